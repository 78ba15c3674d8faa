"""The run folder: its record, logs, adapters, and the state from which a stopped run goes on.

config.json        settings, identity (hashes of weights, prompts and data), versions, git commit
                   (parts/identity.py)
metrics.jsonl      one line a step
completions.jsonl  some rollouts of every step, whole
adapters/step_N/   adapter_model.safetensors and adapter_config.json, as peft writes them
resume/            the last saved states, from which a stopped run goes on (parts/checkpoints.py)
heldout.jsonl      the problems that the run reports, where no file holds just these
before.json, after.json   the evaluations at both ends
dev_before.json    that of the development problems before the first step, with --eval-every
best.json          which adapter was the best on development problems, with --eval-every
digests.json       length and digest of what is finished: adapters and evaluations
owner.lock         the process that works here, while it does (parts/owner.py)

An evaluation's folder is one, too; its record is settings.json. Whatever is replaced is replaced
whole.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parts import checkpoints, owner
from parts.files import (
    PARTIAL,
    CannotWrite,
    append_rows,
    json_lines,
    make_folder,
    read_object,
    read_rows,
    read_sealed,
    remedied,
    require_space,
    write_json,
    write_sealed,
    write_text,
)
from parts.identity import differing_circumstances, provenance, recorded_identity
from parts.stops import stop_signals as stop_signals  # stays importable from here

LOGS = ("metrics.jsonl", "completions.jsonl")
FOLDERS = ("adapters", checkpoints.FOLDER)
SUFFIXES = (".json", ".jsonl", ".safetensors", ".md", ".png")  # of files of ours
DEV_BEFORE = "dev_before"
EVALUATIONS = ("before", "after", DEV_BEFORE)  # that a run makes once; each is a file of its name
LENGTHS = {"steps", "token_budget"}  # settings that say where a run ends
# Settings that are paths, each with the fingerprint, in a record's identity, of what is there.
CONTENTS = {
    "model": "base_weights",
    "adapter": "adapter_weights",
    "data": "training_data",
    "eval_data": "heldout_data",
    "warm_start": "warm_start",
}
DIGESTS = "digests.json"
# What to do about a file that is damaged.
START_ANEW = "start anew with another --out"
MAKE_AGAIN = "remove it to have it made again"


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
        # A kill while the record is first written leaves nothing but these.
        ours = {self.record_file.name + PARTIAL, owner.LOCK}
        if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= ours:
            return
        if not self.record_file.is_file():
            raise ValueError(
                f"{self.folder} exists and is not a run folder (no {self.record_file.name}); "
                "choose another --out"
            )
        self._check_kinds()
        with remedied(START_ANEW):
            stored = read_sealed(self.record_file)
        for name, wanted in ((self.record, config), ("identity", identity or {})):
            held = stored.get(name)
            if not isinstance(held, dict):
                raise ValueError(f"{self.record_file} is damaged: it has no {name}; {START_ANEW}")
            known = stored.get("identity")
            differing = [
                key
                for key, value in wanted.items()
                if held.get(key) != value and not _is_known_otherwise(key, value, held, known)
            ]
            if not differing:
                continue
            said = f"{self.folder} holds a run that differs in {', '.join(differing)}; "
            if set(differing) <= LENGTHS:
                # A longer run is another run from its first step on.
                said += "the learning rate falls to 0 at a run's end, so a run cannot be extended; "
                said += "to train for longer, start anew: "
            raise ValueError(f"{said}choose another --out")

    def _check_kinds(self) -> None:
        """Raise ValueError where a file has a folder's name or the other way round.

        It would else be found out when the file is written, which may be hours later.
        """
        states = self.folder / checkpoints.FOLDER
        for path in [*self.folder.iterdir(), *states.glob("*")]:
            if path.name in FOLDERS and not path.is_dir():
                raise ValueError(f"{path} is no folder; remove it")
            if path.suffix in SUFFIXES and not path.is_file():
                raise ValueError(f"{path} is no file; remove it")

    def create(self, config: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
        """Make the folder, claim it and write its record, unless a run of this config already has.

        Returns what is to be said: whom it was taken over from, and what has changed since it was
        begun that the result may depend on. ValueError: another process has it.
        """
        record = {self.record: config, "identity": identity, **provenance()}
        make_folder(self.folder)
        said = [owner.claim(self.folder)]
        self.check(config, identity)  # another process may have made it since it was looked at
        if not self.record_file.is_file():
            write_sealed(self.record_file, record)
        elif changed := differing_circumstances(read_sealed(self.record_file), record):
            said.append(f"{self.folder} was begun with {'; '.join(changed)}: results may differ")
        return "\n".join(filter(None, said)) or None

    def claim(self) -> str | None:
        """Make this process the owner of a folder that is a run's already, before it is read.

        Returns what is to be said: whom it was taken over from. ValueError: another process has it.
        """
        return owner.claim(self.folder) if self.record_file.is_file() else None

    def recorded_day(self) -> str | None:
        """Return the day that the run's chat template writes for ever, None in a new run.

        None, too, where the template writes no date.
        """
        if not self.record_file.is_file():
            return None
        with remedied(START_ANEW):
            return recorded_identity(self.record_file).get("template_date")

    def log(self, metrics: Mapping[str, Any], completions: list[dict[str, Any]]) -> None:
        """Add a step's metrics and completions."""
        append_rows(self.folder / "metrics.jsonl", [metrics])
        append_rows(self.folder / "completions.jsonl", completions)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of every step so far."""
        return self._rows("metrics.jsonl")

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a log; [] where it is not there."""
        with remedied(START_ANEW):
            return read_rows(self.folder / name)

    def cut_back(self, step: int) -> None:
        """Drop what was logged after `step`, and a torn last line: those steps are taken again."""
        for name in LOGS:
            path = self.folder / name
            if path.is_file():
                write_text(path, json_lines(row for row in self._rows(name) if row["step"] <= step))

    def adapter_folder(self, step: int) -> Path:
        """Return where the adapter after `step` is saved."""
        return self.folder / "adapters" / f"step_{step:05d}"

    def save_state(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        keep: int = 3,
        *,
        due: bool = True,
        spare: Collection[int] = (),
    ) -> None:
        """Write the resumable state after `step`, and leave `keep` of them; vouch for its adapter.

        due    False for a signal's save between two of the run's own; see parts.checkpoints.save
        spare  steps whose states stay beside those, such as the best one's
        Raises CannotWrite, before anything is written, where the disk has no room for it.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        require_space(self.folder, size, "the next save")
        if self.adapter_folder(step).is_dir():
            self.vouch(*sorted(self.adapter_folder(step).iterdir()))
        checkpoints.save(self.folder, step, tensors, logs=LOGS, keep=keep, due=due, spare=spare)

    def load_state(self) -> tuple[int, int, dict[str, Tensor]]:
        """Return the newest saved step, the tokens sampled up to it, and its tensors.

        (0, 0, {}) for a new run. Raises ValueError where states were saved and none is whole.
        """
        state, passed_over = checkpoints.newest(self.folder)
        if state is None:
            if passed_over:
                raise ValueError(f"{passed_over[0]}; no older state is whole; choose another --out")
            return 0, 0, {}
        return state.step, self._row(state.step)["sampled_tokens"], state.tensors()

    def logged(self, step: int) -> dict[str, Any]:
        """Return the metrics of a saved step, {} of step 0."""
        return self._row(step) if step else {}

    def _row(self, step: int) -> dict[str, Any]:
        """Return the metrics of a step; ValueError where the log lacks them."""
        row = {each.get("step"): each for each in self.metrics()}.get(step, {})
        if type(row.get("sampled_tokens")) is not int:
            log = self.folder / "metrics.jsonl"
            raise ValueError(
                f"{log} is damaged: it has no tokens of the last saved step, {step}; {START_ANEW}"
            )
        return row

    def check_whole(self) -> list[str]:
        """Raise ValueError for a damaged file, which it names; before a run goes on with it.

        Returns what is to be said: the newest states that are damaged and passed over for another.
        """
        for name in LOGS:
            if not all(type(row.get("step")) is int for row in self._rows(name)):
                path = self.folder / name
                raise ValueError(f"{path} is damaged: a line has no step; {START_ANEW}")
        self.check_digests()
        state, passed_over = checkpoints.newest(self.folder)
        if state is None and passed_over:
            raise ValueError(f"{passed_over[0]}; no older state is whole; choose another --out")
        if state is None:
            return []
        self._row(state.step)
        said = [f"{fault}; going on from step {state.step}" for fault in passed_over]
        if gone := [step for step in self._gone_adapters() if step <= state.step]:
            names = ", ".join(self.adapter_folder(step).name for step in gone)
            said.append(f"{self.folder}/adapters no longer has {names}; the run goes on without")
        return said

    def _gone_adapters(self) -> list[int]:
        """Return the steps whose adapters were saved and are not there any more, in order."""
        names = (re.match(r"adapters/step_(\d+)/", name) for name in self._digests())
        saved = sorted({int(name[1]) for name in names if name})
        return [step for step in saved if not self.adapter_folder(step).is_dir()]

    def _digests(self) -> dict[str, Any]:
        """Return what is kept of the files that are vouched for, by their names."""
        path = self.folder / DIGESTS
        with remedied("remove it to go on; what it vouched for is then not checked"):
            return read_sealed(path, always=True) if path.is_file() else {}

    def _keep_digests(self, held: Mapping[str, Any]) -> None:
        write_sealed(self.folder / DIGESTS, held)

    def vouch(self, *files: Path) -> None:
        """Keep the length and digest of files that will not change."""
        names = {file.relative_to(self.folder).as_posix(): file for file in files}
        found = {name: checkpoints.measured(file) for name, file in names.items()}
        self._keep_digests({**self._digests(), **found})

    def vouch_anew(self, *files: Path) -> None:
        """Vouch for those of the files that are there and that nothing vouches for.

        A kill between a file and its digest leaves such. Of a folder that is owned only.
        """
        held = self._digests()
        names = {file.relative_to(self.folder).as_posix(): file for file in files}
        if new := [file for name, file in names.items() if file.is_file() and name not in held]:
            self.vouch(*new)

    def disown(self, path: Path) -> None:
        """Keep no digest of a file, or of any in a folder, that is about to be written anew.

        A kill between its writing and its new digest would else leave it looking damaged.
        """
        held = self._digests()
        others = {n: each for n, each in held.items() if not (self.folder / n).is_relative_to(path)}
        if len(others) < len(held):
            self._keep_digests(others)

    def add_rows(self, file: Path, rows: Sequence[Mapping[str, Any]], *, after: int) -> None:
        """Append rows that will not change to a file of `after` rows, and keep a digest of each.

        Only what is new is digested: a file that grows chunk by chunk is not read for each of them.
        Raises CannotWrite, also where the file is gone: new rows would stand for its first.
        """
        if after and not file.is_file():
            raise CannotWrite(f"{file} is not there any more; repeat the command to make it again")
        held = self._digests()
        name = file.relative_to(self.folder).as_posix()
        digests = held.get(name, [])
        if len(digests) != after:  # rows were cut off, or a kill came between rows and their digest
            digests = line_digests(file.read_bytes()) if file.is_file() else []
        append_rows(file, rows)
        held[name] = digests + line_digests(json_lines(rows).encode())
        self._keep_digests(held)

    def check_digests(self, under: str = "") -> None:
        """Raise ValueError for a file that is not what it was when it was vouched for.

        under  the path, below the folder, of what is looked at; "": everything
        A file that was removed is no error: an evaluation is made again, and old adapters may go,
        but not a part of one. Nor are rows that are missing at the end of a file of rows, which are
        made again, too.
        """
        for name, held in self._digests().items():
            file = self.folder / name
            if not name.startswith(under):
                continue
            if not file.is_file():
                if name.startswith("adapters/") and file.parent.is_dir():
                    remedy = f"remove {file.parent} to go on without it"
                    raise ValueError(f"{file} is missing, so this adapter is damaged; {remedy}")
                continue
            if isinstance(held, list):
                found = line_digests(file.read_bytes())
                both = min(len(found), len(held))
                is_whole = found[:both] == held[:both]
            else:
                is_whole = checkpoints.measured(file) == held
            if not is_whole:
                # Of an adapter one file is no use without the other.
                whole = file.parent if name.startswith("adapters/") else "it"
                what = f"{file} is damaged: it is not what was written"
                raise ValueError(f"{what}; remove {whole} to go on without it")

    def inventory(self) -> dict[str, Any]:
        """Return length and digest of each file of a finished run; its saved states may go."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in files]
        kept = [n for n in names if n != owner.LOCK and not n.startswith(f"{checkpoints.FOLDER}/")]
        return {name: checkpoints.measured(self.folder / name) for name in kept}

    def check_inventory(self, held: Mapping[str, Any]) -> None:
        """Raise ValueError for a file that is missing, but in a whole adapter, or has changed."""
        for name, measured in held.items():
            file = self.folder / name
            if checkpoints.measured(file) == measured or not file.parent.is_dir():
                continue
            what = "damaged: it is not what was written" if file.is_file() else "missing"
            raise ValueError(f"{file} is {what}; remove {self.folder} to have it made again")

    def kept(self) -> str:
        """Return, for a line about a stop, what of the run is saved."""
        found = [
            f"the evaluation {when} training"
            for when in ("before", "after")
            if (self.folder / f"{when}.json").is_file()
        ]
        if steps := checkpoints.saved_steps(self.folder):
            found.append(f"the state after step {steps[0]}")
        what = " and ".join(found) or "nothing but its settings"
        return f"{self.folder} keeps {what}; the same command goes on from there"

    def read_evaluation(self, when: str) -> Any | None:
        """Return the evaluation "before" or "after" training, None where it was not made yet."""
        path = self.folder / f"{when}.json"
        return read_object(path) if path.is_file() else None

    def write_evaluation(self, when: str, content: Any) -> None:
        """Keep an evaluation, such as "before" training, in a file of that name; vouch for it."""
        path = self.folder / f"{when}.json"
        self.disown(path)
        write_json(path, content)
        self.vouch(path)


