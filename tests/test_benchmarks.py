"""Benchmarks from the hub's cache, from folders and from files.

Each layout is read whole, and whatever is missing is named.
"""

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from eval import load_benchmark
from parts.benchmarks import BENCHMARKS, LEVELS, default_benchmark, find_files, has_language
from parts.metrics import LEVEL_WEIGHTS
from parts.prompts import find_language, languages

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # copies of the real files, where there are any
COMMIT = "c" * 40
REPOS = {
    "afrimgsm": "masakhane/afrimgsm",
    "mgsm": "juletxara/mgsm",
    "msvamp": "Mathoctopus/MSVAMP",
    "polymath": "Qwen/PolyMath",
}


def names(code: str) -> dict:
    return asdict(find_language(code))


def fill(folder: Path, benchmark: str, code: str, rows: int) -> None:
    """Write a language's files of a benchmark as its data set lays them out."""
    language = find_language(code)
    numbers = range(rows)
    folder.mkdir(parents=True, exist_ok=True)
    match benchmark:
        case "afrimgsm":
            (folder / "data" / code).mkdir(parents=True)
            text = "".join(f"Nawa\nne {number}?\t\t{number}\t\n" for number in numbers)
            header = "question\tanswer\tanswer_number\tequation_solution\n"
            (folder / "data" / code / "test.tsv").write_text(header + text, encoding="utf-8")
            (folder / "data" / code / "train.tsv").write_text(header, encoding="utf-8")
        case "mgsm":
            text = "".join(f"Ngapi {number}?\t{number}\n" for number in numbers)
            (folder / f"mgsm_{language.iso1}.tsv").write_text(text, encoding="utf-8")
        case "msvamp":
            row = '{"m_query": "Ngapi %d?", "equation": "+ number0 number1", "response": "%d.0"}\n'
            text = "".join(row % (number, number) for number in numbers)
            (folder / f"test_{language.english}.json").write_text(text)
        case _:
            inside = folder / str(language.iso1)
            inside.mkdir()
            for level in LEVELS:
                columns = {
                    "id": [f"{level}-{language.iso1}-{number}" for number in numbers],
                    "question": [f"Ngapi {number}?" for number in numbers],
                    "answer": [str(number) for number in numbers],
                }
                parquet.write_table(pa.table(columns), inside / f"{level}.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that lays a benchmark into an offline hub cache, as a download would."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(benchmark: str, code: str, rows: int, revision: str = "main") -> None:
        repo = tmp_path / "hub" / f"datasets--{REPOS[benchmark].replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(COMMIT)
        fill(repo / "snapshots" / COMMIT, benchmark, code, rows)

    return put


@pytest.mark.parametrize("benchmark", REPOS)
def test_a_named_benchmark_comes_from_the_hub_with_its_commit_and_all_its_rows(hub, benchmark):
    rows = BENCHMARKS[benchmark].rows
    files = len(BENCHMARKS[benchmark].files)
    hub(benchmark, "swa", rows)
    hub(benchmark, "eng", rows)  # another language beside it
    swahili = find_language("swa")
    problems, commit = load_benchmark(benchmark, swahili, "main", None)
    assert commit == COMMIT
    assert len(problems) == rows * files
    assert {problem.language for problem in problems} == {"swa"}
    assert len({problem.id for problem in problems}) == len(problems)
    assert float(str(problems[7].answer)) == 7
    assert len(load_benchmark(benchmark, swahili, COMMIT, 3)[0]) == 3  # by its commit, and limited


@pytest.mark.parametrize("benchmark", REPOS)
def test_a_named_benchmark_that_lacks_rows_is_refused(hub, benchmark):
    rows = BENCHMARKS[benchmark].rows
    hub(benchmark, "swa", rows - 1)
    with pytest.raises(ValueError, match=f"has {rows - 1} problems, {benchmark} has {rows}"):
        load_benchmark(benchmark, find_language("swa"), "main", None)


def test_a_folder_with_a_file_twice_is_refused_and_not_measured_twice(hub, tmp_path):
    hub("afrimgsm", "swa", 250)
    (file,) = (tmp_path / "hub").rglob("swa/test.tsv")
    other = tmp_path / "hub" / "backup" / "swa" / "test.tsv"
    other.parent.mkdir(parents=True)
    other.write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="has 2 files for one"):
        load_benchmark(str(tmp_path / "hub"), find_language("swa"), "main", None)


