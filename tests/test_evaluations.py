"""parts/evaluations.py: finished evaluations are read back, checked, and compared in a report."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parts import commands, metrics
from parts.chat import freeze_date
from parts.evaluations import Finished, differing_rows, load_evaluations
from parts.files import json_lines, read_json, read_rows, read_sealed, write_sealed
from parts.model import load_tokenizer
from parts.prompts import template_hash
from parts.tables import cell


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.evaluation, list(arguments))


@pytest.fixture
def two_evaluations(tmp_path) -> tuple[str, str]:
    for name, flags in {"warm": [], "cool": ["--temperature", "0.3"]}.items():
        result = run_cli(
            "--lang",
            "hau,swa",
            *flags,
            "--pass-at-k",
            "2",
            "--limit",
            "6",
            "--out",
            str(tmp_path / name),
        )
        assert result.exit_code == 0, result.output
    return str(tmp_path / "warm"), str(tmp_path / "cool")


def finished(folder: str) -> dict[str, Finished]:
    """Return what --out wrote, by language."""
    loaded = load_evaluations(Path(folder), folder)
    return {found.record["settings"]["lang"]: found for found in loaded}


def test_report_compares_evaluations_and_writes_its_files(tmp_path, two_evaluations):
    result = run_cli("report", *two_evaluations, "--out", str(tmp_path / "report"))
    assert result.exit_code == 0, result.output
    assert "Paired tests over problems" in result.stdout
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000
    pair = [finished(folder)["swa"].results for folder in two_evaluations]
    change, p_value, _ = metrics.paired_tests(*pair)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert f"{cell('pass@1', change)} | {p_value:.3g}" in text
    assert cell("pass@1", change) in result.stdout  # whole: in a pipe it was on three lines
    assert run_cli("report", two_evaluations[0], "--out", str(tmp_path / "one")).exit_code == 0


def test_evaluations_that_were_asked_on_different_days_are_said_to_differ(tmp_path, lab_folder):
    model = tmp_path / "dated"
    shutil.copytree(lab_folder, model)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    flags = ["--model", str(model), "--benchmark", "lab", "--greedy", "--limit", "2", "--out"]
    folders = [str(tmp_path / name) for name in ("today", "then")]
    for folder in folders:
        assert run_cli(*flags, folder).exit_code == 0
    report = ["report", *folders, "--out", str(tmp_path / "report")]
    assert "The prompts differ" not in run_cli(*report).stdout
    # The second is made an evaluation of another day, and goes on with that day.
    record = read_sealed(Path(folders[1]) / "settings.json")
    day = record["identity"]["template_date"]
    then, _ = freeze_date(load_tokenizer(model), "2025-01-09")
    changed = {"template_date": "2025-01-09", "prompt_template": template_hash(then, "hau")}
    record["identity"].update(changed)
    write_sealed(Path(folders[1]) / "settings.json", record)
    (Path(folders[1]) / "problems.jsonl").unlink()
    assert run_cli(*flags, folders[1]).exit_code == 0
    rows = [read_rows(Path(folder) / "problems.jsonl")[0] for folder in folders]
    assert rows[0]["prompt_hash"] != rows[1]["prompt_hash"]
    said = run_cli(*report).stdout
    assert "The prompts differ" in said and "2025-01-09" in said and day in said
    assert "2025-01-09" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_runs_that_were_sampled_differently_are_said_to_be(tmp_path, two_evaluations):
    report = ["report", *two_evaluations, "--out", str(tmp_path / "report")]
    said = run_cli(*report).stdout
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    rows = [f"| {code} | temperature | warm: 1.0, cool: 0.3 |" for code in ("hau", "swa")]
    assert "## These runs were made differently" in text
    assert all(row in text for row in rows) and text.count("warm: ") == 2
    assert "These runs were made differently" in said and "warm: 1.0, cool: 0.3" in said
    # Another seed is no other way of sampling; another dtype is one.
    first = finished(two_evaluations[0])["hau"]
    settings = first.record["settings"] | {"seed": 9}
    identity = first.record["identity"] | {"dtype": "bfloat16"}
    versions = first.record["versions"] | {"torch": "2.0"}
    changed = {"settings": settings, "identity": identity, "versions": versions, "threads": 77}
    other = replace(first, record=first.record | changed)
    name = first.view.name
    assert [row[1] for row in differing_rows("hau", first, other)] == ["dtype", "torch", "threads"]
    row = ["hau", "dtype", f"{name}: float32, {name}: bfloat16"]
    assert differing_rows("hau", first, other)[0] == row


def test_a_report_never_writes_into_what_it_reads(two_evaluations):
    first, second = two_evaluations
    for out in (second, f"{second}/report"):
        result = CliRunner().invoke(commands.evaluation, ["report", first, second, "--out", out])
        said = f"error: --out {out} is in the evaluation {second}; choose another --out\n"
        assert (result.exit_code, result.stderr) == (2, said)
        assert not Path(second, "report").exists()


def test_the_reports_curve_holds_every_k(two_evaluations):
    found = finished(two_evaluations[0])["hau"]
    summary = read_json(Path(two_evaluations[0]) / "hau" / "summary.json")
    assert list(found.view.pass_at_k) == [1, 2]
    assert asdict(found.view.pass_at_k[2]) == summary["pass@2"]
    assert {name: asdict(each) for name, each in found.view.summary.items()} == summary
    assert [asdict(each) for each in found.results] == found.view.problems
    assert found.record["settings"] == found.view.settings


def test_what_cannot_be_compared_is_refused(tmp_path, two_evaluations):
    def said(*folders: str) -> str:
        result = run_cli("report", *folders, "--out", str(tmp_path / "report"))
        assert result.exit_code == 2 and result.stderr.count("\n") == 1
        assert not (tmp_path / "report").exists()
        return result.stderr

    first, second = two_evaluations
    run_cli("--lang", "hau", "--greedy", "--limit", "5", "--out", str(tmp_path / "fewer"))
    assert "are of different problems in hau" in said(first, str(tmp_path / "fewer"))
    other = ["--benchmark", "lab", "--lang", "eng", "--greedy", "--limit", "5"]
    run_cli(*other, "--out", str(tmp_path / "other"))
    assert "are of different benchmarks: lab, lab/problems" in said(first, str(tmp_path / "other"))
    assert "holds no evaluation" in said(first, str(tmp_path / "nowhere"))
    (Path(second) / "swa" / "summary.json").unlink()
    assert "swa is not finished" in said(first, second)


def test_verdicts_that_are_not_those_of_the_summary_are_refused(tmp_path, two_evaluations):
    """Without digests, a table of the one and a figure of the other were drawn."""
    out = Path(shutil.copytree(two_evaluations[0], tmp_path / "edited"))
    rows = read_rows(out / "swa" / "problems.jsonl")
    for attempt in rows[0]["attempts"]:
        attempt["correct"] = not attempt["correct"]
    (out / "swa" / "problems.jsonl").write_text(json_lines(rows), encoding="utf-8")
    (out / "swa" / "digests.json").unlink()
    result = run_cli("report", str(out), "--out", str(tmp_path / "report"))
    assert result.exit_code == 2 and "summary.json has a pass@1 of" in result.stderr, result.output


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "{"),
        ("settings.json", "[]"),
        ("settings.json", '{"settings": {"lang": "hau"}, "identity": {}}'),
        ("summary.json", "3"),
        ("summary.json", '{"pass@1": {"value": 1}}'),
        ("summary.json", '{"pass@1": 0.5}'),
        ("problems.jsonl", '{"id": "0"}\n'),
        ("problems.jsonl", "7\n"),
    ],
)
def test_a_damaged_evaluation_is_one_line_that_names_the_file(tmp_path, name, content):
    out = tmp_path / "base"
    assert run_cli("--greedy", "--limit", "1", "--out", str(out)).exit_code == 0
    (out / name).write_text(content)
    commands_to_try = [["report", str(out), "--out", str(tmp_path / "report")]]
    if name == "problems.jsonl":  # the others are written anew, or belong to another evaluation
        commands_to_try.append(["--greedy", "--limit", "1", "--out", str(out)])
    for arguments in commands_to_try:
        result = run_cli(*arguments)
        assert result.exit_code == 2 and name in result.stderr, result.output
        assert result.stderr.count("\n") == 1
