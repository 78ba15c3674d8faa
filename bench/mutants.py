"""Break the maths of the project on purpose, one place at a time, and see whether a test notices.

    python bench/mutants.py --minutes 30                 a sample over all files
    python bench/mutants.py --files kernels.py --count 20 --seed 1

A mutant is a file with one thing changed: a < is a <=, a + is a -, a 1 is a 2, a True is a False, a
min is a max, a `low` is a `high`, a condition is turned round. It is killed when a test of that
file fails, or runs into the time limit. One that survives shows a line that no test holds, or a
change that changes nothing: HARMLESS lists those, with the reason. Everything happens in a copy of
the project; the tests of a file run in a process forked from one that has loaded torch already.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# File -> its tests, those first that are quick to fail.
TESTS = {
    "kernels.py": [
        "tests/test_reduce_loss.py",
        "tests/test_clip_products.py",
        "tests/test_kernels.py",
        "tests/test_docs.py",
    ],
    "copsd.py": [
        "tests/test_grpo.py",
        "tests/test_groups.py",
        "tests/test_copsd.py",
        "tests/test_flags.py",
        "tests/test_methods.py",
        "tests/test_notes.py",
        "tests/test_watch.py",
    ],
    "parts/sampler.py": ["tests/test_sampler.py", "tests/test_batch.py", "tests/test_docs.py"],
    "parts/batch.py": ["tests/test_sampler.py", "tests/test_batch.py"],
    "parts/lora.py": ["tests/test_lora.py", "tests/test_copies.py", "tests/test_families.py"],
    "parts/copies.py": ["tests/test_copies.py"],
    "parts/metrics.py": ["tests/test_metrics.py", "tests/test_docs.py"],
    "parts/grading.py": ["tests/test_grading.py"],
    "parts/equations.py": ["tests/test_numerals.py", "tests/test_grading.py"],
    "parts/numerals.py": ["tests/test_numerals.py", "tests/test_grading.py"],
    "parts/watch.py": ["tests/test_watch.py"],
    "methods.py": ["tests/test_notes.py", "tests/test_methods.py"],
    "parts/weights.py": ["tests/test_weights.py", "tests/test_methods.py"],
    "parts/narrow.py": ["tests/test_narrow.py", "tests/test_methods.py"],
    "parts/packing.py": ["tests/test_packing.py"],
    "parts/prefixes.py": ["tests/test_prefixes.py"],
    "parts/steps.py": [
        "tests/test_copsd.py",
        "tests/test_grpo.py",
        "tests/test_groups.py",
        "tests/test_lossscale.py",
        "tests/test_ranks.py",
    ],
}
# Tests that say nothing of the maths and take long.
LEFT_OUT = "not readme and not bad_input and not every_flag and not bad_data_file"
PATIENCE = 10  # seconds on the clock for one of processor time, before what waits is ended
LEFT_OUT_FUNCTIONS = {"train", "measure_once"}  # the program around the maths of copsd.py
SWAPS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}
WORDS = [("min", "max"), ("amin", "amax"), ("any", "all"), ("low", "high"), ("exp", "expm1")]
# (file, function, before, after) -> why no test can notice.
HARMLESS = {
    # Of the first cursor only: it counts columns of rows, and is replaced when the first come.
    ("parts/batch.py", "__init__", "0", "1"): "where nothing is written yet, nobody asks how much",
    ("kernels.py", "_score", "-1", "1"): "the last of two axes",
    ("kernels.py", "chunked_divergence", "-1", "1"): "the last of two axes",
    ("kernels.py", "chunked_logprob", "0.5", "1.5"): "a beta that forward KL does not have",
    ("kernels.py", "clip_products", "0.0", "1.0"): "a clip that is not asked for is not read",
    ("kernels.py", "chunk_rows", "False", "True"): "on a CPU, the default, it makes no difference",
    ("parts/sampler.py", "_draw", "-1", "1"): "the last of two axes",
    (
        "methods.py",
        "egrsd_credit",
        "credited_N * advantage_N",
        "credited_N / advantage_N",
    ): "a quotient has the product's sign, and a NaN is not below 0 either",
}


@dataclass(frozen=True)
class Mutant:
    """A file with one place changed: `old` is a node of its tree, `new` what stands there."""

    file: str
    function: str
    tree: ast.Module
    old: ast.AST
    new: ast.AST

    @property
    def before(self) -> str:
        """The first line of what was changed."""
        return ast.unparse(self.old).split("\n")[0]

    @property
    def after(self) -> str:
        """The first line of what it was changed to."""
        return ast.unparse(self.new).split("\n")[0]

    def source(self) -> str:
        """Return the whole file, changed."""
        # A copy of the tree that takes the new node for the copy of the old one.
        changed = copy.deepcopy(self.tree, {id(self.old): self.new})
        return ast.unparse(ast.fix_missing_locations(changed))

    def __str__(self) -> str:
        line = getattr(self.old, "lineno", 1)
        text = (ROOT / self.file).read_text(encoding="utf-8").splitlines()[line - 1].strip()
        return f"{self.file}:{line} {self.function}: {self.before} -> {self.after}  in  {text}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What HARMLESS knows it by, wherever its line moves."""
        return self.file, self.function, self.before, self.after


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that may stand in a node's place, each one change away from it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPS[type(node.op)](), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    if isinstance(node, ast.Break | ast.Continue):
        yield SWAPS[type(node)]()
    if isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
    for pair in WORDS if name else ():
        for word, other in (pair, pair[::-1]):
            parts = getattr(node, str(name)).split("_")
            if word in parts:
                swapped = copy.copy(node)
                setattr(swapped, str(name), "_".join(other if p == word else p for p in parts))
                yield swapped


