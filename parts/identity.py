"""What a run stands on, and how it is known again: fingerprints of weights, files and rows.

A run goes on only with the weights, the prompts and the data that it began with, and an adapter is
put only on the weights that it was trained on. Their fingerprints therefore stand in the run's
record, as its identity. The record also says what else a result may depend on, such as versions and
the git commit; a run that goes on with others is told so. parts/runs.py keeps the record.
"""

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from parts.adapters import CONFIG_FILE
from parts.files import file_digest, read_object, read_sealed
from parts.model import published_name
from parts.recipe import EvalConfig
from parts.typed import typed
from parts.view import say

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
# A model's small files that decide on its numbers beside its weights, by what a message calls them.
MODEL_FILES = {
    "model_config": ("config.json",),
    "generation_config": ("generation_config.json",),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
}


def fingerprint(rows: list[Any]) -> str:
    """Return 16 hex digits that change with any field of any row, such as a problem."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits of SHA-256 over names, shapes, dtypes and bytes.

    tensors  dict(model.named_parameters()) without an adapter, or an adapter's state_dict()
    Copies one tensor at a time to the CPU.
    """
    return _tensors_fingerprint(sorted(tensors.items()))


def folder_fingerprint(folder: Path) -> str:
    """Return the weights_fingerprint of a model's files, one tensor at a time.

    It is of what is stored: neither the dtype nor the device that a run loads it in has a part in
    it, nor how the tensors are spread over files. Raises OSError or SafetensorError.
    """
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if not (folder / files[0]).is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} is damaged: it has no weight_map")
        files = sorted(set(typed([*weight_map.values()], list[str], f"{index}: weight_map")))
    with ExitStack() as stack:
        places = {}
        for name in files:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
            places |= dict.fromkeys(file.keys(), file)
        return _tensors_fingerprint(
            (name, file.get_tensor(name)) for name, file in sorted(places.items())
        )


def files_fingerprints(folder: Path) -> dict[str, str]:
    """Return a digest of each kind of small file of a model: its settings, its vocabulary."""
    found = {}
    for kind, names in MODEL_FILES.items():
        digests = [file_digest(folder / name) for name in names if (folder / name).is_file()]
        found[kind] = fingerprint(digests)
    return found


def _tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        as_bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(as_bytes.numpy().data)
    return digest.hexdigest()[:16]


def record_of(path: Path) -> Path | None:
    """Return the record of the run that a run or adapter folder is of; None where there is none."""
    path = path.resolve()  # "step_00005", "." and a link have their run folder elsewhere
    files = (folder / "config.json" for folder in (path, path.parent.parent))
    return next((file for file in files if file.is_file()), None)


