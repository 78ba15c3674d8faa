"""Train base, GRPO and COPSD at an equal budget of sampled tokens and compare them; or COPSD with one part changed.

`python copsd.py compare` calls this; nothing here is part of either method. Every arm is a run folder that
`copsd.py train` with the settings in its config.json makes again. What the folder of a comparison holds:

    config.json                 the settings; another comparison's folder is refused
    LANG/train, dev, test.jsonl what arms train on, what rates are picked on, and what is reported
    LANG/sweep/METHOD-RATE/     runs of half the budget, in the first language, from which each method's rate is picked
    LANG/ARM-SEED/              a run, and results.json: its evaluations on the test problems
    compare.json                every estimate and test of the tables
    tables.md, figures          what to look at (bench/outcome.py)
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from bench.outcome import LABELS, Results, draw, scores, write_outcome
from eval import evaluate
from parts.data import Problem, find_language, hub_training_file, load_problems, split_heldout
from parts.metrics import Estimate
from parts.runs import Run, read_json, write_json
from parts.sampler import SamplingParams

SWEEP_SEED = 1000  # of the runs that pick a rate; no reported run may have it
CHECKPOINTS = 6  # of a run, at which it is evaluated
KL_PROBLEMS = 64  # at every checkpoint; a KL per token needs fewer problems than an accuracy
PAIRS = (("base", "grpo"), ("base", "copsd"), ("grpo", "copsd"))
ABLATIONS = (  # setting, the values it is tried with, in the order of the table; the recipe's own is the first arm
    ("clip_mode", ("none", "entry", "token")),
    ("divergence", ("forward_kl", "reverse_kl", "jsd")),
    ("teacher", ("fixed", "current", "ema")),
    ("english_problem", (True, False)),
    ("english_solution", (True, False)),
    ("swap_solutions", (False, True)),
)


class Tools(NamedTuple):
    """What a comparison needs of copsd.py, which this file does not import."""

    configure: Callable[[dict[str, Any]], tuple[Any, Path]]
    prepare: Callable[[Any, Path, Console], tuple[Any, Run]]
    loops: dict[
        str, Callable[[Any, Run, Any], bool]
    ]  # method -> its loop; False: stopped by a signal
    heldout_kl: Callable[[Any, int], Estimate]
    pose_in_english: Callable[[list[Problem], float], list[Problem]]
    ruler: Any = None  # settings: those of COPSD's recipe that every arm, whatever its own, is evaluated with


class Stopped(Exception):
    """A signal stopped the arm that was training; its state is saved."""


@dataclass(frozen=True)
class Arm:
    """One run: its name in tables, its folder, and the settings it is started with."""

    name: str
    folder: Path
    settings: dict[str, Any]


class Progress:
    """Say which arm is being trained, how far it is, and how long all the rest will take.

    It stands where a loop expects a StepView. Time left is elapsed time by share of the budget done, evaluations too.
    """

    EVERY_S = 60.0

    def __init__(self, console: Console, arms: int, units: float):
        self.console, self.arms, self.units = console, arms, units  # units: runs of a whole budget
        self.arm, self.done, self.title, self.size = 0, 0.0, "", 0.0
        self.started = self.printed = time.monotonic()
        self.before = 0.0  # units that were finished by an earlier call

    def start(self, title: str, size: float) -> None:
        """Begin the next arm, of a budget of `size` units."""
        self.arm, self.title, self.size = self.arm + 1, title, size

    def show(self, metrics: dict[str, Any]) -> None:
        """Take a step's metrics, as StepView does."""
        if time.monotonic() - self.printed > (0.5 if self.console.is_terminal else self.EVERY_S):
            self._print(
                f"step {metrics['step']}, {metrics['progress']:.0%}",
                min(1.0, metrics["progress"]),
                last=False,
            )

    def finish(self, said: str, *, earlier: bool = False) -> None:
        """End the arm with what came out of it; `earlier`: an earlier call did the work."""
        self.done += self.size
        self.before += self.size * earlier
        self._print(said, 0.0, last=True)

    def _print(self, said: str, share: float, *, last: bool) -> None:
        self.printed = time.monotonic()
        done = self.done - self.before + share * self.size
        left = (
            (self.printed - self.started) / done * (self.units - self.done - share * self.size)
            if done
            else 0.0
        )
        line = f"{self.arm}/{self.arms} {self.title}: {said}" + (
            f"; {left / 60:.0f} min left" if left > 1 else ""
        )
        end = "\n" if last or not self.console.is_terminal else "\r"
        self.console.print(
            line.ljust(100 if self.console.is_terminal else 0),
            end=end,
            highlight=False,
            soft_wrap=True,
        )


