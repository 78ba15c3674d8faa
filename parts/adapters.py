"""Adapter files, as peft writes and reads them: a folder with the settings and the tensors.

peft is the library that most tools load LoRA adapters with, so a trained adapter can be used
wherever it can. Its name for a tensor is "base_model.model.<module path>.lora_A.weight"; ours,
outside the files, is "<module path>.lora_A".
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from parts.checkpoints import write_tensors
from parts.files import make_folder, read_object, write_text
from parts.lora import Lora, adaptable_layers, attach_lora, copy_exactly
from parts.model import refuse_not_finite
from parts.typed import typed

# The names that peft looks for.
CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIX = ".weight"
# What an adapter has to say to be plain LoRA, y = W x + (alpha / r) B A x, and nothing more; first
# what a file means that does not say it. Other values keep the names of the tensors and compute
# something else with them, or start from other base weights: "pissa", "olora", "loftq", "corda" and
# their like take the start of B A out of W. `null` says as little as a field that is not there.
PLAIN_LORA = {
    "peft_type": ("LORA",),
    "use_rslora": (False,),
    "alpha_pattern": ({},),
    "rank_pattern": ({},),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "ensure_weight_tying": (False,),
    "loftq_config": ({},),
    "modules_to_save": ([],),
    "layers_pattern": ([], ""),
}
# What does not change a trained adapter's numbers, or is read in load_adapter. A field that stands
# in neither list, such as one of a peft to come, is refused unless it is null.
OTHER_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
}


def save_adapter(lora: Lora, folder: Path, *, base_model: str, revision: str | None = None) -> None:
    """Write the adapter's current A and B as peft does; each of the two files is whole or absent.

    base_model  the hub's name or the absolute folder of the model they belong to: peft loads it
                unless it is given one
    revision    the hub's commit of it; None for a folder
    """
    config = {
        "peft_type": "LORA",
        "use_rslora": False,
        "alpha_pattern": {},
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        **({"revision": revision} if revision else {}),
        "bias": "none",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
    }
    make_folder(folder)
    # ASCII, other than write_json: peft reads the file in whatever encoding the machine is set to.
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    tensors = {f"{PREFIX}{name}{SUFFIX}": tensor for name, tensor in lora.sets["current"].items()}
    write_tensors(folder / TENSORS_FILE, tensors, {"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path) -> Lora:
    """Put the adapter in folder on model, which has none yet.

    Raises FileNotFoundError or ValueError as read_settings does, and where it does not fit.
    """
    saved = read_settings(folder)
    try:
        targets = _read_targets(saved, list(adaptable_layers(model)))
        tensors = read_adapter_tensors(folder)
        if not tensors:
            raise ValueError(f"all adapter tensors are missing in {TENSORS_FILE}")
        # Before memory is asked for: the settings may say a rank that no machine has room for.
        largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
        if saved["r"] > largest:
            raise ValueError(f"{CONFIG_FILE} has r={saved['r']}, larger than all of its tensors")
    except ValueError as error:
        raise ValueError(f"adapter {folder}: {error}") from error
    lora = attach_lora(model, rank=saved["r"], alpha=saved["lora_alpha"], targets=targets, seed=0)
    copy_exactly(tensors, lora.sets["current"])
    return lora


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the adapter in folder.

    Raises FileNotFoundError or ValueError where the adapter is not all there, or is more than plain
    LoRA (PLAIN_LORA).
    """
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no adapter in {folder}: {file} is missing")
    saved = read_object(folder / CONFIG_FILE)
    try:
        _check_plain(saved)
    except ValueError as error:
        raise ValueError(f"adapter {folder}: {error}") from error
    return saved


