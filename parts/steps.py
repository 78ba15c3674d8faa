"""What a step of either method has around its method: how far a run is, and the update."""

import math

import torch

from parts.recipe import Config
from parts.sampler import Rollout

MAX_SKIPPED = 3  # updates in a row without a finite gradient before a run gives up


def rollout_seed(config: Config, step: int) -> int:
    """Return the seed of a step's rollouts, another one at every step of every run."""
    return config.seed * 1_000_003 + step


def share_done(config: Config, step: int, sampled_tokens: int) -> float:
    """Return how much of the run is done after `step`, of its token budget or else of its steps."""
    if config.token_budget:
        return sampled_tokens / config.token_budget
    return step / config.steps


def rows_in_the_loss(config: Config, rollouts: list[Rollout]) -> list[int]:
    """Return the rows that count in the loss: all, or with --mask-truncated those that ended."""
    return [
        row
        for row, rollout in enumerate(rollouts)
        if not (config.mask_truncated and rollout.finish_reason == "length")
    ]


def take_step(optimizer: torch.optim.Optimizer, *, lr: float, max_grad_norm: float) -> float:
    """Cut the gradient's norm, step, clear; return the norm before the cut.

    A gradient that is not finite is dropped: one step with it would turn every weight into NaN.
    """
    optimizer.param_groups[0]["lr"] = lr
    parameters = optimizer.param_groups[0]["params"]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def count_skipped(skipped: int, grad_norm: float, step: int) -> int:
    """Return how many updates in a row were dropped, this one included.

    Raises FloatingPointError when they are too many.
    """
    if math.isfinite(grad_norm):
        return 0
    if skipped + 1 == MAX_SKIPPED:
        raise FloatingPointError(
            f"no finite gradient in {MAX_SKIPPED} updates up to step {step}: try a lower --lr"
        )
    return skipped + 1
