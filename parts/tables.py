"""Tables for a terminal: estimates with their intervals, and texts, of which no number is cut."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from parts.view import shown

if TYPE_CHECKING:  # only its fields are read here, so nobody waits for numpy to see a table
    from parts.metrics import Estimate

Summary = Mapping[str, "Estimate"]  # by metric


def cell(name: str, estimate: "Estimate") -> str:
    """Return an estimate as "0.310 [0.250, 0.370]"; numbers of tokens have one digit, not three.

    A value that is nan becomes "-", and where the ends are nan there are no brackets.
    """
    if math.isnan(estimate.value):
        return "-"
    digits = 1 if "tokens" in name else 3
    value = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return value
    return f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def text_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Return a table whose first column names the rows; nothing in it is read as markup."""
    columns = [
        # "fold": a word that is wider than its column is broken, never cut.
        Column(Text(shown(name)), justify="right" if place else "left", overflow="fold")
        for place, name in enumerate(header)
    ]
    table = Table(*columns, title=Text(shown(title)), title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*(Text(shown(text)) for text in row))
    return table


def print_table(table: Table, console: Console) -> None:
    """Print a text_table with every number of it whole.

    Without a terminal it is as wide as its texts. On a terminal that is too narrow its columns are
    printed as several tables, each of which begins with the first column.
    """
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    title = str(table.title)
    for sizes in _fitting_columns(columns, console.width if console.is_terminal else None):
        lines = zip(*(columns[place] for place in sizes), strict=True)
        header, *rows = [list(line) for line in lines]
        part = text_table(title, header, rows)
        part.width = sum(sizes.values()) + 1
        for column, size in zip(part.columns, sizes.values(), strict=True):
            column.width = size - 3
        console.print(part, crop=False)
        title = ""


def _fitting_columns(columns: list[list[str]], width: int | None) -> list[dict[int, int]]:
    """Return the columns of each table, by place, with the room that each takes.

    columns  their texts, the header first
    width    of the terminal; None: there is none
    A column takes three more than its texts: a space on both sides, and the line before it.
    """
    whole = [3 + max(map(cell_len, texts)) for texts in columns]
    if width is None or sum(whole) < width:
        return [dict(enumerate(whole))]
    # A header may be wrapped, and so may the first column; a number stands on one line.
    tight = [3 + max(map(cell_len, [*header.split(), *cells])) for header, *cells in columns[1:]]
    first = max(11, min(whole[0], width - 1 - max(tight, default=0)))
    found = [{0: first}]
    for place, size in enumerate(tight, 1):
        size = max(4, min(size, width - 1 - first))
        if len(found[-1]) > 1 and sum(found[-1].values()) + size >= width:
            found.append({0: first})
        found[-1][place] = size
    return found


def estimates_table(title: str, columns: Mapping[str, Summary]) -> Table:
    """Return a table with a row per metric and a column per summary; "-" where it lacks one."""
    names = dict.fromkeys(name for summary in columns.values() for name in summary)
    rows = []
    for name in names:
        cells = [
            cell(name, summary[name]) if name in summary else "-" for summary in columns.values()
        ]
        rows.append([name, *cells])
    return text_table(title, ["95 % intervals in brackets", *columns], rows)
