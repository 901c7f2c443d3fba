"""TOVA: token omission via attention."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvpress.policy import Budget, Entries, EvictionPolicy, Mass, Quota, check_budget, check_count, check_room, quota_of


@dataclass(frozen=True, kw_only=True)
class TOVA(EvictionPolicy):
    """Keep the tokens that the last row attends to most, the same ones in all heads of a layer.

    An entry's score is the softmax weight that the newest row gives it, over all heads of the layer. After every pass the
    entries of the lowest scores leave, in decode one a step. Nothing is accumulated and nothing is protected: the newest
    token stays because its own row rarely gives it the least.

    Source: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104, and the authors' code
    (github.com/schwartz-lab-NLP/TOVA). Deviations: none in what is kept; the sum over the heads ranks as the authors' mean
    does. NVIDIA's kvpress compresses the prompt alone and always keeps the last token, as `recent=1` does here.

    Args:
        budget: entries kept per layer; int, or float share of the prompt's length (paper: down to 1/8 of the context, which
            is the default here).
        recent: most recent tokens kept whatever their score (authors: 0).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, or an int budget that is not larger than `recent`.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "arXiv 2401.06104"

    budget: Budget = 0.125
    recent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_count(self.recent, "recent", 0)
        check_room(self.budget, self.recent, "recent")

    @property
    def observes(self) -> Mass:
        return Mass(fading=0.0)

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        return "together"

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens, recent=self.recent)

    def score(self, entries: Entries) -> Tensor:
        """The last row's attention mass over all heads, [batch, kv_heads, n], the same for all kv heads."""
        # All heads keep the same entries, so a slot holds the same token in each of them.
        return entries.mass.sum(dim=1, keepdim=True).expand_as(entries.mass)
