"""compare.py: equal budgets, splits that share nothing, runs that are kept, and their numbers."""

import gc
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, few_flags
from rich.console import Console
from typer.testing import CliRunner

import compare
import methods
from parts import arms, commands, measure, outcome, owner
from parts import plan as plans
from parts.adapters import load_adapter
from parts.arms import Arm
from parts.data import load_problems
from parts.experiments import ATTRIBUTION, EVIDENCE
from parts.files import CannotWrite, json_lines, read_json, read_rows, write_json
from parts.metrics import ratios
from parts.model import load_model, load_tokenizer
from parts.recipe import METHODS, Config
from parts.sampler import SamplingParams
from parts.view import NO_NOTE, ArmsProgress

SMALL = [
    *("--lang", "ha", "--seeds", "2", "--sweep", "0.5,1", "--token-budget", "640"),
    *("--batch-size", "8", "--group-size", "4", "--max-new-tokens", "40"),
    *("--eval-problems", "6", "--eval-samples", "2", "--dev-problems", "5"),
    *few_flags(),
]

# For what is said and left behind, whatever the answers are: two steps of two short completions.
TINY = [
    *("--seeds", "1", "--sweep", "1", "--token-budget", "32", "--max-new-tokens", "8"),
    *("--batch-size", "2", "--group-size", "2", "--eval-problems", "1", "--eval-samples", "2"),
    *("--dev-problems", "1"),
    *few_flags(),
]


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.comparison, list(arguments))


def without(given: list[str], *flags: str) -> list[str]:
    """Return a command line without some of its flags, for which an experiment has no use."""
    pairs = zip(given[::2], given[1::2], strict=True)
    return [word for flag, value in pairs if flag not in flags for word in (flag, value)]


def results_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "results.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A small comparison's folder, and what it printed."""
    out = tmp_path_factory.mktemp("compare") / "out"
    result = run_cli(*SMALL, "--out", str(out))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_the_splits_share_no_problem(finished):
    folder = finished[0] / "hau"
    train, dev, test = (
        {row["problem_translated"] for row in read_rows(folder / f"{name}.jsonl")}
        for name in ("train", "dev", "test")
    )
    assert (len(dev), len(test)) == (5, 6)
    assert not train & dev and not train & test and not dev & test


def test_every_arm_spends_the_budget_and_no_more_than_a_step_over_it(finished):
    for method in ("grpo", "copsd"):
        for seed in (0, 1):
            rows = read_rows(finished[0] / "hau" / f"{method}-{seed}" / "metrics.jsonl")
            assert rows[-2]["sampled_tokens"] < 640 <= rows[-1]["sampled_tokens"]
        folders = list((finished[0] / "hau" / "sweep").glob(f"{method}-*"))
        assert len(folders) == 2
        for folder in folders:
            rows = read_rows(folder / "metrics.jsonl")
            assert rows[-2]["sampled_tokens"] < 320 <= rows[-1]["sampled_tokens"]


def test_arms_take_the_rate_that_the_sweep_picked_on_the_development_split(finished):
    out = finished[0]
    sweep = read_json(out / "compare.json")["sweep"]
    for method in ("grpo", "copsd"):
        accuracies = {float(rate): a for rate, a in sweep[method]["accuracies"].items()}
        best = max(accuracies.values())
        assert sweep[method]["picked"] == min(r for r, a in accuracies.items() if a == best)
        for rate, found in accuracies.items():
            final = results_of(out / "hau" / "sweep" / f"{method}-{rate:g}")["final"]
            right, _ = final["greedy"]["pass@1"]
            assert len(right) == 5 and found == sum(right) / 5
        config = read_json(out / "hau" / f"{method}-1" / "config.json")["config"]
        assert config["lr"] == sweep[method]["picked"]
        assert config["eval_data"].endswith("test.jsonl")
    for folder in (out / "hau" / "sweep").iterdir():
        config = read_json(folder / "config.json")["config"]
        assert config["eval_data"].endswith("dev.jsonl")


