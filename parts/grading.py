r"""Grade answers written in many scripts: extract, normalise, compare.

One grader gives GRPO its reward and the evaluation its metric, so the two can never disagree:

    completion --extract_answer--> answer --normalise--> canonical string --grade--> right or wrong, and why

    >>> is_correct(r"... 9 እንቁላል x 2 ብር = \boxed{፲፰ ብር}", "18")
    True

A number is compared exactly, as a fraction; anything else as a folded string, and by math-verify in a worker process.
What could be read in two ways is read in none: a wrong reward teaches worse than a missing one. Nothing a model can
write raises or hangs, and the time grows linearly with the completion. Functions stand in order of use.
"""

import atexit
import contextlib
import json
import os
import re
import sys
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

MAX_ANSWER_CHARS = (
    400  # a longer box is an essay or an attack, and int() refuses more than 4300 digits
)
MAX_EXPONENT = 100  # 10^(10^10) would fill the memory
MATH_LIMIT_S = (
    5.0  # math-verify takes a tenth of a second for a usual answer, and hours for 9^(9^9)
)

_idle_workers: list[Popen[str]] = []
os.register_at_fork(
    after_in_child=_idle_workers.clear
)  # a forked child would take its parent's replies
atexit.register(
    lambda: [(worker.kill(), worker.wait()) for worker in _idle_workers]
)  # none outlives this process
_BRACES = re.compile(
    r"\\boxed\s*\{|\\[{}]|[{}]"
)  # what counts for nesting; an escaped brace is skipped
_NUMERAL = re.compile(r"-?\d+(?:/\d+)?")  # the canonical string of a number, and of nothing else


@dataclass(frozen=True)
class Grade:
    """What a completion is worth. The lenient reading is reported apart: it never makes an answer correct."""

    answer: (
        str | None
    )  # content of the last complete box after the think block; None: not formatted
    canonical: str | None  # the answer normalised; None: no single answer
    lenient: (
        str | None
    )  # canonical; where there is no answer, from the last box anywhere or else the last number
    correct: bool
    lenient_correct: bool
    reason: str  # "right", "wrong", "no box", "think block not closed", "no single answer", "time-out" (math-verify's)


def grade(
    completion: str, gold: str, *, think_open: bool = False, limit_s: float = MATH_LIMIT_S
) -> Grade:
    r"""Return whether the completion's boxed answer equals the gold, and why.

    completion, think_open  as in `extract_answer`; no completion raises
    gold  a plain answer, such as a data set's answer column
    limit_s  how long math-verify may compute, in seconds; then its worker is killed
    To a gold number only a number is equal, and no arithmetic is done: \boxed{9 \times 2} may just quote the problem.
    To any other gold an equal text is equal, or what math-verify finds equal: \sqrt{12} to 2\sqrt{3}, "2, 1" to "1, 2".
    Raises ValueError for a gold without canonical form, OSError when math-verify does not run. (ours)
    """
    expected = normalise(gold, as_text=True)
    if expected is None:
        raise ValueError(
            f"unusable gold answer {gold[:80]!r}: give one number or one short text, like '18' or '7/2'"
        )
    only_number = _NUMERAL.fullmatch(expected) is not None

    def _judge(answer: str) -> tuple[str | None, str]:
        canonical = normalise(answer, as_text=not only_number)
        if canonical is None:
            return None, "no single answer"
        if canonical == expected or only_number:
            return canonical, "right" if canonical == expected else "wrong"
        same = _is_same_mathematics(
            gold, canonical if _NUMERAL.fullmatch(canonical) else answer, limit_s
        )
        return canonical, "time-out" if same is None else "right" if same else "wrong"

    answer = extract_answer(completion, think_open=think_open)
    if answer is not None:
        canonical, reason = _judge(answer)
        return Grade(answer, canonical, canonical, reason == "right", reason == "right", reason)
    numbers, _ = _find_numbers(_plain_text(completion.strip()[-MAX_ANSWER_CHARS:]))
    last_number = "".join(str(number) for number in numbers[-1:] if number is not None)
    lenient, verdict = _judge(extract_answer(re.sub("</?think>", " ", completion)) or last_number)
    unclosed = (
        extract_answer(completion + r"\boxed{0}", think_open=think_open) is None
    )  # not even this one would count
    return Grade(
        None,
        None,
        lenient,
        False,
        verdict == "right",
        "think block not closed" if unclosed else "no box",
    )


