"""PyramidKV in plain Python: SnapKV with fewer entries in later layers."""

from dataclasses import dataclass

from oracles.common.llama import Oracle
from oracles.common.rules import resolve
from oracles.snapkv import SnapKV


class PerLayer(Oracle):
    """The rules know which of how many layers they act on."""

    def evict(self, layer, prompt_seen, decode=False):
        for head in self.heads[layer]:
            kept = set(self.policy.keep_in(layer, len(self.heads), head.entries, head.rows, prompt_seen))
            head.entries = [entry for entry in head.entries if entry.position in kept]
            head.rows = []


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with `total_in` entries in a layer; see `PerLayer`."""

    window: int = 8
    kernel_size: int = 7
    pooling: str = "max"
    beta: int = 20
    runner = PerLayer

    def total_in(self, layer, layers, seen):
        """Entries of one layer."""
        capacity = resolve(self.budget, seen)
        mean = capacity - self.window
        if mean <= 0 or seen <= capacity or seen < 2 * mean or layers == 1:
            return capacity
        smallest = mean // self.beta
        largest = 2 * mean - smallest
        if self.window + largest >= seen:
            largest = seen - self.window
            smallest = 2 * mean - largest
        sizes = [largest]
        while len(sizes) < layers:
            sizes.append(sizes[-1] - (largest - smallest) // (layers - 1))
        return sizes[layer] + self.window

    def keep_in(self, layer, layers, entries, rows, seen):
        return self.window_and_best(entries, rows, self.total_in(layer, layers, seen))
