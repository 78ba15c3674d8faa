"""The evaluator: estimates that match their definitions, and one-line errors."""

import io
import math
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import eval as evaluation
from eval import (
    Attempt,
    Graded,
    bootstrap,
    check_answers,
    difference,
    keep_fitting,
    mcnemar,
    paired_permutation,
    pass_at_k,
    summarise,
)
from parts.data import Problem


def attempt(correct: bool, answer: str | None = "1", tokens: int = 4, finish: str = "stop") -> Attempt:
    return Attempt("text", answer, correct, tokens, finish)


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


def test_summary_matches_a_count_by_hand():
    results = [
        Graded("a", "1", [attempt(True), attempt(False, None, tokens=8, finish="length")]),
        Graded("b", "1", [attempt(False, "2"), attempt(False, "3")]),
    ]
    summary = {name: estimate.value for name, estimate in summarise(results, [1, 2]).items()}
    assert summary == {
        "pass@1": 0.25, "pass@2": 0.5, "format rate": 0.75, "accuracy given a box": pytest.approx(1 / 3),
        "cut at the length limit": 0.25, "mean tokens": 5.0,
    }  # fmt: skip


def test_accuracy_given_a_box_is_nan_when_nothing_is_formatted():
    summary = summarise([Graded("a", "1", [attempt(False, None)])], [1])
    assert math.isnan(summary["accuracy given a box"].value)


def test_bootstrap_interval_covers_the_binomial_one_and_is_seeded():
    values = [1.0] * 100 + [0.0] * 150
    estimate = bootstrap(values, [1.0] * 250, seed=3)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 250)
    assert estimate.value == pytest.approx(0.4)
    assert estimate.low == pytest.approx(0.4 - half, abs=0.012)
    assert estimate.high == pytest.approx(0.4 + half, abs=0.012)
    assert bootstrap(values, [1.0] * 250, seed=3) == estimate


def test_bootstrap_pairs_numerators_with_their_denominators():
    # A problem of 1 token in 100 and one of 99 in 100: every resample's ratio lies between theirs.
    estimate = bootstrap([1.0, 99.0], [100.0, 100.0])
    assert (estimate.low, estimate.value, estimate.high) == (0.01, 0.5, 0.99)


def test_a_difference_is_second_minus_first_problem_by_problem():
    estimate = difference([0.0, 0.5, 1.0], [0.25, 0.75, 1.25])
    assert (estimate.value, estimate.low, estimate.high) == (0.25, 0.25, 0.25)  # the problems' own spread cancels
    with pytest.raises(ValueError):
        difference([0.0], [0.0, 1.0])


def test_the_permutation_test_enumerates_every_sign_pattern_of_few_problems():
    first, second = [0.0, 0.25, 1.0, 0.5, 0.5], [0.75, 0.75, 0.875, 1.0, 0.5]
    changes = [b - a for a, b in zip(first, second, strict=True)]
    sums = [abs(sum(s * d for s, d in zip(signs, changes, strict=True))) for signs in product((1, -1), repeat=5)]
    exact = sum(total >= abs(sum(changes)) for total in sums) / len(sums)
    assert paired_permutation(first, second) == paired_permutation(second, first) == exact == 0.25
    assert paired_permutation(first, first) == paired_permutation([], []) == 1.0


def test_the_permutation_test_of_many_problems_is_near_the_exact_value_seeded_and_never_zero():
    # 40 differences of +1 and 20 of -1: the sum is 20, and P(|S| >= 20) is a binomial tail, McNemar's.
    first, second = [0.0] * 40 + [1.0] * 20, [1.0] * 40 + [0.0] * 20
    exact = 2 * sum(math.comb(60, i) for i in range(21)) / 2**60
    drawn = paired_permutation(first, second, seed=1)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / evaluation.FLIPS))
    assert drawn == paired_permutation(first, second, seed=1) != paired_permutation(first, second, seed=2)
    assert paired_permutation([0.0] * 60, [1.0] * 60) == 1 / (1 + evaluation.FLIPS)


def test_the_tests_keep_their_level_when_nothing_differs():
    random = np.random.default_rng(5)
    pairs = [random.integers(2, size=(2, 40)) for _ in range(200)]
    assert sum(mcnemar(list(a > 0), list(b > 0)) < 0.05 for a, b in pairs) <= 18  # 5 % of 200, and 2.6 sigma


def test_mcnemar_is_the_exact_binomial_over_the_problems_that_only_one_got_right():
    first = [True] * 10 + [False] * 12 + [True] * 3
    second = [True] * 10 + [True] * 12 + [False] * 3
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(2 * (1 + 15 + 105 + 455) / 2**15)
    assert mcnemar(first, first) == mcnemar([True, False], [False, True]) == 1.0


@pytest.mark.parametrize("answer", [None, "", "18 or 19"])
def test_a_gold_that_cannot_be_graded_is_an_error_naming_the_problem(answer):
    with pytest.raises(ValueError, match=r"'p7'.*cannot be graded"):
        check_answers([Problem("p7", "?", None, None, answer, "hau")])


def test_long_prompts_are_left_out_whole_and_counted():
    stream = io.StringIO()
    console = Console(file=stream)
    problems = [Problem(str(i), "?", None, None, "1", "hau") for i in range(3)]
    prompts = [[0] * 3, [0] * 5, [0] * 4]
    kept = keep_fitting(problems, prompts, console, context=10, max_new_tokens=6)
    assert [p.id for p in kept] == ["0", "2"] and stream.getvalue().startswith("skipped 1 of 3 problems")
    with pytest.raises(ValueError, match="no problem fits"):
        keep_fitting(problems, prompts, console, context=10, max_new_tokens=8)


def run_cli(*arguments: str):
    app = evaluation.typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(evaluation.main)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "4", "--pass-at-k", "8"], "--pass-at-k is 8 and --samples 4"),
        (["--pass-at-k", "0"], "valid: 1 <= k <= samples"),
        (["--lang", "xyz"], "unknown language 'xyz'; valid codes"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--benchmark", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--limit", "0"], "--limit is 0; valid: 1 or more"),
        (["--adapter", "nowhere"], "neither an adapter folder nor a run folder"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int3"], "int3"),
        (["--out", "nowhere/results.jsonl"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said):
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_lab_model_is_evaluated_and_the_same_seed_gives_the_same_file(tmp_path):
    small = ["--pass-at-k", "2", "--limit", "6", "--lang", "ha"]
    first, second, other = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "other"))
    result = run_cli(*small, "--out", str(first))
    assert result.exit_code == 0, result.output
    assert "pass@2" in result.stdout and "format rate" in result.stdout
    run_cli(*small, "--out", str(second), "--rows", "5")  # fewer rows at once must not change a sample
    run_cli(*small, "--out", str(other), "--seed", "1")
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
