"""parts/model.py: finding models, loading them, and what is refused."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from parts import machine
from parts import model as ours

SHA = "a" * 40
IDS_BT = torch.arange(14).view(2, 7)
CPU = {"device": "cpu", "dtype": torch.float32}


def fake_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return a function that puts a repo into an empty hub cache, in huggingface_hub's layout."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def put(repo: str) -> Path:
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(SHA)
        return fake_folder(root / "snapshots" / SHA)

    return put


@pytest.mark.parametrize(
    "repo",
    ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-1B", "google/gemma-3-1b-it"],
)
def test_full_and_bare_names_find_the_snapshot_and_a_local_folder_wins(hub_cache, tmp_path, repo):
    bare, snapshot = repo.split("/")[1], hub_cache(repo)
    assert ours.resolve_model(repo) == ours.resolve_model(bare) == snapshot
    fake_folder(tmp_path / bare)
    assert ours.resolve_model(bare) == Path(bare)


def test_cache_serves_when_the_hub_cannot_be_reached(hub_cache, monkeypatch):
    snapshot = hub_cache("HuggingFaceTB/SmolLM2-135M")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert ours.resolve_model("SmolLM2-135M") == snapshot


def test_only_what_loading_reads_is_downloaded(tmp_path, monkeypatch):
    wanted = [
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    others = [
        "consolidated.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "consolidated.pth",
        "model.pt",
        "modeling_x.py",
        "onnx/config.json",
    ]

    def download(repo_id, **patterns):
        assert repo_id == "org/name"
        assert list(filter_repo_objects(wanted + others, **patterns)) == wanted
        return str(fake_folder(tmp_path / "model"))

    monkeypatch.setattr(ours, "snapshot_download", download)
    assert ours.resolve_model("org/name") == tmp_path / "model"


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "no/such", "./no/such/folder", "/no/such/folder"])
def test_absent_model_is_one_line_of_file_not_found(hub_cache, name):
    with pytest.raises(FileNotFoundError, match=name) as error:
        ours.resolve_model(name)
    assert "\n" not in str(error.value)


def test_unknown_bare_name_lists_what_is_valid(hub_cache):
    with pytest.raises(
        ValueError, match=r"local folder, org/name, and Qwen\*, Llama-\*, SmolLM2-\*, gemma-\*"
    ):
        ours.resolve_model("mystery-7b")


@pytest.mark.parametrize(
    ("gone", "named"), [("config.json", "config.json"), ("model.safetensors", r"\*.safetensors")]
)
def test_incomplete_folder_names_what_is_missing(tmp_path, gone, named):
    folder = fake_folder(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {named} in"):
        ours.resolve_model(str(folder))


@pytest.mark.parametrize(("count", "auto"), [(0, "cpu"), (2, "cuda")])
def test_only_devices_that_are_here_are_valid(monkeypatch, count, auto):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert machine.pick_device("auto") == auto and machine.pick_device("cpu") == "cpu"
    present, absent = (["cuda", "cuda:1"], []) if count else ([], ["cuda", "cuda:0"])
    assert [machine.pick_device(device) for device in present] == present
    for device in (*absent, "cuda:2", "tpu"):
        with pytest.raises(ValueError, match="valid on this machine are auto, cpu"):
            machine.pick_device(device)


def test_a_lap_waits_for_the_gpu_whatever_its_number(monkeypatch):
    """A model on Apple's GPU says that it is on "mps:0"."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for device in ("cpu", "mps", "mps:0", "cuda:1"):
        machine.Stopwatch(device).lap("score")
    assert waited == ["mps", "mps", "cuda:1"]


@pytest.mark.parametrize(("works", "picked"), [(True, "mps"), (False, "cpu")])
def test_auto_is_apples_gpu_only_where_it_computes_as_the_cpu_does(monkeypatch, works, picked):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    # Said to be there and not there: whatever is asked of it fails.
    assert machine.pick_device("auto") == "cpu" and machine.pick_device("mps") == "mps"
    for name in ("linspace", "ones", "empty"):
        plain = getattr(torch, name)

        def made(*given, plain=plain, device):
            is_right = works or device == "cpu"
            return plain(*given) if is_right else plain(*given) * 1.01

        monkeypatch.setattr(torch, name, made)
    assert machine.pick_device("auto") == picked
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.pick_device("auto") == "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float32_matrices_are_multiplied_in_float32(lab_folder, dtype):
    kept = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        ours.load_model(lab_folder, device="cpu", dtype=dtype)
        stated = torch.backends.cuda.matmul.fp32_precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept
    assert stated == "ieee"


