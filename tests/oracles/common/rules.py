"""How a policy's rules choose, in plain Python: no tensors."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf

from oracles.common.llama import Oracle


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A policy's rules; the run of a model under them is `runner(model, rules).run(passes)`.

    `keep(entries, rows, seen)` answers which positions stay:
      entries  what one kv head holds, in position order; each has `.position` and `.score`
      rows     the prompt's query rows since the last eviction point, oldest first, each a dict
               {position: softmax mass summed over the group's query heads}
      seen     the sequence's real tokens when the latest prompt pass ended
    Rules that choose by more than this come with a runner that asks them in its own way.
    """

    evict: str = "each_pass"
    rope: str = "original"
    prompt_only = False  # whether decode appends without evicting
    counts_reads = (
        False  # whether it counts what a sparse prompt's rows gave what they read, not what they would give all
    )
    runner = Oracle

    def keep(self, entries, rows, seen):
        return [entry.position for entry in entries]


def share(amount, seen):
    """An int is that many entries; a float is a share of `seen`, rounded down in exact decimal arithmetic."""
    if isinstance(amount, int):
        return amount
    return floor(Fraction(str(amount)) * seen)


def resolve(budget, seen):
    """The total number of entries that a `budget` means: at least 1."""
    return max(1, share(budget, seen))


def column_sums(rows):
    """{position: mass that all `rows` together put on it}; a row puts nothing on what it does not see."""
    sums = {}
    for row in rows:
        for position, mass in row.items():
            sums[position] = sums.get(position, 0.0) + mass
    return sums


CLOSE = 1e-6
"""Relative; what float32 on another processor, or in another order, may turn round."""


class NearTie(AssertionError):
    """A choice between numbers that rounding can turn round: the test needs other numbers, and says nothing as it is."""


def check_apart(a, b):
    """Raise `NearTie` if two numbers that a choice depends on are nearly equal.

    Equal ones are let through: zeros, infinities and copies of one number are equal in any precision.
    """
    if a != b and abs(a - b) < CLOSE * max(abs(a), abs(b)):
        raise NearTie(f"near tie: {a} and {b} differ by rounding alone; give the case other numbers or another seed")


def ranked(scores):
    """Indices from the largest score to the smallest; of equal scores the smaller index comes first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def top(scores, count):
    """Indices of the `count` largest scores, ascending; of equal scores the smaller index wins."""
    order = ranked(scores)
    if 0 < count < len(order):
        check_apart(scores[order[count - 1]], scores[order[count]])
    return sorted(order[:count])


def heavy_and_recent(scores, heavy, recent):
    """Indices of the `heavy` largest scores outside the last `recent`, then of those last `recent`."""
    if len(scores) <= heavy + recent:
        return list(range(len(scores)))
    first_recent = len(scores) - recent
    return top(scores[:first_recent], heavy) + list(range(first_recent, len(scores)))


def sink_and_recent(count, sink, recent):
    """Indices of the first `sink` and the last `recent` of `count` entries."""
    return [index for index in range(count) if index < sink or index >= count - recent]


def pool(scores, kernel_size, pooling):
    """1-d pooling, stride 1, padding kernel_size // 2: "avg" counts the zero padding, "max" pads with -inf."""
    half = kernel_size // 2
    padding = {"avg": 0.0, "max": -inf}[pooling]
    padded = [padding] * half + list(scores) + [padding] * half
    windows = [padded[index : index + kernel_size] for index in range(len(scores))]
    if pooling == "avg":
        return [sum(window) / kernel_size for window in windows]
    return [max(window) for window in windows]


def best_and_recent(entries, scores, total, recent):
    """Positions of the last `recent` entries and the best of the others, `total` in all."""
    recent = min(recent, total)
    return [entries[index].position for index in heavy_and_recent(scores, total - recent, recent)]
