"""Send a run's metrics to a tracker, if one is asked for: the numbers of metrics.jsonl and no more.

None is needed, and none is installed with the project. All of them write files here and send
nothing anywhere: TensorBoard always does, wandb is told to be offline (`wandb sync` sends a run
later), and trackio keeps its runs in a database in the user's cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parts.checkpoints import newest
from parts.files import cannot_write
from parts.runs import Run


class Tracker:
    """A Watcher that hands every step's numbers on.

    log    takes the numbers by name, and the step
    close  is called once, at the end
    Raises CannotWrite, in one line, where either cannot write.
    """

    def __init__(self, log: Callable[[dict[str, float], int], Any], close: Callable[[], Any]):
        self.log = log
        self.close = close

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *raised: Any) -> None:
        with _cannot_write():
            self.close()

    def show(self, metrics: dict[str, Any]) -> None:
        """Take a step's metrics. What is no number is left out, and the alarms are counted."""
        numbers = {name: x for name, x in metrics.items() if isinstance(x, int | float)}
        with _cannot_write():
            self.log({**numbers, "alarms": len(metrics.get("alarms", []))}, metrics["step"])


@contextmanager
def _cannot_write() -> Iterator[None]:
    """Turn what keeps a tracker from writing into CannotWrite, as for any other file of a run."""
    try:
        yield
    except OSError as error:
        place = Path(str(error.filename or "what --track keeps"))
        raise cannot_write(place, error) from error


def _tensorboard(run: Run, settings: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # A run that goes on from a saved step writes those after it again.
    saved, _ = newest(run.folder)
    purge: Any = saved.step + 1 if saved else None
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
    writer.add_text("settings", "\n".join(f"    {n} = {value}" for n, value in settings.items()))

    def _log(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    return Tracker(_log, writer.close)


def _trackio(run: Run, settings: dict[str, Any]) -> Tracker:
    import trackio  # type: ignore[import-not-found]

    trackio.init(project="copsd", name=run.folder.name, config=settings, resume="allow")
    return Tracker(lambda numbers, step: trackio.log(numbers, step=step), trackio.finish)


def _wandb(run: Run, settings: dict[str, Any]) -> Tracker:
    import wandb  # type: ignore[import-not-found]

    folder = str(run.folder)
    name = run.folder.name
    own = wandb.init(project="copsd", name=name, config=settings, dir=folder, mode="offline")
    return Tracker(lambda numbers, step: own.log(numbers, step=step), own.finish)


TRACKERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


def check_tracker(name: str | None) -> None:
    """Raise ValueError for a tracker that is unknown or not installed; None is no tracker."""
    if name is None:
        return
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}; valid: {', '.join(TRACKERS)}")
    if find_spec(name) is None:
        raise ValueError(f"--track {name}: it is not installed; pip install {name}")


def open_tracker(name: str, run: Run, settings: dict[str, Any]) -> Tracker:
    """Return a tracker that was checked, which names the run by its folder; CannotWrite."""
    with _cannot_write():
        return TRACKERS[name](run, settings)