@pytest.mark.parametrize(("native", "auto"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_dtype_is_the_16_bit_type_that_a_gpu_computes_in(monkeypatch, native, auto):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    assert (
        machine.pick_dtype("auto", "cuda:0") is auto
        and machine.pick_dtype("auto", "cpu") is torch.float32
    )
    assert machine.pick_dtype("bfloat16", "cpu") is torch.bfloat16
    with pytest.raises(ValueError, match=r"valid are auto, float32, bfloat16, float16$"):
        machine.pick_dtype("int8", "cpu")


def test_loaded_model_is_the_saved_one_frozen_and_in_eval_mode(tiny_model, tmp_path):
    # Heads that are plain all the same:
    tiny_model.config.update({"final_logit_softcapping": None, "logit_scale": 1.0})
    tiny_model.save_pretrained(tmp_path)
    model = ours.load_model(tmp_path, **CPU)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS_BT).logits, tiny_model(IDS_BT).logits)
    assert ours.load_model(tmp_path, device="cpu", dtype=torch.bfloat16).dtype is torch.bfloat16


def test_weights_that_the_safetensors_lack_are_neither_unpickled_nor_made_up(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, such as model\.norm\.weight"):
        ours.load_model(tmp_path, **CPU)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        ours.load_model(tmp_path, **CPU)


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        (
            {"num_hidden_layers": 1},
            r"no place for, such as model\.layers\.1\.input_layernorm\.weight",
        ),
        (
            {"intermediate_size": 48},
            r"mlp\.down_proj\.weight of the sizes \(32, 64\), and .* describes \(32, 48\)",
        ),
        ({"num_hidden_layers": 3}, r"lacks weights, such as model\.layers\.2"),
    ],
)
def test_weights_of_another_configuration_are_refused_in_one_line(
    tiny_model, tmp_path, caplog, changed, refusal
):
    """A model with fewer layers than its files hold was used without the rest.

    The others were refused below a report of transformers' of many lines.
    """
    tiny_model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = {**json.loads(file.read_text()), **changed}
    config.pop("layer_types")
    file.write_text(json.dumps(config))
    library = logging.getLogger("transformers")
    level = library.level
    library.addHandler(caplog.handler)
    try:
        with pytest.raises(ValueError, match=refusal) as error:
            ours.load_model(tmp_path, **CPU)
    finally:
        library.removeHandler(caplog.handler)
    assert "\n" not in str(error.value)
    assert caplog.records == [] and library.level == level


def test_an_adapter_in_the_models_folder_is_refused(tiny_model, tmp_path):
    """Where peft is installed it was put on unasked, and its numbers were called the base's."""
    tiny_model.save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(tiny_model, config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"move it out and name it with --adapter$"):
        ours.load_model(tmp_path, **CPU)


@pytest.mark.parametrize(
    ("family", "settings", "refusal"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("cohere", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("phi", {}, "bias in its head"),
    ],
)
def test_heads_that_are_more_than_a_matrix_are_refused(tmp_path, family, settings, refusal):
    sizes = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    config = transformers.AutoConfig.for_model(family, **sizes, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        ours.load_model(tmp_path, **CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "a method of tomorrow"},
    ],
)
def test_quantised_weights_are_refused_by_their_method(tmp_path, tiny_model, settings):
    tiny_model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": settings}))
    said = rf"is quantised \({settings['quant_method']}\): valid are weights in float32"
    with pytest.raises(ValueError, match=said):
        ours.load_model(tmp_path, **CPU)


def test_a_folder_beside_the_program_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ours.resolve_model("lab/tiny") == ours.PROJECT / "lab" / "tiny"
    (tmp_path / "lab" / "tiny").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):  # one that is here goes first
        ours.resolve_model("lab/tiny")


