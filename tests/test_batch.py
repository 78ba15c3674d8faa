"""The batch and its cache: rows come and go and columns are added, and no result changes."""

import pytest
import torch
from test_sampler import PLAIN, full_logprobs, ids_of, random_prompts, watch

from parts import batch
from parts.sampler import SamplingParams, sample


def test_the_cache_grows_past_its_first_block(tiny_model, monkeypatch):
    prompts = random_prompts(6, 2)
    expected = ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set()))
    monkeypatch.setattr(batch, "GROWTH_COLUMNS", 5)
    assert ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set())) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_cache_is_right_past_its_growth(tiny_model, monkeypatch, attention):
    # Room for 3 columns only: 20 tokens fill it six times, with rows that end and rows that join in
    # between. What a fresh allocation holds is made NaN, so that reading it would show.
    monkeypatch.setattr(batch, "GROWTH_COLUMNS", 3)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *sizes: empty(*sizes).fill_(float("nan")))
    grown: list[int] = []
    update = batch._GrowingLayer.update

    def watched(layer, key_states, value_states, *args, **kwargs):
        grown.append(layer.filled == layer.keys.shape[2])
        return update(layer, key_states, value_states, *args, **kwargs)

    monkeypatch.setattr(batch._GrowingLayer, "update", watched)
    tiny_model.set_attn_implementation(attention)
    params = SamplingParams(20, temperature=1.1)
    eos_ids = set(range(0, 290, 60))
    prompts = random_prompts(9, 2, 5, 14)
    groups = sample(tiny_model, prompts, params, eos_ids=eos_ids, samples_per_prompt=3, max_rows=4)
    assert sum(grown) >= 12  # two layers
    assert {rollout.finish_reason for group in groups for rollout in group} == {"stop", "length"}
    for group in groups:
        for rollout in group:
            assert rollout.logprobs == pytest.approx(
                full_logprobs(tiny_model, rollout, 1.1), abs=1e-4
            )


def test_the_room_for_all_columns_is_allocated_at_once(tiny_model, monkeypatch):
    made: list[list[int]] = []
    join = batch._right_aligned

    def watched(parts, room):
        made.append([part.shape[1] for part in parts] + [room])
        return join(parts, room)

    monkeypatch.setattr(batch, "_right_aligned", watched)
    sample(tiny_model, random_prompts(6, 2), PLAIN, eos_ids=set())
    assert made == [[6, 2, 11]] * 4  # keys and values of two layers; the twelfth token needs none


@pytest.mark.parametrize(
    ("tokens", "groups"), [(10, [(1, 6), (2, 5), (1, 2)]), (1, [(1, 6), (1, 5), (1, 4), (1, 2)])]
)
def test_small_prefill_groups_change_no_result(tiny_model, monkeypatch, tokens, groups):
    prompts, shapes = random_prompts(6, 2, 5, 4), []
    expected = ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set()))
    monkeypatch.setattr(batch, "PREFILL_TOKENS", tokens)
    watch(tiny_model.model, shapes)
    assert ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set())) == expected
    assert [shape for shape in shapes if shape[1] > 1] == groups


# With 2, the three samples of a prompt are not admitted together.
@pytest.mark.parametrize("max_rows", [None, 2])
def test_each_distinct_prompt_is_prefilled_once(tiny_model, max_rows):
    prompts, shapes = random_prompts(4, 6), []
    watch(tiny_model.model, shapes)
    sample(
        tiny_model,
        [*prompts, *prompts],
        PLAIN,
        eos_ids=set(),
        samples_per_prompt=3,
        max_rows=max_rows,
    )
    assert sum(rows for rows, columns in shapes if columns > 1) == 2
