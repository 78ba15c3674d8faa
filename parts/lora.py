"""LoRA, and the teacher as a view of the same model.

LoRA trains, instead of a layer's weight matrix W, two thin matrices whose product B A is added to
it: a few percent of the parameters. The two of all layers together are the adapter.

Student and teacher are one model. The teacher's view of it is the model without dropout or
gradient. There are four kinds: the adapter is off, as it is now, averaged over steps, or as it was
at the last refresh (teacher_view).

The base weights never change: they are frozen, and an adapter is merged into copies of them only
(parts/copies.py). So the "fixed" teacher is the base model with the adapter switched off, bit for
bit, at any step and in any dtype.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank adapter: y = W x + (alpha / r) B A x.

    lora_A  [r, in], fp32 in any model: steps as small as lr 5e-6 would vanish in bf16's 8 bits
    lora_B  [out, r], fp32
    active  the A and B that forward uses, or None for W alone

    No dropout, and W itself never changes.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.scale = alpha / rank
        # The base's own names, so that its keys in a state dict do not change.
        self.weight = base.weight
        self.bias = base.bias
        # Drawn on the CPU in fp32, so that a seed means the same adapter on every device.
        lora_A = nn.init.kaiming_uniform_(
            torch.empty(rank, base.in_features), a=math.sqrt(5), generator=generator
        )
        self.lora_A = nn.Parameter(lora_A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.active: tuple[Tensor, Tensor] | None = (self.lora_A, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return y in the base's dtype."""
        if self.active is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return adapted_product(x, self.weight, self.bias, *self.active, self.scale)


def adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """Return W x + b + scale B A x.

    A and B are rounded to the dtype of x: a GPU multiplies 16-bit numbers more than ten times as
    fast as fp32. Sums within a product are fp32, and so are the gradients that A and B collect.
    """
    base = nn.functional.linear(x, weight, bias)
    low = nn.functional.linear(x, lora_A.to(x.dtype))
    # In one pass over the layer's output, which is the largest tensor here.
    total = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), lora_B.to(x.dtype).T, alpha=scale)
    return total.view(base.shape)


