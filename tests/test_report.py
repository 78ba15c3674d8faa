"""What people look at: the numbers survive the layout."""

import io
import re

import pytest
from rich.console import Console

from parts.report import (
    COLUMNS,
    LOOKS,
    Panel,
    SamplingProgress,
    StepView,
    _look,
    cell,
    cell_of_seeds,
    curves_figure,
    estimates_table,
    gap_figure,
    markdown_table,
)

METRICS = {
    name: 0.25 for title, (name, _) in COLUMNS.items() if title not in ("objective", "reward", "dead", "ratio max")
}


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_without_a_terminal_a_step_is_one_line():
    stream = io.StringIO()
    with StepView(Console(file=stream, width=40), steps=3) as view:
        view.show({**METRICS, "step": 1, "progress": 1 / 3})
        view.show({**METRICS, "step": 2, "progress": 2 / 3})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[1].startswith("step 2/3  loss +0.2500  KL 0.2500  clipped 25%")


def test_with_a_budget_of_tokens_the_share_of_it_is_shown():
    stream = io.StringIO()
    with StepView(Console(file=stream), steps=None) as view:
        view.show({"step": 7, "progress": 0.31, "reward/mean": 0.5, "loss/kl_nats_per_token": None})
    assert stream.getvalue() == "step 7, 31%  reward 0.500\n"


def test_on_a_terminal_the_last_steps_and_the_bar_are_shown():
    stream = io.StringIO()
    with StepView(Console(file=stream, width=120, force_terminal=True), steps=40) as view:
        for step in range(1, 31):
            view.show({**METRICS, "step": step, "progress": step / 40})
    last = stream.getvalue().rsplit("student H", 1)[1]
    assert "step 30/40" in last and "19" in last and " 18 " not in last


def test_progress_says_how_much_was_sampled():
    stream = io.StringIO()
    with SamplingProgress(Console(file=stream), "before") as progress:
        progress.update(3, 8, 99)
    assert stream.getvalue().startswith("before: 3/8 completions, 99 tokens")


def test_cells_show_value_and_interval_and_nothing_where_there_is_nothing():
    assert cell("pass@1", {"value": 0.3, "low": 0.25, "high": 0.351}) == "0.300 [0.250, 0.351]"
    assert cell("mean tokens", {"value": 26.04, "low": 25.0, "high": 27.0}) == "26.0 [25.0, 27.0]"
    assert cell("pass@1", dict.fromkeys(("value", "low", "high"), float("nan"))) == "-"
    assert cell_of_seeds("pass@1", [estimate(0.2), estimate(0.4)]) == "0.300 (0.200, 0.400)"


def test_a_table_of_two_columns_fits_a_narrow_terminal():
    stream = io.StringIO()
    summary = {"KL to the teacher, nats/token": estimate(0.5), "accuracy given a box": estimate(0.25)}
    Console(file=stream, width=80).print(estimates_table("Hausa", {"before": summary, "after": summary}))
    assert stream.getvalue().count("0.500 [0.400, 0.600]") == 2 and "KL to the teacher, nats/token" in stream.getvalue()


def test_markdown_has_a_header_and_a_row_each():
    assert markdown_table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_the_figure_is_written_in_both_formats(tmp_path):
    evaluation = {code: {"greedy accuracy": estimate(0.5)} for code in ("hau", "eng")}
    paths = [tmp_path / "gap.png", tmp_path / "gap.svg"]
    gap_figure({"hau": {"before": [evaluation], "after": [evaluation]}}, ["Hausa"], paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG") and "<svg" in paths[1].read_text()


def texts(svg: str) -> list[str]:
    """Return the words that matplotlib drew: it writes each in a comment before its outlines."""
    return re.findall("<!-- (.*?) -->", svg)


def test_a_label_looks_alike_in_all_panels_and_stands_once_in_the_legend(tmp_path):
    points = [(1.0, 0.2, 0.1, 0.3), (4.0, 0.5, 0.4, 0.6)]
    panels = [
        Panel("Hausa", "attempts k", "pass@k", {"base": points, "COPSD": points}, log_x=True, y_range=(0, 1)),
        Panel("Swahili", "attempts k", "pass@k", {"COPSD": points}),
    ]
    paths = [tmp_path / "curves.png", tmp_path / "curves.svg"]
    curves_figure(panels, paths)
    svg = paths[1].read_text()
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert [texts(svg).count(word) for word in ("base", "COPSD", "Hausa", "attempts k", "4")] == [1, 1, 1, 2, 1]
    base, copsd = (svg.count(f"stroke: {colour}") for colour, _, _ in LOOKS[:2])
    assert base > 0 and copsd > base  # the second panel's only curve is not drawn in the first colour


def test_more_labels_than_colours_still_look_different():
    assert len({_look(place) for place in range(4 * len(LOOKS))}) == 4 * len(LOOKS)


def test_a_figure_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a panel with a curve"):
        curves_figure([Panel("", "", "", {})], [tmp_path / "none.png"])
