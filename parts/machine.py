"""What a program runs on: device and dtype, how far its numbers go, memory, the clock, the peak."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> str:
    """Return the device.

    "auto" is the first GPU of CUDA, else Apple's where it works, else the CPU.
    ValueError, with what is valid here, unless this machine has it.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device == "auto":
        if gpus:
            return "cuda"
        return "mps" if _mps_works() else "cpu"
    present = ["cpu"]
    if gpus:
        present += ["cuda", *gpus]
    if torch.backends.mps.is_available():
        present.append("mps")
    if device not in present:
        raise ValueError(
            f"no device {device!r} here: valid on this machine are auto, {', '.join(present)}"
        )
    return device


def _mps_works() -> bool:
    """Say whether Apple's GPU is here and does the arithmetic of a step as the CPU does it.

    That is attention under a mask, a matrix product into a given place, and the backward pass.
    """
    if not torch.backends.mps.is_available():
        return False

    def _step(device: str) -> Tensor:
        x_1111 = torch.linspace(-1, 1, 64, device=device).view(1, 1, 8, 8).requires_grad_()
        mask_TT = torch.ones(8, 8, device=device).triu(1) * -1e4
        seen = torch.nn.functional.scaled_dot_product_attention(x_1111, x_1111, x_1111, mask_TT)
        (gradient_1111,) = torch.autograd.grad(seen.square().sum(), x_1111)
        out_TT = torch.empty(8, 8, device=device)
        torch.mm(seen.detach()[0, 0], mask_TT, out=out_TT)
        return torch.stack([out_TT, gradient_1111[0, 0]]).cpu()

    try:
        return torch.allclose(_step("mps"), _step("cpu"), rtol=1e-3, atol=1e-3)
    except (NotImplementedError, RuntimeError):  # an operation that this system's version lacks
        return False


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the base weights' dtype.

    "auto" is bfloat16 on a GPU of CUDA that has it, float16 on one that has not (a T4 and older),
    and float32 elsewhere.
    ValueError if it is unknown.
    """
    if dtype == "auto":
        if not device.startswith("cuda"):
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: valid are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is one of too little memory.

    Apple's GPUs say it by a plain RuntimeError.
    """
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and "out of memory" in str(error))


def state_precision() -> None:
    """State that CUDA multiplies float32 matrices in float32, whatever a card would rather do.

    In a 16-bit model few products are of float32. One is the rotary angle, a position times a
    frequency: in TF32, with its 11 bits, positions beyond 2048 would be rounded.
    """
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def quiet_libraries() -> None:
    """Keep transformers' bars and warnings off the terminal: what matters is checked here.

    It warns, for one, of prompts longer than a tokenizer's model_max_length, which few models mean.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU is never behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):  # a model's is called "mps:0"
        torch.mps.synchronize()


@dataclass
class Stopwatch:
    """Count the seconds of each phase of a step.

    A GPU works behind the program's back. There each lap waits for the work in flight, so that a
    phase pays for what it started.
    """

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to `phase`."""
        wait_for(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def forget_peak(device: str) -> None:
    """Let peak_memory_gib count from here on, where it can: a process has one peak for good."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: str) -> float:
    """Return the peak memory so far in GiB: of the GPU's tensors, or on a CPU of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30


def stop_unless_finite(parameters: Sequence[Tensor]) -> None:
    """Raise FloatingPointError where an update left weights that are not finite.

    Their norm tells, in one number, so that a GPU is waited for once.
    """
    if not torch.nn.utils.get_total_norm(parameters).isfinite():
        raise FloatingPointError(
            "the update left weights that are not finite, or too large to square: try a lower --lr"
        )
