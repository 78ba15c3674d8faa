"""Finished evaluations: read back, checked against their records, and compared in a report."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from parts import owner, runs
from parts.files import make_folder, read_json, read_rows, read_sealed, remedied
from parts.identity import circumstances, fingerprint
from parts.metrics import (
    Estimate,
    Graded,
    bootstrap,
    paired_tests,
    ratios,
    read_graded,
    read_summary,
)
from parts.report import Evaluation, report_tables, write_report
from parts.sampler import SamplingParams
from parts.tables import cell, print_table, text_table
from parts.typed import typed
from parts.view import say

EVALUATE_AGAIN = "remove it, and the command that began the evaluation makes it again"
# Of the identity of an evaluation, what its languages have in common.
SHARED = ("base_weights", "adapter_weights", "adapter_scale", "dtype")

# In these settings two runs that are compared may differ without a word: they are what is compared,
# are refused or said elsewhere, or change no attempt's chances.
MAY_DIFFER = {"model", "adapter", "benchmark", "lang", "ks", "seed", "out"}
ALSO_SAID = ("dtype", "prompt_template")  # of the identity, beside the settings
# What a record holds beside the settings, where it holds it: an older version knew less. Of the
# names that are not here none is read.
IDENTITY = {
    **dict.fromkeys(("base_weights", "dtype", "prompt_template", "data", "problem_ids"), str),
    **dict.fromkeys(("model_config", "generation_config", "tokenizer"), str),
    **dict.fromkeys(("adapter_weights", "template_date", "data_revision"), str | None),
    "adapter_scale": float | None,
    "problems": int,
}
CIRCUMSTANCES = {
    "platform": str,
    "threads": int,
    "git_commit": str | None,
    "git_uncommitted_changes": bool | None,
}


@dataclass(frozen=True)
class Settings:
    """What an evaluation's numbers depend on, beside weights, prompts and data (its identity)."""

    model: str
    adapter: str | None
    benchmark: str
    lang: str
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    thinking: str
    seed: int
    ks: list[int]
    limit: int | None

    def sampling(self) -> SamplingParams:
        """Return the sampler's part."""
        return SamplingParams(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.seed
        )


@dataclass(frozen=True)
class Finished:
    """A finished evaluation in one language, as its folder holds it."""

    record: dict[str, Any]  # settings, identity, versions
    results: list[Graded]
    view: Evaluation  # what the report draws


@dataclass(frozen=True)
class Comparison:
    """Evaluations that were read and can be compared."""

    evaluations: list[Evaluation]
    tables: list[Table]  # of their metrics
    tests: list[list[str]]  # rows of the table of paired tests
    days: list[list[str]]  # run, language, the day its prompts name; [] where all name the same
    sampling: list[list[str]]  # language, what differs of how runs were made, its value by run


def load_evaluations(folder: Path, name: str) -> Iterator[Finished]:
    """Yield what --out wrote, a language at a time; `name` stands for it in the report.

    Raises ValueError or FileNotFoundError for what is damaged, not finished or not there.
    """
    files = [*folder.glob("settings.json"), *sorted(folder.glob("*/settings.json"))]
    if not files:
        raise FileNotFoundError(f"{folder} holds no evaluation: pass what --out wrote")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is no file; {EVALUATE_AGAIN}")
    records = {file: read_record(file) for file in files}
    check_alike(folder, {file.parent.name: record for file, record in records.items()})
    for file, record in records.items():
        settings = record["settings"]
        if not (file.parent / "summary.json").is_file():
            raise ValueError(
                f"{file.parent} is not finished: the command that began it goes on with it"
            )
        problems = file.parent / "problems.jsonl"
        if not problems.is_file() or not problems.stat().st_size:
            raise ValueError(f"{problems} is missing or empty; start anew with what began it")
        with remedied(EVALUATE_AGAIN):
            rows = read_rows(problems)
            with naming(problems):
                results = [read_graded(row) for row in rows]
                check_complete(results, record)
        runs.Run(file.parent, "settings").check_digests()
        with remedied(EVALUATE_AGAIN), naming(file.parent / "summary.json"):
            summary = read_summary(read_json(file.parent / "summary.json"))
            if "format rate" not in summary:  # which a figure shows
                raise ValueError("it has no format rate")
        curve = pass_at_k_curve(results, settings["samples"])
        with remedied(EVALUATE_AGAIN):
            check_same_attempts(file.parent, curve, summary)
        yield Finished(record, results, Evaluation(name, settings, rows, summary, curve))