def is_correct(completion: str, gold: str, *, think_open: bool = False) -> bool:
    """Return `grade(...).correct`."""
    return grade(completion, gold, think_open=think_open).correct


def extract_answer(completion: str, *, think_open: bool = False) -> str | None:
    r"""Return the content of the last complete \boxed{...} after the think block, or None when there is no answer.

    completion  the generated text, without the prompt
    think_open  True when the prompt ended inside a think block: then an answer needs a closing </think>
    Only the text after the last </think> counts; a <think> opened there is unclosed, and then nothing counts.
    Never falls back to a number in the text, to an earlier box, or into the think block. (ours)

    >>> extract_answer(r"perhaps \boxed{17}?</think> So \boxed{17} + 1 = \boxed{\frac{36}{2}}.")
    '\\frac{36}{2}'
    """
    _, closing_tag, text = completion.rpartition("</think>")
    if "<think>" in text or (think_open and not closing_tag):
        return None
    content, last_start = "", -1
    open_braces: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    for match in _BRACES.finditer(text):
        if match[0] == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and start > last_start:
                content, last_start = text[start : match.start()], start
        elif match[0][-1] == "{" and match[0] != r"\{":
            open_braces.append((match[0] != "{", match.end()))
    return content.strip() or None


def normalise(answer: str, *, as_text: bool = False) -> str | None:
    r"""Return the answer's canonical string: a reduced fraction for a number, folded text for anything else.

    None means: empty, longer than MAX_ANSWER_CHARS, or no single clear answer. (ours)
    as_text  True beside a gold that is no number: then several numbers, or an equation, stay the text that they are

    Separators, for figures in any script (every space and apostrophe counts alike, ٬ is an apostrophe and ٫ a period):

    >>> def show(*answers): print(*map(normalise, answers))
    >>> show("1,000", "1 000", "1'000", "1.000.000", "12,34,567")  # no leading 0, groups of three; Indian groups
    1000 1000 1000 1000000 1234567
    >>> show("1.000", "1.5", "3,5", "0,500", "1234,567")  # one period, or a comma that cannot group: the decimal mark
    1 3/2 7/2 1/2 1234567/1000
    >>> show("1.000,50", "1,000.50", "1 000,50")  # two kinds: the last one is the decimal mark
    2001/2 2001/2 2001/2
    >>> show("10 20", "1,2,3", "1,000,50", "18 or 19", "x = 1, y = 2", "18 million", "1/0", "1e999")  # not one number
    None None None None None None None None

    Forms, and what is dropped: currency, words, units, the percent sign, all left of the last "=":

    >>> show("3½", r"3\frac12", "1.2e3", r"1.2\times10^3", "፲፰", "1.5万", "18 birr", "18 cm²", "18%", "x = 18")
    7/2 7/2 1200 1200 18 15000 18 18 18 18
    >>> show("l8", "2x", r"2\sqrt{3}", r"\text{Monday}.")  # not numbers: compared as text
    l8 2x 2\sqrt{3} monday
    """
    if len(answer.strip()) > MAX_ANSWER_CHARS:
        return None
    whole = _plain_text(answer.strip())
    *left_sides, text = [whole] if _INEQUALITY.search(whole) else whole.split("=")
    if as_text and not all(map(_NAME.fullmatch, left_sides)):
        text = whole
    elif any(map(_ENDS_IN_NAME.search, left_sides[1:])):  # two equations
        text = ""
    numbers, skeleton = _find_numbers(text)
    shape = "".join(
        "a" if unicodedata.category(character)[0] in "LM" else character for character in skeleton
    )
    if numbers and not _PROSE.sub("", shape) and not _VARIABLE.search(skeleton):
        if len(numbers) == 1 and numbers[0] is not None and not _CHANGING_WORDS.search(skeleton):
            return str(numbers[0])
        text = ""
    return (text or (whole if as_text else "")).strip().rstrip(" .,;:?") or None


