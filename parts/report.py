"""What people look at: the live view of a run, progress of sampling, tables, figures, the page of completions."""

import base64
import cmath
import csv
import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

Estimate = dict[str, float]  # {"value", "low", "high"}, the ends of its 95 % interval
Summary = dict[str, Estimate]  # by metric
Point = tuple[float, float, float, float]  # x, value, low, high
ENDS = itemgetter("value", "low", "high")  # of an estimate
PAGE = Path(__file__).with_name("page.html")  # but for its data
SHOWN_STEPS = 12  # rows of the live table
COLUMNS = {  # column title -> (metric, format); a run shows what its method logs
    "step": ("step", "{:.0f}"),
    "loss": ("loss/objective_nats_per_token", "{:+.4f}"),
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
LOOKS = (  # colour, marker, line style, hatch: hues a colour-blind reader tells apart, neighbours unlike in grey
    ("#1b4f72", "o", "-", ""),
    ("#e08e1b", "s", "--", "///"),
    ("#2a9d6f", "^", "-.", "..."),
    ("#8e2f5c", "D", ":", "xx"),
    ("#6cb4ee", "v", (0, (6, 1, 1, 1, 1, 1)), "|||"),
    ("#4d4d4d", "P", (0, (9, 2)), "++"),
)


@dataclass(frozen=True)
class Panel:
    """One small plot of curves_figure.

    x_label, y_label  with their units
    curves  label -> points from left to right; low and high are the ends of the band, or of the bar's interval
    names   of the places x = 0, 1, ... of bars, or what to write beside each label's marks, in order
    slope   of a grey line through the origin, to compare with
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[Point]]
    log_x: bool = False
    y_range: tuple[float, float] | None = None
    kind: Literal["lines", "bars", "marks"] = "lines"
    names: tuple[str, ...] = ()
    slope: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the report reads of one run in one language.

    name  of the run, alike in all its languages;  pass_at_k  k -> estimate, for k = 1 .. samples
    settings, problems, summary  as eval.py writes them; settings["lang"] is the language
    """

    name: str
    settings: dict[str, Any]
    problems: list[dict[str, Any]]
    summary: Summary
    pass_at_k: dict[int, Estimate]


class StepView:
    """Show a line of metrics per step: a live table with a bar on a terminal, plain short lines elsewhere."""

    def __init__(
        self, console: Console, steps: int | None
    ):  # None: a budget of tokens decides, its share is shown
        self.console, self.steps = console, steps
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
        """Add one step."""
        self.rows = [*self.rows, metrics][-SHOWN_STEPS:]
        place = f"step {metrics['step']}" + (
            f"/{self.steps}" if self.steps else f", {metrics['progress']:.0%}"
        )
        if self.live:
            columns = [Column(title, justify="right") for title in self._cells(metrics)]
            table, bar = Table(*columns, box=None, header_style="bold"), Table.grid(padding=(0, 1))
            for row in self.rows:
                table.add_row(*self._cells(row).values())
            bar.add_row(place, ProgressBar(total=1.0, completed=metrics["progress"], width=60))
            self.live.update(Group(table, bar), refresh=True)
        else:
            cells = "  ".join(
                f"{title} {text}" for title, text in self._cells(metrics).items() if title != "step"
            )
            self.console.print(f"{place}  {cells}", highlight=False, soft_wrap=True)

    def _cells(self, metrics: dict[str, Any]) -> dict[str, str]:
        return {
            t: form.format(metrics[n])
            for t, (n, form) in COLUMNS.items()
            if metrics.get(n) is not None
        }


class SamplingProgress:
    """Show how far a long sampling is: a line rewritten on a terminal, elsewhere one every half minute and a last."""

    EVERY_S = 30.0

    def __init__(self, console: Console, title: str):
        self.console, self.title = console, title
        self.started = self.printed = time.monotonic()
        self.state = (0, 0, 0)

    def __enter__(self) -> "SamplingProgress":
        return self

    def __exit__(self, kind: type | None, *raised: Any) -> None:
        if kind is None:
            self._print(end="\n")

    def update(self, finished: int, rows: int, tokens: int) -> None:
        """Take the sampler's progress: finished rows, all rows, tokens generated."""
        self.state = (finished, rows, tokens)
        if time.monotonic() - self.printed > (0.2 if self.console.is_terminal else self.EVERY_S):
            self.printed = time.monotonic()
            self._print(end="\r" if self.console.is_terminal else "\n")

    def _print(self, end: str) -> None:
        (finished, rows, tokens), seconds = self.state, time.monotonic() - self.started
        line = f"{self.title}: {finished}/{rows} completions, {tokens} tokens, {seconds:.0f} s"
        self.console.print(line, end=end, highlight=False, soft_wrap=True)


def cell(name: str, estimate: Estimate) -> str:
    """Return "0.31 [0.25, 0.37]", with the digits that suit the metric; "-" for nan, no interval where its ends are."""
    if estimate["value"] != estimate["value"]:
        return "-"
    value, low, high = (f"{end:.{1 if 'tokens' in name else 3}f}" for end in ENDS(estimate))
    return value if low == "nan" else f"{value} [{low}, {high}]"


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


def estimates_table(title: str, columns: dict[str, Summary]) -> Table:
    """Return a table with a row per metric and a column per summary."""
    names = list(dict.fromkeys(name for summary in columns.values() for name in summary))
    rows = [
        [n, *(cell(n, summary[n]) if n in summary else "-" for summary in columns.values())]
        for n in names
    ]
    return text_table(title, ["95 % intervals in brackets", *columns], rows)


def _lines(table: Table) -> list[list[str]]:
    """Return the header and the rows as plain text."""
    return [
        list(map(str, line))
        for line in zip(*([c.header, *c.cells] for c in table.columns), strict=True)
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines
    )


def latex_table(table: Table) -> str:
    """Return a LaTeX table, for the package booktabs, with its title above it as a comment."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    header, *body = [
        " & ".join(
            re.sub(r"[\\~^&%$#_{}]", lambda m: words.get(m[0], "\\" + m[0]), text) for text in line
        )
        + r" \\"
        for line in _lines(table)
    ]
    top = [
        f"% {table.title}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        header,
    ]
    return "\n".join([*top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def curves_figure(panels: list[Panel], paths: list[Path], *, columns: int = 2) -> None:
    """Draw the panels in rows of `columns` under one legend; a label looks alike in all of them.

    Writes the figure to each path, in the format of its suffix. Raises ValueError where there is no curve to draw.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and chooses a backend

    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    if not labels:
        raise ValueError("curves_figure needs a panel with a curve")
    rows, columns = math.ceil(len(panels) / columns), min(columns, len(panels))
    width = max(
        4.2,
        *(0.8 + 0.3 * len(labels) * len(panel.names) * (panel.kind == "bars") for panel in panels),
    )
    figure = Figure(figsize=(width * columns, 3.0 * rows + 0.4), layout="constrained")
    for place, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, columns, place + 1), panel, labels)
    found = [
        pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)
    ]
    handles = {label: handle for handle, label in found}  # one each
    ncols = max(
        1, min(len(labels), int(width * columns / (0.7 + 0.085 * max(map(len, labels)))))
    )  # inches
    figure.legend(
        list(handles.values()),
        list(handles),
        ncols=ncols,
        loc="outside upper center",
        frameon=False,
    )
    for path in paths:
        figure.savefig(path, dpi=160)


