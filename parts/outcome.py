"""What comes out of an experiment (compare.py): estimates, tests, tables and figures.

Estimates are over the test problems, of the mean over seeds. Their 95 % intervals say nothing about
other seeds, so the smallest and the largest seed stand beside them, and are the bands of the
figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parts.figures import Panel, curves_figure
from parts.files import write_json, write_text
from parts.metrics import Estimate, Ratio, bootstrap, difference, paired_permutation
from parts.prompts import find_language
from parts.report import markdown_table
from parts.view import cell

POINTS = 7  # of a curve over training
KL_TITLE = "KL to the teacher, nats/token"
COSTS = {"sampled_tokens": "sampled tokens", "train_s": "seconds", "updates": "updates"}
LANGUAGE_METRICS = ("in the problem's language", "in English")  # of greedy attempts
# A paired test is made on these; the others have no value for some problems, or are no success.
TESTED = ("greedy accuracy", "pass@", "format rate", "English greedy accuracy")

# Of one arm, as compare.run_arm writes them: {"points": [measured, ...], "final": measured}. What
# is measured holds ratios by name for each kind of attempt, the KL's ratio, and what it has cost so
# far.
Results = dict[str, Any]
Measured = dict[str, Any]
Arms = Mapping[str, list[Results]]  # by arm, the base first: its runs, one a seed
Curve = list[tuple[float, float, float, float]]  # x, value, low, high


@dataclass(frozen=True)
class Sweep:
    """How an arm's learning rate was picked."""

    factors: list[float]  # of the recipe's rate
    accuracies: dict[float, float]  # by learning rate, on the development problems
    picked: float

    @property
    def at_edge(self) -> bool:
        """Say whether a better rate may lie beyond those that were tried."""
        return self.picked in (min(self.accuracies), max(self.accuracies))


@dataclass(frozen=True)
class Experiment:
    """The results of every arm, and which arms are tested against which."""

    name: str
    arms: dict[str, Arms]  # by language
    pairs: list[tuple[str, str]]
    sweep: dict[str, Sweep]  # by arm, {} where rates were not picked
    length_limit: int  # of a completion, in tokens
    titles: Mapping[str, str] = field(default_factory=dict)  # of arms; the others show their name
    evidence: Mapping[str, str] = field(default_factory=dict)  # for what arms do, in a column
    # By language, the arms once more at equal seconds. Where there are some, every table is in
    # full: an arm has a row with all intervals, the language it answers in, and more of pass@k.
    equal_seconds: Mapping[str, Arms] = field(default_factory=dict)

    def title(self, name: str) -> str:
        """Return what an arm is called in tables and figures."""
        return self.titles.get(name, name)


def accuracy(measured: Measured) -> float:
    """Return the greedy accuracy."""
    return share(measured, "greedy accuracy")


def share(measured: Measured, metric: str) -> float:
    """Return a metric's value over all problems; nan where nothing counts in it."""
    above, below = ratio_of(measured, metric)
    return float(sum(above) / sum(below)) if sum(below) else float("nan")


def ratio_of(measured: Measured, metric: str) -> Ratio:
    """Return a metric's numerators and denominators, one pair a problem."""
    above, below = _stored_ratio(measured, metric)
    # A file of results has null for nan, such as the KL of a model whose logits overflowed.
    return [math.nan if number is None else number for number in above], below


def _stored_ratio(measured: Measured, metric: str) -> Ratio:
    if metric == "greedy accuracy":
        return measured["greedy"]["pass@1"]
    if metric == "English greedy accuracy":
        return measured["english"]["pass@1"]
    if metric == KL_TITLE:
        return measured["kl"]
    if metric.startswith("pass@"):
        return measured["sampled"][metric]
    return measured["greedy"][metric]


