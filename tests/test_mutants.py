"""bench/mutants.py: a mutant is the file with one thing changed."""

import ast
from pathlib import Path

import pytest

from bench import mutants

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("line", "others"),
    [
        ("a < b", ["a <= b"]),
        ("a + 1", ["a - 1", "a + 2"]),
        ("x.clamp(max=1.5)", ["x.clamp(max=2.5)"]),
        ("min(a, b)", ["max(a, b)"]),
        ("config.clip_low", ["config.clip_high"]),
        ("not a and b", ["not a or b", "a and b"]),
        ("f(dim=-1, keepdim=True)", ["f(dim=1, keepdim=True)", "f(dim=-1, keepdim=False)"]),
    ],
)
def test_each_change_is_one_change(line, others):
    tree = ast.parse(f"def f():\n    return {line}")
    found = [
        mutants.Mutant("x.py", function, tree, node, other).source().split("return ")[1]
        for function, node in mutants.mutable_nodes(tree)
        for other in mutants.changes(node)
    ]
    assert set(others) <= set(found) and line not in found


def test_messages_and_annotations_are_left_alone():
    text = "def f(x: int | None = None) -> int | bool:\n    raise ValueError(1 + 1)"
    assert list(mutants.mutable_nodes(ast.parse(text))) and not [
        other
        for _, node in mutants.mutable_nodes(ast.parse(text))
        for other in mutants.changes(node)
    ]


def test_what_is_said_to_be_harmless_is_still_there():
    for file in mutants.TESTS:
        assert (ROOT / file).is_file() and all((ROOT / t).is_file() for t in mutants.TESTS[file])
    known = {
        mutant.key
        for file in {key[0] for key in mutants.HARMLESS}
        for mutant in mutants.mutants_of(file)
    }
    assert mutants.HARMLESS.keys() <= known


def test_what_is_said_of_the_first_cursor_is_said_of_nothing_else():
    key = ("parts/batch.py", "__init__", "0", "1")
    excused = [str(mutant) for mutant in mutants.mutants_of(key[0]) if mutant.key == key]
    assert len(excused) == 2 and all("self.cursor = Cursor(" in line for line in excused)
