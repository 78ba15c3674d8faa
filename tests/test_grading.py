"""The grader: a table of cases (grading_cases.tsv), math-verify in its workers, hostile input."""

import doctest
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from test_numerals import hostile_text, quick

from parts import grading, mathcheck
from parts.grading import extract_answer, grade, is_correct
from parts.numerals import MAX_ANSWER_CHARS

REASONS = {"right", "wrong", "no box", "think block not closed", "no single answer", "time-out"}


def read_cases() -> dict[str, list[list[str]]]:
    """Return the rows of the table, (text, gold, verdict, why), by the heading above them."""
    lines = (Path(__file__).parent / "grading_cases.tsv").read_text(encoding="utf-8").splitlines()
    cases: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in lines[lines.index("text\tgold\tverdict\twhy") + 1 :]:
        if line.startswith("# --- "):
            rows = cases.setdefault(line.removeprefix("# --- "), [])
        elif not line.startswith("# "):  # an answer may start with the sign of a number
            cells = line.split("\t")
            rows.append([re.sub(r"<U\+(\w+)>", lambda hit: chr(int(hit[1], 16)), c) for c in cells])
    return cases


CASES = read_cases()


@pytest.mark.parametrize("heading", CASES)
def test_case_table(heading: str):
    """A test a heading: with one a row, most of the time went into having three thousand tests."""
    graded_otherwise = []
    for text, gold, verdict, why in CASES[heading]:
        is_completion = "boxed" in text or "think>" in text
        completion = text if is_completion else rf"\boxed{{{text}}}"
        given = grade(completion, gold)
        assert verdict in REASONS and given.correct == (given.reason == "right")
        assert given.answer == extract_answer(completion)
        if given.reason != verdict:
            graded_otherwise.append((text, gold, verdict, given.reason, why))
    assert graded_otherwise == []


def test_case_table_is_large_and_has_no_repeats():
    pairs = [(text, gold) for rows in CASES.values() for text, gold, _, _ in rows]
    assert len(pairs) >= 3000
    assert len(set(pairs)) == len(pairs)


def test_docstring_examples():
    for module, least in ((grading, 2), (mathcheck, 1)):
        results = doctest.testmod(module)
        assert results.attempted >= least
        assert results.failed == 0


# ---- Think blocks and golds


@pytest.mark.parametrize(
    ("completion", "answer", "answer_when_think_open"),
    [
        (r"\boxed{18}", "18", None),
        (r"hm \boxed{17}</think>\boxed{18}", "18", "18"),
        (r"hm</think> <think>again \boxed{18}", None, None),
        (r"<think>hm</think>\boxed{18}", "18", "18"),
        ("", None, None),
    ],
)
def test_a_think_block_opened_in_the_prompt_must_be_closed(
    completion, answer, answer_when_think_open
):
    assert extract_answer(completion) == answer
    assert extract_answer(completion, think_open=True) == answer_when_think_open
    assert is_correct(completion, "18", think_open=True) == (answer_when_think_open == "18")


@pytest.mark.parametrize("gold", ["", "  ", "...", "9" * (MAX_ANSWER_CHARS + 1)])
def test_an_unusable_gold_is_an_error_even_without_an_answer(gold):
    with pytest.raises(ValueError, match="unusable gold answer"):
        is_correct("no box", gold)


