"""MInference in plain Python: which entries each row of a prompt reads, pair by pair."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from oracles.common.numbers import block_means, dot, softmax
from oracles.common.planning import Planned
from oracles.common.rules import top
from oracles.full import Full


def best_singles(queries, keys, scale, probe):
    """What the last rows give entries and distances."""
    by_entry, by_distance = [0.0] * len(keys), [0.0] * len(keys)
    for row in sorted(queries)[-probe:]:
        for entry, weight in enumerate(softmax([dot(queries[row], keys[e]) * scale for e in range(row + 1)])):
            by_entry[entry] += weight
            by_distance[row - entry] += weight
    return by_entry, by_distance


def forced(mass, count, size):
    """The first `count` places and the best of the others, `size` in all."""
    return top([inf if place < count else one for place, one in enumerate(mass)], min(len(mass), size))


def at_distances(distances, row, expand, tile):
    """The entries at these distances before a row, or before the tile that it is in."""
    if expand == "exact":
        return {row - distance for distance in distances if distance <= row}
    first = row // tile * tile
    begins = [max(0, first - distance) for distance in distances if distance < first + tile]
    return {entry for begin in begins for entry in range(begin, begin + tile) if entry <= row}


class Shaped(Planned):
    """`log` collects (layer, position of the row) -> for each query head the entries that it reads."""

    def listed(self, plan, row):
        return sorted(plan[row])

    def reads_entry(self, listed, entry, row):
        return entry in listed

    def pattern(self, layer, head):
        if self.rules.patterns is not None:
            layers = self.rules.patterns[layer]
            if head in layers:
                return layers[head]
        return self.rules.default

    def plan(self, layer, head, queries, keys, scale):
        rules, size, n = self.rules, self.rules.block_size, len(keys)
        if len(queries) == 1 or n < rules.min_len or layer < rules.starting_layer:
            return None
        kind, *sizes = self.pattern(layer, head)
        reads = {}
        if kind == "vertical_slash":
            by_entry, by_distance = best_singles(queries, keys, scale, rules.probe)
            columns = forced(by_entry, rules.sink, max(sizes[0], rules.sink))
            distances = forced(by_distance, rules.recent, max(sizes[1], rules.recent))
        elif kind in ("a_shape", "tri_shape"):
            columns, distances = range(sizes[0]), range(min(n, sizes[1]))
        else:
            columns, distances = [], []
        query_means, key_means = block_means(queries, size), block_means(dict(enumerate(keys)), size)
        for row in queries:
            block = row // size
            found = {row} | {column for column in columns if column <= row}
            found |= at_distances(distances, row, rules.expand, size)
            if kind == "dense" or (kind == "tri_shape" and block >= (n - rules.n_last) // size):
                found |= set(range(row + 1))
            if kind == "block_sparse":
                scores = [dot(query_means[block], key_means[j]) for j in range(block + 1)]
                if rules.force_diagonal:
                    scores[block] = inf
                chosen = top(scores, min(sizes[0], len(scores)))
                found |= {entry for entry in range(row + 1) if entry // size in chosen}
            reads[row] = found
        return reads


@dataclass(frozen=True)
class MInference:
    """The rules' numbers; what is kept says `over`. `patterns`: for each layer {head: [kind, sizes]}."""

    patterns: Any = None
    default: Any = ("vertical_slash", 1000, 6096)
    expand: str = "tile"
    sink: int = 30
    recent: int = 100
    probe: int = 64
    n_last: int = 100
    force_diagonal: bool = True
    starting_layer: int = -1
    block_size: int = 64
    min_len: int = 0
    over: Any = field(default_factory=Full)
    runner = Shaped
