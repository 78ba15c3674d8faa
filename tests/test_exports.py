"""Data for other trainers: what they tokenise is what is trained on here."""

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import few_problems
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bench import trl_sdft
from parts import commands
from parts.chat import freeze_date
from parts.data import load_problems
from parts.exports import FIXED_THERE, PASSED_ON, _as_tokenised_later, lost_settings
from parts.model import load_tokenizer
from parts.prompts import build_prompt
from parts.recipe import Config


def test_trl_reads_the_ids_that_are_trained_on(tmp_path, lab_folder):
    file = tmp_path / "hau.jsonl"
    flags = ["export-data", "--format", "trl", "--lang", "hau", "--file", str(file)]
    result = CliRunner().invoke(commands.copsd, flags)
    assert result.exit_code == 0, result.output
    # The short name "lab/tiny" is for our programs only.
    printed = " ".join(result.stdout.split())
    # What the script has flags for is passed on, and what it has none for is said.
    passed = "--steps 60 --batch-size 64 --micro-batch 32 --max-new-tokens 64"
    passed += " --lora-rank 16 --lr 0.001"
    assert printed.endswith(f"--data {file} --model {lab_folder} {passed}"), printed
    lost = "english_share 0.5 (there 0.0), max_grad_norm 1.0 (there 0.1)"
    assert f"settings that do not reach it: {lost} next: " in printed
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    problems = load_problems(lab_folder.parent / "problems" / "hau" / "train.jsonl", language="hau")
    assert [row["id"] for row in rows] == [problem.id for problem in problems]
    tokenizer = AutoTokenizer.from_pretrained(lab_folder)
    own, _ = freeze_date(load_tokenizer(lab_folder), None)
    for row, problem in list(zip(rows, problems, strict=True))[::50]:
        assert row.keys() == {"id", "prompt", "privileged_context", "answer"}
        # As SDFTTrainer tokenises a column of text.
        read = tokenizer(text=[row["prompt"], row["privileged_context"]])["input_ids"]
        assert read == [
            build_prompt(problem, "hau", own, role=role) for role in ("student", "teacher")
        ]
        assert problem.solution_en in row["privileged_context"]
        assert problem.solution_en not in row["prompt"] and row["answer"] == problem.answer


def test_what_is_said_of_the_script_is_what_it_does(monkeypatch):
    """The learning rate, the rank, the batch and --english-share stayed behind without a word."""
    monkeypatch.setattr(sys, "argv", ["trl_sdft.py", "--data", "x", "--model", "y"])
    flags = vars(trl_sdft.parse_arguments())
    own = {"data", "model", "out", "vllm", "accumulation"}
    assert {name: getattr(Config, name) for name in PASSED_ON} == {
        name: value for name, value in flags.items() if name not in own
    }
    tree = ast.parse(Path(trl_sdft.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if getattr(node.func, "id", "") == "SDFTConfig"]
    there = {str(word.arg): getattr(word.value, "value", None) for word in call.keywords}
    both = FIXED_THERE.keys() & there.keys()
    assert both == {"temperature", "top_p", "top_k", "max_grad_norm"}
    assert {name: there[name] for name in both} == {name: FIXED_THERE[name] for name in both}
    # Of the defaults the clip alone is lost.
    assert lost_settings(Config()) == ["clip_mode entry (there none)"]
    assert lost_settings(Config(lora_rank=8))[1:] == ["lora_alpha 128.0 (there 16)"]


class Beginning:
    """A tokenizer that puts <s> before a text."""

    bos_token = "<s>"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return [*(["<s>"] if add_special_tokens else []), *text.replace("<s>", "<s> ").split()]


def test_the_token_of_the_beginning_is_not_read_twice():
    tokenizer: Any = Beginning()
    assert _as_tokenised_later("<s> user: 2 + 3", tokenizer) == " user: 2 + 3"
    with pytest.raises(ValueError, match="other prompts"):
        _as_tokenised_later("user: 2 + 3", tokenizer)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--file", "a.jsonl", "--out", "b"], "--file and --out both say where to; leave one"),
        (["--no-english-solution", "--swap-solutions"], "is for --english-solution True; here"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands.copsd, ["export-data", *flags])
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", ["rows", "rows.jsonl"])
def test_an_out_that_is_a_file_already_gets_no_second_ending(tmp_path, typed):
    flags = ["--out", str(tmp_path / typed)]
    result = CliRunner().invoke(commands.copsd, ["export-data", *flags])
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_unknown_format_is_refused(tmp_path):
    flags = ["export-data", "--format", "verl", "--file", str(tmp_path / "x.jsonl")]
    result = CliRunner().invoke(commands.copsd, flags)
    assert result.exit_code == 2 and "valid: trl" in result.stderr


def test_what_is_read_is_not_written_over(tmp_path):
    """The user's only data was gone, with exit code 0."""
    data = Path(shutil.copy(few_problems()["data"], tmp_path / "rows.jsonl"))
    before = data.read_bytes()
    for file, said in (
        (data, "is what the problems are read from"),
        (tmp_path / "thesis.md", "valid: a name in .jsonl or .json"),
        (Path("lab/tiny/rows.jsonl"), "among the files of a run"),
    ):
        flags = ["export-data", "--data", str(data), "--eval-problems", "0", "--file", str(file)]
        result = CliRunner().invoke(commands.copsd, flags)
        assert result.exit_code == 2 and said in result.stderr, result.output
    assert data.read_bytes() == before
