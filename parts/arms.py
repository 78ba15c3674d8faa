"""The arms of an experiment: its runs, in the order of their work, and what each is started with.

Three things are found out while it runs. The base's answers say what budget COPSD's steps would
take, a sweep says which learning rate an arm gets, and COPSD's seconds say how long the others
train. Nothing here trains, measures or writes; compare.py does, and hands back what it has found.

Read Arm, stages_of (the order, and what each stage waits for), then the functions that it calls.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from parts.experiments import Variant
from parts.plan import SWEEP_SEED, Plan
from parts.recipe import largest_step
from parts.results import Results, accuracy

CHECKPOINTS = 6  # about so many, at which a run is measured
# The work of an arm, in budgets; it is for the time that is said to be left.
UNTRAINED_SIZE = 0.1
SWEEP_SIZE = 0.5
# An arm whose training takes as long as COPSD's but for this share is not run a second time.
NEARLY = 0.1


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
    in_english: bool = False  # measured on the English side of the test problems
    is_extra: bool = False  # one that nobody could know of when the experiment began


def stages_of(plan: Plan, found: dict[Path, Results]) -> Iterator[list[Arm]]:
    """Yield the arms in the order of their work, in stages; those of one do not wait for another.

    found  the results by an arm's folder. The caller adds those of a stage before it asks for the
           next one: the base's lengths give the budget, the sweep the learning rate, COPSD's
           seconds the arms at equal seconds
    """
    bases = [base_arm(plan, lang) for lang in plan.langs]
    yield bases
    common: dict[str, dict[str, Any]] = {
        lang: {
            **base.settings,
            "token_budget": token_budget(plan, found[base.folder]),
            "save_every": max(1, plan.main.steps // CHECKPOINTS),
        }
        for lang, base in zip(plan.langs, bases, strict=True)
    }
    rates: dict[str, float] = {}
    if plan.factors:
        yield [arm for lang in plan.langs for arm in sweep_arms(plan, lang, common[lang])]
        rates = {variant.name: pick_rate(plan, variant, found) for variant in plan.trained}
    yield [
        arm
        for lang in plan.langs
        for variant in plan.design.variants
        for arm in seed_arms(plan, lang, variant, common[lang], rates)
    ]
    if plan.design.in_full:
        yield [
            arm
            for lang in plan.langs
            for arm in seconds_arms(plan, lang, common[lang], rates, found)
        ]


def base_arm(plan: Plan, lang: str) -> Arm:
    """Return the arm of the untrained model; its settings are the first of every other's."""
    folder = plan.out / lang
    data = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl")}
    return Arm(
        name="base",
        title=f"{lang}, base",
        folder=folder / "base",
        settings={**plan.given, "lang": lang, **data, "seed": 0},
        size=UNTRAINED_SIZE,
        is_trained=False,
    )


def seed_arms(
    plan: Plan, lang: str, variant: Variant, common: dict[str, Any], rates: dict[str, float]
) -> Iterator[Arm]:
    """Yield a variant's run of each seed; one that is not trained is measured once.

    common  the settings that all arms share
    rates   the learning rates that were picked, by the variants' names
    """
    if not variant.is_trained:
        yield Arm(
            name=variant.name,
            title=f"{lang}, {variant.title}",
            folder=plan.out / lang / variant.name,
            settings={**common, **variant.settings, "seed": 0},
            size=UNTRAINED_SIZE,
            is_trained=False,
            in_english=variant.in_english,
        )
        return
    rate = {"lr": rates[variant.name]} if variant.name in rates else {}
    for seed in plan.seeds:
        title = f"{lang}, {variant.title}, seed {seed}"
        settings = {**common, **variant.settings, **rate, "seed": seed}
        yield Arm(variant.name, title, arm_folder(plan, lang, variant.name, seed), settings)


def seconds_arms(
    plan: Plan,
    lang: str,
    common: dict[str, Any],
    rates: dict[str, float],
    found: dict[Path, Results],
) -> Iterator[Arm]:
    """Yield the arms once more with budgets that take as many seconds of training as COPSD.

    An arm whose first run took as long as COPSD's, to within NEARLY, is not run again.
    """
    aim = training_seconds(plan, lang, "copsd", found)
    for variant in plan.trained:
        ratio = aim / training_seconds(plan, lang, variant.name, found)
        if abs(ratio - 1) <= NEARLY:
            continue
        budget = max(int(common["token_budget"] * ratio), least_budget(plan))
        rescaled = {**common, "token_budget": budget}
        rescaled["save_every"] = max(1, int(common["save_every"] * ratio))
        for arm in seed_arms(plan, lang, variant, rescaled, rates):
            yield replace(
                arm,
                title=f"{arm.title}, at equal seconds",
                folder=seconds_folder(plan, lang, variant.name, arm.settings["seed"]),
                is_extra=True,
            )


