"""What the runs of an experiment leave: the results of each, and all of them as an Experiment.

compare.py keeps those of a run in its results.json. A metric stands there as a numerator and a
denominator for each problem, so that runs can still be averaged and tested: see ratio_of and share.
Figures are made of them in parts/curves.py; estimates, tests and tables in parts/outcome.py.
check_results and check_alike see that what an older version wrote, or a person changed, is such.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts.measure import KL_NAME
from parts.metrics import Ratio
from parts.typed import typed

# Of one arm, as compare.run_arm writes them: {"points": [measured, ...], "final": measured}. What
# is measured holds ratios by name for each kind of attempt, the KL's ratio, and what it has cost so
# far.
Results = dict[str, Any]
Measured = dict[str, Any]
Arms = Mapping[str, list[Results]]  # by arm, the base first: its runs, one a seed
# What tables and figures read of every kind of attempt, beside pass@k.
LANGUAGE_METRICS = ("in the problem's language", "in English")
METRICS = ("format rate", "accuracy given a box", *LANGUAGE_METRICS, "mean tokens")
KINDS = ("greedy", "english", "sampled")  # of attempts
COSTS = {"step": int, "sampled_tokens": int, "train_s": float, "updates": int}


@dataclass(frozen=True)
class Sweep:
    """How an arm's learning rate was picked."""

    factors: list[float]  # of the recipe's rate
    accuracies: dict[float, float]  # by learning rate, on the development problems
    picked: float
    untrained: float  # the base's accuracy there, which is what a rate of 0 would leave

    @property
    def helps(self) -> bool:
        """Say whether any rate does better than no training."""
        return max(self.accuracies.values()) > self.untrained

    @property
    def at_edge(self) -> bool:
        """Say whether a better rate may lie beyond those that were tried.

        Not below the lowest where that one already does no better than a rate of 0.
        """
        lowest, highest = min(self.accuracies), max(self.accuracies)
        return self.picked == highest or (self.picked == lowest and self.helps)


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


def check_results(results: Mapping[str, Any], *, is_trained: bool, is_sweep: bool) -> None:
    """Raise ValueError, with the place, unless these are an arm's results as they are read here.

    is_sweep  it is measured greedily, and in no other way
    """
    points, final = results.get("points"), results.get("final")
    if not isinstance(points, list) or bool(points) != is_trained:
        raise ValueError(f"its points are {'no list of checkpoints' if is_trained else 'not []'}")
    for name, measured in [*((f"points[{i}]", x) for i, x in enumerate(points)), ("final", final)]:
        kinds = {"greedy"} if is_sweep else {"greedy", "kl"}
        if name == "final" and not is_sweep:
            kinds.add("sampled")
        if not isinstance(measured, dict) or not kinds <= measured.keys():
            raise ValueError(f"its {name} is no object with {', '.join(sorted(kinds))}")
        for kind in KINDS:
            if kind in measured:
                _check_metrics(measured[kind], f"{name}.{kind}")
        if "kl" in measured:
            _check_ratio(measured["kl"], f"{name}.kl", float | None)
        for cost, number in COSTS.items() if is_trained else ():
            if typed(measured.get(cost), number, f"{name}.{cost}") < 0:
                raise ValueError(f"{name}.{cost} is below 0")
        if is_trained and not measured["train_s"]:
            raise ValueError(f"{name}.train_s is 0")
    files = results.get("files", {})
    if not isinstance(files, dict):
        raise ValueError("its files are no object of what is known of each")
    typed([*files], list[str], "files")


def _check_metrics(metrics: Any, place: str) -> None:
    """Raise ValueError unless these are ratios by metric, of as many problems each."""
    if not isinstance(metrics, dict):
        raise ValueError(f"its {place} is no object of metrics")
    ks = [name for name in metrics if name.startswith("pass@")]
    needed = {*METRICS, *(f"pass@{k}" for k in range(1, max(1, len(ks)) + 1))}
    if missing := sorted(needed - metrics.keys()):
        raise ValueError(f"its {place} has no {missing[0]!r}")
    problems = {_check_ratio(ratio, f"{place}.{name}") for name, ratio in metrics.items()}
    if len(problems) > 1:
        raise ValueError(f"its {place} has metrics of {' and '.join(map(str, problems))} problems")
    for name in ("pass@1", "mean tokens"):  # which always count
        if not sum(metrics[name][1]):
            raise ValueError(f"its {place}.{name} is of nothing")


def _check_ratio(ratio: Any, place: str, kind: Any = float) -> int:
    """Return of how many problems a ratio is; ValueError unless it is one.

    kind  of the numerators; null stands for nan
    """
    if not isinstance(ratio, list) or [type(each) for each in ratio] != [list, list]:
        raise ValueError(f"its {place} is no pair of numerators and denominators")
    above = typed(ratio[0], list[kind], f"{place}[0]")
    below = typed(ratio[1], list[float], f"{place}[1]")
    if not len(above) == len(below) > 0 or min(below) < 0:
        raise ValueError(f"its {place} has not a denominator of 0 or more for each numerator")
    return len(above)


def check_alike(results: Mapping[Path, Results]) -> None:
    """Raise ValueError unless one language's arms were measured on as many problems and samples.

    results  by the arm's folder, the base's first
    """
    first, *others = results
    aim = _sizes(results[first]["final"])
    for folder in others:
        sizes = _sizes(results[folder]["final"])
        if sizes != aim:
            raise ValueError(
                f"{folder} and {first} were measured on other numbers of problems or samples, "
                f"{sizes} and {aim}: one is damaged; remove it to have the arm run again"
            )


def _sizes(measured: Measured) -> list[int]:
    """Return the problems of each kind of attempt, 0 where it was not made, and the samples."""
    sizes = [len(measured[kind]["pass@1"][0]) if kind in measured else 0 for kind in KINDS]
    return [*sizes, samples_of(measured)]
