"""Load a model, put a LoRA adapter on it, look at it as the teacher does, and keep the adapter in files.

The base weights never change: they are frozen, and no adapter is ever merged into them. So the "fixed" teacher is the
base model with the adapter switched off, bit for bit, at any step and in any dtype.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

FAMILIES = {
    "Qwen": "Qwen",
    "Llama-": "meta-llama",
    "SmolLM2-": "HuggingFaceTB",
    "gemma-": "google",
}  # prefix: owner
# What some families do to logits after the head, with the value that does nothing. Scoring multiplies hidden states by
# the head's matrix and no more, so with any other value it would not score the distribution that is sampled from.
PLAIN_HEAD = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}
# Adapters with another value here have the same tensors as plain LoRA but compute something else with them.
PLAIN_LORA = {"peft_type": "LORA", "use_rslora": False, "alpha_pattern": {}}
CONFIG_FILE, TENSORS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
)  # the names peft looks for


def resolve_model(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a model: a local one, or else the hub's snapshot, downloaded or from the hub's local cache.

    name      a folder, "org/name", or a bare name of a known family, such as "Qwen2.5-1.5B"
    revision  hub branch, tag or commit (None: main); the name of the snapshot's folder is the commit, to be recorded
    Never takes pickles or code. Raises ValueError for an unknown bare name, FileNotFoundError for what is not there.
    """
    folder, owners = (
        Path(name),
        [owner for prefix, owner in FAMILIES.items() if name.startswith(prefix)],
    )
    if not folder.is_dir():
        if "/" not in name and not owners:
            prefixes = ", ".join(f"{prefix}*" for prefix in FAMILIES)
            raise ValueError(
                f"unknown model {name!r}: valid are a local folder, org/name, and {prefixes}"
            )
        repo_id = name if "/" in name else f"{owners[0]}/{name}"
        files = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        try:  # subfolders are ignored: they hold the same weights in other formats
            folder = Path(
                snapshot_download(
                    repo_id, revision=revision, allow_patterns=files, ignore_patterns="*/*"
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"model {name}: no such folder, and none from the hub: {reason}"
            ) from error
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise FileNotFoundError(f"model {name}: there is no {pattern} in {folder}")
    return folder


def load_model(
    folder: Path, *, device: str, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """Return the causal language model in folder, frozen, in eval mode; from safetensors only, never with remote code.

    gradient_checkpointing  recompute each layer in backward instead of keeping it; acts in training mode only
    Raises ValueError for a head that is more than a matrix (PLAIN_HEAD), and for weights that the files lack.
    """
    fields = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().to_dict()
    for field, plain in PLAIN_HEAD.items():
        if fields.get(field) not in (plain, None):
            raise ValueError(
                f"model {folder} has {field}={fields[field]}: scoring supports a plain linear head only"
            )
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", **options
    )
    model, info = loaded
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise ValueError(f"model {folder} lacks weights, such as {min(info['missing_keys'])}")
    if model.get_output_embeddings().bias is not None:
        raise ValueError(
            f"model {folder} has a bias in its head: scoring supports a plain linear head only"
        )
    if gradient_checkpointing:
        with warnings.catch_warnings(
            action="ignore", category=FutureWarning
        ):  # 5.17 has no other name for it
            # The reentrant kind drops the gradient of a layer whose input needs none, as behind frozen embeddings.
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    return model.requires_grad_(False).to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in folder; raises ValueError if it has no chat template to build prompts with."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template: valid are chat or instruct models"
        )
    return tokenizer


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return all ids that end a completion: the tokenizer's, the model's (Qwen lists several), the chat template's.

    The template's closes an assistant turn; a base model names it nowhere else and would write the user's next turn.
    """
    turns = [{"role": "user", "content": "MARK"}, {"role": "assistant", "content": "MARK"}]
    closing = (
        str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("MARK")[2].strip()
    )
    ids = set(tokenizer.encode(closing, add_special_tokens=False)[:1]) & set(
        tokenizer.added_tokens_decoder
    )
    for source in (tokenizer, model.config, model.generation_config):
        eos: Any = source.eos_token_id  # an id, a list of ids, or None
        ids |= set(eos if isinstance(eos, list) else [eos]) - {None}
    return ids


def valid_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many ids, from 0, may be sampled: Qwen's heads have more rows than its tokenizer has tokens."""
    return len(tokenizer)