def _is_same_mathematics(gold: str, answer: str, limit_s: float) -> bool | None:
    """Return math-verify's verdict on two texts, None when its worker took longer than the limit or broke down.

    A worker (mathcheck.py) starts at the first need and is kept; Ctrl-C does not reach it.
    """
    command = [sys.executable, "-P", os.path.join(os.path.dirname(__file__), "mathcheck.py")]
    try:
        worker = (
            _idle_workers.pop()
        )  # after an interruption its late reply must meet no other question
    except IndexError:  # a new interpreter, no fork: threads and CUDA do not survive one
        worker = Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, start_new_session=True
        )
    assert worker.stdin and worker.stdout
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([gold, answer, limit_s]), file=worker.stdin, flush=True)
    if reply := worker.stdout.readline():
        _idle_workers.append(worker)
        return json.loads(reply)
    if worker.wait() > 0:  # no signal ended it
        raise OSError(
            f"math-verify does not run ({' '.join(command)} says why): pip install -r requirements.txt"
        )
    return None


_SAME_AS = dict.fromkeys("−–‐‑‒", "-") | dict.fromkeys("’‘ʼ′`٬", "'") | dict.fromkeys("“”„«»", '"')
_SAME_AS |= dict.fromkeys("⁄∕", "/") | dict.fromkeys("፣፤、؛", ";") | dict.fromkeys("。።।۔٫", ".")
_SAME_AS |= {"،": ",", "፡": " ", "؟": "?", "٪": "%", "º": "°"}
_SAME_AS |= {"萬": "万", "亿": "億", "两": "二", "兩": "二", "零": "〇"}
# Against its number ("R18", "KSh500"); ₦ is found by its Unicode category, "naira" or "元" are words like any other.
_CURRENCY_PREFIX = (
    "(?:[rnkm]|br|rs|tk|k?shs?|[tu]sh|fc?|f?cfa|frw|gh[cs]|usd?|eur|gbp|ngn|etb|kes|tzs|ugx|rwf|zar|zmw|lsl|xaf|xof|"
    "jpy|cny|rmb|thb|inr|bdt|birr|naira|cedis?|rand)"
)
_ARGUMENT = r"\s*(?:\{\s*(-?[\w.,' ]+?)\s*\}|(\d))"
_REWRITES = (
    (r"\\!|\\(?:left|right)(?![a-z])", ""),  # 1,\!000
    (r"\\[,;: ()\[\]]|\\q?quad(?![a-z])|~", " "),  # 1\,000 and \(18\)
    (r"\{,\}", ","),  # 1{,}000
    (r"\\(?:times|cdot)(?![a-z])", "×"),
    (rf"\\[dt]?frac{_ARGUMENT}{_ARGUMENT}", r" \1\2/\3\4 "),  # spaces keep 1\frac12 apart from 11/2
    (r"\^\{(-?\d+|\w)\}", r"^\1"),  # 10^{3}
    (r"(?<=[-+])\s*\\?\$\s*", ""),  # -$18: the sign keeps its number
    (r"\^\s*\{?\s*\\circ\s*\}?|°\s?(?:[cf]\b)?|\\?[$%]", " "),  # 18^\circ, 18°C, 18 $, 18\%
    (r"(?<=\d)/[=-](?!\s*\d)", " "),  # 500/= and 500/-: so many shillings
    (rf"(?<!\w){_CURRENCY_PREFIX}(?=\d)", ""),
    (r"(?<!\w)(?:minus|negative|moins|menos|hasi)(?!\w)\s*|[负負]|マイナス", " -"),
    (
        r"((?:^|[:=])\s*[-+])\s+(?=[\d.])",
        r"\1",
    ),  # "- 18" is -18, but the dash of "answer - 18" is not read
)
# \text{...} and its like, and braces that belong to no command: only their content counts.
_WRAPPER = re.compile(
    r"(?:\\(?:text(?:bf|it)?|math(?:rm|bf|it)|mbox|underline)\s*|(?<![\w}^\\]))\{([^{}]*)\}"
)
_INEQUALITY = re.compile(r"[<>≤≥≠!]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")
_ENDS_IN_NAME = re.compile(r"[^\W\d_]\s*$")
_NAME = re.compile(
    r"[^\d+*/^×·|{}-]*"
)  # left of the "=" of a gold that is no equation: x, f(x), (a, b)


