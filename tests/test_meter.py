"""parts/meter.py: what passes take of a token, beside what the model itself takes with weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_families import build, configure
from transformers import DynamicCache

from kernels import clip_products
from parts.footprint import read_shape
from parts.lora import adaptable_layers, attach_lora
from parts.meter import COLUMNS, ROWS, Meter
from parts.model import final_hidden, load_model
from parts.recipe import Config

# Large enough that tensors are most of what is counted.
SIZES = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 512}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "max_position_embeddings": 512}
CASES = {
    "llama": SIZES,
    "gpt_bigcode": GPT,
    "gpt_neox": SIZES,
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 160,
        "max_position_embeddings": 512,
    },
    "phi3": SIZES,
    "youtu": {**SIZES, **LATENT},
}


def attention_targets(folder) -> str:
    """Return the names of a family's attention layers, or of all where none is called so."""
    paths = adaptable_layers(load_model(folder, device="cpu", dtype=torch.float32))
    attention = {path.rpartition(".")[2] for path in paths if "attn" in path or "attention" in path}
    return ",".join(sorted(attention or {path.rpartition(".")[2] for path in paths}))


def with_adapter(folder, config: Config, dtype: torch.dtype):
    model = load_model(folder, device="cpu", dtype=dtype)
    targets = tuple(config.lora_targets.split(","))
    attach_lora(model, rank=config.lora_rank, alpha=8, targets=targets, seed=0)
    return model


def kept_by_autograd(model, ids_BT) -> float:
    """Return the bytes of a token that the backward pass of a real forward pass needs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept = {}

    def _keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_keep, lambda tensor: tensor):
        final_hidden(model, ids_BT)
    return sum(count for count, _ in kept.values()) / ids_BT.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", CASES)
def test_what_is_counted_is_what_autograd_and_the_cache_keep(tmp_path, family, dtype):
    build(family, CASES[family], tmp_path)
    config = Config(lora_rank=4, lora_targets=attention_targets(tmp_path))
    counted = read_shape(tmp_path, config, dtype).passes
    model = with_adapter(tmp_path, config, dtype)
    ids_BT = torch.randint(3, 60, (ROWS, COLUMNS))
    assert counted.saved == pytest.approx(kept_by_autograd(model, ids_BT), rel=0.1)
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
    read: list[Any] = cache.layers
    column = sum(layer.keys.nbytes + layer.values.nbytes for layer in read)
    assert counted.column == column // ids_BT.numel()


@pytest.mark.parametrize("targets", ["q_proj", "q_proj,v_proj", "down_proj"])
def test_few_adapters_keep_less(lab_folder, targets):
    """A plan was up to 1.8 times the peak where --lora-targets named one layer."""
    config = Config(lora_rank=4, lora_targets=targets)
    every = read_shape(
        lab_folder, replace(config, lora_targets=Config().lora_targets), torch.float32
    )
    few = read_shape(lab_folder, config, torch.float32)
    measured = kept_by_autograd(
        with_adapter(lab_folder, config, torch.float32), torch.randint(3, 100, (2, 64))
    )
    assert few.passes.saved == pytest.approx(measured, rel=0.1)
    assert few.passes.saved < 0.9 * every.passes.saved


def test_a_config_json_that_changed_is_counted_anew(tmp_path):
    shapes = []
    for width in (160, 80):
        configure("llama", **{**SIZES, "intermediate_size": width}).save_pretrained(tmp_path)
        shapes.append(read_shape(tmp_path, Config(), torch.bfloat16))
    assert shapes[1].parameters < shapes[0].parameters
    assert shapes[1].passes.saved < shapes[0].passes.saved


def test_a_tensor_counts_once_and_until_it_is_gone():
    model = torch.nn.Linear(8, 8).requires_grad_(False)
    with Meter(model) as meter:
        made = model(torch.ones(16, 8))  # the ones, 512 bytes, go when they have been read
        view = made.T[1:]
        assert (meter.now, meter.peak) == (512, 1024)
        del made
        assert meter.now == 512, "the view holds it"
        del view
    assert (meter.now, meter.peak) == (0, 1024)


def test_the_cosine_of_the_clip_takes_what_the_plan_says():
    student_ND, teacher_ND, head_VD = torch.randn(768, 8), torch.randn(768, 8), torch.randn(512, 8)
    with Meter(torch.nn.Module()) as meter:
        given: Any = {"kind": "forward_kl", "clip_mode": "entry", "clip": 0.05}
        clip_products(student_ND, teacher_ND, head_VD, **given)
    assert meter.peak / (256 * 512) == pytest.approx(2 * 4 + 10 * 4, rel=0.1)
