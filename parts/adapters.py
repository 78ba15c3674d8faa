"""Adapter files, as peft writes and reads them: a folder with the settings and the tensors.

peft is the library that most tools load LoRA adapters with, so a trained adapter can be used
wherever it can. Its name for a tensor is "base_model.model.<module path>.lora_A.weight"; ours,
outside the files, is "<module path>.lora_A".
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from parts.files import read_json, whole_file, write_text
from parts.model import Lora, attach_lora, copy_exactly

# The names that peft looks for.
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX = ".weight"
# Adapters with another value here have the tensors of plain LoRA but compute something else with
# them.
PLAIN_LORA = {"peft_type": "LORA", "use_rslora": False, "alpha_pattern": {}}


def save_adapter(lora: Lora, folder: Path, *, base_model: str) -> None:
    """Write the adapter's current A and B as peft does; each of the two files is whole or absent.

    base_model  the name of the model they belong to: peft loads it unless it is given one
    """
    config = {
        **PLAIN_LORA,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
    }
    folder.mkdir(parents=True, exist_ok=True)
    # ASCII, other than write_json: peft reads the file in whatever encoding the machine is set to.
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    tensors = {f"{PREFIX}{name}{SUFFIX}": tensor for name, tensor in lora.sets["current"].items()}
    with whole_file(folder / TENSORS_FILE) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path) -> Lora:
    """Put the adapter in folder on model, which has none yet.

    Raises FileNotFoundError or ValueError where the adapter is not all there or does not fit.
    """
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no adapter in {folder}: {file} is missing")
    saved = read_json(folder / CONFIG_FILE)
    for field, plain in PLAIN_LORA.items():
        if saved.get(field, plain) != plain:
            raise ValueError(f"adapter {folder} has {field}={saved[field]!r}: valid is {plain!r}")
    if missing := {"r", "lora_alpha", "target_modules"} - saved.keys():
        raise ValueError(f"adapter {folder}: {CONFIG_FILE} lacks {', '.join(sorted(missing))}")
    targets = tuple(saved["target_modules"])
    lora = attach_lora(model, rank=saved["r"], alpha=saved["lora_alpha"], targets=targets, seed=0)
    put_adapter(lora, folder)
    return lora


def put_adapter(lora: Lora, folder: Path) -> None:
    """Copy a saved adapter's tensors into the current set of one that is attached, in place.

    Reads the tensors only, not the settings. Raises ValueError, with nothing copied, unless names
    and shapes are exactly those of the attached adapter.
    """
    copy_exactly(read_adapter_tensors(folder), lora.sets["current"])


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Return a saved adapter's tensors, by "<module path>.lora_A" and ".lora_B"."""
    return {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): tensor
        for name, tensor in load_file(folder / TENSORS_FILE).items()
    }
