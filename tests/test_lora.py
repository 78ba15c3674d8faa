"""parts/lora.py: the adapter, and the teacher's view of it."""

import copy

import pytest
import torch

from parts import lora as ours
from parts.identity import weights_fingerprint
from parts.model import final_hidden, head_weight, load_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attach(model, *, targets=TARGETS, seed=0, ema=False):
    return ours.attach_lora(model, rank=4, alpha=8, targets=targets, seed=seed, ema=ema)


def some_ids(rows=2):
    return torch.randint(0, 290, (rows, 7), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids_BT):
    logits_BTV = final_hidden(model, ids_BT) @ head_weight(model).T
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten()
    )


def train(lora, steps=1):
    optimiser = torch.optim.AdamW(lora.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(lora.model, some_ids()).backward()
        optimiser.step()


def logits_as(lora, kind):
    with ours.teacher_view(lora, kind):
        return lora.model(some_ids()).logits


def test_checkpointing_gives_the_adapter_the_same_gradients(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        lora = attach(
            load_model(
                tmp_path, device="cpu", dtype=torch.float32, gradient_checkpointing=checkpointing
            )
        )
        assert lora.model.model.layers[0].gradient_checkpointing is checkpointing
        train(lora)  # B = 0 would leave A without a gradient
        lora.model.train().zero_grad()
        loss = loss_of(lora.model, some_ids())
        # A teacher between forward and backward must not leak into the recomputation.
        logits_as(lora, "fixed")
        loss.backward()
        gradients.append([p.grad for p in lora.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_changes_no_bit(tiny_model, dtype):
    before = tiny_model.to(dtype)(some_ids()).logits
    attach(tiny_model)
    assert torch.equal(tiny_model(some_ids()).logits, before)


def test_seed_fixes_the_adapter_in_every_dtype(tiny_model):
    seeded = attach(copy.deepcopy(tiny_model), seed=3).state_dict()
    half = attach(copy.deepcopy(tiny_model).to(torch.bfloat16), seed=3).state_dict()
    assert seeded.keys() == half.keys() and all(
        torch.equal(seeded[name], half[name]) for name in seeded
    )
    A = seeded["current.model.layers.1.mlp.down_proj.lora_A"]
    assert not torch.equal(
        A, attach(tiny_model, seed=4).state_dict()["current.model.layers.1.mlp.down_proj.lora_A"]
    )
    assert 0.9 * 64**-0.5 < A.abs().max() <= 64**-0.5  # uniform within 1 / sqrt(in)


def test_a_16_bit_base_multiplies_16_bit_numbers_and_the_adapter_stays_fp32(tiny_model):
    lora = attach(tiny_model.to(torch.bfloat16))
    train(lora)
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    layer = lora.layers["model.layers.0.mlp.up_proj"]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    A, B = (tensor.to(torch.bfloat16).double() for tensor in (layer.lora_A, layer.lora_B))
    base, low = (x @ layer.weight.T).double(), (x.double() @ A.T).to(torch.bfloat16).double()
    # The sum of both products is fp32, and rounded once.
    assert torch.equal(layer(x), (base + 8 / 4 * low @ B.T).to(torch.bfloat16))
    layer(x).float().pow(2).sum().backward()
    slope = 2 * layer(x).double() * 8 / 4
    for found, exact in (
        (layer.lora_A.grad, (slope @ B).T @ x.double()),
        (layer.lora_B.grad, slope.T @ low),
    ):
        assert found is not None and found.dtype == torch.float32
        assert (found - exact).norm() < 2**-7 * exact.norm()


def test_targets_choose_the_layers_and_the_head_is_never_one(tiny_model):
    lora = attach(copy.deepcopy(tiny_model), targets=("q_proj", "mlp.up_proj"))
    assert sorted(lora.layers) == [
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.up_proj", "self_attn.q_proj")
    ]
    assert [id(p) for p in lora.parameters()] == [
        id(p) for p in lora.model.parameters() if p.requires_grad
    ]
    for target in ("query", "proj", "lm_head"):
        with pytest.raises(
            ValueError, match=r"are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$"
        ):
            attach(tiny_model, targets=("q_proj", target))


def test_training_leaves_every_base_weight_as_it_was(tiny_model):
    fingerprint = weights_fingerprint(dict(tiny_model.named_parameters()))
    train(attach(tiny_model), steps=2)
    base = {name: p for name, p in tiny_model.named_parameters() if "lora_" not in name}
    assert weights_fingerprint(base) == fingerprint
    assert all(p.grad is None and not p.requires_grad for p in base.values())


def test_fixed_teacher_is_the_base_bit_for_bit_while_current_moves(tiny_model):
    base = tiny_model(some_ids()).logits
    lora = attach(tiny_model)
    assert torch.equal(logits_as(lora, "fixed"), base)
    train(lora)
    assert torch.equal(logits_as(lora, "fixed"), base)
    assert torch.equal(logits_as(lora, "current"), tiny_model(some_ids()).logits)
    assert not torch.allclose(logits_as(lora, "current"), base, atol=1e-2)


def test_ema_teacher_is_the_closed_form_after_three_updates(tiny_model):
    lora, decay = attach(tiny_model, ema=True), 0.75
    history = [copy.deepcopy(lora.sets["current"])]
    for _ in range(3):
        train(lora)
        lora.update_ema(decay)
        history.append(copy.deepcopy(lora.sets["current"]))
    shares = [decay**3, decay**2 * (1 - decay), decay * (1 - decay), 1 - decay]
    for name, average in lora.sets["ema"].items():
        expected = sum(
            share * tensors[name].double() for share, tensors in zip(shares, history, strict=True)
        )
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    seen = logits_as(lora, "ema")
    lora.load_state_dict(
        {name: lora.state_dict()[name.replace("current.", "ema.")] for name in lora.state_dict()}
    )
    assert torch.equal(tiny_model(some_ids()).logits, seen)


def test_a_copied_teacher_is_renewed_every_so_many_steps_and_stays_between(tiny_model):
    lora = ours.attach_lora(tiny_model, rank=4, alpha=8, targets=TARGETS, seed=0, copy=True)
    assert lora.sets.keys() == {"fixed", "current", "copy"}
    seen = []
    for step in range(1, 5):
        train(lora)
        lora.update_teacher(step, decay=0.5, every=2)
        seen.append(torch.equal(logits_as(lora, "copy"), logits_as(lora, "current")))
    assert seen == [False, True, False, True]


def test_an_adapter_has_the_teachers_it_is_asked_for(tiny_model):
    lora = attach(tiny_model)
    assert lora.sets.keys() == {"fixed", "current"}
    lora.update_teacher(1, decay=0.5, every=1)  # and nothing follows it


@pytest.mark.parametrize("kind", ["fixed", "current", "ema"])
def test_view_is_eval_without_gradient_and_undone_after_an_exception(tiny_model, kind):
    lora = attach(tiny_model, ema=True)
    tiny_model.train()
    tiny_model.model.layers[1].eval()
    modes = [module.training for module in tiny_model.modules()]
    with pytest.raises(RuntimeError, match="inside"), ours.teacher_view(lora, kind):
        assert (
            not any(module.training for module in tiny_model.modules())
            and not torch.is_grad_enabled()
        )
        with ours.teacher_view(lora, "fixed"):
            pass
        assert all((layer.active is None) == (kind == "fixed") for layer in lora.layers.values())
        raise RuntimeError("inside")
    assert [module.training for module in tiny_model.modules()] == modes and torch.is_grad_enabled()
    assert all(layer.active == (layer.lora_A, layer.lora_B) for layer in lora.layers.values())


@pytest.mark.parametrize("kind", ["frozen", "ema"])
def test_teacher_that_is_not_there_lists_the_valid_ones(tiny_model, kind):
    with pytest.raises(ValueError, match="valid are fixed, current, and ema"):
        logits_as(attach(tiny_model), kind)


def test_state_restores_adapter_and_average_exactly(tiny_model):
    lora = attach(copy.deepcopy(tiny_model), ema=True)
    train(lora)
    lora.update_ema(0.5)
    other = attach(tiny_model, ema=True, seed=9)
    other.load_state_dict(lora.state_dict())
    assert all(torch.equal(logits_as(other, kind), logits_as(lora, kind)) for kind in lora.sets)


def test_a_copy_that_is_refreshed_leaves_the_moving_average_as_it_is(tiny_model):
    lora = ours.attach_lora(
        tiny_model, rank=4, alpha=8, targets=TARGETS, seed=0, ema=True, copy=True
    )
    with torch.no_grad():
        for tensor in lora.parameters():
            tensor.add_(1)
    lora.update_teacher(1, decay=1.0, every=1)
    name = next(iter(lora.sets["current"]))
    assert torch.equal(lora.sets["copy"][name], lora.sets["current"][name])
    torch.testing.assert_close(lora.sets["ema"][name], lora.sets["current"][name] - 1)
