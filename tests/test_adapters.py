"""parts/adapters.py: adapter files as peft writes and reads them."""

import copy
import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from parts import files
from parts.adapters import load_adapter, put_adapter, read_adapter_tensors, save_adapter
from parts.lora import Lora, attach_lora
from parts.model import published_name

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def attach(model, *, seed=0, ema=False) -> Lora:
    return attach_lora(model, rank=4, alpha=8, targets=TARGETS, seed=seed, ema=ema)


def trained(model, seed=0) -> Lora:
    """Return an adapter that is no longer the base model, with an average that is another one."""
    lora = attach(model, seed=seed, ema=True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return lora


def some_ids():
    return torch.randint(0, 290, (2, 7), generator=torch.Generator().manual_seed(1))


def test_adapter_files_give_the_same_logits_here_and_in_peft_both_ways(
    tiny_model, tmp_path, monkeypatch
):
    lora = trained(copy.deepcopy(tiny_model))
    logits = lora.model(some_ids()).logits
    replaced = []
    monkeypatch.setattr(files.os, "replace", lambda old, new: replaced.append(old.rename(new).name))
    save_adapter(lora, tmp_path / "ours", base_model="org/base")
    assert (
        sorted(path.name for path in (tmp_path / "ours").iterdir()) == replaced == [CONFIG, WEIGHTS]
    )
    again = load_adapter(copy.deepcopy(tiny_model), tmp_path / "ours")
    assert torch.equal(again.model(some_ids()).logits, logits)
    assert (again.rank, again.alpha, again.targets) == (4, 8, TARGETS)
    peft = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(tmp_path / "ours"))
    torch.testing.assert_close(peft(some_ids()).logits, logits)
    assert peft.peft_config["default"].base_model_name_or_path == "org/base"
    peft.save_pretrained(tmp_path / "peft", save_embedding_layers=False)  # "auto" would ask the hub
    load_adapter(tiny_model, tmp_path / "peft")
    assert torch.equal(tiny_model(some_ids()).logits, logits)


def test_the_config_file_is_this_text(tiny_model, tmp_path):
    save_adapter(
        attach_lora(tiny_model, rank=4, alpha=8, targets=("q_proj",), seed=0),
        tmp_path,
        base_model="modèle",
    )
    assert (
        (tmp_path / CONFIG).read_text(encoding="ascii")
        == """{
  "peft_type": "LORA",
  "use_rslora": false,
  "alpha_pattern": {},
  "task_type": "CAUSAL_LM",
  "base_model_name_or_path": "mod\\u00e8le",
  "bias": "none",
  "r": 4,
  "lora_alpha": 8,
  "lora_dropout": 0.0,
  "target_modules": [
    "q_proj"
  ]
}
"""
    )


def test_tensors_are_read_by_the_adapters_own_names_and_put_in_place(tiny_model, tmp_path):
    saved = trained(copy.deepcopy(tiny_model), seed=3)
    save_adapter(saved, tmp_path, base_model="base")
    tensors = read_adapter_tensors(tmp_path)
    assert tensors.keys() == saved.sets["current"].keys()
    assert "model.layers.1.mlp.down_proj.lora_A" in tensors

    other = trained(tiny_model, seed=4)
    parameters = other.parameters()
    average = copy.deepcopy(other.sets["ema"])
    put_adapter(other, tmp_path)
    for name, tensor in saved.sets["current"].items():
        assert torch.equal(other.sets["current"][name], tensor)
        assert torch.equal(other.sets["ema"][name], average[name])
    # The optimiser and the layers hold these very tensors.
    pairs = zip(other.parameters(), parameters, strict=True)
    assert all(now is before and now.requires_grad for now, before in pairs)
    assert torch.equal(tiny_model(some_ids()).logits, saved.model(some_ids()).logits)


def test_putting_an_adapter_that_does_not_fit_changes_nothing(tiny_model, tmp_path):
    save_adapter(trained(copy.deepcopy(tiny_model)), tmp_path, base_model="base")
    change_tensors(tmp_path / WEIGHTS, lambda tensors: tensors.popitem())
    lora = trained(tiny_model, seed=4)
    before = copy.deepcopy(lora.sets["current"])
    with pytest.raises(ValueError, match="1 adapter tensors are missing"):
        put_adapter(lora, tmp_path)
    assert all(torch.equal(lora.sets["current"][name], before[name]) for name in before)


