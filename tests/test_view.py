"""What is watched on a terminal: the numbers survive the layout, and no name is read as markup."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from parts.view import COLUMNS, NO_NOTE, ArmsProgress, SamplingProgress, StepView, say, sparkline

ROOT = Path(__file__).resolve().parent.parent
METRICS = {
    name: 0.25
    for title, (name, _) in COLUMNS.items()
    if title not in ("objective", "reward", "dead", "ratio max")
}
METRICS_TITLES = {title for title, (name, _) in COLUMNS.items() if name in METRICS}
NAME = "runs/[bold]a:smile:[/]"  # rich would drop the brackets and draw a face


def test_without_a_terminal_a_step_is_one_line():
    stream = io.StringIO()
    with StepView(Console(file=stream, width=40), steps=3) as view:
        view.show({**METRICS, "step": 1, "progress": 1 / 3})
        view.show({**METRICS, "step": 2, "progress": 2 / 3})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step 2/3  loss +0.2500  KL 0.2500  clipped 25%")


def test_with_a_budget_of_tokens_the_share_of_it_is_shown():
    stream = io.StringIO()
    with StepView(Console(file=stream), steps=None) as view:
        view.show({"step": 7, "progress": 0.31, "reward/mean": 0.5, "loss/kl_nats_per_token": None})
    assert stream.getvalue() == "step 7, 31%  reward 0.500\n"


def test_the_share_that_the_length_limit_cut_is_not_the_share_that_the_clip_clipped():
    stream = io.StringIO()
    with StepView(Console(file=stream), steps=9) as view:
        cut = {"rollout/cut_frac": 0.75, "loss/clipped_token_frac": 0.5}
        view.show({"step": 1, "progress": 1 / 9, **cut})
    assert stream.getvalue() == "step 1/9  clipped 50%  cut 75%\n"


def test_on_a_terminal_the_last_steps_and_the_bar_are_shown():
    stream = io.StringIO()
    with StepView(Console(file=stream, width=120, force_terminal=True), steps=40) as view:
        for step in range(1, 31):
            view.show({**METRICS, "step": step, "progress": step / 40})
    last = stream.getvalue().rsplit("student H", 1)[1]
    assert "step 30/40" in last
    assert "19" in last
    assert " 18 " not in last


def test_that_no_note_could_be_read_is_said_once():
    lacking, partly = ({"note/plain_frac": share} for share in (1.0, 0.5))
    for first, times in ((partly, 1), (lacking, 1)):
        stream = io.StringIO()
        with StepView(Console(file=stream), steps=4) as view:
            for step, each in enumerate((first, lacking, lacking), start=1):
                view.show({"step": step, "progress": step / 4, **each})
        assert stream.getvalue().count(NO_NOTE) == times
        assert f"step {1 if first is lacking else 2}: {NO_NOTE}" in stream.getvalue()
    stream = io.StringIO()
    with StepView(Console(file=stream), steps=4) as view:
        view.recall([{"step": 1, "progress": 0.25, **lacking}])
        view.show({"step": 2, "progress": 0.5, **lacking})
    assert NO_NOTE not in stream.getvalue(), "it was said before the run was stopped"
    stream = io.StringIO()
    arms = ArmsProgress(Console(file=stream), arms=2, units=2.0)
    for title in ("one", "two"):
        arms.start(title, 1.0)
        for step in (1, 2):
            arms.show({"step": step, "progress": step / 2, **lacking})
    said = [line for line in stream.getvalue().splitlines() if NO_NOTE in line]
    assert said == [f"{title}: step 1: {NO_NOTE}" for title in ("one", "two")]


def shown(rows: list[dict], width: int, **options) -> list[str]:
    """Return the lines of the last picture of a terminal so wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, height=30, force_terminal=True, color_system=None)
    with StepView(console, 40, **options) as view:
        for row in rows:
            view.show(row)
        picture = view._picture()
    with console.capture() as captured:
        console.print(picture)
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_picture_fits_its_terminal_and_what_has_no_room_is_left_out_whole(width):
    rows = [{**METRICS, "step": step, "progress": step / 40} for step in range(1, 31)]
    alarm = {"KL": "0.9, at the start 0.1"}
    rows[-1] |= {"alarms": alarm, "rollout/tokens": 50, "time_s": 0.5}
    rollout = {"problem_id": "7", "answer": "5", "completion": "so\n" * 99 + "\x1b[2J"}
    lines = shown(rows, width, last_rollout=lambda: rollout)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width and len(lines) <= 30
    assert lines[0].split()[0] == "step" and "step 30/40" in text and "\x1b" not in text
    titles = [title for title in COLUMNS if title in METRICS_TITLES]
    titles = [title for title in titles if f" {title} " in f" {lines[0]} "]
    assert len(lines[1].split()) == len(titles) and "…" not in lines[0]
    assert len(titles) == len(METRICS_TITLES) if width == 200 else len(titles) >= 2
    joined = " ".join(text.split())
    assert "100 tokens/s" in joined and "alarm: KL 0.9, at the start 0.1" in joined
    assert "7, right answer 5: so so" in joined