def test_the_table_holds_the_results_of_the_arms(finished):
    out, printed = finished
    found = read_json(out / "compare.json")["languages"]["hau"]
    accuracies = []
    for seed in (0, 1):
        right, _ = results_of(out / "hau" / f"copsd-{seed}")["final"]["greedy"]["pass@1"]
        accuracies.append(sum(right) / 6)
    assert found["arms"]["copsd"]["greedy accuracy"]["by_seed"] == accuracies
    assert found["arms"]["copsd"]["greedy accuracy"]["value"] == pytest.approx(sum(accuracies) / 2)
    pair = found["pairs"]["copsd - grpo"]["greedy accuracy"]
    values = [found["arms"][name]["greedy accuracy"]["value"] for name in ("copsd", "grpo")]
    assert pair["value"] == pytest.approx(values[0] - values[1]) and 0 < pair["p"] <= 1
    text = (out / "RESULTS.md").read_text(encoding="utf-8")
    assert "| Hausa: GRPO |" in text and "| Hausa: COPSD against GRPO |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4 and all(table in printed for table in tables)
    for name in ("comparison", "comparison_hau"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (out / f"{name}.svg").read_text()


def test_results_are_ratios_of_every_metric_for_each_kind_of_attempt(finished):
    measured = results_of(finished[0] / "hau" / "copsd-0")["final"]
    assert {"greedy", "english", "sampled", "kl"} <= measured.keys()
    for kind in ("greedy", "english", "sampled"):
        for above, below in measured[kind].values():
            assert len(above) == len(below) == 6
    assert {"pass@1", "pass@2"} <= measured["sampled"].keys()
    assert not any(name.startswith("n") for name in measured["greedy"])  # no counts beside them
    assert len(measured["kl"][0]) == 6 and min(measured["kl"][1]) >= 1


@pytest.fixture(scope="module")
def three_ways(finished, tmp_path_factory) -> dict[str, dict[str, dict[str, Any]]]:
    """The same attempts of a trained student, as each of the three tables has their metrics."""
    arm = finished[0] / "hau" / "copsd-0"
    test = finished[0] / "hau" / "test.jsonl"

    # The table before and after training.
    folder = Path("lab/tiny")
    model = load_model(folder, device="cpu", dtype=torch.float32)
    load_adapter(model, sorted((arm / "adapters").iterdir())[-1])
    ruler = measure.Ruler.of(Config(max_new_tokens=40, eval_samples=2), seed=0)
    problems = load_problems(test, language="hau")
    columns = measure.measure_languages(
        model, load_tokenizer(folder), problems, ruler, Console(quiet=True), "after training"
    )
    after = measure.plain_columns(columns)

    # eval.py.
    evaluated = {}
    for name, flags in {"greedy": ["--greedy"], "sampled": ["--pass-at-k", "2"]}.items():
        out = tmp_path_factory.mktemp("eval") / name
        common = ["--benchmark", str(test), "--adapter", str(arm), "--max-new-tokens", "40"]
        result = CliRunner().invoke(
            commands.evaluation, [*common, "--lang", "hau", *flags, "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
        evaluated[name] = read_json(out / "summary.json")

    # compare.py.
    final = results_of(arm)["final"]
    return {"after": after, "eval": evaluated, "compare": {"runs": final}}


def test_a_metric_of_the_same_attempts_is_one_number_in_every_table(three_ways):
    after = three_ways["after"]["hau"]
    evaluated = three_ways["eval"]
    final = three_ways["compare"]["runs"]
    # Of the sampled attempts: all that eval.py and the table after training have.
    assert len(evaluated["sampled"]) > 10
    for name, estimate in evaluated["sampled"].items():
        assert after[name] == estimate, name
    for name in ("pass@1", "pass@2"):
        compared = outcome.over_seeds(name, [final])
        assert {**after[name], "by_seed": [after[name]["value"]]} == compared
    # Of the greedy ones: all that eval.py and compare.py have.
    for name in final["greedy"]:
        metric = "greedy accuracy" if name == "pass@1" else name
        compared = outcome.over_seeds(metric, [final])
        assert str({**evaluated["greedy"][name], "by_seed": compared["by_seed"]}) == str(compared)
    greedy = outcome.over_seeds("greedy accuracy", [final])
    assert {**after["greedy accuracy"], "by_seed": greedy["by_seed"]} == greedy
    # And in English.
    english = outcome.over_seeds("English greedy accuracy", [final])
    found = three_ways["after"]["eng"]["greedy accuracy"]
    assert {**found, "by_seed": english["by_seed"]} == english


def test_the_last_checkpoint_evaluates_as_the_adapter_that_was_saved(finished):
    arm = finished[0] / "hau" / "copsd-0"
    folder = Path("lab/tiny")
    model = load_model(folder, device="cpu", dtype=torch.float32)
    load_adapter(model, sorted((arm / "adapters").iterdir())[-1])
    problems = load_problems(finished[0] / "hau" / "test.jsonl", language="hau")
    params = SamplingParams(40, 0.0, 0.95)
    results = measure.evaluate(model, load_tokenizer(folder), problems, params)
    found = json.loads(json.dumps(ratios(results, [1])))
    assert results_of(arm)["final"]["greedy"] == found


def test_what_is_finished_is_not_done_again_and_other_settings_are_refused(finished, monkeypatch):
    out = finished[0]
    before = (out / "RESULTS.md").read_bytes()
    (out / "RESULTS.md").unlink()
    monkeypatch.setitem(methods.LOOPS, "grpo", None)
    monkeypatch.setitem(methods.LOOPS, "copsd", None)
    assert run_cli(*SMALL, "--out", str(out)).exit_code == 0
    assert (out / "RESULTS.md").read_bytes() == before
    place = SMALL.index("--eval-samples")
    not_given = [*SMALL[:place], *SMALL[place + 2 :]]  # a setting that is no longer given
    for flags, said in (
        ([*SMALL, "--seeds", "3"], "differs in seeds"),
        (not_given, "differs in grpo eval_samples, copsd eval_samples"),
    ):
        result = run_cli(*flags, "--out", str(out))
        assert result.exit_code == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["base/prompts.json", "grpo-1/metrics.jsonl", "copsd-0/config.json"]
)
def test_a_finished_arm_that_is_damaged_is_named_and_not_taken_as_it_is(finished, name):
    file = finished[0] / "hau" / name
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"t", b"T", 1))
    try:
        result = run_cli(*SMALL, "--out", str(finished[0]))
    finally:
        file.write_bytes(whole)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"{file} is damaged" in result.stderr and f"remove {file.parent} " in result.stderr


