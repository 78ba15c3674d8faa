r"""Grade answers written in many scripts: extract, normalise, compare.

One grader gives GRPO its reward and the evaluation its metric, so the two can never disagree:

    completion --extract_answer--> answer --normalise--> canonical string, equal to the gold's canonical string or not

    >>> is_correct(r"... 9 እንቁላል x 2 ብር = \boxed{፲፰ ብር}", "18")
    True

A number is compared exactly, as a fraction, anything else as a normalised string. What could be read in two ways is
read in none: a wrong reward teaches worse than a missing one. Nothing a model can write raises, and the time grows
linearly with the completion. Below the three public functions stands the reading of one short answer, in order of use.
"""

import re
import unicodedata
from fractions import Fraction

MAX_ANSWER_CHARS = 200  # a longer box is an essay or an attack, and int() refuses more than 4300 digits
MAX_EXPONENT = 100  # 10^(10^10) would fill the memory

# ---- The three public functions: extract, normalise, compare

# What counts for nesting: a box that opens, an escaped brace (skipped), a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def extract_answer(completion: str, *, think_open: bool = False) -> str | None:
    r"""Return the content of the last complete \boxed{...} after the think block, or None when there is no answer.

    completion  the generated text, without the prompt
    think_open  True when the prompt ended inside a think block: then an answer needs a closing </think>
    Only the text after the last </think> counts; a <think> opened there is unclosed, and then nothing counts.
    Never falls back to a number in the text, to an earlier box, or into the think block. (ours)

    >>> extract_answer(r"perhaps \boxed{17}?</think> So \boxed{17} + 1 = \boxed{\frac{36}{2}}.")
    '\\frac{36}{2}'
    >>> extract_answer(r"still thinking, \boxed{18}", think_open=True) is None
    True
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


def normalise(answer: str) -> str | None:
    r"""Return the answer's canonical string: a reduced fraction for a number, folded text for anything else.

    None means: empty, longer than MAX_ANSWER_CHARS, or no single clear answer. (ours)

    Separators, for figures in any script (every space and apostrophe counts alike, ٬ is an apostrophe and ٫ a period):

    >>> def show(*answers): print(*map(normalise, answers))
    >>> show("1,000", "1 000", "1'000", "1,000,000", "1.000.000")  # 1-3 digits without leading 0, then groups of three
    1000 1000 1000 1000000 1000000
    >>> show("1,00,000", "12,34,567")  # Indian groups: twos, and a last three
    100000 1234567
    >>> show("1.000", "1.5", "3,5", "0,500", "1234,567")  # one period, or a comma that cannot group: the decimal mark
    1 3/2 7/2 1/2 1234567/1000
    >>> show("1.000,50", "1,000.50", "1 000,50")  # two kinds: the last one is the decimal mark
    2001/2 2001/2 2001/2
    >>> show("10 20", "1,2,3", "1,000,50", "18, 19")  # anything else is more than one number
    None None None None

    Forms and surroundings:

    >>> show("7/2", r"\dfrac{7}{2}", "3 1/2", r"3\frac12", "3½", "1.2e3", r"1.2\times10^3", "1.2×10³", "10²")
    7/2 7/2 7/2 7/2 7/2 1200 1200 1200 100
    >>> show("١٨", "፲፰", "十八", "1.5万", "−18", "minus 18")
    18 18 18 15000 -18 -18
    >>> show("$18", "R18", "18/=", "18 birr", "tufaha 18", "18 cm²", "18°")  # currency, words and units are dropped
    18 18 18 18 18 18 18
    >>> show("50%", "x = 18", "6 x 3 = 18 eggs")  # the percent sign is dropped too; right of the last "=" counts
    50 18 18
    >>> show("18 or 19", "18 million", "1/0", "1e999", "x = 1, y = 2")
    None None None None None
    >>> show("l8", "2x", r"2\sqrt{3}", r"\text{Monday}.")  # not numbers: compared as text
    l8 2x 2\sqrt{3} monday
    """
    if len(answer.strip()) > MAX_ANSWER_CHARS:
        return None
    text = _answer_side(_plain_text(answer.strip()))
    numbers, skeleton = _find_numbers(text)
    if not numbers or not _is_prose(skeleton):
        return text.rstrip(" .,;:?") or None
    if len(numbers) > 1 or numbers[0] is None or _CHANGING_WORDS.search(skeleton):
        return None
    return str(numbers[0])


def is_correct(completion: str, gold: str, *, think_open: bool = False) -> bool:
    """Return whether the completion's boxed answer equals the gold, exactly, after both are normalised.

    completion, think_open  as in `extract_answer`; no completion raises
    gold  a plain answer, such as a data set's answer column
    Raises ValueError when the gold itself has no canonical form. (ours)
    """
    canonical_gold = normalise(gold)
    if canonical_gold is None:
        raise ValueError(f"unusable gold answer {gold[:80]!r}: give one number or one short text, like '18' or '7/2'")
    answer = extract_answer(completion, think_open=think_open)
    return answer is not None and normalise(answer) == canonical_gold


# ---- One plain text: ASCII digits, one kind of minus, space and apostrophe, no LaTeX wrapping, no currency

_SAME_AS = dict.fromkeys("−–‐‑‒", "-") | dict.fromkeys("’‘ʼ′`٬", "'") | dict.fromkeys("“”„«»", '"')
_SAME_AS |= dict.fromkeys("⁄∕", "/") | dict.fromkeys("፣፤、؛", ";") | dict.fromkeys("。።।۔٫", ".")
_SAME_AS |= {"،": ",", "፡": " ", "؟": "?", "٪": "%", "º": "°"}
_SAME_AS |= {"萬": "万", "亿": "億", "两": "二", "兩": "二", "零": "〇"}
# Prefixes that stand against their number ("R18", "KSh500"). Signs like ₦ are found by their Unicode category, and
# "dollars", "naira", "birr", "shilingi", "faranga", "元" need no list: any words around a single number are dropped.
_CURRENCY_PREFIX = (
    "(?:[rnkm]|br|rs|tk|k?shs?|[tu]sh|fc?|f?cfa|frw|gh[cs]|usd?|eur|gbp|ngn|etb|kes|tzs|ugx|rwf|zar|zmw|lsl|xaf|xof|"
    "jpy|cny|rmb|thb|inr|bdt|birr|naira|cedis?|rand)"
)
_ARGUMENT = r"\s*(?:\{\s*(-?[\w.,' ]+?)\s*\}|(\d))"
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
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
        (r"((?:^|[:=])\s*[-+])\s+(?=[\d.])", r"\1"),  # "- 18" is -18, but the dash of "answer - 18" is not read
    )
)
# \text{...} and its like, and braces that belong to no command: only their content counts.
_WRAPPER = re.compile(r"(?:\\(?:text(?:bf|it)?|math(?:rm|bf|it)|mbox|underline)\s*|(?<![\w}^\\]))\{([^{}]*)\}")
_INEQUALITY = re.compile(r"[<>≤≥≠!]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")
_ENDS_IN_NAME = re.compile(r"[^\W\d_]\s*$")


def _plain_text(answer: str) -> str:
    """Return the answer folded to one spelling: characters first, then LaTeX, then signs around numbers."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda run: "^" + unicodedata.normalize("NFKC", run[0]), answer)
    text = unicodedata.normalize("NFC", "".join(map(_plain_character, text)).casefold())
    wrappers_left = True
    while wrappers_left:  # innermost first; each round but the last removes a pair of braces
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text, wrappers_left = _WRAPPER.subn(r" \1 ", text)
    return " ".join(text.split())


