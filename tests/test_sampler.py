"""The sampler against plain definitions.

They are an uncached loop, a full-sequence forward, and a truncation written in Python.
test_batch.py holds the rows that come and go, and the cache that grows.
"""

import math
import random

import pytest
import torch
from conftest import build_tiny_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from parts import sampler
from parts.sampler import Rollout, SamplingParams, choose_tokens, sample

PLAIN = SamplingParams(12, temperature=1.1)
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
}


def random_prompts(*lengths: int) -> list[list[int]]:
    stream = random.Random(5)
    return [[stream.randrange(290) for _ in range(length)] for length in lengths]


def full_logprobs(model, rollout: Rollout, temperature: float) -> list[float]:
    """Score a rollout as training does: one forward over all of it, no cache, no padding."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1]
    chosen = torch.tensor(rollout.completion_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0].tolist()


def ids_of(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.completion_ids for rollout in group] for group in groups]


def watch(module, record: list) -> None:
    """Record the shape of every forward's ids: prefills have several columns, decode steps one."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: record.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )


def test_greedy_equals_an_uncached_argmax_loop(tiny_model):
    prompts = random_prompts(7, 2, 11)
    rollouts = sample(tiny_model, prompts, SamplingParams(15, temperature=0.0), eos_ids=set())
    for prompt, (rollout,) in zip(prompts, rollouts, strict=True):
        ids = list(prompt)
        for _ in range(15):
            ids.append(int(tiny_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert rollout == Rollout(prompt, ids[len(prompt) :], rollout.logprobs, "length")
        assert rollout.logprobs == pytest.approx(full_logprobs(tiny_model, rollout, 1.0), abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
        (LlamaConfig, LlamaForCausalLM),
    ],
)
def test_logprobs_equal_a_full_forward(config_class, model_class, attention):
    torch.manual_seed(3)
    extra = {"head_dim": 8, "attn_implementation": attention}
    model = model_class(config_class(**SIZES, **HEADS, **extra, tie_word_embeddings=False)).eval()
    params = SamplingParams(12, temperature=1.3, top_p=0.9, top_k=50)
    for group in sample(
        model, random_prompts(9, 1, 4), params, eos_ids={3}, samples_per_prompt=2, valid_ids=290
    ):
        for rollout in group:
            assert rollout.logprobs == pytest.approx(full_logprobs(model, rollout, 1.3), abs=1e-4)


def test_seed_and_indices_fix_the_draws_and_the_global_random_state_is_untouched(tiny_model):
    prompts = random_prompts(5) * 3
    torch.manual_seed(1)
    random.seed(1)
    before, python_before = torch.get_rng_state(), random.getstate()
    first = ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set(), samples_per_prompt=3))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before

    torch.manual_seed(2)
    random.seed(2)
    assert ids_of(sample(tiny_model, prompts, PLAIN, eos_ids=set(), samples_per_prompt=3)) == first
    other = SamplingParams(12, temperature=1.1, seed=1)
    assert ids_of(sample(tiny_model, prompts, other, eos_ids=set(), samples_per_prompt=3)) != first
    assert len({tuple(ids) for group in first for ids in group}) == 9


def test_a_part_of_the_prompts_samples_as_it_does_within_the_whole(tiny_model):
    prompts = random_prompts(4, 4, 9, 6, 4)
    whole = sample(tiny_model, prompts, PLAIN, eos_ids=set(), samples_per_prompt=2)
    part = sample(
        tiny_model, prompts[2:4], PLAIN, eos_ids=set(), samples_per_prompt=2, first_index=2
    )
    assert ids_of(part) == ids_of(whole[2:4])
    assert ids_of(
        sample(tiny_model, prompts[2:4], PLAIN, eos_ids=set(), samples_per_prompt=2)
    ) != ids_of(part)


