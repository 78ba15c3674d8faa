"""Measure the chunked divergence against its three matrix products, and against full logits.

    python bench/divergence.py            fp32 on the CPU, at the shape of Qwen2.5-0.5B's head
    python bench/divergence.py --device cuda --dtype bfloat16

floor  the three matrix products that any version needs, bare: over all tokens at once, into buffers
       that already exist
naive  kernels.divergence on full logits, with autograd
ours   kernels.chunked_divergence

Time is a forward and a backward pass. The three take turns, and ratios are taken within a turn.
Memory is the peak beyond the inputs, each in a fresh process. The loss is the paper's: forward KL,
entry clip 0.05, temperature 1.1.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels

LOSS = {"kind": "forward_kl", "temperature": 1.1, "clip_mode": "entry", "clip": 0.05}
MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=512, help="N; memory is also measured at 4 N")
    parser.add_argument("--hidden", type=int, default=896, help="D")
    parser.add_argument("--vocab", type=int, default=151936, help="V")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns that are timed, after one that is not"
    )
    parser.add_argument(
        "--chunk-tokens", type=int, default=256, help="rows of logits alive at a time in ours"
    )
    parser.add_argument(
        "--peak-of", choices=["naive", "ours"], help="print the peak bytes of this one and stop"
    )
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


def make_contestants(
    arguments: argparse.Namespace,
) -> dict[str, Callable[[Tensor, Tensor, Tensor], None]]:
    """Return the two versions by name; each does one forward and one backward pass."""

    def naive(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> None:
        """Keep the whole logits."""
        kernels.divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **LOSS).sum().backward()

    def ours(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> None:
        """Keep a chunk of them at a time."""
        chunk_tokens = arguments.chunk_tokens
        loss_N, _ = kernels.chunked_divergence(
            student_ND, teacher_ND, head_VD, chunk_tokens=chunk_tokens, **LOSS
        )
        loss_N.sum().backward()

    return {"naive": naive, "ours": ours}


def make_floor(student_ND: Tensor, head_VD: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return the three bare matrix products."""
    logits_NV = head_VD.new_zeros(len(student_ND), len(head_VD))
    gradient_ND = torch.zeros_like(student_ND)

    @torch.no_grad()
    def floor(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> None:
        """Multiply three times, and nothing else."""
        torch.mm(student_ND, head_VD.T, out=logits_NV)
        torch.mm(teacher_ND, head_VD.T, out=logits_NV)
        torch.mm(logits_NV, head_VD, out=gradient_ND)

    return floor


def print_times(arguments: argparse.Namespace) -> None:
    """Time the three in turns and print medians, spreads and ratios."""
    inputs = make_inputs(arguments)
    contestants = {"floor": make_floor(inputs[0], inputs[2]), **make_contestants(arguments)}
    seconds = {name: [] for name in contestants}
    for _ in range(arguments.repeats + 1):
        for name, contestant in contestants.items():
            synchronize(arguments.device)
            started = time.perf_counter()
            contestant(*inputs)
            synchronize(arguments.device)
            seconds[name].append(time.perf_counter() - started)
    seconds = {name: times[1:] for name, times in seconds.items()}
    titles = f"{'':8}{'median s':>10}{'min .. max':>20}{'x floor':>10}{'min .. max':>16}"
    print(f"\n{titles}{'x naive':>10}")
    for name, times in seconds.items():
        to_floor = [mine / other for mine, other in zip(times, seconds["floor"], strict=True)]
        to_naive = [mine / other for mine, other in zip(times, seconds["naive"], strict=True)]
        print(
            f"{name:8}{statistics.median(times):10.4f}{spread(times, 4):>20}"
            f"{statistics.median(to_floor):10.2f}{spread(to_floor, 2):>16}"
            f"{statistics.median(to_naive):10.2f}"
        )


def spread(values: list[float], digits: int) -> str:
    """Return the smallest and the largest value as text."""
    return f"{min(values):.{digits}f} .. {max(values):.{digits}f}"


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one, so that the clock sees its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peak(arguments: argparse.Namespace) -> int:
    """Return the peak bytes of one forward and backward pass, beyond those of its inputs."""
    # The compiler's own modules are a few hundred MiB of Python. Compiling something small loads
    # them before the measurement begins.
    small_ND = torch.ones(2, 2, device=arguments.device)
    small_VD = torch.ones(2, 2, device=arguments.device)
    compiled = arguments.peak_of == "ours"
    kernels.chunked_divergence(
        small_ND, small_ND, small_VD, compile=compiled, chunk_tokens=2, **LOSS
    )
    inputs = make_inputs(arguments)
    contestant = make_contestants(arguments)[arguments.peak_of]
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant(*inputs)
        return torch.cuda.max_memory_allocated() - before
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    contestant(*inputs)
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after_kib - before_kib) * 1024


def print_peaks(arguments: argparse.Namespace) -> None:
    """Measure every peak in a process of its own and print them with their ratios."""
    peaks = {}
    count = arguments.tokens
    for name, tokens in [("naive", count), ("ours", count), ("ours", 4 * count)]:
        flags = ["--device", arguments.device, "--dtype", arguments.dtype, "--tokens", str(tokens)]
        flags += ["--hidden", str(arguments.hidden), "--vocab", str(arguments.vocab)]
        flags += ["--chunk-tokens", str(arguments.chunk_tokens), "--peak-of", name]
        child = subprocess.run(
            [sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, check=True
        )
        peaks[name, tokens] = int(child.stdout)
    print(f"{'':8}{'tokens':>10}{'peak MiB':>20}{'of naive':>10}")
    for (name, tokens), peak in peaks.items():
        print(f"{name:8}{tokens:10}{peak / MIB:20.0f}{peak / peaks['naive', count]:10.3f}")


def main() -> None:
    """Run what the flags ask for."""
    arguments = parse_arguments()
    if arguments.peak_of:
        print(measure_peak(arguments))
        return
    print(
        f"{arguments.device} {arguments.dtype}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: N {arguments.tokens}, D {arguments.hidden}, "
        f"V {arguments.vocab}, chunk {arguments.chunk_tokens}\n"
    )
    # First the peaks: on Linux a child's peak starts at its parent's, which is still small now.
    print_peaks(arguments)
    print_times(arguments)


if __name__ == "__main__":
    main()
