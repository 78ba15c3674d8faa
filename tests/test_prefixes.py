"""Prompts whose keys and values are kept: the states are those of the plain way, within a bound."""

import pytest
import torch
from test_sampler import random_prompts
from transformers import OPTConfig, OPTForCausalLM

from copsd import completion_hidden
from parts import prefixes
from parts.prefixes import KeptPrompts

PROMPTS = random_prompts(9, 2, 14, 5)
COMPLETIONS = [[7, 8, 9], [3], [11, 12, 13, 14, 15, 2], [4, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_states_are_those_of_a_plain_forward(tiny_model, attention):
    tiny_model.set_attn_implementation(attention)
    plain_ND = completion_hidden(tiny_model, PROMPTS, COMPLETIONS).detach()
    kept = KeptPrompts()
    for _ in range(2):  # computed, and then read
        found_ND = kept.completion_hidden(tiny_model, PROMPTS, COMPLETIONS)
        torch.testing.assert_close(found_ND, plain_ND, atol=1e-5, rtol=1e-5)
    assert len(kept.kept) == 4 and not found_ND.requires_grad


def test_a_kept_prompt_is_computed_once(tiny_model):
    shapes = []
    tiny_model.model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    kept = KeptPrompts()
    for _ in range(3):
        kept.completion_hidden(tiny_model, PROMPTS, COMPLETIONS)
    # Alone and without its last id, which goes with the completion.
    assert shapes == [(1, 8), (1, 1), (1, 13), (1, 4), (4, 6), (4, 6), (4, 6)]


def test_what_is_kept_is_bounded_and_changes_no_bit(tiny_model, monkeypatch):
    """A stopped run goes on with nothing kept and meets the prompts in another order."""
    free = KeptPrompts()
    expected = free.completion_hidden(tiny_model, PROMPTS, COMPLETIONS)
    # Two layers, keys and values, two heads of eight numbers of four bytes.
    assert free.bytes == sum(len(prompt) - 1 for prompt in PROMPTS) * 2 * 2 * 2 * 8 * 4
    for limit in (0, 1000, 2000, 3000):
        monkeypatch.setattr(prefixes, "KEPT_BYTES", limit)
        for first in ([0, 1, 2, 3], [2, 1], [3]):
            kept = KeptPrompts()
            kept.completion_hidden(
                tiny_model, [PROMPTS[row] for row in first], [COMPLETIONS[row] for row in first]
            )
            found = kept.completion_hidden(tiny_model, PROMPTS, COMPLETIONS)
            assert torch.equal(found, expected)
            assert kept.bytes <= limit
            tensors = [tensor for layers in kept.kept.values() for tensor in layers]
            assert kept.bytes == sum(tensor.nbytes for tensor in tensors)


def test_pads_behind_a_long_prompt_stay_within_the_context():
    """The longest prompt and the longest completion are of two rows, and together too long."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=300,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    model = OPTForCausalLM(config).eval()
    prompts = random_prompts(50, 6)
    completions = [[7, 8, 9], [*range(10, 60)]]
    found_ND = KeptPrompts().completion_hidden(model, prompts, completions)
    plain_ND = completion_hidden(model, prompts, completions).detach()
    torch.testing.assert_close(found_ND, plain_ND, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_one_id_is_refused(tiny_model):
    with pytest.raises(ValueError, match="two ids or more"):
        KeptPrompts().completion_hidden(tiny_model, [[5], [5, 6]], [[7], [7]])
