"""The flags of `train`: each changes what is learned, and those for memory do not.

CHANGES has a value for each flag that two short runs can tell from its default. ELSEWHERE names the
others, and where they are tested.
"""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import assert_alike_but_for_rounding, few_problems
from test_copsd import QUIET, jsonl, make_setup, train
from test_grpo import ADAPTER
from test_grpo import train as train_grpo

import copsd
from parts.recipe import Config
from parts.view import StepView

CHANGES = {
    "lang": "swa",
    "data": "lab/problems/hau/test.jsonl",
    "seed": 1,
    "divergence": "reverse_kl",
    "clip_mode": "none",
    "clip": 0.01,
    "reduction": "trajectory",
    "teacher": "current",
    "english_problem": False,
    "english_solution": False,
    "batch_size": 5,
    "temperature": 0.8,
    "max_new_tokens": 12,
    "lr": 2e-3,
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_targets": "q_proj",
    "steps": 3,
    "dtype": "bfloat16",
    "save_every": 1,
    "english_share": 0.0,
    "swap_solutions": True,
    "answer_only": True,
    "completion": "reference",
    "token_budget": 150,
    "loss_over": "sampled",
    "teacher_reads": "brief",
    "token_weight": "position",
    "loss_prefix": 0.3,
}
# These change memory, speed, place or the evaluation, and must not change what is learned, or are
# tested elsewhere.
ELSEWHERE = {
    "model",
    "top_p",
    "top_k",
    "eval_data",
    "out",
    "beta",
    "ema_decay",
    "thinking",
    "micro_batch",
    "micro_tokens",
    "chunk_tokens",
    "sample_rows",
    "gradient_checkpointing",
    "compile",
    "device",
    "eval_problems",
    "eval_samples",
    "eval_temperature",
    "eval_top_p",
    "keep",
    # In test_controls.py
    "cosine_every",
    # In test_watch.py
    "eval_every",
    "dev_problems",
    # GRPO's, below
    "method",
    "group_size",
    "scale_rewards",
    "inner_epochs",
    "clip_low",
    "clip_high",
    "kl_coef",
    "loss_norm",
    "mask_truncated",
    "resample_dead_groups",
    # The family's, in test_methods.py, test_notes.py and test_setup.py
    "warm_start",
    "teacher_every",
    "loss_top_k",
    "brief",
    "brief_language",
    "note_tokens",
    "vote_samples",
    "gate_scale",
    "gate_floor",
    "gate_lookahead",
    "credit_mix",
    "credit_clip",
    "witness_weight",
    "witness_tokens",
}


def fingerprint(folder: Path) -> list:
    adapters = sorted(folder.glob("adapters/*/adapter_model.safetensors"))
    return [
        [path.parent.name for path in adapters],
        adapters[-1].read_bytes(),
        (folder / "completions.jsonl").read_bytes(),
    ]


def test_every_flag_has_a_tested_effect(tmp_path):
    assert CHANGES.keys() | ELSEWHERE == {f.name for f in fields(Config)}
    few = few_problems()
    paper = {"clip_mode": "entry", **few}  # without a clip, its size has nothing to change
    plain = fingerprint(train(tmp_path / "plain", **paper))
    for name, value in CHANGES.items():
        assert fingerprint(train(tmp_path / name, **{**paper, name: value})) != plain, name
    hot = {"temperature": 3.0, **few}  # at 1.1 too few tokens are there for a truncation to show
    assert fingerprint(train(tmp_path / "h1", **hot)) != fingerprint(
        train(tmp_path / "h2", top_k=1, **hot)
    )
    assert fingerprint(train(tmp_path / "h3", **hot)) != fingerprint(
        train(tmp_path / "h4", top_p=0.1, **hot)
    )
    jsd = {"divergence": "jsd", "clip_mode": "none", **few}
    assert fingerprint(train(tmp_path / "j1", **jsd)) != fingerprint(
        train(tmp_path / "j2", beta=0.1, **jsd)
    )
    ema = {"teacher": "ema", **few}
    assert fingerprint(train(tmp_path / "e1", **ema)) != fingerprint(
        train(tmp_path / "e2", ema_decay=0.1, **ema)
    )


def test_memory_flags_do_not_change_what_is_sampled(tmp_path):
    plain = jsonl(train(tmp_path / "plain") / "completions.jsonl")
    flags = {"micro_batch": 2, "chunk_tokens": 7, "sample_rows": 4, "gradient_checkpointing": True}
    changed = jsonl(train(tmp_path / "changed", **flags) / "completions.jsonl")
    for row, other in zip(plain, changed, strict=True):
        assert row["completion"] == other["completion"]
        assert row["kl_nats_per_token"] == pytest.approx(other["kl_nats_per_token"], abs=1e-4)


def test_micro_batches_change_an_adapter_by_rounding_and_by_no_more(tmp_path):
    # Products over other numbers of rows round otherwise. Bytes are the same at one micro-batch.
    found = {}
    for size in (1, 2, 6):
        setup, run = make_setup(tmp_path / str(size), micro_batch=size)
        copsd.train_copsd(setup, run, StepView(QUIET, 2))
        weights = torch.cat([tensor.detach().flatten() for tensor in setup.lora.parameters()])
        rows = jsonl(run.folder / "completions.jsonl")
        losses = [row["loss/objective_nats_per_token"] for row in run.metrics()]
        found[size] = (weights, [row["completion"] for row in rows], losses)
    weights, texts, losses = found[1]
    for size in (2, 6):
        other, same_texts, same_losses = found[size]
        assert_alike_but_for_rounding(weights, other, moved=2 * 1e-3)
        assert same_texts == texts and same_losses == pytest.approx(losses, rel=1e-5)


# GRPO's

FLAGS = {
    "scale_rewards": "none",
    "inner_epochs": 2,
    "kl_coef": 0.5,
    "loss_norm": "sequence",
    "group_size": 8,
    "mask_truncated": True,
    "resample_dead_groups": True,
    "seed": 1,
}


def test_every_flag_of_grpo_has_an_effect(tmp_path, monkeypatch):
    monkeypatch.setattr(
        copsd, "is_correct", lambda text, gold, think_open: len(text) % 3 == 0
    )  # few dead groups
    base = {"batch_size": 16, "group_size": 4, "temperature": 1.5, "max_new_tokens": 30, "lr": 5e-3}
    base |= few_problems()
    plain = (train_grpo(tmp_path / "plain", **base) / ADAPTER).read_bytes()
    for name, value in FLAGS.items():
        assert (
            train_grpo(tmp_path / name, **{**base, name: value}) / ADAPTER
        ).read_bytes() != plain, name
    two = {**base, "inner_epochs": 3, "lr": 2e-2}  # ratios leave the band only after an update
    plain = (train_grpo(tmp_path / "two", **two) / ADAPTER).read_bytes()
    for name in ("clip_low", "clip_high"):
        assert (
            train_grpo(tmp_path / name, **{**two, name: 1e-3}) / ADAPTER
        ).read_bytes() != plain, name
