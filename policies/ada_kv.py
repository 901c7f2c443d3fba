"""Ada-KV: a layer's entries go to the kv heads that can use them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.topk_select import topk_select
from kvpress.policies.snapkv import SnapKV
from kvpress.policy import (
    Budget,
    Entries,
    EvictionPolicy,
    Mass,
    Observer,
    Policy,
    Quota,
    SelectionPolicy,
    check_choice,
    check_factor,
)


@dataclass(frozen=True, kw_only=True)
class AdaKV(EvictionPolicy):
    """Share a layer's entries among its kv heads by their scores: `AdaKV(SnapKV(budget=1024))`.

    The inner policy says how many entries a kv head keeps on average, which newest ones of them always stay, and scores
    the others. With `b` entries beside the newest, each kv head is sure of its best alpha * b; the rest of the layer's
    kv_heads * b goes to the best scores of all kv heads together. So a head that looks at few tokens holds little, one that
    looks at many holds more, and the layer as many as under the inner policy, to the entry. What a head does not hold
    takes no memory. How many a layer holds remains the inner policy's affair: with `PyramidKV` it falls from layer to layer.
    Decode appends and never evicts.

    Source: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arXiv 2407.11550, and the authors' code (github.com/FFY0/AdaKV). Deviations:

    - The safeguard comes first and the best of all heads after it. The authors take the best kv_heads * b of all heads first,
      and a head with f of them gets (1 - alpha) * f + alpha * b, rounded: then the heads together may hold a few entries more
      or fewer than the layer's budget, or a head less than there is room for. Both are the uniform budget at alpha = 1 and the
      best of all heads at alpha = 0.
    - Heads are kv heads, with the inner policy's scores (the paper's are query heads; the authors' later code has kv heads too).
    - Scores are the inner policy's: `SnapKV` sums over the window's rows where the authors take the mean, which is the same
      ranking.
    - Any policy that evicts after prompts alone can be the inner one, not only SnapKV and PyramidKV.
    - Later prompt passes share anew, among the entries that each head still holds.

    The entries of a layer lie in pages of 32 slots, each of which belongs to one kv head. A head's last page is partly empty,
    16 slots on average, and is read whole; with mean budgets below about 200 entries that is felt. While a prompt pass runs,
    its layer is a rectangle as long as its longest head. Selection policies need that rectangle in decode and are refused.

    Args:
        inner: the policy that scores, with its budget: the mean over the kv heads of a layer.
        alpha: part of the uniform budget that each kv head is sure of, in [0, 1] (authors: 0.2). With 1 it is the inner policy,
            bit for bit.
        normalize: for the comparison between heads, scale a head's scores by the part of their sum that its best `b` have, as
            the authors' code does on request: a head whose attention is spread out gets less from it.
        evict: see `EvictionPolicy`; "after_prompt" if the inner policy says so.

    Raises:
        PolicyError: a value out of range, or an inner policy that evicts in decode, or not at all.
    """

    name: ClassVar[str] = "ada_kv"
    paper: ClassVar[str] = "arXiv 2407.11550"
    wraps: ClassVar[str | None] = "inner"

    inner: EvictionPolicy = field(default=SnapKV(), kw_only=False)
    alpha: float = 0.2
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_inner(self.inner)
        check_factor(self.alpha, "alpha")
        check_choice(self.normalize, "normalize", (True, False))
        if self.inner.evict != "each_pass":
            object.__setattr__(self, "evict", self.inner.evict)

    @classmethod
    def at_budget(cls, budget: Budget, **fields_: Any) -> "AdaKV":
        inner = fields_.pop("inner", cls.inner)
        check_inner(inner)
        others = {one.name: getattr(inner, one.name) for one in fields(inner) if one.name != "budget"}
        return cls(type(inner).at_budget(budget, **others), **fields_)

    def check_company(self, others: Sequence[Policy]) -> None:
        selecting = [other for other in others if isinstance(other, SelectionPolicy)]
        if selecting and self.heads == "shared":
            raise PolicyError(
                f"{self.describe()} keeps another number of entries in each kv head, and {selecting[0].describe()} chooses "
                f"among as many in all; use the inner policy {self.inner.describe()} with it, or leave it out"
            )

    @property
    def observes(self) -> Observer:
        return self.inner.observes

    @property
    def evict_every(self) -> None:
        return None

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        return "shared" if self.alpha < 1 else "alone"

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return self.inner.quota(tokens, layer, layers)

    def score(self, entries: Entries) -> Tensor:
        """The inner policy's scores, [batch, kv_heads, n]."""
        return self.inner.score(entries)

    def share(self, priority: Tensor, totals: Tensor) -> Tensor:
        kv_heads, n = priority.shape[1:]
        stays = priority == float("inf")
        beside = (totals[:, None] - stays.sum(-1)).clamp(min=0)  # [batch, kv_heads]
        most = min(n, max(1, int(beside.max())))
        scores = priority.masked_fill(stays, float("-inf"))
        index, chosen = topk_select(scores, beside, most)
        if self.normalize:
            # In float64, since a score that was infinite is the largest float32.
            weights = scores.clamp(min=0).double()
            best = weights.gather(2, index).masked_fill_(~chosen, 0.0).sum(-1)
            whole = weights.sum(-1)
            part = torch.where(whole > 0, best / whole, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
            scores = scores * part[..., None].float()
        # The small term keeps a product exact that has no exact binary form.
        sure = (beside.double() * self.alpha + 1e-9).floor().long()
        index, chosen = topk_select(scores, sure, most)
        marks = torch.zeros_like(stays, dtype=torch.uint8).scatter_add_(2, index, chosen.to(torch.uint8))
        scores = scores.masked_fill(stays | (marks > 0), float("inf"))
        # All kv heads in one row; of equal scores the earlier head's goes first.
        best, taken = topk_select(
            scores.flatten(1)[:, None], kv_heads * totals[:, None], min(kv_heads * n, kv_heads * int(totals.max()))
        )
        heads = best[:, 0] // n
        return torch.zeros_like(beside).scatter_add_(1, heads, taken[:, 0].to(beside.dtype))


def check_inner(inner: Any) -> None:
    """Raise `PolicyError` unless the policy can be shared among heads: it evicts after prompts, and by scores alone."""
    if not isinstance(inner, EvictionPolicy):
        shown = inner.describe() if isinstance(inner, Policy) else repr(inner)
        raise PolicyError(
            f"inner={shown} is no evicting policy; give one that evicts after prompts, as SnapKV(budget=1024)"
        )
    if isinstance(inner, AdaKV):
        raise PolicyError(f"inner={inner.describe()} shares heads already; give its inner policy")
    counts = inner.observes
    plain = not isinstance(counts, Mass) or (counts.noise is None and not counts.last_rows)
    if inner.evict_every is not None or inner.places.moved or inner.merges or not plain:
        raise PolicyError(
            f"inner={inner.describe()} does more than evict after a prompt by scores; give a policy like SnapKV, PyramidKV, "
            "H2OPrefill, A2SFPrefill or ObservedAttention"
        )
