"""What a training step leaves in the log: its tally, its metrics, some of its rollouts.

A name whose number has a unit ends in it. A fraction is of the step's tokens, a fraction under
"reward" of groups, and one under "rollout" of completions.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kernels import gradient_cosine
from parts.lossscale import LossScale
from parts.machine import Stopwatch, peak_memory_gib
from parts.prompts import Problem
from parts.recipe import Config
from parts.sampler import Rollout

LOGGED_ROLLOUTS = 4  # completions of every step that are kept whole
# The rows of kernels.clip_products, by the names under which a step's tally keeps them.
CLIP_PRODUCTS = ("clipped_by_plain_N", "clipped_square_N", "plain_square_N")
Metrics = dict[str, float | None]


class Tally:
    """What a step's micro-batches leave: the loss, and each token's statistics, on the CPU."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.tokens: dict[str, list[Tensor]] = {}
        self.rows: list[tuple[int, int]] = []  # row, tokens
        # What a method's own lines log: a sum, and what it is divided by.
        self.notes: dict[str, tuple[float, float]] = {}
        self.scored = 0  # tokens that those lines sent forward
        self.updated = 0  # and backward

    def add(
        self, loss: Tensor, stats: Mapping[str, Tensor], rows: list[int], lengths: list[int]
    ) -> None:
        """Add a micro-batch: its share of the loss, its tokens' statistics, its rows' lengths."""
        self.loss += loss.item()
        self.rows += zip(rows, lengths, strict=True)
        for name, tensor_N in stats.items():
            self.tokens.setdefault(name, []).append(tensor_N.float().cpu())

    def join(self, other: "Tally", prefix: str = "") -> None:
        """Add another tally's loss and statistics; those of another term go under a prefix."""
        self.loss += other.loss
        for name, tensors in other.tokens.items():
            self.tokens.setdefault(prefix + name, []).extend(tensors)

    def mean(self, name: str) -> float | None:
        """Return a statistic's mean over the step's tokens, None if there are none."""
        return torch.cat(self.tokens[name]).mean().item() if name in self.tokens else None

    def note(self, name: str, total: float, count: float) -> None:
        """Add to what is logged under a name: the mean of all that is noted, by its count."""
        old_total, old_count = self.notes.get(name, (0.0, 0.0))
        self.notes[name] = (old_total + total, old_count + count)

    def clip_cosine(self, prefix: str = "") -> float | None:
        """Return the cosine between the clipped and the plain gradient.

        None if it is not measured, and where one of them is 0, as both are where nothing is taught.
        """
        names = [prefix + name for name in CLIP_PRODUCTS]
        if names[0] not in self.tokens:
            return None
        products_3N = torch.stack([torch.cat(self.tokens[name]) for name in names])
        cosine = gradient_cosine(products_3N)
        return None if math.isnan(cosine) else cosine

    def row_means(self, name: str) -> dict[int, float]:
        """Return a statistic's mean over each row's tokens."""
        lengths = [length for _, length in self.rows]
        by_row = torch.cat(self.tokens[name]).split(lengths)
        return {
            row: tokens_C.mean().item()
            for (row, _), tokens_C in zip(self.rows, by_row, strict=True)
        }


def merge(tallies: list[Tally]) -> Tally:
    """Return what several ranks, or several updates on one batch, leave together."""
    whole = Tally()
    for tally in tallies:
        whole.join(tally)
        whole.rows += tally.rows
        for name, noted in tally.notes.items():
            whole.note(name, *noted)
        whole.scored += tally.scored
        whole.updated += tally.updated
    return whole


def count_tokens(rollouts: list[Rollout], *, prompts: bool = False) -> int:
    """Return the completion tokens of all rollouts, with or without the prompts before them."""
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    if prompts:
        tokens += sum(len(rollout.prompt_ids) for rollout in rollouts)
    return tokens


def asks_for_cosine(config: Config, step: int) -> bool:
    """Say whether this step measures how far the clip turns the gradient: the first does."""
    is_clipped = config.clip_mode != "none" and config.loss_over == "vocabulary"
    if not is_clipped or config.cosine_every == 0:
        return False
    return (step - 1) % config.cosine_every == 0


def copsd_metrics(tally: Tally) -> Metrics:
    """Return COPSD's means over the step's tokens under the names they are logged by."""
    return {
        "loss/objective_nats_per_token": tally.loss,
        "loss/kl_nats_per_token": tally.mean("kl_N"),  # never clipped
        "loss/clipped_token_frac": tally.mean("clipped_N"),
        "loss/clip_gradient_cosine": tally.clip_cosine(),  # with the unclipped gradient on logits
        "loss/teacher_entropy_nats_per_token": tally.mean("teacher_entropy_N"),
        "loss/student_entropy_nats_per_token": tally.mean("student_entropy_N"),
    }


