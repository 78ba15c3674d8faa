"""Sample completions from any Hugging Face causal LM, in batches, with a KV cache.

Read sample (the arguments), _decode (the loop), choose_tokens (logits to ids), in this order. Then
read on in parts/batch.py: the rows that decode together, and where their cache keeps what.

Not done: the model's generation_config is never read, no prompt is cut, the global random state is
never touched.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parts.batch import Batch, Row
from parts.copies import sampling_copies
from parts.family import check_family, check_modules, context_length
from parts.model import token_count
from parts.recipe import LEAST_TEMPERATURE

# Steps from one look at the chosen ids to the next, by device; elsewhere 1. A look waits for the
# device, and what a row generates past its end in between is thrown away.
LOOK_EVERY = {"cuda": 8}
# Candidates that are tried before a sort of the whole vocabulary.
FIRST_WIDTH = 256


def _require(fits: bool, what: str, valid: str) -> None:
    if not fits:
        raise ValueError(f"{what}; valid: {valid}")


@dataclass(frozen=True)
class SamplingParams:
    """Say how tokens are chosen. Raises ValueError on a value outside its range.

    max_new_tokens  tokens per completion, 1 or more; EOS counts
    temperature     1e-6 or more, divides the logits; 0 is greedy: always the most likely id, with
                    log-probs at temperature 1
    top_p           in (0, 1], keep the fewest most likely ids that reach this probability together
                    (the nucleus); 1 is off
    top_k           0 or more, keep so many most likely ids; 0 is off. Acts before top_p, which sees
                    their probabilities renormalised
    seed            with the prompt's and the sample's index it fixes a row's random stream
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}", "1 or more")
        _require(
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < float("inf"),
            f"temperature is {self.temperature}",
            f"0 (greedy), or {LEAST_TEMPERATURE:g} or more",
        )
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}", "above 0, up to 1 (off)")
        _require(self.top_k >= 0, f"top_k is {self.top_k}", "0 (off) or more")


