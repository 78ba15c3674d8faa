"""The rows that decode together, and their KV cache.

A KV cache keeps every layer's keys and values of the tokens so far, so that a step computes one
token a row instead of the whole text again. Computing those of the prompts is called prefill.

A batch of three rows with prompts (p) of 4, 2 and 3 tokens after two steps (c); a dot is masked:
    column 0 1 2 3 4 5
           p p p p c c    start 0
           . . p p c c    start 2: its column 4 is its position 2
           . p p p c c    start 1
All rows end at one column, so a step writes one column. Keys carry their true rotary position
wherever they stand.

Read Batch (its exchange brings rows in and takes them out, its step appends a token to each), then
_GrowingLayer (where the columns lie in memory). What is appended, parts.sampler chooses.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# A cache has room for at most so many columns to come. When they are full, it is copied once.
GROWTH_COLUMNS = 256
# Padded prompt tokens in one prefill forward: bounds its memory, and the padding as well.
PREFILL_TOKENS = 512


@dataclass
class Row:
    """One completion as it grows.

    stream         draws this row's random numbers, one a step, whatever stands beside it
    logprobs       nats, one per completion id
    finish_reason  as in parts.sampler.Rollout; empty while the row generates
    """

    prompt_ids: tuple[int, ...]
    stream: random.Random
    completion_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def append(self, token: int, logprob: float, eos_ids: set[int], max_new_tokens: int) -> None:
        """Add a token, and see whether it is the last."""
        self.completion_ids.append(token)
        self.logprobs.append(logprob)
        if token in eos_ids:
            self.finish_reason = "stop"
        elif len(self.completion_ids) == max_new_tokens:
            self.finish_reason = "length"


@dataclass
class _History:
    """What a row needs to go on: where its keys and values lie, and its last hidden state.

    layers    transformers' cache layers: keys and values are [rows, heads, columns, head size]
    row       the row of them that is meant
    columns   the columns of it that are no padding
    hidden_D  the final hidden state of the last id
    """

    layers: list[Any]
    row: int
    columns: slice
    hidden_D: Tensor

    def keys(self, layer: int) -> Tensor:
        """Return a layer's keys as [heads, length, head size]."""
        return self.layers[layer].keys[self.row, :, self.columns]

    def values(self, layer: int) -> Tensor:
        """Return a layer's values as [heads, length, head size]."""
        return self.layers[layer].values[self.row, :, self.columns]


