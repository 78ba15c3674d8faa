"""parts/weights.py: how much each token counts, by hand and by what must not change."""

import math

import pytest
import torch

from parts.recipe import Config
from parts.weights import by_position, confidence, credit, mean_one, token_weights

ENTROPY_N = torch.tensor([0.0, 2.0, 0.5, 1.0, 0.0, 3.0, 0.2])
LENGTHS = [4, 3]


def weights(**given) -> torch.Tensor | None:
    return token_weights(Config(**given), {"teacher_entropy_N": ENTROPY_N}, LENGTHS)


def test_tokens_that_count_alike_have_no_weights():
    assert weights() is None


@pytest.mark.parametrize(
    "given",
    [
        {"token_weight": "confidence"},
        {"token_weight": "confidence", "gate_lookahead": 2, "gate_floor": 0.3},
        {"token_weight": "position"},
        {"loss_prefix": 0.3},
        {"token_weight": "confidence", "loss_prefix": 0.5},
    ],
)
def test_the_weights_of_every_completion_have_the_mean_1_and_none_is_below_0(given):
    weight_N = weights(**given)
    assert weight_N is not None and weight_N.min() >= 0
    for weight_C in weight_N.split(LENGTHS):
        assert weight_C.mean().item() == pytest.approx(1, abs=1e-6)
    assert len(weight_N.unique()) > 1


def test_the_gate_by_hand():
    weight_C = confidence(ENTROPY_N[:4], scale=2.0, floor=0.5, lookahead=0)
    expected = [max(0.5, math.exp(-entropy / 2)) for entropy in (0.0, 2.0, 0.5, 1.0)]
    assert weight_C.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3, 50])
def test_the_look_ahead_takes_the_least_entropy_of_the_next_tokens_of_the_same_completion(
    lookahead,
):
    weight_C = confidence(ENTROPY_N, scale=1.0, floor=1e-9, lookahead=lookahead)
    entropies = ENTROPY_N.tolist()
    least = [min(entropies[place : place + lookahead + 1]) for place in range(len(entropies))]
    assert weight_C.tolist() == pytest.approx([math.exp(-entropy) for entropy in least])
    # Rows do not look into the next row.
    both_N = weights(token_weight="confidence", gate_lookahead=lookahead)
    (first_N,) = (
        token_weights(
            Config(token_weight="confidence", gate_lookahead=lookahead),
            {"teacher_entropy_N": ENTROPY_N[:4]},
            [4],
        ),
    )
    assert both_N is not None and first_N is not None and torch.equal(both_N[:4], first_N)


def test_a_teacher_that_is_equally_sure_of_all_tokens_weighs_each_exactly_1():
    same_N = torch.full((7,), 0.7)
    weight_N = token_weights(
        Config(token_weight="confidence"), {"teacher_entropy_N": same_N}, LENGTHS
    )
    assert weight_N is not None and torch.equal(weight_N, torch.ones(7))
    assert torch.equal(mean_one(torch.full((13,), 0.3)), torch.ones(13))


def test_a_prefix_keeps_the_first_share_of_each_completion_and_at_least_a_token():
    weight_N = weights(loss_prefix=0.3)
    assert weight_N is not None
    assert weight_N.tolist() == pytest.approx([2.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0])
    short_N = token_weights(Config(loss_prefix=0.01), {"teacher_entropy_N": ENTROPY_N[:3]}, [1, 2])
    assert short_N is not None and short_N.tolist() == [1.0, 2.0, 0.0]
    # So small a share was rounded to no token at all, and the mean of none is nan.
    least_N = token_weights(Config(loss_prefix=1e-10), {"teacher_entropy_N": torch.ones(3)}, [1, 2])
    assert least_N is not None and least_N.tolist() == [1.0, 2.0, 0.0]
    # As floats, 0.07 times 100 is above 7.
    long_N = token_weights(Config(loss_prefix=0.07), {"teacher_entropy_N": torch.ones(100)}, [100])
    assert long_N is not None and int((long_N > 0).sum()) == 7


def test_weights_by_position_fall_to_the_end():
    weight_C = by_position(5)
    assert weight_C.tolist() == pytest.approx([1.8, 1.4, 1.0, 0.6, 0.2])


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [0.0, 0.2, 0.99])
def test_credit_never_flips_a_rewards_sign_and_stays_within_its_clip(mix, clip):
    generator = torch.Generator().manual_seed(0)
    advantage_N = torch.randn(1000, generator=generator)
    advantage_N[:10] = 0
    log_ratio_N = 30 * torch.randn(1000, generator=generator)
    factor_N = credit(advantage_N, log_ratio_N, mix=mix, clip=clip)
    assert factor_N.min() > 0 and (factor_N - 1).abs().max() <= mix * clip + 1e-6
    assert torch.equal((advantage_N * factor_N).sign(), advantage_N.sign())
    if mix == 0 or clip == 0:
        assert torch.equal(factor_N, torch.ones(1000))


@pytest.mark.parametrize("log_ratio", [1e4, -1e4, math.inf, -math.inf])
def test_credit_stands_any_gap_between_teacher_and_student(log_ratio):
    """Of an advantage of 0, where no sign is to be had, an infinite gap made nan."""
    advantage_N = torch.tensor([2.0, -2.0, 0.0])
    factor_N = credit(advantage_N, torch.full((3,), log_ratio), mix=0.5, clip=0.2)
    agrees = 0.1 if log_ratio > 0 else -0.1
    assert factor_N.tolist() == pytest.approx([1 + agrees, 1 - agrees, 1.0])
    assert torch.equal((advantage_N * factor_N).sign(), advantage_N.sign())


def test_credit_is_the_formula_of_rlsd():
    advantage_N = torch.tensor([0.5, 0.5, -2.0, -2.0])
    log_ratio_N = torch.tensor([0.1, -0.05, 0.1, -0.05])
    ratio_N = (advantage_N.sign() * log_ratio_N).exp().clamp(0.8, 1.2)
    factor_N = credit(advantage_N, log_ratio_N, mix=0.4, clip=0.2)
    torch.testing.assert_close(factor_N, (1 - 0.4) + 0.4 * ratio_N)


def test_a_teacher_that_agrees_with_the_student_leaves_every_advantage_as_it_is():
    advantage_N = torch.tensor([0.5, -2.0, 0.0])
    factor_N = credit(advantage_N, torch.zeros(3), mix=0.5, clip=0.2)
    assert torch.equal(factor_N, torch.ones(3))
