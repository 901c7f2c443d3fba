"""KeyDiff in plain Python, over keys as lists of numbers."""

from dataclasses import dataclass
from math import hypot

from oracles.common.by_keys import ByKeys
from oracles.common.numbers import cosine
from oracles.common.rules import Rules, resolve, top


@dataclass(frozen=True)
class KeyDiff(Rules):
    """The keys that are least like the mean of all keys' directions."""

    budget: int | float
    prompt_only = True
    runner = ByKeys

    def keep_keys(self, keys, layer, seen):
        unit = [[x / hypot(*key) for x in key] for key in keys]
        anchor = [sum(column) / len(keys) for column in zip(*unit, strict=True)]
        return top([-cosine(key, anchor) for key in keys], resolve(self.budget, seen))
