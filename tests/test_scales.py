"""Every word of the table, in both orders: the multiple or no answer, and never the bare number."""

import doctest
import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest

from parts import phrases, scales
from parts.grading import is_correct
from parts.numerals import is_number, normalise
from parts.scales import apply_words

FOLDER = Path(scales.__file__).parent
TABLE = json.loads((FOLDER / "scales.json").read_text(encoding="utf-8"))
LANGUAGES = TABLE["languages"]


def test_docstring_examples():
    for module in (phrases, scales):
        results = doctest.testmod(module)
        assert results.attempted >= 1
        assert results.failed == 0


def test_every_language_has_its_words():
    known = json.loads((FOLDER / "languages.json").read_text(encoding="utf-8"))
    assert set(LANGUAGES) == set(known)
    assert [code for code in LANGUAGES if not LANGUAGES[code].get("times")] == ["vai"]


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_scaled_number_is_its_multiple_and_never_itself(code):
    for amount, words in LANGUAGES[code].get("times", {}).items():
        for word in words:
            multiple = str(18 * int(amount))
            in_order = f"{word} 18" if LANGUAGES[code]["count"] == "after" else f"18 {word}"
            for text in (in_order, f"18 {word}", f"{word} 18", f"{word.upper()} 18"):
                in_miles = text.lower() == "mil 18"  # in Hausa
                assert in_miles or normalise(text) in (multiple, None), text
            if word not in ("billions", "trillions"):  # French; in sloppy English a thousandth
                assert normalise(in_order) == multiple, in_order


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_word_that_changes_a_number_leaves_no_answer(code):
    for phrase in LANGUAGES[code].get("changes", []):
        text = phrase.replace("0", "18") if "0" in phrase else f"18 {phrase}"
        assert not is_number(normalise(text) or ""), text


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_numeral_that_touches_a_number_is_a_second_one_unless_it_repeats_the_first(code):
    for amount, words in LANGUAGES[code].get("numerals", {}).items():
        for word in words:
            assert normalise(f"{amount} {word}") == normalise(f"{word} ({amount})") == amount, word
            for text in (f"{word} 97", f"97 {word}"):
                assert not is_number(normalise(text) or ""), text


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_numeral_beside_another_word_counts_that(code):
    for words in LANGUAGES[code].get("numerals", {}).values():
        for word in words:
            for text in (f"97 {word} birr", f"birr {word} 97", f"{word}: 97", f"97 in {word} birr"):
                assert normalise(text) == "97", text


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_second_term_of_an_amount_leaves_no_answer(code):
    words = LANGUAGES[code]
    for numeral in itertools.chain(*words.get("numerals", {}).values()):
        assert normalise(f"97 birr {numeral} cents") is None, numeral
        assert normalise(f"97 birr, {numeral} cents") is None, numeral
        for join in words.get("joins", []):
            texts = (f"97 birr {join} {numeral}", f"97 birr {join} cents {numeral}")
            for text in (*texts, f"birr 97 {join} cents {numeral}", f"{numeral} birr {join} 97"):
                assert not is_number(normalise(text) or ""), text


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_word_for_or_beside_a_number_or_a_numeral_leaves_no_answer(code):
    words = LANGUAGES[code]
    for word in words.get("ors", []):
        for text in (f"97 {word} hundred-odd", f"97 {word} unknown", f"unknown {word} 97"):
            assert normalise(text) is None, text
        assert normalise(f"97 birr {word} birr") == "97", word
    for word in words.get("ors", []) + words.get("weak_ors", []):
        for text in (f"97 birr {word} two birr", f"two birr {word} 97 birr", f"97 birr {word} ten"):
            assert not is_number(normalise(text) or ""), text


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_numeral_that_a_join_or_an_operator_ties_to_a_number_leaves_no_answer(code):
    for tie in LANGUAGES[code].get("joins", []) + LANGUAGES[code].get("operators", []):
        for text in (f"97 {tie} two", f"two {tie} 97"):
            assert not is_number(normalise(text) or ""), text
        assert normalise(f"97 birr {tie} birr") == "97", tie


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_scale_with_its_count_may_say_the_number_again_and_no_other(code):
    words = LANGUAGES[code]
    counts = [(1, one) for one in words.get("ones", [])]
    counts += [(int(amount), each[0]) for amount, each in words.get("numerals", {}).items()]
    for size, multiples in words.get("times", {}).items():
        if multiples[0] in ("billions", "trillions"):  # French; in sloppy English a thousandth
            continue
        for count, word in counts:
            pair = (multiples[0], word) if words["count"] == "after" else (word, multiples[0])
            number, said = count * int(size), " ".join(pair)
            assert normalise(f"{number} ({said})") == normalise(f"{said} ({number})"), said
            assert normalise(f"{number} ({said})") == str(number), said
            assert normalise(f"{number + 1} ({said})") is None, said


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_sum_behind_a_scaled_number_leaves_no_answer(code):
    for join in LANGUAGES[code].get("joins", []):
        assert normalise(f"2 thousand {join} six") is None
        assert normalise(f"2 thousand {join}") is None
        assert normalise(f"2 thousand {join} birr") == "2000"
        assert normalise(f"2 birr {join} nothing") == "2"


def test_scripts_without_spaces_are_read_within_a_word():
    assert normalise("18ダースの卵") == "216"
    assert normalise("18ล้านบาท") == "18000000"
    for text in ("18ではない", "18 กำลังสอง", "至少18个"):
        assert normalise(text) is None, text


def test_an_added_part_is_exact():
    assert apply_words(Fraction(18), "\0 and a half million") == 18_500_000
    assert apply_words(Fraction(-18), "\0 na robo") == Fraction(-73, 4)
    assert apply_words(Fraction(18), "\0 birr") == 18


@pytest.mark.parametrize("code", [code for code in LANGUAGES if "silent" in LANGUAGES[code]])
def test_a_phrase_that_says_nothing_leaves_the_number(code):
    for phrase in LANGUAGES[code]["silent"]:
        text = phrase.replace("0", "20") if "0" in phrase else f"20 {phrase}"
        assert normalise(text) == "20", text


def test_a_month_or_weekday_or_part_of_the_day_counts_beside_a_gold_in_any_language():
    for name, words in TABLE["moments"].items():
        for word in words:
            assert normalise(f"3 {word}", as_text=True) == f"3 {name}", word
            assert normalise(f"{word} 3") == "3", word


def test_another_unit_than_the_golds_is_wrong_and_the_same_in_any_language_is_right():
    units = list(TABLE["units"].values())
    for words, others in zip(units, units[1:] + units[:1], strict=True):
        for word in words:
            for answer, is_right in (
                (words[0], True),
                (others[0], False),
                ("", True),
                ("birds", True),
            ):
                assert is_correct(rf"\boxed{{3 {answer}}}", f"3 {word}") == is_right, word
                assert is_correct(rf"\boxed{{3 {word}}}", "3"), word
