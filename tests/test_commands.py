"""parts/commands.py: the command lines answer at once, and say in one line what is wrong."""

import os
import subprocess
import sys
from dataclasses import asdict, fields
from typing import Any

import pytest
from conftest import ROOT, few_flags
from typer.testing import CliRunner

import compare
import eval as evaluator
import methods
import show
from parts import commands, evaluations
from parts.benchmarks import BENCHMARKS, has_language
from parts.experiments import ATTRIBUTION, FAMILY
from parts.files import write_json
from parts.prompts import languages
from parts.recipe import OWN_SETTINGS, CompareConfig, Config, EvalConfig

APPS = {"copsd": commands.copsd, "eval": commands.evaluation, "compare": commands.comparison}
CONFIGS = {
    "copsd train": Config,
    "copsd show": Config,
    "compare": CompareConfig,
    "eval": EvalConfig,
}
# Runs a program as `python PROGRAM ARGUMENTS` does, and says which slow packages it loaded.
LISTENER = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code
slow = ("torch", "transformers", "numpy", "matplotlib", "pyarrow")
print("loaded:", *(name for name in slow if name in sys.modules))
sys.exit(code)
"""
SMALL = ["--eval-problems", "0", "--steps", "1", "--batch-size", "2", "--max-new-tokens", "8"]


def run_cli(command: str, *arguments: str):
    """Run "copsd train", "eval" and so on in this process, on a wide terminal."""
    program, *subcommand = command.split()
    wide = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}
    return CliRunner().invoke(APPS[program], [*subcommand, *arguments], env=wide)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("copsd.py --help", 0, "languages"),
        ("copsd.py train --help", 0, "--lora-rank"),
        ("copsd.py show --help", 0, "--html"),
        ("copsd.py languages", 0, "Hausa"),
        ("copsd.py compare --lang hau", 2, "python compare.py"),
        ("copsd.py train --lerning-rate 1", 2, "No such option"),
        ("copsd.py train --lr fast", 2, "Invalid value"),
        ("copsd.py train --steps 1.5", 2, "Invalid value"),
        ("copsd.py train --steps 1_0", 2, "'1_0' is not a valid integer"),
        ("copsd.py train --lr 1_0", 2, "'1_0' is not a valid float"),
        ("copsd.py plan --gpu ٢٤", 2, "is not a valid float"),
        ("copsd.py plan --prompt-tokens 2_0", 2, "is not a valid integer"),
        ("copsd.py tarin", 2, "No such command"),
        ("eval.py --help", 0, "--pass-at-k"),
        ("eval.py report --help", 0, "--out"),
        ("eval.py --pass-at 8", 2, "No such option"),
        ("eval.py --limit many", 2, "Invalid value"),
        ("eval.py --samples ٤", 2, "is not a valid integer"),
        ("compare.py --help", 0, "--ablate"),
        ("compare.py --seed-s 3", 2, "No such option"),
        ("compare.py --dev-problems x", 2, "Invalid value"),
    ],
)
def test_what_needs_no_model_loads_no_slow_package(tmp_path, command, code, said):
    program, *arguments = command.split()
    result = subprocess.run(
        [sys.executable, "-c", LISTENER, str(ROOT / program), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TERMINAL_WIDTH": "200"},
    )
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert said in output and "Traceback" not in output
    assert result.stdout.splitlines()[-1] == "loaded:"
    if code:
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_listener_hears_what_a_working_command_loads(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LISTENER, str(ROOT / "copsd.py"), "train", "--model", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 2 and "torch transformers" in result.stdout


def test_the_lines_where_a_program_starts_stand_above_its_slow_imports():
    for name in APPS:
        lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
        start = lines.index('if __name__ == "__main__":')
        imports = [line for line in lines[:start] if line.startswith(("import ", "from "))]
        assert imports == []
        assert lines[start + 2 : start + 7] == [
            "    from parts import heap, stops",  # which import nothing slow
            "",
            "    heap.restart_with_joined_holes()",
            "    stops.say_stops()",
            "    from parts import commands",
        ]


@pytest.mark.parametrize("command", CONFIGS)
def test_every_setting_is_a_flag_with_its_help_under_its_heading(command):
    text = run_cli(command, "--help").output
    for f in fields(CONFIGS[command]):
        if command == "copsd show" and f.name not in commands.SHOWN:
            continue  # what a walk through one problem does not depend on
        flag = "--" + f.name.replace("_", "-")
        if command == "compare" and f.name in OWN_SETTINGS:
            assert f"{flag} " not in text, flag  # it is refused, and tests/test_compare.py sees it
            continue
        assert f"{flag} " in text, flag
        assert commands.help_text(f).split(". ")[0][:60] in text, flag
        assert f.metadata["section"] in text


def test_the_comparisons_help_is_of_the_comparison():
    """It was a run's: one language, the run's folder, and nothing of the budget."""
    text = " ".join(run_cli("compare", "--help").output.split())
    assert "what --steps of COPSD sample at the base's mean length" in text
    assert "The same command goes on with a comparison that was stopped" in text
    assert "codes, separated by commas" in text and "runs/METHOD" not in text
    assert "--family and --attribute: 30." in text and "grpo 500" not in text
    assert ATTRIBUTION.steps == FAMILY.steps == 30


def test_languages_are_all_listed_with_codes_and_benchmarks():
    lines = [line.rstrip() for line in run_cli("copsd languages").output.splitlines()]
    assert len(lines) == 1 + len(languages())
    for line, language in zip(lines[1:], languages().values(), strict=True):
        codes = line.split()[:2]
        assert codes == [language.iso3, language.iso1 or "-"]
        held = [name for name in BENCHMARKS if has_language(name, asdict(language))]
        assert language.own in line and line.endswith(f" {', '.join(held)}")
    # It listed no benchmark for English, and PolyMath alone for German.
    assert lines[1 + [*languages()].index("eng")].endswith("lab, afrimgsm, mgsm, msvamp, polymath")


@pytest.mark.parametrize("command", ["copsd train", "copsd show"])
def test_a_command_gets_the_flags_that_were_typed_and_no_others(monkeypatch, command):
    received: list[dict[str, Any]] = []

    def listening(given: dict[str, Any]):
        received.append(given)
        raise ValueError("that is all")

    monkeypatch.setattr("parts.setup.configure", listening)
    typed = ["--beta", "0.5", "--no-english-problem", "--top-k", "0"]
    assert run_cli(command, *typed).exit_code == 2
    assert run_cli(command).exit_code == 2
    # 0.5 is the default, and was typed all the same: it goes before a recipe's value.
    expected = {"beta": 0.5, "english_problem": False, "top_k": 0}
    assert received == [expected, {}]


def test_compare_says_where_it_went():
    for arguments in ([], ["--lang", "hau", "--seeds", "3"], ["--ablate"], ["anything"]):
        result = run_cli("copsd compare", *arguments)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and "python compare.py" in result.stderr
    assert "compare" not in run_cli("copsd", "--help").output


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("copsd train", ["--model", "nowhere"], "unknown model 'nowhere'"),
        ("copsd train", ["--lang", "xyz"], "unknown language 'xyz'"),
        ("copsd train", ["--lr", "nan"], "--lr is nan; valid: 0 or more"),
        ("copsd train", ["--lr", "-1"], "--lr is -1"),
        ("copsd train", ["--divergence", "l2"], "unknown divergence 'l2'; valid: forward_kl"),
        ("copsd train", ["--method", "ppo"], "unknown method 'ppo'; valid: copsd, grpo"),
        ("copsd train", ["--data", "nowhere.jsonl"], "no data file nowhere.jsonl"),
        ("copsd train", ["--data", "README.md"], "unknown extension '.md'"),
        ("copsd train", ["--device", "abacus"], "no device 'abacus'"),
        ("copsd train", ["--dtype", "int3"], "unknown dtype 'int3'"),
        ("copsd train", ["--lora-targets", "nose"], "LoRA target 'nose' matches no layer"),
        ("copsd train", ["--max-new-tokens", "9999"], "no problem fits the model's context"),
        ("copsd show", ["--model", "nowhere"], "unknown model 'nowhere'"),
        ("copsd show", ["--adapter", "nowhere"], "neither an adapter folder nor a run folder"),
        ("copsd show", ["--temperature", "0"], "--temperature is 0"),
        ("eval", ["--top-p", "nan"], "--top-p is nan"),
        ("compare", ["--lr", "inf"], "--lr is inf"),
        ("eval report", ["nowhere"], "nowhere holds no evaluation"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, command, flags, said):
    takes_model = command != "eval report" and "--model" not in flags
    model = ["--model", str(ROOT / "lab" / "tiny")] if takes_model else []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("words")
    result = run_cli(command, *model, *flags)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and "Traceback" not in result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_broken_weights_and_broken_json_are_bad_input(tmp_path):
    for name, said in (("config.json", "config.json"), ("model.safetensors", "error: ")):
        model = tmp_path / f"without {name}"
        model.mkdir()
        for file in (ROOT / "lab" / "tiny").iterdir():
            (model / file.name).symlink_to(file)
        (model / name).unlink()
        (model / name).write_bytes(b"{")
        result = run_cli("eval", "--model", str(model), "--benchmark", "lab", "--limit", "1")
        assert result.exit_code == 2 and said in result.stderr, result.output
        assert result.stderr.count("\n") == 1


def a_bug(*arguments: Any, **options: Any):
    raise ValueError("a bug")


def test_a_bug_after_loading_shows_its_traceback(tmp_path, monkeypatch):
    for method in methods.LOOPS:
        monkeypatch.setitem(methods.LOOPS, method, a_bug)
    monkeypatch.setattr(evaluator, "evaluate", a_bug)
    monkeypatch.setattr(show, "walk", a_bug)
    monkeypatch.setattr(compare, "measure_arm", lambda *arguments, **options: a_bug())
    compared = ["--eval-problems", "2", "--dev-problems", "2", "--token-budget", "4096"]
    compared += few_flags()
    for command, flags in {
        "copsd train": [*SMALL, *few_flags(), "--out", str(tmp_path / "run")],
        "copsd show": [],
        "eval": ["--limit", "1"],
        "compare": [*compared, "--out", str(tmp_path / "compare")],
    }.items():
        result = run_cli(command, *flags)
        assert isinstance(result.exception, ValueError), command
        assert str(result.exception) == "a bug" and result.exit_code == 1
        assert "error:" not in result.stderr


def test_a_bug_in_drawing_a_report_shows_its_traceback(tmp_path, monkeypatch):
    out = tmp_path / "base"
    assert run_cli("eval", "--greedy", "--limit", "2", "--out", str(out)).exit_code == 0
    monkeypatch.setattr(evaluations, "write_report", a_bug)
    result = run_cli("eval report", str(out), "--out", str(tmp_path / "report"))
    assert isinstance(result.exception, ValueError) and str(result.exception) == "a bug"


def test_a_report_that_cannot_be_written_is_bad_input(tmp_path):
    out = tmp_path / "base"
    assert run_cli("eval", "--greedy", "--limit", "2", "--out", str(out)).exit_code == 0
    (tmp_path / "file").write_text("mine")
    result = run_cli("eval report", str(out), "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_paths_of_the_user_are_not_read_as_markup(tmp_path):
    folder = tmp_path / "[red]x"
    folder.mkdir()
    write_json(folder / "other.json", {})
    result = run_cli("eval", "--limit", "1", "--out", str(folder))
    assert result.exit_code == 2 and "[red]x exists and is not a run folder" in result.stderr


def test_what_the_user_named_is_printed_as_it_was_typed(tmp_path, monkeypatch):
    name = "ev[/x][hau-0][bold]:smile:"  # an end without a beginning, a tag, a style, an emoji
    # In a folder without lab/tiny, too: the default model stands beside the program.
    monkeypatch.chdir(tmp_path)
    result = run_cli("eval", "--greedy", "--limit", "1", "--out", name)
    assert result.exit_code == 0, result.output
    assert f"completions, verdicts and settings: {name}\n" in result.stdout
    result = run_cli("eval report", name, "--out", f"{name} report")
    assert result.exit_code == 0, result.output
    assert f"report: {name} report/report.html" in result.stdout and name in result.stdout
    result = run_cli("copsd train", *SMALL, "--out", f"run {name}")
    assert result.exit_code == 0, result.output
    assert f"into run {name}\n" in result.stdout