def metrics_of(measured: Measured, *, in_full: bool = False) -> list[str]:
    """Return the metrics that the tables show, in their order."""
    english = ["English greedy accuracy"] if "english" in measured else []
    samples = _samples(measured)
    ks = {1, samples}
    if in_full:
        ks |= {2**power for power in range(samples.bit_length())}
    return [
        "greedy accuracy",
        *(f"pass@{k}" for k in sorted(ks)),
        "format rate",
        "accuracy given a box",
        *(LANGUAGE_METRICS if in_full else []),
        *english,
        "mean tokens",
    ]


def summarise_language(
    arms: Arms, pairs: Sequence[tuple[str, str]], *, in_full: bool = False
) -> dict[str, Any]:
    """Return every arm's estimates and, for each pair of arms, differences with their p-values."""
    finals = {name: [run["final"] for run in runs] for name, runs in arms.items()}
    metrics = metrics_of(next(iter(finals.values()))[0], in_full=in_full)
    summary: dict[str, Any] = {"arms": {}, "pairs": {}}
    for name, runs in finals.items():
        found = {metric: over_seeds(metric, runs) for metric in metrics}
        kl = [share(run, KL_TITLE) for run in runs]
        found[KL_TITLE] = {"value": float(np.mean(kl)), "by_seed": kl}
        costs = {key: [run.get(key, 0) for run in runs] for key in COSTS}
        summary["arms"][name] = found | costs
    for first, second in pairs:
        summary["pairs"][f"{second} - {first}"] = {
            metric: compare_arms(metric, finals[first], finals[second])
            for metric in metrics
            if metric.startswith(TESTED)
        }
    return summary


def over_seeds(metric: str, runs: list[Measured]) -> dict[str, Any]:
    """Return a metric's estimate over problems of the mean over seeds, and each seed's value."""
    above, below = _mean_over_seeds(metric, runs)
    by_seed = [share(run, metric) for run in runs]
    return {**asdict(bootstrap(above, below)), "by_seed": by_seed}


def compare_arms(metric: str, first: list[Measured], second: list[Measured]) -> dict[str, float]:
    """Return second - first with its interval, and p of the paired permutation test."""
    one, _ = _mean_over_seeds(metric, first)
    other, _ = _mean_over_seeds(metric, second)
    return {**asdict(difference(one, other)), "p": paired_permutation(one, other)}


def tables(experiment: Experiment) -> list[str]:
    """Return the tables in Markdown: all arms, their differences; a comparison has two more.

    In full: all arms at equal sampled tokens, all arms at equal seconds, differences, the sweep.
    """
    if experiment.equal_seconds:
        found = [
            full_table(experiment, experiment.arms, "at equal sampled tokens"),
            full_table(experiment, experiment.equal_seconds, "at equal seconds"),
            pairs_table(experiment),
        ]
    else:
        found = [arms_table(experiment), pairs_table(experiment)]
        if experiment.sweep:
            found = [summary_table(experiment), *found]
    if experiment.sweep:
        found.append(sweep_table(experiment))
        found += edge_note(experiment)
    return found


def summary_table(experiment: Experiment) -> str:
    """Return the greedy accuracy of every arm, a row a language, with its 95 % interval."""
    rows = []
    names: list[str] = []
    for lang, arms in experiment.arms.items():
        names = list(arms)
        cells = []
        for runs in arms.values():
            ratio = _mean_over_seeds("greedy accuracy", [run["final"] for run in runs])
            cells.append(cell("greedy accuracy", bootstrap(*ratio)))
        rows.append([find_language(lang).english, *cells])
    return markdown_table(["greedy accuracy", *map(experiment.title, names)], rows)


def arms_table(experiment: Experiment) -> str:
    """Return every language's arms: means over seeds, smallest and largest seed in parentheses."""
    rows = []
    header: list[str] = []
    for lang, arms in experiment.arms.items():
        for name, found in summarise_language(arms, [])["arms"].items():
            metrics = [metric for metric in found if metric not in COSTS]
            header = ["", *metrics, *COSTS.values()]
            cells = [_seeds_cell(metric, found[metric]) for metric in metrics]
            costs = [f"{np.mean(found[key]):.0f}" for key in COSTS]
            title = f"{find_language(lang).english}: {experiment.title(name)}"
            rows.append([title, *cells, *costs])
    return markdown_table(*_varying(header, rows))


