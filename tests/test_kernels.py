"""The divergences and log-probs: each claim against its definition in fp64, by other operations.

test_reduce_loss.py holds the mean of a step, and test_clip_products.py how far a clip turns the
gradient.
"""

import doctest
import itertools
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels

CASES = list(itertools.product(kernels.KINDS, kernels.CLIP_MODES))
# Each clips some tokens or entries of the inputs below, and not all.
CLIPS = {"none": None, "entry": 0.05, "token": 0.6}
N, D, V = 13, 8, 31
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return student_ND with a gradient, teacher_ND and head_VD."""
    generator = torch.Generator().manual_seed(0)
    student_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    teacher_ND = student_ND + 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return student_ND.to(dtype).requires_grad_(), teacher_ND.to(dtype), head_VD.to(dtype)


def options(kind: str, clip_mode: str) -> dict:
    """Return one case's arguments, none of them at its default."""
    return {
        "kind": kind,
        "beta": 0.3,
        "temperature": 1.3,
        "clip_mode": clip_mode,
        "clip": CLIPS[clip_mode],
    }


def oracle(
    student_NV: Tensor, teacher_NV: Tensor, *, kind, beta, temperature, clip_mode, clip
) -> Tensor:
    """Return loss_N from explicit probabilities in fp64."""
    q = Categorical(logits=student_NV.double() / temperature)
    p = Categorical(logits=teacher_NV.double() / temperature)
    mixture = beta * p.probs + (1 - beta) * q.probs
    terms_NV = {
        "forward_kl": lambda: p.probs * torch.log(p.probs / q.probs),
        "reverse_kl": lambda: q.probs * torch.log(q.probs / p.probs),
        "jsd": lambda: (
            beta * p.probs * torch.log(p.probs / mixture)
            + (1 - beta) * q.probs * torch.log(q.probs / mixture)
        ),
    }[kind]()
    if clip_mode == "entry":
        terms_NV = torch.where(terms_NV > clip, torch.full_like(terms_NV, clip), terms_NV)
    loss_N = terms_NV.sum(-1)
    if clip_mode == "token":
        loss_N = torch.where(loss_N > clip, torch.full_like(loss_N, clip), loss_N)
    return loss_N


