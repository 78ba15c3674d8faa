"""All that a training run works with: loaded from its settings, checked, then given a folder."""

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kernels import compile_fault
from parts import ranks, readings, runs
from parts.adapters import put_adapter, read_settings
from parts.chat import completion_text, freeze_date, prompt_opens_think
from parts.checkpoints import check_state
from parts.data import (
    keep_fitting,
    load_problems,
    read_problem_sets,
    write_problems,
)
from parts.family import context_length
from parts.files import remedied, require_space
from parts.fitting import check_memory
from parts.footprint import Lengths, NotCounted, read_shape
from parts.grading import is_gradable
from parts.identity import (
    files_fingerprints,
    fingerprint,
    folder_fingerprint,
    refuse_foreign_adapter,
    weights_fingerprint,
)
from parts.lora import Lora, attach_lora
from parts.lossscale import LossScale
from parts.machine import forget_peak, pick_device, pick_dtype
from parts.measure import DEV_METRIC, check_answers, check_columns
from parts.model import (
    check_vocabulary,
    eos_ids,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from parts.prefixes import KeptPrompts
from parts.prompts import (
    Problem,
    build_prompt,
    encode_prompt,
    is_teachable,
    pose_in_english,
    template_hash,
)
from parts.recipe import (
    DISTILLED,
    EVAL_TOKENS,
    GROUPED,
    LABELS,
    Config,
    EvalConfig,
    keeps_prompts,
)
from parts.sampler import Rollout
from parts.selfcheck import check_model
from parts.settings import doubts_of, fill, read_recipe, settle
from parts.view import say

HELDOUT = "heldout.jsonl"  # of a run's folder; see keep_heldout


@dataclass(frozen=True)
class Setup:
    """The model in both of its roles, and the problems; ready to use."""

    config: Config
    model: PreTrainedModel  # frozen; the adapter works inside it, where it is on
    tokenizer: PreTrainedTokenizerBase
    lora: Lora  # the adapter: the small matrices that are trained
    train: list[Problem]
    heldout: list[Problem]
    kept_prompts: KeptPrompts = field(default_factory=KeptPrompts)  # as the fixed teacher read them
    dev: list[Problem] = field(default_factory=list)  # watched on the way, never trained on
    loss_scale: LossScale = field(default_factory=LossScale)  # of float16, which needs one

    @property
    def keeps_prompts(self) -> bool:
        """Say whether the teacher's prompts are computed once; see parts/recipe.py."""
        return keeps_prompts(self.config, on_cpu=self.model.device.type == "cpu")

    def student_prompt(self, problem: Problem) -> list[int]:
        """Return the ids of x, before a rollout: what evaluation asks, too."""
        return student_prompt(self.config, problem, self.tokenizer)

    def teacher_prompt(self, problem: Problem, note: str | None = None) -> list[int]:
        """Return the ids of x, x_en and s_en, which the teacher reads before the same rollout.

        note  what other teachers of the family read in their place; see parts/readings.py
        """
        return readings.reading(self.config, problem, self.tokenizer, note)

    @property
    def opens_think(self) -> bool:
        """Say whether a prompt ends inside an opened think block: answers count only behind it."""
        return prompt_opens_think(self.tokenizer, self.config.thinking)

    @cached_property
    def end_ids(self) -> set[int]:
        """Return the ids that end a completion, which are kept: the template is slow to ask."""
        return eos_ids(self.model, self.tokenizer)

    def text_of(self, rollout: Rollout) -> str:
        """Return what a rollout wrote, without the token that ends it: what is graded and shown."""
        return completion_text(rollout.completion_ids, self.tokenizer, self.end_ids)

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
    config: Config,
    folder: Path,
    console: Console,
    day: str | None = None,
    aside: Console | None = None,
) -> tuple[Setup, dict[str, str | None]]:
    """Load what the settings name; return it with the identity of weights, prompts and data.

    day    what a chat template that writes today's date is to write; None: today
    aside  where the memory is said; None: with the rest
    Writes nothing. Raises ValueError or OSError for what is missing, broken or does not fit.
    """
    device = ranks.own_device(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device)
    if config.compile and (fault := compile_fault(device.partition(":")[0])):
        raise ValueError(f"--compile does not work here; leave it out: {fault}")
    tokenizer, day = freeze_date(load_tokenizer(folder), day)
    context = context_length(load_config(folder))
    train, dev, heldout = fitting_problems(config, tokenizer, context, console)
    lengths = longest_prompts(config, tokenizer, [*train, *dev, *heldout])
    say(aside or console, _memory_line(config, folder, dtype, device, lengths))
    forget_peak(device)  # of an earlier run in this process, such as another arm
    model = load_model(
        folder, device=device, dtype=dtype, gradient_checkpointing=config.gradient_checkpointing
    )
    # Reading the files maps them into memory once more, so it comes before anything computes.
    base = folder_fingerprint(folder)
    check_model(model, f"model {config.model}")
    check_vocabulary(model, tokenizer, f"model {config.model}")
    identity = {
        "base_weights": base,
        **files_fingerprints(folder),
        "prompt_template": template_hash(tokenizer, config.lang, config.thinking),
        "template_date": day,
        "dtype": str(dtype),
        "training_data": fingerprint(train),
        "heldout_data": fingerprint(heldout),
        "dev_data": fingerprint(dev),
    }
    if config.teacher_reads != "solution" or config.method == "ssopd":
        identity["wordings"] = fingerprint(readings.wordings(config.lang))
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
        path = Path(config.warm_start)
        refuse_foreign_adapter(path, base, config.model, folder, console)
        identity["warm_start"] = _warm_start(lora, path)
    given = (config, model, tokenizer, lora, train, heldout)
    return Setup(*given, dev=dev, loss_scale=LossScale.of(dtype)), identity