def recorded_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of the base weights under a run or adapter folder.

    None where none was recorded.
    """
    record_file = record_of(path)
    return recorded_identity(record_file).get("base_weights") if record_file else None


def recorded_identity(record_file: Path) -> dict[str, Any]:
    """Return what a record says the run is of; ValueError where it is no object.

    Which names it has, and what they hold, is not checked.
    """
    return _recorded(record_file, "identity")


def recorded_settings(record_file: Path) -> dict[str, Any]:
    """Return the settings of a run's record, as unchecked as recorded_identity's."""
    return _recorded(record_file, "config")


def thinking_of(given: Mapping[str, Any], console: Console) -> dict[str, str]:
    """Return {"thinking": what the run of a typed --adapter had}; {} where it was typed, too.

    given  the typed flags of an evaluation
    No other setting of a run changes what its student reads of a problem. The console is told of
    any but the default, and where the user chose another than the run's.
    """
    record_file = record_of(Path(given["adapter"])) if "adapter" in given else None
    trained = recorded_settings(record_file).get("thinking") if record_file else None
    if trained is None:
        return {}
    if "thinking" in given:
        if (chosen := given["thinking"]) != trained:
            say(console, f"--thinking {chosen}: the adapter was trained with --thinking {trained}")
        return {}
    if trained != EvalConfig.thinking:
        say(console, f"--thinking {trained}, as the adapter was trained")
    return {"thinking": trained}


def tell_other_prompts(
    adapter: str | None,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    console: Console,
) -> None:
    """Say where an adapter was trained with other prompts than those of an evaluation.

    settings, identity  of the evaluation in one language
    Another language or thinking mode has other prompts anyhow, and nothing is said of these.
    """
    record_file = record_of(Path(adapter)) if adapter else None
    if record_file is None:
        return
    trained = recorded_settings(record_file)
    held = recorded_identity(record_file)
    alike = all(trained.get(name) == settings[name] for name in ("lang", "thinking"))
    if not alike or held.get("prompt_template") in (None, identity["prompt_template"]):
        return
    then, now = held.get("template_date"), identity["template_date"]
    what = "another wording or chat template"
    if then != now:
        what = f"another date, {then}, which the chat template writes; here it is {now}"
    say(console, f"the prompts are not those that the adapter was trained with: they had {what}")


def _recorded(record_file: Path, name: str) -> dict[str, Any]:
    part = read_sealed(record_file).get(name, {})
    if not isinstance(part, dict):
        raise ValueError(f"{record_file} is damaged: it has no {name}")
    return part


def refuse_foreign_adapter(
    path: Path, base_weights: str, model: str, folder: Path, console: Console | None = None
) -> None:
    """Raise ValueError for an adapter that was trained on other base weights than the model's.

    folder   the model's
    console  where is said that nothing tells
    """
    is_foreign = _is_foreign(path, base_weights, folder)
    if is_foreign:
        raise ValueError(f"adapter {path} was trained on other base weights than those of {model}")
    if is_foreign is None and console:
        say(console, f"adapter {path}: nothing says on which base weights it was trained")


def _is_foreign(path: Path, base_weights: str, folder: Path) -> bool | None:
    """Say whether an adapter is of other base weights than the model in a folder; None: who knows.

    A run's record says it. An adapter that was copied out of its run still names its base: a folder
    that may be here, or a name on the hub.
    """
    recorded = recorded_fingerprint(path)
    if recorded is not None:
        return recorded != base_weights
    settings = path / CONFIG_FILE
    named = read_object(settings).get("base_model_name_or_path") if settings.is_file() else None
    if not isinstance(named, str):
        return None
    if (Path(named) / "config.json").is_file():
        return folder_fingerprint(Path(named)) != base_weights
    own, commit = published_name(folder)
    if commit is None or named.count("/") != 1:
        return None
    if named == own:
        return False
    # Others publish copies of a model under its bare name, which may have its weights or not.
    is_other = named.partition("/")[2].lower() != own.partition("/")[2].lower()
    return True if is_other else None


def provenance() -> dict[str, Any]:
    """Return what a result may depend on beside its settings: versions, platform, git commit.

    What git says is None outside a clone, and where there is no git.
    """
    commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
    changes = _git("status", "--porcelain")
    packages = {name: version(name) for name in PACKAGES}
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **packages},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "git_commit": commit or None,
        "git_uncommitted_changes": bool(changes) if commit else None,
    }


def circumstances(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result may depend on and a run does not compare, by name, of its record.

    A package by its name; a record that lacks something has None there.
    """
    named = ("platform", "threads", "git_commit", "git_uncommitted_changes")
    versions = record.get("versions")
    packages = versions if isinstance(versions, dict) else {}
    return {**packages, **{name: record.get(name) for name in named}}


def differing_circumstances(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return "threads 1, now 2" and so on, for what differs between two records."""
    before, after = circumstances(then), circumstances(now)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name} {before.get(name)}, now {after.get(name)}" for name in names]


def _git(*arguments: str) -> str:
    """Return what git says of the project's folder, "" outside a clone or without git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace").strip()
