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

The memory is allocated before it is needed, a step writes into it in place, and attention sees a
whole bucket of columns, of which those to come are masked. So the shapes and addresses of one step
are those of the next, and a GPU can replay the decoder's part of it as one recorded graph: to
launch its thousand small kernels one by one takes several times as long as to run them. The head
and the choice of a token are a few dozen more, which parts.sampler launches as they are.

Read Batch (its exchange brings rows in and takes them out, its step appends a token to each), then
WrittenLayer (where the columns lie in memory), then Recorder (what a GPU replays). What is
appended, parts.sampler chooses.
"""

import random
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from parts.attention import attends_with_one_token
from parts.family import context_length

# A cache has room for at most so many columns to come. When they are full, it is copied once.
GROWTH_COLUMNS = 256
# Attention sees a multiple of so many columns. A graph is recorded for each, so that on a GPU they
# are to be few; on a CPU nothing is recorded, and masked columns are only work.
BUCKET_COLUMNS = {"cuda": 256}
SMALL_BUCKET = 4
# Steps of a bucket that run as they are before one is recorded: libraries set themselves up in the
# first, and a bucket that is left at once is not worth it.
PLAIN_STEPS = 2
# Devices whose steps are recorded.
RECORDED = ("cuda",)
# Padded prompt tokens in one prefill forward: bounds its memory, and the padding as well. A GPU is
# hardly slower with many than with few.
PREFILL_TOKENS = {"cuda": 4096}
SMALL_PREFILL = 512


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

    def extend(
        self, ids: list[int], logprobs: list[float], eos_ids: set[int], max_new_tokens: int
    ) -> int:
        """Add tokens up to the one that ends the row; return how many were added."""
        before = len(self.completion_ids)
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish_reason:
                break
            self.completion_ids.append(token)
            self.logprobs.append(logprob)
            if token in eos_ids:
                self.finish_reason = "stop"
            elif len(self.completion_ids) == max_new_tokens:
                self.finish_reason = "length"
        return len(self.completion_ids) - before


@dataclass
class _Prompt:
    """A prompt that is prefilled.

    layers    transformers' cache layers: keys and values are [rows, heads, columns, head size]
    row       the row of them that is meant
    length    the columns of it that are no padding, from the first on
    hidden_D  the final hidden state of the last id
    """

    layers: list[Any]
    row: int
    length: int
    hidden_D: Tensor

    def keys(self, layer: int) -> Tensor:
        """Return a layer's keys as [1, heads, length, head size]."""
        return self.layers[layer].keys[self.row, None, :, : self.length]

    def values(self, layer: int) -> Tensor:
        """Return a layer's values as [1, heads, length, head size]."""
        return self.layers[layer].values[self.row, None, :, : self.length]


