"""Policies that keep entries by attention gathered over rows: rules in plain Python, and how their runs differ."""

from dataclasses import dataclass

from oracles.llama import Oracle
from oracles.policies import column_sums, heavy_and_recent, pool, resolve, share, top


def best_and_recent(entries, scores, total, recent):
    """Positions of the last `recent` entries and the best of the others, `total` in all."""
    recent = min(recent, total)
    return [entries[index].position for index in heavy_and_recent(scores, total - recent, recent)]


class Fading(Oracle):
    """Each row first multiplies what an entry has gathered by the rules' `alpha`."""

    def observe(self, layer, kv_head, position, mass, logits, decode):
        for entry in self.heads[layer][kv_head].entries:
            entry.score *= self.policy.alpha
        super().observe(layer, kv_head, position, mass, logits, decode)


@dataclass(frozen=True)
class H2OPrefill:
    """The last `recent` entries of a prompt and those with the largest sums over all its rows."""

    budget: int | float
    recent: int = 32
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True

    def keep(self, entries, rows, seen):
        return best_and_recent(entries, [entry.score for entry in entries], resolve(self.budget, seen), self.recent)


@dataclass(frozen=True)
class ObservedAttention:
    """The entries of a prompt with the largest mean over the rows that can see them."""

    budget: int | float
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True

    def keep(self, entries, rows, seen):
        means = [entry.score / len(range(entry.position, seen)) for entry in entries]
        return best_and_recent(entries, means, resolve(self.budget, seen), 0)


@dataclass(frozen=True)
class A2SF:
    """The entries with the most attention that fades with every row; see `Fading`."""

    budget: int | float
    alpha: float
    recent: int | float = 0
    evict: str = "each_pass"
    rope = "original"
    prompt_only = False
    runner = Fading

    def keep(self, entries, rows, seen):
        scores = [entry.score for entry in entries]
        return best_and_recent(entries, scores, resolve(self.budget, seen), share(self.recent, seen))


@dataclass(frozen=True)
class A2SFPrefill:
    """The same for a prompt alone."""

    budget: int | float
    alpha: float
    recent: int
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True
    runner = Fading

    def keep(self, entries, rows, seen):
        return best_and_recent(entries, [entry.score for entry in entries], resolve(self.budget, seen), self.recent)


class LayerWide(Oracle):
    """All kv heads of a layer keep the same positions, by what the last row alone gave in all of them together."""

    def observe(self, layer, kv_head, position, mass, logits, decode):
        for entry in self.heads[layer][kv_head].entries:
            entry.score = mass.get(entry.position, 0.0)

    def evict(self, layer, prompt_seen, decode=False):
        heads = self.heads[layer]
        positions = [entry.position for entry in heads[0].entries]
        assert all([entry.position for entry in head.entries] == positions for head in heads)
        scores = [sum(head.entries[index].score for head in heads) for index in range(len(positions))]
        kept = set(self.policy.keep_by(scores, heads[0].entries, prompt_seen))
        for head in heads:
            head.entries = [entry for entry in head.entries if entry.position in kept]


@dataclass(frozen=True)
class TOVA:
    """The entries that the last row looks at most in all heads of the layer; see `LayerWide`."""

    budget: int | float
    recent: int = 0
    evict: str = "each_pass"
    rope = "original"
    prompt_only = False
    runner = LayerWide

    def keep_by(self, scores, entries, seen):
        return best_and_recent(entries, scores, resolve(self.budget, seen), self.recent)


class PerLayer(Oracle):
    """The rules know which of how many layers they act on."""

    def evict(self, layer, prompt_seen, decode=False):
        for head in self.heads[layer]:
            kept = set(self.policy.keep_in(layer, len(self.heads), head.entries, head.rows, prompt_seen))
            head.entries = [entry for entry in head.entries if entry.position in kept]
            head.rows = []


@dataclass(frozen=True)
class PyramidKV:
    """SnapKV with `total_in` entries in a layer; see `PerLayer`."""

    budget: int | float
    window: int = 8
    kernel_size: int = 7
    pooling: str = "max"
    beta: int = 20
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True
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
        positions = [entry.position for entry in entries]
        total = self.total_in(layer, layers, seen)
        if len(positions) <= total:
            return positions
        last = min(self.window, total)
        candidates, window = positions[:-last], positions[-last:]
        mass = column_sums(rows[-self.window :])
        pooled = pool([mass.get(position, 0.0) for position in candidates], self.kernel_size, self.pooling)
        return [candidates[index] for index in top(pooled, total - last)] + window
