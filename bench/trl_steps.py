"""Steps of TRL's SDFTTrainer or GRPOTrainer with the settings of a run of ours; see bench/steps.py.

    python bench/trl_steps.py '{"method": "copsd", "model": "lab/tiny", ...}'

Prints the seconds of the last step and the tokens that it sampled, as JSON. TRL's side is as fast
as its settings make it: no gradient checkpointing, no mixed precision that a CPU lacks, nothing
saved or logged but what the trainer must, no second forward for the old log-probs.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bench.records import peer_version
from parts.data import load_problems, pick_order
from parts.grading import is_correct
from parts.model import load_tokenizer, resolve_model
from parts.prompts import Problem, build_prompt
from parts.recipe import Config
from parts.settings import fill


class Clock(TrainerCallback):
    """Keep the seconds of each step, from its rollouts to its update, and its mean length."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []
        self.lengths: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Keep what the trainer says of its completions."""
        if logs and "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])


def make_rows(config: Config, tokenizer: Any, problems: list[Problem]) -> list[dict[str, str]]:
    """Return the trainer's rows: our student's prompt, and what the teacher reads beyond it.

    TRL puts its teacher's text together from both. So the texts of the two teachers differ, but
    not, to within a few tokens, their lengths.
    """
    rows = []
    for problem in problems:
        student, teacher = (
            build_prompt(problem, problem.language, tokenizer, role=role)
            for role in ("student", "teacher")
        )
        beyond = teacher[: len(teacher) - len(student)]
        rows.append(
            {
                "prompt": tokenizer.decode(student),
                "privileged_context": tokenizer.decode(beyond),
                "answer": str(problem.answer),
            }
        )
    return rows


def rewards(completions: list[str], answer: list[str], **others: Any) -> list[float]:
    """Return 1 for each right completion, by our grader."""
    return [float(is_correct(text, gold)) for text, gold in zip(completions, answer, strict=True)]


def common_arguments(config: Config, folder: str) -> dict[str, Any]:
    """Return the settings that both trainers have."""
    return {
        "output_dir": folder,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.batch_size // config.micro_batch,
        "learning_rate": config.lr,
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "gradient_checkpointing": False,
        "bf16": False,  # autocast; the weights have the dtype that is asked for
        "use_cpu": True,
        "shuffle_dataset": False,
        "disable_dropout": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def make_trainer(config: Config, folder: str, clock: Clock) -> Any:
    """Return the trainer that is the method's nearest, on the problems in our order."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
    from trl.experimental.sdft import (  # pyright: ignore[reportMissingImports]
        SDFTConfig,
        SDFTTrainer,
    )

    model_folder = resolve_model(config.model)
    tokenizer = load_tokenizer(model_folder)
    problems = load_problems(Path(str(config.data)), language=config.lang)
    is_grpo = config.method == "grpo"
    batch = config.batch_size // (config.group_size if is_grpo else 1)
    order = [
        index
        for step in range(config.steps)
        for index in pick_order(len(problems), seed=config.seed, step=step, batch=batch)
    ]
    rows = make_rows(config, tokenizer, [problems[index] for index in order])
    settings = common_arguments(config, folder)
    dtype = getattr(torch, config.dtype)
    shared = {
        "model": AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "callbacks": [clock],
        "peft_config": LoraConfig(
            r=config.lora_rank,
            lora_alpha=int(config.lora_alpha),
            target_modules=config.lora_targets.split(","),
            task_type="CAUSAL_LM",
        ),
    }
    if is_grpo:
        arguments = GRPOConfig(
            num_generations=config.group_size,
            beta=config.kl_coef,
            epsilon=config.clip_low,
            epsilon_high=config.clip_high,
            **settings,
        )
        return GRPOTrainer(reward_funcs=rewards, args=arguments, **shared)
    arguments = SDFTConfig(
        num_generations=1,
        max_prompt_length=None,
        distillation_mode="full_logits",
        distillation_alpha=0.0,  # KL(teacher || student)
        teacher_model_kind="base",
        # Behind the teacher's own text comes what the student reads.
        teacher_prompt_template="{privileged_context}{prompt}",
        **settings,
    )
    return SDFTTrainer(args=arguments, **shared)


def read_settings(text: str) -> dict[str, Any]:
    """Return a run's settings by their names; ArgumentTypeError where the text has none such."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"broken JSON: {error}") from error
    if not isinstance(found, dict) or "model" not in found:
        raise argparse.ArgumentTypeError('valid: an object of settings, with a "model"')
    settings = {name.replace("-", "_"): value for name, value in found.items()}
    if unknown := sorted(settings.keys() - {f.name for f in fields(Config)}):
        raise argparse.ArgumentTypeError(f"unknown settings: {', '.join(unknown)}")
    return settings


def main() -> None:
    """Train, then print the last step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", type=read_settings, help="of copsd.py train, as JSON")
    settings = parser.parse_args().settings
    try:
        config = fill(settings, resolve_model(settings["model"]))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if peer_version("trl") is None:
        parser.error("trl is not installed: pip install -r bench/requirements.txt")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(config, folder, clock).train()
    tokens = clock.lengths[-1] * config.batch_size
    print(json.dumps({"seconds": clock.seconds[-1], "tokens": tokens}))


if __name__ == "__main__":
    main()