@dataclass
class Cursor:
    """Where the next columns of a cache go; all of its layers share one.

    column_C  their indices, on the device: a recorded step reads them there
    filled    columns that have been written
    shown     columns that attention sees; a mask hides those that are not filled
    """

    column_C: Tensor
    filled: int
    shown: int


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
        self.model_layers = model.config.get_text_config().num_hidden_layers
        self.last_position = context_length(model.config) - 1
        self.layers: list[Any] = []  # of WrittenLayer, once rows are there
        self.cache = Cache(layers=[])
        self.rows: list[Row] = []
        self.starts: list[int] = []  # each row's first column; those before it are masked
        self.hidden_BD = torch.tensor([])
        # What a step reads, on the device and at fixed addresses between two exchanges.
        self.ids_B1 = torch.tensor([])  # what it appends
        self.position_B1 = torch.tensor([])  # of these ids
        self.mask_B11T = torch.tensor([])  # is added to attention scores
        self.cursor = Cursor(torch.tensor([]), 0, 0)
        self.recorder = Recorder(self.decoder, self.decoder.device)
        # Prompts that are prefilled, and still needed by a waiting row.
        self.prompts: dict[tuple[int, ...], _Prompt] = {}

    def unfinished(self) -> int:
        """Return how many rows still generate."""
        return sum(not row.finish_reason for row in self.rows)

    def tokens_left(self) -> int:
        """Return how many tokens every row that still generates may append."""
        lengths = [len(row.completion_ids) for row in self.rows if not row.finish_reason]
        return self.max_new_tokens - max(lengths)

    def exchange(self, waiting: deque[Row], max_rows: int) -> None:
        """Drop finished rows, take rows from the left of waiting, right-align all in one cache.

        waiting   longest prompts first, of one id or more; what is taken is gone from it
        max_rows  rows there may be afterwards
        """
        kept = [index for index, row in enumerate(self.rows) if not row.finish_reason]
        admitted = [waiting.popleft() for _ in range(min(len(waiting), max_rows - len(kept)))]
        distinct = dict.fromkeys(row.prompt_ids for row in admitted)
        self._prefill([ids for ids in distinct if ids not in self.prompts])

        prompts = [self.prompts[row.prompt_ids] for row in admitted]
        column = self.cursor.filled
        lengths = [column - self.starts[row] for row in kept]
        old = slice(column - max(lengths, default=0), column)  # what is kept, with pads before it
        lengths += [prompt.length for prompt in prompts]
        self.rows = [self.rows[index] for index in kept] + admitted

        # The last token of a completion is never fed back, so it needs no column.
        steps = self.max_new_tokens - 1 - min(len(row.completion_ids) for row in self.rows)
        room = min(steps, GROWTH_COLUMNS)
        self._align(lengths, capacity=max(lengths) + room)
        for index in range(self.model_layers):
            # One layer after the other, since a whole second cache would double the peak memory.
            keys = [prompt.keys(index) for prompt in prompts]
            values = [prompt.values(index) for prompt in prompts]
            if kept:
                layer = self.layers[index]
                keys.insert(0, layer.keys[kept, :, old])
                values.insert(0, layer.values[kept, :, old])
            new = WrittenLayer(right_aligned(keys, room), right_aligned(values, room), self.cursor)
            self.layers[index : index + 1] = [new]
        self.cache = Cache(layers=self.layers)
        hidden = [self.hidden_BD[kept]] if kept else []
        self.hidden_BD = torch.cat([*hidden, *(prompt.hidden_D[None] for prompt in prompts)])
        still_needed = {row.prompt_ids for row in waiting}
        self.prompts = {ids: read for ids, read in self.prompts.items() if ids in still_needed}

    def _align(self, lengths: list[int], capacity: int) -> None:
        """Set each row's start, what a step reads, and the columns that there are."""
        device = self.decoder.device
        filled = max(lengths)
        self.starts = [filled - length for length in lengths]
        self.ids_B1 = torch.zeros(len(lengths), 1, dtype=torch.long, device=device)
        self.position_B1 = torch.tensor(lengths, device=device)[:, None]
        self.cursor = Cursor(torch.tensor([filled], device=device), filled, shown=0)
        self._show(capacity)

    def _show(self, capacity: int) -> None:
        """Let attention see the next bucket of columns, those to come masked; forget old graphs."""
        device = self.decoder.device
        size = BUCKET_COLUMNS.get(device.type, SMALL_BUCKET)
        cursor = self.cursor
        cursor.shown = min(capacity, (cursor.filled // size + 1) * size)
        column_T = torch.arange(cursor.shown, device=device)
        start_B111 = torch.tensor(self.starts, device=device)[:, None, None, None]
        hidden_B11T = (column_T < start_B111) | (column_T >= cursor.filled)
        self.mask_B11T = additive_mask(hidden_B11T, self.decoder.dtype)
        self.recorder.forget()

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Compute each prompt's keys, values and last hidden state; prompts come longest first.

        They begin alike, with what a chat template writes first. Where that spares as much as one
        forward takes, it is computed once, and all prompts go on behind it.
        """
        most = PREFILL_TOKENS.get(self.decoder.device.type, SMALL_PREFILL)
        begins = common_start(prompts)
        if len(begins) * (len(prompts) - 1) < most:
            begins = ()
        start: Any = DynamicCache()
        if begins:
            self._read([begins], start)
        while prompts:
            longest = len(prompts[0])
            count = max(1, most // longest)
            group = prompts[:count]
            prompts = prompts[count:]
            cache = DynamicCache()
            for index, layer in enumerate(start.layers):
                keys = layer.keys.expand(len(group), -1, -1, -1)
                cache.update(keys, layer.values.expand(len(group), -1, -1, -1), index)
            # Pads stand behind the prompt, where causal attention hides them from its tokens: no
            # mask is needed.
            padded = [[*ids[len(begins) :], *[0] * (longest - len(ids))] for ids in group]
            hidden_BPD = self._read(padded, cache)
            for index, ids in enumerate(group):
                # A view would keep all of hidden_BPD alive.
                last_D = hidden_BPD[index, len(ids) - len(begins) - 1].clone()
                self.prompts[ids] = _Prompt(cache.layers, index, len(ids), last_D)

    def _read(self, rows: Sequence[Sequence[int]], cache: Cache) -> Tensor:
        """Return the hidden states of rows that go on behind the cache, which is filled further."""
        ids_BP = torch.tensor(rows, device=self.decoder.device)
        output = self.decoder(input_ids=ids_BP, past_key_values=cache, use_cache=True)
        return output.last_hidden_state

    def step(self, ids_B: Tensor) -> None:
        """Append one id to every row's columns and compute the hidden states that follow."""
        cursor = self.cursor
        if cursor.filled == cursor.shown:
            if cursor.filled == self.layers[0].keys.shape[2]:
                for layer in self.layers:
                    layer.grow(GROWTH_COLUMNS)
            self._show(self.layers[0].keys.shape[2])
        self.ids_B1.copy_(ids_B[:, None])
        self.hidden_BD = self.recorder.run(self._append)
        cursor.filled += 1

    def _append(self) -> Tensor:
        """Be the decoder's step: no shape, address or number of it changes within a bucket."""
        cursor = self.cursor
        self.mask_B11T.index_fill_(3, cursor.column_C, 0.0)
        with attends_with_one_token(self.decoder.config):
            output = self.decoder(
                input_ids=self.ids_B1,
                position_ids=self.position_B1,
                attention_mask=self.mask_B11T,
                past_key_values=self.cache,
                use_cache=True,
            )
        # A finished row that stays goes on past its end, but not past the positions that there are.
        self.position_B1.add_(1).clamp_(max=self.last_position)
        cursor.column_C += 1
        return output.last_hidden_state[:, 0]


class WrittenLayer(DynamicLayer):
    """One layer's keys and values, written in place where the cursor stands.

    transformers' DynamicLayer copies the whole cache for every token, and its StaticLayer counts
    columns by itself, which a recorded step cannot.

    keys, values  [rows, heads, capacity, head size]; columns to come are zeros, since a masked one
                  has weight 0, but 0 times a stray NaN would be NaN
    """

    def __init__(self, keys: Tensor, values: Tensor, cursor: Cursor) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.cursor = cursor
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns; return, as views, all that attention sees."""
        self.keys.index_copy_(2, self.cursor.column_C, key_states)
        self.values.index_copy_(2, self.cursor.column_C, value_states)
        return self.keys[:, :, : self.cursor.shown], self.values[:, :, : self.cursor.shown]

    def grow(self, columns: int) -> None:
        """Allocate so many more columns."""
        self.keys = right_aligned([self.keys], columns)
        self.values = right_aligned([self.values], columns)

    def get_seq_length(self) -> int:
        """Return the filled columns, not the allocated ones."""
        return self.cursor.filled


class Recorder:
    """Runs a step: on a CPU as it is; on a GPU of CUDA as one graph, recorded when it pays.

    A graph is every kernel of a step with its addresses and numbers, replayed by one launch. It is
    kept while they hold, which is until the next exchange or bucket, so it never sees old weights.

    refused  decoders whose step cannot be recorded: their next rollouts do not try it again
    """

    refused: ClassVar[WeakSet[nn.Module]] = WeakSet()

    def __init__(self, decoder: nn.Module, device: torch.device) -> None:
        self.decoder = decoder
        self.can_record = device.type in RECORDED and decoder not in self.refused
        self.forget()

    def forget(self) -> None:
        """Drop the graph: what it reads and writes is about to be something else."""
        self.steps = 0
        self.replay: Callable[[], Tensor] | None = None

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """Return what step() returns; the next run may overwrite it."""
        self.steps += 1
        if self.can_record and self.replay is None:
            try:
                if self.steps == PLAIN_STEPS:
                    return self.rehearse(step)
                if self.steps > PLAIN_STEPS:
                    self.replay = self.record(step)
            # Such as a module that asks the device for a number, or too little memory.
            except RuntimeError as error:
                self.can_record = False
                self.refused.add(self.decoder)
                reason = str(error).splitlines()[0]
                warnings.warn(f"decoding goes on without CUDA graphs: {reason}", stacklevel=2)
        return self.replay() if self.replay else step()

    def rehearse(self, step: Callable[[], Tensor]) -> Tensor:
        """Run the step before the one that is recorded. RuntimeError where it waits for the device.

        No graph can wait. That is found out here, since a recording that fails leaves torch in
        disorder. A step that failed here can be run once more: it writes the same columns again,
        and it moves on only at its end.
        """
        with warnings.catch_warnings(action="ignore"):  # it calls itself a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return the replay of a step, which is recorded and not run."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # What other threads do meanwhile, such as NCCL's, does not concern this recording.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = step()
        finally:
            # A recording that fails stays on the stream that it was made on.
            torch.cuda.set_stream(stream)

        def _replay() -> Tensor:
            graph.replay()
            return output

        return _replay


def common_start(prompts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the ids that all prompts begin with, but for the last id of the shortest.

    >>> common_start([(5, 6, 7), (5, 6, 8)]), common_start([(5, 6, 7), (5, 6)]), common_start([])
    ((5, 6), (5,), ())
    """
    columns = zip(*prompts, strict=False)  # as many as the shortest has
    alike = list(takewhile(lambda ids: len(set(ids)) == 1, columns))
    shortest = min(map(len, prompts), default=0)
    return tuple(ids[0] for ids in alike[: max(0, shortest - 1)])


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides columns when it is added to attention scores; eager attention adds a mask.

    hidden  bool, True where a column is not to be seen
    """
    return torch.finfo(dtype).min * hidden.to(dtype)


def right_aligned(parts: list[Tensor], room: int) -> Tensor:
    """Return [rows, heads, columns, head size]: zeros, a row's part, `room` more zeros.

    parts  [some rows, heads, length, head size], rows one below the other
    """
    longest = max(part.shape[2] for part in parts)
    rows = sum(len(part) for part in parts)
    _, heads, _, head_size = parts[0].shape
    aligned = parts[0].new_empty(rows, heads, longest + room, head_size)
    # A masked column has weight 0, but 0 times a stray NaN would be NaN.
    aligned[:, :, : longest - min(part.shape[2] for part in parts)] = 0
    aligned[:, :, longest:] = 0
    row = 0
    for part in parts:
        aligned[row : row + len(part), :, longest - part.shape[2] : longest] = part
        row += len(part)
    return aligned
