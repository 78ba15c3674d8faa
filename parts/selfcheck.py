"""Check, on the model at hand and before anything is written, that it is read as its authors mean.

Sampling and scoring take short ways through a model: they multiply hidden states by the head, share
a cache between rows of different lengths, and leave pads unmasked. A family that these ways do not
fit runs all the same, and its numbers are wrong. So the model is asked on a few tokens: what it
says the plain way is compared with what it says our ways.
"""

from collections.abc import Iterator
from math import isfinite

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parts.batch import PLAIN_STEPS
from parts.machine import is_out_of_memory
from parts.model import final_hidden, head_weight, token_count
from parts.packing import packed_hidden
from parts.prefixes import KeptPrompts
from parts.sampler import SamplingParams, sample

# Lengths of the two prompts: enough for padding.
LENGTHS = (9, 4)
# Tokens after each: the prompt's own, those of steps that run as they are, that of a step which a
# GPU records, and that of its replay.
NEW_TOKENS = 3 + PLAIN_STEPS


@torch.no_grad()
def check_model(model: PreTrainedModel, name: str) -> None:
    """Raise ValueError, in one line, for a model that is sampled or scored other than it means.

    name  what the message calls the model

    Five comparisons: hidden states times the head are the model's own logits; two prompts of
    different lengths through the sampler, alone and beside each other, have the log-probs of a
    plain forward pass; so has a completion behind a kept prompt, and so has the second of two that
    are packed behind one; and two passes in training mode agree. About a dozen passes over a dozen
    tokens.
    The global random state stays as it was, and so do the modes of the modules.
    """
    called = f"{name} ({model.config.model_type})"
    # What rounding does grows with the logits, so differences are compared with their spread.
    tolerance = 2 * torch.finfo(model.dtype).eps ** 0.5
    try:
        for what, difference, spread in _differences(model):
            if model.dtype == torch.float16 and not isfinite(spread):
                raise ValueError(
                    f"{called} cannot be used: its numbers leave float16's range; "
                    "valid: --dtype float32 or bfloat16"
                )
            if not difference <= tolerance * spread:  # NaN is refused, too
                raise ValueError(
                    f"{called} cannot be used: {what} differ by {difference:.2g} nats, "
                    f"where rounding explains {tolerance * spread:.2g}"
                )
    # A family's own code can fail in any way when it is called as it does not expect.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{called} cannot be used: its code fails with {reason}") from error


def _differences(model: PreTrainedModel) -> Iterator[tuple[str, float, float]]:
    """Yield what was compared, by how many nats it differs, and the spread of the logits there."""
    vocabulary = token_count(model)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(vocabulary, (sum(LENGTHS) + 1,), generator=generator).tolist()
    prompts = [draws[: LENGTHS[0]], draws[LENGTHS[0] : -1]]
    # One id is allowed, so that rounding cannot choose another where rows stand otherwise.
    token = min(draws[-1], head_weight(model).shape[0] - 1)
    logits = [_plain_logits(model, prompt + [token] * NEW_TOKENS) for prompt in prompts]
    spread = float(torch.cat(logits).std(-1).mean())

    ids_BT = torch.zeros(2, len(logits[0]), dtype=torch.long, device=model.device)
    for row, prompt in enumerate(prompts):
        ids = prompt + [token] * NEW_TOKENS
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    first, second = (_training_logits(model, ids_BT) for _ in range(2))
    for row, plain in enumerate(logits):
        apart = _apart(model, first[row, : len(plain)], plain)
        yield "hidden states times the head and the model's own logits", apart, spread
    yield "two passes in training mode", float((first - second).abs().max()), spread

    plain = [
        row[length - 1 : -1].log_softmax(-1)[:, token]
        for row, length in zip(logits, LENGTHS, strict=True)
    ]
    alone = [_sampled(model, [prompt], token)[0] for prompt in prompts]
    beside = _sampled(model, prompts, token)
    for row in range(2):
        own = plain[row].cpu()
        apart = _apart(model, alone[row], own)
        yield "log-probs of a sampled row and of a plain pass", apart, spread
        apart = _apart(model, beside[row], own)
        yield "log-probs of a row sampled beside another and of a plain pass", apart, spread

    behind_ND = KeptPrompts().completion_hidden(model, prompts, [[token] * NEW_TOKENS] * 2)
    behind_NV = nn.functional.linear(behind_ND, head_weight(model)).float()
    own_NV = torch.cat([row[length - 1 : -1] for row, length in zip(logits, LENGTHS, strict=True)])
    yield (
        "logits behind a kept prompt and of a plain pass",
        _apart(model, behind_NV, own_NV),
        spread,
    )

    packed_ND = packed_hidden(model, prompts[:1] * 2, [[token] * NEW_TOKENS] * 2)
    second_ND = packed_ND[NEW_TOKENS:]  # stands behind the first completion and must not see it
    second_NV = nn.functional.linear(second_ND, head_weight(model)).float()
    yield (
        "logits of a completion packed behind another and of a plain pass",
        _apart(model, second_NV, logits[0][LENGTHS[0] - 1 : -1]),
        spread,
    )


def _apart(model: PreTrainedModel, ours: Tensor, own: Tensor) -> float:
    """Return the largest difference; of the middle token where precision is low.

    There, rounding may send a token of a mixture to other experts, which is no mistake of ours.
    What a family means otherwise shows at nearly every token.
    """
    apart_T = (ours - own).abs().reshape(len(own), -1).amax(-1)
    return float(apart_T.max() if model.dtype == torch.float32 else apart_T.median())


def _plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Return the model's own logits of one row, fp32."""
    ids_1T = torch.tensor([ids], device=model.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0].float()


def _training_logits(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Return logits as training computes them, fp32, in training mode and with pads at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        hidden_BTD = final_hidden(model, ids_BT)
    finally:
        for module, mode in modes:
            module.training = mode
    return nn.functional.linear(hidden_BTD, head_weight(model)).float()


def _sampled(model: PreTrainedModel, prompts: list[list[int]], token: int) -> list[Tensor]:
    """Return each row's log-probs of NEW_TOKENS times the one token, through the sampler."""
    params = SamplingParams(NEW_TOKENS)
    groups = sample(model, prompts, params, eos_ids=set(), valid_ids=[token])
    return [torch.tensor(rollout.logprobs) for (rollout,) in groups]
