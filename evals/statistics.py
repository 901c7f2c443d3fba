"""Means with intervals, and differences on the same samples, by the bootstrap.

Scores come in strata (one per task). The mean is that of the strata's means, as LongBench averages its data sets, and each
resample draws within the strata, as many as there are. The generator is this module's own: equal scores, equal intervals.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kvpress.intervals import wilson_interval

RESAMPLES = 10_000
LEVEL = 0.95
Key = TypeVar("Key", bound=Hashable)
# With fewer samples that differ, even all of them differing the same way happens by chance in more than 5 % of cases
# (two-sided sign test: 2 * 0.5 ** 6 = 3 %, 2 * 0.5 ** 5 = 6 %).
LEAST_DIFFERING = 6
RULE = (
    f"n.s. (not significant): the {LEVEL:.0%} interval of the difference on the same samples holds 0, or fewer than "
    f"{LEAST_DIFFERING} samples differ"
)
"""What is said of differences wherever they are shown."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval at `LEVEL`, over n samples."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference, its interval, and whether chance alone would hardly make it."""

    mean: float
    low: float
    high: float
    n: int
    significant: bool


def estimate(strata: Sequence[Sequence[float]]) -> Estimate:
    """The mean of scores in [0, 1].

    The bootstrap says nothing where all scores of a stratum are equal. If all scores of all strata are, the interval is
    Wilson's for as many right or wrong answers: ten of ten right is not certainty.

    Args:
        strata: scores, [stratum][sample]; at least one stratum, none empty.

    Raises:
        ValueError: no stratum, or an empty one.
    """
    n = sum(map(len, strata))
    low, mean, high = _bootstrap(strata)
    if low == high:
        low, high = wilson_interval(mean * n, n)
    return Estimate(mean, low, high, n)


def difference(scores: Sequence[Mapping[Key, float]], reference: Sequence[Mapping[Key, float]]) -> Difference | None:
    """How much better `scores` are than `reference`, on the samples that both have; scores in [0, 1].

    Where all pairs differ by the same, most often not at all, the bootstrap would claim certainty. The interval is then that of
    samples of which as large a share as n equal ones leave possible (Wilson's upper end for none of n) differ by 1 or -1.

    Args:
        scores, reference: sample -> score, for each stratum.

    Returns:
        None if they have no sample in common.
    """
    pairs = [[a[key] - b[key] for key in a if key in b] for a, b in zip(scores, reference, strict=True)]
    pairs = [stratum for stratum in pairs if stratum]
    if not pairs:
        return None
    low, mean, high = _bootstrap(pairs)
    n = sum(map(len, pairs))
    if low == high:  # the share of others that may differ, by up to 1 in either direction
        unseen = wilson_interval(0, n)[1]
        low, high = ((1 - unseen) * mean + unseen * end for end in (-1.0, 1.0))
    differing = sum(value != 0 for stratum in pairs for value in stratum)
    significant = differing >= LEAST_DIFFERING and (low > 0 or high < 0)
    return Difference(mean, low, high, n, significant)


def spread(values: Sequence[float]) -> Estimate:
    """The mean of values that have no upper limit; without an interval (both ends are the mean) where all are equal."""
    low, mean, high = _bootstrap([values])
    return Estimate(mean, low, high, len(values))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, score) that no other beats: cheaper and as good, or better and as cheap. By cost."""
    best, front = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def _bootstrap(strata: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Lower end, mean, upper end, by percentiles."""
    if not strata or not all(len(stratum) for stratum in strata):
        raise ValueError("no scores to average; give at least one in each stratum")
    generator = np.random.default_rng(0)
    means, total = np.zeros(RESAMPLES), 0.0
    for stratum in strata:
        values = np.asarray(stratum, dtype=np.float64)
        rows = max(1, 2**22 // len(values))  # at a time, for the memory
        for start in range(0, RESAMPLES, rows):
            count = min(rows, RESAMPLES - start)
            means[start : start + count] += values[generator.integers(len(values), size=(count, len(values)))].mean(1)
        total += math.fsum(stratum) / len(values)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means / len(strata), [tail, 1 - tail])
    return float(low), total / len(strata), float(high)
