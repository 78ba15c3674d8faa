"""Compare methods at an equal budget of sampled tokens; or COPSD with one part changed at a time.

    python compare.py --lang hau --seeds 3     base, GRPO and COPSD
    python compare.py --ablate --lang hau      COPSD's recipe, and each of its parts changed
    python compare.py --attribute --lang hau   where the gain comes from: COPSD and its controls
    python compare.py --family --lang hau      every method
    python compare.py --jobs 2                 any of them, with two runs at a time

An experiment is a list of arms (parts/experiments.py), and an arm is a name and settings. To make
its run again, give `copsd.py train` the settings in its config.json. Which runs there are, and with
what budget and learning rate, is in parts/arms.py; here they are made and measured. The folder of
an experiment holds

    config.json                  its settings; another experiment's folder is refused
    LANG/train, dev, test.jsonl  what arms train on, what rates are picked on, what is reported
    LANG/base/                   the untrained model, whose answers set the token budget
    LANG/sweep/ARM-RATE/         runs of half the budget, from which each arm's learning rate is
                                 picked: one rate for all languages. base-0 is the base
    LANG/ARM-SEED/               a run; results.json: its checkpoints on the test problems;
                                 prompts.json: what student and teacher read of some problems, whole
    LANG/ARM-seconds-SEED/       the same with another budget, so that it trains as long as COPSD
    compare.json, RESULTS.md     every estimate and test; the tables (parts/outcome.py), and figures
"""

if __name__ == "__main__":
    # Read before torch is loaded: `--help` and a mistyped flag answer at once. See copsd.py.
    from parts import heap, stops

    heap.restart_with_joined_holes()
    stops.say_stops()
    from parts import commands

    commands.comparison()

import gc
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import typer
from rich.console import Console

import copsd
import methods
from parts import outcome
from parts.adapters import put_adapter
from parts.arms import (
    SWEEP_SIZE,
    UNTRAINED_SIZE,
    Arm,
    arm_folder,
    pick_rate,
    results_by_arm,
    seconds_folder,
    stages_of,
    sweep_accuracies,
    untrained_accuracy,
)
from parts.data import load_problems
from parts.evaluations import naming
from parts.files import read_sealed, remedied, write_json, write_sealed
from parts.measure import Ruler
from parts.metrics import Ratio, ratios
from parts.plan import Plan
from parts.program import Output, bad_input, say_error, working
from parts.prompts import pose_in_english
from parts.recipe import GROUPED, LABELS
from parts.results import (
    Experiment,
    Measured,
    Results,
    Sweep,
    accuracy,
    check_alike,
    check_results,
)
from parts.runs import Run
from parts.setup import Setup, configure, prepare
from parts.side_by_side import work_through
from parts.view import ArmsProgress, say

KL_PROBLEMS = 64  # at every checkpoint; a KL per token needs fewer problems than an accuracy
SHOWN_PROBLEMS = 4  # in prompts.json
STOPPED = 130  # the exit code of a run that a signal ended


class Stopped(Exception):
    """A signal stopped the arm that was training; its state is saved."""


def carry_out(plan: Plan, console: Console) -> None:
    """Run what is missing of an experiment, then write its tables and figures.

    Raises KeyboardInterrupt when a signal stopped it: finished arms are kept, and the same command
    goes on.
    """
    trained = len(plan.langs) * len(plan.trained) * len(plan.seeds)
    bases = 2 if plan.factors else 1  # a sweep has one of its own
    untrained = len(plan.langs) * (bases + len(plan.design.variants) - len(plan.trained))
    sweeps = len(plan.langs) * len(plan.factors) * len(plan.trained)
    progress = ArmsProgress(
        console,
        arms=trained + untrained + sweeps,
        units=trained + UNTRAINED_SIZE * untrained + SWEEP_SIZE * sweeps,
    )
    found: dict[Path, Results] = {}
    try:
        for arms in stages_of(plan, found):
            for arm, results in finish_arms(plan, arms, progress):
                found[arm.folder] = results
    except Stopped:
        raise KeyboardInterrupt from None  # as if the signal had come while an arm was measured
    write_outcome(plan, found, console)


def finish_arms(
    plan: Plan, arms: list[Arm], progress: ArmsProgress
) -> Iterator[tuple[Arm, Results]]:
    """Run what is missing of a stage; yield each arm and its results as it is finished.

    Those that an earlier call finished come first.
    """
    for arm in arms:
        if arm.is_extra:
            progress.expect(arm.size)
    earlier = [arm for arm in arms if results_file(arm).is_file()]
    missing = [arm for arm in arms if arm not in earlier]
    for arm in chain(earlier, done_apart(plan, missing)):
        progress.start(arm.title, arm.size)
        # What an earlier call, or a process beside this one, has finished is read.
        results = run_arm(plan, arm, progress, progress.console)
        trained_s = results["final"].get("train_s", 0)
        said = f"greedy accuracy {accuracy(results['final']):.3f}, trained {trained_s:.0f} s"
        progress.finish(said, earlier=arm in earlier)
        yield arm, results


