"""parts/data.py: rows and hub sets become problems; what is held out; the order of the rest."""

import doctest
import io
import json
import math
import random
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import TRAINING_ROW, write_file
from pyarrow import parquet
from rich.console import Console

import eval as evaluator
from parts import data, prompts
from parts.commands import help_text
from parts.data import keep_fitting, load_problems, pick_order, split_heldout
from parts.prompts import Problem, find_language
from parts.recipe import Config
from parts.rows import EXTENSIONS
from parts.setup import configure, prepare


def test_doctests():
    result = doctest.testmod(data)
    assert result.failed == 0 and result.attempted >= 1


def jsonl(folder: Path, *rows) -> Path:
    return write_file(
        folder, "rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )


def test_rows_of_other_languages_are_left_out_and_keep_their_row_numbers(tmp_path):
    names = ["Swahili", "hau", "KISWAHILI", "sw", "Klingon"]
    path = jsonl(tmp_path, *(TRAINING_ROW | {"language": name} for name in names))
    swahili = load_problems(path, language="swa")
    assert [(row.id, row.language) for row in swahili] == [(i, "swa") for i in "023"]
    assert [row.id for row in load_problems(path, language="ha")] == ["1"]
    with pytest.raises(
        ValueError, match=r"rows.jsonl: no problems in yor; .*Klingon.*Swahili.*hau"
    ):
        load_problems(path, language="yor")
    with pytest.raises(ValueError, match=r"line 5: unknown language 'Klingon'"):
        load_problems(path)
    path = jsonl(tmp_path, TRAINING_ROW | {"language": "whatever", "language_short": "HA"})
    assert load_problems(path)[0].language == "hau"
    path = jsonl(tmp_path, *(TRAINING_ROW | {"id": "x", "language": code} for code in ("sw", "ha")))
    assert len(load_problems(path)) == 2  # one id may stand in several languages


def test_the_plain_layout_needs_a_language_and_has_no_english_side(tmp_path):
    path = jsonl(tmp_path, {"id": 7, "Question": " Nawa? ", "answer": 12, "solution": "Haka."})
    assert load_problems(path, language="ha") == [Problem("7", "Nawa?", None, None, "12", "hau")]
    assert load_problems(path, language="en") == [
        Problem("7", "Nawa?", "Nawa?", "Haka.", "12", "eng")
    ]
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1: no language named"):
        load_problems(path)
    assert load_problems(jsonl(tmp_path, {"problem": "Nawa?"}), language="ha")[0].answer is None
    # Enough for the ablation without the English problem.
    path = jsonl(tmp_path, TRAINING_ROW | {"problem": None})
    assert load_problems(path, language="ha") == [Problem("0", "Nini?", None, "So.", "4", "hau")]


def test_text_becomes_nfc(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Mélòó ni ọ́ọ́lù?")
    row = load_problems(jsonl(tmp_path, {"problem": decomposed}), language="yo")[0]
    assert row.problem == unicodedata.normalize("NFC", decomposed) != decomposed


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"title": "x", "answer": 1}\n',
            "line 1: needs a column .*question.*; has 'title', 'answer'",
        ),
        ("a.jsonl", '{"problem": "x"}\n\n{"problem": " "}\n', "line 3: empty problem"),
        ("a.jsonl", '{"problem": ["x"]}\n', "line 1: problem must be text or a number, not a list"),
        ("a.jsonl", '["x"]\n', "line 1: must be an object, not a list"),
        (
            "a.jsonl",
            '{"id": 1, "problem": "x"}\n{"id": "1", "problem": "y"}\n',
            "line 2: duplicate id '1'",
        ),
        ("a.jsonl", "\n", "no problems: it has no rows"),
        ("a.json", '{"data": []}', "line 1: needs a column .* has 'data'"),
        ("a.json", "5", "line 1: must be an object, not a int"),
        ("a.tsv", "question\tanswer\n\t1\n", "line 2: empty question"),
        ("a.csv", "", "no problems: it has no rows; the first line of a table names the columns"),
        ("a.csv", "problem,answer\n\n", "no problems: it has no rows"),
        ("a.tsv", "Nawa?\tshida\n", "no problems: it has no rows"),
        ("a.csv", "problem\tanswer\nNawa?\t5\n", r"line 2: .*; has 'problem\\tanswer'"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_file_and_the_place(tmp_path, name, text, message):
    path = write_file(tmp_path, name, text)
    with pytest.raises(ValueError, match=f"{name}: {message}") as error:
        load_problems(path, language="ha")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("She has 16 - 3 = 13.\nSo 9 * 2 = <<9*2=18>>18.\n#### 18", "18"),
        ("#### 18", "18"),
        ("####1,800 ", "1,800"),
        ("a #### 1\nb\n#### -7/2\n", "-7/2"),
        ("18 # 4", "18 # 4"),
        (r"\frac12", r"\frac12"),
        (r"-\infty", r"-\infty"),
        ("∅", "∅"),
        ("½", "½"),
        ("None of them", "None of them"),
        (1e16, "10000000000000000"),
        (2.0**60, str(2**60)),
        (5e-7, "0.0000005"),
        (0.1, "0.1"),
        (8.0, "8.0"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_an_answer_is_what_stands_behind_a_worked_solution_or_alone(tmp_path, answer, expected):
    for column in data.ANSWER_COLUMNS:
        path = jsonl(tmp_path, {"question": "Nawa?", column: answer})
        assert load_problems(path, language="ha")[0].answer == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"We have 9*2=18. So \boxed{18}", "18"),
        ("She has 9*2=18.\nSo $\\boxed{\\frac{7}{2}}$.\n", r"\frac{7}{2}"),
        (r"At first \boxed{3} but then \boxed{\text{none of {them}}}.", r"\text{none of {them}}"),
        (r"\boxed{3} na \boxed{4}", r"\boxed{3} na \boxed{4}"),
        (r"x=\boxed{3}, y=\boxed{5}", r"x=\boxed{3}, y=\boxed{5}"),
        (r"\boxed{18}", r"\boxed{18}"),
        ("x = 1 and y = 2", "x = 1 and y = 2"),
        ("y - 1/2 = 3x - 3", "y - 1/2 = 3x - 3"),
        ("x^2/9 + y^2/4 = 1", "x^2/9 + y^2/4 = 1"),
        ("x = 1/2 = 0.5", "x = 1/2 = 0.5"),
        ("Anna = 5, Bob = 6, Carol = 7, Dan = 8", "Anna = 5, Bob = 6, Carol = 7, Dan = 8"),
        ("x=2, y=3, where both are primes", "x=2, y=3, where both are primes"),
        ("f(x) = 0 for all x and f(x) = x for all x", "f(x) = 0 for all x and f(x) = x for all x"),
        ("10/15 = 2/3", "10/15 = 2/3"),
        ("1/2 = 0.5, 3/4 = 0.75", "1/2 = 0.5, 3/4 = 0.75"),
        ("C. 3 × 4 = 12", "C. 3 × 4 = 12"),
        ("(1) 5\n(2) 6", "(1) 5\n(2) 6"),
        ("18\n birr", "18\n birr"),
        (
            "\\begin{pmatrix}1&2\\\\\n3&4\\end{pmatrix}",
            "\\begin{pmatrix}1&2\\\\\n3&4\\end{pmatrix}",
        ),
    ],
)
def test_an_answer_is_the_last_box_of_a_worked_solution_and_an_equation_stays(
    tmp_path, answer, expected
):
    path = jsonl(tmp_path, {"question": "Nawa?", "answer": answer})
    assert load_problems(path, language="ha")[0].answer == expected