def change_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS} is missing"),
        (lambda f: (f / CONFIG).unlink(), FileNotFoundError, f"{CONFIG} is missing"),
        (lambda f: change_config(f, use_rslora=True), ValueError, "use_rslora=True"),
        (lambda f: change_config(f, peft_type="IA3"), ValueError, "peft_type='IA3'"),
        (lambda f: change_config(f, alpha_pattern={"q_proj": 1}), ValueError, "alpha_pattern"),
        (
            lambda f: change_config(f, target_modules=["q_proj"]),
            ValueError,
            "24 adapter tensors are missing, unknown",
        ),
        (
            lambda f: change_config(f, target_modules=["c_attn"]),
            ValueError,
            "'c_attn' matches no layer",
        ),
        (lambda f: change_config(f, r=8), ValueError, "28 adapter tensors are .* misshapen"),
        (lambda f: change_config(f, r=10**12), ValueError, "r=1000000000000, larger than all"),
        (
            lambda f: change_tensors(f / WEIGHTS, lambda t: t.popitem()),
            ValueError,
            "1 adapter tensors",
        ),
        (
            lambda f: change_tensors(f / WEIGHTS, lambda t: t.update(x=torch.ones(1))),
            ValueError,
            "such as x",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused_in_one_line(
    tiny_model, tmp_path, damage, kind, message
):
    save_adapter(attach(copy.deepcopy(tiny_model)), tmp_path, base_model="base")
    damage(tmp_path)
    with pytest.raises(kind, match=message) as error:
        load_adapter(tiny_model, tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapter_whose_settings_are_incomplete_is_an_error_that_names_them(tmp_path, tiny_model):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}', encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="lacks lora_alpha, target_modules"):
        load_adapter(tiny_model, tmp_path)


def make_with_peft(model, folder, **settings):
    """Save a peft adapter whose B A is not 0; return what peft's model says with it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), **settings}
    with_peft = get_peft_model(copy.deepcopy(model), LoraConfig(**settings)).eval()
    torch.manual_seed(5)
    for name, parameter in with_peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with_peft.save_pretrained(folder, save_embedding_layers=False)
    return with_peft(some_ids()).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"r": 1},
        {"lora_alpha": 3.5, "lora_dropout": 0.1},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
        {"exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"exclude_modules": r".*\.layers\.0\..*"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"model\.layers\.1\.mlp\..*_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": ["mlp.up_proj", "k_proj"]},
    ],
    ids=str,
)
def test_every_accepted_form_of_a_peft_adapter_computes_what_peft_does(
    tiny_model, tmp_path, settings
):
    logits = make_with_peft(tiny_model, tmp_path / "peft", **settings)
    lora = load_adapter(copy.deepcopy(tiny_model), tmp_path / "peft")
    torch.testing.assert_close(lora.model(some_ids()).logits, logits)
    # What is written of it afterwards is the same adapter.
    save_adapter(lora, tmp_path / "ours", base_model="base")
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(tmp_path / "ours"))
    torch.testing.assert_close(again(some_ids()).logits, logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "eva"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 8}),
        ("modules_to_save", ["embed_tokens"]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.down_proj"]),
        ("layers_pattern", "layers"),
        ("task_type", "SEQ_CLS"),
        ("megatron_config", {"a": 1}),
        ("kasa_config", {}),
        ("a_field_to_come", False),
        ("r", 0),
        ("r", 2.5),
        ("lora_alpha", "8"),
        ("lora_alpha", 0),
        ("lora_alpha", -32),
        ("target_modules", "("),
        ("target_modules", {"a": 1, "b": 2}),
        ("target_modules", ".*nothing"),
        ("target_modules", [1]),
        ("target_modules", 5),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", True),
        ("exclude_modules", {"q_proj": 1}),
        ("exclude_modules", {}),
        ("init_lora_weights", 1),
        ("use_dora", 0),
        ("layers_to_transform", [True]),
    ],
)
def test_an_adapter_that_is_more_than_plain_lora_is_refused_by_the_fields_name(
    tiny_model, tmp_path, field, value
):
    save_adapter(attach(copy.deepcopy(tiny_model)), tmp_path, base_model="base")
    change_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=field) as error:
        load_adapter(tiny_model, tmp_path)
    assert "\n" not in str(error.value)


def test_an_untrained_pissa_adapter_of_peft_is_refused(tiny_model, tmp_path):
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear")
    with_peft = get_peft_model(copy.deepcopy(tiny_model), config)
    with_peft.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        load_adapter(tiny_model, tmp_path)


def test_a_field_of_a_later_peft_that_says_nothing_is_accepted(tiny_model, tmp_path):
    save_adapter(trained(copy.deepcopy(tiny_model)), tmp_path, base_model="base")
    change_config(tmp_path, a_field_to_come=None, peft_version="9.9")
    load_adapter(tiny_model, tmp_path)


def test_peft_finds_the_base_model_of_an_adapter_by_itself(tiny_model, tmp_path):
    base = tmp_path / "base"
    tiny_model.save_pretrained(base)
    lora = trained(copy.deepcopy(tiny_model))
    name, revision = published_name(base)
    save_adapter(lora, tmp_path / "ours", base_model=name, revision=revision)
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
    torch.testing.assert_close(found(some_ids()).logits, lora.model(some_ids()).logits)

    snapshot = tmp_path / "hub" / "models--org--a-name" / "snapshots" / ("a" * 40)
    name, revision = published_name(snapshot)
    assert (name, revision) == ("org/a-name", "a" * 40)
    save_adapter(lora, tmp_path / "hub", base_model=name, revision=revision)
    config = PeftConfig.from_pretrained(str(tmp_path / "hub"))
    assert (config.base_model_name_or_path, config.revision) == (name, revision)
