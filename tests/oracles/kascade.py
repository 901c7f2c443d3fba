"""Kascade in plain Python: anchors pick for each kv head what they and the layers after them read."""

from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Any

from oracles.common.numbers import dot, softmax
from oracles.common.planning import Planned
from oracles.common.rules import resolve, top
from oracles.common.selecting import Selecting
from oracles.full import Full


class Cascade(Planned, Selecting):
    """`picked` is what the last anchor handed on: for each of its kv heads positions, or None for everything.

    In a prompt `tiles` holds that for each tile, by the number of its first row. `log` collects what decode steps read, as other
    selecting policies' oracles, and (layer, position of the row) -> the entries that the query heads of a prompt's row read.
    """

    def start(self):
        self.picked, self.tiles = None, {}

    def anchor(self, layer):
        anchors, layers = self.rules.anchors, self.config.num_hidden_layers
        if anchors is None:
            anchors = [0, 2, *(round(layers * share) for share in (0.2, 0.4, 0.6))]
        return max(anchor for anchor in anchors if anchor <= layer)

    def sources(self, layer):
        kv_heads = self.config.num_key_value_heads
        return range(kv_heads) if self.rules.head_map is None else self.rules.head_map[layer]

    def count(self, n):
        k = self.rules.k
        return min(n, k if isinstance(k, int) else max(resolve(k, n), self.rules.least))

    def of_heads(self, heads):
        """What belongs to query heads, by kv heads."""
        group = len(heads) // self.config.num_key_value_heads
        return [heads[start : start + group] for start in range(0, len(heads), group)]

    def attention(self, *given):
        self.scale = 1 / sqrt(self.config.head_dim)
        return super().attention(*given)

    # ------------------------------------------------------------------ decode steps

    def choose(self, layer, heads):
        if layer == self.anchor(layer):
            self.picked = [self.pick(group) for group in self.of_heads(heads)]
        groups = self.of_heads(heads)
        chosen = []
        for group, source in zip(groups, self.sources(layer), strict=True):
            picked = None if layer == 0 else self.picked[source]
            chosen += [[at for at in positions if picked is None or at in picked] for positions, _, _ in group]
        return chosen

    def pick(self, group):
        """The current token and the best others of a kv head; None for all."""
        positions = group[0][0]
        count = self.count(len(positions))
        if count == len(positions):
            return None
        mass = [0.0] * len(positions)
        for _, query, keys in group:
            for at, weight in enumerate(softmax([dot(query, key) * self.scale for key in keys])):
                mass[at] += weight
        mass[-1] = inf
        return [positions[at] for at in top(mass, count)]

    # ------------------------------------------------------------------ prompts

    def listed(self, plan, row):
        return sorted(plan[row])

    def reads_entry(self, listed, entry, row):
        return entry in listed

    def plan_heads(self, layer, queries, positions, heads):
        rules = self.rules
        if rules.decode_only:
            return [None] * heads
        inputs = self.of_heads([self.inputs(layer, queries, head, positions) for head in range(heads)])
        plans = []
        for kv_head, (group, source) in enumerate(zip(inputs, self.sources(layer), strict=True)):
            n, rows, plan = len(group[0][1]), len(positions), {}
            held = [entry.position for entry in self.heads[layer][kv_head].entries]
            for start in range(0, rows, rules.tile):
                tile = range(n - rows + start, n - rows + min(rows, start + rules.tile))
                if layer == self.anchor(layer):
                    found = self.pick_for(tile, group)
                    self.tiles[start, kv_head] = None if found is None else {held[entry] for entry in found}
                picked = None if layer == 0 else self.tiles[start, source]
                older = [entry for entry in range(tile[0]) if picked is None or held[entry] in picked]
                for row in tile:
                    plan[row] = {*older, *(entry for entry in tile if entry <= row)}
            plans += [plan] * len(group)
        return plans

    def pick_for(self, tile, group):
        """The entries before a tile that get the most of its rows' attention; None for all."""
        count = max(0, self.count(tile[-1] + 1) - len(tile))
        if count >= tile[0]:
            return None
        mass = [0.0] * tile[0]
        for queries, keys in group:
            for row in tile:
                weights = softmax([dot(queries[row], keys[entry]) * self.scale for entry in range(row + 1)])
                for entry in range(tile[0]):
                    mass[entry] += weights[entry]
        return top(mass, count)


@dataclass(frozen=True)
class Kascade:
    """The rules' numbers; what is kept says `over`."""

    k: Any = 0.1
    least: int = 128
    tile: int = 32
    anchors: Any = None
    head_map: Any = None
    decode_only: bool = False
    over: Any = field(default_factory=Full)
    runner = Cascade
