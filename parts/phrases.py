"""The words of scales.json, which scale or change a number, and a text as a row of them.

    >>> [part if isinstance(part, str) else part.kind for part in split("mill. of mayai")]
    ['times', '.', 'of', 'mayai']

A phrase of several words is one part, and so is each mark. The grader does not know which language
an answer is in, so a phrase that two languages read differently is certain in neither. Functions
stand in order of use.
"""

import dataclasses
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from parts.plaintext import NOT_INSIDE_A_WORD, WORD_ENDS

# The place of the number among the words.
NUMBER = "\0"


@dataclass(frozen=True)
class Effect:
    """What a phrase of scales.json does to the number beside it.

    kind          "times", "plus", "says", "or", or "changes", which is: nothing certain
    amount        how many times as large, how much is added, or what a numeral says; 0 for
                  "or" and "changes"
    may_precede   whether it does so when it stands before the number
    may_follow    whether it does so when it stands after the number
    needs_plural  whether it means something else beside one: "1 billion" may be French
    """

    kind: str
    amount: Fraction = Fraction(0)
    may_precede: bool = False
    may_follow: bool = True
    needs_plural: bool = False


CHANGES = Effect("changes")
OR = Effect("or")


# ---- A text as a row of words and phrases


def split(skeleton: str) -> list[str | Effect]:
    """Return the skeleton's words and marks in order, with the longest known phrases as effects."""
    words = _words(skeleton)
    parts: list[str | Effect] = []
    while words:
        has_count = isinstance((parts or [""])[-1], Effect)
        phrase = _first_phrase(words, has_count)
        if _is_silent(phrase, has_count):
            parts += [NUMBER] * phrase.count(NUMBER)
        else:
            parts.append(_EFFECTS.get(phrase, words[0]))
        words = words[max(1, len(phrase)) :]
    if _CHANGE_IN_PLACE.search(unicodedata.normalize("NFKD", skeleton)):
        parts.append(CHANGES)
    return parts


def _first_phrase(words: tuple[str, ...], has_count: bool) -> tuple[str, ...]:
    """Return the longest phrase of the table that words begin with, () for none.

    has_count  a word of the table stands before them
    """
    for length in range(_LONGEST_PHRASE, 0, -1):
        phrase = words[:length]
        if phrase in _EFFECTS or _is_silent(phrase, has_count):
            return phrase
    return ()


def _is_silent(phrase: tuple[str, ...], has_count: bool) -> bool:
    """Say whether a phrase says nothing where it stands.

    The mil of "mil 20" is a mile, and that of "dos mil (2000)" a thousand.
    """
    return phrase in _SILENT and not (has_count and NUMBER in phrase)


def leading_scale(text: str) -> str:
    """Return the words at the start of a folded text that scale a number before them, "" for none.

    >>> leading_scale("million and a half years"), leading_scale("birr, or 2 million")
    ('million and a half', '')
    """
    words = _words(text)
    start = 0
    for length in range(_LONGEST_PHRASE, 0, -1):
        effect = _EFFECTS.get(words[:length])
        if words[:length] in _SILENT:
            break
        if effect and effect.kind in ("times", "plus") and effect.may_follow:
            start = length
            break
    following = leading_scale(" ".join(words[start:])) if start else ""
    return f"{' '.join(words[:start])} {following}".strip()


def without_dozens(text: str) -> str:
    """Return the text without its words for twelve, which may be what was counted: 7 dozen."""
    return _DOZENS.sub(" ", text)


def names(text: str, kind: str) -> set[str]:
    """Return what a folded text names of a kind of the table, "moments" or "units".

    >>> names("le 3 mai", "moments"), names("5 kilomita", "units")
    ({'may'}, {'km'})
    """
    pattern, name_of = _NAMES[kind]
    return {name_of[found] for found in pattern.findall(_without_accents(text))}


