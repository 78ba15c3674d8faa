"""parts/arms.py: which runs an experiment has, and what those before them decide of each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_plan import small_plan

from parts.arms import Arm, pick_rate, stages_of, sweep_accuracies, sweep_folder, untrained_accuracy
from parts.experiments import ATTRIBUTION, GRPO
from parts.plan import Plan


def measured(right: list[float], tokens: list[float] | None = None) -> dict[str, Any]:
    """Return results with so many right greedy answers and sampled lengths."""
    ones = [1.0] * len(right)
    found = {"greedy": {"pass@1": (right, ones)}}
    if tokens:
        found["sampled"] = {"mean tokens": (tokens, ones)}
    return {"final": found}


def walk(plan: Plan, accuracies: dict[str, float]) -> list[Arm]:
    """Return the arms of a plan, whose sweep's runs get these accuracies by their folder's name."""
    found: dict[Path, Any] = {}
    arms = []
    for stage in stages_of(plan, found):
        arms += stage
        for arm in stage:
            accuracy = accuracies.get(arm.folder.name, 0.0)
            found[arm.folder] = measured([accuracy, accuracy], [10.0, 20.0])
    return arms


def test_arms_are_the_base_the_sweep_and_the_methods_of_every_seed(tmp_path):
    plan = small_plan(tmp_path, lang="ha,sw")
    arms = walk(plan, {"grpo-0.001": 0.5, "copsd-0.0005": 0.75})
    names = [str(arm.folder.relative_to(plan.out)) for arm in arms]
    seeds = [f"{method}-{seed}" for method in ("grpo", "copsd") for seed in (0, 4)]
    sweep = [f"{method}-{rate}" for method in ("grpo", "copsd") for rate in ("0.0005", "0.001")]
    sweep = ["base-0", *sweep]
    sweeps = [f"{lang}/sweep/{name}" for lang in ("hau", "swa") for name in sweep]
    later = [f"{lang}/{name}" for lang in ("hau", "swa") for name in seeds]
    assert names == ["hau/base", "swa/base", *sweeps, *later]
    assert [arm.folder.name for arm in arms if not arm.is_trained] == [
        *2 * ["base"],
        *2 * ["base-0"],
    ]
    assert [arm.folder.name for arm in arms if arm.is_sweep] == 2 * sweep
    assert sum(arm.size for arm in arms) == pytest.approx(4 * 0.1 + 8 * 0.5 + 8)
    by_name = dict(zip(names, arms, strict=True))
    # All languages take one rate.
    for lang in ("hau", "swa"):
        assert by_name[f"{lang}/grpo-4"].settings["lr"] == 0.001
        assert by_name[f"{lang}/copsd-4"].settings["lr"] == 0.0005
        settings = by_name[f"{lang}/copsd-4"].settings
        assert (settings["method"], settings["lang"], settings["seed"]) == ("copsd", lang, 4)
        assert settings["data"] == str(plan.out / lang / "train.jsonl")
        assert settings["eval_data"] == str(plan.out / lang / "test.jsonl")
        swept = by_name[f"{lang}/sweep/grpo-0.001"].settings
        assert swept["lang"] == lang and swept["eval_data"] == str(plan.out / lang / "dev.jsonl")


def test_without_a_budget_it_is_what_copsds_steps_sample_at_the_bases_length(tmp_path):
    plan = small_plan(tmp_path)
    arms = {arm.folder.name: arm for arm in walk(plan, {})}
    whole = 12 * 8 * 15  # steps, completions, their mean length: of 10 and 20
    assert arms["copsd-0"].settings["token_budget"] == whole
    assert arms["grpo-4"].settings["token_budget"] == whole
    assert arms["copsd-0.001"].settings["token_budget"] == whole // 2
    assert arms["copsd-0"].settings["save_every"] == 2  # six checkpoints of twelve steps
    assert "token_budget" not in arms["base"].settings
    given = replace(
        plan, configs={k: replace(c, token_budget=900) for k, c in plan.configs.items()}
    )
    assert {a.settings.get("token_budget") for a in walk(given, {})} == {None, 450, 900}


def test_the_sweep_picks_the_best_rate_and_the_lowest_of_equals(tmp_path):
    plan = replace(small_plan(tmp_path, lr=0.1), factors=[8.0, 4.0, 2.0, 1.0])
    right = {0.1: 1.0, 0.2: 3.0, 0.4: 3.0, 0.8: 2.0}
    found = {}
    for rate, count in right.items():
        some = [1.0] * int(count) + [0.0] * (4 - int(count))
        found[sweep_folder(plan, "hau", "grpo", rate)] = measured(some)
    assert pick_rate(plan, GRPO, found) == 0.2
    accuracies = sweep_accuracies(plan, GRPO, found)
    assert accuracies == {0.8: 0.5, 0.4: 0.75, 0.2: 0.75, 0.1: 0.25}


def test_the_sweep_measures_the_base_on_the_problems_that_rates_are_picked_on(tmp_path):
    plan = small_plan(tmp_path, lang="ha,sw")
    found = {
        sweep_folder(plan, lang, "base", 0): measured([1.0] * right + [0.0] * (4 - right))
        for lang, right in (("hau", 1), ("swa", 2))
    }
    assert untrained_accuracy(plan, found) == 0.375
    bases = [arm for arm in walk(plan, {}) if arm.is_sweep and not arm.is_trained]
    assert [arm.settings["lang"] for arm in bases] == ["hau", "swa"]
    for arm in bases:
        assert arm.settings["eval_data"] == str(plan.out / arm.settings["lang"] / "dev.jsonl")
        assert arm.settings["eval_problems"] == plan.options.dev_problems


def test_the_sweep_picks_what_is_best_over_all_languages(tmp_path):
    plan = replace(small_plan(tmp_path, lang="ha,sw", lr=0.1), factors=[1.0, 2.0])
    found = {}
    for lang, rate, right in (("hau", 0.1, 4), ("hau", 0.2, 3), ("swa", 0.1, 1), ("swa", 0.2, 3)):
        some = [1.0] * right + [0.0] * (4 - right)
        found[sweep_folder(plan, lang, "grpo", rate)] = measured(some)
    assert sweep_accuracies(plan, GRPO, found) == {0.1: 0.625, 0.2: 0.75}
    assert pick_rate(plan, GRPO, found) == 0.2


def test_an_ablations_arms_are_one_method_at_its_recipes_rate(tmp_path):
    plan = small_plan(tmp_path, ablate=True, sweep=None, group_size=None)
    arms = walk(plan, {})
    assert not any(arm.is_sweep for arm in arms) and len(arms) == 1 + 10 * 2
    trained = [arm for arm in arms if arm.is_trained]
    assert not any("lr" in arm.settings for arm in trained)
    changed = {arm.name: arm.settings for arm in trained if arm.settings["seed"] == 4}
    assert changed["teacher=ema"]["teacher"] == "ema" and "teacher" not in changed["recipe"]


def attributed(tmp_path: Path, seconds: dict[str, float]) -> list[Arm]:
    """Return an attribution's arms, which trained for these seconds by their folder's name."""
    plan = small_plan(tmp_path, attribute=True, group_size=None)
    found: dict[Path, Any] = {}
    arms = []
    for stage in stages_of(plan, found):
        arms += stage
        for arm in stage:
            results = measured([1.0, 0.0], [10.0, 20.0])
            results["final"]["train_s"] = seconds.get(arm.folder.name, 100.0)
            found[arm.folder] = results
    return arms


def test_an_attributions_arms_share_a_method_a_sweep_and_a_budget(tmp_path):
    arms = attributed(tmp_path, {})
    trained = {arm.folder.name: arm for arm in arms if arm.is_trained and not arm.is_sweep}
    names = [variant.name for variant in ATTRIBUTION.variants if variant.is_trained]
    assert list(trained) == [f"{name}-{seed}" for name in names for seed in (0, 4)]
    assert len({arm.settings["token_budget"] for arm in trained.values()}) == 1
    sweeps = [arm for arm in arms if arm.is_sweep]
    assert [arm.folder.name for arm in sweeps if not arm.is_trained] == ["base-0"]
    for name in names:
        rates = [arm.settings["lr"] for arm in sweeps if arm.name == name]
        assert rates == [0.0005, 0.001]
    assert trained["reference-4"].settings["completion"] == "reference"
    assert trained["format-0"].settings["swap_solutions"] is True
    (ceiling,) = [arm for arm in arms if arm.in_english]
    assert ceiling.folder.name == "translated" and not ceiling.is_trained


def test_an_arm_that_trains_quicker_than_copsd_runs_again_as_long_and_one_as_quick_does_not(
    tmp_path,
):
    quick = {"reference-0": 20.0, "reference-4": 30.0, "off-policy-0": 108.0}
    arms = {arm.folder.name: arm for arm in attributed(tmp_path, quick)}
    extra = [name for name, arm in arms.items() if arm.is_extra]
    assert extra == ["reference-seconds-0", "reference-seconds-4"]
    first = arms["reference-0"].settings
    again = arms["reference-seconds-0"].settings
    assert again["token_budget"] == 4 * first["token_budget"]  # 100 seconds instead of 25
    differ = {name for name in first if first[name] != again[name]}
    assert differ == {"token_budget", "save_every"}
