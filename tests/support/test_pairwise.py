"""Which parameters of a test run, by the definition of what they are to cover."""

from collections import Counter
from itertools import combinations, product

import pytest

from support.matrix import CASES
from support.pairwise import choose

SIZES = [(4, 3, 2), (3, 3, 3, 3), (2, 5), (6,), (2, 2, 2, 2, 2, 2)]


def full(*sizes):
    """Every combination of values 0..size-1, an axis for each size."""
    return [[frozenset([value]) for value in values] for values in product(*map(range, sizes))]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_of_values_is_there(sizes):
    """By counting: two axes have as many pairs of values as the product of their sizes."""
    items = full(*sizes)
    chosen = [[*map(min, items[at])] for at in choose(items)]
    for axis, size in enumerate(sizes):
        assert len({values[axis] for values in chosen}) == size
    for a, b in combinations(range(len(sizes)), 2):
        assert len({(values[a], values[b]) for values in chosen}) == sizes[a] * sizes[b]


def test_less_than_the_product_where_there_are_three_axes():
    assert 12 <= len(choose(full(4, 3, 2))) < 24
    assert 9 <= len(choose(full(3, 3, 3, 3))) < 20
    assert len(choose(full(2, 5))) == 10
    assert len(choose(full(6))) == 6


def test_combinations_that_do_not_exist_are_not_missed():
    """Value 0 of the first axis comes with value 0 of the second alone."""
    items = [axes for axes in full(2, 3, 2) if min(axes[0]) or not min(axes[1])]
    chosen = [tuple(map(min, items[at])) for at in choose(items)]
    assert {values[:2] for values in chosen} == {(0, 0), (1, 0), (1, 1), (1, 2)}


def test_a_situation_meets_every_trait():
    chosen = choose([[frozenset(case.named_traits)] for case in CASES])
    assert len(chosen) < len(CASES) / 2
    assert set().union(*(CASES[at].named_traits for at in chosen)) == set().union(
        *(case.named_traits for case in CASES)
    )
    assert {CASES[at].policy.name for at in chosen} == {case.policy.name for case in CASES}


def test_with_a_second_axis_every_trait_meets_every_value():
    items = [[frozenset(case.named_traits), frozenset([side])] for case in CASES for side in ("left", "right")]
    chosen = [items[at] for at in choose(items)]
    for side in ("left", "right"):
        met = set().union(*(traits for traits, value in chosen if side in value))
        assert met == set().union(*(case.named_traits for case in CASES))


def test_cases_take_turns():
    """Situation after situation the cases that ran least come first, so that none stays out."""
    used, items, names = Counter(), [[frozenset(case.named_traits)] for case in CASES], [case.id for case in CASES]
    for _ in range(27):
        choose(items, used, names)
    assert min(used[name] for name in names) >= 3, used


def test_the_same_every_time():
    items = [[frozenset(case.named_traits)] for case in CASES]
    assert choose(items) == choose(items)