def _memory_line(
    config: Config, folder: Path, dtype: torch.dtype, device: str, lengths: Lengths
) -> str:
    """Return what is said of the memory; ValueError where the run cannot fit."""
    try:
        return check_memory(read_shape(folder, config, dtype), config, device, lengths)
    except NotCounted as error:
        return str(error)  # it may well fit


def prepare(
    config: Config,
    folder: Path,
    console: Console,
    day: str | None = None,
    aside: Console | None = None,
) -> tuple[Setup, runs.Run]:
    """Load and check everything, and only then make the run's folder, or find it fitting.

    day    as in load_setup, for a new run; one that goes on keeps its own
    aside  where the memory is said, and warnings of settings, which the arms of an experiment would
           repeat; None: with the rest
    """
    for warning in doubts_of(config):
        say(aside or console, warning)
    run = runs.Run(Path(str(config.out)))
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    if ranks.is_first():
        run.check(settings)
        taken_over = run.claim()
        for said in ([taken_over] if taken_over else []) + run.check_whole():
            say(console, said)
        check_evaluations(run)
        day = run.recorded_day() or day
    day = ranks.decide(day or date.today().isoformat())  # it may turn while the ranks start
    setup, identity = load_setup(config, folder, console, day, aside)
    ranks.agreed(**identity)
    if ranks.is_first():
        run.check(settings, identity)
        check_state(run.folder, setup.lora.state_dict(), setup.lora.parameters())
        # A state is the adapter, the teacher's own, and two numbers of the optimiser's for each.
        adapter = sum(tensor.numel() for tensor in setup.lora.parameters()) * 4  # bytes
        saved = adapter * (5 if config.teacher in ("ema", "copy") else 4)
        require_space(run.folder, saved, "the first save")
        if taken_over := run.create(settings, identity):
            say(console, taken_over)
        keep_heldout(setup, run)
        kept = (*(f"{when}.json" for when in runs.EVALUATIONS), HELDOUT)
        run.vouch_anew(*(run.folder / name for name in kept))
    return setup, run


def check_evaluations(run: runs.Run) -> None:
    """Raise ValueError where an evaluation before or after training is damaged."""
    with remedied(runs.MAKE_AGAIN):
        dev = run.read_evaluation(runs.DEV_BEFORE)
        if dev is not None and not isinstance(dev.get(DEV_METRIC), float):
            file = run.folder / f"{runs.DEV_BEFORE}.json"
            raise ValueError(f"{file} is damaged: it has no {DEV_METRIC}")
        for when in ("before", "after"):
            if (stored := run.read_evaluation(when)) is not None:
                check_columns(stored, run.folder / f"{when}.json")


def keep_heldout(setup: Setup, run: runs.Run) -> None:
    """Write the problems that a run reports into its folder, where no file holds just these.

    So the evaluation that comes next is of them, and of none that was trained on. What was held out
    of the hub's training set is not written: next come the language's own benchmarks.
    """
    config = setup.config
    file = run.folder / HELDOUT
    if file.is_file() or not setup.heldout or not (config.data or config.eval_data):
        return
    if config.eval_data:
        whole = load_problems(Path(config.eval_data), language=config.lang)
        if whole == setup.heldout:
            return
    write_problems(file, setup.heldout)


def evaluation_command(setup: Setup, folder: Path) -> str:
    """Return the command, as a shell takes it, that evaluates a run's adapter as the run did.

    That is on the problems that the run reported, with its prompts and its length limit. The
    adapter is the best on development problems, where the run named it, else the last.
    """
    config = setup.config
    words = ["python", "eval.py", "--pass-at-k", "8", "--model", config.model]
    words += ["--lang", config.lang]
    # What eval.py takes from the model's recipe by itself is not named.
    recipe = read_recipe(Path(str(setup.model.name_or_path)))
    known = str(recipe.get("eval_data")).replace("{lang}", config.lang)
    if (folder / HELDOUT).is_file():
        words += ["--benchmark", str(folder / HELDOUT)]
    elif config.eval_data and config.eval_data != known:
        words += ["--benchmark", config.eval_data]
    if config.max_new_tokens != recipe.get("max_new_tokens", EVAL_TOKENS):
        words += ["--max-new-tokens", str(config.max_new_tokens)]
    if config.thinking != EvalConfig.thinking:
        words += ["--thinking", config.thinking]
    best = runs.Run(folder).read_evaluation("best")
    return shlex.join([*words, "--adapter", str(folder / best["adapter"] if best else folder)])


