"""What is watched on a terminal: the steps of a run, progress, tables of estimates.

Names of folders and of runs are the user's. Square brackets and colons in them mean something to
rich, so every such text is shown as a rich Text, which is never read as markup.
"""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:  # only its fields are read here, so nobody waits for numpy to see a table
    from parts.metrics import Estimate

Summary = Mapping[str, "Estimate"]  # by metric
SHOWN_STEPS = 12  # rows of the live table
COLUMNS = {  # column title -> (metric, format); a run shows what its method logs
    "step": ("step", "{:.0f}"),
    "loss": ("loss/objective_nats_per_token", "{:+.4f}"),
    "reward": ("reward/mean", "{:.3f}"),
    "dead": ("reward/dead_group_frac", "{:.0%}"),
    "KL": ("loss/kl_nats_per_token", "{:.4f}"),
    "clipped": ("loss/clipped_token_frac", "{:.0%}"),  # by the divergence's clip
    "ratio max": ("ratio/max", "{:.2f}"),
    "teacher H": ("loss/teacher_entropy_nats_per_token", "{:.3f}"),
    "student H": ("loss/student_entropy_nats_per_token", "{:.3f}"),
    "|grad|": ("update/grad_norm", "{:.3f}"),
    "tokens": ("rollout/completion_tokens_mean", "{:.0f}"),
    "cut": ("rollout/cut_frac", "{:.0%}"),  # ended by the length limit
    "s": ("time_s", "{:.1f}"),
}


class Watcher(Protocol):
    """Whatever is told of every step of a training loop."""

    def show(self, metrics: dict[str, Any]) -> None:
        """Take one step's metrics, which hold at least "step" and "progress"."""
        ...


class StepView:
    """Show the metrics of each step: a live table with a bar on a terminal, elsewhere a line each.

    steps  how many there will be; None where a budget of tokens decides, whose share is then shown
    """

    def __init__(self, console: Console, steps: int | None):
        self.console = console
        self.steps = steps
        self.rows: list[dict[str, Any]] = []
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "StepView":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.live:
            self.live.stop()

    def show(self, metrics: dict[str, Any]) -> None:
        """Add one step, whose metrics hold at least "step" and "progress", a share from 0 to 1."""
        self.rows = [*self.rows, metrics][-SHOWN_STEPS:]
        place = f"step {metrics['step']}"
        if self.steps:
            place += f"/{self.steps}"
        else:
            place += f", {metrics['progress']:.0%}"
        if self.live:
            self.live.update(self._table(place), refresh=True)
        else:
            self._print_line(place)

    def _table(self, place: str) -> Group:
        """Return the last steps with a bar below them; the newest step decides on the columns."""
        newest = self.rows[-1]
        columns = [Column(title, justify="right") for title in _cells(newest)]
        table = Table(*columns, box=None, header_style="bold")
        for row in self.rows:
            table.add_row(*_cells(row).values())
        bar = Table.grid(padding=(0, 1))
        bar.add_row(place, ProgressBar(total=1.0, completed=newest["progress"], width=60))
        return Group(table, bar)

    def _print_line(self, place: str) -> None:
        """Print the newest step as one line, however narrow the console is."""
        cells = _cells(self.rows[-1])
        texts = [f"{title} {text}" for title, text in cells.items() if title != "step"]
        say(self.console, f"{place}  {'  '.join(texts)}")


def _cells(metrics: dict[str, Any]) -> dict[str, str]:
    """Return column title -> text, of the columns whose metric is there."""
    return {
        title: form.format(metrics[name])
        for title, (name, form) in COLUMNS.items()
        if metrics.get(name) is not None
    }


class SamplingProgress:
    """Show how far a long sampling is.

    On a terminal one line is rewritten. Elsewhere a line is printed every half minute, and a last
    one at the end.
    """

    TERMINAL_EVERY_S = 0.2
    LINE_EVERY_S = 30.0

    def __init__(self, console: Console, title: str):
        self.console = console
        self.title = title
        self.started = time.monotonic()
        self.printed = self.started
        self.finished = 0
        self.rows = 0
        self.tokens = 0

    def __enter__(self) -> "SamplingProgress":
        return self

    def __exit__(self, kind: type | None, *raised: Any) -> None:
        if kind is None:
            self._print(end="\n")

    def update(self, finished: int, rows: int, tokens: int) -> None:
        """Take the sampler's progress: finished rows, all rows, tokens generated."""
        self.finished = finished
        self.rows = rows
        self.tokens = tokens
        terminal = self.console.is_terminal
        pause = self.TERMINAL_EVERY_S if terminal else self.LINE_EVERY_S
        if time.monotonic() - self.printed > pause:
            self.printed = time.monotonic()
            self._print(end="\r" if terminal else "\n")

    def _print(self, end: str) -> None:
        seconds = time.monotonic() - self.started
        done = f"{self.finished}/{self.rows} completions, {self.tokens} tokens, {seconds:.0f} s"
        self.console.print(Text(f"{self.title}: {done}"), end=end, soft_wrap=True)


