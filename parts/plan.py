"""An experiment as it was asked for: read, checked, its folder and its problems laid out.

`copsd.py plan`, which is about memory, is in parts/fitting.py. Nothing here trains or measures;
compare.py does, with what this file returns.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from parts.data import DEV_SEED, hub_training_file, load_aloud, split_heldout, write_problems
from parts.experiments import ATTRIBUTION, COMPARISON, FAMILY, Design, Variant
from parts.files import read_sealed
from parts.machine import pick_device, pick_dtype
from parts.model import resolve_model
from parts.prompts import Problem, find_language
from parts.recipe import OWN_SETTINGS, CompareConfig, Config
from parts.runs import Run
from parts.settings import check_settings
from parts.setup import configure, load_setup
from parts.view import say

SWEEP_SEED = 1000  # of the runs that pick a rate; no reported run may have it
MAX_SEEDS = 1000  # runs of each arm
LAYOUT = 2  # of the folder: an older one holds other results.json files
# Setting, and the values it is tried with, in the table's order. The recipe as it is comes first.
ABLATIONS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("clip_mode", ("none", "entry", "token")),
    ("divergence", ("forward_kl", "reverse_kl", "jsd")),
    ("teacher", ("fixed", "current", "ema")),
    ("english_problem", (True, False)),
    ("english_solution", (True, False)),
    ("swap_solutions", (False, True)),
)
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
    design: Design  # its arms
    out: Path

    @property
    def trained(self) -> list[Variant]:
        """The arms that are trained."""
        return [variant for variant in self.design.variants if variant.is_trained]

    @property
    def main(self) -> Config:
        """COPSD's recipe in the first language: what every arm is measured with, too."""
        return self.configs["copsd", self.langs[0]]


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
    own |= {"lang", "out", "dev_problems"}
    shared = {name: value for name, value in given.items() if name not in own}
    langs = parse_list(options.lang, "lang", lambda code: find_language(code).iso3)
    design = pick_design(options)
    if design.steps:
        shared.setdefault("steps", design.steps)
    factors = parse_factors(options.sweep or design.sweep or "1")
    # COPSD's recipe is what every arm is measured with, so it is there in any case.
    methods = dict.fromkeys(
        [*(v.settings.get("method", "copsd") for v in design.variants), "copsd"]
    )
    # All arms have COPSD's length limit, so that a budget means the same in each.
    limit = configure({**shared, "method": "copsd", "lang": langs[0]})[0].max_new_tokens
    shared["max_new_tokens"] = limit
    configs = {
        (method, lang): configure({**shared, "method": method, "lang": lang})[0]
        for method in methods
        for lang in langs
    }
    main = configs["copsd", langs[0]]
    pick_dtype(main.dtype, pick_device(main.device))  # refuses what this machine does not have
    if options.results and not Path(options.results).parent.is_dir():
        raise ValueError(f"--results is {options.results}: there is no such folder")
    if main.eval_problems < 1:
        valid = "1 or more, for arms are compared on them"
        raise ValueError(f"--eval-problems is {main.eval_problems}; valid: {valid}")
    if options.ablate:
        design = replace(design, variants=ablation_arms(main))
        pairs = tuple(("recipe", variant.name) for variant in design.variants[1:])
        design = replace(design, pairs=pairs)
    refuse_equal_arms(design, {**shared, "lang": langs[0]})
    plan = Plan(
        options=options,
        given=shared,
        langs=langs,
        seeds=parse_seeds(options.seeds),
        factors=factors if design.sweep else [],
        configs=configs,
        design=design,
        out=Path(options.out or f"runs/{design.folder}-{Path(main.model).name}-{'-'.join(langs)}"),
    )
    open_folder(plan, console)
    return plan


def pick_design(options: CompareConfig) -> Design:
    """Return the experiment that the flags name; ValueError where they name two.

    An ablation's arms come later, for they are those that the recipe does not have.
    """
    designs = {
        "ablate": Design("ablation", "ablate", (), (), sweep=None),
        "attribute": ATTRIBUTION,
        "family": FAMILY,
    }
    asked = [name for name in designs if getattr(options, name)]
    if len(asked) > 1:
        flags = " and ".join(f"--{name}" for name in asked)
        raise ValueError(f"{flags} are experiments of their own; ask for one of them")
    return designs[asked[0]] if asked else COMPARISON


