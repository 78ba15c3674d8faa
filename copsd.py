"""COPSD, crosslingual on-policy self-distillation (arXiv 2605.09548), in one process.

One model plays two roles. The student q reads a problem x in the target language and writes a completion y. The
teacher p is the same model that also reads the English translation x_en and an English solution s_en. Training pulls
the student towards the teacher on the student's own words:

    y ~ q(. | x)
    Eq. (1)  L = (1/N) sum_t D( p(. | x, x_en, s_en, y_<t) || q(. | x, y_<t) )      over the step's N completion tokens

GRPO, the baseline, has no teacher: it samples G completions of each problem and learns from which of them are right.

    Eq. (4)  A_i = (r_i - mean r) / (std r + eps)                            r = 1 where the grader says so, else 0
    Eq. (5)  L = -(1/N) sum_t min(ratio_t A, clamp(ratio_t, 1 - low, 1 + high) A) - coef KL_t,  ratio_t = q / q_old

Read top down: Config is the recipe, `distil` and `surrogate` are the equations, `train_copsd` and `train_grpo` the
loops, paragraph for paragraph alike. The rest prepares and reports.

Departures: a part of the data is held out, so that a run can measure itself (the released code trains on all of it);
the mean is over the tokens of the whole step (the paper averages each completion first: --reduction trajectory); a
share of the problems can be posed in English (--english-share, 0 by default); GRPO's mean is over tokens, too, where
the OPSD script takes the mean of each completion (--loss-norm sequence).
"""

import math
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval import (
    Estimate,
    bad_input,
    bootstrap,
    check_answers,
    evaluate,
    keep_fitting,
    start_program,
    summarise,
)
from kernels import (
    CLIP_MODES,
    KINDS,
    REDUCTIONS,
    chunked_divergence,
    chunked_logprob,
    divergence,
    reduce_loss,
)
from parts import data, runs
from parts.data import Problem
from parts.flags import check_settings, flags_of, setting
from parts.grading import is_correct
from parts.machine import Stopwatch, peak_memory_gib, pick_device, pick_dtype
from parts.model import (
    Lora,
    attach_lora,
    eos_ids,
    final_hidden,
    head_weight,
    load_model,
    load_tokenizer,
    resolve_model,
    save_adapter,
    teacher_view,
    valid_ids,
)
from parts.sampler import Rollout, SamplingParams, sample
from parts.view import SamplingProgress, StepView, estimates_table

ADVANTAGE_EPS = 1e-4  # added to a group's standard deviation (TRL)
MAX_DRAWS = 4  # of --resample-dead-groups, for one step
MAX_SKIPPED = 3  # updates in a row without a finite gradient before a run gives up


