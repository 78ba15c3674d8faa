"""parts/stops.py: the first signal asks, the second acts, whichever it is."""

import contextlib
import itertools
import os
import signal
import time

import pytest

from parts import stops
from parts.stops import STOPS, stop_signals, stops_act, stops_raise


@pytest.fixture(autouse=True)
def handlers():
    """Start each test with the handlers of a program at work, and put pytest's back."""
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers_now():
    return {number: signal.getsignal(number) for number in STOPS}


@pytest.mark.parametrize("first", STOPS)
def test_after_any_first_signal_any_second_one_acts(first):
    before = handlers_now()
    with stop_signals() as stopped:
        signal.raise_signal(first)
        assert stopped == [first]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert handlers_now() == before


def test_what_torchrun_passes_on_is_no_second_signal(monkeypatch):
    """A signal to the whole group reaches a worker twice, and nothing was saved."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop_signals() as stopped:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # ends a process that torchrun did not start
        assert stopped == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(stops, "PASSED_ON_S", 0.0)
    with stop_signals() as stopped:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # a person's, later
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_one_ends_the_process(first, second):
    if (child := os.fork()) == 0:
        with stop_signals():
            signal.raise_signal(first)
            signal.raise_signal(second)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -second


@pytest.mark.parametrize("pair", list(itertools.combinations(sorted(STOPS), 2)))
def test_of_two_that_come_together_the_second_acts(capfd, pair):
    if (child := os.fork()) == 0:
        code = 0
        with contextlib.suppress(KeyboardInterrupt), stop_signals():
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            for number in pair:
                os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            code = 70  # it was not stopped
        os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Python calls the handlers of pending signals in the order of their numbers.
    second = max(pair)
    assert ended == (0 if second == signal.SIGINT else -second)
    assert capfd.readouterr().err == ""


def test_under_nohup_a_lost_terminal_changes_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals() as stopped, stops_raise():
        signal.raise_signal(signal.SIGHUP)
    assert stopped == []


@pytest.mark.parametrize("number", STOPS)
def test_elsewhere_a_stop_interrupts_as_ctrl_c_does(number):
    before = handlers_now()
    with pytest.raises(KeyboardInterrupt), stops_raise():
        signal.raise_signal(number)
    assert handlers_now() == before


def test_while_a_stop_is_said_every_signal_acts():
    before = handlers_now()
    with stops_act():
        pass
    assert handlers_now() == before
    for number in STOPS:
        if (child := os.fork()) == 0:
            with stops_act():
                signal.raise_signal(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -number


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_meets_a_destructor_is_not_lost(number):
    """Python drops what is raised in a __del__, such as those of the regex package."""

    class Met:
        def __del__(self):
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt), stops_raise():
        Met()
        time.sleep(5)
