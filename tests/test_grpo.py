"""GRPO: advantages and loss by hand, what counts in the mean, and a loop that is like COPSD's.

test_groups.py holds the groups and their rewards, and test_flags.py what each flag changes.
"""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import die_at, few_problems
from rich.console import Console

import copsd
from copsd import (
    Group,
    advantages,
    clipped_surrogate,
    grpo_loss,
    loss_reduction,
    roll_out_groups,
)
from kernels import reduce_loss
from parts import steplog, steps
from parts.microbatch import Limit, micro_batches
from parts.recipe import Config
from parts.sampler import Rollout
from parts.setup import configure, prepare
from parts.view import StepView

SMALL = {
    "method": "grpo",
    "steps": 2,
    "batch_size": 8,
    "group_size": 4,
    "micro_batch": 3,
    "eval_problems": 0,
    "max_new_tokens": 48,
    "lr": 1e-3,
    "english_share": 0.0,
}
QUIET = Console(quiet=True)
ADAPTER = Path("adapters/step_00002/adapter_model.safetensors")


def make_setup(tmp_path: Path, **given):
    config, folder = configure({**SMALL, **few_problems(), "out": str(tmp_path / "run"), **given})
    return prepare(config, folder, QUIET)


def train(tmp_path: Path, **given) -> Path:
    setup, run = make_setup(tmp_path, **given)
    assert copsd.train_grpo(setup, run, StepView(QUIET, setup.config.steps))
    return run.folder


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def nudge(setup, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in setup.lora.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def live_groups(setup, count: int = 2) -> list[Group]:
    """Return groups with rewards that differ, by hand: the lab's would depend on its weights."""
    groups = roll_out_groups(setup, setup.train[:count], seed=0)
    return [Group(group.problem, group.rollouts, [1.0, 0.0, 0.0, 1.0]) for group in groups]


def step_gradient(
    setup, groups: list[Group], micro_batch: int, kept: list[int] | None = None
) -> torch.Tensor:
    """Return the gradient of one update, as the loop computes it."""
    config = setup.config
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    kept = list(range(len(rollouts))) if kept is None else kept
    advantage_B = advantages(
        torch.tensor([group.rewards for group in groups]), config.scale_rewards
    ).flatten()
    tokens = sum(len(rollouts[row].completion_ids) for row in kept)
    reduction, denominator = loss_reduction(config, tokens, len(kept))
    for tensor in setup.lora.parameters():
        tensor.grad = None
    for rows in micro_batches(rollouts, Limit(micro_batch), kept):
        lengths = [len(rollouts[row].completion_ids) for row in rows]
        advantage_N = advantage_B[rows].repeat_interleave(torch.tensor(lengths))
        loss_N, _ = grpo_loss(setup, [rollouts[row] for row in rows], advantage_N, None)
        options = {"reduction": reduction, "step_tokens": denominator, "step_rows": len(kept)}
        reduce_loss(loss_N, lengths, **options).backward()
    return torch.cat([t.grad.flatten() for t in setup.lora.parameters() if t.grad is not None])


# By hand


def test_advantages_by_hand():
    reward_BG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    first, second = (
        0.5 / (math.sqrt(1 / 3) + 1e-4),
        1 / (0.5 + 1e-4),
    )  # standard deviations of 3 degrees of freedom
    expected = [
        [first, -first, -first, first],
        [0.75 * second, -0.25 * second, -0.25 * second, -0.25 * second],
    ]
    torch.testing.assert_close(advantages(reward_BG, "group"), torch.tensor(expected))
    unscaled = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]])
    torch.testing.assert_close(advantages(reward_BG, "none"), unscaled)


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_a_group_whose_rewards_agree_has_advantages_of_exactly_zero(scale, size):
    for reward in (0.0, 1.0):
        assert torch.equal(advantages(torch.full((1, size), reward), scale), torch.zeros(1, size))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [  # loss = -min(ratio A, clamp(ratio, 0.8, 1.3) A), gradient on the ratio
        (0.5, 2.0, -1.0, -2.0),  # too low and A > 0: it may still rise
        (1.5, 2.0, -2.6, 0.0),  # too high and A > 0: clipped at 1.3
        (0.5, -2.0, 1.6, 0.0),  # too low and A < 0: clipped at 0.8
        (1.5, -2.0, 3.0, 2.0),  # too high and A < 0: it may still fall
        (1.0, 2.0, -2.0, -2.0),
    ],
)
def test_the_corners_of_the_clipped_surrogate(ratio, advantage, loss, gradient):
    ratio_N = torch.tensor([ratio], requires_grad=True)
    loss_N = clipped_surrogate(ratio_N, torch.tensor([advantage]), low=0.2, high=0.3)
    assert loss_N.item() == pytest.approx(loss)
    assert torch.autograd.grad(loss_N.sum(), ratio_N)[0].item() == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("norm", "weights"),
    [  # what a token weighs in completions of 3 and 1 tokens, of at most 10
        ("token", [1 / 4, 1 / 4]),
        ("sequence", [1 / 6, 1 / 2]),
        ("constant", [1 / 20, 1 / 20]),
    ],
)
def test_what_a_token_weighs_in_the_mean(norm, weights):
    config = Config(method="grpo", loss_norm=norm, max_new_tokens=10)
    reduction, denominator = loss_reduction(config, 4, 2)
    loss_N = torch.ones(4, requires_grad=True)
    reduce_loss(
        loss_N, [3, 1], reduction=reduction, step_tokens=denominator, step_rows=2
    ).backward()
    torch.testing.assert_close(loss_N.grad, torch.tensor([weights[0]] * 3 + [weights[1]]))