@dataclass(frozen=True)
class Config:
    """The recipes; each default is the released script's unless its doc names another source. Every field is a flag.

    GRPO's defaults are those of the OPSD scripts (arXiv 2601.18734); COPSD's release has none.
    """

    method: str = setting("copsd", "what to train with", choices=("copsd", "grpo"))
    model: str = setting(
        "lab/tiny", "a local folder, org/name, or a bare name such as Qwen2.5-1.5B (ours: the lab)"
    )
    lang: str = setting("hau", "target language, an ISO 639-1 or 639-3 code (ours)")
    data: str | None = setting(
        None, "file of training problems [the hub's COPSD set for the language]"
    )
    eval_data: str | None = setting(
        None, "file of problems to evaluate on [held out of the data] (ours)"
    )
    out: str | None = setting(None, "run folder [runs/METHOD-MODEL-LANG-SEED]")
    seed: int = setting(0, "of the adapter, the order of problems, the split and the sampler")
    steps: int = setting(100, "batches sampled; COPSD updates once on each", grpo=500, least=1)
    token_budget: int | None = setting(
        None, "sampled tokens to stop at, in place of steps (ours)", least=1
    )

    divergence: str = setting("forward_kl", "teacher first", choices=KINDS)
    beta: float = setting(0.5, "of jsd, between 0 and 1")
    clip_mode: str = setting("entry", "what the clip caps", choices=CLIP_MODES)
    clip: float = setting(0.05, "cap in nats", above=0)
    reduction: str = setting(
        "token", "mean over tokens, or completions' mean (the paper's text)", choices=REDUCTIONS
    )
    teacher: str = setting("fixed", "fixed: adapter off", choices=("fixed", "current", "ema"))
    ema_decay: float = setting(0.99, "of the ema teacher, per step (ours)", least=0, most=1)
    english_problem: bool = setting(True, "show the teacher the English problem")
    english_solution: bool = setting(True, "show the teacher the English solution")
    swap_solutions: bool = setting(
        False, "show it the solution of another problem, as an ablation (ours)"
    )
    thinking: str = setting("auto", "whether the prompt opens a think block: auto, on or off")

    group_size: int = setting(8, "GRPO: completions per problem", least=2)
    scale_rewards: str = setting(
        "group", "GRPO: by its deviation, or not (Dr. GRPO)", choices=("group", "none")
    )
    inner_epochs: int = setting(1, "GRPO: updates on each batch (TRL)", least=1)
    clip_low: float = setting(
        0.2, "GRPO: the ratio counts no further down than 1 - this (PPO, TRL)", least=0, most=1
    )
    clip_high: float = setting(
        0.2, "GRPO: nor further up than 1 + this (PPO, TRL; 0.28 in DAPO)", least=0
    )
    kl_coef: float = setting(
        0.0, "GRPO: weight of the KL to the initial model, which costs a forward pass", least=0
    )
    loss_norm: str = setting(
        "token", "GRPO: as in DAPO, OPSD, Dr. GRPO", choices=("token", "sequence", "constant")
    )
    mask_truncated: bool = setting(
        False, "GRPO: leave completions cut by the length limit out of the loss (DAPO)"
    )
    resample_dead_groups: bool = setting(
        False, "GRPO: draw other problems for all-right and all-wrong groups (DAPO)"
    )

    batch_size: int = setting(
        32, "completions per step: COPSD's are of as many problems, GRPO's of groups", least=1
    )
    english_share: float = setting(
        0.0, "share of problems posed in English, not to forget it (ours)", least=0, most=1
    )
    temperature: float = setting(
        1.1, "of the rollouts, and of all distributions in the loss", grpo=1.2, above=0
    )
    top_p: float = setting(0.95, "nucleus of the rollouts, up to 1 (GRPO: TRL)", grpo=1.0)
    top_k: int = setting(
        20, "most likely tokens kept in the rollouts, 0 is off (GRPO: TRL)", grpo=0
    )
    max_new_tokens: int = setting(2048, "tokens per completion", grpo=16384)

    lr: float = setting(5e-6, "peak learning rate; falls linearly to 0, no warm-up", least=0)
    weight_decay: float = setting(0.0, "AdamW's", least=0)
    max_grad_norm: float = setting(0.1, "the gradient's norm is cut to this", above=0)
    lora_rank: int = setting(64, "r", least=1)
    lora_alpha: float = setting(128.0, "the adapter is scaled by alpha / r", above=0)
    lora_targets: str = setting(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers to adapt, by name"
    )

    micro_batch: int = setting(
        4, "rows per forward and backward; changes memory, not the gradient (ours)", least=1
    )
    chunk_tokens: int = setting(256, "rows of logits alive at a time (ours)", least=1)
    sample_rows: int = setting(256, "completions decoded at once (ours)", least=1)
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    compile: bool | None = setting(None, "torch.compile the divergence [where it pays]")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting(
        "auto", "auto, float32 or bfloat16: of the base weights; the adapter is always float32"
    )
    save_every: int = setting(5, "steps between saves", least=1)

    eval_problems: int = setting(
        32, "problems of the evaluations before and after; 0 is none (ours)", least=0
    )
    eval_samples: int = setting(
        8, "completions per problem there; pass@k has k = 1 and this (ours)", least=1
    )
    eval_temperature: float = setting(
        1.0, "of the sampled evaluations, whose top-k is off", least=0
    )
    eval_top_p: float = setting(0.95, "of the sampled evaluations", above=0, most=1)


@dataclass(frozen=True)
class CompareConfig(Config):
    """What `compare` takes beside the settings of its runs, of which lang may name several, separated by commas."""

    seeds: str = setting("3", "runs of each arm: a count, or seeds such as 0,4,7 (ours)")
    sweep: str = setting(
        "0.03,0.1,0.3,1,2",
        "rates tried for each method on a development split, times its lr (ours)",
    )
    dev_problems: int = setting(100, "training problems set aside as that split (ours)")
    ablate: bool = setting(
        False, "compare COPSD with one part changed at a time, instead of base, GRPO, COPSD (ours)"
    )


@dataclass(frozen=True)
class Setup:
    """All that a loop works with, ready to use."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lora: Lora
    train: list[Problem]
    heldout: list[Problem]


def completion_hidden(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
) -> Tensor:
    """Return hidden_ND, the states that predict each completion token, row after row; EOS is among the tokens.

    Prompt and completion are contiguous and pads come after both, so no row sees a pad. The state at t-1 predicts t:

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


