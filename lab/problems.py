"""Parallel word problems in four languages, made from templates.json and a seed.

A problem is a template plus its numbers; the names and things only dress it. The hash of template
and numbers alone decides whether the pair may be trained on. So no list of used problems has to be
kept, and no two programs can disagree.
"""

import hashlib
import json
import operator
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LANGUAGES = ("eng", "hau", "swa", "yor")
TARGETS = LANGUAGES[1:]
FEW = 40  # problems of a language
TEST_SHARE = 5  # one pair in five is never trained on
SPECIFICATION = json.loads((HERE / "templates.json").read_text(encoding="utf-8"))
TEMPLATES = {template["id"]: template for template in SPECIFICATION["templates"]}
NEW_WORDING = tuple(name for name in TEMPLATES if name.startswith("new_"))  # never trained on
KNOWN_WORDING = tuple(name for name in TEMPLATES if not name.startswith("new_"))
# Whether a single step is "+" or "*" can be guessed from the size of the numbers. So in the sets
# the other templates come three times.
GUESSABLE = (["a + b"], ["a * b"])
SET_WORDING = tuple(
    name for name in KNOWN_WORDING for _ in range(1 if TEMPLATES[name]["steps"] in GUESSABLE else 3)
)
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Drawn:
    """One problem before it is put into words.

    dressing  a seed: the wordings of its solution follow from it, in each language others
    """

    template: str
    numbers: tuple[int, ...]
    name: str
    friend: str
    thing: int
    dressing: int = 0

    @property
    def held_out(self) -> bool:
        """Say whether this (template, numbers) pair belongs to the test side of the split."""
        digest = hashlib.sha256(f"{self.template} {self.numbers}".encode()).digest()
        return digest[0] % TEST_SHARE == 0


@dataclass(frozen=True)
class Wording:
    """How a solution is put: what stands before each equation, and before the answer."""

    openings: list[str]
    answer: str


def equations(drawn: Drawn) -> list[tuple[str, int]]:
    """Return the worked steps as (text, value): [("3 * 4 = 12", 12), ("12 + 5 = 17", 17)]."""
    known = dict(zip("abc", drawn.numbers, strict=False))
    steps = []
    for step in TEMPLATES[drawn.template]["steps"]:
        left, symbol, right = step.split()
        value = OPERATORS[symbol](known[left], known[right])
        steps.append((f"{known[left]} {symbol} {known[right]} = {value}", value))
        known["first"] = value
    return steps


def words(drawn: Drawn, language: str) -> str:
    """Return the problem's text in `language`."""
    text = TEMPLATES[drawn.template][language].format(
        name=drawn.name,
        friend=drawn.friend,
        thing=SPECIFICATION["things"][drawn.thing][language],
        **dict(zip("abc", drawn.numbers, strict=False)),
    )
    return text[0].upper() + text[1:]


def draw_wording(rng: random.Random, language: str, steps: int) -> Wording:
    """Draw how a solution of one or two steps is put; all ways are equally likely."""
    phrases = SPECIFICATION["wordings"][language]
    kinds = ("alone",) if steps == 1 else ("first", "then")
    openings = [f"{rng.choice(phrases[kind])} {rng.choice(phrases['verb'])}" for kind in kinds]
    return Wording(openings, rng.choice(phrases["answer"]))


def solution(drawn: Drawn, language: str, *, again: int = 0) -> str:
    r"""Return a worked solution in `language`, in one of many wordings.

    again  another number, another wording

    "First we get 4 * 3 = 12. Then it makes 12 + 5 = 17. The answer is \boxed{17}.", for instance.
    The numbers of a sum or product stand in either order.
    """
    rng = random.Random(f"{drawn.dressing}/{language}/{again}")
    steps = equations(drawn)
    wording = draw_wording(rng, language, len(steps))
    sentences = [
        f"{opening} {_either_order(rng, text)}."
        for opening, (text, _) in zip(wording.openings, steps, strict=True)
    ]
    return " ".join([*sentences, f"{wording.answer} \\boxed{{{steps[-1][1]}}}."])


def brief_solution(drawn: Drawn) -> str:
    r"""Return the solution without words: "3 * 4 = 12. 12 + 5 = 17. \boxed{17}.", for instance."""
    steps = equations(drawn)
    return " ".join([*(f"{text}." for text, _ in steps), f"\\boxed{{{steps[-1][1]}}}."])


def plan(drawn: Drawn) -> str:
    """Return the solution's steps without their results, in no language: "3 * 4, _ + 5"."""
    known = {**dict(zip("abc", drawn.numbers, strict=False)), "first": "_"}
    steps = [step.split() for step in TEMPLATES[drawn.template]["steps"]]
    return ", ".join(f"{known[left]} {symbol} {known[right]}" for left, symbol, right in steps)