def training_seconds(plan: Plan, lang: str, name: str, found: dict[Path, Results]) -> float:
    """Return how long an arm's runs trained, without measuring: the mean over seeds."""
    runs = [found[arm_folder(plan, lang, name, seed)] for seed in plan.seeds]
    return fmean(run["final"]["train_s"] for run in runs)


def sweep_arms(plan: Plan, lang: str, common: dict[str, Any]) -> Iterator[Arm]:
    """Yield a run of each trained arm at each factor of its learning rate, with half the budget.

    Before them the base, on the problems that they are measured on.

    common  the settings that all arms of the language share
    """
    half = {
        **common,
        "eval_data": str(plan.out / lang / "dev.jsonl"),
        "eval_problems": plan.options.dev_problems,
        "token_budget": max(common["token_budget"] // 2, least_budget(plan)),
        "seed": SWEEP_SEED,
    }
    yield Arm(
        name="base",
        title=f"{lang}, sweep, base",
        folder=sweep_folder(plan, lang, "base", 0),
        settings=half,
        size=UNTRAINED_SIZE,
        is_sweep=True,
        is_trained=False,
    )
    for variant in plan.trained:
        for rate in sweep_rates(plan, variant):
            title = f"{lang}, sweep, {variant.title}, lr {rate:g}"
            settings = {**half, **variant.settings, "lr": rate}
            folder = sweep_folder(plan, lang, variant.name, rate)
            yield Arm(variant.name, title, folder, settings, SWEEP_SIZE, is_sweep=True)


def sweep_rates(plan: Plan, variant: Variant) -> list[float]:
    """Return the learning rates that an arm is tried with: factors of its method's."""
    method = variant.settings.get("method", "copsd")
    return [factor * plan.configs[method, plan.langs[0]].lr for factor in plan.factors]


def arm_folder(plan: Plan, lang: str, name: str, seed: int) -> Path:
    """Return where an arm is kept."""
    return plan.out / lang / f"{name.replace(' ', '-')}-{seed}"


def seconds_folder(plan: Plan, lang: str, name: str, seed: int) -> Path:
    """Return where an arm's run at equal seconds is kept, if it has one of its own."""
    return plan.out / lang / f"{name.replace(' ', '-')}-seconds-{seed}"


def sweep_folder(plan: Plan, lang: str, name: str, rate: float) -> Path:
    """Return where a run of the sweep is kept; the base's rate is 0."""
    return plan.out / lang / "sweep" / f"{name}-{rate:g}"


def sweep_accuracies(
    plan: Plan, variant: Variant, found: dict[Path, Results]
) -> dict[float, float]:
    """Return, by learning rate, the greedy accuracy on the development problems.

    It is the mean over the languages, each of which has as many problems.
    """
    return {
        rate: fmean(
            accuracy(found[sweep_folder(plan, lang, variant.name, rate)]["final"])
            for lang in plan.langs
        )
        for rate in sweep_rates(plan, variant)
    }


def untrained_accuracy(plan: Plan, found: dict[Path, Results]) -> float:
    """Return the base's greedy accuracy on those problems, the mean over the languages."""
    folders = [sweep_folder(plan, lang, "base", 0) for lang in plan.langs]
    return fmean(accuracy(found[folder]["final"]) for folder in folders)


def pick_rate(plan: Plan, variant: Variant, found: dict[Path, Results]) -> float:
    """Return the learning rate with the best accuracy of the sweep, the lowest of equals."""
    accuracies = sweep_accuracies(plan, variant, found)
    return max(sorted(accuracies), key=lambda rate: accuracies[rate])


def token_budget(plan: Plan, base: Results) -> int:
    """Return what every arm may sample: --token-budget, or else what COPSD's steps would.

    That is of completions as long as the base's are on average.
    """
    if plan.main.token_budget:
        return plan.main.token_budget
    lengths, problems = base["final"]["sampled"]["mean tokens"]
    budget = int(plan.main.steps * plan.main.batch_size * (sum(lengths) / sum(problems)))
    return max(budget, least_budget(plan))


def least_budget(plan: Plan) -> int:
    """Return what a step of any arm may sample at most, in tokens: no run has a smaller budget."""
    return max(largest_step(config) for config in plan.configs.values())


def results_by_arm(
    plan: Plan,
    lang: str,
    found: dict[Path, Results],
    folder_of: Callable[[Plan, str, str, int], Path],
) -> dict[str, list[Results]]:
    """Return a language's results by arm, the base first.

    folder_of  arm_folder or seconds_folder; an arm that has no run there has one run for both
    """
    arms = {"base": [found[plan.out / lang / "base"]]}
    for variant in plan.design.variants:
        if not variant.is_trained:
            arms[variant.name] = [found[plan.out / lang / variant.name]]
            continue
        folders = [folder_of(plan, lang, variant.name, seed) for seed in plan.seeds]
        if folders[0] not in found:
            folders = [arm_folder(plan, lang, variant.name, seed) for seed in plan.seeds]
        arms[variant.name] = [found[folder] for folder in folders]
    return arms