def _plain_character(character: str) -> str:
    """Return the plain spelling of one character; "" for what cannot be seen, such as direction marks.

    Other numerals (², ①, Ethiopic) are left alone: NFKC would turn "1①" into "11". "½" gets spaces, for "3½".
    """
    category = unicodedata.category(character)
    if character.isspace() or category in ("Cc", "Cf", "Cs"):
        return " " if character.isspace() else ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Sc":
        return "$"
    folded = unicodedata.normalize("NFKC", _SAME_AS.get(character, character))
    if category == "No":
        return f" {folded.replace('⁄', '/')} " if "⁄" in folded else character
    return "".join(_SAME_AS.get(part, part) for part in folded)


def _answer_side(text: str) -> str:
    """Return what stands right of the last "="; "" for two equations side by side ("x = 1, y = 2")."""
    if "=" not in text or _INEQUALITY.search(text):
        return text
    *sides, last_side = text.split("=")
    return "" if any(map(_ENDS_IN_NAME.search, sides[1:])) else last_side.strip()


# ---- Numbers in a plain text

_FIGURE = r"(?:\d+(?:[.,' ]\d+)*|(?<![\w.])\.\d+)"
_HAN_UNIT = "(?:[十百万億]|千(?![克米瓦卡]))"  # 千克 is a kilogram, not a thousand of anything
_HAN = rf"(?:[〇一二三四五六七八九]|{_HAN_UNIT})"
_NUMBER = re.compile(
    rf"""(?P<sign>(?<![\w)])[-+])?          # "3-5" and "T-18" have no negative number
    (?: (?P<power>    (?:{_FIGURE}\s?[×x*·]\s?)?10\^[-+]?\d+ | {_FIGURE}e[-+]?\d+ )
      | (?P<mixed>    \d+\ [1-9]\d*/\d+ )
      | (?P<fraction> {_FIGURE}\s?/\s?{_FIGURE} )
      | (?P<han>      \d[\d.,]*{_HAN_UNIT}(?:\d|{_HAN})* | {_HAN}+ )
      | (?P<ethiopic> [፩-፼]+ )
      | (?P<figure>   {_FIGURE} ) )""",
    re.VERBOSE,
)
_SLOT = "\0"  # stands for a number in the skeleton; control characters are gone from a plain text

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
    """Return a plain text's numbers (None for one that cannot be read) and its skeleton, a slot for each number."""
    numbers: list[Fraction | None] = []
    has_digit = re.search(r"\d", text) is not None

    def _fill_slot(match: re.Match[str]) -> str:
        kind = str(match.lastgroup)  # the form's group closes last
        if has_digit and kind == "han" and not match["han"][0].isdigit():
            return match[0]  # beside figures 三 is a letter: "18个三明治" is 18 sandwiches
        value = _READERS[kind](match[kind])
        numbers.append(-value if value is not None and match["sign"] == "-" else value)
        return _SLOT

    return numbers, _NUMBER.sub(_fill_slot, _UNIT_POWER.sub(r"\1", text))


