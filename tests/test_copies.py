"""parts/copies.py: layers multiply by merged and packed copies, and afterwards all is as before."""

import pytest
import torch
from torch import nn

from parts import copies
from parts.copies import can_pack, sampling_copies, scoring_copies
from parts.lora import Lora, LoRALinear, attach_lora, teacher_view
from parts.model import final_hidden

IDS_BT = torch.arange(12).view(2, 6)


@pytest.fixture
def lora(tiny_model) -> Lora:
    """Return an adapter of tiny_model that changes what it says."""
    lora = attach_lora(tiny_model, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), seed=0)
    for index, tensor in enumerate(lora.parameters()):
        nn.init.normal_(tensor, std=0.1, generator=torch.Generator().manual_seed(index))
    return lora


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packs(request, monkeypatch) -> bool:
    """Let weights be packed, however few they are, or not."""
    monkeypatch.setattr(copies, "PACKED_BYTES", 0 if request.param else 2**60)
    if request.param and not can_pack(0, torch.device("cpu"), torch.float32):
        pytest.skip("needs oneDNN and a processor with AVX")
    return request.param


def linear_layers(model) -> list[nn.Linear | LoRALinear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | LoRALinear)]


def with_copies(model, copies_of=sampling_copies) -> int:
    """Return how many layers multiply by a copy within the block."""
    with copies_of(model):
        return sum("forward" in vars(layer) for layer in linear_layers(model))


@torch.no_grad()
def test_copies_say_what_the_layers_say_to_rounding_and_leave_no_trace(tiny_model, lora, packs):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    plain = tiny_model(IDS_BT).logits
    with sampling_copies(tiny_model):
        copied = tiny_model(IDS_BT).logits
    torch.testing.assert_close(copied, plain, atol=1e-5, rtol=1e-5)
    assert not torch.equal(copied, plain)
    assert torch.equal(tiny_model(IDS_BT).logits, plain)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(RuntimeError, match="inside"), sampling_copies(tiny_model):
        raise RuntimeError("inside")
    assert not any("forward" in vars(layer) for layer in linear_layers(tiny_model))


@torch.no_grad()
def test_the_adapter_that_is_switched_on_is_the_one_in_the_copies(tiny_model, lora, packs):
    for kind in ("fixed", "current"):
        with teacher_view(lora, kind):
            plain = final_hidden(tiny_model, IDS_BT)
            with sampling_copies(tiny_model):
                copied = final_hidden(tiny_model, IDS_BT)
        torch.testing.assert_close(copied, plain, atol=1e-5, rtol=1e-5)