def loss_and_gradient(loss_N: Tensor, variable: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses and the gradient of their weighted sum; every token weighs differently."""
    weight_N = torch.linspace(-1, 2, len(loss_N), dtype=loss_N.dtype)
    (gradient,) = torch.autograd.grad((loss_N * weight_N).sum(), variable, retain_graph=True)
    return loss_N.detach(), gradient


@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_divergence_equals_its_definition_in_value_and_gradient(kind: str, clip_mode: str) -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    student_NV = (student_ND @ head_VD.T).detach().requires_grad_()
    teacher_NV = teacher_ND @ head_VD.T
    given = options(kind, clip_mode)
    ours = loss_and_gradient(kernels.divergence(student_NV, teacher_NV, **given), student_NV)
    exact = loss_and_gradient(oracle(student_NV, teacher_NV, **given), student_NV)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 64])
@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_chunked_divergence_equals_its_definition_at_any_chunk(
    kind: str, clip_mode: str, chunk_tokens: int
) -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    loss_N, stats = kernels.chunked_divergence(
        student_ND, teacher_ND, head_VD, chunk_tokens=chunk_tokens, **options(kind, clip_mode)
    )
    exact_N = oracle(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **options(kind, clip_mode))
    ours = loss_and_gradient(loss_N, student_ND)
    exact = loss_and_gradient(exact_N, student_ND)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    kl_N = oracle(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **options(kind, "none"))
    torch.testing.assert_close(stats["kl_N"], kl_N.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_chunked_error_is_no_larger_than_the_plain_versions(
    kind: str, clip_mode: str, dtype: torch.dtype
) -> None:
    student_ND, teacher_ND, head_VD = make_inputs(dtype)
    student_NV, teacher_NV = student_ND @ head_VD.T, teacher_ND @ head_VD.T
    ours_N, _ = kernels.chunked_divergence(
        student_ND, teacher_ND, head_VD, chunk_tokens=5, **options(kind, clip_mode)
    )
    plain_N = kernels.divergence(student_NV, teacher_NV, **options(kind, clip_mode))
    exact_N = oracle(student_NV, teacher_NV, **options(kind, clip_mode))
    assert ours_N.dtype == torch.float32
    exact = loss_and_gradient(exact_N, student_ND)
    ours = loss_and_gradient(ours_N, student_ND)
    plain = loss_and_gradient(plain_N, student_ND)
    for ours_tensor, plain_tensor, exact_tensor in zip(ours, plain, exact, strict=True):
        our_error = (ours_tensor.double() - exact_tensor.double()).abs().max()
        plain_error = (plain_tensor.double() - exact_tensor.double()).abs().max()
        rounding = 4 * torch.finfo(ours_tensor.dtype).eps * exact_tensor.abs().max()
        assert our_error <= plain_error + rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_in_16_bits_the_error_to_fp64_is_no_larger_than_the_plain_versions(
    kind: str, clip_mode: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    student_ND = torch.randn(300, 24, generator=generator)
    teacher_ND = (student_ND + 0.5 * torch.randn(300, 24, generator=generator)).to(dtype)
    head_VD = (0.5 * torch.randn(200, 24, generator=generator)).to(dtype)
    student_ND = student_ND.to(dtype).requires_grad_()
    exact_ND = student_ND.detach().double().requires_grad_()
    given = options(kind, clip_mode)
    # In fp64 from the same 16-bit states on, so that rounded logits count as an error.
    exact_N = oracle(
        exact_ND @ head_VD.double().T, teacher_ND.double() @ head_VD.double().T, **given
    )
    plain_N = kernels.divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **given)
    ours_N, _ = kernels.chunked_divergence(
        student_ND, teacher_ND, head_VD, chunk_tokens=64, **given
    )
    exact = loss_and_gradient(exact_N, exact_ND)
    ours = loss_and_gradient(ours_N, student_ND)
    plain = loss_and_gradient(plain_N, student_ND)
    for ours_tensor, plain_tensor, exact_tensor in zip(ours, plain, exact, strict=True):
        our_error = (ours_tensor.double() - exact_tensor).norm()
        plain_error = (plain_tensor.double() - exact_tensor).norm()
        # Where both round at random, the larger of two like errors is larger by percent.
        assert 0 < our_error <= 1.05 * plain_error


def test_gradcheck_of_the_closed_form() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    for kind in kernels.KINDS:
        assert torch.autograd.gradcheck(
            lambda hidden_ND, kind=kind: kernels.chunked_divergence(
                hidden_ND, teacher_ND, head_VD, kind=kind
            )[0],
            student_ND,
        )


@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_equal_hidden_states_give_exactly_zero(kind: str, clip_mode: str) -> None:
    student_ND, _, head_VD = make_inputs(torch.float32)
    loss_N, stats = kernels.chunked_divergence(
        student_ND, student_ND.detach(), head_VD, chunk_tokens=5, **options(kind, clip_mode)
    )
    loss_N, gradient_ND = loss_and_gradient(loss_N, student_ND)
    assert loss_N.eq(0).all() and gradient_ND.eq(0).all() and stats["clipped_frac"] == 0
    logits_NV = student_ND.detach() @ head_VD.T
    assert kernels.divergence(logits_NV, logits_NV, **options(kind, clip_mode)).eq(0).all()


def test_kinds_point_the_way_they_say() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    q = Categorical(logits=(student_ND @ head_VD.T).detach())
    p = Categorical(logits=teacher_ND @ head_VD.T)

    def measure(kind: str, beta: float = 0.5) -> Tensor:
        return kernels.divergence(q.logits, p.logits, kind=kind, beta=beta)

    torch.testing.assert_close(measure("forward_kl"), kl_divergence(p, q))
    torch.testing.assert_close(measure("reverse_kl"), kl_divergence(q, p))
    torch.testing.assert_close(measure("jsd", 1e-6) / 1e-6, kl_divergence(p, q), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        measure("jsd", 1 - 1e-6) / 1e-6, kl_divergence(q, p), rtol=1e-3, atol=0
    )


def test_entry_clip_gradient_is_the_formula_of_the_docstring() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    student_NV = (student_ND @ head_VD.T).detach().requires_grad_()
    teacher_NV = teacher_ND @ head_VD.T
    loss_N = kernels.divergence(
        student_NV, teacher_NV, kind="forward_kl", clip_mode="entry", clip=0.05
    )
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    q_NV = student_NV.detach().softmax(-1)
    p_NV = teacher_NV.softmax(-1)
    unclipped_NV = p_NV * (p_NV / q_NV).log() <= 0.05
    assert 0 < unclipped_NV.sum() < unclipped_NV.numel()
    mass_N1 = (p_NV * unclipped_NV).sum(-1, keepdim=True)
    expected_NV = mass_N1 * (q_NV - p_NV * unclipped_NV / mass_N1)
    torch.testing.assert_close(gradient_NV, expected_NV)


@pytest.mark.parametrize("clip_mode", kernels.CLIP_MODES)
@pytest.mark.parametrize("kind", kernels.KINDS)
def test_stats_are_what_they_say_and_carry_no_gradient(kind: str, clip_mode: str) -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    given = options(kind, clip_mode)
    _, stats = kernels.chunked_divergence(student_ND, teacher_ND, head_VD, chunk_tokens=5, **given)
    student_NV, teacher_NV = student_ND @ head_VD.T, teacher_ND @ head_VD.T
    q = Categorical(logits=student_NV / 1.3)
    p = Categorical(logits=teacher_NV / 1.3)
    assert set(stats) == {"kl_N", "clipped_frac", "teacher_entropy_N", "student_entropy_N"}
    torch.testing.assert_close(stats["teacher_entropy_N"], p.entropy())
    torch.testing.assert_close(stats["student_entropy_N"], q.entropy().detach())
    clipped_N = oracle(student_NV, teacher_NV, **given) < oracle(
        student_NV, teacher_NV, **options(kind, "none")
    )
    assert stats["clipped_frac"].item() == pytest.approx(clipped_N.double().mean().item())
    assert not any(tensor.requires_grad for tensor in stats.values())


def test_only_the_student_gets_a_gradient() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    teacher_ND.requires_grad_()
    head_VD.requires_grad_()
    kernels.chunked_divergence(student_ND, teacher_ND, head_VD, kind="jsd")[0].sum().backward()
    assert student_ND.grad is not None and teacher_ND.grad is None and head_VD.grad is None
    logits_NV = [torch.randn(3, 5, requires_grad=True) for _ in range(2)]
    kernels.divergence(*logits_NV, kind="jsd").sum().backward()
    assert logits_NV[0].grad is not None and logits_NV[1].grad is None


def test_without_a_gradient_the_loss_is_the_same_and_the_third_product_is_skipped() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    with_gradient_N, _ = kernels.chunked_divergence(
        student_ND, teacher_ND, head_VD, kind="jsd", chunk_tokens=5
    )
    with torch.no_grad(), _Products() as products:
        loss_N, _ = kernels.chunked_divergence(
            student_ND, teacher_ND, head_VD, kind="jsd", chunk_tokens=5
        )
    assert torch.equal(loss_N, with_gradient_N) and not loss_N.requires_grad
    assert products.count == 6  # three chunks, two products each


def test_the_rows_of_a_chunk_are_those_given_else_256_and_1024_compiled_on_cuda() -> None:
    def rows(chunk_tokens: int | None) -> list[int]:
        return [
            kernels.chunk_rows(chunk_tokens, compiled=compiled, device_type=device_type)
            for compiled in (False, True)
            for device_type in ("cpu", "mps", "cuda")
        ]

    assert rows(None) == [256, 256, 256, 256, 256, 1024]
    assert rows(7) == [7] * 6 and rows(256) == [256] * 6
    assert kernels.chunk_rows(None) == 256
    # Whether to compile is not asked of the rows that compiled code then takes.
    assert not kernels.compiling_pays(None, 2**14 - 1) and kernels.compiling_pays(None, 2**14)
    assert not kernels.compiling_pays(1024, 2**12 - 1) and kernels.compiling_pays(1024, 2**12)


@pytest.mark.parametrize("compile", [False, True])
def test_the_rows_are_asked_for_the_device_of_the_head(compile: bool, monkeypatch) -> None:
    asked = []
    rows = kernels.chunk_rows
    monkeypatch.setattr(kernels, "chunk_rows", lambda n, **how: asked.append(how) or rows(n, **how))
    monkeypatch.setattr(kernels, "_compiled_if", lambda function, _: function)
    inputs = [tensor.to("meta") for tensor in make_inputs()]
    kernels.chunked_divergence(*inputs, kind="jsd", compile=compile)
    assert asked[-1] == {"compiled": compile, "device_type": "meta"}


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=needs_compiler)], ids=["eager", "compiled"]
)
def test_without_a_number_of_rows_a_cpu_computes_what_it_does_with_256(
    compile: bool, monkeypatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # More tokens than 1024, so that other chunks would be seen, and no multiple of 256.
    student_ND, teacher_ND = torch.randn(2, 1100, D, generator=generator)
    student_ND.requires_grad_()
    head_VD = torch.randn(V, D, generator=generator)
    given = options("jsd", "entry")
    ids_N = torch.arange(1100) % V
    walk = kernels._walk_chunks
    walked = []
    monkeypatch.setattr(kernels, "_walk_chunks", lambda *a: walked.append(a[4]) or walk(*a))

    def compute(chunk_tokens: int | None) -> tuple[list[Tensor], int]:
        """Return all results and gradients, and the products of what never is compiled."""
        chunk: Any = {} if chunk_tokens is None else {"chunk_tokens": chunk_tokens}
        inputs = student_ND, teacher_ND, head_VD
        loss_N, stats = kernels.chunked_divergence(*inputs, compile=compile, **chunk, **given)
        with _Products() as products:
            products_3N = kernels.clip_products(*inputs, **chunk, **given)
            scores = kernels.chunked_logprob(student_ND, head_VD, ids_N, **chunk)
        sums = loss_N.sum(), scores[0].sum() + 2 * scores[1].sum()
        gradients = [torch.autograd.grad(found, student_ND)[0] for found in sums]
        return [loss_N, *stats.values(), products_3N, *scores, *gradients], products.count

    (unsaid, count), (said, same_count) = compute(None), compute(256)
    assert all(torch.equal(one, other) for one, other in zip(unsaid, said, strict=True))
    assert walked == [256, 256] and count == same_count == 5 * 3


class _Products(TorchDispatchMode):
    """Count matrix products and remember the most elements any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += "mm" in str(func)
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_divergence_never_holds_more_than_one_chunk_of_logits(kind: str, clip_mode: str) -> None:
    student_ND, teacher_ND, head_VD = make_inputs(torch.float32)
    with _Products() as products:
        loss_N, _ = kernels.chunked_divergence(
            student_ND, teacher_ND, head_VD, chunk_tokens=5, **options(kind, clip_mode)
        )
        loss_N.sum().backward()
    assert products.largest == max(5 * V, V * D) and products.count == 9


def test_logprob_never_holds_more_than_one_chunk_of_logits() -> None:
    hidden_ND, _, _ = make_inputs(torch.float32)
    head_VD = torch.randn(2000, D)  # so wide that a chunk of logits outweighs the head
    with _Products() as products:
        logprob_N, _ = kernels.chunked_logprob(hidden_ND, head_VD, torch.arange(N), chunk_tokens=9)
        logprob_N.sum().backward()
    assert products.largest == 9 * 2000


def test_non_contiguous_hidden_states_and_an_empty_batch_work() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    strided = [
        torch.stack([tensor, tensor], dim=-1)[..., 0]
        for tensor in (student_ND, teacher_ND, head_VD)
    ]
    assert not any(tensor.is_contiguous() for tensor in strided)
    loss_N, _ = kernels.chunked_divergence(*strided, kind="forward_kl", chunk_tokens=5)
    given = {**options("forward_kl", "none"), "temperature": 1}
    exact_N = oracle(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **given)
    torch.testing.assert_close(
        loss_and_gradient(loss_N, student_ND), loss_and_gradient(exact_N, student_ND)
    )
    empty_N, stats = kernels.chunked_divergence(
        student_ND[:0], teacher_ND[:0], head_VD, kind="forward_kl"
    )
    empty_N.sum().backward()
    assert empty_N.shape == (0,) and stats["clipped_frac"] == 0 and stats["kl_N"].shape == (0,)
    logprob_N, entropy_N = kernels.chunked_logprob(
        student_ND[:0], head_VD, torch.zeros(0, dtype=torch.int64)
    )
    assert logprob_N.shape == entropy_N.shape == (0,)


@pytest.mark.parametrize("kind, clip_mode", CASES)
def test_extreme_logits_give_finite_numbers(kind: str, clip_mode: str) -> None:
    student_ND = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 1e4]], requires_grad=True)
    teacher_ND = torch.tensor([[-1e4, 1e4], [-1e4, 1e4], [1e4, 0.0]])
    head_VD = torch.eye(2)
    chunked_N, stats = kernels.chunked_divergence(
        student_ND, teacher_ND, head_VD, **options(kind, clip_mode)
    )
    plain_N = kernels.divergence(student_ND, teacher_ND, **options(kind, clip_mode))
    for loss_N in (chunked_N, plain_N):
        loss_N, gradient_ND = loss_and_gradient(loss_N, student_ND)
        assert loss_N.isfinite().all() and gradient_ND.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in stats.values())
    torch.testing.assert_close(chunked_N, plain_N)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 64])
