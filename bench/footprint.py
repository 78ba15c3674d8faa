"""How far `copsd.py plan` is from the memory that a step takes, on a CPU.

    python bench/footprint.py --model MODEL_FOLDER
        steps of COPSD and GRPO, each in a process of its own: the peak beyond what Python, torch
        and transformers take themselves, beside what the plan says
    python bench/footprint.py --model MODEL_FOLDER -- --batch-size 8 --max-new-tokens 96
        the same with further flags of train

No id ends a row, for the plan is of the most that a step can take. Problems are made up.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parts.heap import restart_with_joined_holes

SMALL = ["--batch-size", "8", "--max-new-tokens", "96", "--lora-rank", "16", "--steps", "1"]
STEPS = {
    "COPSD": ["--micro-batch", "8", "--no-gradient-checkpointing"],
    "COPSD, recomputed": ["--micro-batch", "8"],
    "COPSD, rows one by one": ["--micro-batch", "1"],
    "GRPO": ["--method", "grpo", "--micro-batch", "4", "--no-gradient-checkpointing"],
    "sampling, 128 rows": ["--micro-batch", "1", "--batch-size", "128"],
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model's folder")
    parser.add_argument("--words", type=int, default=60, help="of a problem, about one token each")
    parser.add_argument("--only", choices=[*STEPS], help="measure one step")
    parser.add_argument("--here", action="store_true", help="in this process; print and stop")
    parser.add_argument("flags", nargs="*", help="flags of train, after --")
    return parser.parse_args()


def write_problems(path: Path, words: int, count: int = 128) -> None:
    """Write problems of so many words, with an English side as long and an answer."""
    rows = []
    for number in range(count):
        text = " ".join(["word"] * (words - 1))
        rows.append(
            {
                "id": str(number),
                "problem": f"{number} {text}",
                "problem_translated": f"{number} {text}",
                "solution": f"{text} {number}",
                "answer": str(number),
                "language": "hau",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def peak_bytes() -> int:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure(flags: list[str]) -> tuple[int, int]:
    """Return the peak bytes of a run of one step beyond those before it, and those of the plan."""
    import torch
    from rich.console import Console
    from typer.testing import CliRunner

    from parts import commands, footprint, setup
    from parts.heap import keep_freed_memory

    keep_freed_memory()
    # The compiler is a few hundred MiB of Python; compiling something loads it beforehand.
    torch.compile(torch.neg)(torch.zeros(8))
    said = {}

    def _remember(shape, config, device, lengths):
        said["plan"] = footprint.footprint(shape, config, lengths, on_cpu=True).peak
        said["before"] = peak_bytes()
        return ""

    with (
        patch.object(setup, "check_memory", _remember),
        patch("parts.setup.eos_ids", lambda *_: set()),
        patch.object(commands, "start", lambda: Console(stderr=True)),
    ):
        result = CliRunner().invoke(commands.copsd, ["train", *flags])
    if result.exit_code:
        raise RuntimeError(result.output)
    return peak_bytes() - said["before"], said["plan"]


def main() -> None:
    """Run what the flags ask for."""
    restart_with_joined_holes()  # as copsd.py does
    arguments = parse_arguments()
    if arguments.here:
        print(json.dumps(measure(arguments.flags)))
        return
    print(f"{'':26}{'measured GiB':>14}{'plan GiB':>10}{'plan / measured':>17}")
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "problems.jsonl"
        write_problems(data, arguments.words)
        common = ["--model", arguments.model, "--data", str(data), "--eval-problems", "0"]
        common += ["--device", "cpu"]  # what is measured is a process's memory
        for number, (name, flags) in enumerate(STEPS.items()):
            if arguments.only not in (None, name):
                continue
            out = ["--out", f"{temporary}/run{number}"]
            typed = [*common, *SMALL, *flags, *out, *arguments.flags]
            child = subprocess.run(
                [sys.executable, __file__, "--model", "-", "--here", "--", *typed],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            measured, planned = json.loads(child.stdout)
            sizes = f"{measured / 2**30:14.2f}{planned / 2**30:10.2f}{planned / measured:17.2f}"
            print(f"{name:26}{sizes}", flush=True)


if __name__ == "__main__":
    main()
