r"""Read the number that a text says, in many scripts and spellings, or tell that it says none.

The shape is that of a parser:

    answer --plain_text--> without style, currency, degrees (plaintext.py)
           --_find_numbers--> its numbers, and the skeleton, which is the text with a hole for each
           --_is_only_words--> whether words, units and punctuation are all that is around them
           --one_number--> the number as those words scale it, or none (scales.py)

    >>> normalise("፲፰ ብር"), normalise(r"1{,}000.50\text{ shillings}"), normalise("18 or 19")
    ('18', '2001/2', None)

Words of scale count where they stand beside the number. Where they leave it in doubt, and where
a word changes it in another way, there is no single answer:

    >>> print(*map(normalise, ("18 million", "elfu 18", "18 and a half", "18 squared", "not 18")))
    18000000 18000 37/2 None None

Everything that means the same becomes one canonical string. What could be read in two ways is read
in none: a wrong reward teaches worse than a missing one.

No text raises. Functions stand in order of use, and each is preceded by the patterns it uses. A
comment "x -> y" says what becomes of an example.
"""

import itertools
import re
import unicodedata
from fractions import Fraction

from parts.equations import right_side
from parts.phrases import NUMBER, names
from parts.plaintext import MARK, plain_text
from parts.scales import one_number

# A longer answer is an essay or an attack. Python's int() refuses more than 4300 digits, too.
MAX_ANSWER_CHARS = 400
# 10^(10^10) would fill the memory.
MAX_EXPONENT = 100

# The canonical string of a number, and of nothing else: 18, -7/2.
_CANONICAL_NUMBER = re.compile(r"-?\d+(?:/\d+)?")

# What may end a text without being part of it: "monday." -> "monday".
_CLOSING_MARKS = " .,;:?"


# What makes a number a time of day, and is no word: the pm of 3 pm -> p, not the am of am 3. Mai
_HALF_OF_DAY = re.compile(r"\0\s?([ap])\.?m(?![^\W\d_])")


# ---- From a text to its canonical string


def normalise(answer: str, *, as_text: bool = False) -> str | None:
    r"""Return the answer's canonical string: a reduced fraction for a number, else folded text.

    None means: empty, longer than MAX_ANSWER_CHARS, or no single clear answer. (ours)
    as_text  True beside a gold answer that is no number. Then a text with several numbers, or an
             equation, stays the text that it is, and 3 p.m. and May 3 keep what makes them no 3.

    Separators, for figures in any script. Every space and every apostrophe counts alike; the Arabic
    ٬ is an apostrophe and ٫ a period.

    >>> def show(*answers): print(*map(normalise, answers))

    Groups have three figures and no leading 0; Indian groups have two before the last three:

    >>> show("1,000", "1 000", "1'000", "1.000.000", "12,34,567")
    1000 1000 1000 1000000 1234567

    One period, or a comma that cannot group, is the decimal mark:

    >>> show("1.000", "1.5", "3,5", "0,500", "1234,567")
    1 3/2 7/2 1/2 1234567/1000

    Of two kinds of mark, the last one is the decimal mark:

    >>> show("1.000,50", "1,000.50", "1 000,50")
    2001/2 2001/2 2001/2

    These are not one number:

    >>> show("10 20", "1,2,3", "1,000,50", "18 or 19", "x = 1, y = 2", "1/0", "1e999")
    None None None None None None None

    Many forms are read:

    >>> show("3½", r"3\frac12", "1.2e3", r"1.2\times10^3", "፲፰", "1.5万")
    7/2 7/2 1200 1200 18 15000

    Currency, other words, units, the percent sign and all that is left of the last "=" are dropped:

    >>> show("18 birr", "18 m/s²", "18%", "(18)", "x = 18")
    18 18 18 18 18

    What is no number is compared as text:

    >>> show("l8", "2x", r"2\sqrt{3}", r"\text{Monday}.")
    l8 2x 2\sqrt{3} monday
    """
    if len(answer.strip()) > MAX_ANSWER_CHARS:
        return None
    whole = plain_text(answer.strip(), as_text=as_text)
    said = right_side(whole, as_text=as_text)
    numbers, skeleton = _find_numbers(said if as_text else _CONCORD.sub(r"\1 ", said))
    if numbers and _is_only_words(skeleton):
        scaled = one_number(numbers, skeleton)
        if scaled is not None:
            moments = {*names(skeleton, "moments"), *_HALF_OF_DAY.findall(skeleton)}
            return " ".join([str(scaled), *(sorted(moments) if as_text else ())])
        said = ""  # it is about numbers, but not clearly about one
    canonical = said or (whole if as_text else "")
    return canonical.strip().rstrip(_CLOSING_MARKS) or None


