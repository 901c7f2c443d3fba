"""StreamingLLM: attention sinks and a sliding window."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.policy import (
    Budget,
    Entries,
    EvictionPolicy,
    Own,
    Places,
    Quota,
    Sinks,
    check_budget,
    check_choice,
    check_count,
    entries_for,
)

DEFAULT_RECENT = 512


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionPolicy):
    """Keep the first few tokens (attention sinks) and a window of the most recent ones.

    The same positions stay in every layer and kv head, whatever the content. After every pass entries between the first
    `sink` and the last `recent` are evicted. With `rope="reindex"` attention sees the kept entries at the consecutive
    positions 0 .. m-1, as in the paper, so distances never exceed the size of the cache.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, and the authors'
    code. Deviations:

    - Keys are cached after the rotary embedding. Re-indexing is done by rotating the query back by the gap for the sinks,
      which gives the same scores (rotary attention depends on distances only) without rotating the cache at every step.
    - The authors make room before a turn of new tokens; here the cache is at its budget after every pass, and the tokens
      of a pass see all that was kept before.
    - A share of a short prompt that has no room for the sinks and one recent token keeps those `sink + 1` entries.

    Args:
        sink: first tokens kept (authors: 4).
        recent: most recent tokens kept; int, or float share of the prompt (authors' class: 512, the default here).
        budget: sink and recent together, instead of `recent`; what is left after the sinks is the window.
        rope: "reindex" (paper) or "original" (keys and query stay at their own positions; for models without rotary
            embedding and for comparisons).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, both `recent` and `budget`, or a budget without room for the
            sinks and one recent token.
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "arXiv 2309.17453"

    sink: int = 4
    recent: Budget | None = None
    budget: Budget | None = None
    rope: Literal["reindex", "original"] = "reindex"

    @property
    def places(self) -> Places:
        return Sinks(self.sink) if self.rope == "reindex" and self.sink else Own()

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        if self.budget is None:
            recent = max(1, entries_for(DEFAULT_RECENT if self.recent is None else self.recent, tokens))
            return Quota(self.sink + recent, recent)
        total = max(self.sink + 1, entries_for(self.budget, tokens))
        return Quota(total, total - self.sink)

    def score(self, entries: Entries) -> Tensor:
        """Earlier is better: [batch, kv_heads, n]."""
        return -entries.positions.float()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.sink, "sink", 0)
        check_choice(self.rope, "rope", ("reindex", "original"))
        if self.recent is not None and self.budget is not None:
            raise PolicyError(
                f"recent={self.recent!r} and budget={self.budget!r}: give one of them, as StreamingLLM(budget=0.2) or "
                "StreamingLLM(sink=4, recent=512)"
            )
        if self.recent is not None:
            check_budget(self.recent, "recent")
        if self.budget is not None:
            check_budget(self.budget)
            if isinstance(self.budget, int) and self.budget <= self.sink:
                raise PolicyError(
                    f"budget={self.budget} has no room for sink={self.sink} and one recent token; give at least {self.sink + 1}"
                )
