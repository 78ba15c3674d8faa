"""kernels.clip_products: by how much the clip turns the gradient, against autograd's in fp64.

test_kernels.py holds the clipped losses themselves, and the inputs and the oracle used here.
"""

import math
from typing import Any

import pytest
import torch
from test_kernels import CASES, make_inputs, options, oracle

import kernels


@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_the_clips_cosine_is_that_of_autograds_gradients_on_the_logits(
    kind: str, clip_mode: str, chunk_tokens: int
) -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    student_NV = (student_ND @ head_VD.T).detach().requires_grad_()
    given: dict[str, Any] = options(kind, clip_mode) | (
        {"clip": 0.1} if clip_mode == "token" else {}
    )
    gradients = {}
    for mode in {"none", clip_mode}:
        exact_N = oracle(student_NV, teacher_ND @ head_VD.T, **{**given, "clip_mode": mode})
        (gradients[mode],) = torch.autograd.grad(exact_N.sum(), student_NV)
    clipped_NV = gradients[clip_mode]
    plain_NV = gradients["none"]
    products_3N = kernels.clip_products(
        student_ND, teacher_ND, head_VD, chunk_tokens=chunk_tokens, **given
    )
    exact_3N = torch.stack(
        [(a * b).sum(-1) for a, b in ((clipped_NV, plain_NV), (clipped_NV, clipped_NV))]
        + [(plain_NV * plain_NV).sum(-1)]
    )
    unscaled_3N = exact_3N * given["temperature"] ** 2  # the factor 1 / T is left out: it cancels
    torch.testing.assert_close(products_3N, unscaled_3N, rtol=1e-9, atol=1e-12)
    assert not products_3N.requires_grad and products_3N.dtype == torch.float64
    cosine = torch.cosine_similarity(clipped_NV.flatten(), plain_NV.flatten(), dim=0)
    assert kernels.gradient_cosine(products_3N) == pytest.approx(cosine.item(), abs=1e-10)
    if clip_mode == "none":
        assert kernels.gradient_cosine(products_3N) == pytest.approx(1, abs=1e-12)
    else:
        assert cosine < 0.99, "the case must turn the gradient to tell anything"


def test_the_cosine_of_micro_batches_joined_is_that_of_the_step_and_of_no_gradient_is_nan() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    given: dict[str, Any] = {"kind": "forward_kl", "clip_mode": "entry", "clip": 0.05}
    whole_3N = kernels.clip_products(student_ND, teacher_ND, head_VD, **given)
    parts = [
        kernels.clip_products(student_ND[rows], teacher_ND[rows], head_VD, **given)
        for rows in (slice(0, 4), slice(4, None))
    ]
    joined = kernels.gradient_cosine(torch.cat(parts, dim=1))
    assert joined == pytest.approx(kernels.gradient_cosine(whole_3N), abs=1e-12)
    same_3N = kernels.clip_products(student_ND, student_ND.detach(), head_VD, **given)
    assert math.isnan(kernels.gradient_cosine(same_3N))
    with pytest.raises(ValueError, match="needs a positive clip"):
        kernels.clip_products(student_ND, teacher_ND, head_VD, **{**given, "clip": None})


def test_the_mixture_of_jsd_is_half_and_half_unless_said() -> None:
    inputs = make_inputs()
    given: dict[str, Any] = {"kind": "jsd", "clip_mode": "entry", "clip": 0.05}
    unsaid_3N = kernels.clip_products(*inputs, **given)
    half_3N = kernels.clip_products(*inputs, beta=0.5, **given)
    third_3N = kernels.clip_products(*inputs, beta=0.3, **given)
    assert torch.equal(unsaid_3N, half_3N) and not torch.equal(unsaid_3N, third_3N)
