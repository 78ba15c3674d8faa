"""What an evaluation leaves to look at: figures, tables in three formats, the page of completions.

Names of folders and of runs are the user's, and are shown as they are: a dollar sign in a label
starts no formula, and an underscore at its beginning does not take it out of the legend.
"""

import base64
import cmath
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.table import Table

from parts.files import whole_file
from parts.metrics import Estimate
from parts.view import Summary, estimates_table

Point = tuple[float, float, float, float]  # x, value, low, high
Grid = dict[str, dict[str, "Evaluation"]]  # language -> name of the run -> its evaluation
PAGE = Path(__file__).with_name("page.html")  # all of the page but its data
LATEX_WORDS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


class Look(NamedTuple):
    """How a label is drawn: colour, marker of a point, style of a line, hatch of a bar."""

    colour: str
    marker: str
    line: Any  # "-", "--", ..., or (offset, lengths of dashes and gaps)
    hatch: str


# A colour-blind reader tells these hues apart, and neighbours differ in grey, too.
LOOKS = (
    Look("#1b4f72", "o", "-", ""),
    Look("#e08e1b", "s", "--", "///"),
    Look("#2a9d6f", "^", "-.", "..."),
    Look("#8e2f5c", "D", ":", "xx"),
    Look("#6cb4ee", "v", (0, (6, 1, 1, 1, 1, 1)), "|||"),
    Look("#4d4d4d", "P", (0, (9, 2)), "++"),
)