def grpo_metrics(tally: Tally, group_rewards: list[list[float]], inner_epochs: int) -> Metrics:
    """Return GRPO's rewards over all groups drawn, and its means over all inner epochs' tokens.

    A group is dead when its rewards agree: it has no gradient.
    """
    if "ratio_N" in tally.tokens:
        ratio_N = torch.cat(tally.tokens["ratio_N"])
    else:  # every row was masked out of the loss
        ratio_N = torch.full((1,), math.nan)
    rewards = sum(sum(group) for group in group_rewards)
    dead = sum(len(set(group)) == 1 for group in group_rewards)
    own = {}
    if "credit_N" in tally.tokens:
        own = {
            "loss/teacher_entropy_nats_per_token": tally.mean("teacher_entropy_N"),
            "credit/mean": tally.mean("credit_N"),
            "credit/flipped_token_frac": tally.mean("flipped_N"),  # 0, or something is wrong
        }
    if "witness/skipped_group_frac" in tally.notes:  # the divergence of SSOPD's term
        own = {
            "loss/clipped_token_frac": tally.mean("witness_clipped_N"),
            "loss/clip_gradient_cosine": tally.clip_cosine("witness_"),
            "witness/kl_nats_per_token": tally.mean("witness_kl_N"),
        }
    return {
        "loss/objective": tally.loss / inner_epochs,
        "loss/kl_nats_per_token": tally.mean("kl_N"),  # None unless --kl-coef asks for it
        "loss/student_entropy_nats_per_token": tally.mean("entropy_N"),
        "reward/mean": rewards / sum(len(group) for group in group_rewards),
        "reward/dead_group_frac": dead / len(group_rewards),
        "ratio/mean": ratio_N.mean().item(),
        "ratio/min": ratio_N.min().item(),
        "ratio/max": ratio_N.max().item(),
        "ratio/clipped_low_frac": tally.mean("clipped_low_N"),
        "ratio/clipped_high_frac": tally.mean("clipped_high_N"),
        **own,
        **{name: total / count if count else None for name, (total, count) in tally.notes.items()},
    }


def update_metrics(grad_norm: float, lr: float, skipped: int, loss_scale: LossScale) -> Metrics:
    """Return what the update did: the gradient's norm before it was cut, the learning rate.

    And what the next loss is multiplied by, in float16.
    """
    return {
        "update/grad_norm": grad_norm,
        "update/lr": lr,
        "update/skipped_in_a_row": skipped,
        **loss_scale.metrics(),
    }


def work_metrics(
    rollouts: list[Rollout], watch: Stopwatch, *, sampled: int, scored: int, updated: int
) -> Metrics:
    """Return what each phase handled, in tokens and seconds, the lengths, and the peak memory.

    sampled, scored, updated  tokens that were generated, went forward, went backward. A prompt that
                              rows share (parts/packing.py) counts in each of them, and one that is
                              kept from an earlier epoch (parts/prefixes.py) in every step
    """
    cut = sum(rollout.finish_reason == "length" for rollout in rollouts)
    return {
        "rollout/tokens": sampled,
        "score/tokens": scored,
        "update/tokens": updated,
        "rollout/completion_tokens_mean": count_tokens(rollouts) / len(rollouts),
        "rollout/cut_frac": cut / len(rollouts),  # of completions, by the length limit
        **{f"{phase}/time_s": seconds for phase, seconds in watch.seconds.items()},
        "time_s": sum(watch.seconds.values()),
        "memory/peak_gib": peak_memory_gib(watch.device),
    }


def completion_rows(
    step: int,
    problems: list[Problem],
    rollouts: list[Rollout],
    scores: Mapping[str, Any],
    decode: Callable[..., Any],
) -> list[dict[str, Any]]:
    """Return some of the step's rollouts whole, for completions.jsonl.

    scores  name -> each row's value, to stand beside it
    They are spread evenly over the step, for problems posed in English come first.
    """
    kept = sorted({len(rollouts) * place // LOGGED_ROLLOUTS for place in range(LOGGED_ROLLOUTS)})
    return [
        {
            "step": step,
            "problem_id": problems[row].id,
            "prompt": decode(rollouts[row].prompt_ids),
            "completion": decode(rollouts[row].completion_ids),
            "answer": problems[row].answer,
            "finish_reason": rollouts[row].finish_reason,
            "tokens": len(rollouts[row].completion_ids),
            **{name: values[row] for name, values in scores.items()},
        }
        for row in kept
    ]
