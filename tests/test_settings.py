"""parts/settings.py: what is typed goes before recipe, method and default; all is checked."""

import json
import math
import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from parts.recipe import METHODS, CompareConfig, Config, EvalConfig
from parts.settings import (
    as_trained,
    check_run,
    check_settings,
    doubts_of,
    fill,
    range_text,
    read_recipe,
    settle,
)

NUMBERS = [
    f.name for f in fields(Config) if isinstance(f.default, int | float) and f.type is not bool
]


def write_recipe(folder: Path, **entries: Any) -> Path:
    (folder / "recipe.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "valid", "others"),
    [
        ("steps", [1, 10**6], [0, -1]),
        ("token_budget", [1, None], [0, -5]),
        ("beta", [1e-9, 0.5, 0.999], [0.0, 1.0, -0.5, 2.0]),
        ("clip", [1e-9, 100.0], [0.0, -0.05]),
        ("ema_decay", [0.0, 1.0], [-0.01, 1.01]),
        ("group_size", [2, 64], [1, 0]),
        ("inner_epochs", [1], [0]),
        ("clip_low", [0.0, 1.0], [-0.1, 1.1]),
        ("clip_high", [0.0, 5.0], [-0.1]),
        ("kl_coef", [0.0, 2.0], [-0.1]),
        ("batch_size", [1], [0]),
        ("english_share", [0.0, 1.0], [-0.1, 1.1]),
        ("temperature", [1e-6, 2.0], [0.0, -1.0]),
        ("top_p", [1e-9, 1.0], [0.0, 1.1]),
        ("top_k", [0, 50], [-1]),
        ("max_new_tokens", [1, 10**8], [0, 10**8 + 1]),
        ("lr", [0.0, 1.0], [-1e-9]),
        ("weight_decay", [0.0], [-0.1]),
        ("max_grad_norm", [1e-9, 10.0], [0.0, -1.0]),
        ("lora_rank", [1], [0]),
        ("lora_alpha", [0.5], [0.0, -1.0]),
        ("micro_batch", [1], [0]),
        ("chunk_tokens", [1, None], [0]),
        ("sample_rows", [1], [0]),
        ("save_every", [1], [0]),
        ("eval_problems", [0], [-1]),
        ("eval_samples", [1], [0]),
        ("eval_temperature", [0.0], [-0.1]),
        ("eval_top_p", [1e-9, 1.0], [0.0, 1.1]),
        ("seed", [0, -3, 10**9], [10**9 + 1, -(10**9) - 1]),
    ],
)
def test_a_setting_is_held_to_its_range_and_the_error_says_what_is_valid(name, valid, others):
    for value in valid:
        check_settings(replace(Config(), **{name: value}))
    (f,) = (f for f in fields(Config) if f.name == name)
    for value in others:
        with pytest.raises(ValueError) as error:
            check_settings(replace(Config(), **{name: value}))
        flag = "--" + name.replace("_", "-")
        assert str(error.value) == f"{flag} is {value}; valid: {range_text(f)}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_valid_that_is_not_finite(name, value):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is {value}; valid: .+$"):
        check_settings(replace(Config(), **{name: value}))


