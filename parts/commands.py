"""The command lines of the programs, apart from what they call.

torch and transformers take seconds to load, and none of them is needed to print `--help`, to list
the languages or to refuse a mistyped flag. So nothing heavy is imported above; each command imports
its program when it runs. What all programs have around their commands is in parts/program.py.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from parts.program import bad_input, make_program, other_ranks, start, working
from parts.prompts import languages
from parts.recipe import CHOSEN_BY, LONGEST, OWN_SETTINGS, CompareConfig, Config, EvalConfig
from parts.settings import flag_of, range_text, refuse_idle
from parts.typed import read_number

Given = dict[str, Any]  # the values of the flags that were typed

copsd = make_program(
    "COPSD, crosslingual on-policy self-distillation: train, show one problem, list languages.",
    no_args_is_help=True,
)
evaluation = make_program("Sample, grade, and print pass@k with its companions and 95 % intervals.")
comparison = make_program(
    "Compare methods at an equal budget of sampled tokens; write tables and figures. The budget is "
    "--token-budget, or what --steps of COPSD sample at the base's mean length. The same command "
    "goes on with a comparison that was stopped."
)


# Of a run's settings, those that a walk through one problem depends on.
SHOWN = (
    "method",
    "model",
    "lang",
    "data",
    "seed",
    "divergence",
    "beta",
    "clip_mode",
    "clip",
    "loss_over",
    "loss_top_k",
    "english_problem",
    "english_solution",
    "swap_solutions",
    "answer_only",
    "thinking",
    "teacher_reads",
    "brief",
    "brief_language",
    "note_tokens",
    "vote_samples",
    "token_weight",
    "gate_scale",
    "gate_floor",
    "gate_lookahead",
    "loss_prefix",
    "credit_mix",
    "credit_clip",
    "witness_weight",
    "witness_tokens",
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "device",
    "dtype",
)
# Those that decide what it trains on.
EXPORTED = (
    "model",
    "lang",
    "data",
    "eval_data",
    "out",
    "seed",
    "english_problem",
    "english_solution",
    "swap_solutions",
    "thinking",
    "max_new_tokens",
    "eval_problems",
)
# Those that its memory depends on.
PLANNED = (
    "method",
    "model",
    "teacher",
    "group_size",
    "kl_coef",
    "batch_size",
    "max_new_tokens",
    "lora_rank",
    "lora_targets",
    "micro_batch",
    "micro_tokens",
    "chunk_tokens",
    "sample_rows",
    "gradient_checkpointing",
    "compile",
    "device",
    "dtype",
    "eval_problems",
    "eval_samples",
    "eval_every",
    "dev_problems",
    "teacher_reads",
    "vote_samples",
    "completion",
    "token_budget",
    "steps",
)


def named_path(given: str | Path) -> Path:
    """Return the path that a flag names; an empty one would be the folder where the user stands."""
    if not str(given).strip():
        raise typer.BadParameter("it is empty; leave it out, or give it a value")
    return Path(given)


def path_option(text: str) -> Any:
    """Return an option that takes a path, whose help is `text`."""
    return typer.Option(parser=named_path, metavar="PATH", help=text)


def whole_number(given: str | int) -> int:
    """Return the whole number that was typed."""
    return _number(given, int, "integer")


def real_number(given: str | float) -> float:
    """Return the number that was typed."""
    return _number(given, float, "float")


def token_count(given: str | int) -> int:
    """Return the number of tokens that was typed: of a text that a model can read."""
    count = whole_number(given)
    if not 1 <= count <= LONGEST:
        raise typer.BadParameter(f"{given} is not in the range 1<=x<={LONGEST}.")
    return count


def _number(given: Any, kind: type, called: str) -> Any:
    try:
        return read_number(str(given), kind)
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} is not a valid {called}.") from error


# What reads a flag, by the type of its setting; typer reads the others.
READERS: dict[Any, dict[str, Any]] = {
    int: {"parser": whole_number, "metavar": "INTEGER"},
    float: {"parser": real_number, "metavar": "FLOAT"},
}


def flags_of(
    config: type, only: Sequence[str] | None = None, hidden: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command one flag per field of the dataclass `config`.

    only    the fields that have a flag; None: all
    hidden  those whose flag is not offered: it is there to be refused with the reason
    The command receives, first, the values of the flags that were typed and no others, so that a
    recipe can fill the rest. Parameters of its own follow them.
    """

    def _decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        flagged = [f for f in fields(config) if only is None or f.name in only]
        names = {f.name for f in flagged}

        def _wrapper(**values: Any) -> None:
            given = {n: value for n, value in values.items() if n in names and value is not None}
            command(given, **{n: value for n, value in values.items() if n not in names})

        flags = []
        for f in flagged:
            option = typer.Option(
                help=help_text(f),
                show_default=False,
                rich_help_panel=f.metadata["section"],
                hidden=f.name in hidden,
                **next((READERS[kind] for kind in kinds_of(f) if kind in READERS), {}),
            )
            flags.append(
                inspect.Parameter(
                    f.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[f.type | None, option],
                )
            )
        _wrapper.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        _wrapper.__doc__ = command.__doc__
        return _wrapper

    return _decorate


