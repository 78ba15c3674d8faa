"""The command lines of the programs, apart from what they call.

torch and transformers take seconds to load, and none of them is needed to print `--help`, to list
the languages or to refuse a mistyped flag. So nothing heavy is imported above; each command imports
its program when it runs.
"""

import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from parts.prompts import languages
from parts.recipe import CompareConfig, Config, EvalConfig, range_text, refuse_idle

Given = dict[str, Any]  # the values of the flags that were typed
UsageError: Any = typer.BadParameter.__base__  # click's, which typer carries inside


class _OneLineErrors(TyperGroup):
    """A program that answers a mistyped command line with one line, like any other bad input."""

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:
        """Run the program and exit."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal or a pipe may have no letter such as ƙ: it shows "?", and nothing stops.
            sys.stdout.reconfigure(errors="replace")
        typed = list(sys.argv[1:] if args is None else args)
        if self.no_args_is_help and not typed:
            typed = ["--help"]
        try:
            code = super().main(typed, **{**options, "standalone_mode": False})
        except UsageError as error:
            typer.echo(f"error: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        sys.exit(code)


def _program(text: str, **options: Any) -> typer.Typer:
    return typer.Typer(
        cls=_OneLineErrors,
        add_completion=False,
        pretty_exceptions_enable=False,  # a bug shows Python's own traceback
        rich_markup_mode="rich",  # flags stand under headings
        help=text,
        **options,
    )


copsd = _program(
    "COPSD, crosslingual on-policy self-distillation: train, show one problem, list languages.",
    no_args_is_help=True,
)
evaluation = _program("Sample, grade, and print pass@k with its companions and 95 % intervals.")
comparison = _program("Compare methods at an equal budget of sampled tokens.")


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
    "english_problem",
    "english_solution",
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


def flags_of(
    config: type, only: Sequence[str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command one flag per field of the dataclass `config`.

    only  the fields that have a flag; None: all
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
                help=help_text(f), show_default=False, rich_help_panel=f.metadata["section"]
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


def help_text(f: Field) -> str:
    """Return a flag's help: its doc, then what is valid, the default, and who chose it."""
    parts = []
    if f.metadata["choices"]:
        parts.append(", ".join(f.metadata["choices"]))
    elif bounds := range_text(f):
        parts.append(bounds)
    if f.default is not None:
        defaults = [f"default {f.default}"]
        defaults += [f"{method} {value}" for method, value in f.metadata["by_method"].items()]
        parts += [", ".join(defaults), f.metadata["source"]]
    return f"{f.metadata['doc']} ({'; '.join(parts)})" if parts else f.metadata["doc"]


def start() -> Console:
    """Set up the process of a command that is going to work, and return its console."""
    # torch's threads wait for each other by spinning, which is fastest where each has a processor.
    # Where another process is busy, they take the processor from the very thread they wait for: a
    # lab step then takes four times as long. libgomp reads this when torch loads it.
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ.pop("GOMP_SPINCOUNT", None)
    if not _machine_is_idle():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from transformers.utils import logging as transformers_logging

    from parts.machine import keep_freed_memory
    from parts.measure import language_detector
    from parts.view import say

    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    console = Console()
    if language_detector() is None:
        say(console, 'pycld2 is not installed: no metric of the written language, which is "-"')
    return console


def _machine_is_idle(seconds: float = 0.1) -> bool:
    """Say whether every processor is free, by what Linux counts while this process sleeps.

    True where there is nothing to read it from. No result depends on it, only the time it takes.
    """
    counts = Path("/proc/stat")
    if not counts.is_file():
        return True

    def _idle_ticks() -> int:
        first_line = counts.read_text(encoding="ascii").split("\n", 1)[0]
        return sum(map(int, first_line.split()[4:6]))  # idle, and waiting for a disk

    try:
        before = _idle_ticks()
        time.sleep(seconds)
        idle_seconds = (_idle_ticks() - before) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):  # a hardened container hides the counts
        return True
    processors = os.cpu_count() or 1
    return idle_seconds > (processors - 0.5) * seconds


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn a wrong value, or a file that is missing, torn or unwritable, into a line and exit 2.

    It goes around reading, checking and loading only: an error in what comes after is a bug, and
    shows its traceback.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@copsd.command("train")
@flags_of(Config)
def train_command(given: Given) -> None:
    """Train with COPSD, GRPO or one of their neighbours, and show what it changed.

    The same command goes on with a run that was stopped. A flag that is not given comes from the
    model folder's recipe.json, where there is one, else from its default here.
    """
    console = start()
    import copsd as program
    from methods import LOOPS
    from parts.setup import configure, prepare

    with bad_input():
        config, folder = configure(given)
        refuse_idle(given, config)
        setup, run = prepare(config, folder, console)
    raise typer.Exit(program.train(setup, run, console, LOOPS[config.method]))


@copsd.command("show")
@flags_of(Config, only=SHOWN)
def show_command(
    given: Given,
    adapter: Annotated[
        Path | None, typer.Option(help="A run's folder: show its student beside the untrained one.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the same as a page to this file.")
    ] = None,
) -> None:
    """Carry one problem through: both prompts, a rollout, and what each token adds to the loss."""
    console = start()
    import show
    from parts.setup import configure

    with bad_input():
        if html and not html.parent.is_dir():
            raise ValueError(f"--html is {html}: there is no such folder")
        config, folder = configure(given)
        refuse_idle(given, config)
        setup = show.prepare(config, folder, adapter, console)
    found = show.walk(setup, trained=adapter is not None)
    show.print_walk(setup, found, console)
    if html:
        show.write_page(found, html)


@copsd.command("languages")
def languages_command() -> None:
    """List the languages: codes, names, script, and the benchmarks that have them."""
    table = Table(box=None, header_style="bold")
    for column in ("639-3", "639-1", "English name", "own name", "script", "benchmarks"):
        table.add_column(column)
    for language in languages().values():
        names = (language.iso3, language.iso1 or "-", language.english, language.own)
        table.add_row(*names, language.script, ", ".join(language.benchmarks))
    Console().print(table)


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
@flags_of(CompareConfig)
def run_comparison(given: Given) -> None:
    """Train base, GRPO and COPSD at an equal budget of sampled tokens; write tables and figures.

    The budget is --token-budget, or what --steps of COPSD sample at the base's mean length. The
    same command goes on with a comparison that was stopped.
    """
    console = start()
    import compare
    from parts.plan import make_plan

    with bad_input():
        plan = make_plan(given, console)
    raise typer.Exit(compare.run(plan, console))


@evaluation.callback(invoke_without_command=True)
@flags_of(EvalConfig)
def evaluate_command(given: Given, context: typer.Context) -> None:
    """Sample, grade, and print pass@k with its companions and 95 % intervals."""
    if context.invoked_subcommand:
        return
    console = start()
    import eval as evaluator

    with bad_input():
        job = evaluator.prepare(given, console)
    evaluator.run(job, console)


@evaluation.command("report")
def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(help="What --out wrote. The others are compared with the first."),
    ],
    out: Annotated[Path, typer.Option(help="The report's folder.")] = Path("evaluations/report"),
) -> None:
    """Write tables, figures and a page for the browser; test each evaluation against the first."""
    console = start()
    import eval as evaluator

    with bad_input():
        found = evaluator.prepare_report(folders, out)
    evaluator.report(found, out, console)
