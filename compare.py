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

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

import copsd
from parts import outcome
from parts.adapters import put_adapter
from parts.data import (
    hub_training_file,
    load_aloud,
    load_problems,
    split_heldout,
    write_problems,
)
from parts.files import read_object, write_json
from parts.measure import Ruler
from parts.metrics import Graded, ratios
from parts.outcome import Results, accuracy
from parts.prompts import Problem, find_language, pose_in_english
from parts.recipe import CompareConfig, Config, check_settings
from parts.runs import Run
from parts.setup import Setup, configure, prepare
from parts.view import ArmsProgress, say

SWEEP_SEED = 1000  # of the runs that pick a rate; no reported run may have it
CHECKPOINTS = 6  # of a run, at which it is measured
KL_PROBLEMS = 64  # at every checkpoint; a KL per token needs fewer problems than an accuracy
LAYOUT = 2  # of the folder: an older one holds other results.json files
METHODS = {"grpo": {"method": "grpo"}, "copsd": {"method": "copsd"}}
PAIRS = (("base", "grpo"), ("base", "copsd"), ("grpo", "copsd"))
# Setting, and the values it is tried with, in the table's order. The recipe as it is comes first.
ABLATIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("clip_mode", ("none", "entry", "token")),
    ("divergence", ("forward_kl", "reverse_kl", "jsd")),
    ("teacher", ("fixed", "current", "ema")),
    ("english_problem", (True, False)),
    ("english_solution", (True, False)),
    ("swap_solutions", (False, True)),
)
OWN_SETTINGS = {  # flags of a run that an experiment sets by itself
    "method": "it trains with several",
    "seed": "--seeds says which",
    "save_every": "an arm is measured at 6 checkpoints",
}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Plan:
    """An experiment that was read and checked."""

    options: CompareConfig  # what was typed
    given: dict[str, Any]  # the settings of every run, of these
    langs: list[str]
    seeds: list[int]
    factors: list[float]  # of the sweep; none where rates are not picked
    configs: dict[tuple[str, str], Config]  # by method and language: its recipe
    variants: dict[str, dict[str, Any]]  # the arms, and what each sets
    out: Path

    @property
    def main(self) -> Config:
        """COPSD's recipe in the first language: what every arm is measured with, too."""
        return self.configs["copsd", self.langs[0]]


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


def make_plan(given: dict[str, Any], console: Console | None = None) -> Plan:
    """Return the experiment that the typed flags ask for. ValueError or OSError: bad input.

    Makes the folder and its record, and nothing before all is checked. Rows of the data that are
    left out are counted on the console.
    """
    options = CompareConfig(**given)
    check_settings(options)
    for name, why in OWN_SETTINGS.items():
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} is not for a comparison: {why}")
    own = {f.name for f in fields(CompareConfig)} - {f.name for f in fields(Config)}
    shared = {n: value for n, value in given.items() if n not in own | {"lang", "out"}}
    langs = parse_list(options.lang, "lang", lambda code: find_language(code).iso3)
    factors = parse_list(options.sweep, "sweep", float)
    if not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"--sweep is {options.sweep!r}; valid: factors above 0, such as 0.5,1,2")
    methods = ["copsd"] if options.ablate else list(METHODS)
    configs = {
        (method, lang): configure({**shared, "method": method, "lang": lang})[0]
        for method in methods
        for lang in langs
    }
    main = configs["copsd", langs[0]]
    if main.eval_problems < 1:
        valid = "1 or more, for arms are compared on them"
        raise ValueError(f"--eval-problems is {main.eval_problems}; valid: {valid}")
    kind = "ablate" if options.ablate else "compare"
    plan = Plan(
        options=options,
        given=shared,
        langs=langs,
        seeds=parse_seeds(options.seeds),
        factors=[] if options.ablate else factors,
        configs=configs,
        variants=ablation_arms(main) if options.ablate else METHODS,
        out=Path(options.out or f"runs/{kind}-{Path(main.model).name}-{'-'.join(langs)}"),
    )
    open_folder(plan, console)
    return plan


