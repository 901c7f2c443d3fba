"""H2O: the heavy-hitter oracle."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvpress.errors import PolicyError
from kvpress.policy import (
    Budget,
    Consecutive,
    EvictionPolicy,
    Mass,
    Own,
    Places,
    Quota,
    check_budget,
    check_choice,
    entries_for,
)

DEFAULT_BUDGET = 0.2


@dataclass(frozen=True, kw_only=True)
class H2O(EvictionPolicy):
    """Keep the tokens that got the most attention so far (heavy hitters) and the most recent ones.

    An entry's score is the softmax weight it received, accumulated in float32 over every row since it came in, summed over
    the query heads of its kv head; it is neither decayed nor normalised, and lost when the entry is dropped. After every
    pass, prompt or decode step, each layer and kv head keeps its last `recent` entries and the `heavy` best of the others;
    in decode that drops exactly one entry a step.

    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arXiv 2306.14048, and the authors' real-drop code. Deviations:

    - The paper's Algorithm 1 writes the score of the current row only; text, figures and all code accumulate. So does this.
    - One set per kv head (the authors' code has one per query head and works for multi-head attention only).
    - Scores are summed in float32 (authors: in the model's dtype, where large sums stop growing).
    - With one `budget`, heavy and recent are its two halves, and an odd entry goes to recent (the authors round each down).
    - Sequences of a batch have their own scores (the authors sum over the batch).
    - With `rope="reindex"` the authors make room before a turn of new tokens; here the cache is at its budget after every
      pass, and the tokens of a pass see all that was kept before.

    Args:
        heavy: heavy hitters kept; int, or float share of the prompt's length. May be 0 (a sliding window).
        recent: most recent tokens kept, likewise. May be 0, which leaves a cache of heavy hitters alone.
        budget: heavy and recent together (paper: 4 % to 60 % of the prompt, 20 % in the main results, which is the
            default here); equal halves, or the remainder when one of the two is given.
        rope: "original" (keys and query stay at their own positions) or "reindex" (the authors' streaming variant: what is
            kept is attended at the consecutive positions 0 .. m-1, so distances never exceed the size of the cache).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, parts that do not fit the budget or do not add up to it, or nothing to keep.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv 2306.14048"

    heavy: Budget | None = None
    recent: Budget | None = None
    budget: Budget | None = None
    rope: Literal["original", "reindex"] = "original"

    @property
    def observes(self) -> Mass:
        return Mass()  # the entries with the most of it stay: `EvictionPolicy.score`

    @property
    def places(self) -> Places:
        return Consecutive() if self.rope == "reindex" else Own()

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        if self.heavy is not None and self.recent is not None:
            heavy, recent = entries_for(self.heavy, tokens), entries_for(self.recent, tokens)
            return Quota(heavy + recent, recent) if heavy + recent else Quota(1, 1)
        total = max(1, entries_for(self._total, tokens))
        if self.recent is not None:
            return Quota(total, min(total, entries_for(self.recent, tokens)))
        heavy = total // 2 if self.heavy is None else min(total, entries_for(self.heavy, tokens))
        return Quota(total, total - heavy)

    @property
    def _total(self) -> Budget:
        """Heavy and recent together, where not both are given."""
        return DEFAULT_BUDGET if self.budget is None else self.budget

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.rope, "rope", ("original", "reindex"))
        given = {name: value for name in ("heavy", "recent") if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            check_budget(value, name, minimum=0)
        if self.budget is not None:
            check_budget(self.budget)
            check_parts(self.budget, given)
        elif len(given) == 1:
            raise PolicyError(
                f"heavy={self.heavy!r}, recent={self.recent!r} without a budget: give both, or budget= alone for equal halves"
            )
        elif given and not any(given.values()):
            raise PolicyError("heavy=0 and recent=0 keep nothing; give at least one entry")


def check_parts(budget: Budget, given: dict[str, Budget]) -> None:
    """Raise `PolicyError` unless `heavy` and `recent`, as far as given, are of the budget's kind, fit it and make it up."""
    if any(value and isinstance(value, int) != isinstance(budget, int) for value in given.values()):
        raise PolicyError(f"budget={budget!r} with {given}: give all as entries (int) or all as shares (float)")
    used = sum(given.values())
    if used > budget + 1e-9:
        raise PolicyError(f"heavy + recent = {used:g} is larger than budget={budget!r}; lower them or raise the budget")
    if len(given) == 2 and used < budget - 1e-9:
        raise PolicyError(
            f"heavy + recent = {used:g} is less than budget={budget!r}; drop the budget or one of the parts"
        )