def done_apart(plan: Plan, arms: list[Arm]) -> Iterator[Arm]:
    """Yield each arm once a process of its own has run it; with --jobs 1 as it is, not run yet.

    Raises Stopped where a signal ended one, and SystemExit where one failed.
    """
    if plan.options.jobs == 1:
        yield from arms
        return
    apart = partial(run_apart, plan)
    for arm, code in work_through(apart, arms, plan.options.jobs, preload=__name__):
        if code == STOPPED:
            raise Stopped
        if code < 0:
            say_error(f"{arm.folder}: its process was killed by signal {-code}")
            raise SystemExit(1)
        if code:
            raise SystemExit(code)  # the arm's own process has said why
        yield arm


def run_apart(plan: Plan, arm: Arm) -> int:
    """Run an arm in a process of its own, which leaves its results; return the exit code."""
    progress = ArmsProgress(Console(), arms=1, units=arm.size, is_said=False)
    progress.start(arm.title, arm.size)
    try:
        quiet = Console(quiet=True)
        with redirect_stdout(Output(sys.stdout)), working(quiet, lambda: "finished arms are kept"):
            run_arm(plan, arm, progress, Console())
    except Stopped:
        return STOPPED
    except typer.Exit as ending:
        return ending.exit_code
    return 0


def results_file(arm: Arm) -> Path:
    """Return where the results of an arm are kept, once it is finished."""
    return arm.folder / "results.json"


def run_arm(plan: Plan, arm: Arm, progress: ArmsProgress, console: Console) -> Results:
    """Train an arm from where it stands and measure its checkpoints.

    console  where is said what its folder and its problems lack, such as a damaged state
    What is finished is read, not done again. Bad input is a line and exit code 2, as bad_input
    makes it. Raises Stopped where a signal ended the training, and FloatingPointError where its
    numbers are no longer finite.
    """
    path = results_file(arm)
    with bad_input():
        if path.is_file():
            return read_results(arm)
        # The last arm's model is a cycle of references, and would stand beside this one's.
        gc.collect()
        config, model_folder = configure({**arm.settings, "out": str(arm.folder)})
        # The first arm decides what day a template writes, or arms of two days would differ in it.
        day = Run(plan.out / plan.langs[0] / "base").recorded_day()
        setup, run = prepare(config, model_folder, console, day, aside=Console(quiet=True))
        refuse_missing_problems(arm, setup)
        if arm.in_english:
            setup = ask_in_english(setup)
    write_json(arm.folder / "prompts.json", whole_prompts(setup))
    if not arm.is_trained:
        results: Results = {
            "points": [],
            "final": measure_arm(plan, setup, whole=not arm.is_sweep, sampled=not arm.is_sweep),
        }
    else:
        try:
            if not methods.LOOPS[config.method](setup, run, progress):
                raise Stopped
        except FloatingPointError as error:
            raise FloatingPointError(f"{arm.folder}: {error}") from error
        points = measure_checkpoints(plan, arm, setup, run)
        results = {"points": points, "final": points[-1]}
    results["files"] = run.inventory()
    write_sealed(path, results)
    return results


def refuse_missing_problems(arm: Arm, setup: Setup) -> None:
    """Raise ValueError where an arm left problems out: arms are measured on the same ones."""
    asked = load_problems(Path(str(setup.config.eval_data)), language=setup.config.lang)
    if len(setup.heldout) < len(asked):
        missing = len(asked) - len(setup.heldout)
        raise ValueError(
            f"{arm.folder}: {missing} of {len(asked)} test problems do not fit the model's context "
            "with their prompts; lower --max-new-tokens"
        )


def ask_in_english(setup: Setup) -> Setup:
    """Return the same with its test problems posed in English; the plan has seen that all can be.

    It measures what the model would solve if a perfect translator had put them into English.
    """
    return replace(setup, heldout=pose_in_english(setup.heldout, 1.0))


def whole_prompts(setup: Setup) -> list[dict[str, str | None]]:
    """Return some problems as the arm's student and, where it has one, teacher read them, whole.

    Beside them the label, where the completion is one that nobody samples. What was sampled stands
    in completions.jsonl.
    """
    config = setup.config
    decode = setup.tokenizer.decode
    shown = []
    problems = setup.train[:SHOWN_PROBLEMS]
    prompts = methods.example_prompts(setup, problems)
    for problem, teacher_prompt in zip(problems, prompts, strict=True):
        row = {
            "problem": problem.id,
            "student": str(decode(setup.student_prompt(problem))),
            "teacher": str(decode(teacher_prompt)) if teacher_prompt else None,
        }
        if config.completion in LABELS:
            write, _ = copsd.SOURCES[config.completion]
            (label,) = write(setup, [problem], seed=config.seed)
            row["label"] = str(decode(label.completion_ids))
        shown.append(row)
    return shown