@dataclass(frozen=True)
class Rollout:
    """One completion, with the log-probs that a training forward computes.

    completion_ids  EOS, when it was sampled, is the last
    logprobs        nats, one per completion id, under softmax(logits / temperature) over the whole
                    head: top_k, top_p and valid_ids choose ids but do not cut this distribution
    finish_reason   "stop": the last id is EOS; "length": max_new_tokens reached
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    finish_reason: str

    def cut(self, tokens: int) -> "Rollout":
        """Return the start of the completion, of so many tokens at most."""
        start = slice(tokens)
        return Rollout(self.prompt_ids, self.completion_ids[start], self.logprobs[start], "length")


def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    eos_ids: set[int],
    samples_per_prompt: int = 1,
    first_index: int = 0,
    max_rows: int | None = None,
    valid_ids: int | Iterable[int] | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[list[Rollout]]:
    """Sample completions: per prompt, in order, a list of samples_per_prompt rollouts.

    eos_ids      ids that end a row; may be empty
    max_rows     at most so many rows decode at once, and rows that end make room for waiting ones;
                 None: all at once
    valid_ids    ids that may be sampled: a count n for 0 to n - 1 (a head wider than its tokenizer)
                 or ids; None: all
    on_progress  called after each look at the rows, which on a CPU is each step, with (finished
                 rows, all rows, tokens generated so far)

    A row depends on the seed, its prompt's index (from first_index on) and its sample's, not on the
    rows beside it, up to float rounding. No gradient; afterwards each module trains or
    evaluates as before.
    ValueError: bad arguments, models that are not supported.
    """
    _check(model, prompts, params)
    _require(samples_per_prompt >= 1, f"samples_per_prompt is {samples_per_prompt}", "1 or more")
    _require(
        max_rows is None or max_rows >= 1,
        f"max_rows is {max_rows}",
        "1 or more, or None for all rows at once",
    )
    batch = Batch(model, params.max_new_tokens)
    allowed_V = _allowed_ids(valid_ids, eos_ids, batch.head.weight)
    # random.Random hashes its text with SHA-512: streams are unrelated, and the same everywhere.
    rows = [
        Row(tuple(ids), random.Random(f"{params.seed}/{index}/{number}"))
        for index, ids in enumerate(prompts, start=first_index)
        for number in range(samples_per_prompt)
    ]
    with _eval_mode(model), sampling_copies(model):
        steps = _decode(batch, rows, params, eos_ids, allowed_V, max_rows or len(rows))
        for finished, generated in steps:
            if on_progress is not None:
                on_progress(finished, len(rows), generated)
    rollouts = [
        Rollout(list(row.prompt_ids), row.completion_ids, row.logprobs, row.finish_reason)
        for row in rows
    ]
    return [
        rollouts[first : first + samples_per_prompt]
        for first in range(0, len(rows), samples_per_prompt)
    ]


def _check(model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams) -> None:
    check_family(model.config, "the model")
    check_modules(model, "the model")
    _require(
        model.config._attn_implementation in ("sdpa", "eager"),
        "unknown attention implementation",
        "sdpa, eager",
    )
    last_id = token_count(model) - 1
    limit = context_length(model.config)
    for index, ids in enumerate(prompts):
        _require(len(ids) > 0, f"prompt {index} is empty", "at least one id")
        _require(
            min(ids) >= 0 and max(ids) <= last_id,
            f"prompt {index} has an unknown id",
            f"0 to {last_id}",
        )
        _require(
            len(ids) + params.max_new_tokens <= limit,
            f"prompt {index} has {len(ids)} tokens and max_new_tokens is {params.max_new_tokens}",
            f"{limit} together (the model's context)",
        )


def _allowed_ids(
    valid_ids: int | Iterable[int] | None, eos_ids: set[int], head_VD: Tensor
) -> Tensor | None:
    """Return a bool mask over the head, True for ids that may be sampled; None if all may."""
    size = head_VD.shape[0]
    if valid_ids is None:
        valid_ids = size
    allowed = set(valid_ids if isinstance(valid_ids, Iterable) else range(valid_ids))
    _require(
        bool(allowed) and allowed <= set(range(size)),
        "valid_ids is empty or leaves the head",
        f"0 to {size - 1}",
    )
    _require(
        eos_ids <= allowed,
        f"eos ids {sorted(eos_ids - allowed)} are never sampled",
        f"up to {max(allowed)}",
    )
    if len(allowed) == size:
        return None
    allowed_V = torch.zeros(size, dtype=torch.bool)
    allowed_V[list(allowed)] = True
    return allowed_V.to(head_VD.device)


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within it, no dropout, and no gradient checkpointing, which would turn the cache off."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True  # train() would also reach children that were in eval mode


@torch.no_grad()
def _decode(
    batch: Batch,
    rows: list[Row],
    params: SamplingParams,
    eos_ids: set[int],
    allowed_V: Tensor | None,
    max_rows: int,
) -> Iterator[tuple[int, int]]:
    """Complete the rows in place; yield (finished rows, generated tokens) after each look."""
    look_every = LOOK_EVERY.get(batch.decoder.device.type, 1)
    # Longest first: neighbours need little padding and a lack of memory shows at once. Equal
    # prompts become neighbours.
    waiting = deque(sorted(rows, key=lambda row: (-len(row.prompt_ids), row.prompt_ids)))
    unfinished = 0
    generated = 0
    while waiting or unfinished:
        # An exchange copies the cache, about one step's time: it pays once an eighth of the rows
        # have finished.
        if 8 * unfinished <= 7 * len(batch.rows):
            batch.exchange(waiting, max_rows)
        steps = min(look_every, batch.tokens_left())
        ids_BS, logprob_BS = _choose(batch, steps, params, allowed_V)
        if not logprob_BS.isfinite().all():  # of one logit that is NaN or infinite, all are NaN
            raise FloatingPointError(
                "the model's logits are not finite: its weights are damaged, or were updated with "
                "too high an --lr"
            )
        looked_at = zip(batch.rows, ids_BS.tolist(), logprob_BS.tolist(), strict=True)
        for row, ids, logprobs in looked_at:
            generated += row.extend(ids, logprobs, eos_ids, params.max_new_tokens)
        unfinished = batch.unfinished()
        yield len(rows) - len(waiting) - unfinished, generated
        if unfinished:
            batch.step(ids_BS[:, -1])


def _choose(
    batch: Batch, steps: int, params: SamplingParams, allowed_V: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose so many ids for every row and append all but the last; return (ids_BS, logprob_BS).

    With top-k nothing is looked at in between, so a GPU is not waited for and always has work ahead
    of it. Without, it is asked after every token whether a row needs more ids than were sorted.
    """
    uniforms = [[row.stream.random() for _ in range(steps)] for row in batch.rows]
    device = batch.hidden_BD.device
    # Tokens are drawn in fp64, which Apple's GPUs do not have: there the CPU draws.
    place = torch.device("cpu") if device.type == "mps" else device
    uniform_BS = torch.tensor(uniforms, dtype=torch.float64).to(place)
    if allowed_V is not None:
        allowed_V = allowed_V.to(place)
    ids: list[Tensor] = []
    logprobs: list[Tensor] = []
    for number in range(steps):
        if ids:
            batch.step(ids[-1])
        ids_B, logprob_B = choose_tokens(
            batch.head(batch.hidden_BD).float().to(place),
            uniform_BS[:, number],
            allowed_V,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        )
        ids.append(ids_B.to(device))
        logprobs.append(logprob_B)
    return torch.stack(ids, dim=1), torch.stack(logprobs, dim=1)