def test_a_level_that_is_missing_is_an_error(hub, tmp_path):
    hub("polymath", "tel", 125)
    next(tmp_path.rglob("high.parquet")).unlink()
    with pytest.raises(FileNotFoundError, match="polymath has 3 files for Telugu, not 4"):
        load_benchmark("polymath", find_language("te"), "main", None)


def test_what_the_cache_does_not_hold_offline_says_what_to_pass_instead(hub):
    message = r"cannot reach revision v9 of juletxara/mgsm.*--benchmark FOLDER"
    with pytest.raises(FileNotFoundError, match=message):
        find_files("mgsm", names("swa"), revision="v9")


@pytest.mark.parametrize("benchmark", REPOS)
def test_a_folder_in_a_known_layout_is_taken_as_it_is(tmp_path, benchmark):
    fill(tmp_path / "copy", benchmark, "swa", 9)
    folder = str(tmp_path / "copy")
    problems, commit = load_benchmark(folder, find_language("swa"), "main", None)
    assert commit is None
    assert len(problems) == 9 * len(BENCHMARKS[benchmark].files)
    assert [code for code in languages() if has_language(folder, names(code))] == ["swa"]
    message = (
        "is a folder in which no file for French is called as .*; name one file: .jsonl, .json"
    )
    with pytest.raises(FileNotFoundError, match=message):
        find_files(folder, names("fra"))


def test_a_folder_of_two_benchmarks_is_ambiguous(tmp_path):
    fill(tmp_path, "mgsm", "swa", 2)
    fill(tmp_path, "msvamp", "swa", 2)
    with pytest.raises(
        FileNotFoundError, match="files for Swahili of 2 benchmarks; name the folder"
    ):
        find_files(str(tmp_path), names("swa"))


def test_a_file_and_a_path_with_the_language_in_it(tmp_path):
    fill(tmp_path, "mgsm", "swa", 2)
    file = tmp_path / "mgsm_sw.tsv"
    assert find_files(str(file), names("swa")) == ([file], None)
    file.rename(tmp_path / "swa.tsv")
    pattern = str(tmp_path / "{lang}.tsv")
    assert find_files(pattern, names("swa")) == ([tmp_path / "swa.tsv"], None)
    assert has_language(pattern, names("swa"))
    assert not has_language(pattern, names("hau"))
    message = r"no benchmark .*hau.tsv; valid: a file, a folder, lab, afrimgsm"
    with pytest.raises(FileNotFoundError, match=message):
        find_files(pattern, names("hau"))
    with pytest.raises(ValueError, match="is one file: name its language"):
        has_language(str(tmp_path / "swa.tsv"), names("swa"))


def test_the_languages_are_those_of_each_benchmark():
    counts = {"lab": 4, "afrimgsm": 19, "mgsm": 11, "msvamp": 10, "polymath": 11}
    for benchmark, count in counts.items():
        codes = BENCHMARKS[benchmark].languages.split()
        assert len(set(codes)) == len(codes) == count
        assert set(codes) <= languages().keys()
    # COPSD has training problems in a benchmark's languages, but for these.
    unlisted = {"afrimgsm": {"eng", "fra"}, "polymath": {"eng"}}
    for benchmark, others in unlisted.items():
        listed = {
            code for code, language in languages().items() if benchmark in language.training_sets
        }
        assert listed | others == set(BENCHMARKS[benchmark].languages.split())
    assert tuple(LEVEL_WEIGHTS) == LEVELS
    for code in ("eng", "yor"):
        assert len(load_benchmark("lab", find_language(code), "main", None)[0]) == 250


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="copies of the real benchmarks are not beside the project"
)
@pytest.mark.parametrize(
    ("folder", "codes"),
    [
        ("afrimgsm", "hau swa yor amh ewe twi"),
        ("mgsm", "eng swa ben tel"),
        ("msvamp", "eng swa tha"),
    ],
)
def test_the_real_files_have_their_rows(folder, codes):
    for code in codes.split():
        problems, _ = load_benchmark(str(SHARED / folder), find_language(code), "main", None)
        assert len(problems) == BENCHMARKS[folder].rows


def test_a_language_has_the_first_benchmark_of_three_that_has_it():
    found = {code: default_benchmark([names(code)]) for code in languages()}
    polymath = ["ben", "deu", "jpn", "rus", "spa", "tel", "tha", "zho"]
    assert [code for code in found if found[code] == "polymath"] == polymath
    assert set(found.values()) == {"afrimgsm", "polymath"}
    assert default_benchmark([names("swa"), names("deu")]) == "polymath"
    with pytest.raises(ValueError, match="no benchmark has Hausa, German: pass --benchmark"):
        default_benchmark([names("hau"), names("deu")])
