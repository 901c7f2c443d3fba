"""A2SF as a compression of the prompt alone."""

from dataclasses import dataclass
from typing import ClassVar

from kvpress.policy import (
    Budget,
    EvictionPolicy,
    Mass,
    Quota,
    check_budget,
    check_count,
    check_factor,
    check_room,
    quota_of,
)


@dataclass(frozen=True, kw_only=True)
class A2SFPrefill(EvictionPolicy):
    """Keep what the end of the prompt attends to, by a window that fades out, and the most recent tokens; decode appends.

    At the end of a prompt pass each layer and kv head keeps its last `recent` entries and, of the others, the best
    `budget - recent` by the softmax weights of all rows, summed over the group, where each row counts `alpha` times what the
    next one does. With 0.95 that is a soft window of about the last 20 rows. Decode never evicts.

    Source: the current code of the authors of A2SF (github.com/Dirac-Notation/A2SF); for the paper's method see `A2SF`.
    Deviations:

    - A budget smaller than `recent` keeps the last `budget` tokens (a share of a short prompt can be that small); as an int it
      is refused.
    - Later prompt passes compress again, by all that an entry has received since it came in; decode steps count, and fade
      what came before, like any other row.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length.
        alpha: forgetting factor in [0, 1]; 1 is the plain sum of `H2OPrefill`.
        recent: most recent tokens kept.
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, or an int budget that is not larger than `recent`.
    """

    name: ClassVar[str] = "a2sf_prefill"
    paper: ClassVar[str] = "arXiv 2407.20485"

    budget: Budget = 256
    alpha: float = 0.95
    recent: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_factor(self.alpha, "alpha")
        check_count(self.recent, "recent", 0)
        check_room(self.budget, self.recent, "recent")

    @property
    def observes(self) -> Mass:
        return Mass(fading=float(self.alpha))

    @property
    def evict_every(self) -> None:
        return None

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens, recent=self.recent)