def kinds_of(f: Field) -> tuple[Any, ...]:
    """Return the types that a field may have: int and None of int | None."""
    return get_args(f.type) or (f.type,)


def help_text(f: Field) -> str:
    """Return a flag's help: its doc, then what is valid, the default, and who chose it."""
    parts = []
    if f.metadata["choices"]:
        parts.append(", ".join(f.metadata["choices"]))
    elif bounds := range_text(f):
        parts.append(bounds)
    if f.default is not None:
        parts.append(f"default {f.default}, {f.metadata['source']}")
        own = f.metadata["by_method"].items()
        parts += [f"{method} {value}, {CHOSEN_BY.get(method, 'ours')}" for method, value in own]
    return f"{f.metadata['doc']} ({'; '.join(parts)})" if parts else f.metadata["doc"]


@copsd.command("train")
@flags_of(Config)
def train_command(
    given: Given,
    track: Annotated[
        str | None,
        typer.Option(help="A tracker that takes the metrics, too: tensorboard, trackio, wandb."),
    ] = None,
    show_rollout: Annotated[
        bool, typer.Option("--show-rollout", help="Show the newest rollout below the steps.")
    ] = False,
    stop_on_collapse: Annotated[
        bool, typer.Option("--stop-on-collapse", help="Save and stop at the first alarm.")
    ] = False,
) -> None:
    """Train with COPSD, GRPO or one of their neighbours, and show what it changed.

    The same command goes on with a run that was stopped. A flag that is not given comes from the
    model folder's recipe.json, where there is one, else from its default here.
    """
    console = start()
    import copsd as program
    from methods import LOOPS
    from parts.setup import configure, prepare
    from parts.track import check_tracker
    from parts.watch import Watching

    with bad_input():
        check_tracker(track)
        config, folder = configure(given)
        refuse_idle(given, config)
        setup, run = prepare(config, folder, console)
    watching = Watching(track, show_rollout, stop_on_collapse)
    with working(console, run.kept), other_ranks():
        code = program.train(setup, run, console, LOOPS[config.method], watching)
    raise typer.Exit(code)


@copsd.command("show")
@flags_of(Config, only=SHOWN)
def show_command(
    given: Given,
    adapter: Annotated[
        Path | None,
        path_option(
            "A run's folder: show its student beside the untrained one, with the run's settings "
            "where none is typed. Or an adapter's folder, which has none."
        ),
    ] = None,
    html: Annotated[Path | None, path_option("Write the same as a page to this file.")] = None,
) -> None:
    """Carry one problem through: both prompts, a rollout, and what each token adds to the loss."""
    console = start()
    import show
    from parts import ranks
    from parts.files import refuse_no_file, refuse_other_name
    from parts.setup import configure
    from parts.view import say

    with bad_input():
        ranks.refuse("copsd.py show")
        if html:
            refuse_no_file(html, "--html")
            refuse_other_name(html, "--html", ".html", ".htm")
        settings, said = show.as_in_run(given, adapter, SHOWN) if adapter else (given, "")
        config, folder = configure(settings)
        # A walk shows the divergence of any method, whatever a recipe says of evaluations.
        refuse_idle(given, replace(config, eval_problems=1))
        setup = show.prepare(config, folder, adapter, console)
    if said:
        say(console, said)
    with working(console, lambda: "nothing was to be kept"):
        found = show.walk(setup, trained=adapter is not None)
        show.print_walk(setup, found, console)
        if html:
            show.write_page(found, html)


