"""Metrics against counts by hand, exact fractions and exact tail probabilities."""

import doctest
import json
import math
from dataclasses import asdict
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from parts import metrics
from parts.metrics import (
    Attempt,
    Graded,
    bootstrap,
    bootstrap_percentile,
    difference,
    harness_correct,
    majority_correct,
    mcnemar,
    mean_of_languages,
    paired_permutation,
    paired_tests,
    pass_at_k,
    read_graded,
    summarise,
)


def attempt(correct: bool, answer: str | None = "1", text: str = "", **fields) -> Attempt:
    """Return an attempt: a few tokens of Hausa that stop, with an answer in its canonical form."""
    plain = {
        "canonical": answer,
        "lenient": answer,
        "lenient_correct": correct,
        "reason": "right" if correct else "wrong",
        "tokens": 4,
        "finish_reason": "stop",
        "language": "hau",
        "seed": "0/0/0",
    }
    return Attempt(text, answer, correct=correct, **{**plain, **fields})


def graded(*attempts: Attempt, id: str = "a", level: str | None = None) -> Graded:
    return Graded(id, "hau", "?", "1", "f00", level, list(attempts))


def values(results: list[Graded], ks: list[int]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in summarise(results, ks).items()}


def test_doctests():
    result = doctest.testmod(metrics)
    assert result.failed == 0 and result.attempted >= 3


def test_every_metric_matches_a_count_by_hand():
    results = [
        graded(
            attempt(True, text="= 1"),
            attempt(
                False,
                None,
                lenient_correct=True,
                reason="no box",
                tokens=8,
                finish_reason="length",
                language="eng",
            ),
        ),
        graded(
            attempt(False, "2", text="1", language="unknown"),
            attempt(False, "?", canonical=None, reason="no single answer"),
        ),
    ]
    assert values(results, [1, 2]) == {
        "pass@1": 0.25,
        "pass@2": 0.5,
        "avg@2": 0.25,
        "maj@2": 0.5,
        "format rate": 0.75,
        "accuracy given a box": pytest.approx(1 / 3),
        "extraction failures": 0.25,
        "grader time-outs": 0.0,
        "lenient accuracy": 0.5,
        "lm-eval exact match": 0.5,
        "in the problem's language": 0.5,
        "in English": 0.25,
        "cut at the length limit": 0.25,
        "mean tokens": 5.0,
        "p95 tokens": pytest.approx(7.4),
    }


def test_a_grader_time_out_is_counted_as_its_own_verdict():
    slow = attempt(False, "x", canonical=None, reason="time-out")
    assert values([graded(slow, attempt(True))], [1])["grader time-outs"] == 0.5


def test_one_attempt_has_no_average_or_majority_of_its_own():
    assert {name for name in values([graded(attempt(True))], [1]) if "@" in name} == {"pass@1"}


def test_accuracy_given_a_box_is_nan_when_nothing_is_formatted():
    assert math.isnan(values([graded(attempt(False, None))], [1])["accuracy given a box"])


def test_the_majority_is_of_canonical_answers_and_ties_go_to_the_first():
    one = attempt(True, "1")
    two = attempt(False, "2")
    none = attempt(False, None)  # it does not vote
    assert majority_correct([two, one, one]) and not majority_correct([one, two, two])
    assert majority_correct([one, two]) and not majority_correct([two, one])
    assert majority_correct([none, none, none, one, two])
    assert not majority_correct([none, none])
    same = attempt(True, "1.0", canonical="1")  # written otherwise, the same vote
    assert majority_correct([two, one, two, same, same])
    # Right answers are equal also where their canonical texts are not, and a wrong one is not right
    # because its text is that of a right one: M is not m.
    root, product = (attempt(True, text) for text in (r"\\sqrt{12}", r"2\\sqrt{3}"))
    assert majority_correct([two, two, root, product, product])
    small, large = attempt(False, "m", canonical="m"), attempt(True, "M", canonical="m")
    assert not majority_correct([small, small, large])
    assert values([graded(two, one, one)], [1, 2, 3])["maj@2"] == 0.0  # of the first two attempts


