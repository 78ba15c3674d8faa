"""The run folder: nothing half-written, nothing overwritten, and a state that comes back whole."""

import json
import signal

import pytest
import torch

from parts.runs import (
    Run,
    adapter_folder,
    optimizer_tensors,
    provenance,
    read_json,
    read_recipe,
    recorded_fingerprint,
    restore_optimizer,
    stop_signals,
    write_json,
)


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


def test_whole_rows_survive_a_torn_last_line_and_a_broken_one_is_named(tmp_path):
    run = Run(tmp_path, "settings")
    assert run.whole_rows("problems.jsonl") == []
    run.append("problems.jsonl", [{"id": "a\u2028b"}, {"id": "ʼn"}])
    whole = (tmp_path / "problems.jsonl").read_bytes()
    (tmp_path / "problems.jsonl").write_bytes(
        whole + '{"id": "ƙ'.encode()[:-1]
    )  # torn inside a letter
    assert run.whole_rows("problems.jsonl") == [{"id": "a\u2028b"}, {"id": "ʼn"}]
    assert (tmp_path / "problems.jsonl").read_bytes() == whole
    (tmp_path / "problems.jsonl").write_bytes(b'{"id"\n' + whole)
    with pytest.raises(ValueError, match=r"problems.jsonl is broken before its last line"):
        run.whole_rows("problems.jsonl")


def test_an_evaluations_record_is_its_settings(tmp_path):
    run = Run(tmp_path / "evaluation", "settings")
    run.create({"seed": 0}, {"data": "aa"})
    assert read_json(run.folder / "settings.json")["settings"] == {"seed": 0}
    run.check({"seed": 0}, {"data": "aa"})
    with pytest.raises(ValueError, match="differs in data;"):
        run.check({"seed": 0}, {"data": "bb"})
    with pytest.raises(ValueError, match=r"no config\.json"):
        Run(run.folder).check({"seed": 0})


def test_the_state_comes_back_bit_for_bit_with_its_step(tmp_path):
    run = Run(tmp_path)
    assert run.load_state() == (0, {})
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.tensor(7),
    }  # a view that is not contiguous, and a scalar
    run.save_state(12, tensors)
    step, loaded = run.load_state()
    assert step == 12 and all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_write_keeps_the_old_content(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"old": 1})
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "x.json", {"new": 2})
    monkeypatch.undo()
    assert read_json(tmp_path / "x.json") == {"old": 1}


def test_logs_are_cut_back_to_the_saved_step_and_a_torn_line_is_dropped(tmp_path):
    run = Run(tmp_path)
    run.append("metrics.jsonl", [{"step": step} for step in (1, 2, 3)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    run.cut_back(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_optimizer_state_survives_the_round_trip_through_flat_tensors():
    def fresh():
        parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        return parameter, torch.optim.AdamW([parameter], lr=0.1)

    def step(parameter, optimizer):
        (parameter**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    straight, optimizer = fresh()
    step(straight, optimizer)
    resumed, other = fresh()
    with torch.no_grad():
        resumed.copy_(straight)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    restore_optimizer(other, saved)
    step(straight, optimizer)
    step(resumed, other)
    assert torch.equal(straight, resumed)


def test_broken_json_names_file_line_and_column(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n  "a": }\n')
    with pytest.raises(ValueError, match=r"config.json, line 2, column 8"):
        read_json(path)


def test_a_recipe_gives_values_and_paths_beside_the_model(tmp_path):
    assert read_recipe(tmp_path) == {}
    recipe = {
        "lr": {"value": 0.5, "why": "so"},
        "data": {"value": "../problems/{lang}.jsonl", "why": "here"},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe))
    assert read_recipe(tmp_path / "model") == {
        "lr": 0.5,
        "data": str(tmp_path / "problems" / "{lang}.jsonl"),
    }


def test_the_last_adapter_of_a_run_is_found_and_a_missing_one_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither an adapter folder nor a run folder"):
        adapter_folder(tmp_path)
    for step in ("step_00005", "step_00010"):
        (tmp_path / "adapters" / step).mkdir(parents=True)
        (tmp_path / "adapters" / step / "adapter_config.json").write_text("{}")
    last = tmp_path / "adapters" / "step_00010"
    assert adapter_folder(tmp_path) == adapter_folder(last) == last
    assert recorded_fingerprint(tmp_path) is None
    write_json(tmp_path / "config.json", {"identity": {"base_weights": "abc"}})
    assert recorded_fingerprint(tmp_path) == recorded_fingerprint(last) == "abc"


def test_the_first_signal_is_remembered_and_the_second_acts():
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job ignores it
    with stop_signals() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, inherited) is signal.default_int_handler


def test_provenance_names_versions_and_commit():
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["git_commit"] is None or len(found["git_commit"]) == 40
