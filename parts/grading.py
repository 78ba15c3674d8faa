r"""Grade answers: take one out of a completion, compare it with the gold answer, say why.

One grader gives GRPO its reward and the evaluation its metric, so that the two never disagree:

    completion --extract_answer--> answer --normalise--> canonical string
               --grade--> right or wrong, and why

    >>> is_correct(r"... 9 እንቁላል x 2 ብር = \boxed{፲፰ ብር}", "18")
    True

A number is compared exactly, as a fraction. Anything else is compared as a folded string, and then
by math-verify in a worker process. What could be read in two ways is read in none: a wrong reward
teaches worse than a missing one. Nothing that a model can write raises or hangs, and the time grows
linearly with the completion. Functions stand in order of use.
"""

import atexit
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE, Popen

from parts.numerals import MAX_ANSWER_CHARS, is_number, last_number, normalise
from parts.phrases import JOINS, ORS, leading_scale, names, without_dozens
from parts.plaintext import MARK, plain_text

# math-verify takes a tenth of a second for a usual answer, and hours for 9^(9^9).
MATH_LIMIT_S = 5.0


@dataclass(frozen=True)
class Grade:
    """What a completion is worth; the lenient reading is apart and never makes an answer correct.

    answer     content of the last complete box after the think block, with the sign before it and
               the word of scale behind it; None: not formatted
    canonical  the answer normalised; None: no single answer
    lenient    the same as canonical. Where there is no answer: of the last box anywhere, inside the
               think block too, or else the last number
    reason     "right", "wrong", "no box", "think block not closed", "no single answer", or
               "time-out", which is math-verify's
    """

    answer: str | None
    canonical: str | None
    lenient: str | None
    correct: bool
    lenient_correct: bool
    reason: str


def grade(
    completion: str, gold: str, *, think_open: bool = False, limit_s: float = MATH_LIMIT_S
) -> Grade:
    r"""Return whether the completion's boxed answer equals the gold, and why.

    completion, think_open  as in `extract_answer`; no completion raises
    gold     a plain answer, such as a data set's answer column
    limit_s  how long math-verify may compute, in seconds; then its worker is killed

    To a gold number only a number is equal, and no arithmetic is done: \boxed{9 \times 2} may just
    quote the problem. Beside a gold with a unit another unit is wrong. To any other gold an equal
    text is equal, and so is what math-verify finds equal: \sqrt{12} to 2\sqrt{3}, "2, 1" to "1, 2".
    Beside the letter of a choice neither its mark counts nor what it stands for: "(C)" and "C) 18"
    are C.
    Raises ValueError for a gold without canonical form, OSError when math-verify does not run.
    (ours)
    """
    expected = normalise(gold, as_text=True)
    if expected is None:
        advice = "give one number or one short text, like '18' or '7/2'"
        raise ValueError(f"unusable gold answer {gold[:80]!r}: {advice}")
    text = _after_thinking(completion, think_open)
    answer = None if text is None else _last_box(text)
    if answer is not None:
        canonical, verdict = _judge(answer, gold, expected, limit_s)
        right = verdict == "right"
        return Grade(answer, canonical, canonical, right, right, verdict)
    without_tags = re.sub("</?think>", " ", completion)
    lenient_answer = _last_box(without_tags) or last_number(completion) or ""
    lenient, verdict = _judge(lenient_answer, gold, expected, limit_s)
    reason = "think block not closed" if text is None else "no box"
    return Grade(None, None, lenient, False, verdict == "right", reason)


def is_gradable(gold: str | None) -> bool:
    """Say whether `grade` takes the gold: it is there, and has a canonical form."""
    return normalise(gold or "", as_text=True) is not None


def check_math_verify(golds: Iterable[str]) -> None:
    """Raise OSError where a gold is no plain number and math-verify, which it needs, does not run.

    It is asked a question whose answer is known. Without this, a program that is at work would
    find out, at the first completion that is no equal text.
    """
    canonical = [normalise(gold, as_text=True) for gold in golds]
    if all(each is None or is_number(each) for each in canonical):
        return
    if not _is_same_mathematics(r"\sqrt{4}", "2", MATH_LIMIT_S):
        raise OSError(
            "math-verify does not work: it does not find \\sqrt{4} equal to 2; "
            "pip install -r requirements.txt"
        )


