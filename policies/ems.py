"""EMS, reconstructed: evict, then merge what is dropped into what stays."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpress.kernels.nearest_centre import nearest_centre
from kvpress.policy import (
    Budget,
    Dropped,
    Entries,
    EvictionPolicy,
    Mass,
    Merge,
    Quota,
    check_at_least_zero,
    check_budget,
    check_choice,
    check_count,
    check_factor,
    check_pooling,
    check_room,
    pool_scores,
    quota_of,
)

MEAN_FLOOR = 1e-6
WEIGHT_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class EMS(EvictionPolicy):
    """EMS, a reconstruction: keep by a global-local score, and merge what is dropped into the most similar of what stays.

    No code is known to be published, and this was made from what the abstract and the reviews tell of the paper: results are
    those of the reconstruction, not the authors'.

    An entry has two statistics: the softmax mass it got from every row since it came in (global), and from the last `window`
    rows alone (local), both summed over the group. When there are too many entries, the last `recent` and the first `n_sink`
    stay, and the best of the others up to the budget, as centres. The local statistic is pooled over neighbours. Then both
    are compared by the place that they give an entry among the others, and the better place counts: each statistic is sure
    of its best entries, `global_weight` to 1.
    Of the rest, by the larger of the two statistics, each over its mean, the best that together have the share `rho` of the
    rest's sum, at most `kappa` times the budget, are candidates to be merged. A candidate goes to the centre with the
    largest cos(K) * cos(V) if that is at least `tau`; all others are dropped (the "zero class"). A centre and its members
    become one entry at the centre's position: its key has the centre's norm and the score-weighted mean of the members'
    directions, its value is the score-weighted mean, its two statistics are the sums. Prompt passes end so; decode does it
    when there are `evict_every` entries too many.

    Source: Li et al., "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local
    Importance", arXiv 2412.08521.

    Known of the paper: the two statistics, aligned by their means, of which the larger counts; three classes (centres, to be
    merged, irrelevant) whose split follows a head's sparsity and redundancy; the product of the cosines; the zero class.

    Chosen here, by the measurements in docs/ems.md:

    - Centres are chosen by places instead of means (`align`): each statistic is sure of its half of the budget. By means
      needles are found as well with the same window and pooling, but novels are 0.05 nats a token worse, no better than under
      SnapKV and H2O. The merge still has the means.
    - The local statistic is that of 4 rows, pooled over 7 by their maximum, and the window that scores is not the one that
      stays. Over 16 or 32 rows the few that ask for a needle are outvoted.
    - The global one is a plain sum and not pooled.

    These were measured for what a prompt leaves, without the merge, on one small model and few prompts.

    Chosen without measurements:

    - Keys are compared and merged as they are cached, after the rotary embedding.
    - Each cosine is at least 0 before the product, or two opposite directions would count as alike (`raw_product`
      takes them as they are).
    - One set per kv head, all heads with the same budget: budgets that adapt to a head are left out, because what is
      merged in decode would have to move between them. A head still decides how much of its rest is merged.

    The score as it was reconstructed first is `EMS(window=32, recent=32, kernel_size=1, align="mean")`.

    Args:
        budget: entries kept per layer and kv head; int, or float share of the prompt's length (paper: 256).
        window: last rows that make the local statistic.
        recent: last tokens that always stay.
        kernel_size: odd width of the local statistic's pooling over neighbours; 1 is no pooling.
        pooling: "max" or "avg".
        align: what the two statistics are compared by: "place" (each one's ranking) or "mean" (each over its mean).
        global_weight: factor on the global one, in [0, 1]. 1 treats both alike; 0 looks at the local one alone.
        n_sink: first tokens that always stay.
        rho: share of the rest's score that the candidates for merging have, in [0, 1]; 1 makes all of them candidates.
        kappa: at most so many times the budget are candidates, at least 0; `math.inf` for no limit.
        tau: least similarity to merge, at least 0; above 1 nothing is merged.
        raw_product: see above.
        value_norms: merged values keep the centre's norm too.
        keep_centre_score: a centre keeps its own statistics instead of the sums.
        evict_every: decode steps between compressions; until then more entries are held.
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, or an int budget without room beside the recent entries and the sinks.
    """

    name: ClassVar[str] = "ems"
    paper: ClassVar[str] = "arXiv 2412.08521"

    budget: Budget = 256
    window: int = 4
    recent: int = 32
    kernel_size: int = 7
    pooling: Literal["avg", "max"] = "max"
    align: Literal["place", "mean"] = "place"
    global_weight: float = 1.0
    n_sink: int = 0
    rho: float = 0.9
    kappa: float = 4.0
    tau: float = 0.6
    raw_product: bool = False
    value_norms: bool = False
    keep_centre_score: bool = False
    evict_every: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        check_count(self.window, "window", 1)
        check_count(self.recent, "recent", 0)
        check_pooling(self.kernel_size, self.pooling)
        check_choice(self.align, "align", ("place", "mean"))
        check_factor(self.global_weight, "global_weight")
        check_count(self.n_sink, "n_sink", 0)
        check_factor(self.rho, "rho")
        check_at_least_zero(self.kappa, "kappa")
        check_at_least_zero(self.tau, "tau")
        for flag in ("raw_product", "value_norms", "keep_centre_score"):
            check_choice(getattr(self, flag), flag, (True, False))
        check_count(self.evict_every, "evict_every", 1)
        check_room(self.budget, self.recent + self.n_sink, "recent + n_sink" if self.n_sink else "recent")

    @property
    def observes(self) -> Mass:
        return Mass(last_rows=self.window)

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return quota_of(self.budget, tokens, recent=self.recent)

    def score(self, entries: Entries) -> Tensor:
        """What decides who stays, [batch, kv_heads, n]; infinite for the sinks."""
        last = torch.iinfo(entries.positions.dtype).max
        by_position = entries.positions.masked_fill(~entries.candidates, last).argsort(dim=-1, stable=True)
        is_candidate = entries.candidates.gather(2, by_position)
        global_, local = (score.gather(2, by_position) for score in aligned(entries))
        # The candidates come first, so that what is filled in behind them acts as the pooling's padding.
        local = local.masked_fill(~is_candidate, 0.0 if self.pooling == "avg" else -math.inf)
        local = pool_scores(local, self.kernel_size, self.pooling)
        if self.align == "mean":
            scores = torch.maximum(self.global_weight * global_, local)
        else:
            by_place = [places(score.masked_fill(~is_candidate, -math.inf)) for score in (global_, local)]
            scores = -torch.minimum(by_place[0] / self.global_weight, by_place[1])
        scores = torch.empty_like(scores).scatter_(2, by_position, scores)
        return scores.masked_fill(entries.candidates & (entries.positions < self.n_sink), math.inf)

    def merge(self, dropped: Dropped) -> Merge:
        entries, positions = dropped.entries, dropped.entries.positions
        scores = torch.maximum(*aligned(entries))
        last = torch.iinfo(positions.dtype).max

        # The rest, best first; of equals the earlier one.
        at = positions.gather(2, dropped.rest).masked_fill(~dropped.is_rest, last)
        order = at.argsort(dim=-1, stable=True)
        ranked = scores.gather(2, dropped.rest).masked_fill(~dropped.is_rest, -1.0)
        order = order.gather(2, ranked.gather(2, order).argsort(dim=-1, descending=True, stable=True))
        is_candidate = self._candidates(ranked.gather(2, order), dropped.is_centre.sum(-1, keepdim=True))
        width = min(order.shape[2], math.floor(min(self.kappa * dropped.centres.shape[2], order.shape[2])))
        order, is_candidate = order[..., :width], is_candidate[..., :width]

        # Centres in position order, so that of equal ones the earlier is found first.
        at = positions.gather(2, dropped.centres).masked_fill(~dropped.is_centre, last)
        by_position = at.argsort(dim=-1, stable=True)
        place, similarity = nearest_centre(
            entries.keys,
            entries.values,
            dropped.centres.gather(2, by_position),
            dropped.is_centre.gather(2, by_position),
            dropped.rest.gather(2, order),
            raw_product=self.raw_product,
        )
        place = by_position.gather(2, place).masked_fill(~is_candidate | (similarity < self.tau), -1)
        return Merge(
            target=torch.full_like(dropped.rest, -1).scatter_(2, order, place),
            weights=scores.clamp(min=WEIGHT_FLOOR),
            value_norms=self.value_norms,
            sum_statistics=not self.keep_centre_score,
        )

    def _candidates(self, ranked: Tensor, budgets: Tensor) -> Tensor:
        """Which of the rest may be merged, bool [batch, kv_heads, m].

        Args:
            ranked: their scores [batch, kv_heads, m], largest first, negative for what is not of the rest.
            budgets: int [batch, kv_heads, 1], entries that stay.
        """
        is_rest = ranked >= 0
        numbers = torch.arange(1, ranked.shape[2] + 1, device=ranked.device)
        within = is_rest & (numbers <= self.kappa * budgets)
        if self.rho == 1:
            return within
        mass = ranked.clamp(min=0)
        return within & (mass.cumsum(-1) - mass < self.rho * mass.sum(-1, keepdim=True))


def aligned(entries: Entries) -> tuple[Tensor, Tensor]:
    """The mass from all rows and that from the last rows, each over its mean over the entries held, 0 for an empty slot."""
    held = entries.positions >= 0
    return _over_mean(entries.mass, held), _over_mean(entries.last_rows, held)


def _over_mean(mass: Tensor, held: Tensor) -> Tensor:
    mass = mass.masked_fill(~held, 0.0)
    mean = mass.sum(-1, keepdim=True) / held.sum(-1, keepdim=True).clamp(min=1)
    return mass / mean.clamp(min=MEAN_FLOOR)


def places(scores: Tensor) -> Tensor:
    """The place of each score among those of its kv head, 1 for the largest; of equals the earlier comes first.

    Args:
        scores: [batch, kv_heads, n].

    Returns:
        float32 [batch, kv_heads, n].
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    numbers = torch.arange(1, scores.shape[2] + 1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(2, order, numbers.expand_as(order))
