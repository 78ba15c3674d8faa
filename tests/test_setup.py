"""parts/setup.py: a run may start from another's adapter, and keeps the date of its first day."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import few_problems, write_file
from safetensors.torch import load_file, save_file
from test_copsd import QUIET, SMALL
from test_methods import GROUPS, make_setup, run_cli, train
from typer.testing import CliRunner

from parts import commands
from parts.adapters import read_adapter_tensors
from parts.data import load_problems
from parts.files import read_json, read_sealed, write_json, write_sealed
from parts.model import load_tokenizer
from parts.prompts import Problem
from parts.recipe import Config
from parts.setup import configure, evaluation_command, prepare, student_prompt


def test_a_warm_start_begins_with_a_runs_last_adapter(tmp_path):
    first = train(tmp_path / "first")
    setup, run = make_setup(tmp_path / "second", method="grpo", **GROUPS, warm_start=str(first))
    saved = first / "adapters" / "step_00002"
    for name, tensor in read_adapter_tensors(saved).items():
        assert torch.equal(setup.lora.sets["current"][name], tensor)
    copied, _ = make_setup(tmp_path / "third", method="opsdc", warm_start=str(first))
    for name, tensor in copied.lora.sets["copy"].items():
        assert torch.equal(tensor, copied.lora.sets["current"][name])
    assert json.loads(run.record_file.read_text())["identity"]["warm_start"]


def test_the_command_that_comes_next_evaluates_the_run_as_it_was_trained(tmp_path):
    """It left out the file of the problems and the think block, and broke at a space."""
    model = tmp_path / "my model"
    shutil.copytree("lab/tiny", model)
    (model / "recipe.json").unlink()
    files = {
        "data": "lab/problems/{lang}/train.jsonl",
        "eval_data": "lab/problems/{lang}/test.jsonl",
    }
    setup, run = make_setup(tmp_path / "a run", **files, model=str(model), thinking="off")
    words = shlex.split(evaluation_command(setup, run.folder))
    begin = ["python", "eval.py", "--pass-at-k", "8", "--model", str(model), "--lang", "hau"]
    begin += ["--benchmark", "lab/problems/hau/test.jsonl", "--max-new-tokens", "24"]
    added = ["--thinking", "off", "--adapter", str(tmp_path / "a run" / "run")]
    assert words == [*begin, *added]
    # The file of the model's recipe is eval.py's, too: the README shows this line.
    setup, _ = prepare(*configure({"out": str(tmp_path / "lab")}), QUIET)
    assert evaluation_command(setup, Path("runs/copsd-tiny-hau-0")) == (
        "python eval.py --pass-at-k 8 --model lab/tiny --lang hau --adapter runs/copsd-tiny-hau-0"
    )


DATA = few_problems()
SPLITS = {
    "held out of the data": ["--data", DATA["data"], "--eval-problems", "3"],
    "the first of a file that is trained on, too": [
        *("--data", DATA["data"], "--eval-data", DATA["data"], "--eval-problems", "3"),
    ],
    "the first of a recipe's file": ["--eval-problems", "3"],
}


@pytest.mark.parametrize("flags", SPLITS.values(), ids=SPLITS)
def test_what_comes_next_evaluates_the_reported_problems_as_the_run_asked_them(tmp_path, flags):
    """It evaluated whole files, training problems among them, or a benchmark in place of the data,
    at another length limit, and the last adapter where another was named the best."""
    run = tmp_path / "a run"
    small = ["--steps", "2", "--batch-size", "2", "--eval-samples", "1", "--max-new-tokens", "20"]
    small += ["--thinking", "off", "--save-every", "1", "--eval-every", "1", "--dev-problems", "1"]
    result = CliRunner().invoke(commands.copsd, ["train", *small, *flags, "--out", str(run)])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: python eval.py "))
    best = run / read_json(run / "best.json")["adapter"]
    assert words[-2:] == ["--adapter", str(best)]
    result = CliRunner().invoke(commands.evaluation, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    trained, found = (
        read_sealed(file) for file in (run / "config.json", tmp_path / "out" / "settings.json")
    )
    assert found["identity"]["problems"] == 3
    assert found["identity"]["data"] == trained["identity"]["heldout_data"]
    assert found["identity"]["prompt_template"] == trained["identity"]["prompt_template"]
    for name in ("thinking", "max_new_tokens", "lang"):
        assert found["settings"][name] == trained["config"][name]


def test_of_a_runs_settings_only_thinking_changes_what_its_student_reads(lab_folder):
    """eval.py takes that one from the record of an adapter's run, and would have to take others."""
    read = set()

    class Spied:
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return getattr(Config(), name)

    spied: Any = Spied()
    problem = Problem("7", "Nawa ne 2 + 3?", None, None, "5", "hau")
    student_prompt(spied, problem, load_tokenizer(lab_folder))
    assert read == {"thinking"}


