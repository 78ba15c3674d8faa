"""Train base, GRPO and COPSD at an equal budget of sampled tokens and compare them; or COPSD with one part changed.

`python copsd.py compare` calls this; nothing here is part of either method. Every arm is a run folder that
`copsd.py train` with the settings in its config.json makes again. What the folder of a comparison holds:

    config.json                 the settings; another comparison's folder is refused
    LANG/train, dev, test.jsonl what arms train on, what rates are picked on, and what is reported
    LANG/sweep/METHOD-RATE/     runs of half the budget, in the first language, from which each method's rate is picked
    LANG/ARM-SEED/              a run, and results.json: its evaluations on the test problems
    compare.json                every estimate and test of the tables
    tables.md, figures          what to look at

Estimates are over the test problems, of the mean over seeds: their 95 % intervals say nothing about other seeds, so the
smallest and largest seed stand beside them, and are the bands of the figures.
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

from eval import evaluate
from parts.data import Problem, find_language, hub_training_file, load_problems, split_heldout
from parts.metrics import Estimate, Graded, bootstrap, difference, paired_permutation, pass_at_k
from parts.report import Panel, curves_figure, markdown_table
from parts.runs import Run, read_json, write_json
from parts.sampler import SamplingParams

SWEEP_SEED = 1000  # of the runs that pick a rate; no reported run may have it
CHECKPOINTS = 6  # of a run, at which it is evaluated
KL_PROBLEMS = 64  # at every checkpoint; a KL per token needs fewer problems than an accuracy
LABELS = {"base": "base", "grpo": "GRPO", "copsd": "COPSD"}
PAIRS = (("base", "grpo"), ("base", "copsd"), ("grpo", "copsd"))
ABLATIONS = (  # setting, the values it is tried with, in the order of the table; the recipe's own is the first arm
    ("clip_mode", ("none", "entry", "token")),
    ("divergence", ("forward_kl", "reverse_kl", "jsd")),
    ("teacher", ("fixed", "current", "ema")),
    ("english_problem", (True, False)),
    ("english_solution", (True, False)),
    ("swap_solutions", (False, True)),
)
Results = dict[str, Any]


class Tools(NamedTuple):
    """What a comparison needs of copsd.py, which this file does not import."""

    configure: Callable[[dict[str, Any]], tuple[Any, Path]]
    prepare: Callable[[Any, Path, Console], tuple[Any, Run]]
    loops: dict[str, Callable[[Any, Run, Any], bool]]  # method -> its loop; False: stopped by a signal
    heldout_kl: Callable[[Any, int], Estimate]
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
            self._print(f"step {metrics['step']}, {metrics['progress']:.0%}", min(1.0, metrics["progress"]), last=False)

    def finish(self, said: str, *, earlier: bool = False) -> None:
        """End the arm with what came out of it; `earlier`: an earlier call did the work."""
        self.done += self.size
        self.before += self.size * earlier
        self._print(said, 0.0, last=True)

    def _print(self, said: str, share: float, *, last: bool) -> None:
        self.printed = time.monotonic()
        done = self.done - self.before + share * self.size
        left = (self.printed - self.started) / done * (self.units - self.done - share * self.size) if done else 0.0
        line = f"{self.arm}/{self.arms} {self.title}: {said}" + (f"; {left / 60:.0f} min left" if left > 1 else "")
        end = "\n" if last or not self.console.is_terminal else "\r"
        self.console.print(line.ljust(100 if self.console.is_terminal else 0), end=end, highlight=False, soft_wrap=True)


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
        raise ValueError(f"--seeds is {text!r}; valid: a count of 1 or more, or seeds from 0 as in 0,4,7")
    return seeds


def write_split(tools: Tools, config: Any, folder: Path, dev_count: int) -> dict[str, Path]:
    """Write the training problems in two parts and the test problems, so that no arm can see another split."""
    files = {name: folder / f"{name}.jsonl" for name in ("train", "dev", "test")}
    if all(file.is_file() for file in files.values()):
        return files
    lang = config.lang
    train = load_problems(Path(config.data) if config.data else hub_training_file(lang), language=lang)
    if config.eval_data:
        test = load_problems(Path(config.eval_data), language=lang)[: config.eval_problems]
    else:
        train, test = split_heldout(train, config.eval_problems, 0)
    train, dev = split_heldout(train, dev_count, 0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in (("train", train), ("dev", dev), ("test", test)):
        rows = [
            {"id": p.id, "problem": p.problem_en, "solution": p.solution_en, "answer": p.answer,
             "problem_translated": p.problem, "language": p.language}
            for p in problems
        ]  # fmt: skip
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial = files[name].with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(files[name])
    return files


# ---- Evaluate


def scores(results: list[Graded]) -> dict[str, list[float]]:
    """Return, per problem, what the estimates are made of; of the first attempt where there is one only."""
    return {
        "n": [float(len(r.attempts)) for r in results],
        "correct": [float(sum(a.correct for a in r.attempts)) for r in results],
        "formatted": [float(sum(a.answer is not None for a in r.attempts)) for r in results],
        "tokens": [sum(a.tokens for a in r.attempts) / len(r.attempts) for r in results],
        "tokens_if_right": [float(r.attempts[0].tokens if r.attempts[0].correct else 0) for r in results],
    }


def in_english(problems: list[Problem]) -> list[Problem]:
    """Return the problems that have an English side, posed in English."""
    return [replace(p, problem=p.problem_en, language="eng") for p in problems if p.problem_en]


def evaluate_model(tools: Tools, setup: Any, *, kl: bool, samples: int = 0) -> Results:
    """Return the scores of greedy decoding in both languages, of `samples` completions in the target's, and the KL."""
    ruler = tools.ruler

    def _scores(problems: list[Problem], temperature: float, count: int) -> dict[str, list[float]]:
        params = SamplingParams(ruler.max_new_tokens, temperature, ruler.eval_top_p, seed=0)
        options = {"samples": count, "thinking": ruler.thinking, "max_rows": ruler.sample_rows}
        return scores(evaluate(setup.model, setup.tokenizer, problems, params, **options))

    found: Results = {"greedy": _scores(setup.heldout, 0.0, 1)}
    if english := in_english(setup.heldout):
        found["english"] = _scores(english, 0.0, 1)
    if samples:
        found["sampled"] = _scores(setup.heldout, ruler.eval_temperature, samples)
    if kl:
        # To the teacher that reads everything, whatever taught this arm, so that arms are comparable.
        whole = replace(ruler, english_problem=True, english_solution=True, divergence="forward_kl", teacher="fixed")
        found["kl"] = asdict(tools.heldout_kl(replace(setup, config=whole, heldout=setup.heldout[:KL_PROBLEMS]), 0))
    return found