def is_number(canonical: str) -> bool:
    """Return whether a canonical string is that of a number, so that equal means equal in value."""
    return _CANONICAL_NUMBER.fullmatch(canonical) is not None


def last_number(text: str) -> str | None:
    """Return the last number among the text's last MAX_ANSWER_CHARS characters, canonically.

    Whatever stands around it does not count. None where there is no number, and where the last one
    cannot be read or is cut: an earlier number, or a part of one, is never taken in its place.

    >>> last_number("9 x 2 = 18 birr."), last_number("18 or 1/0")
    ('18', None)
    """
    # A box is a wrapper of style to plain_text, and \boxed{18} 17 is not the number "18 17".
    apart = _end_of(text.strip()).replace(r"\boxed", "; ")
    numbers, _ = _find_numbers(plain_text(apart))
    number = numbers[-1] if numbers else None
    return None if number is None else str(number)


def _end_of(text: str) -> str:
    r"""Return the text's last MAX_ANSWER_CHARS characters without what may be the end of a number.

    Where the text is cut, an ASCII word is dropped, of which 5 of "1245" or ac{12}{5} of
    "\frac{12}{5}" may be left, and so are the figures and marks behind it, up to the next letter.
    """
    if len(text) <= MAX_ANSWER_CHARS:
        return text
    end = re.sub(r"^[!-~]+", "", text[-MAX_ANSWER_CHARS:])
    return "".join(itertools.dropwhile(_may_be_of_number, end))


def _may_be_of_number(character: str) -> bool:
    """Return whether a character is a numeral of any script, or a mark and no letter."""
    return not character.isalpha() or unicodedata.numeric(character, None) is not None


# What isiZulu and isiXhosa join to a figure with a hyphen, which is no minus: angu-18 -> angu 18
_CONCORD = re.compile(
    rf"(?<![^\W_])(?<!{MARK})(?<![\\'])"
    r"([ui]|(?:[ae]|abe)?ngu|(?:ba|zi|yi|li|lu|bu|ku)(?:ngu|li|yi)"
    r"|[aei](?:ba|zi|yi|li|ma|mi|lu|bu|ku)(?:ngu|ngama|li|yi)?|[aei]?ngama"
    r"|kwe|kwi|kuka|nge|kune|ku|yi|kuyi|uma|ndi)-(?=\d)"
)

# What could be said of a variable: the "squared" of "18 a squared".
_SAID_OF_A_VARIABLE = (
    "(?:squared|cubed|plus|minus|times|over|by|divided|multiplied|raised|factorial"
    "|prime|squares?|equals?|to|of|and|or|is|are|where|when|while|if|for|with|from|in|not|but"
    "|since|as|than|then|so|ko|da|ne|ce|au|na|ou|et|und|oder|m[aá]s|por|plus|fois|mal|hoch|kwa)"
)

# What may stand around a number without changing it. It is matched on the skeleton in which every
# letter and mark has become an "a" and every number a \0.
_PROSE = re.compile(
    r"a+(?:-a+|\.?\s?[/·]\s?a+)*"  # words, also joined ones: birr, km/h, km./h, twenty-one
    # A remark in parentheses, 18 (eighteen birr), 21 (twenty-one), but no difference: 2(x-y)
    r"|\((?:a|\s|(?:(?<=aaa)|(?<=-aa))-(?=aa)|(?<=a)'(?=aa))*\)"
    r"|[\s.,;?\"']"  # punctuation
    # The number itself, what is joined to it, 18-year-old, and what it is divided among, $18/hour
    r"|\0(?:(?:-a+)+|\s?/\s?a+)?"
    r"|(?<!\0):|:(?!\0)"  # a colon, but not one between two numbers, a ratio's: 1:2
)

# The letter of "18 a day", which is no variable: a word follows, and not one that could be said of
# a variable, as in "18 a squared".
_FOR_EACH = (
    rf"(?<=\s)a (?!{_SAID_OF_A_VARIABLE}\b)"
    r"[a-zà-ɏḀ-ỿ]{3,}(?![^\W\d_])(?!.*\b[a-z]\b)"
)

