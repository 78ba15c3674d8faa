"""Files that are written whole or not at all, and the readers of JSON and of JSON lines.

A run can be killed at any moment. A file that is replaced is therefore written beside its place
first, and a file that grows is a file of lines, whose last line may be torn.

JSON has no word for a number that is not finite. Here it is written as null, which every reader of
JSON takes, and stands for "no value"; who reads a number back takes null for nan.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # the suffix of a file that is being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well, what was written there replaces `path`.

    After an error, or a kill at any moment, `path` holds what it held before. The only way by which
    the project replaces a file.
    """
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return content as JSON, letters as they are, and null for a number that is not finite.

    >>> json_text({"loss": math.nan, "ratios": [1.5, math.inf]})
    '{"loss": null, "ratios": [1.5, null]}'
    """
    return json.dumps(_without_nan(content), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_nan(content: Any) -> Any:
    """Return a copy of content with None in place of nan and of infinities."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return content


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json_text(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; a ValueError names the place where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; a ValueError names a file that holds anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a line of JSON for each row; JSON escapes line feeds, so no row spans two lines."""
    return "".join(json_text(row) + "\n" for row in rows)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append a line of JSON for each row; a torn last line, left by a kill, is cut off first."""
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json_lines(rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without a torn last line; [] where there is no file.

    Lines end at a line feed and nowhere else: U+2028 and its like are ordinary text inside a row.
    Never writes. Raises ValueError, with the file, where a whole line is broken.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        raise ValueError(f"{path} is broken before its last line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged: it holds a line that is no JSON object")
    return rows
