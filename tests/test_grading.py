"""The grader: a table of cases (grading_cases.tsv), numbers in every script read back, math-verify, hostile input."""

import doctest
import os
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parts import grading, mathcheck
from parts.grading import (
    MAX_ANSWER_CHARS,
    MAX_EXPONENT,
    extract_answer,
    grade,
    is_correct,
    normalise,
)

ZEROS = [
    chr(code) for code in range(0x110000) if unicodedata.decimal(chr(code), None) == 0
]  # one per digit script
REASONS = {"right", "wrong", "no box", "think block not closed", "no single answer", "time-out"}
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def read_cases() -> list[tuple[str, str, str, str]]:
    lines = (Path(__file__).parent / "grading_cases.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")][1:]
    unescaped = [
        [re.sub(r"<U\+(\w+)>", lambda hit: chr(int(hit[1], 16)), cell) for cell in row]
        for row in rows
    ]
    return [(text, gold, verdict, why) for text, gold, verdict, why in unescaped]


CASES = read_cases()


@pytest.mark.parametrize(
    ("text", "gold", "verdict", "why"), CASES, ids=[f"{case[0]} {case[3]}" for case in CASES]
)
def test_case_table(text: str, gold: str, verdict: str, why: str):
    is_completion = r"boxed" in text or "think>" in text
    completion = text if is_completion else rf"\boxed{{{text}}}"
    given = grade(completion, gold)
    assert given.reason == verdict in REASONS, why
    assert given.correct == is_correct(completion, gold) == (verdict == "right")
    assert given.answer == extract_answer(completion)


def test_case_table_is_large_and_has_no_repeats():
    assert len(CASES) >= 200
    assert len({case[:2] for case in CASES}) == len(CASES)


def test_docstring_examples():
    for module, least in ((grading, 8), (mathcheck, 1)):
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
    first, last = r"\boxed{18} no, \boxed{17}", r"\boxed{17} no, \boxed{18}"
    assert not is_correct(first, "18") and is_correct(
        last, "18"
    )  # its reward read the first box, its metric the last
    assert grade(r"\boxed{}", "18").canonical is None  # an empty box could win its majority vote
    assert (
        grade(r"\boxed{18.0}", "18").canonical == grade(r"\boxed{$18}", "18").canonical
    )  # it voted on raw strings
    for written in ("१८", "১৮", "๑๘", "፲፰", "$18", "18 birr"):  # math-verify alone rejects each
        assert is_correct(rf"\boxed{{{written}}}", "18")


# ---- math-verify, in workers that are killed at their limit

ROOT_2, HOPELESS = r"2\sqrt{2}", r"\boxed{9^{9^{9^{9}}}}"


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
    assert is_correct(r"\boxed{\sqrt{8}}", ROOT_2) and not is_correct(r"\boxed{\sqrt{9}}", ROOT_2)
    assert len(workers) == 1
    assert (
        os.getsid(workers[0].pid) == workers[0].pid
    )  # a session of its own: Ctrl-C does not reach it


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
    sleeper = "import time; from parts import mathcheck; mathcheck.is_same = lambda *_: time.sleep(60); mathcheck.main()"
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


# ---- Written in every script and read back


def in_script(figure: str, zero: str) -> str:
    return "".join(chr(ord(zero) + int(c)) if c in "0123456789" else c for c in figure)


