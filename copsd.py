"""COPSD, crosslingual on-policy self-distillation (arXiv 2605.09548), in one process.

One model plays two roles. The student q reads a problem x in the target language and writes a completion y. The
teacher p is the same model that also reads the English translation x_en and an English solution s_en. Training pulls
the student towards the teacher on the student's own words:

    y ~ q(. | x)
    Eq. (1)  L = (1/N) sum_t D( p(. | x, x_en, s_en, y_<t) || q(. | x, y_<t) )      over the step's N completion tokens

Read top down: Config is the recipe, `distil` is the equation, `train_copsd` is the loop. The rest prepares and reports.

Departures: a part of the data is held out, so that a run can measure itself (the released code trains on all of it);
the mean is over the tokens of the whole step (the paper averages each completion first: --reduction trajectory); a
share of the problems can be posed in English (--english-share, 0 by default).
"""

import hashlib
import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval import Estimate, bad_input, bootstrap, check_answers, evaluate, keep_fitting, start_program, summarise
from kernels import chunked_divergence, divergence, reduce_loss
from parts.data import (
    Problem,
    build_prompt,
    find_language,
    hub_training_file,
    languages,
    load_problems,
    pick_order,
    render_prompt,
    split_heldout,
    template_hash,
)
from parts.model import (
    Lora,
    attach_lora,
    eos_ids,
    final_hidden,
    head_weight,
    load_model,
    load_tokenizer,
    resolve_model,
    save_adapter,
    teacher_view,
    valid_ids,
)
from parts.report import SamplingProgress, StepView, estimates_table
from parts.runs import (
    Run,
    Stopwatch,
    optimizer_tensors,
    peak_memory_gib,
    pick_device,
    pick_dtype,
    read_json,
    read_recipe,
    restore_optimizer,
    stop_signals,
    weights_fingerprint,
    write_json,
)
from parts.sampler import Rollout, SamplingParams, sample

TEACHERS = ("fixed", "current", "ema")
MAX_SKIPPED = 3  # updates in a row without a finite gradient before a run gives up
LOGGED_ROLLOUTS = 4  # completions of every step that are kept whole


