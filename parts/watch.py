"""What is watched while a run trains: its texts, development problems, and alarms.

Nothing here changes a weight or draws from a random stream of the training, so a run that is
watched learns what one that is not learns from the same problems. Everything follows from the log,
metrics.jsonl: a run that was stopped and goes on watches as if it had not been stopped.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from parts import ranks
from parts.checkpoints import newest
from parts.files import parse_json, read_edge_rows
from parts.grading import extract_answer
from parts.measure import DEV_METRIC, Ruler
from parts.metrics import ratios
from parts.recipe import Config, step_kl_name
from parts.runs import DEV_BEFORE, Run
from parts.sampler import Rollout
from parts.setup import Setup
from parts.track import open_tracker
from parts.view import StepView, Watcher

START_STEPS = 5  # a run's start, which later steps are compared with, is at most so many
RECENT_STEPS = 3  # one odd batch is no alarm, so it is the mean of so many that is compared
REPEATED_TOKENS = 8  # in a row: shorter runs, such as "= 10 +", recur in honest mathematics
DEV_TIME = "dev/time_s"
TAIL_BYTES = 2**22  # of completions.jsonl, in which its last line surely fits


@dataclass(frozen=True)
class Rule:
    """When a metric raises an alarm, as compared with the run's own start.

    highest, lowest  (factor, plus): the limits are factor * start + plus
    """

    name: str
    metric: str
    highest: tuple[float, float] = (0.0, math.inf)
    lowest: tuple[float, float] = (0.0, -math.inf)

    def alarm(self, start: float, recent: float) -> str | None:
        """Return what is said of a recent mean outside the limits, None of one inside."""
        highest, lowest = (factor * start + plus for factor, plus in (self.highest, self.lowest))
        if lowest <= recent <= highest:
            return None
        return f"{recent:.3g}, at the start {start:.3g}"


# Wide on purpose (ours): training moves all of these, and an alarm is to mean a collapse.
RULES = (
    Rule("completion tokens", "rollout/completion_tokens_mean", (2.0, 0.0), (0.5, 0.0)),
    Rule("share cut", "rollout/cut_frac", highest=(1.0, 0.25)),
    Rule("share with an answer", "rollout/format_frac", lowest=(1.0, -0.25)),
    Rule("share of repeated text", "rollout/repeated_frac", highest=(1.0, 0.2)),
    Rule("KL", "loss/kl_nats_per_token", highest=(2.0, 0.25)),
    Rule("entropy", "loss/student_entropy_nats_per_token", (2.0, 0.5), (0.1, 0.0)),
)
# Of one look, against the one before the first step.
DEV_RULE = Rule("development accuracy", DEV_METRIC, lowest=(0.7, -0.05))


def look(
    setup: Setup, run: Run, rollouts: list[Rollout], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Return a step's metrics with what watching adds to them.

    That is how its texts are, the development problems where they are due, and "alarms", which is
    empty while all is well.
    """
    found = {**metrics, **text_metrics(setup, rollouts)}
    if is_look_due(setup.config, metrics["step"], metrics["progress"]):
        found |= dev_metrics(setup)
    if not ranks.is_first():  # another machine may not have the files
        return found
    first = START_STEPS + RECENT_STEPS
    logged = read_edge_rows(run.folder / "metrics.jsonl", first, RECENT_STEPS - 1)
    found["alarms"] = alarms([*logged, found])
    if DEV_METRIC in found and (before := run.read_evaluation(DEV_BEFORE)):
        said = DEV_RULE.alarm(before[DEV_METRIC], found[DEV_METRIC])
        found["alarms"] |= {DEV_RULE.name: said} if said else {}
    return found


def look_before(setup: Setup, run: Run) -> None:
    """Try the development problems before the first step, in a run that looks at them; once."""
    is_missing = setup.config.eval_every > 0 and run.read_evaluation(DEV_BEFORE) is None
    if not ranks.decide(is_missing):
        return
    found = dev_metrics(setup)
    if ranks.is_first():
        run.write_evaluation(DEV_BEFORE, _without_time(found))