# On the model


def test_the_ratio_is_one_on_the_first_inner_epoch_and_moves_on_the_next(tmp_path):
    setup, _ = make_setup(tmp_path)
    nudge(setup)
    batch = [rollout for group in live_groups(setup) for rollout in group.rollouts]
    advantage_N = torch.ones(sum(len(rollout.completion_ids) for rollout in batch))
    _, first = grpo_loss(setup, batch, advantage_N, None)
    _, again = grpo_loss(setup, batch, advantage_N, first["logprob_N"])
    assert torch.equal(first["ratio_N"], torch.ones_like(advantage_N))
    torch.testing.assert_close(again["ratio_N"], torch.ones_like(advantage_N), atol=1e-5, rtol=0)
    nudge(setup)
    _, moved = grpo_loss(setup, batch, advantage_N, first["logprob_N"])
    assert (moved["ratio_N"] - 1).abs().max() > 0.01
    torch.testing.assert_close(moved["ratio_N"], (moved["logprob_N"] - first["logprob_N"]).exp())
    assert (
        moved["clipped_high_N"].equal(moved["ratio_N"] > 1.2) and not moved["clipped_low_N"].any()
    )


def test_each_side_of_the_clip_is_counted_by_its_own_bound(tmp_path):
    setup, _ = make_setup(tmp_path, clip_low=0.1, clip_high=0.5)
    rollouts = copsd.roll_out(setup, setup.train[:1], seed=0)
    tokens = steplog.count_tokens(rollouts)
    _, first = grpo_loss(setup, rollouts, torch.ones(tokens), None)
    # Below both bounds of the low side, between them, inside, above the low bound, above both.
    ratio_N = torch.tensor([0.4, 0.8, 0.95, 1.3, 1.6]).repeat(tokens)[:tokens]
    old_logprob_N = first["logprob_N"] - ratio_N.log()
    for advantage, low, high in ((1.0, [], [1.6]), (-1.0, [0.4, 0.8], []), (0.0, [], [])):
        advantage_N = torch.full((tokens,), advantage)
        loss_N, stats = grpo_loss(setup, rollouts, advantage_N, old_logprob_N)
        least_N = torch.minimum(ratio_N * advantage, ratio_N.clamp(0.9, 1.5) * advantage)
        assert torch.allclose(loss_N, -least_N, atol=1e-5)
        for side, wanted in (("low", low), ("high", high)):
            counted = {round(x, 3) for x in ratio_N[stats[f"clipped_{side}_N"]].tolist()}
            assert counted == set(wanted), (advantage, side)


def test_the_gradient_is_that_of_reinforce_with_the_group_as_baseline(tmp_path):
    setup, _ = make_setup(tmp_path, scale_rewards="none")
    nudge(setup)
    groups = live_groups(setup, 1)
    gradient = step_gradient(setup, groups, 4)
    for tensor in setup.lora.parameters():
        tensor.grad = None
    total, tokens = torch.tensor(0.0), 0
    for rollout, reward in zip(groups[0].rollouts, groups[0].rewards, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        logits = (
            setup.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
            / setup.config.temperature
        )
        chosen = logits.log_softmax(-1)[range(len(rollout.completion_ids)), rollout.completion_ids]
        total, tokens = total - (reward - 0.5) * chosen.sum(), tokens + len(rollout.completion_ids)
    (total / tokens).backward()
    plain = torch.cat([t.grad.flatten() for t in setup.lora.parameters() if t.grad is not None])
    torch.testing.assert_close(gradient, plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("norm", ["token", "sequence", "constant"])
def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path, norm):
    setup, _ = make_setup(tmp_path, loss_norm=norm, kl_coef=0.1)
    nudge(setup)
    groups = live_groups(setup)
    gradients = [step_gradient(setup, groups, size) for size in (1, 3, 8)]
    scale = gradients[0].abs().max().item()
    assert scale > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5 * scale, rtol=0)