def run_arm(tools: Tools, arm: Arm, progress: Any, console: Console, *, on_test: bool = True) -> Results:
    """Train an arm from where it stands and evaluate its checkpoints; what is finished is read, not done again."""
    path = arm.folder / "results.json"
    if path.is_file():
        return read_json(path)
    config, folder = tools.configure(arm.settings)
    setup, run = tools.prepare(config, folder, console)
    if arm.name == "base":
        results = {"points": [], "final": evaluate_model(tools, setup, kl=True, samples=config.eval_samples)}
    else:
        try:
            finished = tools.loops[config.method](setup, run, progress)
        except FloatingPointError as error:
            raise ValueError(f"{arm.folder}: {error}") from error
        if not finished:
            raise Stopped
        results = {"points": [], "final": {}}
        steps = {row["step"]: row for row in run.whole_rows("metrics.jsonl")}
        for adapter in sorted((arm.folder / "adapters").glob("step_*"))[0 if on_test else -1 :]:
            for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
                own = setup.lora.sets["current"][name.removeprefix("base_model.model.").removesuffix(".weight")]
                with torch.no_grad():
                    own.copy_(tensor)
            step = int(adapter.name.removeprefix("step_"))
            last = step == max(steps)
            found = evaluate_model(tools, setup, kl=on_test, samples=config.eval_samples if last and on_test else 0)
            seconds = sum(row["time_s"] for row in steps.values() if row["step"] <= step)
            updates = step * (config.inner_epochs if config.method == "grpo" else 1)
            cost = {"step": step, "sampled_tokens": steps[step]["sampled_tokens"], "train_s": seconds}
            results["points"].append({**cost, "updates": updates, **found})
            if last:
                results["final"] = {**cost, "updates": updates, **found}
    write_json(path, results)
    return results