def choose_tokens(
    logits_BV: Tensor,
    uniform_B: Tensor,
    allowed_V: Tensor | None,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Choose one id per row; return (ids_B, logprob_B).

    logits_BV  fp32, the head's output
    uniform_B  fp64 in [0, 1): the probabilities that are left after the cut are summed up, the most
               likely first; the id in whose stretch of the sum this point falls is chosen
    allowed_V  bool, False for ids that are never chosen; None: all may be
    logprob_B  fp32, nats, under softmax(logits / temperature) over all V; at temperature 1 when
               greedy (temperature 0)

    Top-p 0.6 keeps the probabilities 0.5 and 0.3, which become 0.625 and 0.375:
    >>> logits_BV = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(3, 3)
    >>> uniform_B = torch.tensor([0.0, 0.6, 0.7], dtype=torch.float64)
    >>> choose_tokens(logits_BV, uniform_B, None, temperature=1.0, top_p=0.6, top_k=0)[0].tolist()
    [0, 0, 2]
    """
    scaled_BV = logits_BV / (temperature or 1.0)
    total_B1 = scaled_BV.logsumexp(-1, keepdim=True)
    choice_BV = scaled_BV
    choice_total_B1 = total_B1
    if allowed_V is not None:
        choice_BV = scaled_BV.masked_fill(~allowed_V, float("-inf"))
        choice_total_B1 = choice_BV.logsumexp(-1, keepdim=True)

    if temperature == 0:
        ids_B = choice_BV.argmax(-1)
    elif top_k > 0:
        ids_B = _draw(choice_BV, None, uniform_B, top_p=top_p, width=top_k)
    else:
        ids_B = _draw(choice_BV, choice_total_B1, uniform_B, top_p=top_p, width=FIRST_WIDTH)
    return ids_B, (scaled_BV.gather(-1, ids_B[:, None]) - total_B1)[:, 0]


def _draw(
    scaled_BV: Tensor, total_B1: Tensor | None, uniform_B: Tensor, *, top_p: float, width: int
) -> Tensor:
    """Draw from the `width` most likely ids, cut to the nucleus of top_p; return ids_B.

    To sort the whole vocabulary is slow, and the nucleus rarely has more than some hundred ids.

    total_B1  log of the sum of all V weights: the width is then a guess, and rows that need more
              ids are drawn again from all of V. None: the width is the user's top-k, and the
              probabilities are renormalised over it.
    """
    size = scaled_BV.shape[-1]
    score_BK, candidate_BK = scaled_BV.topk(min(width, size))
    log_total_B1 = score_BK.logsumexp(-1, keepdim=True) if total_B1 is None else total_B1
    # fp64: a long fp32 sum rounds by as much as the tail that it decides.
    p_BK = (score_BK - log_total_B1).double().exp()
    cumulative_BK = p_BK.cumsum(-1)
    kept_BK = p_BK > 0
    point_B1 = uniform_B[:, None]
    if top_p < 1:
        # The id that crosses top_p stays, so at least one does.
        kept_BK &= cumulative_BK - p_BK < top_p
        point_B1 = point_B1 * (p_BK * kept_BK).sum(-1, keepdim=True)
    place_B1 = (cumulative_BK <= point_B1).sum(-1, keepdim=True)
    last_B1 = (kept_BK.sum(-1, keepdim=True) - 1).clamp(min=0)  # of NaN logits nothing is kept
    ids_B = candidate_BK.gather(-1, place_B1.clamp(max=last_B1))[:, 0]
    if total_B1 is not None and width < size:
        again_B = cumulative_BK[:, -1] <= (uniform_B if top_p == 1 else top_p)
        if again_B.any():
            ids_B[again_B] = _draw(
                scaled_BV[again_B], total_B1[again_B], uniform_B[again_B], top_p=top_p, width=size
            )
    return ids_B
