"""parts/tables.py: no number is cut, whatever the width, and no name is read as markup."""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_view import NAME

from parts.metrics import Estimate
from parts.tables import cell, estimates_table, print_table, text_table

ROOT = Path(__file__).resolve().parent.parent


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1)


def test_cells_show_value_and_interval_and_nothing_where_there_is_nothing():
    assert cell("pass@1", Estimate(0.3, 0.25, 0.351)) == "0.300 [0.250, 0.351]"
    assert cell("mean tokens", Estimate(26.04, 25.0, 27.0)) == "26.0 [25.0, 27.0]"
    assert cell("pass@1", Estimate(math.nan, math.nan, math.nan)) == "-"
    assert cell("pass@1", Estimate(0.375, math.nan, math.nan)) == "0.375"


def test_a_table_of_two_columns_fits_a_narrow_terminal():
    stream = io.StringIO()
    summary = {
        "KL to the teacher, nats/token": estimate(0.5),
        "accuracy given a box": estimate(0.25),
    }
    table = estimates_table("Hausa", {"before": summary, "after": summary})
    Console(file=stream, width=80).print(table)
    assert stream.getvalue().count("0.500 [0.400, 0.600]") == 2
    assert "KL to the teacher, nats/token" in stream.getvalue()


def test_a_metric_that_one_summary_lacks_is_a_dash_there():
    columns = {"before": {"pass@1": estimate(0.5)}, "after": {"pass@8": estimate(0.25)}}
    table = estimates_table("Hausa", columns)
    assert [[str(text) for text in column.cells] for column in table.columns] == [
        ["pass@1", "pass@8"],
        ["0.500 [0.400, 0.600]", "-"],
        ["-", "0.250 [0.150, 0.350]"],
    ]


def test_a_table_shows_names_as_they_are():
    stream = io.StringIO()
    print_table(text_table(NAME, ["metric", NAME], [[NAME, NAME]]), Console(file=stream, width=80))
    assert stream.getvalue().count(NAME) == 4


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_of_a_table_is_cut_or_broken(width, terminal):
    """Of six metrics in several languages rich cut or broke the numbers where it had no room."""
    header = ["pass@1", "pass@8", "accuracy given a box", "in the problem's language", "", "猫猫"]
    values = [f"0.9{place}4 [0.{place}40, 0.98{place}]" for place in range(12)]
    rows = [["Hausa", *values[:6]], ["mean", *values[6:]]]
    table = text_table("lab/tiny, lab", ["95 % intervals in brackets", *header], rows)
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    print_table(table, console)
    text = stream.getvalue()
    assert "…" not in text and text.count("lab/tiny, lab") == 1
    assert all(text.count(value) == 1 for value in values)
    for value in values:
        (line,) = (line for line in text.splitlines() if value in line)
        assert line.split()[1] == rows[value in values[6:]][0]
    assert all(word in text for name in header for word in name.split())
    lengths = {cell_len(line) for line in text.splitlines()[1:]}
    assert max(lengths) <= width if terminal else len(lengths) == 1


def test_on_a_terminal_narrower_than_a_number_its_digits_go_on_below():
    table = text_table("lab", ["metric", "pass@1"], [["accuracy", "0.964 [0.940, 0.984]"]])
    stream = io.StringIO()
    console = Console(file=stream, width=18, force_terminal=True, color_system=None)
    print_table(table, console)
    digits = "".join(letter for letter in stream.getvalue() if letter in "[.,]0123456789")
    assert digits == "10.964[0.940,0.984]"  # the first is pass@1's
    assert max(map(cell_len, stream.getvalue().splitlines())) <= 18


def test_a_table_that_fits_is_printed_as_one():
    """These are the lines that the README shows."""
    summary = {"greedy accuracy": estimate(0.5), "in the problem's language": estimate(0.25)}
    table = estimates_table("Hausa", {"before": summary, "after": summary})
    shown = []
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, width=80, force_terminal=terminal, color_system=None)
        print_table(table, console)
        shown.append(stream.getvalue())
        stream.truncate(stream.seek(0))
        console.print(table)
        assert stream.getvalue() == shown[-1]
    assert shown[0] == shown[1]


def test_a_table_is_shown_without_the_large_libraries():
    seen = "import sys, parts.tables; print({'torch', 'numpy', 'matplotlib'} & sys.modules.keys())"
    found = subprocess.run(
        [sys.executable, "-c", seen], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "set()\n"
