"""Micro-batches: how the rows of a step are divided, so that each part fits into the memory.

Rows that stand in one micro-batch are padded to its longest, and what a pad computes is thrown
away. So rows of like length stand together. The student's and the teacher's row of one completion
are always in the same micro-batch. The largest comes first: where memory lacks, it lacks at once
and not in the middle of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.console import Console

from parts.machine import is_out_of_memory
from parts.recipe import Config
from parts.sampler import Rollout
from parts.view import say

Result = TypeVar("Result")
PADDING = 0.1  # the most of a micro-batch's positions that are pads, where they are budgeted


@dataclass(frozen=True)
class Limit:
    """What goes through the model at once, forward and backward.

    rows    so many at most
    tokens  so many positions at most, counted with pads, of the role whose rows are longer; a row
            that is longer stands alone. None: any number
    """

    rows: int
    tokens: int | None = None

    @classmethod
    def of(cls, config: Config) -> "Limit":
        """Return the limit that a run's settings name."""
        return cls(config.micro_batch, config.micro_tokens)

    def holds(self, sizes: list[tuple[int, int]]) -> bool:
        """Say whether these rows, as the student's and the teacher's positions, may stand together.

        >>> Limit(3).holds([(9, 9), (2, 5)]), Limit(1).holds([(9, 9), (9, 9)])
        (True, False)

        With a budget of positions, neither may there be too many, nor too many pads among them:

        >>> budget = Limit(3, tokens=18)
        >>> budget.holds([(8, 9), (8, 9)]), budget.holds([(8, 10), (8, 9)])
        (True, False)
        >>> budget.holds([(9, 9), (7, 7)])  # 4 of 36 are pads
        False
        """
        if len(sizes) > self.rows:
            return False
        if self.tokens is None:
            return True
        widths = [max(role) for role in zip(*sizes, strict=True)]
        positions = len(sizes) * sum(widths)
        pads = positions - sum(map(sum, sizes))
        return len(sizes) * max(widths) <= self.tokens and pads <= PADDING * positions

    def halved(self) -> "Limit":
        """Return a limit of half as many rows and positions, and at least one."""
        tokens = None if self.tokens is None else max(1, self.tokens // 2)
        return Limit(max(1, self.rows // 2), tokens)

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.rows} rows" + (f" and {self.tokens} tokens" if self.tokens else "")


def micro_batches(
    rollouts: list[Rollout],
    limit: Limit,
    rows: list[int] | None = None,
    teacher_prompts: list[list[int]] | None = None,
    *,
    together: bool = False,
) -> list[list[int]]:
    """Return the rows of each micro-batch, the largest micro-batch and its longest row first.

    rows             those that are to be divided; None: all
    teacher_prompts  what the teacher reads before each rollout; None: there is none
    together         keep rows of one prompt beside each other, for those that share it

    The result is the same for the same lengths, whatever the tokens are.
    """
    sizes = {}
    for row in range(len(rollouts)) if rows is None else rows:
        completion = len(rollouts[row].completion_ids)
        teacher = len(teacher_prompts[row]) + completion if teacher_prompts else 0
        sizes[row] = (len(rollouts[row].prompt_ids) + completion, teacher)

    batches: list[list[int]] = []
    # By the student's length first: what the backward pass needs is kept of the student's rows.
    order = sorted(sizes, key=lambda row: sizes[row], reverse=True)
    if together:
        first: dict[tuple[int, ...], int] = {}  # where a prompt's longest row stands
        for place, row in enumerate(order):
            first.setdefault(tuple(rollouts[row].prompt_ids), place)
        order.sort(key=lambda row: first[tuple(rollouts[row].prompt_ids)])
    for row in order:
        if not batches or not limit.holds([sizes[other] for other in [*batches[-1], row]]):
            batches.append([])
        batches[-1].append(row)

    # Under a budget, shorter rows may take more positions together than the longest ones do.
    def _positions(batch: list[int]) -> int:
        return len(batch) * max(max(sizes[row]) for row in batch)

    return sorted(batches, key=_positions, reverse=True)


def halve_until_it_fits(
    attempt: Callable[[Limit], Result], limit: Limit, start_again: Callable[[], None], rows: int
) -> tuple[Result, Limit]:
    """Return attempt(limit) and the limit with which memory sufficed: the given, or a smaller one.

    attempt      takes a step's rows in micro-batches; what it reads stays, so no token is sampled
                 twice
    start_again  undoes what a failed attempt left, such as a part of the gradient
    rows         of the step, as many as this rank has or more: half of a limit above them could be
                 the same attempt again
    """
    while True:
        try:
            return attempt(limit), limit
        except RuntimeError as error:
            if not is_out_of_memory(error) or min(limit.rows, rows) <= 1:
                raise
        # Not in the handler: there the traceback still holds the tensors of the failed attempt.
        start_again()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        limit = Limit(min(limit.rows, rows), limit.tokens).halved()
        said = f"out of memory: micro-batches of {limit} from here on; nothing is sampled again"
        say(Console(stderr=True), said)
