"""An experiment as it was asked for: read, checked, its folder and its problems laid out.

`copsd.py plan`, which is about memory, is in parts/fitting.py. Nothing here trains or measures;
compare.py does, with what this file returns.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from rich.console import Console

from parts.chat import freeze_date
from parts.data import DEV_SEED, read_reported, split_heldout, write_problems
from parts.experiments import ATTRIBUTION, COMPARISON, FAMILY, Design, Variant
from parts.family import context_length
from parts.files import make_folder, read_sealed, refuse_no_file, remedied, split_section
from parts.machine import pick_device, pick_dtype
from parts.measure import check_answers
from parts.model import load_config, load_tokenizer, resolve_model
from parts.prompts import Problem, find_language
from parts.recipe import OWN_SETTINGS, CompareConfig, Config
from parts.runs import MAKE_AGAIN, START_ANEW, Run
from parts.settings import as_trained, check_settings, doubts_of, flag_of, idle_settings
from parts.setup import configure, fitting_problems, load_setup, needs_answers
from parts.typed import read_number
from parts.view import say

ASKED_FIRST = 50  # problems of a part, of which an arm is asked whether it could start
SWEEP_SEED = 1000  # of the runs that pick a rate; no reported run may have it
MAX_SEEDS = 1000  # runs of each arm
SPLITS = ("train", "dev", "test")
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
            raise ValueError(f"{flag_of(name)} is not for a comparison: {why}")
    own = {f.name for f in fields(CompareConfig)} - {f.name for f in fields(Config)}
    own |= {"lang", "out", "dev_problems"}
    shared = {name: value for name, value in given.items() if name not in own}
    langs = parse_list(options.lang, "lang", lambda code: find_language(code).iso3)
    design = pick_design(options)
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
    if options.results:
        check_results(Path(options.results), design.name)
    if main.eval_problems < 1:
        valid = "1 or more, for arms are compared on them"
        raise ValueError(f"--eval-problems is {main.eval_problems}; valid: {valid}")
    if options.ablate:
        design = replace(design, variants=ablation_arms(main))
        pairs = tuple(("recipe", variant.name) for variant in design.variants[1:])
        design = replace(design, pairs=pairs)
    arms = configs_of(design, {**shared, "lang": langs[0]})
    refuse_idle_flags(design, shared, arms)
    refuse_equal_arms(arms)
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
    print_warnings(arms, console)
    open_folder(plan, console)
    return plan


def pick_design(options: CompareConfig) -> Design:
    """Return the experiment that the flags name; ValueError where they name two.

    An ablation has no sweep, and its arms come later: they are those that the recipe does not have.
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
    if options.ablate and options.sweep:
        raise ValueError("--sweep is not for --ablate: every arm has the recipe's rate")
    return designs[asked[0]] if asked else COMPARISON


def configs_of(design: Design, shared: dict[str, Any]) -> dict[str, Config]:
    """Return the settings of each trained arm by its name; ValueError where one's fit nothing.

    shared  the settings of all arms
    """
    configs = {}
    for variant in design.variants:
        if not variant.is_trained:
            continue
        try:
            own = {**shared, **variant.settings, "out": "one folder"}
            configs[variant.name] = configure(own)[0]
        except ValueError as error:  # it may name a flag that the arm has, and nobody typed
            raise ValueError(f"the arm {variant.name!r}: {error}") from error
    return configs


def refuse_equal_arms(arms: dict[str, Config]) -> None:
    """Raise ValueError where two arms would be the same run."""
    names: dict[str, str] = {}
    for name, config in arms.items():
        other = names.setdefault(repr(as_trained(config)), name)
        if other != name:
            raise ValueError(
                f"the arms {other!r} and {name!r} would be the same run; leave out the "
                f"flags that set what they differ in"
            )


def refuse_idle_flags(design: Design, shared: dict[str, Any], arms: dict[str, Config]) -> None:
    """Raise ValueError for a flag that no arm uses, or that leaves an arm without its difference.

    shared  the settings of all arms, of which those in `arms` are made
    """
    unused = dict.fromkeys(shared, "")
    for variant in design.variants:
        if not variant.is_trained:
            continue
        idle = idle_settings({**shared, **variant.settings}, arms[variant.name])
        if variant.settings and variant.settings.keys() <= idle.keys():
            why = idle[next(iter(variant.settings))]
            raise ValueError(f"the arm {variant.name!r} would not differ: {why}")
        said = f"the arm {variant.name!r} has its own --"
        own = {name: said + name.replace("_", "-") for name in variant.settings}
        unused = {
            name: own.get(name) or why or idle[name]
            for name, why in unused.items()
            if name in own or name in idle
        }
    for why in unused.values():
        raise ValueError(f"{why}, and no other arm uses it")


def print_warnings(arms: dict[str, Config], console: Console | None) -> None:
    """Say what is doubtful about the arms' settings, each doubt once, and in which arms it is."""
    if console is None:
        return
    names: dict[str, list[str]] = {}
    for name, config in arms.items():
        for warning in doubts_of(config):
            names.setdefault(warning, []).append(name)
    for warning, those in names.items():
        say(console, f"{warning} (in {', '.join(those)})")


