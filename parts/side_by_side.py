"""Work in several processes at once, where one piece of it does not wait for another.

The lab's products are too small to be divided well: a second thread makes a training step a
quarter faster. Two runs at the same time, with a thread each, take two thirds of the time of one
after the other.
"""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from threading import Thread
from typing import TypeVar

import torch

from parts.heap import keep_freed_memory
from parts.machine import quiet_libraries
from parts.stops import stop_signals

LOOK_EVERY_S = 0.5  # from one look for a signal to the next
Piece = TypeVar("Piece")


def work_through(
    work: Callable[[Piece], int], pieces: Iterable[Piece], jobs: int, *, preload: str
) -> Generator[tuple[Piece, int], None, None]:
    """Call work(piece) for each piece, `jobs` at a time; yield each with its exit code as it ends.

    work     is looked up by its name in the process of each piece, so it is a function of a module,
             or a partial of one; what it returns is the exit code
    preload  the name of that module, which is imported once for all processes

    A signal that asks this process to end is passed on, no further piece begins, and
    KeyboardInterrupt is raised once all have ended. Where the caller asks for no more, the pieces
    at work are asked to end. So they are where this process is killed.
    """
    # Each process begins as a copy of a server that has done nothing but the import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    threads = max(1, torch.get_num_threads() // jobs)
    waiting = deque(pieces)
    running: list[tuple[Piece, ForkServerProcess]] = []
    passed_on = 0
    with stop_signals() as stopped, _ended_at_exit(running, stopped):
        while running or waiting:
            while waiting and len(running) < jobs:
                process = context.Process(target=_work_alone, args=(work, waiting[0], threads))
                process.start()
                running.append((waiting.popleft(), process))
            wait([process.sentinel for _, process in running], LOOK_EVERY_S)
            pass_on(stopped[passed_on:], running)
            passed_on = len(stopped)
            ended = [pair for pair in running if not pair[1].is_alive()]
            running[:] = [pair for pair in running if pair not in ended]
            if stopped:
                waiting.clear()
            yield from ((piece, int(process.exitcode or 0)) for piece, process in ended)
    if stopped:
        raise KeyboardInterrupt


@contextmanager
def _ended_at_exit(
    running: list[tuple[Piece, ForkServerProcess]], stopped: list[int]
) -> Iterator[None]:
    """Within it, processes run; behind it, none of those that `running` holds then.

    They are asked to end, unless a signal was passed on to them already: a second one would not
    wait for what is being saved.
    """
    try:
        yield
    finally:
        if not stopped:
            pass_on([signal.SIGTERM], running)
        for _, process in running:
            process.join()


def pass_on(signals: list[int], running: list[tuple[Piece, ForkServerProcess]]) -> None:
    """Send each signal to every process that is still at work."""
    at_work = [process for _, process in running if process.is_alive()]
    for number, process in product(signals, at_work):
        with suppress(ProcessLookupError):  # it may have ended since
            os.kill(int(process.pid or 0), number)


def _work_alone(work: Callable[[Piece], int], piece: Piece, threads: int) -> None:
    """Be one of the processes, apart from the terminal's Ctrl-C, which the first passes on."""
    os.setpgrp()
    Thread(target=_end_with_the_first, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    quiet_libraries()
    sys.exit(work(piece))


def _end_with_the_first() -> None:
    """Ask this process to end once the one that it works for is gone: a kill passes nothing on.

    It would else go on with its piece, and the same command, given again, would find it there.
    """
    if first := multiprocessing.parent_process():
        first.join()
        os.kill(os.getpid(), signal.SIGTERM)
