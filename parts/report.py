"""What people look at: the live view of a run, progress of long sampling, and tables for a terminal or for Markdown."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:  # matplotlib takes a second to import: only the functions that draw do
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = dict[str, dict[str, float]]  # metric -> {"value", "low", "high"}, the ends of its 95 % interval
SHOWN_STEPS = 12  # rows of the live table
COLUMNS = {  # column title -> (metric, format); a run shows those that its method logs
    "step": ("step", "{:.0f}"),
    "loss": ("loss/objective_nats_per_token", "{:+.4f}"),
    "objective": ("loss/objective", "{:+.4f}"),
    "reward": ("reward/mean", "{:.3f}"),
    "dead": ("reward/dead_group_frac", "{:.0%}"),
    "KL": ("loss/kl_nats_per_token", "{:.4f}"),
    "clipped": ("loss/clipped_token_frac", "{:.0%}"),
    "ratio max": ("ratio/max", "{:.2f}"),
    "teacher H": ("loss/teacher_entropy_nats_per_token", "{:.3f}"),
    "student H": ("loss/student_entropy_nats_per_token", "{:.3f}"),
    "|grad|": ("update/grad_norm", "{:.3f}"),
    "tokens": ("rollout/completion_tokens_mean", "{:.0f}"),
    "cut": ("rollout/clipped_frac", "{:.0%}"),
    "s": ("time_s", "{:.1f}"),
}
LOOKS = (  # colour, marker, line style per label: hues a colour-blind reader tells apart, neighbours unlike in grey
    ("#1b4f72", "o", "-"),
    ("#e08e1b", "s", "--"),
    ("#2a9d6f", "^", "-."),
    ("#8e2f5c", "D", ":"),
    ("#6cb4ee", "v", (0, (6, 1, 1, 1, 1, 1))),
    ("#4d4d4d", "P", (0, (9, 2))),
)


@dataclass(frozen=True)
class Panel:
    """One small plot of curves_figure.

    x_label, y_label  with their units
    curves  label -> points (x, value, low, high) from left to right; low and high are the ends of the band
    """

    title: str
    x_label: str
    y_label: str
    curves: dict[str, list[tuple[float, float, float, float]]]
    log_x: bool = False
    y_range: tuple[float, float] | None = None


class StepView:
    """Show a line of metrics per step: a live table with a bar on a terminal, plain short lines elsewhere.

    steps  how many there will be; None where a budget of tokens decides, and then the share of it is shown
    """

    def __init__(self, console: Console, steps: int | None):
        self.console, self.steps = console, steps
        self.rows: list[dict[str, Any]] = []
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "StepView":
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.__exit__(kind, error, trace)

    def show(self, metrics: dict[str, Any]) -> None:
        """Add one step."""
        self.rows = [*self.rows, metrics][-SHOWN_STEPS:]
        place = f"step {metrics['step']}" + (f"/{self.steps}" if self.steps else f", {metrics['progress']:.0%}")
        if self.live:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(place, ProgressBar(total=1.0, completed=metrics["progress"], width=60))
            self.live.update(Group(self._table(), bar), refresh=True)
        else:
            cells = [f"{title} {text}" for title, text in self._cells(metrics).items() if title != "step"]
            self.console.print(f"{place}  {'  '.join(cells)}", highlight=False, soft_wrap=True)

    def _cells(self, metrics: dict[str, Any]) -> dict[str, str]:
        shown = {title: column for title, column in COLUMNS.items() if metrics.get(column[0]) is not None}
        return {title: form.format(metrics[name]) for title, (name, form) in shown.items()}

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for title in self._cells(self.rows[-1]):
            table.add_column(title, justify="right")
        for row in self.rows:
            table.add_row(*self._cells(row).values())
        return table


class SamplingProgress:
    """Show how far a long sampling is: a line rewritten on a terminal, elsewhere one every half minute and a last."""

    EVERY_S = 30.0

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.started = self.printed = time.monotonic()
        self.state = (0, 0, 0)

    def __enter__(self) -> "SamplingProgress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._print(end="\n")

    def update(self, finished: int, rows: int, tokens: int) -> None:
        """Take the sampler's progress: finished rows, all rows, tokens generated."""
        self.state = (finished, rows, tokens)
        if time.monotonic() - self.printed > (0.2 if self.console.is_terminal else self.EVERY_S):
            self.printed = time.monotonic()
            self._print(end="\r" if self.console.is_terminal else "\n")

    def _print(self, end: str) -> None:
        finished, rows, tokens = self.state
        seconds = time.monotonic() - self.started
        line = f"{self.title}: {finished}/{rows} completions, {tokens} tokens, {seconds:.0f} s"
        self.console.print(line, end=end, highlight=False, soft_wrap=True)


