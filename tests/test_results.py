"""parts/results.py: a metric of what was measured is read from the attempts that it is of.

The results that are made by hand here are those of test_curves.py and test_outcome.py, too.
"""

from dataclasses import replace
from typing import Any

from parts.measure import KL_NAME
from parts.metrics import Attempt, Graded, ratios
from parts.results import Experiment, Sweep, accuracy, ratio_of, share

WRONG = Attempt(
    completion="",
    answer=None,
    canonical=None,
    lenient=None,
    correct=False,
    lenient_correct=False,
    reason="no box",
    tokens=8,
    finish_reason="stop",
    language="hau",
    seed="0/0/0",
)
RIGHT = replace(WRONG, answer="1", canonical="1", correct=True, reason="right", tokens=4)
BOXED = replace(WRONG, answer="2", canonical="2", reason="wrong", tokens=6)


def graded(*problems: list[Attempt]) -> list[Graded]:
    """Return problems with these attempts."""
    return [
        Graded(str(place), "hau", "?", "1", "abc", None, attempts)
        for place, attempts in enumerate(problems)
    ]


def measured(
    greedy: list[Attempt], sampled: list[list[Attempt]] | None = None, kl: float = 0.5
) -> dict[str, Any]:
    """Return what compare.py keeps of these attempts, one greedy one a problem."""
    sampled = sampled or [[attempt, attempt] for attempt in greedy]
    own = ratios(graded(*([attempt] for attempt in greedy)), [1])
    return {
        "greedy": own,
        "english": own,
        "sampled": ratios(graded(*sampled), [1, 2]),
        "kl": ([kl * 10, kl * 30], [10.0, 30.0]),
    }


def run_of(final: dict[str, Any], **costs: float) -> dict[str, Any]:
    """Return the results of a run with two checkpoints, of which the last is `final`."""
    cost = {"sampled_tokens": 900, "train_s": 4.0, "updates": 3} | costs
    half = {name: value / 2 for name, value in cost.items()}
    return {"points": [{**final, **half}, {**final, **cost}], "final": {**final, **cost}}


BASE = {"points": [], "final": measured([WRONG, WRONG])}
HALF = run_of(measured([RIGHT, WRONG]))
WHOLE = run_of(measured([RIGHT, RIGHT], kl=0.25))
TITLES = {"grpo": "GRPO", "copsd": "COPSD"}


def experiment(**arms: list[dict[str, Any]]) -> Experiment:
    """Return an experiment in Hausa that picked no rate; every arm is tested against the first."""
    names = list(arms)
    pairs = [(names[0], name) for name in names[1:]]
    return Experiment("ablation", {"hau": arms}, pairs, {}, length_limit=16, titles=TITLES)


def compared() -> Experiment:
    """Return a comparison in two languages that picked rates."""
    arms = {"base": [BASE], "grpo": [HALF, HALF], "copsd": [HALF, WHOLE]}
    sweep = {
        "grpo": Sweep([1.0], {0.1: 0.5}, 0.1, 0.25),
        "copsd": Sweep([1.0], {0.1: 0.5}, 0.1, 0.25),
    }
    pairs = [("grpo", "copsd")]
    return Experiment("comparison", {"hau": arms, "swa": arms}, pairs, sweep, 16, TITLES)


def in_full() -> Experiment:
    """Return an experiment of two trained arms of one method and an untrained one, in full."""
    arms = {"base": [BASE], "copsd": [HALF, WHOLE], "format": [HALF], "translated": [BASE]}
    longer = run_of(measured([RIGHT, RIGHT]), train_s=8.0)
    titles = {**TITLES, "format": "right box behind garbage", "translated": "base, in English"}
    return Experiment(
        "attribution",
        {"hau": arms},
        [("copsd", "format")],
        {"copsd": Sweep([1.0], {0.1: 0.5}, 0.1, 0.25)},
        16,
        titles,
        {"copsd": "code", "format": "ours"},
        {"hau": {**arms, "format": [longer]}},
    )


def test_metrics_are_read_from_the_attempts_they_are_of():
    found = measured([RIGHT, WRONG], [[RIGHT, BOXED], [WRONG, WRONG]])
    found["english"] = ratios(graded([RIGHT], [RIGHT]), [1])
    assert ratio_of(found, "greedy accuracy") == ([1.0, 0.0], [1.0, 1.0])
    assert ratio_of(found, "pass@1")[0] == [0.5, 0.0]
    assert ratio_of(found, "pass@2")[0] == [1.0, 0.0]
    assert share(found, "English greedy accuracy") == 1.0
    assert share(found, "format rate") == 0.5
    assert share(found, "mean tokens") == 6.0
    assert share(found, KL_NAME) == 0.5
    assert accuracy(found) == 0.5
