"""What comes out of an experiment (compare.py): estimates, tests, tables, and the files of all.

Estimates are over the test problems, of the mean over seeds. Their 95 % intervals say nothing about
other seeds, so the smallest and the largest seed stand beside them, and are the bands of the
figures (parts/curves.py).

Read tables (which there are), summarise_language (the numbers in them), and write_experiment (the
files).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from parts.curves import figures_of
from parts.figures import curves_figure
from parts.files import section_marks, split_section, write_json, write_text
from parts.measure import KL_NAME
from parts.metrics import Estimate, Ratio, bootstrap, difference, paired_permutation
from parts.prompts import find_language
from parts.report import markdown_table
from parts.results import (
    LANGUAGE_METRICS,
    Arms,
    Experiment,
    Measured,
    ratio_of,
    samples_of,
    share,
)
from parts.tables import cell

COSTS = {"sampled_tokens": "sampled tokens", "train_s": "seconds", "updates": "updates"}
# A paired test is made on these; the others have no value for some problems, or are no success.
TESTED = ("greedy accuracy", "pass@", "format rate", "English greedy accuracy")


def metrics_of(measured: Measured, *, in_full: bool = False) -> list[str]:
    """Return the metrics that the tables show, in their order."""
    english = ["English greedy accuracy"] if "english" in measured else []
    samples = samples_of(measured)
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
        kl = [share(run, KL_NAME) for run in runs]
        found[KL_NAME] = {"value": float(np.mean(kl)), "by_seed": kl}
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
            metrics = [metric for metric in found if metric not in (*COSTS, KL_NAME)]
            header = [what, "evidence", "seeds", *metrics, KL_NAME, *COSTS.values()]
            title = f"{find_language(lang).english}: {experiment.title(name)}"
            seeds = [f"{value:.3f}" for value in found["greedy accuracy"]["by_seed"]]
            ends = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else "-"
            cells = []
            for metric in metrics:
                numbers = found[metric]
                estimate = Estimate(numbers["value"], numbers["low"], numbers["high"])
                cells.append(cell(metric, estimate))
            kl = f"{found[KL_NAME]['value']:.3f}"
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
    header = ["dev accuracy at lr times", *(f"{factor:g}" for factor in [0, *factors]), "picked lr"]
    rows = []
    for name, found in experiment.sweep.items():
        accuracies = [
            f"{accuracy:.3f}" for accuracy in [found.untrained, *found.accuracies.values()]
        ]
        rows.append([experiment.title(name), *accuracies, f"{found.picked:g}"])
    return markdown_table(header, rows)


def edge_note(experiment: Experiment) -> list[str]:
    """Return sentences that name the arms whose pick says little, [] where there are none."""
    sweep = experiment.sweep.items()
    kinds = {
        "At the edge of the sweep, so that a better rate may lie beyond": [
            experiment.title(name) for name, found in sweep if found.at_edge
        ],
        "No rate does better than no training": [
            experiment.title(name) for name, found in sweep if not found.helps
        ],
    }
    return [f"{said}: {', '.join(names)}." for said, names in kinds.items() if names]


def write_experiment(
    experiment: Experiment, shown: list[str], out: Path, results: Path | None
) -> list[Path]:
    """Write compare.json, RESULTS.md and the figures; return the files.

    shown    its tables
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
            # One picture holds a panel a language, three in a row; the others are two panels wide.
            columns = 3 if name == experiment.name else 2
            pictures = [file.with_name(f"{name}.{suffix}") for suffix in ("png", "svg")]
            curves_figure(panels, pictures[:1] if file == results else pictures, columns=columns)
            files += pictures[:1]
        text = "\n\n".join(
            [
                *shown,
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
    begin, end = section_marks(name)
    before, after = split_section(file, name)
    write_text(file, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _mean_over_seeds(metric: str, runs: list[Measured]) -> Ratio:
    """Return a metric's numerators and denominators, each the mean over seeds, by problem."""
    pairs = [ratio_of(run, metric) for run in runs]
    above = np.mean([numerators for numerators, _ in pairs], axis=0).tolist()
    below = np.mean([denominators for _, denominators in pairs], axis=0).tolist()
    return above, below


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
