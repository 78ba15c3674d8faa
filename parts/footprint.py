"""How much memory a training run takes at most, known from the model's configuration alone.

A step has phases that need memory beside the weights, and their peaks do not add up: sampling keeps
keys and values of every token of every row, the update keeps what the backward pass needs of one
micro-batch, and a teacher that reads before the student keeps nothing, but may multiply by copies
of the weights. All are counted here for completions that all reach their length limit.

    peak = weights + adapter + optimiser + max(sampling, teacher, update)

On a CPU there is also what its allocator wastes. Nothing is loaded: the model is built on torch's
meta device, where tensors have a shape and no data. bench/footprint.py measures how far a figure is
from the truth. Not counted: Python, torch's own code, and what CUDA keeps for itself (CONTEXT).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn
from transformers import AutoModelForCausalLM

from parts.copies import choose_copies
from parts.lora import adaptable_layers
from parts.machine import DTYPES
from parts.microbatch import Limit
from parts.model import load_config, loading, resolve_model
from parts.packing import packing_pays
from parts.prefixes import KEPT_BYTES
from parts.recipe import DISTILLED, GROUPED, Config, check_run, fill, keeps_prompts
from parts.view import say

GIB = 2**30
CARDS_GB = (24, 40, 80, 141)  # of 10**9 bytes, as cards are sold
CONTEXT = 0.8e9  # bytes of a card that hold no tensor: CUDA's context, cuBLAS's workspace, gaps
FP32 = 4  # bytes of a number; the adapter, its gradient and its optimiser have no other
COMPILED_LOGITS = 2**22  # logits of a chunk from which the divergence is compiled (kernels.py)
PREFILL_TOKENS = 512  # prompt tokens that go through the model at once (parts/batch.py)
LEAST_CHUNK = 32  # rows of logits; fewer save no memory that counts


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on.

    parameters    of the base, those that two layers share counted once
    adapter       numbers in A and B of all adapted layers
    adapted       weights of these layers
    linear        weights of all linear layers, the head among them
    intermediate  the width inside a layer's MLP
    """

    parameters: int
    adapter: int
    adapted: int
    linear: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int


@dataclass(frozen=True)
class Footprint:
    """The bytes of a run, by what takes them."""

    weights: int
    adapter: int  # and its moving average or copy, where the teacher is one
    optimiser: int  # the gradient, and AdamW's two averages of it
    kept: int  # keys and values of prompts, as the fixed teacher read them
    copies: int  # sampling: of weights, with the adapter added, in fp32
    cache: int  # sampling: keys and values
    choice: int  # sampling: logits of the next token
    teacher: int  # its pass: one layer while it computes, and packed copies of the weights
    activations: int  # update: what is kept for the backward pass
    layer: int  # update: one layer while it computes, forward or backward
    chunk: int  # update: logits in the loss, when no layer computes
    cache_gaps: int  # sampling: what a CPU's allocator cannot use again
    gaps: int  # update: the same
    loading: int  # what reading the weights takes

    @property
    def static(self) -> int:
        """Return what is there in both phases."""
        return self.weights + self.adapter + self.optimiser + self.kept

    @property
    def sampling(self) -> int:
        """Return the peak while completions are sampled."""
        return self.static + self.copies + self.cache + self.cache_gaps + self.choice

    @property
    def scoring(self) -> int:
        """Return the peak while a teacher reads a micro-batch."""
        return self.static + self.teacher

    @property
    def update(self) -> int:
        """Return the peak while a micro-batch is scored and its gradient taken."""
        return self.static + self.activations + self.gaps + max(self.layer, self.chunk)

    @property
    def peak(self) -> int:
        """Return the peak of the whole run."""
        return max(self.sampling, self.scoring, self.update, self.loading)


@dataclass(frozen=True)
class Lengths:
    """The tokens of the longest prompts, as the student and as the teacher reads them."""

    student: int
    teacher: int


def read_shape(folder: Path, config: Config) -> Shape:
    """Return the sizes of the model in a folder that holds at least its config.json.

    The adapter is that of config. Raises OSError or ValueError, as transformers does.
    """
    config_file = load_config(folder)
    with torch.device("meta"), loading(folder, f"model {folder}"):
        model = AutoModelForCausalLM.from_config(config_file)
    text = config_file.get_text_config()
    targets = tuple(config.lora_targets.split(","))
    adapted = [
        layer
        for path, layer in adaptable_layers(model).items()
        if any(f".{path}".endswith(f".{target}") for target in targets)
    ]
    ends = sum(layer.in_features + layer.out_features for layer in adapted)
    # Families that lack one of these mean the usual value by it.
    heads = text.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        adapter=config.lora_rank * ends,
        adapted=sum(layer.weight.numel() for layer in adapted),
        linear=sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=model.get_output_embeddings().weight.shape[0],
    )


