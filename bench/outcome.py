"""What comes out of a comparison (bench/compare.py): estimates, tests, tables and figures, from the arms' results.

Estimates are over the test problems, of the mean over seeds: their 95 % intervals say nothing about other seeds, so the
smallest and largest seed stand beside them, and are the bands of the figures.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from parts.data import find_language
from parts.metrics import Graded, bootstrap, difference, paired_permutation, pass_at_k
from parts.report import Panel, curves_figure, markdown_table
from parts.runs import write_json

LABELS = {"base": "base", "grpo": "GRPO", "copsd": "COPSD"}
POINTS = 7  # of a curve over training
Results = dict[str, Any]  # of one arm, as compare.run_arm writes them


def scores(results: list[Graded]) -> dict[str, list[float]]:
    """Return, per problem, what the estimates are made of; of the first attempt where there is one only."""
    return {
        "n": [float(len(r.attempts)) for r in results],
        "correct": [float(sum(a.correct for a in r.attempts)) for r in results],
        "formatted": [float(sum(a.answer is not None for a in r.attempts)) for r in results],
        "tokens": [sum(a.tokens for a in r.attempts) / len(r.attempts) for r in results],
        "tokens_if_right": [
            float(r.attempts[0].tokens if r.attempts[0].correct else 0) for r in results
        ],
    }


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
    values = [
        pass_at_k(int(n), int(c), k) for n, c in zip(sampled["n"], sampled["correct"], strict=True)
    ]
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
    return [
        "greedy accuracy",
        *(f"pass@{k}" for k in sorted({1, samples})),
        "format rate",
        "accuracy given a box",
        *english,
        "mean tokens",
    ]


def summarise_language(arms: dict[str, list[Results]], pairs: Any) -> dict[str, Any]:
    """Return every arm's estimates and, for each pair of arms, differences with their intervals and p-values."""
    finals = {name: [run["final"] for run in runs] for name, runs in arms.items()}
    metrics = metrics_of(next(iter(finals.values()))[0])
    summary: dict[str, Any] = {"arms": {}, "pairs": {}}
    for name, runs in finals.items():
        summary["arms"][name] = {metric: over_seeds(metric, runs) for metric in metrics}
        kl = [run["kl"]["value"] for run in runs]
        costs = {
            key: [run.get(key, 0) for run in runs]
            for key in ("sampled_tokens", "train_s", "updates")
        }
        summary["arms"][name]["KL to the teacher, nats/token"] = {
            "value": float(np.mean(kl)),
            "by_seed": kl,
        }
        summary["arms"][name] |= costs
    for first, second in pairs:
        tests = {}
        for metric in metrics:
            if metric not in (
                "accuracy given a box",
                "mean tokens",
            ):  # the first has no value for some problems
                ends = [
                    [per_problem(metric, run)[0] for run in finals[name]]
                    for name in (first, second)
                ]
                one, other = (np.mean(values, axis=0).tolist() for values in ends)
                tests[metric] = {
                    **asdict(difference(one, other)),
                    "p": paired_permutation(one, other),
                }
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
            cells = [
                number(found[metric], 1 if metric == "mean tokens" else 3) for metric in metrics
            ]
            costs = [
                f"{np.mean(found[key]):.0f}" for key in ("sampled_tokens", "train_s", "updates")
            ]
            rows.append([f"{find_language(lang).english}: {labels[name]}", *cells, *costs])
    return markdown_table(header, rows)


def pairs_table(summaries: dict[str, Any], labels: dict[str, str]) -> str:
    """Return the table of differences: 95 % interval over problems and the paired permutation test's p."""
    rows, header = [], []
    for lang, summary in summaries.items():
        for pair, tests in summary["pairs"].items():
            second, first = pair.split(" - ")
            header = ["", *tests]
            rows.append(
                [
                    f"{find_language(lang).english}: {labels[second]} against {labels[first]}",
                    *(interval(test) for test in tests.values()),
                ]
            )
    return markdown_table(header, rows)


