"""What is watched on a terminal: the steps of a run, and progress.

Names of folders and of runs are the user's. Square brackets and colons in them mean something to
rich, so every such text is shown as a rich Text, which is never read as markup.
"""

import math
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

SHOWN_STEPS = 12  # rows of the live table
COLUMNS = {  # column title -> (metric, format); a run shows what its method logs
    "step": ("step", "{:.0f}"),
    "loss": ("loss/objective_nats_per_token", "{:+.4f}"),
    "reward": ("reward/mean", "{:.3f}"),
    "dead": ("reward/dead_group_frac", "{:.0%}"),
    "KL": ("loss/kl_nats_per_token", "{:.4f}"),
    "clipped": ("loss/clipped_token_frac", "{:.0%}"),  # by the divergence's clip
    "dev": ("dev/greedy_accuracy", "{:.3f}"),  # on development problems, with --eval-every
    "ratio max": ("ratio/max", "{:.2f}"),
    "teacher H": ("loss/teacher_entropy_nats_per_token", "{:.3f}"),
    "student H": ("loss/student_entropy_nats_per_token", "{:.3f}"),
    "|grad|": ("update/grad_norm", "{:.3f}"),
    "tokens": ("rollout/completion_tokens_mean", "{:.0f}"),
    "cut": ("rollout/cut_frac", "{:.0%}"),  # ended by the length limit
    "s": ("time_s", "{:.1f}"),
}
SPARKED = ("loss", "reward", "KL")  # of them the whole course is drawn
SPARKS = "▁▂▃▄▅▆▇█"
SPARKS_ASCII = "_.-=+*#@"  # for terminals without the others
NO_NOTE = (
    "no usable note: the teacher reads what the student reads, and has nothing to teach. A thought "
    "that is not closed within its length limit leaves nothing to read: raise --note-tokens, for "
    "votes --max-new-tokens, or take --thinking off"
)
SHOWN_ROLLOUT_LINES = 6  # of a rollout on a terminal
SHOWN_ROLLOUT_LETTERS = 300  # of a rollout in a line


def lacks_notes(metrics: Mapping[str, Any]) -> bool:
    """Say whether notes were written for the teacher of a step, and none of them could be read."""
    return metrics.get("note/plain_frac") == 1


class Watcher(Protocol):
    """Whatever is told of every step of a training loop."""

    def show(self, metrics: dict[str, Any]) -> bool | None:
        """Take one step's metrics, which hold at least "step" and "progress".

        True asks the loop to save and stop.
        """
        ...