def is_correct(completion: str, gold: str, *, think_open: bool = False) -> bool:
    """Return `grade(...).correct`."""
    return grade(completion, gold, think_open=think_open).correct


# ---- The answer of a completion


def extract_answer(completion: str, *, think_open: bool = False) -> str | None:
    r"""Return what is in the last complete \boxed{...} after the think block; None: no answer.

    completion  the generated text, without the prompt
    think_open  True when the prompt ended inside a think block: an answer then needs a closing
                </think>

    A minus that touches the box belongs to the answer, and so does a word of scale behind it:
    -\boxed{18}, \boxed{18} million. Only the text after the last </think> counts. A <think> opened
    there is unclosed, and then nothing counts. Never falls back to a number in the text, to an
    earlier box, or into the think block. What follows a \boxed without braces is in it, up to the
    end of its formula, sentence or line: \boxed 18. Where there is none, \fbox{18} is a box. (ours)

    >>> extract_answer(r"perhaps \boxed{17}?</think> So \boxed{17} + 1 = \boxed{\frac{36}{2}}.")
    '\\frac{36}{2}'
    """
    text = _after_thinking(completion, think_open)
    return None if text is None else _last_box(text)


def _after_thinking(completion: str, think_open: bool) -> str | None:
    """Return the text after the think block, None where that is not closed."""
    _, closing_tag, text = completion.rpartition("</think>")
    if "<think>" in text or (think_open and not closing_tag):
        return None
    return text


# Where a box begins: the \boxed{ of "\boxed{18}" or of "\boxed {18}".
_BOX_OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")

# A box without braces, and what is meant by it: up to the end of the formula, of the sentence, of
# the line or of what an equation says. It begins with a figure, or with a command for one.
_BARE_BOX = re.compile(
    r"\\boxed\s*(?=[-−]?\s?(?:\\\$|[\d፩-፼〇一二三四五六七八九十百千]"
    r"|\\(?:[dct]?frac|text|math\w\w|sqrt)(?![a-z])))"
    r"((?:[^\n$=\\{}.。።।]|[.。።।](?!\s|$|\$)|\\[a-zA-Z]+|\\[^a-zA-Z)\]]"
    r"|\{(?:[^{}\n]|\{[^{}\n]*\})*\})+)"
)

# What counts for nesting. An escaped brace, \{, is matched so that it is skipped, and so is \\, the
# end of a line, which escapes no brace behind it.
_BRACES = re.compile(r"\\[\\{}]|[{}]")


def _last_box(text: str) -> str | None:
    r"""Return the content of the complete box that starts last; None: there is none, or it's empty.

    \fbox counts where there is no \boxed, and one without braces where no other begins behind it.
    The boxes are tried from the last one to the first. Where one is not closed, an earlier one can
    only be closed before it, so no part of the text is looked at twice and the time grows linearly.
    """
    command = r"\boxed" if r"\boxed" in text else r"\fbox"
    last = max(text.rfind(command), 0)
    if bare := _BARE_BOX.match(text, last, last + 2 * MAX_ANSWER_CHARS):
        return _with_surroundings(text, last, bare[1].strip(), bare.end())
    # Boxes that begin behind the last closing brace are not complete.
    end = text.rfind("}") + 1
    while (place := text.rfind(command, 0, end)) >= 0:
        opening = _BOX_OPENING.match(text, place, end)
        closing = _closing_brace(text, opening.end(), end) if opening else None
        if opening and closing is not None:
            content = text[opening.end() : closing].strip()
            return _with_surroundings(text, place, content, closing + 1) if content else None
        end = text.rfind("}", 0, place) + 1
    return None


# A minus that is a sign, since it stands behind a word, a mark or nothing, and that touches a box.
# That of "20 -\boxed{2}" or "x -\boxed{2}" is an operator, and that of "Answer:-" a mark.
_SIGN = re.compile(r"(?:^|[=≈(\n]|[:,.]\s|[^\W\d_]{2}[:,]?\s)\s*(?:\$|\\[(\[]|\*)*\s*[-−]$")

# How far to look for them, in characters.
_NEAR = 60