@dataclass(eq=False)
class Lora:
    """The adapter of one model.

    layers  by module path
    sets    the weights that each kind of teacher reads, by "<module path>.lora_A" and ".lora_B".
            "fixed": none; "current": what is trained; and if asked for, "ema": its moving
            average, or "copy": what it was at the last refresh
    """

    model: PreTrainedModel
    layers: dict[str, LoRALinear]
    rank: int
    alpha: float
    targets: tuple[str, ...]
    sets: dict[str, dict[str, Tensor]]

    def parameters(self) -> list[Tensor]:
        """Return what the optimiser trains, in the model's order."""
        return list(self.sets["current"].values())

    def update_ema(self, decay: float) -> None:
        """After an optimiser step: ema <- decay ema + (1 - decay) current.

        A and B are averaged separately, not their product.
        """
        for name, average in self.sets["ema"].items():
            average.lerp_(self.sets["current"][name].detach(), 1 - decay)

    def update_teacher(self, step: int, *, decay: float, every: int) -> None:
        """After the optimiser's step number `step`, let the teacher's own set follow, if any.

        decay  of the moving average, at each step
        every  steps from one copy of the current set to the next
        """
        if "ema" in self.sets:
            self.update_ema(decay)
        if "copy" in self.sets and step % every == 0:
            self.copy_current("copy")

    @torch.no_grad()
    def copy_current(self, *kinds: str) -> None:
        """Let the teacher's own sets of these kinds, "ema" or "copy", equal the current one."""
        for kind in kinds:
            for name, tensor in self.sets[kind].items():
                tensor.copy_(self.sets["current"][name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors, as "current.<path>.lora_A" and so on; memory is shared."""
        return {
            f"{kind}.{name}": tensor.detach()
            for kind, tensors in self.sets.items()
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy state into the adapter; raises ValueError unless it is exactly the adapter's."""
        copy_exactly(state, self.state_dict())


@torch.no_grad()
def copy_exactly(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy state's tensors into own's, in place.

    Raises ValueError, before anything is copied, unless names and shapes are exactly own's.
    """
    unfit = sorted(own.keys() ^ state.keys())
    if not unfit:
        unfit = [name for name in own if own[name].shape != state[name].shape]
    if unfit:
        raise ValueError(
            f"{len(unfit)} adapter tensors are missing, unknown or misshapen here, "
            f"such as {unfit[0]}"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def adaptable_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the layers that may have an adapter, by module path: linear ones, but not the head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def targeted_layers(model: PreTrainedModel, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """Return the layers that targets such as "q_proj" name, by module path, in the model's order.

    Raises ValueError for a target that matches nothing, or that matches in a mixture of experts
    more than attention. The model may be on the meta device.
    """
    linears = adaptable_layers(model)
    chosen = {
        target: [path for path in linears if f".{path}".endswith(f".{target}")]
        for target in targets
    }
    _check_targets(model, chosen)
    named = {path for paths in chosen.values() for path in paths}
    return {path: layer for path, layer in linears.items() if path in named}


def _check_targets(model: PreTrainedModel, chosen: Mapping[str, list[str]]) -> None:
    """Raise ValueError for a target that cannot be adapted, or not as its name says.

    chosen  the paths that each target matches
    The experts of a mixture are one stacked tensor, which is no linear layer. A target such as
    "up_proj" would match the layers beside them only, while peft takes it for the experts as well.
    """
    valid = set(adaptable_layers(model))
    stacked = any(
        parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    if stacked:
        attention = [
            f"{path}."
            for path, module in model.named_modules()
            if "Attention" in type(module).__name__
        ]
        valid = {path for path in valid if path.startswith(tuple(attention))}
    if not valid:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear layer that LoRA could be put on: its layers "
            "are of another type"
        )
    for target, paths in chosen.items():
        if paths and valid.issuperset(paths):
            continue
        reached = "more than attention, beside stacked experts" if paths else "no layer"
        names = ", ".join(sorted({path.rpartition(".")[2] for path in valid}))
        raise ValueError(
            f"LoRA target {target!r} matches {reached}: valid for this model are {names}"
        )


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    seed: int,
    ema: bool = False,
    copy: bool = False,
) -> Lora:
    """Replace every linear layer that a target names ("q_proj") by a LoRALinear; freeze the rest.

    rank   r, the number of rows of A and of columns of B
    alpha  the adapter's share is scaled by alpha / rank
    seed   fixes A, uniform within 1 / sqrt(in) as in peft; B = 0, so the model starts as the base,
           bit for bit
    ema    keep a moving average for the "ema" teacher: one more copy of the adapter
    copy   keep a copy for the "copy" teacher, likewise

    Never adapts the head, whose weight is used outside the model. Raises ValueError as
    targeted_layers does.
    """
    targeted = targeted_layers(model, targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoRALinear] = {}
    current: dict[str, Tensor] = {}
    for path, base in targeted.items():
        layers[path] = LoRALinear(base, rank=rank, alpha=alpha, generator=generator)
        current[f"{path}.lora_A"] = layers[path].lora_A
        current[f"{path}.lora_B"] = layers[path].lora_B
        model.set_submodule(path, layers[path])
    sets: dict[str, dict[str, Tensor]] = {"fixed": {}, "current": current}
    for kind, wanted in (("ema", ema), ("copy", copy)):
        if wanted:
            sets[kind] = {name: tensor.detach().clone() for name, tensor in current.items()}
    return Lora(model, layers, rank, alpha, targets, sets)


@contextmanager
def teacher_view(lora: Lora, kind: str) -> Iterator[None]:
    """Within the block the model is the teacher: no dropout, no gradient, that kind's adapter.

    kind  "fixed": adapter off, which is the base; "current": the adapter as it is; "ema": its
          moving average; "copy": what it was at the last refresh

    Afterwards, exception or not, all is as before. Keep the student's backward out of the block:
    with gradient checkpointing it runs the student's layers again. Raises ValueError for a kind
    that the adapter does not have.
    """
    if kind not in lora.sets:
        raise ValueError(
            f"no {kind!r} teacher: valid are fixed, current, "
            "and ema or copy if the adapter was attached with it"
        )
    tensors = lora.sets[kind]
    modes = [(module, module.training) for module in lora.model.modules()]
    actives = [(layer, layer.active) for layer in lora.layers.values()]
    lora.model.eval()
    for path, layer in lora.layers.items():
        layer.active = None
        if tensors:
            layer.active = (tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"])
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, active in actives:
            layer.active = active
