"""Numbers in every script and spelling: written by other means than ours, and read back."""

import doctest
import re
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import numerals
from parts.numerals import MAX_ANSWER_CHARS, MAX_EXPONENT, is_number, last_number, normalise

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# The zero of each script that has decimal digits.
ZEROS = [chr(code) for code in range(0x110000) if unicodedata.decimal(chr(code), None) == 0]


def test_docstring_examples():
    results = doctest.testmod(numerals)
    assert results.attempted >= 8
    assert results.failed == 0


# ---- Written in every script and read back


def in_script(figure: str, zero: str) -> str:
    return "".join(chr(ord(zero) + int(c)) if c in "0123456789" else c for c in figure)


def in_ethiopic(number: int) -> str:
    """Write a positive number by CSS Counter Styles 3: pairs of digits, ፻ and ፼ in turn."""
    digits = str(number)
    if len(digits) % 2:
        digits = "0" + digits
    pairs = [int(pair) for pair in re.findall("..", digits)]
    text = ""
    for place, pair in zip(reversed(range(len(pairs))), pairs, strict=True):
        is_first = place == len(pairs) - 1
        is_hundreds = place % 2 == 1
        unwritten_one = pair == 1 and place > 0 and (is_first or is_hundreds)
        if pair and not unwritten_one:
            text += " ፲፳፴፵፶፷፸፹፺"[pair // 10] + " ፩፪፫፬፭፮፯፰፱"[pair % 10]
        if is_hundreds and pair:
            text += "፻"
        elif place and not is_hundreds:
            text += "፼"
    return text.replace(" ", "")


def in_han(number: int) -> str:
    """Write 0 <= number < 10^12 in formal Chinese."""
    for size, unit in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if number >= size:
            rest = number % size
            filler = "零" if 0 < rest < size // 10 else ""
            return in_han(number // size) + unit + (filler + in_han(rest) if rest else "")
    return "零一二三四五六七八九"[number]


def in_indian_groups(number: int) -> str:
    head, tail = divmod(number, 1000)
    return f"{re.sub(r'(?<=.)(?=(..)+$)', ',', str(head))},{tail:03d}" if head else str(tail)


def test_there_are_many_digit_scripts_and_every_digit_of_each_is_read():
    assert len(ZEROS) >= 60
    for zero in ZEROS:
        for number in (0, 18, 1234567890):
            assert normalise(in_script(str(number), zero)) == str(number)
            assert normalise(in_script(str(number + 1), zero)) != str(number)


WRAPPERS = [
    "{}",
    "${}$",
    r"\text{{{}}}",
    r"{}\text{{ birr}}",
    "{} apples",
    "tufaha {}",
    "x = {}",
    "Answer: {}.",
    "₦{}",
    "{}%",
]
GROUPERS = {
    "none": str,
    "comma": lambda n: f"{n:,}",
    "space": lambda n: f"{n:,}".replace(",", "\u202f"),
    "apostrophe": lambda n: f"{n:,}".replace(",", "’"),
    "latex": lambda n: f"{n:,}".replace(",", "{,}"),
    "indian": in_indian_groups,
}


@quick
@given(
    st.integers(0, 10**12),
    st.sampled_from(ZEROS),
    st.sampled_from(sorted(GROUPERS)),
    st.sampled_from(["", "-", "−", "–", "－"]),
    st.sampled_from(WRAPPERS),
)
def test_an_integer_in_any_script_grouping_and_wrapper_reads_back(
    number, zero, grouper, sign, wrapper
):
    text = wrapper.format(sign + in_script(GROUPERS[grouper](number), zero))
    assert normalise(text) == str(-number if sign else number), text


@quick
@given(
    st.integers(0, 10**9),
    st.integers(0, 99),
    st.sampled_from(ZEROS),
    st.sampled_from(
        [("", "."), ("", ","), (",", "."), (".", ","), (" ", ","), (" ", "."), ("’", ".")]
    ),
)
def test_a_decimal_in_any_script_and_style_reads_back(whole, hundredths, zero, style):
    group, mark = style
    text = in_script(f"{whole:,}".replace(",", group) + f"{mark}{hundredths:02d}", zero)
    assert normalise(text) == str(whole + Fraction(hundredths, 100)), text


@quick
@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from(ZEROS))
def test_a_fraction_reads_back_reduced(top, bottom, zero):
    for text in (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}"):
        assert normalise(in_script(text, zero)) == str(Fraction(top, bottom))


@quick
@given(st.integers(1, 10**12))
def test_an_ethiopic_numeral_reads_back(number):
    assert normalise(in_ethiopic(number) + " ብር") == str(number)


@quick
@given(st.integers(0, 10**12 - 1))
def test_a_han_numeral_reads_back_by_units_and_by_position(number):
    by_units = in_han(number)
    by_position = "".join("〇一二三四五六七八九"[int(digit)] for digit in str(number))
    for text in (by_units, by_units + "个苹果", by_position):
        assert normalise(text) == str(number), text


@quick
@given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from([" or ", ", ", "; ", " and ", "、", " birr, "]),
)
def test_two_numbers_are_never_one(first, second, joint):
    assert normalise(f"{first}{joint}{second}") is None


