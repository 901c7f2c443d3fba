"""Recycled Attention: what one step attended to serves the steps after it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import PolicyError
from kvpress.kernels.topk_select import topk_select
from kvpress.policy import (
    Budget,
    Selected,
    SelectionPolicy,
    View,
    check_budget,
    check_choice,
    check_count,
    entries_for,
    entries_of,
    is_number,
)

Set = tuple[Tensor, Tensor, Tensor]
"""Slots int64 [batch, kv_heads, k], which of them are used, bool, and how many may be, int64 [batch, kv_heads, 1]."""


@dataclass(frozen=True, kw_only=True)
class RecycledAttention(SelectionPolicy):
    """Read everything now and then, and in between what that step attended to most.

    Everything is kept. Each layer and kv head has a set of `budget` entries: after a prompt those that the prompt's last row
    gave the most attention. A decode step reads the set and its own token; then its token joins the set and the entry to
    which this step gave the least attention leaves it. Every `stride` steps a full step reads everything, and the set
    becomes the entries that it gave the most attention. Prompts are exact.

    Source: Xu et al., "Recycled Attention: Efficient inference for long-context language models", arXiv 2411.05787. The
    authors' code was not read. What is left open there is decided so, or differs:

    - An entry's attention is the largest softmax weight over the query heads of its kv head (`group_reduce`).
    - The token of the step itself does not leave the set in its own step.
    - There is no second cache: the set is a list of slots, and a full step has nothing to bring up to date. The entries
      read are the same.
    - With the dynamic schedule `stride` is not used. The queries are compared as the attention uses them, rotated, over all
      heads of the layer together; each sequence of a batch decides for itself, and where one needs a full step the report
      counts all as read.
    - The set is the most attended of all entries, that of a prompt's last row included.

    Args:
        budget: entries in the set, K; int, or float share of what is held at the full step (authors: 4096, or 2048 for
            prompts of 16,000 tokens).
        stride: decode steps from one full step to the next, S; 1 makes every step full (authors: 10, 50 or 256).
        query_stride: with `similarity`, the steps between two looks at whether a full step is due, QC (authors: 5).
        similarity: a full step is due when the cosine of the query and that of the last full step is below, s (authors:
            0.8). None for the fixed schedule.
        group_reduce: "max" or "sum" over the query heads of a kv head.

    Raises:
        PolicyError: a value out of range, one of `query_stride` and `similarity` without the other, or an eviction policy
            beside it that frees slots in decode.
    """

    name: ClassVar[str] = "recycled"
    paper: ClassVar[str] = "arXiv 2411.05787"
    takes_budget: ClassVar[bool] = True
    observes_reads: ClassVar[bool] = True
    notes: ClassVar[str | None] = "recycled's sets"

    budget: Budget = 4096
    stride: int = 50
    query_stride: int | None = None
    similarity: float | None = None
    group_reduce: Literal["max", "sum"] = "max"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count(self.stride, "stride", 1)
        check_choice(self.group_reduce, "group_reduce", ("max", "sum"))
        if self.query_stride is not None:
            check_count(self.query_stride, "query_stride", 1)
        if self.similarity is not None and not is_number(self.similarity):
            raise PolicyError(f"similarity={self.similarity!r} is no number to compare a cosine with; give one, as 0.8")
        if (self.query_stride is None) != (self.similarity is None):
            raise PolicyError(
                f"query_stride={self.query_stride!r}, similarity={self.similarity!r}: the dynamic schedule needs both, as "
                "query_stride=5, similarity=0.8; the fixed one neither"
            )

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        return "alone" if self.similarity is None else "together"  # the queries of all heads are compared at once

    def phase(self, number: int) -> bool:
        """Whether a full step is due, or with `similarity` a look at whether it is."""
        return number % (self.stride if self.query_stride is None else self.query_stride) == 0

    def select(self, view: View) -> Selected:
        state, n = view.state, view.positions.shape[2]
        full = self._is_full(view)
        view.shared["full"] = full
        if full is True or (state["index"].shape[2] + 1 == n and view.valid is None):
            return Selected()
        index = torch.cat((state["index"], view.newest_slot), dim=2)
        member = torch.cat((state["chosen"], view.newest_there), dim=2)
        if full is False:  # where the width is fixed, some places may be unused
            return Selected(index, member, None if view.waits else member.sum(-1))
        # Some sequences are full, so the others come along and look at their own set alone.
        own = _as_mask(index, member, n)
        everything = torch.ones_like(own) if view.valid is None else view.valid
        slots = torch.arange(n, device=index.device).expand_as(own)
        count = None
        if not view.waits:  # nothing but the sets where none is full
            count = torch.where(full.any(), view.length, member.sum(-1).amax()).expand(own.shape[:2])
        return Selected(slots, torch.where(full[:, None, None], everything, own), count)

    def after_read(self, view: View, selected: Selected, mass: Tensor) -> None:
        state, full = view.state, view.shared.pop("full", True)  # it is not there for a prompt's last row
        grouped = mass.unflatten(1, (view.positions.shape[1], -1))
        scores = grouped.amax(2) if self.group_reduce == "max" else grouped.sum(2)
        if full is True:
            new, query = self._most_attended(view, scores), view.query
        else:
            only_set = full is False and selected.index is not None  # and the newest, last
            at_set = scores[..., :-1] if only_set else scores.gather(2, state["index"])
            new, query = self._with_newest(view, at_set), state["query"]
        if isinstance(full, Tensor):
            new = _where(full, self._most_attended(view, scores), new)
            query = torch.where(full[:, None, None, None], view.query, query)
        for name, value in zip(("index", "chosen", "room", "query"), (*new, query), strict=True):
            view.keep(name, value)

    def _is_full(self, view: View) -> bool | Tensor:
        """Whether this step is a full one; bool [batch] where the sequences differ."""
        if "index" not in view.state or (view.phase and self.similarity is None):
            return True  # there is no set where the cache was taken over, or tokens were taken back
        if not view.phase or self.similarity is None:
            return False
        now, then = view.query.flatten(1).float(), view.state["query"].flatten(1).float()
        due = functional.cosine_similarity(now, then, dim=-1) < self.similarity
        if view.waits and bool(due.all()):
            return True
        return False if view.waits and not bool(due.any()) else due

    def _width(self, n: int) -> int:
        """Entries of a set, of n."""
        return min(n, max(1, entries_for(self.budget, n)))

    def _most_attended(self, view: View, scores: Tensor) -> Set:
        """The set after a full step: index, which of it there are, and how many there may be."""
        width = self._width(view.positions.shape[2])
        there = (view.positions >= 0) & (view.positions < view.seen[:, None, None])
        room = entries_of(self.budget, there.sum(-1))
        index, chosen = topk_select(scores.masked_fill(~there, float("-inf")), room.clamp(max=width), width)
        return index, chosen, room[..., None]

    def _with_newest(self, view: View, at_set: Tensor) -> Set:
        """The set after a step that read it: the newest slot is in, and the least attended out where there is no room."""
        index, chosen, room = (view.state[name] for name in ("index", "chosen", "room"))
        if isinstance(self.budget, int) or not view.waits:  # a set that is still small gets unused places
            more = max(0, self._width(view.positions.shape[2]) - index.shape[2])
            index, chosen, at_set = (functional.pad(x, (0, more)) for x in (index, chosen, at_set))
        # An unused place is taken first where there is room, and never where there is none; of equals the newest leaves.
        has_room = chosen.sum(-1, keepdim=True) < room
        unused = torch.where(has_room, float("-inf"), float("inf"))
        at_set = torch.where(chosen, at_set, unused)
        lowest = at_set == at_set.amin(-1, keepdim=True)
        leaves = torch.where(lowest, index, -1).argmax(-1, keepdim=True)
        newest, there = view.newest_slot, view.newest_there
        after = index.scatter(2, leaves, newest), chosen.scatter(2, leaves, True)
        return torch.where(there, after[0], index), torch.where(there, after[1], chosen), room


def _as_mask(index: Tensor, member: Tensor, n: int) -> Tensor:
    """bool [batch, kv_heads, n], True at the index where it is a member."""
    mask = torch.zeros(*index.shape[:2], n + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(2, index.masked_fill(~member, n), True)[..., :n]


def _where(rows: Tensor, these: Set, others: Set) -> Set:
    """One set for the sequences where `rows`, bool [batch], is True, and another for the rest."""
    width = max(these[0].shape[2], others[0].shape[2])

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        x, y = (functional.pad(part, (0, width - part.shape[2])) for part in (x, y))  # with unused places
        return torch.where(rows[:, None, None], x, y)

    room = torch.where(rows[:, None, None], these[2], others[2])
    return chosen(these[0], others[0]), chosen(these[1], others[1]), room
