"""Policies that choose what each query head reads in a decode step.

The rules may act over an eviction policy's rules (`over`), which say what is held. `log` collects what was read:
(position of the row, layer) -> for each query head the positions.
"""

from dataclasses import dataclass, field
from typing import Any

from oracles.common.llama import Oracle, rotate
from oracles.full import Full


class Selecting(Oracle):
    """A decode step reads what `choose` says; prompts read everything. Decode steps may be run again, exactly."""

    def run(self, passes):
        self.log, self.decoded = {}, []
        self.start()
        return super().run(passes)

    def start(self):
        """Forget everything."""

    def again(self, tokens, decode):
        every = getattr(self.policy, "correct_every", 0)
        if not every:
            return []
        if decode and len(self.decoded) < every:
            self.decoded = self.decoded + tokens
            return []
        again, self.decoded = self.decoded, []
        return again

    def reads(self, layer, queries, row, positions, decode):
        reads = []
        for query_head, (entries, places, place) in enumerate(super().reads(layer, queries, row, positions, decode)):
            query = rotate(queries[row, query_head], place, self.theta).tolist()
            keys = [rotate(e.key, at, self.theta).tolist() for e, at in zip(entries, places, strict=True)]
            reads.append((entries, places, place, query, keys))
        if not decode:
            self.see_prompt(layer, [query for *_, query, _ in reads])
            return [read[:3] for read in reads]
        chosen = self.choose(layer, [([e.position for e in entries], q, k) for entries, _, _, q, k in reads])
        self.log[positions[row], layer] = chosen
        narrowed = []
        for (entries, places, place, *_), wanted in zip(reads, chosen, strict=True):
            held = [i for i, entry in enumerate(entries) if entry.position in wanted]
            narrowed.append(([entries[i] for i in held], [places[i] for i in held], place))
        return narrowed

    def see_prompt(self, layer, queries):
        """A prompt's row, with its query heads."""

    def choose(self, layer, heads):
        """For each query head (positions held, query, keys), all rotated: the positions that it reads."""
        raise NotImplementedError


@dataclass(frozen=True)
class Over:
    """Keeps what the eviction rules below keep."""

    over: Any = field(default_factory=Full, kw_only=True)

    evict = property(lambda self: self.over.evict)
    rope = property(lambda self: self.over.rope)
    prompt_only = property(lambda self: self.over.prompt_only)
    counts_reads = property(lambda self: self.over.counts_reads)

    def keep(self, entries, rows, seen):
        return self.over.keep(entries, rows, seen)