@pytest.mark.parametrize("spoilt", [b"", b"{", b"{}"])
def test_an_arms_results_that_are_damaged_say_what_to_do(finished, spoilt):
    file = finished[0] / "hau" / "copsd-0" / "results.json"
    whole = file.read_bytes()
    file.write_bytes(spoilt)
    try:
        result = run_cli(*SMALL, "--out", str(finished[0]))
    finally:
        file.write_bytes(whole)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert str(file) in result.stderr and "remove it to have the arm run again" in result.stderr


def run_with_other_results(out: Path, file: Path, change: Callable[[Any], None]):
    """Run a finished comparison again with an arm's results changed, and put them back."""
    whole = file.read_bytes()
    content = json.loads(whole)
    del content["sha256"]
    change(content)
    write_json(file, content)
    try:
        return run_cli(*SMALL, "--out", str(out))
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("files",), None, "its files are no object"),
        (("files",), [1], "its files are no object"),
        (("final", "sampled_tokens"), "x", "final.sampled_tokens is 'x'; valid: a whole number"),
        (("final", "train_s"), 0, "final.train_s is 0"),
        (("final", "kl"), [[1]], "its final.kl is no pair"),
        (("final", "greedy", "pass@1"), [[0.5], [1.0]], "metrics of 1 and 6 problems"),
        (("final", "sampled"), {}, "its final.sampled has no 'accuracy given a box'"),
        (("points",), [], "its points are no list of checkpoints"),
        (("points", 0, "greedy"), 3, "its points[0].greedy is no object of metrics"),
        (("final", "english"), None, "its final.english is no object of metrics"),
    ],
)
def test_results_without_a_seal_of_another_shape_are_one_line(finished, place, value, said):
    """A file without a digest of itself is taken as an older version's; each was a traceback."""
    file = finished[0] / "hau" / "copsd-0" / "results.json"

    def _put(content: Any) -> None:
        for name in place[:-1]:
            content = content[name]
        content[place[-1]] = value

    result = run_with_other_results(finished[0], file, _put)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert f"{file} is damaged: " in result.stderr and said in result.stderr
    assert "remove it to have the arm run again" in result.stderr


