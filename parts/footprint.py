"""How much memory a training run takes at most, known from the model's configuration alone.

A step has phases that need memory beside the weights, and their peaks do not add up: sampling keeps
keys and values of every token of every row, the update keeps what the backward pass needs of one
micro-batch, and a teacher that reads before the student keeps nothing, but may multiply by copies
of the weights. All are counted here for completions that all reach their length limit.

    peak = weights + adapter + optimiser + max(sampling, teacher, update)

On a CPU there is also what its allocator wastes. Nothing is loaded: the model is built on torch's
meta device, where tensors have a shape and no data, and what its passes take of a token is counted
there (parts/meter.py). bench/footprint.py measures how far a figure is from the truth. Not counted:
Python, most of torch's own code, and what CUDA keeps for itself. Whether that fits, and what to
change where it does not, is asked in parts/fitting.py.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kernels import chunk_rows, compiling_pays
from parts import ranks
from parts.batch import GROWTH_COLUMNS, PREFILL_TOKENS, SMALL_PREFILL
from parts.copies import choose_copies
from parts.family import switch_off_dropout
from parts.heap import RETURNED_BYTES
from parts.lora import attach_lora, targeted_layers
from parts.meter import Passes, count_passes
from parts.model import load_config, loading
from parts.packing import is_worth_packing
from parts.prefixes import KEPT_BYTES
from parts.recipe import DISTILLED, GROUPED, Config, keeps_prompts

FP32 = 4  # bytes of a number; the adapter, its gradient and its optimiser have no other
CODE_BYTES = 2**24  # of torch's own code, which a CPU reads in a step and not before it


class NotCounted(ValueError):
    """A pass through the model needs numbers that only its weights have."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on.

    dtype       of the weights, and of most of what passes make
    parameters  of the base, those that two layers share counted once
    stacked     of these, in tensors that hold many experts, which a file has one by one
    adapter     numbers in A and B of all adapted layers
    adapted     weights of these layers
    outputs     numbers that these layers make of a token
    linear      weights of all linear layers, the head among them
    small       of these, in layers whose copy stays on a CPU's heap when it is freed
    passes      the bytes of a token in the passes through the model
    """

    dtype: torch.dtype
    parameters: int
    stacked: int
    adapter: int
    adapted: int
    outputs: int
    linear: int
    small: int
    layers: int
    hidden: int
    vocabulary: int
    passes: Passes


@dataclass(frozen=True)
class Footprint:
    """The bytes of a run, by what takes them."""

    code: int  # of libraries
    weights: int
    adapter: int  # and its moving average or copy, where the teacher is one
    optimiser: int  # the gradient, and AdamW's two averages of it
    kept: int  # keys and values of prompts, as the fixed teacher read them
    kept_before: int  # of these, what is there before the last step
    copies: int  # sampling: of weights with the adapter added, or of the rounded adapter
    cache: int  # sampling: keys and values
    choice: int  # sampling: logits of the next token
    teacher: int  # its pass: one layer while it computes, and packed copies of the weights
    activations: int  # update: what is kept for the backward pass
    layer: int  # update: one layer while it computes, forward or backward
    chunk: int  # update: logits in the loss, when no layer computes
    gaps: int  # update: what a CPU's allocator cannot use again
    loading: int  # what reading the weights takes

    @property
    def static(self) -> int:
        """Return what is there in all phases."""
        return self.code + self.weights + self.adapter + self.optimiser

    @property
    def sampling(self) -> int:
        """Return the peak while completions are sampled."""
        return self.static + self.kept_before + self.copies + self.cache + self.choice

    @property
    def scoring(self) -> int:
        """Return the peak while a teacher reads a micro-batch."""
        return self.static + self.kept + self.teacher

    @property
    def update(self) -> int:
        """Return the peak while a micro-batch is scored and its gradient taken."""
        kept = self.kept + self.activations + self.gaps
        return self.static + kept + max(self.layer, self.chunk)

    @property
    def peak(self) -> int:
        """Return the peak of the whole run."""
        return max(self.sampling, self.scoring, self.update, self.loading)


@dataclass(frozen=True)
class Lengths:
    """The tokens of the longest prompts, as the student and as the teacher reads them."""

    student: int
    teacher: int


def read_shape(folder: Path, config: Config, dtype: torch.dtype) -> Shape:
    """Return the sizes of the model in a folder that holds at least its config.json.

    dtype  what its weights are to have
    The adapter is that of config. Raises OSError or ValueError, as transformers does, and for a
    target that attach_lora would refuse; NotCounted for a model that can be built and not counted.
    """
    # The arms of a comparison, each in its turn, ask for the same model.
    settings = (folder / "config.json").read_bytes()
    return _count_shape(folder, settings, config.lora_targets, config.lora_rank, dtype)


@cache
def _count_shape(
    folder: Path, settings: bytes, targets: str, rank: int, dtype: torch.dtype
) -> Shape:
    """Do the work of read_shape; settings are those in folder, so that others are counted anew."""
    config_file = load_config(folder)
    switch_off_dropout(config_file)
    names = tuple(targets.split(","))
    with torch.device("meta"), loading(folder, f"model {folder}"):
        model = AutoModelForCausalLM.from_config(config_file, dtype=dtype).eval()
    adapted = targeted_layers(model, names).values()
    # Before the adapter is there: it puts layers of its own into the places of these.
    linear = [m.weight.numel() for m in model.modules() if type(m) is nn.Linear]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stacked = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 3)
    with torch.device("meta"):
        lora = attach_lora(model, rank=rank, alpha=rank, targets=names, seed=0)
    text = config_file.get_text_config()
    try:
        with loading(folder, f"model {folder}"):
            passes = count_passes(model)
    except ValueError as error:
        what = f"the memory that {config_file.model_type} takes is not known before it runs"
        raise NotCounted(f"{what}: {error}") from error
    return Shape(
        dtype=dtype,
        parameters=parameters,
        stacked=stacked,
        adapter=sum(tensor.numel() for tensor in lora.parameters()),
        adapted=sum(layer.weight.numel() for layer in adapted),
        outputs=sum(layer.out_features for layer in adapted),
        linear=sum(linear),
        small=sum(count for count in linear if count * dtype.itemsize < RETURNED_BYTES),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=model.get_output_embeddings().weight.shape[0],
        passes=passes,
    )


def footprint(shape: Shape, config: Config, lengths: Lengths, *, on_cpu: bool) -> Footprint:
    """Return the bytes of a run of these settings at its most."""
    size = shape.dtype.itemsize
    # A CPU's weights are the file, mapped, and what had to be put together from it.
    weights = (shape.parameters + (shape.stacked if on_cpu else 0)) * size
    device = "cpu" if on_cpu else "cuda"
    prefill_tokens = PREFILL_TOKENS.get(device, SMALL_PREFILL)
    cached, aligned, choice = _sampling_bytes(shape, config, size, lengths, prefill_tokens)
    activations, layer = _update_bytes(shape, config, size, lengths)
    kind = choose_copies(
        shape.linear * size, shape.adapted * size, torch.device(device), shape.dtype
    )
    numbers = {
        "packed": shape.linear,
        "stacked": shape.linear + shape.adapter,
        "merged": shape.adapted,
        "rounded": shape.adapter,
        "none": 0,
    }
    copied = numbers[kind] * size
    packed = copied if kind == "packed" else 0
    sets = 2 if config.teacher in ("ema", "copy") else 1
    keeps = keeps_prompts(config, on_cpu=on_cpu)
    teacher = packed + _teacher_bytes(shape, config, lengths, keeps=keeps)
    kept = _kept_bytes(shape, config, lengths, steps=config.steps) if keeps else 0
    gaps = 0
    if on_cpu:
        returned = (shape.linear - shape.small) * size if kind in ("packed", "stacked") else 0
        one_layer = aligned // (2 * shape.layers)
        sampled = copied + cached + choice - (aligned if one_layer >= RETURNED_BYTES else 0)
        gaps = _gaps_bytes(max(sampled, teacher) - returned, activations + kept)
    return Footprint(
        code=CODE_BYTES if on_cpu else 0,
        weights=weights,
        adapter=sets * shape.adapter * FP32,
        optimiser=3 * shape.adapter * FP32,
        kept=kept,
        kept_before=_kept_bytes(shape, config, lengths, steps=config.steps - 1) if keeps else 0,
        copies=copied,
        cache=cached,
        choice=choice,
        teacher=teacher,
        activations=activations,
        layer=layer,
        chunk=_chunk_bytes(shape, config, size, lengths, on_cpu=on_cpu),
        gaps=gaps,
        # To hash the file, a CPU maps it once more.
        loading=weights + (shape.parameters * size if on_cpu else 0),
    )


def _kept_bytes(shape: Shape, config: Config, lengths: Lengths, *, steps: int) -> int:
    """Return the bytes of the prompts that the fixed teacher keeps, if no step repeats one."""
    if config.token_budget is not None:
        return KEPT_BYTES  # nobody knows how many steps there will be
    prompts = config.batch_size * steps + config.eval_problems
    return min(KEPT_BYTES, prompts * lengths.teacher * shape.passes.column)


def _sampling_bytes(
    shape: Shape, config: Config, size: int, lengths: Lengths, prefill_tokens: int
) -> tuple[int, int, int]:
    """Return the bytes of the cache, what of them are columns in a row, and of choosing a token.

    prefill_tokens  of prompts that go through the model at once
    """
    rows = sampled_rows(config)
    # A plan, an explanation and a control's completion are written behind more than the problem.
    writes_more = config.teacher_reads in ("plan", "explained") or config.completion == "teacher"
    prompt = lengths.teacher if writes_more else lengths.student
    passes = shape.passes
    aligned = rows * (prompt + config.max_new_tokens) * passes.column
    # What is decoded beside the cache is one layer of it: copied to grow, or expanded from latents.
    full = aligned + rows * (prompt + config.max_new_tokens) * passes.decoded
    # When rows enter, the keys and values of their prompts, once a group, stand beside the cache.
    prompts = rows // config.group_size if config.method in GROUPED else rows
    room = min(config.max_new_tokens, GROWTH_COLUMNS)
    entering = (max(1, prompts) * prompt + rows * (prompt + room)) * passes.column
    prefill = max(prefill_tokens, prompt) * passes.forward
    logits = rows * shape.vocabulary * (size + 3 * FP32)  # as they come, scaled, allowed, exp
    return max(full, entering), aligned, max(logits, prefill)


def sampled_rows(config: Config) -> int:
    """Return how many completions are decoded at once: no more than there are."""
    attempts = config.vote_samples if config.teacher_reads == "voted" else 1
    looked_at = config.dev_problems if config.eval_every else 0
    sampled = config.batch_size * attempts
    wanted = max(sampled, config.eval_problems * config.eval_samples, looked_at)
    return min(config.sample_rows, -(-wanted // ranks.count()))  # each rank has its share of them


def _update_bytes(shape: Shape, config: Config, size: int, lengths: Lengths) -> tuple[int, int]:
    """Return what a micro-batch keeps for its backward pass, and what passes through one layer."""
    rows = _micro_rows(config, lengths)
    completion = int(rows * config.max_new_tokens)
    tokens = _student_tokens(config, lengths)
    kept = tokens * shape.passes.saved
    if config.gradient_checkpointing:
        # Every layer's input is kept, and all of the one layer that is computed again.
        kept = kept // shape.layers + tokens * shape.layers * shape.hidden * size
    # The final states of both roles and the gradient on them.
    kept += 3 * completion * shape.hidden * size
    # The gradient flows back through one layer at a time.
    passing = tokens * shape.passes.forward
    if config.method in GROUPED and (config.method != "grpo" or config.kl_coef):
        # The initial model or a neighbour's teacher scores the rows while their gradient waits.
        other = lengths.student if config.method == "grpo" else lengths.teacher
        passing = max(passing, (int(rows * other) + completion) * shape.passes.forward)
    return kept, passing


def _teacher_bytes(shape: Shape, config: Config, lengths: Lengths, *, keeps: bool) -> int:
    """Return what COPSD's teacher needs to score a micro-batch: what passes through one layer.

    Where it keeps prompts, that is of the completions only, and beside it stand the keys and values
    of all layers: of the prompts as they are kept, and of the rows that are made of them.
    """
    if config.method not in DISTILLED:
        return 0
    rows = _micro_rows(config, lengths)
    if not keeps:
        return int(rows * (lengths.teacher + config.max_new_tokens)) * shape.passes.forward
    cached = int(rows * (2 * lengths.teacher + config.max_new_tokens)) * shape.passes.column
    read = max(int(rows * config.max_new_tokens), lengths.teacher)
    return cached + read * shape.passes.forward


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
    plain = together * (lengths.student + config.max_new_tokens)
    packed = lengths.student + together * config.max_new_tokens
    shares = is_worth_packing(plain, packs=1, longest=packed)
    return int(rows * (lengths.student / (together if shares else 1) + config.max_new_tokens))


def _gaps_bytes(before: int, kept: int) -> int:
    """Return what stays empty on a CPU's heap while an update keeps so many bytes.

    before  what sampling and the teacher had there, and have freed
    The heap never shrinks. Of what is free, half is in pieces too small for an update's tensors, as
    measured with bench/footprint.py: from a fifth to seven tenths. A GPU's allocator uses it.
    """
    return max(before // 2, before - kept)


def loss_rows(shape: Shape, config: Config, lengths: Lengths, *, on_cpu: bool) -> int:
    """Return the rows of logits that exist at a time in the loss, whoever chose them."""
    rows = chunk_rows(
        config.chunk_tokens,
        compiled=_is_compiled(shape, config),
        device_type="cpu" if on_cpu else "cuda",
    )
    return min(rows, _loss_tokens(config, lengths))


def _loss_tokens(config: Config, lengths: Lengths) -> int:
    """Return the completion tokens of a micro-batch."""
    return int(_micro_rows(config, lengths) * config.max_new_tokens)


def _is_compiled(shape: Shape, config: Config) -> bool:
    """Say whether the loss is a compiled divergence, where the compiler works."""
    if config.method in ("grpo", "egrsd"):
        return False
    if config.compile is not None:
        return config.compile
    return compiling_pays(config.chunk_tokens, shape.vocabulary)


def _chunk_bytes(shape: Shape, config: Config, size: int, lengths: Lengths, *, on_cpu: bool) -> int:
    """Return the bytes of the logits that exist at a time in the loss."""
    logits = loss_rows(shape, config, lengths, on_cpu=on_cpu) * shape.vocabulary
    if config.method in ("grpo", "egrsd"):
        return logits * (size + 4 * FP32)
    if not _is_compiled(shape, config):
        return logits * (2 * size + 7 * FP32)
    # What the clip does to the gradient is found without the compiler, in chunks of its own.
    is_asked = config.clip_mode != "none" and config.cosine_every > 0
    rows = min(chunk_rows(config.chunk_tokens), _loss_tokens(config, lengths))
    cosine = rows * shape.vocabulary * (2 * size + 9 * FP32) if is_asked else 0
    # Student's and teacher's; compiled code keeps nothing else whole.
    return max(cosine, 2 * logits * size)
