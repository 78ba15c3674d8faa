"""Draw how far the clip turns the gradient: its cosine with the unclipped one, over clip values.

    python bench/clip.py --lang hau
    python bench/clip.py --model FOLDER --lang swa --data msvamp/triples_sw.jsonl --problems 32
    python bench/clip.py --lang hau --runs runs/clip-0.05 runs/clip-0.5   # and what training led to

One batch of the student's completions, before any training. At each clip the gradient of the
divergence on the logits is compared with the one that nothing clips: 1 means that the clip
changes no direction, below 0 a step raises the unclipped divergence. Beside it is the share of the
tokens that the clip touches. With --runs a second panel shows the accuracy before and after the
training of finished COPSD runs of the same model, problems and kind of clip, each at its clip; one
that clips nothing is a level. Writes a .json with the numbers beside the picture.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from copsd import completion_hidden, roll_out
from kernels import chunked_divergence, clip_products, gradient_cosine
from parts.figures import Panel, curves_figure
from parts.files import read_sealed, write_json
from parts.lora import teacher_view
from parts.measure import GREEDY_NAME, read_columns
from parts.model import head_weight
from parts.program import say_error
from parts.prompts import find_language
from parts.recipe import Config
from parts.runs import Run
from parts.setup import Setup, configure, load_setup
from parts.typed import typed

CLIPS = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.6, 3.2)
SUFFIXES = (".png", ".svg")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=Config.model)
    parser.add_argument("--lang", default=Config.lang)
    parser.add_argument("--data", help="a file of training problems; else the model's recipe's")
    parser.add_argument("--problems", type=int, default=32, help="completions of the batch")
    parser.add_argument("--max-new-tokens", type=int, help="else the recipe's")
    parser.add_argument("--temperature", type=float, default=Config.temperature)
    parser.add_argument("--divergence", default=Config.divergence)
    parser.add_argument("--clip-mode", default="entry", choices=["entry", "token"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="finished runs' folders")
    parser.add_argument("--out", type=Path, default=Path("clip.png"), help="the picture")
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError where the work could not begin, or its picture not be written at its end."""
    if arguments.problems < 1:
        raise ValueError(f"--problems is {arguments.problems}; valid: 1 or more")
    if arguments.out.suffix not in SUFFIXES:
        raise ValueError(f"--out is {arguments.out}; valid: a name in {' or '.join(SUFFIXES)}")
    if not arguments.out.parent.is_dir():
        raise ValueError(f"--out is {arguments.out}: there is no such folder")