def test_arms_of_other_numbers_of_problems_are_one_line(finished):
    file = finished[0] / "hau" / "copsd-0" / "results.json"

    def _shorten(content: Any) -> None:
        for metric in content["final"]["sampled"].values():
            del metric[0][-1], metric[1][-1]

    result = run_with_other_results(finished[0], file, _shorten)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert f"{file.parent} and {finished[0] / 'hau' / 'base'} were measured on" in result.stderr


@pytest.mark.parametrize("layout", [None, 1])
def test_a_folder_of_an_older_comparison_is_refused_with_one_line(tmp_path, layout):
    config = {"langs": ["hau"], "seeds": [0, 1]} | ({} if layout is None else {"layout": layout})
    write_json(tmp_path / "config.json", {"config": config, "identity": {}})
    before = (tmp_path / "config.json").read_bytes()
    result = run_cli(*SMALL, "--out", str(tmp_path))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "is of an older version of the comparison; choose another --out" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_training_runs_folder_is_no_comparisons(tmp_path):
    write_json(tmp_path / "config.json", {"config": asdict(Config()), "identity": {}})
    result = run_cli(*SMALL, "--out", str(tmp_path))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_a_signal_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.LOOPS, "copsd", lambda setup, run, view: False)
    result = run_cli(*TINY, "--sweep", "0.5,1", "--out", str(tmp_path / "out"))
    assert result.exit_code == 130 and "same command goes on" in result.stdout
    assert len(list(tmp_path.glob("out/hau/sweep/grpo-*/results.json"))) == 2
    assert not list(tmp_path.glob("out/hau/sweep/copsd-*/results.json"))


def test_an_arms_model_is_gone_before_the_next_one_is_loaded(tmp_path, monkeypatch):
    """A model is a cycle of references: two of them stood side by side until Python looked."""
    models: list[weakref.ref] = []
    alive: list[int] = []
    prepare = compare.prepare

    def watched(*given, **named):
        alive.append(sum(model() is not None for model in models))
        setup, run = prepare(*given, **named)
        models.append(weakref.ref(setup.model))
        return setup, run

    monkeypatch.setattr(compare, "prepare", watched)
    monkeypatch.setitem(methods.LOOPS, "grpo", lambda setup, run, view: False)
    gc.disable()
    try:
        result = run_cli(*TINY, "--sweep", "0.5,1", "--out", str(tmp_path / "out"))
    finally:
        gc.enable()
    assert result.exit_code == 130 and alive == [0, 0, 0]


def test_an_arm_stopped_in_its_last_step_is_measured_by_the_next_call(tmp_path, monkeypatch):
    flags = [*TINY, "--out", str(tmp_path / "out")]

    def _stop(progress: ArmsProgress, metrics: dict[str, Any]) -> None:
        if metrics["progress"] >= 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ArmsProgress, "show", _stop)
        stopped = run_cli(*flags)
    assert stopped.exit_code == 130 and "same command goes on" in stopped.stdout
    (arm,) = (log.parent for log in tmp_path.glob("out/hau/**/metrics.jsonl"))
    assert not (arm / "results.json").exists()
    trained = (arm / "metrics.jsonl").read_bytes()
    result = run_cli(*flags)
    assert result.exit_code == 0, result.output
    assert (arm / "results.json").is_file() and (arm / "metrics.jsonl").read_bytes() == trained


