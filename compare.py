"""Compare methods at an equal budget of sampled tokens; or COPSD with one part changed at a time.

    python compare.py --lang hau --seeds 3     base, GRPO and COPSD
    python compare.py --ablate --lang hau      COPSD's recipe, and each of its parts changed

An experiment is a list of arms, and an arm is a name and settings: a run that `copsd.py train` with
the settings in its config.json makes again. The folder of an experiment holds

    config.json                  its settings; another experiment's folder is refused
    LANG/train, dev, test.jsonl  what arms train on, what rates are picked on, what is reported
    LANG/sweep/METHOD-RATE/      runs of half the budget, in the first language, from which each
                                 method's learning rate is picked
    LANG/ARM-SEED/               a run, and results.json: its checkpoints on the test problems
    compare.json, RESULTS.md     every estimate and test; the tables (parts/outcome.py), and figures
"""

from parts import commands

if __name__ == "__main__":
    # Read before torch is loaded: `--help` and a mistyped flag answer at once. See copsd.py.
    commands.comparison()

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import copsd
import methods
from parts import outcome
from parts.adapters import put_adapter
from parts.data import load_problems
from parts.files import read_object, write_json
from parts.measure import Ruler
from parts.metrics import Graded, ratios
from parts.outcome import Results, accuracy
from parts.plan import SWEEP_SEED, Plan
from parts.prompts import Problem, pose_in_english
from parts.recipe import GROUPED
from parts.runs import Run
from parts.setup import Setup, configure, prepare
from parts.view import ArmsProgress, say

CHECKPOINTS = 6  # of a run, at which it is measured
KL_PROBLEMS = 64  # at every checkpoint; a KL per token needs fewer problems than an accuracy
PAIRS = (("base", "grpo"), ("base", "copsd"), ("grpo", "copsd"))


@dataclass(frozen=True)
class Arm:
    """One run: its name in tables, where it is kept, and the settings it is started with."""

    name: str
    title: str
    folder: Path
    settings: dict[str, Any]
    size: float = 1.0  # in budgets
    is_sweep: bool = False  # measured greedily, once, at its end
    is_trained: bool = True


class Stopped(Exception):
    """A signal stopped the arm that was training; its state is saved."""