def test_any_of_several_eos_ids_ends_a_row_and_is_its_last_id(tiny_model):
    tiny_model.config.pad_token_id = 0  # pad == eos must not matter
    eos_ids, rows = {0, 60, 120, 180, 240}, []
    prompts = [[0, 60, 5], [7, 0, 0, 0]]  # eos ids inside a prompt neither end nor hide anything
    params = SamplingParams(20, temperature=2.0)
    for group in sample(tiny_model, prompts, params, eos_ids=eos_ids, samples_per_prompt=20):
        for rollout in group:
            *body, last = rollout.completion_ids
            assert not eos_ids & set(body)
            assert rollout.finish_reason == ("stop" if last in eos_ids else "length")
            assert len(rollout.completion_ids) == 20 or last in eos_ids
            assert len(rollout.logprobs) == len(rollout.completion_ids)
            assert rollout.logprobs == pytest.approx(
                full_logprobs(tiny_model, rollout, 2.0), abs=1e-4
            )
            rows.append((rollout.finish_reason, last))
    assert len({last for reason, last in rows if reason == "stop"}) > 1
    assert any(reason == "length" for reason, _ in rows)


def test_an_eos_as_the_very_last_token_is_a_stop(tiny_model):
    (free,) = sample(
        tiny_model, random_prompts(4), SamplingParams(6, temperature=0.0), eos_ids=set()
    )[0]
    last = free.completion_ids[-1]
    count = free.completion_ids.index(last) + 1
    (rollout,) = sample(
        tiny_model, random_prompts(4), SamplingParams(count, temperature=0.0), eos_ids={last}
    )[0]
    assert (rollout.completion_ids, rollout.finish_reason) == (free.completion_ids[:count], "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_outside_valid_ids_are_never_sampled(tiny_model, temperature):
    with torch.no_grad():  # ids past the tokenizer become the most likely ones everywhere
        tiny_model.set_output_embeddings(torch.nn.Linear(32, 300))
        tiny_model.get_output_embeddings().bias[290:] = 50.0
    params = SamplingParams(10, temperature=temperature)
    wild = sample(tiny_model, random_prompts(3, 5), params, eos_ids=set(), samples_per_prompt=4)
    tame = sample(
        tiny_model, random_prompts(3, 5), params, eos_ids=set(), samples_per_prompt=4, valid_ids=290
    )
    few = sample(
        tiny_model,
        random_prompts(3, 5),
        params,
        eos_ids=set(),
        samples_per_prompt=4,
        valid_ids=[2, 5, 7],
    )
    assert all(min(ids) >= 290 for group in ids_of(wild) for ids in group)
    assert all(max(ids) < 290 for group in ids_of(tame) for ids in group)
    assert all(set(ids) <= {2, 5, 7} for group in ids_of(few) for ids in group)
    rollout = tame[0][0]  # the log-prob is over the whole head, as in training
    assert rollout.logprobs == pytest.approx(
        full_logprobs(tiny_model, rollout, temperature or 1.0), abs=1e-4
    )


def truncated(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> list[tuple[int, float]]:
    """Return the kept (id, probability), most likely first, by the words of the definition."""
    order = sorted(range(len(logits)), key=lambda index: -logits[index])[: top_k or len(logits)]
    weights = [math.exp(logits[index] / temperature) for index in order]
    kept, reached = [], 0.0
    for index, weight in zip(order, weights, strict=True):
        kept.append((index, weight))
        reached += weight / sum(weights)
        if reached >= top_p:
            break
    return [(index, weight / sum(weight for _, weight in kept)) for index, weight in kept]


# With a first width of 3, nearly every row needs the second, complete draw.
@pytest.mark.parametrize("first_width", [3, 256])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 0), (0.7, 0), (0.97, 0), (1.0, 5), (0.6, 9), (0.9, 999), (1e-9, 0)]
)
def test_draws_invert_the_truncated_distribution(monkeypatch, first_width, top_p, top_k):
    monkeypatch.setattr(sampler, "FIRST_WIDTH", first_width)
    logits_1V = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(8))
    kept = truncated(logits_1V[0].tolist(), 1.4, top_p, top_k)
    uniforms, expected, edge = [], [], 0.0
    for index, probability in kept:  # just inside both ends of every kept id's interval
        uniforms += [edge + 1e-4 * probability, edge + (1 - 1e-4) * probability]
        expected += [index, index]
        edge += probability
    uniform_B = torch.tensor(uniforms, dtype=torch.float64)
    ids_B, logprob_B = choose_tokens(
        logits_1V.expand(len(uniforms), -1),
        uniform_B,
        torch.ones(40).bool(),
        temperature=1.4,
        top_p=top_p,
        top_k=top_k,
    )
    assert ids_B.tolist() == expected
    assert logprob_B.tolist() == pytest.approx(
        (logits_1V / 1.4).log_softmax(-1)[0, ids_B].tolist(), abs=1e-5
    )


