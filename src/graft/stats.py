"""Intervals and paired verdicts for the quality of methods that answered the same test rows.

Every method gives an array of 0 and 1, or of scores between them, shape [seeds, items]; items stand in the same order
for all. What is said below of rows that are right or wrong is exact; for scores, means of rows are taken as normal
(Student's t for one seed, its draws in place of resampled rows for several), with rows added that were not seen:
one of 0 and one of 1 to the scores of a method, and half a row of 1, half of -1 and one of 0 to the gaps of a pair, as
Agresti and Coull (American Statistician 52, 1998) and Agresti and Min do. Scores that are all 0.01 do not say that the
next row is 0.01 too: among 20 rows no answer of 1 is found with 12 % chance where one row in ten has it. With the two
rows the interval reaches about 3 / rows beyond the mean, the rule of three; with half of each it covers 88 % there.
A share or a difference of shares has no unit: 0.01 is one percentage point.

What is claimed depends on the number of seeds:

- One seed: a claim about *these trained models*. Only the draw of the test rows is uncertain. Wilson's
  score interval, exact McNemar test, Agresti-Min interval of the difference.
- Several seeds: a claim about *the methods*. Rows and training runs are both drawn, crossed: every run
  answers every row. Rows are resampled as in the pigeonhole bootstrap (Owen, "The pigeonhole bootstrap",
  Annals of Applied Statistics 1(2), 2007). Seeds are not resampled: of three seeds a bootstrap draws
  the same three values over and over, so it understates training luck. Simulated with equal methods, 1000
  rows and runs 2.8 points apart, resampled seeds called 28 % of pairs different with two seeds and 22 % with
  three, against 5 % here: luck is drawn from Student's t with the variance of the seeds' own means.

Two seeds say little about luck, and intervals from two seeds are wide for that reason; use three or more.
With fewer than about 20 rows every figure here is rough.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from scipy.stats import t as student

from graft.errors import UsageError

ALPHA = 0.05
DRAWS = 20_000
_SEED = 20_070_601
_UNSEEN_SCORES = ((0.0, 1.0), (1.0, 1.0))
"""(value, rows) added to the scores of a method."""
_UNSEEN_GAPS = ((-1.0, 0.5), (0.0, 1.0), (1.0, 0.5))
"""(value, rows) added to the gaps of a pair."""


@dataclass(frozen=True)
class Interval:
    """A mean share of correct answers and its 95 % interval, all in 0..1."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean share of the first minus the second, its 95 % interval (in -1..1) and two-sided p."""

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """Whether `first` is "better" or "worse" than `second`, or a "tie"; `p` is Holm-adjusted.

    `low` and `high` bound the difference of this pair alone, so a tie may have an interval without 0.
    """

    first: str
    second: str
    outcome: Literal["better", "worse", "tie"]
    difference: float
    low: float
    high: float
    p: float


def interval(correct: ArrayLike) -> Interval:
    """The share of correct answers with its 95 % interval; `correct` is 0 to 1, [seeds, items].

    One seed: Wilson (JASA 22, 1927). Several seeds: the 2.5 and 97.5 % points of bootstrapped rows plus
    luck with seeds - 1 degrees of freedom, and never narrower than Wilson's interval over one seed's
    rows: more seeds average luck away, not which rows were drawn, and a bootstrap of rows that are all
    right has no width at all. Raises `UsageError` for anything but 0 to 1 in two dimensions.
    """
    answers = _checked(correct)
    seeds = answers.shape[0]
    mean = float(answers.mean())
    least, most = _one_seed_interval(answers, mean)
    if seeds == 1:
        return Interval(mean, least, most)
    rng = np.random.default_rng(_SEED)
    if _graded(answers):
        centre, error = _smoothed(answers.mean(axis=0), _UNSEEN_SCORES)
        draws = centre + _student_deviations(error, answers.shape[1], rng)
    else:
        counts = np.bincount(answers.sum(axis=0).astype(int), minlength=seeds + 1)
        draws = mean + _row_deviations(np.arange(seeds + 1) / seeds, counts.astype(float), rng)
    draws += _luck(_luck_variance(answers), seeds - 1, rng)
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(mean, float(max(0.0, min(low, least))), float(min(1.0, max(high, most))))


