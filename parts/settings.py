"""The settings of one run: typed, filled up from the recipe of model and method, and checked.

A run takes each setting from the first of these that has it: the flags that were typed, the model
folder's recipe.json, the method, the default. What a setting is, and which values are valid, stands
in parts/recipe.py.
"""

import math
import os
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from parts.files import read_object
from parts.prompts import find_language
from parts.recipe import (
    DISTILLED,
    GROUPED,
    LABELS,
    LEAST_TEMPERATURE,
    METHODS,
    NOTELESS,
    TYPED_ONLY,
    Config,
    Needs,
    Such,
    largest_step,
    of_method,
)
from parts.typed import typed


def fill(given: dict[str, Any], model_folder: Path) -> Config:
    """Return the settings of a run; see the top of the file for what goes first."""
    method = given.get("method", Config.method)
    defaults = {
        f.name: of_method(f.metadata["by_method"], method, f.default) for f in fields(Config)
    }
    recipe = read_recipe(model_folder, method)
    if "data" in given:
        recipe.pop("eval_data", None)  # the recipe's benchmark belongs to the recipe's data
    return Config(**{**defaults, **recipe, **given})


def settle(config: Config) -> Config:
    """Check the settings of a run; return them with language, files and folder named in full."""
    check_settings(config)
    lang = find_language(config.lang).iso3
    out = config.out or f"runs/{config.method}-{Path(config.model).name}-{lang}-{config.seed}"
    files = {
        name: str(value).replace("{lang}", lang)
        for name in ("data", "eval_data")
        if (value := getattr(config, name))
    }
    config = replace(config, lang=lang, out=out, **files)
    check_run(config)
    return config


def read_recipe(model_folder: Path, method: str = "copsd") -> dict[str, Any]:
    """Return the settings that the folder's recipe.json has for this model, {} where there is none.

    Each entry is {"value": ..., "why": ...}, with another value under a method's name where that
    differs, for the methods that follow it, too. Files in it are relative to the folder; "{lang}"
    stands for the language. Raises ValueError for a recipe that says anything else.
    """
    path = model_folder / "recipe.json"
    if not os.path.lexists(path):
        return {}
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is no file that can be read; remove it, or put the recipe there")
    entries = read_object(path)
    known = {f.name: f for f in fields(Config)}
    if unknown := entries.keys() - known.keys():
        raise ValueError(f"{path} has unknown settings: {', '.join(sorted(unknown))}")
    recipe = {}
    for name, entry in entries.items():
        _check_entry(name, entry, f"{path}: {name}")
        recipe[name] = of_method(entry, method, entry["value"])
        check_value(known[name], recipe[name], f"{path}: {name}")
    for name in ("data", "eval_data"):
        if recipe.get(name) is not None:
            recipe[name] = os.path.normpath(model_folder / recipe[name])
    return recipe


def _check_entry(name: str, entry: Any, called: str) -> None:
    """Raise ValueError for a recipe's entry that cannot be, or of which a part would not be read.

    called  what the message calls it
    """
    if name in TYPED_ONLY:
        raise ValueError(f"{called} can only be typed: {TYPED_ONLY[name]}")
    if not isinstance(entry, dict) or "value" not in entry:
        raise ValueError(f'{called} is no object with a "value"')
    valid = ("value", "why", *METHODS)
    if unknown := sorted(entry.keys() - {*valid}):
        raise ValueError(f"{called} has an unknown {unknown[0]!r}; valid: {', '.join(valid)}")


def check_settings(config: Any) -> None:
    """Raise ValueError for the first setting that is not what its field allows, saying what is."""
    for f in fields(config):
        check_value(f, getattr(config, f.name), _flag(f))


def check_value(f: Field, value: Any, name: str) -> None:
    """Raise ValueError for a value that is of another type or range than its setting's.

    name  what the message calls it: the flag, or the file and the field
    """
    valid = range_text(f) or "a finite number"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; valid: {valid}")
    typed(value, f.type, name)
    choices = f.metadata["choices"]
    if choices and value not in choices:
        place = name.removesuffix(_flag(f)).removesuffix(f.name)
        called = f.name.replace("_", " ")
        raise ValueError(f"{place}unknown {called} {value!r}; valid: {', '.join(choices)}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} is empty; leave it out, or give it a value")
    if isinstance(value, int | float) and type(value) is not bool and not _is_inside(value, f):
        raise ValueError(f"{name} is {value}; valid: {valid}")


