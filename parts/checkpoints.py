"""Saved states: what a stopped run goes on from, each with what vouches for it.

resume/step_00005.safetensors  adapter, moving average and optimiser state after step 5
resume/step_00005.json         the length and digest of that file and of each log up to step 5, and
                               a digest of itself

The second file is written last, so a state that has none was never finished. Several are kept:
where the newest is damaged, or does not fit the logs, an older one is used, and the steps after it
are taken again, which gives the same bytes. Bytes are compared, not times or names, so any change
of a state or of what was logged before it is seen.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from parts.files import (
    PARTIAL,
    file_digest,
    make_folder,
    read_sealed,
    remove_file,
    whole_file,
    write_sealed,
)

FOLDER = "resume"
TENSORS = ".safetensors"
VOUCHER = ".json"


@dataclass(frozen=True)
class State:
    """A saved state that was found whole."""

    step: int
    file: Path

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        try:
            return load_file(self.file)
        except SafetensorError as error:
            raise ValueError(f"{self.file} is damaged: {error}") from error

    def check(self, wanted: Mapping[str, Tensor], optimizer: Collection[str]) -> None:
        """Raise ValueError unless the state has these tensors, and all of the optimiser's or none.

        wanted     name -> tensor of the shape that it is to have
        optimizer  the optimiser's names; it has none before its first update
        """
        with safe_open(self.file, framework="pt") as file:
            held = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        unfit = [name for name in wanted if held.get(name) != list(wanted[name].shape)]
        missing = {*optimizer} - held.keys()
        if held.keys() & {*optimizer}:
            unfit += sorted(missing)
        unfit += sorted(held.keys() - {*wanted, *optimizer})
        if unfit:
            raise ValueError(
                f"{self.file} is damaged: {len(unfit)} tensors are missing, unknown or misshapen, "
                f"such as {unfit[0]}; start anew with another --out"
            )


def save(
    run_folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    logs: Collection[str],
    keep: int,
    due: bool = True,
    spare: Collection[int] = (),
) -> None:
    """Write the state after `step`; of the older ones leave `keep` - 1.

    logs   files of the run, by name, that had grown up to this step
    keep   how many states there are to be, this one included
    due    whether a run that was never stopped saves here, too; a state that is not due is a
           signal's, and goes with the next save
    spare  steps whose states stay whatever `keep` says, such as the best one's
    """
    folder = run_folder / FOLDER
    make_folder(folder)
    file = _file(folder, step, TENSORS)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_tensors(file, contiguous, {"step": str(step)})
    voucher = {
        "step": step,
        "due": due,
        "state": measured(file),
        "logs": {name: measured(run_folder / name) for name in logs},
    }
    write_sealed(_file(folder, step, VOUCHER), voucher)
    _remove_older(folder, step, keep=keep, spare=spare)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as safetensors does, whole or not at all; raises CannotWrite.

    Its own writer goes through a temporary file, which a kill would leave behind for ever.
    """
    content = tensor_bytes(dict(tensors), metadata=metadata)
    with whole_file(path) as partial:
        partial.write_bytes(content)


def measured(file: Path, size: int | None = None) -> dict[str, Any]:
    """Return the length of a file, or `size` of its bytes, and their digest; 0 of no file."""
    if not file.is_file():
        return {"bytes": 0, "sha256": None}
    size = file.stat().st_size if size is None else size
    return {"bytes": size, "sha256": file_digest(file, size) if size else None}


def saved_steps(run_folder: Path) -> list[int]:
    """Return the steps whose states were finished, the newest first; not whether they are whole."""
    found = (re.fullmatch(r"step_(\d+)\.json", path.name) for path in _files(run_folder))
    return sorted({int(match[1]) for match in found if match}, reverse=True)


def newest(run_folder: Path) -> tuple[State | None, list[str]]:
    """Return the newest state that is whole and fits the logs, and what is wrong with newer ones.

    (None, []) where nothing was saved yet. Writes nothing.
    """
    passed_over = []
    for step in saved_steps(run_folder):
        fault = _fault(run_folder, step)
        if fault is None:
            return State(step, _file(run_folder / FOLDER, step, TENSORS)), passed_over
        passed_over.append(fault)
    return None, passed_over


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as flat named tensors: "optimizer/3/exp_avg"."""
    return {
        f"optimizer/{index}/{name}": tensor
        for index, entry in optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }


def check_state(run_folder: Path, adapter: Mapping[str, Tensor], trained: Sequence[Tensor]) -> None:
    """Raise ValueError where the run's newest state lacks a tensor, or has one of another shape.

    adapter  its tensors by name, as the state is to hold them
    trained  what the optimiser trains: AdamW keeps two means of the gradient of each, and a count
    """
    state, _ = newest(run_folder)
    if state is None:
        return
    entries = [
        f"optimizer/{index}/{name}"
        for index in range(len(trained))
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    state.check({f"lora/{name}": tensor for name, tensor in adapter.items()}, entries)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what optimizer_tensors returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, *place = key.split("/")
        if prefix == "optimizer":
            index, name = place
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _fault(run_folder: Path, step: int) -> str | None:
    """Return what is wrong with a state, in a line that names the file; None where it is whole."""
    folder = run_folder / FOLDER
    try:
        voucher = read_sealed(_file(folder, step, VOUCHER))
        if voucher["step"] != step:
            return f"{_file(folder, step, VOUCHER)} is damaged: it is of another step"
        wanted = {_file(folder, step, TENSORS): voucher["state"]}
        wanted |= {run_folder / name: held for name, held in voucher["logs"].items()}
        for file, held in wanted.items():
            is_log = file.parent == run_folder
            size = held["bytes"] if is_log and file.is_file() else None
            if measured(file, size) != held:
                what = f"the log up to step {step}" if is_log else "it"
                return f"{file} is damaged: {what} is not what was saved"
    except (KeyError, TypeError, AttributeError):
        return f"{_file(folder, step, VOUCHER)} is damaged: it does not vouch for a state"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _remove_older(folder: Path, step: int, *, keep: int, spare: Collection[int]) -> None:
    """Remove all states but `keep` of them, those to spare, and the one after `step`.

    A newer state is there only where it was damaged, and a partial file only after a kill.
    """
    kept = {step}
    for older in saved_steps(folder.parent):
        has_room = older < step and older not in spare and len(kept) < keep
        if has_room and _is_due(_file(folder, older, VOUCHER)):
            kept.add(older)
    kept |= {*spare}
    names = {_file(folder, each, end).name for each in kept for end in (TENSORS, VOUCHER)}
    for path in _files(folder.parent):
        ours = re.fullmatch(r"step_\d+\.(?:json|safetensors)", path.name.removesuffix(PARTIAL))
        if ours and path.name not in names:
            remove_file(path)


def _is_due(voucher: Path) -> bool:
    """Say whether a state is one of a run that was never stopped; a damaged one is none."""
    try:
        return read_sealed(voucher).get("due") is True
    except (OSError, ValueError):
        return False


def _files(run_folder: Path) -> list[Path]:
    folder = run_folder / FOLDER
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _file(folder: Path, step: int, suffix: str) -> Path:
    return folder / f"step_{step:05d}{suffix}"
