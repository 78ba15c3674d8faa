"""parts/attention.py: grouped heads give what repeated keys and values give."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config

from parts import attention
from parts.attention import NAME, attends_with_one_token, one_token_attention
from parts.sampler import SamplingParams, sample


@pytest.mark.parametrize("heads", [2, 6])
def test_grouped_heads_give_what_repeated_keys_and_values_give(heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 1, 8, generator=generator)
    # Views of a longer memory, as the cache hands them out.
    key, value = (torch.randn(3, 2, 9, 8, generator=generator)[:, :, :7] for _ in range(2))
    mask = torch.zeros(3, 1, 1, 7).masked_fill(
        torch.rand(3, 1, 1, 7, generator=generator) < 0.4, -1e9
    )
    found, weights = one_token_attention(None, query, key, value, mask, scaling=0.3, dropout=0.0)
    repeated = (tensor.repeat_interleave(heads // 2, dim=1) for tensor in (key, value))
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert weights is None


def test_it_takes_the_place_of_sdpa_alone_and_gives_it_back():
    config = Qwen2Config()
    for name, within in (("sdpa", NAME), ("eager", "eager")):
        config._attn_implementation = name
        with attends_with_one_token(config):
            assert config._attn_implementation == within
        with pytest.raises(RuntimeError, match="inside"), attends_with_one_token(config):
            raise RuntimeError("inside")
        assert config._attn_implementation == name


def test_every_step_of_sampling_but_the_prompts_attends_so(tiny_model, monkeypatch):
    heads: list[tuple[int, int]] = []

    def watched(query, key, *rest, **options):
        heads.append((query.shape[1], key.shape[1]))
        return scaled_dot_product_attention(query, key, *rest, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    sample(tiny_model, [[5, 6, 7], [8]], SamplingParams(4), eos_ids=set())
    config = tiny_model.config
    own = config.num_key_value_heads
    assert own < config.num_attention_heads
    assert heads == [(own, own)] * 3 * config.num_hidden_layers
