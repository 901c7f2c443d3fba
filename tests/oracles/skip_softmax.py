"""Skip-softmax in plain Python: which tiles of entries a tile of rows does not skip, one score at a time."""

from dataclasses import dataclass, field
from math import exp, inf
from typing import Any

from oracles.common.numbers import dot
from oracles.common.planning import Planned
from oracles.common.rules import check_apart
from oracles.full import Full


def walk(rows, keys, scale, skip, tile):
    """The tiles of entries that some rows read, ascending.

    rows: {entry: [d] list}; keys: [n] lists [d].
    """
    largest, read = dict.fromkeys(rows, -inf), []
    for start in range(0, max(rows) + 1, tile):
        tops = {
            row: max(scale * dot(query, keys[entry]) for entry in range(start, min(start + tile, row + 1)))
            for row, query in rows.items()
            if row >= start
        }
        after = {row: max(largest[row], top) for row, top in tops.items()}
        weights = [exp(top - after[row]) for row, top in tops.items()]
        if skip < 1:
            check_apart(max(weights), skip)
        if max(weights) >= skip:
            largest |= after
            read.append(start // tile)
    return read


class Skipping(Planned):
    """`log` collects (layer, position of the row) -> tiles per query head."""

    def plan(self, layer, head, queries, keys, scale):
        """The entry of the pass's first row, and the tiles that each tile of rows reads; None for everything."""
        rules, n = self.rules, len(keys)
        skip = min(1.0, rules.scale / n)
        if n <= rules.tile or n < rules.min_len or skip == 0:
            return None
        first = min(queries)
        tiles = []
        for start in range(first, n, rules.tile):
            rows = {row: queries[row] for row in range(start, min(n, start + rules.tile))}
            tiles.append(walk(rows, keys, scale, skip, rules.tile))
        return first, tiles

    def listed(self, plan, row):
        first, tiles = plan
        return tiles[(row - first) // self.rules.tile]

    def reads_entry(self, listed, entry, row):
        return entry // self.rules.tile in listed


@dataclass(frozen=True)
class SkipSoftmax:
    """The rules' numbers; what is kept says `over`."""

    scale: float = 588.0
    tile: int = 128
    min_len: int = 0
    over: Any = field(default_factory=Full)
    runner = Skipping