def setting(default: Any, doc: str) -> Any:
    """Return a dataclass field whose doc is also its flag's help text."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """The paper's recipe; each default is the released script's unless its doc says "ours". Every field is a flag."""

    model: str = setting("lab/tiny", "a local folder, org/name, or a bare name such as Qwen2.5-1.5B (ours: the lab)")
    lang: str = setting("hau", "target language, an ISO 639-1 or 639-3 code (ours)")
    data: str | None = setting(None, "file of training problems [the hub's COPSD set for the language]")
    eval_data: str | None = setting(None, "file of problems to evaluate on [held out of the data] (ours)")
    out: str | None = setting(None, "run folder [runs/copsd-MODEL-LANG-SEED]")
    seed: int = setting(0, "of the adapter, the order of problems, the split and the sampler")
    steps: int = setting(100, "optimiser steps, at least 1")

    divergence: str = setting("forward_kl", "forward_kl, reverse_kl or jsd, teacher first")
    beta: float = setting(0.5, "of jsd, between 0 and 1")
    clip_mode: str = setting("entry", "none, entry or token: what the clip caps")
    clip: float = setting(0.05, "cap in nats, above 0")
    reduction: str = setting(
        "token", "token (mean over the step's tokens) or trajectory (mean of means, the paper's text)"
    )
    teacher: str = setting("fixed", "fixed (adapter off), current or ema")
    ema_decay: float = setting(0.99, "of the ema teacher, per step, from 0 to 1 (ours)")
    english_problem: bool = setting(True, "show the teacher the English problem")
    english_solution: bool = setting(True, "show the teacher the English solution")
    thinking: str = setting("auto", "auto, on or off: whether the prompt opens a think block")

    batch_size: int = setting(32, "problems per step, one rollout each")
    english_share: float = setting(0.0, "share of them posed in English, against forgetting it; from 0 to 1 (ours)")
    temperature: float = setting(1.1, "of the rollouts, and of both distributions in the loss; above 0")
    top_p: float = setting(0.95, "nucleus of the rollouts, up to 1")
    top_k: int = setting(20, "most likely tokens kept in the rollouts, 0 is off")
    max_new_tokens: int = setting(2048, "tokens per completion")

    lr: float = setting(5e-6, "peak learning rate; falls linearly to 0, no warm-up")
    weight_decay: float = setting(0.0, "AdamW's")
    max_grad_norm: float = setting(0.1, "the gradient's norm is cut to this")
    lora_rank: int = setting(64, "r")
    lora_alpha: float = setting(128.0, "the adapter is scaled by alpha / r")
    lora_targets: str = setting("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers to adapt, by name")

    micro_batch: int = setting(4, "rows per forward and backward; changes memory, not the gradient (ours)")
    chunk_tokens: int = setting(256, "rows of logits alive at a time (ours)")
    sample_rows: int = setting(256, "completions decoded at once (ours)")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass")
    compile: bool | None = setting(None, "torch.compile the divergence [where it pays]")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = setting("auto", "auto, float32 or bfloat16: of the base weights; the adapter is always float32")
    save_every: int = setting(5, "steps between saves")

    eval_problems: int = setting(32, "problems of the evaluations before and after; 0 is no evaluation (ours)")
    eval_samples: int = setting(8, "completions per problem there; pass@k is reported for k = 1 and this (ours)")
    eval_temperature: float = setting(1.0, "of the sampled evaluations; top-p as above, top-k off")


@dataclass(frozen=True)
class Setup:
    """All that a loop works with, ready to use."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lora: Lora
    train: list[Problem]
    heldout: list[Problem]


