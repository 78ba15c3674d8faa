"""The family on one bench: four published neighbours as variants of the loops of COPSD and GRPO.

They differ in four places: what the teacher reads, how a token is weighted, which divergence, and
when the teacher's weights are renewed. Mostly these are settings. Where COPSD's loop is not enough,
a method's own code is below, and one of the two loops in copsd.py takes it as an argument.

    python copsd.py train --method opsdc     shorter solutions: the teacher was asked to be brief
    python copsd.py show --method ssopd      what its teacher reads, and what each token weighs

    method  the teacher reads              token weight            divergence        teacher
    copsd   English problem and solution   1                       forward KL, clip  fixed
    opsdc   a request to be brief          1                       reverse KL        copy of the
                                                                                     student
    ophsd   a plan by the student, answer  1                       reverse KL        fixed
    egrsd   as copsd                       GRPO's advantage times  none              fixed
                                           credit and confidence
    ssopd   a right completion             first tokens of the     forward KL, clip  fixed
                                           longest wrong one

EGRSD can also be had without rewards, which is COPSD with EGRSD's weights: --token-weight
confidence. Its control is --token-weight position. The formula of that confidence is ours
(parts/weights.py).

How sure we are of each stands in EVIDENCE (parts/experiments.py): "code", read in the authors'
code; "second-hand", from notes on the paper. None is claimed to be an exact reproduction.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from copsd import (
    Group,
    completion_logprob,
    copsd_gradient,
    roll_out_groups,
    train_copsd,
    train_grpo,
)
from parts.chat import CLOSE, OPEN
from parts.family import context_length
from parts.grading import extract_answer, is_correct, is_gradable, normalise
from parts.lora import teacher_view
from parts.machine import Stopwatch
from parts.microbatch import Limit
from parts.prompts import Problem, encode_prompt, pose_in_english, spelled_control
from parts.readings import note_request, render_witness
from parts.recipe import LABELS, Config
from parts.runs import Run
from parts.sampler import Rollout
from parts.setup import Reader, Reading, Setup, read_solutions
from parts.steplog import Metrics, Tally, count_tokens
from parts.steps import rollout_seed, write_completions
from parts.view import Watcher
from parts.weights import credit, token_weights

NOTE_SEEDS = 10**18  # further than any seed of a rollout: no stream is shared


# OPHSD, and the other teachers whose text is written during training.


def read_notes(setup: Setup, problems: list[Problem], step: int) -> Reading:
    """Return what the teacher reads where a note is written for each problem: a plan by the student
    as it is now, or an explanation of the solution by the teacher itself (reason_first).

    Where a note cannot be shown, the plain prompt, the student's own, is in its place; the log
    counts them. One that reaches --note-tokens is used as far as it goes.
    """
    config = setup.config
    requests = [note_request(config, problem, setup.tokenizer) or [] for problem in problems]
    if config.teacher_reads == "explained":
        with teacher_view(setup.lora, config.teacher):
            written = write_apart(setup, requests, step=step, limit=config.note_tokens)
    else:
        written = write_apart(setup, requests, step=step, limit=config.note_tokens)
    notes = [usable_text(setup, rollout) for (rollout,) in written]
    prompts, noted = _prompts_with_notes(setup, problems, notes)
    sampled = count_tokens([rollout for (rollout,) in written])
    return Reading(prompts, sampled, {**noted, "note/tokens_mean": sampled / len(written)})


def _prompts_with_notes(
    setup: Setup, problems: list[Problem], notes: list[str]
) -> tuple[list[list[int]], Metrics]:
    """Return what the teacher reads of each problem with its note, and the share without one.

    The plain prompt, the student's own, is in the place of one whose note is empty, spells a
    control token, or makes it too long for the context.
    """
    limit = context_length(setup.model.config) - setup.config.max_new_tokens
    prompts = []
    plain = 0
    for problem, note in zip(problems, notes, strict=True):
        is_readable = note and not spelled_control(note, setup.tokenizer)
        prompt = setup.teacher_prompt(problem, note) if is_readable else []
        if not prompt or len(prompt) > limit:
            prompt = setup.student_prompt(problem)
            plain += 1
        prompts.append(prompt)
    return prompts, {"note/plain_frac": plain / len(problems)}


def read_votes(setup: Setup, problems: list[Problem], step: int) -> Reading:
    """Return what the teacher reads where no solution is known: the answer most attempts agree on.

    The student as it is now attempts the English problem --vote-samples times. A problem without
    any answer leaves the plain prompt, the student's own, in its place, and so does an answer that
    read_notes would not show; the log counts them. It also says how many winners are right, of the
    problems whose answer is known and can be graded.
    """
    config = setup.config
    asked = [setup.student_prompt(problem) for problem in pose_in_english(problems, 1.0)]
    attempts = write_apart(
        setup, asked, step=step, limit=config.max_new_tokens, samples=config.vote_samples
    )
    texts = [[usable_text(setup, rollout) for rollout in rollouts] for rollouts in attempts]
    elected = [count_votes(of_problem) for of_problem in texts]
    right = [
        is_correct(text, str(problem.answer))
        for problem, (_, text) in zip(problems, elected, strict=True)
        if is_gradable(problem.answer)
    ]
    prompts, noted = _prompts_with_notes(setup, problems, [winner for winner, _ in elected])
    sampled = sum(count_tokens(rollouts) for rollouts in attempts)
    right_frac = sum(right) / len(right) if right else None
    return Reading(prompts, sampled, {**noted, "vote/right_frac": right_frac})


def count_votes(texts: list[str]) -> tuple[str, str]:
    r"""Return the answer that most texts agree on, and the first text that gives it: it is graded.

    Of answers with as many votes, the one that came first. Both are "" where no text has an answer.

    >>> count_votes([r"\boxed{7}", r"so \boxed{1,000}", r"\boxed{1000}"])
    ('1000', 'so \\boxed{1,000}')
    """
    votes = [voted_answer(text) for text in texts]
    ranked = Counter(vote for vote in votes if vote).most_common(1)
    if not ranked:
        return "", ""
    winner, _ = ranked[0]
    return winner, texts[votes.index(winner)]


def voted_answer(text: str) -> str | None:
    r"""Return the normal form of a text's answer, by which votes are counted; None: it has none.

    Several numbers, which are no number, are one answer as a text:

    >>> voted_answer(r"so \boxed{1,000}"), voted_answer(r"so \boxed{1, 2}"), voted_answer("so 2")
    ('1000', '1, 2', None)
    """
    answer = extract_answer(text)
    return None if answer is None else normalise(answer) or normalise(answer, as_text=True)


def write_apart(
    setup: Setup, prompts: list[list[int]], *, step: int, limit: int, samples: int = 1
) -> list[list[Rollout]]:
    """Sample from prompts other than the student's, with a random stream apart from the rollouts'.

    limit  new tokens at most
    """
    seed = NOTE_SEEDS + rollout_seed(setup.config, step)
    return write_completions(setup, prompts, seed=seed, samples=samples, limit=limit)


def usable_text(setup: Setup, rollout: Rollout) -> str:
    """Return what a model wrote as another may read it: after its thoughts, "" where it cannot be.

    A text that spells a control token cannot: it would end the turn that it stands in.
    """
    text = setup.text_of(rollout)
    if setup.opens_think or OPEN in text:
        _, closed, text = text.rpartition(CLOSE)
        text = text if closed else ""
    text = text.strip()
    return "" if spelled_control(text, setup.tokenizer) else text


# EGRSD: GRPO's advantage of a completion, spread over its tokens by what the teacher thinks.


def egrsd_credit(
    setup: Setup,
    teacher_prompts: list[list[int]],
    rollouts: list[Rollout],
    advantage_N: Tensor,
    old_logprob_N: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return each token's advantage times its credit and its weight, and what to log of each.

    teacher_prompts  before each rollout: English problem and solution, too
    advantage_N      of the completion that a token stands in
    old_logprob_N    the student's log q of the tokens when they were sampled, in nats
    Neither factor is below 0, so that no advantage changes its sign.
    """
    config = setup.config
    completions = [rollout.completion_ids for rollout in rollouts]
    with teacher_view(setup.lora, config.teacher):
        logprob_N, entropy_N = completion_logprob(setup, teacher_prompts, completions)
    stats = {"teacher_entropy_N": entropy_N}
    log_ratio_N = logprob_N - old_logprob_N
    factor_N = credit(advantage_N, log_ratio_N, mix=config.credit_mix, clip=config.credit_clip)
    weight_N = token_weights(config, stats, list(map(len, completions)))
    if weight_N is not None:
        factor_N = factor_N * weight_N
    credited_N = advantage_N * factor_N
    flipped_N = credited_N * advantage_N < 0
    return credited_N, {**stats, "credit_N": factor_N, "flipped_N": flipped_N}