def _is_prose(skeleton: str) -> bool:
    """Return whether only words and punctuation surround the numbers, so that dropping them loses nothing."""
    shape = "".join("a" if unicodedata.category(character)[0] in "LM" else character for character in skeleton)
    return not _PROSE.sub("", shape) and not _VARIABLE.search(skeleton)


# ---- One number: a reader for each form, from its text to its value, None when the form is broken

# Groups of three by one repeated mark, or Indian groups; group 1 is the mark.
_GROUPED = re.compile(r"[1-9]\d{0,2}([.,' ])\d{3}(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3}")
_DECIMAL = re.compile(r"(.*)([.,])(\d+)")
# Largest first; the count before a unit is smaller than this: 二十百 is no numeral, 二十万 is.
_HAN_COUNT_LIMITS = {"億": 10**8, "万": 10**4, "千": 10, "百": 10, "十": 10}
_PAIR = "[፲-፺]?[፩-፱]?"  # tens, ones
_ETHIOPIC = re.compile(f"(?:(?:{_PAIR}፻)?{_PAIR}፼)*(?:{_PAIR}፻)?{_PAIR}")


def _read_figure(figure: str) -> Fraction | None:
    """Read ASCII digits with separators, by the table in `normalise`."""
    is_grouped = _GROUPED.fullmatch(figure) and not re.fullmatch(r"\d+\.\d+", figure)  # 1.000 is one, 1,000 a thousand
    decimal = None if is_grouped else _DECIMAL.fullmatch(figure)
    whole, mark, part = decimal.groups() if decimal else (figure, None, "0")
    if re.search(r"\D", whole) and (not _GROUPED.fullmatch(whole) or (mark and mark in whole)):
        return None
    return Fraction(re.sub(r"\D", "", whole or "0") + "." + part)


def _read_power(power: str) -> Fraction | None:
    """Read 1.2e3, 1.2×10^3 or 10^3."""
    mantissa, exponent = re.split(r"\s?[×x*·]\s?10\^|e|10\^", power, maxsplit=1)
    value = _read_figure(mantissa or "1")
    return None if value is None or abs(int(exponent)) > MAX_EXPONENT else value * Fraction(10) ** int(exponent)


def _read_fraction(fraction: str) -> Fraction | None:
    """Read 7/2 or 1 000 / 3."""
    top, bottom = (_read_figure(figure.strip()) for figure in fraction.split("/"))
    return top / bottom if top is not None and bottom else None


def _read_mixed(mixed: str) -> Fraction | None:
    """Read 3 1/2; the fraction must be proper, for "1 500/3" could also be 1500/3."""
    whole, top, bottom = map(int, re.split("[ /]", mixed))
    return whole + Fraction(top, bottom) if top < bottom else None


def _read_han(numeral: str) -> Fraction | None:
    """Read 二〇二四 by position and 三千五百, 3万5千 by units: count, largest unit, rest."""
    for unit, count_limit in _HAN_COUNT_LIMITS.items():
        before, found, after = numeral.partition(unit)
        if found:
            size = int(unicodedata.numeric(unit))
            count, rest = _read_han(before or "一"), _read_han(after or "〇")
            if count is None or rest is None or count >= count_limit or rest >= size:
                return None
            return count * size + rest
    return _read_figure("".join(str(int(unicodedata.numeric(c))) if c.isalpha() or c == "〇" else c for c in numeral))


def _read_ethiopic(numeral: str) -> Fraction | None:
    """Read ፲፱፻፺፭: tens and ones add up, ፻ takes the pair before it a hundredfold, ፼ all before it ten thousandfold.

    A missing count is one (፻ is 100). Digits in a row (፩፰) are no Ethiopic numeral, which knows no positions.
    """
    if not _ETHIOPIC.fullmatch(numeral):
        return None
    myriads, hundreds, pair = 0, 0, 0
    for character in numeral:
        if character == "፻":
            hundreds, pair = 100 * (pair or 1), 0
        elif character == "፼":
            myriads, hundreds, pair = 10_000 * (myriads + hundreds + pair or 1), 0, 0
        else:
            pair += int(unicodedata.numeric(character))
    return Fraction(myriads + hundreds + pair)


_READERS = {
    "power": _read_power,
    "mixed": _read_mixed,
    "fraction": _read_fraction,
    "han": _read_han,
    "ethiopic": _read_ethiopic,
    "figure": _read_figure,
}
