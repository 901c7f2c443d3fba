"""SnapKV: what the end of the prompt looks at."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvpress.policy import (
    Budget,
    Entries,
    EvictionPolicy,
    Quota,
    Window,
    check_budget,
    check_count,
    check_pooling,
    check_room,
    pooled_mass,
    quota_of,
)


@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictionPolicy):
    """Keep what the last rows of the prompt attend to, with its neighbours, and those last rows themselves.

    At the end of a prompt pass the softmax weights of its last `window` rows are summed over the rows and the group, pooled
    over neighbouring entries, and the best `budget - window` of the entries before the window stay, with the window. Decode
    appends and never evicts.

    Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469, and the authors'
    code. Deviations:

    - One set per kv head, by the sum over its query heads before pooling (the authors repeat K and V to all query heads and
      keep a set for each, which holds G times the memory).
    - A budget smaller than the window keeps the last `budget` tokens (a share of a short prompt can be that small); as an
      int it is refused. The authors assert window < budget.
    - Later prompt passes compress again: their last rows score all entries still held.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length
            (authors: 1024 to 4096 entries).
        window: last rows of the prompt that score, and are always kept.
        kernel_size: odd width of the pooling over neighbours; 1 is no pooling.
        pooling: "avg" (authors' default) or "max".
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, an even `kernel_size`, or an int budget that is not larger than `window`.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv 2404.14469"

    budget: Budget = 2048
    window: int = 32
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"

    @property
    def observes(self) -> Window:
        return Window(self.window)

    @property
    def evict_every(self) -> None:
        return None  # decode appends

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens, recent=self.window)

    def score(self, entries: Entries) -> Tensor:
        """The window's attention mass, pooled over the candidates in position order, [batch, kv_heads, n]."""
        return pooled_mass(entries, self.kernel_size, self.pooling)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_count(self.window, "window", 1)
        check_pooling(self.kernel_size, self.pooling)
        check_room(self.budget, self.window, "window")