@pytest.mark.parametrize(
    "answer",
    [
        "5*3=15\n15+3=18",
        "9*2=18\n### 18",
        "9*2=18 <<9*2=18>>18",
        r"5 \times 3 = 15, 15 + 3 = 18",
        "She sells nine eggs for two birr each and so the answer must be y = 18",
        "She has nine eggs left.\nEach of them costs two birr. So she makes 18.",
        "She makes 9 * 2 = 18 dollars every day.",
        "Janet sells 16 - 3 - 4 eggs so she makes 18",
    ],
)
def test_a_worked_solution_without_its_mark_is_an_error_with_its_line(tmp_path, answer):
    path = jsonl(tmp_path, {"question": "a", "answer": 1}, {"question": "b", "answer": answer})
    with pytest.raises(ValueError) as error:
        load_problems(path, language="ha")
    said = "answer looks like a worked solution; give its final answer alone"
    assert str(error.value) == f"{path}: line 2: {said}"


def test_of_two_problem_columns_none_is_taken_in_silence(tmp_path):
    for other in ("question", "m_query"):
        path = jsonl(tmp_path, {"problem": "How many?", other: "Nawa?", "answer": 1})
        said = (
            f"line 1: problem and {other} are two texts; call the one in Hausa problem_translated"
        )
        with pytest.raises(ValueError, match=said):
            load_problems(path, language="hau")
    row = {"question": "Nawa?", "problem": "Nawa? ", "m_query": None, "answer": 1}
    assert load_problems(jsonl(tmp_path, row), language="hau")[0].problem == "Nawa?"
    row = {"question": "Wie viele?", "problem": "How many?", "problem_translated": "Nawa?"}
    (problem,) = load_problems(jsonl(tmp_path, row), language="hau")
    assert (problem.problem, problem.problem_en) == ("Nawa?", "How many?")