@pytest.mark.parametrize(
    ("completion", "reason", "lenient"),
    [
        (r"\boxed{18}", "right", "18"),
        (r"\boxed{17}", "wrong", "17"),
        (r"\boxed{17} or 18", "wrong", "17"),
        (r"\boxed{18 or 19}, say 18", "no single answer", None),
        ("9 x 2 = 18 birr.", "no box", "18"),
        ("18, 17", "no box", "17"),
        ("It is 0", "no box", "0"),
        (r"18 \boxed{17", "no box", "17"),
        (r"\boxed{18} \boxed{} 17", "no box", "17"),
        ("none", "no box", None),
        (r"<think>\boxed{18}", "think block not closed", "18"),
        ("<think>it is ፲፰", "think block not closed", "18"),
        (r"<think>\boxed{18}</think> so 17", "no box", "18"),
        ("18 " + "a" * MAX_ANSWER_CHARS, "no box", None),
    ],
)
def test_the_lenient_reading_is_apart(completion, reason, lenient):
    given = grade(completion, "18")
    assert (given.reason, given.lenient) == (reason, lenient)
    assert given.correct == (reason == "right")
    assert given.lenient_correct == (lenient == "18")
    assert (given.canonical is None) == (reason not in ("right", "wrong"))


def test_what_the_released_evaluation_got_wrong():
    # Its reward read the first box, its metric the last.
    assert not is_correct(r"\boxed{18} no, \boxed{17}", "18")
    assert is_correct(r"\boxed{17} no, \boxed{18}", "18")
    # An empty box could win its majority vote, which was on raw strings.
    assert grade(r"\boxed{}", "18").canonical is None
    assert grade(r"\boxed{18.0}", "18").canonical == grade(r"\boxed{$18}", "18").canonical
    # math-verify alone rejects each of these.
    for written in ("१८", "১৮", "๑๘", "፲፰", "$18", "18 birr"):
        assert is_correct(rf"\boxed{{{written}}}", "18")


# ---- math-verify, in workers that are killed at their limit

ROOT_2 = r"2\sqrt{2}"
HOPELESS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture
def workers(monkeypatch) -> list[subprocess.Popen]:
    """Begin without a worker and return the list of those that are started."""
    started = []

    def start(*args, **kwargs):
        started.append(subprocess.Popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(grading, "_idle_workers", [])
    monkeypatch.setattr(grading, "Popen", start)
    return started


def test_one_worker_is_started_when_it_is_needed_and_kept(workers):
    for answer in ("8", "18 or 19", r"\sqrt{324}", r"9 \times 2", "18!"):
        assert not is_correct(rf"\boxed{{{answer}}}", "18")
    assert is_correct(rf"\boxed{{{ROOT_2}}}", ROOT_2)
    assert workers == []
    assert is_correct(r"\boxed{\sqrt{8}}", ROOT_2)
    assert not is_correct(r"\boxed{\sqrt{9}}", ROOT_2)
    assert len(workers) == 1
    # A session of its own: Ctrl-C does not reach it.
    assert os.getsid(workers[0].pid) == workers[0].pid


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_worker_that_takes_too_long_is_killed(workers, in_thread):
    def hopeless():
        return grade(HOPELESS, ROOT_2, limit_s=0.5)

    is_correct(r"\boxed{\sqrt{8}}", ROOT_2)  # starts it, which takes its time
    given = ThreadPoolExecutor(1).submit(hopeless).result() if in_thread else hopeless()
    assert (given.reason, given.correct, given.lenient_correct) == ("time-out", False, False)
    assert given.canonical is not None
    assert workers[0].returncode in (-signal.SIGPROF, -signal.SIGALRM)  # dead and reaped: no zombie
    assert is_correct(r"\boxed{\sqrt{8}}", ROOT_2)
    assert len(workers) == 2 and workers[1].poll() is None


@pytest.mark.parametrize(
    "answer",
    [
        "10^{10^{10}}",
        "10^(10^10)",
        "(10^9)!",
        r"\binom{10^8}{10^7}",
        "(x+1)^{99999}",
        r"\sum_{n=1}^{10^9} \frac1n",
    ],
)
def test_a_hostile_expression_costs_the_limit_at_most(answer):
    assert grade(rf"\boxed{{{answer}}}", ROOT_2, limit_s=0.3).reason in ("time-out", "wrong")


def test_a_limit_of_nothing_is_not_no_limit():
    assert grade(HOPELESS, ROOT_2, limit_s=0).reason == "time-out"


def test_a_worker_that_does_not_even_compute_is_killed_by_the_clock():
    sleeper = """if True:
        import time
        from parts import mathcheck
        mathcheck.is_same = lambda *_: time.sleep(60)
        mathcheck.main()
    """
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", sleeper], cwd=root, input='["", "", 0.02]', text=True, timeout=50
    )
    assert run.returncode == -signal.SIGALRM


