"""Try faults on the programs and count what came of them; nothing may be lost, and nothing silent.

    python bench/faults.py            every kind of fault, ten minutes at most
    python bench/faults.py --short    one of each kind, on COPSD's training and on an evaluation

Each trial works in a folder of its own with the lab's model. A fault strikes: the process is killed
(SIGKILL) at a random moment or at a write; it gets a signal; a write meets a full disk; a file is
changed afterwards; another process wants the same folder; a number is not finite. Then the same
command is given again, as a user would, and its files are compared with those of a run that nothing
happened to.

    same bytes   it went on and ended with the same files
    clear stop   it ended by itself in one line that says why, without a traceback, and its exit
                 code is not 0
    lost         anything else: other bytes, a traceback, a hang

The programs run for real, each in a process of its own that was forked from this one.
bench/injected.py holds how such a process is started, and how a fault is put into it. Here are the
trials, the order in which they are tried, and the table.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has one thread only

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import compare  # noqa: F401 (loaded here once, and not in each process)
from bench.injected import (
    Ended,
    Program,
    full_disk,
    infinite_gradient,
    killer,
    nan_loss,
    pauser,
    recorder,
    run,
    start,
    through,
    unseen_update,
    wait,
)
from lab.problems import write_few
from parts import commands, owner
from parts.files import PARTIAL
from parts.settings import flag_of
from parts.tables import text_table

RECORDS = ("config.json", "settings.json")
ROOT = Path(__file__).resolve().parent.parent
VARYING = ("time_s", "train_s", "memory/", "per_s")  # keys whose values differ from run to run
# Files that hold times, or digests of files that do: only that they are there is compared.
UNEQUAL = ("config.json", "settings.json", "digests.json", "compare.json", "RESULTS.md")
SMALL = ["--device", "cpu", "--max-new-tokens", "8", "--eval-samples", "2"]
TRAIN = ["train", *SMALL, "--steps", "3", "--save-every", "1", "--keep", "2", "--batch-size", "2"]
TRAIN += ["--eval-problems", "1"]
WATCHED = ["--eval-every", "2", "--dev-problems", "1"]  # an adapter at a look, and the best one
COMPARE = [*SMALL, "--seeds", "1", "--sweep", "1", "--token-budget", "32", "--batch-size", "2"]
COMPARE += ["--group-size", "2", "--eval-problems", "1", "--dev-problems", "1"]
GRPO = [*WATCHED, "--method", "grpo", "--group-size", "2"]
EVALUATE = ["--device", "cpu", "--pass-at-k", "2", "--limit", "6", "--max-new-tokens", "8"]


def make_programs(folder: Path) -> list[Program]:
    """Return what is tried, on a few problems that are written into a folder."""
    data = [word for name, path in write_few(folder).items() for word in (flag_of(name), path)]
    return [
        Program("train copsd", commands.copsd, [*TRAIN, *data]),
        Program("train grpo", commands.copsd, [*TRAIN, *data, *GRPO]),
        Program("eval", commands.evaluation, EVALUATE),
        Program("compare", commands.comparison, [*COMPARE, *data]),
    ]


# What is compared.


def content(folder: Path) -> dict[str, object]:
    """Return the files of a folder by name, as far as two runs of a command have them alike."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # The lock of a killed process stays in a folder in which nothing was left to do, and there
        # saved states are of no use any more.
        is_finished = (path.parent.parent / "results.json").is_file()
        is_used = path.name != owner.LOCK and not (path.parent.name == "resume" and is_finished)
        if not path.is_file() or not is_used:
            continue
        found[name] = path.read_bytes()
        is_voucher = path.parent.name == "resume" and path.suffix == ".json"
        # A comparison draws accuracy over seconds, too, in the figure of each language.
        shows_time = path.suffix in (".png", ".svg") and "_" in path.stem
        if path.name in UNEQUAL or is_voucher or shows_time:
            found[name] = "there"
        elif path.name in ("metrics.jsonl", "results.json"):
            lines = path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else []
            rows = [json.loads(line) for line in lines or [path.read_text("utf-8")]]
            found[name] = [_timeless(row) for row in rows]
    return found


