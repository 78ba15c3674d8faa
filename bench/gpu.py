"""One short visit to a GPU: is it right there, how fast is it, and does it take what plan says?

    python bench/gpu.py --out gpu.jsonl                    Qwen2.5-1.5B's shape, about 8 minutes
    python bench/gpu.py --size toy --device cpu            the same at toy size, in a minute

A result is a line of JSON, written as it comes, so that a visit that is cut keeps what it had.
First what must hold: rows batched are rows alone, greedy ids are those of transformers' generate,
recorded steps give what plain ones give, gradients are as near to fp64 as autograd's, a run that
broke off ends as one that did not. Then rates, beside limits measured on the same card. Weights are
random: no token ends a row whose time is taken.
"""

import argparse
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import copsd
import kernels
from parts import batch, footprint, ranks
from parts.files import json_text
from parts.lora import attach_lora
from parts.machine import pick_device, pick_dtype, wait_for
from parts.sampler import Rollout, SamplingParams, sample
from parts.setup import configure, longest_prompts, prepare

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "vocab_size": 1600,  # at least what the lab's tokenizer has
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
LARGE = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
PROMPT = 64  # tokens
# What a part of the visit can fail with. A lack of memory is a RuntimeError.
FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
LOSS = {"kind": "forward_kl", "temperature": 1.1, "clip_mode": "entry", "clip": 0.05}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: dict[str, Any]
    rows: tuple[int, ...]  # decoded at once
    new_tokens: int
    loss_tokens: int
    matrix: int  # side of the matrices whose product gives the rate of products
    copied: int  # bytes that give the bandwidth
    step: tuple[int, int]  # completions of a training step, and their tokens
    recorded: int  # tokens of a completion whose recorded steps are checked


SIZES = {
    "toy": Size(SMALL, (2, 4), 8, 64, 256, 2**24, (4, 8), 24),
    "qwen": Size(LARGE, (32, 256), 1024, 2048, 8192, 2**32, (32, 512), 300),
}


class Visit:
    """Where results go, and how long the visit may take."""

    def __init__(self, out: Path | None, minutes: float, device: str):
        self.out = out
        self.ends = time.monotonic() + 60 * minutes
        self.device = device

    def report(self, what: str, **found: Any) -> None:
        """Print a result and append it to the file, at once."""
        line = json_text({"what": what, **found})
        print(line, flush=True)
        if self.out:
            with self.out.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    def section(self, what: str, work: Callable[[], None]) -> None:
        """Do a part of the visit, if there is time; a part that fails does not end the others."""
        if time.monotonic() > self.ends:
            self.report(what, skipped="no time is left")
            return
        started = time.monotonic()
        try:
            work()
        except FAULTS as error:
            self.report(what, error=f"{type(error).__name__}: {str(error).splitlines()[:1]}")
            traceback.print_exc()
        self.report("time", section=what, seconds=round(time.monotonic() - started, 1))

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return how long something takes, waiting for the GPU before and after."""
        wait_for(self.device)
        started = time.perf_counter()
        work()
        wait_for(self.device)
        return time.perf_counter() - started


def build_model(settings: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """Return a model of random weights, made where it is used."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**settings), dtype=dtype)
    model.generation_config.eos_token_id = None  # generate would end rows there
    return model.eval().requires_grad_(False)


