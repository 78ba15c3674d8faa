"""Pieces of work in processes of their own: their number, how they end, how all are stopped."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parts.side_by_side import pass_on, work_through


def note_and_sleep(folder: Path, seconds: float, piece: int) -> int:
    """Leave a file when a piece begins and one when it ends; return the piece as its exit code."""
    (folder / f"{piece}.begun").write_text(str(os.getpid()))
    time.sleep(seconds)
    (folder / f"{piece}.ended").touch()
    return piece


def found(folder: Path, ending: str) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob(f"*.{ending}"))


def work(folder: Path, pieces: list[int], seconds: float = 0.0):
    step = partial(note_and_sleep, folder, seconds)
    return work_through(step, pieces, 2, preload=__name__)


def test_every_piece_comes_back_with_its_exit_code(tmp_path):
    codes = dict(work(tmp_path, [0, 3, 0, 7]))
    assert codes == {0: 0, 3: 3, 7: 7}
    assert found(tmp_path, "ended") == [0, 3, 7]


def test_no_more_than_the_jobs_are_at_work(tmp_path):
    pieces = work(tmp_path, [1, 2, 3, 4], seconds=1.0)
    next(pieces)
    # The first two have ended, or one of them nearly so; the fourth waits for a place.
    assert 4 not in found(tmp_path, "begun")
    assert len(list(pieces)) == 3


def test_pieces_at_work_are_asked_to_end_when_no_more_is_asked_for(tmp_path):
    pieces = work_through(partial(sleep_by_piece, tmp_path), [0, 60, 60, 60], 2, preload=__name__)
    assert next(pieces) == (0, 0)
    began = time.monotonic()
    pieces.close()
    assert time.monotonic() - began < 30
    assert found(tmp_path, "ended") == [0]


@pytest.mark.parametrize("seems_alive", [False, True])
def test_a_signal_for_a_piece_that_is_gone_is_no_error(seems_alive):
    """A traceback took the place of the line that says what is kept."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    process: Any = SimpleNamespace(pid=ended.pid, is_alive=lambda: seems_alive)
    pass_on([signal.SIGTERM], [(0, process)])


def sleep_by_piece(folder: Path, piece: int) -> int:
    """Work for as many seconds as the piece says."""
    return min(0, note_and_sleep(folder, piece, piece))


STOPPABLE = """
import sys
from functools import partial
from pathlib import Path
from tests.test_side_by_side import sleep_by_piece
from parts.side_by_side import work_through

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    step = partial(sleep_by_piece, folder)
    try:
        for piece, code in work_through(step, [60, 61, 62], 2, preload="tests.test_side_by_side"):
            print(piece, code, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def start_two_of_three(tmp_path):
    """Start a process with three pieces, two at a time; return it once two have begun."""
    script = tmp_path / "stoppable.py"
    script.write_text(STOPPABLE)
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    while len(found(tmp_path, "begun")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_pieces_at_work_and_no_other_begins(tmp_path, number):
    process = start_two_of_three(tmp_path)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert printed.splitlines()[-1] == "interrupted"
    assert found(tmp_path, "begun") == [60, 61]
    assert found(tmp_path, "ended") == []
    for piece in (60, 61):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{piece}.begun").read_text()), 0)


def test_no_piece_is_left_behind_by_a_process_that_is_killed(tmp_path):
    """One went on for as long as its piece took, and the same command found its folder in use."""
    process = start_two_of_three(tmp_path)
    process.kill()
    process.communicate(timeout=120)  # which returns once the pieces have closed what they print to
    assert process.returncode == -signal.SIGKILL
    assert found(tmp_path, "begun") == [60, 61]
    assert found(tmp_path, "ended") == []
