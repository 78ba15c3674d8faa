"""parts/track.py: a tracker is told the log's numbers, and changes nothing that is learned."""

import errno
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import few_flags
from typer.testing import CliRunner

from parts import commands, track
from parts.files import read_rows
from parts.runs import Run

SMALL = ["--steps", "2", "--batch-size", "4", "--max-new-tokens", "20", "--eval-problems", "0"]


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.copsd, ["train", *SMALL, *few_flags(), *arguments])


@pytest.fixture
def stand_ins(monkeypatch) -> list:
    """Install modules that stand in for all three trackers, and record what they are told."""
    told: list = []

    def _call(name: str, result=None):
        return lambda *args, **options: told.append((name, args, options)) or result

    own = types.SimpleNamespace(log=_call("log"), finish=_call("finish"))
    wandb = types.SimpleNamespace(init=_call("init", own))
    trackio = types.SimpleNamespace(init=_call("init"), log=_call("log"), finish=_call("finish"))
    writer = types.SimpleNamespace(
        add_scalar=lambda name, x, step: told.append(("log", ({name: x},), {"step": step})),
        add_text=_call("text"),
        flush=lambda: None,
        close=_call("finish"),
    )
    tensorboard = types.SimpleNamespace(SummaryWriter=_call("init", writer))
    for name, module in (
        ("wandb", wandb),
        ("trackio", trackio),
        ("torch.utils.tensorboard", tensorboard),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(track, "find_spec", lambda name: name)
    return told


def logged(told: list) -> dict[int, dict[str, float]]:
    """Return what was told, by step."""
    steps: dict[int, dict[str, float]] = {}
    for name, args, options in told:
        if name == "log":
            steps.setdefault(options["step"], {}).update(args[0])
    return steps


@pytest.mark.parametrize("name", track.TRACKERS)
def test_a_tracker_is_told_the_numbers_of_the_log_and_the_run_is_the_same(
    tmp_path, stand_ins, name
):
    plain = run_cli("--out", str(tmp_path / "plain"))
    tracked = run_cli("--out", str(tmp_path / "tracked"), "--track", name)
    assert plain.exit_code == tracked.exit_code == 0, tracked.output
    rows = read_rows(tmp_path / "tracked" / "metrics.jsonl")
    steps = logged(stand_ins)
    assert list(steps) == [1, 2]
    for row in rows:
        numbers = {key: x for key, x in row.items() if isinstance(x, int | float)}
        assert steps[row["step"]] == numbers | {"alarms": 0}
    assert [told[0] for told in stand_ins].count("finish") == 1
    assert stand_ins[0][0] == "init"
    for file in ("completions.jsonl", "adapters/step_00002/adapter_model.safetensors"):
        first, second = (tmp_path / run / file for run in ("plain", "tracked"))
        assert first.read_bytes() == second.read_bytes()
    # A tracker is no setting of the run: the same run goes on without it.
    assert run_cli("--out", str(tmp_path / "tracked")).exit_code == 0


def test_tensorboard_drops_the_steps_that_a_killed_run_writes_again(tmp_path, stand_ins):
    saved = tmp_path / "run"
    assert run_cli("--out", str(saved)).exit_code == 0
    for folder in (saved, tmp_path / "new"):
        track.open_tracker("tensorboard", Run(folder), {})
    begun = [options["purge_step"] for name, _, options in stand_ins if name == "init"]
    assert begun == [3, None]


def test_wandb_is_offline_and_all_name_the_run_by_its_folder(tmp_path, stand_ins):
    run = Run(tmp_path / "mine")
    for name in track.TRACKERS:
        track.open_tracker(name, run, {"seed": 0})
    (_, places, _), _, (_, _, trackio), (_, _, wandb) = stand_ins
    assert Path(places[0]) == run.folder / "tensorboard"
    assert trackio["name"] == wandb["name"] == "mine" and trackio["config"] == {"seed": 0}
    assert wandb["mode"] == "offline" and Path(wandb["dir"]) == run.folder


def test_what_is_no_number_is_left_out_and_alarms_are_counted():
    told: list = []
    tracker = track.Tracker(lambda numbers, step: told.append((numbers, step)), lambda: None)
    row = {"step": 3, "loss": 0.5, "kl": None, "alarms": {"KL": "1", "entropy": "2"}, "text": "no"}
    tracker.show(row)
    assert told == [({"step": 3, "loss": 0.5, "alarms": 2}, 3)]


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_cannot_write_is_one_line_and_the_run_goes_on_without_it(
    tmp_path, stand_ins, monkeypatch, when
):
    def _full(*given, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys.modules["trackio"], when, _full)
    flags = ["--save-every", "1", "--out", str(tmp_path / "run")]
    result = run_cli(*flags, "--track", "trackio")
    said = "error: cannot write what --track keeps: No space left on device; free some space there"
    assert result.exit_code == 2 and result.stderr.startswith(said), result.output
    assert result.stderr.count("\n") == 1
    assert run_cli(*flags).exit_code == 0
    assert run_cli("--save-every", "1", "--out", str(tmp_path / "plain")).exit_code == 0
    for file in ("completions.jsonl", "adapters/step_00002/adapter_model.safetensors"):
        first, second = (tmp_path / run / file for run in ("plain", "run"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wandb", "--track wandb: it is not installed; pip install wandb"),
        ("mlflow", "unknown tracker 'mlflow'; valid: tensorboard, trackio, wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line_and_nothing_is_made(tmp_path, name, said):
    if find_spec(name):
        pytest.skip(f"{name} is installed here")
    result = run_cli("--out", str(tmp_path / "run"), "--track", name)
    assert result.exit_code == 2 and result.stderr == f"error: {said}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not find_spec("tensorboard"), reason="TensorBoard is not installed")
def test_tensorboard_reads_what_was_written(tmp_path):
    out = tmp_path / "run"
    assert run_cli("--out", str(out), "--track", "tensorboard").exit_code == 0
    reading = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(reading).EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = events.Scalars("loss/kl_nats_per_token")
    rows = read_rows(out / "metrics.jsonl")
    assert [event.step for event in found] == [1, 2]
    values = [row["loss/kl_nats_per_token"] for row in rows]
    assert [event.value for event in found] == pytest.approx(values, rel=1e-6)
