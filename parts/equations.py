r"""What an equation says: its right side, unless it is not solved, or there are two.

    >>> right_side("a = 18", as_text=False), right_side("2a = 18", as_text=False)
    (' 18', '')

Each function is preceded by the patterns it uses.
"""

import re

from parts.plaintext import MARK

# A relation whose sides must not be taken apart as those of an "=": the ≥ of "x ≥ 3", the \leq of
# "x \leq 3", the ! of "x != 3".
_INEQUALITY = re.compile(r"[<>≤≥≠!]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")

# What stands between two equations, and is no comma of 1,000: x = 1, y + 1 = 18
_SEPARATOR = r"(?:[,;](?!\d{3})|\band\b)"

# The end of a middle part that begins another equation: the y of " 1, y ", which is the middle part
# of "x = 1, y = 2", and the f(1) of " a, f(1) ". The w of " l × w " begins none.
_ENDS_IN_NAME = re.compile(
    r"(?:^|[^-+*/×÷·^\s])\s*(?<![^\W\d_])[^\W\d_]+\s*$"
    rf"|{_SEPARATOR}\s*[^\W\d_]+(?:_?\d+|_\{{\w+\}}|\([^()]*\))\s*$"
    rf"|{_SEPARATOR}.*[^\W\d_]\s*$"
)

# What a thing may be called, left of its "=": x, x_1, f(x), f(3), (a, b). With another figure, an
# operator, a root, a logarithm or a product in it the left side says something, and the text is an
# equation: x + 1 = 5, xy = 6.
_NAME = re.compile(
    r"(?!.*(?:√|\\sqrt|\b(?:log|ln|exp)(?![a-z])|\b[xyz]{2,3}\b))"
    r"(?:[^\d+*/^×÷·|{}-]|(?<=\b[^\W\d_])\d+|(?<=\b[^\W\d_]_)(?:\d+|\{\w+\})"
    r"|(?<=[^\W\d_]\()-?\d[\d., ]*(?=\)))*"
)

# A Latin, Greek or Cyrillic letter that stands alone and may be an unknown. None are the name of a
# function, f(3), one with an index, a_1, and a currency or a label before a figure: R 9.
_LETTER = (
    rf"(?:(?<![^\W\d_])(?<![^\W\d_]-)(?<!['\\])(?<!{MARK})[a-zα-ορ-ωху]"
    rf"(?![^\W\d_]|['(_]|\s?\d|-[^\W\d_]{{2}}|{MARK})"
    r"|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|psi|omega)(?![a-z]))"
)

# The unknown of an equation: a letter that a figure, a root or a sign is tied to. What is not tied
# is a unit, 10 g + 8 g, a word, or what was asked: m + n = 18.
_UNKNOWN = re.compile(
    rf"""(?<=\d)(?![mglhsf]){_LETTER}  # 2x
    |(?<=\d\ )(?=[xyznху\\]){_LETTER}(?!\ -\d)(?=\s*(?:$|[-+*/^×÷·)]))  # 2 x, but not 9 x 2
    |(?<!\d)(?<!\d\ )(?<!/){_LETTER}\s?[-+*/^×÷·]\s?\(?\d  # x + 1, but not 9 m × 2 nor km/h × 3
    |\d(?:\s?(?:[-+*^×÷·xх]|/(?!\s?[mglhsf]))\s?\(?|\(){_LETTER}(?!\ [^\W\d_]{{2}})  # 1 + x, 2(x
    |(?:√|(?<![a-z])(?:sqrt|log|ln|exp)(?:_\w|_\{{\w+\}})?)\s*[({{]?\s*{_LETTER}  # \sqrt{{x}}
    |(?<=\d)(?:[xyz]{{2,3}}|abc?|bc)(?![^\W\d_])  # 2xy
    |^\s*-\s?{_LETTER}\s*$  # -x
    |\|\s?[xyzn]\s?\|  # |x|
    |{_LETTER}\ (?:squared|cubed|(?:plus|minus|times|over|divided\ by)\ \d)""",
    re.VERBOSE,
)
_INDEX = re.compile(r"_\{[^{}]*\}")

# What is read as a unit, 3m = 18, or as thousands, 3k + 2 = 20, is an unknown if it equals a bare
# number, of thousands a small one.
_QUANTITY = re.compile(r"^\s*[\d.,]+[mglhsf]\s*$")
_MULTIPLE = re.compile(r"\d (?:thousand|million|billion)\s*(?:$|[-+*/^×÷·])")


def right_side(text: str, *, as_text: bool) -> str:
    """Return what the text says: 18 of "x = 18", and the whole of a text without "=".

    "" stands for an equation that is not solved, 2x = 18, and for two: x = 1, y = 2. As a text, an
    equation is kept whole.
    """
    *left_sides, right = [text] if _INEQUALITY.search(text) else text.split("=")
    equations = [side for side in left_sides if not _NAME.fullmatch(side)]
    if as_text and equations:
        return text
    if any(_ENDS_IN_NAME.search(side) for side in left_sides[1:]):
        return ""
    # The formula of what is asked stands right of its name: A = l × w = 6 × 3 = 18
    if left_sides and _NAME.fullmatch(left_sides[0]):
        formulas = [side for side in left_sides[1:2] if not re.search(_SEPARATOR, side)]
        equations = [side for side in equations if side not in formulas]
    return "" if any(_is_unsolved(side, right) for side in equations) else right


def _is_unsolved(side: str, right: str) -> bool:
    """Return whether the side that equals `right` has an unknown that something is tied to."""
    if _UNKNOWN.search(_INDEX.sub("", side)):
        return True
    is_bare = not re.search(r"[^\W\d_]", right)
    is_small = sum(map(str.isdigit, right)) <= 3
    return is_bare and bool(_QUANTITY.search(side) or (is_small and _MULTIPLE.search(side)))
