"""What a step of either method has around its method: drawing, the update, going on."""

import math

import torch

from parts import runs
from parts.data import pick_order
from parts.prompts import Problem, pose_in_english
from parts.recipe import Config
from parts.sampler import Rollout
from parts.setup import Setup

MAX_SKIPPED = 3  # updates in a row without a finite gradient before a run gives up


def draw_problems(setup: Setup, count: int, *, step: int, draw: int = 0) -> list[Problem]:
    """Return the problems of a step, the first --english-share of them posed in English.

    draw  counts the further draws that a step may ask for; they follow orders of their own
    """
    config = setup.config
    order = pick_order(len(setup.train), seed=config.seed + draw, step=step - 1, batch=count)
    return pose_in_english([setup.train[index] for index in order], config.english_share)


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


def begin(setup: Setup, run: runs.Run) -> tuple[torch.optim.AdamW, int, int]:
    """Return the optimiser, the last saved step and the tokens sampled so far; 0 in a new run.

    Adapter, optimiser and logs are brought to that step, so that a stopped run goes on exactly.
    """
    config = setup.config
    optimizer = torch.optim.AdamW(
        setup.lora.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    step, sampled_tokens, tensors = run.load_state()
    run.cut_back(step)
    if step:
        prefix = "lora/"
        setup.lora.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
        runs.restore_optimizer(optimizer, tensors)
    setup.model.train()
    return optimizer, step, sampled_tokens
