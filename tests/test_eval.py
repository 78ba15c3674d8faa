"""eval.py: one result for one seed, a stop costs nothing finished, bad input is one line."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import eval as evaluator
from parts import commands, metrics
from parts.adapters import save_adapter
from parts.files import read_json, read_rows, read_sealed, write_json, write_sealed
from parts.lora import attach_lora
from parts.model import load_model
from parts.recipe import EvalConfig


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.evaluation, list(arguments))


def lines(folder: Path) -> list[dict]:
    return read_rows(folder / "problems.jsonl")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "4", "--pass-at-k", "8"], "--pass-at-k is 8 and --samples 4"),
        (
            ["--samples", "4", "--pass-at-k", "1,8,2"],
            "--pass-at-k is 1,8,2 and --samples 4; valid: 1 <= k <= samples",
        ),
        (["--pass-at-k", "0"], "valid: 1 <= k <= samples"),
        (["--pass-at-k", "1;8"], "--pass-at-k is 1;8; valid: numbers such as 8 or 1,4,8,12"),
        (["--greedy", "--samples", "4"], "--greedy is one completion"),
        (["--greedy", "--pass-at-k", "4"], "--greedy is one completion: leave out --pass-at-k"),
        (["--greedy", "--temperature", "0.7"], "--greedy is one completion"),
        (["--temperature", "0", "--pass-at-k", "4"], "4 completions would be equal"),
        (["--temperature", "0", "--samples", "2"], "2 completions would be equal"),
        (["--top-k", "1", "--pass-at-k", "8"], "8 completions would be equal"),
        (["--lang", "xyz"], "unknown language 'xyz'; valid codes"),
        (["--lang", "hau,xyz"], "unknown language 'xyz'; valid codes"),
        (["--lang", "fra"], "no benchmark lab/problems/fra/test.jsonl"),
        (["--benchmark", "lab", "--lang", "fra"], "lab has no French; valid: eng hau swa yor"),
        (["--benchmark", "polymath", "--lang", "hau"], "polymath has no Hausa; valid: ben deu"),
        (
            ["--benchmark", "lab/problems/hau/test.jsonl", "--lang", "all"],
            "is one file: name its language",
        ),
        (
            ["--benchmark", "lab/tiny", "--lang", "all"],
            "lab/tiny has no files that are known by a language; name one file: .jsonl",
        ),
        (
            ["--benchmark", "lab/tiny"],
            "lab/tiny is a folder in which no file for Hausa is called as those of a benchmark are",
        ),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (
            ["--benchmark", "nowhere.jsonl"],
            "no benchmark nowhere.jsonl; valid: a file, a folder, lab, afrimgsm",
        ),
        (["--limit", "0"], "--limit is 0; valid: 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; valid: 1 or more"),
        (["--batch-rows", "0"], "--batch-rows is 0; valid: 1 or more"),
        (["--adapter", "nowhere"], "neither an adapter folder nor a run folder"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int3"], "int3"),
        (["--out", "eval.py"], "eval.py exists and is not a run folder (no settings.json)"),
        (["--out", "eval.py/results"], "Not a directory"),
        (["--out", "lab"], "lab exists and is not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said):
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


SMALL = ["--pass-at-k", "2", "--limit", "6", "--lang", "ha"]


def test_one_seed_gives_one_file_whatever_the_batch_and_the_chunk(tmp_path, monkeypatch):
    result = run_cli(*SMALL, "--out", str(tmp_path / "first"))
    assert result.exit_code == 0, result.output
    assert "pass@2" in result.stdout and "in the problem's language" in result.stdout
    run_cli(*SMALL, "--out", str(tmp_path / "rows"), "--batch-rows", "5")
    run_cli(*SMALL, "--out", str(tmp_path / "seed"), "--seed", "1")
    monkeypatch.setattr(evaluator, "CHUNK", 4)
    run_cli(*SMALL, "--out", str(tmp_path / "chunk"))
    names = ("first", "rows", "seed", "chunk")
    found = {name: (tmp_path / name / "problems.jsonl").read_bytes() for name in names}
    assert found["first"] == found["rows"] == found["chunk"] != found["seed"]


def test_a_line_and_the_settings_hold_all_that_a_reader_needs(tmp_path):
    run_cli(*SMALL, "--out", str(tmp_path / "run"))
    line = lines(tmp_path / "run")[1]
    asked = list(read_rows(Path("lab/problems/hau/test.jsonl")))[1]
    assert (line["id"], line["gold"], line["level"]) == ("1", asked["answer"], None)
    assert "\u2009" not in line["problem"]
    assert [attempt["seed"] for attempt in line["attempts"]] == ["0/1/0", "0/1/1"]
    needed = {"completion", "answer", "canonical", "lenient", "correct", "reason"}
    assert needed <= line["attempts"][0].keys()
    record = read_json(tmp_path / "run" / "settings.json")
    assert record["settings"] == {
        "model": "lab/tiny",
        "adapter": None,
        "benchmark": "lab/problems/{lang}/test.jsonl",
        "lang": "hau",
        "samples": 2,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 0,
        "max_new_tokens": 64,
        "thinking": "auto",
        "seed": 0,
        "ks": [1, 2],
        "limit": 6,
    }
    identity = record["identity"]
    assert identity["adapter_weights"] is None and identity["data_revision"] is None
    assert identity["dtype"] == "float32"
    assert len(identity["base_weights"]) == len(identity["data"]) == 16
    assert len(identity["prompt_template"]) == 12
    assert "torch" in record["versions"] and "git_commit" in record
    assert read_json(tmp_path / "run" / "summary.json")["pass@2"].keys() == {"value", "low", "high"}


def test_a_stopped_evaluation_goes_on_and_ends_with_the_bytes_of_an_unstopped_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluator, "CHUNK", 3)
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    arguments = ["--pass-at-k", "1,2", "--limit", "8", "--out"]
    assert run_cli(*arguments, str(whole)).exit_code == 0
    started: list[int] = []
    plain = evaluator.evaluate

    def stop_at_the_third_chunk(*arguments, **options):
        started.append(options["first_index"])
        if len(started) == 3:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(evaluator, "evaluate", stop_at_the_third_chunk)
    assert run_cli(*arguments, str(cut)).exit_code == 130
    kept = (cut / "problems.jsonl").read_bytes()
    assert kept.count(b"\n") == 6 and not (cut / "summary.json").exists()
    torn = b"".join(kept.splitlines(keepends=True)[:4]) + b'{"id": "4", "probl'
    (cut / "problems.jsonl").write_bytes(torn)
    assert run_cli(*arguments, str(cut)).exit_code == 0
    assert started == [0, 3, 6, 3, 6]  # the first chunk is whole and not sampled again
    for file in ("problems.jsonl", "summary.json"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    assert run_cli(*arguments, str(cut)).exit_code == 0
    assert len(started) == 5  # finished: nothing is sampled


def test_other_settings_or_problems_in_the_folder_are_refused_and_kept(tmp_path):
    run_cli(*SMALL, "--out", str(tmp_path))
    before = (tmp_path / "problems.jsonl").read_bytes()
    result = run_cli(*SMALL, "--out", str(tmp_path), "--seed", "4", "--top-p", "0.9")
    assert result.exit_code == 2 and "differs in top_p, seed; choose another --out" in result.stderr
    assert (tmp_path / "problems.jsonl").read_bytes() == before
    others = b"".join(before.splitlines(keepends=True)[1:])
    broken = b"{" + before
    for content, said in ((others, "has other problems"), (broken, "broken before its last line")):
        (tmp_path / "problems.jsonl").write_bytes(content)
        result = run_cli(*SMALL, "--out", str(tmp_path))
        assert result.exit_code == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1
        assert (tmp_path / "problems.jsonl").read_bytes() == content


def test_greedy_is_one_completion_at_temperature_0(tmp_path):
    spelled = ["--temperature", "0", "--pass-at-k", "1", "--seed", "0"]
    for name, flags in {"greedy": ["--greedy"], "zero": spelled}.items():
        result = run_cli(*flags, "--limit", "4", "--out", str(tmp_path / name))
        assert "Hausa, 1 sample a problem" in result.stdout
    greedy = (tmp_path / "greedy" / "problems.jsonl").read_bytes()
    assert greedy == (tmp_path / "zero" / "problems.jsonl").read_bytes()
    assert all(len(line["attempts"]) == 1 for line in lines(tmp_path / "greedy"))


def test_several_languages_have_a_folder_each_a_row_each_and_a_mean(tmp_path):
    flags = ["--benchmark", "lab", "--lang", "swa,ha", "--greedy", "--limit", "3"]
    result = run_cli(*flags, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"swa", "hau"}
    assert lines(tmp_path / "swa")[0]["problem"] != lines(tmp_path / "hau")[0]["problem"]
    rows = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [name for name in rows if name in ("swa", "hau", "mean")] == ["swa", "hau", "mean"]
    # In a pipe it was as wide as a terminal, and the numbers were on three lines each.
    assert len(re.findall(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", result.stdout)) == 3 * 4


def test_all_means_every_language_of_the_benchmark():
    lab = ["eng", "hau", "swa", "yor"]
    assert [language.iso3 for language in evaluator.pick_languages("all", "lab")] == lab
    counts = {"afrimgsm": 19, "mgsm": 11, "msvamp": 10}
    for benchmark, count in counts.items():
        assert len(evaluator.pick_languages("all", benchmark)) == count
    found = evaluator.pick_languages("all", "lab/problems/{lang}/test.jsonl")
    assert [language.iso3 for language in found] == lab


@pytest.fixture
def adapter(tmp_path, lab_folder) -> Path:
    """An adapter of the lab model that changes what it says."""
    model = load_model(lab_folder, device="cpu", dtype=torch.float32)
    lora = attach_lora(model, rank=2, alpha=4.0, targets=("q_proj", "up_proj"), seed=0)
    torch.manual_seed(0)
    lora.load_state_dict(
        {name: 0.3 * torch.randn(tensor.shape) for name, tensor in lora.state_dict().items()}
    )
    save_adapter(lora, tmp_path / "adapter", base_model="lab/tiny")
    return tmp_path / "adapter"


def test_an_adapter_is_evaluated_and_fingerprinted(tmp_path, adapter):
    for name, flags in {"base": [], "adapted": ["--adapter", str(adapter)]}.items():
        result = run_cli(*SMALL, *flags, "--out", str(tmp_path / name))
        assert result.exit_code == 0, result.output
    base = read_json(tmp_path / "base" / "settings.json")["identity"]
    adapted = read_json(tmp_path / "adapted" / "settings.json")["identity"]
    assert base["adapter_weights"] is None and len(adapted["adapter_weights"]) == 16
    # Its scale, alpha / r, is not among its tensors, and decides as much.
    own = {"adapter_weights": adapted["adapter_weights"], "adapter_scale": 2.0}
    assert {**base, **own} == adapted
    assert lines(tmp_path / "base") != lines(tmp_path / "adapted")


def test_an_adapter_of_an_unknown_base_is_said_to_be_one(adapter):
    """Where its record and its base are gone, the numbers may be of another model's adapter."""
    settings = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": "/gone"})
    result = run_cli(*SMALL, "--adapter", str(adapter))
    assert result.exit_code == 0, result.output
    assert "nothing says on which base weights it was trained" in result.stdout


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: [file.unlink() for file in folder.iterdir()],
            "neither an adapter folder nor a run folder",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "adapter_model.safetensors is missing",
        ),
        (
            lambda folder: save_file({}, folder / "adapter_model.safetensors"),
            "adapter tensors are missing",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "error"),
        (
            lambda folder: write_json(folder / "config.json", {"identity": {"base_weights": "ff"}}),
            "other base weights",
        ),
    ],
    ids=["empty folder", "no tensors", "empty tensors", "torn tensors", "another base"],
)
def test_an_adapter_that_cannot_be_used_is_never_the_base_model(adapter, spoil, said):
    spoil(adapter)
    result = run_cli(*SMALL, "--adapter", str(adapter))
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert "pass@" not in result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that was trained with --thinking off."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--steps", "1", "--batch-size", "2", "--eval-problems", "0", "--max-new-tokens", "8"]
    flags += ["--thinking", "off", "--out", str(out)]
    assert CliRunner().invoke(commands.copsd, ["train", *flags]).exit_code == 0
    return out


