"""Keyformer: heavy hitters by a noisy softmax that flattens as more is discarded."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvpress.errors import PolicyError
from kvpress.policy import (
    Budget,
    EvictionPolicy,
    Mass,
    Noise,
    Quota,
    check_budget,
    check_choice,
    check_count,
    check_factor,
    check_finite,
    entries_for,
)

# What the schedule's length is when nobody says it: the authors' summaries are of so many tokens at most.
USUAL_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Keyformer(EvictionPolicy):
    """Keep the key tokens, by a softmax with Gumbel noise and a rising temperature, and the most recent ones.

    An entry's score is what it gets of softmax((q.k + noise) / tau), accumulated in float32 over every row since it came
    in, summed over the query heads of its kv head. tau is `tau_init` in a prompt pass and moves in equal steps to `tau_end`
    over the `new_tokens` decode steps after it, so that the more was discarded, the less one row decides. After every pass
    each layer and kv head keeps its last `recent_ratio * budget` entries and the best of the others. What attention gives out is
    the model's own softmax, without noise.

    Source: Adnan et al., "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    arXiv 2403.09054, and the authors' code. Deviations:

    - The noise comes from a table of Gumbel numbers made from `seed`; each layer, query head and row reads a run of it that
      a hash of the three (and the entry's position) places. So it is the same in every batch, chunking and device,
      and does not touch the random state of sampling; two runs of the table that overlap share numbers, shifted. The
      authors draw from the global generator.
    - "fresh" noise for every row is what the code does; the paper's algorithm draws once per token ("per_token").
    - One set per kv head, with noise of each query head's own (the paper leaves grouped heads open).
    - Scores and noise are float32 and belong to one sequence (authors: the model's dtype, summed over batch and beams).
    - Only entries that are held get noise, and what was dropped is gone; the authors' simulator masks, one token short.
    - The schedule starts again with every prompt pass, and stays at `tau_end` beyond `new_tokens` steps.

    Args:
        budget: entries kept per layer and kv head; int, or float share of the prompt's length (authors' config: 0.6;
            paper: 0.5 to 0.9).
        recent_ratio: share of the budget that the newest tokens have, in [0, 1] (paper: 0.2 to 0.3).
        tau_init: temperature in the prompt, above 0.
        tau_end: after `new_tokens` steps, above 0.
        new_tokens: length of the schedule; None for what `generate` was asked for, and 128 where that is not known.
        noise: "fresh" for every row, "per_token" for one number per head and entry, or "none".
        seed: of the noise.
        evict_every: decode steps between evictions (the authors' fast code: 8); until then more entries are held.
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range.
    """

    name: ClassVar[str] = "keyformer"
    paper: ClassVar[str] = "arXiv 2403.09054"

    budget: Budget = 0.6
    recent_ratio: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    new_tokens: int | None = None
    noise: Literal["fresh", "per_token", "none"] = "fresh"
    seed: int = 0
    evict_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        if isinstance(self.recent_ratio, int) and not isinstance(self.recent_ratio, bool) and self.recent_ratio > 0:
            raise PolicyError(
                f"recent_ratio={self.recent_ratio} is an int; here it is a share of the budget: give a float in [0, 1], as 0.3"
            )
        check_factor(self.recent_ratio, "recent_ratio")
        check_finite(self.tau_init, "tau_init", above=0)
        check_finite(self.tau_end, "tau_end", above=0)
        if self.new_tokens is not None:
            check_count(self.new_tokens, "new_tokens", 1)
        check_choice(self.noise, "noise", ("fresh", "per_token", "none"))
        check_count(self.seed, "seed", 0)
        if self.seed >= 1 << 63:
            raise PolicyError(f"seed={self.seed} is too large; give one below 2**63")
        check_count(self.evict_every, "evict_every", 1)

    @property
    def _noise(self) -> Noise | None:
        if self.noise == "none" and self.tau_init == self.tau_end == 1:
            return None
        seed = None if self.noise == "none" else self.seed
        return Noise(self.tau_init, self.tau_end, self.new_tokens, seed, self.noise == "fresh", USUAL_NEW_TOKENS)

    @property
    def observes(self) -> Mass:
        return Mass(noise=self._noise)

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        total = max(1, entries_for(self.budget, tokens))
        return Quota(total, entries_for(float(self.recent_ratio), total))
