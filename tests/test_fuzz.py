"""Every reader, given anything: it returns a value or says in one ValueError or OSError why not.

What a reader is given is any bytes, any JSON, and, since those are refused at the door, a file that
is right but for one value or a few bytes.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_results import experiment

import compare
from parts import data, measure, prompts
from parts.adapters import load_adapter, save_adapter
from parts.arms import Arm
from parts.evaluations import load_evaluations
from parts.files import read_json, read_object, read_rows
from parts.identity import recorded_fingerprint
from parts.lora import attach_lora
from parts.metrics import read_graded, read_summary
from parts.outcome import arms_table
from parts.recipe import Config
from parts.results import METRICS as MEASURED
from parts.runs import Run, last_adapter_folder
from parts.settings import fill
from parts.setup import configure
from parts.watch import last_completion

# The same examples every time, so that a test does not fail on someone else's change.
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, -1, 10**400])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | st.just("\ud800\u2028\x1b")
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
DEEP = b"[" * 100_000
ODD_FILES = [b"", b"\xff\xfe", b"\x00" * 9, b"null", b"[]", b"3", b'"a"', b"{}", b'{"a": 1e999}']


def survives(read: Callable[[], Any]) -> None:
    """Pass if `read` returns, or raises what a command turns into one line."""
    try:
        read()
    except (ValueError, OSError) as error:
        assert str(error)


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the place of every value in a JSON content, the whole included."""
    yield path
    if isinstance(content, dict | list):
        for name in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[name], (*path, name))


