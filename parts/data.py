"""Make problems of a data file's rows, split off what is held out, and order the rest.

The layouts are those that the data sets have on the hub, oddities included. parts.rows reads the
rows, whatever the file's format. parts.prompts says what a problem is and how it becomes a prompt.
"""

import math
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from rich.console import Console

from parts.files import json_lines, write_text
from parts.prompts import Language, Problem, find_language, named_language
from parts.prompts import build_prompt as build_prompt  # stays importable from here
from parts.recipe import Config
from parts.rows import EXTENSIONS, raw_rows
from parts.view import say

# In order of preference; m_query and response are MSVAMP's.
PROBLEM_COLUMNS = ("problem_translated", "problem", "question", "m_query")
ANSWER_COLUMNS = ("answer_number", "answer", "response")  # the first that is not empty
LANGUAGE_COLUMNS = ("language_short", "language", "language_code", "lang")
DEV_SEED = 0  # draws the development problems, whatever the run's seed

# What Python, JSON, pandas and spreadsheets write where there is no number, in lower case.
NO_ANSWER = {"nan", "inf", "infinity", "none", "null", "na", "n/a", "n.a", "true", "false"}
NO_ANSWER |= {"#n/a", "#na", "<na>", "#value!", "#ref!", "#div/0!", "#name?", "#num!", "unknown"}
NO_ANSWER |= {"nil", "undefined", "missing", "no answer", "not available", "todo", "tbd"}

# JSON reads \frac, behind one backslash, as a form feed and "rac". The first line has the control
# characters that no text needs, and halves of surrogate pairs. Tabs and line ends are ordinary, but
# not before what such a command leaves of itself.
BROKEN_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]"
    r"|\t(?=ext[a-z]*\{|(?:imes|heta|riangle|d?frac|ilde|herefore|binom)(?![a-z]))"
    r"|\r(?=(?:ight|ho|angle|ceil|floor)(?![a-z])|m\b|ightarrow)"
    r"|\n(?=(?:eq|otin|abla|earrow|otag)(?![a-z]))"
)
BROKEN_ANSWER = re.compile(rf"{BROKEN_TEXT.pattern}|[\t\r](?=[A-Za-z])|\n(?=[eu](?![A-Za-z]))")

# The boxes of a worked solution, and what else tells one: many words about an equation or on
# several lines, and a chain of sums, in which a result is used again: 5*3=15, 15+3=18.
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
CHAIN = re.compile(
    # No part of an equation such as y - 1/2 = 3x - 3
    r"(?<![\w^)}.+*/=-])(?<![+*/=-] )\d[\d.,]*"
    r"(?:\s*(?:[-+*×÷·]|\\(?:times|cdot|div)\b)\s*\d[\d.,]*)+\s*=\s*"
    r"(\d+(?:[.,]\d+)*)(?![.,]?\d|\s*/).*(?<![\d.,])\1(?![.,]?\d)",
    re.DOTALL,
)
# A sum within a sentence: she makes 9 * 2 = 18 dollars.
SUM = re.compile(r"\d\s*[=×÷*+]\s*\d|\d\s+[-−/]\s+\d")
MANY_WORDS = 12
WORD = re.compile(r"(?<![\\\w])(?!and\b|or\b)[^\W\d_]{2,}")
ESCAPES = {"\b": r"\b", "\f": r"\f", "\t": r"\t", "\r": r"\r", "\n": r"\n"}


@dataclass(frozen=True)
class Loaded:
    """The problems of a data file, and how many of its rows were left out, by the reason."""

    problems: list[Problem]
    left_out: dict[str, int]


def load_problems(path: Path, *, language: str | None = None) -> list[Problem]:
    """Return the problems of one data file: .jsonl, .json, .tsv or .csv, .parquet.

    Two layouts are told apart by their columns, in any case:
    training  problem_translated, and in English problem and solution, as COPSD's hub sets have them
    plain     another of PROBLEM_COLUMNS, in `language`; there is no English side
    Both have one of ANSWER_COLUMNS; of a worked solution, as GSM8K has them, the answer is what
    follows "####". An id is the row's number from 0 where there is none. Rows that name another
    language than `language`, in one of LANGUAGE_COLUMNS, are left out: read_problems counts them.
    Text becomes NFC. A ValueError names the file and the line or row.
    """
    return read_problems(path, language=language).problems


