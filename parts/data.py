"""Read problems: from files and hub sets, split off what is held out, and order the rest.

The layouts are those that the data sets have on the hub, oddities included. parts.prompts says what
a problem is and how it becomes a prompt.
"""

import csv
import io
import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from pyarrow import parquet
from rich.console import Console

from parts.files import json_lines, write_text
from parts.prompts import Language, Problem, find_language, languages
from parts.prompts import build_prompt as build_prompt  # stays importable from here
from parts.recipe import Config

# In order of preference; m_query and response are MSVAMP's.
PROBLEM_COLUMNS = ("problem_translated", "problem", "question", "m_query")
ANSWER_COLUMNS = ("answer_number", "answer", "response")  # the first that is not empty
Row = tuple[str, Any]  # the words that say where a row stands in its file, and its content


def load_problems(path: Path, *, language: str | None = None) -> list[Problem]:
    """Return the problems of one data file: .jsonl, .json, .tsv or .csv, .parquet.

    Two layouts are told apart by their columns, in any case:
    training  problem_translated, and in English problem and solution, as COPSD's hub sets have them
    plain     another of PROBLEM_COLUMNS, in `language`; there is no English side
    Both have one of ANSWER_COLUMNS. An id is the row's number from 0 where there is none. Rows that
    name another language than `language`, by language_short or language, are left out. Text becomes
    NFC. A ValueError names the file and the line or row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    try:
        return _read_problems(path, language)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_problems(path: Path, language: str | None) -> list[Problem]:
    """Return the problems of a file that is there; a ValueError does not name it yet."""
    wanted = find_language(language) if language else None
    by_name = {name: known for known in languages().values() for name in known.names}
    problems: dict[tuple[str, str], Problem] = {}
    others: set[str] = set()
    for number, (where, cells) in enumerate(_rows(path)):
        if not isinstance(cells, dict):
            raise ValueError(f"{where}: must be an object, not a {type(cells).__name__}")
        row = {name.lower(): value for name, value in cells.items()}
        named = _text(row, "language_short", where) or _text(row, "language", where)
        spoken = by_name.get(named.lower()) if named else wanted
        if wanted and spoken != wanted:
            others.add(str(named))
            continue
        if not spoken:
            what = f"unknown language {named!r}" if named else "no language named"
            raise ValueError(f"{where}: {what}")
        problem = _problem(row, number, where, spoken)
        if problems.setdefault((problem.language, problem.id), problem) is not problem:
            raise ValueError(f"{where}: duplicate id {problem.id!r}")
    if not problems:
        wish = f" in {language}" if language else ""
        raise ValueError(f"no problems{wish}; languages: {sorted(others)}")
    return list(problems.values())


def _problem(row: dict[str, Any], number: int, where: str, language: Language) -> Problem:
    """Return the problem of a row; `number` is its id where it names none."""
    column = next((name for name in PROBLEM_COLUMNS if name in row), None)
    if not column:
        needed = f"needs a column {', '.join(PROBLEM_COLUMNS)}"
        raise ValueError(f"{where}: {needed}; has {', '.join(row)}")
    text = _text(row, column, where)
    if not text:
        raise ValueError(f"{where}: empty {column}")
    # Beside problem_translated, the column "problem" is English; alone it is the problem itself.
    english_column = "problem" if column == "problem_translated" else column
    has_english = column != english_column or language.iso3 == "eng"
    answers = (_text(row, name, where) for name in ANSWER_COLUMNS)
    return Problem(
        id=_text(row, "id", where) or str(number),
        problem=text,
        problem_en=_text(row, english_column, where) if has_english else None,
        solution_en=_text(row, "solution", where) if has_english else None,
        answer=next((answer for answer in answers if answer), None),
        language=language.iso3,
    )


def _text(row: dict[str, Any], column: str, where: str) -> str | None:
    """Return a cell as NFC text without outer blanks, None where it is absent or blank."""
    value = row.get(column)
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise ValueError(f"{where}: {column} must be text or a number, not a {kind}")
    return unicodedata.normalize("NFC", str(value)).strip() or None


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Write problems as load_problems reads them, in the training layout, as .jsonl."""
    rows = [
        {
            "id": problem.id,
            "problem": problem.problem_en,
            "solution": problem.solution_en,
            "answer": problem.answer,
            "problem_translated": problem.problem,
            "language": problem.language,
        }
        for problem in problems
    ]
    write_text(path, json_lines(rows))