def footprint(
    shape: Shape, config: Config, dtype: torch.dtype, lengths: Lengths, *, on_cpu: bool
) -> Footprint:
    """Return the bytes of a run of these settings at its most."""
    size = dtype.itemsize
    weights = shape.parameters * size
    cache, choice = _sampling_bytes(shape, config, size, lengths)
    activations, layer = _update_bytes(shape, config, size, lengths)
    kind = choose_copies(
        shape.linear * size, shape.adapted * size, torch.device("cpu" if on_cpu else "cuda"), dtype
    )
    copied = {"packed": shape.linear, "merged": shape.adapted, "none": 0}[kind] * size
    packed = copied if kind == "packed" else 0
    sets = 2 if config.teacher in ("ema", "copy") else 1
    return Footprint(
        weights=weights,
        adapter=sets * shape.adapter * FP32,
        optimiser=3 * shape.adapter * FP32,
        kept=_kept_bytes(shape, config, size, lengths),
        copies=copied,
        cache=cache,
        choice=choice,
        teacher=packed + _teacher_bytes(shape, config, size, lengths),
        activations=activations,
        layer=layer,
        chunk=_chunk_bytes(shape, config, size),
        cache_gaps=cache * 2 // 5 if on_cpu else 0,  # measured, as the other
        gaps=_gaps_bytes(shape, config, size, lengths) if on_cpu else 0,
        # A CPU's weights are the file, mapped; to hash it, it is mapped once more.
        loading=2 * weights if on_cpu else weights,
    )


def _kept_bytes(shape: Shape, config: Config, size: int, lengths: Lengths) -> int:
    """Return the bytes of the prompts that the fixed teacher keeps, if no step repeats one."""
    if config.method not in DISTILLED or not keeps_prompts(config):
        return 0
    prompts = config.batch_size * (config.steps or 1) + config.eval_problems
    column = 2 * shape.kv_heads * shape.head_size * size
    return min(KEPT_BYTES, prompts * lengths.teacher * column * shape.layers)


def _sampling_bytes(shape: Shape, config: Config, size: int, lengths: Lengths) -> tuple[int, int]:
    """Return the bytes of the cache and of choosing a token, for the rows decoded at once."""
    rows = _sampled_rows(config)
    # A plan, an explanation and a control's completion are written behind more than the problem.
    writes_more = config.teacher_reads in ("plan", "explained") or config.completion == "teacher"
    prompt = lengths.teacher if writes_more else lengths.student
    column = 2 * shape.kv_heads * shape.head_size * size  # a layer's key and value of one token
    # One layer more, while it is copied to grow. Attention under a mask repeats the keys and values
    # of one layer for each query head.
    groups = shape.heads // shape.kv_heads
    layers = shape.layers + 1 + (groups if groups > 1 else 0)
    full = rows * (prompt + config.max_new_tokens) * column * layers
    # When rows enter, the keys and values of their prompts exist twice.
    entering = 2 * rows * prompt * column * shape.layers
    prefill = max(PREFILL_TOKENS, prompt) * _forward_bytes(shape, size)
    logits = rows * shape.vocabulary * (size + 3 * FP32)  # as they come, scaled, allowed, exp
    return max(full, entering), max(logits, prefill)


def _sampled_rows(config: Config) -> int:
    """Return how many completions are decoded at once: no more than there are."""
    attempts = config.vote_samples if config.teacher_reads == "voted" else 1
    wanted = max(config.batch_size * attempts, config.eval_problems * config.eval_samples)
    return min(config.sample_rows, wanted)


def _update_bytes(shape: Shape, config: Config, size: int, lengths: Lengths) -> tuple[int, int]:
    """Return what a micro-batch keeps for its backward pass, and what passes through one layer."""
    rows = _micro_rows(config, lengths)
    completion = int(rows * config.max_new_tokens)
    tokens = _student_tokens(config, lengths)
    saved = _saved_bytes(shape, size)
    if config.gradient_checkpointing:
        # Every layer's input is kept, and all of the one layer that is computed again.
        kept = tokens * (shape.layers * shape.hidden * size + saved)
    else:
        kept = tokens * shape.layers * saved
    # The final states of both roles and the gradient on them; the norm before them in fp32.
    kept += 3 * completion * shape.hidden * size + 2 * tokens * shape.hidden * FP32
    # The gradient flows back through one layer at a time.
    passing = tokens * _forward_bytes(shape, size)
    if config.method in GROUPED and (config.method != "grpo" or config.kl_coef):
        # The initial model or a neighbour's teacher scores the rows while their gradient waits.
        other = lengths.student if config.method == "grpo" else lengths.teacher
        passing = max(passing, (int(rows * other) + completion) * _forward_bytes(shape, size))
    return kept, passing


