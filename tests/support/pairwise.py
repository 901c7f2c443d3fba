"""Which of a test's parameters run: every pair of values once, instead of every combination (that is `pytest --full`).

A fault that no single value shows is nearly always shown by two together. So of each test enough items run that every value
of an axis meets every value of each other axis that the full product has it meet. An axis is a `parametrize` mark, or a
fixture with parameters. A case of the matrix stands for its policy and its traits (`Case.named_traits`: its
roles, how it evicts, what it observes, ...), each of which is such a value. The situation is the test itself: a test over the
cases alone runs every policy and every trait. Tests marked `every_case` run whole.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Axis = frozenset[Hashable]  # what one axis of an item has: one value, or the traits of a case


def to_cover(axes: Sequence[Axis]) -> set[Hashable]:
    """What an item covers: each value, and each pair of values of different axes."""
    alone = {(axis, value) for axis, values in enumerate(axes) for value in values}
    pairs = (
        product(((a, x) for x in axes[a]), ((b, y) for y in axes[b])) for a, b in combinations(range(len(axes)), 2)
    )
    return alone | {pair for some in pairs for pair in some}


def choose(items: Sequence[Sequence[Axis]], used: Counter[Any] | None = None, names: Sequence[Any] = ()) -> list[int]:
    """Indices of items that together cover what all of them cover, ascending.

    Greedy: always the one that covers most of what is missing; of equal ones that whose name is least `used`, then the first.
    """
    if len(items) == 1:
        return [0]
    used = Counter() if used is None else used
    names = names or [None] * len(items)
    bits: dict[Hashable, int] = {}  # a set of what is to cover is a number with these bits
    covers = [sum(bits.setdefault(one, 1 << len(bits)) for one in to_cover(axes)) for axes in items]
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(items)), key=lambda at: ((covers[at] & missing).bit_count(), -used[names[at]], -at))
        missing &= ~covers[best]
        used[names[best]] += 1
        chosen.append(best)
    return sorted(chosen)


def by_test(items: Iterable[pytest.Item]) -> list[list[pytest.Item]]:
    """The items of each test together, in their order."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return list(tests.values())


def axes_of(item: pytest.Item, by_name: bool = True) -> tuple[list[Axis], Any]:
    """The item's axes, and the name of its case of the matrix, if it has one.

    With `by_name` a case's policy is one of its values besides how it plays its roles.
    """
    call = getattr(item, "callspec", None)
    if call is None:
        return [], None
    together = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
    alone = [[name] for name in call.params if not any(name in names for names in together)]
    axes, case = [], None
    for names in together + alone:
        cases = [call.params[name] for name in names if hasattr(call.params.get(name), "traits")]
        if cases:
            case = cases[0].id
            axes.append(frozenset(cases[0].named_traits if by_name else cases[0].traits))
        else:
            # Of one value of a mark each item has the same objects.
            axes.append(frozenset([tuple(id(call.params[name]) for name in names)]))
    return axes, case


def _names(given: str | Iterable[str]) -> list[str]:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given)


class Pairwise:
    """The pytest plugin. What `-k` and `-m` leave out, or an id names, is decided before."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        used: Counter[Any] = Counter()
        kept = set()
        for same in by_test(items):
            if same[0].get_closest_marker("every_case"):
                kept.update(same)
                continue
            axes, names = zip(*map(axes_of, same), strict=True)
            kept.update(same[at] for at in choose(axes, used, names))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
