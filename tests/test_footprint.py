"""What a run takes, from the configuration alone; what fits; what happens where it did not."""

import json
from dataclasses import replace

import pytest
import torch
from test_copsd import jsonl, timeless
from test_copsd import train as train_copsd
from test_grpo import train as train_grpo
from typer.testing import CliRunner

import copsd
from parts import commands, footprint, setup
from parts.footprint import (
    GIB,
    Footprint,
    Lengths,
    changes_that_fit,
    flags_text,
    read_shape,
)
from parts.lora import attach_lora
from parts.microbatch import Limit, halve_until_it_fits
from parts.model import final_hidden, load_model
from parts.recipe import Config

# Qwen2.5-1.5B's published sizes.
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LENGTHS = Lengths(student=256, teacher=1024)


@pytest.fixture
def qwen(tmp_path):
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    return folder


def planned(shape, config: Config, dtype=torch.bfloat16, lengths=LENGTHS, **options) -> Footprint:
    return footprint.footprint(shape, config, dtype, lengths, **{"on_cpu": False, **options})


def test_weights_and_adapter_are_counted_from_the_configuration_alone(qwen):
    shape = read_shape(qwen, Config())
    assert shape.parameters == 1_543_714_304  # as its authors say: 1.54 B
    # r (in + out) of q, k, v, o, gate, up and down, in 28 layers.
    per_layer = 2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)
    assert shape.adapter == 28 * 64 * per_layer
    found = planned(shape, Config())
    assert found.weights == 2 * shape.parameters
    assert found.optimiser == 3 * 4 * shape.adapter, "the gradient and two averages, in fp32"
    assert planned(shape, replace(Config(), teacher="ema")).adapter == 2 * found.adapter


