"""parts/program.py: errors in one line, output that may go away, threads on a busy machine."""

import errno
import io
import logging.handlers
import os
import signal
import subprocess
import sys

import pytest
import typer
from conftest import ROOT
from rich.console import Console
from typer.testing import CliRunner

from parts import commands, program
from parts.files import CannotWrite, write_json
from parts.model import load_tokenizer
from parts.prompts import languages


def test_an_error_of_several_lines_becomes_one(capsys):
    with pytest.raises(typer.Exit) as end, program.bad_input():
        raise ValueError("first\n   second\tthird")
    assert end.value.exit_code == 2
    assert capsys.readouterr().err == "error: first second third\n"


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), FloatingPointError("x")])
def test_what_is_no_bad_input_is_not_turned_into_a_line(error):
    with pytest.raises(type(error)), program.bad_input():
        raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped; all is kept"),
        (CannotWrite("cannot write x: full; free some"), 2, "error: cannot write x: full; free"),
        (FloatingPointError("NaN"), 1, "error: NaN"),
        (MemoryError(), 1, "error: out of memory; fewer rows at once take less"),
        (RuntimeError("MPS backend out of memory"), 1, "error: out of memory; fewer rows"),
    ],
)
def test_work_that_cannot_be_finished_says_why(capsys, error, code, said):
    with pytest.raises(typer.Exit) as end, program.working(Console(), lambda: "all is kept"):
        raise error
    captured = capsys.readouterr()
    assert end.value.exit_code == code and said in captured.out + captured.err
    assert (captured.out + captured.err).count("\n") == 1


def test_a_stop_before_there_is_anything_to_keep_is_said(monkeypatch):
    def _stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("parts.setup.configure", _stopped)
    result = CliRunner().invoke(commands.copsd, ["train"])
    assert (result.exit_code, result.stderr) == (130, "error: stopped\n")


# A module that is met where Ctrl-C comes: while the command line is read, and at Python's end.
INTERRUPTED = {
    "typer.py": "import signal\nsignal.raise_signal(signal.SIGINT)\n",
    "sitecustomize.py": "import atexit, signal\natexit.register(signal.raise_signal, 2)\n",
}


@pytest.mark.parametrize("name", INTERRUPTED)
@pytest.mark.parametrize("command", ["copsd.py languages", "eval.py --help", "compare.py --help"])
def test_ctrl_c_before_a_command_works_or_after_is_a_line(tmp_path, command, name):
    (tmp_path / name).write_text(INTERRUPTED[name], encoding="utf-8")
    result = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (result.returncode, result.stderr) == (130, b"error: stopped\n")
    assert bool(result.stdout) == (name == "sitecustomize.py")  # what was printed is there


def test_a_long_input_is_not_repeated_whole(capsys):
    program.say_error(f"--seeds is {'1,' * 9000}; valid: a count")
    said = capsys.readouterr().err
    assert len(said) < 2 * program.LONGEST_ERROR and said.count("\n") == 1
    assert said.startswith("error: --seeds is 1,") and said.endswith("; valid: a count\n")


def test_libraries_warn_of_nothing_while_a_command_works(lab_folder):
    """A prompt longer than model_max_length made a line of transformers' in a run that is right."""
    program.start()
    heard = logging.handlers.BufferingHandler(9)
    logging.getLogger("transformers").addHandler(heard)
    tokenizer = load_tokenizer(lab_folder)
    tokenizer.model_max_length = 5
    tokenizer.encode("2 + 3 = 5" * 9)
    logging.getLogger("transformers").removeHandler(heard)
    assert not heard.buffer


def test_names_cannot_drive_the_terminal(tmp_path):
    folder = tmp_path / "\x1b[31mred\x07"
    folder.mkdir()
    write_json(folder / "other.json", {})
    result = CliRunner().invoke(commands.evaluation, ["--limit", "1", "--out", str(folder)])
    assert result.exit_code == 2 and "\x1b" not in result.stderr and "\x07" not in result.stderr
    assert r"\x1b[31mred\x07" in result.stderr