@pytest.mark.parametrize("completion", ["so " * 400, "猫" * 400])
def test_a_picture_is_no_higher_than_its_terminal_where_its_lines_are_wrapped(completion):
    """A wrapped alarm counted as one line, and a wide letter as one column."""
    rows = [{**METRICS, "step": step, "progress": step / 40} for step in range(1, 31)]
    rows[-1] |= {"alarms": {"KL": "0.9, at the start 0.1, " * 20}}
    rollout = {"problem_id": "7", "answer": "5", "completion": completion}
    lines = shown(rows, 40, last_rollout=lambda: rollout)
    assert len(lines) == 29 and max(map(cell_len, lines)) <= 40
    assert "0.9, at the start" in " ".join(lines) and lines[-1].strip(" so猫") == ""


def test_a_step_without_a_metric_that_others_have_has_an_empty_cell():
    rows = [
        {"step": 1, "progress": 0.1, "loss/kl_nats_per_token": 0.5},
        {"step": 2, "progress": 0.2, "dev/greedy_accuracy": 0.25, "loss/kl_nats_per_token": 0.4},
        {"step": 3, "progress": 0.3, "loss/kl_nats_per_token": 0.3},
    ]
    header, first, second, third, *_ = shown(rows, 80)
    end = header.index("dev") + 3
    assert second[:end].endswith("0.250")
    assert first[:end].split() == ["1", "0.5000"] and third.split() == ["3", "0.3000"]


