r"""Tell whether an answer is the same mathematics as the gold: math-verify behind a filter.

    >>> is_same(r"2\sqrt{3}", r"x = \sqrt{12}"), is_same(r"\{1, 2\}", "2, 1")
    (True, True)
    >>> is_same("listen", "silent")
    False

A program, not a library: `grading` runs it in a process of its own. 9^(9^9) keeps one call busy for
hours, and no thread or signal handler of Python's can end that. The kernel can: the signal of a
timer, where it has no handler, kills the process.

    stdin   a question a line, in JSON: [gold, answer, limit]. The limit is in seconds of computing,
            and not by the clock, so that other load on the machine changes no verdict
    stdout  true or false, a line each; where the limit struck there is no line, and no process
"""

import json
import re
import signal
import string
import sys
import unicodedata

from math_verify import LatexExtractionConfig, parse, verify

# ---- How the texts are read

# A run of raised figures, which are an exponent: x² -> x^{2}
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")

# A root as a character, with a number or one letter behind it: √12, √(12) -> \sqrt{12}
_ROOT = re.compile(r"√\s?(?:[({]\s?(\w+)\s?[)}]|(\d+|\w))")

# What puts a text into mathematics mode and is not mathematics: $x$, \(x\), \[x\]
_DELIMITER = re.compile(r"\$|(?<!\\)\\[()\[\]]")

# What may end a text without being part of it.
_CLOSING_MARKS = " .,;:?"

# Characters for which math-verify knows only the ASCII sign or the command. The marks of a list are
# Chinese, Arabic and Ethiopic ones.
_SIGNS = {
    **{"−": "-", "–": "-", "∞": r"\infty ", "·": r"\cdot ", "∈": r"\in "},
    **dict.fromkeys("、،፣", ","),
    **dict.fromkeys("؛፤", ";"),
    **dict.fromkeys("。።٫", "."),
}

# Other spellings of what it knows
_SPELLINGS = {"**": "^", r"\varnothing": r"\emptyset"}

# The number π in letters, and an area or a volume, of which it would drop the cm and keep the ^2.
_PI = re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])")
_UNIT_POWER = re.compile(r"(?<![a-zA-Z\\])([cdkm]m|ft)\s?\^\s?\{?[23]\}?(?=\W*$)")

# math-verify takes the whole box and looks for no formula in it.
_WHOLE_BOX = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)

# ---- What is compared, and what is no mathematics

# Space that means nothing. That between figures does: "1 2" is not "12".
_LOOSE_SPACE = re.compile(r"\s+(?!\d)|(?<!\d)\s+")

# Words that belong to mathematics: \begin{matrix}, \sqrt, "1 and 2"
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+|\b(?:and|or)\b")

# What stays of a gold in words, or is a ratio, a time or a date, once the commands are gone:
# "Monday", 1:2, 3 pm, 2024-05-03. math-verify drops a unit at the end, and would find 3 am equal to
# 3 pm, and it takes a date for a difference, equal to that of another date.
_WORD_OR_RATIO = re.compile(
    r"[^\W\d_]{3}|\d\s*:\s*\d|\d\s*[APap]\.?\s?[Mm]\b|^\s*\d+([-/.])\d+\1\d+\s*$"
)

# A gold that is a word or a name, with or without \text around it: no, \text{B}, AB
_ONLY_LETTERS = re.compile(r"(?:\\text\w*|[^\W\d_]|[\s{}])*")

# The base of a figure: the 8 of 25_8 or 25_{8}. math-verify does not look at it.
_BASE = re.compile(r"\d\s*_\s*\{?\s*(\w+)")

# The = of an equation; those of <=, >= and != are none.
_EQUALS = re.compile(r"(?<![<>!])=")

# What a thing may be called, left or right of an =: x, f(x), S_4, \theta
_NAME = re.compile(
    r"(?:_(?:\{\w+\}|\w)"  # an index: _4, _{10}
    r"|[^\d\\+*/^|_-]"  # anything but figures and operators
    r"|\\(?!sqrt|frac)[a-zA-Z]+"  # a command, but not one that computes
    r")*"
)

# ---- The limit

