"""The run folder: its record, logs, adapters, and the state from which a stopped run goes on.

config.json        settings, identity (hashes of weights, prompts and data), versions, git commit
metrics.jsonl      one line a step
completions.jsonl  some rollouts of every step, whole
adapters/step_N/   adapter_model.safetensors and adapter_config.json, as peft writes them
resume.safetensors adapter, moving average and optimiser state of the last save
before.json, after.json   the evaluations at both ends
best.json          which adapter was the best on development problems, with --eval-every

An evaluation's folder is one, too; its record is settings.json. Whatever is replaced is replaced
whole.
"""

import hashlib
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parts.files import (
    PARTIAL,
    append_rows,
    json_lines,
    read_object,
    read_rows,
    whole_file,
    write_json,
    write_text,
)

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
LOGS = ("metrics.jsonl", "completions.jsonl")
LENGTHS = {"steps", "token_budget"}  # settings that say where a run ends


@dataclass(frozen=True)
class Run:
    """One run folder, or an evaluation's, whose record is settings.json."""

    folder: Path
    record: str = "config"

    @property
    def record_file(self) -> Path:
        """The file that says what the folder is a run of."""
        return self.folder / f"{self.record}.json"

    def check(self, config: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> None:
        """Raise ValueError if the folder holds anything but a run of this config and identity.

        Touches nothing.
        """
        if not self.folder.exists():
            return
        # A kill while the record is first written leaves nothing but a partial file.
        if self.folder.is_dir() and all(
            path.name.endswith(PARTIAL) for path in self.folder.iterdir()
        ):
            return
        if not self.record_file.is_file():
            raise ValueError(
                f"{self.folder} exists and is not a run folder (no {self.record_file.name}); "
                "choose another --out"
            )
        stored = read_object(self.record_file)
        for name, wanted in ((self.record, config), ("identity", identity or {})):
            held = stored.get(name)
            if not isinstance(held, dict):
                raise ValueError(f"{self.record_file} is damaged: it has no {name}")
            differing = [key for key, value in wanted.items() if held.get(key) != value]
            if not differing:
                continue
            said = f"{self.folder} holds a run that differs in {', '.join(differing)}; "
            if set(differing) <= LENGTHS:
                # A longer run is another run from its first step on.
                said += "the learning rate falls to 0 at a run's end, so a run cannot be extended; "
                said += "to train for longer, start anew: "
            raise ValueError(f"{said}choose another --out")

    def create(self, config: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Make the folder and write its record, unless a run of this config already has."""
        record = {self.record: config, "identity": identity, **provenance()}
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.record_file.is_file():
            write_json(self.record_file, record)

    def recorded_day(self) -> str | None:
        """Return the day that the run's chat template writes for ever, None in a new run.

        None, too, where the template writes no date.
        """
        if not self.record_file.is_file():
            return None
        return read_object(self.record_file).get("identity", {}).get("template_date")

    def log(self, metrics: Mapping[str, Any], completions: list[dict[str, Any]]) -> None:
        """Add a step's metrics and completions."""
        append_rows(self.folder / "metrics.jsonl", [metrics])
        append_rows(self.folder / "completions.jsonl", completions)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of every step so far."""
        return read_rows(self.folder / "metrics.jsonl")

    def cut_back(self, step: int) -> None:
        """Drop what was logged after `step`, and a torn last line: those steps are taken again."""
        for name in LOGS:
            path = self.folder / name
            if path.is_file():
                write_text(path, json_lines(row for row in read_rows(path) if row["step"] <= step))

    def adapter_folder(self, step: int) -> Path:
        """Return where the adapter after `step` is saved."""
        return self.folder / "adapters" / f"step_{step:05d}"

    def save_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the resumable state after `step`."""
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        with whole_file(self.folder / "resume.safetensors") as partial:
            save_file(contiguous, partial, metadata={"step": str(step)})

    def load_state(self) -> tuple[int, int, dict[str, Tensor]]:
        """Return the last saved step, the tokens sampled up to it, and its tensors.

        (0, 0, {}) for a new run.
        """
        path = self.folder / "resume.safetensors"
        if not path.is_file():
            return 0, 0, {}
        try:
            with safe_open(path, framework="pt") as file:
                saved = (file.metadata() or {}).get("step", "")
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        sampled = {str(row.get("step")): row.get("sampled_tokens") for row in self.metrics()}
        tokens = sampled.get(saved)
        if not saved.isdecimal() or not isinstance(tokens, int):
            log = self.folder / "metrics.jsonl"
            raise ValueError(f"{path} or {log} is damaged: they do not agree on the last step")
        return int(saved), tokens, tensors

    def check_whole(self) -> None:
        """Raise ValueError for a damaged file, which it names; before a run goes on with it."""
        self.load_state()
        for name in LOGS:
            path = self.folder / name
            if not all(isinstance(row.get("step"), int) for row in read_rows(path)):
                raise ValueError(f"{path} is damaged: a line has no step")

    def read_evaluation(self, when: str) -> Any | None:
        """Return the evaluation "before" or "after" training, None where it was not made yet."""
        path = self.folder / f"{when}.json"
        return read_object(path) if path.is_file() else None

    def write_evaluation(self, when: str, content: Any) -> None:
        """Keep the evaluation "before" or "after" training."""
        write_json(self.folder / f"{when}.json", content)


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
        files = sorted(set(read_object(index)["weight_map"].values()))
    with ExitStack() as stack:
        places = {}
        for name in files:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
            places |= dict.fromkeys(file.keys(), file)
        return _tensors_fingerprint(
            (name, file.get_tensor(name)) for name, file in sorted(places.items())
        )


def _tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        as_bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(as_bytes.numpy().data)
    return digest.hexdigest()[:16]


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


def _git(*arguments: str) -> str:
    """Return what git says of the project's folder, "" outside a clone or without git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return ""
    return done.stdout.decode(errors="replace").strip()


def last_adapter_folder(path: Path) -> Path:
    """Return the adapter that `path` stands for: itself, or the last one of a run folder.

    FileNotFoundError where there is none.
    """
    if (path / "adapter_config.json").is_file():
        return path
    # By number, as the name's five digits are too few for a long run. Other folders that someone
    # put there, such as a copy, are not the run's.
    saved = {
        int(found.group(1)): folder
        for folder in (path / "adapters").glob("step_*")
        if (found := re.fullmatch(r"step_(\d+)", folder.name))
    }
    if not saved:
        raise FileNotFoundError(
            f"{path} is neither an adapter folder nor a run folder with a saved adapter"
        )
    return saved[max(saved)]


def recorded_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of the base weights under a run or adapter folder.

    None where none was recorded.
    """
    for folder in (path, path.parent.parent):
        if (folder / "config.json").is_file():
            return read_object(folder / "config.json").get("identity", {}).get("base_weights")
    return None


def refuse_foreign_adapter(path: Path, base_weights: str, model: str) -> None:
    """Raise ValueError for an adapter that was trained on other base weights than the model's."""
    if recorded_fingerprint(path) not in (None, base_weights):
        raise ValueError(f"adapter {path} was trained on other base weights than those of {model}")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as flat named tensors: "optimizer/3/exp_avg"."""
    return {
        f"optimizer/{index}/{name}": tensor
        for index, entry in optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what optimizer_tensors returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix, *place = key.split("/")
        if prefix == "optimizer":
            index, name = place
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the yielded list, so that a step can be finished.

    A second one acts at once.
    """
    received: list[int] = []

    def _remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, _remember)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
