"""HiP in plain Python: a walk down a tree for each block of rows, one product at a time."""

from dataclasses import dataclass, field
from math import floor
from typing import Any

from oracles.common.llama import rotate
from oracles.common.numbers import dot
from oracles.common.planning import Planned
from oracles.common.rules import top
from oracles.full import Full


def nearest(x):
    return floor(x + 0.5)


def first_ranges(leaves, keep):
    """All leaves as so many ranges (first, last)."""
    return [(nearest(j * leaves / keep), nearest((j + 1) * leaves / keep) - 1) for j in range(keep)]


def walk(leaves, keep, score):
    """The leaves that are found, ascending."""
    if leaves <= keep:
        return list(range(leaves))
    ranges = first_ranges(leaves, keep)
    while any(first < last for first, last in ranges):
        halves = []
        for first, last in ranges:
            if first == last:
                halves.append((first, last))
            else:
                middle = nearest((first + last) / 2)
                halves += [(first, middle - 1), (middle, last)]
        scores = [score((first + last) // 2) for first, last in halves]
        ranges = [halves[index] for index in top(scores, keep)]
    return [first for first, _ in ranges]


class Walking(Planned):
    """`log` collects (layer, position of the row) -> for each query head the entries (by their place) that it reads."""

    def run(self, passes):
        self.found, self.steps = {}, {}
        return super().run(passes)

    def listed(self, plan, row):
        return plan[row // self.rules.block_size]

    def reads_entry(self, listed, entry, row):
        return entry in listed

    def plan(self, layer, head, queries, keys, scale):
        rules, n, size = self.rules, len(keys), self.rules.block_size
        self.found, self.steps = {}, {}
        if len(queries) == 1 or n <= rules.k or n < rules.min_len or layer < rules.dense_layers:
            return None
        plan, rows = {}, sorted(queries)
        for block in sorted({row // size for row in rows}):
            compared = range(block * size, (block + 1) * size, rules.row_stride)
            compared = [queries[min(max(row, rows[0]), rows[-1])] for row in compared]
            seen = min(n, (block + 1) * size)
            plan[block] = self.read(self.search(compared, keys[:seen]), seen, block * size)
        return plan

    def search(self, queries, keys):
        """The leaves that rows find."""
        leaf = self.rules.key_block_size

        def score(at):
            return max(dot(query, key) for query in queries for key in keys[at * leaf : (at + 1) * leaf])

        return walk(-(-len(keys) // leaf), self.rules.k // leaf, score)

    def read(self, found, seen, first_row):
        """The entries in these leaves, the first ones, and the window, of so many seen."""
        rules, leaf = self.rules, self.rules.key_block_size
        start = max(0, first_row - rules.window + 1)
        return [
            entry
            for entry in range(seen)
            if entry // leaf in found or entry // leaf * leaf < rules.sink or entry // leaf >= start // leaf
        ]

    def reads(self, layer, queries, row, positions, decode):
        reads = super().reads(layer, queries, row, positions, decode)
        if not decode:
            return reads
        self.steps[layer] = self.steps.get(layer, 0) + 1
        if layer < self.rules.dense_layers:
            return reads
        narrowed, log = [], []
        for head, (entries, places, place) in enumerate(reads):
            if (self.steps[layer] - 1) % self.rules.refresh == 0:
                query = rotate(queries[row, head], place, self.theta).tolist()
                keys = [rotate(e.key, at, self.theta).tolist() for e, at in zip(entries, places, strict=True)]
                self.found[layer, head] = self.search([query], keys)
            held = self.read(self.found[layer, head], len(entries), len(entries) - 1)
            log.append([entries[i].position for i in held])
            narrowed.append(([entries[i] for i in held], [places[i] for i in held], place))
        self.log[layer, positions[row]] = log
        return narrowed


@dataclass(frozen=True)
class HiP:
    """The rules' numbers; what is kept says `over`."""

    k: int = 512
    window: int = 256
    sink: int = 32
    block_size: int = 32
    key_block_size: int = 2
    row_stride: int = 4
    dense_layers: int = 3
    refresh: int = 8
    min_len: int = 0
    over: Any = field(default_factory=Full)
    runner = Walking
