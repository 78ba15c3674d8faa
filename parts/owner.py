"""One process owns a folder at a time: a lock file says which, and the system holds the lock.

Two runs in one folder would write every step twice. So a program claims its folder before it writes
there, and another that comes is refused and told who holds it. The lock is the kernel's (flock): it
ends with its process, however that ends, so a dead owner's folder is free by itself. The file stays
then, and the next owner reads from it, and says, whom it took over from.

Some network disks have no such locks. There the file decides alone: a process of this machine that
has ended is taken over from, and one of another machine is believed to be alive.

Nothing is claimed by reading.
"""

import atexit
import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from parts.files import cannot_write, parse_json

LOCK = "owner.lock"  # in the folder, for as long as it is owned
NAMING_S = 2.0  # an owner writes its name within microseconds, unless the machine is busy

# The lock files of this process by folder. They stay open, for a lock ends when its file is closed.
_held: dict[Path, BinaryIO] = {}


def claim(folder: Path) -> str | None:
    """Make this process the only owner of a folder that is there, until the process ends.

    Returns what to say where a dead process held it before, else None. Claiming again is no error.
    Raises ValueError, which names the holder, where another process owns it.
    """
    place = folder.resolve()
    file = place / LOCK
    if place in _held and _is_still(_held[place], file):
        return None
    stream = _locked(folder, file)
    left = _owner(stream)
    try:
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(_myself()).encode())
        stream.flush()
    except OSError as error:
        raise cannot_write(file, error) from error
    _held[place] = stream
    return f"{folder}: taken over from {_named(left)}, which has ended" if left else None


def release() -> None:
    """Give up every folder of this process; the interpreter calls it at its end."""
    for place, stream in _held.items():
        with suppress(OSError):  # the folder may be gone
            if _is_still(stream, place / LOCK):
                (place / LOCK).unlink()
        stream.close()
    _held.clear()


atexit.register(release)
# The parent's locks are not a forked child's, which must not remove their files when it ends.
os.register_at_fork(after_in_child=_held.clear)


def _locked(folder: Path, file: Path) -> BinaryIO:
    """Return the lock file, open and locked; ValueError where another process has it."""
    while True:
        try:
            stream, is_new = _opened(file)
        except OSError as error:
            raise cannot_write(file, error) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _named(_owner_soon(stream))
            stream.close()
            raise ValueError(
                f"{folder} is in use by {holder}; wait for it to end, or choose another --out"
            ) from error
        except OSError:  # this disk has no locks, but only one process makes the file
            _refuse_living(folder, file, None if is_new else _owner_soon(stream))
        # The owner before may have removed the file between our opening and our locking of it.
        if _is_still(stream, file):
            return stream
        stream.close()


def _opened(file: Path) -> tuple[BinaryIO, bool]:
    """Return the lock file, open, and whether it is this process that has made it."""
    try:
        return os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), "r+b"), True
    except FileExistsError:
        return os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+b"), False


def _refuse_living(folder: Path, file: Path, owner: dict[str, Any] | None) -> None:
    """Raise ValueError unless the file's own words are those of a process that has ended."""
    if owner is None:
        return
    # One of our own number is not us: a container counts its processes from 1 at every start.
    pid = owner.get("pid")
    if owner.get("host") == platform.node() and (pid == os.getpid() or not _is_alive(pid)):
        return
    raise ValueError(
        f"{folder} is in use by {_named(owner)}; if that has ended, remove {file.name} from it"
    )


def _is_alive(pid: Any) -> bool:
    """Say whether this machine has the process; True where that cannot be told."""
    if type(pid) is not int or pid < 1:
        return True
    try:
        os.kill(pid, 0)  # no signal: it only asks
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's
        return True
    return True


def _is_still(stream: BinaryIO, file: Path) -> bool:
    """Say whether the open file is the one that the path leads to."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(file))
    except (OSError, ValueError):
        return False


def _myself() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"pid": os.getpid(), "host": platform.node(), "since": since}


def _owner(stream: BinaryIO) -> dict[str, Any] | None:
    """Return what an owner wrote into its lock file; None where it had not come to it."""
    stream.seek(0)
    try:
        content = parse_json(stream.read())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _owner_soon(stream: BinaryIO) -> dict[str, Any] | None:
    """Return what the owner wrote; one that has just locked the file gets a moment to write it."""
    until = time.monotonic() + NAMING_S
    while (owner := _owner(stream)) is None and time.monotonic() < until:
        time.sleep(0.01)
    return owner


def _named(owner: dict[str, Any] | None) -> str:
    """Return an owner as a person is told of it."""
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
