"""TOVA in plain Python: a layer keeps what its last row looks at."""

from dataclasses import dataclass

from oracles.common.llama import Oracle
from oracles.common.rules import Rules, best_and_recent, resolve


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
class TOVA(Rules):
    """The entries that the last row looks at most in all heads of the layer; see `LayerWide`."""

    budget: int | float
    recent: int = 0
    runner = LayerWide

    def keep_by(self, scores, entries, seen):
        return best_and_recent(entries, scores, resolve(self.budget, seen), self.recent)