def test_what_is_wrong_with_the_folder_of_an_arm_is_said(tmp_path, monkeypatch):
    flags = [*TINY, "--steps", "6", "--token-budget", "64", "--out", str(tmp_path / "out")]

    def _stop(progress: ArmsProgress, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ArmsProgress, "show", _stop)
        assert run_cli(*flags).exit_code == 130
    owner.release()
    (state,) = tmp_path.glob("out/hau/**/resume/step_00002.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    (state.parent.parent / owner.LOCK).write_text('{"pid": 41, "host": "h", "since": "then"}')
    command = [sys.executable, "compare.py", *flags, "--jobs", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"{state} is damaged") == 1
    assert "going on from step 1" in result.stdout
    assert result.stdout.count(f"{state.parent.parent}: taken over from process 41") == 1
    assert "memory: " not in result.stdout  # each of many arms would repeat it


def test_an_arm_whose_gradient_is_lost_ends_the_comparison_with_its_name(tmp_path, monkeypatch):
    def diverged(setup, run, view):
        raise FloatingPointError("no finite gradient")

    monkeypatch.setitem(methods.LOOPS, "grpo", diverged)
    result = run_cli(*TINY, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "no finite gradient" in result.stderr
    assert "grpo-" in result.stderr and result.stderr.count("\n") == 1


def test_an_ablation_is_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "ABLATIONS", (("clip_mode", ("none", "entry")),))
    flags = [*without(TINY, "--sweep", "--group-size"), "--ablate", "--out", str(tmp_path / "out")]
    result = run_cli(*flags, "--results", str(tmp_path / "RESULTS.md"))
    assert result.exit_code == 0, result.output
    for title in ("clip mode=entry", "clip mode=entry against recipe"):
        assert f"| Hausa: {title} |" in result.stdout
        assert f"| Hausa: {title} |" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def test_an_attribution_writes_both_tables_and_the_whole_prompts(tmp_path, monkeypatch):
    kept = [v for v in ATTRIBUTION.variants if v.name in ("copsd", "reference", "translated")]
    small = replace(ATTRIBUTION, variants=tuple(kept), pairs=(("copsd", "reference"),))
    monkeypatch.setattr(plans, "ATTRIBUTION", small)
    out = tmp_path / "out"
    flags = [*without(SMALL, "--group-size"), "--attribute", "--seeds", "1", "--sweep", "1"]
    flags += ["--batch-size", "4", "--token-budget", "350"]
    result = run_cli(*flags, "--out", str(out))
    assert result.exit_code == 0, result.output
    text = (out / "RESULTS.md").read_text(encoding="utf-8")
    assert "| at equal sampled tokens |" in text and "| at equal seconds |" in text
    assert "| Hausa: fine-tuned on the solution against COPSD |" in text
    assert "At the edge of the sweep" in text
    content = read_json(out / "compare.json")
    assert list(content["at equal seconds"]["hau"]["arms"]) == ["base", *(v.name for v in kept)]
    # The base asked in English is the base's English column, with sampled attempts besides.
    base = results_of(out / "hau" / "base")["final"]
    translated = results_of(out / "hau" / "translated")["final"]
    assert translated["greedy"] == base["english"] and "pass@2" in translated["sampled"]
    problems = {p.id: p for p in load_problems(out / "hau" / "train.jsonl", language="hau")}
    for row in read_json(out / "hau" / "reference-0" / "prompts.json"):
        assert row["teacher"] is None and problems[row["problem"]].problem in row["student"]
        assert row["label"] == f"{problems[row['problem']].solution_en}<|im_end|>"
    for row in read_json(out / "hau" / "copsd-0" / "prompts.json"):
        assert str(problems[row["problem"]].solution_en) in row["teacher"] and "label" not in row


def test_the_family_is_every_method_each_with_what_its_own_teacher_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "NEARLY", 1e9)  # no second run at equal seconds
    right = iter(range(10**6))
    monkeypatch.setattr("copsd.is_correct", lambda *_, **__: next(right) % 2 == 0)  # mixed groups
    out = tmp_path / "out"
    result = run_cli(*TINY, "--family", "--note-tokens", "8", "--out", str(out))
    assert result.exit_code == 0, result.output
    text = (out / "RESULTS.md").read_text(encoding="utf-8")
    told = {}
    for method in METHODS:
        assert f"| Hausa: {method.upper()} " in text and EVIDENCE[method] in text
        assert read_rows(out / "hau" / f"{method}-0" / "metrics.jsonl")
        told[method] = [row["teacher"] for row in read_json(out / f"hau/{method}-0/prompts.json")]
    assert told["grpo"] == [None] * 4
    problems = load_problems(out / "hau" / "train.jsonl", language="hau")
    for place, problem in enumerate(problems[:4]):
        for method in ("copsd", "egrsd"):
            assert str(problem.solution_en) in told[method][place]
        for method in ("opsdc", "ophsd", "ssopd"):
            assert str(problem.solution_en) not in told[method][place]
        assert "taƙaita" in told["opsdc"][place]
        assert f"kawai:\n{problem.answer}" in told["ophsd"][place]
        assert "Mafita daidai ta wannan matsala:" in told["ssopd"][place]


