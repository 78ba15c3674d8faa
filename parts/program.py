"""What every program has around its commands: its start, its output, its errors in one line.

The commands themselves are in parts/commands.py. torch and transformers take seconds to load, so
nothing heavy is imported above: `--help` and a mistyped flag answer at once.

Read make_program (a program that answers bad input with a line), Output (what it prints to), start
(what a command that works begins with), and last what stands around its work: bad_input while it
loads, working and other_ranks while it runs.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperGroup

from parts.stops import ctrl_c_raises

UsageError: Any = typer.BadParameter.__base__  # click's, which typer carries inside
# Looks of a waiting thread at its work, some tens of microseconds, before it sleeps. Measured: on a
# quiet machine a lab step then takes about 7 % longer than without a bound, and where another
# process comes to work beside it, twice as long and not ten to a hundred times.
SPINS = "3000"
LONGEST_ERROR = 1200  # letters
LESS_MEMORY = (
    "fewer rows at once take less: --batch-rows of eval.py; of a run --sample-rows for sampling, "
    "--micro-batch, with --gradient-checkpointing, for updates"
)


def make_program(text: str, **options: Any) -> typer.Typer:
    """Return a program that has no command yet, whose help begins with `text`."""
    return typer.Typer(
        cls=_OneLineErrors,
        add_completion=False,
        pretty_exceptions_enable=False,  # a bug shows Python's own traceback
        rich_markup_mode="rich",  # flags stand under headings
        help=text,
        **options,
    )


class _OneLineErrors(TyperGroup):
    """A program that answers a mistyped command line with one line, like any other bad input."""

    def main(self, args: Sequence[str] | None = None, **options: Any) -> Any:
        """Run the program and exit."""
        sys.stdout = sys.stdout or _nowhere()
        sys.stderr = sys.stderr or _nowhere()
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal or a pipe may have no letter such as ƙ: it shows "?", and nothing stops.
            sys.stdout.reconfigure(errors="replace")
        typed = list(sys.argv[1:] if args is None else args)
        if self.no_args_is_help and not typed:
            typed = ["--help"]
        refuse_undecodable(typed)
        output = Output(sys.stdout)
        try:
            with redirect_stdout(output):
                code = super().main(typed, **{**options, "standalone_mode": False})
        except UsageError as error:
            say_error(error.format_message())
            sys.exit(2)
        except typer.Abort:
            say_error("stopped")
            sys.exit(130)
        if output.failure and not isinstance(output.failure, BrokenPipeError):
            say_error(f"standard output cannot be written: {output.failure.strerror}")
            sys.exit(code or 2)
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; stopped before there was anything to keep, it says so.

        In `main` it is too late: typer makes a bare exit code of it.
        """
        try:
            with ctrl_c_raises():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            say_error("stopped")
            raise typer.Exit(130) from stop


def _nowhere() -> TextIO:
    """Return a stream that loses what is printed, for one that a shell has closed (>&-).

    It takes that stream's number, too: a file of ours would else get it, and what libraries print.
    """
    stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    os.set_inheritable(stream.fileno(), True)  # processes that are started have it, too
    return stream


class Output(io.TextIOBase):
    """Standard output that may go away: what is printed then is lost, and the work is not.

    `| head` closes its end of the pipe after ten lines, and a disk that output is sent to can be
    full. Hours of training do not end for a line that nobody reads.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.failure: OSError | None = None  # the first one

    @property
    def encoding(self) -> str:
        """The letters that the stream has."""
        return self.stream.encoding

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        with self._losing():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send what was written."""
        with self._losing():
            self.stream.flush()

    def isatty(self) -> bool:
        """Say whether a person sees it."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the stream's number."""
        return self.stream.fileno()

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error
            # What the stream still holds must go somewhere, or Python complains at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def say_error(text: str) -> None:
    """Print one line to standard error; what could drive a terminal is shown as what it is.

    Of a line that repeats a long input the middle is left out: the reason and the remedy stay.
    """
    from parts.view import shown

    line = " ".join(text.split())
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR // 2]} [...] {line[-LONGEST_ERROR // 2 :]}"
    with suppress(OSError):  # the disk that stderr is sent to is full: the exit code says it
        typer.echo(f"error: {shown(line)}", err=True)


def refuse_undecodable(words: Sequence[str]) -> None:
    """Exit with code 2, in a line, where a word has bytes that are no letters in this locale.

    Python keeps them as half surrogates, which no JSON, no tokenizer and no terminal takes.
    """
    encoding = sys.getfilesystemencoding()
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            remedy = "name it in UTF-8" if "utf" in encoding else "set PYTHONUTF8=1"
            say_error(f"{word}: not all of it is letters in this locale ({encoding}); {remedy}")
            sys.exit(2)


def start() -> Console:
    """Set up the process of a command that is going to work, and return its console."""
    # torch's threads wait for each other by spinning, which is fastest where each has a processor.
    # Where another process is busy, they take the processor from the very thread they wait for: a
    # lab step then takes many times as long. So they spin for a bounded while, or where others are
    # busy already not at all. libgomp reads this when torch loads it.
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    if _machine_is_idle():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    else:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from parts import ranks
    from parts.heap import keep_freed_memory
    from parts.machine import quiet_libraries
    from parts.measure import language_detector
    from parts.view import say

    ranks.join()
    keep_freed_memory()
    quiet_libraries()
    console = Console(quiet=not ranks.is_first())
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
    shows its traceback. A model that the memory does not hold is a line and exit 1.
    """
    from safetensors import SafetensorError

    from parts.machine import is_out_of_memory

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say_error(
            "out of memory while loading; --dtype bfloat16 halves the weights, and copsd.py plan "
            "says what a run takes; what is saved is kept"
        )
        raise typer.Exit(1) from error
    except (ValueError, OSError, SafetensorError) as error:
        say_error(str(error))
        raise typer.Exit(2) from error


@contextmanager
def working(console: Console, kept: Callable[[], str]) -> Iterator[None]:
    """Say in a line why work that was begun could not be finished, where that is no bug.

    kept  returns what is kept of it, for a line about a stop

    Exit code 130: stopped, by Ctrl-C, SIGTERM or SIGHUP; 2: a file cannot be written, as on a full
    disk; 1: numbers that are not finite, or too little memory for even one row.
    """
    from parts.files import CannotWrite
    from parts.machine import is_out_of_memory
    from parts.stops import stops_act, stops_raise
    from parts.view import say

    try:
        with stops_raise():
            yield
    except KeyboardInterrupt as stop:
        with stops_act():  # a second one does not wait for the words
            say(console, f"stopped; {kept()}")
        raise typer.Exit(130) from stop
    except CannotWrite as error:
        say_error(str(error))
        raise typer.Exit(2) from error
    except FloatingPointError as error:
        say_error(str(error))
        raise typer.Exit(1) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        say_error(f"out of memory; {LESS_MEMORY}; {kept()}")
        raise typer.Exit(1) from error


@contextmanager
def other_ranks() -> Iterator[None]:
    """Part from the other ranks after work that ended well; exit 1, in a line, where one is lost.

    What was saved is whole, and the same command goes on with it, with as many ranks as it has.
    """
    from parts import ranks

    try:
        yield
    except ConnectionError as error:
        say_error(f"{error}; the same command goes on from what is saved")
        raise typer.Exit(1) from error
    ranks.leave()
