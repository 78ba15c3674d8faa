"""What the student reads and what the teacher reads: the paper's idea, in one file.

Both are the same model. The student reads a problem in the target language. The teacher also reads
its English translation and an English solution, each under a label. The two prompts end alike, so
that the same completion can follow either:

    student   [ problem            | instruction ]                                        opening
    teacher   [ problem | English problem | English solution | transition | instruction ] opening

The brackets are one user turn in the model's own chat template, the opening is the assistant's
first sentence. The wordings in languages.json are ours, unreviewed by speakers; Vai's are in
English, and give the language's name in Vai's script.
"""

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parts.chat import THINKING as THINKING  # stay importable from here
from parts.chat import open_turn
from parts.chat import prompt_opens_think as prompt_opens_think
from parts.files import read_object

# transformers takes seconds to load, and `copsd.py languages` needs this file but not that one.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ROLES = ("student", "teacher")
# What the fields of a problem are called in errors. In a data file the English ones are the columns
# `problem` and `solution`, beside problem_translated (parts/data.py).
CALLED = {
    "problem": "problem",
    "problem_en": "English problem",
    "solution_en": "English solution",
}
# Other codes of ISO 639 by which data sets tag these languages: swh and gaz are FLORES-200's, cmn
# is Mandarin, and the last three are the second codes of ISO 639-2.
SAME_LANGUAGE = {
    "swh": "swa",
    "gaz": "orm",
    "cmn": "zho",
    "chi": "zho",
    "ger": "deu",
    "fre": "fra",
}


@dataclass(frozen=True)
class Language:
    """A language and the short wordings, in that language, that its prompts are made of."""

    iso3: str  # ISO 639-3, the code used everywhere inside the project
    iso1: str | None  # ISO 639-1, None where the language has none
    english: str  # its name in English
    own: str  # its name in itself
    script: str
    training_sets: tuple[str, ...]  # COPSD's that have it: "afrimgsm", "polymath"
    problem_label: str
    english_problem_label: str
    english_solution_label: str
    solution_begin: str
    solution_end: str
    transition: str  # understand the solution, do not copy it, solve the problem yourself
    instruction: str  # reason step by step, put the final answer in \boxed{}
    opening: str  # the assistant's first sentence, which announces thinking in this language
    # What the family's other teachers read; see parts/readings.py.
    brief: str  # be brief
    brief_by_difficulty: str  # be very brief where the problem is easy, longer where it is hard
    plan_request: str  # write a plan from the solution, without calculation and answer
    plan_label: str
    answer_label: str  # the answer, to check only
    witness_label: str  # a right solution of this problem

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
    return read_languages(Path(__file__).with_name("languages.json"))


def read_languages(path: Path) -> dict[str, Language]:
    """Return the languages of a file; ValueError, with the language, where one is not whole."""
    found = {}
    for iso3, record in read_object(path).items():
        try:
            sets = (*record["training_sets"],)
            language = Language(iso3=iso3, **{**record, "training_sets": sets})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {iso3} is no language: {error}") from error
        texts = {**asdict(language), "iso1": language.iso1 or "none"}
        del texts["training_sets"]
        wanted = [*texts.values(), *language.training_sets]
        is_list = isinstance(record["training_sets"], list)
        if not is_list or not all(isinstance(text, str) for text in wanted):
            raise ValueError(f"{path}: {iso3} has something else where a text is to be")
        found[iso3] = language
    return found


def find_language(code: str) -> Language:
    """Return the language of an ISO 639-1 or 639-3 code in any case, or raise ValueError.

    A country or a script after the code is ignored: sw-KE, swh_Latn.
    """
    first = re.split("[-_]", code.lower(), maxsplit=1)[0]
    first = SAME_LANGUAGE.get(first, first)
    for language in languages().values():
        if first in (language.iso3, language.iso1):
            return language
    valid = ", ".join(
        f"{known.iso3} ({known.iso1})" if known.iso1 else known.iso3
        for known in languages().values()
    )
    raise ValueError(f"unknown language {code!r}; valid codes: {valid}")


