"""What an evaluation leaves to look at: figures, tables in three formats, the page of completions.

Which numbers go into a figure is said here, and how it is drawn in parts/figures.py.
"""

import base64
import cmath
import csv
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from parts.figures import Panel, Point, curves_figure
from parts.files import make_folder, whole_file
from parts.metrics import Estimate, Ratio, mean_of_languages, pass_at_k
from parts.tables import Summary, estimates_table

Grid = dict[str, dict[str, "Evaluation"]]  # language -> name of the run -> its evaluation
PAGE = Path(__file__).with_name("page.html")  # all of the page but its data
PAGE_BYTES = 8_000_000  # of problems and attempts on one page, about
LATEX_WORDS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


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
            mean = mean_of_languages([_pass_ratio(runs[name], k) for runs in grid.values()])
            columns[name] = found | {"mean of languages": mean}
        tables.append(estimates_table(f"pass@{k}", columns))
    return tables


def _pass_ratio(evaluation: Evaluation, k: int) -> Ratio:
    """Return pass@k of every problem, each over 1."""
    rights = [[a["correct"] for a in problem["attempts"]] for problem in evaluation.problems]
    return [pass_at_k(len(each), sum(each), k) for each in rights], [1.0] * len(rights)


def write_report(evaluations: list[Evaluation], tests: list[Table], out: Path) -> list[Path]:
    """Write tables, figures and the page of completions into a folder; return the files.

    evaluations  every run in every language, once, or ValueError, before anything is written. Those
                 in a language are of the same problems. The others are set against the first run.
    tests        tables that stand below those of the evaluations
    out          made if it is missing: report.html, .md, .tex and .csv, each figure as PNG and PDF,
                 and where there are very many completions report-2.html and so on
    """
    tables = [*report_tables(evaluations), *tests]
    figures = report_figures(evaluations)
    make_folder(out)
    pictures = {}
    for name, panels in figures.items():
        pictures[name] = [out / f"{name}.png", out / f"{name}.pdf"]
        curves_figure(panels, pictures[name], columns=1 if name == "languages" else 2)
    pngs = {name: png.read_bytes() for name, (png, _) in pictures.items()}
    texts = {
        **_pages(evaluations, tables, pngs),
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


def _pages(
    evaluations: list[Evaluation], tables: list[Table], pngs: Mapping[str, bytes]
) -> dict[str, str]:
    """Return the pages of completions by file name, each with its data inside.

    A browser has a hard time with more than some PAGE_BYTES, so that problems beyond go on in
    report-2.html and so on. The tables and figures are on the first page.
    """
    parts = _page_problems(evaluations)
    names = ["report.html", *(f"report-{number}.html" for number in range(2, len(parts) + 1))]
    return {
        name: _page(
            {
                "tables": [{"title": str(table.title), "lines": _lines(table)} for table in tables],
                "figures": {name: base64.b64encode(png).decode() for name, png in pngs.items()},
                "runs": [
                    {
                        "name": e.name,
                        "settings": e.settings,
                        "problems": [
                            p for p in e.problems if (e.settings["lang"], p["id"]) in part
                        ],
                    }
                    for e in evaluations
                ],
                "pages": names,
                "page": number,
            }
            | ({"tables": [], "figures": {}} if number else {})
        )
        for number, (name, part) in enumerate(zip(names, parts, strict=True))
    }


def _page_problems(evaluations: list[Evaluation]) -> list[set[tuple[str, str]]]:
    """Return the problems of each page, by language and id; all attempts at one share a page."""
    sizes: Counter[tuple[str, str]] = Counter()
    for e in evaluations:
        for problem in e.problems:
            content = _embedded(problem).encode(errors="replace")
            sizes[e.settings["lang"], problem["id"]] += len(content)
    parts: list[set[tuple[str, str]]] = [set()]
    filled = 0
    for problem, size in sizes.items():
        if parts[-1] and filled + size > PAGE_BYTES:
            parts.append(set())
            filled = 0
        parts[-1].add(problem)
        filled += size
    return parts


def _page(data: Mapping[str, Any]) -> str:
    """Return one page with its data."""
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", _embedded(data))


def _embedded(data: Mapping[str, Any]) -> str:
    """Return data as JSON for a page's script, which nothing but "</script>" can end."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


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
