"""The run folder: settings, metrics, completions, adapters, and the state from which a stopped run goes on exactly.

config.json        settings, identity (hashes of weights, prompts and data), versions, git commit
metrics.jsonl      one line a step
completions.jsonl  some rollouts of every step, whole
adapters/step_N/   adapter_model.safetensors and adapter_config.json, as peft writes them
resume.safetensors adapter, moving average and optimiser state of the last save, written whole or not at all
before.json, after.json   the evaluations at both ends
"""

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LOGGED_ROLLOUTS = 4  # completions of every step that are kept whole
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; ValueError names the file, line and column where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_recipe(model_folder: Path, method: str = "copsd") -> dict[str, Any]:
    """Return the settings that the folder's recipe.json has for this model, {} where there is none.

    Each entry is {"value": ..., "why": ...}, with another value under a method's name where that differs. Files in it
    are relative to the folder; "{lang}" stands for the language.
    """
    path = model_folder / "recipe.json"
    if not path.is_file():
        return {}
    recipe = {name: entry.get(method, entry["value"]) for name, entry in read_json(path).items()}
    for name in ("data", "eval_data"):
        if name in recipe:
            recipe[name] = os.path.normpath(model_folder / recipe[name])
    return recipe


def fingerprint(rows: list[Any]) -> str:
    """Return 16 hex digits that change with any field of any row, such as a problem."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits of SHA-256 over names, shapes, dtypes and bytes; copies one tensor at a time to the CPU.

    tensors  dict(model.named_parameters()) before an adapter is attached, or an adapter's state_dict()
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Return what a result may depend on beside its settings: versions, platform, git commit (None outside a clone)."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "git_commit": commit.stdout.strip() or None,
        "git_uncommitted_changes": bool(changed.stdout.strip()),
    }


def adapter_folder(path: Path) -> Path:
    """Return the adapter that `path` stands for: itself, or the last one of a run folder. FileNotFoundError if none."""
    if (path / "adapter_config.json").is_file():
        return path
    saved = sorted((path / "adapters").glob("step_*"))
    if not saved:
        raise FileNotFoundError(
            f"{path} is neither an adapter folder nor a run folder with a saved adapter"
        )
    return saved[-1]


def recorded_fingerprint(path: Path) -> str | None:
    """Return the fingerprint of the base weights under a run or adapter folder, None where none was recorded."""
    for folder in (path, path.parent.parent):
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json").get("identity", {}).get("base_weights")
    return None


@dataclass(frozen=True)
class Run:
    """One run folder, or an evaluation's, whose record is settings.json."""

    folder: Path
    record: str = "config"

    def check(self, config: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> None:
        """Raise ValueError if the folder is in use by anything but a run of this config and identity; touch nothing."""
        file = self.folder / f"{self.record}.json"
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        if not file.is_file():
            raise ValueError(
                f"{self.folder} exists and is not a run folder (no {file.name}); choose another --out"
            )
        stored = read_json(file)
        for name, wanted in ((self.record, config), ("identity", identity or {})):
            differing = [
                key for key, value in wanted.items() if stored.get(name, {}).get(key) != value
            ]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a run that differs in {', '.join(differing)}; choose another --out"
                )

    def create(self, config: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Make the folder and write its record, unless a run of this config already has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.record}.json"
        if not file.is_file():
            write_json(file, {self.record: config, "identity": identity, **provenance()})

    def append(self, file: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a .jsonl file and flush them."""
        with (self.folder / file).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def whole_rows(self, file: str) -> list[dict[str, Any]]:
        """Return the rows of a .jsonl file, [] where there is none, and cut off a torn last line."""
        path = self.folder / file
        if not path.is_file():
            return []
        *lines, torn = path.read_bytes().split(b"\n")
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))
        try:
            return [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is broken before its last line: {error}") from error

    def cut_back(self, step: int) -> None:
        """Drop what was logged after `step`, and a torn last line: those steps will be taken again."""
        for file in ("metrics.jsonl", "completions.jsonl"):
            path = self.folder / file
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                whole = [
                    line
                    for line in lines
                    if line.endswith("\n") and json.loads(line)["step"] <= step
                ]
                partial = path.with_name(file + ".partial")
                partial.write_text("".join(whole), encoding="utf-8")
                os.replace(partial, path)

    def save_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the resumable state after `step`, whole or not at all."""
        partial = self.folder / "resume.partial"
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"step": str(step)})
        os.replace(partial, self.folder / "resume.safetensors")

    def load_state(self) -> tuple[int, dict[str, Tensor]]:
        """Return the last saved step and its tensors; (0, {}) for a new run."""
        path = self.folder / "resume.safetensors"
        if not path.is_file():
            return 0, {}
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"]), {
                name: file.get_tensor(name) for name in file.keys()
            }  # noqa: SIM118


class Tally:
    """What a step's micro-batches leave behind: the loss, and each token's statistics by name, on the CPU."""

    def __init__(self):
        self.loss = 0.0
        self.tokens: dict[str, list[Tensor]] = {}
        self.rows: list[tuple[int, int]] = []  # row, tokens

    def add(
        self, loss: Tensor, stats: dict[str, Tensor], rows: list[int], lengths: list[int]
    ) -> None:
        """Add a micro-batch: its share of the loss, its tokens' statistics, its rows and their lengths."""
        self.loss += loss.item()
        self.rows += zip(rows, lengths, strict=True)
        for name, tensor_N in stats.items():
            self.tokens.setdefault(name, []).append(tensor_N.float().cpu())

    def mean(self, name: str) -> float | None:
        """Return a statistic's mean over the step's tokens, None if there are none."""
        return torch.cat(self.tokens[name]).mean().item() if name in self.tokens else None

    def row_means(self, name: str) -> dict[int, float]:
        """Return a statistic's mean over each row's tokens."""
        by_row = torch.cat(self.tokens[name]).split([length for _, length in self.rows])
        return {
            row: tokens_C.mean().item()
            for (row, _), tokens_C in zip(self.rows, by_row, strict=True)
        }


def completion_rows(
    step: int,
    problems: list[Any],
    rollouts: list[Any],
    scores: Mapping[str, Any],
    decode: Callable[..., Any],
) -> list[dict[str, Any]]:
    """Return some of the step's rollouts whole, for completions.jsonl, evenly spread: English ones come first.

    scores  name -> each row's value, to stand beside it
    """
    spread = range(0, len(rollouts), max(1, len(rollouts) // LOGGED_ROLLOUTS))[:LOGGED_ROLLOUTS]
    return [
        {
            "step": step,
            "problem_id": problems[row].id,
            "prompt": decode(rollouts[row].prompt_ids),
            "completion": decode(rollouts[row].completion_ids),
            "answer": problems[row].answer,
            "finish_reason": rollouts[row].finish_reason,
            "tokens": len(rollouts[row].completion_ids),
            **{name: values[row] for name, values in scores.items()},
        }
        for row in spread
    ]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as flat named tensors: "optimizer/3/exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{index}/{name}": tensor
        for index, entry in state.items()
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
    """Collect SIGINT and SIGTERM in the yielded list, so that a step can be finished; a second one acts at once."""
    received: list[int] = []

    def _remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        n: signal.signal(n, _remember) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
