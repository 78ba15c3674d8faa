"""A whole training step of COPSD or GRPO, beside TRL's trainer and beside its matrix products.

    python bench/steps.py --method copsd --model FOLDER --data FILE --lang swa
    python bench/steps.py --method grpo --model FOLDER --data FILE --lang swa

ours   `copsd.py train`, as a user runs it, with the flags below
trl    SDFTTrainer or GRPOTrainer (bench/trl_steps.py) on the same problems, step for step, the same
       prompts to within a few tokens, loss, adapter and batch, at the fastest setting that we found
floor  the matrix products of the model's linear layers, and of its head, for the tokens that ours
       handled: nothing of attention, of norms, or of choosing tokens

Each measurement is a process of its own that takes two steps, the first of which does not count:
it compiles. The three take turns. Completions are sampled, so the two do not generate equally many
tokens: the notes say how many. Memory is the peak of the process.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.process import ROOT, own_process
from bench.records import (
    OURS,
    Record,
    add_common_flags,
    missing,
    peer_version,
    report,
)
from parts.data import load_problems, write_problems
from parts.files import read_rows

STEPS = 2  # the first warms up, the last is timed


@dataclass(frozen=True)
class Measured:
    """One timed step: its seconds, the peak of its process in MiB, the tokens that it sampled."""

    seconds: float
    peak_mib: float
    tokens: float


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="copsd", choices=["copsd", "grpo"])
    parser.add_argument("--model", default="lab/tiny", help="a model's folder")
    parser.add_argument("--data", type=Path, default=ROOT / "lab/problems/hau/train.jsonl")
    parser.add_argument("--lang", default="hau", help="the language of the data")
    parser.add_argument("--problems", type=int, default=8, help="per step")
    parser.add_argument("--group-size", type=int, default=8, help="GRPO's completions a problem")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows, ours")
    parser.add_argument("--peer-micro-batch", type=int, help="TRL's; COPSD: all, GRPO: 16")
    parser.add_argument("--new-tokens", type=int, default=96, help="per completion, at most")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--flags", default="", help="--flags=...: further ones of copsd.py train, ours"
    )
    parser.add_argument("--floor-of", help="time the floor of these counts of tokens and stop")
    add_common_flags(parser, repeats=3)
    return parser.parse_args()


def run_flags(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Return the settings of a step, by the names that copsd.py has for them."""
    group = arguments.group_size if arguments.method == "grpo" else 1
    return {
        "method": arguments.method,
        "model": arguments.model,
        "lang": arguments.lang,
        "data": str(data),
        "steps": STEPS,
        "batch-size": arguments.problems * group,
        "micro-batch": min(arguments.micro_batch, arguments.problems * group),
        "max-new-tokens": arguments.new_tokens,
        "lora-rank": arguments.lora_rank,
        "dtype": arguments.dtype,
        "english-share": 0,
        "eval-problems": 0,
        # TRL has no clip of the divergence.
        **({"group-size": group, "kl-coef": 0} if group > 1 else {"clip-mode": "none"}),
    }


