"""Knorm in plain Python, over keys as lists of numbers."""

from dataclasses import dataclass
from math import hypot

from oracles.common.by_keys import ByKeys
from oracles.common.rules import Rules, resolve, top


@dataclass(frozen=True)
class Knorm(Rules):
    """The shortest keys."""

    budget: int | float
    skip_layers: int = 0
    prompt_only = True
    runner = ByKeys

    def keep_keys(self, keys, layer, seen):
        count = len(keys) if layer < self.skip_layers else resolve(self.budget, seen)
        return top([-hypot(*key) for key in keys], count)