def test_the_time_that_is_left_is_by_the_steps_since_the_first(monkeypatch):
    clock = iter([100.0, 110.0, 130.0, 140.0])
    monkeypatch.setattr("parts.view.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    with StepView(Console(file=stream), steps=12) as view:  # goes on at step 9 of 12
        for step in (9, 10, 11, 12):
            view.show({"step": step, "progress": step / 12})
    assert stream.getvalue().splitlines() == [
        "step 9/12",
        "step 10/12  20 s left",
        "step 11/12  15 s left",
        "step 12/12",
    ]


def test_an_alarm_is_said_once_while_it_stands_and_again_when_it_returns():
    stream = io.StringIO()
    raised = [{}, {"KL": "1"}, {"KL": "2", "entropy": "3"}, {}, {"KL": "4"}]
    with StepView(Console(file=stream), steps=None) as view:
        for step, alarms in enumerate(raised):
            view.show({"step": step, "progress": 1.0, "alarms": alarms})
    said = [line for line in stream.getvalue().splitlines() if line.startswith("alarm")]
    assert said == ["alarm: KL 1", "alarm: entropy 3", "alarm: KL 4"]


def test_a_run_that_goes_on_is_shown_as_if_it_had_not_been_stopped():
    rows = [
        {"step": step, "progress": step / 8, "loss/kl_nats_per_token": float(step), "alarms": {}}
        for step in range(1, 7)
    ]
    rows[3]["alarms"] = rows[4]["alarms"] = {"KL": "4"}
    straight = StepView(Console(quiet=True), steps=8)
    for row in rows:
        straight.show(row)
    stream = io.StringIO()
    resumed = StepView(Console(file=stream), steps=8)
    resumed.recall(rows[:4])
    assert stream.getvalue() == ""
    for row in rows[4:]:
        resumed.show(row)
    assert resumed.courses == straight.courses and resumed.alarms == straight.alarms
    assert resumed.courses["KL"] == [1, 2, 3, 4, 5, 6]
    assert "alarm" not in stream.getvalue()  # it was told before


def test_a_sparkline_is_the_means_of_its_parts_from_the_lowest_to_the_highest():
    assert sparkline([3.0], 10) == "▁" and sparkline([2.0, 2.0, 2.0], 10) == "▁▁▁"
    assert sparkline([1.0, 3.0, 5.0, 7.0, 9.0, 11.0], 3) == "▁▄█"
    assert sparkline([-1.0, 1.0], 9, ramp="ab") == "ab"
    assert len(sparkline([float(x % 7) for x in range(1000)], 33)) == 33


def test_a_terminal_of_ascii_has_another_ramp():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = Console(file=stream, width=60, force_terminal=True, color_system=None)
    with StepView(console, 9) as view:
        for step, kl in ((1, 0.5), (2, 0.25)):
            view.show({"step": step, "progress": step / 9, "loss/kl_nats_per_token": kl})
    stream.flush()
    assert b"KL     @_ 0.500 to 0.250" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_divergence_has_its_own_name():
    row = {"step": 1, "progress": 0.1, "loss/kl_nats_per_token": 0.5}
    stream = io.StringIO()
    with StepView(Console(file=stream), 9, kl="reverse KL") as view:
        view.show(row)
    assert stream.getvalue() == "step 1/9  reverse KL 0.5000\n"
    header, *_ = lines = shown([row, {**row, "step": 2}], 40, kl="reverse KL")
    assert header.split() == ["step", "reverse", "KL"]
    assert any(line.startswith("reverse KL ▁▁ 0.500 to 0.500") for line in lines)


def test_progress_says_how_much_was_sampled():
    stream = io.StringIO()
    with SamplingProgress(Console(file=stream), "before") as progress:
        progress.update(3, 8, 99)
    assert stream.getvalue().startswith("before: 3/8 completions, 99 tokens")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_a_name_as_it_is(terminal):
    stream = io.StringIO()
    console = Console(file=stream, width=40, force_terminal=terminal, color_system=None)
    with SamplingProgress(console, NAME) as progress:
        progress.update(3, 8, 99)
    assert stream.getvalue() == f"{NAME}: 3/8 completions, 99 tokens, 0 s\n"


@pytest.mark.parametrize("width", [40, 80])
def test_what_is_written_over_fits_its_terminal(width, monkeypatch):
    """A longer line was wrapped, and the carriage return went back over its last part only."""
    clock = iter(range(100))
    monkeypatch.setattr("parts.view.time.monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    title = "before training: Hausa, 8 samples a problem, problems 1 to 64 of 250"
    with SamplingProgress(console, title) as sampling:
        sampling.update(3, 2000, 99)
    arms = ArmsProgress(console, arms=2, units=2.0)
    arms.start(f"Hausa: {title}", 1.0)
    arms.show({"step": 4, "progress": 0.5})
    arms.finish("greedy accuracy 0.500")
    arms.start("short", 1.0)
    arms.show({"step": 4, "progress": 0.5})
    parts = stream.getvalue().replace("\n", "\n\r").split("\r")
    passing = [part for part in parts if part and not part.endswith("\n")]
    lasting = [part for part in parts if part.endswith("\n")]
    assert [len(part) for part in passing] == [width - 1] * 3  # and so nothing is left of the last
    assert "…" in passing[0] + passing[1] and "…" not in passing[2] + "".join(lasting)
    assert "3/2000 completions" in lasting[0] and "greedy accuracy 0.500" in lasting[1]


@pytest.mark.parametrize(
    ("seconds", "left"), [(20.0, "20 s left"), (360.0, "6 min left"), (7800.0, "2 h 10 min left")]
)
def test_the_time_that_is_left_of_arms_is_said_as_a_person_says_it(monkeypatch, seconds, left):
    """It was "0 min left" and "130 min left"."""
    clock = iter([0.0, seconds])
    monkeypatch.setattr("parts.view.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = ArmsProgress(Console(file=stream), arms=2, units=2.0)
    progress.start("first", 1.0)
    progress.finish("done")
    assert stream.getvalue() == f"1/2 first: done; {left}\n"


def test_the_progress_of_arms_counts_the_time_that_is_left(monkeypatch):
    clock = iter([0.0, 30.0, 120.0, 120.0, 180.0])
    monkeypatch.setattr("parts.view.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = ArmsProgress(Console(file=stream, width=40), arms=3, units=2.5)
    progress.start(NAME, 0.5)
    progress.finish("read again", earlier=True)  # at 30 s; it says nothing about the speed
    progress.start("second", 1.0)
    progress.show({"step": 4, "progress": 0.5})  # at 120 s: half a unit of two is done
    progress.finish("accuracy 0.500")  # at 180 s
    assert stream.getvalue().splitlines() == [
        f"1/3 {NAME}: read again",
        "2/3 second: step 4, 50%; 6 min left",
        "2/3 second: accuracy 0.500; 3 min left",
    ]


def test_what_is_said_is_printed_as_it_is():
    stream = io.StringIO()
    say(Console(file=stream, width=20), f"{NAME}, and a line longer than the console")
    assert stream.getvalue() == f"{NAME}, and a line longer than the console\n"