def refuse_equal_arms(design: Design, shared: dict[str, Any]) -> None:
    """Raise ValueError where two arms would be the same run, or one's settings fit nothing.

    shared  the settings of all arms
    """
    names: dict[str, str] = {}
    for variant in design.variants:
        if not variant.is_trained:
            continue
        config, _ = configure({**shared, **variant.settings, "out": "one folder"})
        other = names.setdefault(repr(config), variant.name)
        if other != variant.name:
            raise ValueError(
                f"the arms {other!r} and {variant.name!r} would be the same run; leave out the "
                f"flags that set what they differ in"
            )


def open_folder(plan: Plan, console: Console | None) -> None:
    """Make the experiment's folder and record, or find its own; ValueError for another's."""
    root = Run(plan.out)
    if root.record_file.is_file():
        held = read_sealed(root.record_file).get("config", {})
        if "seeds" in held and held.get("layout") != LAYOUT:
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
    if plan.design.in_full:
        settings["arms"] = {variant.name: variant.settings for variant in plan.design.variants}
    for method, lang in plan.configs:
        if lang == plan.langs[0]:
            recipe = asdict(plan.configs[method, lang]).items()
            settings |= {f"{method} {n}": v for n, v in recipe if n not in ("method", "out")}
    root.check(settings)
    taken_over = root.claim()
    if console and taken_over:
        say(console, taken_over)
    root.check_digests()
    # Broken data of any language is an error before the folder is made.
    splits = {lang: read_splits(plan, lang, console) for lang in plan.langs}
    if not root.record_file.is_file():
        # So is what only loading tells, such as weights that are broken.
        load_setup(plan.main, resolve_model(plan.main.model), Console(quiet=True))
    root.create(settings, {})
    for lang in plan.langs:
        write_splits(root, lang, splits[lang])


def parse_list(text: str, what: str, convert: Callable[[str], Value]) -> list[Value]:
    """Return the converted parts of "a,b,c"; ValueError for a broken or a repeated one."""
    try:
        values = [convert(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{what} is {text!r}: {error}") from error
    if len(set(values)) < len(values):
        raise ValueError(f"--{what} is {text!r}, which names one of them twice")
    return values


def parse_factors(text: str) -> list[float]:
    """Return the factors of "0.5,1,2", which the learning rates of a sweep are."""
    factors = parse_list(text, "sweep", float)
    if not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"--sweep is {text!r}; valid: factors above 0, such as 0.5,1,2")
    return factors


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "3", which is 0, 1 and 2, or of "0,4,7"."""
    seeds = parse_list(text, "seeds", int)
    if len(seeds) == 1 and "," not in text:
        seeds = list(range(min(seeds[0], MAX_SEEDS + 1)))
    too_large = len(seeds) > MAX_SEEDS or max(seeds, default=0) > 10**9
    if not seeds or min(seeds) < 0 or too_large or SWEEP_SEED in seeds:
        valid = f"a count of 1 to {MAX_SEEDS}, or seeds from 0 to {10**9} as in 0,4,7"
        raise ValueError(f"--seeds is {text!r}; valid: {valid}")
    return seeds


def ablation_arms(config: Config) -> tuple[Variant, ...]:
    """Return the recipe as it is, and an arm for each value of ABLATIONS that it does not have."""
    arms = [Variant("recipe", "recipe")]
    for setting, values in ABLATIONS:
        for value in values:
            if value != getattr(config, setting):
                name = f"{setting}={value}".replace("_", " ")
                arms.append(Variant(name, name, {setting: value}))
    return tuple(arms)


def read_splits(plan: Plan, lang: str, console: Console | None = None) -> dict[str, list[Problem]]:
    """Return the problems of a language in three parts, {} where they are written already."""
    if all((plan.out / lang / f"{name}.jsonl").is_file() for name in ("train", "dev", "test")):
        return {}
    config = plan.configs["copsd", lang]
    source = Path(config.data) if config.data else hub_training_file(lang)
    train = load_aloud(source, lang, console)
    if config.eval_data:
        test = load_aloud(Path(config.eval_data), lang, console)[: config.eval_problems]
    else:
        train, test = split_heldout(train, config.eval_problems, 0)
    train, dev = split_heldout(train, plan.options.dev_problems, DEV_SEED)
    return {"train": train, "dev": dev, "test": test}


def write_splits(root: Run, lang: str, splits: dict[str, list[Problem]]) -> None:
    """Write each part of a language as a data file, so that no arm can see another split."""
    folder = root.folder / lang
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in splits.items():
        write_problems(folder / f"{name}.jsonl", problems)
    if splits:
        root.vouch(*(folder / f"{name}.jsonl" for name in splits))
