"""parts/watch.py: a watched run learns what an unwatched one does, and says when it goes wrong."""

import io
import itertools
import json
from pathlib import Path

import pytest
from conftest import die_at, few_flags, few_problems, stop_at
from rich.console import Console
from typer.testing import CliRunner

import copsd
from methods import LOOPS
from parts import checkpoints, commands, watch
from parts.data import load_problems, write_problems
from parts.files import read_json, read_rows
from parts.sampler import Rollout
from parts.setup import configure, prepare
from parts.view import StepView
from parts.watch import Rule, Watching, alarms, best_row, repeated_share

SMALL = {"batch_size": 8, "micro_batch": 4, "eval_problems": 0, "max_new_tokens": 24, "lr": 5e-3}
LOOKS = {"eval_every": 2, "dev_problems": 5}
QUIET = Console(quiet=True)
TRAIN = Path(few_problems()["data"])


def make_setup(out: Path, **given):
    config, folder = configure({**SMALL, **few_problems(), "out": str(out), **given})
    return prepare(config, folder, QUIET)


def train(out: Path, **given) -> Path:
    setup, run = make_setup(out, **given)
    assert LOOPS[setup.config.method](setup, run, StepView(QUIET, setup.config.steps))
    return run.folder


def adapter(folder: Path, step: int) -> bytes:
    return (folder / f"adapters/step_{step:05d}/adapter_model.safetensors").read_bytes()


def timeless(folder: Path) -> list[dict]:
    rows = read_rows(folder / "metrics.jsonl")
    return [
        {name: x for name, x in row.items() if "time_s" not in name and "memory" not in name}
        for row in rows
    ]


def a_log(**metrics: list[float]) -> list[dict]:
    """Return rows of metrics, by the words of their names after the slash."""
    names = {rule.metric.split("/")[1]: rule.metric for rule in watch.RULES}
    names |= {"dev": watch.DEV_METRIC}
    steps = len(next(iter(metrics.values())))
    return [
        {"step": step + 1, **{names[name]: values[step] for name, values in metrics.items()}}
        for step in range(steps)
    ]


# Alarms


@pytest.mark.parametrize(
    ("metric", "start", "fine", "wrong"),
    [
        ("completion_tokens_mean", 100.0, [51.0, 199.0], [49.0, 201.0]),
        ("cut_frac", 0.1, [0.0, 0.34], [0.36]),
        ("format_frac", 0.9, [0.66, 1.0], [0.64]),
        ("repeated_frac", 0.05, [0.0, 0.24], [0.26]),
        ("kl_nats_per_token", 0.3, [0.0, 0.84], [0.86]),
        ("student_entropy_nats_per_token", 0.4, [0.041, 1.29], [0.039, 1.31]),
    ],
)
def test_a_metric_raises_an_alarm_outside_its_limits_and_nowhere_else(metric, start, fine, wrong):
    for value in fine:
        assert alarms(a_log(**{metric: [start] * 5 + [value] * 3})) == {}
    for value in wrong:
        (said,) = alarms(a_log(**{metric: [start] * 5 + [value] * 3})).values()
        assert said == f"{value:.3g}, at the start {start:.3g}"


def test_every_rule_is_about_something_that_steps_log(tmp_path):
    (row,) = read_rows(train(tmp_path / "run", steps=1) / "metrics.jsonl")
    assert all(isinstance(row[rule.metric], float) for rule in watch.RULES)
    assert row["alarms"] == {}


def test_an_alarm_is_of_means_over_the_first_and_the_last_steps():
    odd = [0.0] * 5 + [1.0, 0.0, 0.0]  # one odd batch of three
    assert alarms(a_log(cut_frac=[0.0] * 5 + [0.7, 0.0, 0.0])) == {}
    assert list(alarms(a_log(cut_frac=odd))) == ["share cut"]
    assert alarms(a_log(cut_frac=[*odd, 0.0])) == {}  # and it ends
    assert alarms(a_log(cut_frac=[1.0, 0.0, 0.0])) == {}, "too early to say"
    # Rows without the metric, as of GRPO without a KL, or with null for nan, are no zeros.
    assert alarms([{"step": step} for step in range(9)]) == {}
    holes = a_log(format_frac=[0.9] * 5 + [0.9] * 3)
    holes[0]["rollout/format_frac"] = None
    assert alarms(holes) == {}
    # The log has null for a step whose numbers ended; in memory it is nan.
    dropped = a_log(format_frac=[0.9] * 7 + [float("nan")])
    assert alarms(dropped) == {}


