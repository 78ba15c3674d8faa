"""Tokens per second of parts.sampler against transformers' generate, on a real chat model.

    python bench/sampler.py --model FOLDER
        32 rows of 32 prompts of mixed lengths, 128 new tokens each, both samplers in turn
    python bench/sampler.py --model FOLDER --samples 4 --ends
        8 prompts with 4 samples each, and rows end where the model ends them

bench/smollm2.py makes a folder with a real model. Both samplers get the same prompts, and the same
temperature, top-k and top-p. Without --ends no id counts as an end on either side, so both generate
exactly rows * new-tokens ids. With it the ids up to each row's end count: ours drops rows that
have ended, generate goes on padding them. The time to read the prompts is included. The two
alternate within one run, so that a busy machine slows both. Memory is the peak of a process that
samples once.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# The project is run from its folder, not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.records import OURS, Record, add_common_flags, report
from parts.machine import peak_memory_gib
from parts.sampler import SamplingParams, sample

Sampler = Callable[[Any, list[list[int]], int, SamplingParams, set[int]], int]

SENTENCES = (
    "Amina sells mangoes at the market and wants to plan her week.",
    "Each basket holds 24 mangoes, and a bad basket loses a quarter of them.",
    "On Monday she sold 3 baskets, on Tuesday twice as many, on Wednesday none.",
    "The bus to the market costs 450 shillings each way.",
    "Her brother helps on Fridays and takes one tenth of what they earn that day.",
    "A mango sells for 80 shillings, or 65 shillings if a customer buys ten or more.",
    "She saves half of the profit for a new stall that costs 52,000 shillings.",
    "The rent of the present stall is due at the end of the month.",
)


def chat_prompts(tokenizer: Any, rows: int, mean_tokens: int) -> list[list[int]]:
    """Return distinct chat prompts, from about half to one and a half times mean_tokens long."""
    prompts = []
    for row in range(rows):
        wanted = mean_tokens // 2 + mean_tokens * row // max(1, rows - 1)
        text = f"Question {row + 1}."
        ids = []
        sentence = row
        while len(ids) < wanted:
            text = f"{text} {SENTENCES[sentence % len(SENTENCES)]}"
            sentence += 1
            messages = [{"role": "user", "content": f"{text} How much does she earn in the week?"}]
            chat = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        prompts.append(ids)
    return prompts


def run_generate(
    model: Any, prompts: list[list[int]], samples: int, params: SamplingParams, ends: set[int]
) -> int:
    """Sample with generate, left-padded as it asks for; return the number of new tokens."""
    longest = max(len(ids) for ids in prompts)
    pads = [[0] * (longest - len(ids)) for ids in prompts]
    padded = [pad + ids for pad, ids in zip(pads, prompts, strict=True)]
    mask = [pad + [1] * len(ids) for pad, ids in zip(pads, prompts, strict=True)]
    torch.manual_seed(params.seed)
    output_BT = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=True,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_new_tokens=params.max_new_tokens,
        num_return_sequences=samples,
        pad_token_id=0,
        eos_token_id=sorted(ends) or None,
    )
    return sum(_length(row, ends) for row in output_BT[:, longest:].tolist())


def _length(ids: list[int], ends: set[int]) -> int:
    """Return how many ids there are up to the first end, with it.

    >>> _length([5, 7, 2, 0, 0], {2}), _length([5, 7], set())
    (3, 2)
    """
    for place, token in enumerate(ids, start=1):
        if token in ends:
            return place
    return len(ids)


def run_ours(
    model: Any, prompts: list[list[int]], samples: int, params: SamplingParams, ends: set[int]
) -> int:
    """Sample with parts.sampler; return the number of new tokens."""
    groups = sample(model, prompts, params, eos_ids=ends, samples_per_prompt=samples)
    return sum(len(rollout.completion_ids) for group in groups for rollout in group)


SAMPLERS: dict[str, Sampler] = {OURS: run_ours, "generate": run_generate}


def tokens_per_second(run: Sampler, *arguments: Any) -> float:
    """Time one run, waiting for the GPU where there is one."""
    started = time.perf_counter()
    tokens = run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="a model's folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=32, help="completions, a multiple of --samples")
    parser.add_argument("--samples", type=int, default=1, help="completions per prompt")
    parser.add_argument("--ends", action="store_true", help="rows end where the model ends them")
    parser.add_argument("--new-tokens", type=int, default=128, help="per row, at most")
    parser.add_argument("--prompt-tokens", type=int, default=96, help="mean prompt length")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0")
    parser.add_argument("--top-p", type=float, default=0.95, help="in (0, 1], 1 is off")
    parser.add_argument("--top-k", type=int, default=20, help="0 is off")
    parser.add_argument("--peak-of", choices=[*SAMPLERS], help="print its peak in MiB and stop")
    add_common_flags(parser, repeats=3)
    return parser.parse_args()


def prepare(
    arguments: argparse.Namespace,
) -> tuple[Any, list[list[int]], int, SamplingParams, set[int]]:
    """Return what a sampler is called with."""
    dtype = getattr(torch, arguments.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    model.to(arguments.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model.generation_config.eos_token_id = None  # generate would end rows there unasked
    ends = {tokenizer.eos_token_id} if arguments.ends else set()
    count = arguments.rows // arguments.samples
    prompts = chat_prompts(tokenizer, count, arguments.prompt_tokens)
    params = SamplingParams(
        arguments.new_tokens, arguments.temperature, arguments.top_p, arguments.top_k
    )
    return model, prompts, arguments.samples, params, ends


def peak_mib(name: str) -> float:
    """Return the peak of a sampler in MiB, measured in a process of its own."""
    command = [sys.executable, *sys.argv, "--peak-of", name]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> Iterator[Record]:
    """Let both samplers take turns; yield their records."""
    peaks = {name: peak_mib(name) for name in SAMPLERS}
    model, prompts, samples, params, ends = prepare(arguments)
    speeds: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for run in SAMPLERS.values():
        run(model, prompts, samples, replace(params, max_new_tokens=4), ends)  # warm-up
    for repeat in range(arguments.repeats):
        for name, run in SAMPLERS.items():
            seeded = replace(params, seed=repeat)
            speeds[name].append(tokens_per_second(run, model, prompts, samples, seeded, ends))
    kind = "distinct prompts" if arguments.samples == 1 else f"{arguments.samples} a prompt"
    row = f"sampler, {arguments.rows} rows, {kind}{', ragged ends' if ends else ''}"
    lengths = sorted(len(ids) for ids in prompts)
    notes = {
        OURS: f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, up to "
        f"{params.max_new_tokens} new ones a row, top-p {params.top_p}, top-k {params.top_k}, "
        f"{arguments.dtype}"
    }
    for name, values in speeds.items():
        yield Record(row, name, "tokens/s", tuple(values), peaks[name], notes.get(name, ""))


def main() -> None:
    """Run what the flags ask for."""
    arguments = parse_arguments()
    if arguments.peak_of:
        SAMPLERS[arguments.peak_of](*prepare(arguments))
        print(1024 * peak_memory_gib(arguments.device))
        return
    report(measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
