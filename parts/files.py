"""Files that are written whole or not at all, and the readers of JSON and of JSON lines.

A run can be killed at any moment. A file that is replaced is therefore written beside its place
first, and a file that grows is a file of lines, whose last line may be torn.

JSON has no word for a number that is not finite. Here it is written as null, which every reader of
JSON takes, and stands for "no value"; who reads a number back takes null for nan.

A disk can be full at any write. What a file held before is then still there, and CannotWrite, in
one line, names the file and says what to do.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # the suffix of a file that is being written
SEAL = "sha256"  # the key under which an object carries the digest of the rest of itself
BLOCK = 2**20  # bytes that are read at a time


class CannotWrite(OSError):
    """A file cannot be written. The message is one line; what the file held before, it holds."""


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """Return what to raise where writing failed: the file, the reason, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = error.strerror or " ".join(str(error).split())
    remedy = "free some space there" if full else "see that it can be written"
    return CannotWrite(f"cannot write {path}: {reason}; {remedy}, then repeat the command")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well, what was written there replaces `path`.

    After an error, or a kill at any moment, `path` holds what it held before. The only way by which
    the project replaces a file. Raises CannotWrite.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # it is there after an error only
            partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there; raises CannotWrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        place = Path(error.filename)
        what = "a link to what is not there" if place.is_symlink() else "no folder"
        raise CannotWrite(f"cannot write {folder}: {place} is {what}; name another") from error
    except OSError as error:
        raise cannot_write(folder, error) from error


def remove_file(path: Path) -> None:
    """Remove a file; raises CannotWrite."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def refuse_no_file(path: Path, flag: str) -> None:
    """Raise ValueError where a flag names what must not be written as a file: before any work.

    That is a folder, a device or a link, which would be replaced by the file; a file in a folder
    that is not there; and one in a folder of a run or an evaluation, which may be its log.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{flag} is {path}: there is no such folder")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{flag} is {path}, which is no file; name one that is to be written")
    if any((path.parent / record).is_file() for record in ("config.json", "settings.json")):
        raise ValueError(f"{flag} is {path}, among the files of a run; name one somewhere else")


def refuse_other_name(path: Path, flag: str, *suffixes: str) -> None:
    """Raise ValueError where the file that a flag names does not end as its kind does."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{flag} is {path}; valid: a name in {' or '.join(suffixes)}")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise CannotWrite where the disk of a folder, made or not, has fewer bytes free than needed.

    what  is to be written, as the message calls it
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CannotWrite(
            f"{folder}: {what} needs {size_text(needed)} and {size_text(free)} are free; "
            "free some space there, then repeat the command"
        )


def size_text(count: int) -> str:
    """Return a number of bytes as a person says it.

    >>> size_text(2_500_000), size_text(3 * 2**30)
    ('2.4 MiB', '3.0 GiB')
    """
    unit = "GiB" if count >= 2**30 else "MiB"
    return f"{count / (2**30 if unit == 'GiB' else 2**20):.1f} {unit}"


def file_digest(path: Path, size: int | None = None) -> str:
    """Return SHA-256, in hex, of a file or of its first `size` bytes; OSError if it is not there.

    A file that is shorter than `size` has another digest than the one that was that long.
    """
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as stream:
        while left and (block := stream.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    digest.update(b"" if not left else b"it ends too early")
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """Return content as JSON, letters as they are, and null for a number that is not finite.

    Half a surrogate pair, which UTF-8 cannot write, is escaped. Names of files have such where the
    locale is POSIX: there Python cannot read their letters, and keeps their bytes so.

    >>> print(json_text(["ɓ", "\\udcc9"]))
    ["ɓ", "\\udcc9"]
    >>> json_text({"loss": math.nan, "ratios": [1.5, math.inf]})
    '{"loss": null, "ratios": [1.5, null]}'
    """
    text = json.dumps(_without_nan(content), ensure_ascii=False, allow_nan=False, indent=indent)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


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


@contextmanager
def remedied(remedy: str) -> Iterator[None]:
    """Add what to do to the ValueError of a block that finds a file of ours damaged."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; a ValueError names the place where it is broken."""
    try:
        return parse_json(path.read_bytes())
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says; ValueError, JSONDecodeError or UnicodeDecodeError where it is broken.

    Lists in lists in lists, some thousands deep, are broken, too: nothing of ours is like that, and
    Python's reader would give up with a RecursionError. So is an object that names something twice,
    of which that reader would take the last and say nothing.
    """
    whole = text if isinstance(text, str) else text.decode()
    try:
        return json.loads(whole, object_pairs_hook=_named_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError where it has a name twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {repeated!r} twice")
    return content


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON with a digest of itself, whole or not at all."""
    write_json(path, {**content, SEAL: seal(content)})


def read_sealed(path: Path, *, always: bool = False) -> dict[str, Any]:
    """Return the object that write_sealed wrote; ValueError where a byte of it has changed.

    always  every version sealed this file; else one without a digest, as an older version wrote it,
            is returned as it is
    """
    content = read_object(path)
    held = content.pop(SEAL, None)
    if (always or held is not None) and held != seal(content):
        raise ValueError(f"{path} is damaged: it is not what its own digest says")
    return content


def seal(content: Mapping[str, Any]) -> str:
    """Return the digest of an object, which stays the same when it is written and read again."""
    as_read = json.loads(json_text(content))  # tuples are lists then, and nan is null
    text = json.dumps(as_read, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
    lines = json_lines(rows).encode()
    whole = None  # how long it was, in bytes
    try:
        with path.open("ab+") as stream:
            whole = _cut_torn_line(stream)
            stream.write(lines)
    except OSError as error:
        if whole is not None:
            with suppress(OSError):  # /dev/full, for one, has no length
                os.truncate(path, whole)
        raise cannot_write(path, error) from error


def _cut_torn_line(stream: BinaryIO) -> int:
    """Cut what stands behind the last line feed; return the length that is left, in bytes."""
    if stream.seek(0, os.SEEK_END):
        stream.seek(-1, os.SEEK_END)
        if stream.read() != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
    return stream.seek(0, os.SEEK_END)


def read_edge_rows(path: Path, first: int, last: int) -> list[dict[str, Any]]:
    """Return a file's first and last rows, as read_rows does, without parsing those between."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        lines = [*islice(stream, first), *deque(stream, maxlen=last)]
    return [parse_json(line) for line in lines if line.endswith(b"\n")]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without a torn last line; [] where there is no file.

    Lines end at a line feed and nowhere else: U+2028 and its like are ordinary text inside a row.
    Never writes. Raises ValueError, with the file, where a whole line is broken.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        rows = [parse_json(line) for line in lines]
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        raise ValueError(f"{path} is broken before its last line: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged: it holds a line that is no JSON object")
    return rows


def section_marks(name: str) -> tuple[str, str]:
    """Return the comments between which an experiment's section of a Markdown file stands."""
    return f"<!-- begin {name}: written by compare.py -->", f"<!-- end {name} -->"


def split_section(file: Path, name: str) -> tuple[str, str]:
    """Return what stands before and after an experiment's section of a Markdown file, as it is.

    Where there is none, its place is the end. ValueError or OSError where it cannot be told.
    """
    begin, end = section_marks(name)
    try:
        whole = file.read_text(encoding="utf-8") if file.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8: {error}") from error
    before, found, rest = whole.partition(begin)
    if not found:
        return (whole.rstrip() + "\n\n" if whole else ""), "\n"
    _, ended, after = rest.partition(end)
    if not ended:
        raise ValueError(f"{file} has {begin!r} without {end!r}")
    return before, after
