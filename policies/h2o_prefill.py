"""H2O as a compression of the prompt alone."""

from dataclasses import dataclass
from typing import ClassVar

from kvpress.policy import Budget, EvictionPolicy, Mass, Quota, check_budget, check_count, check_room, quota_of


@dataclass(frozen=True, kw_only=True)
class H2OPrefill(EvictionPolicy):
    """Keep the tokens that all rows of the prompt attended to most, and the most recent ones; decode appends.

    At the end of a prompt pass each layer and kv head keeps its last `recent` entries and, of the others, the best
    `budget - recent` by the softmax weights that all rows gave them, summed over the group. Decode never evicts. This is what
    most comparisons on long prompts call H2O; `H2O` is the method of its paper, which also evicts at every decode step.

    Source: the H2O of KVCache-Factory (github.com/Zefan-Cai/KVCache-Factory), after Zhang et al., "H2O: Heavy-Hitter Oracle
    for Efficient Generative Inference of Large Language Models", arXiv 2306.14048. Deviations:

    - One set per kv head, by the sum over its query heads (there: one per query head by default, which holds G times the
      memory).
    - A budget smaller than `recent` keeps the last `budget` tokens (a share of a short prompt can be that small); as an int it
      is refused.
    - Later prompt passes compress again, by all that an entry has received since it came in, also from decode steps.
    - The kernel size that is accepted and not used there is left out.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length (there: 2048
            when nothing is set).
        recent: most recent tokens kept (there: 32 when nothing is set, 8 in the LongBench runs).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, or an int budget that is not larger than `recent`.
    """

    name: ClassVar[str] = "h2o_prefill"
    paper: ClassVar[str] = "arXiv 2306.14048"

    budget: Budget = 2048
    recent: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_count(self.recent, "recent", 0)
        check_room(self.budget, self.recent, "recent")

    @property
    def observes(self) -> Mass:
        return Mass()

    @property
    def evict_every(self) -> None:
        return None

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens, recent=self.recent)
