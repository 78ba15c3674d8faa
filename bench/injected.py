"""A program in a process of its own, and the faults that can be put into it.

`start` forks the process that calls it, so that torch need not be loaded again. `wait` returns the
exit code and the words with which the fork ended. A fault is put into it in one of two ways. A hook
hears of every file that Python is about to open, rename or make (sys.addaudithook): there a process
kills itself at its n-th write, pauses, or finds the disk full (/dev/full). A patch replaces a
function before the program begins, so that a number is not finite.

bench/faults.py holds what is tried with them, and what counts as lost.
"""

import argparse
import errno
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import copsd
import eval as evaluator
from parts import owner, steps
from parts.files import PARTIAL

Hook = Callable[[str, tuple], None]
Patch = Callable[[], None]
HANG_S = 120.0


@dataclass(frozen=True)
class Program:
    """A command that is tried, but for its --out."""

    name: str
    app: Callable[[list[str]], None]
    arguments: list[str]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9 where signal 9 killed it), and what it printed."""

    code: int
    said: str
    errors: str

    @property
    def is_clear(self) -> bool:
        """Say whether it stopped by itself and told why in one line."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        said = len(lines) == 1 or "stopped" in self.said or "error: " in self.said
        return self.code > 0 and said and "Traceback" not in self.errors


# Processes.


def start(
    program: Program,
    out: Path,
    *,
    hook: Hook | None = None,
    patch: Patch | None = None,
    words: Path | None = None,
) -> int:
    """Fork a process that runs the program into `out`; return its number.

    words  where what it prints is kept, with ".said" and ".errors" behind it; None: beside `out`
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for name in ("said", "errors"):
        Path(f"{words or out}.{name}").touch()
    if pid := os.fork():
        return pid
    code = 70
    try:
        code = _be(program, out, words or out, hook, patch)
    finally:
        os._exit(code)  # whatever happened, this is not the bench


def _be(program: Program, out: Path, words: Path, hook: Hook | None, patch: Patch | None) -> int:
    """Be the forked process; return its exit code."""
    os.setsid()
    # A bench that nohup began ignores SIGHUP, and one that a script began with & ignores SIGINT.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "said"), (2, "errors")):
        os.dup2(os.open(f"{words}.{name}", os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    code = 1
    try:
        evaluator.CHUNK = 2  # so that a small evaluation has several
        if patch:
            patch()
        if hook:
            sys.addaudithook(hook)
        program.app([*program.arguments, "--out", str(out)])
    except SystemExit as end:
        code = int(end.code or 0)  # None is a good end
    except KeyboardInterrupt:  # before the program began
        print("stopped")
        code = 130
    except BaseException:
        traceback.print_exc()
    through(words).touch()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner.release()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def through(words: Path) -> Path:
    """Return the file that is there once the program is through, and signals are ignored."""
    return Path(f"{words}.through")


def wait(pid: int, words: Path) -> Ended:
    """Wait for a process; one that hangs is killed, and has ended with code -9."""
    until = time.monotonic() + HANG_S
    status = None
    while status is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            status = None
            time.sleep(0.01)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
    said, errors = (Path(f"{words}.{name}").read_text("utf-8") for name in ("said", "errors"))
    return Ended(os.waitstatus_to_exitcode(status), said, errors)


def run(program: Program, out: Path, *, words: Path | None = None, **faults: Any) -> Ended:
    """Run a program to its end."""
    return wait(start(program, out, words=words, **faults), words or out)


# Hooks: what the process itself does at its writes.


def _written(event: str, arguments: tuple, out: Path) -> Path | None:
    """Return the path below `out` that an audit event is about to write, None for other events."""
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        flags = arguments[2]
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        path = Path(os.fspath(arguments[0])) if writes else None
    elif event == "os.rename":
        path = Path(arguments[1])
    elif event == "os.mkdir":
        path = Path(arguments[0])
    else:
        return None
    return path if path and (path == out or out in path.parents) else None


def recorder(out: Path, events: Path) -> Hook:
    """Note in the file `events`, a line each, what the process is about to write below `out`."""

    def _hook(event: str, arguments: tuple) -> None:
        if path := _written(event, arguments, out):
            with events.open("a") as stream:
                stream.write(f"{path.relative_to(out)}\n")

    return _hook


def killer(out: Path, number: int, *, torn: bool) -> Hook:
    """Kill the process before its n-th write; torn: with the one before it half done."""
    count = 0
    last: Path | None = None

    def _hook(event: str, arguments: tuple) -> None:
        nonlocal count, last
        path = _written(event, arguments, out)
        if path is None:
            return
        if count == number:
            if torn and last and last.is_file() and last.suffix == ".jsonl":
                os.truncate(last, max(0, last.stat().st_size - 9))
            elif torn and event == "os.rename":
                partial = Path(arguments[0])
                os.truncate(partial, partial.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        last = path

    return _hook


def pauser(out: Path, number: int) -> Hook:
    """Stop the process before its n-th write, until it is told to go on."""
    count = itertools.count()

    def _hook(event: str, arguments: tuple) -> None:
        if _written(event, arguments, out) and next(count) == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    return _hook


def full_disk(out: Path, target: Path, record: Path) -> Hook:
    """Let every write of the file `target` below `out` fail as it does on a full disk.

    record  of the run that the file is of, below `out`
    What is replaced is written beside its place first: a link to /dev/full stands there. What grows
    fails as it is opened.
    """
    partial = out / f"{target}{PARTIAL}"
    busy = False

    def _hook(event: str, arguments: tuple) -> None:
        nonlocal busy
        path = _written(event, arguments, out)
        if busy or path is None:
            return
        busy = True
        try:
            if event == "os.mkdir" and path == partial.parent and path != out:
                path.mkdir(exist_ok=True)
            if event == "open" and path == out / target:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            # In a new folder nothing may stand before its record.
            is_run = target == record or (out / record).is_file()
            if is_run and partial.parent.is_dir() and not partial.is_symlink():
                partial.unlink(missing_ok=True)
                partial.symlink_to("/dev/full")
        finally:
            busy = False

    return _hook


# Patches: what is changed in the process before the program begins.


def nan_loss() -> None:
    """Let every loss be NaN."""
    plain = copsd.reduce_loss
    copsd.reduce_loss = lambda *each, **options: plain(*each, **options) * torch.nan


def infinite_gradient() -> None:
    """Let one tensor's gradient be infinite at every update."""
    plain = copsd.take_step

    def _broken(optimizer: torch.optim.Optimizer, **options: Any) -> float:
        optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
        return plain(optimizer, **options)

    copsd.take_step = _broken


def unseen_update() -> None:
    """Let nobody look at the weights after an update."""
    steps.stop_unless_finite = lambda parameters: None  # the next rollout is to see it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    parser.error("there is nothing to run here; python bench/faults.py tries these faults")
