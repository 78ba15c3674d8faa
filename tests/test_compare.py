"""The comparison: equal budgets, splits that share nothing, arms that are kept, numbers that are the arms' own."""

import json
from pathlib import Path
from typing import Any

import bench.compare
import pytest
from bench.compare import ablation_arms, parse_seeds
from bench.outcome import band, over_seeds, per_problem, right_within
from typer.testing import CliRunner

import copsd
from copsd import Config

SMALL = [
    "--lang",
    "ha",
    "--seeds",
    "2",
    "--sweep",
    "0.5,1",
    "--token-budget",
    "900",
    "--batch-size",
    "8",
    "--group-size=4",
    "--max-new-tokens",
    "40",
    "--eval-problems",
    "6",
    "--eval-samples",
    "2",
    "--dev-problems",
    "5",
]


def run_cli(*arguments: str):
    return CliRunner().invoke(copsd.app, ["compare", *arguments])


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compare") / "out"
    result = run_cli(*SMALL, "--out", str(out))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_the_splits_share_no_problem(finished):
    parts = [
        {row["problem_translated"] for row in jsonl(finished[0] / "hau" / f"{n}.jsonl")}
        for n in ("train", "dev")
    ]
    parts.append({row["problem_translated"] for row in jsonl(finished[0] / "hau" / "test.jsonl")})
    assert [len(part) for part in parts][1:] == [5, 6]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_every_arm_spends_the_budget_and_no_more_than_a_step_over_it(finished):
    for method in ("grpo", "copsd"):
        for seed in (0, 1):
            rows = jsonl(finished[0] / "hau" / f"{method}-{seed}" / "metrics.jsonl")
            assert rows[-2]["sampled_tokens"] < 900 <= rows[-1]["sampled_tokens"]
        for folder in (finished[0] / "hau" / "sweep").glob(f"{method}-*"):
            rows = jsonl(folder / "metrics.jsonl")
            assert rows[-2]["sampled_tokens"] < 450 <= rows[-1]["sampled_tokens"]


def test_arms_take_the_rate_that_the_sweep_picked_on_the_development_split(finished):
    out = finished[0]
    rates = json.loads((out / "compare.json").read_text())["rates"]
    for method in ("grpo", "copsd"):
        best = max(rates[method]["accuracy"].values())
        assert rates[method]["picked"] == min(
            float(r) for r, a in rates[method]["accuracy"].items() if a == best
        )
        config = json.loads((out / "hau" / f"{method}-1" / "config.json").read_text())["config"]
        assert config["lr"] == rates[method]["picked"] and config["eval_data"].endswith(
            "test.jsonl"
        )
    for folder in (out / "hau" / "sweep").iterdir():
        assert json.loads((folder / "config.json").read_text())["config"]["eval_data"].endswith(
            "dev.jsonl"
        )


def test_the_table_holds_the_results_of_the_arms(finished):
    out, printed = finished
    found = json.loads((out / "compare.json").read_text())["languages"]["hau"]
    accuracies = []
    for seed in (0, 1):
        greedy = json.loads((out / "hau" / f"copsd-{seed}" / "results.json").read_text())["final"][
            "greedy"
        ]
        accuracies.append(sum(greedy["correct"]) / 6)
    assert found["arms"]["copsd"]["greedy accuracy"]["by_seed"] == accuracies
    assert found["arms"]["copsd"]["greedy accuracy"]["value"] == pytest.approx(sum(accuracies) / 2)
    pair = found["pairs"]["copsd - grpo"]["greedy accuracy"]
    values = [found["arms"][name]["greedy accuracy"]["value"] for name in ("copsd", "grpo")]
    assert pair["value"] == pytest.approx(values[0] - values[1]) and 0 < pair["p"] <= 1
    text = (out / "tables.md").read_text(encoding="utf-8")
    assert (
        "| Hausa: GRPO |" in text
        and "| Hausa: COPSD against GRPO |" in text
        and text.strip() in printed
    )
    for name in ("compare", "compare_hau"):
        assert (out / f"{name}.png").stat().st_size > 10_000 and "<svg" in (
            out / f"{name}.svg"
        ).read_text()


def test_the_last_checkpoint_evaluates_as_the_adapter_that_was_saved(finished):
    from eval import evaluate
    from parts.adapters import load_adapter
    from parts.data import load_problems
    from parts.model import load_model, load_tokenizer
    from parts.sampler import SamplingParams

    run = finished[0] / "hau" / "copsd-0"
    folder = Path("lab/tiny")
    model = load_model(folder, device="cpu", dtype=copsd.torch.float32)
    load_adapter(model, sorted((run / "adapters").iterdir())[-1])
    problems = load_problems(finished[0] / "hau" / "test.jsonl", language="hau")
    results = evaluate(model, load_tokenizer(folder), problems, SamplingParams(40, 0.0, 0.95))
    final = json.loads((run / "results.json").read_text())["final"]
    assert [float(r.attempts[0].correct) for r in results] == final["greedy"]["correct"]
    assert [r.attempts[0].tokens for r in results] == final["greedy"]["tokens"]


