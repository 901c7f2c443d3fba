"""StreamingLLM in plain Python (spec section 7.1)."""

from dataclasses import dataclass, field

from oracles.common.rules import Rules, resolve, share, sink_and_recent


@dataclass(frozen=True)
class StreamingLLM(Rules):
    """The first `sink` and the last `recent` entries.

    Give `recent`, or `budget` for both together; a share too small for the sinks keeps them and one recent entry.
    """

    sink: int = 4
    recent: int | float | None = None
    budget: int | float | None = None
    rope: str = field(default="reindex", kw_only=True)

    def parts(self, seen):
        """(sink, recent) in entries."""
        if self.budget is not None:
            total = max(self.sink + 1, resolve(self.budget, seen))
            return self.sink, total - self.sink
        return self.sink, max(1, share(self.recent, seen))

    def keep(self, entries, rows, seen):
        sink, recent = self.parts(seen)
        return [entries[index].position for index in sink_and_recent(len(entries), sink, recent)]
