"""The experiments of compare.py as data: their arms, and which of these are tested against which.

An arm is a name, a title and the settings that it changes; several arms may train with one method.
A new arm is an entry here, and a new method of the family a line of EVIDENCE. The base model,
untrained, is an arm of every experiment and is not listed.
"""

from dataclasses import dataclass, field
from typing import Any

from parts.recipe import METHODS, Config


@dataclass(frozen=True)
class Variant:
    """An arm as it is planned; parts/plan.py and parts/arms.py make runs of it.

    name        of its folders and in compare.json
    title       in tables and figures
    settings    of `copsd.py train`, beside those that were typed
    evidence    where what it does is known from: "code", "second-hand" or "ours"; "" is not shown
    is_trained  False: the base model, measured once
    in_english  measured on the English side of the test problems
    """

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    evidence: str = ""
    is_trained: bool = True
    in_english: bool = False


@dataclass(frozen=True)
class Design:
    """An experiment as it is planned.

    name     of its section in RESULTS.md; figures are called after it
    folder   the default --out begins with it
    pairs    (first, second): second - first is tested
    sweep    the default --sweep; None: every arm has its recipe's rate
    in_full  one row an arm with every interval, how often the answer is in the problem's language,
             pass@k at each power of two, and all that a second time at equal seconds
    steps    the default --steps
    """

    name: str
    folder: str
    variants: tuple[Variant, ...]
    pairs: tuple[tuple[str, str], ...]
    sweep: str | None
    in_full: bool = False
    steps: int = Config.steps


# How sure we are of what each method does; "code" is the authors'.
EVIDENCE = {
    "copsd": "code",  # arXiv 2605.09548
    "grpo": "code",  # as in OPSD's scripts, for COPSD released none
    "opsdc": "code",  # arXiv 2603.05433, also called CRISP
    "ophsd": "code",  # arXiv 2605.08741
    "egrsd": "second-hand, its gate ours",  # arXiv 2605.13255
    "ssopd": "second-hand",  # arXiv 2605.17497
}
GRPO = Variant("grpo", "GRPO", {"method": "grpo"}, EVIDENCE["grpo"])
COPSD = Variant("copsd", "COPSD", {"method": "copsd"}, EVIDENCE["copsd"])
# On the lab, runs learn little at the lowest of these rates and collapse at the highest.
SWEEP = "0.03,0.1,0.3,1,3,9,27"
WIDE_SWEEP = "0.1,0.3,1,3,9"
HIGH_SWEEP = "0.3,1,3,9,27"  # below, controls that teach learn less
MANY_ARMS_STEPS = 30  # keeps dozens of runs below an hour on two cores

COMPARISON = Design(
    name="comparison",
    folder="compare",
    variants=(GRPO, COPSD),
    pairs=(("base", "grpo"), ("base", "copsd"), ("grpo", "copsd")),
    sweep=SWEEP,
)

# The neighbours of COPSD, each with its recipe; see parts/recipe.py for what they set. At the 50
# steps of OPSDC's recipe its teacher would not be renewed once in so short a run.
OWN = {"opsdc": {"teacher_every": MANY_ARMS_STEPS // 3}}
NEIGHBOURS = tuple(
    Variant(method, method.upper(), {"method": method, **OWN.get(method, {})}, EVIDENCE[method])
    for method in METHODS
    if method not in ("copsd", "grpo")
)
FAMILY = Design(
    name="family",
    folder="family",
    variants=(GRPO, COPSD, *NEIGHBOURS),
    pairs=tuple(
        (first, second.name)
        for second in (COPSD, *NEIGHBOURS)
        for first in ("base", "grpo", "copsd")
        if first != second.name
    ),
    sweep=WIDE_SWEEP,
    in_full=True,
    steps=MANY_ARMS_STEPS,
)

# What else could be behind COPSD's gain? Each control takes one thing away from it, or brings one.
CONTROLS = (
    Variant("reference", "fine-tuned on the solution", {"completion": "reference"}, "ours"),
    Variant("off-policy", "the teacher writes", {"completion": "teacher"}, "ours"),
    Variant(
        "answer",
        "teacher reads the answer only",
        {"answer_only": True, "english_problem": False},
        "ours",
    ),
    Variant(
        "english-problem",
        "teacher reads the English problem only",
        {"english_solution": False},
        "ours",
    ),
    Variant(
        "other-solution",
        "teacher reads another problem's solution",
        {"swap_solutions": True},
        "ours",
    ),
    Variant(
        "format",
        "right box behind garbage",
        {"completion": "garbage", "swap_solutions": True},
        "ours",
    ),
    Variant("english", "English problems only", {"english_share": 1.0}, "ours"),
)
CEILING = Variant(
    "translated", "base, asked in English", evidence="ours", is_trained=False, in_english=True
)
ATTRIBUTION = Design(
    name="attribution",
    folder="attribute",
    variants=(COPSD, *CONTROLS, CEILING),
    pairs=(
        *(("base", variant.name) for variant in (COPSD, *CONTROLS, CEILING)),
        *(("copsd", variant.name) for variant in (*CONTROLS, CEILING)),
    ),
    sweep=HIGH_SWEEP,
    in_full=True,
    steps=MANY_ARMS_STEPS,
)
