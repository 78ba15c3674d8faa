"""parts/rows.py: a file's rows in every format that the data sets have on the hub.

They are looked at through parts.data.load_problems, as a run reads them.
"""

import csv
import json
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from conftest import TRAINING_ROW, write_file
from pyarrow import parquet

from parts.data import load_problems
from parts.prompts import Problem


def test_the_training_layout_loads_alike_from_every_format(tmp_path):
    row = TRAINING_ROW | {"language": "Swahili", "language_short": "sw"}
    table = [row, row | {"problem_translated": "Ngapi\u2028gani?", "Answer": "5"}]
    first = Problem("0", "Nini?", "What?", "So.", "4", "swa")
    expected = [first, replace(first, id="1", problem="Ngapi\u2028gani?", answer="5")]
    lines = ["\t".join(row), *("\t".join(cells.values()) for cells in table)]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    paths = [
        tmp_path / "rows.parquet",
        write_file(
            tmp_path,
            "rows.jsonl",
            "\ufeff" + "\n".join(json.dumps(cells, ensure_ascii=False) for cells in table),
        ),
        write_file(tmp_path, "rows.json", "\ufeff" + json.dumps(table)),
        write_file(tmp_path, "rows.TSV", "\n".join(lines) + "\n"),
        write_file(tmp_path, "rows.csv", "\ufeff" + "\r\n".join(lines).replace("\t", ",") + "\r\n"),
    ]
    for path in paths:
        assert load_problems(path) == expected, path
        assert load_problems(path, language="sw") == expected, path


def test_afrimgsm_rows_with_raw_line_breaks_and_quotes(tmp_path):
    text = 'Ya ce "nawa\t\t11\t\nDaya\n\nbiyu" ne?\tAmsa: 29\t29\t1 + 28\nUku?\t\t0\t\n\n'
    header = "question\tanswer\tanswer_number\tequation_solution\n"
    path = write_file(tmp_path, "test.tsv", header + text)
    expected = [("0", 'Ya ce "nawa', "11"), ("1", 'Daya\nbiyu" ne?', "29"), ("2", "Uku?", "0")]
    rows = load_problems(path, language="hau")
    assert [(row.id, row.problem, row.answer) for row in rows] == expected


@pytest.mark.parametrize(
    "field", ['"Ya ce ""sannu"", nawa?"', '"Daya\nbiyu?"', '"""sannu"" ya ce"']
)
def test_a_tsv_with_quotes_as_pandas_writes_them_is_refused(tmp_path, field):
    path = write_file(tmp_path, "rows.tsv", f"question\tanswer\nUku?\t3\n{field}\t18\n")
    with pytest.raises(ValueError, match=r"line 3: quoted fields in a .tsv; save it as .csv, with"):
        load_problems(path, language="ha")


@pytest.mark.parametrize(
    "field", ['"Sannu, nawa?"', '"Sannu" ya ce "nawa"', 'Ya ce ""sannu""', '""Sannu""', '""']
)
def test_a_raw_field_of_a_tsv_keeps_its_quotation_marks(tmp_path, field):
    path = write_file(tmp_path, "rows.tsv", f"question\tanswer\n{field}\t18\n")
    assert load_problems(path, language="ha")[0].problem == field


@pytest.mark.parametrize("answer", ["18.5", "1/2", "$18", "-3", "20 %"])
def test_a_table_without_a_header_may_begin_with_any_number(tmp_path, answer):
    path = write_file(tmp_path, "rows.tsv", f"Nawa?\t{answer}\nNe?\t4\n")
    assert [row.answer for row in load_problems(path, language="ha")] == [answer, "4"]


def test_blanks_around_a_heading_are_none_of_it(tmp_path):
    path = write_file(tmp_path, "rows.jsonl", json.dumps({" Question ": "Nawa?", "answer ": 4}))
    assert [row.problem for row in load_problems(path, language="ha")] == ["Nawa?"]


def test_mgsm_has_no_header_and_msvamp_a_line_of_json_per_row(tmp_path):
    path = write_file(tmp_path, "mgsm_sw.tsv", "Mayai mangapi?\t1,450\nSiku\nngapi?\t-3\n")
    rows = [(row.id, row.problem, row.answer) for row in load_problems(path, language="sw")]
    assert rows == [("0", "Mayai mangapi?", "1,450"), ("1", "Siku\nngapi?", "-3")]
    row = {
        "query": "how many ?",
        "equation": "- number0 number1",
        "response": "8.0",
        "m_query": "Ngapi?",
    }
    path = write_file(
        tmp_path,
        "test_Swahili.json",
        json.dumps(row) + "\n" + json.dumps(row | {"response": "1.5"}) + "\n",
    )
    assert [row.answer for row in load_problems(path, language="sw")] == ["8.0", "1.5"]
    assert load_problems(path, language="sw")[0] == Problem("0", "Ngapi?", None, None, "8.0", "swa")