def write_outcome(
    out: Path,
    found: dict[str, dict[str, list[Results]]],
    pairs: Any,
    labels: dict[str, str],
    rates: dict[str, Any],
) -> list[str]:
    """Write compare.json and tables.md; return the tables: arms, pairs and, where rates were picked, the sweep."""
    summaries = {lang: summarise_language(arms, pairs) for lang, arms in found.items()}
    tables = [arms_table(summaries, labels), pairs_table(summaries, labels)]
    if rates:
        lines = [
            [
                labels[method],
                *(f"{a:.3f}" for a in rate["accuracy"].values()),
                f"{rate['picked']:g}",
            ]
            for method, rate in rates.items()
        ]
        factors = next(iter(rates.values()))["factors"]
        header = ["dev accuracy at lr times", *(f"{factor:g}" for factor in factors), "picked lr"]
        tables.append(markdown_table(header, lines))
    write_json(out / "compare.json", {"languages": summaries, "rates": rates})
    (out / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    return tables


def band(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """Return the mean of curves, one a seed, with the smallest and the largest, at points that all of them reach."""
    grid = np.linspace(0, min(curve[-1][0] for curve in curves), POINTS)
    lines = np.array(
        [np.interp(grid, [x for x, _ in curve], [value for _, value in curve]) for curve in curves]
    )
    columns = (grid, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0))
    return [
        (float(x), float(v), float(low), float(high))
        for x, v, low, high in zip(*columns, strict=True)
    ]


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
        LABELS[name]: band(
            [[start, *((point[x] / unit, value(point)) for point in run["points"])] for run in runs]
        )
        for name, runs in arms.items()
        if name != "base"
    }


def at_the_end(
    arms: dict[str, list[Results]], xs: list[int], value: Callable[[Results, int], float]
) -> dict[str, Any]:
    """Return a curve for every arm: a value of its last evaluation that depends on x."""
    curves = {}
    for name, runs in arms.items():
        lines = np.array([[value(run["final"], x) for x in xs] for run in runs])
        ends = zip(xs, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0), strict=True)
        curves[LABELS[name]] = [
            (float(x), float(v), float(low), float(high)) for x, v, low, high in ends
        ]
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
        Panel(
            "Greedy accuracy",
            tokens,
            "accuracy",
            over_training(arms, share("greedy accuracy")),
            y_range=unit,
        ),
        Panel(
            "The same against time",
            "seconds of training",
            "accuracy",
            over_training(arms, share("greedy accuracy"), x="train_s", unit=1.0),
            y_range=unit,
        ),
        Panel(
            "Format rate",
            tokens,
            "share with a box",
            over_training(arms, share("format rate")),
            y_range=unit,
        ),
        Panel(
            "Accuracy given a box",
            tokens,
            "accuracy",
            over_training(arms, share("accuracy given a box")),
            y_range=unit,
        ),
        Panel(
            "pass@k after training",
            "k, attempts",
            "pass@k",
            at_the_end(
                arms, list(range(1, samples + 1)), lambda found, k: share(f"pass@{k}")(found)
            ),
            y_range=unit,
        ),
        Panel(
            "Right within a limit",
            "max new tokens",
            "greedy accuracy",
            at_the_end(arms, limits, right_within),
            y_range=unit,
        ),
        Panel(
            "KL(teacher, student), unclipped",
            tokens,
            "nats per token",
            over_training(arms, lambda found: found["kl"]["value"]),
        ),
    ]
    if "english" in arms["base"][0]["final"]:
        curves = over_training(arms, share("English greedy accuracy"))
        panels.insert(
            6, Panel("English: greedy accuracy", tokens, "accuracy", curves, y_range=unit)
        )
    return panels


def draw(found: dict[str, dict[str, list[Results]]], out: Path, limit: int) -> None:
    """Write compare.png and .svg, accuracy of every language, and compare_LANG.png and .svg, all of one."""
    panels = []
    for lang, arms in found.items():
        curves = over_training(arms, share("greedy accuracy"))
        title = f"{find_language(lang).english}: greedy accuracy"
        panels.append(
            Panel(title, "sampled tokens, thousands", "accuracy", curves, y_range=(0.0, 1.02))
        )
        files = [out / f"compare_{lang}.{suffix}" for suffix in ("png", "svg")]
        curves_figure(language_panels(arms, limit), files, columns=2)
    curves_figure(
        panels, [out / f"compare.{suffix}" for suffix in ("png", "svg")], columns=len(panels)
    )