def _one_seed_interval(answers: NDArray[np.float64], mean: float) -> tuple[float, float]:
    """What the draw of the rows alone leaves open: Wilson's interval, Student's with two more rows for scores."""
    items = answers.shape[1]
    if not _graded(answers):
        wilson = binomtest(round(mean * items), items).proportion_ci(method="wilson")
        return float(wilson.low), float(wilson.high)
    if items == 1:
        return 0.0, 1.0
    centre, error = _smoothed(answers.mean(axis=0), _UNSEEN_SCORES)
    half = float(student.ppf(1 - ALPHA / 2, items - 1)) * error
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def compare_pair(a: ArrayLike, b: ArrayLike) -> Difference:
    """The paired difference of two methods, a minus b, both 0 to 1 [seeds, items]; not adjusted for others.

    One seed: exact McNemar test (binomial over the rows that only one of the two got right) and the
    interval of Agresti and Min (Statistics in Medicine 24, 2005), which adds half a row to each cell.
    Several seeds: p is the share of draws at least as far from their centre as the difference is from
    0, with one added above and below the line (Davison and Hinkley 1997, ch. 4); the interval inverts it.
    Luck has 2 * (seeds - 1) degrees of freedom, as if both methods were equally lucky. Where only one
    varies and rows hardly matter, that is optimistic: 11 % false positives at three seeds, 7 % at five.
    A difference of exactly 0 has p = 1. Raises `UsageError` for unlike shapes or values outside 0 to 1.
    """
    first, second = _checked(a), _checked(b)
    if first.shape != second.shape:
        raise UsageError(
            f"results of shape {list(first.shape)} and {list(second.shape)} cannot be paired",
            "give both methods the same seeds and test rows; repeat an untrained base for every seed",
        )
    seeds = first.shape[0]
    if _graded(first) or _graded(second):
        return _graded_pair(first, second)
    gaps = (first.sum(axis=0) - second.sum(axis=0)).astype(int)
    difference = float(gaps.mean() / seeds)
    counts = np.bincount(gaps + seeds, minlength=2 * seeds + 1)
    if seeds == 1:
        half, centre, p = _one_seed(int(counts[2]), int(counts[0]), int(counts[1]))
    else:
        half, centre, p = _several_seeds(counts, difference, _luck_variance(first) + _luck_variance(second))
    return Difference(difference, max(-1.0, centre - half), min(1.0, centre + half), p)


def verdicts(correct: Mapping[str, ArrayLike]) -> list[Verdict]:
    """A verdict for every unordered pair of labels, in the order given.

    p is adjusted over all pairs by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979),
    so that 5 % bounds the chance that any two equal methods are called different, not the chance for each
    pair. Raises `UsageError` where `correct` is empty, an array is not of 0 to 1 or shapes differ.
    """
    if not correct:
        raise UsageError("there are no results to compare")
    arrays = {label: _checked(values, f"results of {label!r}: ") for label, values in correct.items()}
    pairs = list(combinations(arrays, 2))
    raw = [compare_pair(arrays[first], arrays[second]) for first, second in pairs]
    adjusted = holm([pair.p for pair in raw])
    return [
        Verdict(*names, _outcome(pair.difference, p), pair.difference, pair.low, pair.high, p)
        for names, pair, p in zip(pairs, raw, adjusted, strict=True)
    ]


