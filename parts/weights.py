"""How much each token counts: the weights of a completion's tokens, and EGRSD's credit.

Weights of one completion have the mean 1, so that they move a loss from some of its tokens to
others and do not change its size; and so a step may be split into micro-batches anyhow.

The formulas of the confidence gate and of the weights by position are ours: EGRSD (arXiv
2605.13255) published no gate that could be read, only that it falls with the teacher's entropy, has
a floor above zero, and in one form looks ahead for the least entropy.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from parts.recipe import Config


def token_weights(config: Config, stats: Mapping[str, Tensor], lengths: list[int]) -> Tensor | None:
    """Return weight_N of each token under these settings, or None where all count alike.

    stats    of a loss: "teacher_entropy_N" in nats, and the device of all tokens
    lengths  how many tokens each row has, one row after the other
    """
    if config.token_weight == "uniform" and config.loss_prefix == 1:
        return None
    entropy_N = stats["teacher_entropy_N"].detach()
    rows = []
    for entropy_C in entropy_N.split(lengths):
        weight_C = torch.ones_like(entropy_C)
        if config.token_weight == "confidence":
            weight_C = confidence(
                entropy_C,
                scale=config.gate_scale,
                floor=config.gate_floor,
                lookahead=config.gate_lookahead,
            )
        elif config.token_weight == "position":
            weight_C = by_position(len(entropy_C)).to(entropy_C)
        # The prefix is cut from what is weighted, and the rest of it has the mean 1 again.
        # 0.07 of 100 tokens is 7, and as a product of floats a little more than 7.
        prefix = math.ceil(round(config.loss_prefix * len(entropy_C), 9))
        weight_C[max(prefix, 1) :] = 0  # without any token there would be no mean
        rows.append(mean_one(weight_C))
    return torch.cat(rows) if rows else None


def confidence(entropy_C: Tensor, *, scale: float, floor: float, lookahead: int) -> Tensor:
    """Return the gate of a completion's tokens, max(floor, exp(-H_t / scale)); the formula is ours.

    entropy_C  H, the teacher's entropy at each token, in nats
    lookahead  H_t is the least entropy of token t and of so many tokens after it, as far as the
               completion goes: a single unsure token before sure ones keeps its weight

    >>> entropy_C = torch.tensor([0.0, 3.0, 0.0, 3.0, 3.0])
    >>> for lookahead in (0, 1):
    ...     weight_C = confidence(entropy_C, scale=1.0, floor=0.1, lookahead=lookahead)
    ...     print([round(weight, 2) for weight in weight_C.tolist()])
    [1.0, 0.1, 1.0, 0.1, 0.1]
    [1.0, 1.0, 1.0, 0.1, 0.1]
    """
    least_C = entropy_C
    for distance in range(1, min(lookahead, len(entropy_C) - 1) + 1):
        later_C = entropy_C[distance:]
        least_C = torch.cat([torch.minimum(least_C[:-distance], later_C), least_C[-distance:]])
    return (-least_C / scale).exp().clamp(min=floor)


def by_position(length: int) -> Tensor:
    """Return weights that fall evenly along a completion, from nearly 2 to nearly 0; ours.

    The control of the gate: as unequal, and blind to what the teacher thinks.

    >>> by_position(4).tolist()
    [1.75, 1.25, 0.75, 0.25]
    """
    place_C = torch.arange(length, dtype=torch.float32)
    return 2 * (length - place_C - 0.5) / length


def mean_one(weight_C: Tensor) -> Tensor:
    """Return the weights divided by their mean; equal ones become exactly 1."""
    # The largest is taken out first: 0.3 / mean(0.3, ...) need not be 1 in floats, 1 / 1 is.
    weight_C = weight_C / weight_C.max()
    return weight_C / weight_C.mean()


def credit(advantage_N: Tensor, log_ratio_N: Tensor, *, mix: float, clip: float) -> Tensor:
    """Return what each token's advantage is multiplied by: never below 0, so no sign flips.

    advantage_N  the advantage A of the completion that a token stands in
    log_ratio_N  log p - log q of the token, under teacher and student: above 0 where the teacher,
                 who reads more, finds it likelier
    The core of RLSD, as EGRSD has it: (1 - mix) + mix clamp((p / q)^sign(A), 1 - clip, 1 + clip).
    A right completion's tokens count for more where the teacher agrees, a wrong one's where not.

    >>> advantage_N = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    >>> log_ratio_N = torch.tensor([0.7, -0.7, 0.7, -0.7, 0.7])
    >>> [round(x, 2) for x in credit(advantage_N, log_ratio_N, mix=0.5, clip=0.2).tolist()]
    [1.1, 0.9, 0.9, 1.1, 1.0]
    """
    # Within these bounds exp fits fp32, and 0 times an infinite ratio would be nan.
    bounded_N = log_ratio_N.detach().clamp(-80, 80)
    agreement_N = (advantage_N.sign() * bounded_N).exp()
    return 1 + mix * (agreement_N.clamp(1 - clip, 1 + clip) - 1)
