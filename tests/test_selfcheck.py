"""parts/selfcheck.py: a model that would be sampled or scored wrongly is refused, with figures."""

import copy
from typing import cast

import pytest
import torch
from test_batch import let_it_record
from torch import Tensor
from transformers import Qwen2ForCausalLM

from parts import batch
from parts.model import load_model
from parts.selfcheck import check_model


def test_a_model_that_is_read_rightly_passes_and_keeps_its_modes(tiny_model):
    tiny_model.train()
    tiny_model.model.layers[1].eval()
    modes = [module.training for module in tiny_model.modules()]
    state = torch.get_rng_state()
    check_model(tiny_model, "the model")
    assert [module.training for module in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    check_model(tiny_model.to(torch.bfloat16), "the model")


def test_the_check_asks_a_recorded_step_too(tiny_model, monkeypatch):
    """On a GPU nearly all tokens come of recorded steps, and the check had seen none of them."""
    recorded = []

    def record(recorder, step):
        recorded.append(step)
        return step

    let_it_record(monkeypatch)
    monkeypatch.setattr(batch, "BUCKET_COLUMNS", {"cpu": 64})
    monkeypatch.setattr(batch.Recorder, "record", record)
    check_model(tiny_model, "the model")
    assert len(recorded) == 3  # of two rows alone, and of the two beside each other


def test_a_model_beyond_float16s_range_is_told_the_dtypes_that_hold_it(tiny_model, tmp_path):
    """Both messages spoke of a model, or weights, that are wrong."""
    with torch.no_grad():
        tiny_model.model.norm.weight *= 1e4
        check_model(tiny_model, "the model")
        said = "leave float16's range; valid: --dtype float32 or bfloat16$"
        with pytest.raises(ValueError, match=said) as error:
            check_model(copy.deepcopy(tiny_model).half(), "the model")
        assert "\n" not in str(error.value)
        tiny_model.model.norm.weight *= 1e4
    tiny_model.save_pretrained(tmp_path)
    load_model(tmp_path, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="if they leave float16's range: --dtype float32"):
        load_model(tmp_path, device="cpu", dtype=torch.float16)


class Scaled(Qwen2ForCausalLM):
    """A family whose head scales, by a number that no configuration names."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = cast(Tensor, output.logits) * 1.1
        return output


def add_noise(model):
    def _noise(module, inputs, output):
        return output + 0.1 * torch.randn_like(output) if module.training else output

    model.model.norm.register_forward_hook(_noise)


def forget_positions(model):
    def _drop(module, args, kwargs):
        return args, {**kwargs, "position_ids": None}

    model.get_decoder().register_forward_pre_hook(_drop, with_kwargs=True)


def see_the_whole_batch(model):
    def _mix(module, inputs, output):
        return output + 0.3 * output.mean(dim=0, keepdim=True)

    model.model.layers[0].mlp.register_forward_hook(_mix)


def see_from_first_to_last(model):
    """Let a model read of a mask where a row begins and ends, and nothing in between."""

    def _fill(module, inputs, given):
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            seen = mask[:, 0] == 0
            columns = torch.arange(mask.shape[-1])
            first = seen.int().argmax(-1, keepdim=True)
            last = mask.shape[-1] - 1 - seen.flip(-1).int().argmax(-1, keepdim=True)
            between = (columns >= first) & (columns <= last)
            given["attention_mask"] = batch.additive_mask(~between[:, None], mask.dtype)
        return inputs, given

    model.model.register_forward_pre_hook(_fill, with_kwargs=True)


def fail(model):
    def _fail(module, inputs, output):
        raise KeyError("no\nkey")

    model.model.norm.register_forward_hook(_fail)


def scale(model):
    model.__class__ = Scaled


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (scale, "hidden states times the head and the model's own logits differ by"),
        (add_noise, "differ by"),
        (forget_positions, "a row sampled beside another and of a plain pass differ by"),
        (see_the_whole_batch, "differ by"),
        (see_from_first_to_last, "packed behind another and of a plain pass differ by"),
        (fail, "its code fails with KeyError"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_is_read_wrongly_is_refused_in_one_line(tiny_model, harm, message, dtype):
    model = tiny_model.to(dtype)
    harm(model)
    with pytest.raises(ValueError, match=message) as error:
        check_model(model, "model M")
    text = str(error.value)
    assert text.startswith("model M (qwen2) cannot be used: ") and "\n" not in text