def load_aloud(path: Path, language: str, console: Console | None) -> list[Problem]:
    """Return load_problems' problems; say how many rows were left out, by reason."""
    loaded = read_problems(path, language=language)
    if console and loaded.left_out:
        count = sum(loaded.left_out.values())
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in loaded.left_out.items())
        said = f"{path}: left out {count} of {count + len(loaded.problems)} rows: {reasons}"
        say(console, said)
    return loaded.problems


def read_problems(path: Path, *, language: str | None = None) -> Loaded:
    """Return what load_problems returns, and what it leaves out."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; valid: a file, {', '.join(EXTENSIONS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    try:
        return _read_problems(path, language)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_problems(path: Path, language: str | None) -> Loaded:
    """Return the problems of a file that is there; a ValueError does not name it yet."""
    wanted = find_language(language) if language else None
    problems: dict[tuple[str, str], Problem] = {}
    others: Counter[str] = Counter()  # rows by the language that they name
    for number, (where, cells) in enumerate(raw_rows(path)):
        if not isinstance(cells, dict):
            raise ValueError(f"{where}: must be an object, not a {type(cells).__name__}")
        row = {name.strip().lower(): value for name, value in cells.items()}
        if len(row) < len(cells):
            said = f"two columns differ in case or blanks only: {', '.join(cells)}"
            raise ValueError(f"{where}: {said}")
        names = (_text(row, column, where) for column in LANGUAGE_COLUMNS)
        named = next((name for name in names if name), None)
        spoken = named_language(named) if named else wanted
        if wanted and spoken != wanted:
            others[str(named)] += 1
            continue
        if not spoken:
            what = f"unknown language {named!r}" if named else "no language named"
            raise ValueError(f"{where}: {what}")
        problem = _problem(row, number, where, spoken)
        if problems.setdefault((problem.language, problem.id), problem) is not problem:
            raise ValueError(f"{where}: duplicate id {problem.id!r}")
    if not problems and not others:
        raise ValueError("no problems: it has no rows; the first line of a table names the columns")
    if not problems:
        raise ValueError(f"no problems in {language}; languages: {sorted(others)}")
    left_out = {f"in {name}, not {language}": rows for name, rows in sorted(others.items())}
    return Loaded(list(problems.values()), left_out)


def _problem(row: dict[str, Any], number: int, where: str, language: Language) -> Problem:
    """Return the problem of a row; `number` is its id where it names none."""
    column = next((name for name in PROBLEM_COLUMNS if name in row), None)
    if not column:
        needed = f"needs a column {', '.join(PROBLEM_COLUMNS)}"
        held = ", ".join(map(repr, row)) or "none"  # a tab within a name shows
        raise ValueError(f"{where}: {needed}; has {held}")
    text = _text(row, column, where)
    if not text:
        raise ValueError(f"{where}: empty {column}")
    if column != "problem_translated":
        others = [name for name in PROBLEM_COLUMNS if _text(row, name, where) not in (None, text)]
        if others:
            advice = f"call the one in {language.english} problem_translated"
            raise ValueError(f"{where}: {column} and {others[0]} are two texts; {advice}")
    # Beside problem_translated, the column "problem" is English; alone it is the problem itself.
    english_column = "problem" if column == "problem_translated" else column
    has_english = column != english_column or language.iso3 == "eng"
    return Problem(
        id=_text(row, "id", where) or str(number),
        problem=text,
        problem_en=_text(row, english_column, where) if has_english else None,
        solution_en=_text(row, "solution", where) if has_english else None,
        answer=_answer(row, where),
        language=language.iso3,
    )


def _answer(row: dict[str, Any], where: str) -> str | None:
    """Return the row's answer, None where it has none; ValueError for what can be no answer."""
    for column in ANSWER_COLUMNS:
        cell = _cell(row, column, where)
        if not _clean(cell):
            continue
        _, mark, last = cell.rpartition("####")  # GSM8K ends a worked solution so
        _refuse_broken(BROKEN_ANSWER, last, column, where)
        answer = _clean(last)
        if mark and "\n" in answer:
            raise ValueError(f"{where}: {column} has more than the answer behind its last ####")
        boxes = [_clean(box[1]) for box in BOX.finditer(answer)]
        words = WORD.findall(BOX.sub("", answer))
        # Of an answer without words, what stands beside a box is part of it: -\boxed{18}. Beside
        # several boxes a few words may join them: \boxed{3} na \boxed{4}.
        words_of_an_answer = 3 if len(set(boxes)) > 1 else 0
        if boxes and (_is_worked(answer) or len(words) > words_of_an_answer):
            answer = boxes[-1]
        if _is_worked(answer):
            advice = "give its final answer alone"
            raise ValueError(f"{where}: {column} looks like a worked solution; {advice}")
        bare = answer.strip("\"'`()[]{}$.+- ").lower()
        says_something = any(unicodedata.category(c)[0] in "LN" or c in "∅∞" for c in bare)
        if bare in NO_ANSWER or not says_something:
            advice = "leave it empty where there is none"
            raise ValueError(f"{where}: {column} is {cell[-80:]!r}, which is no answer; {advice}")
        return answer
    return None


