"""The embedded lab model: a decode step and the whole first command, beside an older commit.

    python bench/lab_speed.py --what decode --against af3eb05
    python bench/lab_speed.py --what command --against af3eb05

decode   milliseconds of a step of 64 rows with an adapter on, as in training: the difference
         between long completions and short ones, so that reading the prompts does not count
command  seconds of `python copsd.py train` in a new process, evaluations included

The older commit is checked out to a temporary folder and takes turns with this working tree.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.process import ROOT, own_process
from bench.records import OURS, Record, add_common_flags, report

# Run in a checkout's folder. It calls what has kept its name and meaning since the first house.
DECODE = """
import sys, time
from pathlib import Path
import torch
from parts.model import attach_lora, load_model
from parts.sampler import SamplingParams, sample

rows, repeats = int(sys.argv[1]), int(sys.argv[2])
model = load_model(Path("lab/tiny"), device="cpu", dtype=torch.float32)
targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
attach_lora(model, rank=16, alpha=32, targets=targets, seed=0)
prompts = [[5 + (7 * row + place) % 900 for place in range(60)] for row in range(rows)]

def seconds(new_tokens):
    started = time.perf_counter()
    sample(model, prompts, SamplingParams(new_tokens, 1.1, 0.95), eos_ids=set())
    return time.perf_counter() - started

seconds(2)
for _ in range(repeats):
    print((seconds(42) - seconds(2)) / 40)
"""


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="decode", choices=["decode", "command"])
    parser.add_argument("--against", metavar="COMMIT", help="an older commit of this project")
    parser.add_argument("--rows", type=int, default=64, help="of the decode step")
    parser.add_argument("--flags", default="", help="--flags=...: of the command, for both")
    add_common_flags(parser, repeats=3)
    return parser.parse_args()


def check_out(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder and return it; ValueError if there is none."""
    command = ["git", "archive", "--format=tar", commit]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise ValueError(f"no commit {commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def time_decode(checkout: Path, rows: int, folder: Path) -> tuple[float, float]:
    """Return the seconds of a decode step of a checkout, and its process's peak in MiB."""
    command = [sys.executable, "-c", DECODE, str(rows), "3"]
    printed, peak_mib = own_process(command, folder, cwd=checkout)
    return min(float(line) for line in printed.split()), peak_mib


def time_command(checkout: Path, flags: list[str], folder: Path) -> tuple[float, float]:
    """Return the seconds of a checkout's first command, and its process's peak in MiB."""
    out = tempfile.mkdtemp(dir=folder)
    flags = [*flags, "--device", "cpu", "--out", f"{out}/run"]
    command = [sys.executable, "copsd.py", "train", *flags]
    started = time.perf_counter()
    _, peak_mib = own_process(command, folder, cwd=checkout)
    return time.perf_counter() - started, peak_mib


def measure(arguments: argparse.Namespace) -> Iterator[Record]:
    """Let this working tree and the older commit take turns; yield their records."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkouts = {OURS: ROOT}
        if arguments.against:
            older = folder / "older"
            checkouts[arguments.against] = check_out(arguments.against, older)
        seconds: dict[str, list[float]] = {who: [] for who in checkouts}
        peaks = dict.fromkeys(checkouts, 0.0)
        for _, (who, checkout) in product(range(arguments.repeats), checkouts.items()):
            if arguments.what == "decode":
                found, peak_mib = time_decode(checkout, arguments.rows, folder)
            else:
                found, peak_mib = time_command(checkout, arguments.flags.split(), folder)
            seconds[who].append(found)
            peaks[who] = max(peaks[who], peak_mib)
    rows = {"decode": f"lab, decode step of {arguments.rows} rows", "command": "lab, first command"}
    for who, values in seconds.items():
        yield Record(rows[arguments.what], who, "s", tuple(values), peaks[who])


def main() -> None:
    """Run what the flags ask for."""
    arguments = parse_arguments()
    report(measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
