"""A2SF: accumulated attention with a forgetting factor."""

from dataclasses import dataclass
from typing import ClassVar

from kvpress.errors import PolicyError
from kvpress.policy import (
    Budget,
    EvictionPolicy,
    Mass,
    Quota,
    check_budget,
    check_factor,
    entries_for,
    quota_of,
)


@dataclass(frozen=True, kw_only=True)
class A2SF(EvictionPolicy):
    """Keep the tokens that got the most attention lately: accumulated attention that fades with every row.

    An entry's score is the softmax weight it received, summed over the group and accumulated over the rows since it came in,
    where each new row first multiplies what was accumulated by `alpha`. Without that early tokens, which more rows have seen,
    always lead. After every row one entry too many leaves, from all that are held: the newest is not protected, unless by
    `recent`.

    Source: Jo and Shin, "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer
    Decoder", arXiv 2407.20485, and the authors' code (github.com/Dirac-Notation/A2SF). Deviations:

    - The paper's prompt is `evict="each_row"`: its rows are attended and evicted one after the other, which is slow and
      makes the prompt's own output sparse. By default the prompt is attended densely; its rows give the same weighted sum,
      and the entries over the budget leave at the end.
    - One set per kv head, by the sum over its query heads (the paper's models have no groups; the authors' later code sums).
    - A share is of the tokens seen when a prompt pass ends (the paper scores known texts, and takes the whole text).

    Args:
        budget: entries kept per layer and kv head; int, or float share of the prompt's length (paper: 0.1 to 0.8, its
            tables 0.2).
        alpha: forgetting factor in [0, 1]; 1 is H2O's plain sum, 0 looks at the last row alone. 0.2 is the default of the
            authors' code and the middle of the range, 0.1 to 0.3, that the paper finds best (its tables: 0.1 and 0.5).
        recent: most recent tokens kept, within the budget; int, or float share of the prompt (paper: 0).
        evict: see `EvictionPolicy`. "each_row" is the paper's prompt; it needs an int budget for the chunks of a prompt not to
            matter, and a cache: a pass with `use_cache=False` is exact.

    Raises:
        PolicyError: a value out of range, or `recent` larger than the budget or of the other kind (entries and shares).
    """

    name: ClassVar[str] = "a2sf"
    paper: ClassVar[str] = "arXiv 2407.20485"

    budget: Budget = 0.2
    alpha: float = 0.2
    recent: Budget = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_factor(self.alpha, "alpha")
        check_budget(self.recent, "recent", minimum=0)
        if self.recent and isinstance(self.recent, int) != isinstance(self.budget, int):
            raise PolicyError(
                f"recent={self.recent!r} with budget={self.budget!r}: give both as entries (int) or both as shares (float)"
            )
        if self.recent > self.budget:
            raise PolicyError(
                f"recent={self.recent!r} is larger than budget={self.budget!r}; lower it or raise the budget"
            )

    @property
    def observes(self) -> Mass:
        return Mass(fading=float(self.alpha))

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens, recent=entries_for(self.recent, tokens))