def _rows(path: Path) -> Iterator[Row]:
    """Yield the data file's rows; its suffix says how they are written."""
    readers = {
        ".jsonl": _json_rows,
        ".json": _json_rows,
        ".tsv": _tsv_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"unknown extension {suffix!r}; valid: {', '.join(readers)}")
    yield from readers[suffix](path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    for number, row in enumerate(parquet.read_table(path).to_pylist()):
        yield f"row {number}", row


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one JSON list, or of a line of JSON a row, as MSVAMP's .json files are."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        for number, row in enumerate(json.loads(text)):
            yield f"row {number}", row
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            place = f"line {number}, column {error.colno}"
            raise ValueError(f"{place}: {error.msg}") from error
        yield f"line {number}", row


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    header = next(reader, [])
    for fields in reader:
        if fields:
            yield _table_row(f"line {reader.line_num}", header, fields)


def _tsv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table without quotes, as AfriMGSM and MGSM are.

    AfriMGSM has line breaks inside fields: a line of too few fields goes on in the next. MGSM has
    no header: where a table of two fields starts with a number in the second, they are question and
    answer.
    """
    text = io.StringIO(path.read_text(encoding="utf-8-sig"))
    reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    lines: Iterator[list[str]] = reader
    header = next(reader, [])
    if len(header) == 2 and header[1].strip("- ").replace(",", "").isdecimal():
        lines = chain([header], reader)
        header = ["question", "answer"]
    for fields in lines:
        if not fields:
            continue
        where = f"line {reader.line_num}"
        while len(fields) < len(header) and (more := next(reader, None)) is not None:
            broken_field = "\n".join([fields[-1], *more[:1]])
            fields = [*fields[:-1], broken_field, *more[1:]]
        yield _table_row(where, header, fields)


def _table_row(where: str, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise ValueError(f"{where}: {len(fields)} fields where the header has {len(header)}")
    return where, dict(zip(header, fields, strict=True))


def hub_training_file(language: str | Language) -> Path:
    """Return COPSD's training file for a language, from the hub or its local cache.

    How the hub names its files is not known to us: taken is the parquet whose path holds one of the
    language's codes or names, in any case, between non-letters. The returned path holds the hub's
    commit. FileNotFoundError where there is not exactly one.
    """
    if isinstance(language, str):
        language = find_language(language)
    benchmark = "AfriMGSM" if "afrimgsm" in language.benchmarks else "PolyMath"
    repo = f"yihongLiu/COPSD-{benchmark}-TrainDataset"
    patterns = []
    for name in language.names:
        in_any_case = "".join(f"[{letter}{letter.upper()}]" for letter in name)
        patterns += [f"{in_any_case}[!a-zA-Z]*parquet", f"*[!a-zA-Z]{in_any_case}[!a-zA-Z]*parquet"]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except OSError as error:
        raise FileNotFoundError(
            f"cannot reach {repo} on the hub; pass --data FILE instead"
        ) from error
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet")]
    matches = [file for file in files if any(fnmatchcase(file, pattern) for pattern in patterns)]
    if len(matches) != 1:
        raise FileNotFoundError(
            f"{repo} has {len(matches)} files for {language.english}, not 1; pass --data FILE"
        )
    return folder / matches[0]


def split_heldout(
    problems: list[Problem], count: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Return (train, heldout); held out is every row of `count` texts drawn by the seed."""
    texts = list(dict.fromkeys(row.problem for row in problems))
    if not 0 <= count < len(texts):
        valid = f"0 to {len(texts) - 1}"
        raise ValueError(
            f"cannot hold out {count} of {len(texts)} distinct problems; valid: {valid}"
        )
    held = set(random.Random(seed).sample(texts, count))
    train = [row for row in problems if row.problem not in held]
    heldout = [row for row in problems if row.problem in held]
    return train, heldout


def read_train_and_heldout(config: Config) -> tuple[list[Problem], list[Problem]]:
    """Return the problems that a run trains on and those that it is evaluated on."""
    lang = config.lang
    source = Path(config.data) if config.data else hub_training_file(lang)
    train = load_problems(source, language=lang)
    heldout: list[Problem] = []
    if config.eval_data:
        heldout = load_problems(Path(config.eval_data), language=lang)[: config.eval_problems]
    elif config.eval_problems:
        train, heldout = split_heldout(train, config.eval_problems, config.seed)
    if config.swap_solutions:
        others = train[1:] + train[:1]
        train = [
            replace(problem, solution_en=other.solution_en)
            for problem, other in zip(train, others, strict=True)
        ]
    return train, heldout


def keep_fitting(
    problems: list[Problem],
    prompts: list[list[int]],
    console: Console,
    *,
    context: int,
    max_new_tokens: int,
) -> list[Problem]:
    """Return the problems whose prompts leave room for max_new_tokens in the model's context.

    The others are left out whole, never cut, and counted aloud. Raises ValueError if that is all.
    """
    kept = [
        problem
        for problem, prompt in zip(problems, prompts, strict=True)
        if len(prompt) + max_new_tokens <= context
    ]
    if problems and not kept:
        raise ValueError(
            f"no problem fits the model's context of {context} tokens: lower --max-new-tokens"
        )
    if len(kept) < len(problems):
        console.print(
            f"skipped {len(problems) - len(kept)} of {len(problems)} problems: their prompts and "
            f"{max_new_tokens} new tokens exceed the model's context of {context}",
            soft_wrap=True,
        )
    return kept


def pick_order(count: int, *, seed: int, step: int, batch: int) -> list[int]:
    """Return the indices of a step's problems: each of `count` problems once in every epoch.

    step  from 0. A pure function of its arguments, so a resumed run needs no state.
    An epoch may end inside a step:

    >>> [pick_order(3, seed=0, step=step, batch=2) for step in range(3)]
    [[1, 2], [0, 2], [1, 0]]
    """
    epoch, offset = divmod(step * batch, count)
    last_epoch = epoch + (offset + batch - 1) // count
    order = []
    for number in range(epoch, last_epoch + 1):
        order += random.Random(f"{seed}/{number}").sample(range(count), count)
    return order[offset : offset + batch]
