"""The figures of an experiment: its curves, and the panels that they stand in.

A line is the mean over seeds, and the band around it reaches from the smallest seed to the largest.
How a panel is drawn is in parts/figures.py.

Read figures_of (which figures there are), language_panels (what one of them shows), over_training
and at_the_end (the two kinds of curves).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parts.figures import Panel
from parts.measure import KL_NAME
from parts.prompts import find_language
from parts.results import Arms, Experiment, Measured, ratio_of, samples_of, share

POINTS = 7  # of a curve over training
Curve = list[tuple[float, float, float, float]]  # x, value, low, high


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
    ks = list(range(1, samples_of(measured) + 1))
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
    curves = over_training(arms, KL_NAME)
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


def _mean_and_ends(xs: Sequence[float], lines: np.ndarray) -> Curve:
    """Return (x, mean, smallest, largest) of lines, one a seed, at each x."""
    ends = zip(xs, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0), strict=True)
    return [(float(x), float(mean), float(low), float(high)) for x, mean, low, high in ends]


def _training_panel(arms: Arms, title: str, y_label: str, metric: str) -> Panel:
    return _unit_panel(title, "sampled tokens, thousands", y_label, over_training(arms, metric))


def _unit_panel(title: str, x_label: str, y_label: str, curves: dict[str, Curve]) -> Panel:
    """Return a panel of shares, whose axis goes from 0 to 1."""
    return Panel(title, x_label, y_label, curves, y_range=(0.0, 1.02))
