"""All that a training run works with: loaded from its settings, checked, then given a folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parts import readings, runs
from parts.adapters import put_adapter, read_settings
from parts.chat import freeze_date
from parts.data import keep_fitting, read_train_and_heldout
from parts.family import context_length
from parts.machine import pick_device, pick_dtype
from parts.measure import check_answers, check_columns
from parts.model import Lora, attach_lora, load_model, load_tokenizer, resolve_model
from parts.prompts import Problem, build_prompt, is_teachable, pose_in_english, template_hash
from parts.recipe import DISTILLED, GROUPED, Config, collapse_warnings, fill, settle
from parts.selfcheck import check_model
from parts.view import say


@dataclass(frozen=True)
class Setup:
    """The model in both of its roles, and the problems; ready to use."""

    config: Config
    model: PreTrainedModel  # frozen; the adapter works inside it, where it is on
    tokenizer: PreTrainedTokenizerBase
    lora: Lora  # the adapter: the small matrices that are trained
    train: list[Problem]
    heldout: list[Problem]

    def student_prompt(self, problem: Problem) -> list[int]:
        """Return the ids of x, before a rollout: what evaluation asks, too."""
        return student_prompt(self.config, problem, self.tokenizer)

    def teacher_prompt(self, problem: Problem, note: str | None = None) -> list[int]:
        """Return the ids of x, x_en and s_en, which the teacher reads before the same rollout.

        note  what other teachers of the family read in their place; see parts/readings.py
        """
        return readings.reading(self.config, problem, self.tokenizer, note)

    def can_teach(self, problem: Problem) -> bool:
        """Say whether the problem has all that the teacher's prompt without a note shows of it."""
        return _can_teach(self.config, problem)


@dataclass(frozen=True)
class Reading:
    """What the teacher reads before each rollout of a step, and what it took to have it."""

    prompts: list[list[int]]
    sampled_tokens: int = 0
    metrics: dict[str, float | None] = field(default_factory=dict)  # to be logged


def read_solutions(setup: Setup, problems: list[Problem], step: int) -> Reading:
    """Return what COPSD's teacher reads, and any other that needs no note: the same at any step."""
    return Reading([setup.teacher_prompt(problem) for problem in problems])


# What finds a step's reading: of the setup, the problems and the step's number.
Reader = Callable[[Setup, list[Problem], int], Reading]


def configure(given: dict[str, Any]) -> tuple[Config, Path]:
    """Return a run's settings, of which `given` were typed, and the model's folder."""
    folder = resolve_model(given.get("model", Config.model))
    return settle(fill(given, folder)), folder


def load_setup(
    config: Config, folder: Path, console: Console, day: str | None = None
) -> tuple[Setup, dict[str, str | None]]:
    """Load what the settings name; return it with the identity of weights, prompts and data.

    day  what a chat template that writes today's date is to write; None: today
    Writes nothing. Raises ValueError or OSError for what is missing, broken or does not fit.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    tokenizer, day = freeze_date(load_tokenizer(folder), day)
    model = load_model(
        folder, device=device, dtype=dtype, gradient_checkpointing=config.gradient_checkpointing
    )
    check_model(model, f"model {config.model}")
    context = context_length(model.config)
    train, heldout = _load_problems(config, tokenizer, context, console)
    identity = {
        "base_weights": runs.folder_fingerprint(folder),
        "prompt_template": template_hash(tokenizer, config.lang, config.thinking),
        "template_date": day,
        "dtype": str(dtype),
        "training_data": runs.fingerprint(train),
        "heldout_data": runs.fingerprint(heldout),
    }
    lora = attach_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        targets=tuple(config.lora_targets.split(",")),
        seed=config.seed,
        ema=config.teacher == "ema",
        copy=config.teacher == "copy",
    )
    if config.warm_start:
        identity["warm_start"] = _warm_start(lora, config, str(identity["base_weights"]))
    return Setup(config, model, tokenizer, lora, train, heldout), identity


def prepare(
    config: Config, folder: Path, console: Console, day: str | None = None
) -> tuple[Setup, runs.Run]:
    """Load and check everything, and only then make the run's folder, or find it fitting.

    day  as in load_setup, for a new run; one that goes on keeps its own
    """
    for warning in collapse_warnings(config):
        say(console, warning)
    run = runs.Run(Path(str(config.out)))
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    run.check(settings)
    run.check_whole()
    for when in ("before", "after"):
        if (stored := run.read_evaluation(when)) is not None:
            check_columns(stored, run.folder / f"{when}.json")
    setup, identity = load_setup(config, folder, console, run.recorded_day() or day)
    run.check(settings, identity)
    run.create(settings, identity)
    return setup, run


def student_prompt(
    config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids of the student's prompt under these settings."""
    return build_prompt(problem, problem.language, tokenizer, thinking=config.thinking)


def _warm_start(lora: Lora, config: Config, base_weights: str) -> str:
    """Put a former run's last adapter into the new one; return what identifies it.

    Raises ValueError for one of another base, or with other layers, rank or scale.
    """
    path = Path(str(config.warm_start))
    runs.refuse_foreign_adapter(path, base_weights, config.model)
    folder = runs.last_adapter_folder(path)
    saved = read_settings(folder)
    if saved["lora_alpha"] / saved["r"] != lora.alpha / lora.rank:
        raise ValueError(
            f"--warm-start {path} has an adapter of rank {saved['r']} and alpha "
            f"{saved['lora_alpha']}; here they are {lora.rank} and {lora.alpha:g}"
        )
    try:
        put_adapter(lora, folder)
    except ValueError as error:
        raise ValueError(f"--warm-start {path}: {error}") from error
    lora.copy_current()
    return runs.weights_fingerprint(lora.sets["current"])


def _can_teach(config: Config, problem: Problem) -> bool:
    return config.teacher_reads == "brief" or is_teachable(
        problem,
        english_problem=config.english_problem,
        english_solution=config.english_solution,
    )


def _load_problems(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int, console: Console
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and the held-out ones, without those too long to fit."""
    train, heldout = read_train_and_heldout(config, console)
    # GRPO's reward is the grader's verdict, so it needs answers to train, too.
    check_answers([*heldout, *(train if config.method in GROUPED else [])])
    must_teach = config.method in (*DISTILLED, "egrsd")

    def _fitting(problems: list[Problem], needs_teacher: bool) -> list[Problem]:
        longest = []
        for problem in problems:
            prompts = []
            for posed in (problem, *pose_in_english([problem], 1.0)):
                prompts.append(student_prompt(config, posed, tokenizer))
                if needs_teacher:
                    prompts += readings.longest_prompts(config, posed, tokenizer)
                elif _can_teach(config, posed):
                    prompts.append(readings.reading(config, posed, tokenizer))
            longest.append(max(prompts, key=len))
        return keep_fitting(
            problems,
            longest,
            console,
            context=context,
            max_new_tokens=config.max_new_tokens,
        )

    heldout = _fitting(heldout, False)
    without = sum(not _can_teach(config, problem) for problem in heldout)
    if without:
        said = "lack what the teacher is to read: the KL to the teacher is of the others"
        say(console, f"{without} of {len(heldout)} held-out problems {said}")
    return _fitting(train, must_teach), heldout