def arms_of(plan: Plan, found: dict[Path, Results]) -> Iterator[Arm]:
    """Yield the arms in the order of their work.

    found  by an arm's folder: the results of the arms before, which decide the later ones' budget
           (by the base's length) and learning rate (by the sweep)
    """
    rates: dict[str, float] = {}
    for lang in plan.langs:
        folder = plan.out / lang
        common = {
            **plan.given,
            "lang": lang,
            "data": str(folder / "train.jsonl"),
            "eval_data": str(folder / "test.jsonl"),
        }
        base = Arm(
            name="base",
            title=f"{lang}, base",
            folder=folder / "base",
            settings={**common, "seed": 0},
            size=0.1,
            is_trained=False,
        )
        yield base
        budget = token_budget(plan, found[base.folder])
        common |= {
            "token_budget": budget,
            "save_every": max(1, plan.main.steps // CHECKPOINTS),
        }
        if plan.factors and lang == plan.langs[0]:
            half = {
                **common,
                "eval_data": str(folder / "dev.jsonl"),
                "eval_problems": plan.options.dev_problems,
                "token_budget": max(budget // 2, largest_step(plan)),
                "seed": SWEEP_SEED,
            }
            yield from sweep_arms(plan, half)
            rates = {method: pick_rate(plan, method, found) for method in plan.variants}
        for name, changes in plan.variants.items():
            rate = {"lr": rates[name]} if name in rates else {}
            for seed in plan.seeds:
                title = f"{lang}, {outcome.label(name)}, seed {seed}"
                settings = {**common, **changes, **rate, "seed": seed}
                yield Arm(name, title, arm_folder(plan, lang, name, seed), settings)


def sweep_arms(plan: Plan, common: dict[str, Any]) -> Iterator[Arm]:
    """Yield a run of each method at each factor of its learning rate."""
    for method, changes in plan.variants.items():
        for rate in sweep_rates(plan, method):
            title = f"{plan.langs[0]}, sweep, {outcome.label(method)}, lr {rate:g}"
            settings = {**common, **changes, "lr": rate}
            folder = sweep_folder(plan, method, rate)
            yield Arm(method, title, folder, settings, size=0.5, is_sweep=True)


def sweep_rates(plan: Plan, method: str) -> list[float]:
    """Return the learning rates that a method is tried with."""
    lr = plan.configs[method, plan.langs[0]].lr
    return [factor * lr for factor in plan.factors]


def arm_folder(plan: Plan, lang: str, name: str, seed: int) -> Path:
    """Return where an arm is kept."""
    return plan.out / lang / f"{name.replace(' ', '-')}-{seed}"


def sweep_folder(plan: Plan, method: str, rate: float) -> Path:
    """Return where a run of the sweep is kept."""
    return plan.out / plan.langs[0] / "sweep" / f"{method}-{rate:g}"


def sweep_accuracies(plan: Plan, method: str, found: dict[Path, Results]) -> dict[float, float]:
    """Return, by learning rate, the greedy accuracy on the development problems."""
    return {
        rate: accuracy(found[sweep_folder(plan, method, rate)]["final"])
        for rate in sweep_rates(plan, method)
    }


def pick_rate(plan: Plan, method: str, found: dict[Path, Results]) -> float:
    """Return the learning rate with the best accuracy of the sweep, the lowest of equals."""
    accuracies = sweep_accuracies(plan, method, found)
    return max(sorted(accuracies), key=lambda rate: accuracies[rate])


def token_budget(plan: Plan, base: Results) -> int:
    """Return what every arm may sample: --token-budget, or what --steps of the base would."""
    if plan.main.token_budget:
        return plan.main.token_budget
    lengths, problems = base["final"]["sampled"]["mean tokens"]
    budget = int(plan.main.steps * plan.main.batch_size * (sum(lengths) / sum(problems)))
    return max(budget, largest_step(plan))


def largest_step(plan: Plan) -> int:
    """Return what a step may sample at most, in tokens: no run can have a smaller budget."""
    return max(config.batch_size * config.max_new_tokens for config in plan.configs.values())


def run(plan: Plan, console: Console) -> int:
    """Run what is missing of an experiment, write its tables and figures; return the exit code.

    130 when a signal stopped it: finished arms are kept, and the same command goes on.
    """
    trained = len(plan.langs) * len(plan.variants) * len(plan.seeds)
    sweeps = len(plan.factors) * len(plan.variants)
    progress = ArmsProgress(
        console,
        arms=trained + len(plan.langs) + sweeps,
        units=trained + 0.1 * len(plan.langs) + 0.5 * sweeps,
    )
    found: dict[Path, Results] = {}
    try:
        for arm in arms_of(plan, found):
            progress.start(arm.title, arm.size)
            earlier = (arm.folder / "results.json").is_file()
            found[arm.folder] = run_arm(plan, arm, progress)
            final = found[arm.folder]["final"]
            said = f"greedy accuracy {accuracy(final):.3f}, trained {final.get('train_s', 0):.0f} s"
            progress.finish(said, earlier=earlier)
    except (Stopped, KeyboardInterrupt):
        say(console, "stopped; finished arms are kept, and the same command goes on from here")
        return 130
    except FloatingPointError as error:
        say(console, f"error: {arm.folder}: {error}")
        return 1
    write_outcome(plan, found, console)
    return 0


def run_arm(plan: Plan, arm: Arm, progress: ArmsProgress) -> Results:
    """Train an arm from where it stands and measure its checkpoints.

    What is finished is read, not done again.
    """
    path = arm.folder / "results.json"
    with commands.bad_input():
        if path.is_file():
            return read_results(path)
        config, model_folder = configure({**arm.settings, "out": str(arm.folder)})
        # The first arm decides what day a template writes, or arms of two days would differ in it.
        day = Run(plan.out / plan.langs[0] / "base").recorded_day()
        setup, run = prepare(config, model_folder, Console(quiet=True), day)
        refuse_missing_problems(arm, setup)
    if not arm.is_trained:
        results: Results = {"points": [], "final": measure_arm(plan, setup, kl=True, sampled=True)}
    else:
        if not methods.LOOPS[config.method](setup, run, progress):
            raise Stopped
        points = measure_checkpoints(plan, arm, setup, run)
        results = {"points": points, "final": points[-1]}
    write_json(path, results)
    return results


def refuse_missing_problems(arm: Arm, setup: Setup) -> None:
    """Raise ValueError where an arm left test problems out: arms are compared on the same ones."""
    asked = load_problems(Path(str(setup.config.eval_data)), language=setup.config.lang)
    if len(setup.heldout) < len(asked):
        missing = len(asked) - len(setup.heldout)
        raise ValueError(
            f"{arm.folder}: {missing} of {len(asked)} test problems do not fit the model's context "
            "with their prompts; lower --max-new-tokens"
        )


def read_results(path: Path) -> Results:
    """Return an arm's results; ValueError where the file is damaged."""
    results = read_object(path)
    final = results.get("final")
    if not (isinstance(final, dict) and "greedy" in final and "points" in results):
        raise ValueError(f"{path} is damaged: it holds no results; without it the arm is run again")
    return results


def measure_checkpoints(plan: Plan, arm: Arm, setup: Setup, run: Run) -> list[Results]:
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
                    kl=not arm.is_sweep,
                    sampled=step == saved[-1] and not arm.is_sweep,
                ),
            }
        )
    return points


