"""Completions in one row behind their prompt are what they are alone: states, gradients."""

import pytest
import torch
from conftest import build_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from copsd import completion_hidden
from kernels import chunked_logprob
from parts.lora import attach_lora
from parts.microbatch import Limit, micro_batches
from parts.model import head_weight, load_model
from parts.packing import LONGEST_ROW, packed_hidden, packing_pays, packs_of
from parts.sampler import Rollout

PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[11, 12]] * 2 + [[5, 6, 7, 8, 9]]
COMPLETIONS = [[20, 21, 22], [30], [20, 23, 24, 25], [40, 41], [42], [50, 51]]


def test_states_are_those_of_each_completion_alone(tiny_model):
    plain_ND = completion_hidden(tiny_model, PROMPTS, COMPLETIONS)
    packed_ND = packed_hidden(tiny_model, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(packed_ND, plain_ND, atol=1e-5, rtol=1e-5)
    assert len(plain_ND) == sum(map(len, COMPLETIONS))


def test_a_completion_does_not_see_its_neighbours(tiny_model):
    changed = [[60, 61, 62], *COMPLETIONS[1:]]
    before = packed_hidden(tiny_model, PROMPTS, COMPLETIONS)
    after = packed_hidden(tiny_model, PROMPTS, changed)
    assert torch.equal(before[3:], after[3:]), "those of the other completions"
    assert not torch.allclose(before[1:3], after[1:3])


class AddsInAnyOrder(TorchDispatchMode):
    """Counts additions that several threads of a CPU make in the order in which they come."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        accumulates = "index_put" in function.name() and (args[3:] or [False])[0]
        if accumulates and (place_N := args[1][0]).unique().numel() < place_N.numel():
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_the_gradient_is_added_up_in_one_order(tiny_model):
    with AddsInAnyOrder() as watched:
        packed_hidden(tiny_model, PROMPTS, COMPLETIONS).sum().backward()
    assert watched.count == 0
    with AddsInAnyOrder() as watched:  # the same, as brackets do it
        torch.zeros(3, requires_grad=True)[torch.tensor([0, 0])].sum().backward()
    assert watched.count == 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_log_probs_and_gradients_are_those_of_plain_rows(lab_folder, checkpointed):
    model = load_model(
        lab_folder, device="cpu", dtype=torch.float32, gradient_checkpointing=checkpointed
    )
    lora = attach_lora(model, rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    model.train()
    ids_N = torch.tensor([token for completion in COMPLETIONS for token in completion])
    weight_N = torch.linspace(-1, 2, len(ids_N))
    found = []
    for read in (completion_hidden, packed_hidden):
        hidden_ND = read(model, PROMPTS, COMPLETIONS)
        logprob_N, _ = chunked_logprob(hidden_ND, head_weight(model), ids_N, chunk_tokens=5)
        (logprob_N * weight_N).sum().backward()
        gradient = torch.cat([t.grad.flatten() for t in lora.parameters() if t.grad is not None])
        found.append((logprob_N.detach(), gradient))
        for tensor in lora.parameters():
            tensor.grad = None
    (plain_N, plain), (packed_N, packed) = found
    torch.testing.assert_close(packed_N, plain_N, atol=1e-4, rtol=0)
    torch.testing.assert_close(packed, plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-4)


def test_it_is_asked_for_where_prompts_are_shared_and_completions_short():
    prompt = [5] * 100
    assert packing_pays([prompt] * 8, [[7] * 64] * 8)
    assert not packing_pays([prompt] * 8, [[7] * 400] * 8), "the prompts save too little"
    uneven = [[7] * 10] * 3 + [[7] * 90]
    assert packing_pays([[5] * 10] * 4, uneven), "plain rows are padded to the longest"
    long = LONGEST_ROW // 8
    assert not packing_pays([[5] * 1000] * 8, [[7] * long] * 8), "the row grows too long"
    assert not packing_pays([[number] * 100 for number in range(8)], [[7] * 64] * 8)


def test_rows_of_one_prompt_stay_together_in_micro_batches():
    prompts = [[1] * 9, [2] * 9, [1] * 9, [2] * 9]
    rollouts = [
        Rollout(prompt, [7] * new, [0.0] * new, "stop")
        for prompt, new in zip(prompts, (4, 3, 2, 1), strict=True)
    ]
    assert micro_batches(rollouts, Limit(2)) == [[0, 1], [2, 3]]
    assert micro_batches(rollouts, Limit(2), together=True) == [[0, 2], [1, 3]]
    assert [len(pack) - 1 for pack in packs_of(prompts, [[7]] * 4)] == [1, 1, 1, 1]


def test_a_model_with_other_positions_is_packed_alike():
    model = build_tiny_model(seed=3, num_key_value_heads=4, rope_theta=100.0)
    plain_ND = completion_hidden(model, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(
        packed_hidden(model, PROMPTS, COMPLETIONS), plain_ND, atol=1e-5, rtol=1e-5
    )