def test_what_is_finished_is_not_done_again_and_other_settings_are_refused(finished, monkeypatch):
    out = finished[0]
    before = (out / "tables.md").read_bytes()
    (out / "tables.md").unlink()
    monkeypatch.setitem(copsd.LOOPS, "grpo", None)
    monkeypatch.setitem(copsd.LOOPS, "copsd", None)
    assert run_cli(*SMALL, "--out", str(out)).exit_code == 0
    assert (out / "tables.md").read_bytes() == before
    result = run_cli(*SMALL, "--out", str(out), "--seeds", "3")
    assert (
        result.exit_code == 2
        and "differs in seeds" in result.stderr
        and result.stderr.count("\n") == 1
    )
    place = SMALL.index("--eval-samples")
    result = run_cli(
        *SMALL[:place], *SMALL[place + 2 :], "--out", str(out)
    )  # a setting that is no longer given
    assert (
        result.exit_code == 2
        and "differs in grpo eval_samples, copsd eval_samples" in result.stderr
    )


def test_a_signal_keeps_what_is_finished(tmp_path, monkeypatch):
    loop = copsd.LOOPS["grpo"]
    monkeypatch.setitem(copsd.LOOPS, "copsd", lambda setup, run, view: False)
    result = run_cli(*SMALL, "--out", str(tmp_path / "out"))
    assert result.exit_code == 130 and "same command goes on" in result.stdout
    assert len(list(tmp_path.glob("out/hau/sweep/grpo-*/results.json"))) == 2 and loop


def test_ablations_change_one_setting_at_a_time():
    arms = ablation_arms(Config(clip_mode="none"))
    assert arms["recipe"] == {} and all(
        len(flags) == 1 for name, flags in arms.items() if name != "recipe"
    )
    assert (
        "clip_mode=none".replace("_", " ") not in arms and {"clip_mode": "entry"} in arms.values()
    )
    assert {"swap_solutions": True} in arms.values() and {"english_problem": False} in arms.values()
    assert len(arms) == 10


def test_an_ablation_is_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.compare, "ABLATIONS", (("clip_mode", ("none", "entry")),))
    result = run_cli(*SMALL, "--ablate", "--seeds", "1", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert (
        "| Hausa: clip mode=entry |" in result.stdout
        and "| Hausa: clip mode=entry against recipe |" in result.stdout
    )


def test_the_sweep_picks_the_best_rate_and_the_lowest_of_equals(monkeypatch):
    right = {0.1: 1.0, 0.2: 3.0, 0.4: 3.0, 0.8: 2.0}

    def evaluated(tools, arm, *rest, **options):
        return {"final": {"greedy": {"correct": [right[arm.settings["lr"]]], "n": [4.0]}}}

    monkeypatch.setattr(bench.compare, "timed", evaluated)
    unused: Any = None
    found = bench.compare.sweep(
        unused, {"lang": "hau"}, 0.1, "grpo", [8.0, 4.0, 2.0, 1.0], Path("out"), unused
    )
    assert found["picked"] == 0.2 and found["accuracy"] == {
        "0.8": 0.5,
        "0.4": 0.75,
        "0.2": 0.75,
        "0.1": 0.25,
    }


def test_seeds_are_a_count_or_a_list():
    assert parse_seeds("3") == [0, 1, 2] and parse_seeds("0,4,7") == [0, 4, 7]
    for text in ("0", "1,1", "x", "-1", "1000,2"):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(text)


def test_a_band_spans_the_seeds_where_all_of_them_have_been():
    points = band([[(0.0, 0.0), (10.0, 1.0)], [(0.0, 0.0), (20.0, 1.0)]])
    assert points[-1] == (10.0, 0.75, 0.5, 1.0) and points[0] == (0.0, 0.0, 0.0, 0.0)


def test_estimates_by_hand():
    run = {
        "greedy": {
            "n": [1.0, 1.0],
            "correct": [1.0, 0.0],
            "formatted": [1.0, 0.0],
            "tokens": [4.0, 8.0],
            "tokens_if_right": [4.0, 0.0],
        },
        "sampled": {"n": [2.0, 2.0], "correct": [1.0, 0.0]},
    }
    assert per_problem("pass@1", run)[0] == [0.5, 0.0] and per_problem("pass@2", run)[0] == [
        1.0,
        0.0,
    ]
    assert over_seeds("accuracy given a box", [run])["value"] == 1.0
    assert over_seeds("greedy accuracy", [run, run])["by_seed"] == [0.5, 0.5]
    assert (right_within(run, 3), right_within(run, 4)) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lang", "hau,ha"], "names one of them twice"),
        (["--lang", "hau,xyz"], "unknown language 'xyz'"),
        (["--seeds", "1,1"], "names one of them twice"),
        (["--seeds", "0"], "valid: a count of 1 or more"),
        (["--token-budget", "100"], "--token-budget is 100; valid: 4096 or more"),
        (["--sweep", "0,1"], "factors above 0"),
        (["--sweep", "a"], "--sweep is 'a'"),
        (["--group-size", "1"], "--group-size is 1; valid: 2 or more"),
        (["--eval-problems", "0"], "--eval-problems is 0; valid: 1 or more"),
        (["--dev-problems", "0"], "--dev-problems is 0; valid: 1 or more"),
        (["--dev-problems", "500"], "cannot hold out 500"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--out", "tests"], "tests exists and is not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    result = run_cli("--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and result.stderr.count("\n") == 1
