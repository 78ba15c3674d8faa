"""parts/footprint.py: what a run takes, from the configuration alone."""

from dataclasses import replace

import pytest
import torch
from test_families import SIZES
from transformers import AutoConfig

from parts import commands, footprint, setup
from parts.footprint import Footprint, Lengths, read_shape
from parts.prefixes import KEPT_BYTES
from parts.recipe import Config

LENGTHS = Lengths(student=256, teacher=1024)


def planned(shape, config: Config, lengths=LENGTHS, **options) -> Footprint:
    return footprint.footprint(shape, config, lengths, **{"on_cpu": False, **options})


def test_weights_and_adapter_are_counted_from_the_configuration_alone(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    assert shape.parameters == 1_543_714_304  # as its authors say: 1.54 B
    # r (in + out) of q, k, v, o, gate, up and down, in 28 layers.
    per_layer = 2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)
    assert shape.adapter == 28 * 64 * per_layer
    found = planned(shape, Config())
    assert found.weights == 2 * shape.parameters
    assert found.optimiser == 3 * 4 * shape.adapter, "the gradient and two averages, in fp32"
    assert planned(shape, replace(Config(), teacher="ema")).adapter == 2 * found.adapter


def test_the_cache_is_of_every_row_to_its_length_limit(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = replace(Config(), batch_size=32, eval_problems=0, max_new_tokens=1000)
    column = 2 * 2 * 128 * 2  # key and value, heads, their size, bytes
    least = 32 * (256 + 1000) * column * 28
    assert least <= planned(shape, config).cache < 1.3 * least
    wide = planned(shape, replace(config, sample_rows=16)).cache
    assert wide == pytest.approx(planned(shape, config).cache / 2, rel=0.01)


def test_stacked_experts_stand_beside_the_file_that_they_come_from(tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    AutoConfig.for_model("mixtral", **SIZES, **experts).save_pretrained(tmp_path)
    config = Config(lora_targets="q_proj,v_proj")
    shape = read_shape(tmp_path, config, torch.float32)
    assert shape.stacked == 2 * 4 * 3 * 32 * 48, "layers, experts, matrices"
    mapped = 4 * shape.parameters
    assert planned(shape, config).weights == planned(shape, config).loading == mapped
    on_cpu = planned(shape, config, on_cpu=True)
    assert on_cpu.weights == mapped + 4 * shape.stacked
    assert on_cpu.loading == 2 * mapped + 4 * shape.stacked


def test_what_a_setting_saves(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = Config(micro_batch=8, gradient_checkpointing=False, chunk_tokens=256)
    found = planned(shape, config)
    assert planned(shape, replace(config, micro_batch=4)).activations == found.activations // 2
    recomputed = planned(shape, replace(config, gradient_checkpointing=True))
    assert recomputed.activations < found.activations / 8
    assert planned(shape, replace(config, chunk_tokens=128)).chunk == found.chunk // 2
    assert planned(shape, config, on_cpu=True).update > found.update, "holes in the heap"


def test_without_a_number_a_chunk_has_the_rows_that_the_loss_takes_by_itself(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)

    def chunk(on_cpu: bool = False, **changes) -> float:
        """Return the bytes of an entry of the vocabulary, in bf16."""
        config = Config(**{"cosine_every": 0, **changes})
        return planned(shape, config, on_cpu=on_cpu).chunk / shape.vocabulary

    compiled, eager, of_logprob, of_cosine = 2 * 2, 2 * 2 + 7 * 4, 2 + 4 * 4, 2 * 2 + 9 * 4
    assert chunk() == 1024 * compiled and chunk(on_cpu=True) == 256 * compiled
    assert chunk(chunk_tokens=512) == chunk(on_cpu=True, chunk_tokens=512) == 512 * compiled
    assert chunk(compile=False) == 256 * eager
    assert chunk(on_cpu=True, compile=False) == 256 * eager
    for method in ("grpo", "egrsd"):
        assert chunk(method=method) == chunk(on_cpu=True, method=method) == 256 * of_logprob
    # The cosine runs eagerly, with 256 rows beside a compiled loss of 1024.
    clips = {"clip_mode": "entry", "cosine_every": 1}
    assert chunk(**clips) == chunk(on_cpu=True, **clips) == 256 * of_cosine
    assert chunk(**clips, chunk_tokens=1024) == 1024 * of_cosine
    # No chunk has more rows than a micro-batch has tokens.
    few: dict = {"micro_batch": 2, "max_new_tokens": 40}
    assert chunk(**few) == 80 * compiled and chunk(**clips, **few) == 80 * of_cosine
    # What is to be compiled does not hang on the rows that compiled code would have.
    small = replace(shape, vocabulary=2**13)
    assert planned(small, Config()).chunk == 256 * 2**13 * eager
    insists = Config(compile=True, cosine_every=0)
    assert planned(small, insists).chunk == 1024 * 2**13 * compiled


def test_kept_prompts_are_those_of_all_steps_up_to_the_room_for_them(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = Config(batch_size=4, steps=3, eval_problems=2)

    def kept(**changes) -> int:
        return planned(shape, replace(config, **changes), on_cpu=True).kept

    column = 2 * 2 * 128 * 2  # key and value, heads, their size, bytes
    assert kept() == (4 * 3 + 2) * 1024 * column * 28 < KEPT_BYTES
    assert kept(steps=100) == KEPT_BYTES
    assert kept(token_budget=10**6) == KEPT_BYTES
    for other in ({"method": "grpo"}, {"method": "egrsd"}, {"completion": "reference"}):
        assert kept(**other) == 0
    assert planned(shape, config, on_cpu=False).kept == 0, "a GPU computes them in batches"


def test_rows_behind_kept_prompts_have_a_cache_of_all_layers(qwen):
    """Of a model whose heads each have keys of their own it was most of the peak, and not there."""
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = Config(micro_batch=4, max_new_tokens=2048)
    column = 2 * 2 * 128 * 2 * 28  # key and value, heads, their size, bytes, layers
    behind = footprint._teacher_bytes(shape, config, LENGTHS, keeps=True)
    whole = footprint._teacher_bytes(shape, config, LENGTHS, keeps=False)
    passing = shape.passes.forward
    assert whole == 4 * (1024 + 2048) * passing
    assert behind == 4 * (2 * 1024 + 2048) * column + 4 * 2048 * passing


def test_rows_that_are_decoded_are_those_of_looks_too_and_of_one_rank(monkeypatch):
    config = Config(batch_size=8, eval_problems=0, sample_rows=256)
    assert footprint.sampled_rows(config) == 8
    looks = replace(config, eval_every=5, dev_problems=100)
    assert footprint.sampled_rows(looks) == 100
    monkeypatch.setattr(footprint.ranks, "count", lambda: 3)
    assert footprint.sampled_rows(looks) == 34


def test_a_budget_of_positions_is_counted_by_the_longer_role(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
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


def test_a_prompt_that_a_group_shares_is_counted_once(qwen):
    shape = read_shape(qwen, Config(), torch.bfloat16)
    config = replace(Config(), method="grpo", group_size=8, micro_batch=8, max_new_tokens=64)

    def kept(**changes) -> int:
        return footprint._update_bytes(shape, replace(config, **changes), 2, LENGTHS)[0]

    final_states = 3 * 8 * 64 * shape.hidden * 2
    shared = (kept() - final_states) / (kept(method="copsd") - final_states)
    assert shared == pytest.approx((256 + 8 * 64) / (8 * (256 + 64)), rel=0.01)
    # Completions so long that their prompt counts for little are plain rows.
    assert kept(max_new_tokens=1000) == kept(max_new_tokens=1000, method="copsd")
    assert kept(micro_batch=1) == kept(micro_batch=1, method="copsd")


def test_the_longest_prompts_are_those_of_the_data(tmp_path):
    config, folder = setup.configure({"out": str(tmp_path / "run")})
    loaded = setup.prepare(config, folder, commands.Console(quiet=True))[0]
    found = setup.longest_prompts(config, loaded.tokenizer, loaded.train)
    students = [len(loaded.student_prompt(problem)) for problem in loaded.train]
    teachers = [len(loaded.teacher_prompt(problem)) for problem in loaded.train]
    # Among the longest texts, which need not be the most tokens to the letter.
    assert 0.9 * max(students) <= found.student <= max(students)
    assert 0.9 * max(teachers) <= found.teacher <= max(teachers)