def save_tokenizer(folder: Path, template: str | None) -> Path:
    words = {"[UNK]": 0, "MARK": 1, "<|close|>": 2, "<eos>": 3, "stop": 4}
    base = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, unk_token="[UNK]", eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|close|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_eos_ids_are_those_of_tokenizer_configs_and_template(tiny_model, tmp_path):
    turns = "{{% for m in messages %}}{{{{ m['content'] }}}}{}\n{{% endfor %}}"
    closed = ours.load_tokenizer(save_tokenizer(tmp_path / "closed", turns.format("<|close|>")))
    bare = ours.load_tokenizer(save_tokenizer(tmp_path / "bare", turns.format(" stop")))
    assert ours.valid_ids(closed) == 5
    tiny_model.config.eos_token_id, tiny_model.generation_config.eos_token_id = None, None
    assert ours.eos_ids(tiny_model, closed) == {2, 3}
    tiny_model.config.eos_token_id, tiny_model.generation_config.eos_token_id = 11, [12, 13]
    assert ours.eos_ids(tiny_model, closed) == {2, 3, 11, 12, 13}
    assert ours.eos_ids(tiny_model, bare) == {3, 11, 12, 13}
    with pytest.raises(ValueError, match="has no chat template"):
        ours.load_tokenizer(save_tokenizer(tmp_path / "without", None))


def test_valid_ids_are_those_of_the_vocabulary_where_it_has_a_gap():
    words = {"[UNK]": 0, "word": 1, "<eos>": 7}
    base = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>")
    assert ours.valid_ids(tokenizer) == {0, 1, 7}


def test_hidden_states_times_head_are_the_logits_and_right_pads_change_nothing(tiny_model):
    ids_BT = IDS_BT[:1]
    hidden_BTD = ours.final_hidden(tiny_model, ids_BT)
    torch.testing.assert_close(
        hidden_BTD @ ours.head_weight(tiny_model).T, tiny_model(ids_BT).logits
    )
    padded_BT = torch.nn.functional.pad(ids_BT, (0, 5))
    torch.testing.assert_close(ours.final_hidden(tiny_model, padded_BT)[:, :7], hidden_BTD)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("config.json", {"vocab_size": 0}, "config.json has vocab_size 0; valid: 1 or more"),
        ("config.json", {"vocab_size": -1}, "config.json has vocab_size -1; valid: 1 or more"),
        ("config.json", {"max_position_embeddings": 0}, "has max_position_embeddings 0; valid: 1"),
        ("config.json", {"pad_token_id": 99999}, "cannot be loaded: "),
        ("config.json", {"model_type": None}, "cannot be loaded: "),
        ("config.json", {"model_type": 5}, "cannot be loaded: "),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "abacus", "rope_theta": 1e4}},
            "its files name 'abacus', which transformers does not know",
        ),
        ("config.json", {"hidden_act": "abacus"}, "its files name 'abacus', which transformers"),
        ("config.json", {"rope_parameters": {"rope_type": "linear"}}, "loaded: Missing required"),
        ("tokenizer_config.json", {"model_max_length": "abacus"}, "'abacus'; valid: a number"),
        ("tokenizer_config.json", {"model_max_length": [1]}, "[1]; valid: a number, 1 or more"),
    ],
)
def test_a_models_setting_that_is_wrong_is_one_line_and_nothing_is_printed_before(
    lab_folder, tmp_path, caplog, name, changes, said
):
    """transformers' own warnings stood before the line, and some settings failed at use."""
    model = tmp_path / "model"
    shutil.copytree(lab_folder, model)
    content = json.loads((model / name).read_text(encoding="utf-8"))
    (model / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    heard = logging.getLogger("transformers")
    heard.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as warned, pytest.raises(ValueError) as error:
            warnings.simplefilter("always")
            ours.load_tokenizer(model)
            ours.load_model(model, **CPU)
    finally:
        heard.removeHandler(caplog.handler)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not caplog.records and not warned


def prefixed(prefix: str, *merges: object):
    return lambda held: held["model"].update(
        continuing_subword_prefix=prefix, merges=[*merges, *held["model"]["merges"]]
    )


BROKEN_PARTS = {
    "a prefix within a letter": prefixed("x"),  # the library would end the process
    "a prefix of merges written as text": prefixed("x", "a n"),
    "a prefix that is no half": prefixed("Ġt"),
    "a table of no letters": lambda held: held.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": ""}
    ),
    "nothing to replace": lambda held: held.update(
        normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "b"}
    ),
    "no token for what is unknown": lambda held: held["model"].update(
        type="WordLevel", unk_token="", vocab=held["model"]["vocab"]
    ),
}


@pytest.mark.parametrize("part", BROKEN_PARTS)
def test_a_tokenizer_that_fails_within_its_library_is_one_line(tmp_path, lab_folder, capfd, part):
    """Some failed in Rust, with a page of its own; one ended the process."""
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lab_folder / name, tmp_path)
    held = json.loads((lab_folder / "tokenizer.json").read_text(encoding="utf-8"))
    BROKEN_PARTS[part](held)
    (tmp_path / "tokenizer.json").write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer"):
        ours.load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""
