"""ObservedAttention in plain Python."""

from dataclasses import dataclass

from oracles.common.rules import Rules, best_and_recent, resolve


@dataclass(frozen=True)
class ObservedAttention(Rules):
    """The entries of a prompt with the largest mean over the rows that can see them."""

    budget: int | float
    prompt_only = True
    counts_reads = True

    def keep(self, entries, rows, seen):
        means = [entry.score / len(range(entry.position, seen)) for entry in entries]
        return best_and_recent(entries, means, resolve(self.budget, seen), 0)