def parse_list(text: str, what: str, convert: Callable[[str], Any]) -> list[Any]:
    """Return the converted parts of "a,b,c"; ValueError for one that cannot be read and for a repeated one."""
    try:
        values = [convert(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{what} is {text!r}: {error}") from error
    if len(set(values)) < len(values):
        raise ValueError(f"--{what} is {text!r}, which names one of them twice")
    return values


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "3", which is 0, 1 and 2, or of "0,4,7"."""
    seeds = parse_list(text, "seeds", int)
    seeds = list(range(seeds[0])) if len(seeds) == 1 and "," not in text else seeds
    if not seeds or min(seeds) < 0 or SWEEP_SEED in seeds:
        raise ValueError(
            f"--seeds is {text!r}; valid: a count of 1 or more, or seeds from 0 as in 0,4,7"
        )
    return seeds


def write_split(config: Any, folder: Path, dev_count: int) -> dict[str, Path]:
    """Write the training problems in two parts and the test problems, so that no arm can see another split."""
    files = {name: folder / f"{name}.jsonl" for name in ("train", "dev", "test")}
    if all(file.is_file() for file in files.values()):
        return files
    lang = config.lang
    train = load_problems(
        Path(config.data) if config.data else hub_training_file(lang), language=lang
    )
    if config.eval_data:
        test = load_problems(Path(config.eval_data), language=lang)[: config.eval_problems]
    else:
        train, test = split_heldout(train, config.eval_problems, 0)
    train, dev = split_heldout(train, dev_count, 0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train), ("dev", dev), ("test", test)):
        rows = [
            {
                "id": p.id,
                "problem": p.problem_en,
                "solution": p.solution_en,
                "answer": p.answer,
                "problem_translated": p.problem,
                "language": p.language,
            }
            for p in problems
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial = files[name].with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(files[name])
    return files


# ---- Evaluate


def evaluate_model(tools: Tools, setup: Any, *, kl: bool, samples: int = 0) -> Results:
    """Return the scores of greedy decoding in both languages, of `samples` completions in the target's, and the KL."""
    ruler = tools.ruler

    def _scores(problems: list[Problem], temperature: float, count: int) -> dict[str, list[float]]:
        params = SamplingParams(ruler.max_new_tokens, temperature, ruler.eval_top_p, seed=0)
        options = {"samples": count, "thinking": ruler.thinking, "max_rows": ruler.sample_rows}
        return scores(evaluate(setup.model, setup.tokenizer, problems, params, **options))

    found: Results = {"greedy": _scores(setup.heldout, 0.0, 1)}
    if english := tools.pose_in_english([p for p in setup.heldout if p.problem_en], 1.0):
        found["english"] = _scores(english, 0.0, 1)
    if samples:
        found["sampled"] = _scores(setup.heldout, ruler.eval_temperature, samples)
    if kl:
        # To the teacher that reads everything, whatever taught this arm, so that arms are comparable.
        whole = replace(
            ruler,
            english_problem=True,
            english_solution=True,
            divergence="forward_kl",
            teacher="fixed",
        )
        found["kl"] = asdict(
            tools.heldout_kl(replace(setup, config=whole, heldout=setup.heldout[:KL_PROBLEMS]), 0)
        )
    return found


@torch.no_grad()
def load_checkpoint(setup: Any, adapter: Path) -> None:
    """Put a saved adapter in the place of the one that was trained."""
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        setup.lora.sets["current"][
            name.removeprefix("base_model.model.").removesuffix(".weight")
        ].copy_(tensor)


def run_arm(
    tools: Tools, arm: Arm, progress: Any, console: Console, *, on_test: bool = True
) -> Results:
    """Train an arm from where it stands and evaluate its checkpoints; what is finished is read, not done again."""
    path = arm.folder / "results.json"
    if path.is_file():
        return read_json(path)
    config, folder = tools.configure(arm.settings)
    setup, run = tools.prepare(config, folder, console)
    if arm.name == "base":
        results = {
            "points": [],
            "final": evaluate_model(tools, setup, kl=True, samples=config.eval_samples),
        }
    else:
        try:
            finished = tools.loops[config.method](setup, run, progress)
        except FloatingPointError as error:
            raise ValueError(f"{arm.folder}: {error}") from error
        if not finished:
            raise Stopped
        points = []
        steps = {row["step"]: row for row in run.whole_rows("metrics.jsonl")}
        for adapter in sorted((arm.folder / "adapters").glob("step_*"))[0 if on_test else -1 :]:
            load_checkpoint(setup, adapter)
            step = int(adapter.name.removeprefix("step_"))
            last = step == max(steps)
            found = evaluate_model(
                tools, setup, kl=on_test, samples=config.eval_samples if last and on_test else 0
            )
            seconds = sum(row["time_s"] for row in steps.values() if row["step"] <= step)
            updates = step * (config.inner_epochs if config.method == "grpo" else 1)
            cost = {
                "step": step,
                "sampled_tokens": steps[step]["sampled_tokens"],
                "train_s": seconds,
            }
            points.append({**cost, "updates": updates, **found})
        results = {"points": points, "final": points[-1]}
    write_json(path, results)
    return results


def accuracy(results: Results, part: str = "greedy") -> float:
    """Return the share of right answers of one evaluation."""
    return sum(results[part]["correct"]) / sum(results[part]["n"])


# ---- The two experiments


def ablation_arms(config: Any) -> dict[str, dict[str, Any]]:
    """Return the arms of --ablate: the recipe as it is, and each value of ABLATIONS that is not the recipe's."""
    arms: dict[str, dict[str, Any]] = {"recipe": {}}
    for setting, values in ABLATIONS:
        flags = {
            value: f"{setting}={value}" for value in values if value != getattr(config, setting)
        }
        arms |= {flag.replace("_", " "): {setting: value} for value, flag in flags.items()}
    return arms


def read_options(
    options: dict[str, Any], given: dict[str, Any], tools: Tools
) -> tuple[list[str], list[int], list[float], dict[tuple[str, str], Any]]:
    """Return languages, seeds, the sweep's factors, and each (method, language)'s settings; ValueError: bad input."""
    langs = parse_list(options["lang"], "lang", lambda code: find_language(code).iso3)
    seeds = parse_seeds(options["seeds"])
    factors = parse_list(options["sweep"], "sweep", float)
    if min(factors) <= 0:
        raise ValueError(
            f"--sweep is {options['sweep']!r}; valid: factors above 0, such as 0.5,1,2"
        )
    if options["dev_problems"] < 1:
        raise ValueError(f"--dev-problems is {options['dev_problems']}; valid: 1 or more")
    methods = ["copsd"] if options["ablate"] else ["grpo", "copsd"]
    configs = {
        (m, lang): tools.configure({**given, "method": m, "lang": lang})[0]
        for m in methods
        for lang in langs
    }
    return langs, seeds, factors, configs


def compare(options: dict[str, Any], given: dict[str, Any], console: Console, tools: Tools) -> None:
    """Run what is missing of a comparison and write its tables and figures; see the top of the file.

    options  seeds, sweep, dev_problems, ablate, out, lang;  given  settings of every run
    Raises ValueError for bad input before anything is written, Stopped when a signal ended an arm early.
    """
    langs, seeds, factors, configs = read_options(options, given, tools)
    methods, ablate = list(dict.fromkeys(method for method, _ in configs)), options["ablate"]
    main = configs["copsd", langs[0]]
    if main.eval_problems < 1:
        raise ValueError(
            f"--eval-problems is {main.eval_problems}; valid: 1 or more, for arms are compared on them"
        )
    names = f"{Path(main.model).name}-{'-'.join(langs)}"
    out = Path(options["out"] or f"runs/{'ablate' if ablate else 'compare'}-{names}")
    settings = {name: str(value) for name, value in options.items() if name != "out"}
    for method in methods:
        recipe = asdict(configs[method, langs[0]]).items()
        settings |= {
            f"{method} {name}": value for name, value in recipe if name not in ("method", "out")
        }
    root, tools = Run(out), tools._replace(ruler=main)
    root.check(settings)
    root.create(settings, {})

    # Problems, the base, and from its completions' mean length what a budget of --steps is in tokens.
    variants = ablation_arms(main) if ablate else {}
    arms_of = list(variants) if ablate else methods
    sweeps = 0 if ablate else len(factors) * len(methods)
    count = len(langs) * (1 + len(arms_of) * len(seeds)) + sweeps
    progress = Progress(console, count, len(langs) * (0.1 + len(arms_of) * len(seeds)) + sweeps / 2)
    found: dict[str, dict[str, list[Results]]] = {}
    rates: dict[str, Any] = {}
    for lang in langs:
        files = write_split(configs["copsd", lang], out / lang, options["dev_problems"])
        common = {
            **given,
            "lang": lang,
            "data": str(files["train"]),
            "eval_data": str(files["test"]),
            "max_new_tokens": main.max_new_tokens,
        }
        arm = Arm(
            "base", out / lang / "base", {**common, "out": str(out / lang / "base"), "seed": 0}
        )
        found[lang] = {"base": [timed(tools, arm, f"{lang}, base", 0.1, progress)]}
        length = float(np.mean(found[lang]["base"][0]["final"]["sampled"]["tokens"]))
        budget = main.token_budget or int(main.steps * main.batch_size * length)
        common |= {"token_budget": budget, "save_every": max(1, main.steps // CHECKPOINTS)}
        if lang == langs[0] and not ablate:
            shared = {
                **common,
                "eval_data": str(files["dev"]),
                "eval_problems": options["dev_problems"],
                "token_budget": budget // 2,
                "seed": SWEEP_SEED,
            }
            for method in methods:
                rates[method] = sweep(
                    tools, shared, configs[method, lang].lr, method, factors, out, progress
                )
        for name in arms_of:
            flags = variants[name] if ablate else {"method": name, "lr": rates[name]["picked"]}
            found[lang][name] = []
            for seed in seeds:
                folder = out / lang / f"{name.replace(' ', '-')}-{seed}"
                arm = Arm(name, folder, {**common, **flags, "seed": seed, "out": str(folder)})
                title = f"{lang}, {LABELS.get(name, name)}, seed {seed}"
                found[lang][name].append(timed(tools, arm, title, 1.0, progress))

    labels = {**{name: name for name in arms_of}, **LABELS}
    pairs = [("recipe", name) for name in arms_of[1:]] if ablate else PAIRS
    tables = write_outcome(out, found, pairs, labels, rates)
    if not ablate:
        draw(found, out, main.max_new_tokens)
    console.print("\n\n".join(tables), highlight=False, soft_wrap=True)
    console.print(
        f"{out}: compare.json, tables.md" + ("" if ablate else ", compare*.png and .svg"),
        highlight=False,
    )


def timed(
    tools: Tools, arm: Arm, title: str, size: float, progress: Progress, **options: Any
) -> Results:
    """Run an arm under a progress line that ends with its accuracy."""
    progress.start(title, size)
    earlier = (arm.folder / "results.json").is_file()
    results = run_arm(tools, arm, progress, Console(quiet=True), **options)
    seconds = results["final"].get("train_s", 0.0)
    progress.finish(
        f"greedy accuracy {accuracy(results['final']):.3f}, trained {seconds:.0f} s",
        earlier=earlier,
    )
    return results


def sweep(
    tools: Tools,
    shared: dict[str, Any],
    lr: float,
    method: str,
    factors: list[float],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train a method at each factor of its rate and return the rate with the best accuracy on the development split."""
    accuracies = {}
    for factor in factors:
        folder = out / shared["lang"] / "sweep" / f"{method}-{factor * lr:g}"
        arm = Arm(
            method, folder, {**shared, "method": method, "lr": factor * lr, "out": str(folder)}
        )
        title = f"{shared['lang']}, sweep, {LABELS[method]}, lr {factor * lr:g}"
        accuracies[factor * lr] = accuracy(
            timed(tools, arm, title, 0.5, progress, on_test=False)["final"]
        )
    picked = max(sorted(accuracies), key=lambda rate: accuracies[rate])  # the lowest of equals
    return {
        "picked": picked,
        "factors": factors,
        "accuracy": {f"{rate:g}": value for rate, value in accuracies.items()},
    }
