"""The visit to a GPU, at toy size on a CPU: all of its parts run, and what must hold does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_batch import let_it_record

from bench import gpu
from parts import batch

ROOT = Path(__file__).resolve().parent.parent


def visit(tmp_path: Path) -> list[dict]:
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "bench/gpu.py", "--size", "toy", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300
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
    updates = [line for line in found if line["what"] == "recorded steps"]
    assert [line["update"] for line in updates] == ["before", "after"]
    assert updates[0]["tokens"] != updates[1]["tokens"], "the update changed what is sampled"
    for line in updates:
        assert line["rows_equal_to_plain"] == line["rows"] == 8 and line["logprob_gap_nats"] == 0
    decodes = [
        (line["who"], line["top_k"], line["rows"]) for line in found if line["what"] == "decode"
    ]
    contestants = [("ours", 20), ("ours", 0), ("generate", 20)]
    assert decodes == [(*contestant, rows) for rows in (2, 4) for contestant in contestants]
    assert by_name["step"]["rollout/tokens"] == 4 * 8, "no token ends a row"
    assert by_name["memory"]["plan_gib"] > 0 and by_name["divergence"]["share_of_product_rate"] > 0


def test_a_visit_without_time_says_what_it_left_out(tmp_path, monkeypatch, capsys):
    flags = ["--size", "toy", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    gpu.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in found if "skipped" in line] == [
        "sampling",
        "recording",
        "gradient",
        "resume",
        "limits",
        "step",
    ]


def test_the_visit_would_see_a_recording_that_does_nothing(monkeypatch, capsys):
    """As a graph that was recorded on another GPU does: its output stays that of one step."""

    def record(recorder, step):
        output = step()
        return lambda: output

    let_it_record(monkeypatch)
    monkeypatch.setattr(batch.Recorder, "record", record)
    visit = gpu.Visit(None, 8, "cpu")
    gpu.check_recording(visit, gpu.SIZES["toy"], torch.float32)
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert line["graphs"] > 0 and line["rows_equal_to_plain"] < line["rows"]


@pytest.mark.parametrize(
    "error", [FloatingPointError, KeyError, IndexError, torch.OutOfMemoryError]
)
def test_a_part_that_fails_does_not_end_the_visit(capsys, error):
    def fail():
        raise error("as if")

    gpu.Visit(None, 8, "cpu").section("a part", fail)
    failed, took = map(json.loads, capsys.readouterr().out.splitlines())
    assert error.__name__ in failed["error"] and took["section"] == "a part"
