"""FINCH in plain Python (spec of the newer methods, section 3.6.6)."""

from dataclasses import dataclass, field

from oracles.common.rules import Rules, share, top


@dataclass(frozen=True)
class Finch(Rules):
    """The question, and the best of what is before it, at consecutive places.

    With `chunk` the entries before the question are cut into pieces of so many. Of the first k entries as many stay as their
    share of all that stay, rounded down, where k is the end of a piece.
    """

    budget: int | float
    question: int
    chunk: int | None = None
    rope: str = field(default="reindex", kw_only=True)
    prompt_only = True

    def keep(self, entries, rows, seen):
        positions = [entry.position for entry in entries]
        total = max(share(self.budget, seen), self.question)
        if len(positions) <= total:
            return positions
        candidates, asking = positions[: -self.question], positions[-self.question :]
        weights = scores(rows[-self.question :], candidates)
        size, room = self.chunk or len(candidates), total - self.question
        kept = []
        for start in range(0, len(candidates), size):
            stop = min(start + size, len(candidates))
            count = room * stop // len(candidates) - room * start // len(candidates)
            kept += [candidates[start + index] for index in top(weights[start:stop], count)]
        return kept + asking


def scores(rows, positions):
    """Each row times the number of entries it sees, and the mean over the rows."""
    return [sum(row.get(position, 0.0) * len(row) for row in rows) / len(rows) for position in positions]
