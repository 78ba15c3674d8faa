"""Whether a run fits into the memory that there is, what to change where it does not, and the plan.

parts/footprint.py counts the bytes. Here they are held against what a device has free before a run
loads anything, or against the cards that `copsd.py plan` is asked about. Where they are too many,
settings are looked for that save memory and change no result.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from parts.footprint import (
    Footprint,
    Lengths,
    Shape,
    footprint,
    loss_rows,
    read_shape,
    sampled_rows,
)
from parts.machine import DTYPES
from parts.microbatch import Limit
from parts.model import resolve_model
from parts.recipe import Config
from parts.settings import check_run, fill, flag_of, refuse_idle
from parts.view import say

GIB = 2**30
CARDS_GB = (24, 40, 80, 141)  # of 10**9 bytes, as cards are sold
CONTEXT = 0.8e9  # bytes of a card that hold no tensor: CUDA's context, cuBLAS's workspace, gaps
LEAST_CHUNK = 32  # rows of logits; fewer save no memory that counts


def changes_that_fit(
    shape: Shape,
    config: Config,
    lengths: Lengths,
    limit: float,
    *,
    on_cpu: bool,
) -> dict[str, Any] | None:
    """Return the settings to change so that a run fits into `limit` bytes; None if none do.

    Only those of "Machine" are tried, which change no result. {}: it fits as it is.
    """
    changes: dict[str, Any] = {}
    while True:
        changed = replace(config, **changes)
        found = footprint(shape, changed, lengths, on_cpu=on_cpu)
        if found.peak <= limit:
            return changes
        chunk = loss_rows(shape, changed, lengths, on_cpu=on_cpu)
        following = _next_change(changed, chunk, sampling=found.sampling > limit)
        if max(found.static, found.loading) > limit or following is None:
            return None
        changes |= following


def _next_change(config: Config, chunk: int, *, sampling: bool) -> dict[str, Any] | None:
    """Return what saves memory in the phase that lacks it, the cheapest in time first.

    chunk  rows of logits that exist at a time in the loss
    """
    if sampling:
        rows = sampled_rows(config)
        return {"sample_rows": rows // 2} if rows > 1 else None
    rows = min(config.micro_batch, config.batch_size)
    if not config.gradient_checkpointing:
        return {"gradient_checkpointing": True}
    if rows > 1:
        halved = Limit.of(config).halved()
        budget = {"micro_tokens": halved.tokens} if halved.tokens else {}
        return {"micro_batch": rows // 2, **budget}
    if chunk > LEAST_CHUNK:
        return {"chunk_tokens": chunk // 2}
    return None


def flags_text(changes: dict[str, Any]) -> str:
    """Return settings as they are typed: --micro-batch 2 --gradient-checkpointing."""
    words = []
    for name, value in changes.items():
        flag = flag_of(name)
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)


def footprint_line(found: Footprint) -> str:
    """Return the parts of a footprint in one line."""

    def _gib(count: int) -> str:
        return f"{count / GIB:.2f}"

    return (
        f"memory: {_gib(found.peak)} GiB at most: weights {_gib(found.weights)}, "
        f"adapter and optimiser {_gib(found.adapter + found.optimiser)}, kept prompts "
        f"{_gib(found.kept)}, then the largest of "
        f"sampling {_gib(found.sampling - found.static)}, the teacher's pass "
        f"{_gib(found.scoring - found.static)} and update {_gib(found.update - found.static)}"
    )


@cache
def free_bytes(device: str) -> int | None:
    """Return what was free on a device when this process first asked, None where nothing says it.

    A comparison asks before each arm. What an arm has freed, torch's allocator and malloc keep for
    the next: neither CUDA nor Linux counts it as free again.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_on_the_host(), default=None) if device == "cpu" else None


