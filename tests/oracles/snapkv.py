"""SnapKV in plain Python (spec section 7.2)."""

from dataclasses import dataclass

from oracles.common.rules import Rules, column_sums, pool, resolve, top


@dataclass(frozen=True)
class SnapKV(Rules):
    """The last entries and those that the prompt's last rows look at, pooled over neighbours.

    Evicts for prompt passes only; in decode the cache grows.
    """

    budget: int | float
    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"
    prompt_only = True

    def keep(self, entries, rows, seen):
        return self.window_and_best(entries, rows, resolve(self.budget, seen))

    def window_and_best(self, entries, rows, total):
        """Positions of `total` entries."""
        positions = [entry.position for entry in entries]
        if len(positions) <= total:
            return positions
        kept_window = min(self.window, total)
        candidates, last = positions[:-kept_window], positions[-kept_window:]
        mass = column_sums(rows[-self.window :])
        pooled = pool([mass.get(position, 0.0) for position in candidates], self.kernel_size, self.pooling)
        return [candidates[index] for index in top(pooled, total - kept_window)] + last