def accuracy(results: Results, part: str = "greedy") -> float:
    """Return the share of right answers of one evaluation."""
    return sum(results[part]["correct"]) / sum(results[part]["n"])


# ---- Compare


def per_problem(metric: str, found: Results) -> tuple[list[float], list[float]]:
    """Return a metric's numerators and denominators, one pair a problem."""
    greedy = found["greedy"]
    ones = [1.0] * len(greedy["n"])
    if metric == "greedy accuracy":
        return greedy["correct"], ones
    if metric == "format rate":
        return greedy["formatted"], ones
    if metric == "accuracy given a box":
        return greedy["correct"], greedy["formatted"]
    if metric == "English greedy accuracy":
        return found["english"]["correct"], [1.0] * len(found["english"]["n"])
    if metric == "mean tokens":
        return greedy["tokens"], ones
    k, sampled = int(metric.removeprefix("pass@")), found["sampled"]
    values = [pass_at_k(int(n), int(c), k) for n, c in zip(sampled["n"], sampled["correct"], strict=True)]
    return values, [1.0] * len(values)


def over_seeds(metric: str, runs: list[Results]) -> dict[str, Any]:
    """Return a metric's estimate over problems of the mean over seeds, and each seed's value."""
    pairs = [per_problem(metric, found) for found in runs]
    above, below = (np.mean([pair[part] for pair in pairs], axis=0).tolist() for part in (0, 1))
    values = [sum(a) / sum(b) if sum(b) else float("nan") for a, b in pairs]
    return {**asdict(bootstrap(above, below)), "by_seed": values}


def metrics_of(found: Results) -> list[str]:
    """Return the metrics that these results have, in the tables' order."""
    samples = int(found["sampled"]["n"][0])
    english = ["English greedy accuracy"] if "english" in found else []
    return ["greedy accuracy", *(f"pass@{k}" for k in sorted({1, samples})), "format rate", "accuracy given a box",
            *english, "mean tokens"]  # fmt: skip


def summarise_language(arms: dict[str, list[Results]], pairs: Any) -> dict[str, Any]:
    """Return every arm's estimates and, for each pair of arms, differences with their intervals and p-values."""
    finals = {name: [run["final"] for run in runs] for name, runs in arms.items()}
    metrics = metrics_of(next(iter(finals.values()))[0])
    summary: dict[str, Any] = {"arms": {}, "pairs": {}}
    for name, runs in finals.items():
        summary["arms"][name] = {metric: over_seeds(metric, runs) for metric in metrics}
        kl = [run["kl"]["value"] for run in runs]
        costs = {key: [run.get(key, 0) for run in runs] for key in ("sampled_tokens", "train_s", "updates")}
        summary["arms"][name]["KL to the teacher, nats/token"] = {"value": float(np.mean(kl)), "by_seed": kl}
        summary["arms"][name] |= costs
    for first, second in pairs:
        tests = {}
        for metric in metrics:
            if metric not in ("accuracy given a box", "mean tokens"):  # the first has no value for some problems
                ends = [[per_problem(metric, run)[0] for run in finals[name]] for name in (first, second)]
                one, other = (np.mean(values, axis=0).tolist() for values in ends)
                tests[metric] = {**asdict(difference(one, other)), "p": paired_permutation(one, other)}
        summary["pairs"][f"{second} - {first}"] = tests
    return summary


def number(estimate: dict[str, Any], digits: int = 3) -> str:
    """Return "0.903 (0.892, 0.920)", the mean over seeds and the ends among them, or just the value of one seed."""
    seeds = estimate["by_seed"]
    ends = f" ({min(seeds):.{digits}f}, {max(seeds):.{digits}f})" if len(seeds) > 1 else ""
    return f"{estimate['value']:.{digits}f}{ends}"


def interval(estimate: dict[str, Any]) -> str:
    """Return "+0.671 [+0.610, +0.732], p < 0.0001"."""
    p_value = f"p {estimate['p']:.4f}" if estimate["p"] >= 0.0001 else "p < 0.0001"
    return f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}], {p_value}"


