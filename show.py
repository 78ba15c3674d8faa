"""Carry one problem through: both prompts, a rollout, and what each of its tokens adds to the loss.

    python copsd.py show --lang hau
    python copsd.py show --lang hau --adapter runs/copsd-tiny-hau-0 --html walk.html
    python copsd.py show --lang hau --method ophsd

The method on one screen. The student writes; at each of its tokens the teacher, which is the same
model with more to read, has its own opinion; the distance between the two, averaged over the
tokens, is COPSD's loss. GRPO hears one number of the same rollout: 0 or 1. Another method is shown
with its own teacher and with each token's weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from copsd import Group, advantages, completion_hidden, reward, roll_out
from kernels import chunked_logprob, clip_products, gradient_cosine
from methods import reader, witness_pair
from parts import ranks, runs
from parts.adapters import load_adapter
from parts.chat import freeze_date
from parts.data import hub_training_file, keep_fitting, load_problems, replace_solutions
from parts.family import context_length
from parts.files import read_sealed
from parts.grading import grade, is_gradable
from parts.identity import folder_fingerprint, refuse_foreign_adapter
from parts.lora import attach_lora, teacher_view
from parts.machine import pick_device, pick_dtype
from parts.measure import check_answers
from parts.model import (
    check_vocabulary,
    head_weight,
    load_model,
    load_tokenizer,
    resolve_model,
)
from parts.prompts import Problem, find_language, template_hash
from parts.recipe import DISTILLED, DIVERGENCES, GROUPED, Config, divergence_options
from parts.sampler import Rollout
from parts.selfcheck import check_model
from parts.settings import check_value, fill
from parts.setup import Setup, longest_prompt, needs_answers, needs_teacher
from parts.steps import write_completions
from parts.tokens import TokenRow, explain_tokens, tokens_table, write_tokens_page
from parts.view import NO_NOTE, lacks_notes, say
from parts.weights import credit, token_weights

# Where there is no group, so many are sampled. The one furthest from the teacher is shown.
DRAWN = 8
# Settings that a walk takes from a run's record, beside those that can be typed. The batch must be
# a multiple of the group.
RECORDED = ("completion", "group_size", "batch_size", "scale_rewards")
HERE = ("device",)  # a setting of the machine at hand, whatever the run had
ANY_METHOD = ("model", "lang", "data", "seed", "thinking", "dtype")  # not of the method's recipe
OURS = " (the formula of confidence is ours)"  # said wherever its name is


@dataclass(frozen=True)
class Walk:
    """One problem carried through."""

    problem: Problem
    rollout: Rollout
    prompts: dict[str, str]  # as text, by who reads it
    prompt_tokens: dict[str, int]
    completion: str
    rows: list[TokenRow]  # a row a token, of the untrained student
    after: list[TokenRow] | None  # the same tokens under the trained student
    mean_is: str  # what the method makes of the rows' mean; "" where it does not train on it
    name: str  # of the divergence, in one word
    notes: list[str]  # what stands below the table


@dataclass(frozen=True)
class Lesson:
    """A rollout as a method learns from it."""

    rollout: Rollout
    teacher_prompt: list[int]
    reader: str = "the teacher reads"  # what is said of the teacher's prompt
    advantage: float = 0.0  # of the completion, where the method has rewards
    weight: float = 1.0  # of all its tokens, beside what the token weights make of it
    notes: tuple[str, ...] = ()
    whole: Rollout | None = None  # where only its start is learned from


def as_in_run(
    given: dict[str, Any], adapter: Path, shown: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Return the settings of a walk beside a run's student, and a line that says their source.

    given  what was typed: it goes before what the run's record says
    shown  the settings that can be typed
    Where `adapter` is no run's folder they are `given`, and there is no line. Where another method
    is typed than the record's, the record's recipe is ignored; where another language is, its data.
    Raises ValueError for a record that is damaged, and OSError for data that are not there.
    """
    file = runs.Run(adapter).record_file
    if not file.is_file() or runs.last_adapter_folder(adapter) == adapter:
        return given, ""
    record = read_sealed(file).get("config")
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it has no config")
    taken = _taken(record, given, shown, file)
    if taken.get("data") and not Path(taken["data"]).exists():
        gone = f"{adapter} was trained on {taken['data']}, which is not there"
        raise FileNotFoundError(f"{gone}; name the file with --data")
    config = {**taken, **given}
    said = ", ".join(_told(taken, config))
    return config, f"settings as in {adapter}{': ' if said else ''}{said}"