def _free_on_the_host() -> Iterator[int]:
    """Yield what Linux says is available, and what a container's limit leaves of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if os.access(limit, os.R_OK) and (text := limit.read_text(encoding="ascii").strip()) != "max":
        yield max(0, int(text) - int(used.read_text(encoding="ascii")))


def check_memory(shape: Shape, config: Config, device: str, lengths: Lengths) -> str:
    """Return the line that a run prints before it loads anything; ValueError where it cannot fit.

    It cannot where not even micro-batches of one row would fit. On a GPU a step that runs out of
    memory falls back to smaller ones by itself (parts/microbatch.py). Where the device does not say
    what is free, nothing is refused.
    """
    on_cpu = device == "cpu"
    found = footprint(shape, config, lengths, on_cpu=on_cpu)
    line = footprint_line(found)
    free = free_bytes(device)
    if free is None:
        return line
    line += f"; {free / GIB:.2f} free"
    if found.peak <= free:
        return line
    changes = changes_that_fit(shape, config, lengths, free, on_cpu=on_cpu)
    advice = f"fits with {flags_text(changes)}" if changes else "no setting of Machine makes it fit"
    least = footprint(shape, replace(config, micro_batch=1), lengths, on_cpu=on_cpu)
    if least.peak > free:
        raise ValueError(f"{line}: {advice}")
    return f"{line}: may not fit; {advice}"


def parts_table(found: Footprint) -> Table:
    """Return what takes a run's memory, a row each; what would be 0.00 is left out."""
    table = Table("", Column("GiB", justify="right"), box=None)
    rows = {
        "code of libraries": found.code,
        "weights": found.weights,
        "adapter": found.adapter,
        "gradient and optimiser": found.optimiser,
        "prompts that the teacher keeps": found.kept,
        "sampling: weights with the adapter": found.copies,
        "sampling: keys and values": found.cache,
        "sampling: choice of a token": found.choice,
        "teacher: one layer at work, packed weights": found.teacher,
        "update: activations of a micro-batch": found.activations,
        "update: one layer at work": found.layer,
        "update: a chunk of logits": found.chunk,
        "update: holes in a CPU's heap": found.gaps,
        "peak while sampling": found.sampling,
        "peak while the teacher reads": found.scoring,
        "peak in the update": found.update,
    }
    for name, count in rows.items():
        if (said := f"{count / GIB:.2f}") != "0.00":
            table.add_row(name, said)
    return table


def cards_table(
    shape: Shape, config: Config, lengths: Lengths, cards: Sequence[float]
) -> tuple[Table, bool]:
    """Return which cards, in GB, hold a run and with which flags, and whether all of them do."""
    table = Table(
        Column("card, GB", justify="right"),
        Column("peak, GiB", justify="right"),
        "fits",
        box=None,
    )
    every = True
    for card in cards:
        limit = card * 10**9 - CONTEXT
        changes = changes_that_fit(shape, config, lengths, limit, on_cpu=False)
        if changes is None:
            every = False
            table.add_row(f"{card:g}", "-", "no: no setting of Machine makes it fit")
            continue
        changed = replace(config, **changes)
        peak = footprint(shape, changed, lengths, on_cpu=False).peak
        said = f"with {flags_text(changes)}" if changes else "as it is"
        table.add_row(f"{card:g}", f"{peak / GIB:.2f}", said)
    return table, every


def plan(given: dict[str, Any], lengths: Lengths, cards: Sequence[float], console: Console) -> int:
    """Print the memory of the run that typed flags ask for; 0 if every card holds it, else 1.

    cards  how large they are, in GB
    Reads no more of the model than its configuration and its recipe. Raises ValueError or OSError.
    """
    for card in cards:
        if not 0 < card < math.inf:
            raise ValueError(f"--gpu is {card:g}; valid: a number of GB above 0")
    folder = resolve_model(given.get("model", Config.model), weights=False)
    config = fill(given, folder)
    check_run(config)
    refuse_idle(given, config)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        valid = "auto, cpu, cuda, cuda:N, mps"  # whether this machine has it does not matter here
        raise ValueError(f"unknown device {config.device!r}; valid: {valid}")
    # The cards that are asked about have bfloat16, whatever this machine has.
    auto = "float32" if config.device == "cpu" else "bfloat16"
    dtype = DTYPES.get(auto if config.dtype == "auto" else config.dtype)
    if dtype is None:
        raise ValueError(f"unknown dtype {config.dtype!r}: valid are auto, {', '.join(DTYPES)}")
    shape = read_shape(folder, config, dtype)
    found = footprint(shape, config, lengths, on_cpu=config.device == "cpu")
    name = str(dtype).removeprefix("torch.")
    say(
        console,
        f"{config.method.upper()} on {config.model} in {name}, prompts of up to {lengths.student} "
        f"tokens (the teacher's {lengths.teacher}), completions of {config.max_new_tokens}",
    )
    console.print(parts_table(found))
    table, every = cards_table(shape, config, lengths, cards)
    console.print(table)
    say(console, footprint_line(found))
    return 0 if every else 1