@copsd.command("plan")
@flags_of(Config, only=PLANNED)
def plan_command(
    given: Given,
    gpu: Annotated[
        float | None,
        typer.Option(
            help="Only a card of so many GB. Without it: 24, 40, 80, 141.", **READERS[float]
        ),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            parser=token_count,
            metavar="INTEGER",
            help=f"Tokens of the longest prompt that the student reads (1 to {LONGEST}).",
        ),
    ] = 256,
    teacher_tokens: Annotated[
        int,
        typer.Option(
            parser=token_count,
            metavar="INTEGER",
            help=f"Tokens of the longest prompt that the teacher reads (1 to {LONGEST}).",
        ),
    ] = 1024,
) -> None:
    """Say how much memory a run takes at most and what makes it fit, without loading the model.

    Exit code 1: a card does not hold it, whatever the settings of Machine.
    """
    console = start()
    from parts import ranks
    from parts.fitting import CARDS_GB, plan
    from parts.footprint import Lengths

    cards = CARDS_GB if gpu is None else [gpu]
    with bad_input():
        ranks.refuse("copsd.py plan")
        code = plan(given, Lengths(prompt_tokens, teacher_tokens), cards, console)
    raise typer.Exit(code)


@copsd.command("export-data")
@flags_of(Config, only=EXPORTED)
def export_command(
    given: Given,
    format: Annotated[str, typer.Option(help="Whose trainer reads it: trl.")] = "trl",
    file: Annotated[
        Path | None, path_option("Where to. Without it: the run's --out, and .jsonl.")
    ] = None,
) -> None:
    """Write the training problems, with the prompts of both roles, for another trainer to read."""
    console = start()
    from parts import ranks
    from parts.exports import export_data

    with bad_input():
        ranks.refuse("copsd.py export-data")
        export_data(given, format, file, console)


@copsd.command("languages")
def languages_command() -> None:
    """List the languages: codes, names, script, and the benchmarks that have them."""
    from parts.benchmarks import BENCHMARKS

    table = Table(box=None, header_style="bold")
    for column in ("639-3", "639-1", "English name", "own name", "script", "benchmarks"):
        table.add_column(column)
    for language in languages().values():
        names = (language.iso3, language.iso1 or "-", language.english, language.own)
        held = [
            name for name, each in BENCHMARKS.items() if language.iso3 in each.languages.split()
        ]
        table.add_row(*names, language.script, ", ".join(held))
    console = Console()
    # In a pipe a language is one line, however many benchmarks have it.
    (console if console.is_terminal else Console(width=120)).print(table)


@copsd.command(
    "compare",
    hidden=True,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def compare_command() -> None:
    """Say where the comparison went."""
    typer.echo("error: the comparison is a program of its own: python compare.py --help", err=True)
    raise typer.Exit(2)


@comparison.callback(invoke_without_command=True)
@flags_of(CompareConfig, hidden=OWN_SETTINGS)
def run_comparison(given: Given) -> None:
    """Run an experiment: its help is the program's."""
    console = start()
    import compare
    from parts import ranks
    from parts.plan import make_plan

    with bad_input():
        ranks.refuse("compare.py")
        plan = make_plan(given, console)
    kept = f"finished arms are kept in {plan.out}, and the same command goes on from there"
    with working(console, lambda: kept):
        compare.carry_out(plan, console)


@evaluation.callback(invoke_without_command=True)
@flags_of(EvalConfig)
def evaluate_command(given: Given, context: typer.Context) -> None:
    """Sample, grade, and print pass@k with its companions and 95 % intervals."""
    if context.invoked_subcommand:
        if given:
            flags = ", ".join(map(flag_of, given))
            raise typer.BadParameter(f"{flags} before report, which would not see it")
        return
    console = start()
    import eval as evaluator

    with bad_input():
        job = evaluator.prepare(given, console)
    with working(console, job.kept), other_ranks():
        evaluator.carry_out(job, console)


@evaluation.command("report")
def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(
            parser=named_path,
            help="What --out wrote. The others are compared with the first.",
        ),
    ],
    out: Annotated[Path, path_option("The report's folder.")] = Path("evaluations/report"),
) -> None:
    """Write tables, figures and a page for the browser; test each evaluation against the first."""
    console = start()
    from parts import evaluations, ranks

    with bad_input():
        ranks.refuse("eval.py report")
        found = evaluations.prepare_report(folders, out, console)
    with working(console, lambda: "the evaluations are as they were"):
        evaluations.report(found, out, console)