@st.composite
def nearly(draw: Any, content: Any) -> bytes:
    """Draw a JSON text that is `content` but for one value: another in its place, or none."""
    changed = {"whole": copy.deepcopy(content)}
    *path, last = ("whole", *draw(st.sampled_from(list(places(content)))))
    holder: Any = changed
    for name in path:
        holder = holder[name]
    if path and draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = draw(JSON)
    return json.dumps(changed["whole"]).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Draw the bytes of a file that was cut, or had a few bytes overwritten."""
    at = draw(st.integers(0, len(whole) - 1))
    if draw(st.booleans()):
        return whole[:at]
    other = draw(st.binary(min_size=1, max_size=4))
    return whole[:at] + other + whole[at + len(other) :]


def any_of(content: Any) -> st.SearchStrategy[bytes]:
    """Return what a JSON file that should hold `content` may hold."""
    as_json = json.dumps(content).encode()
    return (
        st.sampled_from(ODD_FILES)
        | st.builds(lambda: DEEP)
        | st.binary(max_size=40)
        | JSON.map(lambda x: json.dumps(x).encode("utf-8", "surrogatepass"))
        | nearly(content)
        | damaged(as_json)
    )


ROW = {
    "id": "1",
    "problem_translated": "Nawa?",
    "problem": "How?",
    "answer": "5",
    "language": "hau",
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv"])
def test_data_files_of_text(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    table = b"question,answer\na,1\nb,2\n" if suffix == ".csv" else b"question\tanswer\na\t1\n"

    @few
    @given(any_of([ROW]) | any_of(ROW) | damaged(table))
    def _read(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: data.read_problems(path))
        survives(lambda: data.read_problems(path, language="hau"))

    _read()


def test_data_files_of_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pa.Table.from_pylist([ROW, {**ROW, "id": "2"}]), path)
    whole = path.read_bytes()

    @few
    @given(damaged(whole) | st.binary(max_size=40))
    def _read(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: data.read_problems(path, language="hau"))

    _read()


def test_recipes(tmp_path):
    recipe = json.loads(Path("lab/tiny/recipe.json").read_text(encoding="utf-8"))

    @few
    @given(any_of(recipe))
    def _read(content: bytes) -> None:
        (tmp_path / "recipe.json").write_bytes(content)
        survives(lambda: fill({}, tmp_path))
        survives(lambda: fill({"method": "grpo"}, tmp_path))

    _read()


def test_what_a_recipe_gives_is_checked_as_a_flag_is(tmp_path):
    model = tmp_path / "model"
    shutil.copytree("lab/tiny", model)
    recipe = json.loads((model / "recipe.json").read_text(encoding="utf-8"))

    @few
    @given(nearly(recipe))
    def _read(content: bytes) -> None:
        (model / "recipe.json").write_bytes(content)
        survives(lambda: configure({"model": str(model), "lang": "hau"}))

    _read()


def test_adapters(tmp_path):
    model = build_tiny_model()
    whole = tmp_path / "whole"
    lora = attach_lora(model, rank=2, alpha=4.0, targets=("q_proj",), seed=0)
    save_adapter(lora, whole, base_model="lab/tiny")
    config = json.loads((whole / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"exclude_modules": None, "layers_to_transform": [0], "rank_pattern": {}}
    tensors = (whole / "adapter_model.safetensors").read_bytes()

    @few
    @given(any_of(config))
    def _read_config(content: bytes) -> None:
        (whole / "adapter_config.json").write_bytes(content)
        survives(lambda: load_adapter(build_tiny_model(), whole))

    @few
    @given(damaged(tensors) | st.binary(max_size=40))
    def _read_tensors(content: bytes) -> None:
        (whole / "adapter_model.safetensors").write_bytes(content)
        survives(lambda: load_adapter(build_tiny_model(), whole))

    _read_config()
    (whole / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    _read_tensors()


RECORD = {
    "config": {"seed": 0, "lang": "hau", "steps": 2},
    "identity": {"base_weights": "ab", "template_date": None},
    "versions": {"torch": "2"},
}
METRICS = {"step": 1, "progress": 0.5, "sampled_tokens": 9, "alarms": {}}
COMPLETION = {"step": 1, "problem_id": "1", "completion": "5", "answer": "5"}
ESTIMATE = {"value": 0.5, "low": 0.25, "high": None}
EVALUATION = {"hau": {"greedy accuracy": ESTIMATE, "pass@1": ESTIMATE}}


def test_the_record_of_a_run(tmp_path):
    run = Run(tmp_path)

    @few
    @given(any_of(RECORD))
    def _read(content: bytes) -> None:
        run.record_file.write_bytes(content)
        survives(lambda: run.check(RECORD["config"], RECORD["identity"]))
        survives(run.recorded_day)
        survives(lambda: recorded_fingerprint(tmp_path))
        survives(lambda: last_adapter_folder(tmp_path))

    _read()


@pytest.mark.parametrize(("name", "row"), [("metrics", METRICS), ("completions", COMPLETION)])
def test_the_logs_of_a_run(tmp_path, name, row):
    run = Run(tmp_path)
    path = tmp_path / f"{name}.jsonl"

    @few
    @given(any_of(row), st.sampled_from([b"", b"\n", b"\n{"]))
    def _read(content: bytes, end: bytes) -> None:
        path.write_bytes(json.dumps(row).encode() + b"\n" + content + end)
        survives(lambda: read_rows(path))
        survives(run.check_whole)
        if name == "completions":
            survives(lambda: last_completion(tmp_path))

    _read()


def test_the_saved_state_of_a_run(tmp_path):
    run = Run(tmp_path)
    run.create(RECORD["config"], RECORD["identity"])
    run.log(METRICS, [COMPLETION])
    run.save_state(1, {"lora/a": torch.ones(2, 2)})
    (path,) = tmp_path.glob("resume/*.safetensors")
    whole = path.read_bytes()

    @few
    @given(damaged(whole) | st.binary(max_size=40))
    def _read(content: bytes) -> None:
        path.write_bytes(content)
        survives(run.check_whole)
        survives(run.load_state)

    _read()


def test_the_evaluations_of_a_run(tmp_path):
    run = Run(tmp_path)
    path = tmp_path / "before.json"

    def _columns() -> None:
        stored = run.read_evaluation("before")
        measure.check_columns(stored, path)  # type: ignore[arg-type]
        columns = measure.read_columns(stored)  # type: ignore[arg-type]
        measure.print_change(columns, columns, Console(quiet=True), Config())

    @few
    @given(any_of(EVALUATION))
    def _read(content: bytes) -> None:
        path.write_bytes(content)
        survives(_columns)

    _read()


ATTEMPT = {
    "completion": "5",
    "answer": "5",
    "canonical": "5",
    "lenient": "5",
    "correct": True,
    "lenient_correct": True,
    "reason": "same number",
    "tokens": 3,
    "finish_reason": "stop",
    "language": "hau",
    "seed": "0/0/0",
}
GRADED = {
    "id": "1",
    "language": "hau",
    "problem": "Nawa?",
    "gold": "5",
    "prompt_hash": "ab",
    "level": None,
    "attempts": [ATTEMPT],
}
SETTINGS = {
    "settings": {"lang": "hau", "samples": 1, "benchmark": "lab", "model": "lab/tiny"},
    "identity": {"data": "ab", "template_date": None},
}
FILES = {
    "settings.json": SETTINGS,
    "problems.jsonl": GRADED,
    "summary.json": {
        "pass@1": {**ESTIMATE, "value": 1.0},
        "mean tokens": ESTIMATE,
        "format rate": ESTIMATE,
    },
}


@pytest.mark.parametrize("name", FILES)
def test_the_results_of_an_evaluation(tmp_path, name):
    for file, content in FILES.items():
        (tmp_path / file).write_text(json.dumps(content) + "\n", encoding="utf-8")
    assert len(list(load_evaluations(tmp_path, "x"))) == 1

    @few
    @given(any_of(FILES[name]))
    def _read(content: bytes) -> None:
        (tmp_path / name).write_bytes(content + b"\n")
        survives(lambda: list(load_evaluations(tmp_path, "x")))

    _read()


def test_the_results_of_an_arm(tmp_path):
    arm = Arm("copsd", "COPSD", tmp_path, {})
    ratio = [[1.0, 0.0], [1.0, 1.0]]
    kinds = dict.fromkeys(("greedy", "sampled"), dict.fromkeys(("pass@1", *MEASURED), ratio))
    point = {"step": 1, "sampled_tokens": 9, "train_s": 1.0, "updates": 1, "kl": ratio, **kinds}
    whole = {"points": [point], "final": point}
    (tmp_path / "results.json").write_text(json.dumps(whole), encoding="utf-8")
    assert compare.read_results(arm) == whole

    @few
    @given(any_of(whole))
    def _read(content: bytes) -> None:
        (tmp_path / "results.json").write_bytes(content)
        survives(lambda: arms_table(experiment(copsd=[compare.read_results(arm)])))

    _read()


def test_the_languages(tmp_path):
    written = json.loads(Path("parts/languages.json").read_text(encoding="utf-8"))
    two = {code: written[code] for code in ("hau", "amh")}
    path = tmp_path / "languages.json"
    path.write_text(json.dumps(two), encoding="utf-8")
    assert prompts.read_languages(path) == {code: prompts.languages()[code] for code in two}

    @few
    @given(any_of(two))
    def _read(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: prompts.read_languages(path))

    _read()


def test_any_json_is_no_row_and_no_estimate_unless_it_is_one():
    @few
    @given(JSON)
    def _read(content: Any) -> None:
        survives(lambda: read_summary(content))
        if isinstance(content, dict):
            survives(lambda: read_graded(content))

    _read()


@pytest.mark.parametrize("content", [*ODD_FILES, pytest.param(DEEP, id="deep")])
def test_files_of_json(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    survives(lambda: read_json(path))
    survives(lambda: read_object(path))
    survives(lambda: read_rows(path))
    os.truncate(path, 0)
    with pytest.raises(ValueError):
        read_json(path)
    assert read_rows(path) == [] and math.isinf(float("1e999"))