def _with_surroundings(text: str, start: int, content: str, end: int) -> str:
    """Return the content of the box from `start` to `end` with its sign and its words of scale."""
    if _SIGN.search(text[max(start - _NEAR, 0) : start]):
        content = f"-({content})" if re.search("[-+]", content) else f"-{content}"
    line = text[end : end + _NEAR].partition("\n")[0]
    behind = plain_text(line.lstrip(" }$*"))
    scale = behind[:1] if behind.startswith(("万", "億")) else leading_scale(behind)
    return f"{content} {scale}" if scale else content


def _closing_brace(text: str, start: int, end: int) -> int | None:
    """Return where the brace that was opened before `start` is closed; None: not before `end`."""
    depth = 1
    for brace in _BRACES.finditer(text, start, end):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return brace.start()
    return None


# ---- Right or wrong

# A letter of a list of choices that stands alone: the B of "A. or B" and of "A) 5 or (B)". The
# franc, gram and hour of "C) 18 g" are none, nor is a variable, as in "C) a + b". Nor is the
# article or pronoun of "C) a dog", if no comma and no "or" or "and" stands before it.
_NO_OR_BEFORE = (
    r"(?<![,/&;] )(?<!\bor )(?<!\band )(?<!\boder )(?<!\bund )"
    r"(?<!\bau )(?<!\bna )(?<!\bko )(?<!\bda )(?<!\bou )(?<!\bet )"
)
_LONE_LETTER = (
    rf"(?<![\w'])(?<!{MARK})(?!(?<=\d )[fgh])"
    r"(?<![=+*^<>≤≥×])(?<![=+*^<>≤≥×] )(?![a-j]\s?[-=+*^<>≤≥×(])"
    rf"(?!{_NO_OR_BEFORE}[aei] [a-zà-ɏḀ-ỿ]{{2}})"
    rf"[a-j](?![\w'])(?!{MARK})"
)

# A letter of a list of choices, with a label, its mark or what it stands for: Jibu: C, (C), C) 18.
# Not one of two: C) or D), C. and D, C) D
_CHOICE = re.compile(
    r"(?:(?:answer|choice|option) |选项?|[^\s:()\d]{2,}: ?)?[(\[]?([a-z])"
    r"(?:[)\].:](?: (?!.*\b[a-z][).:])(?!(?:.*\b(?:or|and) )?\W*[a-z]\W*$)"
    rf"(?!.*{_LONE_LETTER}).*)?)?"
)


def _judge(answer: str, gold: str, expected: str, limit_s: float) -> tuple[str | None, str]:
    """Return the answer's canonical string, None if it has none, and the reason of its grade.

    expected  the gold's canonical string
    """
    only_number = is_number(expected)
    gold_choice = _CHOICE.fullmatch(expected)
    choice = _CHOICE.fullmatch(plain_text(answer[:MAX_ANSWER_CHARS])) if gold_choice else None
    if gold_choice and choice:
        return choice[1], "right" if choice[1] == gold_choice[1] else "wrong"
    if _is_same_list(answer, gold):
        return expected, "right"
    canonical = normalise(answer, as_text=not only_number)
    if canonical is None:
        return None, "no single answer"
    if canonical == expected and _have_other_units(answer, gold):
        return canonical, "wrong"
    if canonical == expected and _have_equal_letters(answer, gold, expected):
        return canonical, "right"
    if only_number:
        # A question may ask for dozens, and then 7 dozen is 7.
        counts_dozens = normalise(without_dozens(answer)) == expected
        return (expected, "right") if counts_dozens else (canonical, "wrong")
    read_by_it = canonical if is_number(canonical) else answer  # it knows ASCII figures only
    same = _is_same_mathematics(gold, read_by_it, limit_s)
    if same is None:
        return canonical, "time-out"
    return canonical, "right" if same else "wrong"


def _one_of(words: set[str]) -> str:
    """Return a pattern of any of the words."""
    return "|".join(map(re.escape, sorted(words)))


# What stands between the items of a list, but not the comma of thousands: 1,2 and 1; 2 and 1 na 2
_LIST_MARK = re.compile(
    rf" ?(?:[,;]|(?<![^\W\d_])(?:{_one_of(JOINS)})(?![^\W\d_])) ?"
    r"(?!\d{3}(?!\d))"
)
_FIGURES = re.compile(r"[-+\d./]+(?:,[-+\d./]+)+")

