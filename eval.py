"""Evaluate a model on maths problems in one language: sample, grade, and estimate pass@k and its companions.

    python eval.py --pass-at-k 8                                  the lab model in Hausa
    python eval.py --pass-at-k 8 --adapter runs/copsd-lab-hau-0   the same with a trained adapter

Prompts are the student's training prompts, built by the same function; answers are judged by the same grader that
rewards GRPO. Every estimate carries a 95 % interval from a bootstrap over problems.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from parts.data import Problem, build_prompt, find_language, load_problems, prompt_opens_think
from parts.grading import extract_answer, is_correct, normalise
from parts.machine import keep_freed_memory, pick_device, pick_dtype
from parts.model import eos_ids, load_adapter, load_model, load_tokenizer, resolve_model, valid_ids
from parts.report import SamplingProgress, estimates_table
from parts.runs import (
    adapter_folder,
    read_recipe,
    recorded_fingerprint,
    weights_fingerprint,
)
from parts.sampler import SamplingParams, sample

RESAMPLES = 2000  # of the bootstrap; the interval's ends then move by less than 0.3 points from seed to seed
EXACT_FLIPS, FLIPS = 14, 20_000  # of the permutation test: all sign patterns of so many problems, or so many drawn


@dataclass(frozen=True)
class Attempt:
    """One graded completion: its text, the answer read from it (None: not formatted), the verdict, its length."""

    completion: str
    answer: str | None
    correct: bool
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Graded:
    """One problem with its gold answer and every attempt at it."""

    id: str
    gold: str
    attempts: list[Attempt]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased probability that at least one of k attempts, drawn from n with c right, is right.

    1 - C(n-c, k) / C(n, k), as a product so that no binomial overflows (Chen et al. 2021, 2107.03374, Eq. 1).
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.

    >>> pass_at_k(n=8, c=2, k=1), round(pass_at_k(n=8, c=2, k=4), 4)
    (0.25, 0.7857)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    all_wrong = 1.0
    for drawn in range(k):
        all_wrong *= (n - c - drawn) / (n - drawn)
    return 1.0 - all_wrong


def check_answers(problems: list[Problem]) -> None:
    """Raise ValueError for a problem whose gold answer is missing or cannot be graded."""
    for problem in problems:
        if problem.answer is None or normalise(problem.answer) is None:
            raise ValueError(f"problem {problem.id!r}: answer {problem.answer!r} cannot be graded; a number is needed")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    params: SamplingParams,
    *,
    samples: int = 1,
    thinking: str = "auto",
    max_rows: int | None = None,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[Graded]:
    """Sample `samples` completions of every problem under the student's prompt and grade each.

    Never cuts a prompt: one that does not fit the model's context with max_new_tokens is the sampler's ValueError.
    """
    check_answers(problems)
    think_open = prompt_opens_think(tokenizer, thinking)
    prompts = [build_prompt(problem, problem.language, tokenizer, thinking=thinking) for problem in problems]
    groups = sample(
        model, prompts, params, samples_per_prompt=samples, max_rows=max_rows, on_progress=on_progress,
        eos_ids=eos_ids(model, tokenizer), valid_ids=valid_ids(tokenizer),
    )  # fmt: skip
    results = []
    for problem, rollouts in zip(problems, groups, strict=True):
        attempts = []
        for rollout in rollouts:
            text = str(tokenizer.decode(rollout.completion_ids, skip_special_tokens=True))
            answer = extract_answer(text, think_open=think_open)
            correct = is_correct(text, str(problem.answer), think_open=think_open)
            attempts.append(Attempt(text, answer, correct, len(rollout.completion_ids), rollout.finish_reason))
        results.append(Graded(problem.id, str(problem.answer), attempts))
    return results


def keep_fitting(
    problems: list[Problem], prompts: list[list[int]], console: Console, *, context: int, max_new_tokens: int
) -> list[Problem]:
    """Return the problems whose prompts leave room for max_new_tokens; the others are left out whole, never cut.

    Says how many were left out. Raises ValueError if that is all of them.
    """
    kept = [p for p, prompt in zip(problems, prompts, strict=True) if len(prompt) + max_new_tokens <= context]
    if problems and not kept:
        raise ValueError(f"no problem fits the model's context of {context} tokens: lower --max-new-tokens")
    if len(kept) < len(problems):
        console.print(
            f"skipped {len(problems) - len(kept)} of {len(problems)} problems: their prompts and {max_new_tokens} new "
            f"tokens exceed the model's context of {context}",
            soft_wrap=True,
        )
    return kept


def bootstrap(numerators: list[float], denominators: list[float], *, seed: int = 0) -> Estimate:
    """Return sum(numerators) / sum(denominators), one pair a problem, with a 95 % percentile interval over problems.

    nan where the denominators sum to zero. A mean over problems has denominators of 1.
    """
    pairs = np.array([numerators, denominators], dtype=float)
    if not pairs[1].sum():
        return Estimate(math.nan, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    above, below = pairs[:, drawn].sum(axis=2)
    low, high = np.percentile(above[below > 0] / below[below > 0], [2.5, 97.5])
    return Estimate(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high))


def difference(first: list[float], second: list[float], *, seed: int = 0) -> Estimate:
    """Return the mean of second - first, per-problem scores in one order, with a bootstrap interval over problems."""
    changes = [b - a for a, b in zip(first, second, strict=True)]
    return bootstrap(changes, [1.0] * len(changes), seed=seed)


def paired_permutation(first: list[float], second: list[float], *, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test that per-problem scores do not differ in the mean.

    If they did not, a problem's difference would as likely have had the other sign. The p-value is the share of sign
    patterns whose sum is at least as far from 0 as the one seen: of all patterns where at most 14 problems differ, else
    of 20,000 drawn ones and the one seen (the +1 correction), so it is never 0.

    >>> paired_permutation([0.0] * 3, [1.0] * 3)
    0.25
    """
    changes = np.array([b - a for a, b in zip(first, second, strict=True) if a != b])
    seen = abs(changes.sum()) - 1e-9  # a pattern that ties but for rounding counts
    if len(changes) <= EXACT_FLIPS:
        signs = 1 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)
        return float((abs(signs @ changes) >= seen).mean())
    random = np.random.default_rng(seed)
    flipped = [random.choice((-1, 1), size=len(changes)) @ changes for _ in range(FLIPS)]
    return float((1 + (abs(np.array(flipped)) >= seen).sum()) / (1 + FLIPS))


