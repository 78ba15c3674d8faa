"""parts/files.py: what is replaced is replaced whole, and a torn last line costs no other line."""

import doctest
import json
import math

import pytest

from parts import files
from parts.files import (
    append_rows,
    json_lines,
    read_json,
    read_object,
    read_rows,
    whole_file,
    write_json,
    write_text,
)


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_a_file_holds_what_it_held_before(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    with pytest.raises(error), whole_file(tmp_path / "fresh.txt") as partial:
        partial.write_text("half")
        raise error
    assert not (tmp_path / "fresh.txt").exists()
    # What an earlier try left behind does not end up in the file.
    write_text(path, "n")
    assert path.read_text() == "n"


def test_an_interrupted_write_keeps_the_old_content(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"old": 1})

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {"new": 2})
    monkeypatch.undo()
    assert read_json(tmp_path / "x.json") == {"old": 1}


def test_json_comes_back_and_keeps_its_letters_readable(tmp_path):
    content = {"ƙ": ["a\u2028b", 1.5, None, True]}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert "ƙ".encode() in (tmp_path / "x.json").read_bytes()


def test_doctests():
    result = doctest.testmod(files)
    assert result.failed == 0 and result.attempted >= 1


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
    row = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": math.nan, "e": 2}}
    expected = {"a": None, "b": [None, [1.5, None]], "c": {"d": None, "e": 2}}
    write_json(tmp_path / "x.json", row)
    append_rows(tmp_path / "x.jsonl", [row, row])
    texts = [(tmp_path / "x.json").read_text(), *(tmp_path / "x.jsonl").read_text().splitlines()]
    assert [json.loads(text, parse_constant=refuse_constant) for text in texts] == [expected] * 3
    assert math.isnan(row["c"]["d"])  # what is given stays as it is


@pytest.mark.parametrize("content", ["[1]", "null", '"x"', "3"])
def test_a_file_that_should_hold_an_object_and_does_not_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json is damaged: it holds no JSON object"):
        read_object(tmp_path / "config.json")
    (tmp_path / "rows.jsonl").write_text(f"{{}}\n{content}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl is damaged: it holds a line that is no JSON"):
        read_rows(tmp_path / "rows.jsonl")


def test_bytes_that_are_no_utf8_name_the_file(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"config.json is no UTF-8"):
        read_json(tmp_path / "config.json")


def test_broken_json_names_file_line_and_column(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n  "a": }\n')
    with pytest.raises(ValueError, match=r"config.json, line 2, column 8"):
        read_json(path)


def test_whole_rows_survive_a_torn_last_line_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"id": "a\u2028b"}, {"id": "ʼn"}, {"id": "a\nb"}]
    assert read_rows(path) == []
    append_rows(path, rows)
    whole = path.read_bytes()
    assert whole.decode() == json_lines(rows) and whole.count(b"\n") == 3
    torn = whole + '{"id": "ƙ'.encode()[:-1]  # torn inside a letter
    path.write_bytes(torn)
    assert read_rows(path) == rows
    assert path.read_bytes() == torn  # reading never writes
    path.write_bytes(b'{"id"\n' + whole)
    with pytest.raises(ValueError, match=r"problems.jsonl is broken before its last line"):
        read_rows(path)
    path.write_bytes(b"\xff\n" + whole)
    with pytest.raises(ValueError, match=r"problems.jsonl is broken before its last line"):
        read_rows(path)


@pytest.mark.parametrize("torn", ["", '{"id": 9', '{"id": 9}', '{"id": "ƙ'])
def test_what_is_appended_stands_on_a_line_of_its_own(tmp_path, torn):
    path = tmp_path / "problems.jsonl"
    append_rows(path, [{"id": 1}, {"id": 2}])
    with path.open("a", encoding="utf-8") as stream:
        stream.write(torn)
    append_rows(path, [{"id": 3}])
    assert read_rows(path) == [{"id": 1}, {"id": 2}, {"id": 3}]
    path.write_text(torn, encoding="utf-8")  # nothing but a torn line
    append_rows(path, [{"id": 3}])
    assert read_rows(path) == [{"id": 3}]