# A signal, its timer, and seconds of that timer for a second of the limit. The first counts
# computing; the second goes by the clock, should math-verify hang without computing.
_LIMITS = (
    (signal.SIGPROF, signal.ITIMER_PROF, 1),
    (signal.SIGALRM, signal.ITIMER_REAL, 60),
)


def is_same(gold: str, answer: str) -> bool:
    """Return whether two LaTeX texts are the same expression, list, interval, relation or matrix.

    A gold in words is no mathematics: math-verify takes a word for a product, equal to any of its
    anagrams. Where the answer is an equation and the gold is none, each side of it must be the gold
    or a name: x + 1 = 5 is no 5.
    """
    gold = _latex(gold)
    answer = _latex(answer)
    if _LOOSE_SPACE.sub("", gold) == _LOOSE_SPACE.sub("", answer):
        return True
    if _WORD_OR_RATIO.search(_COMMAND.sub("", gold)) or _ONLY_LETTERS.fullmatch(gold):
        return False
    gold_bases = set(_BASE.findall(gold))
    answer_bases = set(_BASE.findall(answer))
    if gold_bases and answer_bases and gold_bases != answer_bases:
        return False
    gold, answer = _tell_cases_apart(gold, answer)
    *left_sides, right_side = [answer] if _EQUALS.search(gold) else _EQUALS.split(answer)
    values = [side for side in left_sides if not _NAME.fullmatch(side)]
    return all(_are_equal(gold, side) for side in (right_side, *values))


def _tell_cases_apart(*texts: str) -> list[str]:
    """Return the texts with another letter for a capital where both cases of it occur in them.

    math-verify takes M and m for one symbol.
    """
    letters = set(re.sub(r"\\[a-zA-Z]+", "", " ".join(texts)))
    capitals = [letter for letter in string.ascii_uppercase if {letter, letter.lower()} <= letters]
    # d, e and i mean something else in mathematics.
    spare = [
        letter
        for letter in string.ascii_lowercase
        if letter not in "dei" and letters.isdisjoint({letter, letter.upper()})
    ]
    renamed = dict(zip(capitals, spare, strict=False))
    return [
        re.sub(r"\\[a-zA-Z]+|[A-Z]", lambda found: renamed.get(found[0], found[0]), text)
        for text in texts
    ]


def _latex(text: str) -> str:
    """Return the text as math-verify reads it: ASCII digits and commands, nothing around them."""
    text = _SUPERSCRIPTS.sub(lambda run: "^{" + unicodedata.normalize("NFKC", run[0]) + "}", text)
    text = "".join(_plain_character(character) for character in text)
    text = _ROOT.sub(r"\\sqrt{\1\2}", text)
    for written, command in _SPELLINGS.items():
        text = text.replace(written, command)
    text = _UNIT_POWER.sub(r"\1", _PI.sub(r"\\pi ", text))
    return _DELIMITER.sub(" ", text).strip(_CLOSING_MARKS)


def _plain_character(character: str) -> str:
    """Return the ASCII digit of a digit in any script, and the ASCII spelling of a sign.

    math-verify knows no full-width characters, such as those of （1，2）.
    """
    if unicodedata.east_asian_width(character) == "F":
        character = unicodedata.normalize("NFKC", character)
    return str(unicodedata.decimal(character, _SIGNS.get(character, character)))


def _are_equal(gold: str, answer: str) -> bool:
    """Return math-verify's verdict to 50 digits; neither its own time limit nor a fallback is on.

    The whole texts are read, never a formula found in one of them.
    """
    parsed_gold, parsed_answer = (
        parse(rf"\boxed{{{text}}}", _WHOLE_BOX, "no_fallback", "first_match", parsing_timeout=0)
        for text in (gold, answer)
    )
    return verify(
        parsed_gold, parsed_answer, float_rounding=50, numeric_precision=50, timeout_seconds=0
    )


def main() -> None:
    """Answer questions until there are no more."""
    for line in sys.stdin:
        gold, answer, limit_s = json.loads(line)
        for number, timer, factor in _LIMITS:
            signal.signal(number, signal.SIG_DFL)
            signal.setitimer(timer, factor * max(limit_s, 0.001))  # 0 would be no limit
        verdict = is_same(gold, answer)
        for _, timer, _ in _LIMITS:
            signal.setitimer(timer, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
