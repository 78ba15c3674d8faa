"""Signals that ask a program to end: Ctrl-C, a scheduler's SIGTERM, a terminal's SIGHUP.

The first one asks: a step is finished and saved, or what is kept is said. The second one acts.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_S = 0.01
PASSED_ON_S = 5.0


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in the yielded list, so that a step can be finished.

    A second one acts at once, whichever it is. SIGHUP stays ignored where it is, as under nohup.
    """
    received: list[int] = []

    def _remember(number: int, frame: Any) -> None:
        received.append(number)
        for each in before:
            again = _at_once(each)
            signal.signal(each, _unless_passed_on(again) if each == number else again)

    before: dict[int, Any] = {}
    for number in STOPS:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _remember)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unless_passed_on(act: Any) -> Any:
    """Return a handler that acts unless torchrun passes on what its workers have had themselves.

    A scheduler that signals all processes reaches each worker twice, the second time by torchrun.
    """
    first = time.monotonic()

    def _act(number: int, frame: Any) -> None:
        if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - first < PASSED_ON_S:
            return
        act(number, frame)

    return _act


def _at_once(number: int) -> Any:
    """Return the handler of what a signal does unasked: Ctrl-C interrupts, the others end it."""
    return signal.default_int_handler if number == signal.SIGINT else _end


def _end(number: int, frame: Any) -> None:
    """End the process by the signal.

    A function and not SIG_DFL: where two signals come together, Python calls their handlers one
    after the other, and one that the first has just set to SIG_DFL would be lost with a traceback.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def stops_raise() -> Iterator[None]:
    """Let every stop raise KeyboardInterrupt, as Ctrl-C does; the second ends at once.

    For work that is not finished step by step, so that it can say what it kept.
    """

    def _interrupt(number: int, frame: Any) -> None:
        if _is_in_destructor(frame):
            # Python drops what is raised there, so the signal comes again in a moment.
            Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()
            return
        for each in before:
            signal.signal(each, _at_once(each))
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_stops() -> None:
    """Let Ctrl-C end a program in a line where its command does not work yet, or any more.

    The first half second goes into reading the command line, the last one into the end of Python,
    which would show a traceback of what it was at.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _say)


def _say(number: int, frame: Any) -> None:
    with suppress(OSError):  # a shell has closed it
        os.write(2, b"error: stopped\n")
    os._exit(130)


@contextmanager
def ctrl_c_raises() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt again, so that a command can clear up."""
    before = signal.getsignal(signal.SIGINT)
    if before is _say:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is _say:
            signal.signal(signal.SIGINT, before)


def _is_in_destructor(frame: Any) -> bool:
    """Return whether the frame is of a __del__, or of what one calls."""
    while frame and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextmanager
def stops_act() -> Iterator[None]:
    """Let every stop end the process at once, without a traceback: while a stop is being said."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
