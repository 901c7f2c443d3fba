"""Observed attention: what a prompt's rows attend to on average."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpress.policy import Budget, Entries, EvictionPolicy, Mass, Quota, check_budget, quota_of


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(EvictionPolicy):
    """Keep the tokens that got the most attention from each row that could see them, on average.

    An entry's score is the softmax weight it received, summed over the rows and the group, divided by the number of rows that
    can see it: the mean where `H2O` takes the sum, so early tokens have no advantage of age. At the end of a prompt pass each
    layer and kv head keeps the best entries, the newest having no protection; decode appends and never evicts.

    Source: ObservedAttentionPress of NVIDIA's kvpress (github.com/NVIDIA/kvpress); the averaged score was tried and found
    worse than the sum by Zhang et al., arXiv 2306.14048, appendix B.2. Deviations:

    - The share is of what stays (there: of what goes), and nothing stays whole by default: without a value of its own the
      method gets H2O's 20 %.
    - Later prompt passes compress again; an entry's rows are then all that came after it, decode steps too.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length.
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range.
    """

    name: ClassVar[str] = "observed_attention"
    paper: ClassVar[str] = "arXiv 2306.14048"

    budget: Budget = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)

    @property
    def observes(self) -> Mass:
        return Mass()

    @property
    def evict_every(self) -> None:
        return None

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens)

    def score(self, entries: Entries) -> Tensor:
        """The accumulated attention mass per row that can see the entry, [batch, kv_heads, n]."""
        assert entries.tokens is not None
        # The token at position j is seen by its own row and by all after it. (A slot that is empty does not count.)
        rows = entries.tokens[:, None, None] - entries.positions
        return entries.mass / rows
