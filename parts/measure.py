"""Measure a model: problems -> graded attempts -> parts.metrics. There is no other way to measure.

eval.py, the tables before and after training, and every checkpoint of a comparison come through
here, so that a metric cannot differ between two tables.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parts import ranks
from parts.chat import completion_text, prompt_opens_think
from parts.data import ANSWER_COLUMNS
from parts.grading import check_math_verify, grade
from parts.metrics import LEVEL_WEIGHTS, Attempt, Estimate, Graded, read_summary, summarise
from parts.model import eos_ids, valid_ids
from parts.prompts import (
    Problem,
    build_prompt,
    find_language,
    languages,
    pose_in_english,
)
from parts.recipe import DIVERGENCES, NOTELESS, Config
from parts.sampler import Rollout, SamplingParams, sample
from parts.tables import estimates_table, print_table
from parts.view import SamplingProgress, say

GREEDY_NAME = "greedy accuracy"
ENGLISH_METRICS = ("format rate", "in the problem's language", "mean tokens")  # beside it
KL_NAME = "KL to the teacher, nats/token"  # where it is kept; kl_title says which it is
DEV_METRIC = "dev/greedy_accuracy"  # decides which adapter of a run is the best
Columns = dict[str, dict[str, Estimate]]  # by language, an ISO 639-3 code, then by metric


@dataclass(frozen=True)
class Ruler:
    """How attempts are sampled to measure a model, whatever it was trained with."""

    max_new_tokens: int
    temperature: float  # of the sampled attempts; greedy ones are measured beside them
    top_p: float
    samples: int  # sampled attempts per problem
    seed: int
    thinking: str
    max_rows: int  # decoded at once

    @classmethod
    def of(cls, config: Config, *, seed: int) -> "Ruler":
        """Return the ruler that a run's settings name."""
        return cls(
            max_new_tokens=config.max_new_tokens,
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            samples=config.eval_samples,
            seed=seed,
            thinking=config.thinking,
            max_rows=config.sample_rows,
        )

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problems: list[Problem],
        *,
        greedy: bool,
        on_progress: Callable[[int, int, int], None] | None = None,
    ) -> list[Graded]:
        """Return one greedy attempt at each problem, or `samples` sampled ones, graded."""
        params = SamplingParams(
            self.max_new_tokens, 0.0 if greedy else self.temperature, self.top_p, seed=self.seed
        )
        return evaluate(
            model,
            tokenizer,
            problems,
            params,
            samples=1 if greedy else self.samples,
            thinking=self.thinking,
            max_rows=self.max_rows,
            on_progress=on_progress,
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    params: SamplingParams,
    *,
    samples: int = 1,
    thinking: str = "auto",
    first_index: int = 0,
    max_rows: int | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[Graded]:
    """Sample `samples` completions of every problem under the student's prompt and grade each.

    first_index  the first problem's place in the whole evaluation: its random stream depends on it
    Several ranks divide the problems, and each returns all of them.
    Never cuts a prompt: one that does not fit the model's context is the sampler's ValueError.
    """
    check_answers(problems)
    mine = ranks.share(len(problems))
    first_index += mine.start
    problems = problems[mine]
    think_open = prompt_opens_think(tokenizer, thinking)
    end_ids = eos_ids(model, tokenizer)
    groups = sample(
        model,
        [
            build_prompt(problem, problem.language, tokenizer, thinking=thinking)
            for problem in problems
        ],
        params,
        samples_per_prompt=samples,
        first_index=first_index,
        max_rows=max_rows,
        on_progress=on_progress,
        eos_ids=end_ids,
        valid_ids=valid_ids(tokenizer),
    )
    results = []
    for index, (problem, rollouts) in enumerate(zip(problems, groups, strict=True), first_index):
        attempts = []
        for number, rollout in enumerate(rollouts):
            text = completion_text(rollout.completion_ids, tokenizer, end_ids)
            seed = f"{params.seed}/{index}/{number}"
            attempts.append(_attempt(text, rollout, problem, seed, think_open))
        results.append(_graded(problem, rollouts[0].prompt_ids, attempts))
    return ranks.gather(results)


def _attempt(text: str, rollout: Rollout, problem: Problem, seed: str, think_open: bool) -> Attempt:
    graded = grade(text, str(problem.answer), think_open=think_open)
    return Attempt(
        completion=text,
        **asdict(graded),
        tokens=len(rollout.completion_ids),
        finish_reason=rollout.finish_reason,
        language=text_language(text),
        seed=seed,
    )


def _graded(problem: Problem, prompt_ids: list[int], attempts: list[Attempt]) -> Graded:
    prompt_hash = hashlib.sha256(repr(prompt_ids).encode()).hexdigest()[:12]
    # PolyMath's ids begin with their level.
    levels = [level for level in LEVEL_WEIGHTS if problem.id.startswith(f"{level}-")]
    return Graded(
        id=problem.id,
        language=problem.language,
        problem=problem.problem,
        gold=str(problem.answer),
        prompt_hash=prompt_hash,
        level=levels[0] if levels else None,
        attempts=attempts,
    )


def check_answers(problems: list[Problem]) -> None:
    """Raise ValueError for a problem whose gold answer is missing or cannot be graded.

    OSError: an answer needs math-verify, which does not run.
    """
    for problem in problems:
        what = f"problem {problem.id!r}: answer {problem.answer!r} cannot be graded"
        if problem.answer is None:
            raise ValueError(f"{what}: none of the columns {', '.join(ANSWER_COLUMNS)} holds one")
        try:
            grade("", problem.answer)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    check_math_verify(str(problem.answer) for problem in problems)


def text_language(text: str) -> str:
    """Return the language a text is written in, or "unknown".

    An ISO 639 code, 639-3 for the languages of languages.json. CLD2 decides, where it calls itself
    reliable: it knows all of languages.json but Ewe and Vai, and Twi as Akan. Vai is told by its
    script, and Ewe by its letters where CLD2 is not sure. Of several languages the largest part
    counts. Without CLD2 all but Vai is unknown.

    >>> text_language("Jibu ni mayai kumi na nane."), text_language("18 + 1 = 19")
    ('swa', 'unknown')
    """
    # LaTeX commands are English words. One \boxed does no harm, and without it CLD2 finds the lab's
    # answers too short.
    plain = re.sub(r"\\(?!boxed)[A-Za-z]+", " ", text)
    if len(re.findall("[\ua500-\ua63f]", plain)) > len(plain) / 3:
        return "vai"
    detect = language_detector()
    if detect is None:
        return "unknown"
    printable = "".join(c if c.isprintable() else " " for c in plain)
    reliable, _, found = detect(printable)
    if not reliable:
        return "ewe" if re.search("[ƒʋ]", plain) else "unknown"
    code = str(found[0][1]).partition("-")[0]
    if code == "ak":
        return "twi"
    known = [language.iso3 for language in languages().values() if language.iso1 == code]
    return known[0] if known else code


@cache
def language_detector() -> Any:
    """Return CLD2's function; None where it is not installed, for Linux on ARM has no build."""
    try:
        from pycld2 import detect
    except ImportError:
        return None
    return detect


def measure_languages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    ruler: Ruler,
    console: Console,
    when: str,
) -> Columns:
    """Return every metric in the problems' language and, so that forgetting shows, some in English.

    There greedy attempts are enough to see it, and they are an eighth of the work.
    """

    def _measure(posed: list[Problem], greedy: bool) -> list[Graded]:
        language = find_language(posed[0].language)
        how = "greedy" if greedy else "sampled"
        with SamplingProgress(console, f"{when}: {language.english}, {how}") as progress:
            return ruler.measure(
                model, tokenizer, posed, greedy=greedy, on_progress=progress.update
            )

    own = problems[0].language
    greedy = summarise(_measure(problems, True), [1])
    ks = sorted({1, ruler.samples})
    sampled = summarise(_measure(problems, False), ks)
    columns = {own: {GREEDY_NAME: greedy["pass@1"], **sampled}}
    english = pose_in_english([problem for problem in problems if problem.problem_en], 1.0)
    if own != "eng" and english:
        summary = summarise(_measure(english, True), [1])
        columns["eng"] = {GREEDY_NAME: summary["pass@1"]}
        columns["eng"] |= {name: summary[name] for name in ENGLISH_METRICS}
    return columns