def in_ethiopic(number: int) -> str:
    """Write a positive number by the rules of CSS Counter Styles 3: pairs of digits, ፻ and ፼ in turn."""
    text = ""
    pairs = [
        int(pair)
        for pair in re.findall("..", f"{number:0{len(str(number)) + len(str(number)) % 2}d}")
    ]
    for place, pair in zip(reversed(range(len(pairs))), pairs, strict=True):
        silent = pair == 0 or (
            pair == 1 and place > 0 and (place == len(pairs) - 1 or place % 2 == 1)
        )
        tens = " ፲፳፴፵፶፷፸፹፺"[pair // 10]
        ones = " ፩፪፫፬፭፮፯፰፱"[pair % 10]
        text += "" if silent else (tens + ones).replace(" ", "")
        text += "፻" if place % 2 == 1 and pair else "፼" if place % 2 == 0 and place else ""
    return text


def in_han(number: int) -> str:
    """Write 0 <= number < 10^12 in formal Chinese."""
    for size, unit in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if number >= size:
            rest = number % size
            filler = "零" if 0 < rest < size // 10 else ""
            return in_han(number // size) + unit + (filler + in_han(rest) if rest else "")
    return "零一二三四五六七八九"[number]


def in_indian_groups(number: int) -> str:
    head, tail = divmod(number, 1000)
    return f"{re.sub(r'(?<=.)(?=(..)+$)', ',', str(head))},{tail:03d}" if head else str(tail)


def test_there_are_many_digit_scripts_and_every_digit_of_each_is_read():
    assert len(ZEROS) >= 60
    for zero in ZEROS:
        for number in (0, 18, 1234567890):
            assert is_correct(rf"\boxed{{{in_script(str(number), zero)}}}", str(number))
            assert not is_correct(rf"\boxed{{{in_script(str(number + 1), zero)}}}", str(number))


WRAPPERS = [
    "{}",
    "${}$",
    r"\text{{{}}}",
    r"{}\text{{ birr}}",
    "{} apples",
    "tufaha {}",
    "x = {}",
    "Answer: {}.",
    "₦{}",
    "{}%",
]
GROUPERS = {
    "none": str,
    "comma": lambda n: f"{n:,}",
    "space": lambda n: f"{n:,}".replace(",", "\u202f"),
    "apostrophe": lambda n: f"{n:,}".replace(",", "’"),
    "latex": lambda n: f"{n:,}".replace(",", "{,}"),
    "indian": in_indian_groups,
}


@quick
@given(
    st.integers(0, 10**12),
    st.sampled_from(ZEROS),
    st.sampled_from(sorted(GROUPERS)),
    st.sampled_from(["", "-", "−", "–", "－"]),
    st.sampled_from(WRAPPERS),
)
def test_an_integer_in_any_script_grouping_and_wrapper_reads_back(
    number, zero, grouper, sign, wrapper
):
    text = wrapper.format(sign + in_script(GROUPERS[grouper](number), zero))
    assert normalise(text) == str(-number if sign else number), text


@quick
@given(
    st.integers(0, 10**9),
    st.integers(0, 99),
    st.sampled_from(ZEROS),
    st.sampled_from(
        [("", "."), ("", ","), (",", "."), (".", ","), (" ", ","), (" ", "."), ("’", ".")]
    ),
)
def test_a_decimal_in_any_script_and_style_reads_back(whole, hundredths, zero, style):
    group, mark = style
    text = in_script(f"{whole:,}".replace(",", group) + f"{mark}{hundredths:02d}", zero)
    assert normalise(text) == str(whole + Fraction(hundredths, 100)), text


@quick
@given(st.integers(-999, 999), st.integers(1, 999), st.sampled_from(ZEROS))
def test_a_fraction_reads_back_reduced(top, bottom, zero):
    for text in (f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}"):
        assert normalise(in_script(text, zero)) == str(Fraction(top, bottom))


@quick
@given(st.integers(1, 10**12))
def test_an_ethiopic_numeral_reads_back(number):
    assert normalise(in_ethiopic(number) + " ብር") == str(number)


@quick
@given(st.integers(0, 10**12 - 1))
def test_a_han_numeral_reads_back_by_units_and_by_position(number):
    by_position = "".join("〇一二三四五六七八九"[int(digit)] for digit in str(number))
    assert (
        normalise(in_han(number))
        == normalise(in_han(number) + "个苹果")
        == normalise(by_position)
        == str(number)
    )


@quick
@given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from([" or ", ", ", "; ", " and ", "、", " birr, "]),
)
def test_two_numbers_are_never_one(first, second, joint):
    assert normalise(f"{first}{joint}{second}") is None


@quick
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**3))
def test_a_canonical_string_is_its_own_canonical_string(top, bottom):
    canonical = str(Fraction(top, bottom))
    assert normalise(canonical) == canonical


# ---- Hostile input

PIECES = (
    r"0 1 8 . , ' / - + = ^ _ { } ( ) $ % ° ! : ; e x × \ \boxed{ \frac{ \text{ \times 10^ <think> </think> "
    "½ ² ፻ ፼ ፩ 十 万 三 ﷺ"
)
hostile_text = st.one_of(
    st.text(st.characters()),  # every code point, surrogates too
    st.lists(st.sampled_from([*PIECES.split(" "), " ", "\0", "\u200b", "\ud800"]), max_size=40).map(
        "".join
    ),
)


@settings(quick, max_examples=300)
@given(hostile_text)
def test_no_text_raises(text):
    answer = normalise(text)
    assert answer is None or answer
    normalise(text, as_text=True)
    extract_answer(text, think_open=True)
    assert is_correct(text, "123456789") in (True, False)
    is_correct(rf"\boxed{{{text}}}", "18")


@settings(quick, max_examples=40)
@given(hostile_text)
def test_no_text_breaks_a_worker(text):
    assert grade(rf"\boxed{{{text}}}", r"x\sqrt{8}", limit_s=0.5).reason in REASONS


@settings(quick, max_examples=300)
@given(hostile_text)
def test_a_number_comes_only_from_numerals(text):
    answer = normalise(text)
    if answer is not None and re.fullmatch(r"-?\d+(/\d+)?", answer):
        folded = unicodedata.normalize("NFKC", text)
        assert any(
            unicodedata.numeric(character, None) is not None or character in "两兩"
            for character in folded
        )
        assert answer == str(Fraction(answer)), "not reduced"


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


def test_a_long_box_is_no_answer_but_blanks_around_a_short_one_do_not_count():
    assert normalise("1" * MAX_ANSWER_CHARS) == "1" * MAX_ANSWER_CHARS
    assert normalise("1" * (MAX_ANSWER_CHARS + 1)) is None
    assert normalise("a" * (MAX_ANSWER_CHARS + 1)) is None
    assert is_correct(r"\boxed{" + " " * 1_000_000 + "18}", "18")
    assert normalise(" " * MAX_ANSWER_CHARS + "18") == "18"


def test_exponents_are_read_up_to_their_bound():
    assert normalise(f"10^{MAX_EXPONENT}") == str(10**MAX_EXPONENT)
    assert normalise(f"1e-{MAX_EXPONENT}") == f"1/{10**MAX_EXPONENT}"
    assert normalise(f"10^{MAX_EXPONENT + 1}") is None
    assert normalise(f"1e-{MAX_EXPONENT + 1}") is None


def test_the_work_of_extraction_grows_linearly(monkeypatch):
    """Count brace matches, the only unit of work: four times the text, four times the matches."""
    counts = []

    class CountingBraces:
        def finditer(self, text):
            matches = list(braces.finditer(text))
            counts.append(len(matches))
            return matches

    braces = grading._BRACES
    monkeypatch.setattr(grading, "_BRACES", CountingBraces())
    for repeats in (100, 400):
        extract_answer(r"\boxed{{1}" * repeats)
    assert counts[1] == 4 * counts[0]
