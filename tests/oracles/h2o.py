"""H2O in plain Python (spec section 1.2)."""

from dataclasses import dataclass

from oracles.common.rules import Rules, heavy_and_recent, resolve, share


@dataclass(frozen=True)
class H2O(Rules):
    """The `heavy` entries of most accumulated softmax mass and the last `recent`.

    Give `heavy` and `recent`, or `budget` for both together: then heavy is the smaller half.
    """

    heavy: int | float | None = None
    recent: int | float | None = None
    budget: int | float | None = None
    counts_reads = True

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