def _is_known_otherwise(name: str, value: Any, held: Mapping[str, Any], identity: Any) -> bool:
    """Say whether a setting is a path to what a record also knows by its content.

    Then another spelling of it, from another working directory, or another place, is no other run.
    """
    fingerprint = CONTENTS.get(name)
    is_path = isinstance(value, str) and isinstance(held.get(name), str)
    return is_path and isinstance(identity, dict) and identity.get(fingerprint) is not None


def line_digests(content: bytes) -> list[str]:
    """Return 16 hex digits for each whole line of a file's content."""
    *lines, _ = content.split(b"\n")
    return [hashlib.sha256(line).hexdigest()[:16] for line in lines]


def last_adapter_folder(path: Path) -> Path:
    """Return the adapter that `path` stands for: itself, or the last one of a run folder.

    FileNotFoundError where there is none, ValueError where its files are not those that were saved.
    """
    adapter = _adapter_of(path)
    saved = adapter.resolve()
    if adapter != path and (gone := Run(path)._gone_adapters()):
        last = Run(path).adapter_folder(gone[-1])
        if int(saved.name.removeprefix("step_")) < gone[-1]:
            raise ValueError(f"{last}, the last adapter of the run, is not there; name {adapter}")
    Run(saved.parent.parent).check_digests(f"adapters/{saved.name}/")
    return adapter


def _adapter_of(path: Path) -> Path:
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