def test_a_budget_is_enough_for_a_step_of_the_arm_that_samples_most(tmp_path):
    result = run_cli(*SMALL, "--family", "--note-tokens", "99", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "--token-budget is 640; valid: 1112 or more" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lang", "hau,ha"], "names one of them twice"),
        (["--lang", "hau,xyz"], "unknown language 'xyz'"),
        (["--lang", "hau,fra"], "no data file"),
        (["--seeds", "1,1"], "names one of them twice"),
        (["--seeds", "0"], "valid: a count of 1 to 1000"),
        (["--token-budget", "100"], "--token-budget is 100; valid: 4096 or more"),
        (["--sweep", "0,1"], "factors above 0"),
        (["--sweep", "1,1.0000001"], "differ in their first 5 digits"),
        (["--sweep", "a"], "--sweep is 'a'"),
        (["--group-size", "1"], "--group-size is 1; valid: 2 or more"),
        (["--eval-problems", "0"], "--eval-problems is 0; valid: 1 or more"),
        (["--dev-problems", "0"], "--dev-problems is 0; valid: 1 or more"),
        (["--dev-problems", "500"], "cannot hold out 500"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--out", "tests"], "tests exists and is not a run folder"),
        (["--method", "grpo"], "--method is not for a comparison"),
        (["--sweep", "nan"], "factors above 0"),
        (["--sweep", "inf"], "factors above 0"),
        (["--attribute", "--family"], "experiments of their own; ask for one of them"),
        (["--attribute", "--completion", "teacher"], "would be the same run; leave out"),
        (["--attribute", "--data", "tests/none.jsonl"], "tests/none.jsonl"),
        (["--ablate", "--sweep", "0.3,1"], "--sweep is not for --ablate"),
        (["--witness-tokens", "9"], "--witness-tokens is for --method ssopd; here --method is"),
        (["--family", "--teacher-every", "20"], "the arm 'opsdc' has its own --teacher-every"),
        (["--attribute", "--group-size", "4"], "--group-size is for --method grpo, egrsd, ssopd"),
        (["--attribute", "--teacher-reads", "brief"], "the arm 'answer' would not differ: --"),
        # Two methods whose differences are switched off, or given to both.
        (["--family", "--witness-weight", "0"], "'grpo' and 'ssopd' would be the same run"),
        (
            ["--family", "--credit-mix", "0", "--token-weight", "uniform"],
            "'grpo' and 'egrsd' would be the same run",
        ),
        (
            ["--family", "--teacher-reads", "plan", "--divergence", "reverse_kl"],
            "'copsd' and 'ophsd' would be the same run",
        ),
        # The line names a flag that nobody typed, so it says whose it is.
        (["--attribute", "--answer-only"], "the arm 'english-problem': --answer-only shows"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    result = run_cli("--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def problems_file(path: Path, source: str, **changed: Any) -> str:
    """Write a file's first problems, the last of them changed; return the new file's name."""
    rows = read_rows(Path(source))[:12]
    rows[-1] |= changed
    path.write_text(json_lines(rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attribute"], "the arm 'reference' in hau: --completion reference would be a thought"),
        (["--family", "--note-tokens", "999"], "the arm 'ophsd' in hau: no problem fits"),
    ],
    ids=["thought", "long"],
)
def test_an_arm_that_could_not_start_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, flags, said
):
    """Each was found out when the arm's turn came, hours later."""
    monkeypatch.setattr("parts.setup.prompt_opens_think", lambda *_: "--attribute" in flags)
    few = ["--eval-problems", "6", "--dev-problems", "5", *few_flags()]
    result = run_cli(*flags, *few, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "changed", "flags", "said"),
    [
        ("--eval-data", {"problem": None}, ["--attribute"], "1 of 12 test problems in hau have no"),
        ("--data", {"answer": None}, ["--dev-problems", "2"], "answer None cannot be graded"),
    ],
    ids=["English side", "answer"],
)
def test_problems_that_lack_what_an_arm_takes_are_refused_before_anything_is_made(
    tmp_path, flag, changed, flags, said
):
    files = {"--data": "lab/problems/hau/train.jsonl", "--eval-data": "lab/problems/hau/test.jsonl"}
    files[flag] = problems_file(tmp_path / "some.jsonl", files[flag], **changed)
    named = [word for pair in files.items() for word in pair]
    result = run_cli(*flags, *named, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [None, b"\xff", b"<!-- begin comparison: written by compare.py -->\n"]
)
def test_a_results_file_that_could_not_take_its_section_is_refused_at_the_start(tmp_path, content):
    """It was read when all arms were done, an hour later."""
    file = tmp_path / "RESULTS.md"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    result = run_cli(*SMALL, "--results", str(file), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and str(file) in result.stderr, result.output
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert content is None or file.read_bytes() == content


def test_a_comparison_warns_of_what_collapsed_elsewhere_and_says_in_which_arms(tmp_path):
    console = Console(record=True, width=300)
    flags = {"teacher": "copy", "steps": 5, "eval_problems": 6, "dev_problems": 5}
    plans.make_plan({**flags, "out": str(tmp_path / "out")}, console)
    said = console.export_text().splitlines()
    assert len(said) == 2 and all(line.endswith(" (in copsd)") for line in said)
    assert "an unclipped forward KL" in said[0] and "no step learns from a renewed" in said[1]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CannotWrite("cannot write x: No space left on device"), 2, "error: cannot write x"),
        (KeyboardInterrupt(), 130, ""),
        (FloatingPointError("x: no finite gradient"), 1, "error: x: no finite gradient"),
        (compare.Stopped(), 130, ""),
    ],
)
def test_a_run_in_its_own_process_ends_in_a_line_and_a_code(monkeypatch, capsys, error, code, said):
    def _fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(compare, "run_arm", _fail)
    arm = Arm("copsd", "COPSD", Path("nowhere"), {})
    plan: Any = None  # nothing gets as far as to read it
    assert compare.run_apart(plan, arm) == code
    shown = capsys.readouterr().err
    assert shown.startswith(said) and shown.count("\n") == bool(said)


