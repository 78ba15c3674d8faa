"""Carry one problem through: both prompts, a rollout, and what each of its tokens adds to the loss.

    python copsd.py show --lang hau
    python copsd.py show --lang hau --adapter runs/copsd-tiny-hau-0 --html walk.html

The method on one screen. The student writes; at each of its tokens the teacher, which is the same
model with more to read, has its own opinion; the distance between the two, averaged over the
tokens, is COPSD's loss. GRPO hears one number of the same rollout: 0 or 1.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from torch import Tensor

from copsd import completion_hidden, roll_out
from kernels import clip_products, gradient_cosine
from parts import runs
from parts.adapters import load_adapter
from parts.chat import completion_text, freeze_date, prompt_opens_think
from parts.data import hub_training_file, keep_fitting, load_problems
from parts.family import context_length
from parts.grading import grade
from parts.machine import pick_device, pick_dtype
from parts.model import attach_lora, eos_ids, head_weight, load_model, load_tokenizer, teacher_view
from parts.prompts import Problem, render_prompt, template_hash
from parts.recipe import Config
from parts.sampler import Rollout
from parts.setup import Setup
from parts.tokens import TokenRow, explain_tokens, tokens_table, write_tokens_page
from parts.view import say

DRAWN = 8  # completions, of which the one is shown that the teacher disagrees with most


@dataclass(frozen=True)
class Walk:
    """One problem carried through."""

    problem: Problem
    rollout: Rollout
    prompts: dict[str, str]  # by role, as text
    prompt_tokens: dict[str, int]
    completion: str
    rows: list[TokenRow]  # a row a token, of the untrained student
    after: list[TokenRow] | None  # the same tokens under the trained student
    notes: list[str]  # what stands below the table


def prepare(config: Config, folder: Path, adapter: Path | None, console: Console) -> Setup:
    """Load the model, and the first training problem. ValueError or OSError: bad input.

    adapter  a run or adapter folder whose student is to be shown beside the untrained one
    """
    device = pick_device(config.device)
    model = load_model(folder, device=device, dtype=pick_dtype(config.dtype, device))
    day = runs.Run(adapter).recorded_day() if adapter else None  # the day it was trained with
    tokenizer, _ = freeze_date(load_tokenizer(folder), day)
    source = Path(config.data) if config.data else hub_training_file(config.lang)
    problem = load_problems(source, language=config.lang)[0]
    if adapter is None:
        targets = tuple(config.lora_targets.split(","))
        lora = attach_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=targets,
            seed=config.seed,
        )
    else:
        fingerprint = runs.folder_fingerprint(folder)
        runs.refuse_foreign_adapter(adapter, fingerprint, config.model)
        lora = load_adapter(model, runs.last_adapter_folder(adapter))
    setup = Setup(config, model, tokenizer, lora, train=[problem], heldout=[])
    keep_fitting(
        [problem],
        [max(setup.student_prompt(problem), setup.teacher_prompt(problem), key=len)],
        console,
        context=context_length(model.config),
        max_new_tokens=config.max_new_tokens,
    )
    return setup


@torch.no_grad()
def walk(setup: Setup, *, trained: bool) -> Walk:
    """Return the first problem carried through; `trained`: beside the student with its adapter."""
    problem = setup.train[0]
    # With the adapter off the student is the base model, as it is before the first step.
    with teacher_view(setup.lora, "fixed"):
        rollouts = roll_out(setup, [problem], seed=setup.config.seed, samples=DRAWN)
        explained = [_explain(setup, problem, rollout) for rollout in rollouts]
    distances = [fmean(row.kl for row in rows) for rows in explained]
    furthest = distances.index(max(distances))
    rollout = rollouts[furthest]
    rows = explained[furthest]
    with teacher_view(setup.lora, "fixed"):
        clip_note = _clip_note(setup, problem, rollout)
    after = None
    notes = [
        f"shown: of {DRAWN} completions, the one that the teacher disagrees with most",
        _reward_note(setup, problem, rollout, "GRPO hears of this rollout"),
        clip_note,
    ]
    if trained:
        after = _explain(setup, problem, rollout)
        (own,) = roll_out(setup, [problem], seed=setup.config.seed)
        notes.append(f"the trained student writes: {_text(setup, own)}")
        notes.append(_reward_note(setup, problem, own, "GRPO would hear of that"))
    return Walk(
        problem=problem,
        rollout=rollout,
        prompts=_prompt_texts(setup, problem),
        prompt_tokens={
            "student": len(setup.student_prompt(problem)),
            "teacher": len(setup.teacher_prompt(problem)),
        },
        completion=_text(setup, rollout),
        rows=rows,
        after=after,
        notes=notes,
    )


def print_walk(setup: Setup, found: Walk, console: Console) -> None:
    """Print the prompts with the boundary where the completion begins, the table, and the notes."""
    for role, text in found.prompts.items():
        say(console, f"===== the {role} reads, {found.prompt_tokens[role]} tokens =====")
        say(console, f"{text}<<< the completion begins here >>>\n")
    say(console, f"===== the student writes, {len(found.rows)} tokens =====\n{found.completion}\n")
    console.print(tokens_table(found.rows, after=found.after))
    for note in found.notes:
        say(console, note)
    config = setup.config
    say(console, f"template hash {template_hash(setup.tokenizer, config.lang, config.thinking)}")


def write_page(found: Walk, path: Path) -> None:
    """Write the same as one page for the browser."""
    write_tokens_page(
        path,
        title=f"One problem carried through: {found.problem.id}, {found.problem.language}",
        prompts={
            f"What the {role} reads ({found.prompt_tokens[role]} tokens)": text
            for role, text in found.prompts.items()
        },
        rows=found.rows,
        after=found.after,
        notes=found.notes,
    )


def _hidden(setup: Setup, problem: Problem, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return student_ND, of the student as it is at the moment, and teacher_ND."""
    completions = [rollout.completion_ids]
    student_ND = completion_hidden(setup.model, [rollout.prompt_ids], completions)
    with teacher_view(setup.lora, "fixed"):
        teacher_ND = completion_hidden(setup.model, [setup.teacher_prompt(problem)], completions)
    return student_ND, teacher_ND


