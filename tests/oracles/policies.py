"""What each eviction policy keeps, in plain Python: the rules only, no tensors.

A policy has `rope` and `prompt_only`, says when it evicts (`evict`), and answers `keep(entries, rows, seen)`:
  entries  what one kv head holds, in position order; each has `.position` and `.score`
  rows     the prompt's query rows since the last eviction point, oldest first, each a dict
           {position: softmax mass summed over the group's query heads}
  seen     the sequence's real tokens when the latest prompt pass ended
  returns  the positions that stay
"""

from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf


def share(amount, seen):
    """An int is that many entries; a float is a share of `seen`, rounded down in exact decimal arithmetic."""
    if isinstance(amount, int):
        return amount
    return floor(Fraction(str(amount)) * seen)


def resolve(budget, seen):
    """The total number of entries that a `budget` means: at least 1."""
    return max(1, share(budget, seen))


def column_sums(rows):
    """{position: mass that all `rows` together put on it}; a row puts nothing on what it does not see."""
    sums = {}
    for row in rows:
        for position, mass in row.items():
            sums[position] = sums.get(position, 0.0) + mass
    return sums


def top(scores, count):
    """Indices of the `count` largest scores, ascending; of equal scores the smaller index wins."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(order[:count])


def heavy_and_recent(scores, heavy, recent):
    """Indices of the `heavy` largest scores outside the last `recent`, then of those last `recent`."""
    if len(scores) <= heavy + recent:
        return list(range(len(scores)))
    first_recent = len(scores) - recent
    return top(scores[:first_recent], heavy) + list(range(first_recent, len(scores)))


def sink_and_recent(count, sink, recent):
    """Indices of the first `sink` and the last `recent` of `count` entries."""
    return [index for index in range(count) if index < sink or index >= count - recent]


def pool(scores, kernel_size, pooling):
    """1-d pooling, stride 1, padding kernel_size // 2: "avg" counts the zero padding, "max" pads with -inf."""
    half = kernel_size // 2
    padding = {"avg": 0.0, "max": -inf}[pooling]
    padded = [padding] * half + list(scores) + [padding] * half
    windows = [padded[index : index + kernel_size] for index in range(len(scores))]
    if pooling == "avg":
        return [sum(window) / kernel_size for window in windows]
    return [max(window) for window in windows]


def rope_positions(positions, rope):
    """Where entries held at `positions` are rotated: there ("original") or at 0..m-1 ("reindex")."""
    return list(range(len(positions))) if rope == "reindex" else list(positions)


@dataclass(frozen=True)
class Full:
    """Keeps everything: exact attention (spec section 0.8, U1)."""

    rope = "original"
    prompt_only = False
    evict = "each_pass"

    def keep(self, entries, rows, seen):
        return [entry.position for entry in entries]


@dataclass(frozen=True)
class StreamingLLM:
    """The first `sink` and the last `recent` entries (spec section 7.1).

    Give `recent`, or `budget` for both together; a share too small for the sinks keeps them and one recent entry.
    """

    sink: int = 4
    recent: int | float | None = None
    budget: int | float | None = None
    rope: str = "reindex"
    evict: str = "each_pass"
    prompt_only = False

    def parts(self, seen):
        """(sink, recent) in entries."""
        if self.budget is not None:
            total = max(self.sink + 1, resolve(self.budget, seen))
            return self.sink, total - self.sink
        return self.sink, max(1, share(self.recent, seen))

    def keep(self, entries, rows, seen):
        sink, recent = self.parts(seen)
        return [entries[index].position for index in sink_and_recent(len(entries), sink, recent)]


@dataclass(frozen=True)
class H2O:
    """The `heavy` entries of most accumulated softmax mass and the last `recent` (spec section 1.2).

    Give `heavy` and `recent`, or `budget` for both together: then heavy is the smaller half.
    """

    heavy: int | float | None = None
    recent: int | float | None = None
    budget: int | float | None = None
    rope: str = "original"
    evict: str = "each_pass"
    prompt_only = False

    def parts(self, seen):
        """(heavy, recent) in entries."""
        if self.budget is not None:
            total = resolve(self.budget, seen)
            return total // 2, total - total // 2
        heavy, recent = share(self.heavy, seen), share(self.recent, seen)
        return heavy, recent if heavy + recent > 0 else 1

    def keep(self, entries, rows, seen):
        heavy, recent = self.parts(seen)
        scores = [entry.score for entry in entries]
        return [entries[index].position for index in heavy_and_recent(scores, heavy, recent)]


@dataclass(frozen=True)
class SnapKV:
    """The last entries and those that the prompt's last rows look at, pooled over neighbours (spec section 7.2).

    Evicts for prompt passes only; in decode the cache grows.
    """

    budget: int | float
    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"
    evict: str = "each_pass"
    rope = "original"
    prompt_only = True

    def keep(self, entries, rows, seen):
        positions = [entry.position for entry in entries]
        total = resolve(self.budget, seen)
        if len(positions) <= total:
            return positions
        kept_window = min(self.window, total)
        candidates, last = positions[:-kept_window], positions[-kept_window:]
        mass = column_sums(rows[-self.window :])
        pooled = pool([mass.get(position, 0.0) for position in candidates], self.kernel_size, self.pooling)
        return [candidates[index] for index in top(pooled, total - kept_window)] + last
