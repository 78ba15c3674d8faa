"""parts/identity.py: a fingerprint sees every change, and an adapter fits its own base only."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from parts.files import read_json, write_json
from parts.identity import (
    fingerprint,
    folder_fingerprint,
    provenance,
    recorded_fingerprint,
    refuse_foreign_adapter,
    weights_fingerprint,
)
from parts.runs import Run


def test_the_fingerprint_of_a_folder_is_of_what_is_stored(tiny_model, tmp_path):
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path / "one")
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    stored = folder_fingerprint(tmp_path / "one")
    # However it is cut into files, and not of the dtype that a run loads it in.
    assert stored == folder_fingerprint(tmp_path / "shards")
    assert stored == weights_fingerprint(dict(tiny_model.named_parameters()))
    with torch.no_grad():
        tiny_model.model.norm.weight[3] += 1
    tiny_model.save_pretrained(tmp_path / "other")
    assert folder_fingerprint(tmp_path / "other") != stored


def test_a_fingerprint_changes_with_name_shape_type_and_bytes():
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3).index_fill(1, torch.tensor(2), 1.0)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ]
    found = {weights_fingerprint(tensors) for tensors in (base, *others)}
    assert len(found) == 6 and {len(digits) for digits in found} == {16}
    tall = torch.arange(6.0).reshape(2, 3)
    pair = {"a": tall, "b": tall.T}
    turned = {"b": tall.T.contiguous(), "a": tall}  # neither order nor strides count
    assert weights_fingerprint(pair) == weights_fingerprint(turned)
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_fingerprint_sees_names_shapes_dtypes_and_bytes_but_not_order():
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(5.0)
    assert weights_fingerprint({"a": a, "b": b}) == weights_fingerprint({"b": b, "a": a})
    variants = [
        {"a": v, "b": b}
        for v in (a, a + torch.tensor([0, 0, 0, 2**-20]), a.view(2, 2), a.view(torch.int32))
    ]
    fingerprints = {weights_fingerprint(tensors) for tensors in [*variants, {"a": a, "c": b}]}
    assert len(fingerprints) == 5 and all(len(fingerprint) == 16 for fingerprint in fingerprints)


def test_an_adapter_of_other_base_weights_is_refused(tmp_path):
    last = tmp_path / "adapters" / "step_00010"
    assert recorded_fingerprint(tmp_path) is None
    write_json(tmp_path / "config.json", {"identity": {"base_weights": "abc"}})
    assert recorded_fingerprint(tmp_path) == recorded_fingerprint(last) == "abc"
    for path in (tmp_path, last):
        refuse_foreign_adapter(path, "abc", "lab/tiny", Path("lab/tiny"))
        with pytest.raises(ValueError, match="trained on other base weights than those of M"):
            refuse_foreign_adapter(path, "def", "M", Path("M"))


def test_an_adapter_whose_base_nobody_recorded_is_not_refused(tmp_path):
    refuse_foreign_adapter(tmp_path, "abc", "lab/tiny", Path("lab/tiny"))


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", None),  # refused
        ("Qwen/Qwen2.5-1.5B", True),
        ("someone/qwen2.5-1.5b", False),
        ("/no/longer/here", False),
        (None, False),
    ],
)
def test_an_adapter_without_a_record_is_held_to_the_hubs_name_that_it_has(tmp_path, named, known):
    folder = tmp_path / "models--Qwen--Qwen2.5-1.5B" / "snapshots" / ("a" * 40)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": named})
    if known is None:
        with pytest.raises(ValueError, match="trained on other base weights than those of Qwen2"):
            refuse_foreign_adapter(adapter, "abc", "Qwen2.5-1.5B", folder)
    else:
        console = Console(record=True, width=300)
        refuse_foreign_adapter(adapter, "abc", "Qwen2.5-1.5B", folder, console)
        assert ("nothing says on which base" in console.export_text()) is not known


def test_provenance_names_versions_and_commit():
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["git_commit"] is None or len(found["git_commit"]) == 40


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_without_git_the_commit_is_null_and_the_run_goes_on(tmp_path, monkeypatch, error):
    def absent(*arguments, **options):
        raise error("git")

    monkeypatch.setattr("parts.identity.subprocess.run", absent)
    run = Run(tmp_path / "run")
    run.create({"lr": 1}, {})
    record = read_json(run.record_file)
    assert record["git_commit"] is None and record["git_uncommitted_changes"] is None


def test_an_adapter_is_known_by_its_run_however_its_folder_is_named(tmp_path, monkeypatch):
    last = tmp_path / "run" / "adapters" / "step_00010"
    last.mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", {"identity": {"base_weights": "abc"}})
    link = tmp_path / "link"
    link.symlink_to(last)
    assert recorded_fingerprint(link) == "abc"
    monkeypatch.chdir(last.parent)
    assert recorded_fingerprint(Path("step_00010")) == "abc"
    monkeypatch.chdir(last)
    assert recorded_fingerprint(Path(".")) == "abc"
