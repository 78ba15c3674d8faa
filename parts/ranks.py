"""One run in several processes, its ranks, which torchrun starts: on one machine or on many.

    torchrun --nproc-per-node 4 copsd.py train ...

Every rank holds the whole model and the same adapter. A step's prompts are divided: each rank
samples its share, all then know all rollouts, and each takes the gradient of its share of the rows,
which is summed over the ranks. A row's random stream depends on the step, the problem and the
sample, so that it does not matter which rank draws it, nor how many there are.

What a run decides, such as when to stop, rank 0 decides for all; and it alone writes. Without
torchrun there is one rank, and every function here gives back what it was given.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How long a rank waits for the others, such as for the longest row of an evaluation. A rank that
# died is noticed at once: its connection breaks, or torchrun ends the rest.
PATIENCE = timedelta(days=1)


def join() -> None:
    """Meet the other ranks, where torchrun started this process."""
    if dist.is_torchelastic_launched():
        # Rollouts and decisions travel between CPUs, gradients between GPUs where there are any.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def leave() -> None:
    """Part from the others, at the end of a run that ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse(program: str) -> None:
    """Raise ValueError where several ranks run a program that is for one."""
    if count() > 1:
        raise ValueError(f"{program} is for one process: start it without torchrun")


def count() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Return this rank's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Say whether this is the rank that decides, writes and prints."""
    return number() == 0


def own_device(device: str) -> str:
    """Return the device of this process, and let a GPU that has a number be the current one.

    In several ranks "cuda" is one GPU for each. CUDA's graphs are recorded on the current GPU, and
    what a card can do is asked of it, so it is the one that the model is on.
    ValueError: a machine with more ranks than GPUs, or one GPU that is named for several ranks.
    """
    if count() > 1 and device.startswith("cuda"):
        beside = int(os.environ["LOCAL_WORLD_SIZE"])  # ranks on this machine, this one among them
        gpus = torch.cuda.device_count()
        if beside > gpus:
            raise ValueError(
                f"{beside} processes a machine, and GPUs on this one: {gpus}; "
                f"valid are --nproc-per-node up to {gpus}, or --device cpu"
            )
        if beside > 1 and device != "cuda":
            raise ValueError(
                f"--device {device} would be one GPU for {beside} processes: leave --device out "
                "under torchrun, and each has its own"
            )
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return device


def share(items: int) -> slice:
    """Return which of so many items are this rank's: neighbours, about as many as any other's.

    >>> share(5)
    slice(0, 5, None)
    """
    return slice(items * number() // count(), items * (number() + 1) // count())


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all ranks, rank 0's first, so that shares stand in their order."""
    if count() == 1:
        return items
    lists: list[Any] = [None] * count()
    _together(dist.all_gather_object, lists, items)
    return [item for part in lists for item in part]


def decide(value: Any) -> Any:
    """Return rank 0's value, whatever the others have."""
    if count() == 1:
        return value
    values = [value if is_first() else None]
    _together(dist.broadcast_object_list, values, src=0)
    return values[0]


def agreed(**identity: Any) -> dict[str, Any]:
    """Return the identity of what this rank works on; ValueError where rank 0's is another.

    identity  fingerprints of model, data and prompts, by name
    """
    if decide(identity) != identity:
        raise ValueError("this machine has another model, data or prompts than that of rank 0")
    return identity


def sum_gradients(parameters: list[Tensor]) -> None:
    """Replace every rank's gradient by the sum over the ranks, in one message.

    Where no row was in the loss, it is zero. Without one, AdamW would pass that step by, and its
    momentum would move the adapter only where another rank had rows.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if count() > 1:
        flat = torch.cat([grad.flatten() for grad in grads])
        _together(dist.all_reduce, flat)
        grads = flat.split([parameter.numel() for parameter in parameters])
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.view_as(parameter)


def _together(operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Do what all ranks do at once. ConnectionError: one of them has ended."""
    try:
        operation(*arguments, **options)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(f"another process of this run has ended: {reason}") from error
