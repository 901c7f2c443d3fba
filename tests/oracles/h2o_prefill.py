"""H2O for a prompt alone, in plain Python."""

from dataclasses import dataclass

from oracles.common.rules import Rules, best_and_recent, resolve


@dataclass(frozen=True)
class H2OPrefill(Rules):
    """The last `recent` entries of a prompt and those with the largest sums over all its rows."""

    budget: int | float
    recent: int = 32
    prompt_only = True
    counts_reads = True

    def keep(self, entries, rows, seen):
        return best_and_recent(entries, [entry.score for entry in entries], resolve(self.budget, seen), self.recent)