def distil(
    setup: Setup, privileged: list[list[int]], rollouts: list[Rollout]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Eq. (1)'s summand at every completion token, loss_N in nats, and what to log of each, by name.

    privileged  the teacher's prompt for each rollout: both roles score the same ids. Gradient to the student only
    """
    config = setup.config
    completions = [rollout.completion_ids for rollout in rollouts]
    student_ND = completion_hidden(
        setup.model, [rollout.prompt_ids for rollout in rollouts], completions
    )
    with teacher_view(setup.lora, config.teacher):
        teacher_ND = completion_hidden(setup.model, privileged, completions)
    loss_N, stats = chunked_divergence(  # Eq. (1), D
        student_ND,
        teacher_ND,
        head_weight(setup.model),
        kind=config.divergence,
        beta=config.beta,
        temperature=config.temperature,
        clip_mode=config.clip_mode,
        clip=config.clip,
        chunk_tokens=config.chunk_tokens,
        compile=config.compile,
    )
    return loss_N, {**stats, "clipped_N": loss_N.detach() < stats["kl_N"]}


def advantages(reward_BG: Tensor, scale: str) -> Tensor:
    """Return Eq. (4)'s advantage_BG of each completion over its group; exactly 0 where all rewards of a group agree.

    scale  group: divide by the group's standard deviation (of G - 1 degrees, as TRL's), none: do not (Dr. GRPO)

    >>> [round(a, 3) for a in advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), "group")[0].tolist()]
    [1.5, -0.5, -0.5, -0.5]
    """
    centred_BG = reward_BG - reward_BG.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred_BG  # not Eq. (4): without the division
    return centred_BG / (reward_BG.std(dim=1, keepdim=True) + ADVANTAGE_EPS)  # Eq. (4)


def clipped_surrogate(ratio_N: Tensor, advantage_N: Tensor, *, low: float, high: float) -> Tensor:
    """Return Eq. (5)'s loss_N of each token without its KL term: a ratio gains nothing beyond [1 - low, 1 + high].

    Where the clip acts, which is a ratio too high with A > 0 or too low with A < 0, the gradient is 0:

    >>> ratio_N = torch.tensor([0.5, 1.5, 0.5, 1.5], requires_grad=True)
    >>> loss_N = clipped_surrogate(ratio_N, torch.tensor([1.0, 1.0, -1.0, -1.0]), low=0.2, high=0.2)
    >>> [round(x, 2) for x in loss_N.tolist()], torch.autograd.grad(loss_N.sum(), ratio_N)[0].tolist()
    ([-0.5, -1.2, 0.8, 1.5], [-1.0, 0.0, 0.0, 1.0])
    """
    return -torch.minimum(
        ratio_N * advantage_N, ratio_N.clamp(1 - low, 1 + high) * advantage_N
    )  # Eq. (5)


def surrogate(
    setup: Setup, rollouts: list[Rollout], advantage_N: Tensor, old_N: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Eq. (5)'s summand at every completion token, and what to log of each, by name.

    old_N  the tokens' log-probs before the step's first update, as returned then under "logprob_N"; None: this is it,
           and the ratio is 1. They come from this same forward, never from the sampler, whose rounding differs
    """
    config, completions = setup.config, [rollout.completion_ids for rollout in rollouts]
    ids_N = torch.tensor([token for ids in completions for token in ids], device=setup.model.device)

    def _logprobs() -> tuple[Tensor, Tensor]:
        hidden_ND = completion_hidden(
            setup.model, [rollout.prompt_ids for rollout in rollouts], completions
        )
        options = {"temperature": config.temperature, "chunk_tokens": config.chunk_tokens}
        return chunked_logprob(hidden_ND, head_weight(setup.model), ids_N, **options)

    logprob_N, entropy_N = _logprobs()
    ratio_N = (logprob_N - (logprob_N.detach() if old_N is None else old_N)).exp()
    loss_N = clipped_surrogate(ratio_N, advantage_N, low=config.clip_low, high=config.clip_high)
    stats = {"logprob_N": logprob_N, "ratio_N": ratio_N, "entropy_N": entropy_N}
    if config.kl_coef:
        with teacher_view(setup.lora, "fixed"):
            initial_N, _ = _logprobs()
        stats["kl_N"] = (initial_N - logprob_N).expm1() - (
            initial_N - logprob_N
        )  # Schulman's k3, not below 0
        loss_N = loss_N + config.kl_coef * stats["kl_N"]  # Eq. (5), KL
    stats["clipped_low_N"] = (ratio_N < 1 - config.clip_low) & (advantage_N < 0)
    stats["clipped_high_N"] = (ratio_N > 1 + config.clip_high) & (advantage_N > 0)
    return loss_N, {name: tensor.detach() for name, tensor in stats.items()}