def slipped(drawn: Drawn, language: str, rng: random.Random) -> list[tuple[str, bool]]:
    r"""Return a solution that slips, as pieces of text and whether a piece is worth learning.

    A student that misreads a problem writes a wrong sum. A teacher that has only ever copied right
    solutions would then write the right result behind the wrong sum, and so unteach arithmetic.
    These pieces let it learn to go on as any calculator does: 24 - 4 read as 24 + 4 gives 28. The
    choice of a wrong sum itself is never worth learning.
    """
    steps = rng.choice((1, 2))
    wording = draw_wording(rng, language, steps)
    first, value = _any_sum(rng, drawn.numbers)
    pieces = [(f"{wording.openings[0]} {first}", False)]
    result = value
    if steps == 2:
        written = TEMPLATES[drawn.template]["steps"]
        plan_holds = len(written) == 2  # its second step goes on from the slipped value
        if plan_holds:
            known = {**dict(zip("abc", drawn.numbers, strict=False)), "first": value}
            left, symbol, right = written[1].split()
            second = f"{known[left]} {symbol} {known[right]}"
            result = OPERATORS[symbol](known[left], known[right])
        else:
            second, result = _any_sum(rng, (value, *drawn.numbers))
        if result < 0:
            return slipped(drawn, language, rng)
        pieces += [(f" = {value}. {wording.openings[1]}", True), (f" {second}", plan_holds)]
    return [*pieces, (f" = {result}. {wording.answer} \\boxed{{{result}}}.", True)]


def _either_order(rng: random.Random, equation: str) -> str:
    """Return "3 * 4 = 12" or "4 * 3 = 12"; a difference has one order only."""
    left, symbol, rest = equation.split(" ", 2)
    right, rest = rest.split(" ", 1)
    if symbol == "-" or rng.random() < 0.5:
        return equation
    return f"{right} {symbol} {left} {rest}"


def _any_sum(rng: random.Random, numbers: tuple[int, ...]) -> tuple[str, int]:
    """Return a sum of any two of the numbers, as text and value.

    The value is from 0 to 150, as far as those of the templates go.
    """
    while True:
        left = rng.choice(numbers)
        symbol = rng.choice("+-*")
        right = rng.choice(numbers)
        value = OPERATORS[symbol](left, right)
        if 0 <= value <= 150:
            return f"{left} {symbol} {right}", value


def draw(rng: random.Random, templates: tuple[str, ...]) -> Drawn:
    """Draw a problem whose every intermediate value is at least 1."""
    while True:
        template = TEMPLATES[rng.choice(templates)]
        numbers = tuple(rng.randint(low, high) for low, high in template["ranges"].values())
        name = rng.choice(SPECIFICATION["names"])
        friend = rng.choice(SPECIFICATION["friends"])
        thing = rng.randrange(len(SPECIFICATION["things"]))
        dressing = rng.randrange(2**32)
        drawn = Drawn(template["id"], numbers, name, friend, thing, dressing)
        if all(value >= 1 for _, value in equations(drawn)):
            return drawn


def draw_training(rng: random.Random) -> Drawn:
    """Draw a problem that may be trained on: a known wording and a pair outside the test side."""
    while True:
        drawn = draw(rng, KNOWN_WORDING)
        if not drawn.held_out:
            return drawn


def draw_set(
    rng: random.Random, count: int, templates: tuple[str, ...], *, held_out: bool
) -> list[Drawn]:
    """Draw `count` problems on one side of the split, the templates in turn.

    No two of them have the same template and numbers.
    """
    found: dict[tuple[str, tuple[int, ...]], Drawn] = {}
    while len(found) < count:
        drawn = draw(rng, (templates[len(found) % len(templates)],))
        if drawn.held_out == held_out:
            found.setdefault((drawn.template, drawn.numbers), drawn)
    return list(found.values())


def write_problems(folder: Path, seed: int) -> None:
    """Write train, test and new-wording problems, a file for each in every language.

    Row i is the same problem in all languages. The columns are those of the COPSD training sets,
    English problem and solution and translated problem, plus the template and its numbers, which
    the tests of the split read.
    """
    rng = random.Random(seed)
    sets = {  # 500 are what the paper has for a language of AfriMGSM, which has 250 to test on
        "train": draw_set(rng, 500, SET_WORDING, held_out=False),
        "test": draw_set(rng, 250, SET_WORDING, held_out=True),
        "new_wording": draw_set(rng, 60, NEW_WORDING, held_out=True),
    }
    for name, drawns in sets.items():
        for language in LANGUAGES:
            path = folder / language / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {
                    "id": str(row),
                    "problem": words(drawn, "eng"),
                    "solution": solution(drawn, "eng"),
                    "answer": str(equations(drawn)[-1][1]),
                    "problem_translated": words(drawn, language),
                    "language": language,
                    "template": drawn.template,
                    "numbers": drawn.numbers,
                }
                for row, drawn in enumerate(drawns)
            ]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            path.write_text("".join(lines), encoding="utf-8")


def write_few(folder: Path) -> dict[str, str]:
    """Write a few problems in Hausa and in Swahili; return a run's settings that name the files.

    For runs of a few steps, which take less time than it takes to read all problems.
    """
    settings = {}
    for name, split in (("data", "train"), ("eval_data", "test")):
        rows: list[str] = []
        for language in ("hau", "swa"):
            text = (HERE / "problems" / language / f"{split}.jsonl").read_text(encoding="utf-8")
            rows += text.split("\n")[:FEW]
        path = folder / f"{split}.jsonl"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        settings[name] = str(path)
    return settings