@quick
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**3))
def test_a_canonical_string_is_its_own_canonical_string(top, bottom):
    canonical = str(Fraction(top, bottom))
    assert normalise(canonical) == canonical


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 x 2 = 18 birr.", "18"),
        ("18, 17", "17"),
        ("It is 0", "0"),
        ("18 " + "a" * MAX_ANSWER_CHARS, None),
        ("none", None),
        ("18 or 1/0", None),
        ("", None),
    ],
)
def test_the_last_number_is_taken_or_none(text, number):
    assert last_number(text) == number
    assert number is None or is_number(number)


@pytest.mark.parametrize(
    "number",
    [
        "1245",
        "1,245",
        "12 345",
        "1'245",
        "3.25",
        "7/2",
        "1e25",
        "10^25",
        "10²⁵",
        "١٢٤٥",
        "፲፰",
        "三百五",
        r"\frac{12}{5}",
        r"1.2\times10^3",
        "-5",
        "1 1/2",
    ],
)
def test_a_number_is_never_read_from_the_part_that_a_cut_leaves(number):
    for cut in range(1, len(number)):
        text = f"total {number}" + " " * 3 + "n" * (MAX_ANSWER_CHARS - 3 - len(number) + cut)
        assert last_number(text) is None, text[-MAX_ANSWER_CHARS:]
        assert last_number(text[:-9] + " is 18 nn") == "18"


def test_a_number_behind_the_cut_is_read_in_every_script():
    assert last_number("这" * MAX_ANSWER_CHARS + "一共18元") == "18"
    assert last_number("na " * MAX_ANSWER_CHARS + "18 birr") == "18"
    assert last_number("total 1245" + " na" * 130) == "1245"
    assert last_number("total 1245" + " na" * 133) is None  # the last 400 characters begin with 5


# ---- Hostile input

PIECES = (
    r"0 1 8 . , ' / - + = ^ _ { } ( ) $ % ° ! : ; e x × "
    r"\ \boxed{ \frac{ \text{ \times 10^ <think> </think> "
    "½ ² ፻ ፼ ፩ 十 万 三 ﷺ"
)
hostile_text = st.one_of(
    st.text(st.characters()),  # every code point, surrogates too
    st.lists(st.sampled_from([*PIECES.split(" "), " ", "\0", "\u200b", "\ud800"]), max_size=40).map(
        "".join
    ),
)


@settings(quick, max_examples=300)
@given(hostile_text)
def test_no_text_raises(text):
    answer = normalise(text)
    assert answer is None or answer
    as_text = normalise(text, as_text=True)
    assert as_text is None or as_text
    number = last_number(text)
    assert number is None or is_number(number)


@settings(quick, max_examples=300)
@given(hostile_text)
def test_a_number_comes_only_from_numerals(text):
    answer = normalise(text)
    if answer is not None and re.fullmatch(r"-?\d+(/\d+)?", answer):
        folded = unicodedata.normalize("NFKC", text)
        assert any(
            unicodedata.numeric(character, None) is not None or character in "两兩"
            for character in folded
        )
        assert answer == str(Fraction(answer)), "not reduced"


def test_a_long_answer_is_none_but_blanks_around_a_short_one_do_not_count():
    assert normalise("1" * MAX_ANSWER_CHARS) == "1" * MAX_ANSWER_CHARS
    assert normalise("1" * (MAX_ANSWER_CHARS + 1)) is None
    assert normalise("a" * (MAX_ANSWER_CHARS + 1)) is None
    assert normalise(" " * MAX_ANSWER_CHARS + "18") == "18"


def test_exponents_are_read_up_to_their_bound():
    assert normalise(f"10^{MAX_EXPONENT}") == str(10**MAX_EXPONENT)
    assert normalise(f"1e-{MAX_EXPONENT}") == f"1/{10**MAX_EXPONENT}"
    assert normalise(f"10^{MAX_EXPONENT + 1}") is None
    assert normalise(f"1e-{MAX_EXPONENT + 1}") is None