@pytest.mark.parametrize("first_width", [1, 2, 256])
def test_ids_that_reach_top_p_exactly_are_the_whole_nucleus(monkeypatch, first_width):
    monkeypatch.setattr(sampler, "FIRST_WIDTH", first_width)
    logits_BV = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    order = [1, 3, 2, 0]  # from the most likely id on
    log_p_V = (logits_BV - logits_BV.logsumexp(-1, keepdim=True))[0, order]
    p_V = log_p_V.double().exp()
    before_V = p_V.cumsum(0) - p_V  # what the more likely ids hold together
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for kept in (1, 2, 3):
        top_p = before_V[kept].item()
        ids_B, _ = choose_tokens(logits_BV, almost_one, None, temperature=1.0, top_p=top_p, top_k=0)
        assert ids_B.item() == order[kept - 1]


def test_no_mask_is_a_mask_of_all_ids():
    logits_BV = torch.randn(50, 700, generator=torch.Generator().manual_seed(8))
    uniform_B = torch.rand(50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for temperature, top_p, top_k in [(0.0, 1.0, 0), (1.3, 1.0, 0), (1.3, 0.9, 0), (1.3, 0.9, 30)]:
        settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        free = choose_tokens(logits_BV, uniform_B, None, **settings)
        masked = choose_tokens(logits_BV, uniform_B, torch.ones(700).bool(), **settings)
        assert torch.equal(free[0], masked[0]) and torch.equal(free[1], masked[1])


def test_a_uniform_next_to_one_still_draws_a_kept_id():
    uniform_B = torch.full((3,), 1 - 2**-53, dtype=torch.float64)
    logits_BV, allowed_V = torch.zeros(3, 700), torch.arange(700) < 650
    for top_p, top_k in [(1.0, 0), (0.999, 0), (1.0, 690), (0.5, 20)]:
        ids_B, _ = choose_tokens(
            logits_BV, uniform_B, allowed_V, temperature=1.0, top_p=top_p, top_k=top_k
        )
        assert ids_B.max() < 650


def test_the_generation_config_is_ignored(tiny_model):
    expected = ids_of(sample(tiny_model, random_prompts(4), PLAIN, eos_ids=set()))
    absurd = {
        "temperature": 9.0,
        "top_k": 1,
        "top_p": 0.01,
        "max_new_tokens": 1,
        "repetition_penalty": 50.0,
    }
    tiny_model.generation_config.update(
        **absurd, eos_token_id=expected[0][0][0], do_sample=False, num_beams=4
    )
    before = tiny_model.generation_config.to_dict()
    assert ids_of(sample(tiny_model, random_prompts(4), PLAIN, eos_ids=set())) == expected
    assert tiny_model.generation_config.to_dict() == before


def test_every_modules_mode_is_put_back_and_dropout_is_off(tiny_model):
    expected = ids_of(sample(tiny_model, random_prompts(4), PLAIN, eos_ids=set()))
    tiny_model.model.gradient_checkpointing = True  # as gradient_checkpointing_enable() leaves it
    tiny_model.train()
    tiny_model.model.layers[0].eval()  # a mixed model stays mixed
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = [module.training for module in tiny_model.modules()]
    grad_modes = set()
    tiny_model.model.register_forward_pre_hook(lambda *_: grad_modes.add(torch.is_grad_enabled()))
    assert ids_of(sample(tiny_model, random_prompts(4), PLAIN, eos_ids=set())) == expected
    assert [module.training for module in tiny_model.modules()] == before

    def fail(*_):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        sample(tiny_model, random_prompts(4), PLAIN, eos_ids=set(), on_progress=fail)
    assert [module.training for module in tiny_model.modules()] == before
    assert grad_modes == {False}
    assert torch.is_grad_enabled()


def test_bf16_rows_stay_close_to_the_full_forward(tiny_model):
    model = tiny_model.bfloat16()
    for (rollout,) in sample(model, random_prompts(3, 9), PLAIN, eos_ids=set()):
        assert rollout.logprobs == pytest.approx(
            full_logprobs(model.float(), rollout, 1.1), abs=0.3
        )
        logprobs = torch.tensor(rollout.logprobs)
        # Summed in fp32, not in the model's precision.
        assert not torch.equal(logprobs, logprobs.bfloat16().float())


def test_no_prompts_give_no_rollouts(tiny_model):
    assert sample(tiny_model, [], PLAIN, eos_ids={1}) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [300]]}, "prompt 1 .* 0 to 299"),
        ({"prompts": [[1], [-1]]}, "prompt 1 .* 0 to 299"),
        (
            {"prompts": [[1], [5] * 250]},
            "prompt 1 has 250 tokens and max_new_tokens is 12; valid: 256",
        ),
        ({"eos_ids": {300}}, "eos ids .300."),
        ({"eos_ids": {-1}}, "eos ids .-1."),
        ({"eos_ids": {295}, "valid_ids": 290}, "eos ids .295."),
        ({"valid_ids": 301}, "valid_ids .* 0 to 299"),
        ({"valid_ids": 0}, "valid_ids"),
        ({"valid_ids": [-1, 3]}, "valid_ids"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0; valid: 1 or more"),
        ({"max_rows": 0}, "max_rows is 0; valid: 1 or more"),
    ],
)
def test_bad_arguments_are_named(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_model, **{"prompts": [[1, 2]], "params": PLAIN, "eos_ids": set(), **arguments})