def test_evaluations_and_comparisons_are_held_to_theirs():
    for config, said in (
        (EvalConfig(limit=0), "--limit is 0; valid: 1 or more"),
        (EvalConfig(temperature=math.nan), "--temperature is nan; valid: 0 or more"),
        (EvalConfig(top_p=0.0), "--top-p is 0.0; valid: above 0, up to 1"),
        (EvalConfig(thinking="maybe"), "unknown thinking 'maybe'; valid: auto, on, off"),
        (CompareConfig(dev_problems=0), "--dev-problems is 0; valid: 1 or more"),
        (CompareConfig(lr=math.inf), "--lr is inf; valid: 0 or more"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            check_settings(config)
    check_settings(EvalConfig())
    check_settings(CompareConfig())


def test_a_range_reads_as_words():
    found = {f.name: range_text(f) for f in fields(Config)}
    assert found["lr"] == "0 or more"
    assert found["top_p"] == "above 0, up to 1"
    assert found["beta"] == "above 0, below 1"
    assert found["clip_low"] == "0 or more, up to 1"
    assert found["seed"] == "-1000000000 or more, up to 1000000000"
    assert found["model"] == ""


@pytest.mark.parametrize("f", [f for f in fields(Config) if f.metadata["choices"]])
def test_an_unknown_word_is_an_error_that_lists_the_valid_ones(f):
    for word in f.metadata["choices"]:
        check_settings(replace(Config(), **{f.name: word}))
    valid = ", ".join(f.metadata["choices"])
    said = f"unknown {f.name.replace('_', ' ')} 'other'; valid: {valid}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_settings(replace(Config(), **{f.name: "other"}))


def test_typed_flags_go_before_the_recipe_before_the_method_before_the_default(tmp_path):
    default = fill({}, tmp_path)
    assert default == Config() and default.temperature == 1.1
    by_method = fill({"method": "grpo"}, tmp_path)
    assert (by_method.temperature, by_method.top_k, by_method.steps) == (1.2, 0, 500)
    assert by_method.lr == Config.lr  # where the method has no value of its own
    write_recipe(tmp_path, temperature={"value": 0.7, "why": "so"})
    for method in METHODS:
        assert fill({"method": method}, tmp_path).temperature == 0.7
    assert fill({"method": "grpo", "temperature": 0.5}, tmp_path).temperature == 0.5
    # A flag that was typed counts though it is the default.
    assert fill({"temperature": 1.1}, tmp_path).temperature == 1.1


def test_a_recipe_may_have_another_value_for_a_method(tmp_path):
    write_recipe(tmp_path, lr={"value": 0.1, "grpo": 0.2, "why": "so"})
    assert read_recipe(tmp_path)["lr"] == read_recipe(tmp_path, "copsd")["lr"] == 0.1
    assert read_recipe(tmp_path, "grpo")["lr"] == 0.2
    assert fill({"method": "grpo"}, tmp_path).lr == 0.2


def test_a_recipe_gives_values_and_paths_beside_the_model(tmp_path):
    assert read_recipe(tmp_path) == {}
    (tmp_path / "model").mkdir()
    write_recipe(
        tmp_path / "model",
        lr={"value": 0.5, "why": "so"},
        data={"value": "../problems/{lang}.jsonl", "why": "here"},
    )
    assert read_recipe(tmp_path / "model") == {
        "lr": 0.5,
        "data": str(tmp_path / "problems" / "{lang}.jsonl"),
    }


def test_a_recipe_of_unknown_settings_is_an_error_that_names_them(tmp_path):
    write_recipe(tmp_path, lr={"value": 0.1}, speed={"value": 9}, colour={"value": "red"})
    with pytest.raises(ValueError, match=r"recipe\.json has unknown settings: colour, speed$"):
        fill({}, tmp_path)


def test_an_entry_has_no_part_that_nobody_reads(tmp_path):
    """A mistyped method's value was left out in silence."""
    write_recipe(tmp_path, lr={"value": 0.001, "grop": 0.5})
    said = r"recipe\.json: lr has an unknown 'grop'; valid: value, why, copsd, grpo, opsdc, ophsd,"
    with pytest.raises(ValueError, match=said):
        read_recipe(tmp_path)


@pytest.mark.parametrize("name", ["method", "model", "out"])
def test_what_a_recipe_cannot_give_is_refused(tmp_path, name):
    """A method from a recipe was trained with COPSD's defaults."""
    write_recipe(tmp_path, **{name: {"value": "grpo"}})
    with pytest.raises(ValueError, match=rf"recipe\.json: {name} can only be typed: a "):
        fill({}, tmp_path)


def make_link(path: Path) -> None:
    path.symlink_to("nowhere.json")


@pytest.mark.parametrize("make", [Path.mkdir, make_link, os.mkfifo])
def test_a_recipe_that_is_no_file_is_no_missing_recipe(tmp_path, make):
    """A folder, a link to nothing and a pipe were ignored, and the defaults taken."""
    make(tmp_path / "recipe.json")
    with pytest.raises(ValueError, match=r"recipe\.json is no file that can be read; remove it"):
        read_recipe(tmp_path)


def test_the_recipes_benchmark_belongs_to_the_recipes_data(tmp_path):
    write_recipe(tmp_path, data={"value": "train.jsonl"}, eval_data={"value": "test.jsonl"})
    found = fill({}, tmp_path)
    assert found.eval_data == str(tmp_path / "test.jsonl")
    own = fill({"data": "mine.jsonl"}, tmp_path)
    assert (own.data, own.eval_data) == ("mine.jsonl", None)
    both = fill({"data": "mine.jsonl", "eval_data": "other.jsonl"}, tmp_path)
    assert both.eval_data == "other.jsonl"


def test_language_files_and_folder_are_named_in_full():
    given = Config(lang="HA", model="some/Model-1B", data="d/{lang}.jsonl", seed=7)
    found = settle(given)
    assert (found.lang, found.data, found.eval_data) == ("hau", "d/hau.jsonl", None)
    assert found.out == "runs/copsd-Model-1B-hau-7"
    assert settle(replace(given, out="mine")).out == "mine"
    with pytest.raises(ValueError, match="unknown language 'xx'"):
        settle(replace(given, lang="xx"))
    with pytest.raises(ValueError, match="--lr is -1"):
        settle(replace(given, lr=-1.0))


def test_two_settings_that_belong_together_are_checked_together():
    grpo = Config(method="grpo", batch_size=12, group_size=8)
    with pytest.raises(ValueError, match="--batch-size is 12; valid: a multiple of --group-size 8"):
        check_run(grpo)
    check_run(replace(grpo, batch_size=16))
    check_run(replace(grpo, method="copsd"))  # which has no groups
    budget = Config(batch_size=4, max_new_tokens=10, token_budget=39)
    with pytest.raises(ValueError, match="--token-budget is 39; valid: 40 or more"):
        check_run(budget)
    check_run(replace(budget, token_budget=40))


@pytest.mark.parametrize("method", METHODS)
def test_the_lab_models_recipe_is_valid_for_every_method(lab_folder, method):
    found = settle(fill({"method": method}, lab_folder))
    assert Path(str(found.data)).is_file() and Path(str(found.eval_data)).is_file()


def test_completions_that_would_be_equal_are_refused():
    with pytest.raises(ValueError, match="--eval-temperature is 0, so that --eval-samples 8"):
        check_run(Config(eval_temperature=0.0))
    check_run(Config(eval_temperature=0.0, eval_samples=1))


def test_what_a_warm_start_does_not_begin_with_is_said():
    """The KL of --kl-coef was 7 nats before the first update, and nothing said to what."""
    base = "the base without any adapter, not what --warm-start begins with"
    kl, fixed = f"warning: the KL of --kl-coef is to {base}", f"warning: --teacher fixed is {base}"
    grpo = Config(method="grpo", warm_start="runs/x", kl_coef=0.1)
    assert doubts_of(grpo) == [kl]
    assert doubts_of(replace(grpo, method="ssopd")) == [kl, fixed]
    assert doubts_of(Config(warm_start="runs/x", kl_coef=0.1)) == [fixed], "COPSD has no such term"
    for silent in (
        replace(grpo, warm_start=None),
        replace(grpo, kl_coef=0.0),
        Config(),
        Config(warm_start="runs/x", teacher="ema"),
        Config(warm_start="runs/x", completion="reference"),
    ):
        assert doubts_of(silent) == []
    helps = {f.name: f.metadata["doc"] for f in fields(Config)}
    assert "without any adapter" in helps["kl_coef"] and "stay the base" in helps["warm_start"]


@pytest.mark.parametrize(
    ("given", "alike"),
    [
        # A part that is switched off leaves GRPO, whatever its other settings say.
        ({"method": "ssopd", "witness_weight": 0.0, "witness_tokens": 9}, {"method": "grpo"}),
        ({"method": "egrsd", "credit_mix": 0.0}, {"method": "grpo"}),
        # Settings that nothing reads: a clip without its mode, a copy's rhythm without a copy.
        ({"clip_mode": "none", "clip": 1.0}, {"clip_mode": "none"}),
        ({"method": "grpo", "divergence": "jsd"}, {"method": "grpo"}),
        ({"method": "opsdc"}, {"method": "copsd"}),
    ],
)
def test_settings_that_train_alike_are_equal_once_what_is_not_read_is_left_out(given, alike):
    assert as_trained(Config(**given)) == as_trained(Config(**alike))


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"method": "ssopd"}, {"method": "grpo"}),
        ({"method": "egrsd", "credit_mix": 0.0, "loss_prefix": 0.5}, {"method": "grpo"}),
        ({"method": "egrsd", "credit_mix": 0.0, "token_weight": "position"}, {"method": "grpo"}),
        ({"method": "egrsd"}, {"method": "ssopd"}),
        ({"clip": 1.0}, {}),
        ({"seed": 1}, {}),
        ({"method": "grpo"}, {"method": "copsd"}),
    ],
)
def test_settings_that_train_otherwise_are_not_equal(given, other):
    assert as_trained(Config(**given)) != as_trained(Config(**other))


def test_a_method_whose_own_part_is_switched_off_is_said_to_be_grpo():
    ssopd = Config(method="ssopd", witness_weight=0.0)
    said = "warning: --method ssopd with --witness-weight 0 trains as --method grpo"
    assert said in doubts_of(ssopd)
    assert said not in doubts_of(replace(ssopd, witness_weight=0.1))
    egrsd = Config(method="egrsd", credit_mix=0.0)
    said = "warning: --method egrsd with --credit-mix 0 trains as --method grpo"
    assert said in doubts_of(egrsd)
    assert said not in doubts_of(replace(egrsd, token_weight="confidence"))
