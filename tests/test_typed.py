"""parts/typed.py: a value is of the type it must have, or refused by its name."""

import math
from dataclasses import dataclass

import pytest

from parts.typed import typed


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, bool),
        (3, int),
        (-(2**62), int),
        (3, float),
        (0.5, float),
        ("ƙ", str),
        ("", str),
        (None, int | None),
        (3, int | None),
        ([], list[int]),
        ([1, 2], list[int]),
        ([1], list[int] | int | None),
        (1, list[int] | int | None),
    ],
)
def test_a_value_of_the_kind_comes_back_as_it_is(value, kind):
    found = typed(value, kind, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "kind", "valid"),
    [
        ("false", bool, "true or false"),
        (1, bool, "true or false"),
        (None, bool, "true or false"),
        (True, int, "a whole number"),
        (1.0, int, "a whole number"),
        ("1", int, "a whole number"),
        (None, int, "a whole number"),
        ([1], int, "a whole number"),
        (2**63, int, "a whole number"),
        pytest.param(10**5000, int, "a whole number", id="5000 digits"),
        (math.nan, float, "a finite number"),
        (-math.inf, float, "a finite number"),
        (1e31, float, "a finite number, at most 1e30"),
        (10**400, float, "a finite number"),
        (True, float, "a finite number"),
        ("0.5", float, "a finite number"),
        (None, float, "a finite number"),
        (5, str, "text"),
        ("a\ud800", str, "text"),
        (None, str, "text"),
        (True, int | None, "a whole number or null"),
        ({}, list[int], "a list"),
        ("ab", list[int], "a list"),
    ],
)
def test_any_other_is_refused_in_one_line_with_its_name(value, kind, valid):
    with pytest.raises(ValueError, match=rf"^file: lr is .*; valid: {valid}") as error:
        typed(value, kind, "file: lr")
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    str(error.value).encode()  # it can be printed


def test_a_list_is_read_to_its_items():
    with pytest.raises(ValueError, match=r"^ks\[1\] is '2'; valid: a whole number$"):
        typed([1, "2"], list[int], "ks")


@dataclass(frozen=True)
class Inner:
    right: bool


@dataclass(frozen=True)
class Outer:
    id: str
    inner: list[Inner]


def test_an_object_is_read_to_its_fields():
    assert typed({"id": "a", "inner": [{"right": True}]}, Outer, "row") == Outer("a", [Inner(True)])
    for value, said in (
        ([], "row is .*; valid: an object"),
        ({"id": "a"}, "row has no 'inner'"),
        ({"id": "a", "inner": [], "more": 1}, "row has an unknown 'more'"),
        ({"id": 1, "inner": []}, "row.id is 1; valid: text"),
        ({"id": "a", "inner": [{"right": "false"}]}, r"row.inner\[0\].right is 'false'"),
    ):
        with pytest.raises(ValueError, match=said):
            typed(value, Outer, "row")