def test_a_csv_field_may_be_quoted(tmp_path):
    path = write_file(tmp_path, "rows.csv", 'question,answer\n"Daya,\nbiyu?",3\n')
    assert load_problems(path, language="ha")[0].problem == "Daya,\nbiyu?"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"problem": "x"}\n{"problem": }\n', "line 2, column 13: Expecting value"),
        ("a.json", '[\n{"problem": "x"},\n{"problem" "y"}]', ".* line 3 column 12"),
        ("a.tsv", "question\tanswer\nx\t1\t2\n", "line 2: 3 fields where the header has 2"),
        ("a.tsv", "question\tanswer\nx\t1\ny\n", "line 3: 1 fields where the header has 2"),
        ("a.csv", "question,answer\nx,1\ny\n", "line 3: 1 fields where the header has 2"),
        ("a.csv", 'question,answer\nx,1\ny,"5\nz,6\n', "line 3: a quotation mark is not closed"),
        ("a.csv", 'question,answer\nx,1\n"y"z,5\n', "line 3: ',' expected after"),
        ("a.parquet", "not parquet at all", ".*not a parquet file"),
        ("a.txt", "x", "unknown extension '.txt'; valid: .jsonl, .json, .tsv, .csv, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_the_file_and_the_place(
    tmp_path, name, text, message
):
    path = write_file(tmp_path, name, text)
    with pytest.raises(ValueError, match=f"{name}: {message}") as error:
        load_problems(path, language="ha")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.decimal128(3, 1)])
def test_a_tenth_is_a_tenth_in_every_width(tmp_path, kind):
    numbers = [Decimal("0.1")] if pa.types.is_decimal(kind) else np.array([0.1], np.float64)
    if pa.types.is_floating(kind):
        numbers = np.array([0.1], kind.to_pandas_dtype())
    table = pa.table({"question": ["Nawa?"], "answer": pa.array(numbers, kind)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert load_problems(tmp_path / "rows.parquet", language="ha")[0].answer == "0.1"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([-(10**18)], pa.timestamp("us")),
        ([2**62], pa.duration("s")),
        ([2**31 - 1], pa.date32()),
        ([86_400_000 * 10**9], pa.date64()),
        ([[-(10**18)]], pa.list_(pa.timestamp("us"))),
        ([{"when": -(10**18)}], pa.struct({"when": pa.timestamp("us")})),
        ([0], pa.timestamp("us", "Nowhere")),
    ],
)
@pytest.mark.parametrize("name", ["answer", "note"])
def test_a_parquet_column_of_what_python_has_no_value_for_is_one_line(tmp_path, values, kind, name):
    """A date far away was an OverflowError, whether the column is read or not."""
    path = tmp_path / "rows.parquet"
    held = {"question": ["Nawa?"], "answer": ["4"], name: pa.array(values, kind)}
    parquet.write_table(pa.table(held), path)
    with pytest.raises(ValueError, match=f"column '{name}' of .* cannot be read: ") as error:
        load_problems(path, language="ha")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_an_escape_that_json_does_not_have_says_how_a_backslash_is_written(tmp_path):
    for name in ("rows.jsonl", "rows.json"):
        text = r'{"question": "\alpha"}'
        path = write_file(tmp_path, name, f"[{text}]" if name == "rows.json" else text)
        with pytest.raises(ValueError, match=r"line 1.*two backslashes for one"):
            load_problems(path, language="ha")


def test_fields_of_any_length_load_and_the_limit_of_others_stays(tmp_path):
    limit = csv.field_size_limit()
    for name, tab in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = [tab.join(["question", "note", "answer"]), tab.join(["a", "x" * 140_000, "1"])]
        path = write_file(tmp_path, name, "\n".join(lines) + "\n")
        assert [row.answer for row in load_problems(path, language="ha")] == ["1"]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(("name", "tab"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_the_empty_columns_of_a_spreadsheet_are_nobodys(tmp_path, name, tab):
    """Two columns, it was said, are called ''."""
    lines = [tab.join(cells) for cells in (["question", "answer", "", ""], ["Nini?", "4", "", ""])]
    path = write_file(tmp_path, name, "\n".join(lines) + "\n")
    assert [row.answer for row in load_problems(path, language="ha")] == ["4"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("rows.json", json.dumps({"question": "Nini?", "answer": 4}, indent=2), 1),
        ("rows.jsonl", json.dumps([{"question": "Nini?", "answer": 4}], indent=2), 1),
        ("rows.jsonl", '{"question": "Nini?", "answer": 4}\n\n  {\n"answer": 4}\n{"a": 1}', 3),
    ],
)
def test_a_row_that_goes_over_several_lines_is_said_to_be_one(tmp_path, name, text, line):
    path = write_file(tmp_path, name, text)
    with pytest.raises(ValueError, match=f"line {line}, .*: a piece of JSON over several lines; v"):
        load_problems(path, language="ha")


@pytest.mark.parametrize(
    "text", ['{"a": 1} {"b": 2}\n', '{"a": 1\n{"b": 2}\n', "[" * 10**5 + "\n" + "]" * 10**5]
)
def test_other_broken_lines_are_told_what_json_says(tmp_path, text):
    path = write_file(tmp_path, "rows.jsonl", text)
    with pytest.raises(ValueError, match=r"line 1.*: (Extra|Expecting|it is nested)"):
        load_problems(path, language="ha")


def test_blanks_around_a_column_of_a_table_are_not_part_of_its_name(tmp_path):
    path = write_file(tmp_path, "rows.csv", "question, answer, language\nNini?,4,sw\n")
    (problem,) = load_problems(path)
    assert (problem.problem, problem.answer, problem.language) == ("Nini?", "4", "swa")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.csv", "question,answer,answer\nNini?,4,5\n", "two columns are called 'answer'"),
        ("rows.tsv", "question\tanswer\tanswer \nNini?\t4\t5\n", "are called 'answer'"),
        ("rows.csv", "question,answer,Answer\nNini?,4,5\n", "differ in case or blanks only"),
        ("rows.jsonl", '{"question": "Nini?", "answer": 4, "Answer": 5}\n', "case or blanks only"),
    ],
)
def test_a_column_that_is_there_twice_is_an_error(tmp_path, name, text, said):
    with pytest.raises(ValueError, match=said):
        load_problems(write_file(tmp_path, name, text), language="sw")
