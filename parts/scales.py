"""Words that scale a number, and words that change it: of "18 million", "18 and a half", "not 18".

The words stand in scales.json, which says where they come from (phrases.py reads it). They are a
closed class in each language; every other word is a unit, a currency or a counted noun, and says
nothing.

    >>> [apply_words(Fraction(18), words) for words in ("kuma \\0", "\\0 тыс. рублей", "not \\0")]
    [Fraction(18000, 1), Fraction(18000, 1), None]

The grader does not know which language an answer is in, so a word that two languages read
differently is certain in neither. Functions stand in order of use.
"""

import itertools
import math
import re
from fractions import Fraction
from typing import TypeGuard

from parts.phrases import AGAIN, CHANGES, JOINS, NUMBER, OPERATORS, OR, Effect, is_noun, split


def one_number(numbers: list[Fraction | None], skeleton: str) -> Fraction | None:
    """Return the number that a text's numbers and words say together; None: none, or in doubt.

    numbers   None for one that cannot be read
    skeleton  folded text with one \\0 in the place of each number
    """
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return None
    return apply_words(known[0], skeleton) if len(known) == 1 else add_terms(known, skeleton)


def apply_words(number: Fraction, skeleton: str) -> Fraction | None:
    r"""Return the number as the words beside it scale it; None: they leave it in doubt.

    skeleton  folded text with one \0 in the place of the number

    Between number and scale word stands nothing else: "18 (million)" is in doubt. What is added
    stands nearer to the number than what multiplies: 18 and a half million, not 18 million and a
    half. Multiples grow from left to right, 18 hundred thousand; the other way they are a sum.
    """
    parts = split(skeleton)
    if CHANGES in parts or _offers_another(parts):
        return None
    parts = _without_repetition(number, parts)
    if parts is None:
        return None
    place = parts.index(NUMBER)
    parts = _without_counted_noun(parts, place)
    before = [part for part in parts[max(place - 1, 0) : place] if _is_scale(part)]
    scales = itertools.takewhile(_is_scale, parts[place + 1 :])
    after = [part for part in scales if _is_scale(part)]
    left = parts[: place - len(before)][::-1]
    right = parts[place + 1 + len(after) :]
    if _says_another(number, left) or _says_another(number, right) or _is_one_term(left, right):
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


# Numbers with their scales, before or behind them, and at last perhaps one without: NtN is 2
# thousand 500, and TNTN elfu 2 na mia 5. A word may stand at the end, or before the first scale.
_TERMS = re.compile("(?:Nt)+N?w?|w?(?:TN)+N?w?")


def add_terms(numbers: list[Fraction], skeleton: str) -> Fraction | None:
    """Return the sum of numbers whose scales fall, 1 lakh 20 thousand; None: they make no sum."""
    parts = [part for part in split(skeleton) if part not in JOINS]
    scales = [part for part in parts if _is_scale(part)]
    is_certain = all(scale.kind == "times" and not scale.needs_plural for scale in scales)
    letters = "".join(
        "N" if part == NUMBER else "tT"[part.may_precede] if _is_scale(part) else _letter(part)
        for part in parts
    )
    if not is_certain or not _TERMS.fullmatch(letters):
        return None
    total = Fraction(0)
    limit = math.inf
    for number, factor in zip(numbers, [*(scale.amount for scale in scales), 1], strict=False):
        if number.denominator > 1 or not 0 < number * factor < limit:
            return None
        total += number * factor
        limit = factor
    return total


def _without_counted_noun(parts: list[str | Effect], place: int) -> list[str | Effect]:
    """Return the parts without the noun between a number and what ends them: 18 days and a half."""
    noun, added = [*parts[place + 1 : place + 3], "", ""][:2]
    rest = parts[place + 3 :]
    ends = not any(isinstance(part, Effect) or part[0].isalpha() for part in rest)
    adds = isinstance(added, Effect) and added.kind == "plus" and added.may_follow
    if noun and is_noun(noun) and adds and ends:
        return parts[: place + 1] + parts[place + 2 :]
    return parts


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
    while start and (_counts(kept[start - 1]) or kept[start - 1] in JOINS):
        start -= 1
    words = kept[start:place]
    if any(map(_is_scale, words)) and _say(words) == abs(number):
        del kept[start:place]
    return kept