# SSOPD: beside GRPO's loss, the longest wrong completion learns from the shortest right one.


class Witnessed(NamedTuple):
    """A wrong completion that learns from a right one of its group."""

    prompt: list[int]  # what the teacher reads, the right completion in it
    learner: Rollout  # the start of the wrong completion
    weight: float  # of the group
    wrong: Rollout  # the whole of it


def add_ssopd_term(
    setup: Setup, groups: list[Group], tally: Tally, watch: Stopwatch, cosine: bool, limit: Limit
) -> None:
    """Add the gradient of this rank's share of the term, and of the log.

    L = (1/M) sum over the step's M groups of w(p) times the mean divergence over the first
    --witness-tokens of the wrong completion; w is 0 for groups that are not mixed.

    groups  the step's M, of all ranks
    """
    found = [pair for group in groups if (pair := witness_pair(setup, group))]
    learners = [pair.learner for pair in found]
    prompts = [pair.prompt for pair in found]
    weight_B = torch.tensor([pair.weight for pair in found]) / len(groups)
    part = copsd_gradient(setup, learners, prompts, watch, cosine, limit, weight_B)
    tally.join(part, "witness_")
    tally.note("witness/skipped_group_frac", len(groups) - len(found), len(groups))
    for row, tokens in part.rows:
        through_student = len(learners[row].prompt_ids) + tokens
        tally.updated += through_student
        tally.scored += through_student + len(prompts[row]) + tokens