def test_a_file_that_holds_just_the_reported_problems_is_not_written_again(tmp_path):
    rows = Path(DATA["eval_data"]).read_text(encoding="utf-8").splitlines(keepends=True)
    whole = write_file(tmp_path, "whole.jsonl", "".join(rows[:2]))
    setup, run = make_setup(tmp_path, eval_data=str(whole), eval_problems=2)
    assert not (run.folder / "heldout.jsonl").exists()
    assert f"--benchmark {whole} " in evaluation_command(setup, run.folder)
    # What is written is vouched for, and a run goes on with it.
    given = {"data": DATA["data"], "eval_data": None, "eval_problems": 2}
    setup, run = make_setup(tmp_path / "own", **given)
    assert load_problems(run.folder / "heldout.jsonl") == setup.heldout
    make_setup(tmp_path / "own", **given)
    with (run.folder / "heldout.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match="is damaged: it is not what was written"):
        make_setup(tmp_path / "own", **given)


def test_a_warm_start_from_another_base_or_another_shape_is_one_line(tmp_path):
    first = train(tmp_path / "first")
    other = tmp_path / "other"
    shutil.copytree(first, other)
    record = read_sealed(other / "config.json")
    record["identity"]["base_weights"] = "0" * 16
    write_sealed(other / "config.json", record)
    for flags, said in (
        (["--warm-start", str(other)], "was trained on other base weights"),
        (["--warm-start", str(first), "--lora-rank", "4"], "has an adapter of rank 16"),
        (["--warm-start", str(first), "--lora-targets", "q_proj"], "adapter tensors are missing"),
        (["--warm-start", str(tmp_path / "nowhere")], "neither an adapter folder nor a run folder"),
    ):
        result = run_cli(*flags, "--out", str(tmp_path / "run"))
        assert result.exit_code == 2 and said in result.stderr, result.output
        assert result.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_warm_start_from_a_copied_adapter_is_held_to_the_base_that_it_names(tmp_path, lab_folder):
    """Where no run's record stood beside it, any base was taken for its own."""
    step = train(tmp_path / "first") / "adapters" / "step_00002"
    copied = shutil.copytree(step, tmp_path / "copied")
    small = ["--warm-start", str(copied), "--out"]
    result = run_cli(*small, str(tmp_path / "same"))
    assert result.exit_code == 0 and "nothing says on which base" not in result.stdout
    # The same layers with other numbers: the adapter fits, and means something else.
    other = shutil.copytree(lab_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 0.001 for name, tensor in tensors.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    named = read_json(copied / "adapter_config.json")
    write_json(copied / "adapter_config.json", {**named, "base_model_name_or_path": str(other)})
    result = run_cli(*small, str(tmp_path / "others"))
    assert result.exit_code == 2 and "was trained on other base weights" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "others").exists()
    write_json(copied / "adapter_config.json", {**named, "base_model_name_or_path": "gone/away"})
    result = run_cli(*small, str(tmp_path / "unknown"))
    assert result.exit_code == 0, result.output
    assert "nothing says on which base weights it was trained" in result.stdout


def test_a_run_goes_on_tomorrow_with_the_date_that_its_template_wrote_today(tmp_path):
    model = tmp_path / "dated"
    shutil.copytree("lab/tiny", model)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    given = {**SMALL, **few_problems(), "model": str(model), "out": str(tmp_path / "run")}
    config, folder = configure(given)
    setup, run = prepare(config, folder, QUIET, "2025-01-09")
    assert read_json(run.record_file)["identity"]["template_date"] == "2025-01-09"
    again, _ = prepare(config, folder, QUIET)  # on another day
    problem = setup.train[0]
    assert again.student_prompt(problem) == setup.student_prompt(problem)
    assert str(again.tokenizer.decode(again.teacher_prompt(problem))).startswith("09 Jan 2025")