def test_an_adapter_is_asked_as_it_was_trained_unless_the_user_says_otherwise(tmp_path, trained):
    """It was asked with the default prompt, whatever its run's record said."""
    small = ["--greedy", "--limit", "2", "--max-new-tokens", "8", "--adapter"]
    step = trained / "adapters" / "step_00001"
    own = "--thinking off, as the adapter was trained"
    other = "--thinking auto: the adapter was trained with --thinking off"
    cases = [
        (trained, [], [own], "off"),
        (step, [], [own], "off"),
        (trained, ["--thinking", "off"], [], "off"),
        (step, ["--thinking", "auto"], [other], "auto"),
    ]
    for number, (adapter, flags, said, thinking) in enumerate(cases):
        out = tmp_path / str(number)
        result = run_cli(*small, str(adapter), *flags, "--out", str(out))
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert [line for line in lines if line.startswith("--thinking")] == said
        assert read_json(out / "settings.json")["settings"]["thinking"] == thinking


def test_an_adapter_that_was_trained_with_another_prompt_is_told_of(tmp_path, trained, lab_folder):
    model = Path(shutil.copytree(lab_folder, tmp_path / "model"))
    with (model / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write("{# #} ")
    flags = ["--greedy", "--limit", "2", "--max-new-tokens", "8", "--adapter", str(trained)]
    flags += ["--benchmark", "lab"]
    said = "the prompts are not those that the adapter was trained with: they had another "
    assert said not in run_cli(*flags).stdout
    result = run_cli(*flags, "--model", str(model))
    assert f"{said}wording or chat template\n" in result.stdout, result.output
    # The wordings of another language were never the training's.
    assert said not in run_cli(*flags, "--model", str(model), "--lang", "swa").stdout
    copied = Path(shutil.copytree(trained, tmp_path / "copied"))
    record = read_sealed(copied / "config.json")
    record["identity"] |= {"prompt_template": "0" * 12, "template_date": "2025-01-09"}
    write_sealed(copied / "config.json", record)
    flags[flags.index(str(trained))] = str(copied)
    assert f"{said}date, 2025-01-09, which the chat template" in run_cli(*flags).stdout


def test_pass_at_k_stays_importable_from_here():
    assert evaluator.pass_at_k is metrics.pass_at_k


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    model = str(Path("lab/tiny").resolve())
    monkeypatch.chdir(tmp_path)
    result = run_cli("--greedy", "--limit", "2", "--model", model)
    assert result.exit_code == 0 and "pass@1" in result.stdout
    assert not list(tmp_path.iterdir())


def test_where_every_token_is_the_likeliest_one_completion_is_asked_for():
    for asked in (EvalConfig(temperature=0.0), EvalConfig(top_k=1), EvalConfig(greedy=True)):
        ks, samples, _ = evaluator.sampling_plan(asked)
        assert (ks, samples) == ([1], 1)
    assert evaluator.sampling_plan(EvalConfig())[:2] == ([1, 8], 8)


def test_without_a_benchmark_it_is_the_languages_own_and_is_said(tmp_path):
    for lang, benchmark in {"hau": "afrimgsm", "zh": "polymath", "ha,yo": "afrimgsm"}.items():
        stream = io.StringIO()
        console = Console(file=stream, width=20)
        settings = evaluator.read_settings(EvalConfig(lang=lang), tmp_path, console)
        assert settings.benchmark == benchmark
        assert stream.getvalue().startswith(f"benchmark {benchmark}, which has ")
        assert stream.getvalue().count("\n") == 1
    refused = {"all": "pass --benchmark", "hau,zho": "no benchmark has Hausa, Chinese"}
    for lang, said in refused.items():
        with pytest.raises(ValueError, match=said):
            evaluator.read_settings(EvalConfig(lang=lang), tmp_path, Console(quiet=True))


def test_an_out_holds_the_languages_of_one_evaluation_only(tmp_path):
    out = tmp_path / "out"
    given = ["--limit", "2", "--out", str(out)]
    assert run_cli("--pass-at-k", "1", "--greedy", "--lang", "hau,swa", *given).exit_code == 0
    result = run_cli("--pass-at-k", "2", "--lang", "yor,eng", *given)
    assert result.exit_code == 2 and "holds two evaluations: hau and yor differ in" in result.stderr
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["hau", "swa"]
    result = run_cli("--pass-at-k", "1", "--greedy", "--lang", "yor,eng", *given)
    assert result.exit_code == 0, result.output


def test_several_languages_do_not_go_into_the_folder_of_one(tmp_path):
    given = ["--greedy", "--limit", "2", "--out", str(tmp_path / "out")]
    assert run_cli("--lang", "hau", *given).exit_code == 0
    before = sorted((tmp_path / "out").rglob("*"))
    result = run_cli("--lang", "hau,swa", *given)
    said = f"error: {tmp_path / 'out'} holds an evaluation of one language; choose another --out\n"
    assert (result.exit_code, result.stderr) == (2, said)
    assert sorted((tmp_path / "out").rglob("*")) == before
    report = ["report", str(tmp_path / "out"), "--out", str(tmp_path / "report")]
    assert run_cli(*report).exit_code == 0


def test_what_another_process_finished_before_the_folder_was_claimed_is_not_done_again(
    tmp_path, monkeypatch
):
    flags = [*SMALL, "--out", str(tmp_path / "out")]
    plain = evaluator.refuse_mixture
    written = []

    def _be_late(*arguments: Any) -> None:
        plain(*arguments)
        monkeypatch.setattr(evaluator, "refuse_mixture", plain)
        assert run_cli(*flags).exit_code == 0
        written.append((tmp_path / "out" / "problems.jsonl").read_bytes())

    monkeypatch.setattr(evaluator, "refuse_mixture", _be_late)
    result = run_cli(*flags)
    assert result.exit_code == 0, result.output
    assert written == [(tmp_path / "out" / "problems.jsonl").read_bytes()]


def test_a_kill_while_a_summary_is_written_anew_leaves_nothing_damaged(tmp_path, monkeypatch):
    flags = ["--greedy", "--limit", "2", "--out", str(tmp_path)]
    assert run_cli(*flags).exit_code == 0
    whole = (tmp_path / "summary.json").read_bytes()

    def _die(*files: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "summarise", lambda graded, ks: {})  # as of another version
        patch.setattr(evaluator.runs.Run, "vouch", _die)
        assert run_cli(*flags).exit_code == 130
    assert (tmp_path / "summary.json").read_bytes() != whole
    result = run_cli(*flags)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "summary.json").read_bytes() == whole


def test_fewer_samples_than_the_default_k_are_as_many_ks():
    ks, samples, _ = evaluator.sampling_plan(EvalConfig(samples=4))
    assert (ks, samples) == ([1, 4], 4)