def _taken(
    record: dict[str, Any], given: dict[str, Any], shown: Sequence[str], file: Path
) -> dict[str, Any]:
    """Return the settings that a walk takes from a run's record; ValueError: they are damaged."""
    method = given.get("method", record.get("method"))
    names = [*shown, *RECORDED] if method == record.get("method") else ANY_METHOD
    known = {f.name: f for f in fields(Config)}
    taken = {n: record[n] for n in names if n in record and n not in (*HERE, *given)}
    for name, value in taken.items():
        check_value(known[name], value, f"{file}: {name}")
    if "lang" in given and find_language(given["lang"]).iso3 != record.get("lang"):
        taken.pop("data", None)
    return taken


def _told(taken: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return "lang hau" and so on: of what was taken, what the method's own recipe would not set.

    config  all settings of the walk that are known so far
    """
    first = ("method", "model", "lang")
    chosen = {name: config[name] for name in first if name in config}
    plain = fill(chosen, resolve_model(config.get("model", Config.model)))
    unsaid = (*first, "data", "batch_size")
    own = [n for n in taken if n not in unsaid and taken[n] != getattr(plain, n)]
    return [f"{name} {taken[name]}" for name in ("method", "lang", *own) if name in taken]


def prepare(config: Config, folder: Path, adapter: Path | None, console: Console) -> Setup:
    """Load the model, and the first training problem. ValueError or OSError: bad input.

    adapter  a run or adapter folder whose student is to be shown beside the untrained one
    """
    device = ranks.own_device(pick_device(config.device))
    model = load_model(folder, device=device, dtype=pick_dtype(config.dtype, device))
    check_model(model, f"model {config.model}")
    day = runs.Run(adapter).recorded_day() if adapter else None  # the day it was trained with
    tokenizer, _ = freeze_date(load_tokenizer(folder), day)
    source = Path(config.data) if config.data else hub_training_file(config.lang)
    check_vocabulary(model, tokenizer, f"model {config.model}")
    problem = replace_solutions(config, load_problems(source, language=config.lang))[0]
    if needs_answers(config) or is_gradable(problem.answer):
        check_answers([problem])
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
        fingerprint = folder_fingerprint(folder)
        refuse_foreign_adapter(adapter, fingerprint, config.model, folder, console)
        lora = load_adapter(model, runs.last_adapter_folder(adapter))
    # A walk shows the teacher of a first step: the base model, whenever it is renewed later.
    config = replace(config, teacher="fixed")
    setup = Setup(config, model, tokenizer, lora, train=[problem], heldout=[])
    keep_fitting(
        [problem],
        [longest_prompt(config, problem, tokenizer, must_teach=needs_teacher(config))],
        console,
        context=context_length(model.config),
        max_new_tokens=config.max_new_tokens,
    )
    return setup


@torch.no_grad()
def walk(setup: Setup, *, trained: bool) -> Walk:
    """Return the first problem carried through; `trained`: beside the student with its adapter."""
    problem = setup.train[0]
    samples = setup.config.group_size if setup.config.method in GROUPED else DRAWN
    # With the adapter off the student is the base model, as it is before the first step.
    with teacher_view(setup.lora, "fixed"):
        prompts = [setup.student_prompt(problem)]
        (rollouts,) = write_completions(setup, prompts, seed=setup.config.seed, samples=samples)
        lessons = _lessons(setup, problem, rollouts)
        explained = [_explain(setup, lesson) for lesson in lessons]
    distances = [fmean(row.kl for row in rows) for rows in explained]
    furthest = distances.index(max(distances))
    lesson = lessons[furthest]
    rollout = lesson.rollout
    rows = explained[furthest]
    with teacher_view(setup.lora, "fixed"):
        clip_notes = _clip_notes(setup, lesson)
    after = None
    notes = [
        *lesson.notes,
        *_control_notes(setup.config),
        _reward_note(setup, problem, lesson.whole or rollout, "GRPO hears of this rollout"),
        *clip_notes,
    ]
    if trained:
        after = _explain(setup, lesson)
        (own,) = roll_out(setup, [problem], seed=setup.config.seed)
        notes.append(f"the trained student writes: {setup.text_of(own)}")
        notes.append(_reward_note(setup, problem, own, "GRPO would hear of that"))
    student_reads = setup.student_prompt(problem)
    prompts = {"the student reads": student_reads, lesson.reader: lesson.teacher_prompt}
    return Walk(
        problem=problem,
        rollout=rollout,
        prompts={who: str(setup.tokenizer.decode(ids)) for who, ids in prompts.items()},
        prompt_tokens={who: len(ids) for who, ids in prompts.items()},
        completion=setup.text_of(rollout),
        rows=rows,
        after=after,
        mean_is=_mean_is(setup.config, lesson),
        name=DIVERGENCES[setup.config.divergence].split()[-1],
        notes=notes,
    )


def print_walk(setup: Setup, found: Walk, console: Console) -> None:
    """Print the prompts with the boundary where the completion begins, the table, and the notes."""
    for who, text in found.prompts.items():
        say(console, f"===== {who}, {found.prompt_tokens[who]} tokens =====")
        say(console, f"{text}<<< the completion begins here >>>\n")
    say(console, f"===== the student writes, {len(found.rows)} tokens =====\n{found.completion}\n")
    config = setup.config
    table = tokens_table(found.rows, after=found.after, mean_is=found.mean_is, name=found.name)
    console.print(table)
    for note in found.notes:
        say(console, note)
    say(console, f"template hash {template_hash(setup.tokenizer, config.lang, config.thinking)}")


def write_page(found: Walk, path: Path) -> None:
    """Write the same as one page for the browser."""
    write_tokens_page(
        path,
        title=f"One problem carried through: {found.problem.id}, {found.problem.language}",
        prompts={
            f"What {who} ({found.prompt_tokens[who]} tokens)": text
            for who, text in found.prompts.items()
        },
        rows=found.rows,
        after=found.after,
        mean_is=found.mean_is,
        name=found.name,
        notes=found.notes,
    )


def _mean_is(config: Config, lesson: Lesson) -> str:
    """Return what the method makes of the mean of what the tokens add, "" where nothing."""
    if _control_notes(config):
        return ""
    if config.method in DISTILLED:
        return "loss"
    return "SSOPD's term" if config.method == "ssopd" and lesson.weight else ""


def _hidden(setup: Setup, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Return student_ND, of the student as it is at the moment, and teacher_ND."""
    completions = [lesson.rollout.completion_ids]
    student_ND = completion_hidden(setup.model, [lesson.rollout.prompt_ids], completions)
    with teacher_view(setup.lora, "fixed"):
        teacher_ND = completion_hidden(setup.model, [lesson.teacher_prompt], completions)
    return student_ND, teacher_ND


def _control_notes(config: Config) -> list[str]:
    """Say where a run's loss differs from what is shown."""
    notes = []
    if config.completion != "student":
        said = "trained on other completions than the student's"
        notes.append(f"--completion {config.completion}: {said}, so no loss is shown")
    if config.loss_over != "vocabulary":
        said = "the loss is not over the whole vocabulary, as the divergence here is"
        notes.append(f"--loss-over {config.loss_over}: {said}")
    return notes


def _clip_notes(setup: Setup, lesson: Lesson) -> list[str]:
    """Say how far the clip turns the gradient of this rollout; where none is set, the paper's.

    Nothing of a method whose loss is no divergence, nor of a rollout that nothing is learned from.
    """
    config = setup.config
    is_shown = config.method in (*DISTILLED, "ssopd") and not _control_notes(config)
    if not is_shown or lesson.weight == 0:
        return []
    is_set = config.clip_mode != "none"
    mode = config.clip_mode if is_set else Config.clip_mode
    clip = config.clip if is_set else Config.clip
    options = divergence_options(replace(config, clip_mode=mode, clip=clip))
    products_3N = clip_products(*_hidden(setup, lesson), head_weight(setup.model), **options)
    cosine = gradient_cosine(products_3N)
    found = "none, for one of them is 0" if math.isnan(cosine) else f"{cosine:.3f}"
    return [
        f"cosine of the gradient on the logits with and without the {mode} clip of {clip:g} nats: "
        f"{found}{'' if is_set else ' (it is not set here)'}"
    ]


def _lessons(setup: Setup, problem: Problem, rollouts: list[Rollout]) -> list[Lesson]:
    """Return the rollouts as the method learns from them; of SSOPD's, the one that it takes."""
    config = setup.config
    if config.method not in GROUPED:
        return _distilled(setup, problem, rollouts)
    group = reward(setup, problem, rollouts)
    if config.method == "ssopd":
        return [_witnessed(setup, group)]
    count = f"shown: of {len(rollouts)} completions,"
    if config.method == "egrsd":
        shown = f"{count} the one that the teacher disagrees with most"
        prompt = setup.teacher_prompt(problem)
        who = "EGRSD's teacher reads"
    elif setup.can_teach(problem):
        shown = f"{count} the one that COPSD's teacher disagrees with most"
        prompt = setup.teacher_prompt(problem)
        who = "COPSD's teacher would read; GRPO has no teacher"
    else:  # only GRPO takes such problems
        shown = f"{count} the first; the problem has no English side"
        prompt = setup.student_prompt(problem)
        who = "the base model reads; GRPO has no teacher"
    found = advantages(torch.tensor([group.rewards]), config.scale_rewards)[0].tolist()
    lessons = []
    for rollout, advantage in zip(rollouts, found, strict=True):
        said = f"each token's advantage is {advantage:.3f}"
        said += " times its weight" if config.method == "egrsd" else ", and all count alike"
        said += OURS if config.token_weight == "confidence" else ""
        if group.dead:
            said += ": all completions are right or all are wrong, so nothing is learned"
        lessons.append(Lesson(rollout, prompt, who, advantage, notes=(shown, said)))
    return lessons


def _distilled(setup: Setup, problem: Problem, rollouts: list[Rollout]) -> list[Lesson]:
    """Return the rollouts as COPSD learns from them, or a method with its loop."""
    config = setup.config
    reading = reader(config)(setup, [problem], 0)
    shown = f"shown: of {len(rollouts)} completions, the one that the teacher disagrees with most"
    weighs = "every token weighs 1"
    if config.token_weight != "uniform" or config.loss_prefix < 1:
        given = f"--token-weight {config.token_weight} and --loss-prefix {config.loss_prefix:g}"
        weighs = f"tokens weigh 1 on average, by {given}"
        weighs += OURS if config.token_weight == "confidence" else ""
    unread = (NO_NOTE,) if lacks_notes(reading.metrics) else ()
    name = "the" if config.method == "copsd" else f"{config.method.upper()}'s"
    (prompt,) = reading.prompts
    who = f"{name} teacher reads"
    notes = (shown, weighs, *unread)
    return [Lesson(rollout, prompt, who, notes=notes) for rollout in rollouts]


def _witnessed(setup: Setup, group: Group) -> Lesson:
    """Return the rollout of a group that SSOPD's term takes; of one that it skips, the longest."""
    pair = witness_pair(setup, group)
    if pair is not None:
        said = "shown: the start of the longest wrong completion; the teacher reads a right one"
        who = "SSOPD's teacher reads"
        given = (pair.learner, pair.prompt, who)
        return Lesson(*given, weight=pair.weight, notes=(said,), whole=pair.wrong)
    count = f"{sum(group.rewards):.0f} of {len(group.rewards)} completions are right"
    longest = max(group.rollouts, key=lambda rollout: len(rollout.completion_ids))
    who = "the base model reads; SSOPD's teacher reads nothing"
    notes = ("shown: the longest completion", f"SSOPD skips this group: {count}")
    return Lesson(longest, longest.prompt_ids, who, weight=0.0, notes=notes)


def _explain(setup: Setup, lesson: Lesson) -> list[TokenRow]:
    """Return a row for each token of the rollout, under the student as it is at the moment."""
    config = setup.config
    student_ND, teacher_ND = _hidden(setup, lesson)
    rows = explain_tokens(
        student_ND,
        teacher_ND,
        head_weight(setup.model),
        lesson.rollout.completion_ids,
        lambda ids: str(setup.tokenizer.decode(ids)),
        kind=config.divergence,
        beta=config.beta,
        temperature=config.temperature,
        clip_mode=config.clip_mode,
        clip=config.clip,
    )
    weights = _weights(setup, lesson, student_ND, teacher_ND)
    return [replace(row, weight=weight) for row, weight in zip(rows, weights, strict=True)]


def _weights(setup: Setup, lesson: Lesson, student_ND: Tensor, teacher_ND: Tensor) -> list[float]:
    """Return how much each token weighs for the method."""
    config = setup.config
    ids_N = torch.tensor(lesson.rollout.completion_ids, device=setup.model.device)
    head_VD = head_weight(setup.model)
    student_N, _ = chunked_logprob(student_ND, head_VD, ids_N, temperature=config.temperature)
    teacher_N, entropy_N = chunked_logprob(
        teacher_ND, head_VD, ids_N, temperature=config.temperature
    )
    weight_N = torch.full_like(entropy_N, lesson.weight)
    given_N = token_weights(config, {"teacher_entropy_N": entropy_N}, [len(ids_N)])
    if given_N is not None:
        weight_N = weight_N * given_N
    if config.method == "egrsd":
        advantage_N = torch.full_like(entropy_N, lesson.advantage)
        log_ratio_N = teacher_N - student_N
        weight_N = weight_N * credit(
            advantage_N, log_ratio_N, mix=config.credit_mix, clip=config.credit_clip
        )
    return weight_N.tolist()


def _reward_note(setup: Setup, problem: Problem, rollout: Rollout, what: str) -> str:
    """Say the reward of a rollout, as GRPO gets it, and why."""
    if not problem.answer:
        return f"{what}: nothing, for the problem has no answer"
    if not is_gradable(problem.answer):
        return f"{what}: nothing, for the problem's answer cannot be graded"
    verdict = grade(setup.text_of(rollout), problem.answer, think_open=setup.opens_think)
    return f"{what}: {int(verdict.correct)} ({verdict.reason}; the answer is {problem.answer})"