def test_masked_rows_count_neither_above_nor_below_the_fraction_line(tmp_path):
    setup, _ = make_setup(tmp_path)
    nudge(setup)
    groups = live_groups(setup, 1)
    without_last = step_gradient(setup, groups, 4, kept=[0, 1, 2])
    rollouts = [*groups[0].rollouts[:3], Rollout([5], [7] * 40, [0.0] * 40, "length")]
    other_last = [Group(groups[0].problem, rollouts, groups[0].rewards)]
    torch.testing.assert_close(step_gradient(setup, other_last, 4, kept=[0, 1, 2]), without_last)


def test_eos_gets_a_gradient(tmp_path):
    setup, _ = make_setup(tmp_path)
    nudge(setup)
    group = live_groups(setup, 1)[0]
    eos = setup.tokenizer.eos_token_id
    rollout = next(r for r in group.rollouts if r.finish_reason == "stop")
    assert rollout.completion_ids[-1] == eos
    only_eos_N = torch.zeros(len(rollout.completion_ids))
    only_eos_N[-1] = 1.0
    loss_N, _ = grpo_loss(setup, [rollout], only_eos_N, None)
    loss_N.sum().backward()
    assert max(t.grad.abs().max().item() for t in setup.lora.parameters() if t.grad is not None) > 0


def test_the_kl_to_the_initial_model_is_k3_and_zero_at_the_start(tmp_path):
    setup, _ = make_setup(tmp_path, kl_coef=0.5)
    batch = live_groups(setup, 1)[0].rollouts
    zeros_N = torch.zeros(sum(len(rollout.completion_ids) for rollout in batch))
    loss_N, start = grpo_loss(setup, batch, zeros_N, None)
    assert start["kl_N"].abs().max() == 0 and loss_N.abs().max() == 0
    nudge(setup)
    loss_N, moved = grpo_loss(setup, batch, zeros_N, None)
    difference_N = start["logprob_N"] - moved["logprob_N"]  # initial minus current
    torch.testing.assert_close(
        moved["kl_N"], difference_N.exp() - 1 - difference_N, atol=1e-6, rtol=1e-3
    )
    torch.testing.assert_close(loss_N.detach(), 0.5 * moved["kl_N"])
    assert moved["kl_N"].min() >= 0 and loss_N.requires_grad


# The loop


def test_a_step_logs_what_it_did(tmp_path):
    rows = jsonl(train(tmp_path, kl_coef=0.01, inner_epochs=2) / "metrics.jsonl")
    assert rows[0].keys() >= {
        "loss/objective",
        "loss/kl_nats_per_token",
        "loss/student_entropy_nats_per_token",
        "reward/mean",
        "reward/dead_group_frac",
        "ratio/mean",
        "ratio/min",
        "ratio/max",
        "ratio/clipped_low_frac",
        "ratio/clipped_high_frac",
        "rollout/cut_frac",
        "rollout/time_s",
        "score/time_s",
        "update/time_s",
        "update/grad_norm",
        "rollout/tokens",
        "sampled_tokens",
    }
    assert rows[1]["sampled_tokens"] == rows[0]["rollout/tokens"] + rows[1]["rollout/tokens"]
    assert [row["update/lr"] for row in rows] == pytest.approx([1e-3, 5e-4])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_step_says_how_many_tokens_went_forward_and_backward(tmp_path, monkeypatch, kl_coef):
    """The initial model's pass, where there is one, is a pass forward; prompts are in each."""
    sampled = []
    real = steps.write_completions
    monkeypatch.setattr(
        steps, "write_completions", lambda *a, **k: sampled.append(real(*a, **k)) or sampled[-1]
    )
    (row,) = jsonl(train(tmp_path, steps=1, kl_coef=kl_coef, inner_epochs=2) / "metrics.jsonl")
    rollouts = [rollout for group in sampled[0] for rollout in group]
    read = sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts)
    assert row["update/tokens"] == 2 * read
    assert row["score/tokens"] == (4 if kl_coef else 2) * read