def witness_pair(setup: Setup, group: Group) -> Witnessed | None:
    """Return the longest wrong completion of a group with the shortest right one as its witness.

    None where the group has no right or no wrong completion, or where the right one cannot be
    read: it is empty without its thoughts, spells a control token, or does not fit the context.
    """
    config = setup.config
    judged = list(zip(group.rollouts, group.rewards, strict=True))
    right = [rollout for rollout, reward in judged if reward]
    wrong = [rollout for rollout, reward in judged if not reward]
    if not right or not wrong:
        return None
    witness = usable_text(setup, min(right, key=_tokens))
    longest = max(wrong, key=_tokens)
    start = longest.cut(config.witness_tokens)
    text = render_witness(config, group.problem, setup.tokenizer, witness)
    prompt = encode_prompt(text, setup.tokenizer)
    fits = len(prompt) + len(start.completion_ids) <= context_length(setup.model.config)
    weight = group_weight(len(right) / len(judged), config.witness_weight)
    return Witnessed(prompt, start, weight, longest) if witness and fits else None


def _tokens(rollout: Rollout) -> int:
    return len(rollout.completion_ids)


def group_weight(pass_rate: float, most: float) -> float:
    """Return w(p) = most * 4 p (1 - p): 0 where all completions or none are right.

    >>> [group_weight(pass_rate, 0.5) for pass_rate in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.375, 0.5, 0.0]
    """
    return most * 4 * pass_rate * (1 - pass_rate)


# The loop of each method, which takes a setup, a run and a view.


def reader(config: Config) -> Reader:
    """Return what finds the teacher's prompts of a step under these settings."""
    readers = {"plan": read_notes, "explained": read_notes, "voted": read_votes}
    return readers.get(config.teacher_reads, read_solutions)


def distil(setup: Setup, run: Run, view: Watcher) -> bool:
    """Train with COPSD's loop and the teacher that the settings name."""
    return train_copsd(setup, run, view, reader(setup.config))


def example_prompts(setup: Setup, problems: list[Problem]) -> list[list[int] | None]:
    """Return what the method's teacher would read of some problems now; None: nothing."""
    config = setup.config
    if config.method == "grpo" or config.completion in LABELS:
        return [None] * len(problems)
    if config.method == "ssopd":
        groups = roll_out_groups(setup, problems, seed=config.seed)
        pairs = [witness_pair(setup, group) for group in groups]
        return [pair.prompt if pair else None for pair in pairs]
    return [*reader(config)(setup, problems, 0).prompts]


LOOPS: dict[str, Callable[[Setup, Run, Watcher], bool]] = {
    "copsd": distil,
    "grpo": train_grpo,
    "opsdc": distil,
    "ophsd": distil,
    "egrsd": partial(train_grpo, credit=egrsd_credit),
    "ssopd": partial(train_grpo, add_term=add_ssopd_term),
}
