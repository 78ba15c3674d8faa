r"""Completions that the student did not write: controls that ask where COPSD's gain comes from.

COPSD learns on what the student writes, from a teacher that has read the solution. Were all of that
needed, each of these would gain less (`python compare.py --attribute`):

    teacher    the teacher writes, and the student learns the teacher's distribution on its words:
               distillation off policy
    reference  the English solution, learned as hard labels: supervised fine-tuning
    garbage    the solution's words in disorder and a box with the right answer, as hard labels:
               what the format alone is worth

All stand behind the student's prompt, as a rollout of the student would. Ours; none is published.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from parts.chat import turn_end_ids
from parts.lora import teacher_view
from parts.prompts import Problem
from parts.sampler import Rollout
from parts.setup import Setup
from parts.steps import write_completions

Scorer = Callable[[Setup, list[list[int]], list[list[int]]], tuple[Tensor, Tensor]]


def teacher_writes(setup: Setup, problems: list[Problem], *, seed: int) -> list[Rollout]:
    """Sample a completion of each problem from the teacher, y ~ p(. | x, x_en, s_en).

    The rollouts have the student's prompt, for the student learns them there; their log-probs are
    the teacher's.
    """
    prompts = [setup.teacher_prompt(problem) for problem in problems]
    with teacher_view(setup.lora, setup.config.teacher):
        written = write_completions(setup, prompts, seed=seed)
    return [
        replace(rollout, prompt_ids=setup.student_prompt(problem))
        for problem, (rollout,) in zip(problems, written, strict=True)
    ]


def reference_label(setup: Setup, problems: list[Problem], *, seed: int) -> list[Rollout]:
    """Return the English solution of each problem as its completion; `seed` changes nothing."""
    return [_label(setup, problem, solution_of(problem)) for problem in problems]


def garbage_label(setup: Setup, problems: list[Problem], *, seed: int) -> list[Rollout]:
    """Return the words of each problem's solution in disorder, and a box with its answer.

    Words that --max-new-tokens leaves no room for are left out, for without its box it is no label.
    With --swap-solutions the words are another problem's, and the numbers among them say nothing.
    """
    return [
        _label(setup, problem, garbage_text(problem, seed), ending=" " + right_box(problem))
        for problem in problems
    ]


def garbage_text(problem: Problem, seed: int) -> str:
    r"""Return the text of `garbage_label`; the solution's own box is left out.

    >>> garbage_text(Problem("7", "?", "?", r"We get 3 + 4 = \boxed{7}.", "41", "hau"), seed=0)
    'We = + 3 get 4 \\boxed{41}'
    """
    words = [word for word in solution_of(problem).split() if "boxed" not in word]
    random.Random(f"{seed}/{problem.id}").shuffle(words)
    return " ".join([*words, right_box(problem)])


def right_box(problem: Problem) -> str:
    """Return a box with the problem's answer."""
    return f"\\boxed{{{problem.answer}}}"


def solution_of(problem: Problem) -> str:
    """Return the English solution; ValueError where there is none, which no label can do without.

    A run with labels asks its problems for one before it starts (parts/readings.py).
    """
    if not problem.solution_en:
        raise ValueError(f"problem {problem.id!r} has no English solution to be learned as a label")
    return problem.solution_en


def hard_label_loss(
    logprob_of: Scorer,
    setup: Setup,
    teacher_prompts: list[list[int]],
    rollouts: list[Rollout],
    *,
    cosine: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -log q of every completion token, loss_N in nats, and what to log of each, by name.

    logprob_of       copsd.completion_logprob, which stands above this file
    teacher_prompts  are not read: a label has no teacher but itself
    cosine           is not measured: nothing is clipped
    It is the forward KL from a teacher that is sure of the label, so it is logged as the KL.
    """
    completions = [rollout.completion_ids for rollout in rollouts]
    prompts = [rollout.prompt_ids for rollout in rollouts]
    logprob_N, entropy_N = logprob_of(setup, prompts, completions)
    return -logprob_N, {"kl_N": -logprob_N.detach(), "student_entropy_N": entropy_N.detach()}


def _label(setup: Setup, problem: Problem, text: str, ending: str = "") -> Rollout:
    """Return a text and the end of the turn as a completion under the student's prompt.

    It is cut at --max-new-tokens, as a completion of the student is; with an `ending` of the text,
    which has to stay, before that. Nothing sampled it: its log-probs are nan.
    """
    tokenizer = setup.tokenizer
    end = min(turn_end_ids(tokenizer) or setup.end_ids)
    ids = [*tokenizer.encode(text, add_special_tokens=False), end]
    limit = setup.config.max_new_tokens
    if ending and len(ids) > limit:
        kept = [*tokenizer.encode(ending, add_special_tokens=False), end]
        ids = [*ids[: max(limit - len(kept), 0)], *kept]
    return Rollout(
        prompt_ids=setup.student_prompt(problem),
        completion_ids=ids[:limit],
        logprobs=[float("nan")] * min(limit, len(ids)),
        finish_reason="stop" if len(ids) <= limit else "length",
    )