def holm(ps: list[float]) -> list[float]:
    """Holm-adjusted p values, in the order given: the k-th smallest of m times m - k + 1, never falling."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted = [1.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, ps[index] * (len(ps) - rank)))
        adjusted[index] = largest
    return adjusted


def _outcome(difference: float, p: float) -> Literal["better", "worse", "tie"]:
    if p >= ALPHA:
        return "tie"
    return "better" if difference > 0 else "worse"


def _one_seed(wins: int, losses: int, ties: int) -> tuple[float, float, float]:
    """Half width, centre and p, from how many rows only a, only b, and both or neither got right."""
    discordant = wins + losses
    p = float(binomtest(wins, discordant).pvalue) if discordant else 1.0
    items = wins + losses + ties + 2
    centre = (wins - losses) / items
    half = 1.959964 * float(np.sqrt((discordant + 1) / items - centre**2) / np.sqrt(items))
    return half, centre, p


def _several_seeds(counts: NDArray[np.int64], difference: float, variance: float) -> tuple[float, float, float]:
    """Half width, centre and p; `counts` are rows by the sum of their gap over seeds, -seeds..seeds.

    Half a row is added at each end and one in the middle, as Agresti and Min do, so that a few rows that
    all agree do not look like certainty.
    """
    seeds = len(counts) // 2
    smoothed = counts.astype(float)
    smoothed[[0, seeds, -1]] += (0.5, 1.0, 0.5)
    rng = np.random.default_rng(_SEED)
    draws = _row_deviations(np.arange(-seeds, seeds + 1) / seeds, smoothed, rng)
    distance = np.abs(draws + _luck(variance, 2 * (seeds - 1), rng))
    # 1e-12: sums of thirds that are equal on paper differ in the last bit.
    p = (1 + int((distance >= abs(difference) - 1e-12).sum())) / (DRAWS + 1)
    return float(np.quantile(distance, 1 - ALPHA)), difference, p


def _graded(answers: NDArray[np.float64]) -> bool:
    """Whether there are scores other than 0 and 1."""
    return not bool(np.isin(answers, (0, 1)).all())


def _graded_pair(first: NDArray[np.float64], second: NDArray[np.float64]) -> Difference:
    """The paired difference of scores; p and interval are of the smoothed gaps, so that they agree."""
    seeds, items = first.shape
    gaps = first.mean(axis=0) - second.mean(axis=0)
    difference = float(gaps.mean())
    centre, error = _smoothed(gaps, _UNSEEN_GAPS)
    freedom = max(1, items - 1)
    if seeds == 1:
        half = float(student.ppf(1 - ALPHA / 2, freedom)) * error
        p = 2 * float(student.sf(abs(centre) / error, freedom))
    else:
        rng = np.random.default_rng(_SEED)
        luck = _luck(_luck_variance(first) + _luck_variance(second), 2 * (seeds - 1), rng)
        distance = np.abs(_student_deviations(error, items, rng) + luck)
        # 1e-12: sums of thirds that are equal on paper differ in the last bit.
        p = (1 + int((distance >= abs(centre) - 1e-12).sum())) / (DRAWS + 1)
        half = float(np.quantile(distance, 1 - ALPHA))
    return Difference(difference, max(-1.0, centre - half), min(1.0, centre + half), p)


def _smoothed(values: NDArray[np.float64], unseen: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """The mean of rows and its standard error, with (value, how many rows) of `unseen` added."""
    added, weights = np.array(unseen).T
    items = len(values) + weights.sum()
    centre = (values.sum() + added @ weights) / items
    squares = ((values - centre) ** 2).sum() + ((added - centre) ** 2) @ weights
    return float(centre), float(np.sqrt(squares / (items - 1) / items))


def _student_deviations(error: float, items: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Deviations of DRAWS means of rows from their centre, [DRAWS], in Student's t."""
    draws: NDArray[np.float64] = rng.standard_t(max(1, items - 1), size=DRAWS) * error
    return draws


def _row_deviations(
    values: NDArray[np.float64], counts: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Deviations of DRAWS bootstrapped row means from their centre, [DRAWS].

    Rows with the same value are exchangeable, so drawing how many of each there are is the same bootstrap
    as drawing rows, at seeds + 1 columns instead of one for each row.
    """
    rows = counts.sum()
    drawn = rng.multinomial(round(rows), counts / rows, size=DRAWS)
    deviations: NDArray[np.float64] = drawn @ values / rows - counts @ values / rows
    return deviations


def _luck_variance(answers: NDArray[np.float64]) -> float:
    """Variance over training runs of the mean over seeds."""
    return float(answers.mean(axis=1).var(ddof=1)) / len(answers)


def _luck(variance: float, freedom: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draws of the error of a mean over seeds, [DRAWS]."""
    draws: NDArray[np.float64] = rng.standard_t(freedom, size=DRAWS) * np.sqrt(variance)
    return draws


def _checked(correct: Any, who: str = "") -> NDArray[np.float64]:
    """`correct` as numbers, [seeds, items]."""
    try:
        values = np.asarray(correct)
    except ValueError:
        raise UsageError(f"{who}rows of unlike length, expected [seeds, items]") from None
    if values.ndim != 2 or values.size == 0:
        raise UsageError(f"{who}shape {list(values.shape)}, expected [seeds, items], at least one of each")
    if values.dtype.kind not in "biuf" or not bool(((values >= 0) & (values <= 1)).all()):
        raise UsageError(f"{who}expected numbers from 0 to 1 (or false and true) only")
    return values.astype(np.float64)