@dataclass(frozen=True)
class Panel:
    """One small plot of curves_figure.

    x_label, y_label  with their units
    curves  label -> points from left to right; low and high are the ends of the band around a line,
            or of the interval at a bar or a mark
    log_x   whether the x axis is logarithmic, with a tick at each power of two
    names   with bars, of the places x = 0, 1, ...; with marks, what stands beside each label's
            marks, in order
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

    name       of the run, alike in all its languages
    settings   as eval.py writes them to settings.json; settings["lang"] is the language
    problems   the rows of problems.jsonl: each problem with every attempt at it
    summary    metric -> estimate
    pass_at_k  k -> estimate, for k = 1 .. samples
    """

    name: str
    settings: dict[str, Any]
    problems: list[dict[str, Any]]
    summary: Summary
    pass_at_k: Mapping[int, Estimate]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = []
    for line in [header, ["---"] * len(header), *rows]:
        cells = " | ".join(text.replace("|", r"\|") for text in line)
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def latex_table(table: Table) -> str:
    """Return a LaTeX table, for the package booktabs, with its title above it as a comment."""
    header, *body = [
        " & ".join(_latex_text(text) for text in line) + r" \\" for line in _lines(table)
    ]
    alignment = "l" + "r" * (len(table.columns) - 1)
    lines = [
        f"% {table.title}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        header,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]
    return "\n".join(lines)


def _latex_text(text: str) -> str:
    """Return text with every character that means something to LaTeX written out."""
    return re.sub(r"[\\~^&%$#_{}]", lambda m: LATEX_WORDS.get(m[0], "\\" + m[0]), text)


def _lines(table: Table) -> list[list[str]]:
    """Return the header and the rows of a table as plain text."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    return [list(line) for line in zip(*columns, strict=True)]


def curves_figure(panels: list[Panel], paths: list[Path], *, columns: int = 2) -> None:
    """Draw the panels in rows of `columns` under one legend; a label looks alike in all of them.

    Writes the figure to each path, in the format of its suffix. Raises ValueError where there is no
    curve to draw.
    """
    # Imported here, so that only who draws waits for it to load. Not pyplot, which keeps every
    # figure in memory and chooses a backend.
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    if not labels:
        raise ValueError("curves_figure needs a panel with a curve")
    rows = math.ceil(len(panels) / columns)
    columns = min(columns, len(panels))
    width = columns * max(_panel_inches(panel, labels) for panel in panels)
    figure = Figure(figsize=(width, 3.0 * rows + 0.4), layout="constrained")
    handles = {}
    for place, panel in enumerate(panels):
        handles |= _draw(figure.add_subplot(rows, columns, place + 1), panel, labels)
    entry_inches = 0.7 + 0.085 * max(
        map(len, labels)
    )  # a sample of the line, and the longest label
    figure.legend(
        list(handles.values()),
        [_plain(label) for label in handles],
        ncols=max(1, min(len(labels), int(width / entry_inches))),
        loc="outside upper center",
        frameon=False,
    )
    for path in paths:
        with whole_file(path) as partial:
            figure.savefig(partial, format=path.suffix.removeprefix("."), dpi=160)


def _plain(text: str) -> str:
    """Return text that matplotlib shows as it is: two dollar signs would enclose a formula."""
    return text.replace("$", r"\$")


def _panel_inches(panel: Panel, labels: list[str]) -> float:
    """Return how wide a panel must be; every bar needs its room."""
    bars = len(labels) * len(panel.names) if panel.kind == "bars" else 0
    return max(4.2, 0.8 + 0.3 * bars)


def _draw(axes: Any, panel: Panel, labels: list[str]) -> dict[str, Any]:
    """Draw a panel, each label in the look of its place among `labels`.

    Returns what stands for each label in a legend. That matplotlib finds it by itself is no help:
    it leaves out labels that begin with an underscore.
    """
    handles = {}
    for label, points in panel.curves.items():
        place = labels.index(label)
        if panel.kind == "lines":
            handles[label] = _draw_line(axes, points, _look(place))
        elif panel.kind == "bars":
            handles[label] = _draw_bars(axes, points, _look(place), place, len(labels))
        else:
            handles[label] = _draw_marks(axes, points, _look(place), panel.names)
    if panel.kind == "bars":
        axes.set_xticks(range(len(panel.names)), [_plain(name) for name in panel.names])
    if panel.slope is not None:
        axes.plot([0, 1], [0, panel.slope], color="#999999", linewidth=1, zorder=0)
    axes.set_title(_plain(panel.title), fontsize=11)
    axes.set_xlabel(_plain(panel.x_label))
    axes.set_ylabel(_plain(panel.y_label))
    axes.set(ylim=panel.y_range, axisbelow=True)
    axes.grid(alpha=0.3, axis="y" if panel.kind == "bars" else "both")
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    return handles


def _look(place: int) -> Look:
    """Return the look of a label by its place; past the last look, the colours meet other lines."""
    line = LOOKS[(place + place // len(LOOKS)) % len(LOOKS)].line
    return LOOKS[place % len(LOOKS)]._replace(line=line)


def _arrays(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the x, the values, the low and the high ends of points, each as one array."""
    x, value, low, high = np.array(points, dtype=float).reshape(-1, 4).T
    return x, value, low, high


def _draw_line(axes: Any, points: Sequence[Point], look: Look) -> Any:
    """Draw a line, with about ten markers however many points it has, in a band of its colour."""
    x, value, low, high = _arrays(points)
    [line] = axes.plot(
        x,
        value,
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        markevery=max(1, len(x) // 10),
        markersize=5,
    )
    axes.fill_between(x, low, high, color=look.colour, alpha=0.18, linewidth=0)
    return line


def _draw_bars(axes: Any, points: Sequence[Point], look: Look, place: int, count: int) -> Any:
    """Draw a bar at each x; the bars of `count` labels share 0.8 of the way to the next x."""
    x, value, low, high = _arrays(points)
    wide = 0.8 / count
    return axes.bar(
        x + (place + 0.5) * wide - 0.4,
        value,
        wide,
        yerr=(value - low, high - value),
        color=look.colour,
        hatch=look.hatch,
        edgecolor="white",
    )


def _draw_marks(axes: Any, points: Sequence[Point], look: Look, names: tuple[str, ...]) -> Any:
    """Draw a mark with its interval at each point, and beside it its name, where it has one."""
    x, value, low, high = _arrays(points)
    marks = axes.errorbar(
        x,
        value,
        (value - low, high - value),
        color=look.colour,
        fmt=look.marker,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=0.8,
    )
    for name, *at in zip(names, x, value, strict=False):
        axes.annotate(
            _plain(name), at, xytext=(-5, 3), textcoords="offset points", ha="right", fontsize=8
        )
    return marks


def report_figures(evaluations: list[Evaluation]) -> dict[str, list[Panel]]:
    """Return the panels of a report's figures, by file name.

    pass-at-k  a panel a language: pass@k against k
    languages  a panel for pass@1 and one for the largest k: a bar a run in each language
    scatter    a panel a language: how often each problem is solved, by each run against the first
    format     one panel: pass@1 against the format rate
    lengths    a panel a language: how long the completions are

    The scatter is left out where there is one run only. ValueError: see write_report.
    """
    grid, ks = _grid(evaluations)
    by_run = {e.name: [runs[e.name] for runs in grid.values()] for e in evaluations}
    figures = {
        "pass-at-k": [_pass_panel(language, runs) for language, runs in grid.items()],
        "languages": [_languages_panel(tuple(grid), by_run, k) for k in ks],
    }
    first = evaluations[0].name
    if len(by_run) > 1:
        figures["scatter"] = [_scatter_panel(lang, runs, first) for lang, runs in grid.items()]
    figures["format"] = [_format_panel(tuple(grid), by_run, first)]
    width = _longest(evaluations) // 30 + 1  # of a bin, so that there are at most 31 of them
    figures["lengths"] = [_lengths_panel(lang, runs, width) for lang, runs in grid.items()]
    return figures


def _grid(evaluations: list[Evaluation]) -> tuple[Grid, list[int]]:
    """Return the evaluations by language and run, and the k to show.

    These are 1 and the largest k that all evaluations have.
    """
    grid: Grid = {e.settings["lang"]: {} for e in evaluations}
    for e in evaluations:
        grid[e.settings["lang"]][e.name] = e
    same_runs = len({frozenset(runs) for runs in grid.values()}) == 1
    all_once = sum(map(len, grid.values())) == len(evaluations)
    if not (same_runs and all_once):
        found = ", ".join(f"{e.name} in {e.settings['lang']}" for e in evaluations)
        raise ValueError(
            f"a report needs every run in every language, once; got {found or 'no run'}"
        )
    return grid, sorted({1, min(max(e.pass_at_k) for e in evaluations)})


def _point(x: float, estimate: Estimate) -> Point:
    """Return the point of an estimate at x."""
    return (x, estimate.value, estimate.low, estimate.high)


def _pass_panel(language: str, runs: Mapping[str, Evaluation]) -> Panel:
    """Return the panel of pass@k against k in a language."""
    curves = {
        name: [_point(k, estimate) for k, estimate in e.pass_at_k.items()]
        for name, e in runs.items()
    }
    y_label = "pass@k, share of problems"
    return Panel(language, "k, attempts", y_label, curves, log_x=True, y_range=(0, 1.02))


def _languages_panel(
    languages: tuple[str, ...], by_run: Mapping[str, list[Evaluation]], k: int
) -> Panel:
    """Return the panel of pass@k in every language; a run's evaluations are in their order."""
    curves = {
        name: [_point(x, e.pass_at_k[k]) for x, e in enumerate(found)]
        for name, found in by_run.items()
    }
    y_label = f"pass@{k}, share of problems"
    return Panel("", "language", y_label, curves, y_range=(0, 1.02), kind="bars", names=languages)


def _scatter_panel(language: str, runs: Mapping[str, Evaluation], first: str) -> Panel:
    """Return the panel that sets every other run in a language against the first, by problem."""
    curves = {
        f"{name} against {first}": _problem_points(runs[first], e)
        for name, e in runs.items()
        if name != first
    }
    return Panel(language, f"{first}, share right", "share right", curves, kind="marks", slope=1)


def _problem_points(first: Evaluation, other: Evaluation) -> list[Point]:
    """Return a point a problem: the share of its attempts that are right in each of two runs.

    Problems with equal shares would hide each other, so they lie around their place as seeds lie in
    a sunflower: each 2.4 radians, about the golden angle, further on, at a distance that grows with
    the square root of their number.
    """
    x = _shares_right(first)
    y = _shares_right(other)
    points = []
    taken = Counter()  # place -> how many problems lie around it
    for problem in x:
        place = complex(x[problem], y[problem])
        moved = place + cmath.rect(0.1 * (taken[place] / len(x)) ** 0.5, 2.4 * taken[place])
        points.append((moved.real, moved.imag, moved.imag, moved.imag))
        taken[place] += 1
    return points


def _shares_right(evaluation: Evaluation) -> dict[str, float]:
    """Return problem's id -> the share of its attempts that are right."""
    return {
        problem["id"]: sum(a["correct"] for a in problem["attempts"]) / len(problem["attempts"])
        for problem in evaluation.problems
    }


def _format_panel(
    languages: tuple[str, ...], by_run: Mapping[str, list[Evaluation]], first: str
) -> Panel:
    """Return the panel of pass@1 against the format rate: a mark a run in each language.

    A run that only learned to write boxes moves along the grey line: it has more completions with a
    box, and as many right among them as the first run.
    """
    curves = {
        name: [_point(e.summary["format rate"].value, e.pass_at_k[1]) for e in found]
        for name, found in by_run.items()
    }
    boxed = sum(x for x, *_ in curves[first])
    right = sum(value for _, value, *_ in curves[first])
    return Panel(
        f"grey: as many right per box as {first}",
        "format rate, share of completions",
        "pass@1, share of completions",
        curves,
        kind="marks",
        names=languages,
        slope=right / boxed if boxed else 0,
    )


def _longest(evaluations: list[Evaluation]) -> int:
    """Return the length of the longest completion, in tokens."""
    return max(max(_lengths(evaluation)) for evaluation in evaluations)


def _lengths(evaluation: Evaluation) -> list[int]:
    """Return the length of every completion, in tokens."""
    return [a["tokens"] for problem in evaluation.problems for a in problem["attempts"]]


def _lengths_panel(language: str, runs: Mapping[str, Evaluation], width: int) -> Panel:
    """Return the panel of the completions' lengths in a language, in bins of `width` tokens."""
    curves = {name: _length_points(e, width) for name, e in runs.items()}
    return Panel(language, "length, tokens", f"completions, share per {width} tokens", curves)


def _length_points(evaluation: Evaluation, width: int) -> list[Point]:
    """Return a histogram of the lengths: a point without interval at the middle of each bin."""
    lengths = np.array(_lengths(evaluation))
    shares = np.bincount(lengths // width) / len(lengths)
    middles = [(place + 0.5) * width for place in range(len(shares))]
    return [(x, share, share, share) for x, share in zip(middles, shares.tolist(), strict=True)]


def report_tables(evaluations: list[Evaluation]) -> list[Table]:
    """Return a table per language and, where there are several, pass@k over them with the mean.

    ValueError: see write_report.
    """
    grid, ks = _grid(evaluations)
    tables = [
        estimates_table(language, {name: e.summary for name, e in runs.items()})
        for language, runs in grid.items()
    ]
    if len(grid) == 1:
        return tables
    for k in ks:
        columns = {}
        for name in dict.fromkeys(e.name for e in evaluations):
            found = {language: runs[name].pass_at_k[k] for language, runs in grid.items()}
            mean = sum(estimate.value for estimate in found.values()) / len(grid)
            found["mean of languages"] = Estimate(mean, math.nan, math.nan)
            columns[name] = found
        tables.append(estimates_table(f"pass@{k}", columns))
    return tables


def write_report(evaluations: list[Evaluation], tests: list[Table], out: Path) -> list[Path]:
    """Write tables, figures and the page of completions into a folder; return the files.

    evaluations  every run in every language, once, or ValueError, before anything is written. Those
                 in a language are of the same problems. The others are set against the first run.
    tests        tables that stand below those of the evaluations
    out          made if it is missing: report.html, .md, .tex and .csv, and each figure as PNG, PDF
    """
    tables = [*report_tables(evaluations), *tests]
    figures = report_figures(evaluations)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, panels in figures.items():
        pictures[name] = [out / f"{name}.png", out / f"{name}.pdf"]
        curves_figure(panels, pictures[name], columns=1 if name == "languages" else 2)
    pngs = {name: png.read_bytes() for name, (png, _) in pictures.items()}
    texts = {
        "report.html": _page(evaluations, tables, pngs),
        "report.md": _markdown(tables, list(figures)),
        "report.tex": "\n".join(map(latex_table, tables)),
    }
    for name, text in texts.items():
        with whole_file(out / name) as partial:
            # Half a surrogate pair, which a completion may hold, is no text: it becomes "?".
            partial.write_text(text, encoding="utf-8", errors="replace")
    _write_csv(evaluations, out / "report.csv")
    files = [out / name for name in [*texts, "report.csv"]]
    return [*files, *(path for paths in pictures.values() for path in paths)]


def _page(evaluations: list[Evaluation], tables: list[Table], pngs: Mapping[str, bytes]) -> str:
    """Return the page of completions, with all its data inside."""
    data = {
        "tables": [{"title": str(table.title), "lines": _lines(table)} for table in tables],
        "figures": {name: base64.b64encode(png).decode() for name, png in pngs.items()},
        "runs": [
            {"name": e.name, "settings": e.settings, "problems": e.problems} for e in evaluations
        ],
    }
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False)
    # Only "</script>" can end the script that holds the data, so no completion may write a "<".
    embedded = embedded.replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", embedded)


def _markdown(tables: list[Table], figures: list[str]) -> str:
    """Return the report as Markdown: the tables, then the figures by their names."""
    sections = ["# Evaluation report\n"]
    for table in tables:
        header, *rows = _lines(table)
        sections.append(f"## {table.title}\n\n{markdown_table(header, rows)}\n")
    sections += [f"![{name}]({name}.png)\n" for name in figures]
    return "\n".join(sections)


def _write_csv(evaluations: list[Evaluation], path: Path) -> None:
    """Write every estimate with its ends, a row each."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["run", "language", "metric", "value", "low", "high"])
        for e in evaluations:
            passes = {f"pass@{k}": estimate for k, estimate in e.pass_at_k.items()}
            for metric, found in {**passes, **e.summary}.items():
                row = [e.name, e.settings["lang"], metric, found.value, found.low, found.high]
                rows.writerow(row)
