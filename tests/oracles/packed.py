"""Packed in plain Python: each number is one of a few between the least and the greatest of its group."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from oracles.common.llama import Oracle, rotate
from oracles.full import Full


def rounded(numbers, bits, most):
    """A vector as it is read once it was packed; `most` channels at most share a scale, all groups are alike."""
    size = next(size for size in range(most, 0, -1) if len(numbers) % size == 0)
    read = []
    for start in range(0, len(numbers), size):
        group = numbers[start : start + size]
        least, scale = min(group), (max(group) - min(group)) / (2**bits - 1)
        # Python rounds half to even.
        read += [least + round((number - least) / scale) * scale if scale else least for number in group]
    return read


class Packing:
    """Comes before a runner: its rows, and what chooses what is kept, see entries as they are read."""

    def __init__(self, model, packing):
        super().__init__(model, packing.over)
        self.packing, self.packed = packing, {}

    def rounded(self, x):
        return torch.tensor(rounded(x.tolist(), self.packing.bits, self.packing.group), dtype=torch.float64)

    def attention(self, layer, x, positions, decode):
        self.fed = positions
        return super().attention(layer, x, positions, decode)

    def row(self, layer, queries, row, positions, decode):
        alone = decode or self.policy.evict == "each_row"
        newest, fresh = (positions[row], inf) if alone else (positions[-1], positions[0])
        self.newest = newest
        with self.as_read(layer, newest, fresh):
            return super().row(layer, queries, row, positions, decode)

    def evict(self, layer, prompt_seen, decode=False):
        at_once = not decode and self.policy.evict == "each_pass"
        with self.as_read(layer, self.newest, self.fed[0] if at_once else inf):
            super().evict(layer, prompt_seen, decode)

    @contextmanager
    def as_read(self, layer, newest, fresh):
        """Within the block a layer's entries are as read: exact the newest ones up to a position, and from another one on."""
        packing, theta, changed = self.packing, self.theta, []
        for entry in [entry for head in self.heads[layer] for entry in head.entries]:
            if entry.position >= fresh or entry.position > newest - packing.residual:
                continue
            changed.append((entry, entry.key, entry.value))
            if id(entry) not in self.packed:
                place = entry.position % packing.piece if packing.piece else entry.position
                stored = self.rounded(rotate(entry.key, place, theta))
                self.packed[id(entry)] = entry, rotate(stored, -place, theta), self.rounded(entry.value)
            _, entry.key, entry.value = self.packed[id(entry)]
        yield
        for entry, key, value in changed:
            entry.key, entry.value = key, value


@dataclass(frozen=True)
class Packed:
    """The packing's numbers; what is kept and read say the rules `over`.

    `piece`: keys are stored rotated at their places in pieces of so many tokens, by rules that rotate them or the queries to other
    positions than their own; 1 where they are stored without a rotation, None where at their own positions.
    """

    bits: int = 8
    group: int = 64
    residual: int = 32
    over: Any = field(default_factory=Full)
    piece: int | None = None

    def runner(self, model, rules):
        assert rules is self
        return type("Packing", (Packing, getattr(self.over, "runner", Oracle)), {})(model, self)