def _clip_note(setup: Setup, problem: Problem, rollout: Rollout) -> str:
    """Say how far the clip turns the gradient of this rollout; where none is set, the paper's."""
    config = setup.config
    is_set = config.clip_mode != "none"
    mode = config.clip_mode if is_set else Config.clip_mode
    clip = config.clip if is_set else Config.clip
    products_3N = clip_products(
        *_hidden(setup, problem, rollout),
        head_weight(setup.model),
        kind=config.divergence,
        beta=config.beta,
        temperature=config.temperature,
        clip_mode=mode,
        clip=clip,
    )
    return (
        f"cosine of the gradient on the logits with and without the {mode} clip of {clip:g} nats: "
        f"{gradient_cosine(products_3N):.3f}{'' if is_set else ' (it is not set here)'}"
    )


def _explain(setup: Setup, problem: Problem, rollout: Rollout) -> list[TokenRow]:
    """Return a row for each token of the rollout, under the student as it is at the moment."""
    config = setup.config
    student_ND, teacher_ND = _hidden(setup, problem, rollout)
    return explain_tokens(
        student_ND,
        teacher_ND,
        head_weight(setup.model),
        rollout.completion_ids,
        lambda ids: str(setup.tokenizer.decode(ids)),
        kind=config.divergence,
        beta=config.beta,
        temperature=config.temperature,
        clip_mode=config.clip_mode,
        clip=config.clip,
    )


def _prompt_texts(setup: Setup, problem: Problem) -> dict[str, str]:
    config = setup.config
    return {
        role: render_prompt(
            problem,
            problem.language,
            setup.tokenizer,
            role=role,
            thinking=config.thinking,
            english_problem=config.english_problem,
            english_solution=config.english_solution,
        )
        for role in ("student", "teacher")
    }


def _text(setup: Setup, rollout: Rollout) -> str:
    end_ids = eos_ids(setup.model, setup.tokenizer)
    return completion_text(rollout.completion_ids, setup.tokenizer, end_ids)


def _reward_note(setup: Setup, problem: Problem, rollout: Rollout, what: str) -> str:
    """Say the reward of a rollout, as GRPO gets it, and why."""
    if problem.answer is None:
        return f"{what}: nothing, for the problem has no answer"
    think_open = prompt_opens_think(setup.tokenizer, setup.config.thinking)
    verdict = grade(_text(setup, rollout), problem.answer, think_open=think_open)
    return f"{what}: {int(verdict.correct)} ({verdict.reason}; the answer is {problem.answer})"
