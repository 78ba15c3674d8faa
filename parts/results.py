"""What the runs of an experiment leave: the results of each, and all of them as an Experiment.

compare.py keeps those of a run in its results.json. A metric stands there as a numerator and a
denominator for each problem, so that runs can still be averaged and tested: see ratio_of and share.
Figures are made of them in parts/curves.py; estimates, tests and tables in parts/outcome.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parts.measure import KL_NAME
from parts.metrics import Ratio

# Of one arm, as compare.run_arm writes them: {"points": [measured, ...], "final": measured}. What
# is measured holds ratios by name for each kind of attempt, the KL's ratio, and what it has cost so
# far.
Results = dict[str, Any]
Measured = dict[str, Any]
Arms = Mapping[str, list[Results]]  # by arm, the base first: its runs, one a seed


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
    if metric == KL_NAME:
        return measured["kl"]
    if metric.startswith("pass@"):
        return measured["sampled"][metric]
    return measured["greedy"][metric]


def samples_of(measured: Measured) -> int:
    """Return how many attempts were sampled at a problem: the largest k of pass@k."""
    names = [name for name in measured["sampled"] if name.startswith("pass@")]
    return max(int(name.removeprefix("pass@")) for name in names)