class Batch:
    """The rows that decode together.

    A row that has finished stays, its ids unused, until the next exchange.

    max_new_tokens  of every row: bounds the columns that are allocated
    rows            those of the last exchange, in the order of every tensor's rows
    head            the model's output layer, which makes logits of hidden_BD
    hidden_BD       final hidden states, each of which predicts its row's next id
    """

    def __init__(self, model: PreTrainedModel, max_new_tokens: int) -> None:
        self.decoder = model.get_decoder()
        self.head: Any = model.get_output_embeddings()
        self.max_new_tokens = max_new_tokens
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[DynamicLayer() for _ in range(layers)])
        self.rows: list[Row] = []
        self.starts: list[int] = []  # each row's first column; those before it are masked
        self.position_B1 = torch.empty(0)  # of the id that the next step appends
        self.mask_B11T: Tensor | None = None  # what is added to attention scores; None: no padding
        self.hidden_BD = torch.empty(0)
        # Prompts that are prefilled, and still needed by a waiting row.
        self.prompts: dict[tuple[int, ...], _History] = {}

    def unfinished(self) -> int:
        """Return how many rows still generate."""
        return sum(not row.finish_reason for row in self.rows)

    def exchange(self, waiting: deque[Row], max_rows: int) -> None:
        """Drop finished rows, take rows from the left of waiting, right-align all in one cache.

        waiting   longest prompts first, of one id or more; what is taken is gone from it
        max_rows  rows there may be afterwards
        """
        kept = [index for index, row in enumerate(self.rows) if not row.finish_reason]
        admitted = [waiting.popleft() for _ in range(min(len(waiting), max_rows - len(kept)))]
        distinct = dict.fromkeys(row.prompt_ids for row in admitted)
        self._prefill([ids for ids in distinct if ids not in self.prompts])

        layers = self.cache.layers
        column = self.cache.get_seq_length()
        histories = [
            _History(layers, row, slice(self.starts[row], column), self.hidden_BD[row])
            for row in kept
        ]
        histories += [self.prompts[row.prompt_ids] for row in admitted]
        self.rows = [self.rows[index] for index in kept] + admitted

        # The last token of a completion is never fed back, so it needs no column.
        steps = self.max_new_tokens - 1 - min(len(row.completion_ids) for row in self.rows)
        for index in range(len(layers)):
            # One layer after the other, since a whole second cache would double the peak memory.
            layers[index] = _GrowingLayer(
                [old.keys(index) for old in histories],
                [old.values(index) for old in histories],
                room=min(steps, GROWTH_COLUMNS),
            )
        self.hidden_BD = torch.stack([old.hidden_D for old in histories])
        lengths = [old.columns.stop - old.columns.start for old in histories]
        self._align(lengths, columns=max(lengths) + steps)
        still_needed = {row.prompt_ids for row in waiting}
        self.prompts = {ids: old for ids, old in self.prompts.items() if ids in still_needed}

    def _align(self, lengths: list[int], columns: int) -> None:
        """Set each row's start and position, and the mask for so many columns."""
        self.starts = [max(lengths) - length for length in lengths]
        self.position_B1 = torch.tensor(lengths, device=self.hidden_BD.device)[:, None]
        self.mask_B11T = None
        if any(self.starts):
            start_B111 = torch.tensor(self.starts, device=self.hidden_BD.device)[
                :, None, None, None
            ]
            padding_B11T = torch.arange(columns, device=self.hidden_BD.device) < start_B111
            # Additive, as eager attention adds a mask: True and False would count as 1 and 0.
            dtype = self.hidden_BD.dtype
            self.mask_B11T = torch.finfo(dtype).min * padding_B11T.to(dtype)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Compute each prompt's keys, values and last hidden state; prompts come longest first."""
        while prompts:
            longest = len(prompts[0])
            count = max(1, PREFILL_TOKENS // longest)
            group = prompts[:count]
            prompts = prompts[count:]
            # Pads stand behind the prompt, where causal attention hides them from its tokens: no
            # mask is needed.
            padded = [[*ids, *[0] * (longest - len(ids))] for ids in group]
            ids_BP = torch.tensor(padded, device=self.decoder.device)
            cache = DynamicCache()
            output = self.decoder(input_ids=ids_BP, past_key_values=cache, use_cache=True)
            hidden_BPD = output.last_hidden_state
            for index, ids in enumerate(group):
                # A view would keep all of hidden_BPD alive.
                last_D = hidden_BPD[index, len(ids) - 1].clone()
                self.prompts[ids] = _History(cache.layers, index, slice(0, len(ids)), last_D)

    def step(self, ids_B: Tensor) -> None:
        """Append one id to every row's columns and compute the hidden states that follow."""
        columns = self.cache.get_seq_length() + 1
        mask_B11T = self.mask_B11T
        if mask_B11T is not None:
            # Contiguous: attention on a GPU refuses some strides.
            mask_B11T = mask_B11T[..., :columns].contiguous()
        output = self.decoder(
            input_ids=ids_B[:, None],
            position_ids=self.position_B1,
            attention_mask=mask_B11T,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden_BD = output.last_hidden_state[:, 0]
        self.position_B1 = self.position_B1 + 1


class _GrowingLayer(DynamicLayer):
    """One layer's keys and values, with room for the columns to come.

    transformers' DynamicLayer copies the whole cache for every token; this one writes the new
    column in place.

    keys, values  a tensor a row, [heads, length, head size]
    room          columns that are allocated behind them
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], *, room: int) -> None:
        super().__init__()
        self.keys: Tensor = _right_aligned(keys, room)
        self.values: Tensor = _right_aligned(values, room)
        self.filled = self.keys.shape[2] - room
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns; return, as views, all that are filled."""
        column = self.filled
        self.filled = column + key_states.shape[2]
        if self.filled > self.keys.shape[2]:
            self.keys = _right_aligned(list(self.keys), GROWTH_COLUMNS)
            self.values = _right_aligned(list(self.values), GROWTH_COLUMNS)
        self.keys[:, :, column : self.filled] = key_states
        self.values[:, :, column : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self) -> int:
        """Return the filled columns, not the allocated ones."""
        return self.filled


def _right_aligned(parts: list[Tensor], room: int) -> Tensor:
    """Return [rows, heads, columns, head size]: zeros, a row's part, then `room` empty columns."""
    lengths = [part.shape[1] for part in parts]
    longest = max(lengths)
    heads, _, head_size = parts[0].shape
    aligned = parts[0].new_empty(len(parts), heads, longest + room, head_size)
    # A masked column has weight 0, but 0 times a stray NaN would be NaN. The room holds whatever
    # was in memory: nothing reads a column of it before it is written.
    aligned[:, :, : longest - min(lengths)] = 0
    for row, part in enumerate(parts):
        aligned[row, :, longest - lengths[row] : longest] = part
    return aligned
