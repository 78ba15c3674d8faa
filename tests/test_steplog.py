"""parts/steplog.py: the numbers that a step leaves, by hand."""

import math

import pytest
import torch

from parts.lossscale import LossScale
from parts.machine import Stopwatch
from parts.prompts import Problem
from parts.sampler import Rollout
from parts.steplog import (
    CLIP_PRODUCTS,
    Tally,
    completion_rows,
    copsd_metrics,
    count_tokens,
    grpo_metrics,
    merge,
    update_metrics,
    work_metrics,
)


def rollout(prompt: int, completion: int, finish_reason: str = "stop") -> Rollout:
    """Return a rollout of so many tokens, its prompt's ids below 100 and its own from there on."""
    return Rollout(
        prompt_ids=list(range(prompt)),
        completion_ids=list(range(100, 100 + completion)),
        logprobs=[0.0] * completion,
        finish_reason=finish_reason,
    )


def tallied(*micro_batches: dict[str, list[float]], lengths: list[list[int]]) -> Tally:
    tally = Tally()
    first = 0
    for stats, some in zip(micro_batches, lengths, strict=True):
        rows = list(range(first, first + len(some)))
        first += len(some)
        tensors = {name: torch.tensor(values) for name, values in stats.items()}
        tally.add(torch.tensor(0.25), tensors, rows, some)
    return tally


def test_a_tally_adds_losses_and_means_over_tokens_not_over_micro_batches():
    tally = tallied({"kl_N": [1.0, 3.0, 8.0]}, {"kl_N": [4.0]}, lengths=[[2, 1], [1]])
    assert tally.loss == 0.5
    assert tally.row_means("kl_N") == {0: 2.0, 1: 8.0, 2: 4.0}
    uneven = tallied({"kl_N": [1.0, 1.0, 1.0]}, {"kl_N": [5.0]}, lengths=[[3], [1]])
    assert uneven.mean("kl_N") == 2.0  # the mean of the micro-batches' means would be 3.0
    assert tally.mean("entropy_N") is None


def test_row_means_are_of_the_rows_that_were_named_in_whatever_order():
    tally = Tally()
    tally.add(torch.tensor(1.0), {"kl_N": torch.tensor([1.0, 2.0, 4.0])}, [3, 0], [1, 2])
    tally.add(torch.tensor(1.0), {"kl_N": torch.tensor([7.0])}, [1], [1])
    assert tally.row_means("kl_N") == {3: 1.0, 0: 3.0, 1: 7.0}


def test_booleans_and_half_precision_are_counted_as_numbers():
    tally = Tally()
    clipped_N = torch.tensor([True, False, False, True])
    half_N = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.bfloat16)
    tally.add(torch.tensor(0.0), {"clipped_N": clipped_N, "kl_N": half_N}, [0], [4])
    assert tally.mean("clipped_N") == 0.5 and tally.mean("kl_N") == 2.0


def test_tokens_are_those_of_completions_with_or_without_prompts():
    rollouts = [rollout(5, 2), rollout(7, 3)]
    assert count_tokens(rollouts) == 5
    assert count_tokens(rollouts, prompts=True) == 17
    assert count_tokens([]) == 0


def test_copsds_metrics_are_the_tallys_means_by_their_names():
    stats = {
        "kl_N": [0.5, 1.5],
        "clipped_N": [1.0, 0.0],
        "teacher_entropy_N": [2.0, 4.0],
        "student_entropy_N": [1.0, 2.0],
    }
    assert copsd_metrics(tallied(stats, lengths=[[2]])) == {
        "loss/objective_nats_per_token": 0.25,
        "loss/kl_nats_per_token": 1.0,
        "loss/clipped_token_frac": 0.5,
        "loss/clip_gradient_cosine": None,  # not asked for at this step
        "loss/teacher_entropy_nats_per_token": 3.0,
        "loss/student_entropy_nats_per_token": 1.5,
    }


def test_gradients_that_are_0_have_no_cosine():
    """It was nan, which a tracker would have drawn."""
    tally = Tally()
    tally.add(torch.tensor(0.0), {name: torch.zeros(3) for name in CLIP_PRODUCTS}, [0], [3])
    assert tally.clip_cosine() is None
    values = torch.tensor([[1.0], [4.0], [1.0]])
    products: dict[str, torch.Tensor] = dict(zip(CLIP_PRODUCTS, values, strict=True))
    tally.add(torch.tensor(0.0), products, [1], [1])
    assert tally.clip_cosine() == 0.5


def test_another_term_is_logged_beside_grpo_under_names_of_its_own():
    """SSOPD's divergence and GRPO's KL to the initial model would else be one mean."""
    tally = Tally()
    tally.add(torch.tensor(1.0), {"kl_N": torch.tensor([4.0]), "ratio_N": torch.ones(1)}, [0], [1])
    term = Tally()
    products = zip(CLIP_PRODUCTS, torch.tensor([[1.0], [4.0], [1.0]]), strict=True)
    of_term = {"kl_N": torch.tensor([1.0, 2.0]), "clipped_N": torch.tensor([1.0, 0.0])}
    term.add(torch.tensor(0.5), of_term | dict(products), [3], [2])
    tally.join(term, "witness_")
    tally.note("witness/skipped_group_frac", 1, 4)
    logged = grpo_metrics(tally, [[1.0, 0.0]], 1)
    assert logged["loss/objective"] == 1.5 and tally.rows == [(0, 1)]
    assert logged["loss/kl_nats_per_token"] == 4.0
    assert logged["witness/kl_nats_per_token"] == 1.5
    assert logged["loss/clipped_token_frac"] == 0.5
    assert logged["loss/clip_gradient_cosine"] == 0.5


