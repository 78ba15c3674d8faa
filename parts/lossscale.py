"""The loss scale of float16: its smallest gradients would be rounded to 0, so they are enlarged.

float16 holds nothing below 6e-8 and nothing above 65,504, where bfloat16 reaches as far as float32.
A token's gradient is one of the thousands that a step is the mean of, and much of it would vanish.
So the loss is multiplied before the backward pass, and the adapter's gradient, which is float32,
is divided after it, before its norm is measured. The factor is a power of two, which changes no
digit.

    too large a factor   something in the backward pass exceeds 65,504: the gradient is not finite,
                         the update is dropped, and the factor is halved
    too small a factor   nothing says so; after GROWTH updates in a row the factor is doubled

The factor and the updates since are in the log of every step, from which a stopped run goes on.
With float32 and bfloat16 there is no factor, and every function here leaves things as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIRST = 2.0**16  # falls to what fits within the first updates (torch's GradScaler has the same)
GROWTH = 100  # ours: the paper's runs have 100 steps, and a factor too large costs one of them
FACTOR = "update/loss_scale"
GOOD_UPDATES = "update/good_updates_at_scale"


@dataclass
class LossScale:
    """What the loss is multiplied by, as it changes during a run.

    factor         a power of two, at least 1
    good_updates   in a row, since the factor last changed
    moves          False: the factor is 1 and stays
    losses_finite  whether the losses since the last update were
    fell           whether the last update was dropped because the factor was too large
    """

    factor: float = 1.0
    good_updates: int = 0
    moves: bool = False
    losses_finite: bool = True
    fell: bool = False

    @classmethod
    def of(cls, dtype: torch.dtype) -> "LossScale":
        """Return the first one of a run whose model has this dtype."""
        return cls(FIRST, moves=True) if dtype == torch.float16 else cls()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, times the factor, to what is there."""
        if self.moves:
            self.losses_finite &= bool(loss.isfinite())
            loss = loss * self.factor
        loss.backward()

    def unscale(self, parameters: Sequence[Tensor]) -> None:
        """Divide the gradients by the factor, in place."""
        for parameter in parameters:
            if self.moves and parameter.grad is not None:
                parameter.grad.div_(self.factor)

    def adapt(self, finite: bool, losses_finite: bool) -> None:
        """Change the factor after an update, which was dropped unless the gradient was finite.

        losses_finite  of all ranks. A loss that is not finite has been so before it was multiplied:
                       then the factor is not to blame and stays, and so it does at 1

        >>> scale = LossScale(4.0, moves=True)
        >>> for finite, losses_finite in ((False, True), (True, True), (False, False)):
        ...     scale.adapt(finite, losses_finite)
        ...     print(scale.factor, scale.fell)
        2.0 True
        2.0 False
        2.0 False
        """
        self.fell = self.moves and not finite and losses_finite and self.factor > 1
        self.losses_finite = True
        if self.fell:
            self.factor /= 2
        if not finite:
            self.good_updates = 0
        elif self.moves:
            self.good_updates += 1
            if self.good_updates == GROWTH:
                self.factor *= 2
                self.good_updates = 0

    def metrics(self) -> dict[str, float | None]:
        """Return what a step logs of it: nothing where it does not move."""
        return {FACTOR: self.factor, GOOD_UPDATES: self.good_updates} if self.moves else {}

    def restore(self, logged: Mapping[str, Any]) -> None:
        """Go on from the metrics of a saved step; {} is the start of a run."""
        if self.moves and logged:
            self.factor = logged[FACTOR]
            self.good_updates = logged[GOOD_UPDATES]