def test_a_product_has_the_layers_bias_and_takes_any_number_of_dimensions(packs):
    layer = nn.Linear(5, 3)
    product = copies.packed_product if packs else copies.plain_product
    multiply = product(layer.weight.detach(), layer.bias.detach())
    for shape in ((5,), (4, 5), (2, 4, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(multiply(x), layer(x).detach())


@torch.no_grad()
def test_what_is_packed_is_what_the_layers_multiply_by(tiny_model, lora, packs, monkeypatch):
    made = []
    for name in ("packed_product", "plain_product"):
        plain = getattr(copies, name)
        monkeypatch.setattr(
            copies, name, lambda *given, name=name, plain=plain: made.append(name) or plain(*given)
        )
    count = with_copies(tiny_model)
    assert made == ["packed_product" if packs else "plain_product"] * count and count > 0


@pytest.mark.parametrize(
    ("device", "dtype", "instructions", "packed"),
    [
        ("cpu", torch.float32, "AVX2", True),
        ("cpu", torch.float32, "AVX512", True),
        ("cpu", torch.float32, "DEFAULT", False),
        ("cpu", torch.bfloat16, "AVX512", True),
        ("cpu", torch.bfloat16, "AVX2", False),
        ("cpu", torch.float16, "AVX512", False),
        ("cuda", torch.float32, "AVX512", False),
        ("cuda", torch.bfloat16, "AVX512", False),
    ],
)
def test_weights_are_packed_on_a_cpu_that_multiplies_their_numbers(
    monkeypatch, device, dtype, instructions, packed
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    has_bf16 = instructions == "AVX512"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    least = copies.PACKED_BYTES
    assert can_pack(least, torch.device(device), dtype) is packed
    assert can_pack(least - 1, torch.device(device), dtype) is False
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert can_pack(least, torch.device(device), dtype) is False


def test_weights_are_copied_in_fp32_only_and_where_they_fit(tiny_model, lora, packs, monkeypatch):
    layers = linear_layers(tiny_model) if packs else list(lora.layers.values())
    assert with_copies(tiny_model) == len(layers)
    with teacher_view(lora, "fixed"):  # the base, which is packed and has nothing to merge
        assert with_copies(tiny_model) == (len(layers) if packs else 0)
    for fitting in (layers, list(lora.layers.values())):
        needed = sum(layer.weight.nbytes for layer in fitting)
        monkeypatch.setattr(copies, "COPIES_BYTES", needed)
        assert with_copies(tiny_model) == len(fitting)
    monkeypatch.setattr(copies, "COPIES_BYTES", needed - 1)
    assert with_copies(tiny_model) == 0
    monkeypatch.setattr(copies, "COPIES_BYTES", 2**31)
    first = next(iter(lora.layers.values()))
    first.weight.data = first.weight.data.bfloat16()
    assert with_copies(tiny_model) == 0


@torch.no_grad()
def test_in_16_bits_the_adapter_is_rounded_once_and_nothing_changes(tiny_model, lora):
    tiny_model.bfloat16()
    for tensor in lora.parameters():
        tensor.data = tensor.data.float()  # bfloat16() reaches the adapter, too
        nn.init.normal_(tensor, std=0.1)
    plain = tiny_model(IDS_BT).logits
    with sampling_copies(tiny_model):
        assert torch.equal(tiny_model(IDS_BT).logits, plain)
        assert all("forward" in vars(layer) for layer in lora.layers.values())
        for tensor in lora.parameters():
            tensor.zero_()  # which the copies do not see
        assert torch.equal(tiny_model(IDS_BT).logits, plain)
    assert not torch.equal(tiny_model(IDS_BT).logits, plain)
    assert with_copies(tiny_model, scoring_copies) == 0
    with teacher_view(lora, "fixed"):
        assert with_copies(tiny_model) == 0


@torch.no_grad()
def test_in_bf16_the_rows_of_A_stand_below_those_of_W(tiny_model, lora, monkeypatch):
    monkeypatch.setattr(copies, "PACKED_BYTES", 0)
    if not can_pack(0, torch.device("cpu"), torch.bfloat16):
        pytest.skip("needs oneDNN and a processor that multiplies bf16")
    tiny_model.bfloat16()
    for tensor in lora.parameters():
        tensor.data = tensor.data.float()  # bfloat16() reaches the adapter, too
        nn.init.normal_(tensor, std=0.1)
    rounded = {layer: copies.rounded_product(layer) for layer in lora.layers.values()}
    with sampling_copies(tiny_model):
        for layer, product in rounded.items():
            x = torch.randn(3, 2, layer.weight.shape[1], dtype=torch.bfloat16)
            assert layer.forward(x).shape == (3, 2, len(layer.weight))
            torch.testing.assert_close(layer.forward(x), product(x), atol=2**-6, rtol=2**-6)
    assert with_copies(tiny_model, scoring_copies) == 0
    with teacher_view(lora, "fixed"):
        assert with_copies(tiny_model) == len(linear_layers(tiny_model))


def test_a_stacked_product_has_the_layers_bias():
    if not can_pack(copies.PACKED_BYTES, torch.device("cpu"), torch.bfloat16):
        pytest.skip("needs oneDNN and a processor that multiplies bf16")
    base = nn.Linear(8, 5).bfloat16()
    layer = LoRALinear(base, rank=2, alpha=6.0, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = base(x) + 3 * x.float() @ (layer.lora_B @ layer.lora_A).T
        stacked = copies.stacked_product(layer)(x).float()
    torch.testing.assert_close(stacked, expected, atol=0.1, rtol=0.05)


def test_one_pass_of_the_teacher_multiplies_by_packed_copies_or_none(tiny_model, lora, packs):
    layers = linear_layers(tiny_model)
    for kind in ("fixed", "current"):
        with teacher_view(lora, kind):
            assert with_copies(tiny_model, scoring_copies) == (len(layers) if packs else 0)