def _is_worked(answer: str) -> bool:
    """Return whether an answer tells how it was found."""
    has_lines = "\n" in answer and r"\begin" not in answer
    words = len(WORD.findall(answer))
    if words > MANY_WORDS and (has_lines or "=" in answer):
        return True
    return CHAIN.search(answer) is not None or (words > 2 and SUM.search(answer) is not None)


def _text(row: dict[str, Any], column: str, where: str) -> str | None:
    """Return a cell as NFC text without outer blanks, None where it is absent, blank or nan."""
    return _clean(_cell(row, column, where)) or None


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    """Return a cell as the text that it is, "" where it is absent or nan."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal | None):
        kind = type(value).__name__
        raise ValueError(f"{where}: {column} must be text or a number, not a {kind}")
    has_point = isinstance(value, float | Decimal)
    if value is None or (has_point and math.isnan(value)):
        return ""
    if has_point and not math.isfinite(value):
        raise ValueError(f"{where}: {column} is {value}, which is no number")
    text = str(value)
    if has_point and "e" in text.lower():
        # 1e+16 is written out, which a grader reads: all figures of a whole number, 2.0**60.
        text = format(Decimal(value if value == value // 1 else text), "f")
    _refuse_broken(BROKEN_TEXT, text, column, where)
    return text


def _refuse_broken(pattern: re.Pattern, text: str, column: str, where: str) -> None:
    """Raise ValueError where text holds a control character, and say what was probably meant."""
    found = pattern.search(text)
    if not found:
        return
    said = f"{where}: {column} holds the control character U+{ord(found[0]):04X}"
    rest = re.match(r"\S{0,20}", text[found.end() :])
    if found[0] in ESCAPES and rest and rest[0]:
        meant = ESCAPES[found[0]] + rest[0]
        said += f"; probably {meant} was meant: JSON takes two backslashes for one"
    raise ValueError(said)


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


def hub_training_file(language: str | Language) -> Path:
    """Return COPSD's training file for a language, from the hub or its local cache.

    How the hub names its files is not known to us: taken is the parquet whose path holds one of the
    language's codes or names, in any case, between non-letters. The returned path holds the hub's
    commit. FileNotFoundError where there is not exactly one.
    """
    if isinstance(language, str):
        language = find_language(language)
    benchmark = "AfriMGSM" if "afrimgsm" in language.training_sets else "PolyMath"
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
    """Return (train, heldout); held out is every row of `count` texts drawn by the seed.

    ValueError: there are not more texts than that.
    """
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


def read_problem_sets(
    config: Config, console: Console | None = None
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Return the problems to train on, to watch the run on, and to report.

    Those to watch it on are set aside from the training problems, and none without --eval-every.
    Rows of the files that are left out are counted on the console.
    """
    train, heldout = read_reported(config, config.seed, console)
    dev: list[Problem] = []
    if config.eval_every:
        train, dev = split_heldout(train, config.dev_problems, DEV_SEED)
    return replace_solutions(config, train), dev, heldout


