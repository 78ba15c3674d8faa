"""Groups: the rollouts of one problem with their rewards, and what takes the place of a dead one.

test_grpo.py holds what GRPO makes of them.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_grpo import QUIET, jsonl, make_setup, nudge, step_gradient

import copsd
import show
from copsd import Group, roll_out, roll_out_groups
from parts import measure, steps
from parts.grading import is_correct
from parts.sampler import Rollout, SamplingParams
from parts.view import StepView


def test_a_group_from_one_prefill_is_the_rows_sampled_one_by_one(tmp_path):
    setup, _ = make_setup(
        tmp_path, top_k=1
    )  # no chance: a row's random stream depends on its place
    group = roll_out_groups(setup, setup.train[:1], seed=0)[0].rollouts
    rows = roll_out(setup, [setup.train[0]] * 4, seed=0)
    assert [r.completion_ids for r in group] == [r.completion_ids for r in rows]
    for one, other in zip(group, rows, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rewards_are_the_graders_verdicts_and_a_group_shares_its_prompt(tmp_path):
    setup, _ = make_setup(tmp_path)
    groups = roll_out_groups(setup, setup.train[:3], seed=0)
    for group, problem in zip(groups, setup.train, strict=False):
        assert len(group.rollouts) == 4 and len({tuple(r.prompt_ids) for r in group.rollouts}) == 1
        texts = [
            setup.tokenizer.decode(r.completion_ids, skip_special_tokens=True)
            for r in group.rollouts
        ]
        assert group.rewards == [
            float(is_correct(str(text), str(problem.answer))) for text in texts
        ]


def test_a_reward_counts_the_answer_after_the_token_that_ends_a_thought(tmp_path, monkeypatch):
    # Special tokens were stripped before the grader looked, </think> among them: rewards were 0.
    setup, _ = make_setup(tmp_path)
    tokenizer = copy.copy(setup.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = f"{setup.tokenizer.chat_template}<think>\n"
    setup = replace(setup, tokenizer=tokenizer)
    problem = setup.train[0]
    close, end = (tokenizer.get_vocab()[token] for token in ("</think>", "<|im_end|>"))
    wrong, right = (
        tokenizer.encode(f"\\boxed{{{answer}}}", add_special_tokens=False)
        for answer in ("-1", problem.answer)
    )
    spelled = [
        token
        for part in ("</thi", "nk>")
        for token in tokenizer.encode(part, add_special_tokens=False)
    ]
    completions = {
        (*wrong, close, *right, end): 1.0,
        (*right, close, *wrong, end): 0.0,
        (*wrong, *right, end): 0.0,  # the thought is not closed
        (*wrong, *spelled, *right, end): 0.0,  # nor is it by words that look like the token
    }
    rollouts = [Rollout([5], list(ids), [0.0] * len(ids), "stop") for ids in completions]
    monkeypatch.setattr(steps, "write_completions", lambda *_, **__: [rollouts])
    (group,) = roll_out_groups(setup, [problem], seed=0)
    assert group.rewards == list(completions.values())
    monkeypatch.setattr(measure, "sample", lambda *_, **__: [rollouts])
    (graded,) = measure.evaluate(setup.model, tokenizer, [problem], SamplingParams(9), samples=4)
    assert [float(attempt.correct) for attempt in graded.attempts] == group.rewards
    notes = [show._reward_note(setup, problem, rollout, "reward") for rollout in rollouts]
    assert [note.startswith("reward: 1") for note in notes] == [True, False, False, False]


def test_a_reward_that_cannot_be_graded_is_an_error_naming_the_problem(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [
        {"problem": f"p{i}", "answer": "" if i == 3 else "18", "language": "hau"} for i in range(5)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'3'.*None cannot be graded"):
        make_setup(tmp_path, data=str(data))
    assert not (tmp_path / "run").exists()


def test_problems_without_an_english_side_train_grpo_and_are_evaluated(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [
        json.loads(line)
        for line in Path("lab/problems/hau/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plain = [{"question": row["problem_translated"], "answer": row["answer"]} for row in rows[:12]]
    data.write_text("".join(json.dumps(row) + "\n" for row in plain), encoding="utf-8")
    setup, run = make_setup(tmp_path, data=str(data), eval_data=str(data), eval_problems=4)
    assert copsd.train_grpo(setup, run, StepView(QUIET, 2))
    measured = copsd.measure_once(setup, run, QUIET, "after")
    assert measured.keys() == {"hau"}
    assert math.isnan(measured["hau"]["KL to the teacher, nats/token"].value)
    with pytest.raises(ValueError, match="has no English problem and no English solution"):
        make_setup(tmp_path / "copsd", method="copsd", data=str(data))


def test_dead_groups_give_exactly_no_gradient(tmp_path):
    setup, _ = make_setup(tmp_path)
    nudge(setup)
    groups = roll_out_groups(setup, setup.train[:2], seed=0)
    for reward in (0.0, 1.0):
        dead = [Group(group.problem, group.rollouts, [reward] * 4) for group in groups]
        assert all(group.dead for group in dead)
        assert step_gradient(setup, dead, 3).abs().max() == 0


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_a_dead_group_is_not_replaced_by_a_problem_that_is_in_the_step(tmp_path, monkeypatch, rows):
    """With one problem in the data, it was drawn four times more; by chance, so was any other."""
    data = tmp_path / "data.jsonl"
    lines = Path("lab/problems/hau/train.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")
    given = {"resample_dead_groups": True, "data": str(data), "english_share": 0.5}
    setup, _ = make_setup(tmp_path, batch_size=4, **given)

    seeds = []

    def all_dead(setup, problems, *, seed):
        assert problems
        seeds.append(seed)
        return [Group(problem, [], [0.0]) for problem in problems]

    monkeypatch.setattr(copsd, "roll_out_groups", all_dead)
    for step in range(1, 9):
        first = all_dead(setup, steps.draw_problems(setup, 1, step=step), seed=0)
        drawn = copsd.replace_dead(setup, first, step=step, seed=0)
        ids = [group.problem.id for group in drawn]
        assert len(ids) == len(set(ids)) == min(rows, 1 + copsd.MAX_DRAWS)
    last = steps.rollout_seed(setup.config, 10**6)
    assert all(seed == 0 or seed > last for seed in seeds), "a stream is another step's"


def test_other_problems_replace_dead_groups_and_their_tokens_are_counted(tmp_path, monkeypatch):
    setup, run = make_setup(tmp_path, resample_dead_groups=True, steps=1)
    asked: list[list[str]] = []
    real = copsd.roll_out_groups

    def first_groups_dead(setup, problems, *, seed):
        asked.append([problem.id for problem in problems])
        rewards = [1.0] * 4 if len(asked) == 1 else [1.0, 0.0, 1.0, 0.0]
        return [
            Group(group.problem, group.rollouts, rewards)
            for group in real(setup, problems, seed=seed)
        ]

    monkeypatch.setattr(copsd, "roll_out_groups", first_groups_dead)
    copsd.train_grpo(setup, run, StepView(QUIET, 1))
    assert len(asked) == 2 and len(asked[1]) == 2 and not set(asked[0]) & set(asked[1])
    metrics = jsonl(run.folder / "metrics.jsonl")[0]
    assert metrics["reward/dead_group_frac"] == 0.5 and metrics["update/grad_norm"] > 0
    assert metrics["rollout/tokens"] > 8 * metrics["rollout/completion_tokens_mean"]
    assert {row["problem_id"] for row in jsonl(run.folder / "completions.jsonl")} <= set(asked[1])