@cache
def named_language(name: str) -> Language | None:
    """Return the language that a data file means by a name, a code or a tag; None: unknown.

    >>> [named_language(name).iso3 for name in ("Kiswahili", "sw", "sw-KE", "swh_Latn")]
    ['swa', 'swa', 'swa', 'swa']
    """
    for language in languages().values():
        if name.lower() in language.names:
            return language
    try:
        return find_language(name)
    except ValueError:
        return None


def pose_in_english(problems: list[Problem], share: float, *, step: int = 1) -> list[Problem]:
    """Return the problems with the first `share` of them posed in English.

    step  from 1. Where the share is no whole number of a step's problems, what rounding leaves over
          is carried to the steps after it, so that the share holds over a run
    A problem that has no English side stays as it is.
    """
    before, after = (round(share * len(problems) * past) for past in (step - 1, step))
    count = after - before
    english = [
        replace(problem, problem=problem.problem_en, language="eng")
        if problem.problem_en
        else problem
        for problem in problems[:count]
    ]
    return english + problems[count:]


def is_teachable(problem: Problem, *, english_problem: bool, english_solution: bool) -> bool:
    """Say whether the problem has all that the teacher's prompt is to show of it."""
    return not _missing_fields(problem, _shown_fields(english_problem, english_solution))


def render_prompt(
    problem: Problem,
    language: str | Language,
    tokenizer: "Tokenizer",
    *,
    role: str = "student",
    thinking: str = "auto",
    english_problem: bool = True,
    english_solution: bool = True,
) -> str:
    r"""Return the prompt's text: the user's turn and the opened turn of the assistant.

    role      "student" or "teacher". english_problem=False and english_solution=False leave that
              block out of the teacher's prompt; the transition stays (for ablations)
    thinking  a think block is where a reasoning model writes before it answers. "auto" opens one
              where the model would unasked, "on" insists on it, "off" keeps it closed
    Adds no system turn and never truncates. Raises ValueError for an unknown value; without a chat
    template, or for one that fails or loses the problem; for a problem that lacks a field to be
    shown or holds a control token. Both roles end in the same text:

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({}))
    >>> template = "user: {{ messages[0].content }} assistant: "
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template)
    >>> problem = Problem("7", "Nawa ne 2 + 3?", "What is 2 + 3?", "2 + 3 = 5", "5", "hau")
    >>> {render_prompt(problem, "hau", tokenizer, role=role)[-56:] for role in ROLES}
    {'ed{}. assistant: Zan yi tunani da Hausa, mataki-mataki.\n'}
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; valid: {', '.join(ROLES)}")
    if isinstance(language, str):
        language = find_language(language)
    if role == "student":
        shown = []
        user_turn = _student_turn(problem, language)
    else:
        shown = _shown_fields(english_problem, english_solution)
        user_turn = _teacher_turn(problem, language, shown)
    text = render_turn(user_turn, problem, tokenizer, thinking, shown)
    return f"{text}{language.opening}\n"


def render_turn(
    user_turn: str, problem: Problem, tokenizer: "Tokenizer", thinking: str, shown: list[str]
) -> str:
    """Return the text of a user's turn about a problem, up to where the assistant writes.

    shown  the fields that stand in the turn beside the problem, for the error's message
    Raises ValueError as render_prompt does.
    """
    text = open_turn(user_turn, tokenizer, thinking)
    _refuse_lost_text(text, user_turn, problem, shown)
    _refuse_control_text(problem, tokenizer)
    return text


def build_prompt(
    problem: Problem, language: str | Language, tokenizer: "Tokenizer", **options: Any
) -> list[int]:
    """Return render_prompt's text, with its options, as token ids.

    Every student's prompt, in training and in evaluation, is built here. The text is tokenised once
    and never decoded again, for decoding and tokenising again can give other ids.
    """
    text = render_prompt(problem, language, tokenizer, **options)
    return encode_prompt(text, tokenizer)


def encode_prompt(text: str, tokenizer: "Tokenizer") -> list[int]:
    """Return a rendered prompt's ids; the template has written the special tokens already."""
    return tokenizer.encode(text, add_special_tokens=False)