def completion_hidden(model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Return hidden_ND, the states that predict each completion token, row after row; EOS is among the tokens.

    Prompt and completion are contiguous and pads come after both, so no row sees a pad. The state at t-1 predicts t:

        ids      p0 p1 p2 c0 c1 pad       completion c0 c1
        hidden          ^  ^              is predicted from p2 and c0
    """
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    scored_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        ids_BT[index, : len(row)] = torch.tensor(row)
        scored_BT[index, len(prompt) - 1 : len(row) - 1] = True
    return final_hidden(model, ids_BT.to(model.device))[scored_BT.to(model.device)]


def distil(setup: Setup, problems: list[Problem], rollouts: list[Rollout]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Eq. (1)'s summand at every completion token, loss_N in nats, with the kernel's statistics.

    Student and teacher score the same token ids; only what stands before them differs. Gradient to the student only.
    """
    config = setup.config
    completions = [rollout.completion_ids for rollout in rollouts]
    privileged = [teacher_prompt(config, problem, setup.tokenizer) for problem in problems]
    student_ND = completion_hidden(setup.model, [rollout.prompt_ids for rollout in rollouts], completions)
    with teacher_view(setup.lora, config.teacher):
        teacher_ND = completion_hidden(setup.model, privileged, completions)
    return chunked_divergence(  # Eq. (1), D
        student_ND, teacher_ND, head_weight(setup.model), kind=config.divergence, beta=config.beta,
        temperature=config.temperature, clip_mode=config.clip_mode, clip=config.clip, chunk_tokens=config.chunk_tokens,
        compile=config.compile,
    )  # fmt: skip


def student_prompt(config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids before a rollout: what evaluation asks, too."""
    return build_prompt(problem, problem.language, tokenizer, thinking=config.thinking)


def teacher_prompt(config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the teacher reads before the same rollout."""
    return build_prompt(
        problem, problem.language, tokenizer, role="teacher", thinking=config.thinking,
        english_problem=config.english_problem, english_solution=config.english_solution,
    )  # fmt: skip


def roll_out(setup: Setup, problems: list[Problem], *, seed: int) -> list[Rollout]:
    """Sample one completion per problem, y ~ q(. | x), from the student as it is now."""
    config = setup.config
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k, seed)
    prompts = [student_prompt(config, problem, setup.tokenizer) for problem in problems]
    groups = sample(
        setup.model, prompts, params, max_rows=config.sample_rows, eos_ids=eos_ids(setup.model, setup.tokenizer),
        valid_ids=valid_ids(setup.tokenizer),
    )  # fmt: skip
    return [group[0] for group in groups]


def pose_in_english(problems: list[Problem], share: float) -> list[Problem]:
    """Return the problems with the first `share` of them in English; one that has no English side stays as it is."""
    count = round(share * len(problems))
    english = [replace(p, problem=p.problem_en, language="eng") if p.problem_en else p for p in problems[:count]]
    return english + problems[count:]


def micro_batches(rollouts: list[Rollout], size: int) -> list[list[int]]:
    """Return the rows of each micro-batch, rows of like length together so that little is padding."""
    order = sorted(
        range(len(rollouts)), key=lambda row: len(rollouts[row].prompt_ids) + len(rollouts[row].completion_ids)
    )
    return [order[start : start + size] for start in range(0, len(order), size)]


def train_copsd(setup: Setup, run: Run, view: StepView) -> bool:
    """Train from the last saved step to the end; return False if a signal stopped it early (state saved)."""
    config, model, lora = setup.config, setup.model, setup.lora
    optimizer = torch.optim.AdamW(lora.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first_step = restore(run, lora, optimizer)
    model.train()
    skipped = 0
    with stop_signals() as stopped:
        for step in range(first_step + 1, config.steps + 1):
            watch = Stopwatch(str(model.device))

            # Problems of this step, and one completion of each from the current student.
            order = pick_order(len(setup.train), seed=config.seed, step=step - 1, batch=config.batch_size)
            problems = pose_in_english([setup.train[index] for index in order], config.english_share)
            rollouts = roll_out(setup, problems, seed=config.seed * 1_000_003 + step)
            step_tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
            watch.lap("rollout")

            # The loss, micro-batch by micro-batch; each adds its share of the one mean over the step's tokens.
            tally = Tally(step_tokens)
            for rows in micro_batches(rollouts, config.micro_batch):
                batch = [rollouts[row] for row in rows]
                loss_N, stats = distil(setup, [problems[row] for row in rows], batch)
                lengths = [len(rollout.completion_ids) for rollout in batch]
                loss = reduce_loss(  # Eq. (1), 1/N
                    loss_N, lengths, reduction=config.reduction, step_tokens=step_tokens, step_rows=len(rollouts)
                )
                watch.lap("score")
                loss.backward()
                watch.lap("update")
                tally.add(loss, stats, lengths, rows)

            # The update. A gradient that is not finite would ruin the adapter for good: it is dropped and counted.
            lr = config.lr * (1 - (step - 1) / config.steps)
            optimizer.param_groups[0]["lr"] = lr
            grad_norm = torch.nn.utils.clip_grad_norm_(lora.parameters(), config.max_grad_norm).item()
            skipped = 0 if grad_norm < float("inf") else skipped + 1  # nan compares false
            if not skipped:
                optimizer.step()
            optimizer.zero_grad()
            if skipped == MAX_SKIPPED:
                raise FloatingPointError(f"no finite gradient in {MAX_SKIPPED} steps up to {step}: try a lower --lr")

            # The teacher follows, where it is to.
            if config.teacher == "ema":
                lora.update_ema(config.ema_decay)
            watch.lap("update")

            # Log and save.
            metrics = {"step": step, **tally.metrics(), **work_metrics(setup, problems, rollouts)}
            metrics |= {"update/grad_norm": grad_norm, "update/lr": lr, "update/skipped_in_a_row": skipped}
            metrics |= {f"{phase}/time_s": seconds for phase, seconds in watch.seconds.items()}
            metrics |= {"time_s": sum(watch.seconds.values()), "memory/peak_gib": peak_memory_gib(watch.device)}
            run.append("metrics.jsonl", [metrics])
            run.append("completions.jsonl", completion_rows(setup, step, problems, rollouts, tally.kl_by_row))
            view.show(metrics)
            if step % config.save_every == 0 or step == config.steps or stopped:
                save(run, setup, optimizer, step)
            if stopped and step < config.steps:
                return False
    return True


class Tally:
    """Sums of a step's statistics over its micro-batches, as means over the step's tokens."""

    def __init__(self, step_tokens: int):
        self.step_tokens = step_tokens
        self.sums = dict.fromkeys(("objective", "kl", "teacher_entropy", "student_entropy", "clipped"), 0.0)
        self.kl_by_row: dict[int, float] = {}

    def add(self, loss: Tensor, stats: dict[str, Tensor], lengths: list[int], rows: list[int]) -> None:
        """Add a micro-batch: its share of the loss, the kernel's statistics, its rows and their lengths."""
        self.sums["objective"] += loss.item()
        self.sums["clipped"] += stats["clipped_frac"].item() * sum(lengths) / self.step_tokens
        for name in ("kl", "teacher_entropy", "student_entropy"):
            self.sums[name] += stats[f"{name}_N"].sum().item() / self.step_tokens
        for row, kl_C in zip(rows, stats["kl_N"].split(lengths), strict=True):
            self.kl_by_row[row] = kl_C.mean().item()

    def metrics(self) -> dict[str, float]:
        """Return the step's means under the names they are logged by."""
        return {
            "loss/objective_nats_per_token": self.sums["objective"],
            "loss/kl_nats_per_token": self.sums["kl"],
            "loss/clipped_token_frac": self.sums["clipped"],
            "loss/teacher_entropy_nats_per_token": self.sums["teacher_entropy"],
            "loss/student_entropy_nats_per_token": self.sums["student_entropy"],
        }


def work_metrics(setup: Setup, problems: list[Problem], rollouts: list[Rollout]) -> dict[str, float]:
    """Return how many tokens each phase handled, and the share of completions that the length limit cut."""
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    student = tokens + sum(len(rollout.prompt_ids) for rollout in rollouts)
    teacher = tokens + sum(len(teacher_prompt(setup.config, problem, setup.tokenizer)) for problem in problems)
    return {
        "rollout/tokens": tokens,
        "rollout/completion_tokens_mean": tokens / len(rollouts),
        "rollout/clipped_frac": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        "score/tokens": student + teacher,  # forward
        "update/tokens": student,  # backward
    }


def completion_rows(
    setup: Setup, step: int, problems: list[Problem], rollouts: list[Rollout], kl_by_row: dict[int, float]
) -> list[dict[str, Any]]:
    """Return some of the step's rollouts whole, for completions.jsonl, evenly spread: English ones come first."""
    spread = range(0, len(rollouts), max(1, len(rollouts) // LOGGED_ROLLOUTS))[:LOGGED_ROLLOUTS]
    return [
        {
            "step": step,
            "problem_id": problems[row].id,
            "prompt": setup.tokenizer.decode(rollouts[row].prompt_ids),
            "completion": setup.tokenizer.decode(rollouts[row].completion_ids),
            "answer": problems[row].answer,
            "finish_reason": rollouts[row].finish_reason,
            "tokens": len(rollouts[row].completion_ids),
            "kl_nats_per_token": kl_by_row[row],
        }
        for row in spread
    ]


def save(run: Run, setup: Setup, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save the adapter for use and the state for going on."""
    save_adapter(setup.lora, run.folder / "adapters" / f"step_{step:05d}", base_model=setup.config.model)
    adapter = {f"lora/{name}": tensor for name, tensor in setup.lora.state_dict().items()}
    run.save_state(step, {**adapter, **optimizer_tensors(optimizer)})


def restore(run: Run, lora: Lora, optimizer: torch.optim.Optimizer) -> int:
    """Bring adapter and optimiser to the last saved step, drop what was logged after it, and return that step."""
    step, tensors = run.load_state()
    run.cut_back(step)
    if step:
        lora.load_state_dict({n.removeprefix("lora/"): t for n, t in tensors.items() if n.startswith("lora/")})
        restore_optimizer(optimizer, tensors)
    return step


@torch.no_grad()
def heldout_kl(setup: Setup, seed: int) -> Estimate:
    """Return the unclipped KL, in nats per token, on the student's own rollouts of held-out problems."""
    rollouts = roll_out(setup, setup.heldout, seed=seed)
    kl_sums, lengths = [0.0] * len(rollouts), [len(rollout.completion_ids) for rollout in rollouts]
    for rows in micro_batches(rollouts, setup.config.micro_batch):
        _, stats = distil(setup, [setup.heldout[row] for row in rows], [rollouts[row] for row in rows])
        for row, kl_C in zip(rows, stats["kl_N"].split([lengths[row] for row in rows]), strict=True):
            kl_sums[row] = kl_C.sum().item()
    return bootstrap(kl_sums, [float(length) for length in lengths])


def measure(setup: Setup, console: Console, when: str) -> dict[str, dict[str, Any]]:
    """Evaluate on the held-out problems, in the target language and, so that forgetting shows, in English."""
    config, columns = setup.config, {}
    sampled = SamplingParams(config.max_new_tokens, config.eval_temperature, config.top_p, seed=config.seed)
    greedy = replace(sampled, temperature=0.0)
    english = pose_in_english([p for p in setup.heldout if p.problem_en], 1.0)
    for problems in [setup.heldout, english] if setup.heldout[0].language != "eng" and english else [setup.heldout]:
        language = find_language(problems[0].language)
        summary: dict[str, Estimate] = {}
        for name, params, samples in (("greedy", greedy, 1), ("sampled", sampled, config.eval_samples)):
            with SamplingProgress(console, f"{when} training: {language.english}, {name}") as progress:
                results = evaluate(
                    setup.model, setup.tokenizer, problems, params, samples=samples, thinking=config.thinking,
                    max_rows=config.sample_rows, on_progress=progress.update,
                )  # fmt: skip
            if name == "greedy":
                summary["greedy accuracy"] = summarise(results, [1])["pass@1"]
            else:
                summary |= summarise(results, sorted({1, config.eval_samples}))
        if problems is setup.heldout:
            summary["KL to the teacher, nats/token"] = heldout_kl(setup, config.seed)
        columns[language.iso3] = {name: asdict(estimate) for name, estimate in summary.items()}
    return columns


def validate(config: Config) -> None:
    """Raise ValueError for a setting outside its range, before anything is loaded."""
    at_least = {"steps": 1, "batch_size": 1, "micro_batch": 1, "chunk_tokens": 1, "sample_rows": 1, "save_every": 1}
    at_least |= {"lora_rank": 1, "eval_problems": 0, "eval_samples": 1, "weight_decay": 0, "ema_decay": 0, "lr": 0}
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; valid: {least} or more")
    if not config.max_grad_norm > 0 or not config.lora_alpha > 0 or not 0 <= config.english_share <= 1:
        raise ValueError("--max-grad-norm and --lora-alpha must be above 0, --english-share from 0 to 1")
    if config.ema_decay > 1:
        raise ValueError(f"--ema-decay is {config.ema_decay}; valid: from 0 to 1")
    if config.teacher not in TEACHERS:
        raise ValueError(f"unknown teacher {config.teacher!r}; valid: {', '.join(TEACHERS)}")
    SamplingParams(config.max_new_tokens, config.temperature, config.top_p, config.top_k)
    # A dry run on two logits: a wrong name or number is the same error now that it would be at the first step.
    loss_N = divergence(
        torch.zeros(1, 2), torch.zeros(1, 2), kind=config.divergence, beta=config.beta, temperature=config.temperature,
        clip_mode=config.clip_mode, clip=config.clip,
    )  # fmt: skip
    reduce_loss(loss_N, [1], reduction=config.reduction, step_tokens=1, step_rows=1)


def configure(given: dict[str, Any]) -> tuple[Config, Path]:
    """Return the config (flags before the model's recipe before the paper's) and the model's folder."""
    folder = resolve_model(given.get("model", Config.model))
    recipe = read_recipe(folder)
    unknown = recipe.keys() - {f.name for f in fields(Config)}
    if unknown:
        raise ValueError(f"{folder / 'recipe.json'} has unknown settings: {', '.join(sorted(unknown))}")
    if "data" in given:
        recipe.pop("eval_data", None)  # the recipe's benchmark belongs to the recipe's data
    config = Config(**{**recipe, **given})
    lang = find_language(config.lang).iso3
    files = {
        name: str(value).replace("{lang}", lang) for name in ("data", "eval_data") if (value := getattr(config, name))
    }
    out = config.out or f"runs/copsd-{Path(config.model).name}-{lang}-{config.seed}"
    config = replace(config, lang=lang, out=out, **files)
    validate(config)
    return config, folder


def load_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int, console: Console
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and the held-out ones, without those too long for the model's context."""
    train = load_problems(Path(config.data) if config.data else hub_training_file(config.lang), language=config.lang)
    heldout: list[Problem] = []
    if config.eval_data:
        heldout = load_problems(Path(config.eval_data), language=config.lang)[: config.eval_problems]
    elif config.eval_problems:
        train, heldout = split_heldout(train, config.eval_problems, config.seed)
    check_answers(heldout)
    kept = []
    for problems in (train, heldout):
        longest = []
        for problem in problems:
            posed = [problem, *pose_in_english([problem], 1.0)]
            prompts = [build(config, p, tokenizer) for p in posed for build in (student_prompt, teacher_prompt)]
            longest.append(max(prompts, key=len))
        kept.append(keep_fitting(problems, longest, console, context=context, max_new_tokens=config.max_new_tokens))
    return kept[0], kept[1]


def fingerprint(problems: list[Problem]) -> str:
    """Return 16 hex digits that change with any field of any problem."""
    return hashlib.sha256(repr(problems).encode()).hexdigest()[:16]


def prepare(config: Config, folder: Path, console: Console) -> tuple[Setup, Run]:
    """Load everything that the settings name, check it, and only then make the run folder."""
    run = Run(Path(str(config.out)))
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    run.check(settings)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device=device, dtype=dtype, gradient_checkpointing=config.gradient_checkpointing)
    train, heldout = load_data(config, tokenizer, model.config.max_position_embeddings, console)
    identity = {
        "base_weights": weights_fingerprint(dict(model.named_parameters())),
        "prompt_template": template_hash(tokenizer, config.lang, config.thinking),
        "dtype": str(dtype),
        "training_data": fingerprint(train),
        "heldout_data": fingerprint(heldout),
    }
    lora = attach_lora(
        model, rank=config.lora_rank, alpha=config.lora_alpha, targets=tuple(config.lora_targets.split(",")),
        seed=config.seed, ema=config.teacher == "ema",
    )  # fmt: skip
    run.check(settings, identity)
    run.create(settings, identity)
    return Setup(config, model, tokenizer, lora, train, heldout), run


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True,
    help="COPSD, crosslingual on-policy self-distillation: train, look at prompts, list languages.",
)  # fmt: skip


def with_config_flags(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """Give a command one flag per field of Config; it receives those that were typed, so a recipe can fill the rest."""

    def wrapper(**flags: Any) -> None:
        """Stand in for the command; its own docstring replaces this one."""
        command({name: value for name, value in flags.items() if value is not None})

    parameters = []
    for f in fields(Config):
        option = typer.Option(help=f"{f.metadata['doc']}{shown_default(f.default)}", show_default=False)
        annotation = Annotated[f.type | None, option]
        parameters.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__doc__ = command.__doc__
    return wrapper


def shown_default(default: Any) -> str:
    """Return " [default]" for a flag's help, nothing for None, whose meaning the help text itself gives."""
    return "" if default is None else f" [{default}]"


@app.command("train")
@with_config_flags
def train_command(given: dict[str, Any]) -> None:
    """Train with COPSD and show what it changed. The same command goes on with a run that was stopped.

    A flag that is not given comes from the model folder's recipe.json, where there is one, else from its default here.
    """
    console = start_program()
    say = partial(console.print, soft_wrap=True, highlight=False)
    with bad_input():
        config, folder = configure(given)
        started = time.monotonic()
        setup, run = prepare(config, folder, console)
    say(
        f"COPSD on {config.model}, {find_language(config.lang).english}: {len(setup.train)} problems to train on, "
        f"{len(setup.heldout)} held out, seed {config.seed}, into {run.folder}"
    )
    if setup.heldout and not (run.folder / "before.json").is_file():
        write_json(run.folder / "before.json", measure(setup, console, "before"))
    try:
        with StepView(console, config.steps) as view:
            finished = train_copsd(setup, run, view)
    except FloatingPointError as error:
        say(f"error: {error}; {run.folder} keeps the last save")
        raise typer.Exit(1) from error
    if not finished:
        say(f"stopped; everything is saved in {run.folder}, and the same command goes on from here")
        raise typer.Exit(130)
    if setup.heldout:
        if not (run.folder / "after.json").is_file():
            write_json(run.folder / "after.json", measure(setup, console, "after"))
        console.print(*before_after(run), sep="\n\n")
    say(f"done in {time.monotonic() - started:.0f} s. {run.folder}: metrics.jsonl, completions.jsonl, adapters/")
    say(f"next: python eval.py --pass-at-k 8 --model {config.model} --lang {config.lang} --adapter {run.folder}")


def before_after(run: Run) -> list[Table]:
    """Return a table per language of the evaluations at both ends of a run."""
    before, after = read_json(run.folder / "before.json"), read_json(run.folder / "after.json")
    return [
        estimates_table(find_language(code).english, {"before": before[code], "after": after[code]}) for code in before
    ]


@app.command("languages")
def languages_command() -> None:
    """List the languages: codes, names, script, and the benchmarks that have them."""
    table = Table(box=None, header_style="bold")
    for column in ("639-3", "639-1", "English name", "own name", "script", "benchmarks"):
        table.add_column(column)
    for language in languages().values():
        names = (language.iso3, language.iso1 or "-", language.english, language.own, language.script)
        table.add_row(*names, ", ".join(language.benchmarks))
    Console().print(table)


@app.command("show")
@with_config_flags
def show_command(given: dict[str, Any]) -> None:
    """Print both prompts of the first training problem as text, with the boundary where the completion begins."""
    start_program()
    with bad_input():
        config, folder = configure(given)
        tokenizer = load_tokenizer(folder)
        source = Path(config.data) if config.data else hub_training_file(config.lang)
        problem = load_problems(source, language=config.lang)[0]
        shown = {"english_problem": config.english_problem, "english_solution": config.english_solution}
        prompts = {
            "student": (student_prompt(config, problem, tokenizer), {}),
            "teacher": (teacher_prompt(config, problem, tokenizer), {"role": "teacher", **shown}),
        }
        for role, (ids, options) in prompts.items():
            text = render_prompt(problem, config.lang, tokenizer, thinking=config.thinking, **options)
            typer.echo(f"===== {role}, {len(ids)} tokens =====\n{text}<<< the completion begins here >>>\n")
        typer.echo(f"template hash {template_hash(tokenizer, config.lang, config.thinking)}")


if __name__ == "__main__":
    app()