def _check_plain(saved: dict[str, Any]) -> None:
    """Raise ValueError, with the field's name, for settings that are not those of plain LoRA."""
    for field, value in saved.items():
        if value is None or field in OTHER_FIELDS:
            continue
        valid = PLAIN_LORA.get(field, ())
        # By type, too: 1 is no true, and an empty list is no empty object.
        if not any(type(value) is type(each) and value == each for each in valid):
            plain = " or ".join(map(repr, valid)) if valid else "null, since its meaning is unknown"
            raise ValueError(f"{CONFIG_FILE} has {field}={value!r}: valid is {plain}")
    missing = {"r", "lora_alpha", "target_modules"} - {
        field for field, value in saved.items() if value is not None
    }
    if missing:
        raise ValueError(f"{CONFIG_FILE} lacks {', '.join(sorted(missing))}")
    for field in ("target_modules", "exclude_modules"):
        typed(saved.get(field), list[str] | str | None, f"{CONFIG_FILE}: {field}")
    if typed(saved["r"], int, f"{CONFIG_FILE}: r") < 1:
        raise ValueError(f"{CONFIG_FILE}: r is {saved['r']}; valid: 1 or more")
    if typed(saved["lora_alpha"], float, f"{CONFIG_FILE}: lora_alpha") <= 0:
        raise ValueError(f"{CONFIG_FILE}: lora_alpha is {saved['lora_alpha']}; valid: above 0")
    layers = list[int] | int | None
    typed(saved.get("layers_to_transform"), layers, f"{CONFIG_FILE}: layers_to_transform")


def _read_targets(saved: dict[str, Any], paths: list[str]) -> tuple[str, ...]:
    """Return the targets for attach_lora: as they stand, or else the paths of the meant layers.

    paths  those of all layers that can be adapted
    Other than a list of names, peft has: a regex for the whole path, "all-linear", layers to leave
    out (exclude_modules), and the numbers of the layers that are meant (layers_to_transform).
    """
    targets = saved["target_modules"]
    excluded = saved.get("exclude_modules")
    numbers = saved.get("layers_to_transform")
    if isinstance(numbers, int):
        numbers = [numbers]
    if isinstance(targets, list) and not excluded and not numbers:
        return tuple(targets)
    if isinstance(targets, str) and numbers:
        raise ValueError("layers_to_transform goes with a list as target_modules, not with a text")
    chosen = [path for path in paths if _is_named(path, targets, "target_modules")]
    if numbers:
        # A target that is a whole path is meant wherever it stands.
        chosen = [path for path in chosen if path in targets or _layer_number(path) in numbers]
    if excluded:
        chosen = [path for path in chosen if not _is_named(path, excluded, "exclude_modules")]
    if not chosen:
        raise ValueError(f"target_modules={targets!r} matches no layer that can be adapted")
    return tuple(chosen)


def _is_named(path: str, names: str | list[str], field: str) -> bool:
    """Say whether a layer is meant by a regex, by "all-linear", or by a list of endings."""
    if not isinstance(names, str):
        return any(f".{path}".endswith(f".{name}") for name in names)
    if names.lower() == "all-linear" and field == "target_modules":
        return True
    try:
        return re.fullmatch(names, path) is not None
    except re.error as error:
        raise ValueError(f"{field}={names!r} is no regular expression: {error}") from error


def _layer_number(path: str) -> int | None:
    """Return the 3 of "model.layers.3.mlp.up_proj"."""
    found = re.search(r"\.[^.]+\.(\d+)\.", path)
    return int(found.group(1)) if found else None


def put_adapter(lora: Lora, folder: Path) -> None:
    """Copy a saved adapter's tensors into the current set of one that is attached, in place.

    Reads the tensors only, not the settings. Raises ValueError, with nothing copied, unless names
    and shapes are exactly those of the attached adapter.
    """
    copy_exactly(read_adapter_tensors(folder), lora.sets["current"])


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Return a saved adapter's tensors, by "<module path>.lora_A" and ".lora_B".

    ValueError where the file is damaged, or a number in it is not finite.
    """
    try:
        tensors = load_file(folder / TENSORS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS_FILE} is damaged: {error}") from error
    refuse_not_finite(tensors, f"adapter {folder}")
    return {
        name.removeprefix(PREFIX).removesuffix(SUFFIX): tensor for name, tensor in tensors.items()
    }