def template_hash(tokenizer: "Tokenizer", language: str | Language, thinking: str = "auto") -> str:
    """Return 12 hex digits that change with the prompt of COPSD's student or teacher.

    That is with the chat template, the wordings, the thinking mode, and a date that a template
    writes. What other teachers read is in parts.readings.wordings.
    """
    placeholder = Problem("placeholder", "PROBLEM", "ENGLISH PROBLEM", "SOLUTION", None, "eng")
    texts = [
        render_prompt(placeholder, language, tokenizer, role=role, thinking=thinking)
        for role in ROLES
    ]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _student_turn(problem: Problem, language: Language) -> str:
    return f"{problem.problem}\n\n{language.instruction}"


def _teacher_turn(problem: Problem, language: Language, shown: list[str]) -> str:
    """Return the teacher's user turn with the English fields `shown`, or raise ValueError."""
    missing = _missing_fields(problem, shown)
    if missing:
        called = " and no ".join(CALLED[field] for field in missing)
        columns = ", ".join(CALLED[field].removeprefix("English ") for field in missing)
        raise ValueError(
            f"problem {problem.id!r} has no {called}, which the teacher's prompt shows; a "
            f"data file has it in these columns, beside problem_translated: {columns}"
        )
    blocks = [f"{language.problem_label}\n{problem.problem}"]
    if "problem_en" in shown:
        blocks.append(f"{language.english_problem_label}\n{problem.problem_en}")
    if "solution_en" in shown:
        # The marks say where the solution ends, for it may hold blank lines and labels of its own.
        solution = f"{language.solution_begin}\n{problem.solution_en}\n{language.solution_end}"
        blocks.append(f"{language.english_solution_label}\n{solution}")
    return "\n\n".join([*blocks, language.transition, language.instruction])


def _shown_fields(english_problem: bool, english_solution: bool) -> list[str]:
    shown = {"problem_en": english_problem, "solution_en": english_solution}
    return [field for field, is_shown in shown.items() if is_shown]


def _missing_fields(problem: Problem, shown: list[str]) -> list[str]:
    return [field for field in shown if not getattr(problem, field)]


def _refuse_lost_text(text: str, user_turn: str, problem: Problem, shown: list[str]) -> None:
    """Raise ValueError where the chat template dropped or changed a part of the user's turn.

    Blanks and line ends do not count, which some templates strip.
    """

    def _is_there(part: str) -> bool:
        return " ".join(part.split()) in " ".join(text.split())

    if not _is_there(user_turn):
        fields = ("problem", *shown)
        lost = [f"the {CALLED[name]}" for name in fields if not _is_there(getattr(problem, name))]
        raise ValueError(
            f"the chat template drops or changes {' and '.join(lost) or 'the wording'} "
            f"in the prompt of problem {problem.id!r}"
        )


def spelled_control(text: str, tokenizer: "Tokenizer") -> str | None:
    """Return a control token that the text spells, and that would act as one; None: it has none."""
    template = tokenizer.get_chat_template()
    for token in tokenizer.added_tokens_decoder.values():
        # DeepSeek-R1 does not mark its turn tokens special; Gemma adds runs of blanks that are
        # ordinary text.
        is_control = token.content.strip() and (token.special or token.content in template)
        if is_control and token.content in text:
            return token.content
    return None


def _refuse_control_text(problem: Problem, tokenizer: "Tokenizer") -> None:
    """Raise ValueError where a problem spells a control token."""
    fields = (problem.problem, problem.problem_en, problem.solution_en, problem.answer)
    token = spelled_control("\n".join(str(field) for field in fields if field), tokenizer)
    if token:
        raise ValueError(f"problem {problem.id!r} spells the control token {token!r}; drop it")
