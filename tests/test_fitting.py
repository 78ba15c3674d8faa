"""parts/fitting.py: what fits, and what a run says of it; what happens where it did not fit."""

import tracemalloc
from dataclasses import replace

import pytest
import torch
from conftest import few_flags
from test_copsd import jsonl, timeless
from test_copsd import train as train_copsd
from test_footprint import LENGTHS, planned
from test_grpo import train as train_grpo
from typer.testing import CliRunner

import copsd
from parts import commands, fitting, footprint, machine, steps
from parts.fitting import GIB, changes_that_fit, flags_text
from parts.footprint import read_shape
from parts.microbatch import Limit, halve_until_it_fits
from parts.recipe import Config


def test_the_changes_that_fit_do_fit_and_change_no_result(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = replace(Config(), micro_batch=32, gradient_checkpointing=False)
    for limit in (8 * GIB, 12 * GIB, 22 * GIB):
        changes = changes_that_fit(shape, config, LENGTHS, limit, on_cpu=False)
        assert changes and planned(shape, replace(config, **changes)).peak <= limit
        sections = {Config.__dataclass_fields__[name].metadata["section"] for name in changes}
        assert sections == {Config.__dataclass_fields__["micro_batch"].metadata["section"]}
    fits = changes_that_fit(shape, config, LENGTHS, 10**12, on_cpu=False)
    never = changes_that_fit(shape, config, LENGTHS, 3 * GIB, on_cpu=False)
    assert (fits, never) == ({}, None)
    assert flags_text({"micro_batch": 2, "gradient_checkpointing": True}) == (
        "--micro-batch 2 --gradient-checkpointing"
    )


def test_a_budget_of_positions_is_halved_with_the_rows(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = replace(Config(), micro_batch=8, max_new_tokens=1000)
    four, one = (planned(shape, replace(config, micro_batch=rows)) for rows in (4, 1))
    limit = (one.update + four.update) / 2
    changes = changes_that_fit(
        shape,
        replace(config, micro_tokens=4 * 2024),
        LENGTHS,
        limit,
        on_cpu=False,
    )
    assert changes and (changes["micro_batch"], changes["micro_tokens"]) == (4, 2 * 2024)


@pytest.mark.parametrize(
    ("changes", "on_cpu", "halved"),
    [
        ({}, False, 512),
        ({}, True, 128),
        ({"compile": False}, False, 128),
        ({"method": "grpo"}, False, 128),
        ({"chunk_tokens": 100}, False, 50),
        ({"chunk_tokens": 33}, False, 16),
        ({"chunk_tokens": 32}, False, None),
    ],
)
def test_a_chunk_is_halved_from_the_rows_that_it_has(qwen, changes, on_cpu, halved):
    small = {"micro_batch": 1, "sample_rows": 1, "max_new_tokens": 2048, "cosine_every": 0}
    config = Config(**{**small, **changes})
    # So wide a vocabulary that a chunk of it outweighs all else in the update.
    wide = replace(read_shape(qwen, config, torch.bfloat16), vocabulary=10**7)
    found = planned(wide, config, on_cpu=on_cpu)
    assert found.update == found.peak
    changed = changes_that_fit(wide, config, LENGTHS, found.peak - 1, on_cpu=on_cpu)
    assert changed == ({"chunk_tokens": halved} if halved else None)


def test_plan_prints_parts_and_cards_from_a_config_json(qwen):
    result = CliRunner().invoke(commands.copsd, ["plan", "--model", str(qwen)])
    assert result.exit_code == 0, result.output
    assert "weights" in result.output and "2.88" in result.output
    assert all(f" {card} " in result.output for card in (24, 40, 80, 141))
    small = CliRunner().invoke(commands.copsd, ["plan", "--model", str(qwen), "--gpu", "3"])
    assert small.exit_code == 1 and "no setting of Machine" in small.output


def test_plan_leaves_out_what_takes_nothing(qwen):
    """On a GPU two rows said that there were no holes in a CPU's heap."""
    flags = ["plan", "--model", str(qwen), "--device"]
    gpu, cpu = (
        CliRunner().invoke(commands.copsd, [*flags, where]).stdout for where in ("cuda", "cpu")
    )
    for said in (gpu, cpu):
        rows = said.partition("card, GB")[0].splitlines()
        assert len(rows) > 9 and not [row for row in rows if row.split()[-1:] == ["0.00"]]
    assert "holes" in cpu and "holes" not in gpu


def test_plan_counts_with_the_longest_lengths_and_says_where_they_end():
    """It built a list of a prompt's length, and ran out of memory."""
    longest = ["--prompt-tokens", "100000000", "--teacher-tokens", "100000000"]
    longest += ["--max-new-tokens", "100000000"]
    tracemalloc.start()
    grpo = ["--method", "grpo", "--micro-batch", "64"]
    result = CliRunner().invoke(commands.copsd, ["plan", *longest, *grpo])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.exit_code == 1 and "no setting of Machine" in result.output, result.output
    assert peak < 100 * 2**20, "a list of so many ids takes 800 MB"
    for flag in longest[::2]:
        result = CliRunner().invoke(commands.copsd, ["plan", flag, "100000001"])
        assert result.exit_code == 2 and "100000000" in result.stderr.replace("100000001", "")


def test_plan_refuses_the_targets_that_training_refuses(tmp_path):
    said = "error: LoRA target 'zz' matches no layer: valid for this model are down_proj, "
    for command in (["plan"], ["train", "--out", str(tmp_path / "run")]):
        result = CliRunner().invoke(commands.copsd, [*command, "--lora-targets", "q_proj,zz"])
        assert result.exit_code == 2 and result.stderr.startswith(said), result.output


def test_plan_takes_a_budget():
    flags = ["--micro-batch", "64", "--no-gradient-checkpointing", "--device", "cpu"]
    said = [
        CliRunner().invoke(commands.copsd, ["plan", *flags, *budget]).stdout
        for budget in ([], ["--micro-tokens", "100"])
    ]
    peaks = [float(text.split("memory: ")[1].split(" GiB")[0]) for text in said]
    assert peaks[1] < peaks[0]


def test_training_says_its_memory_first_and_refuses_what_cannot_fit(tmp_path, monkeypatch):
    flags = ["train", *few_flags(), "--steps", "1", "--batch-size", "2", "--eval-problems", "0"]
    out = tmp_path / "run"
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 2**20)
    refused = CliRunner().invoke(commands.copsd, [*flags, "--out", str(out)])
    assert refused.exit_code == 2 and "GiB at most" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 and not out.exists()
    monkeypatch.setattr(fitting, "free_bytes", lambda device: None)
    result = CliRunner().invoke(commands.copsd, [*flags, "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    said = next(line for line in lines if "GiB at most" in line)
    assert lines.index(said) < lines.index(next(line for line in lines if "COPSD on" in line))


def test_a_model_that_cannot_be_counted_is_trained_and_not_planned(tmp_path, monkeypatch):
    """A family that asks its tensors for numbers, such as jetmoe, would have been refused."""

    def _ask(model):
        return torch.zeros(1, device="meta").item()

    monkeypatch.setattr(footprint, "count_passes", _ask)
    footprint._count_shape.cache_clear()
    flags = ["--max-new-tokens", "4", "--eval-problems", "0"]
    made = ["train", *flags, "--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(commands.copsd, made)
    assert result.exit_code == 0 and "the memory that qwen3 takes is not known" in result.output
    result = CliRunner().invoke(commands.copsd, ["plan", *flags])
    assert result.exit_code == 2 and "the memory that qwen3 takes is not known" in result.stderr


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_memory_that_an_earlier_arm_has_freed_is_free(monkeypatch, device):
    """A comparison refused its own later arms: what is freed stays with torch and malloc."""
    left = iter([80 * GIB, 3 * GIB])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(left), 80 * GIB))
    monkeypatch.setattr(fitting, "_free_on_the_host", lambda: iter([next(left)]))
    fitting.free_bytes.cache_clear()
    try:
        assert [fitting.free_bytes(device) for _ in range(2)] == [80 * GIB] * 2
    finally:
        fitting.free_bytes.cache_clear()


def test_the_peak_is_a_runs_own(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", told.append)
    machine.forget_peak("cpu")
    machine.forget_peak("cuda:1")
    assert told == ["cuda:1"]
    monkeypatch.setattr("parts.setup.forget_peak", told.append)
    train_copsd(tmp_path / "run")
    assert told == ["cuda:1", "cpu"]


# Out of memory in a step


@pytest.mark.parametrize(
    "train, loss, given",
    [
        (train_copsd, "copsd_loss", {"micro_batch": 4}),
        (train_grpo, "grpo_loss", {"micro_batch": 4, "inner_epochs": 2}),
    ],
)
def test_a_step_out_of_memory_goes_on_with_half_the_rows(
    tmp_path, monkeypatch, capsys, train, loss, given
):
    straight = train(tmp_path / "a", **given)
    calls = []
    sampled = []
    real_loss = getattr(copsd, loss)
    real_sample = steps.sample

    def _fail_once(setup, *arguments, **options):
        calls.append(1)
        found = real_loss(setup, *arguments, **options)
        if len(calls) == 2:  # in the middle of a step: a part of the gradient is there already
            raise torch.OutOfMemoryError("as if")
        return found

    monkeypatch.setattr(copsd, loss, _fail_once)
    monkeypatch.setitem(copsd.SOURCES, "student", (copsd.roll_out, copsd.copsd_loss))
    monkeypatch.setattr(steps, "sample", lambda *a, **k: sampled.append(1) or real_sample(*a, **k))
    halved = train(tmp_path / "b", **given)
    assert "out of memory: micro-batches of 2 rows" in capsys.readouterr().err
    assert len(sampled) == 2, "one rollout a step, none again"
    first, second = (timeless(jsonl(run / "metrics.jsonl")) for run in (straight, halved))
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == other[name] or value == pytest.approx(other[name], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("place", "flag", "saved"),
    [
        ("parts.steps.sample", "--sample-rows", "keeps nothing but its settings"),
        ("copsd.copsd_gradient", "--gradient-checkpointing", "keeps the evaluation before"),
        ("parts.measure.sample", "--batch-rows", "keeps nothing but its settings"),
        ("parts.setup.load_model", "--dtype bfloat16", "what is saved is kept"),
    ],
)
def test_out_of_memory_for_good_is_a_line_that_names_what_takes_less(
    tmp_path, monkeypatch, place, flag, saved
):
    def _never(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr(place, _never)
    flags = ["train", "--steps", "1", "--batch-size", "2", "--eval-problems", "1"]
    small = ["--max-new-tokens", "4", "--eval-samples", "1", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(commands.copsd, [*flags, *small])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory") and flag in last and saved in last


def test_without_memory_for_one_row_the_error_is_the_errors():
    def _never(size):
        raise torch.OutOfMemoryError("too little")

    tried = []
    with pytest.raises(torch.OutOfMemoryError):
        halve_until_it_fits(_never, Limit(4), lambda: tried.append(1), 4)
    assert len(tried) == 2  # 2 and 1