def _plain_text(answer: str) -> str:
    """Return the answer with ASCII digits, one kind of minus, space and apostrophe, no LaTeX wrapping, no currency."""
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda run: "^" + unicodedata.normalize("NFKC", run[0]), answer
    )
    text = unicodedata.normalize("NFC", "".join(map(_plain_character, text)).casefold())
    wrappers_left = True
    while wrappers_left:  # innermost first; each round but the last removes a pair of braces
        for pattern, replacement in _REWRITES:
            text = re.sub(pattern, replacement, text)
        text, wrappers_left = _WRAPPER.subn(r" \1 ", text)
    return " ".join(text.split())


def _plain_character(character: str) -> str:
    """Return the plain spelling of one character; "" for what cannot be seen, such as direction marks."""
    category = unicodedata.category(character)
    if character.isspace() or category in ("Cc", "Cf", "Cs"):
        return " " if character.isspace() else ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Sc":
        return "$"
    folded = unicodedata.normalize("NFKC", _SAME_AS.get(character, character))
    if (
        category == "No"
    ):  # ², ①, ፲ stay, for NFKC would turn "1①" into "11"; "½" gets spaces, for "3½"
        return f" {folded.replace('⁄', '/')} " if "⁄" in folded else character
    return "".join(_SAME_AS.get(part, part) for part in folded)


_FIGURE = r"(?:\d+(?:[.,' ]\d+)*|(?<![\w.])\.\d+)"
_HAN_UNIT = "(?:[十百万億]|千(?![克米瓦卡]))"  # 千克 is a kilogram, not a thousand of anything
_HAN = rf"(?:[〇一二三四五六七八九]|{_HAN_UNIT})"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)])[-+])?          # "3-5" and "T-18" have no negative number
    (?: (?:(?P<factor>{_FIGURE})(?:\s?[×x*·]\s?10\^|e)|10\^)(?P<exponent>[-+]?\d+)
      | (?P<whole>\d+)\ (?P<part>[1-9]\d*/\d+) | (?P<fraction>{_FIGURE}\s?/\s?{_FIGURE})
      | (?P<numeral>\d[\d.,]*{_HAN_UNIT}(?:\d|{_HAN})*|{_HAN}+|[፩-፼]+)
      | (?P<figure>{_FIGURE}) )""",
    re.VERBOSE,
)
_UNIT_POWER = re.compile(r"(?<![^\W\d_])([cdkm]?m|ft|in)(?:\s?\^)?[23](?!\w)")  # cm^2, m3
# On the skeleton with every letter and mark as "a": words, remarks in parentheses, punctuation. A ratio's colon is not.
_PROSE = re.compile(r"a+(?:[-/]a+)*|\([a\s]*\)|[\s.,;?\"']|\0|(?<!\0):|:(?!\0)")
# A cased letter against a number poses as a digit ("l8", "1O0"); a lone one after it is a variable ("2x", "2 π"),
# unless it is metre, gram, litre, hour, second or franc.
_VARIABLE = re.compile(r"[a-zß-ʯͰ-ԯ]\0|\0\s?(?![mglhsf](?!\w))[a-zα-ω](?!'|-?[^\W\d_])")
# With these "any words are dropped" would change the number: "18 million" is not 18.
_CHANGING_WORDS = re.compile(
    r"(?<!\w)(?:hundreds?|thousands?|millions?|billions?|trillions?|dozens?|lakhs?|crores?|half|mille|milliards?|demi|"
    r"mil|millones|medio|tausend|millionen|milliarden|тысяч\w*|миллион\w*|mia|elfu|laki|milioni|nusu|dubu|miliyan|rabi|"
    r"ሺህ?|ሚሊዮን|মিলিয়ন|হাজার|লক্ষ|লাখ|কোটি)(?![^\W\d_])|พัน|หมื่น|แสน|ล้าน"
)


def _find_numbers(text: str) -> tuple[list[Fraction | None], str]:
    r"""Return a plain text's numbers (None for one that cannot be read) and its skeleton, a \0 for each number."""
    numbers: list[Fraction | None] = []

    def _fill_slot(match: re.Match[str]) -> str:
        if match["numeral"] and match["numeral"][0] > "፼" and re.search(r"\d", text):
            return match[0]  # beside figures 三 is a letter: "18个三明治" is 18 sandwiches
        numbers.append(_read_number(match))
        return "\0"

    return numbers, _NUMBER.sub(_fill_slot, _UNIT_POWER.sub(r"\1", text))


