"""kernels.reduce_loss: the mean of a step over its tokens or its rows; a token may have a weight.

test_kernels.py holds the losses that go into it.
"""

import itertools

import pytest
import torch

import kernels


@pytest.mark.parametrize(
    "reduction, by_hand", [("token", 29 / 10), ("trajectory", (2 + 8 + 2 + 3.5) / 4)]
)
def test_every_micro_batch_split_gives_one_loss_and_one_gradient(
    reduction: str, by_hand: float
) -> None:
    lengths = [3, 1, 4, 2]
    value_N = torch.tensor([1.0, 2, 3, 8, 1, 1, 2, 4, 3, 4], dtype=torch.float64)
    results = set()
    for cuts in itertools.product([False, True], repeat=3):
        loss_N = value_N.clone().requires_grad_()
        total = 0.0
        start = 0
        rows = []
        for index, length in enumerate(lengths):
            rows.append(length)
            if index < 3 and not cuts[index]:
                continue
            part_N = loss_N[start : start + sum(rows)]
            share = kernels.reduce_loss(
                part_N, rows, reduction=reduction, step_tokens=10, step_rows=4
            )
            share.backward()
            total += share.item()
            start += sum(rows)
            rows = []
        assert loss_N.grad is not None
        results.add((round(total, 12), tuple(loss_N.grad.mul(1e12).round().tolist())))
    assert len(results) == 1
    assert results.pop()[0] == pytest.approx(by_hand)


@pytest.mark.parametrize("reduction", ["token", "trajectory"])
def test_unit_weights_are_the_unweighted_loss_bit_for_bit(reduction):
    torch.manual_seed(0)
    lengths = [5, 1, 7]
    mean = {"reduction": reduction, "step_tokens": 13, "step_rows": 3}
    gradients = []
    for weight_N in (None, torch.ones(13)):
        loss_N = torch.linspace(-1, 2, 13).requires_grad_()
        loss = kernels.reduce_loss(loss_N, lengths, weight_N=weight_N, **mean)
        gradients.append((loss, torch.autograd.grad(loss, loss_N)[0]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("reduction", ["token", "trajectory"])
def test_the_gradient_of_a_weighted_loss_is_autograds_of_the_plain_one(kind, reduction):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_ND = draw(9, 4).requires_grad_()
    teacher_ND = draw(9, 4)
    head_VD = draw(11, 4)
    weight_N = torch.rand(9, generator=generator, dtype=torch.float64)
    lengths = [2, 6, 1]
    loss_N, _ = kernels.chunked_divergence(
        student_ND, teacher_ND, head_VD, kind=kind, chunk_tokens=4, compile=False
    )
    mean = {"reduction": reduction, "step_tokens": 20, "step_rows": 5}
    loss = kernels.reduce_loss(loss_N, lengths, weight_N=weight_N, **mean)
    (found_ND,) = torch.autograd.grad(loss, student_ND)
    plain_N = kernels.divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, kind=kind)
    rows = plain_N.split(lengths)
    weights = weight_N.split(lengths)
    shares = [
        (row * weight).sum() / (20 if reduction == "token" else 5 * len(row))
        for row, weight in zip(rows, weights, strict=True)
    ]
    total = torch.stack(shares).sum()
    (expected_ND,) = torch.autograd.grad(total, student_ND)
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(found_ND, expected_ND)


def test_weights_carry_no_gradient_and_there_is_one_for_each_token():
    weight_N = torch.ones(3, requires_grad=True)
    mean = {"reduction": "token", "step_tokens": 3, "step_rows": 1}
    loss = kernels.reduce_loss(torch.ones(3, requires_grad=True), [3], weight_N=weight_N, **mean)
    loss.backward()
    assert weight_N.grad is None
    with pytest.raises(ValueError, match="a weight for each token"):
        kernels.reduce_loss(torch.ones(3), [3], weight_N=torch.ones(1), **mean)
