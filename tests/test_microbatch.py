"""Micro-batches: which rows stand together, and that how a step is divided changes nothing else."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_copsd import jsonl, make_setup, nudge, read_by_teacher
from test_copsd import train as train_copsd
from test_grpo import live_groups
from test_grpo import make_setup as make_grpo

import copsd
import methods
from copsd import advantages, roll_out
from parts.machine import Stopwatch
from parts.microbatch import PADDING, Limit, halve_until_it_fits, micro_batches
from parts.sampler import Rollout

LIMITS = [Limit(1), Limit(3), Limit(8), Limit(8, 1), Limit(8, 300), Limit(3, 500), Limit(8, 10**6)]


def rows_of(*lengths: tuple[int, int]) -> list[Rollout]:
    return [Rollout([5] * prompt, [7] * new, [0.0] * new, "length") for prompt, new in lengths]


def random_rows(count: int = 200) -> tuple[list[Rollout], list[list[int]]]:
    draw = random.Random(0)
    rollouts = rows_of(*[(draw.randint(50, 120), draw.randint(1, 300)) for _ in range(count)])
    teacher = [[5] * (len(rollout.prompt_ids) + draw.randint(50, 150)) for rollout in rollouts]
    return rollouts, teacher


def widths(rollouts, teacher, rows: list[int]) -> tuple[int, int]:
    return (
        max(len(rollouts[row].prompt_ids) + len(rollouts[row].completion_ids) for row in rows),
        max(len(teacher[row]) + len(rollouts[row].completion_ids) for row in rows),
    )


# Which rows stand together


@pytest.mark.parametrize("limit", [Limit(32), Limit(7, 1000), Limit(64, 4096), Limit(64, 100)])
def test_every_row_stands_once_within_the_limit_and_the_largest_come_first(limit):
    rollouts, teacher = random_rows()
    batches = micro_batches(rollouts, limit, teacher_prompts=teacher)
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    found = []
    for rows in batches:
        found.append(len(rows) * max(widths(rollouts, teacher, rows)))
        assert len(rows) <= limit.rows
        assert limit.tokens is None or found[-1] <= limit.tokens or len(rows) == 1
    assert found == sorted(found, reverse=True)
    if limit.tokens is None:
        longest = max(range(200), key=lambda row: widths(rollouts, teacher, [row]))
        assert batches[0][0] == longest


@pytest.mark.parametrize("tokens", [1000, 4096, 16384])
def test_under_a_budget_at_most_a_tenth_of_the_positions_are_pads(tokens):
    rollouts, teacher = random_rows()
    batches = micro_batches(rollouts, Limit(10**6, tokens), teacher_prompts=teacher)
    positions = sum(len(rows) * sum(widths(rollouts, teacher, rows)) for rows in batches)
    used = sum(sum(widths(rollouts, teacher, [row])) for row in range(200))
    assert 1 - used / positions <= PADDING == 0.1
    assert len(batches) < 200 / 2, "and yet rows do stand together"


def test_a_budget_counts_the_longer_of_the_two_roles():
    rollouts = rows_of((10, 10), (10, 10))
    teacher = [[5] * 40] * 2
    assert micro_batches(rollouts, Limit(2, 99), teacher_prompts=teacher) == [[0], [1]]
    assert micro_batches(rollouts, Limit(2, 100), teacher_prompts=teacher) == [[0, 1]]
    assert micro_batches(rollouts, Limit(2, 40)) == [[0, 1]], "no teacher, no teacher's row"


def test_only_the_rows_that_are_asked_for_are_divided():
    assert micro_batches(rows_of((5, 1), (5, 3), (5, 2), (5, 4)), Limit(2), [0, 3, 2]) == [
        [3, 2],
        [0],
    ]
    assert micro_batches([], Limit(2)) == []


# What they do not change


def whole_gradient(setup) -> torch.Tensor:
    tensors = [t.grad.flatten() for t in setup.lora.parameters() if t.grad is not None]
    for tensor in setup.lora.parameters():
        tensor.grad = None
    return torch.cat(tensors)


def assert_alike(found: list[torch.Tensor]) -> None:
    scale = found[0].abs().max().item()
    assert scale > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("given", [{}, {"teacher": "current", "reduction": "trajectory"}])
def test_copsds_gradient_and_log_do_not_depend_on_micro_batches_budget_or_chunk(tmp_path, given):
    setup, _ = make_setup(tmp_path, **given)
    nudge(setup)
    problems = setup.train[:8]
    rollouts = roll_out(setup, problems, seed=0)
    prompts = read_by_teacher(setup, problems)
    gradients, losses, means = [], [], []
    for limit in LIMITS:
        # A chunk of 7 rows of logits, or of all.
        chunk = 7 if limit.tokens else 256
        changed = replace(setup, config=replace(setup.config, chunk_tokens=chunk))
        tally = copsd.copsd_gradient(changed, rollouts, prompts, Stopwatch("cpu"), False, limit)
        gradients.append(whole_gradient(setup))
        losses.append(tally.loss)
        means.append(tally.row_means("kl_N"))
    assert_alike(gradients)
    assert losses == pytest.approx([losses[0]] * len(LIMITS), rel=1e-4)
    for found in means[1:]:
        assert found == pytest.approx(means[0], rel=1e-3)
    assert len({round(mean, 4) for mean in means[0].values()}) == 8, (
        "rows that differ are the point"
    )


@pytest.mark.parametrize("method", ["grpo", "egrsd", "ssopd"])
def test_grpos_gradient_and_old_log_probs_do_not_depend_on_micro_batches_or_budget(
    tmp_path, method
):
    credit = methods.egrsd_credit if method == "egrsd" else None
    term = methods.add_ssopd_term if method == "ssopd" else None
    setup, _ = make_grpo(tmp_path, method=method)
    nudge(setup)
    start = [tensor.detach().clone() for tensor in setup.lora.parameters()]
    groups = live_groups(setup)
    reward_BG = torch.tensor([group.rewards for group in groups])
    advantage_B = advantages(reward_BG, "group").flatten()
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    read = [setup.teacher_prompt(group.problem) for group in groups] if credit else []
    prompts = [prompt for prompt in read for _ in range(setup.config.group_size)]
    kept = [0, 1, 2, 3, 4, 6, 7]
    gradients, old = [], []
    for limit in LIMITS:
        logprobs: dict[int, torch.Tensor] = {}
        batch = copsd.GrpoBatch(groups, rollouts, advantage_B, kept, prompts, logprobs)
        given = (setup, batch, Stopwatch("cpu"), False, credit, term, limit)
        tally = copsd.grpo_gradient(*given)
        if method == "egrsd":  # its teacher reads what counts in the loss
            scored = [prompts[row] + rollouts[row].completion_ids for row in kept]
            assert tally.scored == sum(map(len, scored))
        first = whole_gradient(setup)
        for tensor in setup.lora.parameters():
            tensor.data.mul_(1.001)
        copsd.grpo_gradient(*given)  # the second inner epoch, with ratios that are not 1
        gradients.append(torch.cat([first, whole_gradient(setup)]))
        for tensor, before in zip(setup.lora.parameters(), start, strict=True):
            tensor.data.copy_(before)
        assert sorted(logprobs) == kept
        old.append(torch.cat([logprobs[row] for row in kept]))
    assert_alike(gradients)
    for other in old[1:]:
        torch.testing.assert_close(other, old[0], atol=1e-4, rtol=0)


def test_a_budget_moves_an_adapter_by_rounding_and_leaves_the_log_in_its_order(tmp_path):
    plain = train_copsd(tmp_path / "a", clip_mode="none")
    budget = train_copsd(tmp_path / "b", clip_mode="none", micro_batch=6, micro_tokens=400)
    rows, others = (jsonl(folder / "completions.jsonl") for folder in (plain, budget))
    for row, other in zip(rows, others, strict=True):
        assert row["completion"] == other["completion"]
        kl = "kl_nats_per_token"
        assert row[kl] == pytest.approx(other[kl], rel=1e-3, abs=1e-5)
    assert len({row["kl_nats_per_token"] for row in rows}) == len(rows)


# Out of memory


def test_out_of_memory_halves_rows_and_positions_until_it_fits(capsys):
    tried = []

    def attempt(limit):
        tried.append(limit)
        if limit.tokens > 300:
            raise torch.OutOfMemoryError("as if")
        return "done"

    assert halve_until_it_fits(attempt, Limit(8, 1000), lambda: None, 8) == ("done", Limit(2, 250))
    assert tried == [Limit(8, 1000), Limit(4, 500), Limit(2, 250)]
    assert "micro-batches of 2 rows and 250 tokens from here on" in capsys.readouterr().err


def test_an_apple_gpus_word_for_it_is_understood_and_other_errors_are_not():
    """It is a RuntimeError like any other, and ended the run with a traceback."""

    def attempt(said, limit):
        if limit.rows > 2:
            raise RuntimeError(said)

    fits = halve_until_it_fits(
        partial(attempt, "MPS backend out of memory"), Limit(8), lambda: None, 8
    )
    assert fits == (None, Limit(2))
    with pytest.raises(RuntimeError, match="a bug"):
        halve_until_it_fits(partial(attempt, "a bug"), Limit(8), lambda: None, 8)


def test_halving_begins_at_the_rows_that_there_are():
    """64, 32 and 16 rows of a step of 8 were the same attempt, thrice."""
    tried = []

    def attempt(limit):
        tried.append(limit.rows)
        if limit.rows > 4:
            raise torch.OutOfMemoryError("as if")

    assert halve_until_it_fits(attempt, Limit(64), lambda: None, 8) == (None, Limit(4))
    assert tried == [64, 4]