def arms_table(summaries: dict[str, Any], labels: dict[str, str]) -> str:
    """Return the table of every language's arms: means over seeds, the smallest and the largest seed in parentheses."""
    rows, header = [], []
    for lang, summary in summaries.items():
        for name, found in summary["arms"].items():
            metrics = [metric for metric in found if isinstance(found[metric], dict)]
            header = ["", *metrics, "sampled tokens", "seconds", "updates"]
            cells = [number(found[metric], 1 if metric == "mean tokens" else 3) for metric in metrics]
            costs = [f"{np.mean(found[key]):.0f}" for key in ("sampled_tokens", "train_s", "updates")]
            rows.append([f"{find_language(lang).english}: {labels[name]}", *cells, *costs])
    return markdown_table(header, rows)


def pairs_table(summaries: dict[str, Any], labels: dict[str, str]) -> str:
    """Return the table of differences: 95 % interval over problems and the paired permutation test's p."""
    rows, header = [], []
    for lang, summary in summaries.items():
        for pair, tests in summary["pairs"].items():
            second, first = pair.split(" - ")
            header = ["", *tests]
            rows.append([f"{find_language(lang).english}: {labels[second]} against {labels[first]}",
                         *(interval(test) for test in tests.values())])  # fmt: skip
    return markdown_table(header, rows)


# ---- Draw


def band(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """Return the mean of curves, one a seed, with the smallest and the largest, at points that all of them reach."""
    grid = np.linspace(0, min(curve[-1][0] for curve in curves), CHECKPOINTS + 1)
    lines = np.array([np.interp(grid, [x for x, _ in curve], [value for _, value in curve]) for curve in curves])
    columns = (grid, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0))
    return [(float(x), float(v), float(low), float(high)) for x, v, low, high in zip(*columns, strict=True)]


def over_training(
    arms: dict[str, list[Results]],
    value: Callable[[Results], float],
    *,
    x: str = "sampled_tokens",
    unit: float = 1000.0,
) -> dict[str, Any]:
    """Return a curve for each trained arm, from the base's on: the value of its checkpoints against x in `unit`s."""
    start = (0.0, value(arms["base"][0]["final"]))
    return {
        LABELS[name]: band([[start, *((point[x] / unit, value(point)) for point in run["points"])] for run in runs])
        for name, runs in arms.items()
        if name != "base"
    }


def at_the_end(arms: dict[str, list[Results]], xs: list[int], value: Callable[[Results, int], float]) -> dict[str, Any]:
    """Return a curve for every arm: a value of its last evaluation that depends on x."""
    curves = {}
    for name, runs in arms.items():
        lines = np.array([[value(run["final"], x) for x in xs] for run in runs])
        ends = zip(xs, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0), strict=True)
        curves[LABELS[name]] = [(float(x), float(v), float(low), float(high)) for x, v, low, high in ends]
    return curves


def share(metric: str) -> Callable[[Results], float]:
    """Return the function that gives a metric of one evaluation."""
    return lambda found: float(np.divide(*(np.sum(part) for part in per_problem(metric, found))))


def right_within(found: Results, limit: int) -> float:
    """Return the greedy accuracy if completions had ended, and been right, within `limit` tokens."""
    return float(np.mean([0 < tokens <= limit for tokens in found["greedy"]["tokens_if_right"]]))