# Accents and tone marks, which many leave out: millón, ẹgbẹ̀rún. Vowel signs of other scripts are
# letters, and are no part of this block.
_ACCENTS = re.compile("[\u0300-\u036f]")

# What joins words, and says nothing here: n'igice, half-dozen
_JOINTS = re.compile("['·-]")


def _without_accents(text: str) -> str:
    """Return the text, its letters decomposed, without their accents and tone marks."""
    return _ACCENTS.sub("", unicodedata.normalize("NFKD", text))


def _words(text: str) -> tuple[str, ...]:
    """Return the words of a text without their accents, and each other mark as a word."""
    text = _JOINTS.sub(" ", _without_accents(text))
    spaced = "".join(
        character if unicodedata.category(character)[0] in "LM" else f" {character} "
        for character in text
    )
    return tuple(_UNSPACED.sub(r" \g<0> ", spaced).split())


# ---- The table

_TABLE = json.loads(Path(__file__).with_name("scales.json").read_text(encoding="utf-8"))
_LANGUAGES = _TABLE["languages"].values()


def _phrases_without_spaces() -> list[str]:
    """Return the phrases in scripts that write no spaces between words, the longest first.

    They count wherever they stand: the ล้าน of ล้านบาท.
    """
    phrases = {
        unicodedata.normalize("NFKD", phrase.replace("0", "").strip())
        for language in _LANGUAGES
        for phrase in (
            *itertools.chain(*language.get("times", {}).values()),
            *itertools.chain(*language.get("plus", {}).values()),
            *itertools.chain(*language.get("numerals", {}).values()),
            *language.get("ors", []),
            *language.get("changes", []),
        )
    }
    return sorted(filter(_THAI_KANA_OR_HAN.match, phrases), key=len, reverse=True)


def _changes_in_place() -> list[str]:
    """Return patterns of the same scripts' phrases of change in which the number has its place.

    They count wherever they stand, too: the เท่าของ before the number of สองเท่าของ 18, from which
    สองเท่า, a longer phrase, takes its first half as a word.
    """
    return [
        re.escape(unicodedata.normalize("NFKD", phrase)).replace(r"\ ", r"\s*").replace("0", NUMBER)
        for language in _LANGUAGES
        for phrase in language.get("changes", [])
        if "0" in phrase and _THAI_KANA_OR_HAN.search(phrase)
    ]


_THAI_KANA_OR_HAN = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff]")
_UNSPACED = re.compile("|".join(_phrases_without_spaces()))
_CHANGE_IN_PLACE = re.compile("|".join(_changes_in_place()))