def mcnemar(first: list[bool], second: list[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test: of the problems that only one got right, is it half each?

    >>> mcnemar([False] * 5, [True] * 5)
    0.0625
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    changed = gained + sum(a and not b for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(changed, count) for count in range(min(gained, changed - gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


def summarise(results: list[Graded], ks: list[int]) -> dict[str, Estimate]:
    """Return every metric over `results`: pass@k for each k, format rate, accuracy given a box, lengths, truncation.

    A completion is formatted when an answer could be read from a complete box. Lengths are in tokens, EOS included.
    """
    every = [1.0] * len(results)
    counts = [(len(r.attempts), sum(a.correct for a in r.attempts), r.attempts) for r in results]
    per_attempt = [1.0 / n for n, _, _ in counts]
    formatted = [sum(a.answer is not None for a in attempts) for _, _, attempts in counts]
    summary = {f"pass@{k}": bootstrap([pass_at_k(n, c, k) for n, c, _ in counts], every) for k in ks}
    summary["format rate"] = bootstrap([f * w for f, w in zip(formatted, per_attempt, strict=True)], every)
    summary["accuracy given a box"] = bootstrap([float(c) for _, c, _ in counts], [float(f) for f in formatted])
    truncated = [sum(a.finish_reason == "length" for a in attempts) / n for n, _, attempts in counts]
    summary["cut at the length limit"] = bootstrap(truncated, every)
    summary["mean tokens"] = bootstrap([sum(a.tokens for a in attempts) / n for n, _, attempts in counts], every)
    return summary


def write_results(results: list[Graded], path: Path) -> None:
    """Write one line of JSON per problem, with every completion, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in results), encoding="utf-8")
    os.replace(partial, path)


def start_program() -> Console:
    """Set up the process of a command, keep the libraries' own progress bars off the screen, and return the console."""
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    return Console()


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn a wrong value, and a file that is missing, torn or unwritable, into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


def evaluation_problems(benchmark: str | None, model_folder: Path, language: str, limit: int | None) -> list[Problem]:
    """Load the benchmark file, or the one that the model's recipe names, and keep its first `limit` problems."""
    file = benchmark or read_recipe(model_folder).get("eval_data")
    if file is None:
        raise ValueError(f"{model_folder} has no recipe that names a benchmark; pass --benchmark FILE")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; valid: 1 or more")
    problems = load_problems(Path(str(file).replace("{lang}", language)), language=language)[:limit]
    check_answers(problems)
    return problems


def main(
    pass_at_k: Annotated[int, typer.Option(help="k of pass@k; pass@1 is always reported")] = 8,
    samples: Annotated[int | None, typer.Option(help="completions per problem [k]", show_default=False)] = None,
    model: Annotated[
        str, typer.Option(help="a local folder, org/name, or a bare name such as Qwen2.5-1.5B")
    ] = "lab/tiny",
    adapter: Annotated[Path | None, typer.Option(help="a run folder, or an adapter folder as peft writes it")] = None,
    lang: Annotated[str, typer.Option(help="ISO 639-1 or 639-3 code")] = "hau",
    benchmark: Annotated[str | None, typer.Option(help="a file of problems [the model's recipe names one]")] = None,
    limit: Annotated[int | None, typer.Option(help="evaluate the first so many problems only")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus; 1 is off")] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(help="tokens per completion [the recipe's, else 4096]")] = None,
    thinking: Annotated[str, typer.Option(help="auto, on or off")] = "auto",
    rows: Annotated[int | None, typer.Option(help="completions decoded at once [all]", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="of the sampler")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    out: Annotated[Path | None, typer.Option(help="write one line of JSON per problem to this file")] = None,
) -> None:
    """Sample, grade and print pass@k with its companions and 95 % intervals."""
    console = start_program()
    with bad_input():
        samples = pass_at_k if samples is None else samples
        if not 1 <= pass_at_k <= samples:
            raise ValueError(f"--pass-at-k is {pass_at_k} and --samples {samples}; valid: 1 <= k <= samples")
        if out is not None and not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
        language, folder = find_language(lang), resolve_model(model)
        problems = evaluation_problems(benchmark, folder, language.iso3, limit)
        tokens = max_new_tokens or read_recipe(folder).get("max_new_tokens", 4096)
        params = SamplingParams(tokens, temperature, top_p, top_k, seed)
        tokenizer = load_tokenizer(folder)
        where = pick_device(device)
        network = load_model(folder, device=where, dtype=pick_dtype(dtype, where))
        if adapter is not None:
            found, expected = adapter_folder(adapter), recorded_fingerprint(adapter)
            if expected not in (None, weights_fingerprint(dict(network.named_parameters()))):
                raise ValueError(f"adapter {adapter} was trained on other base weights than those of {model}")
            load_adapter(network, found)
        prompts = [build_prompt(problem, language, tokenizer, thinking=thinking) for problem in problems]
        context = network.config.max_position_embeddings
        problems = keep_fitting(problems, prompts, console, context=context, max_new_tokens=tokens)
        with SamplingProgress(console, f"{language.english}, {samples} samples a problem") as progress:
            results = evaluate(
                network, tokenizer, problems, params, samples=samples, thinking=thinking, max_rows=rows,
                on_progress=progress.update,
            )  # fmt: skip
    summary = summarise(results, sorted({1, pass_at_k}))
    title = f"{model}{f' + {adapter}' if adapter else ''}: {language.english}, {len(results)} problems x {samples}"
    console.print(estimates_table(title, {language.iso3: {name: asdict(e) for name, e in summary.items()}}))
    if out is not None:
        write_results(results, out)
        console.print(f"completions and verdicts: {out}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()