def check_run(config: Config) -> None:
    """Raise ValueError where single settings, or two that belong together, are out of range."""
    check_settings(config)
    if config.method in GROUPED and config.batch_size % config.group_size:
        valid = f"a multiple of --group-size {config.group_size}"
        raise ValueError(f"--batch-size is {config.batch_size}; valid: {valid}")
    if config.completion != "student":
        check_control(config)
    if config.answer_only and config.swap_solutions:
        raise ValueError("--answer-only and --swap-solutions both replace the solution; leave one")
    if config.answer_only and not config.english_solution:
        raise ValueError("--answer-only shows the answer where --no-english-solution shows nothing")
    # Where only the most likely token can be drawn, every completion of a problem is the same.
    if config.eval_temperature == 0 and config.eval_samples > 1:
        raise ValueError(
            f"--eval-temperature is 0, so that --eval-samples {config.eval_samples} would be "
            "equal; valid: --eval-samples 1, or a temperature above 0"
        )
    if 0 < config.eval_temperature < LEAST_TEMPERATURE:
        valid = f"0, or {LEAST_TEMPERATURE:g} or more"
        raise ValueError(f"--eval-temperature is {config.eval_temperature}; valid: {valid}")
    targets = [target.strip() for target in config.lora_targets.split(",")]
    if len(set(targets)) < len(targets) or "" in targets:
        valid = "names of layers, each once, separated by commas"
        raise ValueError(f"--lora-targets is {config.lora_targets!r}; valid: {valid}")
    largest = largest_step(config)
    if config.token_budget is not None and config.token_budget < largest:
        valid = f"{largest} or more, what a step may sample"
        raise ValueError(f"--token-budget is {config.token_budget}; valid: {valid}")


def check_control(config: Config) -> None:
    """Raise ValueError where a control of COPSD meets settings that it cannot honour."""
    control = f"--completion {config.completion}"
    if config.method != "copsd":
        raise ValueError(f"{control} is a control of COPSD; valid: student")
    if config.teacher_reads not in NOTELESS:
        valid = ", ".join(NOTELESS)
        said = f"--teacher-reads {config.teacher_reads} is of the student's completions"
        raise ValueError(f"{said}; valid with {control}: {valid}")
    is_weighted = config.token_weight != "uniform" or config.loss_prefix < 1
    if config.completion in LABELS and (is_weighted or config.loss_over != "vocabulary"):
        raise ValueError(
            f"{control} has no teacher; --token-weight, --loss-prefix and --loss-over go without it"
        )


def refuse_idle(given: dict[str, Any], config: Config) -> None:
    """Raise ValueError for a typed setting that does nothing in this run, such as another method's.

    given  what was typed, of which `config` was made
    """
    for why in idle_settings(given, config).values():
        raise ValueError(why)
    if {"steps", "token_budget"} <= given.keys():
        raise ValueError("--steps and --token-budget both say where a run ends; leave one")


def idle_settings(given: dict[str, Any], config: Config) -> dict[str, str]:
    """Return, of the typed settings, those that do nothing in this run, each with the reason."""
    idle: dict[str, str] = {}
    for f in fields(config):
        if f.name not in given:
            continue
        why = _unmet(f, f.metadata["needs"], config)
        untrained = _unmet(f, f.metadata["in_training"], config)
        if not why and untrained and not config.eval_problems:
            why = f"{untrained}, and --eval-problems 0 leaves out the KL that it would change"
        if why:
            idle[f.name] = why
    return idle


def _unmet(f: Field, needs: Needs, config: Config) -> str:
    """Return the first of a setting's needs that is not met, in words; "" where all are."""
    for name, values in needs.items():
        value = getattr(config, name)
        if value not in values:
            valid = values.words if isinstance(values, Such) else ", ".join(map(str, values))
            return f"{_flag(f)} is for {flag_of(name)} {valid}; here {flag_of(name)} is {value}"
    return ""