def _read_names(kind: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return the pattern of a kind's words, and what each of them names.

    A Latin symbol of one letter is one behind a figure only: the m of 5 m.
    """
    name_of = {
        _without_accents(word.casefold()): name
        for name, words in _TABLE[kind].items()
        for word in words
    }
    words = sorted(map(re.escape, name_of), key=len, reverse=True)
    symbols = "|".join(word for word in words if len(word) == 1 and word.isascii())
    spaced = "|".join(word for word in words if len(word) > 1 or not word.isascii())
    unspaced = "|".join(filter(_THAI_KANA_OR_HAN.match, words))
    behind = rf"|(?:(?<=\d)|(?<=\d ))(?:{symbols}){WORD_ENDS}" if symbols else ""
    pattern = rf"{unspaced}|{NOT_INSIDE_A_WORD}(?:{spaced}){WORD_ENDS}{behind}"
    return re.compile(pattern), name_of


def _read_effects() -> dict[tuple[str, ...], Effect]:
    """Return the effect of each phrase; "changes" where languages differ."""
    found: dict[tuple[str, ...], set[Effect]] = {}
    singular = set()
    for language in _LANGUAGES:
        counts_after = language["count"] == "after"
        for amount, phrases in language.get("times", {}).items():
            effect = Effect("times", Fraction(amount), may_precede=counts_after)
            for phrase in phrases:
                found.setdefault(_phrase(phrase), set()).add(effect)
        for amount, phrases in language.get("plus", {}).items():
            for phrase in phrases:
                precedes = phrase.endswith(" 0")
                effect = Effect("plus", Fraction(amount), precedes, may_follow=not precedes)
                found.setdefault(_phrase(phrase.removesuffix(" 0")), set()).add(effect)
        for amount, phrases in language.get("numerals", {}).items():
            for phrase in phrases:
                found.setdefault(_phrase(phrase), set()).add(Effect("says", Fraction(amount)))
        for amount, word in _compounds(language):
            found.setdefault(_phrase(word), set()).add(Effect("says", amount))
        for word in language.get("ors", []) + language.get("weak_ors", []):
            found.setdefault(_phrase(word), set()).add(OR)
        beside_a_number = [(f"0 {word}", f"{word} 0") for word in language.get("ors", [])]
        for phrase in itertools.chain(language.get("changes", []), *beside_a_number):
            found.setdefault(_phrase(phrase), set()).add(CHANGES)
        singular |= {_phrase(phrase) for phrase in language.get("singular", [])}
    effects = {
        phrase: readings.pop() if len(readings) == 1 else CHANGES
        for phrase, readings in found.items()
    }
    for phrase in singular:
        effects[phrase] = dataclasses.replace(effects[phrase], needs_plural=True)
    return effects


def _compounds(language: dict[str, Any]) -> Iterator[tuple[Fraction, str]]:
    """Yield the numerals of a language that are tens and ones in one word: 21, einundzwanzig."""
    if "compound" not in language:
        return
    numerals = [
        (Fraction(amount), word)
        for key in ("again", "numerals")
        for amount, words in language[key].items()
        for word in words
    ]
    for (ones, first), (tens, last) in itertools.product(numerals, numerals):
        if ones < 10 and 20 <= tens < 100:
            yield ones + tens, first + language["compound"] + last


def _phrase(written: str) -> tuple[str, ...]:
    """Return the words of a phrase of the table, in which a 0 is the number's place."""
    return _words(written.casefold().replace("0", NUMBER))


def _words_under(key: str) -> set[str]:
    """Return the words that stand under a key of the languages."""
    return {
        word for language in _LANGUAGES for each in language.get(key, []) for word in _phrase(each)
    }


def _read_again() -> dict[str, Fraction]:
    """Return the amounts of the words that count only in what says a number again."""
    return {
        word: Fraction(amount)
        for language in _LANGUAGES
        for amount, words in language.get("again", {}).items()
        for each in words
        for word in _phrase(each)
    }


def is_noun(part: str | Effect) -> bool:
    """Return whether a part may be what a number counts: a word, and not one that ties a numeral.

    In scripts without spaces what looks like one word may be several, and is no noun.
    """
    return (
        isinstance(part, str)
        and part[0].isalpha()
        and part not in JOINS | AGAIN.keys() | OPERATORS | _PREPOSITIONS
        and not _THAI_KANA_OR_HAN.match(part)
    )


_EFFECTS = _read_effects()
_NAMES = {kind: _read_names(kind) for kind in ("moments", "units")}
JOINS = _words_under("joins")
AGAIN = _read_again()
ORS = _words_under("ors") | _words_under("weak_ors")
OPERATORS = _words_under("operators")
_PREPOSITIONS = _words_under("prepositions")
_SILENT = {_phrase(each) for language in _LANGUAGES for each in language.get("silent", [])}
_LONGEST_PHRASE = max(map(len, [*_EFFECTS, *_SILENT]))
_DOZENS = re.compile(
    "|".join(
        each if _THAI_KANA_OR_HAN.match(each) else rf"(?<!\w){each}(?!\w)"
        for language in _LANGUAGES
        for each in language.get("times", {}).get("12", [])
    ),
    re.IGNORECASE,
)