def full_table(experiment: Experiment, by_language: Mapping[str, Arms], what: str) -> str:
    """Return every language's arms with 95 % intervals over problems, and the ends of the seeds.

    what  "at equal seconds", and so on: the head of the first column
    """
    rows = []
    header: list[str] = []
    for lang, arms in by_language.items():
        for name, found in summarise_language(arms, [], in_full=True)["arms"].items():
            metrics = [metric for metric in found if metric not in (*COSTS, KL_TITLE)]
            header = [what, "evidence", "seeds", *metrics, KL_TITLE, *COSTS.values()]
            title = f"{find_language(lang).english}: {experiment.title(name)}"
            seeds = [f"{value:.3f}" for value in found["greedy accuracy"]["by_seed"]]
            ends = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else "-"
            cells = []
            for metric in metrics:
                numbers = found[metric]
                estimate = Estimate(numbers["value"], numbers["low"], numbers["high"])
                cells.append(cell(metric, estimate))
            kl = f"{found[KL_TITLE]['value']:.3f}"
            costs = [f"{np.mean(found[key]):.0f}" for key in COSTS]
            evidence = experiment.evidence.get(name) or "-"
            rows.append([title, evidence, ends, *cells, kl, *costs])
    return markdown_table(header, rows)  # two tables to lay side by side: all columns stay


def pairs_table(experiment: Experiment) -> str:
    """Return the differences between arms: 95 % interval over problems, p of the paired test."""
    rows = []
    header: list[str] = []
    for lang, arms in experiment.arms.items():
        in_full = bool(experiment.equal_seconds)
        summary = summarise_language(arms, experiment.pairs, in_full=in_full)
        for pair, tests in summary["pairs"].items():
            second, first = map(experiment.title, pair.split(" - "))
            header = ["", *tests]
            title = f"{find_language(lang).english}: {second} against {first}"
            rows.append([title, *(_difference_cell(test) for test in tests.values())])
    return markdown_table(*_varying(header, rows))


def sweep_table(experiment: Experiment) -> str:
    """Return each arm's accuracy on the development problems by learning rate, and the pick."""
    factors = next(iter(experiment.sweep.values())).factors
    header = ["dev accuracy at lr times", *(f"{factor:g}" for factor in factors), "picked lr"]
    rows = []
    for name, found in experiment.sweep.items():
        accuracies = [f"{accuracy:.3f}" for accuracy in found.accuracies.values()]
        rows.append([experiment.title(name), *accuracies, f"{found.picked:g}"])
    return markdown_table(header, rows)


def edge_note(experiment: Experiment) -> list[str]:
    """Return a sentence that names the arms whose rate stands at the sweep's edge, [] if none."""
    names = [experiment.title(name) for name, found in experiment.sweep.items() if found.at_edge]
    if not names:
        return []
    return [f"At the edge of the sweep, so that a better rate may lie beyond: {', '.join(names)}."]


def write_experiment(experiment: Experiment, out: Path, results: Path | None) -> list[Path]:
    """Write compare.json, RESULTS.md and the figures; return the files.

    results  another Markdown file, whose section for this experiment is written anew; the figures
             go beside it, too
    """
    in_full = bool(experiment.equal_seconds)
    summaries = {
        lang: summarise_language(arms, experiment.pairs, in_full=in_full)
        for lang, arms in experiment.arms.items()
    }
    sweep = {name: asdict(found) for name, found in experiment.sweep.items()}
    content: dict[str, Any] = {"languages": summaries, "sweep": sweep}
    if in_full:
        content["at equal seconds"] = {
            lang: summarise_language(arms, experiment.pairs, in_full=True)
            for lang, arms in experiment.equal_seconds.items()
        }
    write_json(out / "compare.json", content)
    files = [out / "compare.json"]
    for file in (out / "RESULTS.md", *([results] if results else [])):
        figures = figures_of(experiment)
        for name, panels in figures.items():
            # One picture holds a panel a language in a row; the others are two panels wide.
            columns = len(panels) if name == experiment.name else 2
            pictures = [file.with_name(f"{name}.{suffix}") for suffix in ("png", "svg")]
            curves_figure(panels, pictures[:1] if file == results else pictures, columns=columns)
            files += pictures[:1]
        text = "\n\n".join(
            [
                *tables(experiment),
                *(f"![{name.replace('_', ', ')}]({name}.png)" for name in figures),
            ]
        )
        write_section(file, experiment.name, text)
        files.append(file)
    return files