def test_the_difficulty_weighted_accuracy_is_the_papers():
    right = {"low": 3, "medium": 2, "high": 1, "top": 1}  # of 4, but of 2 for top
    results = [
        graded(attempt(number < right[level]), level=level)
        for level in right
        for number in range(2 if level == "top" else 4)
    ]
    exact = (1 * Fraction(3, 4) + 2 * Fraction(2, 4) + 4 * Fraction(1, 4) + 8 * Fraction(1, 2)) / 15
    assert values(results, [1])["difficulty-weighted accuracy"] == pytest.approx(float(exact))
    assert "difficulty-weighted accuracy" not in values(results[:-2], [1])  # a level is missing


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        ("the answer is 18", "18", True),
        (r"so \boxed{18}.", "18", True),
        ("It costs $1,000.", "1000", True),
        ("<think>18", "18", True),  # ours: a think block that is not closed has no answer
        (r"\boxed{18} of 20 eggs", "18", False),
        ("18.0", "18", False),
        ("1.5", "15", True),
        ("-5", "5", True),
        ("it is 18. So ...", "18", False),  # the dots are its last "number"
        ("፲፰", "18", False),
        ("١٨", "18", False),
        ("7/2", "2", True),
        ("none", "18", False),
        ("8", "8.0", True),  # MSVAMP's golds
    ],
)
def test_the_harness_score_has_its_quirks(completion, gold, verdict):
    assert harness_correct(completion, gold) == verdict


def test_a_problem_comes_back_from_its_line_as_it_was():
    result = graded(attempt(True, text="a\u2028b"), attempt(False, None), level="top")
    assert read_graded(json.loads(json.dumps(asdict(result)))) == result


def test_the_mean_over_languages_resamples_parallel_problems_together():
    right = [1.0] * 30 + [0.0] * 70
    wrong = [1.0 - value for value in right]
    every = [1.0] * 100
    mean = mean_of_languages([(right, every), (wrong, every)])
    # Whatever is drawn, one of the two is right.
    assert mean.value == mean.low == mean.high == pytest.approx(0.5)
    assert mean_of_languages([(right, every)]) == bootstrap(right, every)
    uneven = mean_of_languages([(right, every), ([1.0] * 50, [1.0] * 50)])
    assert uneven.value == pytest.approx(0.65)


def test_a_language_without_a_ratio_is_left_out_of_the_mean():
    right = ([1.0] * 3 + [0.0] * 7, [1.0] * 10)
    no_box = ([0.0] * 10, [0.0] * 10)
    assert mean_of_languages([right, no_box, right]) == bootstrap(*right)
    assert math.isnan(mean_of_languages([no_box]).value)


def test_the_interval_of_a_percentile_lies_around_it():
    lengths = [[length, length + 100] for length in range(1, 101)]
    estimate = bootstrap_percentile(lengths, 95)
    assert estimate.value == pytest.approx(
        float(np.percentile([n for row in lengths for n in row], 95))
    )
    assert estimate.low < estimate.value < estimate.high <= 200


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                right = [index < c for index in range(n)]
                subsets = list(combinations(right, k))
                exact = Fraction(sum(any(subset) for subset in subsets), len(subsets))
                assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_stays_a_number_for_many_samples():
    assert 0 < pass_at_k(20000, 1, 10000) < 1


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="0 <= c <= n"):
        pass_at_k(n, c, k)


def test_bootstrap_interval_covers_the_binomial_one_and_is_seeded():
    values = [1.0] * 100 + [0.0] * 150
    estimate = bootstrap(values, [1.0] * 250, seed=3)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 250)
    assert estimate.value == pytest.approx(0.4)
    assert estimate.low == pytest.approx(0.4 - half, abs=0.012)
    assert estimate.high == pytest.approx(0.4 + half, abs=0.012)
    assert bootstrap(values, [1.0] * 250, seed=3) == estimate


@pytest.mark.parametrize("share", [1 / 3, 5 / 12, 0.1, 0.7])
@pytest.mark.parametrize("problems", [10, 50, 250])
def test_a_value_lies_in_its_interval_where_all_problems_have_the_same_share(share, problems):
    """Rounding put an end beyond it by 1e-16, and no figure was drawn of a negative error bar."""
    found = bootstrap([share] * problems, [1.0] * problems)
    assert found.low <= found.value <= found.high
    assert found.low == pytest.approx(share) and found.high == pytest.approx(share)