@pytest.mark.parametrize(
    "answer",
    [
        "inf",
        "-Infinity",
        "NaN",
        "None",
        "null",
        "N/A",
        "n/a",
        "NA",
        "<NA>",
        "#N/A",
        "#DIV/0!",
        "-",
        "—",
        "?",
        "...",
        "$-$",
        "True",
        "false",
        "[None]",
        "nil",
        "No answer",
        "#### -",
        "So.\n####",
        "####",
    ],
)
def test_what_can_be_no_answer_is_an_error_with_its_line(tmp_path, answer):
    path = jsonl(tmp_path, {"question": "a", "answer": 1}, {"question": "b", "answer": answer})
    with pytest.raises(ValueError, match=r"rows.jsonl: line 2: answer is .*, which is no answer"):
        load_problems(path, language="ha")


def test_true_and_infinity_as_json_has_them_are_errors_with_their_line(tmp_path):
    for value, said in ((True, "not a bool"), (math.inf, "answer is inf, which is no number")):
        with pytest.raises(ValueError, match=rf"line 1: .*{said}"):
            load_problems(jsonl(tmp_path, {"question": "a", "answer": value}), language="ha")
    with pytest.raises(ValueError, match=r"line 1: answer has more than the answer behind"):
        load_problems(jsonl(tmp_path, {"question": "a", "answer": "#### 1\nb"}), language="ha")


def test_nan_is_missing_wherever_it_stands(tmp_path):
    row = {"problem_translated": "Nawa?", "problem": math.nan, "solution": math.nan}
    table = [row | {"answer_number": math.nan, "answer": "#### 4", "id": math.nan}]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    for path in (jsonl(tmp_path, *table), tmp_path / "rows.parquet"):
        assert load_problems(path, language="ha") == [Problem("0", "Nawa?", None, None, "4", "hau")]
    assert load_problems(jsonl(tmp_path, row), language="ha")[0].answer is None
    with pytest.raises(ValueError, match=r"line 1: empty problem_translated"):
        load_problems(jsonl(tmp_path, {"problem_translated": math.nan}), language="ha")


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("answer", "\frac12", r"U+000C; probably \frac12 was meant"),
        ("answer", "\boxed{18}", r"U+0008; probably \boxed{18} was meant"),
        ("answer", "18\text{ m}", r"U+0009; probably \text{ was meant"),
        ("answer", "2\right", r"U+000D; probably \right was meant"),
        ("answer", "x\neq 3", r"U+000A; probably \neq was meant"),
        ("answer", "\tan 3", r"U+0009; probably \tan was meant"),
        ("answer", "\nu", r"U+000A; probably \nu was meant"),
        ("question", "Find $2\times 3$.", r"U+0009; probably \times was meant"),
        ("question", "a \frac{1}{2}", r"U+000C; probably \frac{1}{2} was meant"),
        ("question", "a\0b", "U+0000"),
        ("question", "a\ud83d", "U+D83D"),
    ],
)
def test_what_json_made_of_a_lost_backslash_is_an_error_that_says_what(
    tmp_path, column, text, said
):
    # Python's own escapes are JSON's: "\f" above is a form feed in the file, too.
    row = {"question": "a", "answer": "1"} | {column: text}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": 1}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as error:
        load_problems(path, language="ha")
    assert f"rows.jsonl: line 2: {column} holds the control character" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\t", "\n", "\r\n", "\u200f"])