def test_one_inner_epoch_takes_one_update_and_two_take_two(tmp_path, monkeypatch):
    updates = []
    real = copsd.take_step
    monkeypatch.setattr(copsd, "take_step", lambda *a, **k: updates.append(1) or real(*a, **k))
    train(tmp_path / "one", steps=1)
    assert len(updates) == 1
    train(tmp_path / "two", steps=1, inner_epochs=2)
    assert len(updates) == 3


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    flags = {"steps": 4, "save_every": 2, "inner_epochs": 2}
    straight = train(tmp_path / "straight", **flags)
    setup, run = make_setup(tmp_path / "killed", **flags)
    view = StepView(QUIET, 4)
    die_at(3, view, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        copsd.train_grpo(setup, run, view)
    resumed = train(tmp_path / "killed", **flags)
    for name in (
        "adapters/step_00004/adapter_model.safetensors",
        "resume/step_00004.safetensors",
        "completions.jsonl",
    ):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize("method", ["copsd", "grpo"])
def test_a_token_budget_ends_the_run_and_the_rate_falls_with_it(tmp_path, method):
    config, folder = configure(
        {**SMALL, "method": method, "out": str(tmp_path / "run"), "token_budget": 600}
    )
    setup, run = prepare(config, folder, QUIET)
    loop = {"copsd": copsd.train_copsd, "grpo": copsd.train_grpo}[method]
    assert loop(setup, run, StepView(QUIET, None))
    rows = jsonl(run.folder / "metrics.jsonl")
    assert rows[-1]["sampled_tokens"] >= 600 > rows[-2]["sampled_tokens"]
    assert [row["update/lr"] for row in rows[1:]] == pytest.approx(
        [1e-3 * (1 - row["sampled_tokens"] / 600) for row in rows[:-1]]
    )
    assert loop(setup, run, StepView(QUIET, None)) and len(
        jsonl(run.folder / "metrics.jsonl")
    ) == len(rows)


@pytest.mark.parametrize("method", ["copsd", "grpo"])
def test_updates_dropped_in_a_row_are_counted_across_a_stop(tmp_path, monkeypatch, method):
    flags = {"method": method, "steps": 6, "batch_size": 4, "max_new_tokens": 4}
    loop = {"copsd": copsd.train_copsd, "grpo": copsd.train_grpo}[method]
    plain = torch.nn.utils.clip_grad_norm_
    norms = iter([None, math.nan, math.nan])  # the first update is made, two are dropped

    def broken_norm(parameters, most):
        norm = next(norms, math.inf)
        return plain(parameters, most) if norm is None else torch.tensor(norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken_norm)
    setup, run = make_setup(tmp_path, **flags)
    view = StepView(QUIET, 6)
    with monkeypatch.context() as stopping:
        stopping.setattr(view, "show", lambda metrics: metrics["step"] == 3)
        assert loop(setup, run, view) is False
    setup, run = make_setup(tmp_path, **flags)
    with pytest.raises(FloatingPointError, match="no finite gradient in 3 updates up to step 4"):
        loop(setup, run, view)


@pytest.mark.parametrize("masked", [True, False])
def test_a_step_in_which_everything_is_masked_changes_nothing(tmp_path, monkeypatch, masked):
    monkeypatch.setattr(
        copsd, "is_correct", lambda text, gold, think_open: len(text) % 2 == 0
    )  # no dead groups
    setup, run = make_setup(
        tmp_path, mask_truncated=masked, max_new_tokens=5, steps=1, temperature=3.0
    )
    start = [tensor.clone() for tensor in setup.lora.parameters()]
    copsd.train_grpo(setup, run, StepView(QUIET, 1))
    metrics = jsonl(run.folder / "metrics.jsonl")[0]
    assert metrics["rollout/cut_frac"] == 1 and metrics["reward/dead_group_frac"] < 1
    unchanged = all(
        torch.equal(tensor, before)
        for tensor, before in zip(setup.lora.parameters(), start, strict=True)
    )
    assert unchanged == masked


def test_the_defaults_are_the_published_recipe():
    config, _ = configure(
        {"method": "grpo", "model": "tests/../lab/tiny", "data": "lab/problems/hau/train.jsonl"}
    )
    assert (config.group_size, config.kl_coef, config.scale_rewards) == (8, 0.0, "group")
    defaults = {f.name: f.metadata["by_method"].get("grpo", f.default) for f in fields(Config)}
    assert (defaults["temperature"], defaults["steps"], defaults["max_new_tokens"]) == (
        1.2,
        500,
        16384,
    )
    assert (
        defaults["lr"],
        defaults["batch_size"],
        defaults["lora_rank"],
        defaults["lora_alpha"],
    ) == (
        5e-6,
        32,
        64,
        128,
    )
