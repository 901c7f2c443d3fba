"""A2SF in plain Python: H2O whose sums fade."""

from dataclasses import dataclass

from oracles.common.llama import Oracle
from oracles.common.rules import Rules, best_and_recent, resolve, share


class Fading(Oracle):
    """Each row first multiplies what an entry has gathered by the rules' `alpha`."""

    def observe(self, layer, kv_head, position, mass, logits, decode):
        for entry in self.heads[layer][kv_head].entries:
            entry.score *= self.policy.alpha
        super().observe(layer, kv_head, position, mass, logits, decode)


@dataclass(frozen=True)
class A2SF(Rules):
    """The entries with the most attention that fades with every row; see `Fading`."""

    budget: int | float
    alpha: float
    recent: int | float = 0
    runner = Fading

    counts_reads = property(lambda self: self.alpha == 1)

    def keep(self, entries, rows, seen):
        scores = [entry.score for entry in entries]
        return best_and_recent(entries, scores, resolve(self.budget, seen), share(self.recent, seen))
