"""Knorm: keys of small norm."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvpress.policy import UNLIMITED, Budget, Entries, EvictionPolicy, Quota, check_budget, check_count, quota_of


@dataclass(frozen=True, kw_only=True)
class Knorm(EvictionPolicy):
    """Keep the entries whose keys are short: they tend to get much attention, whoever asks.

    An entry's score is minus the Euclidean norm of its key, which no rotation changes. At the end of a prompt pass each layer and
    kv head keeps the best `budget` entries, none protected. Decode appends and never evicts.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430
    (abstract), and NVIDIA's kvpress. Deviations:

    - The authors are said to leave the first two layers whole; here `skip_layers` says how many, none by default.
    - The norm is taken in float32.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length (paper: down
            to 0.5 in language modelling, the default).
        skip_layers: first layers that keep everything.
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "arXiv 2406.11430"

    budget: Budget = 0.5
    skip_layers: int = 0

    def score(self, entries: Entries) -> Tensor:
        """How short a key is, [batch, kv_heads, n]."""
        return -entries.keys.float().norm(dim=-1)

    @property
    def evict_every(self) -> None:
        return None  # decode appends

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return Quota(UNLIMITED, 0) if layer < self.skip_layers else quota_of(self.budget, tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_count(self.skip_layers, "skip_layers", 0)