def test_threads_get_each_their_own_verdict():
    numbers = range(2, 26)
    with ThreadPoolExecutor(3) as pool:
        verdicts = pool.map(
            lambda n: is_correct(rf"\boxed{{x\sqrt{{{n}}}}}", r"\sqrt{9}x"), numbers
        )
    assert [n for n, verdict in zip(numbers, verdicts, strict=True) if verdict] == [9]


def test_a_late_reply_after_an_interruption_meets_no_other_question(workers):
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    assert is_correct(r"\boxed{\sqrt{8}}", ROOT_2)
    os.kill(workers[0].pid, signal.SIGSTOP)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            is_correct(r"\boxed{\sqrt{8}}", ROOT_2)
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(workers[0].pid, signal.SIGCONT)  # now it replies: right
    assert not is_correct(r"\boxed{\sqrt{9}}", ROOT_2)
    assert len(workers) == 2


def test_without_math_verify_the_error_names_it(workers, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not is_correct(r"\boxed{17}", "18")
    with pytest.raises(OSError, match=r"math-verify .* pip install -r requirements\.txt"):
        is_correct(r"\boxed{\sqrt{8}}", ROOT_2)


def test_a_worker_is_not_shared_with_a_fork_and_ends_with_its_parent():
    script = r"""if True:
        import os
        from parts import grading
        grading.is_correct(r"\boxed{\sqrt{4}x}", "2x")
        if os.fork() == 0:
            os._exit(len(grading._idle_workers))
        print(os.wait()[1], *(worker.pid for worker in grading._idle_workers))
    """
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    status, worker = map(int, run.stdout.split())
    assert status == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# ---- Hostile input


@settings(quick, max_examples=300)
@given(hostile_text)
def test_no_text_raises(text):
    answer = extract_answer(text, think_open=True)
    assert answer is None or answer
    assert is_correct(text, "123456789") in (True, False)
    is_correct(rf"\boxed{{{text}}}", "18")


@settings(quick, max_examples=40)
@given(hostile_text)
def test_no_text_breaks_a_worker(text):
    assert grade(rf"\boxed{{{text}}}", r"x\sqrt{8}", limit_s=0.5).reason in REASONS


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 150_000,
        "{" * 1_000_000,
        r"\boxed{" + "}" * 1_000_000,
        r"\boxed" + " " * 1_000_000,
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + "{" * 300_000 + "18" + "}" * 300_000 + "}",
        r"\boxed{17}" * 100_000,
        "<think>" * 150_000,
        r"<think>\boxed{18}</think>" * 40_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_of_anything_is_graded(text):
    assert not is_correct(text, "18")


def test_blanks_around_a_short_answer_do_not_count():
    assert is_correct(r"\boxed{" + " " * 1_000_000 + "18}", "18")


def test_the_work_of_extraction_grows_linearly(monkeypatch):
    """Count what is matched, the only unit of work: four times the text, four times the matches."""
    counts = []

    class CountingPattern:
        def __init__(self, pattern):
            self.pattern = pattern

        def finditer(self, *args):
            for match in self.pattern.finditer(*args):
                counts[-1] += 1
                yield match

        def match(self, *args):
            counts[-1] += 1
            return self.pattern.match(*args)

    for name in ("_BOX_OPENING", "_BRACES"):
        monkeypatch.setattr(grading, name, CountingPattern(getattr(grading, name)))
    # Boxes that are never closed are all looked at.
    for repeats in (100, 400):
        counts.append(0)
        extract_answer(r"\boxed{{1}" * repeats)
    assert counts[1] == 4 * counts[0] > 0