# Letters that belong to a number and make it something else.
_VARIABLE = re.compile(
    # A letter with upper and lower case right before a figure poses as one: the l of "l8", the
    # O of "1O0".
    r"[a-zß-ʯͰ-ԯ]\0"
    # A single letter after it is a variable: 2x, 2 π, 2/x. Metre, gram, litre, hour, second and
    # franc are none (m g l h s f). Nor is the letter of d'accord, of x-axis or of p.m., nor the
    # Spanish "and" of "18 y medio", nor the "for each" of "18 a day", in Hausa "18 a rana".
    rf"|\0\s?/?\s?(?![mglhsf](?!\w)|y (?:medi[oa]|(?:un |tres )?cuartos?)(?!\w)|{_FOR_EACH})"
    rf"[a-zα-ω](?!'|-?[^\W\d_]|(?<![xyz])\.(?![bcnxyz])[^\W\d_](?![^\W\d_])|{MARK})"
    # A product of usual ones is, too: 2xy, 3ab
    r"|\0\s?/?\s?(?:[xyz]{2,3}|abc?|bc)(?![^\W\d_])"
    # Behind a hyphen any such letter may be one, also a unit's and a Cyrillic one: 18-x, 18-m
    rf"|\0-(?:[a-zα-ωасху]|[xyz]{{2,3}}|abc?|bc)(?![^\W\d_]|{MARK})"
)


def _is_only_words(skeleton: str) -> bool:
    """Return whether nothing but words and punctuation is around the numbers of a skeleton."""
    shape = "".join(
        "a" if unicodedata.category(character)[0] in "LM" else character for character in skeleton
    )
    return not _PROSE.sub("", shape) and not _VARIABLE.search(skeleton)


# ---- Find the numbers

# Figures with separators between them, or with only a decimal point before them: 1,000.50 and .5
_FIGURE = rf"(?:\d+(?:[.,' ]\d+)*|(?<![\w.])(?<!{MARK})\.\d+)"

# Ten, hundred, 10^4, 10^8, thousand. In 千克 (kilogram), 千米 (kilometre), 千瓦 (kilowatt) and 千卡
# (kilocalorie) it belongs to the unit.
_HAN_UNIT = "(?:[十百万億]|千(?![克米瓦卡]))"
_HAN = rf"(?:[〇一二三四五六七八九]|{_HAN_UNIT})"

