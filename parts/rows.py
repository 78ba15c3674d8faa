"""Read the rows of a data file, whatever its format: each row's place, and its cells by column.

The formats are .jsonl, .json, .tsv, .csv and .parquet, with the oddities that the data sets on the
hub have. What the columns mean is not known here: parts.data makes problems of the rows.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parts.files import parse_json

EXTENSIONS = (".jsonl", ".json", ".tsv", ".csv", ".parquet")
Row = tuple[str, Any]  # the words that say where a row stands in its file, and its content


def raw_rows(path: Path) -> Iterator[Row]:
    """Yield a data file's rows in their order; its suffix says how they are written.

    What a row holds is not looked at: one of JSON need not even be an object. A ValueError for what
    cannot be read names the place where there is one, and not the file.
    """
    functions = (_json_rows, _json_rows, _tsv_rows, _csv_rows, _parquet_rows)
    readers = dict(zip(EXTENSIONS, functions, strict=True))
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"unknown extension {suffix!r}; valid: {', '.join(readers)}")
    yield from readers[suffix](path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows; a number of 16 or 32 bits has the digits that tell it from its neighbours.

    0.1 in 32 bits is 0.1, and not 0.10000000149011612, which is the same in 64.
    """
    # Here, so that a machine without pyarrow can run on the other formats, and nobody waits for
    # numpy who reads no rows.
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:  # damaged pages, or a kind that it cannot read
        raise ValueError(" ".join(str(error).split())) from error
    names = table.column_names
    columns = [_column_values(name, table[name]) for name in names]
    kinds = {pa.float16(): np.float16, pa.float32(): np.float32}
    short = {field.name: kinds[field.type] for field in table.schema if field.type in kinds}
    for number in range(len(table)):
        row = {name: values[number] for name, values in zip(names, columns, strict=True)}
        numbers = {name: kind(row[name]) for name, kind in short.items() if row[name] is not None}
        yield f"row {number}", row | {name: float(str(x)) for name, x in numbers.items()}


def _column_values(name: str, column: Any) -> list[Any]:
    """Return what a parquet column holds; ValueError where Python has no such value.

    Its dates end with the year 9999, its spans of time after 2.7 million years, and text is UTF-8.
    """
    try:
        return column.to_pylist()
    except (ArithmeticError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"column {name!r} of {column.type} cannot be read: {reason}; valid: text and numbers"
        ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one JSON list, or of a line of JSON a row, as MSVAMP's .json files are."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            rows = parse_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error}{_escape_advice(error)}") from error
        for number, row in enumerate(rows):
            yield f"row {number}", row
        return
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            place = f"line {number}, column {error.colno}"
            if _goes_over_lines(lines[number - 1 :]):
                said = "a piece of JSON over several lines; valid: a row a line, or in .json a list"
                raise ValueError(f"{place}: {said}") from error
            raise ValueError(f"{place}: {error.msg}{_escape_advice(error)}") from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        yield f"line {number}", row


def _goes_over_lines(lines: list[str]) -> bool:
    """Say whether what begins in the first of the lines is JSON that ends in a later one."""
    try:
        _, end = json.JSONDecoder().raw_decode("\n".join(lines).lstrip())
    except (ValueError, RecursionError):
        return False
    return end > len(lines[0].strip())


def _escape_advice(error: json.JSONDecodeError) -> str:
    return "; JSON takes two backslashes for one" if "escape" in error.msg else ""


def _csv_rows(path: Path) -> Iterator[Row]:
    (_, header), *lines = _table_lines(path, strict=True) or [(0, [])]
    header = _columns(header)
    for number, fields in lines:
        if fields:
            yield _table_row(f"line {number}", header, fields)


def _table_lines(path: Path, **options: Any) -> list[tuple[int, list[str]]]:
    """Return a table's rows, header and all: the number of the line where each ends, its fields.

    Blank lines above the header are no rows.
    options  csv.reader's
    """
    reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), **options)
    # By default csv refuses fields of more than 131,072 characters, be they read or not.
    limit = csv.field_size_limit(2**31 - 1)
    rows: list[tuple[int, list[str]]] = []
    try:
        for fields in reader:
            if fields or rows:
                rows.append((reader.line_num, fields))
        return rows
    except csv.Error as error:
        first = rows[-1][0] + 1 if rows else 1  # line of the row that cannot be read
        is_open = str(error) == "unexpected end of data"
        said = "a quotation mark is not closed" if is_open else str(error)
        raise ValueError(f"line {first}: {said}") from error
    finally:
        csv.field_size_limit(limit)


# A field in quotes, as pandas writes it: with a line end in it, or with quotation marks, which are
# doubled. A field without quotes may begin and end with a quotation mark, too.
_QUOTED = re.compile(r'"(?=.*(?:\n|"".))(?:[^"]|"")*"', re.DOTALL)


def _tsv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table without quotes, as AfriMGSM and MGSM are.

    AfriMGSM has line breaks inside fields: a line of too few fields goes on in the next. MGSM has
    no header: where a table of two fields starts with a number in the second, they are question and
    answer.
    """
    table = _table_lines(path, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = table[0][1] if table else []
    if len(header) == 2 and re.fullmatch(r"[-$€£₦ ]*\d[\d.,/]*[% ]*", header[1]):
        header = ["question", "answer"]
    else:
        table = table[1:]
    header = _columns(header)
    lines = iter(table)
    for number, fields in lines:
        if not fields:
            continue
        while len(fields) < len(header) and (more := next(lines, None)) is not None:
            broken_field = "\n".join([fields[-1], *more[1][:1]])
            fields = [*fields[:-1], broken_field, *more[1][1:]]
        if any(map(_QUOTED.fullmatch, fields)):
            advice = "save it as .csv, with commas between the fields"
            raise ValueError(f"line {number}: quoted fields in a .tsv; {advice}")
        yield _table_row(f"line {number}", header, fields)


def _columns(header: list[str]) -> list[str]:
    """Return the names of a table's columns; ValueError where a name is there twice."""
    names = [name.strip() for name in header]
    # A spreadsheet leaves columns without a name behind the others, which nobody reads.
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(f"two columns are called {min(twice)!r}")
    return names


def _table_row(where: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise ValueError(f"{where}: {len(fields)} fields where the header has {len(header)}")
    return where, dict(zip(header, fields, strict=True))
