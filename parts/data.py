"""Languages, problems, and the one prompt builder that training, GRPO and evaluation share.

The wordings in languages.json are ours, unreviewed by speakers; Vai's are English that names it in its own script.
"""

import csv
import hashlib
import io
import json
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase as Tokenizer

ROLES = ("student", "teacher")
THINKING = ("auto", "on", "off")
PROBLEM_COLUMNS = (
    "problem_translated",
    "problem",
    "question",
    "m_query",
)  # m_query and response are MSVAMP's
ANSWER_COLUMNS = ("answer_number", "answer", "response")  # the first that is not empty


@dataclass(frozen=True)
class Language:
    """A language and the short wordings, in that language, that its prompts are made of."""

    iso3: str  # ISO 639-3, the code used everywhere inside the project
    iso1: str | None  # ISO 639-1, None where the language has none
    english: str  # its name in English
    own: str  # its name in itself
    script: str
    benchmarks: tuple[str, ...]  # the benchmarks that cover it: "afrimgsm", "polymath"
    problem_label: str
    english_problem_label: str
    english_solution_label: str
    solution_begin: str
    solution_end: str
    transition: str  # understand the solution, do not copy it, solve the problem yourself
    instruction: str  # reason step by step, put the final answer in \boxed{}
    opening: str  # the assistant's first sentence, which announces thinking in this language

    @property
    def names(self) -> set[str]:
        """Its codes and names in lower case, as data files may write them."""
        return {name.lower() for name in (self.iso3, self.iso1, self.english, self.own) if name}


@dataclass(frozen=True)
class Problem:
    """A problem in one language, and what the data has of its English side and its answer."""

    id: str
    problem: str
    problem_en: str | None
    solution_en: str | None
    answer: str | None
    language: str  # ISO 639-3


@cache
def languages() -> dict[str, Language]:
    """Return every language of languages.json by its ISO 639-3 code."""
    records = json.loads(Path(__file__).with_name("languages.json").read_text(encoding="utf-8"))
    benchmarks = {iso3: tuple(record.pop("benchmarks")) for iso3, record in records.items()}
    return {
        iso3: Language(iso3=iso3, benchmarks=benchmarks[iso3], **record)
        for iso3, record in records.items()
    }


def find_language(code: str) -> Language:
    """Return the language of an ISO 639-1 or 639-3 code in any case; an unknown code is a ValueError."""
    for language in languages().values():
        if code.lower() in (language.iso3, language.iso1):
            return language
    valid = ", ".join(
        f"{known.iso3} ({known.iso1})" if known.iso1 else known.iso3
        for known in languages().values()
    )
    raise ValueError(f"unknown language {code!r}; valid codes: {valid}")


def _open_assistant_turn(user_turn: str, tokenizer: Tokenizer, thinking: str) -> tuple[str, bool]:
    """Return the text up to where the assistant writes, and whether it ends inside an opened think block."""
    if thinking not in THINKING:
        raise ValueError(f"unknown thinking mode {thinking!r}; valid: {', '.join(THINKING)}")
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model"
        )
    template, enabled = tokenizer.get_chat_template(), thinking != "off"
    options: dict[str, Any] = {
        "tokenize": False,
        "add_generation_prompt": True,
        "enable_thinking": enabled,
    }
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": user_turn}], **options))
    already_open = text.rstrip().endswith(
        "<think>"
    )  # DeepSeek-R1 and Qwen3-Thinking open the block themselves
    opens = already_open or (enabled and ("enable_thinking" in template or "<think>" in template))
    if thinking != "auto" and opens != enabled:
        habit = "always opens a think block" if opens else "has no think block"
        raise ValueError(
            f"thinking {thinking!r} does not fit this chat template, which {habit}; use 'auto'"
        )
    if not opens:
        return text, False
    return (text.rstrip("\n") if already_open else f"{text}<think>") + "\n", True


def prompt_opens_think(tokenizer: Tokenizer, thinking: str = "auto") -> bool:
    """Say whether prompts end inside an opened think block, so that an answer counts only after its end."""
    return _open_assistant_turn("?", tokenizer, thinking)[1]


def _refuse_control_text(problem: Problem, tokenizer: Tokenizer) -> None:
    """Raise ValueError where a problem spells a control token: tokenised with the template, it would act as one."""
    text = "\n".join(filter(None, (problem.problem, problem.problem_en, problem.solution_en)))
    for token in tokenizer.added_tokens_decoder.values():
        # DeepSeek-R1 does not mark its turn tokens special; Gemma adds runs of blanks that are ordinary text.
        is_control = token.content.strip() and (
            token.special or token.content in tokenizer.get_chat_template()
        )
        if is_control and token.content in text:
            raise ValueError(
                f"problem {problem.id!r} spells the control token {token.content!r}; drop it"
            )


