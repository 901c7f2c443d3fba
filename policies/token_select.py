"""TokenSelect: all heads of a layer vote on the tokens that it reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.soft_vote import soft_vote
from kvpress.kernels.topk_select import topk_select
from kvpress.policy import (
    Budget,
    Consecutive,
    EvictionPolicy,
    Pattern,
    Places,
    Policy,
    PrefillPolicy,
    Selected,
    SelectionPolicy,
    View,
    check_choice,
    check_count,
    check_finite,
)


@dataclass(frozen=True, kw_only=True)
class TokenSelect(SelectionPolicy, PrefillPolicy):
    """Read the first tokens, the last ones, and those between that the layer's heads vote for; at consecutive places.

    Every query head spreads one vote over the tokens between by the softmax of its q.k, and the `k` tokens with the most
    votes are read by all heads. What is read is attended as if it were the whole text: keys are cached without their
    rotation and rotated to the places 0 .. n_init + k + n_local - 1, so no distance is ever longer, and a model reads texts
    far beyond the length that it was trained for. Prompts are read in the same way, chunk by chunk, with the mean query of
    a chunk. In decode a layer votes anew only when its query has turned away from the one it voted with.

    Source: Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
    Token-Level KV Cache Selection", arXiv 2411.02886, and the authors' code. Where the two differ and deviations:

    - A query head votes on the keys of its own kv head. The authors' kernel and the paper's pseudo-code take
      `head % kv_heads`, which are other keys in models whose groups lie side by side; `gqa_map="mod"` does the same.
    - Query and candidates are not rotated in the paper's formula; the code rotates the query as if every candidate stood
      `n_local` before it. So does `rotate_query`.
    - The selection cache is the paper's (it is switched off in the released code). It is never used for prompts.
    - Pooling of the votes is in the code alone, tuned per task (0 to 128); off here. A window of even width keeps the length.
    - q.k, softmax and votes are float32 (authors: bfloat16). Sequences of a batch vote on their own.
    - The model's own rotation is taken off a key before it is cached, which in half precision rounds it once more. So
      equal tokens, whose votes are equal in a first layer, are told apart there by rounding.
    - A chunk is a chunk of one pass; a pass without a cache is exact attention, as under every policy.

    Args:
        n_init: first tokens, always read.
        n_local: last tokens, always read; the current one counts.
        k: tokens between that are read besides. May be 0 (sinks and a window).
        chunk: rows of a prompt that select together, at most `n_local`.
        theta: cosine of a layer's query (all heads in one vector) to the one it voted with, from which on the vote is
            reused; above 1 for a vote in every step.
        rotate_query: rotate the voting query's rows to n_local, n_local + 1, ...
        pool: width of a max-pooling of the votes over neighbours; 0 is off.
        vote_scale: factor on q.k in the vote (the attention itself has the model's own).
        gqa_map: "group" or "mod", see above.

    Raises:
        PolicyError: a value out of range, or a chunk longer than `n_local`.
    """

    name: ClassVar[str] = "token_select"
    paper: ClassVar[str] = "arXiv 2411.02886"
    takes_budget: ClassVar[bool] = True
    takes_share: ClassVar[bool] = False

    n_init: int = 128
    n_local: int = 512
    k: int = 2048
    chunk: int = 512
    theta: float = 0.9
    rotate_query: bool = True
    pool: int = 0
    vote_scale: float = 1.0
    gqa_map: Literal["group", "mod"] = "group"

    def __post_init__(self) -> None:
        for field, minimum in (("n_init", 0), ("n_local", 1), ("k", 0), ("chunk", 1), ("pool", 0)):
            check_count(getattr(self, field), field, minimum)
        if self.chunk > self.n_local:
            raise PolicyError(
                f"chunk={self.chunk} is longer than n_local={self.n_local}, and a chunk's own tokens would be voted on; give a "
                f"chunk of at most {self.n_local}"
            )
        check_finite(self.theta, "theta")
        check_finite(self.vote_scale, "vote_scale", above=0)
        if not isinstance(self.rotate_query, bool):
            raise PolicyError(f"rotate_query={self.rotate_query!r} does not work; give True or False")
        check_choice(self.gqa_map, "gqa_map", ("group", "mod"))

    @classmethod
    def at_budget(cls, budget: Budget, **fields: Any) -> "TokenSelect":
        """At most `budget` entries read: sinks, window and votes in the proportion of the defaults, 1 : 4 : 16."""
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 21:
            raise PolicyError(
                f"budget={budget!r} cannot be split into sinks, window and votes; give an int of at least 21"
            )
        n_init, n_local = budget // 21, 4 * budget // 21
        parts = {"n_init": n_init, "n_local": n_local, "k": budget - n_init - n_local, "chunk": min(512, n_local)}
        return cls(**(parts | fields))

    @property
    def places(self) -> Places:
        return Consecutive()

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        return "together"

    def check_company(self, others: Sequence[Policy]) -> None:
        for other in others:
            if isinstance(other, EvictionPolicy):
                raise PolicyError(
                    f"{self.describe()} selects among all tokens and needs every one in the cache, and {other.describe()} evicts "
                    "some; use one of the two"
                )

    def select(self, view: View) -> Selected:
        """The same tokens for every kv head, [batch, kv_heads, n_init + k + n_local] in ascending order."""
        slots, size = view.positions.shape[2], self.n_init + self.k + self.n_local
        if slots <= size:
            return Selected()
        voted, scanned = self._voted(view)
        tokens = self._tokens(view, voted)
        shape = (-1, view.positions.shape[1], -1)
        if view.valid is None:  # each token is in the slot of its position
            return Selected(tokens[:, None].expand(shape), scanned=scanned)
        index = _slots_by_token(view).gather(1, tokens.clamp(min=0))
        return Selected(index[:, None].expand(shape), (tokens >= 0)[:, None].expand(shape), scanned=scanned)

    def plan(self, view: View) -> Pattern | None:
        """The tokens that a chunk of a prompt reads, by a vote of its own."""
        index = self.select(view).index
        return None if index is None else Pattern(index=index)

    def _tokens(self, view: View, voted: Tensor) -> Tensor:
        """First, voted and last tokens, int64 [batch, n_init + k + n_local]; negative where a sequence has none."""
        size, seen = self.n_init + self.k + self.n_local, view.seen[:, None]
        places = torch.arange(size, device=voted.device)
        first = places[: self.n_init].expand(len(voted), -1)
        last = seen - size + places  # a sequence shorter than that is read whole
        chosen = torch.cat((first, voted), dim=1)
        if view.valid is not None:
            chosen = torch.where(seen > size, chosen, last[:, : self.n_init + self.k])
        return torch.cat((chosen, last[:, self.n_init + self.k :]), dim=1)

    def _voted(self, view: View) -> tuple[Tensor, float | Tensor]:
        """The tokens voted for, int64 [batch, k] ascending, from a new vote or the last one; entries scanned for it."""
        batch, device = len(view.seen), view.query.device
        if self.k == 0:
            return torch.zeros(batch, 0, dtype=torch.int64, device=device), 0.0
        query, state = view.query.mean(dim=2).flatten(1), view.state
        if "voted" not in state:  # a query of NaN is near to none
            state["query"] = torch.full_like(query, float("nan"))
            state["voted"] = torch.zeros(batch, self.k, dtype=torch.int64, device=device)
        stale = ~(torch.cosine_similarity(query, state["query"], dim=1) >= self.theta)
        if view.valid is not None:  # a short sequence is read whole and casts no vote
            stale &= view.seen > self.n_init + self.k + self.n_local
        scan = (view.length - self.n_init - self.n_local) / 2  # it reads keys and no values
        if not view.waits:
            view.keep("query", torch.where(stale[:, None], query, state["query"]))
            view.keep("voted", torch.where(stale[:, None], self._vote(view, slice(None)), state["voted"]))
            return state["voted"], scan * stale.float().mean()
        rows = stale.nonzero().flatten().tolist()
        for only in [slice(None)] if len(rows) == batch else [slice(row, row + 1) for row in rows]:
            state["query"][only] = query[only]
            state["voted"][only] = self._vote(view, only)
        return state["voted"], scan * len(rows) / batch

    def _vote(self, view: View, only: slice) -> Tensor:
        """A new vote of some sequences: int64 [sequences, k], ascending."""
        query, keys = view.query[only], view.keys[only]
        if self.rotate_query:
            assert view.turn is not None
            query = view.turn(query, (self.n_local + torch.arange(query.shape[2], device=keys.device))[None, None])
        if self.gqa_map == "mod":  # the sum over heads does not care for their order
            query = query.unflatten(1, (-1, keys.shape[1])).transpose(1, 2).flatten(1, 2)
        if view.valid is None:
            keys = keys[:, :, self.n_init : keys.shape[2] - self.n_local]
            votes = soft_vote(query, keys, scale=self.vote_scale)
        else:
            positions, seen = view.positions[only, 0], view.seen[only, None]
            votes = soft_vote(
                query, keys, (positions >= self.n_init) & (positions < seen - self.n_local), scale=self.vote_scale
            )
            votes = votes.gather(1, _slots_by_token(view)[only, self.n_init :])
            candidates = torch.arange(votes.shape[1], device=votes.device) < seen - self.n_local - self.n_init
            votes = votes.masked_fill_(~candidates, float("-inf"))
        if self.pool > 1:
            before = (self.pool - 1) // 2
            votes = torch.nn.functional.pad(votes, (before, self.pool - 1 - before), value=float("-inf"))
            votes = torch.nn.functional.max_pool1d(votes[:, None], self.pool, stride=1)[:, 0]
            if view.valid is not None:
                votes = votes.masked_fill_(~candidates, float("-inf"))
        index, _ = topk_select(votes[:, None], torch.full((1, 1), self.k, device=votes.device), self.k)
        return index[:, 0] + self.n_init


def _slots_by_token(view: View) -> Tensor:
    """The slot of each sequence's token at each position, int64 [batch, slots]; any slot past its end."""
    positions = view.positions[:, 0].long()
    slots = positions.shape[1]
    numbers = torch.arange(slots, device=positions.device).expand_as(positions)
    places = positions.masked_fill(positions < 0, slots)
    return positions.new_zeros(len(positions), slots + 1).scatter_(1, places, numbers)[:, :slots]
