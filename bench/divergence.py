"""Measure the chunked divergence against its three matrix products, full logits, and peers.

    python bench/divergence.py            the paper's loss, fp32, the head of Qwen2.5-0.5B
    python bench/divergence.py --kind jsd --clip-mode none --against floor,liger,trl
    python bench/divergence.py --device cuda --dtype bfloat16

floor  the three matrix products that any version needs, bare: over all tokens at once, into buffers
       that already exist
naive  kernels.divergence on full logits, with autograd
liger  Liger's chunked JSD, which also makes the gradient of the head
trl    TRL's tiled divergence, which computes the logits again for the gradient
ours   kernels.chunked_divergence

Time is a forward and a backward pass. They take turns, and ratios are taken within a turn. Memory
is the peak beyond the inputs, each in a fresh process, ours also at four times the tokens. All
must give the same loss, else nothing is measured. No peer clips.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels
from bench.records import MIB, OURS, Record, add_common_flags, missing, peer_version, report

Contestant = Callable[[Tensor, Tensor, Tensor], Tensor]
PACKAGES = {"liger": "liger-kernel", "trl": "trl"}  # what a peer is installed by
TEMPERATURE = 1.1
CLIP = 0.05
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # how peers name the kinds


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="forward_kl", choices=kernels.KINDS)
    parser.add_argument("--clip-mode", default="entry", choices=kernels.CLIP_MODES)
    parser.add_argument("--against", default="floor,naive", help="contestants beside ours")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=512, help="N; memory is also measured at 4 N")
    parser.add_argument("--hidden", type=int, default=896, help="D")
    parser.add_argument("--vocab", type=int, default=151936, help="V")
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        help="rows of logits alive at a time in ours; without it: what it takes by itself",
    )
    parser.add_argument("--peak-of", help="print the peak bytes of this one and stop")
    add_common_flags(parser, repeats=5)
    return parser.parse_args()


def make_inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return student_ND, teacher_ND and head_VD.

    They are filled in place, so that making them leaves no higher peak of memory behind.
    """
    torch.manual_seed(0)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    head_VD = torch.empty(arguments.vocab, arguments.hidden, **options).normal_(std=0.05)
    student_ND = torch.empty(arguments.tokens, arguments.hidden, **options).normal_()
    teacher_ND = torch.empty_like(student_ND).normal_(std=0.3).add_(student_ND)
    return student_ND.requires_grad_(), teacher_ND, head_VD


