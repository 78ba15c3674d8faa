"""Completions of one prompt in one row, so that the prompt is computed once, forward and backward.

The completions of a group share their prompt. As rows of their own, each computes it again. Here
they stand behind it in one row, and each sees the prompt and itself:

    ids       p0 p1 a0 a1 b0 b1        completions a and b of one prompt
    position   0  1  2  3  2  3        as if each stood alone
    b1 sees   p0 p1       b0 b1

So every state is, to rounding, that of the completion alone, and the gradient through the prompt's
keys and values is the sum of what each completion sends back. Attention is computed over all of
the row, what nobody sees included: of long completions that costs more than the prompt saves. The
check before a run (parts/selfcheck.py) tries whether a model honours such masks.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parts.batch import additive_mask

# Positions of a packed row: attention and its mask grow with the square.
LONGEST_ROW = 2048
# Packed rows are to have this share of the plain rows' positions at most, pads among both.
LARGEST_SHARE = 0.75


def packs_of(prompts: list[list[int]], completions: list[list[int]]) -> list[list[list[int]]]:
    """Return a prompt and its completions for each packed row: neighbours with equal prompts.

    >>> packs_of([[1, 2], [1, 2], [3]], [[7], [8], [9]])
    [[[1, 2], [7], [8]], [[3], [9]]]
    """
    packs: list[list[list[int]]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if not packs or packs[-1][0] != prompt:
            packs.append([prompt])
        packs[-1].append(completion)
    return packs


def packing_pays(prompts: list[list[int]], completions: list[list[int]]) -> bool:
    """Say whether packed rows are clearly fewer positions than plain ones, and not too long."""
    pairs = zip(prompts, completions, strict=True)
    plain = len(prompts) * max(len(prompt) + len(completion) for prompt, completion in pairs)
    packs = packs_of(prompts, completions)
    longest = max(sum(map(len, pack)) for pack in packs)
    return is_worth_packing(plain, packs=len(packs), longest=longest)


def is_worth_packing(plain: int, *, packs: int, longest: int) -> bool:
    """Say the same of lengths: of packed rows, the longest of which has so many positions.

    plain  positions of the plain rows, pads among them

    >>> is_worth_packing(8 * (100 + 64), packs=1, longest=100 + 8 * 64)
    True
    """
    return longest <= LONGEST_ROW and packs * longest <= LARGEST_SHARE * plain


def packed_hidden(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
) -> Tensor:
    """Return hidden_ND, the states that predict each completion token, row after row.

    To rounding, it is what copsd.completion_hidden returns. Equal prompts are to be neighbours.
    The prompt's last state predicts the first token of each of its completions.
    """
    packs = packs_of(prompts, completions)
    width = max(sum(map(len, pack)) for pack in packs)
    ids_BT = torch.zeros(len(packs), width, dtype=torch.long)
    position_BT = torch.zeros_like(ids_BT)
    part_BT = torch.full_like(ids_BT, -1)  # 0: of the prompt; 1, 2, ...: of that completion
    predicting: list[int] = []  # places in the flattened rows
    for row, pack in enumerate(packs):
        start = 0
        for part, ids in enumerate(pack):
            place = slice(start, start + len(ids))
            first = len(pack[0]) if part else 0
            ids_BT[row, place] = torch.tensor(ids)
            position_BT[row, place] = torch.arange(first, first + len(ids))
            part_BT[row, place] = part
            if part:
                at = row * width + start
                predicting += [row * width + len(pack[0]) - 1, *range(at, at + len(ids) - 1)]
            start += len(ids)
    own_BTT = part_BT[:, :, None] == part_BT[:, None]
    seen_BTT = (own_BTT | (part_BT[:, None] == 0)).tril()
    hidden_BTD = model.base_model(
        input_ids=ids_BT.to(model.device),
        position_ids=position_BT.to(model.device),
        attention_mask=additive_mask(~seen_BTT[:, None].to(model.device), model.dtype),
        use_cache=False,
    ).last_hidden_state
    # Not by brackets: a prompt's last state is taken several times, and what flows back into it is
    # then added by several threads in whatever order they come, which rounds differently each time.
    place_N = torch.tensor(predicting, device=model.device)
    return hidden_BTD.flatten(0, 1).index_select(0, place_N)
