"""Read a value as the type it must have, whatever file it came from.

JSON has true and "true", 1 and "1", NaN and null, and Python takes each of them for more than it
says: "false" counts as true, true as 1. So every setting and every stored number goes through here,
from a flag, a recipe, an adapter's settings or a run's own files, and what is of another type is
refused in one line that names it.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number, at most 1e30 in size",
    str: "text",
}
LARGEST = 2**63  # whole numbers are smaller: torch takes no others, and no setting means any
LARGEST_FLOAT = 1e30  # ten times as much still fits the 32 bits that torch computes in


def typed(value: Any, kind: Any, name: str) -> Any:
    """Return the value if it is of a kind; ValueError, with its name and what is valid, if not.

    kind  bool, int, float, str, None, a list of one of them, a union of them, or a dataclass, which
          is then made of the object that the value must be

    A whole number is a float, too, and stays as it is. true and false are no numbers. Numbers are
    finite. Text can be written as UTF-8.

    >>> typed(3, float, "lr"), typed(None, int | None, "limit"), typed([1, 2], list[int], "ks")
    (3, None, [1, 2])
    >>> typed("false", bool, "english_problem")
    Traceback (most recent call last):
    ValueError: english_problem is 'false'; valid: true or false
    """
    if isinstance(kind, type) and is_dataclass(kind):
        return _object(value, kind, name)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    lists = [each for each in kinds if get_origin(each) is list]
    if lists and isinstance(value, list):
        (item,) = get_args(lists[0])
        if all(_is(each, item) for each in value):
            return value  # names are made, below, for what has to be refused or looked into
        return [typed(each, item, f"{name}[{place}]") for place, each in enumerate(value)]
    if not any(_is(value, each) for each in kinds):
        valid = " or ".join(_word(each) for each in kinds)
        raise ValueError(f"{name} is {_shortened(value)}; valid: {valid}")
    return value


def read_number(text: str, kind: type) -> Any:
    """Return the int or float that a text says in ASCII; ValueError, in Python's words, where none.

    Python itself reads 1_0 as 10, and the digits of every script, which no message here shows.
    """
    if "_" in text or not text.isascii():
        raise ValueError(f"could not convert string to {kind.__name__}: {text!r}")
    return kind(text)


def _is(value: Any, kind: Any) -> bool:
    """Say whether a plain value is of a plain kind."""
    if kind is NoneType:
        return value is None
    if kind is float and type(value) is float:
        return math.isfinite(value) and abs(value) <= LARGEST_FLOAT
    if kind in (int, float) and type(value) is int:
        return -LARGEST < value < LARGEST
    if kind is str and isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    return type(value) is kind


def _object(value: Any, kind: Any, name: str) -> Any:
    """Return a dataclass made of an object that has each of its fields and no other."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {_shortened(value)}; valid: an object")
    known = {f.name: f.type for f in fields(kind)}
    if unfit := sorted(known.keys() ^ value.keys()):
        what = "an unknown" if unfit[0] in value else "no"
        raise ValueError(f"{name} has {what} {unfit[0]!r}; valid: {', '.join(known)}")
    return kind(**{field: typed(value[field], known[field], f"{name}.{field}") for field in known})


def _word(kind: Any) -> str:
    if kind is NoneType:
        return "null"
    return WORDS.get(kind, "a list" if get_origin(kind) is list else str(kind))


def _shortened(value: Any, width: int = 60) -> str:
    """Return a value as a message shows it; a whole number may have thousands of digits."""
    if type(value) is int and not -LARGEST < value < LARGEST:
        return "a number of more than 18 digits"
    text = ascii(value) if isinstance(value, str) and not _is(value, str) else repr(value)
    return text if len(text) <= width else text[:width] + "..."
