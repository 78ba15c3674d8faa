"""A report's figures, tables and page: the numbers survive, no name or completion breaks them."""

import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parts import report
from parts.metrics import Estimate
from parts.report import (
    Evaluation,
    latex_table,
    markdown_table,
    report_figures,
    report_tables,
    write_report,
)
from parts.tables import text_table


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1)


def test_markdown_has_a_header_and_a_row_each():
    assert markdown_table(["a", "b"], [["1", "2"]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
    ]


EVIL = (
    "</script><script>document.title = 'broken'</script> <b>\"bold\"</b> 'quoted' &lt; \\ "
    "@DATA@ \u2028 \ud800 end"
)


def attempt(reason: str, completion: str, tokens: int = 20) -> dict[str, Any]:
    answer = None if reason == "no box" else "18"
    return {
        "completion": completion,
        "answer": answer,
        "canonical": answer,
        "lenient": "18",
        "correct": reason == "right",
        "lenient_correct": False,
        "reason": reason,
        "tokens": tokens,
        "finish_reason": "stop",
        "language": "hau",
        "seed": 7,
    }


def evaluation(name: str, lang: str, rights: tuple[int, int]) -> Evaluation:
    """Return two problems with two attempts each, so many of them right.

    A wrong attempt at the first problem has no box, one at the second has one.
    """
    problems = []
    for place, right in enumerate(rights):
        wrong = attempt("no box", EVIL, 40) if place == 0 else attempt("wrong", r"\boxed{18}")
        attempts = [attempt("right", rf"{name}: \boxed{{18}}")] * right + [wrong] * (2 - right)
        problem = {
            "id": f"{lang}-{place}",
            "problem": f"Mangwaro {place}?",
            "gold": "18",
            "level": None,
        }
        problems.append({**problem, "attempts": attempts})
    share = sum(rights) / 4
    return Evaluation(
        name,
        {"lang": lang, "samples": 2},
        problems,
        {"format rate": estimate(0.75), "mean tokens": estimate(25.0)},
        {1: estimate(share), 2: estimate(min(1.0, share + 0.25))},
    )


def two_runs() -> list[Evaluation]:
    return [
        evaluation("base", "hau", (0, 1)),
        evaluation("base", "swa", (1, 1)),
        evaluation("COPSD", "hau", (2, 2)),
        evaluation("COPSD", "swa", (1, 2)),
    ]


def cells(table) -> list[list[str]]:
    return [[str(text) for text in column.cells] for column in table.columns]


def test_a_report_has_a_table_per_language_and_the_mean_over_languages():
    hausa, swahili, first, second = report_tables(two_runs())
    titles = [str(table.title) for table in (hausa, swahili, first, second)]
    assert titles == ["hau", "swa", "pass@1", "pass@2"]
    assert cells(hausa)[1] == ["0.750 [0.650, 0.850]", "25.0 [24.9, 25.1]"]
    assert cells(first)[0] == ["hau", "swa", "mean of languages"]
    own = ["0.250 [0.150, 0.350]", "0.500 [0.400, 0.600]"]
    # Shares of 0 and 1/2 in one language and 1/2 in the other, resampled alike.
    assert cells(first)[1] == [*own, "0.375 [0.250, 0.500]"]
    assert len(report_tables([evaluation("base", "hau", (0, 1))])) == 1


@pytest.mark.parametrize(
    "kept", [[0, 1, 2], [0, 1, 1], []], ids=["a language lacks", "the same twice", "nothing"]
)
def test_a_report_of_an_incomplete_grid_is_refused(kept, tmp_path):
    message = r"every run in every language, once; got (base in hau, base in swa|no run)"
    with pytest.raises(ValueError, match=message):
        write_report([two_runs()[place] for place in kept], [], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_markup_in_names_stays_text_in_every_format():
    table = text_table("runs/a_b", ["metric", "[bold]50%_a|b"], [[r"\x^2~{$#&}", "[red]1"]])
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    assert "[bold]50%_a|b" in stream.getvalue() and "[red]1" in stream.getvalue()
    assert latex_table(table).splitlines()[3:6:2] == [
        r"metric & [bold]50\%\_a|b \\",
        r"\textbackslash{}x\textasciicircum{}2\textasciitilde{}\{\$\#\&\} & [red]1 \\",
    ]
    assert markdown_table(["a|b"], []).splitlines()[0] == r"| a\|b |"


def test_figures_hold_the_numbers():
    figures = report_figures(two_runs())
    assert list(figures) == ["pass-at-k", "languages", "scatter", "format", "lengths"]
    assert figures["pass-at-k"][1].title == "swa"
    assert figures["pass-at-k"][1].curves["COPSD"][0][:2] == (1, 0.75)
    assert [point[:2] for point in figures["languages"][0].curves["base"]] == [(0, 0.25), (1, 0.5)]
    assert figures["scatter"][0].curves["COPSD against base"] == [(0, 1, 1, 1), (0.5, 1, 1, 1)]
    marks = figures["format"][0].curves["COPSD"]
    assert [mark[:2] for mark in marks] == [(0.75, 1.0), (0.75, 0.75)]
    assert figures["format"][0].slope == pytest.approx((0.25 + 0.5) / (0.75 + 0.75))
    shares = {x: share for x, share, _, _ in figures["lengths"][0].curves["base"] if share}
    assert shares == {21.0: 0.5, 41.0: 0.5}  # bins of 2 tokens: at most 31 of them
    assert "scatter" not in report_figures([evaluation("base", "hau", (0, 1))])


def test_equal_problems_lie_side_by_side_in_the_scatter():
    runs = [evaluation("base", "hau", (1, 1)), evaluation("COPSD", "hau", (2, 2))]
    one, other = report_figures(runs)["scatter"][0].curves["COPSD against base"]
    assert one[:2] == (0.5, 1)
    assert 0.01 < math.dist(one[:2], other[:2]) < 0.1


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    tests = [text_table("paired tests", ["metric", "p"], [["pass@1", "0.0123"]])]
    paths = write_report(two_runs(), tests, out)
    assert sorted(paths) == sorted(out.iterdir())
    assert len(paths) == 14
    return out


def test_every_format_holds_every_table(written):
    for name in ("report.html", "report.md", "report.tex"):
        text = (written / name).read_text(encoding="utf-8")
        assert all(part in text for part in ("0.250 [0.150, 0.350]", "mean of languages", "0.0123"))
    markdown = (written / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert len(pictures) == 5
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    rows = list(csv.DictReader((written / "report.csv").open(encoding="utf-8", newline="")))
    assert len(rows) == 4 * 4
    assert rows[0] == {
        "run": "base",
        "language": "hau",
        "metric": "pass@1",
        "value": "0.25",
        "low": "0.15",
        "high": "0.35",
    }


def test_the_page_holds_its_data_whatever_the_completions_say(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    (embedded,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL
    )
    found = json.loads(embedded)["runs"][0]["problems"][0]["attempts"][0]["completion"]
    assert found == EVIL.replace("\ud800", "?")  # half a surrogate pair is no text
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count(embedded) == 1
    loads = r"""(src|href)=|url\(|import\s*\(|fetch\("""
    assert not re.search(loads, page.replace(embedded, ""))  # it opens from disk, without a network


USER = """<script>
const element = id => document.getElementById(id);
const view = () => [element("count").textContent, element("problems").innerHTML];
const views = [view()].concat(CASES.map(filters => {
  form.reset();
  for (const name of Object.keys(filters)) {
    form.elements[name][name === "open" ? "checked" : "value"] = filters[name];
  }
  form.dispatchEvent(new Event("input"));
  return view();
}));
document.body.replaceChildren(make("pre", {}, JSON.stringify([document.title, views])));
</script></body>"""


# Filters, count, what is shown, what is not; those of the first are in the address.
CASES = [
    (
        {},
        "1 of 4 problems, completions: 2",
        ["✗ no box", "lenient reading: 18", "&lt;b&gt;"],
        ["✗ wrong", "<b>"],
    ),
    (
        {"open": True},
        "4 of 4 problems, completions: 16",
        ["✗ no box", "✗ wrong", "✓ right"],
        [],
    ),
    (
        {},
        "4 of 4 problems, completions: 16",
        ["hau-0", "base: 0/2 right", "swa-1"],
        ["✗ no box"],
    ),
    (
        {"verdict": "not right", "run": "COPSD"},
        "1 of 4 problems, completions: 1",
        ["swa-0"],
        ["swa-1", "hau-0"],
    ),
    (
        {"text": "copsd:", "open": True},
        "4 of 4 problems, completions: 7",
        ["<mark>COPSD:</mark>"],
        ["✗"],
    ),
    (
        {"text": "MANGWARO 1", "run": "base"},
        "2 of 4 problems, completions: 4",
        ["hau-1", "swa-1"],
        ["hau-0"],
    ),
    ({"solved": "some"}, "1 of 4 problems, completions: 4", ["hau-0"], ["swa-0"]),
    ({"text": "nowhere"}, "No completion passes these filters.", [], ["class"]),
]


def test_a_browser_shows_the_filtered_problems_with_their_verdicts(written, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium")
    page = tmp_path / "page.html"
    user = USER.replace("CASES", json.dumps([filters for filters, *_ in CASES[1:]]))
    text = (written / "report.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", user), encoding="utf-8")
    address = f"{page.as_uri()}#lang=hau&verdict=no+box&open=on"
    flags = [
        "--no-sandbox",
        "--headless",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    found = subprocess.run(
        [browser, *flags, "--dump-dom", address], capture_output=True, text=True, check=True
    )
    title, views = json.loads(html.unescape(found.stdout.split("<pre>")[1].split("</pre>")[0]))
    assert title == "Evaluation report"
    for (count, problems), (filters, expected, shown, absent) in zip(views, CASES, strict=True):
        assert count == expected, filters
        assert all(text in problems for text in shown), filters
        assert not any(text in problems for text in absent), filters


def test_a_page_is_as_long_as_its_bytes_are(tmp_path, monkeypatch):
    """Letters of completions were counted: in many scripts a page was three times as long."""
    found = two_runs()
    for e in found:
        for problem in e.problems:
            problem["problem"] = "ቁጥር" * 1000
    bare = len(report.PAGE.read_bytes())
    texts = [json.dumps(p, ensure_ascii=False) for e in found for p in e.problems]
    rows = sum(len(text.encode(errors="replace")) for text in texts)
    monkeypatch.setattr(report, "PAGE_BYTES", rows // 2)
    paths = write_report(found, [], tmp_path)
    pages = [path for path in paths if path.suffix == ".html"]
    assert len(pages) > 1
    # Beside the rows a page holds no more than the settings; the first has the figures, too.
    assert all(path.stat().st_size < bare + rows // 2 + 4000 for path in pages[1:])


def test_very_many_completions_are_paged_with_all_attempts_at_a_problem_on_one(
    tmp_path, monkeypatch
):
    found = two_runs()
    whole = write_report(found, [], tmp_path / "whole")
    assert [path.name for path in whole if path.suffix == ".html"] == ["report.html"]
    monkeypatch.setattr("parts.report.PAGE_BYTES", 1)
    paths = write_report(found, [], tmp_path / "paged")
    pages = [path for path in paths if path.suffix == ".html"]
    assert len(pages) > 1 and all(path.is_file() for path in pages)
    seen: list[tuple[str, str]] = []
    for number, page in enumerate(pages):
        text = page.read_text(encoding="utf-8")
        embedded = text.split('id="data">', 1)[1].split("</script>", 1)[0]
        data = json.loads(embedded)
        assert data["page"] == number and data["pages"] == [path.name for path in pages]
        assert bool(data["tables"]) == (number == 0)
        here = {(r["settings"]["lang"], p["id"]) for r in data["runs"] for p in r["problems"]}
        assert len(here) == 1
        seen += here
    assert sorted(seen) == sorted(
        {(e.settings["lang"], p["id"]) for e in found for p in e.problems}
    )