def _user_turn(problem: Problem, language: Language, role: str, shown: dict[str, bool]) -> str:
    """Return the user turn; a teacher's problem that lacks a field to be shown is a ValueError."""
    if role == "student":
        return f"{problem.problem}\n\n{language.instruction}"
    missing = [field for field in shown if shown[field] and not getattr(problem, field)]
    if missing:
        raise ValueError(
            f"problem {problem.id!r} has no {' and no '.join(missing)}, which the teacher's prompt shows"
        )
    blocks = [f"{language.problem_label}\n{problem.problem}"]
    if shown["problem_en"]:
        blocks.append(f"{language.english_problem_label}\n{problem.problem_en}")
    if shown["solution_en"]:
        marked = f"{language.solution_begin}\n{problem.solution_en}\n{language.solution_end}"
        blocks.append(f"{language.english_solution_label}\n{marked}")
    return "\n\n".join([*blocks, language.transition, language.instruction])


def render_prompt(
    problem: Problem,
    language: str | Language,
    tokenizer: Tokenizer,
    *,
    role: str = "student",
    thinking: str = "auto",
    english_problem: bool = True,
    english_solution: bool = True,
) -> str:
    r"""Return the prompt's text: the user turn in the model's chat template, then the opened assistant turn.

    role      the teacher reads, beside the student's problem and instruction, the English problem and solution;
              english_problem=False and english_solution=False leave that block out, the transition stays (ablations)
    thinking  "auto" opens a think block where the template knows one, "on" insists on it, "off" keeps it closed
    Adds no system turn, never truncates. ValueError: an unknown value, no chat template, a problem without a field to
    show or with a control token. Both roles end alike, so the first completion token is predicted from the same text:

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words, template = Tokenizer(models.WordLevel({})), "user: {{ messages[0].content }} assistant: "
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)
    >>> problem = Problem("7", "Nawa ne 2 + 3?", "What is 2 + 3?", "2 + 3 = 5", "5", "hau")
    >>> {render_prompt(problem, "hau", tokenizer, role=role)[-56:] for role in ROLES}
    {'ed{}. assistant: Zan yi tunani da Hausa, mataki-mataki.\n'}
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; valid: {', '.join(ROLES)}")
    language = find_language(language) if isinstance(language, str) else language
    shown = {"problem_en": english_problem, "solution_en": english_solution}
    text, _ = _open_assistant_turn(_user_turn(problem, language, role, shown), tokenizer, thinking)
    _refuse_control_text(problem, tokenizer)
    return f"{text}{language.opening}\n"


def build_prompt(
    problem: Problem, language: str | Language, tokenizer: Tokenizer, **options: Any
) -> list[int]:
    """Return render_prompt's text, with its options, as token ids: tokenised here once, and never decoded again."""
    text = render_prompt(problem, language, tokenizer, **options)
    return tokenizer.encode(text, add_special_tokens=False)  # the template wrote them


def template_hash(tokenizer: Tokenizer, language: str | Language, thinking: str = "auto") -> str:
    """Return 12 hex digits that change with either role's prompt: template, wordings, mode, a date in the template."""
    placeholder = Problem("placeholder", "PROBLEM", "ENGLISH PROBLEM", "SOLUTION", None, "eng")
    texts = [
        render_prompt(placeholder, language, tokenizer, role=role, thinking=thinking)
        for role in ROLES
    ]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a table's rows. A TSV has no quotes; its line of too few fields goes on in the next, as AfriMGSM's do; one
    of two fields whose first line ends in a number has no header, as MGSM's: they are question and answer.
    """
    is_tsv = path.suffix.lower() == ".tsv"
    text = io.StringIO(path.read_text(encoding="utf-8-sig"))
    reader = (
        csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.reader(text)
    )
    header, body = next(reader, []), reader
    if is_tsv and len(header) == 2 and header[1].strip("- ").replace(",", "").isdecimal():
        header, body = ["question", "answer"], chain([header], reader)
    for fields in filter(None, body):
        where = f"line {reader.line_num}"
        while is_tsv and len(fields) < len(header) and (more := next(reader, None)) is not None:
            fields = [*fields[:-1], "\n".join([fields[-1], *more[:1]]), *more[1:]]
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} fields where the header has {len(header)}")
        yield where, dict(zip(header, fields, strict=True))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the data file's rows, each with the words that say where it stands."""
    suffix = path.suffix.lower()
    text = path.read_text(encoding="utf-8-sig") if suffix in (".json", ".jsonl") else ""
    if suffix in (".tsv", ".csv"):
        yield from _table_rows(path)
    elif suffix == ".json" and text.lstrip().startswith("["):
        yield from ((f"row {number}", row) for number, row in enumerate(json.loads(text)))
    elif suffix in (".json", ".jsonl"):  # MSVAMP's .json files have a line of JSON per row, too
        for number, line in filter(
            lambda line: line[1].strip(), enumerate(text.split("\n"), start=1)
        ):
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
    elif suffix == ".parquet":
        yield from (
            (f"row {number}", row)
            for number, row in enumerate(parquet.read_table(path).to_pylist())
        )
    else:
        raise ValueError(
            f"unknown extension {suffix!r}; valid: .jsonl, .json, .tsv, .csv, .parquet"
        )