def _say(words: list[str | Effect]) -> Fraction | None:
    """Return the number that words say; None: none, or not clearly one, or they count a noun.

    Another word may stand beside a scale with its count, two thousand birr. Beside a mere scale it
    may be a count that the table lacks: elfu saba. A scale without its count is one of it where a
    numeral follows, hundred twenty-five, but alone only where the count would stand after it:
    "1000 (thousand)" may be in thousands.
    """
    places = [place for place, word in enumerate(words) if _counts(word)]
    if not places or NUMBER in words:
        return None
    said = words[places[0] : places[-1] + 1]
    others = words[: places[0]] + words[places[-1] + 1 :]
    scales = list(filter(_is_scale, said))
    is_sum = any(map(_is_numeral, said))
    is_after = any(scale.may_precede for scale in scales)
    lacks_count = _is_scale(said[-1 if is_after else 0])
    is_mixed = any(not _counts(word) and word not in JOINS for word in said)
    is_cut = any(isinstance(word, Effect) or word in JOINS for word in others)
    if is_mixed or is_cut or (lacks_count and not (is_after or is_sum)):
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

    A scale multiplies only what stands right behind it: elfu mia mbili is 200,000, and mia moja
    ishirini is 120.
    """
    terms: list[Fraction] = []  # from right to left; a join is a term of nothing
    for word in reversed(said):
        if _is_scale(word) and terms and terms[-1]:
            terms[-1] *= word.amount
        else:
            terms.append(_amount(word))
    return sum(terms, Fraction(0))


def _amount(word: str | Effect) -> Fraction:
    """Return the amount of a part; that of a join is nothing."""
    return word.amount if isinstance(word, Effect) else AGAIN.get(word, Fraction(0))


def _counts(part: str | Effect) -> bool:
    """Return whether a part is a numeral, a multiple, or a word that may be a numeral."""
    return part in AGAIN or (isinstance(part, Effect) and part.kind in ("says", "times"))


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
    wawili 18. One that touches it, or stands behind a comma, may repeat it.
    """
    tie = next((part for part in aside[:1] if part in JOINS | OPERATORS), None)
    others = aside[1:] if tie is not None or aside[:1] == [","] else aside
    numerals = list(
        itertools.takewhile(
            lambda part: _is_numeral(part) or part in JOINS or part in AGAIN, others
        )
    )
    amounts = [_amount(part) for part in numerals if part not in JOINS]
    beyond = others[len(numerals) : len(numerals) + 1]
    counts_a_word = any(isinstance(part, Effect) or part[0].isalpha() for part in beyond)
    if not any(map(_is_numeral, numerals)) or (counts_a_word and tie not in JOINS):
        return False
    return tie is not None or number not in (sum(amounts), math.prod(amounts))


def _offers_another(parts: list[str | Effect]) -> bool:
    """Return whether a word for "or" stands beside a numeral: 18 eggs or nineteen."""
    return any(
        part == OR and any(map(_is_numeral, parts[max(at - 1, 0) : at + 2]))
        for at, part in enumerate(parts)
    )


# What makes a number one term of an amount, or of two answers, in the letters of `_shape` and from
# the number on: "dollars and fifty" behind the 18 of "18 dollars and fifty cents", and "and hours
# two" before that of "two hours and 18 minutes". Without a join a numeral before it is none: watoto
# wawili 18. Behind tens a word may be a numeral that the table lacks: kumi na nane (18).
_TERM_BEHIND = re.compile("w,?[nN]|w?jw?[nNo]")
_TERM_BEFORE = re.compile("jw?[nN]|wjw?n")


def _is_one_term(left: list[str | Effect], right: list[str | Effect]) -> bool:
    """Return whether the parts beside a number, the nearest first, say more of the same amount.

    A numeral behind a preposition counts something else, 18 in three days.
    """
    return bool(_TERM_BEFORE.match(_shape(left)) or _TERM_BEHIND.match(_shape(right)))


def _shape(aside: list[str | Effect]) -> str:
    """Return a letter for each of the nearest parts."""
    return "".join(map(_letter, aside[:4]))


def _letter(part: str | Effect) -> str:
    """Return the letter of a part: j is a join or an "or", n a numeral and N one from ten on.

    o is a word that may be a numeral, w a noun, a comma itself, and ? anything else.
    """
    if part in JOINS or part == OR:
        return "j"
    if part in AGAIN:
        return "o"
    if _is_numeral(part):
        return "n" if part.amount < 10 else "N"
    if part == ",":
        return ","
    return "w" if is_noun(part) else "?"


def _add_up(parts: list[str | Effect]) -> bool:
    """Return whether a join makes a sum: a numeral follows it, or nothing, which is not all."""
    return any(
        part in JOINS and (not following or _is_numeral(following[0]))
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