def test_bootstrap_pairs_numerators_with_their_denominators():
    # A problem of 1 token in 100 and one of 99 in 100: every resample's ratio lies between theirs.
    estimate = bootstrap([1.0, 99.0], [100.0, 100.0])
    assert estimate == metrics.Estimate(0.5, 0.01, 0.99)


def test_a_difference_is_second_minus_first_problem_by_problem():
    estimate = difference([0.0, 0.5, 1.0], [0.25, 0.75, 1.25])
    assert estimate == metrics.Estimate(0.25, 0.25, 0.25)  # the problems' own spread cancels
    with pytest.raises(ValueError):
        difference([0.0], [0.0, 1.0])


def test_the_permutation_test_enumerates_every_sign_pattern_of_few_problems():
    first = [0.0, 0.25, 1.0, 0.5, 0.5]
    second = [0.75, 0.75, 0.875, 1.0, 0.5]
    changes = [b - a for a, b in zip(first, second, strict=True)]
    sums = [
        abs(sum(s * d for s, d in zip(signs, changes, strict=True)))
        for signs in product((1, -1), repeat=5)
    ]
    exact = sum(total >= abs(sum(changes)) for total in sums) / len(sums)
    assert paired_permutation(first, second) == paired_permutation(second, first) == exact == 0.25
    assert paired_permutation(first, first) == paired_permutation([], []) == 1.0


def test_the_permutation_test_of_many_problems_is_near_the_exact_value_seeded_and_never_zero():
    # 40 differences of +1 and 20 of -1: the sum is 20, and P(|S| >= 20) is a binomial tail,
    # McNemar's.
    first = [0.0] * 40 + [1.0] * 20
    second = [1.0] * 40 + [0.0] * 20
    exact = 2 * sum(math.comb(60, i) for i in range(21)) / 2**60
    drawn = paired_permutation(first, second, seed=1)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / metrics.FLIPS))
    assert drawn == paired_permutation(first, second, seed=1)
    assert drawn != paired_permutation(first, second, seed=2)
    assert paired_permutation([0.0] * 60, [1.0] * 60) == 1 / (1 + metrics.FLIPS)


def test_the_tests_keep_their_level_when_nothing_differs():
    random = np.random.default_rng(5)
    pairs = [random.integers(2, size=(2, 40)) for _ in range(200)]
    rejected = sum(mcnemar(list(a > 0), list(b > 0)) < 0.05 for a, b in pairs)
    assert rejected <= 18  # 5 % of 200, and 2.6 sigma


def test_mcnemar_is_the_exact_binomial_over_the_problems_that_only_one_got_right():
    first = [True] * 10 + [False] * 12 + [True] * 3
    second = [True] * 10 + [True] * 12 + [False] * 3
    exact = 2 * (1 + 15 + 105 + 455) / 2**15
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(exact)
    assert mcnemar(first, first) == mcnemar([True, False], [False, True]) == 1.0


def test_two_evaluations_are_compared_problem_by_problem():
    yes = attempt(True)
    no = attempt(False, "2")
    first = [graded(no, no, yes)] * 4 + [graded(yes, yes, no)]
    second = [graded(yes, yes, no)] * 5
    change, permuted, exact = paired_tests(first, second)
    assert change == difference([1 / 3] * 4 + [2 / 3], [2 / 3] * 5)
    assert change.value == pytest.approx(4 / 15)
    assert permuted == paired_permutation([1 / 3] * 4, [2 / 3] * 4) == 2 / 2**4
    assert exact == mcnemar([False] * 4, [True] * 4)


def test_an_interval_of_a_percentile_is_of_seed_0_unless_said():
    values = [[number * number * 37 % 1009, number * 91 % 997] for number in range(40)]
    said = [bootstrap_percentile(values, 50, **seed) for seed in ({}, {"seed": 0})]
    assert said[0] == said[1]
    assert bootstrap_percentile(values, 50, seed=1) != said[0]