def _teacher_bytes(shape: Shape, config: Config, size: int, lengths: Lengths) -> int:
    """Return what passes through one layer while COPSD's teacher scores a micro-batch."""
    if config.method not in DISTILLED:
        return 0
    tokens = int(_micro_rows(config, lengths) * (lengths.teacher + config.max_new_tokens))
    return tokens * _forward_bytes(shape, size)


def _micro_rows(config: Config, lengths: Lengths) -> float:
    """Return the rows of a micro-batch: a fraction where a budget of positions holds no whole rows.

    Shorter rows would fill the rest of it.
    """
    rows = min(config.micro_batch, config.batch_size)
    if config.micro_tokens is None:
        return rows
    has_teacher = config.method in (*DISTILLED, "egrsd")
    prompt = max(lengths.student, lengths.teacher) if has_teacher else lengths.student
    longest = prompt + config.max_new_tokens
    return min(rows, max(1, config.micro_tokens / longest))


def _student_tokens(config: Config, lengths: Lengths) -> int:
    """Return the positions of a micro-batch's student rows; those of a group may share a prompt."""
    rows = _micro_rows(config, lengths)
    together = min(int(rows), config.group_size) if config.method in GROUPED else 1
    prompts = [[0] * lengths.student] * together
    shares = packing_pays(prompts, [[0] * config.max_new_tokens] * together)
    return int(rows * (lengths.student / (together if shares else 1) + config.max_new_tokens))


def _gaps_bytes(shape: Shape, config: Config, size: int, lengths: Lengths) -> int:
    """Return what is free on a CPU's heap after a forward pass, in holes that stay empty.

    torch asks for aligned memory. glibc then looks for a hole a little larger than the one that a
    tensor of that size has left, and takes new memory instead. About as much as the layers keep
    ends so, and half of it where they keep nothing and are computed again; measured with
    bench/footprint.py. A GPU's allocator uses its holes.
    """
    saved = _student_tokens(config, lengths) * shape.layers * _saved_bytes(shape, size)
    return saved // 2 if config.gradient_checkpointing else saved


def _chunk_bytes(shape: Shape, config: Config, size: int) -> int:
    """Return the bytes of the logits that exist at a time in the loss."""
    logits = config.chunk_tokens * shape.vocabulary
    if config.method in ("grpo", "egrsd"):
        return logits * (size + 4 * FP32)
    # What the clip does to the gradient is found without the compiler.
    is_asked = config.clip_mode != "none" and config.cosine_every > 0
    cosine = logits * (2 * size + 5 * FP32) if is_asked else 0
    if config.compile is not False and logits >= COMPILED_LOGITS:
        # Student's and teacher's; compiled code keeps nothing else whole.
        return max(cosine, 2 * logits * size)
    return logits * (2 * size + 7 * FP32)


def _saved_bytes(shape: Shape, size: int) -> int:
    """Return what a decoder layer keeps of a token for its backward pass.

    What enters both norms; what enters the adapters, in fp32, which in a 16-bit model is a copy for
    each of q, k, v, gate and up; attention's q, k, v and output, and keys and values once more
    where they are repeated for each query head; the MLP's gate, up and product.
    """
    attention = shape.heads * shape.head_size
    keys = shape.kv_heads * shape.head_size
    repeated = 2 * attention if shape.heads > shape.kv_heads else 0
    computed = 2 * attention + 2 * keys + repeated + 3 * shape.intermediate
    if size == FP32:  # the adapters share what enters them
        return FP32 * (computed + 4 * shape.hidden + shape.intermediate)
    copies = 5 * shape.hidden + attention + shape.intermediate
    return size * computed + FP32 * (copies + 2 * shape.hidden)


def _forward_bytes(shape: Shape, size: int) -> int:
    """Return what is alive of a token in a layer whose activations are not kept."""
    return (3 * shape.intermediate + 4 * shape.hidden) * size + 2 * shape.hidden * FP32


