"""parts/narrow.py: the loss over the teacher's most likely tokens, and over the sampled one."""

from typing import Any

import pytest
import torch

from kernels import KINDS, divergence
from parts import narrow
from parts.narrow import sampled_loss, top_k_divergence

GENERATOR = torch.Generator().manual_seed(0)
STUDENT_ND = torch.randn(7, 5, generator=GENERATOR, dtype=torch.float64)
TEACHER_ND = torch.randn(7, 5, generator=GENERATOR, dtype=torch.float64)
HEAD_VD = torch.randn(13, 5, generator=GENERATOR, dtype=torch.float64)


def with_gradient(loss_of):
    student_ND = STUDENT_ND.clone().requires_grad_()
    loss_N = loss_of(student_ND)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), student_ND)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [2, 4, 13, 99])
def test_top_k_is_the_divergence_of_what_both_renormalise_on_the_teachers_entries(kind, top_k):
    options = {"kind": kind, "temperature": 1.3, "clip_mode": "entry", "clip": 0.2}
    found = with_gradient(
        lambda student_ND: top_k_divergence(
            student_ND, TEACHER_ND, HEAD_VD, top_k=top_k, chunk_tokens=3, **options
        )
    )

    def plain(student_ND):
        rows = []
        for student_D, teacher_D in zip(student_ND, TEACHER_ND, strict=True):
            teacher_V = HEAD_VD @ teacher_D
            kept = teacher_V.argsort(descending=True)[:top_k]
            logits = (HEAD_VD @ student_D)[kept].unsqueeze(0)
            rows.append(divergence(logits, teacher_V[kept].unsqueeze(0), **options))
        return torch.cat(rows)

    for one, other in zip(found, with_gradient(plain), strict=True):
        torch.testing.assert_close(one, other)
    if top_k >= 13:
        whole = with_gradient(
            lambda student_ND: divergence(student_ND @ HEAD_VD.T, TEACHER_ND @ HEAD_VD.T, **options)
        )
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one, other)


def test_without_a_number_of_rows_256_are_projected_at_a_time_on_every_device(monkeypatch):
    asked = []
    monkeypatch.setattr(narrow, "checkpoint", lambda chunk, *given, **_: chunk(*given))
    real = torch.Tensor.split
    monkeypatch.setattr(
        torch.Tensor, "split", lambda tensor, rows: asked.append(rows) or real(tensor, rows)
    )
    student_ND, teacher_ND = (tensor.repeat(100, 1) for tensor in (STUDENT_ND, TEACHER_ND))
    ids_N = torch.arange(700) % 13
    given: list[Any] = [{}, {"chunk_tokens": None}, {"chunk_tokens": 256}]
    for chunk in given:
        top_k_divergence(student_ND, teacher_ND, HEAD_VD, top_k=4, kind="jsd", **chunk)
        sampled_loss(student_ND, teacher_ND, HEAD_VD, ids_N, **chunk)
    assert set(asked) == {256} and len(asked) == 3 * (2 + 4)


def test_the_mean_of_the_sampled_loss_and_of_its_gradient_are_the_reverse_kls():
    # Over all tokens that could be sampled, each as likely as the student makes it.
    student_ND = STUDENT_ND[:1].expand(13, 5)
    q_V = (HEAD_VD @ STUDENT_ND[0]).softmax(-1)
    ids_N = torch.arange(13)

    def mean(student_1D):
        loss_N = sampled_loss(
            student_1D.expand(13, 5), TEACHER_ND[:1].expand(13, 5), HEAD_VD, ids_N, chunk_tokens=4
        )
        return loss_N @ q_V

    student_1D = student_ND[:1].clone().requires_grad_()
    found = mean(student_1D)
    exact = divergence(student_1D @ HEAD_VD.T, TEACHER_ND[:1] @ HEAD_VD.T, kind="reverse_kl").sum()
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(
        torch.autograd.grad(found, student_1D)[0], torch.autograd.grad(exact, student_1D)[0]
    )