def language_panels(arms: dict[str, list[Results]], limit: int) -> list[Panel]:
    """Return the panels of one language's figure."""
    tokens, unit = "sampled tokens, thousands", (0.0, 1.02)
    samples = int(arms["base"][0]["final"]["sampled"]["n"][0])
    limits = [max(1, limit * part // 16) for part in range(1, 17)]
    panels = [
        Panel("Greedy accuracy", tokens, "accuracy", over_training(arms, share("greedy accuracy")),
              y_range=unit),
        Panel("The same against time", "seconds of training", "accuracy",
              over_training(arms, share("greedy accuracy"), x="train_s", unit=1.0), y_range=unit),
        Panel("Format rate", tokens, "share with a box", over_training(arms, share("format rate")),
              y_range=unit),
        Panel("Accuracy given a box", tokens, "accuracy",
              over_training(arms, share("accuracy given a box")), y_range=unit),
        Panel("pass@k after training", "k, attempts", "pass@k",
              at_the_end(arms, list(range(1, samples + 1)), lambda found, k: share(f"pass@{k}")(found)), y_range=unit),
        Panel("Right within a limit", "max new tokens", "greedy accuracy", at_the_end(arms, limits, right_within),
              y_range=unit),
        Panel("KL(teacher, student), unclipped", tokens, "nats per token",
              over_training(arms, lambda found: found["kl"]["value"])),
    ]  # fmt: skip
    if "english" in arms["base"][0]["final"]:
        curves = over_training(arms, share("English greedy accuracy"))
        panels.insert(6, Panel("English: greedy accuracy", tokens, "accuracy", curves, y_range=unit))
    return panels


def draw(found: dict[str, dict[str, list[Results]]], out: Path, limit: int) -> None:
    """Write compare.png and .svg, accuracy of every language, and compare_LANG.png and .svg, all of one."""
    panels = []
    for lang, arms in found.items():
        curves = over_training(arms, share("greedy accuracy"))
        title = f"{find_language(lang).english}: greedy accuracy"
        panels.append(Panel(title, "sampled tokens, thousands", "accuracy", curves, y_range=(0.0, 1.02)))
        files = [out / f"compare_{lang}.{suffix}" for suffix in ("png", "svg")]
        curves_figure(language_panels(arms, limit), files, columns=2)
    curves_figure(panels, [out / f"compare.{suffix}" for suffix in ("png", "svg")], columns=len(panels))


# ---- The two experiments


def ablation_arms(config: Any) -> dict[str, dict[str, Any]]:
    """Return the arms of --ablate: the recipe as it is, and each value of ABLATIONS that is not the recipe's."""
    arms: dict[str, dict[str, Any]] = {"recipe": {}}
    for setting, values in ABLATIONS:
        flags = {value: f"{setting}={value}" for value in values if value != getattr(config, setting)}
        arms |= {flag.replace("_", " "): {setting: value} for value, flag in flags.items()}
    return arms


def compare(options: dict[str, Any], given: dict[str, Any], console: Console, tools: Tools) -> None:
    """Run what is missing of a comparison and write its tables and figures; see the top of the file.

    options  seeds, sweep, dev_problems, ablate, out, lang;  given  settings of every run
    Raises ValueError for bad input before anything is written, Stopped when a signal ended an arm early.
    """
    langs = parse_list(options["lang"], "lang", lambda code: find_language(code).iso3)
    seeds, ablate = parse_seeds(options["seeds"]), options["ablate"]
    factors = parse_list(options["sweep"], "sweep", float)
    if min(factors) <= 0:
        raise ValueError(f"--sweep is {options['sweep']!r}; valid: factors above 0, such as 0.5,1,2")
    if options["dev_problems"] < 1:
        raise ValueError(f"--dev-problems is {options['dev_problems']}; valid: 1 or more")
    methods = ["copsd"] if ablate else ["grpo", "copsd"]
    configs = {(m, lang): tools.configure({**given, "method": m, "lang": lang})[0] for m in methods for lang in langs}
    main = configs["copsd", langs[0]]
    if main.eval_problems < 1:
        raise ValueError(f"--eval-problems is {main.eval_problems}; valid: 1 or more, for arms are compared on them")
    names = f"{Path(main.model).name}-{'-'.join(langs)}"
    out = Path(options["out"] or f"runs/{'ablate' if ablate else 'compare'}-{names}")
    settings = {name: str(value) for name, value in options.items() if name != "out"}
    for method in methods:
        recipe = asdict(configs[method, langs[0]]).items()
        settings |= {f"{method} {name}": value for name, value in recipe if name not in ("method", "out")}
    root, tools = Run(out), tools._replace(ruler=main)
    root.check(settings)
    root.create(settings, {})

    # Problems, the base, and from its completions' mean length what a budget of --steps is in tokens.
    arms_of = list(ablation_arms(main)) if ablate else methods
    sweeps = 0 if ablate else len(factors) * len(methods)
    count = len(langs) * (1 + len(arms_of) * len(seeds)) + sweeps
    progress = Progress(console, count, len(langs) * (0.1 + len(arms_of) * len(seeds)) + sweeps / 2)
    found: dict[str, dict[str, list[Results]]] = {}
    common: dict[str, dict[str, Any]] = {}
    rates: dict[str, Any] = {}
    for lang in langs:
        files = write_split(tools, configs["copsd", lang], out / lang, options["dev_problems"])
        common[lang] = {**given, "lang": lang, "data": str(files["train"]), "eval_data": str(files["test"]),
                        "max_new_tokens": main.max_new_tokens}  # fmt: skip
        arm = Arm("base", out / lang / "base", {**common[lang], "out": str(out / lang / "base"), "seed": 0})
        found[lang] = {"base": [timed(tools, arm, f"{lang}, base", 0.1, progress)]}
        length = float(np.mean(found[lang]["base"][0]["final"]["sampled"]["tokens"]))
        budget = main.token_budget or int(main.steps * main.batch_size * length)
        common[lang] |= {"token_budget": budget, "save_every": max(1, main.steps // CHECKPOINTS)}
        if lang == langs[0] and not ablate:
            shared = {**common[lang], "eval_data": str(files["dev"]), "eval_problems": options["dev_problems"],
                      "token_budget": budget // 2, "seed": SWEEP_SEED}  # fmt: skip
            for method in methods:
                rates[method] = sweep(tools, shared, configs[method, lang].lr, method, factors, out, progress)
        for name in arms_of:
            flags = ablation_arms(main)[name] if ablate else {"method": name, "lr": rates[name]["picked"]}
            found[lang][name] = []
            for seed in seeds:
                folder = out / lang / f"{name.replace(' ', '-')}-{seed}"
                arm = Arm(name, folder, {**common[lang], **flags, "seed": seed, "out": str(folder)})
                title = f"{lang}, {LABELS.get(name, name)}, seed {seed}"
                found[lang][name].append(timed(tools, arm, title, 1.0, progress))

    pairs = [("recipe", name) for name in arms_of[1:]] if ablate else PAIRS
    summaries = {lang: summarise_language(arms, pairs) for lang, arms in found.items()}
    labels = {**{name: name for name in arms_of}, **LABELS}
    tables = [arms_table(summaries, labels), pairs_table(summaries, labels)]
    if not ablate:
        lines = [
            [LABELS[method], *(f"{a:.3f}" for a in rate["accuracy"].values()), f"{rate['picked']:g}"]
            for method, rate in rates.items()
        ]
        header = ["dev accuracy at lr times", *(f"{factor:g}" for factor in factors), "picked lr"]
        tables.append(markdown_table(header, lines))
        draw(found, out, main.max_new_tokens)
    write_json(out / "compare.json", {"languages": summaries, "rates": rates})
    (out / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    console.print("\n\n".join(tables), highlight=False, soft_wrap=True)
    console.print(f"{out}: compare.json, tables.md" + ("" if ablate else ", compare*.png and .svg"), highlight=False)


def timed(tools: Tools, arm: Arm, title: str, size: float, progress: Progress, **options: Any) -> Results:
    """Run an arm under a progress line that ends with its accuracy."""
    progress.start(title, size)
    earlier = (arm.folder / "results.json").is_file()
    results = run_arm(tools, arm, progress, Console(quiet=True), **options)
    seconds = results["final"].get("train_s", 0.0)
    progress.finish(f"greedy accuracy {accuracy(results['final']):.3f}, trained {seconds:.0f} s", earlier=earlier)
    return results


def sweep(
    tools: Tools, shared: dict[str, Any], lr: float, method: str, factors: list[float], out: Path, progress: Progress
) -> dict[str, Any]:
    """Train a method at each factor of its rate and return the rate with the best accuracy on the development split."""
    accuracies = {}
    for factor in factors:
        folder = out / shared["lang"] / "sweep" / f"{method}-{factor * lr:g}"
        arm = Arm(method, folder, {**shared, "method": method, "lr": factor * lr, "out": str(folder)})
        title = f"{shared['lang']}, sweep, {LABELS[method]}, lr {factor * lr:g}"
        accuracies[factor * lr] = accuracy(timed(tools, arm, title, 0.5, progress, on_test=False)["final"])
    picked = max(sorted(accuracies), key=lambda rate: accuracies[rate])  # the lowest of equals
    return {"picked": picked, "accuracy": {f"{rate:g}": value for rate, value in accuracies.items()}}