def make_contestant(name: str, arguments: argparse.Namespace) -> Contestant:
    """Return a function of student_ND, teacher_ND, head_VD: forward, backward, the loss's sum."""
    loss = {
        "kind": arguments.kind,
        "temperature": TEMPERATURE,
        "clip_mode": arguments.clip_mode,
        "clip": CLIP,
    }

    def naive(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Keep the whole logits."""
        loss_N = kernels.divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **loss)
        return _backward(loss_N.sum())

    def ours(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Keep a chunk of them at a time."""
        loss_N, _ = kernels.chunked_divergence(
            student_ND, teacher_ND, head_VD, chunk_tokens=arguments.chunk_tokens, **loss
        )
        return _backward(loss_N.sum())

    if name not in PACKAGES:
        return {"naive": naive, OURS: ours, "floor": _floor(arguments)}[name]
    if arguments.clip_mode != "none":
        raise ValueError(f"{name} has no clip {arguments.clip_mode}; valid: --clip-mode none")
    return {"liger": _liger, "trl": _trl}[name](PEER_BETA[arguments.kind])


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _floor(arguments: argparse.Namespace) -> Contestant:
    """Return the three bare matrix products."""
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    logits_NV = torch.empty(0)
    gradient_ND = torch.empty(0)

    @torch.no_grad()
    def floor(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Multiply three times, and nothing else."""
        nonlocal logits_NV, gradient_ND
        if not logits_NV.numel():
            logits_NV = torch.zeros(len(student_ND), len(head_VD), **options)
            gradient_ND = torch.zeros_like(student_ND)
        torch.mm(student_ND, head_VD.T, out=logits_NV)
        torch.mm(teacher_ND, head_VD.T, out=logits_NV)
        torch.mm(logits_NV, head_VD, out=gradient_ND)
        return gradient_ND[0, 0]

    return floor


def _liger(beta: float) -> Contestant:
    """Return Liger's loss without its hard part, at its own chunk size, compiled as by default."""
    import liger_kernel.chunked_loss as losses  # pyright: ignore[reportMissingImports]

    fused = losses.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=TEMPERATURE
    )

    def liger(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Compute the mean over tokens, of which we want the sum."""
        labels_N = torch.zeros(len(student_ND), dtype=torch.long, device=student_ND.device)
        return _backward(
            fused(student_ND, head_VD, teacher_ND, head_VD, labels_N) * len(student_ND)
        )

    return liger


def _trl(beta: float) -> Contestant:
    """Return TRL's tiled divergence."""
    import trl.kernels.chunked_divergence as tiled  # pyright: ignore[reportMissingImports]

    def trl(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> Tensor:
        """Visit tiles of tokens and vocabulary, twice."""
        loss_N, _ = tiled.ChunkedDivergenceFunction.apply(
            student_ND, head_VD, None, teacher_ND, head_VD, None, beta, TEMPERATURE
        )
        return _backward(loss_N.sum())

    return trl


def time_turns(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """Return each contestant's seconds; they take turns, and the first turn does not count."""
    inputs = make_inputs(arguments)
    contestants = {name: make_contestant(name, arguments) for name in names}
    _check_losses(contestants, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name, contestant in contestants.items():
            _synchronize(arguments.device)
            started = time.perf_counter()
            contestant(*inputs)
            _synchronize(arguments.device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _check_losses(
    contestants: dict[str, Contestant], inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Raise ValueError where a contestant computes something else than ours. Warms all up."""
    losses = {name: contestant(*inputs).item() for name, contestant in contestants.items()}
    losses.pop("floor", None)
    for name, loss in losses.items():
        if abs(loss - losses[OURS]) > 0.01 * abs(losses[OURS]):
            raise ValueError(f"{name} computes a loss of {loss:.6g}, ours is {losses[OURS]:.6g}")


def _synchronize(device: str) -> None:
    """Wait for the GPU, where there is one, so that the clock sees its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peak(arguments: argparse.Namespace) -> int:
    """Return the peak bytes of one forward and backward pass, beyond those of its inputs."""
    # The compiler's own modules are a few hundred MiB of Python. Compiling something small loads
    # them before the measurement begins.
    if kernels.compiling_pays(arguments.chunk_tokens, arguments.vocab):
        torch.compile(torch.exp)(torch.ones(2, device=arguments.device))
    contestant = make_contestant(arguments.peak_of, arguments)
    inputs = make_inputs(arguments)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant(*inputs)
        return torch.cuda.max_memory_allocated() - before
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    contestant(*inputs)
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after_kib - before_kib) * 1024


def peak_mib(arguments: argparse.Namespace, name: str, tokens: int) -> float:
    """Return a contestant's peak in MiB, measured in a process of its own."""
    flags = ["--kind", arguments.kind, "--clip-mode", arguments.clip_mode]
    flags += ["--device", arguments.device, "--dtype", arguments.dtype, "--tokens", str(tokens)]
    flags += ["--hidden", str(arguments.hidden), "--vocab", str(arguments.vocab)]
    flags += ["--peak-of", name]
    if arguments.chunk_tokens is not None:
        flags += ["--chunk-tokens", str(arguments.chunk_tokens)]
    child = subprocess.run(
        [sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(child.stdout.splitlines()[-1]) / MIB


def measure(arguments: argparse.Namespace) -> Iterator[Record]:
    """Measure ours and what stands beside it; yield their records."""
    row = f"divergence {arguments.kind}, clip {arguments.clip_mode}"
    names = [OURS]
    for name in arguments.against.split(","):
        if name in PACKAGES and peer_version(PACKAGES[name]) is None:
            yield missing(row, name, PACKAGES[name])
        else:
            names.append(name)
    # First the peaks: on Linux a child's peak starts at its parent's, which is still small now.
    count = arguments.tokens
    peaks = {name: peak_mib(arguments, name, count) for name in names if name != "floor"}
    wide = peak_mib(arguments, OURS, 4 * count)
    seconds = time_turns(arguments, names)
    shape = f"N {count}, D {arguments.hidden}, V {arguments.vocab}, {arguments.dtype}"
    notes = {OURS: f"{shape}; its peak at 4 N is {wide:,.0f} MiB; peaks are beyond the inputs"}
    for name in names:
        yield Record(row, name, "s", tuple(seconds[name]), peaks.get(name), notes.get(name, ""))


def main() -> None:
    """Run what the flags ask for."""
    arguments = parse_arguments()
    if arguments.peak_of:
        print(measure_peak(arguments))
        return
    report(measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
