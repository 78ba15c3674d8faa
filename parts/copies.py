"""Copies of a model's weights to sample from: one product a layer, and a fast one.

Sampling multiplies by every weight once a token, so two things pay that training need not do:

merged  the adapter is added to W in a copy, so that a layer takes one product and not three
packed  on a CPU the copy lies in the order in which oneDNN reads it. For the few rows of a decode
        step it multiplies about twice as fast as what torch calls for a plain matrix
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parts.lora import LoRALinear

# Copies take no more memory than this, or they are not made.
COPIES_BYTES = 2**31
# Weights are packed from so many bytes on. Fewer lie in the processor's cache, where packing gains
# little, and oneDNN compiles a product for every new number of rows, a millisecond each.
PACKED_BYTES = 2**26

Product = Callable[[Tensor], Tensor]


@contextmanager
@torch.no_grad()
def sampling_copies(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, layers multiply by copies of their weights: merged, packed, or both.

    Only in fp32, where a sum is rounded as the sum of the products would be; in bf16 it would
    swallow the adapter: log-probs move by as much as a small adapter moves them. Only where copies
    fit in COPIES_BYTES: of all layers, else of those that have an adapter. Elsewhere the block
    changes nothing. The weights stay as they are, and must not change within it.
    """
    linear = [layer for layer in model.modules() if type(layer) in (nn.Linear, LoRALinear)]
    packs = can_pack(_bytes(linear), model.device, model.dtype)
    layers: list[Any] = linear if packs else [layer for layer in linear if _active(layer)]
    is_fp32 = all(layer.weight.dtype == torch.float32 for layer in layers)
    if not is_fp32 or _bytes(layers) > COPIES_BYTES:
        layers = []
    product = packed_product if packs else plain_product
    for layer in layers:
        layer.forward = product(_merged(layer), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def can_pack(size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether weights of so many bytes are packed.

    The processor's instructions decide, and no measurement: a run's bytes are the same every time.
    """
    has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    is_there = has_avx and torch.backends.mkldnn.is_available()
    is_fit = device.type == "cpu" and dtype == torch.float32
    return is_there and is_fit and PACKED_BYTES <= size <= COPIES_BYTES


def packed_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """Return x -> x W^T + b with a packed copy of W. It has no gradient."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def _multiply(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return _multiply


def plain_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """Return x -> x W^T + b."""
    return partial(nn.functional.linear, weight=weight, bias=bias)


def _bytes(layers: list[Any]) -> int:
    return sum(layer.weight.nbytes for layer in layers)


def _active(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return the A and B that the layer's forward adds, None where it has none or they are off."""
    return layer.active if isinstance(layer, LoRALinear) else None


def _merged(layer: Any) -> Tensor:
    """Return W, or a copy of it that the layer's active adapter is added to."""
    if (active := _active(layer)) is None:
        return layer.weight
    lora_A, lora_B = active
    return torch.addmm(layer.weight, lora_B, lora_A, alpha=layer.scale)
