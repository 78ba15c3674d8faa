"""compare.py: equal budgets, splits that share nothing, arms that are kept, numbers of the arms."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import compare
import methods
from compare import pick_rate, stages_of
from parts import commands, measure, outcome
from parts import plan as plans
from parts.adapters import load_adapter
from parts.data import load_problems
from parts.experiments import ATTRIBUTION, EVIDENCE, GRPO
from parts.files import read_json, read_rows, write_json
from parts.metrics import ratios
from parts.model import load_model, load_tokenizer
from parts.plan import ablation_arms, parse_seeds
from parts.recipe import METHODS, Config
from parts.sampler import SamplingParams

SMALL = [
    *("--lang", "ha", "--seeds", "2", "--sweep", "0.5,1", "--token-budget", "900"),
    *("--batch-size", "8", "--group-size", "4", "--max-new-tokens", "40"),
    *("--eval-problems", "6", "--eval-samples", "2", "--dev-problems", "5"),
]


def run_cli(*arguments: str):
    return CliRunner().invoke(commands.comparison, list(arguments))


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
            assert rows[-2]["sampled_tokens"] < 900 <= rows[-1]["sampled_tokens"]
        folders = list((finished[0] / "hau" / "sweep").glob(f"{method}-*"))
        assert len(folders) == 2
        for folder in folders:
            rows = read_rows(folder / "metrics.jsonl")
            assert rows[-2]["sampled_tokens"] < 450 <= rows[-1]["sampled_tokens"]


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
    result = run_cli(*SMALL, "--out", str(tmp_path / "out"))
    assert result.exit_code == 130 and "same command goes on" in result.stdout
    assert len(list(tmp_path.glob("out/hau/sweep/grpo-*/results.json"))) == 2
    assert not list(tmp_path.glob("out/hau/sweep/copsd-*/results.json"))


def test_an_arm_whose_gradient_is_lost_ends_the_comparison_with_its_name(tmp_path, monkeypatch):
    def diverged(setup, run, view):
        raise FloatingPointError("no finite gradient")

    monkeypatch.setitem(methods.LOOPS, "grpo", diverged)
    result = run_cli(*SMALL, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "error: " in result.stdout and "no finite gradient" in result.stdout
    assert "grpo-" in result.stdout.partition("error: ")[2]


def make_plan(tmp_path: Path, *flags: str, **given: Any) -> plans.Plan:
    """Return the plan of a small experiment, whose folder is made and in which nothing ran."""
    small = {
        "lang": "ha",
        "seeds": "0,4",
        "sweep": "0.5,1",
        "batch_size": 8,
        "group_size": 4,
        "max_new_tokens": 40,
        "eval_problems": 6,
        "dev_problems": 5,
        "steps": 12,
        "out": str(tmp_path / "out"),
    }
    return plans.make_plan({**small, **given})


def measured(right: list[float], tokens: list[float] | None = None) -> dict[str, Any]:
    """Return results with so many right greedy answers and sampled lengths."""
    ones = [1.0] * len(right)
    found = {"greedy": {"pass@1": (right, ones)}}
    if tokens:
        found["sampled"] = {"mean tokens": (tokens, ones)}
    return {"final": found}


def walk(plan: plans.Plan, accuracies: dict[str, float]) -> list[compare.Arm]:
    """Return the arms of a plan, whose sweep's runs get these accuracies by their folder's name."""
    found: dict[Path, Any] = {}
    arms = []
    for stage in stages_of(plan, found):
        arms += stage
        for arm in stage:
            accuracy = accuracies.get(arm.folder.name, 0.0)
            found[arm.folder] = measured([accuracy, accuracy], [10.0, 20.0])
    return arms


def test_arms_are_the_base_the_sweep_and_the_methods_of_every_seed(tmp_path):
    plan = make_plan(tmp_path, lang="ha,sw")
    arms = walk(plan, {"grpo-0.001": 0.5, "copsd-0.0005": 0.75})
    names = [str(arm.folder.relative_to(plan.out)) for arm in arms]
    seeds = [f"{method}-{seed}" for method in ("grpo", "copsd") for seed in (0, 4)]
    sweep = [f"{method}-{rate}" for method in ("grpo", "copsd") for rate in ("0.0005", "0.001")]
    sweeps = [f"{lang}/sweep/{name}" for lang in ("hau", "swa") for name in sweep]
    later = [f"{lang}/{name}" for lang in ("hau", "swa") for name in seeds]
    assert names == ["hau/base", "swa/base", *sweeps, *later]
    assert [arm.folder.name for arm in arms if not arm.is_trained] == ["base", "base"]
    assert [arm.folder.name for arm in arms if arm.is_sweep] == 2 * sweep
    assert sum(arm.size for arm in arms) == pytest.approx(2 * 0.1 + 8 * 0.5 + 8)
    by_name = dict(zip(names, arms, strict=True))
    # All languages take one rate.
    for lang in ("hau", "swa"):
        assert by_name[f"{lang}/grpo-4"].settings["lr"] == 0.001
        assert by_name[f"{lang}/copsd-4"].settings["lr"] == 0.0005
        settings = by_name[f"{lang}/copsd-4"].settings
        assert (settings["method"], settings["lang"], settings["seed"]) == ("copsd", lang, 4)
        assert settings["data"] == str(plan.out / lang / "train.jsonl")
        assert settings["eval_data"] == str(plan.out / lang / "test.jsonl")
        swept = by_name[f"{lang}/sweep/grpo-0.001"].settings
        assert swept["lang"] == lang and swept["eval_data"] == str(plan.out / lang / "dev.jsonl")


def test_without_a_budget_it_is_what_copsds_steps_sample_at_the_bases_length(tmp_path):
    plan = make_plan(tmp_path)
    arms = {arm.folder.name: arm for arm in walk(plan, {})}
    whole = 12 * 8 * 15  # steps, completions, their mean length: of 10 and 20
    assert arms["copsd-0"].settings["token_budget"] == whole
    assert arms["grpo-4"].settings["token_budget"] == whole
    assert arms["copsd-0.001"].settings["token_budget"] == whole // 2
    assert arms["copsd-0"].settings["save_every"] == 2  # six checkpoints of twelve steps
    assert "token_budget" not in arms["base"].settings
    given = replace(
        plan, configs={k: replace(c, token_budget=900) for k, c in plan.configs.items()}
    )
    assert {a.settings.get("token_budget") for a in walk(given, {})} == {None, 450, 900}


def test_the_sweep_picks_the_best_rate_and_the_lowest_of_equals(tmp_path):
    plan = replace(make_plan(tmp_path, lr=0.1), factors=[8.0, 4.0, 2.0, 1.0])
    right = {0.1: 1.0, 0.2: 3.0, 0.4: 3.0, 0.8: 2.0}
    found = {}
    for rate, count in right.items():
        some = [1.0] * int(count) + [0.0] * (4 - int(count))
        found[compare.sweep_folder(plan, "hau", "grpo", rate)] = measured(some)
    assert pick_rate(plan, GRPO, found) == 0.2
    accuracies = compare.sweep_accuracies(plan, GRPO, found)
    assert accuracies == {0.8: 0.5, 0.4: 0.75, 0.2: 0.75, 0.1: 0.25}


def test_the_sweep_picks_what_is_best_over_all_languages(tmp_path):
    plan = replace(make_plan(tmp_path, lang="ha,sw", lr=0.1), factors=[1.0, 2.0])
    found = {}
    for lang, rate, right in (("hau", 0.1, 4), ("hau", 0.2, 3), ("swa", 0.1, 1), ("swa", 0.2, 3)):
        some = [1.0] * right + [0.0] * (4 - right)
        found[compare.sweep_folder(plan, lang, "grpo", rate)] = measured(some)
    assert compare.sweep_accuracies(plan, GRPO, found) == {0.1: 0.625, 0.2: 0.75}
    assert pick_rate(plan, GRPO, found) == 0.2


def test_ablations_change_one_setting_at_a_time():
    variants = ablation_arms(Config(clip_mode="none"))
    arms = {variant.name: variant.settings for variant in variants}
    assert all(variant.title == variant.name for variant in variants)
    assert arms["recipe"] == {}
    assert all(len(settings) == 1 for name, settings in arms.items() if name != "recipe")
    assert "clip mode=none" not in arms and arms["clip mode=entry"] == {"clip_mode": "entry"}
    assert {"swap_solutions": True} in arms.values() and {"english_problem": False} in arms.values()
    assert len(arms) == 10


def test_an_ablations_arms_are_one_method_at_its_recipes_rate(tmp_path):
    plan = make_plan(tmp_path, ablate=True)
    arms = walk(plan, {})
    assert not any(arm.is_sweep for arm in arms) and len(arms) == 1 + 10 * 2
    trained = [arm for arm in arms if arm.is_trained]
    assert not any("lr" in arm.settings for arm in trained)
    changed = {arm.name: arm.settings for arm in trained if arm.settings["seed"] == 4}
    assert changed["teacher=ema"]["teacher"] == "ema" and "teacher" not in changed["recipe"]


def test_an_ablation_is_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "ABLATIONS", (("clip_mode", ("none", "entry")),))
    flags = [*SMALL, "--ablate", "--seeds", "1", "--out", str(tmp_path / "out")]
    result = run_cli(*flags, "--results", str(tmp_path / "RESULTS.md"))
    assert result.exit_code == 0, result.output
    for title in ("clip mode=entry", "clip mode=entry against recipe"):
        assert f"| Hausa: {title} |" in result.stdout
        assert f"| Hausa: {title} |" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def attributed(tmp_path: Path, seconds: dict[str, float]) -> list[compare.Arm]:
    """Return an attribution's arms, which trained for these seconds by their folder's name."""
    plan = make_plan(tmp_path, attribute=True)
    found: dict[Path, Any] = {}
    arms = []
    for stage in stages_of(plan, found):
        arms += stage
        for arm in stage:
            results = measured([1.0, 0.0], [10.0, 20.0])
            results["final"]["train_s"] = seconds.get(arm.folder.name, 100.0)
            found[arm.folder] = results
    return arms


@pytest.mark.parametrize(
    ("flags", "steps", "factors"),
    [
        ({}, 100, [0.03, 0.1, 0.3, 1, 3, 9]),
        ({"family": True}, 30, [0.1, 0.3, 1, 3, 9]),
        ({"attribute": True}, 30, [0.3, 1, 3, 9]),
        ({"attribute": True, "steps": 7, "sweep": "2"}, 7, [2]),
    ],
)
def test_an_experiment_of_many_arms_has_a_smaller_budget_unless_said(
    tmp_path, flags, steps, factors
):
    plan = plans.make_plan({**flags, "out": str(tmp_path / "out")})
    assert (plan.main.steps, plan.factors) == (steps, factors)


def test_an_attributions_arms_share_a_method_a_sweep_and_a_budget(tmp_path):
    arms = attributed(tmp_path, {})
    trained = {arm.folder.name: arm for arm in arms if arm.is_trained and not arm.is_sweep}
    names = [variant.name for variant in ATTRIBUTION.variants if variant.is_trained]
    assert list(trained) == [f"{name}-{seed}" for name in names for seed in (0, 4)]
    assert len({arm.settings["token_budget"] for arm in trained.values()}) == 1
    sweeps = [arm for arm in arms if arm.is_sweep]
    for name in names:
        rates = [arm.settings["lr"] for arm in sweeps if arm.name == name]
        assert rates == [0.0005, 0.001]
    assert trained["reference-4"].settings["completion"] == "reference"
    assert trained["format-0"].settings["swap_solutions"] is True
    (ceiling,) = [arm for arm in arms if arm.in_english]
    assert ceiling.folder.name == "translated" and not ceiling.is_trained


def test_an_arm_that_trains_quicker_than_copsd_runs_again_as_long_and_one_as_quick_does_not(
    tmp_path,
):
    quick = {"reference-0": 20.0, "reference-4": 30.0, "off-policy-0": 108.0}
    arms = {arm.folder.name: arm for arm in attributed(tmp_path, quick)}
    extra = [name for name, arm in arms.items() if arm.is_extra]
    assert extra == ["reference-seconds-0", "reference-seconds-4"]
    first = arms["reference-0"].settings
    again = arms["reference-seconds-0"].settings
    assert again["token_budget"] == 4 * first["token_budget"]  # 100 seconds instead of 25
    differ = {name for name in first if first[name] != again[name]}
    assert differ == {"token_budget", "save_every"}


def test_an_attribution_writes_both_tables_and_the_whole_prompts(tmp_path, monkeypatch):
    kept = [v for v in ATTRIBUTION.variants if v.name in ("copsd", "reference", "translated")]
    small = replace(ATTRIBUTION, variants=tuple(kept), pairs=(("copsd", "reference"),))
    monkeypatch.setattr(plans, "ATTRIBUTION", small)
    out = tmp_path / "out"
    flags = [*SMALL, "--attribute", "--seeds", "1", "--sweep", "1", "--token-budget", "700"]
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
    monkeypatch.setattr(compare, "NEARLY", 1e9)  # no second run at equal seconds
    right = iter(range(10**6))
    monkeypatch.setattr("copsd.is_correct", lambda *_, **__: next(right) % 2 == 0)  # mixed groups
    out = tmp_path / "out"
    flags = [*SMALL, "--family", "--seeds", "1", "--sweep", "1", "--note-tokens", "8"]
    result = run_cli(*flags, "--out", str(out))
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
    assert result.exit_code == 2 and "--token-budget is 900; valid: 1112 or more" in result.stderr


def test_the_splits_that_are_written_are_kept_as_they_are(tmp_path):
    plan = make_plan(tmp_path)
    files = sorted((plan.out / "hau").glob("*.jsonl"))
    assert [file.name for file in files] == ["dev.jsonl", "test.jsonl", "train.jsonl"]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert plans.read_splits(plan, "hau") == {}
    make_plan(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    # A split comes back with every field that training and measuring read.
    source = {p.id: p for p in load_problems(Path("lab/problems/hau/train.jsonl"), language="hau")}
    dev = load_problems(plan.out / "hau" / "dev.jsonl", language="hau")
    assert dev == [source[problem.id] for problem in dev]


def test_seeds_are_a_count_or_a_list():
    assert parse_seeds("3") == [0, 1, 2] and parse_seeds("0,4,7") == [0, 4, 7]
    for text in ("0", "1,1", "x", "-1", "1000,2"):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(text)


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
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    result = run_cli("--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_runs_at_a_time_give_what_one_after_the_other_give(finished, tmp_path):
    out = tmp_path / "out"
    result = run_cli(*SMALL, "--jobs", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = [line.split(":")[0] for line in result.stdout.splitlines() if "greedy accuracy" in line]
    assert [line.split("/")[0] for line in lines[:9]] == [str(number) for number in range(1, 10)]
    adapters = sorted((finished[0] / "hau").rglob("adapter_model.safetensors"))
    assert len(adapters) == 8
    for path in adapters:
        assert (out / path.relative_to(finished[0])).read_bytes() == path.read_bytes()
    for name in ("sweep", "languages"):
        both = [read_json(folder / "compare.json")[name] for folder in (finished[0], out)]
        assert without_seconds(both[0]) == without_seconds(both[1])


CLOCKED = ("seconds", "train_s")


def without_seconds(content: Any) -> Any:
    """Return nested results without what a clock tells."""
    if isinstance(content, dict):
        kept = {name: without_seconds(value) for name, value in content.items()}
        return {name: value for name, value in kept.items() if name not in CLOCKED}
    return content
