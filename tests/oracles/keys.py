"""Policies that keep entries by their keys alone: rules in plain Python over lists of numbers."""

from dataclasses import dataclass
from math import hypot

from oracles.llama import Oracle, rotate
from oracles.policies import resolve, top


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (hypot(*a) * hypot(*b))


class ByKeys(Oracle):
    """The rules see each entry's key as it is cached, rotated at the entry's position, and the layer."""

    def evict(self, layer, prompt_seen, decode=False):
        for head in self.heads[layer]:
            keys = [rotate(entry.key, entry.position, self.theta).tolist() for entry in head.entries]
            head.entries = [head.entries[index] for index in self.policy.keep_keys(keys, layer, prompt_seen)]
            head.rows = []


@dataclass(frozen=True)
class KeyDiff:
    """The keys that are least like the mean of all keys' directions."""

    budget: int | float
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True
    runner = ByKeys

    def keep_keys(self, keys, layer, seen):
        unit = [[x / hypot(*key) for x in key] for key in keys]
        anchor = [sum(column) / len(keys) for column in zip(*unit, strict=True)]
        return top([-cosine(key, anchor) for key in keys], resolve(self.budget, seen))


@dataclass(frozen=True)
class Knorm:
    """The shortest keys."""

    budget: int | float
    skip_layers: int = 0
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True
    runner = ByKeys

    def keep_keys(self, keys, layer, seen):
        count = len(keys) if layer < self.skip_layers else resolve(self.budget, seen)
        return top([-hypot(*key) for key in keys], count)