def write_section(file: Path, name: str, text: str) -> None:
    """Replace the section of that name in a Markdown file, or add it at the end.

    A section stands between two comments, so that what a person wrote around it stays.
    """
    begin = f"<!-- begin {name}: written by compare.py -->"
    end = f"<!-- end {name} -->"
    whole = file.read_text(encoding="utf-8") if file.is_file() else ""
    section = f"{begin}\n\n{text}\n\n{end}"
    before, found, rest = whole.partition(begin)
    if found:
        _, ended, after = rest.partition(end)
        if not ended:
            raise ValueError(f"{file} has {begin!r} without {end!r}")
        write_text(file, before + section + after)
    else:
        write_text(file, (whole.rstrip() + "\n\n" if whole else "") + section + "\n")


def figures_of(experiment: Experiment) -> dict[str, list[Panel]]:
    """Return the panels of each figure by name; an ablation has none."""
    if not experiment.sweep:
        return {}
    overview = []
    figures = {experiment.name: overview}
    for lang, arms in experiment.arms.items():
        titled = {experiment.title(name): runs for name, runs in arms.items()}
        title = f"{find_language(lang).english}: greedy accuracy"
        overview.append(_training_panel(titled, title, "accuracy", "greedy accuracy"))
        figures[f"{experiment.name}_{lang}"] = language_panels(titled, experiment.length_limit)
    return figures


