"""The policy of the README's "Write a policy", in a file of its own as it may lie in any project.

kvpress generate --policy examples/own_policy.py --budget 0.2 @long.txt
"""

from dataclasses import dataclass

from torch import Tensor

from kvpress.policy import Entries, EvictionPolicy, Quota, Window, entries_for


@dataclass(frozen=True, kw_only=True)
class LastRowWins(EvictionPolicy):
    """Keep what the last row of the prompt attends to."""

    name = "last_row"  # makes it kvpress.patch(model, "last_row")
    observes = Window(1)  # or Mass(): every row; or Nothing(), to score by entries.keys or .values
    evict_every = None  # evict after prompts only
    budget: float | int = 0.2

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return Quota(total=max(1, entries_for(self.budget, tokens)), recent=1)

    def score(self, entries: Entries) -> Tensor:  # [batch, kv_heads, n]
        return entries.mass