def student_prompt(
    config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids of the student's prompt under these settings."""
    return build_prompt(problem, problem.language, tokenizer, thinking=config.thinking)


def _warm_start(lora: Lora, path: Path) -> str:
    """Put a former run's last adapter into the new one; return what identifies it.

    Raises ValueError for one with other layers, rank or scale.
    """
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
    lora.copy_current(*lora.sets.keys() & {"ema", "copy"})
    return weights_fingerprint(lora.sets["current"])


def longest_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> Lengths:
    """Return the tokens of the longest prompts of both roles, as far as the longest texts tell."""

    def _letters(problem: Problem) -> int:
        parts = (problem.problem, problem.problem_en, problem.solution_en)
        return sum(len(part or "") for part in parts)

    def _teacher_lengths(problem: Problem) -> list[int]:
        if config.method == "ssopd":  # it reads a completion
            text = readings.render_witness(config, problem, tokenizer, ".")
            return [len(encode_prompt(text, tokenizer)) + config.max_new_tokens]
        if not readings.can_read(config, problem):
            return []
        return readings.longest_readings(config, problem, tokenizer)

    # Tokenising all of thousands of problems once more takes seconds.
    longest = sorted(problems, key=_letters)[-16:]
    student = [len(student_prompt(config, problem, tokenizer)) for problem in longest]
    teacher = [length for problem in longest for length in _teacher_lengths(problem)]
    return Lengths(max(student), max(teacher, default=0))


def _can_teach(config: Config, problem: Problem) -> bool:
    return config.teacher_reads == "brief" or is_teachable(
        problem,
        english_problem=config.english_problem,
        english_solution=config.english_solution,
    )


def needs_answers(config: Config) -> bool:
    """Say whether training takes the answers of its problems, which must then be gradable.

    GRPO's reward is the grader's verdict. The controls that show the answer to the teacher, or
    teach it as a label, need it, too.
    """
    return config.method in GROUPED or config.answer_only or config.completion == "garbage"


def needs_teacher(config: Config) -> bool:
    """Say whether training takes what the teacher is to read from each of its problems.

    GRPO has no teacher, and SSOPD's reads a completion of the student's.
    """
    return config.method in (*DISTILLED, "egrsd")


def longest_prompt(
    config: Config, problem: Problem, tokenizer: PreTrainedTokenizerBase, *, must_teach: bool
) -> int:
    """Return the most tokens of a problem's prompts that have to fit, also posed in English.

    must_teach  the teacher reads it, whatever it lacks: ValueError where it lacks something. Else
                its prompt counts where it can be built
    """
    lengths = []
    for posed in (problem, *pose_in_english([problem], 1.0)):
        lengths.append(len(student_prompt(config, posed, tokenizer)))
        if must_teach:
            lengths += readings.longest_readings(config, posed, tokenizer)
        elif _can_teach(config, posed):
            lengths.append(len(readings.reading(config, posed, tokenizer)))
    return max(lengths)


def fitting_problems(
    config: Config, tokenizer: PreTrainedTokenizerBase, context: int, console: Console
) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Return read_problem_sets' three, without the problems too long to fit.

    Raises ValueError where they lack what training takes of them, or their prompts do not allow it.
    """
    if config.completion in LABELS and prompt_opens_think(tokenizer, config.thinking):
        raise ValueError(
            f"--completion {config.completion} would be a thought without an answer, as prompts "
            "open a think block; valid with it: --thinking off"
        )
    train, dev, heldout = read_problem_sets(config, console)
    graded = train if needs_answers(config) else []
    if config.teacher_reads == "voted":  # its votes are graded in the log, where they can be
        graded = graded or [problem for problem in train if is_gradable(problem.answer)]
    check_answers([*heldout, *dev, *graded])

    has_note = config.teacher_reads in ("plan", "explained")

    def _fitting(problems: list[Problem], must_teach: bool) -> list[Problem]:
        return keep_fitting(
            problems,
            [
                longest_prompt(config, problem, tokenizer, must_teach=must_teach)
                for problem in problems
            ],
            console,
            context=context,
            max_new_tokens=config.max_new_tokens,
            remedy=f"lower {'--note-tokens or ' if has_note else ''}--max-new-tokens",
        )

    heldout = _fitting(heldout, False)
    without = sum(not _can_teach(config, problem) for problem in heldout)
    if without:
        kl = "is of the others" if without < len(heldout) else "is left out"
        said = f"lack what the teacher is to read: the KL to the teacher {kl}"
        say(console, f"{without} of {len(heldout)} held-out problems {said}")
    return _fitting(train, needs_teacher(config)), _fitting(dev, False), heldout
