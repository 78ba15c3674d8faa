r"""Tell whether an answer is the same mathematics as the gold: math-verify behind a filter, for `grading`.

    >>> is_same(r"2\sqrt{3}", r"x = \sqrt{12}"), is_same(r"\{1, 2\}", "2, 1"), is_same("listen", "silent")
    (True, True, False)

A program, not a library: `grading` runs it in a process of its own, for 9^(9^9) keeps one call busy for hours and no
thread or signal handler of Python's can end that. The kernel can: a timer's signal without a handler kills the process.

    stdin   a question a line, in JSON: [gold, answer, limit in seconds of computing, so that load changes no verdict]
    stdout  true or false, a line each; where the limit struck there is no line, and no process any more
"""

import json
import re
import signal
import sys
import unicodedata

from math_verify import LatexExtractionConfig, parse, verify

_LOOSE_SPACE = re.compile(r"\s+(?!\d)|(?<!\d)\s+")  # "1 2" is not "12"
_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+|\b(?:and|or)\b")
_WORD_OR_RATIO = re.compile(r"[^\W\d_]{3}|\d\s*:\s*\d")
_ONLY_LETTERS = re.compile(r"(?:\\text\w*|[^\W\d_]|[\s{}])*")
_EQUALS = re.compile(r"(?<![<>!])=")
_NAME = re.compile(
    r"(?:_(?:\{\w+\}|\w)|[^\d\\+*/^|_-]|\\(?!sqrt|frac)[a-zA-Z]+)*"
)  # x, f(x), S_4, \theta
_SIGNS = {"−": "-", "–": "-", "∞": r"\infty ", "·": r"\cdot ", "∈": r"\in "}
# Signal, timer, seconds for each second of the limit: computing, and by the clock, should it hang without computing.
_LIMITS = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 60))
_WHOLE_BOX = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)


def is_same(gold: str, answer: str) -> bool:
    """Return whether two LaTeX texts are the same expression, list, interval, relation or matrix.

    A gold in words is no mathematics: math-verify takes a word for a product, equal to any of its anagrams.
    Of an equation that answers no equation each side must be the gold or a name: x + 1 = 5 is no 5.
    """
    gold, answer = _latex(gold), _latex(answer)
    if _LOOSE_SPACE.sub("", gold) == _LOOSE_SPACE.sub("", answer):
        return True
    if _WORD_OR_RATIO.search(_COMMAND.sub("", gold)) or _ONLY_LETTERS.fullmatch(gold):
        return False
    *left_sides, right_side = [answer] if _EQUALS.search(gold) else _EQUALS.split(answer)
    others = (side for side in left_sides if not _NAME.fullmatch(side))
    return all(_are_equal(gold, side) for side in (right_side, *others))


def _latex(text: str) -> str:
    """Return the text as math-verify reads it: ASCII digits and commands, no dollars, no delimiters, no full stop."""
    text = re.sub(
        "[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda run: "^{" + unicodedata.normalize("NFKC", run[0]) + "}", text
    )
    text = "".join(
        str(unicodedata.decimal(character, _SIGNS.get(character, character))) for character in text
    )
    return re.sub(r"\$|(?<!\\)\\[()\[\]]", " ", re.sub(r"√\s?(\d+|\w)", r"\\sqrt{\1}", text)).strip(
        " .,;:?"
    )


def _are_equal(gold: str, answer: str) -> bool:
    """Return math-verify's verdict to 50 digits; the whole texts are read, never a formula found in one of them."""
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
