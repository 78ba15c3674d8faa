"""Families of models at toy size, every parameter perturbed: right in both dtypes, or refused."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from copsd import completion_hidden
from parts import adapters, sampler
from parts import model as ours
from parts.family import check_family, context_length
from parts.packing import packed_hidden
from parts.selfcheck import check_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
NOISE = {"dropout": 0.3, "attention_dropout": 0.3}
RIGHT = {
    "afmoe": {**ROUTED, "head_dim": 8, "sliding_window": 64},
    "apertus": {},
    "arcee": {},
    "biogpt": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "layerdrop": 0.3},
    "bitnet": {},
    "deepseek_v3": {
        **{**LATENT, "v_head_dim": 12},  # values narrower than keys
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
        "head_dim": 8,
    },
    "falcon": {"hidden_dropout": 0.3},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "gpt2": {**GPT, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_bigcode": {**GPT, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "granite": {"attention_dropout": 0.3},
    "llama": {"attention_dropout": 0.3},
    "mistral": {"sliding_window": 64},
    "mixtral": {**EXPERTS, "router_jitter_noise": 0.3},
    "olmo2": {},
    "opt": {**NOISE, "layerdrop": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {"resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "phimoe": {**EXPERTS, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {},
    "stablelm": {"hidden_dropout": 0.3},
    "starcoder2": {"residual_dropout": 0.3, "embedding_dropout": 0.3},
    "youtu": LATENT,
}
REFUSED = {
    "bart": ({"d_model": 32}, r"\(bart\) is of an encoder-decoder family"),
    "bert": ({"is_decoder": True}, "bias in its head"),
    "bloom": ({"n_layer": 2, "n_head": 4}, r"\(bloom\) cannot be loaded"),
    "cohere": ({}, "logit_scale=0.0625"),
    "bitnet": (
        {"quantization_config": {"quant_method": "bitnet"}},
        r"\(bitnet\) is quantised \(bitnet\)",
    ),
    "gemma2": ({"head_dim": 8}, "final_logit_softcapping=30.0"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
    "jamba": ({"mamba_d_state": 4}, r"\(jamba\) has layers of LinearAttentionLayer"),
    "mamba": ({}, r"\(mamba\) has layers of LinearAttentionLayer"),
    "marian": ({"d_model": 32}, r"\(marian\) is of an encoder-decoder family"),
    "minicpm3": (LATENT, r"\(minicpm3\) cannot be used: hidden states times the head"),
    "mistral": ({"sliding_window": 63}, r"\(mistral\) has layers of .*a window of 63 tokens"),
    "pegasus": ({"d_model": 32}, r"\(pegasus\) is of an encoder-decoder family"),
    "phi": ({}, "bias in its head"),
    "phi3": ({"sliding_window": 63}, r"\(phi3\) has layers of .*a window of 63 tokens"),
    "phimoe": ({**EXPERTS, "lm_head_bias": True}, "bias in its head"),
    "starcoder2": ({"sliding_window": 63}, r"\(starcoder2\) has .*a window of 63 tokens"),
}
NOT_HONOURED = [  # by their configuration alone
    "bailing_hybrid",
    "bamba",
    "blenderbot",
    "deepseek_v32",
    "falcon_h1",
    "gemma3",
    "gemma3n",
    "granitemoehybrid",
    "llama4",
    "mbart",
    "minimax",
    "nemotron_h",
    "prophetnet",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "t5",
    "zamba2",
]
SMALL_DECODERS = {
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
}


def configure(family, **settings):
    """Return a toy configuration, with those of SIZES that the family knows."""
    default = AutoConfig.for_model(family)
    known = default.to_dict().keys() | default.attribute_map.keys()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    return AutoConfig.for_model(family, **{**sizes, **settings})


def build(family, settings, folder):
    """Save a random model with every parameter perturbed: zero biases would hide mistakes."""
    torch.manual_seed(0)
    if "d_model" in settings:
        settings = {**settings, **SMALL_DECODERS}
    model = AutoModelForCausalLM.from_config(configure(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return folder


def load(folder, dtype=torch.float32, **options):
    return ours.load_model(folder, device="cpu", dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RIGHT)
def test_family_is_sampled_and_scored_as_it_is_meant(tmp_path, family, dtype):
    build(family, RIGHT[family], tmp_path)
    model = load(tmp_path, dtype)
    check_model(model, "the model")
    # The same files, loaded by transformers alone.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    prompts = [list(range(3, 3 + length)) for length in (7, 12, 4)]
    groups = sampler.sample(model, prompts, sampler.SamplingParams(5, 0.0), eos_ids=set())
    rows = [rollout.prompt_ids + rollout.completion_ids for (rollout,) in groups]
    ids_BT = torch.tensor([row + [0] * (17 - len(row)) for row in rows])
    model.train()
    with torch.no_grad():
        logits_BTV = ours.final_hidden(model, ids_BT) @ ours.head_weight(model).T
        again_BTV = ours.final_hidden(model, ids_BT) @ ours.head_weight(model).T
    assert torch.equal(logits_BTV, again_BTV)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    # In fp32 every number counts. In bf16 rounding may send a token to other experts, which is no
    # mistake, so that it is most of the numbers that count.
    furthest = Tensor.max if dtype == torch.float32 else Tensor.median
    for (rollout,), row, logits_TV in zip(groups, rows, logits_BTV, strict=True):
        with torch.no_grad():
            own_TV = plain(torch.tensor([row])).logits[0].float()
        allowed = tolerance * float(own_TV.std())
        assert furthest((logits_TV[: len(row)].float() - own_TV).abs()) < allowed
        own_C = own_TV[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        own_C = own_C[range(5), rollout.completion_ids]
        assert furthest((torch.tensor(rollout.logprobs) - own_C).abs()) < allowed


@pytest.mark.parametrize("family", RIGHT)
def test_a_familys_completions_share_their_prompt(tmp_path, family):
    model = load(build(family, RIGHT[family], tmp_path)).eval()
    prompts = [list(range(3, 12))] * 3 + [[5, 6, 7, 8]] * 2
    completions = [[9, 10, 11], [20], [21, 22, 23, 24, 25], [30, 31], [32, 33, 34]]
    with torch.no_grad():
        plain_ND = completion_hidden(model, prompts, completions)
        packed_ND = packed_hidden(model, prompts, completions)
    torch.testing.assert_close(packed_ND, plain_ND, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", REFUSED)
def test_family_is_refused_by_name_in_one_line(tmp_path, family):
    settings, message = REFUSED[family]
    build(family, settings, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        check_model(load(tmp_path), "the model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", NOT_HONOURED)
def test_a_configuration_that_is_not_honoured_is_refused_before_weights_are_read(family):
    with pytest.raises(ValueError, match=rf"^the model \({family}\) ") as error:
        check_family(AutoConfig.for_model(family), "the model")
    assert "\n" not in str(error.value)


def test_a_quantised_model_is_refused():
    config = configure("qwen2", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"\(qwen2\) is quantised"):
        check_family(config, "the model")


def test_a_family_that_looks_at_both_sides_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(configure("bert"))
    with pytest.raises(ValueError, match=r"\(bert\) cannot be used"):
        check_model(model.eval(), "the model")


def test_checkpointing_does_not_bring_the_noise_of_training_back(tmp_path):
    build("opt", RIGHT["opt"], tmp_path)
    gradients = []
    for checkpointing in (False, True):
        model = load(tmp_path, gradient_checkpointing=checkpointing)
        lora = ours.attach_lora(model, rank=2, alpha=2, targets=("q_proj", "fc1"), seed=0)
        for tensor in lora.parameters():
            torch.nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(1))
        model.train()
        # The two layers recompute in training mode only.
        assert sum(module.training for module in model.modules()) == (2 if checkpointing else 0)
        ours.final_hidden(model, torch.tensor([[3, 4, 5, 6]])).square().mean().backward()
        gradients.append([tensor.grad for tensor in lora.parameters()])
        model.eval()
        assert not any(module.training for module in model.modules())
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(checkpointed, plain)


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


LONGROPE = rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, factor=4.0)


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("phi3", {**LONGROPE, "original_max_position_embeddings": 16}, 16),
        ("llama", rope("dynamic", factor=2.0), 64),
        ("llama", rope("linear", factor=2.0), 64),
        ("llama", rope("default"), 64),
    ],
    ids=["longrope", "dynamic", "linear", "default"],
)
def test_rows_end_where_positions_would_depend_on_the_batch(family, settings, limit):
    torch.manual_seed(0)
    config = configure(family, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert context_length(model.config) == limit
    prompt = [3] * (limit - 4)
    sampler.sample(model, [prompt], sampler.SamplingParams(4), eos_ids=set())
    with pytest.raises(ValueError, match=f"valid: {limit} together"):
        sampler.sample(model, [prompt], sampler.SamplingParams(5), eos_ids=set())
    ours.final_hidden(model, torch.full((1, limit), 3))
    with pytest.raises(ValueError, match=f"context of {limit}"):
        ours.final_hidden(model, torch.full((1, limit + 1), 3))


def test_a_family_without_a_declared_context_has_no_limit():
    assert context_length(transformers.MptConfig()) > 10**9


def test_a_mixture_with_dense_layers_takes_attention_targets_only(tmp_path):
    settings = {**ROUTED, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}
    build("qwen2_moe", settings, tmp_path / "base")
    for target in ("up_proj", "mlp.down_proj"):
        with pytest.raises(ValueError, match=r"valid for this model are k_proj, o_proj, q_proj"):
            model = load(tmp_path / "base")
            ours.attach_lora(model, rank=2, alpha=2, targets=("q_proj", target), seed=0)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    model = load(tmp_path / "base")
    lora = ours.attach_lora(model, rank=2, alpha=4, targets=targets, seed=0)
    for tensor in lora.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    adapters.save_adapter(lora, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_peft = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    ids_BT = torch.arange(3, 13)[None]
    torch.testing.assert_close(model(ids_BT).logits, with_peft(ids_BT).logits)


@pytest.mark.parametrize(("family", "settings"), [("gpt2", GPT), ("falcon", {})])
def test_a_family_without_linear_layers_says_so(family, settings):
    model = AutoModelForCausalLM.from_config(configure(family, **settings))
    with pytest.raises(ValueError, match=r"has no nn\.Linear layer"):
        ours.attach_lora(model, rank=2, alpha=2, targets=("q_proj",), seed=0)


def test_the_documents_have_a_line_for_each_family_and_their_numbers():
    root = Path(__file__).parent.parent
    rooms = (root / "parts" / "README.md").read_text(encoding="utf-8")
    table = rooms.partition("| family |")[2]
    found = dict(re.findall(r"^\| (\w+) \| (right|refused)", table, re.MULTILINE))
    expected = dict.fromkeys([*REFUSED, *NOT_HONOURED], "refused") | dict.fromkeys(RIGHT, "right")
    assert found == expected
    readme = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    assert f"Of {len(expected)} families of transformers" in readme
    assert f"{len(RIGHT)} are right" in readme