def as_trained(config: Config) -> Config:
    """Return the settings without what this run's training never reads: equal ones train alike.

    A method whose own part is switched off is GRPO, and those of COPSD's loop differ in settings
    only.
    """
    is_even = config.token_weight == "uniform" and config.loss_prefix == 1
    adds = {
        "egrsd": config.credit_mix > 0 or not is_even,
        "ssopd": config.witness_weight > 0,
    }
    loop = "copsd" if config.method in DISTILLED else "grpo"
    method = config.method if adds.get(config.method) else loop
    # Without an evaluation, what changes only its KL is idle, too.
    config = replace(config, method=method, eval_problems=0)
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    idle = idle_settings(given, config)
    return replace(config, **{f.name: f.default for f in fields(config) if f.name in idle})


def doubts_of(config: Config) -> list[str]:
    """Return a line for each choice of settings that collapsed for others or misleads.

    One misleads that comes to nothing, or that another setting gives a meaning hard to guess.
    """
    warnings = []
    is_scored = config.method in (*DISTILLED, "ssopd") and config.completion not in LABELS
    follows = config.teacher != "fixed" and is_scored
    # The sampled token's loss estimates the reverse KL, whatever --divergence says.
    is_forward = config.divergence == "forward_kl" and config.loss_over != "sampled"
    if follows and is_forward and config.clip_mode == "none":
        warnings.append(
            "warning: an unclipped forward KL with a teacher that follows the student collapsed "
            "in OPSDC's paper (MATH-500 5.7 against 95.7); valid are --divergence reverse_kl, "
            "a --clip-mode, or --teacher fixed"
        )
    clips = (config.clip_low, config.clip_high) != (Config.clip_low, Config.clip_high)
    if clips and config.method in GROUPED and config.inner_epochs == 1:
        warnings.append(
            "warning: --clip-low and --clip-high act from a batch's second update on, and "
            "--inner-epochs is 1"
        )
    if config.method != "grpo" and as_trained(config).method == "grpo":
        part = "--witness-weight 0" if config.method == "ssopd" else "--credit-mix 0"
        warnings.append(f"warning: --method {config.method} with {part} trains as --method grpo")
    if follows and config.teacher == "copy" and config.teacher_every == 1:
        warnings.append("warning: --teacher-every 1 collapsed in OPSDC's paper; it has 50")
    is_read = is_scored or config.method == "egrsd"
    # What is renewed after the last step teaches nothing any more.
    ends_first = config.token_budget is None and config.steps <= config.teacher_every
    if is_read and config.teacher == "copy" and ends_first:
        warnings.append(
            f"warning: no step learns from a renewed teacher: --steps is {config.steps}, "
            f"--teacher-every {config.teacher_every}"
        )
    # The adapter that a warm start brings is switched off for both.
    pulled = {
        "the KL of --kl-coef is to": config.method in GROUPED and config.kl_coef > 0,
        "--teacher fixed is": is_read and config.teacher == "fixed",
    }
    if config.warm_start:
        warnings += [
            f"warning: {what} the base without any adapter, not what --warm-start begins with"
            for what, here in pulled.items()
            if here
        ]
    return warnings


def range_text(f: Field) -> str:
    """Return the range in words, "" where every number is valid."""
    limits = f.metadata
    bounds = {
        f"{limits['least']} or more": limits["least"],
        f"above {limits['above']}": limits["above"],
        f"up to {limits['most']}": limits["most"],
        f"below {limits['below']}": limits["below"],
    }
    return ", ".join(text for text, bound in bounds.items() if math.isfinite(bound))


def flag_of(name: str) -> str:
    """Return a setting as it is typed: --micro-batch for micro_batch."""
    return "--" + name.replace("_", "-")


def _flag(f: Field) -> str:
    return flag_of(f.name)


def _is_inside(value: float, f: Field) -> bool:
    limits = f.metadata
    return limits["least"] <= value <= limits["most"] and limits["above"] < value < limits["below"]