def test_line_separators_and_tabs_are_ordinary_text_and_come_back(tmp_path, mark):
    text = f"Nawa{mark}ne 2{mark}+ 3?"
    problems = load_problems(jsonl(tmp_path, {"question": text, "answer": 5}), language="ha")
    assert [row.problem for row in problems] == [text]
    data.write_problems(tmp_path / "again.jsonl", problems)
    assert load_problems(tmp_path / "again.jsonl") == problems


def test_every_tag_of_a_language_is_it_and_what_is_left_out_is_counted_aloud(tmp_path):
    tags = ["sw", "sw-KE", "swh_Latn", "SWA", "Kiswahili", "hau_Latn", "Klingon", "swc"]
    for column in data.LANGUAGE_COLUMNS:
        path = jsonl(tmp_path, *({"question": "a", column: tag} for tag in tags))
        assert len(load_problems(path, language="sw")) == 5
        loaded = data.read_problems(path, language="sw")
        others = ["Klingon", "hau_Latn", "swc"]
        assert loaded.left_out == {f"in {tag}, not sw": 1 for tag in others}
    stream = io.StringIO()
    console = Console(file=stream, width=30)
    assert data.load_aloud(path, "sw", console) == loaded.problems
    said = ", ".join(f"1 in {tag}, not sw" for tag in others)
    assert stream.getvalue() == f"{path}: left out 3 of 8 rows: {said}\n"
    whole = jsonl(tmp_path, {"question": "a"})
    data.load_aloud(whole, "sw", console)
    assert stream.getvalue().count("\n") == 1


def test_the_name_of_a_data_file_cannot_drive_the_terminal(tmp_path):
    stream = io.StringIO()
    rows = [{"question": "a"}, {"question": "b", "language": "swa"}]
    path = jsonl(tmp_path, *rows).rename(tmp_path / "x\x1b[31m.jsonl")
    data.load_aloud(path, "hau", Console(file=stream))
    assert "\x1b" not in stream.getvalue() and r"x\x1b[31m.jsonl: left out 1" in stream.getvalue()