def measure_arm(plan: Plan, setup: Setup, *, kl: bool, sampled: bool) -> Results:
    """Return every metric of the model as it is, a ratio per problem, by kind of attempt.

    "greedy" and "sampled" are on the test problems, "english" is greedy on their English side, and
    "kl" is the distance to the teacher on the student's own rollouts.
    """
    ruler = Ruler.of(plan.main, seed=0)

    def _measure(problems: list[Problem], greedy: bool) -> list[Graded]:
        return ruler.measure(setup.model, setup.tokenizer, problems, greedy=greedy)

    found: Results = {"greedy": ratios(_measure(setup.heldout, True), [1])}
    if english := pose_in_english([p for p in setup.heldout if p.problem_en], 1.0):
        found["english"] = ratios(_measure(english, True), [1])
    if sampled:
        ks = list(range(1, ruler.samples + 1))
        found["sampled"] = ratios(_measure(setup.heldout, False), ks)
    if kl:
        # To the teacher that reads everything, whatever taught this arm, so that arms compare.
        whole = replace(
            plan.main,
            english_problem=True,
            english_solution=True,
            divergence="forward_kl",
            teacher="fixed",
        )
        judge = replace(setup, config=whole)
        found["kl"] = copsd.heldout_kl(judge, setup.heldout[:KL_PROBLEMS], seed=0)
    return found


def write_outcome(plan: Plan, found: dict[Path, Results], console: Console) -> None:
    """Write and print the tables, and draw the figures."""
    by_language = {}
    for lang in plan.langs:
        arms = {"base": [found[plan.out / lang / "base"]]}
        for name in plan.variants:
            arms[name] = [found[arm_folder(plan, lang, name, seed)] for seed in plan.seeds]
        by_language[lang] = arms
    names = list(plan.variants)
    sweep = {}
    if plan.factors:
        sweep = {
            method: outcome.Sweep(
                plan.factors, sweep_accuracies(plan, method, found), pick_rate(plan, method, found)
            )
            for method in names
        }
    experiment = outcome.Experiment(
        name="ablation" if plan.options.ablate else "comparison",
        arms=by_language,
        pairs=[("recipe", name) for name in names[1:]] if plan.options.ablate else list(PAIRS),
        sweep=sweep,
        length_limit=plan.main.max_new_tokens,
    )
    results = Path(plan.options.results) if plan.options.results else None
    files = outcome.write_experiment(experiment, plan.out, results)
    for table in outcome.tables(experiment):
        say(console, table + "\n")
    say(console, f"written: {', '.join(map(str, files))}")
