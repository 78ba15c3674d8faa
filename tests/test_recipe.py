"""parts/recipe.py: the words that are valid, the defaults, and what a flag's help says."""

import re
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest

import kernels
from parts.commands import help_text
from parts.prompts import THINKING
from parts.recipe import (
    CHOSEN_BY,
    METHODS,
    PARENTS,
    CompareConfig,
    Config,
    EvalConfig,
    optimiser,
)
from parts.settings import check_settings, range_text

CONFIGS = {"run": Config, "comparison": CompareConfig, "evaluation": EvalConfig}
OWN_FLAGS = [
    pytest.param(config, f, id=f"{name}-{f.name}")
    for name, config in CONFIGS.items()
    for f in fields(config)
    if config is not CompareConfig or f.name not in {each.name for each in fields(Config)}
]


def test_choices_are_those_of_the_code_that_takes_them():
    choices = {f.name: f.metadata["choices"] for f in fields(Config) if f.metadata["choices"]}
    assert set(choices["divergence"]) == set(kernels.KINDS)
    assert set(choices["clip_mode"]) == set(kernels.CLIP_MODES)
    assert set(choices["reduction"]) == set(kernels.REDUCTIONS)
    assert choices["thinking"] == THINKING
    assert choices["method"] == METHODS


def test_the_settings_of_a_run_cannot_be_edited():
    with pytest.raises(FrozenInstanceError):
        Config().lr = 1.0  # type: ignore[misc]


def test_the_help_of_the_chunk_names_the_rows_of_the_code():
    said = help_text(Config.__dataclass_fields__["chunk_tokens"])
    assert f"Without it: {kernels.CHUNK_ROWS}, and {kernels.COMPILED_CUDA_ROWS} for" in said


@pytest.mark.parametrize(("config", "f"), OWN_FLAGS)
def test_a_flags_help_is_whole_sentences_that_name_its_default(config, f):
    said = help_text(f)
    doc = f.metadata["doc"]
    assert said.startswith(doc) and len(doc.split()) >= 3
    # A sentence begins with a capital, or with a value such as "forward_kl", and ends in a stop.
    sentences = re.split(r"(?<=[.)]) (?=[A-Z0-9a-z_]+)", doc)
    values = {"auto", "forward_kl", "pass@k"}
    for sentence in sentences:
        first = re.split(r"[ :]", sentence)[0]
        assert first[0].isupper() or first[0].isdigit() or first in values, sentence
        assert sentence.endswith((".", ").")), sentence
    rest = said.removeprefix(doc)
    if f.default is None:
        assert "default" not in rest
    else:
        assert f"default {f.default}" in rest
        assert f.metadata["source"] and f"default {f.default}, {f.metadata['source']}" in rest
    for method, value in f.metadata["by_method"].items():
        # Not the default's source: COPSD's scripts say nothing of another method.
        assert method in METHODS and f"; {method} {value}, {CHOSEN_BY[method]}" in rest
    for word in f.metadata["choices"]:
        assert word in rest
    assert range_text(f) in said
    assert f.metadata["section"]


def test_each_method_but_copsd_has_a_source_for_the_values_of_its_own():
    assert CHOSEN_BY.keys() <= PARENTS.keys() - {"copsd"}
    assert not any("paper" in source for source in CHOSEN_BY.values())
    of_lr = help_text(next(f for f in fields(Config) if f.name == "lr"))
    assert of_lr.endswith("(0 or more; default 5e-06, paper; opsdc 1e-06, OPSDC)")


def test_a_method_that_was_added_has_values_of_ours():
    """Without a name in CHOSEN_BY every command ended in a KeyError, and no list asked for one."""

    @dataclass(frozen=True)
    class Added:
        lr: float = optimiser(5e-6, "AdamW's peak learning rate.", opsdc=1e-6, added=1e-4)

    said = help_text(Added.__dataclass_fields__["lr"])
    assert said.endswith("(default 5e-06, paper; opsdc 1e-06, OPSDC; added 0.0001, ours)")


def test_a_default_is_valid_and_of_its_fields_type():
    for config in CONFIGS.values():
        check_settings(config())
        for f in fields(config):
            assert f.default is None or type(f.default).__name__ in str(f.type), f.name
            for value in f.metadata["by_method"].values():
                assert isinstance(value, type(f.default)), f.name


def test_sections_stand_together_in_the_file():
    for config in (Config, EvalConfig):
        sections = [f.metadata["section"] for f in fields(config)]
        runs = [name for i, name in enumerate(sections) if i == 0 or sections[i - 1] != name]
        assert len(runs) == len(set(runs))