def mutable_nodes(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield every node that may be changed, with the function it stands in.

    Left out: error messages, annotations, docstrings, the decorators, what is no function, and the
    `strict` of a zip, which checks what holds anyway.
    """

    def _below(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                    continue
                if name in ("annotation", "returns", "decorator_list"):
                    continue
                if isinstance(child, ast.keyword) and child.arg == "strict":
                    continue
                inside = child.name if isinstance(child, ast.FunctionDef) else function
                if inside in LEFT_OUT_FUNCTIONS:
                    continue
                if inside:
                    yield inside, child
                yield from _below(child, inside)

    yield from _below(tree, "")


def mutants_of(file: str) -> list[Mutant]:
    """Return every mutant of a file, in the order of its lines."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [
        Mutant(file, function, tree, node, ast.copy_location(other, node))
        for function, node in mutable_nodes(tree)
        for other in changes(node)
    ]


class QuickestFirst:
    """A plug-in of pytest: tests run in the order of what each took when it ran first.

    A mutant then mostly dies within seconds. The times of the first run stand in `file`.
    """

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, float] = {}
        if file.is_file():
            self.seconds = json.loads(file.read_text(encoding="utf-8"))

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Sort; a test that was never seen comes first."""
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note what a test took, with its fixtures."""
        self.seconds.setdefault(report.nodeid, 0.0)
        if not self.file.is_file():
            self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Keep the times of the first run."""
        if not self.file.is_file():
            self.file.write_text(json.dumps(self.seconds), encoding="utf-8")


def _run_tests(folder: Path, tests: list[str], times: Path, limit_s: float) -> None:
    """Run in a forked process: end with 0 if all tests pass, by SIGXCPU where they take too long.

    limit_s  seconds of processor time, so that a busy machine kills no mutant
    """
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), math.ceil(limit_s) + 1))
    os.chdir(folder)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    with open(folder / "tests.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    main = importlib.import_module("pytest").main
    os._exit(int(main([*options, *tests], plugins=[QuickestFirst(times)])))


def tests_pass(folder: Path, file: str, limit_s: float) -> bool | None:
    """Say whether the file's tests pass in the copy; None if they run into the limit.

    limit_s  seconds of processor time
    """
    tests = [test for test in TESTS[file] if not test.endswith("test_docs.py")]
    if len(tests) < len(TESTS[file]):
        module = file.removesuffix(".py").replace("/", ".")
        tests.append(f"tests/test_docs.py::test_examples_in_docstrings_run[{module}]")
    times = folder / f"{Path(file).stem}.times.json"
    process = multiprocessing.get_context("fork").Process(
        target=_run_tests, args=(folder, tests, times, limit_s)
    )
    process.start()
    process.join(PATIENCE * limit_s)  # one that waits takes no processor time
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return None if process.exitcode == -signal.SIGXCPU else process.exitcode == 0


def _used_s() -> float:
    """Return the processor time of all processes that were waited for, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def sample_of(files: list[str], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants, drawn by the seed; files take turns, so that each has its share."""
    drawn = []
    for file in files:
        mutants = mutants_of(file)
        random.Random(f"{seed}/{file}").shuffle(mutants)
        drawn.append(mutants)
    turns = [mutants[turn] for turn in range(count) for mutants in drawn if turn < len(mutants)]
    return turns[:count]


def run(mutants: list[Mutant], *, minutes: float, limit_s: float) -> int:
    """Try mutants until the time is over, print what became of them, and return the exit code."""
    ends = time.monotonic() + 60 * minutes
    counts: dict[str, Counter[str]] = {}
    survivors = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        ignored = shutil.ignore_patterns(
            ".git", "__pycache__", "runs", "evaluations", ".hypothesis"
        )
        shutil.copytree(ROOT, folder, ignore=ignored)
        limits = {}
        for file in dict.fromkeys(mutant.file for mutant in mutants):
            print(f"unchanged {file}", flush=True)
            began = _used_s()
            if not tests_pass(folder, file, 10 * limit_s):
                print((folder / "tests.log").read_text(encoding="utf-8")[-2000:])
                print(f"error: the tests of {file} do not pass as it is, so they can kill nothing")
                return 1
            # Slow tests are no death: only what takes twice as long as without the change is.
            limits[file] = max(limit_s, 2 * (_used_s() - began))
        for mutant in mutants:
            if time.monotonic() > ends:
                break
            place = folder / mutant.file
            whole = place.read_bytes()
            place.write_text(mutant.source(), encoding="utf-8")
            passed = tests_pass(folder, mutant.file, limits[mutant.file])
            place.write_bytes(whole)
            if passed and mutant.key in HARMLESS:
                fate = "harmless"
            else:
                fate = {True: "survived", False: "killed", None: "timed out"}[passed]
            counts.setdefault(mutant.file, Counter())[fate] += 1
            print(f"{fate:9} {mutant}", flush=True)
            if fate == "survived":
                survivors.append(mutant)
    return report(counts, survivors)


def report(counts: dict[str, Counter[str]], survivors: list[Mutant]) -> int:
    """Print a table and the survivors; return 1 where fewer than 90 % of all were killed."""
    print(f"\n{'file':20} killed  timed out  survived  harmless")
    for file, found in counts.items():
        fates = (found["killed"], found["timed out"], found["survived"], found["harmless"])
        print(f"{file:20} {fates[0]:6}  {fates[1]:9}  {fates[2]:8}  {fates[3]:8}")
    total = sum(counts.values(), Counter())
    killed = total["killed"] + total["timed out"]
    tried = killed + total["survived"]
    print(f"killed {killed} of {tried}, {killed / max(1, tried):.0%}, beside harmless ones")
    for mutant in survivors:
        print(f"survived: {mutant}")
    return int(killed < 0.9 * tried)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0, help="stop beginning new ones then")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="processor seconds, at least, of its tests"
    )
    given = parser.parse_args()
    with contextlib.suppress(ImportError):
        importlib.import_module("matplotlib")
    for heavy in ("torch", "transformers", "pytest"):
        importlib.import_module(heavy)
    importlib.import_module("torch").set_num_threads(1)
    sample = sample_of(given.files, given.count, given.seed)
    sys.exit(run(sample, minutes=given.minutes, limit_s=given.limit))
