"""parts/runs.py: nothing half-written, nothing overwritten, and a state that comes back whole."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from parts import runs
from parts.files import (
    CannotWrite,
    append_rows,
    read_json,
    read_rows,
    read_sealed,
    write_json,
    write_sealed,
)
from parts.runs import Run, last_adapter_folder, stop_signals


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"exists and is not a run folder"):
        Run(tmp_path).check({"lr": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_of_other_settings_or_other_weights_is_refused_by_name(tmp_path):
    run = Run(tmp_path / "run")
    run.check({"lr": 1})  # a new folder is fine, and checking does not make it
    assert not run.folder.exists()
    run.create({"lr": 1, "seed": 0}, {"base_weights": "aa"})
    run.check({"lr": 1, "seed": 0}, {"base_weights": "aa"})
    with pytest.raises(ValueError, match="differs in seed;"):
        run.check({"lr": 1, "seed": 1})
    with pytest.raises(ValueError, match="differs in base_weights;"):
        run.check({"lr": 1, "seed": 0}, {"base_weights": "bb"})


def test_a_run_that_goes_on_with_other_versions_or_threads_is_told_so(tmp_path):
    run = Run(tmp_path / "run")
    assert run.create({"lr": 1}, {}) is None
    assert run.create({"lr": 1}, {}) is None
    record = read_sealed(run.record_file)
    versions = record["versions"] | {"torch": "2.0"}
    write_sealed(run.record_file, record | {"versions": versions, "threads": 77})
    said = run.create({"lr": 1}, {})
    now = f"torch 2.0, now {record['versions']['torch']}; threads 77, now {record['threads']}"
    assert said == f"{run.folder} was begun with {now}: results may differ"


def test_a_record_that_is_there_is_not_written_again(tmp_path):
    run = Run(tmp_path / "run")
    run.create({"lr": 1}, {})
    before = run.record_file.read_bytes()
    run.create({"lr": 1}, {})
    with pytest.raises(ValueError, match="differs in lr;"):  # made by another meanwhile
        run.create({"lr": 2}, {})
    assert run.record_file.read_bytes() == before


def test_another_path_to_the_same_content_is_no_other_run(tmp_path):
    """A run could not go on from another working directory, nor after its folder was moved."""
    run = Run(tmp_path / "run")
    run.create({"data": "a/rows.jsonl", "lr": 1}, {"training_data": "aa"})
    run.check({"data": "/b/rows.jsonl", "lr": 1}, {"training_data": "aa"})
    with pytest.raises(ValueError, match="differs in training_data;"):
        run.check({"data": "/b/rows.jsonl", "lr": 1}, {"training_data": "bb"})
    with pytest.raises(ValueError, match="differs in data;"):  # None is the hub's
        run.check({"data": None, "lr": 1}, {"training_data": "aa"})
    other = Run(tmp_path / "other")
    other.create({"data": "a/rows.jsonl"}, {})  # whose record knows it by its path only
    with pytest.raises(ValueError, match="differs in data;"):
        other.check({"data": "/b/rows.jsonl"}, {})


def test_an_evaluations_record_is_its_settings(tmp_path):
    run = Run(tmp_path / "evaluation", "settings")
    run.create({"seed": 0}, {"data": "aa"})
    assert read_json(run.folder / "settings.json")["settings"] == {"seed": 0}
    run.check({"seed": 0}, {"data": "aa"})
    with pytest.raises(ValueError, match="differs in data;"):
        run.check({"seed": 0}, {"data": "bb"})
    with pytest.raises(ValueError, match=r"no config\.json"):
        Run(run.folder).check({"seed": 0})


def test_the_state_comes_back_bit_for_bit_with_its_step_and_its_tokens(tmp_path):
    run = Run(tmp_path)
    assert run.load_state() == (0, 0, {})
    # A view that is not contiguous, and a scalar.
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7)}
    for step in (11, 12, 13):
        run.log({"step": step, "sampled_tokens": 100 * step}, [])
    run.save_state(12, tensors)
    step, sampled_tokens, loaded = run.load_state()
    assert (step, sampled_tokens) == (12, 1200)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_save_keeps_the_old_state(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.log({"step": 1, "sampled_tokens": 10}, [])
    run.save_state(1, {"a": torch.ones(2)})

    plain = Path.write_bytes

    def torn(path, content):
        plain(path, content[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(KeyboardInterrupt):
        run.save_state(2, {"a": torch.zeros(2)})
    step, _, tensors = run.load_state()
    assert step == 1 and torch.equal(tensors["a"], torch.ones(2))


def test_logs_are_cut_back_to_the_saved_step_and_a_torn_line_is_dropped(tmp_path):
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step}, [{"step": step, "row": row} for row in (0, 1)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    run.cut_back(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "completions.jsonl").read_text() == (
        '{"step": 1, "row": 0}\n{"step": 1, "row": 1}\n'
        '{"step": 2, "row": 0}\n{"step": 2, "row": 1}\n'
    )
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_cutting_back_makes_no_log_where_there_is_none(tmp_path):
    Run(tmp_path).cut_back(0)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_is_kept_by_its_name(tmp_path):
    run = Run(tmp_path)
    assert run.read_evaluation("before") is None
    run.write_evaluation("before", {"hau": {"pass@1": 0.5}})
    assert run.read_evaluation("before") == {"hau": {"pass@1": 0.5}}
    assert run.read_evaluation("after") is None


def test_the_last_adapter_of_a_run_is_found_and_a_missing_one_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither an adapter folder nor a run folder"):
        last_adapter_folder(tmp_path)
    run = Run(tmp_path)
    for step in (5, 10):
        run.adapter_folder(step).mkdir(parents=True)
        (run.adapter_folder(step) / "adapter_config.json").write_text("{}")
    last = tmp_path / "adapters" / "step_00010"
    assert last_adapter_folder(tmp_path) == last_adapter_folder(last) == last


def test_adapters_are_ordered_by_number_and_other_folders_are_not_theirs(tmp_path):
    for name in ("step_99995", "step_100000", "step_final", "step_100001_copy"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    assert last_adapter_folder(tmp_path).name == "step_100000"


def test_the_first_signal_is_remembered_and_the_second_acts():
    # A background job ignores it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop_signals() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


def test_a_record_that_cannot_be_made_leaves_no_folder(tmp_path, monkeypatch):
    def broken():
        raise OSError("no versions")

    monkeypatch.setattr("parts.runs.provenance", broken)
    with pytest.raises(OSError, match="no versions"):
        Run(tmp_path / "run").create({"lr": 1}, {})
    assert not list(tmp_path.iterdir())


def test_a_longer_run_says_why_a_finished_one_is_not_extended(tmp_path):
    run = Run(tmp_path / "run")
    run.create({"steps": 2, "lr": 1}, {})
    with pytest.raises(ValueError, match=r"differs in steps; the learning rate falls to 0 at"):
        run.check({"steps": 4, "lr": 1})
    with pytest.raises(ValueError, match=r"differs in steps, lr; choose another --out"):
        run.check({"steps": 4, "lr": 2})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b"\xff{}"),
        ("config.json", b'{"config": null}'),
        ("config.json", b'{"identity": {}}'),
        ("resume/step_00001.safetensors", b""),
        ("resume/step_00001.safetensors", b"half of a state"),
        ("metrics.jsonl", b""),
        ("metrics.jsonl", b'{"step": 1}\n'),
        ("metrics.jsonl", b"{\n{}\n"),
        ("metrics.jsonl", b"5\n"),
        ("completions.jsonl", b"[]\n"),
        ("completions.jsonl", b'{"id": 1}\n'),
        ("before.json", b"{"),
        ("before.json", b"3"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line_that_names_it(tmp_path, name, content):
    run = Run(tmp_path / "run")
    run.create({"lr": 1}, {})
    run.log({"step": 1, "sampled_tokens": 10}, [{"step": 1}])
    run.save_state(1, {"a": torch.ones(2)})
    run.check({"lr": 1}, {})
    run.check_whole()
    (run.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        run.check({"lr": 1}, {})
        run.check_whole()
        run.read_evaluation("before")


def make_run(folder: Path, steps: int) -> Run:
    """Return a run of so many steps, each with a state and an adapter of one file."""
    run = Run(folder)
    run.create({"lr": 1}, {})
    for step in range(1, steps + 1):
        run.log({"step": step, "sampled_tokens": 10 * step}, [{"step": step}])
        write_json(make_parent(run.adapter_folder(step) / "adapter_config.json"), {"r": step})
        run.save_state(step, {"a": torch.ones(2)})
    return run


def test_adapters_that_someone_removed_are_named_and_no_older_one_stands_for_the_last(tmp_path):
    run = make_run(tmp_path / "run", 4)
    assert run.check_whole() == [] and runs.last_adapter_folder(run.folder).name == "step_00004"
    shutil.rmtree(run.adapter_folder(2))
    assert runs.last_adapter_folder(run.folder).name == "step_00004"
    shutil.rmtree(run.adapter_folder(4))
    (said,) = run.check_whole()
    assert said == f"{run.folder}/adapters no longer has step_00002, step_00004; " + (
        "the run goes on without"
    )
    with pytest.raises(ValueError, match=r"step_00004, the last adapter.*, is not there; name "):
        runs.last_adapter_folder(run.folder)
    assert runs.last_adapter_folder(run.adapter_folder(3)) == run.adapter_folder(3)


def test_a_damaged_adapter_is_to_be_removed_whole(tmp_path):
    run = make_run(tmp_path / "run", 1)
    (run.adapter_folder(1) / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"; remove {run.adapter_folder(1)} to go on without it"):
        run.check_whole()


@pytest.mark.parametrize("content", ["{}", '{"sha256": null}'])
def test_digests_that_vouch_for_nothing_are_damaged(tmp_path, content):
    run = make_run(tmp_path / "run", 1)
    (run.folder / "digests.json").write_text(content)
    with pytest.raises(ValueError, match=r"digests\.json is damaged: .*; remove it to go on"):
        run.check_whole()


@pytest.mark.parametrize(
    "name",
    [
        "after.json",
        "best.json",
        "metrics.jsonl",
        "RESULTS.md",
        "resume/step_00002.json",
        "resume/step_00002.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere"])
def test_what_is_no_file_is_found_before_it_is_written(tmp_path, name, kind):
    run = make_run(tmp_path / "run", 1)
    path = run.folder / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{path} is no file; remove it"):
        run.check({"lr": 1}, {})


def test_what_is_no_folder_is_found_before_it_is_written(tmp_path):
    run = make_run(tmp_path / "run", 1)
    shutil.rmtree(run.folder / "adapters")
    (run.folder / "adapters").write_text("")
    with pytest.raises(ValueError, match=f"{run.folder / 'adapters'} is no folder; remove it"):
        run.check({"lr": 1}, {})


def test_rows_that_were_appended_apart_are_one_log(tmp_path):
    append_rows(tmp_path / "metrics.jsonl", [{"step": 1}])
    run = Run(tmp_path)
    run.log({"step": 2}, [])
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_rows_that_are_vouched_for_are_digested_once_however_often_there_are_more(
    tmp_path, monkeypatch
):
    run = Run(tmp_path)
    file = tmp_path / "problems.jsonl"
    digested: list[int] = []
    plain = runs.line_digests
    monkeypatch.setattr(runs, "line_digests", lambda c: digested.append(len(c)) or plain(c))
    for row in range(20):
        run.add_rows(file, [{"id": row, "text": "word " * 50}], after=row)
    assert sum(digested) == file.stat().st_size
    run.check_digests()
    assert read_sealed(tmp_path / "digests.json")[file.name] == plain(file.read_bytes())


def test_rows_whose_file_was_removed_meanwhile_do_not_become_its_first(tmp_path):
    """An evaluation went on, ended well, and left a file of its last problems."""
    run = Run(tmp_path)
    file = tmp_path / "problems.jsonl"
    run.add_rows(file, [{"id": 0}], after=0)
    file.unlink()
    with pytest.raises(CannotWrite, match=r"problems\.jsonl is not there any more; repeat"):
        run.add_rows(file, [{"id": 1}], after=1)
    assert not file.exists()
    run.add_rows(file, [{"id": 0}], after=0)  # what the same command does
    assert read_rows(file) == [{"id": 0}]
    run.check_digests()


@pytest.mark.parametrize("lost", ["rows at the end", "the digest of the last rows"])
def test_rows_go_on_after_a_kill_and_any_byte_of_them_is_still_watched(tmp_path, lost):
    run = Run(tmp_path)
    file = tmp_path / "problems.jsonl"
    for row in range(4):
        before = (tmp_path / "digests.json").read_bytes() if row else b""
        run.add_rows(file, [{"id": row}], after=row)
    if lost == "rows at the end":
        file.write_bytes(file.read_bytes().replace(b'{"id": 3}\n', b'{"id'))
        run.check_digests()
        run.add_rows(file, [{"id": 3}, {"id": 4}], after=3)
    else:
        (tmp_path / "digests.json").write_bytes(before)
        run.check_digests()
        run.add_rows(file, [{"id": 4}], after=4)
    assert [row["id"] for row in read_rows(file)] == [0, 1, 2, 3, 4]
    run.check_digests()
    whole = file.read_bytes()
    for row in range(5):
        file.write_bytes(whole.replace(b'"id": %d' % row, b'"id": 7'))
        with pytest.raises(ValueError, match=r"problems\.jsonl is damaged"):
            run.check_digests()


def test_any_file_of_a_finished_run_is_watched_and_old_adapters_and_states_may_go(tmp_path):
    run = Run(tmp_path)
    for name in ("prompts.json", "adapters/step_1/a", "adapters/step_2/a", "resume/step_1.json"):
        write_json(make_parent(tmp_path / name), name)
    held = run.inventory()
    assert held.keys() == {"prompts.json", "adapters/step_1/a", "adapters/step_2/a"}
    for folder in ("adapters/step_1", "resume"):
        shutil.rmtree(tmp_path / folder)
    run.check_inventory(held)
    for name in ("prompts.json", "adapters/step_2/a"):
        whole = (tmp_path / name).read_bytes()
        for spoilt in (whole[:-1], whole + b" ", whole.swapcase()):
            (tmp_path / name).write_bytes(spoilt)
            with pytest.raises(ValueError, match=f"{name} is damaged.*; remove .* made again"):
                run.check_inventory(held)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "prompts.json").unlink()
    with pytest.raises(ValueError, match=r"prompts\.json is missing; remove .* made again"):
        run.check_inventory(held)


def make_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_a_kill_while_an_evaluation_is_written_anew_leaves_nothing_damaged(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    run.create({"lr": 1}, {})
    run.write_evaluation("best", {"step": 1})

    def _die(*files: Path) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "vouch", _die)
        with pytest.raises(SystemExit):
            run.write_evaluation("best", {"step": 2})
    run.check_digests()
    assert run.read_evaluation("best") == {"step": 2}
    run.write_evaluation("best", {"step": 3})
    (run.folder / "best.json").write_text("{}")
    with pytest.raises(ValueError, match=r"best\.json is damaged"):
        run.check_digests()


def test_what_a_kill_left_without_a_digest_is_vouched_for_by_the_next_call(tmp_path):
    run = Run(tmp_path / "run")
    run.create({"lr": 1}, {})
    files = [run.folder / f"{when}.json" for when in ("before", "after")]
    write_json(files[0], {"hau": {}})
    run.vouch_anew(*files)
    assert list(read_sealed(run.folder / "digests.json")) == ["before.json"]
    files[0].write_text("{}")
    run.vouch_anew(*files)  # what is vouched for already is not believed anew
    with pytest.raises(ValueError, match=r"before\.json is damaged"):
        run.check_digests()


def test_a_folder_that_is_written_anew_is_disowned_whole(tmp_path):
    run = Run(tmp_path)
    names = ("adapters/step_1/a", "adapters/step_1/b", "adapters/step_10/a", "best.json")
    for name in names:
        write_json(make_parent(tmp_path / name), name)
    run.vouch(*(tmp_path / name for name in names))
    run.disown(tmp_path / "adapters" / "step_1")
    assert list(read_sealed(tmp_path / "digests.json")) == list(names[2:])