def open_folder(plan: Plan, console: Console | None) -> None:
    """Make the experiment's folder and record, or find its own; ValueError for another's."""
    root = Run(plan.out)
    if root.record_file.is_file():
        with remedied(START_ANEW):
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
    with remedied(MAKE_AGAIN):  # found out now and not when all arms are done
        split_section(root.folder / "RESULTS.md", plan.design.name)
    taken_over = root.claim()
    if console and taken_over:
        say(console, taken_over)
    root.check_digests()
    # Broken data of any language is an error before the folder is made.
    splits = {lang: read_splits(plan, lang, console) for lang in plan.langs}
    if not root.record_file.is_file():
        # So is what only loading tells, such as weights that are broken.
        load_setup(plan.main, resolve_model(plan.main.model), Console(quiet=True))
        refuse_no_english(plan, splits)
        refuse_arms_that_cannot_start(plan, splits)
    taken_over = root.create(settings, {})
    if console and taken_over:
        say(console, taken_over)
    for lang in plan.langs:
        folder = root.folder / lang
        if splits[lang]:
            root.disown(folder)
            write_splits(folder, splits[lang])
        root.vouch_anew(*(folder / f"{name}.jsonl" for name in SPLITS))


def refuse_no_english(plan: Plan, splits: dict[str, dict[str, list[Problem]]]) -> None:
    """Raise ValueError where the base is to be asked in English what has no English side."""
    asked = [variant.name for variant in plan.design.variants if variant.in_english]
    for name, (lang, problems) in product(asked, splits.items()):
        missing = sum(not problem.problem_en for problem in problems["test"])
        if missing:
            raise ValueError(
                f"{missing} of {len(problems['test'])} test problems in {lang} have no English "
                f"side, which the arm {name!r} asks the base model"
            )


def refuse_arms_that_cannot_start(plan: Plan, splits: dict[str, dict[str, list[Problem]]]) -> None:
    """Raise ValueError for the first arm that its problems or its prompts would not let start.

    Its turn comes hours later. It is asked what its start asks, of some of its own problems, which
    stand where nobody keeps them; of all only where some would not do.
    """
    folder = resolve_model(plan.main.model)
    tokenizer, _ = freeze_date(load_tokenizer(folder), None)
    context = context_length(load_config(folder))
    with TemporaryDirectory() as scratch:
        for lang, problems in splits.items():
            some = {part: all_of_it[:ASKED_FIRST] for part, all_of_it in problems.items()}
            write_splits(Path(scratch) / "some" / lang, some)
            write_splits(Path(scratch) / "all" / lang, problems)
            if plan.factors:
                check_answers(problems["dev"])  # rates are picked on them

        def _hindrance(variant: Variant, lang: str, share: str) -> str:
            """Return why the arm could not start on this share of the problems, "" if it could."""
            own = {
                **plan.given,
                "lang": lang,
                "data": f"{scratch}/{share}/{lang}/train.jsonl",
                "eval_data": f"{scratch}/{share}/{lang}/test.jsonl",
                "eval_problems": len(splits[lang]["test"]),
                **variant.settings,
            }
            try:
                config = configure(own)[0]
                fitting_problems(config, tokenizer, context, Console(quiet=True))
                if needs_answers(config):
                    check_answers(splits[lang]["train"])
            except ValueError as error:
                return str(error)
            return ""

        for variant, lang in product(plan.trained, splits):
            if _hindrance(variant, lang, "some") and (why := _hindrance(variant, lang, "all")):
                raise ValueError(f"the arm {variant.name!r} in {lang}: {why}")


def check_results(file: Path, name: str) -> None:
    """Raise ValueError or OSError where --results names a file that could not take its section."""
    refuse_no_file(file, "--results")
    split_section(file, name)


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
    """Return the factors of "0.5,1,2", which the learning rates of a sweep are; else ValueError."""
    factors = parse_list(text, "sweep", partial(read_number, kind=float))
    if not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f"--sweep is {text!r}; valid: factors above 0, such as 0.5,1,2")
    # A run of the sweep is called after its rate, in six digits.
    if len({f"{factor:.5g}" for factor in factors}) < len(factors):
        raise ValueError(f"--sweep is {text!r}; valid: factors that differ in their first 5 digits")
    return factors


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of "3", which is 0, 1 and 2, or of "0,4,7"; ValueError for anything else."""
    seeds = parse_list(text, "seeds", partial(read_number, kind=int))
    if len(seeds) == 1 and "," not in text:
        seeds = list(range(min(seeds[0], MAX_SEEDS + 1)))
    too_large = len(seeds) > MAX_SEEDS or max(seeds, default=0) > 10**9
    if not seeds or min(seeds) < 0 or too_large or SWEEP_SEED in seeds:
        valid = f"a count of 1 to {MAX_SEEDS}, or seeds from 0 to {10**9} as in 0,4,7"
        raise ValueError(f"--seeds is {text!r}; valid: {valid}")
    return seeds


def ablation_arms(config: Config) -> tuple[Variant, ...]:
    """Return the recipe as it is, and an arm for each value of ABLATIONS that changes it."""
    arms = [Variant("recipe", "recipe")]
    for setting, values in ABLATIONS:
        for value in values:
            changed = replace(config, **{setting: value})
            if value != getattr(config, setting) and not idle_settings({setting: value}, changed):
                name = f"{setting}={value}".replace("_", " ")
                arms.append(Variant(name, name, {setting: value}))
    return tuple(arms)


def read_splits(plan: Plan, lang: str, console: Console | None = None) -> dict[str, list[Problem]]:
    """Return the problems of a language in three parts, {} where they are written already."""
    if all((plan.out / lang / f"{name}.jsonl").is_file() for name in SPLITS):
        return {}
    config = plan.configs["copsd", lang]
    train, test = read_reported(config, 0, console)
    train, dev = split_heldout(train, plan.options.dev_problems, DEV_SEED)
    return {"train": train, "dev": dev, "test": test}


def write_splits(folder: Path, splits: dict[str, list[Problem]]) -> None:
    """Write each part of a language as a data file, so that no arm can see another split."""
    make_folder(folder)
    for name, problems in splits.items():
        write_problems(folder / f"{name}.jsonl", problems)
