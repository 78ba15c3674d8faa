"""parts/owner.py: one process owns a folder, and a dead one's is free."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, few_flags
from typer.testing import CliRunner

from parts import commands, owner
from parts.owner import LOCK, claim, release

HOLDER = """
import sys, time
from pathlib import Path
from parts.owner import claim
print(claim(Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start a process that owns tmp_path, and wait until it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "None\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def nothing_held():
    yield
    release()


def test_a_second_process_is_told_who_owns_the_folder(tmp_path, holder):
    before = (tmp_path / LOCK).read_bytes()
    said = f"is in use by process {holder.pid} on .*, since 20.*; wait for it to end, or choose"
    with pytest.raises(ValueError, match=said):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert (tmp_path / LOCK).read_bytes() == before


def test_an_owner_that_has_not_yet_written_its_name_gets_a_moment_for_it(tmp_path, monkeypatch):
    file = tmp_path / LOCK
    with file.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        name = json.dumps({"pid": 41, "host": "h", "since": "now"})
        monkeypatch.setattr(owner.time, "sleep", lambda _: file.write_text(name))
        with pytest.raises(ValueError, match="in use by process 41 on h, since now"):
            claim(tmp_path)


def test_a_dead_owners_folder_is_taken_over_and_that_is_said(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said = claim(tmp_path)
    assert said and f"taken over from process {holder.pid} on " in said
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_claiming_again_is_no_error_and_the_end_leaves_nothing(tmp_path):
    assert claim(tmp_path) is None
    assert claim(tmp_path / "." / "") is None
    release()
    assert not list(tmp_path.iterdir())
    assert claim(tmp_path) is None  # nobody died


def test_a_folder_that_was_made_anew_is_claimed_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    claim(folder)
    (folder / LOCK).unlink()
    folder.rmdir()
    folder.mkdir()
    claim(folder)
    assert (folder / LOCK).is_file()


def test_a_lock_file_that_another_put_there_is_not_removed(tmp_path):
    claim(tmp_path)
    (tmp_path / LOCK).rename(tmp_path / "moved")
    (tmp_path / LOCK).write_text("another's")
    release()
    assert (tmp_path / LOCK).read_text() == "another's"


@pytest.mark.parametrize("left", [b"", b"{", b"[1]", b"\xff", b"[" * 10**5])
def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path, left):
    (tmp_path / LOCK).write_bytes(left)
    assert claim(tmp_path) is None


def no_locks(*arguments):
    raise OSError(95, "Operation not supported")


def test_without_locks_the_file_decides(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=f"process {holder.pid} .*; if that has ended, remove own"):
        claim(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said = claim(tmp_path)
    assert said and f"process {holder.pid}" in said
    release()
    # Of another machine's process nothing can be known.
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "elsewhere", "since": "then"}')
    with pytest.raises(ValueError, match="process 1 on elsewhere, since then"):
        claim(tmp_path)
    (tmp_path / LOCK).write_text('{"pid": "x", "host": "' + owner.platform.node() + '"}')
    with pytest.raises(ValueError, match="in use by process x"):
        claim(tmp_path)


def test_without_locks_a_dead_process_of_our_own_number_is_not_us(tmp_path, monkeypatch):
    """In a container that was started again, ours is the number that the dead one had."""
    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    name = {"pid": os.getpid(), "host": owner.platform.node(), "since": "then"}
    (tmp_path / LOCK).write_text(json.dumps(name))
    said = claim(tmp_path)
    assert said and f"taken over from process {os.getpid()} on" in said
    assert claim(tmp_path) is None


def test_without_locks_who_made_the_file_has_it_also_before_its_name_is_there(
    tmp_path, monkeypatch
):
    """Two that came at once both read an empty file, and both took the folder."""
    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    (tmp_path / LOCK).touch()
    name = json.dumps({"pid": 1, "host": "elsewhere", "since": "now"})
    monkeypatch.setattr(owner.time, "sleep", lambda _: (tmp_path / LOCK).write_text(name))
    with pytest.raises(ValueError, match="in use by process 1 on elsewhere"):
        claim(tmp_path)


def test_a_forked_child_does_not_give_up_its_parents_folders(tmp_path):
    claim(tmp_path)
    if (child := os.fork()) == 0:
        release()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).is_file()
    other = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "in use by process" in other.stderr


SMALL = ["--max-new-tokens", "8", "--out"]
TRAINED = ["--steps", "1", "--batch-size", "2", "--eval-problems", "1", "--eval-samples", "1"]
TRAINED += few_flags()
COMPARED = [*TRAINED, "--group-size", "2", "--seeds", "1", "--sweep", "1", "--dev-problems", "1"]


@pytest.mark.parametrize(
    ("app", "flags", "record"),
    [
        (commands.copsd, ["train", *TRAINED, *SMALL], ""),
        (commands.copsd, ["train", *TRAINED, *SMALL], "config.json"),
        (commands.evaluation, ["--limit", "1", "--greedy", *SMALL], ""),
        (commands.evaluation, ["--limit", "1", "--greedy", *SMALL], "settings.json"),
        (commands.comparison, [*COMPARED, *SMALL], ""),
    ],
)
def test_each_program_says_whom_it_takes_a_folder_over_from(tmp_path, app, flags, record):
    out = tmp_path / "out"
    out.mkdir()
    if record:
        assert CliRunner().invoke(app, [*flags, str(out)]).exit_code == 0
        release()
    (out / LOCK).write_text('{"pid": 41, "host": "h", "since": "then"}')
    result = CliRunner().invoke(app, [*flags, str(out)])
    assert result.exit_code == 0, result.output
    said = f"{out}: taken over from process 41 on h, since then, which has ended\n"
    assert result.stdout.count(said) == 1


def test_a_report_says_whom_it_takes_its_folder_over_from(tmp_path):
    done = CliRunner().invoke(
        commands.evaluation, ["--limit", "1", "--greedy", *SMALL, str(tmp_path / "done")]
    )
    assert done.exit_code == 0, done.output
    out = tmp_path / "report"
    out.mkdir()
    (out / LOCK).write_text('{"pid": 41, "host": "h", "since": "then"}')
    arguments = ["report", str(tmp_path / "done"), "--out", str(out)]
    result = CliRunner().invoke(commands.evaluation, arguments)
    assert result.exit_code == 0, result.output
    assert f"{out}: taken over from process 41 on h" in result.stdout
