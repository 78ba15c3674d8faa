"""Prompts that a model which never changes reads again and again: computed once, then kept.

The fixed teacher reads the same prompts in every epoch, and they are most of what it reads. What
attention needs of a prompt are its keys and values in every layer. With them at hand, the model
goes on behind the prompt and computes the completion only. On a CPU, that is: a GPU computes one
prompt alone, as it is done here, hardly faster than a batch of them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from parts.batch import Cursor, WrittenLayer, additive_mask, right_aligned
from parts.family import context_length

# What is kept takes no more memory than this. The lab's 1,250 prompts of 176 tokens take 0.8 GiB;
# one of that length takes 5 MiB of Qwen2.5-1.5B in bf16.
KEPT_BYTES = 2**30


class KeptPrompts:
    """Keys and values of prompts, under weights that do not change while it is used.

    kept   by a prompt's ids without the last: each layer's keys and its values in turn, all of them
           [1, heads, columns, head size]
    bytes  of all that is kept, at most KEPT_BYTES

    Every prompt is computed alone, kept or not: a row of a batch is rounded otherwise in another
    batch, and a run that was stopped, which begins with nothing kept, would not end with the same
    bytes as one that went through. When the room is full, further prompts are computed each time.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], list[Tensor]] = {}
        self.bytes = 0

    @torch.no_grad()
    def completion_hidden(
        self, model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
    ) -> Tensor:
        """Return hidden_ND, the states that predict each completion token, row after row.

        To rounding, it is what copsd.completion_hidden returns; without gradient, and in eval mode
        only. Raises ValueError for prompts of fewer than two ids.

        The last id of the prompt predicts the first of the completion, so it is computed with it:

            kept  p0 p1       fed  p2 c0 pad       completion c0 c1
                              hidden  ^  ^         is predicted from p2 and c0
        """
        if min(map(len, prompts)) < 2:
            raise ValueError("a prompt whose keys and values are kept has two ids or more")
        before = [self._read(model, tuple(prompt[:-1])) for prompt in prompts]
        fed = [
            [prompt[-1], *completion[:-1]]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        width = max(map(len, fed))
        ids_BC = torch.zeros(len(fed), width, dtype=torch.long)
        scored_BC = torch.zeros_like(ids_BC, dtype=torch.bool)
        for index, ids in enumerate(fed):
            ids_BC[index, : len(ids)] = torch.tensor(ids)
            scored_BC[index, : len(ids)] = True

        # The prompts end at one column, and behind it every row sees its own tokens so far.
        lengths = [layers[0].shape[2] for layers in before]
        columns = max(lengths)
        end_C1 = torch.arange(columns, columns + width)[:, None]
        column_T = torch.arange(columns + width)
        start_B11 = columns - torch.tensor(lengths)[:, None, None]
        unseen_BCT = (column_T < start_B11) | (column_T > end_C1)
        written_C = torch.arange(columns, columns + width, device=model.device)
        cursor = Cursor(written_C, filled=columns, shown=columns + width)
        cache = Cache(
            layers=[
                WrittenLayer(
                    right_aligned([layers[index] for layers in before], room=width),
                    right_aligned([layers[index + 1] for layers in before], room=width),
                    cursor,
                )
                for index in range(0, len(before[0]), 2)
            ]
        )
        # Behind a row that has ended come pads: theirs must be positions that there are.
        position_BC = torch.tensor(lengths)[:, None] + torch.arange(width)
        position_BC = position_BC.clamp(max=context_length(model.config) - 1)
        output = model.base_model(
            input_ids=ids_BC.to(model.device),
            position_ids=position_BC.to(model.device),
            attention_mask=additive_mask(unseen_BCT[:, None].to(model.device), model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[scored_BC.to(model.device)]

    def _read(self, model: PreTrainedModel, ids: tuple[int, ...]) -> list[Tensor]:
        """Return a prompt's keys and values, computed unless they are kept."""
        if ids in self.kept:
            return self.kept[ids]
        cache = DynamicCache()
        ids_1P = torch.tensor([ids], device=model.device)
        model.base_model(input_ids=ids_1P, past_key_values=cache, use_cache=True)
        read: list[Any] = cache.layers
        layers = [tensor for layer in read for tensor in (layer.keys, layer.values)]
        # In one piece: small ones would stand between the holes that larger tensors leave.
        pieces = torch.cat([tensor.flatten() for tensor in layers]).split(
            [tensor.numel() for tensor in layers]
        )
        layers = [piece.view_as(tensor) for piece, tensor in zip(pieces, layers, strict=True)]
        size = sum(tensor.nbytes for tensor in layers)
        if self.bytes + size <= KEPT_BYTES:
            self.kept[ids] = layers
            self.bytes += size
        return layers
