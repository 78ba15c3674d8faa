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

# All copies of a model take no more memory than this, or none is made.
COPIES_BYTES = 2**31


@contextmanager
@torch.no_grad()
def sampling_copies(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, layers multiply by copies of their weights: merged, packed, or both.

    Only in fp32, where a sum is rounded as the sum of the products would be; in bf16 it would
    swallow the adapter: log-probs move by as much as a small adapter moves them. Only where all
    copies fit in COPIES_BYTES. Elsewhere the block changes nothing. The weights stay as they are,
    and must not change within it.
    """
    found = [layer for layer in model.modules() if isinstance(layer, nn.Linear | LoRALinear)]
    layers: list[Any] = [layer for layer in found if _gains(layer)]
    same_type = all(layer.weight.dtype == torch.float32 for layer in layers)
    if not same_type or sum(layer.weight.nbytes for layer in layers) > COPIES_BYTES:
        layers = []
    for layer in layers:
        layer.forward = product_of(_merged(layer), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether weights are packed, which the machine's instructions decide: no measurement."""
    has_avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    is_there = has_avx and torch.backends.mkldnn.is_available()
    return is_there and device.type == "cpu" and dtype == torch.float32


def product_of(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return x -> x W^T + b, which has no gradient; packed where that can be."""
    if not can_pack(weight.device, weight.dtype):
        return partial(nn.functional.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def _multiply(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return _multiply


def _gains(layer: nn.Linear | LoRALinear) -> bool:
    """Say whether a layer is faster with a copy of its weight."""
    if isinstance(layer, LoRALinear) and layer.active is not None:
        return True
    is_plain = type(layer) in (nn.Linear, LoRALinear)  # and does nothing else in its forward
    return is_plain and can_pack(layer.weight.device, layer.weight.dtype)


def _merged(layer: nn.Linear | LoRALinear) -> Tensor:
    """Return W, or a copy of it that the layer's active adapter is added to."""
    if isinstance(layer, LoRALinear) and layer.active is not None:
        lora_A, lora_B = layer.active
        return torch.addmm(layer.weight, lora_B, lora_A, alpha=layer.scale)
    return layer.weight
