"""float16: small gradients are not lost, a scale that is too large falls, and resume is exact."""

import pytest
import torch
from conftest import die_at
from test_copsd import QUIET, jsonl, make_setup, nudge, read_by_teacher, timeless, train

import copsd
from copsd import copsd_loss, roll_out
from parts import lossscale
from parts.lossscale import FACTOR, GOOD_UPDATES, LossScale
from parts.view import StepView


def test_the_scale_falls_to_one_and_grows_after_good_updates_in_a_row(monkeypatch):
    monkeypatch.setattr(lossscale, "GROWTH", 2)
    scale = LossScale(4.0, moves=True)
    factors = []
    for finite in (True, False, True, True, False, False, False, True, False):
        scale.adapt(finite, losses_finite=True)
        factors.append((scale.factor, scale.good_updates, scale.fell))
    assert factors == [
        (4.0, 1, False),
        (2.0, 0, True),
        (2.0, 1, False),
        (4.0, 0, False),
        (2.0, 0, True),
        (1.0, 0, True),
        (1.0, 0, False),  # at 1 the scale is not to blame
        (1.0, 1, False),
        (1.0, 0, False),  # and good updates are no longer in a row
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_have_no_scale(dtype):
    scale = LossScale.of(dtype)
    x = torch.tensor(3.0, requires_grad=True)
    scale.backward(x * x)
    scale.unscale([x])
    for finite in (False, True):
        scale.adapt(finite, losses_finite=True)
    assert x.grad == 6.0
    assert scale == LossScale(1.0, 0) and scale.metrics() == {}


def test_gradients_too_small_for_float16_are_kept_by_the_scale(tmp_path):
    gradients = {}
    for name in ("float32", "float16", "unscaled"):
        dtype = "float32" if name == "float32" else "float16"
        setup, _ = make_setup(tmp_path / name, dtype=dtype, clip_mode="none")
        nudge(setup)
        problems = setup.train[:4]
        if name == "float32":
            rollouts = roll_out(setup, problems, seed=0)
        scale = LossScale() if name == "unscaled" else setup.loss_scale
        assert scale.factor == (2.0**16 if name == "float16" else 1.0)
        loss_N, _ = copsd_loss(setup, read_by_teacher(setup, problems), rollouts)
        scale.backward(loss_N.sum() / 1e7)  # as in a step of ten million tokens
        scale.unscale(setup.lora.parameters())
        gradients[name] = torch.cat(
            [t.grad.flatten() for t in setup.lora.parameters() if t.grad is not None]
        )
    exact = gradients["float32"]
    apart = {name: ((found - exact).norm() / exact.norm()) for name, found in gradients.items()}
    assert apart["float16"] < 0.05 < 0.5 < apart["unscaled"]


def test_a_run_in_float16_learns_what_one_in_float32_learns(tmp_path):
    # On labels, for rounding may let another token be drawn.
    given = {"batch_size": 8, "clip_mode": "none", "completion": "reference"}
    rows = jsonl(train(tmp_path / "a", dtype="float16", **given) / "metrics.jsonl")
    others = jsonl(train(tmp_path / "b", **given) / "metrics.jsonl")
    assert [row[FACTOR] for row in rows] == [2.0**16] * 2
    assert [row[GOOD_UPDATES] for row in rows] == [1, 2]
    assert all(FACTOR not in row for row in others), "float32 has no scale"
    for name in ("loss/objective_nats_per_token", "update/grad_norm"):
        assert rows[0][name] == pytest.approx(others[0][name], rel=0.05)


def test_a_stopped_run_in_float16_ends_as_one_that_was_not(tmp_path, monkeypatch):
    # As if all above 2**12 overflowed: the scale falls twice, then grows at every second update.
    monkeypatch.setattr(lossscale, "FIRST", 2.0**14)
    monkeypatch.setattr(lossscale, "GROWTH", 2)
    real = LossScale.backward
    monkeypatch.setattr(
        LossScale,
        "backward",
        lambda scale, loss: (
            real(scale, loss) if scale.factor <= 2.0**12 else (loss * torch.inf).backward()
        ),
    )
    given = {"dtype": "float16", "steps": 7, "save_every": 2, "batch_size": 2}
    straight = train(tmp_path / "a", **given)
    setup, run = make_setup(tmp_path / "b", **given)
    view = StepView(QUIET, 7)
    die_at(6, view, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        copsd.train_copsd(setup, run, view)
    resumed = train(tmp_path / "b", **given)
    rows = jsonl(straight / "metrics.jsonl")
    assert [row[FACTOR] / 2.0**12 for row in rows] == [2, 1, 1, 2, 1, 1, 2]
    assert [row[GOOD_UPDATES] for row in rows] == [0, 0, 1, 0, 0, 1, 0]
    assert timeless(rows) == timeless(jsonl(resumed / "metrics.jsonl"))
    for name in ("adapters/step_00007/adapter_model.safetensors", "resume/step_00007.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


def test_updates_dropped_while_the_scale_falls_do_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lossscale, "FIRST", 2.0**60)
    setup, run = make_setup(tmp_path, dtype="float16", steps=5, batch_size=2)
    start = [tensor.clone() for tensor in setup.lora.parameters()]
    copsd.train_copsd(setup, run, StepView(QUIET, 5))
    rows = jsonl(run.folder / "metrics.jsonl")
    assert [row[FACTOR] / 2.0**55 for row in rows] == [16, 8, 4, 2, 1]
    assert [row["update/skipped_in_a_row"] for row in rows] == [0] * 5
    now = setup.lora.parameters()
    assert all(torch.equal(one, other) for one, other in zip(start, now, strict=True))


def test_a_loss_that_is_not_finite_is_not_the_scales_fault_and_ends_the_run(tmp_path, monkeypatch):
    real = copsd.reduce_loss
    monkeypatch.setattr(copsd, "reduce_loss", lambda *a, **k: real(*a, **k) * torch.nan)
    setup, run = make_setup(tmp_path, dtype="float16", steps=5, batch_size=2)
    with pytest.raises(FloatingPointError, match="no finite gradient in 3 updates"):
        copsd.train_copsd(setup, run, StepView(QUIET, 5))
    assert setup.loss_scale.factor == 2.0**16