def cell(name: str, estimate: dict[str, float]) -> str:
    """Return "0.31 [0.25, 0.37]", with the digits that suit the metric; "-" where there is nothing to estimate."""
    if estimate["value"] != estimate["value"]:
        return "-"
    digits = 1 if "tokens" in name else 3
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def estimates_table(title: str, columns: dict[str, Summary]) -> Table:
    """Return a table with a row per metric and a column per summary."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("95 % intervals in brackets")
    for column in columns:
        table.add_column(column, justify="right")
    names = list(dict.fromkeys(name for summary in columns.values() for name in summary))
    for name in names:
        table.add_row(name, *(cell(name, summary[name]) if name in summary else "-" for summary in columns.values()))
    return table


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_of_seeds(name: str, estimates: list[dict[str, float]]) -> str:
    """Return the mean over seeds: "0.310"."""
    return f"{sum(estimate['value'] for estimate in estimates) / len(estimates):.{1 if 'tokens' in name else 3}f}"


def cell_of_seeds(name: str, estimates: list[dict[str, float]]) -> str:
    """Return the mean over seeds with the smallest and the largest seed: "0.310 (0.290, 0.330)"."""
    ends = [min(estimates, key=lambda e: e["value"]), max(estimates, key=lambda e: e["value"])]
    low, high = (mean_of_seeds(name, [end]) for end in ends)
    return f"{mean_of_seeds(name, estimates)} ({low}, {high})"


def gap_figure(found: dict[str, dict[str, list[dict[str, Summary]]]], names: list[str], paths: list[Path]) -> None:
    """Draw accuracy before and after training, per language and in English, a mark per seed with its 95 % interval.

    found  language code -> "before" or "after" -> an evaluation per seed: language code -> metric -> estimate
    names  what to call the languages, in the same order
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = "greedy accuracy"
    looks = {  # (evaluation, in English): label, marker, fill, edge
        ("before", False): ("before", "o", "white", "#1b4f72"),
        ("after", False): ("after", "o", "#1b4f72", "#1b4f72"),
        ("before", True): ("English before", "s", "white", "#b9770e"),
        ("after", True): ("English after", "s", "#e5a73b", "#b9770e"),
    }
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for place, (language, ends) in enumerate(found.items()):
        for column, ((end, english), (label, marker, face, edge)) in enumerate(looks.items()):
            for seed, evaluation in enumerate(ends[end]):
                estimate = evaluation["eng" if english else language][metric]
                reach = [[estimate["value"] - estimate["low"]], [estimate["high"] - estimate["value"]]]
                across = place + 0.2 * (column - 1.5) + 0.045 * (seed - (len(ends[end]) - 1) / 2)
                axes.errorbar(
                    across, estimate["value"], yerr=reach, marker=marker, markersize=6, markerfacecolor=face,
                    color=edge, capsize=2, linewidth=1, label=label if place == seed == 0 else None,
                )  # fmt: skip
    axes.set_xticks(range(len(found)), names)
    axes.set_xlabel("language trained on")
    axes.set_ylabel("greedy accuracy, held-out problems")
    axes.set_ylim(0, 1.04)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=160)
    pyplot.close(figure)


def curves_figure(panels: list[Panel], paths: list[Path], *, columns: int = 2) -> None:
    """Draw the panels side by side, each curve with its band, under one legend; a label looks alike in all of them.

    Writes the figure to each path, in the format of its suffix. Raises ValueError where there is no curve to draw.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    if not labels:
        raise ValueError("curves_figure needs a panel with a curve")
    figure, grid = _small_multiples(len(panels), columns)
    for panel, axes in zip(panels, grid, strict=True):
        for label, points in panel.curves.items():
            colour, marker, line = _look(labels.index(label))
            x, value, low, high = zip(*points, strict=True) if points else ((),) * 4
            every = max(1, len(x) // 10)  # a marker on each of many points would hide the line
            axes.plot(x, value, color=colour, linestyle=line, marker=marker, markevery=every, markersize=5, label=label)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.log_x:
            _log_ticks(axes)
        if panel.y_range is not None:
            axes.set_ylim(*panel.y_range)
    _legend(figure, grid)
    _save(figure, paths)


def _look(place: int) -> tuple[str, str, Any]:
    """Return colour, marker and line style of the label at `place`; past the last look, colours meet other lines."""
    colour, marker, _ = LOOKS[place % len(LOOKS)]
    return colour, marker, LOOKS[(place + place // len(LOOKS)) % len(LOOKS)][2]


def _small_multiples(
    count: int, columns: int, *, width: float = 4.2, height: float = 3.0
) -> "tuple[Figure, list[Axes]]":
    """Return a figure of `count` plots in rows of at most `columns`. Not by pyplot, which keeps state and a backend."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    grid = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _log_ticks(axes: "Axes") -> None:
    """Make x logarithmic, with plain numbers (1, 2, 4, 8 or 10, 100) at the ticks."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2 if axes.dataLim.x1 <= 64 * max(axes.dataLim.minposx, 1e-9) else 10)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: "Figure", grid: "list[Axes]") -> None:
    """Put one legend above the plots, an entry per label."""
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    room = figure.get_size_inches()[0] / 0.085  # characters of the legend's size that fit side by side
    columns = max(1, int(room / (max(map(len, handles)) + 8)))
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=min(columns, len(handles)),
        frameon=False, fontsize=9, handlelength=3.2,
    )  # fmt: skip


def _save(figure: "Figure", paths: list[Path]) -> None:
    for path in paths:
        figure.savefig(path, dpi=160)