def _draw(axes: Any, panel: Panel, labels: list[str]) -> None:
    """Draw the panel, each label in the look of its place among the labels; past the last, colours meet other lines."""
    for label, points in panel.curves.items():
        place = labels.index(label)
        colour, marker, _, hatch = LOOKS[place % len(LOOKS)]
        line = LOOKS[(place + place // len(LOOKS)) % len(LOOKS)][2]
        x, value, low, high = np.array(points, dtype=float).reshape(-1, 4).T
        reach, look = (value - low, high - value), {"color": colour, "label": label}
        if panel.kind == "lines":
            axes.plot(
                x,
                value,
                marker=marker,
                linestyle=line,
                markevery=max(1, len(x) // 10),
                markersize=5,
                **look,
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        elif panel.kind == "bars":
            wide = 0.8 / len(labels)
            axes.bar(
                x + (place + 0.5) * wide - 0.4,
                value,
                wide,
                yerr=reach,
                hatch=hatch,
                ec="white",
                **look,
            )
            axes.set_xticks(range(len(panel.names)), panel.names)
        else:
            axes.errorbar(
                x,
                value,
                reach,
                fmt=marker,
                markersize=5,
                mec="white",
                mew=0.5,
                elinewidth=0.8,
                **look,
            )
            for name, *at in zip(panel.names, x, value, strict=False):
                axes.annotate(
                    name, at, xytext=(-5, 3), textcoords="offset points", ha="right", fontsize=8
                )
    if panel.slope is not None:
        axes.plot([0, 1], [0, panel.slope], color="#999999", linewidth=1, zorder=0)
    axes.set_title(panel.title, fontsize=11)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, ylim=panel.y_range, axisbelow=True)
    axes.grid(alpha=0.3, axis="y" if panel.kind == "bars" else "both")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


def _length_points(evaluation: Evaluation, width: int) -> list[Point]:
    """Return a histogram of the completions' lengths: a point without interval at the middle of each bin."""
    lengths = [a["tokens"] for p in evaluation.problems for a in p["attempts"]]
    shares = np.bincount(np.array(lengths) // width) / len(lengths)
    return [
        ((place + 0.5) * width, share, share, share) for place, share in enumerate(shares.tolist())
    ]


def _problem_points(*pair: Evaluation) -> list[Point]:
    """Return a point per problem, the share of right attempts in each run; equal ones lie around their place."""
    x, y = (
        {p["id"]: sum(a["correct"] for a in p["attempts"]) / len(p["attempts"]) for p in e.problems}
        for e in pair
    )
    points, taken = [], Counter()
    for at in (complex(x[key], y[key]) for key in x):
        moved = at + cmath.rect(
            0.1 * (taken[at] / len(x)) ** 0.5, 2.4 * taken[at]
        )  # as seeds lie in a sunflower
        points.append((moved.real, moved.imag, moved.imag, moved.imag))
        taken[at] += 1
    return points


def _grid(evaluations: list[Evaluation]) -> tuple[dict[str, dict[str, Evaluation]], list[int]]:
    """Return language -> run -> evaluation, and the k to show: 1 and the largest that all evaluations have."""
    grid: dict[str, dict[str, Evaluation]] = {e.settings["lang"]: {} for e in evaluations}
    for e in evaluations:
        grid[e.settings["lang"]][e.name] = e
    if len({frozenset(runs) for runs in grid.values()}) != 1 or sum(map(len, grid.values())) != len(
        evaluations
    ):
        found = ", ".join(f"{e.name} in {e.settings['lang']}" for e in evaluations)
        raise ValueError(
            f"a report needs every run in every language, once; got {found or 'no run'}"
        )
    return grid, sorted({1, min(max(e.pass_at_k) for e in evaluations)})


def report_figures(evaluations: list[Evaluation]) -> dict[str, list[Panel]]:
    """Return the panels of a report's figures, by file name."""
    grid, ks = _grid(evaluations)
    first, by_run = (
        evaluations[0].name,
        {e.name: [runs[e.name] for runs in grid.values()] for e in evaluations},
    )
    width = (
        max(a["tokens"] for e in evaluations for p in e.problems for a in p["attempts"]) // 30 + 1
    )
    share, passes, lengths, scatter, bars = "share of problems", [], [], [], []
    for code, runs in grid.items():
        curves = {
            n: [(k, *ENDS(found)) for k, found in e.pass_at_k.items()] for n, e in runs.items()
        }
        passes.append(
            Panel(code, "k, attempts", f"pass@k, {share}", curves, log_x=True, y_range=(0, 1.02))
        )
        curves = {n: _length_points(e, width) for n, e in runs.items()}
        lengths.append(
            Panel(code, "length, tokens", f"completions, share per {width} tokens", curves)
        )
        curves = {
            f"{n} against {first}": _problem_points(runs[first], e)
            for n, e in runs.items()
            if n != first
        }
        scatter.append(
            Panel(code, f"{first}, share right", "share right", curves, kind="marks", slope=1)
        )
    for k in ks:
        curves = {
            n: [(x, *ENDS(e.pass_at_k[k])) for x, e in enumerate(found)]
            for n, found in by_run.items()
        }
        bars.append(
            Panel(
                "", "language", f"pass@{k}, {share}", curves, False, (0, 1.02), "bars", tuple(grid)
            )
        )
    curves = {
        n: [(e.summary["format rate"]["value"], *ENDS(e.pass_at_k[1])) for e in of]
        for n, of in by_run.items()
    }
    boxed, right = (sum(point[place] for point in curves[first]) for place in (0, 1))
    look = {"kind": "marks", "names": tuple(grid), "slope": right / boxed if boxed else 0}
    title, x_label = f"grey: as many right per box as {first}", "format rate, share of completions"
    boxes = Panel(title, x_label, "pass@1, share of completions", curves, **look)
    figures = {
        "pass-at-k": passes,
        "languages": bars,
        "scatter": scatter,
        "format": [boxes],
        "lengths": lengths,
    }
    return {
        name: panels for name, panels in figures.items() if name != "scatter" or len(by_run) > 1
    }


def report_tables(evaluations: list[Evaluation]) -> list[Table]:
    """Return a table per language and, where there are several, pass@k over languages with the mean."""
    grid, ks = _grid(evaluations)
    tables = [
        estimates_table(code, {name: e.summary for name, e in runs.items()})
        for code, runs in grid.items()
    ]
    for k in ks if len(grid) > 1 else []:
        columns = {
            e.name: {code: grid[code][e.name].pass_at_k[k] for code in grid} for e in evaluations
        }
        for found in columns.values():
            mean = sum(estimate["value"] for estimate in found.values()) / len(grid)
            found["mean of languages"] = {"value": mean, "low": math.nan, "high": math.nan}
        tables.append(estimates_table(f"pass@{k}", columns))
    return tables


def write_report(evaluations: list[Evaluation], tests: list[Table], out: Path) -> list[Path]:
    """Write tables (Markdown, LaTeX, CSV), figures (PNG, PDF) and the page report.html into a folder; return the files.

    The evaluations in a language are of the same problems; the first run is the one that the others are set against.
    """
    tables, figures = [*report_tables(evaluations), *tests], report_figures(evaluations)
    out.mkdir(parents=True, exist_ok=True)
    for name, panels in figures.items():
        curves_figure(
            panels,
            [out / f"{name}.png", out / f"{name}.pdf"],
            columns=1 if name == "languages" else 2,
        )
    data = {
        "tables": [{"title": str(table.title), "lines": _lines(table)} for table in tables],
        "figures": {
            name: base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in figures
        },
        "runs": [
            {"name": e.name, "settings": e.settings, "problems": e.problems} for e in evaluations
        ],
    }
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace(
        "<", "\\u003c"
    )  # no </script> can end it
    sections = [
        f"## {table.title}\n\n{markdown_table(_lines(table)[0], _lines(table)[1:])}\n"
        for table in tables
    ]
    texts = {
        "report.html": PAGE.read_text(encoding="utf-8").replace("@DATA@", embedded),
        "report.md": "\n".join(
            ["# Evaluation report\n", *sections, *(f"![{name}]({name}.png)\n" for name in figures)]
        ),
        "report.tex": "\n".join(map(latex_table, tables)),
    }
    for name, text in texts.items():
        (out / name).write_text(
            text, encoding="utf-8", errors="replace"
        )  # half a surrogate pair becomes "?"
    with (out / "report.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "language", "metric", "value", "low", "high"])
        for e in evaluations:
            for metric, found in (
                {f"pass@{k}": found for k, found in e.pass_at_k.items()} | e.summary
            ).items():
                rows.writerow([e.name, e.settings["lang"], metric, *ENDS(found)])
    return [
        out / name
        for name in (
            *texts,
            "report.csv",
            *(f"{n}.{end}" for n in figures for end in ("png", "pdf")),
        )
    ]