def test_the_cache_is_of_every_row_to_its_length_limit(qwen):
    shape = read_shape(qwen, Config())
    config = replace(Config(), batch_size=32, eval_problems=0, max_new_tokens=1000)
    column = 2 * 2 * 128 * 2  # key and value, heads, their size, bytes
    least = 32 * (256 + 1000) * column * 28
    assert least <= planned(shape, config).cache < 1.3 * least
    wide = planned(shape, replace(config, sample_rows=16)).cache
    assert wide == pytest.approx(planned(shape, config).cache / 2, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_layer_keeps_is_what_autograd_keeps(lab_folder, dtype):
    shape = read_shape(lab_folder, Config(lora_rank=4))
    model = load_model(lab_folder, device="cpu", dtype=dtype)
    targets = tuple(Config().lora_targets.split(","))
    attach_lora(model, rank=4, alpha=8, targets=targets, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def _keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_keep, lambda tensor: tensor):
        final_hidden(model, torch.randint(3, 100, (2, 64)))
    measured = sum(count for count, _ in kept.values()) / (2 * 64 * shape.layers)
    assert footprint._saved_bytes(shape, dtype.itemsize) == pytest.approx(measured, rel=0.2)


def test_what_a_setting_saves(qwen):
    shape = read_shape(qwen, Config())
    config = replace(Config(), micro_batch=8, gradient_checkpointing=False)
    found = planned(shape, config)
    assert planned(shape, replace(config, micro_batch=4)).activations == found.activations // 2
    recomputed = planned(shape, replace(config, gradient_checkpointing=True))
    assert recomputed.activations < found.activations / 8
    assert planned(shape, replace(config, chunk_tokens=128)).chunk == found.chunk // 2
    assert planned(shape, config, on_cpu=True).update > found.update, "holes in the heap"


def test_a_budget_of_positions_is_counted_by_the_longer_role(qwen):
    shape = read_shape(qwen, Config())
    config = replace(Config(), micro_batch=8, max_new_tokens=1000)
    eight, four, one = (planned(shape, replace(config, micro_batch=rows)) for rows in (8, 4, 1))
    assert planned(shape, replace(config, micro_tokens=4 * (1024 + 1000))) == four
    assert planned(shape, replace(config, micro_tokens=10**6)) == eight, "rows are still a limit"
    assert planned(shape, replace(config, micro_tokens=10)) == one, "a longer row stands alone"
    # Where no whole number of rows fits, shorter rows fill the rest.
    between = planned(shape, replace(config, micro_tokens=5000)).update
    assert planned(shape, replace(config, micro_batch=2)).update < between < four.update
    grpo = replace(config, method="grpo")
    budget = replace(grpo, micro_tokens=4 * (256 + 1000))
    assert planned(shape, budget) == planned(shape, replace(grpo, micro_batch=4)), (
        "no teacher reads"
    )
    limit = (one.update + four.update) / 2
    changes = changes_that_fit(
        shape,
        replace(config, micro_tokens=4 * 2024),
        torch.bfloat16,
        LENGTHS,
        limit,
        on_cpu=False,
    )
    assert changes and (changes["micro_batch"], changes["micro_tokens"]) == (4, 2 * 2024)


def test_a_prompt_that_a_group_shares_is_counted_once(qwen):
    shape = read_shape(qwen, Config())
    config = replace(Config(), method="grpo", group_size=8, micro_batch=8, max_new_tokens=64)

    def kept(**changes) -> int:
        return footprint._update_bytes(shape, replace(config, **changes), 2, LENGTHS)[0]

    final_states = 3 * 8 * 64 * shape.hidden * 2
    shared = (kept() - final_states) / (kept(method="copsd") - final_states)
    assert shared == pytest.approx((256 + 8 * 64) / (8 * (256 + 64)), rel=0.01)
    # Completions so long that their prompt counts for little are plain rows.
    assert kept(max_new_tokens=1000) == kept(max_new_tokens=1000, method="copsd")
    assert kept(micro_batch=1) == kept(micro_batch=1, method="copsd")


def test_plan_takes_a_budget():
    flags = ["--micro-batch", "64", "--no-gradient-checkpointing", "--device", "cpu"]
    said = [
        CliRunner().invoke(commands.copsd, ["plan", *flags, *budget]).stdout
        for budget in ([], ["--micro-tokens", "100"])
    ]
    peaks = [float(text.split("memory: ")[1].split(" GiB")[0]) for text in said]
    assert peaks[1] < peaks[0]


def test_the_changes_that_fit_do_fit_and_change_no_result(qwen):
    shape = read_shape(qwen, Config())
    config = replace(Config(), micro_batch=32, gradient_checkpointing=False)
    for limit in (8 * GIB, 12 * GIB, 22 * GIB):
        changes = changes_that_fit(shape, config, torch.bfloat16, LENGTHS, limit, on_cpu=False)
        assert changes and planned(shape, replace(config, **changes)).peak <= limit
        sections = {Config.__dataclass_fields__[name].metadata["section"] for name in changes}
        assert sections == {Config.__dataclass_fields__["micro_batch"].metadata["section"]}
    fits = changes_that_fit(shape, config, torch.bfloat16, LENGTHS, 10**12, on_cpu=False)
    never = changes_that_fit(shape, config, torch.bfloat16, LENGTHS, 3 * GIB, on_cpu=False)
    assert (fits, never) == ({}, None)
    assert flags_text({"micro_batch": 2, "gradient_checkpointing": True}) == (
        "--micro-batch 2 --gradient-checkpointing"
    )


def test_plan_prints_parts_and_cards_from_a_config_json(qwen):
    result = CliRunner().invoke(commands.copsd, ["plan", "--model", str(qwen)])
    assert result.exit_code == 0, result.output
    assert "weights" in result.output and "2.88" in result.output
    assert all(f" {card} " in result.output for card in (24, 40, 80, 141))
    small = CliRunner().invoke(commands.copsd, ["plan", "--model", str(qwen), "--gpu", "3"])
    assert small.exit_code == 1 and "no setting of Machine" in small.output


def test_training_says_its_memory_first_and_refuses_what_cannot_fit(tmp_path, monkeypatch):
    flags = ["train", "--steps", "1", "--batch-size", "2", "--eval-problems", "0"]
    out = tmp_path / "run"
    monkeypatch.setattr(footprint, "free_bytes", lambda device: 2**20)
    refused = CliRunner().invoke(commands.copsd, [*flags, "--out", str(out)])
    assert refused.exit_code == 2 and "GiB at most" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 and not out.exists()
    monkeypatch.setattr(footprint, "free_bytes", lambda device: None)
    result = CliRunner().invoke(commands.copsd, [*flags, "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    said = next(line for line in lines if "GiB at most" in line)
    assert lines.index(said) < lines.index(next(line for line in lines if "COPSD on" in line))


def test_the_longest_prompts_are_those_of_the_data(tmp_path):
    config, folder = setup.configure({"out": str(tmp_path / "run")})
    loaded = setup.prepare(config, folder, commands.Console(quiet=True))[0]
    found = setup.longest_prompts(config, loaded.tokenizer, loaded.train)
    students = [len(loaded.student_prompt(problem)) for problem in loaded.train]
    teachers = [len(loaded.teacher_prompt(problem)) for problem in loaded.train]
    # Among the longest texts, which need not be the most tokens to the letter.
    assert 0.9 * max(students) <= found.student <= max(students)
    assert 0.9 * max(teachers) <= found.teacher <= max(teachers)


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
    real_sample = copsd.sample

    def _fail_once(setup, *arguments, **options):
        calls.append(1)
        found = real_loss(setup, *arguments, **options)
        if len(calls) == 2:  # in the middle of a step: a part of the gradient is there already
            raise torch.OutOfMemoryError("as if")
        return found

    monkeypatch.setattr(copsd, loss, _fail_once)
    monkeypatch.setitem(copsd.SOURCES, "student", (copsd.roll_out, copsd.copsd_loss))
    monkeypatch.setattr(copsd, "sample", lambda *a, **k: sampled.append(1) or real_sample(*a, **k))
    halved = train(tmp_path / "b", **given)
    assert "out of memory: micro-batches of 2 rows" in capsys.readouterr().err
    assert len(sampled) == 2, "one rollout a step, none again"
    first, second = (timeless(jsonl(run / "metrics.jsonl")) for run in (straight, halved))
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == other[name] or value == pytest.approx(other[name], rel=2e-3, abs=1e-5)


def test_without_memory_for_one_row_the_error_is_the_errors():
    def _never(size):
        raise torch.OutOfMemoryError("too little")

    tried = []
    with pytest.raises(torch.OutOfMemoryError):
        halve_until_it_fits(_never, Limit(4), lambda: tried.append(1))
    assert len(tried) == 2  # 2 and 1
