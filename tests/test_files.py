"""parts/files.py: what is replaced is replaced whole, and a torn last line costs no other line."""

import doctest
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parts import files
from parts.checkpoints import write_tensors
from parts.files import (
    CannotWrite,
    append_rows,
    file_digest,
    json_lines,
    read_edge_rows,
    read_json,
    read_object,
    read_rows,
    read_sealed,
    require_space,
    whole_file,
    write_json,
    write_sealed,
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


def test_a_name_that_no_utf8_can_write_comes_back(tmp_path):
    # A POSIX locale has no letter ɓ: Python keeps the bytes of a path like that as half surrogates.
    name = "ɓulà ƙ".encode().decode("ascii", "surrogateescape")
    write_sealed(tmp_path / "x.json", {"out": name, name: 1})
    assert read_sealed(tmp_path / "x.json") == {"out": name, name: 1}
    append_rows(tmp_path / "x.jsonl", [{"out": name}])
    assert read_rows(tmp_path / "x.jsonl") == [{"out": name}]


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


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_full_disk_is_one_line_that_names_the_file_and_the_remedy(tmp_path, name):
    path = tmp_path / name
    path.write_text("old\n")
    full = tmp_path / (f"{name}.partial" if name == "x.txt" else "link.jsonl")
    full.symlink_to("/dev/full")
    with pytest.raises(CannotWrite) as error:
        if name == "x.txt":
            write_text(path, "new" * 10000)
        else:
            append_rows(full, [{"id": "x" * 10000}])
    said = str(error.value)
    assert said.startswith(f"cannot write {path if name == 'x.txt' else full}: No space left")
    assert "free some space there" in said and "\n" not in said
    assert path.read_text() == "old\n"


def test_a_folder_or_a_removal_that_fails_is_the_same_error(tmp_path):
    """A disk without room for another name gave a traceback."""
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for work, path in (
        (files.make_folder, tmp_path / "file" / "below"),
        (files.make_folder, tmp_path / "file"),
        (files.remove_file, tmp_path / "folder"),
    ):
        with pytest.raises(CannotWrite, match=f"^cannot write {path}: "):
            work(path)


def test_a_link_that_leads_nowhere_is_named_as_one(tmp_path):
    """It said "File exists; see that it can be written"."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    for folder in (link, link / "below"):
        with pytest.raises(CannotWrite, match=f"{folder}: {link} is a link to what is not there"):
            files.make_folder(folder)
    assert link.is_symlink() and not (tmp_path / "gone").exists()


def test_a_tensor_file_on_a_full_disk_is_the_same_error(tmp_path):
    (tmp_path / "x.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match="free some space there"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(10000)}, {})
    assert not list(tmp_path.iterdir())


def test_tensors_are_written_as_their_library_writes_them(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_rows_that_were_written_in_part_are_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    append_rows(path, [{"id": 1}])
    cut = []

    def remember(file, size):
        cut.append((file, size))

    monkeypatch.setattr(files.os, "truncate", remember)

    class Torn:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            raise OSError(28, "No space left on device")

    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda *each, **more: Torn(plain(*each, **more)))
    with pytest.raises(CannotWrite):
        append_rows(path, [{"id": 2}])
    assert cut == [(path, len('{"id": 1}\n'))]


def test_space_is_asked_for_before_it_is_needed(tmp_path):
    require_space(tmp_path / "not" / "yet", 1, "a save")
    with pytest.raises(CannotWrite, match=r"a save needs 1048576.0 GiB and .* are free; free some"):
        require_space(tmp_path / "not" / "yet", 2**50, "a save")
    assert not list(tmp_path.iterdir())


def test_a_sealed_object_knows_itself(tmp_path):
    path = tmp_path / "x.json"
    write_sealed(path, {"a": [1, (2, 3)], "b": math.nan, "ƙ": None})
    assert read_sealed(path) == {"a": [1, [2, 3]], "b": None, "ƙ": None}
    path.write_text(path.read_text().replace("3", "4"))
    with pytest.raises(ValueError, match=r"x.json is damaged: it is not what its own digest says"):
        read_sealed(path)
    write_json(path, {"a": 1})  # of an older version
    assert read_sealed(path) == {"a": 1}


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5, "[" * 10**5 + "]" * 10**5])
def test_json_that_is_nested_without_end_is_broken(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json.*broken JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl is broken before its last line"):
        read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize("content", ['{"a": 1, "b": 2, "a": 1}', '{"c": [{"a": 1, "a": 2}]}'])
def test_an_object_that_names_something_twice_is_broken(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x.json: broken JSON: it names 'a' twice"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(content + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl is broken .*: it names 'a' twice"):
        read_rows(tmp_path / "x.jsonl")


def test_a_number_that_is_not_finite_in_a_sealed_file_is_damage(tmp_path):
    path = tmp_path / "config.json"
    write_sealed(path, {"config": {"lr": 0.5}})
    path.write_text(path.read_text().replace("0.5", "NaN"))
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        read_sealed(path)


def test_a_digest_is_of_so_many_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abcdef")
    start = tmp_path / "start"
    start.write_bytes(b"abc")
    assert file_digest(path, 3) == file_digest(start)
    assert file_digest(start, 6) != file_digest(path, 6)
    assert file_digest(start, 6) != file_digest(start)


def test_the_edges_of_a_file_are_its_rows_without_those_between(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_edge_rows(path, 2, 3) == []
    for count in range(8):
        write_text(path, json_lines({"step": number} for number in range(count)))
        rows = read_rows(path)
        expected = rows if count <= 5 else rows[:2] + rows[-3:]
        assert read_edge_rows(path, 2, 3) == expected
    with path.open("a") as stream:
        stream.write('{"step": 7')  # torn
    assert read_edge_rows(path, 2, 3) == rows[:2] + rows[-2:]