POSIX = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# Trains, evaluates, reports and shows in one process, which loads torch once.
POSIX_DAY = """
import sys
from parts import commands
small = ["--max-new-tokens", "8"]
train = ["--eval-problems", "1", "--eval-samples", "1", "--steps", "1", "--batch-size", "2"]
for app, typed in (
    (commands.copsd, ["train", *small, *train, "--show-rollout", "--out", "run"]),
    (commands.evaluation, [*small, "--limit", "2", "--adapter", "run", "--out", "one"]),
    (commands.evaluation, ["report", "one", "--out", "report"]),
    (commands.copsd, ["show", *small, "--html", "walk.html"]),
    (commands.copsd, ["languages"]),
    (commands.comparison, ["--help"]),
):
    try:
        app(typed)
    except SystemExit as end:
        assert not end.code, (typed, end.code)
"""


@pytest.mark.parametrize(
    "command", ["copsd.py train --out", "eval.py --out", "eval.py report", "compare.py --out"]
)
def test_a_name_that_the_locale_cannot_read_is_refused_with_the_remedy(tmp_path, command):
    name = str(tmp_path).encode() + "/ɓulà".encode()
    result = subprocess.run(
        [sys.executable.encode(), *command.encode().split(), name],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, **POSIX},
    )
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1
    assert b"not all of it is letters in this locale (ascii); set PYTHONUTF8=1" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_posix_locale_writes_the_same_letters(tmp_path):
    env = {**os.environ, **POSIX, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", POSIX_DAY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, env=env)
    assert result.returncode == 0 and result.stderr == b"", result.stderr
    letters = ["run/completions.jsonl", "one/problems.jsonl", "report/report.html", "walk.html"]
    for name in letters:
        assert "ƙ" in (tmp_path / name).read_text(encoding="utf-8"), name
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md", ".tex", ".csv", ".html"):
            path.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1:strict"])
def test_a_terminal_without_the_letters_shows_marks_and_nothing_stops(encoding):
    result = subprocess.run(
        [sys.executable, "copsd.py", "languages"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "300"},
    )
    assert result.returncode == 0 and result.stderr == b""
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(languages()) and b"Amharic" in lines[1] and b"????" in lines[1]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_output_that_goes_away_ends_no_work(tmp_path, number):
    class Gone(io.StringIO):
        failed = 0

        def flush(self):
            self.failed += 1
            raise OSError(number, os.strerror(number))

        def fileno(self):
            return spare.fileno()

    with (tmp_path / "spare").open("w") as spare:
        stream = Gone()
        output = program.Output(stream)
        for _ in range(3):
            print("a line", file=output, flush=True)
    assert stream.failed == 3 and output.failure and output.failure.errno == number


def test_a_broken_pipe_does_not_cost_the_save(tmp_path):
    small = "--eval-problems 0 --steps 1 --batch-size 2 --max-new-tokens 8"
    command = f"{sys.executable} copsd.py train {small} --out {tmp_path / 'run'} | head -1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.count("\n") == 1 and result.stderr == ""
    assert (tmp_path / "run" / "resume" / "step_00001.json").is_file()


TINY_RUN = "train --eval-problems 0 --steps 1 --batch-size 2 --max-new-tokens 8"


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [("languages", ">&-"), ("languages", "2>&-"), (TINY_RUN, ">&- 2>&-")],
)
def test_a_stream_that_a_shell_closed_costs_nothing(tmp_path, arguments, closed):
    words = tmp_path / "words"
    out = f"--out {tmp_path / 'run'}" if arguments == TINY_RUN else ""
    command = f"({sys.executable} copsd.py {arguments} {out} {closed}) > {words} 2>&1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT)
    assert result.returncode == 0 and "Traceback" not in words.read_text(encoding="utf-8")
    if out:
        assert (tmp_path / "run" / "resume" / "step_00001.json").is_file()


@pytest.mark.parametrize(
    ("idle", "policy", "spins"), [(True, None, program.SPINS), (False, "PASSIVE", None)]
)
def test_threads_spin_for_a_while_and_not_at_all_where_another_process_is_busy(
    monkeypatch, idle, policy, spins
):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000000000")
    monkeypatch.setattr(program, "_machine_is_idle", lambda: idle)
    program.start()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_without_the_detector_of_languages_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("parts.measure.language_detector", lambda: None)
    program.start()
    assert capsys.readouterr().out.count("pycld2 is not installed") == 1
    monkeypatch.undo()
    program.start()
    assert capsys.readouterr().out == ""
