"""parts/heap.py: a program starts anew once, as it was typed, and freed tensors leave room."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from parts import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc only")

START = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from parts.heap import keep_freed_memory, restart_with_joined_holes
restart_with_joined_holes()
"""
SAY = (
    START
    + """
import json, os
print(json.dumps([os.environ.get("GLIBC_TUNABLES"), sys.argv, os.getpid()]))
"""
)
# Forward and backward passes of a few layers, each of a few more rows than the one before.
HEAP = (
    START
    + """
keep_freed_memory()
import ctypes, torch

class Counts(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Counts
torch.set_num_threads(1)
layers = [torch.nn.Linear(64, 64) for _ in range(24)]
before = libc.mallinfo2().arena
for turn in range(8):
    x = torch.ones(4096 + 64 * turn, 64)
    for layer in layers:
        y = layer(x)
        x = x + torch.nn.functional.silu(y) * torch.sigmoid(y)
    x.sum().backward()
    del x, y
print((libc.mallinfo2().arena - before) / 2**20)
"""
)


def run(folder: Path, text: str, *words: str, tunables: str | None = None) -> str:
    """Return what a program prints: started as a user does, with these words and tunables."""
    (folder / "program.py").write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    started = subprocess.run(
        [sys.executable, "program.py", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return started.stdout


def test_a_program_starts_anew_once_as_it_was_typed(tmp_path):
    words = ["train", "--lang", "two words", "-x"]
    tunables, argv, _ = json.loads(run(tmp_path, SAY, *words))  # one line: it went on once
    assert tunables == f"{heap.KEPT_APART}=0"
    assert argv == ["program.py", *words]


def test_what_the_user_tunes_stays(tmp_path):
    arena = "glibc.malloc.arena_max=2"
    assert json.loads(run(tmp_path, SAY, tunables=arena))[0] == f"{arena}:{heap.KEPT_APART}=0"
    typed = f"{heap.KEPT_APART}=3"
    assert json.loads(run(tmp_path, SAY, tunables=typed))[0] == typed


@pytest.mark.parametrize(
    "outer",
    [
        "print('began')\nimport runpy, sys\nsys.argv = ['inner.py', 'train']\n"
        "runpy.run_path('inner.py', run_name='__main__')\n",
        "print('began')\nimport torch, runpy\nrunpy.run_path('inner.py', run_name='__main__')\n",
    ],
    ids=["with its own words", "with torch loaded"],
)
def test_a_program_that_runs_within_another_does_not_start_that_anew(tmp_path, outer):
    (tmp_path / "inner.py").write_text(SAY, encoding="utf-8")
    began, said = run(tmp_path, outer).splitlines()
    assert began == "began"
    assert json.loads(said)[0] is None


def test_where_it_cannot_be_started_anew_it_goes_on(monkeypatch):
    tried = []

    def _fail(path, words):
        tried.append(words)
        raise OSError("not allowed")

    monkeypatch.setattr(os, "execv", _fail)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "copsd.py", "plan"])
    monkeypatch.setattr(sys, "argv", ["copsd.py", "plan"])
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    heap.restart_with_joined_holes()
    assert tried == [[sys.executable, "-u", "copsd.py", "plan"]]
    heap.restart_with_joined_holes()
    assert len(tried) == 1


def test_the_holes_of_freed_tensors_take_the_next_ones(tmp_path):
    """glibc as it is takes a third more for the same passes."""
    as_it_is = float(run(tmp_path, HEAP, tunables=f"{heap.KEPT_APART}=7"))
    assert float(run(tmp_path, HEAP)) < 0.85 * as_it_is
