"""Metrics of graded completions: pass@k and its kin, 95 % intervals, tests of a difference."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parts.typed import typed

# PolyMath's levels of difficulty, and the weights of its paper.
LEVEL_WEIGHTS = {"low": 1, "medium": 2, "high": 4, "top": 8}

# Resamples of the bootstrap. From seed to seed the interval's ends then move by less than 0.3
# points.
RESAMPLES = 2000
BLOCK = 2**20  # values of resamples that are looked at together: 8 MiB

# The permutation test tries all sign patterns of up to so many problems, 2**14 of them.
EXACT_FLIPS = 14
# Of more problems it draws so many patterns.
FLIPS = 20_000

Ratio = tuple[list[float], list[float]]  # a numerator and a denominator per problem


@dataclass(frozen=True)
class Attempt:
    """One completion with its grade (parts.grading.Grade has the words for it)."""

    completion: str
    answer: str | None
    canonical: str | None
    lenient: str | None
    correct: bool
    lenient_correct: bool
    reason: str
    tokens: int  # EOS included
    finish_reason: str
    language: str  # text_language's
    seed: str  # of its random stream: the evaluation's seed, the problem's place, the attempt's


@dataclass(frozen=True)
class Graded:
    """One problem with every attempt at it: a line of problems.jsonl."""

    id: str
    language: str
    problem: str
    gold: str
    prompt_hash: str  # of the prompt's ids
    level: str | None  # PolyMath's
    attempts: list[Attempt]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased probability that of k attempts, drawn from n with c right, one is right.

    One or more, that is: 1 - C(n-c, k) / C(n, k), computed as a product so that no binomial
    overflows (Chen et al. 2021, 2107.03374, Eq. 1).
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.

    >>> pass_at_k(n=8, c=2, k=1), round(pass_at_k(n=8, c=2, k=4), 4)
    (0.25, 0.7857)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    all_wrong = 1.0
    for drawn in range(k):
        all_wrong *= (n - c - drawn) / (n - drawn)
    return 1.0 - all_wrong


def bootstrap(numerators: list[float], denominators: list[float], *, seed: int = 0) -> Estimate:
    """Return sum(numerators) / sum(denominators), one pair a problem, with its 95 % interval.

    The bootstrap draws as many problems as there are, with repeats, and computes the ratio of what
    it drew, again and again. The interval holds the middle 95 % of these ratios: it says how far
    other problems of the same kind might have moved the result. nan where the denominators sum to
    zero. A mean over problems has denominators of 1.
    """
    return mean_of_languages([(numerators, denominators)], seed=seed)


def mean_of_languages(languages: list[Ratio], *, seed: int = 0) -> Estimate:
    """Return the mean of several languages' ratios with its interval.

    Languages of equally many problems are resampled alike: row i is the same problem in all, as
    benchmarks lay it out. A language whose denominators sum to zero has no ratio, such as accuracy
    given a box where there is none. It is left out. nan where all are.
    """
    found = []
    for language in languages:
        pairs = np.array(language, dtype=float)  # [2, problems]
        if not pairs[1].sum():
            continue
        problems = pairs.shape[1]
        drawn = np.random.default_rng(seed).integers(problems, size=(RESAMPLES, problems))
        # First the sums over all problems, then those over each resample: [2, 1 + RESAMPLES].
        above, below = np.hstack([pairs.sum(axis=1, keepdims=True), pairs[:, drawn].sum(axis=2)])
        found.append(above / np.where(below > 0, below, math.nan))
    if not found:
        return Estimate(math.nan, math.nan, math.nan)
    value, *resampled = np.mean(found, axis=0)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    # Where all problems have the same share, rounding alone puts an end beyond the value.
    ends = float(np.fmin(low, value)), float(np.fmax(high, value))
    return Estimate(float(value), *ends)


def bootstrap_percentile(values: list[list[int]], percent: float, *, seed: int = 0) -> Estimate:
    """Return a percentile of all problems' values, a row a problem, with its 95 % interval.

    The interval is a bootstrap's over problems; see bootstrap.
    """
    table = np.array(values)
    drawn = np.random.default_rng(seed).integers(len(table), size=(RESAMPLES, len(table)))
    pieces = -(-drawn.size * table.shape[1] // BLOCK)
    blocks = (table[rows].reshape(len(rows), -1) for rows in np.array_split(drawn, pieces))
    resampled = np.concatenate([np.percentile(block, percent, axis=1) for block in blocks])
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(np.percentile(table, percent)), float(low), float(high))


def difference(first: list[float], second: list[float], *, seed: int = 0) -> Estimate:
    """Return the mean of second - first with its bootstrap interval over problems.

    first, second  per-problem scores, in one order; ValueError if one is longer
    """
    changes = [b - a for a, b in zip(first, second, strict=True)]
    return bootstrap(changes, [1.0] * len(changes), seed=seed)


def paired_permutation(first: list[float], second: list[float], *, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test on per-problem scores.

    It tests whether they differ in the mean. If they did not, a problem's difference would as
    likely have had the other sign. The p-value is the share of sign patterns whose sum is at least
    as far from 0 as the one seen. Where at most EXACT_FLIPS problems differ, these are all
    patterns. Else they are FLIPS drawn ones and the one seen (the +1 correction), so that it is
    never 0.

    >>> paired_permutation([0.0] * 3, [1.0] * 3)
    0.25
    """
    changes = np.array([b - a for a, b in zip(first, second, strict=True) if a != b])
    seen = abs(changes.sum()) - 1e-9  # a pattern that ties but for rounding counts
    if len(changes) <= EXACT_FLIPS:
        # The bits of 0, 1, 2, ... are all patterns: a bit that is set is a minus.
        signs = 1 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)
        return float((abs(signs @ changes) >= seen).mean())
    random = np.random.default_rng(seed)
    together = max(1, BLOCK // len(changes))
    counts = [min(together, FLIPS - done) for done in range(0, FLIPS, together)]
    blocks = (random.choice((-1, 1), size=(count, len(changes))) for count in counts)
    as_far = sum((abs(signs @ changes) >= seen).sum() for signs in blocks)
    return float((1 + as_far) / (1 + FLIPS))


def mcnemar(first: list[bool], second: list[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test of two verdicts a problem.

    It looks at the problems that only one of the two got right, and asks whether that could be half
    each.

    >>> mcnemar([False] * 5, [True] * 5)
    0.0625
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    changed = gained + sum(a and not b for a, b in zip(first, second, strict=True))
    tail = sum(math.comb(changed, count) for count in range(min(gained, changed - gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


def read_graded(row: dict[str, Any]) -> Graded:
    """Return a line of problems.jsonl as it was; ValueError where it is none."""
    graded = typed(row, Graded, "a line")
    if not graded.attempts:
        raise ValueError("a line has no attempts")
    if min(attempt.tokens for attempt in graded.attempts) < 0:
        raise ValueError("a line has a completion of fewer than 0 tokens")
    return graded


def read_summary(stored: Any) -> dict[str, Estimate]:
    """Return estimates by metric as they were before JSON, which has null for nan.

    ValueError where it holds anything else.

    >>> read_summary({"pass@1": {"value": 0.5, "low": None, "high": None}})
    {'pass@1': Estimate(value=0.5, low=nan, high=nan)}
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"no estimates by metric: {stored!r}")
    found = {}
    for metric, numbers in stored.items():
        try:
            ends = {
                name: math.nan if x is None else float(typed(x, float, name))
                for name, x in numbers.items()
            }
            found[metric] = Estimate(**ends)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{metric} is no estimate: {numbers!r}") from error
    return found


def harness_correct(completion: str, gold: str) -> bool:
    """Return the verdict of lm-evaluation-harness's AfriMGSM task on a completion.

    That is its metric exact_match under its filter flexible-extract. The answer is the last "$",
    ".", "," and ASCII figures in a row, anywhere. Punctuation is dropped from it and from the gold,
    and the two texts are compared. So, unlike ours: no box is needed; the think block counts; a
    number after the answer replaces it; 1.5 is 15, -5 is 5, 18.0 is not 18; figures of other
    scripts, fractions and words are not read.
    Not alike even so: the harness has its own prompts, decodes greedily and cuts the completion at
    "Question:".
    """
    numbers = re.findall(r"-?(?:[$0-9.,]{2,}|[0-9]+)", completion)
    drop = str.maketrans("", "", string.punctuation)
    return bool(numbers) and numbers[-1].translate(drop) == gold.removesuffix(".0").translate(drop)


def majority_correct(attempts: list[Attempt]) -> bool:
    """Return whether the most frequent answer is right; ties go to the one seen first.

    Wrong answers are told apart by their canonical text. Right ones are equal, however they are
    written. An attempt without a single boxed answer does not vote; where none votes, the majority
    is wrong.
    """
    votes = Counter(
        (attempt.correct, None if attempt.correct else attempt.canonical)
        for attempt in attempts
        if attempt.canonical is not None
    )
    return bool(votes) and votes.most_common(1)[0][0][0]  # of equals, the first counted


def ratios(results: list[Graded], ks: list[int]) -> dict[str, Ratio]:
    """Return every metric that is a ratio of sums over problems.

    All but those that say otherwise are means of attempts.

    pass@k                        a mean of problems: at least one of k attempts is right
    maj@k                         a mean of problems: the majority of the first k attempts is right
    difficulty-weighted accuracy  PolyMath's, where all its levels are there: LEVEL_WEIGHTS over 15
    accuracy given a box          of the attempts that have a complete box, those that are right
    extraction failures           a complete box, and no single answer in it
    lenient accuracy              another ruler: without an answer, any box or the last number is it
    lm-eval exact match           another ruler, the harness's: see `harness_correct`
    in the problem's language     by text_language; an unknown language does not count here. Where
                                  all are unknown nothing was found out: the denominators are 0
    in English                    likewise
    """
    each = [result.attempts for result in results]
    ones = [1.0] * len(results)  # the denominators of a mean over problems

    def _share(holds: Callable[[Attempt], bool]) -> Ratio:
        return [sum(map(holds, attempts)) / len(attempts) for attempts in each], ones

    right = _share(lambda a: a.correct)
    counts = [(len(attempts), sum(a.correct for a in attempts)) for attempts in each]
    found = {f"pass@{k}": ([pass_at_k(n, c, k) for n, c in counts], ones) for k in ks}
    if len(each[0]) > 1:
        found[f"avg@{len(each[0])}"] = right
    for k in ks:
        if k > 1:
            found[f"maj@{k}"] = [float(majority_correct(a[:k])) for a in each], ones
    sizes = Counter(result.level for result in results)
    if sizes.keys() == LEVEL_WEIGHTS.keys():
        weights = [LEVEL_WEIGHTS[str(result.level)] / sizes[result.level] for result in results]
        weighted = [w * share for w, share in zip(weights, right[0], strict=True)]
        found["difficulty-weighted accuracy"] = weighted, weights
    found["format rate"] = _share(lambda a: a.answer is not None)
    boxes = [float(sum(a.answer is not None for a in attempts)) for attempts in each]
    found["accuracy given a box"] = [float(c) for _, c in counts], boxes
    found["extraction failures"] = _share(lambda a: a.answer is not None and a.canonical is None)
    found["grader time-outs"] = _share(lambda a: a.reason == "time-out")
    found["lenient accuracy"] = _share(lambda a: a.lenient_correct)
    matches = [
        sum(harness_correct(a.completion, r.gold) for a in r.attempts) / len(r.attempts)
        for r in results
    ]
    found["lm-eval exact match"] = matches, ones
    inside = [sum(a.language == r.language for a in r.attempts) / len(r.attempts) for r in results]
    known = any(a.language != "unknown" for attempts in each for a in attempts)
    found["in the problem's language"] = inside, ones if known else [0.0] * len(results)
    found["in English"] = _share(lambda a: a.language == "eng")[0], [float(known)] * len(results)
    found["cut at the length limit"] = _share(lambda a: a.finish_reason == "length")
    lengths = [sum(a.tokens for a in attempts) / len(attempts) for attempts in each]
    found["mean tokens"] = lengths, ones
    return found


def summarise(results: list[Graded], ks: list[int]) -> dict[str, Estimate]:
    """Return every metric over `results` with its interval.

    They are those of `ratios`, and a percentile of the lengths.
    """
    lengths = [[attempt.tokens for attempt in result.attempts] for result in results]
    summary = {name: bootstrap(*ratio) for name, ratio in ratios(results, ks).items()}
    return summary | {"p95 tokens": bootstrap_percentile(lengths, 95)}


def paired_tests(first: list[Graded], second: list[Graded]) -> tuple[Estimate, float, float]:
    """Return how two evaluations of the same problems differ: the change, and two p-values of it.

    The change is second - first in pass@1. The p-values are of the permutation test on pass@1 and
    of McNemar's test on the majority answers.
    """
    shares = [
        [sum(a.correct for a in r.attempts) / len(r.attempts) for r in results]
        for results in (first, second)
    ]
    majorities = [
        [majority_correct(result.attempts) for result in results] for results in (first, second)
    ]
    return difference(*shares), paired_permutation(*shares), mcnemar(*majorities)
