"""Sample completions from any Hugging Face causal LM, in batches, with a KV cache and nothing hidden.

Read sample (the arguments), _decode (the loop), _Batch (rows that decode together), choose_tokens (logits to ids).

A batch of three rows with prompts (p) of 4, 2 and 3 tokens after two steps (c); a dot is masked:
    column 0 1 2 3 4 5
           p p p p c c    start 0
           . . p p c c    start 2: its column 4 is its position 2
           . p p p c c    start 1
All rows end at one column, so a step writes one column. Keys carry their true rotary position wherever they stand.
Not done: the model's generation_config is never read, no prompt is cut, the global random state is never touched.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

GROWTH_COLUMNS = 256  # a full cache is copied once per so many tokens
PREFILL_TOKENS = (
    512  # padded prompt tokens in one prefill forward: bounds its memory, and the padding as well
)
ONEDNN_PRODUCTS = (
    2**22
)  # multiplications in a layer from which oneDNN saves more than the two copies around it cost
FIRST_WIDTH = 256  # candidates tried before a sort of the whole vocabulary
LOGIT_SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
)  # Gemma, Cohere, Granite: after the head


def _require(fits: bool, what: str, valid: str) -> None:
    if not fits:
        raise ValueError(f"{what}; valid: {valid}")


@dataclass(frozen=True)
class SamplingParams:
    """Say how tokens are chosen. Raises ValueError on a value outside its range."""

    max_new_tokens: int  # tokens per completion, >= 1; EOS counts
    temperature: float = (
        1.0  # >= 0, divides the logits; 0 is greedy, with log-probs at temperature 1
    )
    top_p: float = (
        1.0  # in (0, 1], keep the fewest most likely ids that reach this probability; 1 is off
    )
    top_k: int = 0  # >= 0, keep so many most likely ids, before top_p, which sees them renormalised; 0 is off
    seed: int = 0  # with the prompt's and the sample's index it fixes a row's random stream

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}", "1 or more")
        _require(
            0 <= self.temperature < float("inf"),
            f"temperature is {self.temperature}",
            "0 (greedy) or more",
        )
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}", "above 0, up to 1 (off)")
        _require(self.top_k >= 0, f"top_k is {self.top_k}", "0 (off) or more")


@dataclass(frozen=True)
class Rollout:
    """One completion; its logprobs are those a training forward computes, not cut by top_k, top_p or valid_ids."""

    prompt_ids: list[int]
    completion_ids: list[int]  # EOS, when sampled, is the last
    logprobs: list[
        float
    ]  # nats, one per completion id, under softmax(logits / temperature) over the whole head
    finish_reason: str  # "stop": the last id is EOS; "length": max_new_tokens reached


@dataclass
class _Row:
    prompt_ids: tuple[int, ...]
    stream: random.Random
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""  # empty while the row generates


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
    max_rows     at most so many rows decode at once, and rows that end make room for waiting ones; None: all at once
    valid_ids    ids that may be sampled: a count n for 0 to n - 1 (a head wider than its tokenizer) or ids; None: all
    on_progress  called after every step with (finished rows, all rows, tokens generated so far)

    A row depends on the seed, its prompt's index (from first_index on) and its sample's, not on the rows beside it, up
    to float rounding. No gradient; each module's own mode is put back. ValueError: bad arguments, models not supported.
    """
    _check(model, prompts, params)
    _require(samples_per_prompt >= 1, f"samples_per_prompt is {samples_per_prompt}", "1 or more")
    _require(
        max_rows is None or max_rows >= 1,
        f"max_rows is {max_rows}",
        "1 or more, or None for all rows at once",
    )
    batch = _Batch(model)
    allowed_V = _allowed_ids(valid_ids, eos_ids, batch.head.weight)
    # random.Random hashes its text with SHA-512: streams are unrelated, and the same on every machine.
    rows = [
        _Row(tuple(ids), random.Random(f"{params.seed}/{index}/{number}"))
        for index, ids in enumerate(prompts, start=first_index)
        for number in range(samples_per_prompt)
    ]
    onednn = (
        torch.backends.mkldnn.is_available()
        and model.device.type == "cpu"
        and model.dtype == torch.float32
    )
    onednn &= (
        model.num_parameters() >= ONEDNN_PRODUCTS
    )  # asked at every operation, it would slow a small model
    training = [module for module in model.modules() if module.training]
    model.eval()  # no dropout, and no gradient checkpointing, which would switch the cache off
    try:
        with _OneDNN() if onednn else nullcontext():
            for finished, generated in _decode(
                batch, rows, params, eos_ids, allowed_V, max_rows or len(rows)
            ):
                if on_progress is not None:
                    on_progress(finished, len(rows), generated)
    finally:
        for module in training:
            module.training = True  # train() would also reach children that were in eval mode
    rollouts = [
        Rollout(list(row.prompt_ids), row.completion_ids, row.logprobs, row.finish_reason)
        for row in rows
    ]
    return [
        rollouts[first : first + samples_per_prompt]
        for first in range(0, len(rows), samples_per_prompt)
    ]


