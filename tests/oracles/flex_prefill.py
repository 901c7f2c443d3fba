"""FlexPrefill in plain Python: pattern and budget of each head, one product, one exponential and one sum at a time."""

from dataclasses import dataclass, field
from math import ceil, inf, log, sqrt
from typing import Any

from oracles.common.numbers import block_means, dot, mean_vector, softmax
from oracles.common.planning import Planned
from oracles.common.rules import check_apart, top
from oracles.full import Full


def probe_mass(queries, keys, scale, size):
    """What the last `size` rows give entries and distances, on average."""
    rows = sorted(queries)[-size:]
    by_entry, by_distance = [0.0] * len(keys), [0.0] * len(keys)
    for row in rows:
        for entry, weight in enumerate(softmax([dot(queries[row], keys[e]) * scale for e in range(row + 1)])):
            by_entry[entry] += weight / len(rows)
            by_distance[row - entry] += weight / len(rows)
    return by_entry, by_distance, mean_vector([queries[row] for row in rows])


def divergence(a, b):
    """The Jensen-Shannon divergence; its root is the distance."""
    total = 0.0
    for p, q in zip(a, b, strict=True):
        total += sum(x * log(x / ((p + q) / 2)) for x in (p, q) if x > 0) / 2
    return total


def cover_count(mass, share):
    """One more than the largest numbers that together have no more than the share."""
    count = total = 0
    for number in sorted(mass, reverse=True):
        total += number
        if share < 1 and total > share:
            break
        count += 1
    return count + 1


def cover_pairs(scores, share):
    """The pairs (row block, block) with the most attention, up to a share of all. scores: {row block: [scores]}."""
    mass = {(i, j): weight for i, row in scores.items() for j, weight in enumerate(softmax(row))}
    order = sorted(mass, key=lambda pair: (-mass[pair], pair))
    chosen, total = set(), 0.0
    for pair in order:
        total += mass[pair]
        if share < 1:
            check_apart(total, share * len(scores))
            if total > share * len(scores):
                break
        chosen.add(pair)
    return chosen


def block_sums(mass, size):
    return [sum(mass[start : start + size]) for start in range(0, len(mass), size)]


class Flexible(Planned):
    """`patterns` collects (layer, entries, head) -> whether the head was query-aware."""

    def run(self, passes):
        self.patterns = {}
        return super().run(passes)

    def plan(self, layer, head, queries, keys, scale):
        rules, size, n = self.rules, self.rules.block_size, len(keys)
        least = ceil(rules.min_budget / size)
        if len(queries) == 1 or n <= 2 * size or n <= least * size or n < rules.min_len:
            return None
        blocks = ceil(n / size)
        most = blocks if rules.max_budget is None else min(blocks, ceil(rules.max_budget / size))
        by_entry, by_distance, probe = probe_mass(queries, keys, scale, size)
        columns, diagonals = block_sums(by_entry, size), block_sums(by_distance, size)
        key_means = block_means(dict(enumerate(keys)), size)
        foretold = softmax([dot(probe, key_means[block]) * scale for block in range(blocks)])
        apart = sqrt(divergence(foretold, columns))
        assert abs(apart - rules.tau) > 1e-4, "near tie: whether the head is query-aware"
        aware = self.patterns[layer, n, head] = apart < rules.tau
        counts = [least, least]
        if not aware:
            for mass in (by_entry, by_distance):
                for nudged in (1 - 1e-6, 1 + 1e-6):
                    assert cover_count(mass, rules.gamma) // size == cover_count(mass, rules.gamma * nudged) // size
            counts = [
                max(least, min(most, cover_count(mass, rules.gamma) // size + 1)) for mass in (by_entry, by_distance)
            ]
        columns[0] = diagonals[0] = inf
        columns, diagonals = (top(mass, count) for mass, count in zip((columns, diagonals), counts, strict=True))
        rows = sorted({row // size for row in queries})
        pairs = {(i, i - d) for i in rows for d in diagonals if d <= i} | {
            (i, j) for i in rows for j in columns if j <= i
        }
        if aware:
            query_means = block_means(queries, size)
            scores = {i: [dot(query_means[i], key_means[j]) * scale for j in range(i + 1)] for i in rows}
            pairs |= cover_pairs(scores, rules.gamma)
        return {i: sorted(j for row, j in pairs if row == i) for i in rows}


@dataclass(frozen=True)
class FlexPrefill:
    """The rules' numbers; what is kept says `over`."""

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    min_len: int = 0
    over: Any = field(default_factory=Full)
    runner = Flexible