def test_grpos_metrics_count_rewards_of_all_groups_and_ratios_of_all_tokens():
    stats = {
        "ratio_N": [0.5, 1.0, 1.5, 2.0],
        "entropy_N": [1.0, 1.0, 1.0, 3.0],
        "clipped_low_N": [1.0, 0.0, 0.0, 0.0],
        "clipped_high_N": [0.0, 0.0, 1.0, 1.0],
    }
    rewards = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]  # two of three groups are dead
    found = grpo_metrics(tallied(stats, lengths=[[4]]), rewards, inner_epochs=2)
    assert found == {
        "loss/objective": 0.125,
        "loss/kl_nats_per_token": None,
        "loss/student_entropy_nats_per_token": 1.5,
        "reward/mean": 0.5,
        "reward/dead_group_frac": pytest.approx(2 / 3),
        "ratio/mean": 1.25,
        "ratio/min": 0.5,
        "ratio/max": 2.0,
        "ratio/clipped_low_frac": 0.25,
        "ratio/clipped_high_frac": 0.5,
    }


def test_a_step_whose_rows_are_all_masked_out_has_rewards_and_no_ratio():
    found = grpo_metrics(Tally(), [[0.0, 1.0]], inner_epochs=1)
    assert found["loss/objective"] == 0.0 and found["reward/mean"] == 0.5
    for name in ("ratio/mean", "ratio/min", "ratio/max"):
        assert math.isnan(float(str(found[name])))
    assert found["ratio/clipped_low_frac"] is None
    assert found["loss/student_entropy_nats_per_token"] is None


def test_what_the_update_did():
    assert update_metrics(3.5, 0.01, 2, LossScale()) == {
        "update/grad_norm": 3.5,
        "update/lr": 0.01,
        "update/skipped_in_a_row": 2,
    }


def test_work_is_in_tokens_and_seconds_and_cut_is_by_the_length_limit():
    watch = Stopwatch("cpu", seconds={"rollout": 1.0, "score": 0.5, "update": 2.0})
    rollouts = [rollout(5, 2), rollout(5, 4, "length"), rollout(5, 3), rollout(5, 3, "length")]
    found = work_metrics(rollouts, watch, sampled=12, scored=50, updated=32)
    peak = found.pop("memory/peak_gib")
    assert found == {
        "rollout/tokens": 12,
        "score/tokens": 50,
        "update/tokens": 32,
        "rollout/completion_tokens_mean": 3.0,
        "rollout/cut_frac": 0.5,
        "rollout/time_s": 1.0,
        "score/time_s": 0.5,
        "update/time_s": 2.0,
        "time_s": 3.5,
    }
    assert peak is not None and 0 < peak < 1000


@pytest.mark.parametrize(
    ("count", "kept"),
    [
        *[(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (64, [0, 16, 32, 48])],
        *[(7, [0, 1, 3, 5]), (11, [0, 2, 5, 8])],  # the first half of them was shown
    ],
)
def test_logged_rollouts_are_whole_and_spread_over_the_step(count, kept):
    problems = [Problem(f"p{i}", "?", None, None, str(i), "hau") for i in range(count)]
    rollouts = [rollout(1, 1 + row) for row in range(count)]
    scores = {"reward": [float(row) for row in range(count)], "kl": dict(enumerate(range(count)))}
    rows = completion_rows(7, problems, rollouts, scores, lambda ids: f"{len(ids)} ids")
    assert [row["problem_id"] for row in rows] == [f"p{i}" for i in kept]
    last = kept[-1]
    assert rows[-1] == {
        "step": 7,
        "problem_id": f"p{last}",
        "prompt": "1 ids",
        "completion": f"{1 + last} ids",
        "answer": str(last),
        "finish_reason": "stop",
        "tokens": 1 + last,
        "reward": float(last),
        "kl": last,
    }


def test_what_ranks_or_updates_leave_is_joined_and_notes_are_means_over_what_is_counted():
    first = tallied({"kl_N": [1.0, 3.0]}, lengths=[[2]])
    second = tallied({"kl_N": [5.0]}, lengths=[[1]])
    empty = Tally()
    for tally, total, count in ((first, 1.0, 4), (second, 2.0, 2), (empty, 0.0, 0)):
        tally.note("witness/skipped_group_frac", total, count)
        tally.scored = tally.updated = count
    whole = merge([first, second, empty])
    assert whole.loss == 0.5 and whole.mean("kl_N") == 3.0
    assert whole.notes == {"witness/skipped_group_frac": (3.0, 6.0)}
    assert (whole.scored, whole.updated) == (6, 6) and first.scored == 4
    logged = grpo_metrics(whole, [[1.0, 0.0]], 1)
    assert logged["witness/skipped_group_frac"] == 0.5
    empty.note("witness/kl_nats_per_token", 0.0, 0)
    assert grpo_metrics(empty, [[1.0, 0.0]], 1)["witness/kl_nats_per_token"] is None