# A solution of an equation, with the words or marks behind it: the x = 1 or of "x = 1 or x = 2"
_SOLUTION = re.compile(
    rf"([^\W\d_])(?:_?\d)? ?= ?([-+\d./]+)(?: ?[,;] ?| (?:{_one_of(JOINS | ORS)}) |$)"
)


def _is_same_list(answer: str, gold: str) -> bool:
    """Return whether two texts are the same list of figures, whatever its marks and spaces.

    "1,2" may be a list or a decimal, and beside such a gold both readings are honoured: 1.2 is
    right, which `normalise` finds, and so is 1, 2. Solutions of one unknown have no order:
    x = 2, x = 1.
    """
    figures = _list_of_figures(gold[:MAX_ANSWER_CHARS])
    if len(answer) > MAX_ANSWER_CHARS or not _FIGURES.fullmatch(figures):
        return False
    text = plain_text(answer)
    solutions = _SOLUTION.findall(text)
    if len({name for name, _ in solutions}) == 1 and not _SOLUTION.sub("", text):
        return sorted(value for _, value in solutions) == sorted(figures.split(","))
    return _list_of_figures(answer) == figures


def _list_of_figures(text: str) -> str:
    """Return the text with a comma in the place of each mark of a list: 1 et 2 -> 1,2

    Where semicolons divide, a comma within a figure is its decimal mark: 1,5; 2,5 -> 1.5,2.5
    """
    plain = plain_text(text)
    if ";" in plain:
        plain = re.sub(r"(?<=\d),(?=\d)", ".", plain)
    return _LIST_MARK.sub(",", plain)


def _have_other_units(answer: str, gold: str) -> bool:
    """Return whether both texts name units, and no common one: 5 m and 5 km.

    A text without units is of any, and so is one whose unit the table lacks.
    """
    units = names(plain_text(gold), "units")
    return bool(units) and units.isdisjoint(names(plain_text(answer), "units") or units)


# What makes a text a formula, which a figure alone does not, as in 3:30pm; and what makes it prose.
_FORMULA = re.compile(r"[+*/^=_\\|<>≤≥×√]")
_COMMAND = re.compile(r"\\[a-z]+")
_PROSE = re.compile(r"[^\W\d_]{3}|(?<!\S)[^\W\d_]{2}(?!\S)")


def _have_equal_letters(answer: str, gold: str, expected: str) -> bool:
    """Return whether two texts that are equal when folded are so in the case that matters, too.

    In a formula m and M are two symbols. In words and choices Monday and monday are one.
    expected  the gold's canonical string, which the answer has, too
    """
    letters = _COMMAND.sub(" ", expected)
    if not _FORMULA.search(expected) or _PROSE.search(letters) or letters == letters.upper():
        return True
    return plain_text(answer, fold=False) == plain_text(gold, fold=False)


# Workers that wait for a question. Several exist only when threads grade at the same time.
_idle_workers: list[Popen[str]] = []


def _end_workers() -> None:
    """Kill the idle workers, so that none outlives this process."""
    for worker in _idle_workers:
        worker.kill()
        worker.wait()


atexit.register(_end_workers)
# A forked child would take its parent's replies.
os.register_at_fork(after_in_child=_idle_workers.clear)


def _is_same_mathematics(gold: str, answer: str, limit_s: float) -> bool | None:
    """Return math-verify's verdict on two texts; None: its worker took too long or broke down.

    A worker (mathcheck.py) is started at the first need and kept; Ctrl-C does not reach it.
    """
    command = [sys.executable, "-P", os.path.join(os.path.dirname(__file__), "mathcheck.py")]
    # A worker is out of the list while it works: after an interruption its late reply must not meet
    # another question.
    try:
        worker = _idle_workers.pop()
    except IndexError:
        # A new interpreter and no fork, which threads and CUDA do not survive.
        worker = Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, start_new_session=True
        )
    assert worker.stdin and worker.stdout
    with contextlib.suppress(BrokenPipeError):  # it has just ended, and the empty reply says so
        print(json.dumps([gold, answer, limit_s]), file=worker.stdin, flush=True)
    if reply := worker.stdout.readline():
        _idle_workers.append(worker)
        return json.loads(reply)
    if worker.wait() > 0:  # it ended by itself, with an error, and not by the signal of its limit
        raise OSError(
            f"math-verify does not run ({' '.join(command)} says why): "
            "pip install -r requirements.txt"
        )
    return None
