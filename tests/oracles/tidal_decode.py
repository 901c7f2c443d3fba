"""TidalDecode in plain Python: one layer picks what the next ones read."""

from dataclasses import dataclass
from math import inf

from oracles.common.numbers import dot
from oracles.common.rules import resolve, top
from oracles.common.selecting import Over, Selecting


class Tidal(Selecting):
    def start(self):
        self.picked = None

    def choose(self, layer, heads):
        rules = self.policy
        first, second = rules.sparse_layer_start, rules.correction_layer
        if second is None:
            layers = self.config.num_hidden_layers
            second = max(first + 2, {28: 12, 32: 13, 80: 31}.get(layers, round(layers * 0.4)))
        everything = [positions for positions, _, _ in heads]
        if layer == 0:
            self.picked = None
        if layer in (first, second):
            self.picked = [self.pick(*head) for head in heads]
            return everything
        if self.picked is None:
            return everything
        return [
            [at for at in positions if picked is None or at in picked]
            for positions, picked in zip(everything, self.picked, strict=True)
        ]

    def pick(self, positions, query, keys):
        """The current token and the k - 1 best others; None for all."""
        k = resolve(self.policy.k, len(positions))
        if k >= len(positions):
            return None
        scores = [dot(query, key) for key in keys]
        scores[-1] = inf
        return [positions[i] for i in top(scores, k)]


@dataclass(frozen=True)
class TidalDecode(Over):
    k: int | float = 256
    sparse_layer_start: int = 2
    correction_layer: int | None = None
    correct_every: int = 0
    runner = Tidal