def peer_flags(arguments: argparse.Namespace, flags: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's settings: ours, but for micro-batches of the size at which it is fastest."""
    fastest = 16 if arguments.method == "grpo" else arguments.problems
    rows = arguments.peer_micro_batch or fastest
    return {**flags, "micro-batch": min(rows, flags["batch-size"])}


def measure_ours(
    flags: dict[str, Any], further: list[str], folder: Path
) -> tuple[Measured, dict[str, Any]]:
    """Return our last step, and what it logged."""
    out = Path(tempfile.mkdtemp(dir=folder))
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--device", "cpu", "--no-gradient-checkpointing", *further, "--out", str(out / "run")]
    _, peak_mib = own_process([sys.executable, "copsd.py", "train", *words], out)
    logged = read_rows(out / "run" / "metrics.jsonl")[-1]
    return Measured(logged["time_s"], peak_mib, logged["rollout/tokens"]), logged


def measure_trl(flags: dict[str, Any], folder: Path) -> Measured:
    """Return TRL's last step."""
    command = [sys.executable, "bench/trl_steps.py", json.dumps(flags)]
    printed, peak_mib = own_process(command, folder)
    found = json.loads(printed.splitlines()[-1])
    return Measured(found["seconds"], peak_mib, found["tokens"])


def measure_floor(flags: dict[str, Any], logged: dict[str, Any], folder: Path) -> float:
    """Return the seconds of the bare products for what ours logged, in a process of its own."""
    counts = {
        "new_tokens": flags["max-new-tokens"],
        "sampled": logged["rollout/tokens"],
        "scored": logged["score/tokens"],
        "updated": logged["update/tokens"],
        "rows": flags["batch-size"],
        "samples": flags["group-size"] if flags["method"] == "grpo" else 1,
        "logits": 3 if flags["method"] == "copsd" else 2,  # products of the head for a token
        "model": flags["model"],
        "dtype": flags["dtype"],
    }
    command = [sys.executable, "bench/steps.py", "--floor-of", json.dumps(counts)]
    printed, _ = own_process(command, folder)
    return float(printed.splitlines()[-1])


def time_products(counts: dict[str, Any]) -> float:
    """Return the seconds of a step's matrix products, from products of the same sizes.

    A prompt is read once for all of its samples, in sampling and in scoring.
    """
    import torch
    from torch import nn

    from parts.copies import can_pack, packed_product, plain_product
    from parts.model import head_weight, load_model, resolve_model

    torch.set_grad_enabled(False)
    dtype = getattr(torch, counts["dtype"])
    model = load_model(resolve_model(counts["model"]), device="cpu", dtype=dtype)
    head = model.get_output_embeddings()
    packs = can_pack(head_weight(model).nbytes, model.device, dtype)
    weights = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]

    def _seconds(matrices: list[torch.Tensor], rows: int, backward: bool = False) -> float:
        """Time a product of so many rows with each matrix, plain or packed: the faster counts."""
        sides = [matrix.T if backward else matrix for matrix in matrices]
        inputs = [torch.randn(rows, side.shape[1], dtype=dtype) for side in sides]
        makers = [plain_product, packed_product] if packs else [plain_product]
        ways = [[maker(side.contiguous()) for side in sides] for maker in makers]
        return min(_lap(products, inputs) for products in ways)

    def _lap(products: list[Callable], inputs: list[torch.Tensor]) -> float:
        products[0](inputs[0])
        started = time.perf_counter()
        for product, given in zip(products, inputs, strict=True):
            product(given)
        return time.perf_counter() - started

    # A completion's last token is not fed back while sampling, nor is it scored from.
    student = counts["updated"]
    prompts = (student - counts["sampled"]) // counts["samples"]
    spared = (student - counts["sampled"]) - prompts  # prompt tokens of further samples
    decoded_rows = max(1, round(counts["sampled"] / counts["new_tokens"]))
    repeats = 3
    step = min(_seconds([*weights, head_weight(model)], decoded_rows) for _ in range(repeats))
    seconds = counts["new_tokens"] * step + _seconds(weights, max(1, prompts))
    seconds += _seconds(weights, counts["scored"] - spared)
    seconds += _seconds(weights, student - spared, backward=True)
    return seconds + counts["logits"] * _seconds([head_weight(model)], counts["sampled"])


def measure(arguments: argparse.Namespace) -> Iterator[Record]:
    """Let ours, TRL and the floor take turns; yield their records."""
    row = f"{arguments.method.upper()} step"
    has_trl = peer_version("trl") is not None
    if not has_trl:
        yield missing(row, "trl", "trl")
    ours: list[Measured] = []
    peers: list[Measured] = []
    floors: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        problems = load_problems(arguments.data, language=arguments.lang)
        data = folder / "problems.jsonl"
        # As many as the steps need, so that no step meets a problem again and gains by it.
        write_problems(data, problems[: STEPS * arguments.problems])
        flags = run_flags(arguments, data)
        for _ in range(arguments.repeats):
            measured, logged = measure_ours(flags, arguments.flags.split(), folder)
            ours.append(measured)
            floors.append(measure_floor(flags, logged, folder))
            if has_trl:
                peers.append(measure_trl(peer_flags(arguments, flags), folder))
    yield _record(row, OURS, ours, _split_note(arguments, flags, logged))
    yield Record(row, "floor", "s", tuple(floors))
    if has_trl:
        yield _record(row, "trl", peers, f"TRL {peer_version('trl')}")


def _split_note(
    arguments: argparse.Namespace, flags: dict[str, Any], logged: dict[str, Any]
) -> str:
    phases = ", ".join(
        f"{phase} {logged[f'{phase}/time_s']:.3g} s" for phase in ("rollout", "score", "update")
    )
    return (
        f"{Path(arguments.model).name}, {flags['batch-size']} rows in micro-batches of "
        f"{flags['micro-batch']}, up to {arguments.new_tokens} new tokens, LoRA "
        f"{arguments.lora_rank}, {arguments.dtype}; the last: {phases}"
    )


def _record(row: str, who: str, found: list[Measured], note: str) -> Record:
    tokens = f"{median(one.tokens for one in found):.0f} tokens sampled"
    peak_mib = max(one.peak_mib for one in found)
    seconds = tuple(one.seconds for one in found)
    return Record(row, who, "s", seconds, peak_mib, f"{note}; {tokens}")


def main() -> None:
    """Run what the flags ask for."""
    arguments = parse_arguments()
    if arguments.floor_of:
        print(time_products(json.loads(arguments.floor_of)))
        return
    report(measure(arguments), arguments.json)


if __name__ == "__main__":
    main()
