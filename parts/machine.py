"""What a program runs on: device and dtype, how far its numbers go, memory, the clock, the peak."""

import ctypes
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # float16 would need a loss scaler


def pick_device(device: str) -> str:
    """Return the device, or for "auto" the first GPU of CUDA, and the CPU where there is none.

    ValueError, with what is valid here, unless this machine has it.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if device == "auto":
        return "cuda" if gpus else "cpu"
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


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the base weights' dtype; "auto" is bfloat16 on a GPU that has it, else float32.

    ValueError if it is unknown.
    """
    if dtype == "auto":
        native = device.startswith("cuda") and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if native else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: valid are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed memory for the next request.

    Every step frees and asks for the same large tensors. By default each goes back to the system
    and costs a page fault per 4 KiB when it returns: LOG.md has what that costs.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never by mmap, whose memory always goes back
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


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
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


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
