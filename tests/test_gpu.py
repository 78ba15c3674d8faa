"""The visit to a GPU, at toy size on a CPU: all of its parts run, and what must hold does."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def visit(tmp_path: Path, *flags: str) -> list[dict]:
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "bench/gpu.py", "--size", "toy", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out), *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    written = out.read_text(encoding="utf-8")
    assert written == done.stdout
    return [json.loads(line) for line in written.splitlines()]


def test_every_part_of_the_visit_runs(tmp_path):
    found = visit(tmp_path)
    assert not [line for line in found if "error" in line and "dtype" not in line]
    by_name = {line["what"]: line for line in found}
    assert (
        by_name["greedy ids"]["batched_equals_single"] and by_name["greedy ids"]["equals_generate"]
    )
    assert by_name["resume"]["largest_gap"] == 0
    for line in found:
        if line["what"] == "gradient against fp64":
            assert line["error"] <= 2 * line["naive_error"] + 1e-5
    decodes = [(line["who"], line["rows"]) for line in found if line["what"] == "decode"]
    assert decodes == [("ours", 2), ("generate", 2), ("ours", 4), ("generate", 4)]
    assert by_name["step"]["rollout/tokens"] == 4 * 8, "no token ends a row"
    assert by_name["memory"]["plan_gib"] > 0 and by_name["divergence"]["share_of_product_rate"] > 0


def test_a_visit_without_time_says_what_it_left_out(tmp_path):
    found = visit(tmp_path, "--minutes", "0")
    assert [line["what"] for line in found if "skipped" in line] == [
        "sampling",
        "gradient",
        "resume",
        "limits",
        "step",
    ]