def _text(row: dict[str, Any], column: str, where: str) -> str | None:
    """Return a cell as NFC text without outer blanks, None where it is absent or blank."""
    value = row.get(column)
    if not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{where}: {column} must be text or a number, not a {type(value).__name__}"
        )
    return unicodedata.normalize("NFC", "" if value is None else str(value)).strip() or None


def _problem(row: dict[str, Any], number: int, where: str, language: Language) -> Problem:
    column = next((name for name in PROBLEM_COLUMNS if name in row), None)
    if not column:
        raise ValueError(
            f"{where}: needs a column {', '.join(PROBLEM_COLUMNS)}; has {', '.join(row)}"
        )
    problem = _text(row, column, where)
    if not problem:
        raise ValueError(f"{where}: empty {column}")
    column_en = "problem" if column == "problem_translated" else column
    has_english = (
        column != column_en or language.iso3 == "eng"
    )  # in a plain file all is in the problems' language
    problem_en, solution_en = (
        _text(row, name, where) if has_english else None for name in (column_en, "solution")
    )
    answer = next(filter(None, (_text(row, name, where) for name in ANSWER_COLUMNS)), None)
    return Problem(
        _text(row, "id", where) or str(number),
        problem,
        problem_en,
        solution_en,
        answer,
        language.iso3,
    )


def load_problems(path: Path, *, language: str | None = None) -> list[Problem]:
    """Return the problems of one data file: .jsonl, .json, .tsv or .csv, .parquet.

    Two layouts, told apart by their columns, in any case. COPSD's training layout: problem_translated, and problem and
    solution in English. Plain: another of PROBLEM_COLUMNS, in `language`. Both: one of ANSWER_COLUMNS; id, else the
    row's number from 0; language_short or language, by which rows in other languages are left out when `language` is
    given. Text becomes NFC. A ValueError names the file and the line or row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    wanted = find_language(language) if language else None
    by_name = {name: known for known in languages().values() for name in known.names}
    problems: dict[tuple[str, str], Problem] = {}
    others: set[str] = set()
    try:
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
                raise ValueError(
                    f"{where}: {f'unknown language {named!r}' if named else 'no language named'}"
                )
            problem = _problem(row, number, where, spoken)
            if problems.setdefault((problem.language, problem.id), problem) is not problem:
                raise ValueError(f"{where}: duplicate id {problem.id!r}")
        if not problems:
            raise ValueError(
                f"no problems{f' in {language}' if language else ''}; languages: {sorted(others)}"
            )
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    return list(problems.values())


def hub_training_file(language: str | Language) -> Path:
    """Return COPSD's training file for a language, fetched from the hub or found in its local cache.

    How the hub names its files is not known to us: taken is the parquet whose path holds one of the language's codes or
    names, in any case, between non-letters. The returned path holds the hub's commit. Without one: FileNotFoundError.
    """
    language = find_language(language) if isinstance(language, str) else language
    repo = f"yihongLiu/COPSD-{'AfriMGSM' if 'afrimgsm' in language.benchmarks else 'PolyMath'}-TrainDataset"
    names = ["".join(f"[{letter}{letter.upper()}]" for letter in name) for name in language.names]
    patterns = [f"{start}{name}[!a-zA-Z]*parquet" for name in names for start in ("", "*[!a-zA-Z]")]
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
    """Return (train, heldout); held out is every row of `count` distinct problem texts, drawn under the seed."""
    texts = list(dict.fromkeys(row.problem for row in problems))
    if not 0 <= count < len(texts):
        raise ValueError(
            f"cannot hold out {count} of {len(texts)} distinct problems; valid: 0 to {len(texts) - 1}"
        )
    held = set(random.Random(seed).sample(texts, count))
    return [row for row in problems if row.problem not in held], [
        row for row in problems if row.problem in held
    ]


def pick_order(count: int, *, seed: int, step: int, batch: int) -> list[int]:
    """Return the indices of the problems of a step, counted from 0: each of `count` problems once in every epoch.

    A pure function of its arguments, so a resumed run needs no state. An epoch may end inside a step:

    >>> [pick_order(3, seed=0, step=step, batch=2) for step in range(3)]
    [[1, 2], [0, 2], [1, 0]]
    """
    epoch, offset = divmod(step * batch, count)
    epochs = range(epoch, epoch + 1 + (offset + batch - 1) // count)
    order = [
        i for epoch in epochs for i in random.Random(f"{seed}/{epoch}").sample(range(count), count)
    ]
    return order[offset : offset + batch]