def kl_title(config: Config) -> str:
    """Return what the KL_NAME of a run is in a table: which divergence, and from which teacher.

    A held-out problem has no note, no completion and no solution but its own. Where the teacher
    reads one of these in training, "with the solution" says what it reads here.

    >>> kl_title(Config(divergence="jsd")), kl_title(Config(teacher_reads="plan"))
    ('JSD to the teacher, nats/token', 'forward KL to the teacher with the solution, nats/token')
    """
    has_own = config.teacher_reads in NOTELESS and config.method != "ssopd"
    reads_the_same = has_own and not config.swap_solutions and not config.answer_only
    teacher = "the teacher" if reads_the_same else "the teacher with the solution"
    return f"{DIVERGENCES[config.divergence]} to {teacher}, nats/token"


def print_change(before: Columns, after: Columns, console: Console, config: Config) -> None:
    """Print a table a language, with both evaluations side by side, then a line a language."""
    titles = {KL_NAME: kl_title(config)}
    for code in before:
        both = {
            when: {titles.get(name, name): estimate for name, estimate in found[code].items()}
            for when, found in (("before", before), ("after", after))
        }
        print_table(estimates_table(find_language(code).english, both), console)
    for code in before:
        ends = [found[code][GREEDY_NAME].value for found in (before, after)]
        accuracy = "greedy accuracy {:.3f} before, {:.3f} after".format(*ends)
        say(console, f"{find_language(code).english}: {accuracy}")


def plain_columns(columns: Columns) -> dict[str, Any]:
    """Return columns as JSON takes them."""
    return {
        code: {name: asdict(estimate) for name, estimate in summary.items()}
        for code, summary in columns.items()
    }


def check_columns(stored: dict[str, Any], path: Path) -> None:
    """Raise ValueError, with the file, where stored columns are damaged."""
    try:
        columns = read_columns(stored)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lacking = [code for code, summary in columns.items() if GREEDY_NAME not in summary]
    if lacking:
        raise ValueError(f"{path} is damaged: it has no {GREEDY_NAME} in {', '.join(lacking)}")


def read_columns(stored: dict[str, Any]) -> Columns:
    """Return what plain_columns returned, read again; ValueError where it is damaged."""
    return {code: read_summary(summary) for code, summary in stored.items()}