def _without_time(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a look found but how long it took, so that the same run has the same bytes."""
    return {name: x for name, x in row.items() if name.startswith("dev/") and name != DEV_TIME}


def text_metrics(setup: Setup, rollouts: list[Rollout]) -> dict[str, float]:
    """Return the share of completions that hold an answer, and how much in them is repeated."""
    answered = 0
    repeated = 0.0
    for rollout in rollouts:
        answer = extract_answer(setup.text_of(rollout), think_open=setup.opens_think)
        answered += answer is not None
        repeated += repeated_share(rollout.completion_ids)
    return {
        "rollout/format_frac": answered / len(rollouts),
        "rollout/repeated_frac": repeated / len(rollouts),
    }


def repeated_share(ids: Sequence[int], size: int = REPEATED_TOKENS) -> float:
    """Return the share of runs of `size` tokens that stood earlier in the same completion.

    0 where all are new or the completion is shorter. Three runs of two, of which the last is old:

    >>> round(repeated_share([5, 6, 5, 6], size=2), 3)
    0.333
    """
    runs = [tuple(ids[first : first + size]) for first in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def is_look_due(config: Config, step: int, done: float) -> bool:
    """Say whether the development problems are tried after `step`: every K steps and at the end."""
    return config.eval_every > 0 and (step % config.eval_every == 0 or done >= 1)


def dev_metrics(setup: Setup) -> dict[str, float]:
    """Return how one greedy attempt at each development problem went, under the names logged."""
    started = time.perf_counter()
    ruler = Ruler.of(setup.config, seed=setup.config.seed)
    graded = ruler.measure(setup.model, setup.tokenizer, setup.dev, greedy=True)
    found = ratios(graded, [1])
    names = {
        DEV_METRIC: "pass@1",
        "dev/format_frac": "format rate",
        "dev/cut_frac": "cut at the length limit",
        "dev/completion_tokens_mean": "mean tokens",
    }
    means = {name: sum(found[metric][0]) / len(graded) for name, metric in names.items()}
    return {**means, "dev/problems": len(graded), DEV_TIME: time.perf_counter() - started}


def alarms(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return, by its name, what is said of each rule that the last steps break.

    The start is the first steps: START_STEPS of them, or as many as are not among the last ones.
    It grows until the first alarm and no further, as a run may collapse after its first update.

    rows  the metrics of every step so far, each but the last with its own "alarms"; those between
          the first START_STEPS + RECENT_STEPS and the last RECENT_STEPS left out or not
    """
    early = rows[:-1][: START_STEPS + RECENT_STEPS]
    alarmed = next((place for place, row in enumerate(early) if row.get("alarms")), len(rows) - 1)
    first = rows[: max(0, min(START_STEPS, alarmed + 1 - RECENT_STEPS))]
    found = {}
    for rule in RULES:
        start = _mean(first, rule.metric)
        recent = _mean(rows[-RECENT_STEPS:], rule.metric)
        if start is not None and recent is not None and (said := rule.alarm(start, recent)):
            found[rule.name] = said
    return found


def _mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return a metric's mean over the steps that have a number for it, None if none has.

    Not a number is what a dropped update leaves; in the log it is null.
    """
    numbers = [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    return sum(numbers) / len(numbers) if numbers else None


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the metrics of the best step on the development problems; of equals, the first.

    None where no step was tried on them.
    """
    tried = [row for row in rows if row.get(DEV_METRIC) is not None]
    return max(tried, key=lambda row: row[DEV_METRIC]) if tried else None


def write_best(run: Run) -> str | None:
    """Name the best adapter in best.json; return the sentence that says so, None without one."""
    there = [row for row in run.metrics() if run.adapter_folder(row["step"]).is_dir()]
    row = best_row(there)  # someone may have removed others
    if row is None:
        return None
    folder = run.adapter_folder(row["step"])
    adapter = folder.relative_to(run.folder).as_posix()
    run.write_evaluation("best", {"step": row["step"], "adapter": adapter, **_without_time(row)})
    score = f"greedy accuracy {row[DEV_METRIC]:.3f} on {row['dev/problems']} development problems"
    said = f"best adapter: {folder}, after step {row['step']}, {score}"
    if before := run.read_evaluation(DEV_BEFORE):
        no_better = row[DEV_METRIC] <= before[DEV_METRIC]
        said += f", {before[DEV_METRIC]:.3f} before training"
        said += ": no better than without an adapter" if no_better else ""
    return said


@dataclass(frozen=True)
class Watching:
    """How a run is watched. None of it changes the run, so the next call may choose otherwise.

    track             a tracker that takes the metrics, too; see parts.track
    show_rollout      show the newest rollout below the steps
    stop_on_collapse  save and stop at the first alarm
    """

    track: str | None = None
    show_rollout: bool = False
    stop_on_collapse: bool = False

    @contextmanager
    def start(self, setup: Setup, run: Run, console: Console) -> Iterator["Watch"]:
        """Yield the Watcher of a loop; open and close what it shows the steps in."""
        config = setup.config
        steps = None if config.token_budget else config.steps
        rollout = partial(last_completion, run.folder) if self.show_rollout else None
        look_before(setup, run)
        with ExitStack() as stack:
            watchers: list[Watcher] = []
            if self.track and ranks.is_first():
                watchers.append(stack.enter_context(open_tracker(self.track, run, asdict(config))))
            name = step_kl_name(config)
            view = stack.enter_context(StepView(console, steps, rollout, name))
            if ranks.is_first():
                saved, _ = newest(run.folder)  # the steps after it are taken again
                view.recall([row for row in run.metrics() if saved and row["step"] <= saved.step])
            watchers.append(view)
            yield Watch(run, watchers, self.stop_on_collapse)


class Watch:
    """A Watcher that tells others, and where it is asked to ends the run at the first alarm."""

    def __init__(self, run: Run, watchers: list[Watcher], stop_on_collapse: bool):
        self.run = run
        self.watchers = watchers
        self.stop_on_collapse = stop_on_collapse
        self.collapsed = ""  # what ended the run

    def show(self, metrics: dict[str, Any]) -> bool:
        """Take a step's metrics; True: save and stop."""
        for watcher in self.watchers:
            watcher.show(metrics)
        if self.stop_on_collapse and metrics["alarms"]:
            said = "; ".join(f"{name} {limits}" for name, limits in metrics["alarms"].items())
            self.collapsed = f"collapse at step {metrics['step']}: {said}"
        return bool(self.collapsed)

    def summary(self, finished: bool) -> list[str]:
        """Return what is to be said when the loop has ended, and name the best adapter.

        finished  the run has taken its last step, perhaps the one that the alarm was at
        """
        said = []
        if self.collapsed:
            rest = "" if finished else " (without --stop-on-collapse the run would go on)"
            said.append(f"{self.collapsed}{rest}")
        if ranks.is_first() and (best := write_best(self.run)):
            said.append(best)
        return said


def last_completion(folder: Path) -> dict[str, Any] | None:
    """Return the newest line of a run's completions.jsonl, None where there is none yet."""
    path = folder / "completions.jsonl"
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - TAIL_BYTES))
        *lines, _ = stream.read().split(b"\n")
    return parse_json(lines[-1]) if lines else None