_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)])(?<!{MARK})[-+])?  # "3-5" and "T-18" have no negative number
    (?:
        # Figures that repeat: 0.1(6)
        (?P<repeating>\d+[.,]\d*\(\d+\))
        # A power of ten: 1.2×10^3, 1.2e3, 10^3
        | (?:(?P<factor>{_FIGURE})(?:\s?[×xх*·]\s?10\^|e)|10\^)(?P<exponent>[-+]?\d+)
        # A mixed number: 3 1/2
        | (?P<whole>\d+)\ (?P<part>[1-9]\d*/\d+)
        # A fraction: 7/2, 3/-4
        | (?P<fraction>{_FIGURE}\s?/\s?-?{_FIGURE})
        # A numeral without place values or with units: 1.5万, 三千五百, ፲፰. With a half behind it
        # (半) it has no clear value: 一半 is a half, and 18万半 is either of two.
        | (?P<numeral>(?:\d[\d.,]*\ ?{_HAN_UNIT}(?:\d|,(?=\d{{3}})|{_HAN})*|{_HAN}+)半?|[፩-፼]+)
        # Plain figures: 18
        | (?P<figure>{_FIGURE})
    )
    """,
    re.VERBOSE,
)

# The exponent of a unit, whose figure is no number: 18 cm^2 -> 18 cm, 3 m3 -> 3 m. With a "^" the
# unit may be any word, 18 units^2, but not a product of variables, 18 xy^2, also in the Cyrillic
# letters that look like these, and not a numeral, 一百^2. Of single letters only metre, gram and
# second are units, the Cyrillic second and hour only below a "/". A figure may touch what cannot be
# a product of variables: a metre, a word of katakana, one with a vowel sign.
_UNIT_POWER = re.compile(
    r"(?<![^\W\d_])(?<![\u0900-\u0eff])(?:"
    r"([cdkm]?m|[сдкм]?м|ft|in)(?:\s?\^)?[23]"
    r"|((?<!\d)(?:[mgsh]|(?![abcxyzасху]+\b)[^\W\d_]{2,})|(?:(?<=/)|(?<=/ ))[сч]"
    r"|[\u4e00-\u9fff]*[米尺寸]|[ሜมم]|[ァ-ヿ]{2,}"
    r"|(?=[\u0900-\u0eff]*(?:(?!\w)[\u0900-\u0eff]|[เแโใไ]))[\u0900-\u0eff]{2,})"
    rf"(?<!{_HAN})(?<![፩-፼])\s?\^-?[1-4]"
    r")(?!\w)"
)


# Brackets round the only number, which are no function's: (18), [18 birr], \{18\}
_BRACKETS = re.compile(
    r"(?<![^\s:])(?:\(([^()]*\0[^()]*)\)|\[([^\[\]]*\0[^\[\]]*)\]|\\\{([^{}]*\0[^{}]*)\\\})"
    r"(?![^\s.,;?])"
)


# A number in figures and in Han, one of them in parentheses, perhaps with one and the same counter:
# 一百二十五(125), 18元(十八元)
_SAID_IN_HAN = re.compile(
    rf"({_HAN}+)([^\W\d]?) ?\((\d[\d.,]*)\2?\)(?!{_HAN})"
    rf"|(\d[\d.,]*)([^\W\d]?) ?\(({_HAN}+)\5?\)"
)


def _say_once(match: re.Match[str]) -> str:
    """Return the number in figures; where the two are not equal, what is no number."""
    han, counter, figure = match.group(1, 2, 3) if match[1] else match.group(6, 5, 4)
    is_same = _read_numeral(han) == _read_figure(figure)
    return f"{figure} {counter}" if is_same else "1/0"


def _find_numbers(text: str) -> tuple[list[Fraction | None], str]:
    r"""Return a plain text's numbers, None for one that cannot be read, and its skeleton.

    The skeleton is the text with a \0 in the place of each number, and without brackets round the
    only one.
    """
    numbers: list[Fraction | None] = []
    text = _SAID_IN_HAN.sub(_say_once, text)
    text = _UNIT_POWER.sub(r"\1\2", text)
    has_figures = re.search(r"\d", text)

    def _fill_slot(match: re.Match[str]) -> str:
        # Beside figures a Han numeral is a letter: "18个三明治" is 18 sandwiches, not 18 and 3.
        if has_figures and match["numeral"] and match["numeral"][0] > "፼":
            return match[0]
        numbers.append(_read_number(match))
        return NUMBER

    skeleton = _NUMBER.sub(_fill_slot, text)
    if len(numbers) == 1 and "," not in text:  # (1,2) is a pair
        skeleton = _BRACKETS.sub(r" \1\2\3 ", skeleton)
    return numbers, skeleton


# ---- Read one number


def _read_number(match: re.Match[str]) -> Fraction | None:
    """Read what _NUMBER has found; None where it has no single clear value."""
    value = _read_without_sign(match)
    return -value if value and match["sign"] == "-" else value


def _read_without_sign(match: re.Match[str]) -> Fraction | None:
    """Read the one kind of number that _NUMBER has found."""
    if match["repeating"]:
        return _read_repeating(match["repeating"])
    if match["exponent"]:
        return _read_power_of_ten(match["factor"] or "1", int(match["exponent"]))
    if match["part"]:
        return _read_mixed_number(int(match["whole"]), match["part"])
    if match["fraction"]:
        return _read_fraction(match["fraction"])
    if match["numeral"]:
        return _read_numeral(match["numeral"])
    return _read_figure(match["figure"])


def _read_repeating(figure: str) -> Fraction:
    """Read 0.1(6), which is 1/6: its repeating figures count 9, 99, 999 ... of their last place."""
    whole, decimals, repeating = re.split(r"[.,(]", figure.rstrip(")"))
    difference = int(whole + decimals + repeating) - int(whole + decimals)
    return Fraction(difference, 10 ** len(decimals) * (10 ** len(repeating) - 1))


def _read_power_of_ten(factor: str, exponent: int) -> Fraction | None:
    """Read 1.2×10^3; None past MAX_EXPONENT."""
    number = _read_figure(factor)
    if number is None or abs(exponent) > MAX_EXPONENT:
        return None
    return number * Fraction(10) ** exponent


def _read_mixed_number(whole: int, part: str) -> Fraction | None:
    """Read 3 1/2; None unless the fraction is smaller than one, as in "1 500/3"."""
    fraction = _read_fraction(part)
    return whole + fraction if fraction is not None and fraction < 1 else None


def _read_fraction(fraction: str) -> Fraction | None:
    """Read 7/2 and 3/-4; None for a denominator of zero.

    None also for 1/2,3, which is rather the list of 1/2 and 3. With a decimal comma in the
    numerator, too, it is a fraction: 1,5/2,5.
    """
    figures = [figure.strip().removeprefix("-") for figure in fraction.split("/")]
    top, bottom = map(_read_figure, figures)
    is_list = "," in figures[1] and "," not in figures[0] and not _GROUPED.fullmatch(figures[1])
    if top is None or not bottom or is_list:
        return None
    return -top / bottom if "-" in fraction else top / bottom


# Figures in groups of three by one repeated mark, which is group 1, or in Indian groups: 12,34,567
_GROUPED = re.compile(r"[1-9]\d{0,2}([.,' ])\d{3}(?:\1\d{3})*|[1-9]\d?(?:,\d\d)+,\d{3}")

# The one case in which groups of three are not read as such: 1.000 is one, and 1,000 a thousand.
_ONE_PERIOD = re.compile(r"\d+\.\d+")

# The whole part, the decimal mark, the decimals: 1,000 | . | 50
_DECIMAL = re.compile(r"(.*)([.,])(\d+)")


def _read_figure(figure: str) -> Fraction | None:
    """Read ASCII digits with separators, by the table in `normalise`."""
    is_grouped = _GROUPED.fullmatch(figure) and not _ONE_PERIOD.fullmatch(figure)
    decimal = None if is_grouped else _DECIMAL.fullmatch(figure)
    whole, mark, decimals = decimal.groups() if decimal else (figure, None, "0")
    if re.search(r"\D", whole):  # it has separators of its own
        mark_also_groups = mark is not None and mark in whole
        if mark_also_groups or not _GROUPED.fullmatch(whole):
            return None
    return Fraction(re.sub(r"\D", "", whole or "0") + "." + decimals)


# Units, the largest first, and what the count before each must be smaller than. So 二十百 is no
# numeral and 二十万 is one. Before an Ethiopic ten thousand any count may stand, even another: ፼፼.
_COUNT_LIMITS = {
    "億": 10**8,
    "万": 10**4,
    "千": 10,
    "百": 10,
    "十": 10,
    "፼": float("inf"),
    "፻": 100,
}

# A last figure right behind a unit from a hundred on counts ones or a tenth of the unit: 一千五 is
# 1005 in Japanese, and 1500 in Chinese.
_DOUBTFUL_END = re.compile(r".*[百千万億][1-9一二三四五六七八九]")

# Tens and ones, which add up: ፲፰. Ethiopic has no positions, so that ፩፰ is no number.
_ETHIOPIC_BELOW_100 = re.compile("[፲-፺]?[፩-፱]?")


def _read_numeral(numeral: str) -> Fraction | None:
    """Read 三千五百, 3万5千 and ፲፱፻፺፭ by units, and 二〇二四 by position.

    By units a numeral is a count, its largest unit and a rest; a missing count is one: ፻ is 100.
    """
    numeral = numeral.replace(" ", "")  # 18 万
    if numeral.endswith("半") or _DOUBTFUL_END.fullmatch(numeral):
        return None
    for unit, count_limit in _COUNT_LIMITS.items():
        # ፼ repeats, and then the last one is the one that the others are counts of.
        before, found, after = numeral.rpartition(unit) if unit == "፼" else numeral.partition(unit)
        if found:
            size = int(unicodedata.numeric(unit))
            count = _read_numeral(before or "一")
            rest = _read_numeral(after or "〇")
            if count is None or rest is None or count >= count_limit or rest >= size:
                return None
            return count * size + rest
    if _ETHIOPIC_BELOW_100.fullmatch(numeral):
        return Fraction(sum(int(unicodedata.numeric(character)) for character in numeral))
    return _read_figure("".join(_position_digit(character) for character in numeral))


def _position_digit(character: str) -> str:
    """Return the ASCII digit of a Han one such as 八 or 〇, and any other character as it is."""
    is_han = character.isalpha() or character == "〇"
    return str(int(unicodedata.numeric(character))) if is_han else character
