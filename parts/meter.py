"""What one token takes of memory in a model's passes, counted on the model itself without weights.

On torch's meta device tensors have a shape and no data. So a pass costs milliseconds, whatever the
model's size, and each tensor that it makes and frees can be counted: for every family, and for
every choice of layers with an adapter.
"""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

ATTENTION = "counted"
# The passes that are counted, large enough that what does not grow with tokens hardly counts.
ROWS = 4
COLUMNS = 256


def counted_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Return attention's output, of the kernel that devices choose and the meta device does not.

    It keeps no scores. Where values are narrower than keys a CPU has no such kernel, and keeps the
    scores of each token with all of its row: here of COLUMNS tokens, whatever a row will have.
    """
    groups = query.shape[1] // key.shape[1]
    if key.shape[-1] == value.shape[-1]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output = kernel(query, key, value, is_causal=True, scale=scaling)[0]
    else:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        output = scaled_dot_product_attention(query, key, value, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, counted_attention)


class Meter(TorchDispatchMode):
    """Counts, within its block, the bytes of tensors that are made there.

    now   of those that are alive
    peak  the most that it was

    What the model has before, its weights and their gradient, is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        before = [*model.parameters(), *model.buffers()]
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what torch was asked for, and count what is new in the answer."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a number that a model asks for, such as its longest position: there is none
        if func.name() == "aten::_grouped_mm":  # of experts; on the meta device in bfloat16 only
            output = args[0].new_empty(len(args[0]), args[1].shape[-1])
        else:
            output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count memory unless it is another tensor's, until nothing holds it any more."""
        name = storage._cdata
        if name in self.sizes:
            return
        self.sizes[name] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.now -= self.sizes.pop(name)


@dataclass(frozen=True)
class Passes:
    """The bytes of one token in the passes through a model, all of its layers together.

    saved    what the backward pass needs of it
    forward  what is alive of it at most in a pass that keeps nothing
    column   what the cache keeps of it
    decoded  what is alive of it at most, beside the cache, while a later token is computed
    """

    saved: int
    forward: int
    column: int
    decoded: int


def count_passes(model: PreTrainedModel) -> Passes:
    """Return what passes take of a model on the meta device, its adapter attached.

    Leaves the model with attention that computes nothing.
    """
    model.get_decoder().config._attn_implementation = ATTENTION
    with torch.device("meta"):
        ids_BT = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
        next_B1 = torch.zeros(ROWS, 1, dtype=torch.long)
    with Meter(model) as meter:
        output = model.base_model(input_ids=ids_BT, use_cache=False)
    saved = meter.now
    del output
    cache = DynamicCache()
    with torch.no_grad(), Meter(model) as meter:
        output = model.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        read: list[Any] = cache.layers
        column = sum(layer.keys.nbytes + layer.values.nbytes for layer in read)
        forward = meter.peak - column
        del output
        meter.peak = meter.now
        model.base_model(input_ids=next_B1, past_key_values=cache, use_cache=True)
        decoded = meter.peak - column
    tokens = ROWS * COLUMNS
    return Passes(*(count // tokens for count in (saved, forward, column, decoded)))