def random_prompts(count: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Return prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = [max(1, longest - row % 8) for row in range(count)]
    return [
        torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]


def generate(model: Any, prompts: list[list[int]], new_tokens: int, **how: Any) -> list[list[int]]:
    """Return what transformers' generate writes, left-padded as it asks for."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    output_BT = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **how,
    )
    return output_BT[:, longest:].tolist()


def check_sampling(visit: Visit) -> None:
    """Compare greedy ids, batched, alone, and of generate; in fp32, where rounding decides less."""
    model = build_model(SMALL, visit.device, torch.float32)
    prompts = random_prompts(6, 24, SMALL["vocab_size"])
    params = SamplingParams(32, temperature=0.0)
    together = [group[0] for group in sample(model, prompts, params, eos_ids=set())]
    alone = [sample(model, [ids], params, eos_ids=set())[0][0] for ids in prompts]
    theirs = generate(model, prompts, 32, do_sample=False)
    visit.report(
        "greedy ids",
        batched_equals_single=[r.completion_ids for r in together]
        == [r.completion_ids for r in alone],
        equals_generate=[r.completion_ids for r in together] == theirs,
        logprob_gap_nats=largest_gap(together, alone),
    )


def largest_gap(some: list[Rollout], others: list[Rollout]) -> float:
    """Return by how many nats the log-probs of two samplings differ, as long as both go on."""
    return max(
        abs(a - b)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=False)
    )


def check_recording(visit: Visit, size: Size, dtype: torch.dtype) -> None:
    """Compare what is sampled with recorded steps and with plain ones, before and after an update.

    Rows end at different steps and make room for waiting ones, and completions outgrow both a
    bucket of columns and the cache. The update changes the adapter in place, as an optimiser does.
    """
    model = build_model(SMALL, visit.device, dtype)
    lora = attach_lora(model, rank=4, alpha=8.0, targets=("q_proj", "down_proj"), seed=0)
    prompts = random_prompts(8, 24, SMALL["vocab_size"])
    ends = set(range(0, SMALL["vocab_size"], size.recorded))  # about one token of so many is one

    def _sampled() -> list[Rollout]:
        params = SamplingParams(size.recorded, temperature=1.0)
        return [group[0] for group in sample(model, prompts, params, eos_ids=ends, max_rows=4)]

    record = batch.Recorder.record
    for when in ("before", "after"):
        for tensor in lora.parameters():
            torch.nn.init.normal_(tensor, std=0.1)
        with patch.object(batch.Recorder, "record", autospec=True, side_effect=record) as recording:
            recorded = _sampled()
        with patch.object(batch, "RECORDED", ()):
            plain = _sampled()
        equal = [
            one.completion_ids == other.completion_ids
            for one, other in zip(recorded, plain, strict=True)
        ]
        visit.report(
            "recorded steps",
            dtype=str(dtype),
            update=when,
            graphs=recording.call_count,
            tokens=sum(len(rollout.completion_ids) for rollout in plain),
            rows=len(equal),
            rows_equal_to_plain=sum(equal),
            logprob_gap_nats=largest_gap(recorded, plain),
        )


def check_gradient(visit: Visit) -> None:
    """Compare the loss's gradient with fp64's, beside that of plain autograd in the same type."""
    generator = torch.Generator().manual_seed(2)
    student_ND, teacher_ND = (torch.randn(37, 64, generator=generator).double() for _ in range(2))
    head_VD = torch.randn(1100, 64, generator=generator).double()
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(visit.device, dtype) for x in (student_ND, teacher_ND, head_VD)]
        exact, naive, ours = (
            _gradient(inputs, torch.float64, chunked=False),
            _gradient(inputs, dtype, chunked=False),
            _gradient(inputs, dtype, chunked=True),
        )
        visit.report(
            "gradient against fp64",
            dtype=str(dtype),
            error=float((ours - exact).norm() / exact.norm()),
            naive_error=float((naive - exact).norm() / exact.norm()),
        )


def _gradient(inputs: list[torch.Tensor], dtype: torch.dtype, *, chunked: bool) -> torch.Tensor:
    student_ND, teacher_ND, head_VD = (tensor.to(dtype) for tensor in inputs)
    student_ND.requires_grad_()
    if chunked:
        loss_N, _ = kernels.chunked_divergence(
            student_ND, teacher_ND, head_VD, chunk_tokens=16, **LOSS
        )
    else:
        loss_N = kernels.divergence(student_ND @ head_VD.T, teacher_ND @ head_VD.T, **LOSS)
    (gradient_ND,) = torch.autograd.grad(loss_N.sum(), student_ND)
    return gradient_ND.double().cpu()


class BreaksOff:
    """A view that ends a run after a step, as a kill would; None: never."""

    def __init__(self, after: int | None):
        self.after = after

    def show(self, metrics: dict[str, Any]) -> None:
        """Take a step's metrics."""
        if metrics["step"] == self.after:
            raise InterruptedError


def train_lab(visit: Visit, out: str, after: int | None) -> Path:
    """Train on the lab from where `out` stands; return the last adapter's folder.

    after  break off after that step; None: go on to the end
    """
    given = {"steps": 3, "save_every": 1, "batch_size": 8, "eval_problems": 0}
    given |= {"out": out, "device": visit.device}
    config, folder = configure(given)
    setup, run = prepare(config, folder, Console(quiet=True))
    with suppress(InterruptedError):
        copsd.train_copsd(setup, run, BreaksOff(after))
    return run.adapter_folder(3)


def check_resume(visit: Visit) -> None:
    """Compare a lab run that broke off and went on with one that did not."""
    with tempfile.TemporaryDirectory() as temporary:
        train_lab(visit, f"{temporary}/broken", after=2)
        straight, broken = (
            load_file(train_lab(visit, f"{temporary}/{name}", None) / "adapter_model.safetensors")
            for name in ("straight", "broken")
        )
    gaps = [(straight[name] - broken[name]).abs().max() for name in straight]
    visit.report("resume", largest_gap=float(max(gaps)))


def measure_limits(visit: Visit, size: Size, dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes and the multiplications a second that this device gives, measured."""

    def _fastest(work: Callable[[], Any]) -> float:
        return min(visit.seconds(work) for _ in range(6))

    source = torch.ones(size.copied, dtype=torch.uint8, device=visit.device)
    copying = _fastest(partial(torch.empty_like(source).copy_, source))
    left = torch.randn(size.matrix, size.matrix, device=visit.device, dtype=dtype)
    multiplying = _fastest(partial(torch.mm, left, left, out=torch.empty_like(left)))
    bandwidth = 2 * size.copied / copying
    rate = 2 * size.matrix**3 / multiplying
    visit.report("limits", bytes_per_s=bandwidth, flop_per_s=rate, dtype=str(dtype))
    return bandwidth, rate


def measure_decode(
    visit: Visit, model: Any, rows: int, size: Size, bandwidth: float, contestant: tuple[str, int]
) -> None:
    """Time one sampler, and set it beside the bytes that each token must be read for.

    contestant  its name, and its top-k; 0: off, as GRPO and evaluations have it
    """
    who, top_k = contestant
    prompts = random_prompts(rows, PROMPT, 1000)

    def _ours(new_tokens: int) -> None:
        params = SamplingParams(new_tokens, temperature=1.0, top_p=0.95, top_k=top_k)
        sample(model, prompts, params, eos_ids=set())

    def _theirs(new_tokens: int) -> None:
        how = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": top_k}
        generate(model, prompts, new_tokens, **how)

    work = {"ours": _ours, "generate": _theirs}[who]
    # What is done once is done at every length on the way: kernels are chosen, graphs captured. So
    # the first run is told apart. transformers has another length at every token, and one run.
    new_tokens = size.new_tokens if who == "ours" else -(-size.new_tokens // 4)
    first = visit.seconds(lambda: work(new_tokens))
    seconds = visit.seconds(lambda: work(new_tokens)) if who == "ours" else first
    config = model.config
    head_size = config.hidden_size // config.num_attention_heads
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    read = sum(parameter.nbytes for parameter in model.parameters())
    read += rows * (PROMPT + new_tokens / 2) * column * model.dtype.itemsize
    limit = rows * bandwidth / read
    found = rows * new_tokens / seconds
    visit.report(
        "decode",
        who=who,
        top_k=top_k,
        rows=rows,
        new_tokens=new_tokens,
        first_run_s=first,
        tokens_per_s=found,
        ms_per_step=1000 * seconds / new_tokens,
        share_of_bandwidth_limit=found / limit,
    )


def measure_divergence(visit: Visit, size: Size, dtype: torch.dtype, rate: float) -> None:
    """Time the loss and its gradient, and set it beside its three matrix products."""
    shape = (size.loss_tokens, size.model["hidden_size"])
    student_ND = torch.randn(shape, device=visit.device, dtype=dtype).requires_grad_()
    teacher_ND = torch.randn(shape, device=visit.device, dtype=dtype)
    head_VD = torch.randn(size.model["vocab_size"], shape[1], device=visit.device, dtype=dtype)
    head_VD *= 0.05

    def _loss() -> None:
        loss_N, _ = kernels.chunked_divergence(student_ND, teacher_ND, head_VD, **LOSS)
        loss_N.sum().backward()

    _loss()  # compiles
    seconds = min(visit.seconds(_loss) for _ in range(5))
    products = 6 * size.loss_tokens * head_VD.numel()
    visit.report(
        "divergence",
        tokens=size.loss_tokens,
        seconds=seconds,
        share_of_product_rate=products / seconds / rate,
    )


def measure_step(visit: Visit, size: Size, dtype: torch.dtype) -> None:
    """Take two training steps; report the last one's split and the peak, beside the plan's."""
    rows, new_tokens = size.step
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        build_model(size.model, visit.device, dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "lab" / "tiny").save_pretrained(folder)
        given = {"model": str(folder), "steps": 2, "eval_problems": 0, "device": visit.device}
        given |= {"batch_size": rows, "max_new_tokens": new_tokens, "out": f"{temporary}/run"}
        given |= {"data": str(ROOT / "lab" / "problems" / "hau" / "train.jsonl")}
        given |= {"dtype": str(dtype).removeprefix("torch.")}
        if visit.device.startswith("cuda"):
            torch.cuda.empty_cache()
        config, model_folder = configure(given)
        setup, run = prepare(config, model_folder, Console(quiet=True))
        with patch("parts.setup.eos_ids", lambda *_: set()):
            copsd.train_copsd(setup, run, BreaksOff(None))
        last = run.metrics()[-1]
        lengths = longest_prompts(config, setup.tokenizer, setup.train)
        shape = footprint.read_shape(folder, config, dtype)
    on_cpu = not visit.device.startswith("cuda")
    planned = footprint.footprint(shape, config, lengths, on_cpu=on_cpu).peak / 2**30
    split = {name: value for name, value in last.items() if name.endswith(("time_s", "/tokens"))}
    visit.report("step", rows=rows, new_tokens=new_tokens, **split)
    peak = last["memory/peak_gib"]  # on a CPU with all that Python and torch take
    visit.report("memory", peak_gib=peak, plan_gib=planned, plan_to_peak=planned / peak)


def main() -> None:
    """Make the visit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=[*SIZES], default="qwen")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after so many")
    parser.add_argument("--out", type=Path, help="a file of JSON lines; results are appended")
    given = parser.parse_args()
    size = SIZES[given.size]
    device = ranks.own_device(pick_device(given.device))
    dtype = pick_dtype("auto", device)
    visit = Visit(given.out, given.minutes, device)
    card = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    visit.report("place", device=device, card=card, size=given.size, dtype=str(dtype), **versions)
    visit.section("sampling", lambda: check_sampling(visit))
    for each in dict.fromkeys([torch.float32, dtype]):
        visit.section("recording", partial(check_recording, visit, size, each))
    visit.section("gradient", lambda: check_gradient(visit))
    visit.section("resume", lambda: check_resume(visit))
    limits: list[float] = []
    visit.section("limits", lambda: limits.extend(measure_limits(visit, size, dtype)))
    if limits:
        visit.section("loss", lambda: measure_divergence(visit, size, dtype, rate=limits[1]))
    visit.section("step", lambda: measure_step(visit, size, dtype))
    if limits:
        model = build_model(size.model, device, dtype)
        for rows in size.rows:
            for contestant in (("ours", 20), ("ours", 0), ("generate", 20)):
                work = partial(measure_decode, visit, model, rows, size, limits[0], contestant)
                visit.section("decode", work)


if __name__ == "__main__":
    main()