@pytest.mark.parametrize(
    "field",
    [
        "max_new_tokens=0",
        "temperature=-0.1",
        "temperature=nan",
        "temperature=inf",
        "top_p=0",
        "top_p=1.01",
        "top_k=-1",
    ],
)
def test_bad_sampling_params_are_named(field):
    name, value = field.split("=")
    with pytest.raises(ValueError, match=f"{name} is .*; valid: "):
        SamplingParams(**{"max_new_tokens": 4, name: float(value)})


def test_the_longest_fitting_prompt_is_accepted(tiny_model):
    (rollout,) = sample(tiny_model, [[5] * 252], SamplingParams(4), eos_ids=set())[0]
    assert len(rollout.completion_ids) == 4


def test_models_that_would_be_sampled_wrongly_are_refused(tiny_model):
    mistral = MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=8))
    sliding = Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES, **HEADS, use_sliding_window=True, sliding_window=8, max_window_layers=1
        )
    )
    for model in (mistral, sliding):
        with pytest.raises(ValueError, match="full_attention only"):
            sample(model, [[1]], PLAIN, eos_ids=set())
    tiny_model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30"):
        sample(tiny_model, [[1]], PLAIN, eos_ids=set())
    tiny_model.config.final_logit_softcapping = None
    tiny_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="valid: sdpa, eager"):
        sample(tiny_model, [[1]], PLAIN, eos_ids=set())


def test_one_row_that_is_not_finite_is_enough_to_stop():
    model = build_tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    params = SamplingParams(max_new_tokens=1)  # the least there is
    assert len(sample(model, [[8, 9]], params, eos_ids=set())) == 1
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(model, [[8, 9], [8, 7]], params, eos_ids=set())
