"""Intervals and differences against values from hand and from scipy, and their coverage on drawn data."""

import random

import numpy as np
import pytest
from scipy import stats

from kvpress.evals.statistics import difference, estimate, pareto
from kvpress.intervals import wilson_interval


def as_samples(values):
    return dict(enumerate(values))


def test_a_mean_and_its_interval():
    scores = [0.0, 1.0] * 50
    found = estimate([scores])
    assert (found.mean, found.n) == (0.5, 100)
    # the mean of 100 coin flips has a standard error of 0.05
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)


def test_against_scipy():
    rng = random.Random(3)
    values = [rng.betavariate(2, 5) for _ in range(60)]
    theirs = stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = estimate([values])
    assert (found.low, found.high) == (pytest.approx(theirs.low, abs=0.004), pytest.approx(theirs.high, abs=0.004))


def test_strata_weigh_the_same():
    """The mean of the tasks' means, however many samples they have; resampled within each."""
    found = estimate([[1.0] * 90, [0.0, 1.0] * 5])
    assert found.mean == 0.75
    assert found.n == 100
    # only the second task varies: half its standard error sqrt(0.25 / 10)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 * 0.158, abs=0.06)


@pytest.mark.parametrize(("scores", "share"), [([1.0] * 8, 1.0), ([0.0] * 8, 0.0), ([0.5] * 8, 0.5)])
def test_equal_scores_are_not_certainty(scores, share):
    found = estimate([scores])
    assert (found.mean, found.low, found.high) == (share, *wilson_interval(8 * share, 8))
    assert found.high - found.low > 0.2


def test_no_scores():
    for strata in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="no scores"):
            estimate(strata)


def test_the_same_each_time_and_nothing_of_numpys_own():
    state = np.random.get_state()[1].copy()
    scores = [0.1, 0.9, 0.4, 0.7]
    assert estimate([scores]) == estimate([scores])
    assert (np.random.get_state()[1] == state).all()


def test_the_interval_covers_the_truth():
    rng = random.Random(0)
    hits = 0
    for _ in range(200):
        found = estimate([[float(rng.random() < 0.7) for _ in range(40)]])
        hits += found.low <= 0.7 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_a_paired_difference():
    """Ten of 40 samples lost, none won: the difference is certain though both scores vary a lot."""
    full = [1.0, 0.0] * 20
    less = [0.0 if i < 20 else value for i, value in enumerate(full)]
    found = difference([as_samples(less)], [as_samples(full)])
    assert (found.mean, found.n, found.significant) == (-0.25, 40, True)
    assert found.high < 0
    # ten lost out of 40: standard error sqrt(0.25 * 0.75 / 40) = 0.068
    assert found.low == pytest.approx(-0.25 - 1.96 * 0.068, abs=0.03)
    unpaired = estimate([less]), estimate([full])
    assert unpaired[0].high > unpaired[1].low  # without the pairs nothing could be said


def test_only_common_samples_count():
    ours, theirs = {("a", 0): 1.0, ("a", 1): 0.0}, {("a", 1): 1.0, ("b", 0): 0.0}
    found = difference([ours], [theirs])
    assert (found.mean, found.n) == (-1.0, 1)
    assert difference([ours], [{("c", 0): 1.0}]) is None


def test_differences_average_over_tasks():
    ours = [as_samples([1.0] * 10), as_samples([0.0] * 2)]
    theirs = [as_samples([0.0] * 10), as_samples([0.0] * 2)]
    assert difference(ours, theirs).mean == 0.5


def test_chance_is_not_significant():
    same = difference([as_samples([1.0, 0.0] * 4)], [as_samples([1.0, 0.0] * 4)])
    # of 8 samples without a difference, as many as Wilson's upper end for 0 of 8 may differ by 1
    end = wilson_interval(0, 8)[1]
    assert (same.mean, same.low, same.high, same.significant) == (0, -end, end, False)
    rng = random.Random(1)
    marked = 0
    for _ in range(200):
        pairs = [[float(rng.random() < 0.5) for _ in range(30)] for _ in range(2)]
        marked += difference(*([as_samples(scores)] for scores in pairs)).significant
    assert marked / 200 < 0.12


@pytest.mark.parametrize(("lost", "significant"), [(3, False), (5, False), (6, True)])
def test_a_few_samples_prove_nothing(lost, significant):
    """Five of five lost happen by chance in 2 of 32 cases, six of six in 2 of 64."""
    found = difference([as_samples([0.0] * lost)], [as_samples([1.0] * lost)])
    # and as many as Wilson's upper end for none of n may be gained
    assert (found.mean, found.low, found.high) == (-1, -1, pytest.approx(2 * wilson_interval(0, lost)[1] - 1))
    assert found.significant == significant


def test_pareto():
    #  cost, score: b beats c and d; e is as good as b, and dearer; f is dear and best
    points = [(1, 0.2), (2, 0.6), (2, 0.5), (3, 0.4), (4, 0.6), (9, 0.9)]
    assert pareto(points) == [0, 1, 5]
    assert pareto([]) == []
    assert pareto([(1, 0.5), (1, 0.5)]) == [0]


Z = 1.959964


@pytest.mark.parametrize(
    ("found", "n", "low", "high"),
    [
        (10, 10, 10 / (10 + Z * Z), 1.0),  # at the ends the formula falls together to n / (n + z^2)
        (0, 10, 0.0, Z * Z / (10 + Z * Z)),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 1 / (1 + Z * Z), 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval(found, n, low, high):
    assert wilson_interval(found, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 10, 57])
def test_wilson_interval_holds_the_share(n):
    for found in range(n + 1):
        low, high = wilson_interval(found, n)
        assert 0 <= low <= found / n <= high <= 1


@pytest.mark.parametrize(("found", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_of_nothing(found, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(found, n)