def read_results(arm: Arm) -> Results:
    """Return an arm's results; ValueError where they, or another file of the arm, are damaged."""
    path = results_file(arm)
    with remedied("remove it to have the arm run again"):
        results = read_sealed(path)
        with naming(path):
            check_results(results, is_trained=arm.is_trained, is_sweep=arm.is_sweep)
    Run(arm.folder).check_inventory(results.get("files", {}))
    return results


def measure_checkpoints(plan: Plan, arm: Arm, setup: Setup, run: Run) -> list[Measured]:
    """Return what each saved adapter of a run is worth and has cost; of a sweep's run, the last."""
    updates = setup.config.inner_epochs if setup.config.method in GROUPED else 1  # per step
    steps = {row["step"]: row for row in run.metrics()}
    saved = [step for step in sorted(steps) if run.adapter_folder(step).is_dir()]
    points = []
    for step in saved[-1:] if arm.is_sweep else saved:
        put_adapter(setup.lora, run.adapter_folder(step))
        points.append(
            {
                "step": step,
                "sampled_tokens": steps[step]["sampled_tokens"],
                "train_s": sum(steps[past]["time_s"] for past in steps if past <= step),
                "updates": step * updates,
                **measure_arm(
                    plan,
                    setup,
                    whole=not arm.is_sweep,
                    sampled=step == saved[-1] and not arm.is_sweep,
                ),
            }
        )
    return points


def measure_arm(plan: Plan, setup: Setup, *, whole: bool, sampled: bool) -> Measured:
    """Return every metric of the model as it is, a ratio per problem, by kind of attempt.

    "greedy" and "sampled" are on the problems held out, "english" is greedy on their English side,
    and "kl" is the distance to the teacher on the student's own rollouts.

    whole  False: only "greedy", which is all that a sweep asks for
    """
    ruler = Ruler.of(plan.main, seed=0)
    attempt = partial(ruler.measure, setup.model, setup.tokenizer)
    found: Measured = {"greedy": ratios(attempt(setup.heldout, greedy=True), [1])}
    if not whole:
        return found
    if english := pose_in_english([p for p in setup.heldout if p.problem_en], 1.0):
        found["english"] = ratios(attempt(english, greedy=True), [1])
    if sampled:
        ks = list(range(1, ruler.samples + 1))
        found["sampled"] = ratios(attempt(setup.heldout, greedy=False), ks)
    found["kl"] = distance_to_teacher(plan, setup)
    return found


def distance_to_teacher(plan: Plan, setup: Setup) -> Ratio:
    """Return the KL, in nats, and the tokens of some of the problems held out; see heldout_kl.

    It is to the teacher that reads everything, whatever taught this arm, so that arms compare.
    """
    reads_all = replace(
        plan.main,
        english_problem=True,
        english_solution=True,
        teacher_reads="solution",
        divergence="forward_kl",
        teacher="fixed",
    )
    judge = replace(setup, config=reads_all)
    return copsd.heldout_kl(judge, setup.heldout[:KL_PROBLEMS], seed=0)


def write_outcome(plan: Plan, found: dict[Path, Results], console: Console) -> None:
    """Write and print the tables, and draw the figures."""
    by_language = {}
    equal_seconds = {}
    for lang in plan.langs:
        folder = plan.out / lang
        with bad_input():
            check_alike({arm: each for arm, each in found.items() if arm.parent == folder})
        by_language[lang] = results_by_arm(plan, lang, found, arm_folder)
        if plan.design.in_full:
            equal_seconds[lang] = results_by_arm(plan, lang, found, seconds_folder)
    sweep = {}
    if plan.factors:
        untrained = untrained_accuracy(plan, found)
        sweep = {
            variant.name: Sweep(
                plan.factors,
                sweep_accuracies(plan, variant, found),
                pick_rate(plan, variant, found),
                untrained,
            )
            for variant in plan.trained
        }
    variants = plan.design.variants
    experiment = Experiment(
        name=plan.design.name,
        arms=by_language,
        pairs=list(plan.design.pairs),
        sweep=sweep,
        length_limit=plan.main.max_new_tokens,
        titles={variant.name: variant.title for variant in variants},
        evidence={variant.name: variant.evidence for variant in variants},
        equal_seconds=equal_seconds,
    )
    results = Path(plan.options.results) if plan.options.results else None
    tables = outcome.tables(experiment)
    files = outcome.write_experiment(experiment, tables, plan.out, results)
    for table in tables:
        say(console, table + "\n")
    say(console, f"written: {', '.join(map(str, files))}")
