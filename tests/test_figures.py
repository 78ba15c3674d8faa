"""Figures: what is drawn, as the SVG tells it, and no name of the user's breaks it."""

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from parts import figures
from parts.figures import LOOKS, Look, Panel, Point, curves_figure


def texts(svg: str) -> list[str]:
    """Return the words that matplotlib drew: it writes each in a comment before its outlines."""
    return re.findall("<!-- (.*?) -->", svg)


def test_a_label_looks_alike_in_all_panels_and_stands_once_in_the_legend(tmp_path):
    points = [(1.0, 0.2, 0.1, 0.3), (4.0, 0.5, 0.4, 0.6)]
    both = {"base": points, "COPSD": points}
    panels = [
        Panel("Hausa", "attempts k", "pass@k", both, log_x=True, y_range=(0, 1)),
        Panel("Swahili", "attempts k", "pass@k", {"COPSD": points}),
    ]
    paths = [tmp_path / "curves.png", tmp_path / "curves.svg"]
    curves_figure(panels, paths)
    svg = paths[1].read_text()
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    words = ("base", "COPSD", "Hausa", "attempts k", "4")
    assert [texts(svg).count(word) for word in words] == [1, 1, 1, 2, 1]
    # The second panel's only curve is not drawn in the first colour.
    base, copsd = (svg.count(f"stroke: {look.colour}") for look in LOOKS[:2])
    assert base > 0
    assert copsd > base


@pytest.mark.parametrize("form", ["png", "svg"])
def test_what_is_drawn_again_has_the_same_bytes(tmp_path, form):
    panels = [Panel("Hausa", "k", "pass@k", {"base": [(1.0, 0.2, 0.1, 0.3), (4.0, 0.5, 0.4, 0.6)]})]
    for name in ("first", "second"):
        curves_figure(panels, [tmp_path / f"{name}.{form}"])
    first, second = ((tmp_path / f"{name}.{form}").read_bytes() for name in ("first", "second"))
    assert first == second
    assert b"dc:date" not in first


def test_more_labels_than_colours_still_look_different(tmp_path):
    names = [f"run {place}" for place in range(2 * len(LOOKS))]
    curves = {name: [(float(x), 0.5, 0.4, 0.6) for x in (1, 2)] for name in names}
    curves_figure([Panel("", "k", "pass@k", curves)], [tmp_path / "many.svg"])
    svg = (tmp_path / "many.svg").read_text()
    lines = re.findall(r'fill: none; (stroke-dasharray[^"]*?; )?(?:[^"]*?)stroke: (#\w+)', svg)
    colours = {look.colour for look in LOOKS}
    assert len({line for line in lines if line[1] in colours}) == len(names)


@pytest.mark.parametrize("kind", ["bars", "marks"])
def test_no_two_of_twelve_labels_share_colour_marker_and_hatch(tmp_path, kind, monkeypatch):
    """Past the sixth label only the line changed, which neither a bar nor a mark has."""
    drawn = []
    name = {"bars": "_draw_bars", "marks": "_draw_marks"}[kind]
    draw = getattr(figures, name)

    def _draw(axes: Any, points: list[Point], look: Look, *others: Any) -> Any:
        drawn.append(look)
        return draw(axes, points, look, *others)

    monkeypatch.setattr(figures, name, _draw)
    curves = {f"run {place}": [(0.0, 0.5, 0.4, 0.6)] for place in range(12)}
    curves_figure([Panel("", "k", "pass@k", curves, kind=kind)], [tmp_path / "many.svg"])
    assert len({(look.colour, look.marker, look.hatch) for look in drawn}) == 12
    assert len({(look.colour, look.marker) for look in drawn}) == 12  # what a mark shows
    assert len({(look.colour, look.hatch) for look in drawn}) == 12  # what a bar shows


def kinds() -> dict[str, dict[str, Any]]:
    """Return, for each kind of panel, the arguments that it is made with beside its texts."""
    return {
        "lines": {"kind": "lines"},
        "bars": {"kind": "bars", "names": ("n$1$", "_n$2$")},
        "marks": {"kind": "marks", "names": ("n$1$", "_n$2$")},
    }


@pytest.mark.parametrize("kind", kinds())
def test_names_are_no_formulas_and_an_underscore_does_not_hide_them(tmp_path, kind):
    points: list[Point] = [(0.0, 0.2, 0.1, 0.3), (1.0, 0.5, 0.4, 0.6)]
    curves = {"_a$b_1$": points, "__$": points, r"c\$d$": points}
    shown = kinds()[kind]
    path = tmp_path / "names.svg"
    curves_figure([Panel("t$x$", "x$x$", "y$x$", curves, **shown)], [path])
    found = texts(path.read_text())
    assert [found.count(text) for text in ("t$x$", "x$x$", "y$x$", *curves)] == [1] * 6
    times = len(curves) if kind == "marks" else 1  # beside each label's marks, or once on the axis
    assert all(found.count(name) == times for name in shown.get("names", ()))


@pytest.mark.parametrize("form", ["png", "pdf", "svg"])
def test_letters_that_the_font_lacks_and_escape_codes_print_nothing(tmp_path, form, capfd):
    """Each was a warning on stderr, and the escape code went to the terminal as it was."""
    points = [(1.0, 0.2, 0.1, 0.3)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        panel = Panel("\x1b[31mred", "k", "日本", {"日本": points, "\x1b[31m\n": points})
        curves_figure([panel], [tmp_path / f"figure.{form}"])
    assert not warned and capfd.readouterr() == ("", "")
    if form == "svg":
        said = texts((tmp_path / "figure.svg").read_text(encoding="utf-8"))
        assert r"\x1b[31mred" in said and "日本" in said


def test_a_figure_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a panel with a curve"):
        curves_figure([Panel("", "", "", {})], [tmp_path / "none.png"])
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_by_the_functions_that_draw_and_nowhere_else():
    importing = re.compile(r"^\s*(from|import) matplotlib\b", flags=re.MULTILINE)
    root = Path(__file__).resolve().parent.parent
    for path in [*root.glob("*.py"), *(root / "parts").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        outside = [node for node in ast.parse(text).body if not isinstance(node, ast.FunctionDef)]
        assert not any("matplotlib" in ast.unparse(node) for node in outside)
        assert bool(importing.search(text)) == (path.name == "figures.py"), path.name
