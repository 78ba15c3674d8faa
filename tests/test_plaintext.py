"""What only looks different, or only sets type, is folded away; what it says stays."""

import doctest

import pytest

from parts import plaintext
from parts.plaintext import plain_text


def test_docstring_examples():
    results = doctest.testmod(plaintext)
    assert results.attempted >= 1
    assert results.failed == 0


@pytest.mark.parametrize("style", [r"\textcolor{red}{%s}", r"\bf %s", r"\fbox{%s}", "**%s**"])
@pytest.mark.parametrize("inner", ["18", r"\frac{7}{2}", "x^2", r"\sqrt{2}"])
def test_a_style_says_nothing(style, inner):
    assert plain_text(style % inner) == plain_text(inner)


def test_what_looks_like_a_style_and_is_none_stays():
    assert plain_text("2**3**2") == "2**3**2"
    assert plain_text(r"\sqrt{18}") == r"\sqrt{18}"
    assert plain_text("25_{8}") == "25_8"


def test_capitals_tell_millions_from_metres_beside_a_number_only():
    assert plain_text("18M") == "18 million"
    assert plain_text("18 m") == "18 m"
    assert plain_text("3k", as_text=True) == "3k"