def test_logprob_and_entropy_equal_their_definition_in_value_and_gradient(
    chunk_tokens: int,
) -> None:
    hidden_ND, _, head_VD = make_inputs()
    ids_N = torch.arange(N) * 2
    for index, name in enumerate(("logprob", "entropy")):
        exact = Categorical(logits=hidden_ND @ head_VD.T / 1.3)
        exact_N = exact.log_prob(ids_N) if name == "logprob" else exact.entropy()
        ours = kernels.chunked_logprob(
            hidden_ND, head_VD, ids_N, temperature=1.3, chunk_tokens=chunk_tokens
        )
        torch.testing.assert_close(
            loss_and_gradient(ours[index], hidden_ND), loss_and_gradient(exact_N, hidden_ND)
        )


@pytest.mark.parametrize(
    "change, named",
    [
        ({"kind": "kl"}, "forward_kl, reverse_kl, jsd"),
        ({"clip_mode": "row"}, "none, entry, token"),
        ({"clip_mode": "entry"}, "positive clip"),
        ({"clip_mode": "token", "clip": 0.0}, "positive clip"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kind": "jsd", "beta": 0.0}, "forward_kl and reverse_kl"),
        ({"kind": "jsd", "beta": 1.0}, "forward_kl and reverse_kl"),
        ({"chunk_tokens": 0}, "at least 1"),
    ],
)
def test_bad_options_are_errors_that_name_the_valid_ones(change: dict, named: str) -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    given = {"kind": "forward_kl", **change}
    with pytest.raises(ValueError, match=named):
        kernels.chunked_divergence(student_ND, teacher_ND, head_VD, **given)
    if "chunk_tokens" not in change:
        with pytest.raises(ValueError, match=named):
            kernels.divergence(student_ND, teacher_ND, **given)


def test_mismatched_shapes_and_unknown_reductions_are_errors() -> None:
    student_ND, teacher_ND, head_VD = make_inputs()
    with pytest.raises(ValueError, match=r"one \[N, V\]"):
        kernels.divergence(student_ND, teacher_ND[1:], kind="forward_kl")
    for wrong in ((student_ND, teacher_ND[1:], head_VD), (student_ND, teacher_ND, head_VD[:, 1:])):
        with pytest.raises(ValueError, match=r"hidden states must be \[N, D\]"):
            kernels.chunked_divergence(*wrong, kind="forward_kl")
    with pytest.raises(ValueError, match=r"ids must be \[N\]"):
        kernels.chunked_logprob(student_ND, head_VD, torch.zeros(N + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature must be positive"):
        kernels.chunked_logprob(
            student_ND, head_VD, torch.zeros(N, dtype=torch.int64), temperature=-1.0
        )
    with pytest.raises(ValueError, match="token, trajectory"):
        kernels.reduce_loss(torch.ones(2), [2], reduction="mean", step_tokens=2, step_rows=1)
    with pytest.raises(ValueError, match="2 tokens"):
        kernels.reduce_loss(torch.ones(2), [3], reduction="token", step_tokens=2, step_rows=1)


@needs_compiler
def test_compiled_chunks_agree_and_are_compiled_once() -> None:
    student_ND, teacher_ND, head_VD = make_inputs(torch.float32)
    given = {"chunk_tokens": 5, "clip_mode": "entry"}

    def compare(tokens: int, kind: str, **change) -> None:
        both = []
        for compile in (True, False):
            loss_N, _ = kernels.chunked_divergence(
                student_ND[:tokens],
                teacher_ND[:tokens],
                head_VD,
                kind=kind,
                compile=compile,
                **given,
                **change,
            )
            both.append(loss_and_gradient(loss_N, student_ND))
        torch.testing.assert_close(*both)

    compare(13, "jsd", clip=0.01, temperature=1.3, beta=0.3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (1, 2, 5, 7, 12):
            compare(tokens, "jsd", clip=0.01, temperature=1.3, beta=0.3)
        compare(13, "jsd", clip=0.02, temperature=1.0, beta=0.7)


def test_where_compiling_fails_it_is_said_once_and_the_loss_is_the_same() -> None:
    script = """
import warnings, torch, kernels
student_ND, teacher_ND, head_VD = torch.randn(3, 2), torch.randn(3, 2), torch.randn(2**14, 2)
given = student_ND, teacher_ND, head_VD
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [kernels.chunked_divergence(*given, kind="jsd")[0] for _ in range(2)]
assert sum("divergences run eagerly" in str(warning.message) for warning in caught) == 1
plain_N = kernels.divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, kind="jsd")
torch.testing.assert_close(losses[0], plain_N)
"""
    root = Path(__file__).resolve().parent.parent
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, check=True)


def test_the_examples_in_the_docstrings_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = doctest.testmod(kernels)
    assert results.attempted > 0 and results.failed == 0