def open_folder(plan: Plan, console: Console | None) -> None:
    """Make the experiment's folder and record, or find its own; ValueError for another's."""
    root = Run(plan.out)
    held = read_object(root.record_file).get("config") if root.record_file.is_file() else None
    if isinstance(held, dict) and held.get("layout") != LAYOUT:
        raise ValueError(
            f"{plan.out} is of an older version of the comparison; choose another --out"
        )
    options = plan.options
    settings: dict[str, Any] = {
        "layout": LAYOUT,
        "langs": plan.langs,
        "seeds": plan.seeds,
        "factors": plan.factors,
        "dev_problems": options.dev_problems,
        "ablate": options.ablate,
    }
    for method, lang in plan.configs:
        if lang == plan.langs[0]:
            recipe = asdict(plan.configs[method, lang]).items()
            settings |= {f"{method} {n}": v for n, v in recipe if n not in ("method", "out")}
    root.check(settings)
    # Broken data of any language is an error before the folder is made.
    splits = {lang: read_splits(plan, lang, console) for lang in plan.langs}
    root.create(settings, {})
    for lang in plan.langs:
        write_splits(plan.out / lang, splits[lang])


def parse_list(text: str, what: str, convert: Callable[[str], Value]) -> list[Value]:
    """Return the converted parts of "a,b,c"; ValueError for a broken or a repeated one."""
    try:
        values = [convert(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{what} is {text!r}: {error}") from error
    if len(set(values)) < len(values):
        raise ValueError(f"--{what} is {text!r}, which names one of them twice")
    return values


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "3", which is 0, 1 and 2, or of "0,4,7"."""
    seeds = parse_list(text, "seeds", int)
    if len(seeds) == 1 and "," not in text:
        seeds = list(range(seeds[0]))
    if not seeds or min(seeds) < 0 or SWEEP_SEED in seeds:
        valid = "a count of 1 or more, or seeds from 0 as in 0,4,7"
        raise ValueError(f"--seeds is {text!r}; valid: {valid}")
    return seeds


def ablation_arms(config: Config) -> dict[str, dict[str, Any]]:
    """Return the recipe as it is, and an arm for each value of ABLATIONS that it does not have."""
    arms: dict[str, dict[str, Any]] = {"recipe": {}}
    for setting, values in ABLATIONS:
        for value in values:
            if value != getattr(config, setting):
                arms[f"{setting}={value}".replace("_", " ")] = {setting: value}
    return arms


def read_splits(plan: Plan, lang: str, console: Console | None = None) -> dict[str, list[Problem]]:
    """Return the problems of a language in three parts, {} where they are written already."""
    if all((plan.out / lang / f"{name}.jsonl").is_file() for name in ("train", "dev", "test")):
        return {}
    config = plan.configs["copsd", lang]
    train = load_aloud(Path(config.data) if config.data else hub_training_file(lang), lang, console)
    if config.eval_data:
        test = load_aloud(Path(config.eval_data), lang, console)[: config.eval_problems]
    else:
        train, test = split_heldout(train, config.eval_problems, 0)
    train, dev = split_heldout(train, plan.options.dev_problems, 0)
    return {"train": train, "dev": dev, "test": test}


def write_splits(folder: Path, splits: dict[str, list[Problem]]) -> None:
    """Write each part as a data file, so that no arm can see another split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in splits.items():
        write_problems(folder / f"{name}.jsonl", problems)


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
            "max_new_tokens": plan.main.max_new_tokens,
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
    if path.is_file():
        with commands.bad_input():
            return read_results(path)
    with commands.bad_input():
        config, model_folder = configure({**arm.settings, "out": str(arm.folder)})
        setup, run = prepare(config, model_folder, Console(quiet=True))
        refuse_missing_problems(arm, setup)
    if not arm.is_trained:
        results: Results = {"points": [], "final": measure_arm(plan, setup, kl=True, sampled=True)}
    else:
        if not copsd.LOOPS[config.method](setup, run, progress):
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
    updates = setup.config.inner_epochs if setup.config.method == "grpo" else 1  # per step
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