class ArmsProgress:
    """Say which run of an experiment is at work, how far it is, and how long the rest will take.

    It stands where a loop expects a StepView. On a terminal one line is rewritten, elsewhere a line
    is printed every minute, and a last one for each arm. Time left is elapsed time by the share of
    the work that is done.

    arms   how many there will be
    units  the work of all of them; one unit is a run of a whole budget
    """

    TERMINAL_EVERY_S = 0.5
    LINE_EVERY_S = 60.0

    def __init__(self, console: Console, arms: int, units: float):
        self.console = console
        self.arms = arms
        self.units = units
        self.arm = 0
        self.title = ""
        self.size = 0.0  # of the arm at work, in units
        self.done = 0.0  # units
        self.before = 0.0  # units that an earlier call had finished
        self.started = time.monotonic()
        self.printed = self.started

    def expect(self, size: float) -> None:
        """Count in an arm of `size` units that was not planned."""
        self.arms += 1
        self.units += size

    def start(self, title: str, size: float) -> None:
        """Begin the next arm, of `size` units."""
        self.arm += 1
        self.title = title
        self.size = size

    def show(self, metrics: dict[str, Any]) -> None:
        """Take a step's metrics, as StepView does."""
        pause = self.TERMINAL_EVERY_S if self.console.is_terminal else self.LINE_EVERY_S
        if time.monotonic() - self.printed > pause:
            said = f"step {metrics['step']}, {metrics['progress']:.0%}"
            self._print(said, min(1.0, metrics["progress"]), last=False)

    def finish(self, said: str, *, earlier: bool = False) -> None:
        """End the arm with what came out of it; `earlier` where an earlier call did the work."""
        self.done += self.size
        if earlier:
            self.before += self.size
        self._print(said, 0.0, last=True)

    def _print(self, said: str, share: float, *, last: bool) -> None:
        """Print a line; `share` is what is done of the arm at work."""
        self.printed = time.monotonic()
        done = self.done + share * self.size
        done_here = done - self.before
        line = f"{self.arm}/{self.arms} {self.title}: {said}"
        if done_here:
            left_s = (self.printed - self.started) / done_here * (self.units - done)
            line += f"; {left_s / 60:.0f} min left" if left_s > 1 else ""
        end = "\n"
        if self.console.is_terminal:
            line = line.ljust(100)  # over what is left of a longer line
            end = "\n" if last else "\r"
        self.console.print(Text(line), end=end, soft_wrap=True)


def say(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours, and no line broken at the console's width."""
    console.print(Text(text), soft_wrap=True)


def cell(name: str, estimate: "Estimate") -> str:
    """Return an estimate as "0.310 [0.250, 0.370]"; numbers of tokens have one digit, not three.

    A value that is nan becomes "-", and where the ends are nan there are no brackets.
    """
    if math.isnan(estimate.value):
        return "-"
    digits = 1 if "tokens" in name else 3
    value = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return value
    return f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def text_table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    """Return a table whose first column names the rows; nothing in it is read as markup."""
    columns = [
        Column(Text(name), justify="right" if place else "left")
        for place, name in enumerate(header)
    ]
    table = Table(*columns, title=Text(title), title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def estimates_table(title: str, columns: Mapping[str, Summary]) -> Table:
    """Return a table with a row per metric and a column per summary; "-" where it lacks one."""
    names = dict.fromkeys(name for summary in columns.values() for name in summary)
    rows = []
    for name in names:
        cells = [
            cell(name, summary[name]) if name in summary else "-" for summary in columns.values()
        ]
        rows.append([name, *cells])
    return text_table(title, ["95 % intervals in brackets", *columns], rows)
