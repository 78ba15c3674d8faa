"""Words that scale a number, and words that change it: of "18 million", "18 and a half", "not 18".

The words stand in scales.json, which says where they come from. They are a closed class in each
language; every other word is a unit, a currency or a counted noun, and says nothing.

    >>> [apply_words(Fraction(18), words) for words in ("kuma \\0", "\\0 тыс. рублей", "not \\0")]
    [Fraction(18000, 1), Fraction(18000, 1), None]

The grader does not know which language an answer is in, so a word that two languages read
differently is certain in neither. Functions stand in order of use.
"""

import dataclasses
import itertools
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeGuard

# The place of the number among the words.
NUMBER = "\0"


@dataclass(frozen=True)
class Effect:
    """What a phrase of scales.json does to the number beside it.

    kind          "times", "plus", "says", or "changes", which is: nothing certain
    amount        how many times as large, how much is added, or what a numeral says; 0 for
                  "changes"
    may_precede   whether it does so when it stands before the number
    may_follow    whether it does so when it stands after the number
    needs_plural  whether it means something else beside one: "1 billion" may be French
    """

    kind: str
    amount: Fraction = Fraction(0)
    may_precede: bool = False
    may_follow: bool = True
    needs_plural: bool = False


_CHANGES = Effect("changes")


def apply_words(number: Fraction, skeleton: str) -> Fraction | None:
    r"""Return the number as the words beside it scale it; None: they leave it in doubt.

    skeleton  folded text with one \0 in the place of the number

    Between number and scale word stands nothing else: "18 (million)" is in doubt. What is added
    stands nearer to the number than what multiplies: 18 and a half million, not 18 million and a
    half. Multiples grow from left to right, 18 hundred thousand; the other way they are a sum.
    """
    parts = _split(skeleton)
    if _CHANGES in parts or _CHANGE_IN_PLACE.search(unicodedata.normalize("NFKD", skeleton)):
        return None
    parts = _without_repetition(number, parts)
    if parts is None:
        return None
    place = parts.index(NUMBER)
    before = [part for part in parts[max(place - 1, 0) : place] if _is_scale(part)]
    scales = itertools.takewhile(_is_scale, parts[place + 1 :])
    after = [part for part in scales if _is_scale(part)]
    left = parts[: place - len(before)][::-1]
    right = parts[place + 1 + len(after) :]
    if _says_another(number, left) or _says_another(number, right):
        return None
    effects = [part for part in parts if _is_scale(part)]
    if not effects:
        return number
    if before + after != effects or not _are_certain(number, before, after):
        return None
    if any(effect.kind == "times" for effect in effects) and _add_up(parts[place:]):
        return None
    for effect in before + after:
        if effect.kind == "times":
            number *= effect.amount
        else:
            number += effect.amount if number >= 0 else -effect.amount
    return number


def _without_repetition(number: Fraction, parts: list[str | Effect]) -> list[str | Effect] | None:
    """Return the parts without words that say the number again; None: they say another one.

    They stand in parentheses, 2000 (two thousand). In front of the number, two thousand (2000),
    only what has a scale is looked at here, and what says another number stays.
    """
    kept: list[str | Effect] = []
    for part in parts:
        kept.append(part)
        if part == ")" and "(" in kept:
            opening = len(kept) - 1 - kept[::-1].index("(")
            said = _say(kept[opening + 1 : -1])
            if said not in (None, abs(number)):
                return None
            if said is not None:
                del kept[opening:]
    place = start = kept.index(NUMBER)
    while start and (_counts(kept[start - 1]) or kept[start - 1] in _JOINS):
        start -= 1
    words = kept[start:place]
    if any(map(_is_scale, words)) and _say(words) == abs(number):
        del kept[start:place]
    return kept


def _say(words: list[str | Effect]) -> Fraction | None:
    """Return the number that words say; None: none, or not clearly one, or they count a noun.

    Another word may stand beside a scale with its count, two thousand birr. Beside a mere scale it
    may be a count that the table lacks: elfu saba. A scale alone is one of it only where the count
    would stand after it: "1000 (thousand)" may be in thousands.
    """
    places = [place for place, word in enumerate(words) if _counts(word)]
    if not places or NUMBER in words:
        return None
    said = words[places[0] : places[-1] + 1]
    others = words[: places[0]] + words[places[-1] + 1 :]
    scales = list(filter(_is_scale, said))
    is_after = any(scale.may_precede for scale in scales)
    lacks_count = _is_scale(said[-1 if is_after else 0])
    is_mixed = any(not _counts(word) and word not in _JOINS for word in said)
    is_cut = any(isinstance(word, Effect) or word in _JOINS for word in others)
    if is_mixed or is_cut or (lacks_count and not is_after):
        return None
    if others and (lacks_count or not scales):
        return None
    return _add_from_right(said) if is_after else _add_from_left(said)


def _add_from_left(said: list[str | Effect]) -> Fraction:
    """Add up a numeral whose counts stand before their scales: two hundred thousand and fifty.

    A scale multiplies what came before it, and from a thousand on it ends that, too.
    """
    total = group = Fraction(0)
    for word in said:
        amount = _amount(word)
        if _is_scale(word) or (amount == 10 and 1 < group < 10):  # eight tens: แปดสิบ
            group = (group or 1) * amount
        else:
            group += amount
        if _is_scale(word) and amount >= 1000:
            total, group = total + group, Fraction(0)
    return total + group


def _add_from_right(said: list[str | Effect]) -> Fraction:
    """Add up a numeral whose counts stand after their scales: elfu mbili na mia tano.

    From right to left it is as from left to right, and each of its joined terms is one of its own.
    """
    terms: list[list[str | Effect]] = [[]]
    for word in said:
        if word in _JOINS:
            terms.append([])
        else:
            terms[-1].insert(0, word)
    return sum(map(_add_from_left, terms), Fraction(0))


