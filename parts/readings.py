"""What the teachers of the family read; COPSD's own, the English solution, is in parts/prompts.py.

A reading is a user's turn about a problem. It ends as the student's does, in the instruction and
the opening, so that the same completion can follow either:

    solution   [ problem | English problem | English solution | transition | instruction ]
    brief      [ problem | a request to be brief | instruction ]             nothing privileged
    plan       [ problem | plan | answer, to check only | instruction ]
    explained  [ as solution, and an explanation of it before the transition ]
    voted      [ as solution, with the answer that most attempts agree on in its place ]
    witness    [ problem | a right solution of the student's own | transition | instruction ]

The second text of plan, explained, voted and witness is a note: a model writes it during training.
How is in methods.py. The wordings are ours and unreviewed by speakers; those of explanations are
English in every language, since the solution that they explain is.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from parts.prompts import (
    Problem,
    encode_prompt,
    find_language,
    is_teachable,
    render_prompt,
    render_turn,
)
from parts.recipe import LABELS, Config

# transformers takes seconds to load, and only the name is needed here.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

EXPLAIN_REQUEST = (
    "Explain the solution above to yourself: why each step is right, and why it is taken. "
    "Do not solve the problem anew."
)
EXPLANATION = "{solution}\n\nWhy it is right:\n{note}"  # takes the solution's place
NEEDED = {  # of the readings that need other things than the one with the solution
    "plan": "an English solution and an answer",
    "explained": "an English solution, and the English problem unless that is not shown",
    "voted": "an English problem",
}
VOTED = "No solution is known. Most attempts give the answer {note}."


def wordings(language: str) -> list[object]:
    """Return all that a teacher reads whose reading is not COPSD's, beside the problem.

    That is the wordings of this language, those of English, and ours of this file.
    """
    return [
        *(find_language(code) for code in (language, "eng")),
        *(EXPLAIN_REQUEST, EXPLANATION, VOTED),
    ]


def can_read(config: Config, problem: Problem) -> bool:
    """Say whether the problem has all that training with these settings takes from it."""
    if config.completion in LABELS and not problem.solution_en:
        return False
    reads = config.teacher_reads
    if reads == "brief":
        return True
    if reads == "plan":
        return bool(problem.solution_en and problem.answer)
    if reads == "voted":
        return bool(problem.problem_en)
    shown = config.english_solution or reads == "explained"
    return is_teachable(problem, english_problem=config.english_problem, english_solution=shown)


def render_reading(
    config: Config, problem: Problem, tokenizer: "Tokenizer", note: str | None = None
) -> str:
    """Return the text of the teacher's prompt under these settings.

    note  the plan, the explanation or the voted answer. Without one, whatever --teacher-reads says,
          it is the prompt with the solution: no reading but "brief" is complete without its note
    Raises ValueError as parts.prompts.render_prompt does.
    """
    language = find_language(problem.language)
    if config.teacher_reads == "brief":
        turn = _brief_turn(config, problem)
    elif config.teacher_reads == "plan" and note is not None:
        answer = f"{language.answer_label}\n{problem.answer}"
        blocks = [f"{language.problem_label}\n{problem.problem}", f"{language.plan_label}\n{note}"]
        turn = "\n\n".join([*blocks, answer, language.instruction])
    else:
        return render_prompt(
            _with_note(config, problem, note),
            language,
            tokenizer,
            role="teacher",
            thinking=config.thinking,
            english_problem=config.english_problem,
            english_solution=config.english_solution or note is not None,
        )
    return f"{render_turn(turn, problem, tokenizer, config.thinking, [])}{language.opening}\n"


def reading(
    config: Config, problem: Problem, tokenizer: "Tokenizer", note: str | None = None
) -> list[int]:
    """Return render_reading's text as ids: what the teacher reads before the student's tokens."""
    return encode_prompt(render_reading(config, problem, tokenizer, note), tokenizer)


def render_witness(config: Config, problem: Problem, tokenizer: "Tokenizer", witness: str) -> str:
    """Return what SSOPD's teacher reads: the problem, and a right completion of the student's."""
    language = find_language(problem.language)
    shown = f"{language.solution_begin}\n{witness}\n{language.solution_end}"
    blocks = [
        f"{language.problem_label}\n{problem.problem}",
        f"{language.witness_label}\n{shown}",
        language.transition,
        language.instruction,
    ]
    text = render_turn("\n\n".join(blocks), problem, tokenizer, config.thinking, [])
    return f"{text}{language.opening}\n"


def note_request(config: Config, problem: Problem, tokenizer: "Tokenizer") -> list[int] | None:
    """Return the prompt that asks for the note, as ids; None where no single note is asked for.

    A plan is asked for with the problem and its English solution, an explanation also with the
    English problem, unless that is not to be shown. No opening follows, for the answer is not one
    to the problem.
    """
    language = find_language(problem.language)
    solution = f"{language.solution_begin}\n{problem.solution_en}\n{language.solution_end}"
    solution = f"{language.english_solution_label}\n{solution}"
    blocks = [f"{language.problem_label}\n{problem.problem}"]
    if config.teacher_reads == "plan":
        blocks += [solution, language.plan_request]
    elif config.teacher_reads == "explained":
        if config.english_problem:
            blocks.append(f"{language.english_problem_label}\n{problem.problem_en}")
        blocks += [solution, EXPLAIN_REQUEST]
    else:
        return None
    shown = ["solution_en"]
    text = render_turn("\n\n".join(blocks), problem, tokenizer, config.thinking, shown)
    return encode_prompt(text, tokenizer)


def longest_readings(config: Config, problem: Problem, tokenizer: "Tokenizer") -> list[int]:
    """Return the most tokens of each prompt that the teacher may have to read of a problem.

    A note is not written yet, so its length limit stands in its place. The prompt that asks for it
    is among them, with room for the note in place of a completion. Raises ValueError for a problem
    that lacks what the teacher is to read, or the student to learn as a label.
    """
    if config.completion in LABELS and not problem.solution_en:
        raise ValueError(
            f"problem {problem.id!r} lacks what --completion {config.completion} needs: "
            "an English solution"
        )
    if config.teacher_reads in NEEDED and not can_read(config, problem):
        needed = NEEDED[config.teacher_reads]
        raise ValueError(
            f"problem {problem.id!r} lacks what --teacher-reads {config.teacher_reads} needs: "
            f"{needed}"
        )
    if config.teacher_reads == "voted":
        return [len(reading(config, problem, tokenizer, note="0" * 16))]
    request = note_request(config, problem, tokenizer)
    if request is None:
        return [len(reading(config, problem, tokenizer))]
    with_note = len(reading(config, problem, tokenizer, note=".")) + config.note_tokens
    return [with_note, len(request) + max(0, config.note_tokens - config.max_new_tokens)]


def _brief_turn(config: Config, problem: Problem) -> str:
    own = find_language(problem.language)
    asking = find_language("eng") if config.brief_language == "english" else own
    request = asking.brief if config.brief == "uniform" else asking.brief_by_difficulty
    return f"{problem.problem}\n\n{request}\n\n{own.instruction}"


def _with_note(config: Config, problem: Problem, note: str | None) -> Problem:
    """Return the problem with the note in its solution, as the reading has it."""
    if note is None:
        return problem
    if config.teacher_reads == "voted":
        return replace(problem, solution_en=VOTED.format(note=note))
    return replace(problem, solution_en=EXPLANATION.format(solution=problem.solution_en, note=note))