def _check(model: PreTrainedModel, prompts: list[list[int]], params: SamplingParams) -> None:
    settings = model.config.to_dict()
    # Mistral's configuration has a window but no list of layer types.
    kinds = settings.get("layer_types") or [
        "sliding_attention" if settings.get("sliding_window") else "full_attention"
    ]
    _require(
        set(kinds) == {"full_attention"},
        f"the model's layers are {sorted(set(kinds))}",
        "full_attention only",
    )
    _require(
        model.config._attn_implementation in ("sdpa", "eager"),
        "unknown attention implementation",
        "sdpa, eager",
    )
    for name in LOGIT_SCALES:
        _require(
            settings.get(name) in (None, 1),
            f"{name} is {settings.get(name)}",
            "logits as the head puts them out",
        )
    last_id, limit = (
        settings["vocab_size"] - 1,
        settings.get("max_position_embeddings", float("inf")),
    )
    for index, ids in enumerate(prompts):
        _require(len(ids) > 0, f"prompt {index} is empty", "at least one id")
        _require(
            min(ids) >= 0 and max(ids) <= last_id,
            f"prompt {index} has an unknown id",
            f"0 to {last_id}",
        )
        lengths = (
            f"prompt {index} has {len(ids)} tokens and max_new_tokens is {params.max_new_tokens}"
        )
        _require(
            len(ids) + params.max_new_tokens <= limit,
            lengths,
            f"{limit} together (max_position_embeddings)",
        )


def _allowed_ids(
    valid_ids: int | Iterable[int] | None, eos_ids: set[int], head_VD: Tensor
) -> Tensor:
    """Return a bool mask over the head: the ids that may be sampled."""
    size = head_VD.shape[0]
    allowed = set(
        valid_ids
        if isinstance(valid_ids, Iterable)
        else range(size if valid_ids is None else valid_ids)
    )
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
    return (
        torch.zeros(size, dtype=torch.bool)
        .index_fill(0, torch.tensor(list(allowed)), True)
        .to(head_VD.device)
    )


@torch.no_grad()
def _decode(
    batch: "_Batch",
    rows: list[_Row],
    params: SamplingParams,
    eos_ids: set[int],
    allowed_V: Tensor,
    max_rows: int,
) -> Iterator[tuple[int, int]]:
    """Complete the rows in place; yield (finished rows, generated tokens) after each step."""
    # Longest first: neighbours need little padding and a lack of memory shows at once. Equal prompts become neighbours.
    waiting = deque(sorted(rows, key=lambda row: (-len(row.prompt_ids), row.prompt_ids)))
    while waiting or batch._unfinished:
        # An exchange copies the cache, about one step's time: it pays once an eighth of the rows have finished.
        if 8 * batch._unfinished <= 7 * len(batch.rows):
            batch.exchange(waiting, max_rows)
        logits_BV = batch.head(batch.hidden_BD).float()
        uniform_B = torch.tensor(
            [row.stream.random() for row in batch.rows], dtype=torch.float64
        ).to(logits_BV.device)
        ids_B, logprob_B = choose_tokens(
            logits_BV,
            uniform_B,
            allowed_V,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        )
        for row, token, logprob in zip(batch.rows, ids_B.tolist(), logprob_B.tolist(), strict=True):
            if not row.finish_reason:
                row.completion_ids.append(token)
                row.logprobs.append(logprob)
                full = len(row.completion_ids) == params.max_new_tokens
                row.finish_reason = "stop" if token in eos_ids else "length" if full else ""
        yield (
            len(rows) - len(waiting) - batch._unfinished,
            sum(len(row.completion_ids) for row in rows),
        )
        if batch._unfinished:
            batch.step(ids_B)