def read_batch(arguments: argparse.Namespace) -> Setup:
    """Return the model and the problems of the batch."""
    flags = {
        "model": arguments.model,
        "lang": arguments.lang,
        "data": arguments.data,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "divergence": arguments.divergence,
        "seed": arguments.seed,
        "eval_problems": 0,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    setup, _ = load_setup(*configure(given), Console())
    return setup


@torch.no_grad()
def measure(setup: Setup, problems: int, clip_mode: str) -> dict:
    """Return the unclipped divergence, and by clip the cosine and the share of tokens touched."""
    config = setup.config
    asked = setup.train[:problems]
    rollouts = roll_out(setup, asked, seed=config.seed)
    states: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    # As before the first step: both are the base model, and only their prompts differ.
    with teacher_view(setup.lora, "fixed"):
        for problem, rollout in zip(asked, rollouts, strict=True):
            prompts = {"student": rollout.prompt_ids, "teacher": setup.teacher_prompt(problem)}
            for role, prompt in prompts.items():
                found = completion_hidden(setup.model, [prompt], [rollout.completion_ids])
                states[role].append(found)
    joined = (torch.cat(states["student"]), torch.cat(states["teacher"]), head_weight(setup.model))
    options = {"kind": config.divergence, "beta": config.beta, "temperature": config.temperature}
    rows = []
    for clip in CLIPS:
        clipped = {**options, "clip_mode": clip_mode, "clip": clip}
        _, stats = chunked_divergence(*joined, **clipped)
        rows.append(
            {
                "clip": clip,
                "cosine": gradient_cosine(clip_products(*joined, **clipped)),
                "clipped_token_frac": float(stats["clipped_frac"]),
            }
        )
    _, stats = chunked_divergence(*joined, **options)
    return {
        "tokens": len(joined[0]),
        "kl_nats_per_token": stats["kl_N"].mean().item(),
        "teacher_entropy_nats_per_token": stats["teacher_entropy_N"].mean().item(),
        "clips": rows,
    }


def read_accuracies(folders: list[Path], lang: str, *, model: str, clip_mode: str) -> list[dict]:
    """Return the greedy accuracy before and after each run, by its clip; ValueError if it has none.

    A run that clips nothing has the clip None, and comes last. ValueError, too, for a run that the
    curve is not of: of another method, model, kind of clip, or of other problems than the first.
    """
    rows = []
    problems = {}
    for folder in folders:
        record = read_sealed(folder / "config.json")
        config = read_part(record, "config", folder)
        for name, valid in {
            "method": ("copsd",),
            "model": (model,),
            "clip_mode": ("none", clip_mode),
        }.items():
            if config.get(name) not in valid:
                said = f"{folder} is a run whose {name} is {config.get(name)!r}"
                raise ValueError(f"{said}; valid: {', '.join(valid)}")
        identity = read_part(record, "identity", folder)
        problems[folder] = [identity.get(f"{name}_data") for name in ("training", "heldout")]
        if problems[folder] != problems[folders[0]]:
            raise ValueError(f"{folder} is a run on other problems than {folders[0]}")
        clip = typed(config.get("clip"), float, f"{folder}: clip")
        row: dict = {"clip": None if config["clip_mode"] == "none" else clip}
        for when in ("before", "after"):
            stored = Run(folder).read_evaluation(when)
            if stored is None or lang not in stored:
                raise ValueError(f"{folder} has no evaluation in {lang} {when} training")
            row[when] = vars(read_columns(stored)[lang][GREEDY_NAME])
        rows.append(row)
    return sorted(rows, key=lambda row: math.inf if row["clip"] is None else row["clip"])


def read_part(record: dict, name: str, folder: Path) -> dict:
    """Return an object of a run's record; ValueError where it has none of that name."""
    if not isinstance(record.get(name), dict):
        raise ValueError(f"{folder} is no training run's folder: its record has no {name}")
    return record[name]


def accuracy_panel(rows: list[dict]) -> Panel:
    """Return the accuracy after training over the clip, and without training and without a clip."""
    levels = {"without training": rows[0]["before"]}
    if rows[-1]["clip"] is None:
        levels["without a clip"] = rows[-1]["after"]
    curves = {
        name: [(clip, *estimate.values()) for clip in (CLIPS[0], CLIPS[-1])]
        for name, estimate in levels.items()
    }
    trained = [(row["clip"], *row["after"].values()) for row in rows if row["clip"] is not None]
    curves["after training, 95 % interval"] = trained
    return Panel(
        title="after training",
        x_label="clip, nats",
        y_label="greedy accuracy",
        curves=curves,
        log_x=True,
        y_range=(0, 1.02),
    )


def draw(found: dict, title: str, path: Path) -> None:
    """Draw cosine and share of tokens over the clip, on a logarithmic axis; and the accuracies."""
    curves = {
        label: [(row["clip"], row[key], row[key], row[key]) for row in found["clips"]]
        for label, key in (
            ("cosine with the unclipped gradient", "cosine"),
            ("share of tokens the clip touches", "clipped_token_frac"),
        )
    }
    lowest = min(0.0, *(row["cosine"] for row in found["clips"]))
    panel = Panel(
        title,
        "clip, nats",
        "cosine, share",
        curves,
        log_x=True,
        y_range=(lowest - 0.05, 1.02),
    )
    panels = [panel, accuracy_panel(found["runs"])] if found["runs"] else [panel]
    curves_figure(panels, [path])


def table_lines(rows: list[dict]) -> list[str]:
    """Return the numbers by clip as a table; a cosine with a gradient that is 0 is none."""
    lines = [f"{'clip':>8}{'cosine':>10}{'tokens touched':>18}"]
    for row in rows:
        cosine = "-" if math.isnan(row["cosine"]) else f"{row['cosine']:.3f}"
        lines.append(f"{row['clip']:8g}{cosine:>10}{row['clipped_token_frac']:18.3f}")
    if any(math.isnan(row["cosine"]) for row in rows):
        lines.append("-: there is no cosine, as one of the two gradients is 0")
    return lines


def main() -> None:
    """Measure, print, draw."""
    arguments = parse_arguments()
    try:
        check_arguments(arguments)
        runs = read_accuracies(
            arguments.runs,
            find_language(arguments.lang).iso3,
            model=arguments.model,
            clip_mode=arguments.clip_mode,
        )
        setup = read_batch(arguments)
    except (ValueError, OSError) as error:
        say_error(str(error))
        sys.exit(2)
    found = measure(setup, arguments.problems, arguments.clip_mode)
    print(
        f"{arguments.model}, {arguments.lang}, {arguments.divergence}, {arguments.clip_mode} clip, "
        f"temperature {arguments.temperature:g}: {found['tokens']} tokens, unclipped divergence "
        f"{found['kl_nats_per_token']:.3f}, teacher's entropy "
        f"{found['teacher_entropy_nats_per_token']:.3f} nats a token"
    )
    print("\n".join(table_lines(found["clips"])))
    found["runs"] = runs
    title = f"{Path(arguments.model).name}, {arguments.lang}, before training"
    draw(found, title, arguments.out)
    write_json(arguments.out.with_suffix(".json"), {**vars(arguments), "out": "", **found})


if __name__ == "__main__":
    main()