def check_same_attempts(
    folder: Path, curve: Mapping[int, Estimate], summary: Mapping[str, Estimate]
) -> None:
    """Raise ValueError unless a folder's summary is of the attempts that stand beside it.

    A table is made of the one and a figure of the other. Digests tell, too, where they are there.
    """
    for k, estimate in curve.items():
        stored = summary.get(f"pass@{k}", estimate)
        if not math.isclose(stored.value, estimate.value, abs_tol=1e-9):
            raise ValueError(
                f"{folder}: summary.json has a pass@{k} of {stored.value:.3f}, and by "
                f"problems.jsonl it is {estimate.value:.3f}"
            )


def check_alike(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError unless the languages of a folder are of one evaluation.

    records  by the language's folder, as settings.json has them
    """
    seen: dict[str, tuple[str, Any]] = {}  # by name: where it was seen first, and what it was
    for place, record in records.items():
        own = {name: value for name, value in record["settings"].items() if name != "lang"}
        own |= {name: record["identity"].get(name) for name in SHARED}
        for name, value in own.items():
            first, known = seen.setdefault(name, (place, value))
            if value != known:
                raise ValueError(
                    f"{folder} holds two evaluations: {first} and {place} differ in {name}; "
                    "give each an --out of its own"
                )


def check_complete(results: list[Graded], record: dict[str, Any]) -> None:
    """Raise ValueError unless these are the problems and attempts that the record says.

    A record of an older version does not say which problems there are.
    """
    ids = [graded.id for graded in results]
    identity = record["identity"]
    if identity.get("problem_ids") not in (None, fingerprint(ids)):
        asked = identity.get("problems")
        raise ValueError(f"its {len(ids)} problems are not the {asked} that were evaluated")
    if len(set(ids)) < len(ids):
        raise ValueError("it has a problem twice")
    samples = record["settings"]["samples"]
    short = [graded.id for graded in results if len(graded.attempts) != samples]
    if short:
        raise ValueError(f"problem {short[0]!r} has not the {samples} attempts of the others")


def read_record(file: Path) -> dict[str, Any]:
    """Return an evaluation's settings.json; ValueError where it lacks what a report needs."""
    with remedied("start anew: evaluate into another folder"):
        record = read_sealed(file)
        needed = {"settings": {"lang", "samples", "benchmark"}, "identity": {"data"}}
        for part, names in needed.items():
            held = record.get(part)
            if not isinstance(held, dict) or not names <= held.keys():
                raise ValueError(f"{file} is damaged: its {part} lack {', '.join(sorted(names))}")
        with naming(file):
            _check_record(record)
    return record


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError, with its name, for what is of another kind than eval.py writes it as."""
    versions = record.get("versions", {})
    if not isinstance(versions, dict):
        raise ValueError("its versions are no object")
    settings = {each.name: each.type for each in fields(Settings)}
    for held, kinds in (
        (record["settings"], settings),
        (record["identity"], IDENTITY),
        (record, CIRCUMSTANCES),
        (versions, dict.fromkeys(versions, str)),
    ):
        for name in kinds.keys() & held.keys():
            typed(held[name], kinds[name], name)
    if record["settings"]["samples"] < 1:
        raise ValueError("samples is below 1")
    try:
        json.dumps(record, allow_nan=False)  # the page shows all of it
    except ValueError as error:
        raise ValueError("it has a number that is not finite") from error


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name the file in a ValueError of the block, which reads what the file holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def pass_at_k_curve(results: list[Graded], samples: int) -> dict[int, Estimate]:
    """Return pass@k for every k up to the attempts there are."""
    found = ratios(results, list(range(1, samples + 1)))
    return {k: bootstrap(*found[f"pass@{k}"]) for k in range(1, samples + 1)}


def prepare_report(folders: list[Path], out: Path, console: Console) -> Comparison:
    """Return what the folders hold, those after the first tested against it; make `out`.

    Raises ValueError or OSError where evaluations are missing, not finished, or not comparable, and
    where `out` is in one of them: what is read is never written into.
    """
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--out {out} is in the evaluation {folder}; choose another --out")
    evaluations: list[Evaluation] = []
    tests: list[list[str]] = []
    days: list[list[str]] = []
    sampling: list[list[str]] = []
    firsts: dict[str, Finished] = {}
    places = [folder.resolve() for folder in folders]
    if len({*places}) < len(places):  # a link, or another spelling, is the same evaluation
        twice = next(folder for folder in folders if places.count(folder.resolve()) > 1)
        raise ValueError(f"{twice} is named twice; name each evaluation once")
    names = [place.name for place in places]  # "." has a name, too
    unique = len(set(names)) == len(folders)
    for folder, name in zip(folders, names, strict=True):
        for found in load_evaluations(folder, name if unique else str(folder)):
            evaluations.append(found.view)
            language = found.record["settings"]["lang"]
            day = found.record["identity"].get("template_date") or "none"
            days.append([found.view.name, language, day])
            first = firsts.setdefault(language, found)
            if first is not found:
                tests.append(compared_row(language, first, found))
                sampling += differing_rows(language, first, found)
    benchmarks = {view.settings["benchmark"] for view in evaluations}
    if len(benchmarks) > 1:
        raise ValueError(
            f"these evaluations are of different benchmarks: {', '.join(sorted(benchmarks))}"
        )
    # Refuses a run that is there twice, and one that lacks a language.
    tables = report_tables(evaluations)
    make_folder(out)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"cannot write to {out}")
    if taken_over := owner.claim(out):
        say(console, taken_over)
    differ = len({day for _, _, day in days}) > 1
    return Comparison(evaluations, tables, tests, days if differ else [], sampling)


def report(found: Comparison, out: Path, console: Console) -> None:
    """Write tables, figures and a page of evaluations, and print the tables."""
    header = [
        "language",
        "runs",
        "change of pass@1",
        "p, permutation of pass@1",
        "p, McNemar of majorities",
    ]
    tables = []
    if found.tests:
        title = "Paired tests over problems"
        if len(found.tests) > 1:
            title += f"; {2 * len(found.tests)} p-values, each as if it were the only one"
        tables = [text_table(title, header, found.tests)]
    if found.days:
        title = "The prompts differ: the chat template writes today's date, and it was another"
        tables.append(text_table(title, ["run", "language", "date"], found.days))
    if found.sampling:
        header = ["language", "setting", "value by run"]
        tables.append(text_table("These runs were made differently", header, found.sampling))
    files = write_report(found.evaluations, tables, out)
    for table in (*found.tables, *tables):
        print_table(table, console)
    say(console, f"report: {', '.join(map(str, files))}")


def differing_rows(language: str, first: Finished, second: Finished) -> list[list[str]]:
    """Return a row for everything that two evaluations were made with and differ in."""
    runs_settings = []
    for found in (first, second):
        settings = {k: v for k, v in found.record["settings"].items() if k not in MAY_DIFFER}
        identity = {name: found.record["identity"].get(name) for name in ALSO_SAID}
        runs_settings.append(settings | identity | circumstances(found.record))
    rows = []
    for name in dict.fromkeys([*runs_settings[0], *runs_settings[1]]):
        values = [settings.get(name) for settings in runs_settings]
        if values[0] != values[1]:
            said = f"{first.view.name}: {values[0]}, {second.view.name}: {values[1]}"
            rows.append([language, name, said])
    return rows


def compared_row(language: str, first: Finished, second: Finished) -> list[str]:
    """Return the row of paired tests between two evaluations; ValueError: of other problems."""
    names = (first.view.name, second.view.name)
    if first.record["identity"]["data"] != second.record["identity"]["data"]:
        raise ValueError(f"{' and '.join(names)} are of different problems in {language}")
    change, *p_values = paired_tests(first.results, second.results)
    p_cells = [f"{p:.3g}" for p in p_values]
    return [language, " to ".join(names), cell("pass@1", change), *p_cells]