@dataclass
class _History:
    layers: list[
        Any
    ]  # transformers' cache layers, whose keys and values are [rows, heads, columns, head size]
    row: int  # where this row's keys and values lie in them
    columns: slice
    hidden_D: Tensor  # the final hidden state of the last id


class _Batch:
    """The rows that decode together; one that has finished stays, its ids unused, until the next exchange."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder = model.get_decoder()
        self.head: Any = model.get_output_embeddings()
        self.cache = Cache(layers=[DynamicLayer() for _ in range(model.config.num_hidden_layers)])
        self.rows: list[_Row] = []
        self.starts: list[int] = []  # each row's first column; those before it are masked
        self.hidden_BD = torch.empty(0)  # predicts each row's next id
        self.prompts: dict[
            tuple[int, ...], _History
        ] = {}  # prefilled, and still needed by a waiting row

    @property
    def _unfinished(self) -> int:
        return sum(not row.finish_reason for row in self.rows)

    def exchange(self, waiting: deque[_Row], max_rows: int) -> None:
        """Drop finished rows, take rows from the left of waiting, and right-align them all in one cache."""
        kept = [index for index, row in enumerate(self.rows) if not row.finish_reason]
        admitted = [waiting.popleft() for _ in range(min(len(waiting), max_rows - len(kept)))]
        self._prefill(
            [
                ids
                for ids in dict.fromkeys(row.prompt_ids for row in admitted)
                if ids not in self.prompts
            ]
        )
        layers, column = self.cache.layers, self.cache.get_seq_length()
        histories = [
            _History(layers, row, slice(self.starts[row], column), self.hidden_BD[row])
            for row in kept
        ]
        histories += [self.prompts[row.prompt_ids] for row in admitted]

        for index in range(len(layers)):
            keys = [
                old.layers[index].keys[old.row, :, old.columns].transpose(0, 1) for old in histories
            ]
            values = [
                old.layers[index].values[old.row, :, old.columns].transpose(0, 1)
                for old in histories
            ]
            layers[index] = _GrowingLayer(
                keys, values
            )  # now, since a whole second cache would double the peak memory
        lengths = [old.columns.stop - old.columns.start for old in histories]
        self.starts = [max(lengths) - length for length in lengths]
        self.hidden_BD = torch.stack([old.hidden_D for old in histories])
        self.rows = [self.rows[index] for index in kept] + admitted
        self.prompts = {
            ids: self.prompts[ids]
            for ids in self.prompts.keys() & {row.prompt_ids for row in waiting}
        }

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Compute each prompt's keys, values and last hidden state; the prompts come longest first."""
        while prompts:
            longest = len(prompts[0])
            count = max(1, PREFILL_TOKENS // longest)
            group, prompts = prompts[:count], prompts[count:]
            # Pads stand behind the prompt, where causal attention hides them from its tokens: no mask is needed.
            ids_BP = torch.tensor(
                [[*ids, *[0] * (longest - len(ids))] for ids in group], device=self.decoder.device
            )
            cache = DynamicCache()
            hidden_BPD = self.decoder(
                input_ids=ids_BP, past_key_values=cache, use_cache=True
            ).last_hidden_state
            for index, ids in enumerate(group):
                last_D = hidden_BPD[
                    index, len(ids) - 1
                ].clone()  # a view would keep all of hidden_BPD alive
                self.prompts[ids] = _History(cache.layers, index, slice(0, len(ids)), last_D)

    def step(self, ids_B: Tensor) -> None:
        """Append one id to every row and compute the hidden states that follow."""
        column = self.cache.get_seq_length()
        start_B1 = torch.tensor(self.starts, device=ids_B.device)[:, None]
        mask_B11T = None
        if any(self.starts):
            # Additive, as eager attention adds a mask: True and False would count as 1 and 0.
            padding_B11T = (torch.arange(column + 1, device=ids_B.device) < start_B1)[:, None, None]
            mask_B11T = torch.finfo(self.hidden_BD.dtype).min * padding_B11T.to(
                self.hidden_BD.dtype
            )
        where = {
            "position_ids": column - start_B1,
            "attention_mask": mask_B11T,
            "past_key_values": self.cache,
        }
        self.hidden_BD = self.decoder(
            input_ids=ids_B[:, None], **where, use_cache=True
        ).last_hidden_state[:, 0]


class _GrowingLayer(DynamicLayer):
    """One layer's keys and values, from each row's [length, heads, head size], with room for the columns to come.

    transformers' DynamicLayer copies the whole cache for every token; this one writes the new column in place.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        # Padded with zeros: a masked column has weight 0, but 0 times a stray NaN would be NaN.
        self.keys: Tensor = pad_sequence(keys, batch_first=True, padding_side="left").transpose(
            1, 2
        )
        self.values: Tensor = pad_sequence(values, batch_first=True, padding_side="left").transpose(
            1, 2
        )
        self.filled = self.keys.shape[2]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns; return, as views, all that are filled."""
        column, self.filled = self.filled, self.filled + key_states.shape[2]
        if self.filled > self.keys.shape[2]:
            self.keys, self.values = (
                nn.functional.pad(x, (0, 0, 0, GROWTH_COLUMNS)) for x in (self.keys, self.values)
            )
        self.keys[:, :, column : self.filled] = key_states
        self.values[:, :, column : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Return the filled columns, not the allocated ones."""
        return self.filled


class _OneDNN(TorchFunctionMode):
    """Within it, large linear layers are oneDNN's: MKL, which torch takes for fp32, is half as fast on AMD's CPUs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (
            func is nn.functional.linear
            and not kwargs
            and args[0].numel() * len(args[1]) >= ONEDNN_PRODUCTS
        ):
            return func(
                args[0].to_mkldnn(), *args[1:]
            ).to_dense()  # linear goes by its input's layout
        return func(*args, **(kwargs or {}))


def choose_tokens(
    logits_BV: Tensor,
    uniform_B: Tensor,
    allowed_V: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Choose one id per row; return (ids_B, logprob_B).

    logits_BV  fp32, the head's output
    uniform_B  fp64 in [0, 1): where to invert the cumulative truncated distribution, most likely id first
    allowed_V  bool, False for ids that are never chosen
    logprob_B  fp32, nats, under softmax(logits / temperature) over all V; at temperature 1 when greedy (temperature 0)

    Top-p 0.6 keeps the probabilities 0.5 and 0.3, which become 0.625 and 0.375:
    >>> logits_BV, allowed_V = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(3, 3), torch.tensor([True, True, True])
    >>> uniform_B = torch.tensor([0.0, 0.6, 0.7], dtype=torch.float64)
    >>> choose_tokens(logits_BV, uniform_B, allowed_V, temperature=1.0, top_p=0.6, top_k=0)[0].tolist()
    [0, 0, 2]
    """
    scaled_BV = logits_BV / (temperature or 1.0)
    choice_BV = scaled_BV.masked_fill(~allowed_V, float("-inf"))
    if temperature == 0:
        ids_B = choice_BV.argmax(-1)
    else:
        ids_B = _draw(
            choice_BV, uniform_B, top_p=top_p, width=top_k or FIRST_WIDTH, renormalise=top_k > 0
        )
    return ids_B, scaled_BV.gather(-1, ids_B[:, None])[:, 0] - scaled_BV.logsumexp(-1)


def _draw(
    scaled_BV: Tensor, uniform_B: Tensor, *, top_p: float, width: int, renormalise: bool
) -> Tensor:
    """Draw from the `width` most likely ids, cut to the nucleus of top_p.

    The width is the user's top-k, renormalised, or a guess: then rows that need more ids are drawn again from all of V.
    """
    size = scaled_BV.shape[-1]
    score_BK, candidate_BK = scaled_BV.topk(min(width, size))
    total_B1 = (score_BK if renormalise else scaled_BV).logsumexp(-1, keepdim=True)
    p_BK = (
        (score_BK - total_B1).double().exp()
    )  # fp64: a long fp32 sum rounds by as much as the tail it decides
    cumulative_BK = p_BK.cumsum(-1)
    kept_BK = p_BK > 0
    point_B1 = uniform_B[:, None]
    if top_p < 1:
        kept_BK &= (
            cumulative_BK - p_BK < top_p
        )  # the id that crosses top_p stays, so at least one does
        point_B1 = point_B1 * (p_BK * kept_BK).sum(-1, keepdim=True)
    place_B1 = (cumulative_BK <= point_B1).sum(-1, keepdim=True)
    ids_B = candidate_BK.gather(-1, place_B1.clamp(max=kept_BK.sum(-1, keepdim=True) - 1))[:, 0]
    if not renormalise and width < size:
        again_B = cumulative_BK[:, -1] <= (uniform_B if top_p == 1 else top_p)
        if again_B.any():
            ids_B[again_B] = _draw(
                scaled_BV[again_B], uniform_B[again_B], top_p=top_p, width=size, renormalise=False
            )
    return ids_B