def student_prompt(
    config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids before a rollout: what evaluation asks, too."""
    return data.build_prompt(problem, problem.language, tokenizer, thinking=config.thinking)


def teacher_prompt(
    config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids that the teacher reads before the same rollout."""
    return data.build_prompt(
        problem,
        problem.language,
        tokenizer,
        role="teacher",
        thinking=config.thinking,
        english_problem=config.english_problem,
        english_solution=config.english_solution,
    )


def teachable(config: Config, problem: Problem) -> bool:
    """Say whether the problem has all that the teacher's prompt is to show of it."""
    english = (
        (config.english_problem, problem.problem_en),
        (config.english_solution, problem.solution_en),
    )
    return all(text for shown, text in english if shown)


def roll_out(
    setup: Setup, problems: list[Problem], *, seed: int, samples: int = 1
) -> list[Rollout]:
    """Sample completions, y ~ q(. | x), from the student as it is now: all `samples` of a problem, then the next's."""
    config = setup.config
    params = SamplingParams(
        config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed
    )
    prompts = [student_prompt(config, problem, setup.tokenizer) for problem in problems]
    groups = sample(
        setup.model,
        prompts,
        params,
        samples_per_prompt=samples,
        max_rows=config.sample_rows,
        eos_ids=eos_ids(setup.model, setup.tokenizer),
        valid_ids=valid_ids(setup.tokenizer),
    )
    return [rollout for group in groups for rollout in group]


@dataclass(frozen=True)
class Group:
    """GRPO's completions of one problem, each with its reward: 1 where the evaluator's grader says right, else 0."""

    problem: Problem
    rollouts: list[Rollout]
    rewards: list[float]

    @property
    def dead(self) -> bool:
        """Say whether all rewards agree: then every advantage is 0 and nothing is learned."""
        return len(set(self.rewards)) == 1


def roll_out_groups(setup: Setup, problems: list[Problem], *, seed: int) -> list[Group]:
    """Sample --group-size completions of each problem and reward them."""
    size, think_open = (
        setup.config.group_size,
        data.prompt_opens_think(setup.tokenizer, setup.config.thinking),
    )
    rollouts, groups = roll_out(setup, problems, seed=seed, samples=size), []
    for index, problem in enumerate(problems):
        group = rollouts[index * size : (index + 1) * size]
        texts = [
            str(setup.tokenizer.decode(r.completion_ids, skip_special_tokens=True)) for r in group
        ]
        rewards = [
            float(is_correct(text, str(problem.answer), think_open=think_open)) for text in texts
        ]
        groups.append(Group(problem, group, rewards))
    return groups


def replace_dead(setup: Setup, groups: list[Group], *, step: int, seed: int) -> list[Group]:
    """Draw other problems in place of dead groups, MAX_DRAWS times; return all that were drawn, the live ones first."""
    wanted = len(groups)
    for draw in range(1, MAX_DRAWS + 1):
        missing = wanted - sum(not group.dead for group in groups)
        if missing > 0:
            order = data.pick_order(
                len(setup.train), seed=setup.config.seed + draw, step=step - 1, batch=missing
            )
            problems = pose_in_english(
                [setup.train[index] for index in order], setup.config.english_share
            )
            groups = groups + roll_out_groups(setup, problems, seed=seed + 10**9 * draw)
    return sorted(groups, key=lambda group: group.dead)


def pose_in_english(problems: list[Problem], share: float) -> list[Problem]:
    """Return the problems with the first `share` of them in English; one that has no English side stays as it is."""
    count = round(share * len(problems))
    english = [
        replace(p, problem=p.problem_en, language="eng") if p.problem_en else p
        for p in problems[:count]
    ]
    return english + problems[count:]


def micro_batches(
    rollouts: list[Rollout], size: int, rows: list[int] | None = None
) -> list[list[int]]:
    """Return the rows (all, if None) of each micro-batch, those of like length together so that little is padding."""
    order = sorted(
        range(len(rollouts)) if rows is None else rows,
        key=lambda row: len(rollouts[row].prompt_ids) + len(rollouts[row].completion_ids),
    )
    return [order[start : start + size] for start in range(0, len(order), size)]


def train_copsd(setup: Setup, run: runs.Run, view: StepView) -> bool:
    """Train from the last saved step to the end; return False if a signal stopped it early (state saved)."""
    config, model, lora = setup.config, setup.model, setup.lora
    optimizer = torch.optim.AdamW(lora.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    step, sampled = restore(run, lora, optimizer)
    model.train()
    skipped = 0
    with runs.stop_signals() as stopped:
        while (done := share_done(config, step, sampled)) < 1:
            step += 1
            watch = Stopwatch(str(model.device))

            # Problems of this step, and one completion of each from the current student.
            order = data.pick_order(
                len(setup.train), seed=config.seed, step=step - 1, batch=config.batch_size
            )
            problems = pose_in_english(
                [setup.train[index] for index in order], config.english_share
            )
            rollouts = roll_out(setup, problems, seed=config.seed * 1_000_003 + step)
            step_tokens = count_tokens(rollouts)
            sampled += step_tokens
            watch.lap("rollout")

            # The loss, micro-batch by micro-batch; each adds its share of the one mean over the step's tokens.
            tally = runs.Tally()
            privileged = [teacher_prompt(config, problem, setup.tokenizer) for problem in problems]
            for rows in micro_batches(rollouts, config.micro_batch):
                batch = [rollouts[row] for row in rows]
                lengths = [len(rollout.completion_ids) for rollout in batch]
                loss_N, stats = distil(setup, [privileged[row] for row in rows], batch)
                loss = reduce_loss(  # Eq. (1), 1/N
                    loss_N,
                    lengths,
                    reduction=config.reduction,
                    step_tokens=step_tokens,
                    step_rows=len(rollouts),
                )
                watch.lap("score")
                loss.backward()
                watch.lap("update")
                tally.add(loss, stats, rows, lengths)

            # The update.
            lr = config.lr * (1 - done)
            grad_norm = take_step(optimizer, lr=lr, max_grad_norm=config.max_grad_norm)
            skipped = count_skipped(skipped, grad_norm, step)

            # The teacher follows, where it is to.
            if config.teacher == "ema":
                lora.update_ema(config.ema_decay)
            watch.lap("update")

            # Log and save.
            done = share_done(config, step, sampled)
            metrics = {
                "step": step,
                "progress": done,
                "sampled_tokens": sampled,
                **copsd_metrics(tally),
            }
            metrics |= {
                "update/grad_norm": grad_norm,
                "update/lr": lr,
                "update/skipped_in_a_row": skipped,
            }
            student = count_tokens(rollouts, prompts=True)
            teacher = step_tokens + sum(map(len, privileged))
            metrics |= work_metrics(
                rollouts, watch, sampled=step_tokens, scored=student + teacher, updated=student
            )
            run.append("metrics.jsonl", [metrics])
            scores = {"kl_nats_per_token": tally.row_means("kl_N")}
            rows = runs.completion_rows(step, problems, rollouts, scores, setup.tokenizer.decode)
            run.append("completions.jsonl", rows)
            view.show(metrics)
            if step % config.save_every == 0 or done >= 1 or stopped:
                save(run, setup, optimizer, step)
            if stopped and done < 1:
                return False
    return True


def train_grpo(setup: Setup, run: runs.Run, view: StepView) -> bool:
    """Train from the last saved step to the end; return False if a signal stopped it early (state saved)."""
    config, model, lora = setup.config, setup.model, setup.lora
    optimizer = torch.optim.AdamW(lora.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    step, sampled = restore(run, lora, optimizer)
    model.train()
    skipped = 0
    with runs.stop_signals() as stopped:
        while (done := share_done(config, step, sampled)) < 1:
            step += 1
            watch = Stopwatch(str(model.device))

            # Problems of this step, and a group of completions of each from the current student, with rewards.
            wanted, seed = config.batch_size // config.group_size, config.seed * 1_000_003 + step
            order = data.pick_order(len(setup.train), seed=config.seed, step=step - 1, batch=wanted)
            problems = pose_in_english(
                [setup.train[index] for index in order], config.english_share
            )
            drawn = roll_out_groups(setup, problems, seed=seed)
            if config.resample_dead_groups:
                drawn = replace_dead(setup, drawn, step=step, seed=seed)
            rollouts = [rollout for group in drawn[:wanted] for rollout in group.rollouts]
            step_tokens = sum(count_tokens(group.rollouts) for group in drawn)
            sampled += step_tokens
            watch.lap("rollout")

            # What each completion gains on its group, for all of its tokens; masked ones count nowhere in the loss.
            reward_BG = torch.tensor([group.rewards for group in drawn[:wanted]])
            advantage_B = advantages(reward_BG, config.scale_rewards).flatten()
            kept = [
                r
                for r, y in enumerate(rollouts)
                if not (config.mask_truncated and y.finish_reason == "length")
            ]
            reduction, tokens = loss_mean(
                config, count_tokens([rollouts[row] for row in kept]), len(kept)
            )

            # Updates on this batch, --inner-epochs of them; the first one's log-probs are the old ones of all.
            tally, old = runs.Tally(), {}
            for _ in range(config.inner_epochs):
                for rows in micro_batches(rollouts, config.micro_batch, kept):
                    batch = [rollouts[row] for row in rows]
                    lengths = [len(rollout.completion_ids) for rollout in batch]
                    advantage_N = (
                        advantage_B[rows].repeat_interleave(torch.tensor(lengths)).to(model.device)
                    )
                    loss_N, stats = surrogate(setup, batch, advantage_N, old.get(rows[0]))
                    old.setdefault(rows[0], stats["logprob_N"])
                    loss = reduce_loss(  # Eq. (5), 1/N
                        loss_N,
                        lengths,
                        reduction=reduction,
                        step_tokens=tokens,
                        step_rows=len(kept),
                    )
                    watch.lap("score")
                    loss.backward()
                    watch.lap("update")
                    tally.add(loss, stats, rows, lengths)

                # The update.
                lr = config.lr * (1 - done)
                grad_norm = take_step(optimizer, lr=lr, max_grad_norm=config.max_grad_norm)
                skipped = count_skipped(skipped, grad_norm, step)
                watch.lap("update")

            # Log and save.
            done = share_done(config, step, sampled)
            metrics = {"step": step, "progress": done, "sampled_tokens": sampled}
            metrics |= grpo_metrics(tally, drawn, config.inner_epochs)
            metrics |= {
                "update/grad_norm": grad_norm,
                "update/lr": lr,
                "update/skipped_in_a_row": skipped,
            }
            student = config.inner_epochs * count_tokens(
                [rollouts[row] for row in kept], prompts=True
            )
            initial = student if config.kl_coef else 0
            metrics |= work_metrics(
                rollouts, watch, sampled=step_tokens, scored=student + initial, updated=student
            )
            run.append("metrics.jsonl", [metrics])
            problems = [group.problem for group in drawn[:wanted] for _ in group.rollouts]
            scores = {"reward": reward_BG.flatten().tolist(), "advantage": advantage_B.tolist()}
            rows = runs.completion_rows(step, problems, rollouts, scores, setup.tokenizer.decode)
            run.append("completions.jsonl", rows)
            view.show(metrics)
            if step % config.save_every == 0 or done >= 1 or stopped:
                save(run, setup, optimizer, step)
            if stopped and done < 1:
                return False
    return True


LOOPS = {"copsd": train_copsd, "grpo": train_grpo}


def share_done(config: Config, step: int, sampled: int) -> float:
    """Return how much of the run is done after `step`, of its token budget or else of its steps."""
    return sampled / config.token_budget if config.token_budget else step / config.steps


def count_tokens(rollouts: list[Rollout], *, prompts: bool = False) -> int:
    """Return the completion tokens of all rollouts, with or without those of the prompts before them."""
    return sum(
        len(rollout.completion_ids) + prompts * len(rollout.prompt_ids) for rollout in rollouts
    )


def loss_mean(config: Config, tokens: int, rows: int) -> tuple[str, int]:
    """Return how --loss-norm reduces the loss of a step of `rows` rollouts with `tokens`: reduction and denominator."""
    if (
        config.loss_norm == "constant"
    ):  # Dr. GRPO: the same weight for a token whatever its completion's length
        return "token", rows * config.max_new_tokens
    return {"token": "token", "sequence": "trajectory"}[config.loss_norm], tokens


def take_step(optimizer: torch.optim.Optimizer, *, lr: float, max_grad_norm: float) -> float:
    """Cut the gradient, step, clear; return the norm before the cut. A gradient that is not finite is dropped."""
    optimizer.param_groups[0]["lr"] = lr
    grad_norm = torch.nn.utils.clip_grad_norm_(
        optimizer.param_groups[0]["params"], max_grad_norm
    ).item()
    if grad_norm < float("inf"):  # nan compares false
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def count_skipped(skipped: int, grad_norm: float, step: int) -> int:
    """Return how many updates in a row were dropped, this one included; FloatingPointError when they are too many."""
    skipped = 0 if grad_norm < float("inf") else skipped + 1
    if skipped == MAX_SKIPPED:
        raise FloatingPointError(
            f"no finite gradient in {MAX_SKIPPED} updates up to step {step}: try a lower --lr"
        )
    return skipped


def copsd_metrics(tally: runs.Tally) -> dict[str, float | None]:
    """Return COPSD's means over the step's tokens under the names they are logged by."""
    return {
        "loss/objective_nats_per_token": tally.loss,
        "loss/kl_nats_per_token": tally.mean("kl_N"),
        "loss/clipped_token_frac": tally.mean("clipped_N"),
        "loss/teacher_entropy_nats_per_token": tally.mean("teacher_entropy_N"),
        "loss/student_entropy_nats_per_token": tally.mean("student_entropy_N"),
    }


def grpo_metrics(
    tally: runs.Tally, drawn: list[Group], inner_epochs: int
) -> dict[str, float | None]:
    """Return GRPO's rewards over all groups drawn, and its means over the tokens of all inner epochs."""
    ratio_N = torch.cat(tally.tokens.get("ratio_N", [torch.full((1,), math.nan)]))
    return {
        "loss/objective": tally.loss / inner_epochs,
        "loss/kl_nats_per_token": tally.mean("kl_N"),  # None unless --kl-coef asks for it
        "loss/student_entropy_nats_per_token": tally.mean("entropy_N"),
        "reward/mean": sum(sum(group.rewards) for group in drawn)
        / sum(len(group.rewards) for group in drawn),
        "reward/dead_group_frac": sum(group.dead for group in drawn) / len(drawn),
        "ratio/mean": ratio_N.mean().item(),
        "ratio/min": ratio_N.min().item(),
        "ratio/max": ratio_N.max().item(),
        "ratio/clipped_low_frac": tally.mean("clipped_low_N"),
        "ratio/clipped_high_frac": tally.mean("clipped_high_N"),
    }


def work_metrics(
    rollouts: list[Rollout], watch: Stopwatch, *, sampled: int, scored: int, updated: int
) -> dict[str, float]:
    """Return what each phase handled, in tokens and seconds, the completions' lengths, and peak memory."""
    return {
        "rollout/tokens": sampled,
        "score/tokens": scored,  # forward
        "update/tokens": updated,  # backward
        "rollout/completion_tokens_mean": count_tokens(rollouts) / len(rollouts),
        "rollout/cut_frac": sum(rollout.finish_reason == "length" for rollout in rollouts)
        / len(rollouts),
        **{f"{phase}/time_s": seconds for phase, seconds in watch.seconds.items()},
        "time_s": sum(watch.seconds.values()),
        "memory/peak_gib": peak_memory_gib(watch.device),
    }


def save(run: runs.Run, setup: Setup, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save the adapter for use and the state for going on."""
    save_adapter(
        setup.lora, run.folder / "adapters" / f"step_{step:05d}", base_model=setup.config.model
    )
    adapter = {f"lora/{name}": tensor for name, tensor in setup.lora.state_dict().items()}
    run.save_state(step, {**adapter, **runs.optimizer_tensors(optimizer)})


def restore(run: runs.Run, lora: Lora, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bring adapter, optimiser and logs to the last saved step; return it and the tokens sampled so far, or 0 and 0."""
    step, tensors = run.load_state()
    run.cut_back(step)
    if step:
        lora.load_state_dict(
            {n.removeprefix("lora/"): t for n, t in tensors.items() if n.startswith("lora/")}
        )
        runs.restore_optimizer(optimizer, tensors)
    return step, run.whole_rows("metrics.jsonl")[-1]["sampled_tokens"] if step else 0


@torch.no_grad()
def heldout_kl(setup: Setup, seed: int) -> Estimate:
    """Return the unclipped KL, in nats per token, on the student's own rollouts of held-out problems.

    Problems without an English side are left out, as the teacher cannot read them; nan if that is all.
    """
    problems = [problem for problem in setup.heldout if teachable(setup.config, problem)]
    privileged = [teacher_prompt(setup.config, problem, setup.tokenizer) for problem in problems]
    rollouts = roll_out(setup, problems, seed=seed)
    kl_sums, lengths = [0.0] * len(rollouts), [len(rollout.completion_ids) for rollout in rollouts]
    for rows in micro_batches(rollouts, setup.config.micro_batch):
        _, stats = distil(setup, [privileged[row] for row in rows], [rollouts[row] for row in rows])
        for row, kl_C in zip(
            rows, stats["kl_N"].split([lengths[row] for row in rows]), strict=True
        ):
            kl_sums[row] = kl_C.sum().item()
    return bootstrap(kl_sums, [float(length) for length in lengths])


def measure(setup: Setup, console: Console, when: str) -> dict[str, dict[str, Any]]:
    """Evaluate on the held-out problems, in the target language and, so that forgetting shows, in English."""
    config, columns = setup.config, {}
    sampled = SamplingParams(
        config.max_new_tokens, config.eval_temperature, config.eval_top_p, seed=config.seed
    )
    greedy = replace(sampled, temperature=0.0)
    english = pose_in_english([p for p in setup.heldout if p.problem_en], 1.0)
    for problems in (
        [setup.heldout, english]
        if setup.heldout[0].language != "eng" and english
        else [setup.heldout]
    ):
        language = data.find_language(problems[0].language)
        summary: dict[str, Estimate] = {}
        for name, params, samples in (
            ("greedy", greedy, 1),
            ("sampled", sampled, config.eval_samples),
        ):
            with SamplingProgress(
                console, f"{when} training: {language.english}, {name}"
            ) as progress:
                results = evaluate(
                    setup.model,
                    setup.tokenizer,
                    problems,
                    params,
                    samples=samples,
                    thinking=config.thinking,
                    max_rows=config.sample_rows,
                    on_progress=progress.update,
                )
            if name == "greedy":
                summary["greedy accuracy"] = summarise(results, [1])["pass@1"]
            else:
                summary |= summarise(results, sorted({1, config.eval_samples}))
        if problems is setup.heldout:
            summary["KL to the teacher, nats/token"] = heldout_kl(setup, config.seed)
        columns[language.iso3] = {name: asdict(estimate) for name, estimate in summary.items()}
    return columns


def validate(config: Config) -> None:
    """Raise ValueError for a setting outside its range, before anything is loaded."""
    check_settings(config)
    if config.method == "grpo" and config.batch_size % config.group_size:
        raise ValueError(
            f"--batch-size is {config.batch_size}; valid: a multiple of --group-size {config.group_size}"
        )
    largest = config.batch_size * config.max_new_tokens
    if config.token_budget is not None and config.token_budget < largest:
        raise ValueError(
            f"--token-budget is {config.token_budget}; valid: {largest} or more, what a step may sample"
        )
    SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    # A dry run on two logits: a beta that does not suit is the same error now that it would be at the first step.
    options = {
        "kind": config.divergence,
        "beta": config.beta,
        "clip_mode": config.clip_mode,
        "clip": config.clip,
    }
    divergence(torch.zeros(1, 2), torch.zeros(1, 2), **options)


def configure(given: dict[str, Any]) -> tuple[Config, Path]:
    """Return the config (flags before the model's recipe before the method's) and the model's folder."""
    folder, method = (
        resolve_model(given.get("model", Config.model)),
        given.get("method", Config.method),
    )
    defaults = {
        f.name: f.metadata["by_method"][method]
        for f in fields(Config)
        if method in f.metadata["by_method"]
    }
    recipe = runs.read_recipe(folder, method)
    unknown = recipe.keys() - {f.name for f in fields(Config)}
    if unknown:
        raise ValueError(
            f"{folder / 'recipe.json'} has unknown settings: {', '.join(sorted(unknown))}"
        )
    if "data" in given:
        recipe.pop("eval_data", None)  # the recipe's benchmark belongs to the recipe's data
    config = Config(**{**defaults, **recipe, **given})
    lang = data.find_language(config.lang).iso3
    files = {
        name: str(value).replace("{lang}", lang)
        for name in ("data", "eval_data")
        if (value := getattr(config, name))
    }
    out = config.out or f"runs/{config.method}-{Path(config.model).name}-{lang}-{config.seed}"
    config = replace(config, lang=lang, out=out, **files)
    validate(config)
    return config, folder


def load_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int, console: Console
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and the held-out ones, without those too long for the model's context."""
    lang, heldout = config.lang, []
    train = data.load_problems(
        Path(config.data) if config.data else data.hub_training_file(lang), language=lang
    )
    if config.eval_data:
        heldout = data.load_problems(Path(config.eval_data), language=lang)[: config.eval_problems]
    elif config.eval_problems:
        train, heldout = data.split_heldout(train, config.eval_problems, config.seed)
    check_answers(
        [*heldout, *(train if config.method == "grpo" else [])]
    )  # GRPO's reward needs them
    if config.swap_solutions:
        solutions = [problem.solution_en for problem in train[1:] + train[:1]]
        train = [
            replace(problem, solution_en=other)
            for problem, other in zip(train, solutions, strict=True)
        ]
    kept = []
    for problems in (train, heldout):
        needed = (
            problems is train and config.method == "copsd"
        )  # elsewhere a problem may lack its English side
        longest = []
        for problem in problems:
            posed = [problem, *pose_in_english([problem], 1.0)]
            prompts = [student_prompt(config, p, tokenizer) for p in posed]
            prompts += [
                teacher_prompt(config, p, tokenizer)
                for p in posed
                if needed or teachable(config, p)
            ]
            longest.append(max(prompts, key=len))
        kept.append(
            keep_fitting(
                problems, longest, console, context=context, max_new_tokens=config.max_new_tokens
            )
        )
    return kept[0], kept[1]


def prepare(config: Config, folder: Path, console: Console) -> tuple[Setup, runs.Run]:
    """Load everything that the settings name, check it, and only then make the run folder."""
    run = runs.Run(Path(str(config.out)))
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    run.check(settings)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    tokenizer = load_tokenizer(folder)
    model = load_model(
        folder, device=device, dtype=dtype, gradient_checkpointing=config.gradient_checkpointing
    )
    train, heldout = load_data(config, tokenizer, model.config.max_position_embeddings, console)
    identity = {
        "base_weights": runs.weights_fingerprint(dict(model.named_parameters())),
        "prompt_template": data.template_hash(tokenizer, config.lang, config.thinking),
        "dtype": str(dtype),
        "training_data": runs.fingerprint(train),
        "heldout_data": runs.fingerprint(heldout),
    }
    lora = attach_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=tuple(config.lora_targets.split(",")),
        seed=config.seed,
        ema=config.teacher == "ema",
    )
    run.check(settings, identity)
    run.create(settings, identity)
    return Setup(config, model, tokenizer, lora, train, heldout), run


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="COPSD, crosslingual on-policy self-distillation: train, look at prompts, list languages.",
)


@app.command("train")
@flags_of(Config)
def train_command(given: dict[str, Any]) -> None:
    """Train with COPSD or GRPO and show what it changed. The same command goes on with a run that was stopped.

    A flag that is not given comes from the model folder's recipe.json, where there is one, else from its default here.
    """
    console = start_program()
    say = partial(console.print, soft_wrap=True, highlight=False)
    with bad_input():
        config, folder = configure(given)
        started = time.monotonic()
        setup, run = prepare(config, folder, console)
    say(
        f"{config.method.upper()} on {config.model}, {data.find_language(config.lang).english}: {len(setup.train)} "
        f"problems to train on, {len(setup.heldout)} held out, seed {config.seed}, into {run.folder}"
    )
    if setup.heldout and not (run.folder / "before.json").is_file():
        runs.write_json(run.folder / "before.json", measure(setup, console, "before"))
    try:
        with StepView(console, None if config.token_budget else config.steps) as view:
            finished = LOOPS[config.method](setup, run, view)
    except FloatingPointError as error:
        say(f"error: {error}; {run.folder} keeps the last save")
        raise typer.Exit(1) from error
    if not finished:
        say(f"stopped; everything is saved in {run.folder}, and the same command goes on from here")
        raise typer.Exit(130)
    if setup.heldout:
        if not (run.folder / "after.json").is_file():
            runs.write_json(run.folder / "after.json", measure(setup, console, "after"))
        ends = {end: runs.read_json(run.folder / f"{end}.json") for end in ("before", "after")}
        for code in ends["before"]:
            title = data.find_language(code).english
            columns = {
                end: {name: Estimate(**entry) for name, entry in found[code].items()}
                for end, found in ends.items()
            }
            console.print(estimates_table(title, columns))
    say(
        f"done in {time.monotonic() - started:.0f} s. {run.folder}: metrics.jsonl, completions.jsonl, adapters/"
    )
    say(
        f"next: python eval.py --pass-at-k 8 --model {config.model} --lang {config.lang} --adapter {run.folder}"
    )


@app.command("compare")
@flags_of(CompareConfig)
def compare_command(given: dict[str, Any]) -> None:
    """Train base, GRPO and COPSD at an equal budget of sampled tokens; write tables and figures (bench/compare.py).

    The budget is --token-budget, or what --steps of COPSD sample at the base's mean length. The same command goes on.
    """
    from bench import compare

    console = start_program()
    own = {f.name: f.default for f in fields(CompareConfig)[len(fields(Config)) :]} | {
        "lang": Config.lang,
        "out": None,
    }
    options = {name: given.pop(name, default) for name, default in own.items()}
    tools = compare.Tools(configure, prepare, LOOPS, heldout_kl, pose_in_english)
    try:
        with bad_input():
            compare.compare(options, given, console, tools)
    except (compare.Stopped, KeyboardInterrupt) as stop:
        console.print("stopped; finished arms are kept, and the same command goes on from here")
        raise typer.Exit(130) from stop


@app.command("languages")
def languages_command() -> None:
    """List the languages: codes, names, script, and the benchmarks that have them."""
    table = Table(box=None, header_style="bold")
    for column in ("639-3", "639-1", "English name", "own name", "script", "benchmarks"):
        table.add_column(column)
    for language in data.languages().values():
        names = (
            language.iso3,
            language.iso1 or "-",
            language.english,
            language.own,
            language.script,
        )
        table.add_row(*names, ", ".join(language.benchmarks))
    Console().print(table)


@app.command("show")
@flags_of(Config)
def show_command(given: dict[str, Any]) -> None:
    """Print both prompts of the first training problem as text, with the boundary where the completion begins."""
    start_program()
    with bad_input():
        config, folder = configure(given)
        tokenizer = load_tokenizer(folder)
        source = Path(config.data) if config.data else data.hub_training_file(config.lang)
        problem = data.load_problems(source, language=config.lang)[0]
        shown = {
            "english_problem": config.english_problem,
            "english_solution": config.english_solution,
        }
        prompts = {
            "student": (student_prompt(config, problem, tokenizer), {}),
            "teacher": (teacher_prompt(config, problem, tokenizer), {"role": "teacher", **shown}),
        }
        for role, (ids, options) in prompts.items():
            text = data.render_prompt(
                problem, config.lang, tokenizer, thinking=config.thinking, **options
            )
            typer.echo(
                f"===== {role}, {len(ids)} tokens =====\n{text}<<< the completion begins here >>>\n"
            )
        typer.echo(f"template hash {data.template_hash(tokenizer, config.lang, config.thinking)}")


if __name__ == "__main__":
    app()
