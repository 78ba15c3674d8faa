"""Figures: small plots side by side, in which a label looks alike everywhere.

Names of folders and of runs are the user's, and are shown as they are: a dollar sign in a label
starts no formula, and an underscore at its beginning does not take it out of the legend. What could
drive a terminal is written out, as in tables; a letter that the font lacks is a box.

Read Panel (what is drawn), curves_figure (a figure of panels), _draw (one panel), and the functions
below it: a line, a bar, a mark.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from parts.files import whole_file
from parts.view import shown

Point = tuple[float, float, float, float]  # x, value, low, high


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
    log_x   whether the x axis is logarithmic, with a tick at each power of two, or of four where
            these would be many
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


def curves_figure(panels: list[Panel], paths: list[Path], *, columns: int = 2) -> None:
    """Draw the panels in rows of `columns` under one legend; a label looks alike in all of them.

    Writes the figure to each path, in the format of its suffix. Raises ValueError where there is no
    curve to draw.
    """
    # Imported here, so that only who draws waits for it to load. Not pyplot, which keeps every
    # figure in memory and chooses a backend.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    if not labels:
        raise ValueError("curves_figure needs a panel with a curve")
    rows = math.ceil(len(panels) / columns)
    columns = min(columns, len(panels))
    width = columns * max(_panel_inches(panel, labels) for panel in panels)
    # A sample of the line, and the longest label.
    entry_inches = 0.7 + 0.085 * max(map(len, labels))
    entries = max(1, min(len(labels), int(width / entry_inches)))  # in a row of the legend
    legend_inches = 0.4 + 0.24 * (math.ceil(len(labels) / entries) - 1)
    figure = Figure(figsize=(width, 3.0 * rows + legend_inches), layout="constrained")
    handles = {}
    for place, panel in enumerate(panels):
        handles |= _draw(figure.add_subplot(rows, columns, place + 1), panel, labels)
    figure.legend(
        list(handles.values()),
        [_plain(label) for label in handles],
        ncols=entries,
        loc="outside upper center",
        frameon=False,
    )
    for path in paths:
        form = path.suffix.removeprefix(".")
        # An SVG would carry the time of drawing and random names; so, drawn again, it is the same.
        undated = {"Date": None} if form == "svg" else {}
        with (
            whole_file(path) as partial,
            rc_context({"svg.hashsalt": "figure"}),
            # Of each letter that the font lacks it tells on the terminal, again for every file.
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):
            figure.savefig(partial, format=form, dpi=160, metadata=undated)


def _plain(text: str) -> str:
    """Return text that matplotlib shows as it is: two dollar signs would enclose a formula."""
    return shown(text).replace("$", r"\$")


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
        places = [x for points in panel.curves.values() for x, *_ in points]
        axes.set_xscale("log", base=2 if max(places) <= 64 * min(places) else 4)
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.minorticks_off()
    return handles


def _look(place: int) -> Look:
    """Return the look of a label by its place; past the last, colours meet other shapes."""
    other = LOOKS[(place + place // len(LOOKS)) % len(LOOKS)]
    return other._replace(colour=LOOKS[place % len(LOOKS)].colour)


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