def test_a_run_that_collapses_after_its_first_update_raises_an_alarm_that_stays():
    values = [0.9, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rows = a_log(format_frac=values)
    for place, row in enumerate(rows):
        row["alarms"] = alarms(rows[: place + 1])
    raised = [row["alarms"].get("share with an answer") for row in rows]
    assert raised[:3] == [None] * 3 and raised[3] == "0.0333, at the start 0.9"
    assert set(raised[4:]) == {"0, at the start 0.9"}
    # So it is with the rows between the edges left out, as the log is read.
    assert alarms([*rows[:8], *rows[-2:]]) == rows[-1]["alarms"]


def test_the_start_grows_to_five_steps_while_all_is_well():
    for steps in range(4, 12):
        rows = a_log(completion_tokens_mean=[10.0, 20.0, 30.0, 40.0, 50.0, *[60.0] * 7][:steps])
        rows[-1]["rollout/completion_tokens_mean"] = 1e6
        start = {4: "10", 5: "15", 6: "20", 7: "25"}.get(steps, "30")
        assert alarms(rows)["completion tokens"].endswith(f"at the start {start}")


def test_a_rule_has_two_sides():
    rule = Rule("x", "x", highest=(2.0, 1.0), lowest=(0.5, -1.0))
    assert rule.alarm(4.0, 9.0) is None and rule.alarm(4.0, 1.0) is None
    assert rule.alarm(4.0, 9.1) == "9.1, at the start 4"
    assert rule.alarm(4.0, 0.9) == "0.9, at the start 4"


def test_repeated_text_is_the_share_of_runs_of_eight_that_were_there_before():
    assert repeated_share(range(40)) == 0.0
    assert repeated_share([7] * 7) == 0.0  # shorter than a run
    assert repeated_share([7] * 11) == pytest.approx(3 / 4)
    assert repeated_share([*range(8), *range(8)]) == pytest.approx(1 / 9)


def test_texts_are_counted_by_completion(tmp_path):
    setup, _ = make_setup(tmp_path / "run", steps=1)
    rollouts = copsd.roll_out(setup, setup.train[:4], seed=0)
    end = setup.tokenizer.eos_token_id
    answer = setup.tokenizer.encode(r"Amsar ita ce \boxed{7}.", add_special_tokens=False)
    loop = setup.tokenizer.encode("7", add_special_tokens=False) * 15  # 8 runs, 7 of them old
    texts = [[*answer, end], [*answer, end], loop, [end]]
    made = [
        Rollout(rollout.prompt_ids, ids, rollout.logprobs, "stop")
        for rollout, ids in zip(rollouts, texts, strict=True)
    ]
    found = watch.text_metrics(setup, made)
    assert found["rollout/format_frac"] == 0.5
    assert found["rollout/repeated_frac"] == pytest.approx(7 / 8 / 4)


# Development problems


@pytest.mark.parametrize("method", ["copsd", "grpo"])
def test_a_watched_run_learns_what_one_that_is_not_learns_from_the_same_problems(tmp_path, method):
    flags = {"steps": 3, "save_every": 2, "method": method}
    setup, _ = make_setup(tmp_path / "split", **flags, **LOOKS)
    everything = load_problems(TRAIN, language="hau")
    assert len(setup.dev) == 5 and len(setup.train) == len(everything) - 5
    rest = tmp_path / "rest.jsonl"
    write_problems(rest, [problem for problem in everything if problem not in setup.dev])
    watched = train(tmp_path / "watched", **flags, **LOOKS)
    plain = train(tmp_path / "plain", **flags, data=str(rest))
    for step in (2, 3):
        assert adapter(watched, step) == adapter(plain, step)
    assert (watched / "completions.jsonl").read_bytes() == (
        plain / "completions.jsonl"
    ).read_bytes()
    trained = {row["problem_id"] for row in read_rows(watched / "completions.jsonl")}
    assert not trained & {problem.id for problem in setup.dev}


def test_development_problems_are_tried_every_k_steps_and_at_the_end(tmp_path):
    folder = train(tmp_path / "run", steps=5, save_every=3, **LOOKS)
    rows = read_rows(folder / "metrics.jsonl")
    tried = [row["step"] for row in rows if watch.DEV_METRIC in row]
    assert tried == [2, 4, 5]
    assert all(0 <= row[watch.DEV_METRIC] <= 1 for row in rows if row["step"] in tried)
    assert rows[1]["dev/problems"] == 5 and rows[1]["dev/completion_tokens_mean"] > 1
    kept = sorted(path.name for path in (folder / "adapters").iterdir())
    assert kept == [f"step_{step:05d}" for step in (2, 3, 4, 5)]


def test_without_looks_no_problem_is_set_aside(tmp_path):
    folder = train(tmp_path / "run", steps=2)
    assert not any(name.startswith("dev/") for row in timeless(folder) for name in row)
    setup, _ = make_setup(tmp_path / "other", steps=1)
    assert setup.dev == [] and len(setup.train) == len(load_problems(TRAIN, language="hau"))


def test_a_watched_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    flags = {"steps": 5, "save_every": 3, **LOOKS}
    straight = train(tmp_path / "straight", **flags)
    setup, run = make_setup(tmp_path / "killed", **flags)
    view = StepView(QUIET, 5)
    die_at(4, view, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        copsd.train_copsd(setup, run, view)
    resumed = train(tmp_path / "killed", **flags)
    assert timeless(straight) == timeless(resumed)
    for step in (2, 3, 4, 5):
        assert adapter(straight, step) == adapter(resumed, step)
    for name in ("resume/step_00005.safetensors", "completions.jsonl"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


def test_the_development_problems_are_tried_before_the_first_step_and_once(tmp_path, monkeypatch):
    scores = iter([0.5, 0.31, 0.29])
    look = {"dev/problems": 5, watch.DEV_TIME: 1.0}
    monkeypatch.setattr(
        watch, "dev_metrics", lambda setup: {watch.DEV_METRIC: next(scores), **look}
    )
    out = tmp_path / "run"
    setup, run = make_setup(out, steps=2, eval_every=1, dev_problems=5)
    with Watching().start(setup, run, QUIET):
        assert read_json(out / "dev_before.json") == {watch.DEV_METRIC: 0.5, "dev/problems": 5}
    stream = io.StringIO()
    assert copsd.train(setup, run, Console(file=stream, width=400), copsd.train_copsd) == 0
    first, second = read_rows(out / "metrics.jsonl")
    assert first["alarms"] == {}
    assert second["alarms"] == {"development accuracy": "0.29, at the start 0.5"}
    said = "0.310 on 5 development problems, 0.500 before training: no better than without"
    assert said in stream.getvalue()


@pytest.mark.parametrize("content", ["{}", "[]", '{"dev/greedy_accuracy": "0.5"}'])
def test_a_damaged_look_before_the_first_step_is_one_line(tmp_path, content):
    folder = train(tmp_path / "run", steps=1, **LOOKS)
    (folder / "dev_before.json").write_text(content)
    with pytest.raises(ValueError, match=r"dev_before\.json .*; remove it to have it made again"):
        make_setup(tmp_path / "run", steps=1, **LOOKS)


def test_the_best_step_is_the_first_of_the_best():
    assert best_row([]) is None and best_row([{"step": 1}]) is None
    rows = a_log(dev=[0.2, 0.5, 0.5, 0.4])
    del rows[3][watch.DEV_METRIC]
    best = best_row(rows)
    assert best is not None and best["step"] == 2


# The command


def run_cli(*arguments: str):
    small = ["--batch-size", "4", "--max-new-tokens", "20", "--eval-problems", "0"]
    return CliRunner().invoke(commands.copsd, ["train", *small, *few_flags(), *arguments])


def test_what_is_shown_changes_no_byte(tmp_path):
    folders = []
    for name, terminal, watching in (
        ("plain", False, Watching()),
        ("shown", True, Watching(show_rollout=True, stop_on_collapse=True)),
    ):
        setup, run = make_setup(tmp_path / name, steps=2)
        console = Console(file=io.StringIO(), force_terminal=terminal, width=40)
        assert copsd.train(setup, run, console, copsd.train_copsd, watching) == 0
        folders.append(run.folder)
    plain, shown = folders
    assert adapter(plain, 2) == adapter(shown, 2) and timeless(plain) == timeless(shown)
    for file in ("completions.jsonl", "resume/step_00002.safetensors"):
        assert (plain / file).read_bytes() == (shown / file).read_bytes()


def test_the_best_adapter_is_named_at_the_end_and_is_there(tmp_path):
    out = tmp_path / "run"
    looks = ["--eval-every", "1", "--dev-problems", "3"]
    result = run_cli("--steps", "3", *looks, "--show-rollout", "--out", str(out))
    assert result.exit_code == 0, result.output
    best = read_json(out / "best.json")
    rows = read_rows(out / "metrics.jsonl")
    assert best["step"] == best_row(rows)["step"]  # type: ignore[index]
    assert not any("time" in name for name in best)  # the same run has the same bytes
    assert (out / best["adapter"] / "adapter_model.safetensors").is_file()
    assert f"best adapter: {out / best['adapter']}, after step {best['step']}" in result.stdout
    assert "on 3 development problems" in result.stdout
    shown = read_rows(out / "completions.jsonl")[-1]
    said = f"  {shown['problem_id']}, right answer {shown['answer']}: "
    assert said in result.stdout


def test_a_run_stops_on_collapse_and_goes_on_without_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "START_STEPS", 1)
    monkeypatch.setattr(watch, "RECENT_STEPS", 1)
    real = watch.text_metrics
    monkeypatch.setattr(
        watch, "text_metrics", lambda *a: {**real(*a), "rollout/repeated_frac": next(shares)}
    )
    flags = ["--steps", "5", "--save-every", "4", "--out", str(tmp_path / "run")]
    shares = iter([0.0, 0.1, 0.9])
    result = run_cli(*flags, "--stop-on-collapse")
    assert result.exit_code == 1, result.output
    assert "alarm: share of repeated text 0.9, at the start 0" in result.stdout
    said = "collapse at step 3: share of repeated text 0.9, at the start 0"
    assert said in result.stdout and "stopped and saved" in result.stdout
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [list(row["alarms"]) for row in rows] == [[], [], ["share of repeated text"]]
    assert (tmp_path / "run" / "resume" / "step_00003.safetensors").is_file()
    shares = iter([0.9, 0.9])
    result = run_cli(*flags)
    assert result.exit_code == 0, result.output
    assert "alarm: " not in result.stdout  # it stands, and was told
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    straight = tmp_path / "straight"
    shares = iter([0.0] * 5)
    assert run_cli(*flags[:-1], str(straight)).exit_code == 0
    assert adapter(tmp_path / "run", 5) == adapter(straight, 5)


def test_a_run_that_is_no_longer_finite_still_names_its_best_adapter(tmp_path, monkeypatch):
    plain = copsd.take_step
    updates = itertools.count(1)

    def _overflow(*given, **options):
        if next(updates) == 3:
            raise FloatingPointError("after this update a weight is not finite")
        return plain(*given, **options)

    monkeypatch.setattr(copsd, "take_step", _overflow)
    out = tmp_path / "run"
    result = run_cli("--steps", "4", "--eval-every", "1", "--dev-problems", "2", "--out", str(out))
    assert result.exit_code == 1, result.output
    kept = f"{out} keeps the state after step 2; the same command goes on from there"
    said = f"error: after this update a weight is not finite; {kept}\n"
    assert result.stderr == said and "error" not in result.stdout
    best = read_json(out / "best.json")
    assert f"best adapter: {out / best['adapter']}, after step {best['step']}" in result.stdout


def test_the_best_steps_state_is_kept_beside_the_last_ones(tmp_path, monkeypatch):
    dev = [0.2, 0.9, 0.1, 0.3, 0.9, 0.2]  # of equals, the first is the best
    monkeypatch.setattr(watch, "dev_metrics", lambda setup: {watch.DEV_METRIC: next(scores)})
    flags = {"steps": 6, "keep": 1, "eval_every": 1, "dev_problems": 2, "batch_size": 4}
    scores = iter(dev)
    straight = train(tmp_path / "straight", **flags)
    files = sorted(path.name for path in (straight / "resume").iterdir())
    assert [name for name in files if name.endswith(".json")] == [
        "step_00002.json",
        "step_00006.json",
    ]
    scores = iter(dev)
    setup, run = make_setup(tmp_path / "stopped", **flags)
    view = StepView(QUIET, 6)
    stop_at(4, view, monkeypatch)
    assert copsd.train_copsd(setup, run, view) is False
    assert checkpoints.saved_steps(run.folder) == [4, 2]
    stopped = train(tmp_path / "stopped", **flags)
    assert sorted(path.name for path in (stopped / "resume").iterdir()) == files
    for name in ("step_00002.safetensors", "step_00006.safetensors"):
        assert (stopped / "resume" / name).read_bytes() == (straight / "resume" / name).read_bytes()


def test_the_last_completion_is_the_last_line(tmp_path):
    assert watch.last_completion(tmp_path) is None
    path = tmp_path / "completions.jsonl"
    path.write_text("")
    assert watch.last_completion(tmp_path) is None
    rows = [{"step": step, "completion": "\u2028é" * 300_000} for step in range(3)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = watch.last_completion(tmp_path)
    assert found is not None and found["step"] == 2


def test_the_watch_asks_for_an_end_only_where_it_was_told_to():
    metrics = {"step": 9, "progress": 0.5, "alarms": {"KL": "3, at the start 0.1"}}
    run = copsd.runs.Run(Path("nowhere"))
    stream = io.StringIO()
    view = StepView(Console(file=stream), 9)
    assert watch.Watch(run, [view], stop_on_collapse=False).show(metrics) is False
    guard = watch.Watch(run, [], stop_on_collapse=True)
    assert guard.show({**metrics, "alarms": {}}) is False and guard.show(metrics) is True
    assert guard.collapsed == "collapse at step 9: KL 3, at the start 0.1"
    assert stream.getvalue() == "step 9/9\nalarm: KL 3, at the start 0.1\n"
    # At the last step the run was said to be one that would go on.
    assert guard.summary(finished=True) == [guard.collapsed]
    (said,) = guard.summary(finished=False)
    assert said == f"{guard.collapsed} (without --stop-on-collapse the run would go on)"
    assert Watching() == Watching(track=None, show_rollout=False, stop_on_collapse=False)
