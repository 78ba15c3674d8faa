"""parts/plan.py: what is asked for becomes an experiment, whose problems are divided once."""

from pathlib import Path
from typing import Any

import pytest

from parts import plan as plans
from parts.data import load_problems
from parts.plan import ablation_arms, parse_seeds
from parts.recipe import Config


def small_plan(tmp_path: Path, **given: Any) -> plans.Plan:
    """Return the plan of a small experiment, whose folder is made and in which nothing ran.

    given  a setting that is None is not typed, as one that the experiment has no use for
    """
    small = {
        "lang": "ha",
        "seeds": "0,4",
        "sweep": "0.5,1",
        "batch_size": 8,
        "group_size": 4,
        "max_new_tokens": 40,
        "eval_problems": 6,
        "dev_problems": 5,
        "steps": 12,
        "out": str(tmp_path / "out"),
    }
    typed = {name: value for name, value in {**small, **given}.items() if value is not None}
    return plans.make_plan(typed)


def test_seeds_are_a_count_or_a_list():
    assert parse_seeds("3") == [0, 1, 2] and parse_seeds("0,4,7") == [0, 4, 7]
    for text in ("0", "1,1", "x", "-1", "1000,2"):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(text)


def test_ablations_change_one_setting_at_a_time():
    variants = ablation_arms(Config(clip_mode="none"))
    arms = {variant.name: variant.settings for variant in variants}
    assert all(variant.title == variant.name for variant in variants)
    assert arms["recipe"] == {}
    assert all(len(settings) == 1 for name, settings in arms.items() if name != "recipe")
    assert "clip mode=none" not in arms and arms["clip mode=entry"] == {"clip_mode": "entry"}
    assert {"swap_solutions": True} in arms.values() and {"english_problem": False} in arms.values()
    assert len(arms) == 10


def test_an_ablation_has_no_arm_whose_setting_does_nothing():
    names = {variant.name for variant in ablation_arms(Config(teacher_reads="brief"))}
    assert names == {
        "recipe",
        *("clip mode=none", "clip mode=token"),
        *("divergence=reverse kl", "divergence=jsd"),
        *("teacher=current", "teacher=ema"),
    }


@pytest.mark.parametrize(
    ("flags", "steps", "factors"),
    [
        ({}, 100, [0.03, 0.1, 0.3, 1, 3, 9, 27]),
        ({"family": True}, 30, [0.1, 0.3, 1, 3, 9]),
        ({"attribute": True}, 30, [0.3, 1, 3, 9, 27]),
        ({"attribute": True, "steps": 7, "sweep": "2"}, 7, [2]),
    ],
)
def test_an_experiment_of_many_arms_has_a_smaller_budget_unless_said(
    tmp_path, flags, steps, factors
):
    rows = Path("lab/problems/hau/train.jsonl").read_text(encoding="utf-8").splitlines()
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join(rows[:40]) + "\n", encoding="utf-8")
    few = {"data": str(data), "eval_problems": 4, "dev_problems": 4}
    plan = plans.make_plan({**flags, **few, "out": str(tmp_path / "out")})
    assert (plan.main.steps, plan.factors) == (steps, factors)


def test_the_splits_that_are_written_are_kept_as_they_are(tmp_path):
    plan = small_plan(tmp_path)
    files = sorted((plan.out / "hau").glob("*.jsonl"))
    assert [file.name for file in files] == ["dev.jsonl", "test.jsonl", "train.jsonl"]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert plans.read_splits(plan, "hau") == {}
    small_plan(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    # A split comes back with every field that training and measuring read.
    source = {p.id: p for p in load_problems(Path("lab/problems/hau/train.jsonl"), language="hau")}
    dev = load_problems(plan.out / "hau" / "dev.jsonl", language="hau")
    assert dev == [source[problem.id] for problem in dev]


def test_no_development_problem_of_a_language_is_a_reported_one(tmp_path):
    few = Path("lab/problems/hau/train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    data = tmp_path / "few.jsonl"
    data.write_text("\n".join(few) + "\n", encoding="utf-8")
    both = {"data": str(data), "eval_data": str(data), "eval_problems": 6, "dev_problems": 3}
    plan = plans.make_plan({**both, "lang": "hau", "out": str(tmp_path / "out")})
    files = (plan.out / "hau" / f"{name}.jsonl" for name in ("train", "dev", "test"))
    train, dev, test = ({row.id for row in load_problems(file, language="hau")} for file in files)
    assert (len(train), len(dev), len(test)) == (3, 3, 6)
    assert len(train | dev | test) == 12


@pytest.mark.parametrize("content", [b"\xff", b"<!-- begin comparison: written by compare.py -->"])
def test_a_damaged_file_of_results_is_found_before_the_arms_run(tmp_path, content):
    plan = small_plan(tmp_path)
    (plan.out / "RESULTS.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"RESULTS\.md .*; remove it to have it made again"):
        small_plan(tmp_path)


def test_splits_that_nothing_vouches_for_are_vouched_for_by_the_next_call(tmp_path):
    plan = small_plan(tmp_path)
    vouched = (plan.out / "digests.json").read_bytes()
    (plan.out / "digests.json").unlink()  # as after a kill between the last split and its digest
    small_plan(tmp_path)
    assert (plan.out / "digests.json").read_bytes() == vouched
    test = plan.out / "hau" / "test.jsonl"
    test.write_text(test.read_text(encoding="utf-8").replace("0", "1"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"test\.jsonl is damaged: .*; remove it to go on"):
        small_plan(tmp_path)
