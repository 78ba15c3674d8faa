"""COPSD, crosslingual on-policy self-distillation (arXiv 2605.09548), in one process.

One model plays two roles. The student q reads a problem x in the target language and writes a
completion y. The teacher p is the same model that also reads the English translation x_en and an
English solution s_en. Training pulls the student towards the teacher on the student's own words:

    y ~ q(. | x)
    Eq. (1)  L = (1/N) sum_t D( p(. | x, x_en, s_en, y_<t) || q(. | x, y_<t) )

over the N completion tokens of a step. Both are taken at --temperature. --top-p and --top-k narrow
only what y is drawn from. GRPO, the baseline, has no teacher. It samples G completions of each
problem and learns from which of them are right:

    Eq. (4)  A_i = (r_i - mean r) / (std r + eps)        r_i = 1 where the grader says right, else 0
    Eq. (5)  L = (1/N) sum_t [ -min(ratio_t A_i, clamp(ratio_t) A_i) + coef KL_t ]

where i is the completion that token t stands in; ratio_t = q / q_old is how much more likely the
token has become since it was sampled; clamp holds it to [1 - low, 1 + high]; and KL_t, to the
initial model, is estimated by Schulman's k3.

    python copsd.py train                  COPSD on the embedded lab model
    python copsd.py train --method grpo    the baseline, with the same sampler, prompts and grader

Read from top to bottom. The rest is in parts/README.md, the neighbours of COPSD in methods.py.

A tensor's name ends in its axes: B rows, T positions, N the completion tokens of all rows, D hidden
size, V vocabulary, G completions of a group, C the tokens of one completion. p is the teacher's
distribution, q the student's. README.md lists the departures from the paper.
"""

if __name__ == "__main__":
    # Read before torch is loaded: `--help` answers at once. A command then imports this file.
    from parts import heap, stops

    heap.restart_with_joined_holes()
    stops.say_stops()
    from parts import commands

    commands.copsd()

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from kernels import chunked_divergence, chunked_logprob, clip_products, reduce_loss
from parts import controls, measure, program, ranks, runs, steplog, steps
from parts.copies import scoring_copies
from parts.grading import is_correct
from parts.lora import teacher_view
from parts.machine import Stopwatch
from parts.metrics import Ratio, bootstrap
from parts.microbatch import Limit, halve_until_it_fits, micro_batches
from parts.model import final_hidden, head_weight
from parts.narrow import narrow_loss
from parts.packing import packed_hidden, packing_pays
from parts.prompts import Problem, find_language
from parts.recipe import LABELS, divergence_options
from parts.sampler import Rollout
from parts.setup import Reader, Setup, evaluation_command, read_solutions
from parts.steplog import Tally, count_tokens
from parts.steps import count_skipped, loss_reduction, rows_in_the_loss, share_done, take_step
from parts.view import Watcher, say
from parts.watch import Watching, write_best
from parts.weights import token_weights

# COPSD: the roll-out, the loss, the loop.


def roll_out(setup: Setup, problems: list[Problem], *, seed: int) -> list[Rollout]:
    """Return a completion of each problem, y ~ q(. | x), from the student as it is now."""
    prompts = [setup.student_prompt(problem) for problem in problems]
    return [rollout for (rollout,) in steps.write_completions(setup, prompts, seed=seed)]


def completion_hidden(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
) -> Tensor:
    """Return hidden_ND, the states that predict each completion token, row after row.

    EOS, the token that ends a completion, is among the N. Prompt and completion are contiguous and
    pads come after both, so no row sees a pad. The state at t-1 predicts token t:

        ids      p0 p1 p2 c0 c1 pad       completion c0 c1
        hidden          ^  ^              is predicted from p2 and c0
    """
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    scored_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids_BT[index, : len(row)] = torch.tensor(row)
        scored_BT[index, len(prompt) - 1 : len(row) - 1] = True
    return final_hidden(model, ids_BT.to(model.device))[scored_BT.to(model.device)]