# Groups of three by one repeated mark, or Indian groups; group 1 is the mark.
_GROUPED = re.compile(r"[1-9]\d{0,2}([.,' ])\d{3}(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3}")
# Largest first; the count before a unit is smaller than this: 二十百 is no numeral, 二十万 is, and so is ፼፼.
_COUNT_LIMITS = {
    "億": 10**8,
    "万": 10**4,
    "千": 10,
    "百": 10,
    "十": 10,
    "፼": float("inf"),
    "፻": 100,
}


def _read_number(match: re.Match[str]) -> Fraction | None:
    """Read what _NUMBER has found: 1.2×10^3; 7/2 or 3 1/2, whose fraction must be proper (1 500/3); a numeral."""
    value = None
    if match["exponent"]:
        factor, exponent = _read_figure(match["factor"] or "1"), int(match["exponent"])
        value = (
            None
            if factor is None or abs(exponent) > MAX_EXPONENT
            else factor * Fraction(10) ** exponent
        )
    elif fraction := match["part"] or match["fraction"]:
        top, bottom = (_read_figure(figure.strip()) for figure in fraction.split("/"))
        if top is not None and bottom and (not match["whole"] or top < bottom):
            value = int(match["whole"] or 0) + top / bottom
    else:
        value = (
            _read_numeral(match["numeral"]) if match["numeral"] else _read_figure(match["figure"])
        )
    return -value if value and match["sign"] == "-" else value


def _read_figure(figure: str) -> Fraction | None:
    """Read ASCII digits with separators, by the table in `normalise`."""
    is_grouped = _GROUPED.fullmatch(figure) and not re.fullmatch(
        r"\d+\.\d+", figure
    )  # 1.000 is one, 1,000 a thousand
    decimal = None if is_grouped else re.fullmatch(r"(.*)([.,])(\d+)", figure)
    whole, mark, part = decimal.groups() if decimal else (figure, None, "0")
    if re.search(r"\D", whole) and (not _GROUPED.fullmatch(whole) or (mark and mark in whole)):
        return None
    return Fraction(re.sub(r"\D", "", whole or "0") + "." + part)


def _read_numeral(numeral: str) -> Fraction | None:
    """Read 三千五百, 3万5千 and ፲፱፻፺፭ by units (count, largest unit, rest), 二〇二四 by position.

    A missing count is one: ፻ is 100. Ethiopic knows no positions, only tens and ones that add up: ፩፰ is no number.
    """
    for unit, count_limit in _COUNT_LIMITS.items():
        before, found, after = numeral.rpartition(unit) if unit == "፼" else numeral.partition(unit)
        if found:
            size = int(unicodedata.numeric(unit))
            count, rest = _read_numeral(before or "一"), _read_numeral(after or "〇")
            if count is None or rest is None or count >= count_limit or rest >= size:
                return None
            return count * size + rest
    if re.fullmatch("[፲-፺]?[፩-፱]?", numeral):
        return Fraction(sum(int(unicodedata.numeric(character)) for character in numeral))
    return _read_figure(
        "".join(
            str(int(unicodedata.numeric(c))) if c.isalpha() or c == "〇" else c for c in numeral
        )
    )