def read_reported(
    config: Config, seed: int, console: Console | None = None
) -> tuple[list[Problem], list[Problem]]:
    """Return (train, heldout): the problems of the files, and those to report, which are no others.

    Of --eval-data they are the first --eval-problems, else as many of the training problems, drawn
    by the seed. A training problem of the same text as one of them is left out; where none is to be
    reported, as any of the file, which the evaluation that comes next is of.
    """
    source = Path(config.data) if config.data else hub_training_file(config.lang)
    train = load_aloud(source, config.lang, console)
    if config.eval_data:
        evaluated = load_aloud(Path(config.eval_data), config.lang, console)
        reported = evaluated[: config.eval_problems]
        return _without(reported or evaluated, train, console), reported
    if config.eval_problems:
        return split_heldout(train, config.eval_problems, seed)
    return train, []


def replace_solutions(config: Config, train: list[Problem]) -> list[Problem]:
    """Return training problems with the solutions that --swap-solutions or --answer-only shows."""
    if config.swap_solutions:
        train = _swap_solutions(train)
    if config.answer_only:
        train = [
            replace(p, solution_en=f"\\boxed{{{p.answer}}}" if p.answer else None) for p in train
        ]
    return train


def _without(
    heldout: list[Problem], train: list[Problem], console: Console | None
) -> list[Problem]:
    """Return the training problems whose text is not held out; the others are counted aloud."""
    reported = {problem.problem for problem in heldout}
    kept = [problem for problem in train if problem.problem not in reported]
    if train and not kept:
        raise ValueError("every training problem is also in --eval-data: nothing is left to learn")
    if console and len(kept) < len(train):
        said = f"skipped {len(train) - len(kept)} of {len(train)} training problems: held out, too"
        say(console, said)
    return kept


def _swap_solutions(train: list[Problem]) -> list[Problem]:
    """Return the problems with the next one's solution each, or the next that is another.

    A problem may stand in the data twice, each time with a solution in other words.
    """
    swapped = []
    for place, problem in enumerate(train):
        following = (train[(place + step) % len(train)] for step in range(1, len(train)))
        others = (other.solution_en for other in following if other.problem != problem.problem)
        solutions = (each for each in others if each and each != problem.solution_en)
        if (solution := next(solutions, None)) is None:
            raise ValueError("--swap-solutions needs two training problems of unlike solutions")
        swapped.append(replace(problem, solution_en=solution))
    return swapped


def keep_fitting(
    problems: list[Problem],
    prompt_tokens: list[int],
    console: Console,
    *,
    context: int,
    max_new_tokens: int,
    remedy: str = "lower --max-new-tokens",
) -> list[Problem]:
    """Return the problems whose prompts leave room for max_new_tokens in the model's context.

    The others are left out whole, never cut, and counted aloud. Raises ValueError if that is all.

    prompt_tokens  of each problem, those of its longest prompt
    """
    kept = [
        problem
        for problem, tokens in zip(problems, prompt_tokens, strict=True)
        if tokens + max_new_tokens <= context
    ]
    if problems and not kept:
        raise ValueError(f"no problem fits the model's context of {context} tokens: {remedy}")
    if len(kept) < len(problems):
        said = (
            f"skipped {len(problems) - len(kept)} of {len(problems)} problems: their prompts and "
            f"{max_new_tokens} new tokens exceed the model's context of {context}"
        )
        say(console, said)
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
