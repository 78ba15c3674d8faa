"""Copies of a model's weights that make passes without a gradient faster.

merged  the adapter is added to W in a copy, so that a layer takes one product and not three
packed  the same, and on a CPU the copy lies in the order in which oneDNN reads it. It multiplies
        the few rows of a decode step about twice as fast as what torch calls for a plain matrix,
        and thousands of rows a fifth faster
rounded the adapter's A and B are rounded to a 16-bit model's dtype once, and not in every step
stacked the same, and on a CPU that multiplies 16-bit numbers a packed copy has the rows of A below
        those of W, so that one product makes W x and A x
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parts.lora import LoRALinear, adapted_product

# Copies take no more memory than this, or they are not made.
COPIES_BYTES = 2**31
# Weights are packed from so many bytes on. Fewer lie in the processor's cache, where packing gains
# little, and oneDNN compiles a product for every new number of rows, a millisecond each.
PACKED_BYTES = 2**26

Product = Callable[[Tensor], Tensor]
Kind = Literal["packed", "stacked", "merged", "rounded", "none"]


def sampling_copies(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within the block, layers multiply by copies of their weights, as choose_copies says.

    The weights stay as they are, and must not change within the block.
    """
    return _copies(model, merges=True)


def scoring_copies(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Do the same for one pass over many rows, but only where layers are packed: it pays there."""
    return _copies(model, merges=False)


def choose_copies(linear: int, adapted: int, device: torch.device, dtype: torch.dtype) -> Kind:
    """Say what is copied: of all layers if "packed" or "stacked", else of those with an adapter.

    linear, adapted  the bytes of all layers' weights, and of those with an adapter that is on

    Merged only in fp32, where a sum is rounded as the sum of the products would be. In bf16 the
    rounded sum would lose a small adapter: log-probs move by as much as the adapter moves them.
    """
    if can_pack(linear, device, dtype):
        return "packed" if dtype == torch.float32 else "stacked"
    if dtype != torch.float32:
        return "rounded"
    return "merged" if adapted <= COPIES_BYTES else "none"


def can_pack(size: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether weights of so many bytes are packed.

    The processor's instructions decide, and no measurement: a run's bytes are the same every time.
    """
    has_instructions = {
        torch.float32: lambda: torch.backends.cpu.get_cpu_capability().startswith("AVX"),
        torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    is_fit = device.type == "cpu" and PACKED_BYTES <= size <= COPIES_BYTES
    return (
        is_fit
        and dtype in has_instructions
        and torch.backends.mkldnn.is_available()
        and has_instructions[dtype]()
    )


def packed_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """Return x -> x W^T + b with a packed copy of W. It has no gradient."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def _multiply(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return _multiply


def plain_product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """Return x -> x W^T + b."""
    return partial(nn.functional.linear, weight=weight, bias=bias)


def rounded_product(layer: LoRALinear) -> Product:
    """Return x -> W x + b + scale B A x with A and B rounded to the dtype of W."""
    assert layer.active is not None
    lora_A, lora_B = (tensor.to(layer.weight.dtype) for tensor in layer.active)
    fixed = {"weight": layer.weight, "bias": layer.bias, "scale": layer.scale}
    return partial(adapted_product, lora_A=lora_A, lora_B=lora_B, **fixed)


def stacked_product(layer: LoRALinear) -> Product:
    """Return x -> W x + b + scale B A x, W x and A x from one packed product, rounded as apart.

    Few rows cost a product more to begin than to sum, and A is so thin that it never has more.
    """
    assert layer.active is not None
    lora_A, lora_B = (tensor.to(layer.weight.dtype) for tensor in layer.active)
    outputs = len(layer.weight)
    bias = None if layer.bias is None else nn.functional.pad(layer.bias, (0, len(lora_A)))
    both = packed_product(torch.cat([layer.weight, lora_A]), bias)

    def _multiply(x: Tensor) -> Tensor:
        base, low = both(x).flatten(0, -2).tensor_split([outputs], dim=-1)
        total = torch.addmm(base, low, lora_B.T, alpha=layer.scale)
        return total.view(*x.shape[:-1], outputs)

    return _multiply


@contextmanager
@torch.no_grad()
def _copies(model: PreTrainedModel, *, merges: bool) -> Iterator[None]:
    linear: list[Any] = [
        layer for layer in model.modules() if type(layer) in (nn.Linear, LoRALinear)
    ]
    with_adapter = [layer for layer in linear if _active(layer)]
    kind: Kind = "none"
    if all(layer.weight.dtype == model.dtype for layer in linear):
        kind = choose_copies(_bytes(linear), _bytes(with_adapter), model.device, model.dtype)
    if kind != "packed" and not merges:
        kind = "none"
    layers = {"packed": linear, "stacked": linear, "none": []}.get(kind, with_adapter)
    for layer in layers:
        if kind == "rounded":
            layer.forward = rounded_product(layer)
        elif kind == "stacked" and _active(layer):
            layer.forward = stacked_product(layer)
        else:
            product = plain_product if kind == "merged" else packed_product
            layer.forward = product(_merged(layer), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


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