def changes_that_fit(
    shape: Shape,
    config: Config,
    dtype: torch.dtype,
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
        found = footprint(shape, changed, dtype, lengths, on_cpu=on_cpu)
        if found.peak <= limit:
            return changes
        following = _next_change(changed, sampling=found.sampling > limit)
        if max(found.static, found.loading) > limit or following is None:
            return None
        changes |= following


def _next_change(config: Config, *, sampling: bool) -> dict[str, Any] | None:
    """Return what saves memory in the phase that lacks it, the cheapest in time first."""
    if sampling:
        rows = _sampled_rows(config)
        return {"sample_rows": rows // 2} if rows > 1 else None
    rows = min(config.micro_batch, config.batch_size)
    if not config.gradient_checkpointing:
        return {"gradient_checkpointing": True}
    if rows > 1:
        halved = Limit.of(config).halved()
        budget = {"micro_tokens": halved.tokens} if halved.tokens else {}
        return {"micro_batch": rows // 2, **budget}
    if config.chunk_tokens > LEAST_CHUNK:
        return {"chunk_tokens": config.chunk_tokens // 2}
    return None


def flags_text(changes: dict[str, Any]) -> str:
    """Return settings as they are typed: --micro-batch 2 --gradient-checkpointing."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
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


def free_bytes(device: str) -> int | None:
    """Return the memory that is free on a device, None where nothing says it."""
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


def check_memory(
    shape: Shape, config: Config, dtype: torch.dtype, device: str, lengths: Lengths
) -> str:
    """Return the line that a run prints before it loads anything; ValueError where it cannot fit.

    It cannot where not even micro-batches of one row would, to which a step that runs out of memory
    falls back by itself (copsd.py). Where the device does not say what is free, nothing is refused.
    """
    on_cpu = device == "cpu"
    found = footprint(shape, config, dtype, lengths, on_cpu=on_cpu)
    line = footprint_line(found)
    free = free_bytes(device)
    if free is None:
        return line
    line += f"; {free / GIB:.2f} free"
    if found.peak <= free:
        return line
    changes = changes_that_fit(shape, config, dtype, lengths, free, on_cpu=on_cpu)
    advice = f"fits with {flags_text(changes)}" if changes else "no setting of Machine makes it fit"
    least = footprint(shape, replace(config, micro_batch=1), dtype, lengths, on_cpu=on_cpu)
    if least.peak > free:
        raise ValueError(f"{line}: {advice}")
    return f"{line}: may not fit; {advice}"


def parts_table(found: Footprint) -> Table:
    """Return what takes a run's memory, a row each."""
    table = Table("", Column("GiB", justify="right"), box=None)
    rows = {
        "weights": found.weights,
        "adapter": found.adapter,
        "gradient and optimiser": found.optimiser,
        "prompts that the teacher keeps": found.kept,
        "sampling: weights with the adapter": found.copies,
        "sampling: keys and values": found.cache,
        "sampling: choice of a token": found.choice,
        "sampling: holes in a CPU's heap": found.cache_gaps,
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
        table.add_row(name, f"{count / GIB:.2f}")
    return table


def cards_table(
    shape: Shape, config: Config, dtype: torch.dtype, lengths: Lengths, cards: Sequence[float]
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
        changes = changes_that_fit(shape, config, dtype, lengths, limit, on_cpu=False)
        if changes is None:
            every = False
            table.add_row(f"{card:g}", "-", "no: no setting of Machine makes it fit")
            continue
        changed = replace(config, **changes)
        peak = footprint(shape, changed, dtype, lengths, on_cpu=False).peak
        said = f"with {flags_text(changes)}" if changes else "as it is"
        table.add_row(f"{card:g}", f"{peak / GIB:.2f}", said)
    return table, every


def plan(given: dict[str, Any], lengths: Lengths, cards: Sequence[float], console: Console) -> int:
    """Print the memory of the run that typed flags ask for; 0 if every card holds it, else 1.

    Reads no more of the model than its configuration and its recipe.
    """
    folder = resolve_model(given.get("model", Config.model), weights=False)
    config = fill(given, folder)
    check_run(config)
    # The cards that are asked about have bfloat16, whatever this machine has.
    auto = "float32" if config.device == "cpu" else "bfloat16"
    dtype = DTYPES.get(auto if config.dtype == "auto" else config.dtype)
    if dtype is None:
        raise ValueError(f"unknown dtype {config.dtype!r}: valid are auto, {', '.join(DTYPES)}")
    shape = read_shape(folder, config)
    found = footprint(shape, config, dtype, lengths, on_cpu=config.device == "cpu")
    name = str(dtype).removeprefix("torch.")
    say(
        console,
        f"{config.method.upper()} on {config.model} in {name}, prompts of up to {lengths.student} "
        f"tokens (the teacher's {lengths.teacher}), completions of {config.max_new_tokens}",
    )
    console.print(parts_table(found))
    table, every = cards_table(shape, config, dtype, lengths, cards)
    console.print(table)
    say(console, footprint_line(found))
    return 0 if every else 1