def test_what_is_wrong_with_a_step_is_said_by_a_run_in_its_own_process(monkeypatch, capsys):
    def _run(plan: Any, arm: Arm, progress: ArmsProgress, console: Console) -> None:
        progress.printed -= 3600  # the next line of progress is due, and is another process's
        for step in (1, 2):
            progress.show({"step": step, "progress": step / 2, "note/plain_frac": 1})

    monkeypatch.setattr(compare, "run_arm", _run)
    plan: Any = None
    assert compare.run_apart(plan, Arm("ophsd", "OPHSD", Path("nowhere"), {})) == 0
    assert capsys.readouterr().out == f"OPHSD: step 1: {NO_NOTE}\n"


def test_two_runs_at_a_time_give_what_one_after_the_other_give(finished, tmp_path):
    out = tmp_path / "out"
    result = run_cli(*SMALL, "--seeds", "1", "--jobs", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = [line.split(":")[0] for line in result.stdout.splitlines() if "greedy accuracy" in line]
    assert [line.split("/")[0] for line in lines[:7]] == [str(number) for number in range(1, 8)]
    adapters = sorted((out / "hau").rglob("adapter_model.safetensors"))
    assert len(adapters) == 6
    for path in adapters:
        assert (finished[0] / path.relative_to(out)).read_bytes() == path.read_bytes()
    sweeps = [read_json(folder / "compare.json")["sweep"] for folder in (finished[0], out)]
    assert without_seconds(sweeps[0]) == without_seconds(sweeps[1])
    for path in (out / "hau").rglob("results.json"):
        arms = path.parent, finished[0] / path.parent.relative_to(out)
        found, expected = (without_seconds(results_of(arm)["final"]) for arm in arms)
        assert found == expected


CLOCKED = ("seconds", "train_s")


def without_seconds(content: Any) -> Any:
    """Return nested results without what a clock tells."""
    if isinstance(content, dict):
        kept = {name: without_seconds(value) for name, value in content.items()}
        return {name: value for name, value in kept.items() if name not in CLOCKED}
    return content
