"""A run's training problems as data for other trainers, with the prompts of both roles written out.

TRL's SDFTTrainer (trl.experimental.sdft) is the nearest relative of COPSD. It reads a column
"prompt", from which the student writes, and a column "privileged_context", what the teacher reads
beside it. Here the latter is the teacher's whole prompt, as training here has it: bench/trl_sdft.py
tells the trainer to take it so. Its docstring says how that trainer differs; the settings that do
not reach it, among them --english-share, are FIXED_THERE.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from parts.chat import freeze_date
from parts.family import context_length
from parts.files import json_lines, make_folder, refuse_no_file, refuse_other_name, write_text
from parts.model import load_config, load_tokenizer, published_name, resolve_model
from parts.prompts import Problem, render_prompt
from parts.recipe import Config
from parts.settings import fill, flag_of, refuse_idle, settle
from parts.setup import fitting_problems
from parts.view import say

FORMATS = ("trl",)
# What bench/trl_sdft.py has flags for; their defaults are those of parts/recipe.py.
PASSED_ON = ("steps", "batch_size", "micro_batch", "max_new_tokens", "lora_rank", "lr")
# What it does whatever the run's settings are. Its LoRA alpha is twice the rank.
FIXED_THERE = {
    "english_share": 0.0,
    "divergence": "forward_kl",
    "clip_mode": "none",
    "loss_over": "vocabulary",
    "teacher": "fixed",
    "teacher_reads": "solution",
    "completion": "student",
    "token_weight": "uniform",
    "loss_prefix": 1.0,
    "temperature": 1.1,
    "top_p": 0.95,
    "top_k": 20,
    "weight_decay": 0.0,
    "max_grad_norm": 0.1,
    "lora_targets": Config.lora_targets,
}


def export_data(given: dict[str, Any], kind: str, file: Path | None, console: Console) -> None:
    """Write the problems that a run with these flags trains on as JSON lines.

    file  None: the run's --out, with .jsonl behind it unless it has that already
    Reads the tokenizer and the configuration of the model, not its weights. Raises ValueError or
    OSError.
    """
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}; valid: {', '.join(FORMATS)}")
    if file and file.parent.is_dir():
        refuse_no_file(file, "--file")
    if file:
        refuse_other_name(file, "--file", ".jsonl", ".json")
    if file and "out" in given:
        raise ValueError("--file and --out both say where to; leave one")
    folder = resolve_model(given.get("model", Config.model), weights=False)
    config = settle(fill({**given, "method": "copsd"}, folder))
    refuse_idle(given, config)
    tokenizer, _ = freeze_date(load_tokenizer(folder), None)
    context = context_length(load_config(folder))
    train, _, _ = fitting_problems(config, tokenizer, context, console)
    target = file or Path(f"{str(config.out).removesuffix('.jsonl')}.jsonl")
    read = [Path(each).resolve() for each in (config.data, config.eval_data) if each]
    if target.resolve() in read:
        raise ValueError(f"{target} is what the problems are read from; name another --file")
    make_folder(target.parent)
    write_text(target, json_lines(trl_rows(config, train, tokenizer)))
    say(console, f"{len(train)} problems for TRL's SDFTTrainer: {target}")
    if lost := lost_settings(config):
        say(console, f"settings that do not reach it: {', '.join(lost)}")
    name, _ = published_name(folder)  # TRL knows no short names and no folders beside the program
    words = ["python", "bench/trl_sdft.py", "--data", str(target), "--model", name]
    for setting in PASSED_ON:
        value = getattr(config, setting)
        if value != getattr(Config, setting):
            words += [flag_of(setting), str(value)]
    say(console, f"next: {shlex.join(words)}")


def lost_settings(config: Config) -> list[str]:
    """Return "clip_mode entry (there none)" and so on: what bench/trl_sdft.py does otherwise."""
    there = {**FIXED_THERE, "lora_alpha": 2 * config.lora_rank}
    here = {name: getattr(config, name) for name in there}
    return [f"{n} {here[n]} (there {there[n]})" for n in there if here[n] != there[n]]


def trl_rows(
    config: Config, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Yield a row for each problem: id, prompt, privileged_context, answer.

    Both prompts are text in which the chat template is written out, for the student's ends in words
    that the template does not have (parts/prompts.py).
    """
    shown = {
        "english_problem": config.english_problem,
        "english_solution": config.english_solution,
    }
    for problem in problems:
        texts = {
            role: render_prompt(
                problem, problem.language, tokenizer, role=role, thinking=config.thinking, **shown
            )
            for role in ("student", "teacher")
        }
        yield {
            "id": problem.id,
            "prompt": _as_tokenised_later(texts["student"], tokenizer),
            "privileged_context": _as_tokenised_later(texts["teacher"], tokenizer),
            "answer": problem.answer,
        }


def _as_tokenised_later(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that becomes our ids where special tokens are added, as TRL has them added.

    A template that writes the token of the beginning would else have it twice.
    """
    wanted = tokenizer.encode(text, add_special_tokens=False)
    for form in (text, text.removeprefix(str(tokenizer.bos_token))):
        if tokenizer.encode(form) == wanted:
            return form
    raise ValueError("this tokenizer adds tokens to a text: TRL would train on other prompts")