def language_panels(arms: Arms, limit: int) -> list[Panel]:
    """Return the panels of one language's figure."""
    measured = arms["base"][0]["final"]
    ks = list(range(1, _samples(measured) + 1))
    limits = [max(1, limit * part // 16) for part in range(1, 17)]
    seconds = over_training(arms, "greedy accuracy", x="train_s", unit=1.0)
    panels = [
        _training_panel(arms, "Greedy accuracy", "accuracy", "greedy accuracy"),
        _unit_panel("The same against time", "seconds of training", "accuracy", seconds),
        _training_panel(arms, "Format rate", "share with a box", "format rate"),
        _training_panel(arms, "Accuracy given a box", "accuracy", "accuracy given a box"),
        _unit_panel(
            "pass@k after training",
            "k, attempts",
            "pass@k",
            at_the_end(arms, ks, lambda final, k: share(final, f"pass@{k}")),
        ),
        _unit_panel(
            "Right within a limit",
            "max new tokens",
            "greedy accuracy",
            at_the_end(arms, limits, right_within),
        ),
    ]
    if "english" in measured:
        panels.append(
            _training_panel(arms, "English: greedy accuracy", "accuracy", "English greedy accuracy")
        )
    curves = over_training(arms, KL_TITLE)
    title = "KL(teacher, student), unclipped"
    panels.append(Panel(title, "sampled tokens, thousands", "nats per token", curves))
    return panels


def over_training(
    arms: Arms, metric: str, *, x: str = "sampled_tokens", unit: float = 1000.0
) -> dict[str, Curve]:
    """Return a curve for each trained arm, from the base's on: a metric against x in `unit`s."""
    start = (0.0, share(arms["base"][0]["final"], metric))
    curves = {}
    for name, runs in arms.items():
        if not runs[0]["points"]:  # it was not trained
            continue
        lines = []
        for run in runs:
            points = [(point[x] / unit, share(point, metric)) for point in run["points"]]
            lines.append([start, *points])
        curves[name] = band(lines)
    return curves


def band(curves: list[list[tuple[float, float]]]) -> Curve:
    """Return the mean of curves, one a seed, with the smallest and the largest of them.

    At points that all of them reach.
    """
    grid = np.linspace(0, min(curve[-1][0] for curve in curves), POINTS)
    lines = []
    for curve in curves:
        xs, values = zip(*curve, strict=True)
        lines.append(np.interp(grid, xs, values))
    return _mean_and_ends(grid.tolist(), np.array(lines))


def at_the_end(
    arms: Arms, xs: Sequence[float], value: Callable[[Measured, Any], float]
) -> dict[str, Curve]:
    """Return a curve for every arm: a value of its last measurement that depends on x."""
    return {
        name: _mean_and_ends(xs, np.array([[value(run["final"], x) for x in xs] for run in runs]))
        for name, runs in arms.items()
    }


def right_within(measured: Measured, limit: int) -> float:
    """Return the greedy accuracy within `limit` tokens: the share right that had ended by then."""
    right, _ = ratio_of(measured, "greedy accuracy")
    tokens, _ = ratio_of(measured, "mean tokens")  # of one attempt a problem
    return float(np.mean([r > 0 and t <= limit for r, t in zip(right, tokens, strict=True)]))


def _samples(measured: Measured) -> int:
    """Return how many attempts were sampled at a problem: the largest k of pass@k."""
    names = [name for name in measured["sampled"] if name.startswith("pass@")]
    return max(int(name.removeprefix("pass@")) for name in names)


def _mean_over_seeds(metric: str, runs: list[Measured]) -> Ratio:
    """Return a metric's numerators and denominators, each the mean over seeds, by problem."""
    pairs = [ratio_of(run, metric) for run in runs]
    above = np.mean([numerators for numerators, _ in pairs], axis=0).tolist()
    below = np.mean([denominators for _, denominators in pairs], axis=0).tolist()
    return above, below


def _mean_and_ends(xs: Sequence[float], lines: np.ndarray) -> Curve:
    """Return (x, mean, smallest, largest) of lines, one a seed, at each x."""
    ends = zip(xs, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0), strict=True)
    return [(float(x), float(mean), float(low), float(high)) for x, mean, low, high in ends]


def _training_panel(arms: Arms, title: str, y_label: str, metric: str) -> Panel:
    return _unit_panel(title, "sampled tokens, thousands", y_label, over_training(arms, metric))


def _unit_panel(title: str, x_label: str, y_label: str, curves: dict[str, Curve]) -> Panel:
    """Return a panel of shares, whose axis goes from 0 to 1."""
    return Panel(title, x_label, y_label, curves, y_range=(0.0, 1.02))


def _seeds_cell(metric: str, found: dict[str, Any]) -> str:
    """Return "0.903 (0.892, 0.920)", the mean over seeds and the ends; one seed is its value.

    "-" where nothing counts in the metric, as for the accuracy given a box without any box.
    """
    if math.isnan(found["value"]):
        return "-"
    digits = 1 if metric == "mean tokens" else 3
    seeds = [value for value in found["by_seed"] if not math.isnan(value)]
    ends = ""
    if len(found["by_seed"]) > 1:
        ends = f" ({min(seeds):.{digits}f}, {max(seeds):.{digits}f})"
    return f"{found['value']:.{digits}f}{ends}"


def _difference_cell(test: dict[str, float]) -> str:
    """Return "+0.671 [+0.610, +0.732], p < 0.0001", or "0" where no problem differs."""
    found = Estimate(test["value"], test["low"], test["high"])
    if found == Estimate(0.0, 0.0, 0.0):
        return "0"
    p_value = f"p {test['p']:.4f}" if test["p"] >= 0.0001 else "p < 0.0001"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {p_value}"


def _varying(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns in which every row says the same."""
    kept = [
        column
        for column in range(len(header))
        if len(rows) == 1 or len({row[column] for row in rows}) > 1
    ]
    return [header[column] for column in kept], [[row[column] for column in kept] for row in rows]
