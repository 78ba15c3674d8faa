"""Attention of one new token a row, where several query heads share keys and values.

Grouped heads: a model with 12 query heads and 2 heads of keys and values has 6 of the former for
each of the latter. Under a mask, older releases of transformers repeat keys and values 6 times: on
an H100 that is more than half of a decode step of 32 rows, and six sevenths of one of 256. With one
token a row there is no need: the 6 queries are rows of one product with the keys that they share.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

NAME = "sdpa_of_one_token"


def one_token_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Return attention's output as [rows, 1, heads, values' size], as transformers asks for it.

    query           [rows, heads, 1, head size]
    key, value      [rows, heads of keys, columns, head size]; values may have a size of their own
    attention_mask  [rows, 1, 1, columns], is added to the scores
    scaling         the factor on the scores; None: one over the root of the head size
    """
    rows, heads, _one, size = query.shape
    grouped = query.view(rows, key.shape[1], -1, size)
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, one_token_attention)


@contextmanager
def attends_with_one_token(config: PreTrainedConfig) -> Iterator[None]:
    """Within the block, a model whose attention is sdpa uses the function above."""
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