def final_hidden(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Return hidden_BTD, the states after the last norm; the one at t predicts token t + 1. Gradient to the adapter.

    ids_BT  token ids; pads, if any, come AFTER a row's tokens. Attention is causal, so a token never sees the pads on
            its right, and its position is the same as without them: no mask and no position ids are needed.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
    >>> alone, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0]])
    >>> torch.allclose(final_hidden(model, alone), final_hidden(model, padded)[:, :2], atol=1e-6)
    True
    """
    return model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state


def head_weight(model: PreTrainedModel) -> Tensor:
    """Return head_VD, frozen, in the model's dtype: logits_NV = hidden_ND @ head_VD.T."""
    return cast(nn.Linear, model.get_output_embeddings()).weight


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank adapter: y = W x + (alpha / r) B A x. No dropout, never merged.

    lora_A [r, in], lora_B [out, r]  fp32 in any model: steps as small as lr 5e-6 would vanish in bf16's 8 bits
    active                           the A and B that forward uses, or None for W alone
    Cost: with a half-precision base, an fp32 copy of the layer's input, kept for backward.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.scale = alpha / rank
        self.weight, self.bias = (
            base.weight,
            base.bias,
        )  # the base's own names, so its keys do not change
        # Drawn on the CPU in fp32, so that a seed means the same adapter on every device.
        lora_A = nn.init.kaiming_uniform_(
            torch.empty(rank, base.in_features), a=math.sqrt(5), generator=generator
        )
        self.lora_A = nn.Parameter(lora_A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.active: tuple[Tensor, Tensor] | None = (self.lora_A, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, rounded once to the base's dtype."""
        base = nn.functional.linear(x, self.weight, self.bias)
        if self.active is None:
            return base
        low = nn.functional.linear(x.float(), self.active[0]) * self.scale
        return (base + nn.functional.linear(low, self.active[1])).to(base.dtype)


@dataclass(eq=False)
class Lora:
    """The adapter of one model: its layers by module path, its settings, and the weights each kind of teacher reads.

    sets  "fixed": none; "current": what is trained; "ema", if asked for: its moving average; by "<path>.lora_A" or B
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
        """After an optimiser step: ema <- decay ema + (1 - decay) current, for A and B apart, not for B A."""
        for name, average in self.sets["ema"].items():
            average.lerp_(self.sets["current"][name].detach(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors of the adapter, as "current.<path>.lora_A" and so on, sharing memory with it."""
        return {
            f"{kind}.{name}": t.detach()
            for kind, tensors in self.sets.items()
            for name, t in tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy state into the adapter; raises ValueError unless names and shapes are exactly the adapter's."""
        own = self.state_dict()
        unfit = sorted(own.keys() ^ state.keys()) or [
            name for name in own if own[name].shape != state[name].shape
        ]
        if unfit:
            raise ValueError(
                f"{len(unfit)} adapter tensors are missing, unknown or misshapen here, such as {unfit[0]}"
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    seed: int,
    ema: bool = False,
) -> Lora:
    """Replace, in model, every linear layer that a target names ("q_proj") by a LoRALinear, and freeze all the rest.

    seed  fixes A, uniform within 1 / sqrt(in) as in peft; B = 0, so the model starts as the base, bit for bit
    ema   keep a moving average for the "ema" teacher: one more copy of the adapter
    Never adapts the head, whose weight is used outside the model. Raises ValueError for a target that matches nothing.
    """
    head = model.get_output_embeddings()
    linears = {
        path: m for path, m in model.named_modules() if type(m) is nn.Linear and m is not head
    }
    chosen = {
        target: [path for path in linears if f".{path}".endswith(f".{target}")]
        for target in targets
    }
    for target, paths in chosen.items():
        if not paths:
            present = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
            raise ValueError(
                f"LoRA target {target!r} matches no layer: valid for this model are {present}"
            )
    model.requires_grad_(False)
    generator, layers, current = torch.Generator().manual_seed(seed), {}, {}
    for path, base in linears.items():
        if any(path in paths for paths in chosen.values()):
            layers[path] = LoRALinear(base, rank=rank, alpha=alpha, generator=generator)
            current |= {
                f"{path}.lora_A": layers[path].lora_A,
                f"{path}.lora_B": layers[path].lora_B,
            }
            model.set_submodule(path, layers[path])
    sets = {"fixed": {}, "current": current}
    if ema:
        sets["ema"] = {name: tensor.detach().clone() for name, tensor in current.items()}
    return Lora(model, layers, rank, alpha, targets, sets)


@contextmanager
def teacher_view(lora: Lora, kind: str) -> Iterator[None]:
    """Within the block, make the model the teacher: eval mode, no gradient, and the adapter weights of that kind.

    kind  "fixed": adapter off, which is the base; "current": the adapter as it is; "ema": its moving average
    Afterwards, exception or not, all is as before. Keep the student's backward out of the block: with gradient
    checkpointing it runs the student's layers again. Raises ValueError for a kind that the adapter does not have.
    """
    if kind not in lora.sets:
        raise ValueError(
            f"no {kind!r} teacher: valid are fixed, current, and ema if the adapter was attached with it"
        )
    tensors = lora.sets[kind]
    modes = [(module, module.training) for module in lora.model.modules()]
    actives = [(layer, layer.active) for layer in lora.layers.values()]
    lora.model.eval()
    for path, layer in lora.layers.items():
        layer.active = (tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]) if tensors else None
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, active in actives:
            layer.active = active


def save_adapter(lora: Lora, folder: Path, *, base_model: str) -> None:
    """Write the current A and B as peft does, to name base_model as their base; each file is whole or not there."""
    config = {
        **PLAIN_LORA,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "bias": "none",
    }
    config |= {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
    }
    tensors = {
        f"base_model.model.{name}.weight": tensor for name, tensor in lora.sets["current"].items()
    }
    partial = folder / "adapter.partial"
    folder.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG_FILE)
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / TENSORS_FILE)


def load_adapter(model: PreTrainedModel, folder: Path) -> Lora:
    """Put the adapter in folder on model: FileNotFoundError or ValueError where it is not all there or does not fit."""
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no adapter in {folder}: {file} is missing")
    saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for field, plain in PLAIN_LORA.items():
        if saved.get(field, plain) != plain:
            raise ValueError(f"adapter {folder} has {field}={saved[field]!r}: valid is {plain!r}")
    if missing := {"r", "lora_alpha", "target_modules"} - saved.keys():
        raise ValueError(f"adapter {folder}: {CONFIG_FILE} lacks {', '.join(sorted(missing))}")
    targets = tuple(saved["target_modules"])
    lora = attach_lora(model, rank=saved["r"], alpha=saved["lora_alpha"], targets=targets, seed=0)
    tensors = load_file(folder / TENSORS_FILE).items()
    lora.load_state_dict(
        {n.replace("base_model.model", "current", 1).removesuffix(".weight"): t for n, t in tensors}
    )
    return lora