class StepView:
    """Show each step: on a terminal a live table, its course and what is left, elsewhere a line.

    steps         how many there will be; None where a budget of tokens decides, whose share is then
                  shown
    last_rollout  what returns the newest line of completions.jsonl, to be shown below; None: no
                  rollout is shown
    kl            what the divergence is called that stands under "KL"
    """

    def __init__(
        self,
        console: Console,
        steps: int | None,
        last_rollout: Callable[[], dict[str, Any] | None] | None = None,
        kl: str = "KL",
    ):
        self.console = console
        self.steps = steps
        self.last_rollout = last_rollout
        self.titles = {title: title for title in COLUMNS} | {"KL": kl}
        self.rows: list[dict[str, Any]] = []
        self.courses: dict[str, list[float]] = {title: [] for title in SPARKED}
        self.alarms: dict[str, str] = {}
        self.lacked_notes = False  # at a step so far; it is said once
        self.first: tuple[float, float] | None = None  # when the first step was shown, its progress
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "StepView":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.live:
            self.live.stop()

    def recall(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take the metrics of the steps that an earlier call showed; nothing of them is told again.

        The courses begin with them, and an alarm that stood at their end is no new one.
        """
        for metrics in rows:
            self._draw_on(metrics)
            self.alarms = metrics.get("alarms", {})
            self.lacked_notes |= lacks_notes(metrics)

    def _draw_on(self, metrics: dict[str, Any]) -> None:
        """Add a step's numbers to the courses."""
        for title, course in self.courses.items():
            number = metrics.get(COLUMNS[title][0])
            if number is not None and math.isfinite(number):
                course.append(number)

    def show(self, metrics: dict[str, Any]) -> None:
        """Add one step, whose metrics hold at least "step" and "progress", a share from 0 to 1."""
        self.rows = [*self.rows, metrics][-SHOWN_STEPS:]
        self._draw_on(metrics)
        raised = metrics.get("alarms", {})
        new = {name: said for name, said in raised.items() if name not in self.alarms}
        self.alarms = raised
        if lacks_notes(metrics) and not self.lacked_notes:
            self.lacked_notes = True
            say(self.console, f"step {metrics['step']}: {NO_NOTE}")
        if self.live:
            self.live.update(self._picture(), refresh=True)
            return
        self._print_line()
        for name, said in new.items():
            say(self.console, f"alarm: {name} {said}")

    def _place(self) -> str:
        """Return how far the run is."""
        newest = self.rows[-1]
        if self.steps:
            return f"step {newest['step']}/{self.steps}"
        return f"step {newest['step']}, {newest['progress']:.0%}"

    def _pace(self) -> list[str]:
        """Return tokens sampled a second, and from the second step on how much time is left.

        That is the time since the first step by the share of the run that was done in it.
        """
        newest = self.rows[-1]
        found = []
        if newest.get("time_s") and newest.get("rollout/tokens"):
            found.append(f"{newest['rollout/tokens'] / newest['time_s']:.0f} tokens/s")
        now = time.monotonic()
        if self.first is None:
            self.first = (now, newest["progress"])
        started, share = self.first
        if share < newest["progress"] < 1:
            left_s = (now - started) / (newest["progress"] - share) * (1 - newest["progress"])
            found.append(f"{duration(left_s)} left")
        return found

    def _picture(self) -> Group:
        """Return everything that a terminal shows, no line of it wider than the terminal."""
        width = self.console.width
        place = self._place()
        bar = Table.grid(padding=(0, 1))
        room = max(1, min(60, width - len(place) - 2))
        bar.add_row(place, ProgressBar(total=1.0, completed=self.rows[-1]["progress"], width=room))
        lines = [", ".join(self._pace())]
        ramp = SPARKS_ASCII if self.console.options.ascii_only else SPARKS
        widest = max(len(self.titles[title]) for title in SPARKED)
        for title, course in self.courses.items():
            if course:
                ends = f"{course[0]:.3f} to {course[-1]:.3f}"
                room = max(1, min(60, width - len(ends) - widest - 2))
                named = self.titles[title].ljust(widest)
                lines.append(f"{named} {sparkline(course, room, ramp)} {ends}")
        texts = [Text(line) for line in lines if line]
        texts += [Text(f"alarm: {name} {said}", style="red") for name, said in self.alarms.items()]
        below = [line for text in texts for line in text.wrap(self.console, width)]
        if rollout := self._rollout():
            text = Text(rollout[: SHOWN_ROLLOUT_LINES * width])
            below += text.wrap(self.console, width)[:SHOWN_ROLLOUT_LINES]
        # Beside the rows stand their header, the bar, and the line of the cursor.
        return Group(self._table(max(3, self.console.height - len(below) - 3)), bar, *below)

    def _table(self, height: int) -> Table:
        """Return the last steps, as many as the terminal has room for, and so with the columns."""
        cells = [_cells(row) for row in self.rows[-height:]]
        room = self.console.width
        columns = []
        for title in COLUMNS:
            size = 2 + max(len(self.titles[title]), *(len(row.get(title, "")) for row in cells))
            if size <= room and any(title in row for row in cells):
                columns.append(title)
                room -= size
        table = Table(
            *(Column(self.titles[title], justify="right", no_wrap=True) for title in columns),
            box=None,
            header_style="bold",
        )
        for row in cells:
            table.add_row(*(row.get(title, "") for title in columns))
        return table

    def _rollout(self) -> str | None:
        """Return the newest logged rollout on one line, None if none is to be shown."""
        row = self.last_rollout() if self.last_rollout else None
        if row is None:
            return None
        # An escape code that a model wrote would act on the terminal.
        text = "".join(c if c.isprintable() else " " for c in str(row["completion"]))
        return f"{row['problem_id']}, right answer {row['answer']}: {text}"

    def _print_line(self) -> None:
        """Print the newest step as one line, however narrow the console is."""
        cells = _cells(self.rows[-1])
        texts = [f"{self.titles[title]} {text}" for title, text in cells.items() if title != "step"]
        say(self.console, "  ".join([self._place(), *texts, *self._pace()]))
        if rollout := self._rollout():
            say(self.console, f"  {rollout[:SHOWN_ROLLOUT_LETTERS]}")


def _cells(metrics: dict[str, Any]) -> dict[str, str]:
    """Return column title -> text, of the columns whose metric is there."""
    return {
        title: form.format(metrics[name])
        for title, (name, form) in COLUMNS.items()
        if metrics.get(name) is not None
    }


def sparkline(numbers: Sequence[float], width: int, ramp: str = SPARKS) -> str:
    """Return the course of finite numbers in at most `width` characters, the lowest to the highest.

    Of a longer course each character is the mean of its part.

    >>> sparkline([0.0, 1.0, 2.0, 7.0], 60), sparkline([0.0, 0.0, 5.0, 9.0], 2)
    ('▁▂▃█', '▁█')
    """
    count = min(width, len(numbers))
    ends = [place * len(numbers) // count for place in range(count + 1)]
    means = [sum(numbers[a:b]) / (b - a) for a, b in pairwise(ends)]
    low = min(means)
    span = (max(means) - low) or 1.0
    return "".join(ramp[int((mean - low) / span * (len(ramp) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """Return a time as a person says it.

    >>> duration(9.6), duration(600), duration(7500)
    ('10 s', '10 min', '2 h 5 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


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
            self._print(last=True)

    def update(self, finished: int, rows: int, tokens: int) -> None:
        """Take the sampler's progress: finished rows, all rows, tokens generated."""
        self.finished = finished
        self.rows = rows
        self.tokens = tokens
        terminal = self.console.is_terminal
        pause = self.TERMINAL_EVERY_S if terminal else self.LINE_EVERY_S
        if time.monotonic() - self.printed > pause:
            self.printed = time.monotonic()
            self._print(last=False)

    def _print(self, *, last: bool) -> None:
        seconds = time.monotonic() - self.started
        done = f"{self.finished}/{self.rows} completions, {self.tokens} tokens, {seconds:.0f} s"
        _print_progress(self.console, f"{self.title}: {done}", last=last)


class ArmsProgress:
    """Say which run of an experiment is at work, how far it is, and how long the rest will take.

    It stands where a loop expects a StepView. On a terminal one line is rewritten, elsewhere a line
    is printed every minute, and a last one for each arm. Time left is elapsed time by the share of
    the work that is done.

    arms     how many there will be
    units    the work of all of them; one unit is a run of a whole budget
    is_said  False: another process says how far it is, and here is said only what must not be lost
    """

    TERMINAL_EVERY_S = 0.5
    LINE_EVERY_S = 60.0

    def __init__(self, console: Console, arms: int, units: float, *, is_said: bool = True):
        self.console = console
        self.is_said = is_said
        self.arms = arms
        self.units = units
        self.arm = 0
        self.title = ""
        self.size = 0.0  # of the arm at work, in units
        self.lacked_notes = False  # at a step of it so far
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
        self.lacked_notes = False

    def show(self, metrics: dict[str, Any]) -> None:
        """Take a step's metrics, as StepView does."""
        if lacks_notes(metrics) and not self.lacked_notes:
            self.lacked_notes = True
            said = f"{self.title}: step {metrics['step']}: {NO_NOTE}"
            _print_progress(self.console, said, last=True)
        pause = self.TERMINAL_EVERY_S if self.console.is_terminal else self.LINE_EVERY_S
        if self.is_said and time.monotonic() - self.printed > pause:
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
            line += f"; {duration(left_s)} left" if left_s > 1 else ""
        _print_progress(self.console, line, last=last)


def _print_progress(console: Console, line: str, *, last: bool) -> None:
    """Print a line of progress; on a terminal each but the last is written over by the next.

    Only a line that fits the terminal can be: of a longer one the end is left out.
    """
    text = Text(line)
    end = "\n"
    if console.is_terminal:
        room = console.width - 1
        if not last:
            text.truncate(room, overflow="ellipsis")
            end = "\r"
        text.pad_right(max(0, room - text.cell_len))  # over what is left of a longer line
    console.print(text, end=end, soft_wrap=True)


def say(console: Console, text: str) -> None:
    """Print text as it is: no markup, no colours, and no line broken at the console's width."""
    console.print(Text(shown(text)), soft_wrap=True)


def shown(text: str) -> str:
    r"""Return text with what could drive a terminal written out: names of folders may hold it.

    Line ends and tabs stay, and so does whatever a script needs, such as its marks of direction.

    >>> print(shown("runs/\x1b[31mred"))
    runs/\x1b[31mred
    """
    return "".join(
        letter.encode("unicode_escape").decode() if _drives_a_terminal(letter) else letter
        for letter in text
    )


def _drives_a_terminal(letter: str) -> bool:
    return letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cs")
