"""KeyDiff: keys that differ from the others."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvpress.policy import Budget, Entries, EvictionPolicy, Quota, check_budget, quota_of


@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictionPolicy):
    """Keep the entries whose keys are least like the mean of all keys; what was asked does not matter.

    A layer and kv head's anchor is the mean of its keys' directions, k / |k|, over all entries held. An entry's score is
    -cos(k, anchor), and the best `budget` entries stay. No query is looked at, so nothing depends on what comes after the
    text, and nothing is protected. At the end of a prompt pass; decode appends and never evicts.

    Source: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv 2504.15364 (abstract), and NVIDIA's kvpress. Deviations:

    - The paper reads a prompt in blocks of 128 tokens and evicts after each. Here a pass is a block: generate with
      `prefill_chunk_size=128` for that; one whole prompt is judged at once.
    - Keys are compared as they are cached, after the rotary embedding, in float32.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length (paper: 8192
            on LongBench).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range.
    """

    name: ClassVar[str] = "key_diff"
    paper: ClassVar[str] = "arXiv 2504.15364"

    budget: Budget = 8192

    def score(self, entries: Entries) -> Tensor:
        """How little a key is like the mean key, [batch, kv_heads, n]."""
        directions = normalize(entries.keys.float(), dim=-1).masked_fill_((entries.positions < 0)[..., None], 0.0)
        anchor = directions.mean(dim=2, keepdim=True)  # its length does not matter, so neither do empty slots
        return -cosine_similarity(directions, anchor, dim=-1)

    @property
    def evict_every(self) -> None:
        return None  # decode appends

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