def _amount(word: str | Effect) -> Fraction:
    """Return the amount of a part; that of a join is nothing, and that of a word for one is one."""
    return word.amount if isinstance(word, Effect) else Fraction(word in _ONES)


def _counts(part: str | Effect) -> bool:
    """Return whether a part is a numeral, a multiple, or a word for one that is in its place."""
    return part in _ONES or (isinstance(part, Effect) and part.kind in ("says", "times"))


def _is_scale(part: str | Effect) -> TypeGuard[Effect]:
    """Return whether a part multiplies or adds, and is neither a numeral nor a word."""
    return isinstance(part, Effect) and part.kind in ("times", "plus")


def _is_numeral(part: str | Effect) -> TypeGuard[Effect]:
    """Return whether a part is a numeral in words."""
    return isinstance(part, Effect) and part.kind == "says"


def _says_another(number: Fraction, aside: list[str | Effect]) -> bool:
    """Return whether the parts on one side of a number, the nearest first, say another number.

    A numeral does that a join ties to it, ishirini na 8. So does one that touches it or is tied by
    an operator, twenty 8 and 18 times two, unless it counts a word: 18 one-dollar bills, watoto
    wawili 18. One that touches it may repeat it.
    """
    tie = next((part for part in aside[:1] if part in _JOINS | _OPERATORS), None)
    others = aside if tie is None else aside[1:]
    numerals = itertools.takewhile(_is_numeral, others)
    amounts = [part.amount for part in numerals if _is_numeral(part)]
    beyond = others[len(amounts) : len(amounts) + 1]
    counts_a_word = any(isinstance(part, Effect) or part[0].isalpha() for part in beyond)
    if not amounts or (counts_a_word and tie not in _JOINS):
        return False
    return tie is not None or number not in (sum(amounts), math.prod(amounts))


def _add_up(parts: list[str | Effect]) -> bool:
    """Return whether a join makes a sum: a numeral follows it, or nothing, which is not all."""
    return any(
        part in _JOINS and (not following or _is_numeral(following[0]))
        for part, following in ((part, parts[at + 1 :]) for at, part in enumerate(parts))
    )


def _are_certain(number: Fraction, before: list[Effect], after: list[Effect]) -> bool:
    """Return whether the effects beside a number can be meant in one way only."""
    beside = before + after
    terms = [effect for effect in beside if effect.kind == "plus"]
    factors = [effect.amount for effect in beside if effect.kind == "times"]
    stand_right = all(effect.may_precede for effect in before) and all(
        effect.may_follow for effect in after
    )
    terms_come_first = all(effect.kind == "plus" for effect in beside[: len(terms)])
    one_side_multiplies = not after or all(effect.kind == "plus" for effect in before)
    # Of a whole number alone: 18 and a half, but not 18.5 and a half.
    terms_fit = not terms or (len(terms) == 1 and number.denominator == 1)
    has_plural = abs(number) >= 2 or not any(effect.needs_plural for effect in beside)
    return (
        stand_right
        and terms_come_first
        and one_side_multiplies
        and terms_fit
        and has_plural
        and factors == sorted(factors)
    )


def _split(skeleton: str) -> list[str | Effect]:
    """Return the skeleton's words and marks in order, with the longest known phrases as effects."""
    words = _words(skeleton)
    parts: list[str | Effect] = []
    start = 0
    while start < len(words):
        for length in range(_LONGEST_PHRASE, 0, -1):
            phrase = words[start : start + length]
            if phrase in _EFFECTS:
                parts.append(_EFFECTS[phrase])
                start += len(phrase)
                break
        else:
            parts.append(words[start])
            start += 1
    return parts


# Accents and tone marks, which many leave out: millón, ẹgbẹ̀rún. Vowel signs of other scripts are
# letters, and are no part of this block.
_ACCENTS = re.compile("[\u0300-\u036f]")

# What joins words, and says nothing here: n'igice, half-dozen
_JOINTS = re.compile("['·-]")


def _words(text: str) -> tuple[str, ...]:
    """Return the words of a text without their accents, and each other mark as a word."""
    text = _JOINTS.sub(" ", _ACCENTS.sub("", unicodedata.normalize("NFKD", text)))
    spaced = "".join(
        character if unicodedata.category(character)[0] in "LM" else f" {character} "
        for character in text
    )
    return tuple(_UNSPACED.sub(r" \g<0> ", spaced).split())


# ---- The table

_LANGUAGES = json.loads(Path(__file__).with_name("scales.json").read_text(encoding="utf-8"))[
    "languages"
].values()


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
        for phrase in language.get("changes", []):
            found.setdefault(_phrase(phrase), set()).add(_CHANGES)
        singular |= {_phrase(phrase) for phrase in language.get("singular", [])}
    effects = {
        phrase: readings.pop() if len(readings) == 1 else _CHANGES
        for phrase, readings in found.items()
    }
    for phrase in singular:
        effects[phrase] = dataclasses.replace(effects[phrase], needs_plural=True)
    return effects


def _phrase(written: str) -> tuple[str, ...]:
    """Return the words of a phrase of the table, in which a 0 is the number's place."""
    return _words(written.casefold().replace("0", NUMBER))


_EFFECTS = _read_effects()
_JOINS = {
    word for language in _LANGUAGES for join in language.get("joins", []) for word in _phrase(join)
}
_ONES = {word for language in _LANGUAGES for word in _phrase(" ".join(language.get("ones", [])))}
_OPERATORS = {word for language in _LANGUAGES for word in language.get("operators", [])}
_LONGEST_PHRASE = max(len(phrase) for phrase in _EFFECTS)
