"""Run a measurement in a process of its own, and say how much memory it took.

On Linux the peak memory of a process starts at that of the process that started it. So whoever
calls this has to be small: it imports neither torch nor transformers.
"""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def own_process(command: list[str], folder: Path, *, cwd: Path = ROOT) -> tuple[str, float]:
    """Run a command in cwd; return what it printed and its peak memory in MiB.

    folder  where its output is kept meanwhile; with pipes, a wait for the process would be for ever
            once they are full
    What it prints to stderr is shown only if it fails: RuntimeError has the end of it.
    """
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, err):
            stream.seek(0)
        printed, complaint = out.read(), err.read()
    if child.returncode:
        end = (complaint.strip() or printed.strip()).splitlines()[-1:]
        raise RuntimeError(f"{' '.join(command[:3])} failed: {' '.join(end)}")
    return printed, usage.ru_maxrss / 1024  # Linux counts in KiB