def test_a_file_that_is_missing_or_not_utf8_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*nothing.parquet"):
        load_problems(tmp_path / "nothing.parquet", language="ha")
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"problem": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl: 'utf-8' codec"):
        load_problems(path, language="ha")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return a function that puts a file into an offline hub cache, as a download leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(kind: str, name: str) -> Path:
        repo = tmp_path / f"datasets--yihongLiu--COPSD-{kind}-TrainDataset"
        file = repo / "snapshots" / ("c" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text("c" * 40)
        parquet.write_table(pa.Table.from_pylist([TRAINING_ROW | {"language": "Swahili"}]), file)
        return file

    return put


@pytest.mark.parametrize(
    "name", ["data/swa-00000-of-00001.parquet", "sw.parquet", "Swahili/train_SWA.parquet"]
)
def test_the_training_file_is_found_in_the_hubs_cache_by_code_or_name(hub_cache, name):
    # Names that only start or end like the language.
    hub_cache("AfriMGSM", "data/swap-00000-of-00001.parquet")
    hub_cache("AfriMGSM", "data/biswa-00000-of-00001.parquet")
    file = hub_cache("AfriMGSM", name)
    polymath_file = hub_cache("PolyMath", "data/th.parquet")
    assert data.hub_training_file("sw") == data.hub_training_file(find_language("swa")) == file
    assert load_problems(file, language="swa")[0].problem_en == "What?"
    assert data.hub_training_file("tha") == polymath_file


def test_a_training_file_that_cannot_be_had_says_what_to_pass_instead(hub_cache):
    with pytest.raises(
        FileNotFoundError, match=r"yihongLiu/COPSD-AfriMGSM-TrainDataset.*pass --data FILE"
    ):
        data.hub_training_file("hau")
    for count, name in enumerate(["data/amh.parquet", "data/hau-0.parquet", "data/hau-1.parquet"]):
        hub_cache("AfriMGSM", name)
        if count != 1:
            with pytest.raises(
                FileNotFoundError, match=f"has {count} files for Hausa, not 1; pass --data FILE"
            ):
                data.hub_training_file("hau")


# Texts 0 and 1 stand twice.
TEN = [Problem(str(i), f"text {i % 8}", None, None, None, "hau") for i in range(10)]


def test_held_out_problems_are_disjoint_in_text_and_decided_by_the_seed():
    sizes = set()
    draws = set()
    for seed in range(60):
        train, heldout = split_heldout(TEN, 3, seed)
        assert not {row.problem for row in train} & {row.problem for row in heldout}
        assert len({row.problem for row in heldout}) == 3
        assert sorted([*train, *heldout], key=lambda row: int(row.id)) == TEN
        assert (train, heldout) == split_heldout(TEN, 3, seed)
        sizes.add(len(heldout))
        draws.add(tuple(row.id for row in heldout))
    assert sizes == {3, 4, 5} and len(draws) > 10
    assert split_heldout(TEN, 0, 1) == (TEN, [])
    for count in (-1, 8, 10):
        with pytest.raises(
            ValueError, match=f"hold out {count} of 8 distinct problems; valid: 0 to 7"
        ):
            split_heldout(TEN, count, 0)


@pytest.mark.parametrize(("count", "batch"), [(7, 3), (6, 3), (5, 5), (3, 8), (1, 4)])
def test_every_epoch_is_a_permutation_of_all_problems(count, batch):
    steps = [pick_order(count, seed=4, step=step, batch=batch) for step in range(3 * count)]
    assert all(len(step) == batch for step in steps)
    flat = [i for step in steps for i in step]
    epochs = [flat[start : start + count] for start in range(0, len(flat), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 4:
        assert len({tuple(epoch) for epoch in epochs}) > 1  # not one order for ever


def test_the_order_is_a_pure_function_of_its_arguments():
    state = random.getstate()
    late = pick_order(50, seed=1, step=9, batch=8)
    assert late == pick_order(50, seed=1, step=9, batch=8)
    assert late != pick_order(50, seed=2, step=9, batch=8)
    assert random.getstate() == state


def test_the_prompt_builder_stays_importable_from_here():
    assert data.build_prompt is prompts.build_prompt
    assert data.Problem is Problem


def test_long_prompts_are_left_out_whole_and_counted():
    stream = io.StringIO()
    console = Console(file=stream)
    problems = [Problem(str(i), "?", None, None, "1", "hau") for i in range(3)]
    lengths = [3, 5, 4]
    kept = keep_fitting(problems, lengths, console, context=10, max_new_tokens=6)
    assert [p.id for p in kept] == ["0", "2"]
    assert stream.getvalue().startswith("skipped 1 of 3 problems")
    with pytest.raises(ValueError, match="no problem fits"):
        keep_fitting(problems, lengths, console, context=10, max_new_tokens=8)
    assert keep_fitting([], [], console, context=10, max_new_tokens=8) == []


@pytest.fixture
def numbered(tmp_path) -> Path:
    """A training file of six problems, each with a solution of its own."""
    changes = ({"problem_translated": f"Nawa {i}?", "solution": f"So {i}."} for i in range(6))
    rows = [TRAINING_ROW | change for change in changes]
    return jsonl(tmp_path, *(row | {"language": "hau"} for row in rows))


def test_a_run_holds_out_what_its_seed_draws_or_reads_a_file_of_its_own(tmp_path, numbered):
    everything = load_problems(numbered)
    config = Config(data=str(numbered), eval_problems=2, seed=3)
    train, heldout = split_heldout(everything, 2, 3)
    assert data.read_problem_sets(config) == (train, [], heldout)
    none = replace(config, eval_problems=0)
    assert data.read_problem_sets(none) == (everything, [], [])
    other = write_file(tmp_path, "test.csv", "question,answer\na,1\nb,2\nc,3\n")
    own = replace(config, eval_data=str(other))
    train, _, heldout = data.read_problem_sets(own)
    assert train == everything and [row.problem for row in heldout] == ["a", "b"]


def test_swapped_solutions_are_those_of_other_problems_and_none_is_lost(numbered):
    config = Config(data=str(numbered), eval_problems=2)
    plain, _, plain_heldout = data.read_problem_sets(config)
    swapped, _, heldout = data.read_problem_sets(replace(config, swap_solutions=True))
    assert heldout == plain_heldout  # what is measured stays as it is
    solutions = [row.solution_en for row in plain]
    for row, before in zip(swapped, plain, strict=True):
        assert row.solution_en != before.solution_en
        assert replace(row, solution_en=before.solution_en) == before
    assert sorted(str(row.solution_en) for row in swapped) == sorted(map(str, solutions))


def test_without_a_file_the_hubs_set_of_the_language_is_read(hub_cache):
    hub_cache("AfriMGSM", "data/swa.parquet")
    train, _, heldout = data.read_problem_sets(Config(lang="swa", eval_problems=0))
    assert [row.problem for row in train] == ["Nini?"] and heldout == []


def test_development_problems_are_set_aside_only_where_a_run_is_watched(numbered):
    config = Config(data=str(numbered), eval_problems=2, dev_problems=1)
    plain, none, heldout = data.read_problem_sets(config)
    assert none == []
    watched = replace(config, eval_every=3)
    train, dev, same = data.read_problem_sets(watched)
    assert same == heldout and len(dev) == 1
    assert [row for row in plain if row not in dev] == train and len(train) == 3
    # Swapped solutions come from the problems that are trained on, and from no other.
    swapped, same_dev, _ = data.read_problem_sets(replace(watched, swap_solutions=True))
    assert same_dev == dev
    assert {row.solution_en for row in swapped} == {row.solution_en for row in train}


def test_what_is_held_out_in_a_file_of_its_own_is_not_trained_on(numbered, capsys):
    config = Config(data=str(numbered), eval_data=str(numbered), eval_problems=2)
    train, _, heldout = data.read_problem_sets(config, Console())
    assert len(heldout) == 2 and len(train) == 4
    assert not {row.problem for row in train} & {row.problem for row in heldout}
    assert "skipped 2 of 6 training problems: held out, too" in capsys.readouterr().out
    with pytest.raises(ValueError, match="every training problem is also in --eval-data"):
        data.read_problem_sets(replace(config, eval_problems=6))


def test_of_a_run_that_reports_nothing_the_evaluation_that_comes_next_is_of_new_problems(
    numbered, tmp_path
):
    """It is of all of --eval-data, of which two in three were trained on here."""
    first = "".join(numbered.read_text(encoding="utf-8").splitlines(keepends=True)[:3])
    some = write_file(tmp_path, "some" + numbered.suffix, first)
    config = Config(data=str(numbered), eval_data=str(some), eval_problems=0)
    train, _, heldout = data.read_problem_sets(config)
    assert heldout == [] and train
    evaluated = data.load_problems(some, language=config.lang)
    assert not {row.problem for row in train} & {row.problem for row in evaluated}


def test_the_rows_that_the_readme_shows_are_read_and_the_columns_that_it_names_are_all(tmp_path):
    """What --data has to look like stood nowhere but in the code."""
    readme = Path("parts/README.md").read_text(encoding="utf-8")
    section = readme.partition("## Your own data\n")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL))
    code = blocks.pop("python").replace("mine.parquet", str(tmp_path / "rows.parquet"))
    exec(code, {"pyarrow": pa})
    files = [write_file(tmp_path, f"rows.{kind}", text) for kind, text in blocks.items()]
    files.append(tmp_path / "rows.parquet")
    assert sorted(file.suffix for file in files) == sorted(EXTENSIONS)
    for file in files:
        (problem,) = load_problems(file, language="hau")
        assert (problem.problem, problem.answer) == ("Nawa ne 2 + 3?", "5")
        is_plain = file.suffix == ".json"
        assert (problem.problem_en, problem.id) == (
            None if is_plain else "What is 2 + 3?",
            "sum-1" if file.suffix == ".tsv" else "0",
        )
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", section, re.MULTILINE))))
    read = {*data.PROBLEM_COLUMNS, *data.ANSWER_COLUMNS, *data.LANGUAGE_COLUMNS, "solution", "id"}
    # m_query and the like stand in the first column of the table, each once.
    assert named == read
    said = help_text(Config.__dataclass_fields__["data"])
    assert "parts/README.md" in said and all(each in said for each in EXTENSIONS)


def test_a_file_without_answers_is_told_which_columns_are_read(tmp_path):
    path = jsonl(tmp_path, {"question": "Nawa?", "result": 5}, {"question": "Me?", "result": 6})
    said = "'0': answer None cannot be graded: none of the columns answer_number, answer, response"
    with pytest.raises(ValueError, match=said):
        evaluator.load_benchmark(str(path), find_language("ha"), "main", None)
    with pytest.raises(ValueError, match=said.partition(":")[2]):
        own = {"data": str(path), "eval_problems": 1, "out": str(tmp_path / "run")}
        prepare(*configure(own), Console(quiet=True))


def test_a_swapped_solution_is_never_the_problems_own(tmp_path):
    solutions = ("A", "A", "B", "A")
    rows = [
        TRAINING_ROW | {"problem_translated": f"Nawa {i}?", "solution": text, "language": "hau"}
        for i, text in enumerate(solutions)
    ]
    config = Config(data=str(jsonl(tmp_path, *rows)), eval_problems=0, swap_solutions=True)
    swapped, _, _ = data.read_problem_sets(config)
    assert [row.solution_en for row in swapped] == ["B", "B", "A", "B"]
    for few in (rows[:1], rows[:2]):
        alike = replace(config, data=str(jsonl(tmp_path, *few)))
        with pytest.raises(ValueError, match="two training problems of unlike solutions"):
            data.read_problem_sets(alike)


def test_a_problem_that_stands_twice_is_not_shown_its_solution_in_other_words(tmp_path):
    """It was: only the solution's text had to be another."""
    rows = [
        {"problem_translated": f"Nawa {i}?", "problem": f"How many {i}?", "solution": text}
        | {"answer": "5", "language": "hau"}
        for i, text in enumerate(("first", "again", "", "other"))
    ]
    rows[1]["problem_translated"] = rows[0]["problem_translated"]
    config = Config(data=str(jsonl(tmp_path, *rows)), eval_problems=0, swap_solutions=True)
    swapped, _, _ = data.read_problem_sets(config)
    # And a problem without a solution, in between, has none to give.
    assert [row.solution_en for row in swapped] == ["other", "other", "other", "first"]
    twice = replace(config, data=str(jsonl(tmp_path, *rows[:2])))
    with pytest.raises(ValueError, match="two training problems of unlike solutions"):
        data.read_problem_sets(twice)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_blank_lines_above_a_tables_header_are_passed_over(tmp_path, name):
    mark = "," if name == "a.csv" else "\t"
    text = f"\n\nproblem{mark}answer\nNawa?{mark}5\n"
    (problem,) = load_problems(write_file(tmp_path, name, text), language="hau")
    assert (problem.problem, problem.answer) == ("Nawa?", "5")
