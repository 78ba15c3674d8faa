"""The same training on TRL's SDFTTrainer, whose rollouts vLLM can write.

    pip install trl datasets vllm            tried with trl 1.16; trl.experimental may change
    python copsd.py export-data --format trl --model Qwen2.5-1.5B --lang hau --file hau.jsonl
    python bench/trl_sdft.py --data hau.jsonl --model Qwen/Qwen2.5-1.5B --vllm

What differs from copsd.py: there is no entry clip; a micro-batch's loss is the mean of its
completions' means, not a share of the step's mean over tokens; pads stand before prompts; problems
come in TRL's own order, and vLLM's random numbers are its own; with vLLM a row ends only where the
model's own settings say, not also at the end of the chat template's turn; nothing is held out and
evaluated; logits of whole micro-batches exist at once, in full_logits. Of a run's settings, some do
not reach this script, such as --english-share: export-data names them.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from parts.model import eos_ids


def parse_arguments() -> argparse.Namespace:
    """Return the command line's flags, and `accumulation`, what they make of a step.

    The defaults are the paper's, as in parts/recipe.py.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="what export-data wrote")
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--out", default="runs/trl-sdft")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="completions of a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--vllm", action="store_true", help="let vLLM write the rollouts")
    given = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun and accelerate say it so
    try:
        given.accumulation = accumulation(given.batch_size, given.micro_batch, processes)
    except ValueError as error:
        parser.error(str(error))
    return given


def accumulation(batch: int, micro: int, processes: int) -> int:
    """Return how many micro-batches of each process make a step of so many completions.

    ValueError: the completions cannot be divided so. TRL would take steps of another size.

    >>> accumulation(32, 4, 1), accumulation(32, 4, 2)
    (8, 4)
    """
    if min(batch, micro) < 1 or batch % (micro * processes):
        raise ValueError(
            f"--batch-size is {batch}; valid: a multiple of --micro-batch {micro} times the "
            f"number of processes, {processes}"
        )
    return batch // (micro * processes)


def whole_prompt(prompt: Any, privileged_context: str) -> str:
    """Return what the teacher reads: the privileged context, which is its whole prompt."""
    return privileged_context


def main() -> None:
    """Train."""
    given = parse_arguments()
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from trl.experimental.sdft import (  # pyright: ignore[reportMissingImports]
        SDFTConfig,
        SDFTTrainer,
    )

    settings = SDFTConfig(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.accumulation,
        num_generations=1,
        max_completion_length=given.max_new_tokens,
        max_prompt_length=None,  # else prompts are cut
        temperature=1.1,
        top_p=0.95,
        top_k=20,
        distillation_mode="full_logits",
        distillation_alpha=0.0,  # KL(teacher || student)
        distillation_is_clip=None,
        teacher_model_kind="base",
        learning_rate=given.lr,
        lr_scheduler_type="linear",
        max_grad_norm=0.1,
        use_vllm=given.vllm,
        report_to=[],
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = SDFTTrainer(
        model=given.model,
        args=settings,
        train_dataset=load_dataset("json", data_files=str(Path(given.data)), split="train"),
        peft_config=LoraConfig(
            r=given.lora_rank, lora_alpha=2 * given.lora_rank, target_modules=targets
        ),
    )
    # Rows end where ours do, at the end of the chat template's turn as well.
    ends = sorted(eos_ids(trainer.model, trainer.processing_class))
    trainer.eos_token_ids = ends
    trainer.generation_kwargs["eos_token_id"] = ends
    trainer.generation_config.eos_token_id = ends
    trainer.teacher_context_builder._compose_teacher_prompt = whole_prompt
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