def copsd_loss(
    setup: Setup, teacher_prompts: list[list[int]], rollouts: list[Rollout], *, cosine: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Eq. (1)'s summand at every completion token, loss_N in nats, and what to log of each.

    teacher_prompts  the teacher's prompt for each rollout: both roles score the same completions
    The gradient goes to the student only. Logged are the unclipped divergence, both entropies and
    whether the clip made Eq. (1) smaller at a token; with `cosine`, how far it turns the gradient.
    """
    config = setup.config
    completions = [rollout.completion_ids for rollout in rollouts]
    # The teacher is the same model, by default with its adapter off, as it was before training.
    # What it makes of a prompt then never changes: on a CPU it is kept for the next epoch. Its pass
    # goes first, as it needs a copy of the weights, which is gone before activations need the room.
    hidden = setup.kept_prompts.completion_hidden if setup.keeps_prompts else completion_hidden
    with teacher_view(setup.lora, config.teacher), scoring_copies(setup.model):
        teacher_ND = hidden(setup.model, teacher_prompts, completions)
    student_ND = completion_hidden(setup.model, [r.prompt_ids for r in rollouts], completions)
    head_VD = head_weight(setup.model)
    options = divergence_options(config)
    # Where the loss is over fewer entries, this divergence is only logged and needs no gradient.
    is_whole = config.loss_over == "vocabulary"
    seen_ND = student_ND if is_whole else student_ND.detach()
    states = (seen_ND, teacher_ND, head_VD)
    loss_N, stats = chunked_divergence(*states, **options, compile=config.compile)  # Eq. (1), D
    if cosine:
        products_3N = clip_products(*states, **options)
        stats |= dict(zip(steplog.CLIP_PRODUCTS, products_3N, strict=True))
    if is_whole:
        stats["clipped_N"] = loss_N.detach() < stats["kl_N"]
    else:  # not Eq. (1): over fewer entries
        ids_N = torch.tensor([token for ids in completions for token in ids]).to(loss_N.device)
        loss_N = narrow_loss(config, student_ND, teacher_ND, head_VD, ids_N)
    return loss_N, stats


def copsd_gradient(
    setup: Setup,
    rollouts: list[Rollout],
    teacher_prompts: list[list[int]],
    watch: Stopwatch,
    cosine: bool,
    limit: Limit,
    weight_B: Tensor | None = None,
) -> Tally:
    """Add this rank's share of the gradient of Eq. (1) over a step; return its share of the log.

    A step does not fit in memory at once: each micro-batch adds its share of the step's one mean.
    weight_B  what each completion's mean D counts in the sum that L then is; None: L is Eq. (1)
    """
    config = setup.config
    _, loss_of = SOURCES[config.completion]
    tally = Tally()
    mine = list(range(len(rollouts)))[ranks.share(len(rollouts))]
    for rows in micro_batches(rollouts, limit, mine, teacher_prompts):
        micro = [rollouts[row] for row in rows]
        lengths = [len(rollout.completion_ids) for rollout in micro]
        loss_N, stats = loss_of(setup, [teacher_prompts[row] for row in rows], micro, cosine=cosine)
        weight_N = token_weights(config, stats, lengths)
        if weight_B is not None:
            weight_N = weight_B[rows].repeat_interleave(torch.tensor(lengths))
        loss = reduce_loss(  # Eq. (1), 1/N
            loss_N,
            lengths,
            reduction=config.reduction if weight_B is None else "trajectory",
            step_tokens=count_tokens(rollouts),
            step_rows=len(rollouts) if weight_B is None else 1,
            weight_N=weight_N,
        )
        watch.lap("score")
        setup.loss_scale.backward(loss)
        watch.lap("update")
        tally.add(loss, stats, rows, lengths)
    return tally


def train_copsd(setup: Setup, run: runs.Run, view: Watcher, read: Reader = read_solutions) -> bool:
    """Train from the last saved step to the end; return False if it was ended early.

    read  what the teacher reads of a step's problems; methods.py has other teachers
    """
    config = setup.config
    write, _ = SOURCES[config.completion]
    optimizer, step, sampled_tokens, skipped = steps.begin(setup, run)
    limit = Limit.of(config)
    with runs.stop_signals() as stopped:
        while (done := share_done(config, step, sampled_tokens)) < 1:
            step += 1
            watch = Stopwatch(str(setup.model.device))

            # Problems of this step, and one completion of each from the current student.
            problems = steps.draw_problems(setup, config.batch_size, step=step)
            rollouts = write(setup, problems, seed=steps.rollout_seed(config, step))
            step_tokens = count_tokens(rollouts)
            reading = ranks.decide(read(setup, problems, step))
            sampled_tokens += step_tokens + reading.sampled_tokens
            watch.lap("rollout")

            # The loss and its gradient; where memory runs out, again in smaller micro-batches.
            cosine = steplog.asks_for_cosine(config, step)
            attempt = partial(copsd_gradient, setup, rollouts, reading.prompts, watch, cosine)
            own = len(rollouts[ranks.share(len(rollouts))])
            tally, limit = halve_until_it_fits(attempt, limit, optimizer.zero_grad, own)
            tally = steplog.merge(ranks.gather([tally]))

            # The update. The learning rate falls linearly to 0. A --teacher that moves is renewed.
            lr = config.lr * (1 - done)
            grad_norm = take_step(optimizer, setup=setup, lr=lr)
            skipped = count_skipped(skipped, grad_norm, step, setup.loss_scale)
            setup.lora.update_teacher(step, decay=config.ema_decay, every=config.teacher_every)
            watch.lap("update")

            # Log and save.
            student_tokens = count_tokens(rollouts, prompts=True)
            teacher_tokens = step_tokens + sum(map(len, reading.prompts))
            if config.completion in LABELS:
                teacher_tokens = 0  # no teacher reads a label
            metrics = {
                "step": step,
                "progress": share_done(config, step, sampled_tokens),
                "sampled_tokens": sampled_tokens,
                **steplog.copsd_metrics(tally),
                **reading.metrics,
                **steplog.update_metrics(grad_norm, lr, skipped, setup.loss_scale),
                **steplog.work_metrics(
                    rollouts,
                    watch,
                    sampled=step_tokens + reading.sampled_tokens,
                    scored=student_tokens + teacher_tokens,
                    updated=student_tokens,
                ),
            }
            scores = {"kl_nats_per_token": tally.row_means("kl_N")}
            if steps.finish_step(
                setup, run, view, optimizer, metrics, problems, rollouts, scores, stopped
            ):
                return False
    return not ranks.gather(stopped)  # one may have come in the last step


# GRPO: rewards, advantages, the loss, the loop.

ADVANTAGE_EPS = 1e-4  # added to a group's standard deviation (TRL)
MAX_DRAWS = 4  # of --resample-dead-groups, for one step


@dataclass(frozen=True)
class Group:
    """The completions of one problem, each with its reward: 1 if the grader says right, else 0."""

    problem: Problem
    rollouts: list[Rollout]
    rewards: list[float]

    @property
    def dead(self) -> bool:
        """Say whether all rewards agree: then every advantage is 0 and nothing is learned."""
        return len(set(self.rewards)) == 1


class GrpoBatch(NamedTuple):
    """What all updates of a step learn from. A row is a completion; a group's are neighbours."""

    groups: list[Group]
    rollouts: list[Rollout]  # row after row
    advantage_B: Tensor
    kept: list[int]  # the rows that count in the loss
    teacher_prompts: list[list[int]]  # by row; empty where the method has no teacher
    old_logprobs: dict[int, Tensor]  # logprob_C by row; empty until the first update fills it


class Credit(Protocol):
    """What EGRSD adds (methods.py): each token's own advantage, and what to log of each token.

    advantage_N    of the completion that a token stands in
    old_logprob_N  in nats, under the student from before the step's first update
    """

    def __call__(
        self,
        setup: Setup,
        teacher_prompts: list[list[int]],
        rollouts: list[Rollout],
        advantage_N: Tensor,
        old_logprob_N: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


# What SSOPD adds (methods.py): this rank's share of the gradient of a term of a step's groups.
Term = Callable[[Setup, list[Group], Tally, Stopwatch, bool, Limit], None]


def roll_out_groups(setup: Setup, problems: list[Problem], *, seed: int) -> list[Group]:
    """Sample --group-size completions of each problem and reward them."""
    prompts = [setup.student_prompt(problem) for problem in problems]
    written = steps.write_completions(setup, prompts, seed=seed, samples=setup.config.group_size)
    pairs = zip(problems, written, strict=True)
    return ranks.decide([reward(setup, problem, rollouts) for problem, rollouts in pairs])


def reward(setup: Setup, problem: Problem, rollouts: list[Rollout]) -> Group:
    """Return the completions of a problem with the grader's verdict on each."""
    texts = [setup.text_of(rollout) for rollout in rollouts]
    right = [is_correct(text, str(problem.answer), think_open=setup.opens_think) for text in texts]
    return Group(problem, rollouts, list(map(float, right)))


def replace_dead(setup: Setup, groups: list[Group], *, step: int, seed: int) -> list[Group]:
    """Draw other problems in place of dead groups, up to MAX_DRAWS times, while there are others.

    Returns all groups that were drawn, those that are not dead first.
    """
    wanted = len(groups)
    for draw in range(1, MAX_DRAWS + 1):
        missing = wanted - sum(not group.dead for group in groups)
        taken = [group.problem for group in groups]
        if problems := steps.draw_others(setup, missing, taken, step=step, draw=draw):
            apart = 10**9 * draw  # further than a run's steps, so that no stream is shared
            groups = groups + roll_out_groups(setup, problems, seed=seed + apart)
    return sorted(groups, key=lambda group: group.dead)


def advantages(reward_BG: Tensor, scale: str) -> Tensor:
    """Return Eq. (4)'s advantage_BG: how much better a completion is than its group.

    scale  "group" divides by the group's standard deviation, over G - 1 as torch has it;
           "none" does not (Dr. GRPO)
    Exactly 0 where all rewards of a group agree.

    >>> reward_BG = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    >>> [round(a, 3) for a in advantages(reward_BG, "group")[0].tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    centred_BG = reward_BG - reward_BG.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred_BG  # not Eq. (4): without the division
    return centred_BG / (reward_BG.std(dim=1, keepdim=True) + ADVANTAGE_EPS)  # Eq. (4)


def clipped_surrogate(ratio_N: Tensor, advantage_N: Tensor, *, low: float, high: float) -> Tensor:
    """Return Eq. (5)'s loss_N of each token, without its KL term.

    The surrogate rises with the probability of tokens whose advantage is positive. PPO's clip keeps
    an update near the policy that sampled them: a ratio gains nothing beyond [1 - low, 1 + high].
    Where the clip acts, which is a ratio too high with A > 0 or too low with A < 0, the gradient is
    0:

    >>> ratio_N = torch.tensor([0.5, 1.5, 0.5, 1.5], requires_grad=True)
    >>> advantage_N = torch.tensor([1.0, 1.0, -1.0, -1.0])
    >>> loss_N = clipped_surrogate(ratio_N, advantage_N, low=0.2, high=0.2)
    >>> [round(x, 2) for x in loss_N.tolist()]
    [-0.5, -1.2, 0.8, 1.5]
    >>> torch.autograd.grad(loss_N.sum(), ratio_N)[0].tolist()
    [-1.0, 0.0, 0.0, 1.0]
    """
    clamped_N = ratio_N.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio_N * advantage_N, clamped_N * advantage_N)  # Eq. (5)


def completion_logprob(
    setup: Setup, prompts: list[list[int]], completions: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of every completion token, logprob_N, and the entropy there, entropy_N.

    Both in nats, under the model as it is seen at the moment: with the adapter, or within a view of
    the teacher.
    """
    # A group's completions share their prompt, which is computed once where that saves enough.
    hidden = packed_hidden if packing_pays(prompts, completions) else completion_hidden
    return chunked_logprob(
        hidden(setup.model, prompts, completions),
        head_weight(setup.model),
        torch.tensor([token for ids in completions for token in ids], device=setup.model.device),
        temperature=setup.config.temperature,
        chunk_tokens=setup.config.chunk_tokens,
    )


def grpo_loss(
    setup: Setup,
    rollouts: list[Rollout],
    advantage_N: Tensor,
    old_logprob_N: Tensor | None,
    credit: Credit | None = None,
    teacher_prompts: list[list[int]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Eq. (5)'s summand at every completion token, and what to log of each, by name.

    advantage_N    the advantage of the completion that a token stands in
    old_logprob_N  the tokens' log-probabilities before the step's first update, which a former call
                   returned as "logprob_N"; None: this is that call, and the ratio is 1. They come
                   from this same forward pass, never from the sampler, whose rounding differs
    credit         changes the advantage of each token, by a teacher that reads teacher_prompts
    """
    config = setup.config
    completions = [rollout.completion_ids for rollout in rollouts]
    prompts = [rollout.prompt_ids for rollout in rollouts]
    logprob_N, entropy_N = completion_logprob(setup, prompts, completions)
    if old_logprob_N is None:
        old_logprob_N = logprob_N.detach()
    ratio_N = (logprob_N - old_logprob_N).exp()
    stats = {"logprob_N": logprob_N, "ratio_N": ratio_N, "entropy_N": entropy_N}
    if credit:
        read = teacher_prompts or []
        advantage_N, credited = credit(setup, read, rollouts, advantage_N, old_logprob_N)
        stats |= credited
    loss_N = clipped_surrogate(ratio_N, advantage_N, low=config.clip_low, high=config.clip_high)
    if config.kl_coef:
        with teacher_view(setup.lora, "fixed"):  # the initial model: the adapter switched off
            initial_N, _ = completion_logprob(setup, prompts, completions)
        # Schulman's k3 estimates the KL from the sampled tokens alone, and is never below 0.
        stats["kl_N"] = (initial_N - logprob_N).expm1() - (initial_N - logprob_N)
        loss_N = loss_N + config.kl_coef * stats["kl_N"]  # Eq. (5), KL
    stats["clipped_low_N"] = (ratio_N < 1 - config.clip_low) & (advantage_N < 0)
    stats["clipped_high_N"] = (ratio_N > 1 + config.clip_high) & (advantage_N > 0)
    return loss_N, {name: tensor.detach() for name, tensor in stats.items()}


def grpo_gradient(
    setup: Setup,
    batch: GrpoBatch,
    watch: Stopwatch,
    cosine: bool,
    credit: Credit | None,
    add_term: Term | None,
    limit: Limit,
) -> Tally:
    """Add this rank's share of the gradient of Eq. (5) over a step; return its share of the log."""
    config = setup.config
    groups, rollouts, advantage_B, kept, teacher_prompts, old_logprobs = batch
    tally = Tally()
    kept_tokens = count_tokens([rollouts[row] for row in kept])
    reduction, step_tokens = loss_reduction(config, kept_tokens, len(kept))
    mine = range(len(groups))[ranks.share(len(groups))]  # groups stay whole
    own = [row for row in kept if row // config.group_size in mine]
    student_prompts = [rollout.prompt_ids for rollout in rollouts]
    together = packing_pays(student_prompts, [rollout.completion_ids for rollout in rollouts])
    for rows in micro_batches(rollouts, limit, own, teacher_prompts, together=together):
        micro = [rollouts[row] for row in rows]
        lengths = [len(rollout.completion_ids) for rollout in micro]
        advantage_N = advantage_B[rows].repeat_interleave(torch.tensor(lengths))
        advantage_N = advantage_N.to(setup.model.device)
        # Where an earlier attempt ran out of memory, some rows' old log-probs are known already.
        is_known = all(row in old_logprobs for row in rows)
        old_N = torch.cat([old_logprobs[row] for row in rows]) if is_known else None
        read = [teacher_prompts[row] for row in rows] if credit else []
        loss_N, stats = grpo_loss(setup, micro, advantage_N, old_N, credit, read)
        if not is_known:
            old_logprobs.update(zip(rows, stats["logprob_N"].split(lengths), strict=True))
        loss = reduce_loss(  # Eq. (5), 1/N
            loss_N,
            lengths,
            reduction=reduction,
            step_tokens=step_tokens,
            step_rows=len(kept),
        )
        watch.lap("score")
        setup.loss_scale.backward(loss)
        watch.lap("update")
        tally.add(loss, stats, rows, lengths)
        if credit:  # its teacher has scored them, too
            tally.scored += sum(map(len, read)) + sum(lengths)
    if add_term:
        add_term(setup, groups, tally, watch, cosine, limit)
    return tally


def train_grpo(
    setup: Setup,
    run: runs.Run,
    view: Watcher,
    credit: Credit | None = None,
    add_term: Term | None = None,
) -> bool:
    """Train from the last saved step to the end; return False if it was ended early.

    credit, add_term  what two neighbours add, each in a function of methods.py
    """
    config = setup.config
    optimizer, step, sampled_tokens, skipped = steps.begin(setup, run)
    limit = Limit.of(config)
    with runs.stop_signals() as stopped:
        while (done := share_done(config, step, sampled_tokens)) < 1:
            step += 1
            watch = Stopwatch(str(setup.model.device))

            # Problems of this step, and a group of completions of each, with rewards.
            wanted = config.batch_size // config.group_size
            seed = steps.rollout_seed(config, step)
            problems = steps.draw_problems(setup, wanted, step=step)
            drawn = roll_out_groups(setup, problems, seed=seed)
            if config.resample_dead_groups:
                drawn = replace_dead(setup, drawn, step=step, seed=seed)
            groups = drawn[:wanted]
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            step_tokens = sum(count_tokens(group.rollouts) for group in drawn)
            sampled_tokens += step_tokens
            watch.lap("rollout")

            # What each completion gains on its group, for all of its tokens. Rows that are masked
            # stand in neither the sum nor the denominator of the loss.
            reward_BG = torch.tensor([group.rewards for group in groups])
            advantage_B = advantages(reward_BG, config.scale_rewards).flatten()
            kept = rows_in_the_loss(config, rollouts)
            own = len(groups[ranks.share(len(groups))]) * config.group_size
            by_group = [setup.teacher_prompt(group.problem) for group in groups] if credit else []
            teacher_prompts = [prompt for prompt in by_group for _ in range(config.group_size)]

            # Updates on this batch. All compare with the log-probs from before the first of them.
            tallies = []
            batch = GrpoBatch(groups, rollouts, advantage_B, kept, teacher_prompts, {})
            cosine = steplog.asks_for_cosine(config, step)
            attempt = partial(grpo_gradient, setup, batch, watch, cosine, credit, add_term)
            for _ in range(config.inner_epochs):
                part, limit = halve_until_it_fits(attempt, limit, optimizer.zero_grad, own)
                tallies += ranks.gather([part])

                # The update. The learning rate falls linearly to 0.
                lr = config.lr * (1 - done)
                grad_norm = take_step(optimizer, setup=setup, lr=lr)
                skipped = count_skipped(skipped, grad_norm, step, setup.loss_scale)
                watch.lap("update")
            setup.lora.update_teacher(step, decay=config.ema_decay, every=config.teacher_every)

            # Log and save.
            tally = steplog.merge(tallies)
            student_tokens = count_tokens([rollouts[row] for row in kept], prompts=True)
            updated_tokens = config.inner_epochs * student_tokens
            drawn_rewards = [group.rewards for group in drawn]
            metrics = {
                "step": step,
                "progress": share_done(config, step, sampled_tokens),
                "sampled_tokens": sampled_tokens,
                **steplog.grpo_metrics(tally, drawn_rewards, config.inner_epochs),
                **steplog.update_metrics(grad_norm, lr, skipped, setup.loss_scale),
                **steplog.work_metrics(
                    rollouts,
                    watch,
                    sampled=step_tokens,
                    scored=updated_tokens * (2 if config.kl_coef else 1) + tally.scored,
                    updated=updated_tokens + tally.updated,
                ),
            }
            problems = [group.problem for group in groups for _ in group.rollouts]
            scores = {"reward": reward_BG.flatten().tolist(), "advantage": advantage_B.tolist()}
            if steps.finish_step(
                setup, run, view, optimizer, metrics, problems, rollouts, scores, stopped
            ):
                return False
    return not ranks.gather(stopped)  # one may have come in the last step


# What a step of both methods shares.


@torch.no_grad()
def heldout_kl(setup: Setup, problems: list[Problem], *, seed: int) -> Ratio:
    """Return the unclipped divergence from the teacher on the student's own rollouts.

    Per problem: its sum over the rollout's tokens, in nats, and how many tokens they are. Problems
    without an English side are left out, as the teacher cannot read them.
    """
    problems = [problem for problem in problems if setup.can_teach(problem)]
    teacher_prompts = [setup.teacher_prompt(problem) for problem in problems]
    rollouts = roll_out(setup, problems, seed=seed)
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    kl_sums = [0.0] * len(rollouts)
    mine = list(range(len(rollouts)))[ranks.share(len(rollouts))]
    for rows in micro_batches(rollouts, Limit.of(setup.config), mine, teacher_prompts):
        micro = [rollouts[row] for row in rows]
        _, stats = copsd_loss(setup, [teacher_prompts[row] for row in rows], micro)
        by_row = stats["kl_N"].split([lengths[row] for row in rows])
        for row, kl_C in zip(rows, by_row, strict=True):
            kl_sums[row] = kl_C.sum().item()
    return ranks.gather([kl_sums[row] for row in mine]), [float(length) for length in lengths]


# By --completion: what writes the completions of COPSD's step, and the loss on them. All but the
# first are controls (parts/controls.py).
SOURCES = {
    "student": (roll_out, copsd_loss),
    "teacher": (controls.teacher_writes, copsd_loss),
    "reference": (controls.reference_label, partial(controls.hard_label_loss, completion_logprob)),
    "garbage": (controls.garbage_label, partial(controls.hard_label_loss, completion_logprob)),
}


# The program.


def train(
    setup: Setup,
    run: runs.Run,
    console: Console,
    loop: Callable[[Setup, runs.Run, Watcher], bool],
    watching: Watching | None = None,
) -> int:
    """Train, show what it changed, and return the exit code. Finished parts in the folder are read.

    loop  the method's: train_copsd, train_grpo, or another of methods.LOOPS, made of them
    0: finished; 1: numbers were not finite, or --stop-on-collapse; 130: stopped by a signal.
    """
    config = setup.config
    started = time.monotonic()
    say(
        console,
        f"{config.method.upper()} on {config.model}, {find_language(config.lang).english}: "
        f"{len(setup.train)} problems to train on, {len(setup.heldout)} held out, "
        f"seed {config.seed}, into {run.folder}",
    )
    before = measure_once(setup, run, console, "before")
    try:
        with (watching or Watching()).start(setup, run, console) as view:
            finished = loop(setup, run, view)
    except FloatingPointError as error:
        program.say_error(f"{error}; {run.kept()}")  # also where it is another rank's alone
        if ranks.is_first() and (best := write_best(run)):
            say(console, best)
        return 1
    for line in view.summary(finished):
        say(console, line)
    if not finished:
        say(console, f"stopped and saved; the same command goes on in {run.folder}")
        return 1 if view.collapsed else 130
    after = measure_once(setup, run, console, "after")
    measure.print_change(before, after, console, config)
    took = f"done in {time.monotonic() - started:.0f} s"
    say(console, f"{took}; logs, completions and adapters: {run.folder}")
    say(console, f"next: {evaluation_command(setup, run.folder)}")
    return 0


def measure_once(setup: Setup, run: runs.Run, console: Console, when: str) -> measure.Columns:
    """Return the evaluation "before" or "after" training; one that is done is read, not redone."""
    config = setup.config
    stored = ranks.decide(run.read_evaluation(when) if ranks.is_first() else None)
    if stored is not None:
        return measure.read_columns(stored)
    if not setup.heldout:
        return {}
    ruler = measure.Ruler.of(config, seed=config.seed)
    columns = measure.measure_languages(
        setup.model, setup.tokenizer, setup.heldout, ruler, console, f"{when} training"
    )
    kl = heldout_kl(setup, setup.heldout, seed=config.seed)
    columns[config.lang][measure.KL_NAME] = bootstrap(*kl)
    if ranks.is_first():
        run.write_evaluation(when, measure.plain_columns(columns))
    return columns