def _timeless(value: object) -> object:
    """Return what JSON held without times, memory, and digests of them."""
    if isinstance(value, dict):
        kept = {n: each for n, each in value.items() if not any(w in n for w in VARYING)}
        digests = ("sha256", "files")
        return {name: _timeless(each) for name, each in kept.items() if name not in digests}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


@dataclass
class Bench:
    """The trials' place, what an unharmed run of each program leaves, and how long it takes."""

    folder: Path
    random: random.Random
    expected: dict[str, dict[str, object]]
    seconds: dict[str, float]
    writes: dict[str, list[Path]]  # by program: what it opened, made or replaced, in order
    interrupted: dict[str, Path]  # a folder whose run was killed at two thirds of its writes
    training: Program

    def place(self) -> Path:
        """Return a new folder's name."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "out"

    def again(self, program: Program, out: Path) -> str:
        """Give the command again, and return what became of the run."""
        ended = run(program, out)
        if ended.code == 0:
            same = content(out) == self.expected[program.name]
            return "same bytes" if same else self.explain(program, out, "other bytes")
        return "clear stop" if ended.is_clear else self.explain(program, out, ended.errors)

    def explain(self, program: Program, out: Path, why: str) -> str:
        """Say what was lost, on standard error, for whoever has to mend it."""
        found = content(out)
        expected = self.expected[program.name]
        names = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
        print(f"lost: {program.name} in {out}: {why[-600:]} {sorted(names)}", file=sys.stderr)
        return "lost"


def prepare(folder: Path, programs: list[Program], training: Program) -> Bench:
    """Run each program unharmed, and once killed at two thirds of its writes."""
    bench = Bench(folder, random.Random(0), {}, {}, {}, {}, training)
    for program in programs:
        out = bench.place()
        events = out.with_name("events")
        started = time.monotonic()
        ended = run(program, out, hook=recorder(out, events))
        assert ended.code == 0, ended
        bench.seconds[program.name] = time.monotonic() - started
        bench.expected[program.name] = content(out)
        bench.writes[program.name] = [Path(line) for line in events.read_text().splitlines()]
        part = bench.place()
        count = len(bench.writes[program.name])
        run(program, part, hook=killer(part, 2 * count // 3, torn=False))
        bench.interrupted[program.name] = part
    return bench


# Trials: each returns what became of the run.


def killed_at_random(bench: Bench, program: Program) -> str:
    """Kill it at a random moment."""
    out = bench.place()
    pid = start(program, out)
    time.sleep(bench.random.uniform(0, bench.seconds[program.name]))
    os.kill(pid, signal.SIGKILL)
    wait(pid, out)
    return bench.again(program, out)


def killed_at_write(bench: Bench, program: Program, number: int, torn: bool) -> str:
    """Kill it at its n-th write."""
    out = bench.place()
    ended = run(program, out, hook=killer(out, number, torn=torn))
    if ended.code != -signal.SIGKILL:
        return bench.explain(program, out, f"not killed at write {number}: {ended}")
    return bench.again(program, out)


def signalled(bench: Bench, program: Program, number: int, times: int) -> str:
    """Send a signal, or two of them, at a random moment."""
    out = bench.place()
    pid = start(program, out)
    time.sleep(bench.random.uniform(0.1, 0.9) * bench.seconds[program.name])
    os.kill(pid, number)
    # Exit code 0 is right only where the program was through before the signal came.
    good_ends = (0, -number) if through(out).exists() else (-number,)
    for _ in range(times - 1):
        time.sleep(0.02)
        os.kill(pid, number)
    ended = wait(pid, out)
    before_it_began = not out.exists() and "Traceback" not in ended.errors
    if not (ended.code in good_ends or ended.is_clear or before_it_began):
        return bench.explain(program, out, f"{ended.code} at a signal: {ended.errors}")
    return bench.again(program, out)


def full(bench: Bench, program: Program, target: Path) -> str:
    """Fill the disk for one file, then free it."""
    out = bench.place()
    records = [
        folder / name
        for folder in target.parents  # the nearest first
        for name in RECORDS
        if folder / name in bench.writes[program.name]
    ]
    ended = run(program, out, hook=full_disk(out, target, records[0]))
    if not (ended.code == 2 and ended.is_clear and str(target) in ended.errors):
        return bench.explain(program, out, f"full at {target}: {ended.code} {ended.errors}")
    return bench.again(program, out)


def changed(bench: Bench, program: Program, name: Path, how: str) -> str:
    """Change a file of a run that was killed before its end."""
    # In the place where it was: a comparison's record holds paths.
    out = bench.interrupted[program.name]
    saved = out.with_name("saved")
    if not saved.exists():
        shutil.copytree(out, saved)
    shutil.rmtree(out)
    shutil.copytree(saved, out)
    file = out / name
    held = bytearray(file.read_bytes())
    place = bench.random.randrange(len(held)) if held else 0
    if how == "flipped" and held:
        held[place] ^= 1 << bench.random.randrange(8)
        file.write_bytes(held)
    if how == "truncated":
        file.write_bytes(held[:place])
    if how == "emptied":
        file.write_bytes(b"")
    if how == "deleted":
        file.unlink()
    return bench.again(program, out)


def one_comes_late(bench: Bench, program: Program, number: int) -> str:
    """Give the command again while the first process is before its n-th write."""
    out = bench.place()
    first = _start_paused(program, out, number)
    late = run(program, out, words=out.with_name("late"))
    os.kill(first, signal.SIGCONT)
    return _one_worked(bench, program, out, [wait(first, out), late])


def two_race(bench: Bench, program: Program) -> str:
    """Let two processes make the same folder at the same time; either may win."""
    out = bench.place()
    words = [out, out.with_name("rival")]
    pids = [_start_paused(program, out, 0, words=each) for each in words]
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return _one_worked(bench, program, out, [*map(wait, pids, words)])


def _start_paused(program: Program, out: Path, number: int, words: Path | None = None) -> int:
    """Start a process and return its number when it has stopped before its n-th write."""
    pid = start(program, out, hook=pauser(out, number), words=words)
    os.waitpid(pid, os.WUNTRACED)
    return pid


def _one_worked(bench: Bench, program: Program, out: Path, ends: list[Ended]) -> str:
    """Return what became of a run that two processes wanted; one must have been refused."""
    codes = sorted(ended.code for ended in ends)
    refused = [ended for ended in ends if ended.code == 2]
    if codes != [0, 2] or "in use by process" not in refused[0].errors:
        return bench.explain(program, out, f"two at once: {ends}")
    return bench.again(program, out)


def not_finite(bench: Bench, where: str) -> str:
    """Let a number be NaN, or too large, and expect a clear stop."""
    program = bench.training
    out = bench.place()
    if where == "weights":
        model = out.with_name("model")
        shutil.copytree(ROOT / "lab" / "tiny", model)
        tensors = load_file(model / "model.safetensors")
        next(iter(tensors.values())).view(-1)[3] = torch.nan
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        program = Program("", program.app, [*program.arguments, "--model", str(model)])
    patches = {"loss": nan_loss, "gradient": infinite_gradient, "logits": unseen_update}
    patch = patches.get(where)
    if where in ("logits", "update"):
        program = Program("", program.app, [*program.arguments, "--lr", "1e30"])
    ended = run(program, out, patch=patch)
    words = "not finite" if where in ("weights", "logits", "update") else "no finite gradient"
    if ended.code > 0 and ended.is_clear and words in ended.errors + ended.said:
        return "clear stop"
    print(f"lost: not finite in {where}: {ended}", file=sys.stderr)
    return "lost"


# The table.

Trial = tuple[str, Callable[[], str]]


def trials(bench: Bench, programs: list[Program]) -> Iterator[list[Trial]]:
    """Yield groups of trials, a kind of fault each."""
    for program in programs:
        name = program.name
        writes = bench.writes[name]
        yield [
            (f"{name}: killed at random", lambda p=program: killed_at_random(bench, p))
            for _ in range(30)
        ]
        yield [
            (
                f"{name}: killed at a write",
                lambda p=program, n=number, torn=torn: killed_at_write(bench, p, n, torn),
            )
            for number in range(len(writes))
            for torn in (False, True)
        ]
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        yield [
            (f"{name}: signals", lambda p=program, s=stop, t=times: signalled(bench, p, s, t))
            for stop in stops
            for times in (1, 2)
        ]
        targets = dict.fromkeys(path for path in writes if path.suffix and path.suffix != PARTIAL)
        targets |= dict.fromkeys(p.with_suffix("") for p in writes if p.suffix == PARTIAL)
        yield [
            (f"{name}: full disk", lambda p=program, t=target: full(bench, p, t))
            for target in targets
            if target.name != owner.LOCK
        ]
        part = bench.interrupted[name]
        files = sorted(path.relative_to(part) for path in part.rglob("*") if path.is_file())
        for how in ("truncated", "flipped", "emptied", "deleted"):
            yield [
                (f"{name}: a file {how}", lambda p=program, f=file, h=how: changed(bench, p, f, h))
                for file in files
            ]
        owned = 1 + next(n for n, path in enumerate(writes) if path.name == owner.LOCK)
        last = len(writes) - 1
        kind = f"{name}: two at once"
        yield [
            (kind, lambda p=program: two_race(bench, p)),
            (kind, lambda p=program, n=owned: one_comes_late(bench, p, n)),
            (kind, lambda p=program, n=last: one_comes_late(bench, p, n)),
        ]
    yield [
        ("not finite", lambda w=where: not_finite(bench, w))
        for where in ("weights", "logits", "update", "loss", "gradient")
    ]


def try_in_turn(
    groups: list[list[Trial]],
    counts: dict[str, Counter],
    until: float,
    rounds: int | None,
) -> None:
    """Try one of each kind in turn, so that when the time is up every kind was tried.

    counts  of what became of each kind, by its name; is added to
    rounds  at most so many; None: until nothing is left
    """
    longest = max(map(len, groups))
    for number in range(longest if rounds is None else rounds):
        for name, trial in (group[number] for group in groups if number < len(group)):
            if time.monotonic() >= until:
                return
            counts.setdefault(name, Counter())[trial()] += 1


def main() -> None:
    """Try faults until the time is up, print the table, and fail if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--short", action="store_true", help="one of each kind, however long")
    parser.add_argument("--seconds", type=float, default=570.0, help="stop after so many")
    parser.add_argument("--program", default="", help="only the programs with this in their name")
    options = parser.parse_args()
    until = time.monotonic() + (math.inf if options.short else options.seconds)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    every = make_programs(folder)
    programs = [program for program in every if options.program in program.name]
    if not programs:
        shutil.rmtree(folder)
        parser.error(f"--program: valid are {', '.join(each.name for each in every)}")
    if options.short and not options.program:
        programs = [program for program in programs if program.name in ("train copsd", "eval")]
    counts: dict[str, Counter] = {}
    bench = prepare(folder, programs, training=every[0])
    groups = [bench.random.sample(g, len(g)) for g in trials(bench, programs)]
    possible = Counter(name for group in groups for name, _ in group)
    try_in_turn(groups, counts, until, rounds=1 if options.short else None)
    results = ("same bytes", "clear stop", "lost")
    rows = [
        [name, str(sum(count.values())), str(possible[name]), *(str(count[r]) for r in results)]
        for name, count in sorted(counts.items())
    ]
    header = ["fault", "tried", "of", *results]
    Console(width=100).print(text_table("What came of faults", header, rows))
    lost = sum(count["lost"] for count in counts.values())
    if not lost:
        shutil.rmtree(folder)  # else it stays, for whoever has to mend it
    print(f"{sum(sum(c.values()) for c in counts.values())} faults, {lost} lost")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
