"""Tensor maths of both methods: divergences, log-probabilities, and how losses are reduced.

At every token of a completion a model has a distribution over its vocabulary, the tokens v that
could come next. p is the teacher's distribution and q the student's, everywhere. A divergence D
says how far apart the two are. It is zero only where p = q, and counted in nats: its logarithms are
natural ones. `divergence` is the version of the loss to read first.

    Eq. (1)  L = (1/N) sum_t D( p(.|x, x_en, s_en, y_<t) || q(.|x, y_<t) ),  N tokens t,
             D = sum_v summand_v, which for the forward KL is sum_v p_v (log p_v - log q_v)
    Eq. (2)  D = sum_v min(summand_v, clip), the entry clip, on the upper side only
    Eq. (3)  dD/dlogit_v = (g_v - q_v sum_w g_w) / T,  g_v = q_v dD/dq_v,  T the temperature;
             the gradient on the student's logits: the chain rule through softmax, our writing

Departures: the token clip caps D and not its summands; the trajectory mean is not the mean over
tokens.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint

KINDS = ("forward_kl", "reverse_kl", "jsd")
CLIP_MODES = ("none", "entry", "token")
REDUCTIONS = ("token", "trajectory")
# Rows of logits in a chunk where nobody names a number. On a CPU fewer would slow the products,
# and more cost memory: what runs eagerly keeps several fp32 tensors of a chunk.
CHUNK_ROWS = 256
# The same where the code is compiled for CUDA. With fewer rows the compiler splits each row's sum
# into kernels of its own: on an H100, 2,048 tokens over 151,936 entries in bf16 take 13.1 ms at 256
# rows, 8.5 at 512, and 6.7 at 1024 and at 2048. Compiled code keeps two 16-bit tensors of a chunk,
# 0.6 GB there.
COMPILED_CUDA_ROWS = 1024
COMPILED_LOGITS = 2**22  # of a chunk from which compiling pays


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    clip_mode: str = "none",
    clip: float | None = None,
) -> Tensor:
    """Return loss_N, the divergence between teacher p and student q at every token, in nats.

    student_logits_NV  carries the gradient; 16-bit floats are computed in fp32, fp64 stays fp64
    teacher_logits_NV  the same tokens; detached
    temperature        divides both logits; there is no factor T^2 to make up for it
    kind       forward_kl  KL(p || q), summands p_v (log p_v - log q_v). It weighs by the teacher:
                           the student must cover whatever the teacher may say
               reverse_kl  KL(q || p), summands q_v (log q_v - log p_v). It weighs by the student,
                           which must not say what the teacher would not, and may leave things out
               jsd         Jensen-Shannon, in between: how far each is from their mixture M,
                           beta KL(p || M) + (1 - beta) KL(q || M), M = beta p + (1 - beta) q,
                           0 < beta < 1, as in GKD. For beta towards 0, jsd / beta tends to
                           forward_kl; towards 1, jsd / (1 - beta) tends to reverse_kl
    clip_mode  none        `clip` is ignored
               entry       every summand becomes min(summand, clip), then they are summed, Eq. (2)
               token       the sum becomes min(D, clip)

    Logits of +-1e4 are safe; an infinite one gives NaN. Raises ValueError for an unknown name or an
    unusable number.

    The entry clip changes more than the size of the loss. Let U be the entries that are not
    clipped, p(U) the teacher's mass on them, and p_U the teacher restricted to U and renormalised.
    The gradient of forward_kl on the student's logits (T = 1) is p(U) (q - p_U). So an entry that
    the teacher wants clearly more than the student does is clipped away, and the others push it
    DOWN:

    >>> q = torch.tensor([[0.3, 0.6, 0.1]]).log().requires_grad_()
    >>> p = torch.tensor([[0.6, 0.3, 0.1]]).log()
    >>> for mode in ("none", "entry"):
    ...     loss = divergence(q, p, kind="forward_kl", clip_mode=mode, clip=0.05)
    ...     gradient = torch.autograd.grad(loss.sum(), q)[0][0].tolist()
    ...     print(mode, round(loss.item(), 2), [round(x, 2) for x in gradient])
    none 0.21 [-0.3, 0.3, 0.0]
    entry -0.16 [0.12, -0.06, -0.06]

    And the loss can fall below zero, as it does here, since only the upper side is cut.
    """
    _check_options(kind, beta, temperature, clip_mode, clip)
    if student_logits_NV.shape != teacher_logits_NV.shape:
        shapes = f"{student_logits_NV.shape} and {teacher_logits_NV.shape}"
        raise ValueError(f"logits must share one [N, V], got {shapes}")
    log_q_NV = _scale(student_logits_NV, temperature).log_softmax(-1)
    log_p_NV = _scale(teacher_logits_NV.detach(), temperature).log_softmax(-1)
    summand_NV = _summand(kind, log_p_NV, log_q_NV, beta)
    if clip_mode == "entry":
        summand_NV = summand_NV.clamp(max=clip)  # Eq. (2)
    loss_N = summand_NV.sum(-1)  # Eq. (1), D
    if clip_mode == "token":
        loss_N = loss_N.clamp(max=clip)  # not Eq. (2): a token's loss as a whole
    return loss_N


def chunked_divergence(
    student_ND: Tensor,
    teacher_ND: Tensor,
    head_VD: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    clip_mode: str = "none",
    clip: float | None = None,
    chunk_tokens: int | None = None,
    compile: bool | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, ...) without those logits.

    At 10,000 tokens over a vocabulary of 150,000 they would take 6 GB, twice, in fp32.
    student_ND    hidden states that predict the N completion tokens; carries the gradient
    teacher_ND    the same tokens under the teacher's prompt; no gradient
    head_VD       the output projection, from a hidden state to logits. It is taken as frozen and
                  gets no gradient even where it asks for one
    chunk_tokens  rows of logits alive at a time. None: 256, and 1024 where it runs compiled on CUDA
    compile       True or False. None compiles where torch.compile works and a chunk has 2**22
                  logits or more, counted with 256 rows where chunk_tokens is None
    returns       loss_N in fp32, fp64 where the head has it, and stats without gradient:
                  kl_N          the divergence of the same kind, unclipped
                  teacher_entropy_N and student_entropy_N, at `temperature`: how undecided the
                                model is, 0 nats when it is sure, log V when all tokens are alike
                  clipped_frac  the share of the N tokens whose loss the clip made smaller: with at
                                least one clipped entry, or clipped as a whole

    The gradient, Eq. (3), is taken together with the loss: three matrix products a chunk, and
    [N, D], in the head's dtype, is all that is kept for the backward pass. Equal hidden states give
    a loss and a gradient of exactly zero. Raises ValueError as `divergence` does.
    """
    _check_options(kind, beta, temperature, clip_mode, clip)
    _check_projection(head_VD, chunk_rows(chunk_tokens), student_ND, teacher_ND)
    device_type = head_VD.device.type
    compiled = compile
    if compiled is None:
        compiled = compiling_pays(chunk_tokens, len(head_VD)) and _compiler_works(device_type)
    rows = chunk_rows(chunk_tokens, compiled=compiled, device_type=device_type)
    # Compiled code needs one shape for all calls; else few tokens make do with a small chunk.
    rows = rows if compiled else min(rows, max(len(student_ND), 1))
    # As tensors: a Python number would be baked into the code, and a new one compile it again.
    dtype = torch.promote_types(head_VD.dtype, torch.float32)
    numbers = torch.tensor([temperature, beta, clip or 0.0], dtype=dtype, device=head_VD.device)
    options = _Options(kind, *numbers[:2], clip=numbers[2] if clip_mode == "entry" else None)
    scores_4N, gradient_ND = _walk_chunks(student_ND, teacher_ND, head_VD, options, rows, compiled)
    loss_N, kl_N, teacher_entropy_N, student_entropy_N = scores_4N
    # Autograd has not seen the walk, so it is told here what _gradient_ computed. The difference is
    # zero and changes no loss; its derivative is one, so gradient_ND becomes the loss's derivative.
    loss_N = loss_N + ((student_ND - student_ND.detach()).to(dtype) * gradient_ND).sum(-1)
    if clip_mode == "token":
        loss_N = loss_N.clamp(max=clip)  # not Eq. (2): as in `divergence`
    return loss_N, {
        "kl_N": kl_N,
        "teacher_entropy_N": teacher_entropy_N,
        "student_entropy_N": student_entropy_N,
        "clipped_frac": (loss_N < kl_N).sum() / max(len(loss_N), 1),
    }


def clip_products(
    student_ND: Tensor,
    teacher_ND: Tensor,
    head_VD: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    clip_mode: str,
    clip: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return products_3N, from which `gradient_cosine` says how far the clip turns the gradient.

    Let u be the gradient of a token's D on the student's logits, [V], without the clip, and c with
    it, both by Eq. (3). The rows are c.u, c.c and u.u at each token, in fp32 or fp64. A factor of
    1 / T^2, which all three share, is left out. Arguments are as in `chunked_divergence`; nothing
    carries a gradient. Rows of logits alive at a time are chunk_tokens, or 256 where it is None, as
    this runs eagerly on every device. It costs two of that function's three matrix products, so
    training asks for it at some steps only. Raises ValueError as `divergence` does.
    """
    rows = chunk_rows(chunk_tokens)
    _check_options(kind, beta, temperature, clip_mode, clip)
    _check_projection(head_VD, rows, student_ND, teacher_ND)
    dtype = torch.promote_types(head_VD.dtype, torch.float32)
    numbers = torch.tensor([temperature, beta, clip or 0.0], dtype=dtype, device=head_VD.device)
    plain = _Options(kind, *numbers[:2], clip=None)
    clipped = plain._replace(clip=numbers[2]) if clip_mode == "entry" else plain
    head_VD = head_VD.detach()
    chunks = zip(student_ND.detach().split(rows), teacher_ND.detach().split(rows), strict=True)
    products = []
    for student_CD, teacher_CD in chunks:
        student_CV = student_CD @ head_VD.T
        teacher_CV = teacher_CD @ head_VD.T
        normalisers = _normalise(student_CV, plain), _normalise(teacher_CV, plain)
        plain_CV, kl_C = _logit_gradient(student_CV, teacher_CV, normalisers, plain)
        clipped_CV, _ = _logit_gradient(student_CV, teacher_CV, normalisers, clipped)
        if clip_mode == "token":
            clipped_CV = plain_CV * (kl_C <= numbers[2]).unsqueeze(-1)
        pairs = (clipped_CV, plain_CV), (clipped_CV, clipped_CV), (plain_CV, plain_CV)
        products.append(torch.stack([(one * other).sum(-1) for one, other in pairs]))
    return torch.cat(products, dim=1)


def gradient_cosine(products_3N: Tensor) -> float:
    """Return the cosine between the clipped and the unclipped gradient on all tokens' logits.

    products_3N  of `clip_products`; those of several micro-batches may be joined along N
    1: the clip changes no direction. Below 0: a small step on the logits against the clipped
    gradient raises the unclipped divergence. nan where one of the two gradients is zero. Every
    token weighs the same, as in the mean over tokens.

    In the example of `divergence` the clip turns the gradient round:

    >>> q = torch.tensor([[0.3, 0.6, 0.1]]).log()
    >>> p = torch.tensor([[0.6, 0.3, 0.1]]).log()
    >>> kinds = {"kind": "forward_kl", "clip_mode": "entry"}
    >>> for clip in (0.05, 0.2, 0.5):
    ...     products_3N = clip_products(q, p, torch.eye(3), clip=clip, **kinds)
    ...     print(clip, round(gradient_cosine(products_3N), 2))
    0.05 -0.87
    0.2 -0.87
    0.5 1.0
    """
    dot, clipped_square, plain_square = products_3N.double().sum(-1).tolist()
    lengths = math.sqrt(clipped_square) * math.sqrt(plain_square)
    return dot / lengths if lengths > 0 else math.nan


def chunked_logprob(
    hidden_ND: Tensor,
    head_VD: Tensor,
    ids_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return logprob_N of the chosen ids and entropy_N of their distributions, in nats.

    hidden_ND     hidden states at t-1, predicting ids_N at t; carries the gradient of both results
    head_VD       the output projection, taken as frozen; logits are divided by `temperature`
    ids_N         int64, the tokens that were chosen
    chunk_tokens  rows of logits alive at a time. None: 256 on every device, as it runs eagerly

    The backward pass projects each chunk again instead of keeping its logits. Raises ValueError as
    `divergence` does.
    """
    rows = chunk_rows(chunk_tokens)
    _check_options("forward_kl", 0.5, temperature, "none", None)
    _check_projection(head_VD, rows, hidden_ND)
    if ids_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"ids must be [N] for {len(hidden_ND)} hidden states, got {list(ids_N.shape)}"
        )
    head_VD = head_VD.detach()
    pairs = zip(hidden_ND.split(rows), ids_N.split(rows), strict=True)
    chunks = [
        checkpoint(_logprob_chunk, hidden_CD, head_VD, ids_C, temperature, use_reentrant=False)
        for hidden_CD, ids_C in pairs
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def chunk_rows(
    chunk_tokens: int | None, *, compiled: bool = False, device_type: str = "cpu"
) -> int:
    """Return how many rows of logits a chunk has: a number that is given, else one that suits.

    compiled     whether torch.compile made the code that runs on the chunk
    device_type  "cpu", "cuda" or another of torch's, where it runs

    >>> chunk_rows(None), chunk_rows(None, compiled=True, device_type="cuda")
    (256, 1024)
    """
    if chunk_tokens is not None:
        return chunk_tokens
    return COMPILED_CUDA_ROWS if compiled and device_type == "cuda" else CHUNK_ROWS


def compiling_pays(chunk_tokens: int | None, vocabulary: int) -> bool:
    """Say whether a chunk has so many logits that a compiled divergence is faster.

    Without chunk_tokens, the rows of a chunk that is not compiled decide.
    """
    return chunk_rows(chunk_tokens) * vocabulary >= COMPILED_LOGITS


def reduce_loss(
    loss_N: Tensor,
    lengths: list[int],
    *,
    reduction: str,
    step_tokens: int,
    step_rows: int,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Return this micro-batch's share of the step's loss, a scalar.

    A step may be computed in parts, the micro-batches, so that it fits into the memory. The shares
    of any split add up to the same loss, since the denominators are the whole step's.

    loss_N     per-token losses of the micro-batch's rows, one row after the other
    lengths    how many tokens each row has
    reduction  token       the mean over step_tokens, in which long rows count for more
               trajectory  the mean over step_rows of each row's mean, in which rows count alike
    weight_N   how much each token's loss counts, without gradient; None: all count 1. The
               denominators stay as they are, so weights of mean 1 keep the size of the loss

    Raises ValueError for an unknown reduction, and for lengths that do not add up.

    >>> loss_N = torch.tensor([3.0, 3.0, 3.0, 7.0])
    >>> for name in REDUCTIONS:
    ...     share = reduce_loss(loss_N, [3, 1], reduction=name, step_tokens=4, step_rows=2)
    ...     print(name, share.item())
    token 4.0
    trajectory 5.0
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; valid: {', '.join(REDUCTIONS)}")
    if sum(lengths) != len(loss_N):
        raise ValueError(
            f"lengths must add up to the {len(loss_N)} tokens of the loss, got {sum(lengths)}"
        )
    if weight_N is not None:
        if weight_N.shape != loss_N.shape:
            shapes = f"{list(weight_N.shape)} for {list(loss_N.shape)}"
            raise ValueError(f"there must be a weight for each token of the loss, got {shapes}")
        loss_N = loss_N * weight_N.detach().to(loss_N)
    if reduction == "token":
        return loss_N.sum() / step_tokens  # Eq. (1), 1/N: the step's N
    lengths_B = torch.tensor(lengths, dtype=torch.int64, device=loss_N.device)
    row_length_N = lengths_B.repeat_interleave(lengths_B)
    return (loss_N / row_length_N).sum() / step_rows  # not Eq. (1): rows weigh the same


class _Options(NamedTuple):
    """What the passes over a chunk need to know; clip is None unless entries are clipped."""

    kind: str
    temperature: Tensor
    beta: Tensor
    clip: Tensor | None


def _walk_chunks(
    student_ND: Tensor,
    teacher_ND: Tensor,
    head_VD: Tensor,
    options: _Options,
    chunk_tokens: int,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """Return the four rows of `_score` for every token, and D's gradient on its hidden state.

    The passes over a chunk are compiled one by one. No pass allocates a [C, V] tensor then; the
    last overwrites student_CV. Compiled as a whole they would keep three, and take twice as long on
    a CPU.
    """
    normalise = _compiled_if(_normalise, compiled)
    score = _compiled_if(_score, compiled)
    gradient_ = _compiled_if(_gradient_, compiled)
    with_gradient = student_ND.requires_grad and torch.is_grad_enabled()
    student_ND = student_ND.detach()
    teacher_ND = teacher_ND.detach()
    head_VD = head_VD.detach()
    scores_4N = head_VD.new_zeros(4, len(student_ND), dtype=options.temperature.dtype)
    gradient_ND = head_VD.new_zeros(student_ND.shape)
    # Allocated once and always scored whole, whatever the last chunk fills: compiled code sees a
    # single shape.
    student_CV = head_VD.new_zeros(chunk_tokens, len(head_VD))
    teacher_CV = head_VD.new_zeros(chunk_tokens, len(head_VD))
    # torch.compile makes its code anew with and without gradients. Here it is always without.
    with torch.no_grad():
        for start in range(0, len(student_ND), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            filled = len(student_ND[rows])
            torch.mm(student_ND[rows], head_VD.T, out=student_CV[:filled])
            torch.mm(teacher_ND[rows], head_VD.T, out=teacher_CV[:filled])
            normalisers = normalise(student_CV, options), normalise(teacher_CV, options)
            scores_4C, slope_sum_C1 = score(student_CV, teacher_CV, normalisers, options)
            scores_4N[:, rows] = scores_4C[:, :filled]
            if with_gradient:
                gradient_(student_CV, teacher_CV, normalisers, slope_sum_C1, options)
                torch.mm(student_CV[:filled], head_VD, out=gradient_ND[rows])
    return scores_4N, gradient_ND


def _normalise(logits_CV: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Return the largest scaled logit m and log sum_v exp(logit_v - m), [C, 1] each.

    log q is the logit minus both. They stay apart, since their sum would lose digits.
    """
    scaled_CV = _scale(logits_CV, options.temperature)
    max_C1 = scaled_CV.amax(-1, keepdim=True)
    return max_C1, (scaled_CV - max_C1).exp().sum(-1, keepdim=True).log()


def _score(
    student_CV: Tensor, teacher_CV: Tensor, normalisers, options: _Options
) -> tuple[Tensor, Tensor]:
    """Return [D, D unclipped, teacher entropy, student entropy] of each token, and sum_w g_w."""
    log_p_CV, log_q_CV, summand_CV, slope_CV = _terms(student_CV, teacher_CV, normalisers, options)
    kl_C = summand_CV.sum(-1)  # Eq. (1), D
    loss_C = kl_C
    if options.clip is not None:
        loss_C = summand_CV.clamp(max=options.clip).sum(-1)  # Eq. (2)
    teacher_entropy_C = -(log_p_CV.exp() * log_p_CV).sum(-1)
    student_entropy_C = -(log_q_CV.exp() * log_q_CV).sum(-1)
    scores_4C = torch.stack([loss_C, kl_C, teacher_entropy_C, student_entropy_C])
    return scores_4C, slope_CV.sum(-1, keepdim=True)


def _logit_gradient(
    student_CV: Tensor, teacher_CV: Tensor, normalisers, options: _Options
) -> tuple[Tensor, Tensor]:
    """Return D's gradient on the student's logits, but for the factor 1 / T, and D unclipped."""
    _, log_q_CV, summand_CV, slope_CV = _terms(student_CV, teacher_CV, normalisers, options)
    slope_sum_C1 = slope_CV.sum(-1, keepdim=True)
    return _through_softmax(slope_CV, slope_sum_C1, log_q_CV), summand_CV.sum(-1)


def _gradient_(
    student_CV: Tensor, teacher_CV: Tensor, normalisers, slope_sum_C1: Tensor, options: _Options
) -> None:
    """Overwrite student_CV, which is not read again, with the gradient of D on it."""
    _, log_q_CV, _, slope_CV = _terms(student_CV, teacher_CV, normalisers, options)
    gradient_CV = _through_softmax(slope_CV, slope_sum_C1, log_q_CV)
    student_CV.copy_(gradient_CV / options.temperature)  # Eq. (3), 1/T


def _through_softmax(slope_CV: Tensor, slope_sum_C1: Tensor, log_q_CV: Tensor) -> Tensor:
    """Return g_v - q_v sum_w g_w, the gradient on the logits but for 1 / T; the slope is g."""
    return slope_CV - log_q_CV.exp() * slope_sum_C1  # Eq. (3), but for 1/T


def _terms(
    student_CV: Tensor, teacher_CV: Tensor, normalisers, options: _Options
) -> tuple[Tensor, ...]:
    """Return log p, log q, the summands of D, and g of Eq. (3), called the slope.

    g_v is q_v dsummand_v/dq_v for an unclipped entry and 0 for a clipped one. Any multiple of q_v
    may be added to all of g: as q sums to one, it cancels in Eq. (3). forward_kl adds q_v and
    reverse_kl takes it away, so that g is exactly 0 where p = q.
    """
    kind, temperature, beta, clip = options
    (student_max_C1, student_log_sum_C1), (teacher_max_C1, teacher_log_sum_C1) = normalisers
    log_q_CV = _scale(student_CV, temperature) - student_max_C1 - student_log_sum_C1
    log_p_CV = _scale(teacher_CV, temperature) - teacher_max_C1 - teacher_log_sum_C1
    q_CV = log_q_CV.exp()
    summand_CV = _summand(kind, log_p_CV, log_q_CV, beta)
    if kind == "forward_kl":
        slope_CV = q_CV - log_p_CV.exp()
        clipped_slope_CV = q_CV
    elif kind == "reverse_kl":
        slope_CV = summand_CV
        clipped_slope_CV = -q_CV
    elif kind == "jsd":
        q_to_mixture_CV, _ = _ratios_to_mixture(log_q_CV - log_p_CV, beta)
        slope_CV = (1 - beta) * q_CV * q_to_mixture_CV
        clipped_slope_CV = torch.zeros_like(q_CV)
    else:
        raise NotImplementedError(f"{kind} has no slope")
    if clip is not None:
        slope_CV = torch.where(summand_CV > clip, clipped_slope_CV, slope_CV)
    return log_p_CV, log_q_CV, summand_CV, slope_CV


def _scale(logits_NV: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the logits divided by the temperature, in fp32, or in fp64 if they are."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature


def _summand(kind: str, log_p_NV: Tensor, log_q_NV: Tensor, beta: float | Tensor) -> Tensor:
    """Return what each vocabulary entry adds to D; see `divergence`."""
    if kind == "forward_kl":
        return log_p_NV.exp() * (log_p_NV - log_q_NV)
    if kind == "reverse_kl":
        return log_q_NV.exp() * (log_q_NV - log_p_NV)
    if kind == "jsd":
        q_to_mixture_NV, p_to_mixture_NV = _ratios_to_mixture(log_q_NV - log_p_NV, beta)
        of_teacher_NV = beta * log_p_NV.exp() * p_to_mixture_NV
        return of_teacher_NV + (1 - beta) * log_q_NV.exp() * q_to_mixture_NV
    raise NotImplementedError(f"{kind} has no summand")


def _ratios_to_mixture(ratio_NV: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return log q/M and log p/M from log q/p, with M = beta p + (1 - beta) q.

    Both are exactly zero where p = q.
    """
    ratio_NV = ratio_NV.clamp(max=80)  # exp(80) fits fp32, and beyond it p counts for nothing
    mixture_NV = torch.log1p((1 - beta) * torch.expm1(ratio_NV))
    return ratio_NV - mixture_NV, -mixture_NV


def _logprob_chunk(
    hidden_CD: Tensor, head_VD: Tensor, ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id of a chunk and the entropy at its position."""
    log_q_CV = _scale(hidden_CD @ head_VD.T, temperature).log_softmax(-1)
    logprob_C = log_q_CV.gather(-1, ids_C.unsqueeze(-1)).squeeze(-1)
    return logprob_C, -(log_q_CV.exp() * log_q_CV).sum(-1)


@functools.cache
def _compiled_if(function: Callable, compiled: bool) -> Callable:
    """Return the function, compiled if asked.

    The cache makes it one object for all calls; else each call would compile again.
    """
    return torch.compile(function, fullgraph=True, dynamic=False) if compiled else function


@functools.cache
def _compiler_works(device_type: str) -> bool:
    """Say whether torch.compile can be used; warn, once, if not."""
    if reason := compile_fault(device_type):
        warnings.warn(f"divergences run eagerly, as torch.compile fails: {reason}", stacklevel=3)
    return reason is None


@functools.cache
def compile_fault(device_type: str) -> str | None:
    """Compile something small; return why that does not work, in a line, None where it does.

    On a CPU it needs a C++ compiler.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device_type))
    except TorchDynamoException as error:
        return str(error).splitlines()[0]
    return None


def _check_options(
    kind: str, beta: float, temperature: float, clip_mode: str, clip: float | None
) -> None:
    """Raise ValueError for an unknown name or a number outside its range."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; valid: {', '.join(KINDS)}")
    if clip_mode not in CLIP_MODES:
        raise ValueError(f"unknown clip_mode {clip_mode!r}; valid: {', '.join(CLIP_MODES)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"jsd needs 0 < beta < 1, got {beta}; its ends are the kinds forward_kl and reverse_kl"
        )
    if clip_mode != "none" and (clip is None or not clip > 0):
        raise ValueError(f"clip_mode {clip_mode!r} needs a positive clip in nats, got {clip}")


def _check_projection(head_VD: Tensor, chunk_tokens: int, *hidden_states: Tensor) -> None:
    """Raise ValueError unless hidden states and head fit each other and a chunk has rows."""
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    shapes = [list(tensor.shape) for tensor in (*hidden_states, head_VD)]
    if any(shape != [shapes[0][0], shapes[-1][-1]] for shape in shapes[:-1]):
        raise ValueError(
            f"hidden states must be [N, D], with one N, and the head [V, D]; got {shapes}"
        )
