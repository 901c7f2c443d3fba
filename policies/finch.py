"""FINCH: what the question at the end of the prompt looks at, as if it were the whole text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.attention_mass import attention_mass
from kvpress.policy import (
    Budget,
    Consecutive,
    Entries,
    EvictionPolicy,
    Own,
    Places,
    Quota,
    Window,
    check_budget,
    check_choice,
    check_count,
    check_room,
    entries_for,
    entries_of,
)


@dataclass(frozen=True)
class Question(Window):
    """The softmax weight that each entry gets from the last rows of a prompt, each row times the number of entries it sees.

    The mean over the rows and the group, where those rows read the entries. So a row that sees more, and whose weights are
    smaller for it, counts as much as the others: a weight of 1 is that of an entry at the row's average.
    """

    where_read = True

    def answer(self, observed: Any, positions: Tensor, keys: Callable[[], Tensor], scores: Any) -> dict[str, Tensor]:
        held = observed.sequences
        if "window" not in held:
            return {}
        query, at = held["window"], held["window.at"]
        newest, real = at.amax(1, keepdim=True), at >= 0
        # Rows follow one another, so each sees an entry less than the one behind it, in every kv head.
        behind = (newest - at).masked_fill(~real, 0).float()
        read = keys()
        mass = attention_mass(query, at, read, positions, **vars(scores))
        less = attention_mass(query, at, read, positions, row_weights=behind, **vars(scores))
        seen = ((positions >= 0) & (positions <= newest[:, :, None])).sum(-1, keepdim=True)
        rows = real.sum(1).clamp(min=1)[:, None, None] * (query.shape[1] // positions.shape[1])
        return {"mass": (seen * mass - less) / rows}


@dataclass(frozen=True, kw_only=True)
class Finch(EvictionPolicy):
    """Keep what the question at the end of the prompt attends to, and the question, and go on as if that were the text.

    At the end of a prompt pass its last `question` rows score: the softmax weights of each are taken times the number of
    entries that it sees, and their mean over the rows and the query heads of a kv head is an entry's score. The best
    `budget - question` of the entries before the question stay, with the question. What stays is then attended at the
    positions 0 .. m-1, and what follows at m, m+1, ... Decode appends and never evicts.

    Source: Corallo and Papotti, "FINCH: Prompt-guided Key-Value Cache Compression", arXiv 2408.00167 (its abstract), and NVIDIA's
    kvpress. Where these leave something open, and deviations:

    - `question` says how many of the prompt's last tokens are the question. (NVIDIA has a delimiter in the text, which it takes
      out, so that each text has its own number.) All that follows the question in a chat template belongs to it.
    - A row's weights are taken times the number of entries it sees (NVIDIA: that number less one, which would ignore the first
      row of a text).
    - The question is within the budget, and always stays: a share of a short prompt with no room for it keeps it alone.
    - With `chunk` each so many tokens before the question keep the same share of them, rounded so that all together are as
      many as without. (NVIDIA counts the question to the last chunk, and rounds each down.)
    - The authors read a long document chunk by chunk, the question behind each. That is for the caller to do, with a turn
      for each chunk.
    - One set per kv head. Keys are kept without their rotation, and rotated to their places when they are read, which is the
      same as rotating them when the others go. Later turns are scored where they read, at these places, and compress again.

    Args:
        budget: entries kept per layer and kv head after a prompt pass; int, or float share of the prompt's length.
        question: how many of the prompt's last tokens ask; these rows score, and stay.
        chunk: tokens before the question that choose among themselves; None for all.
        rope: "reindex", or "original": what stays is attended at its own positions (for models without rotary embedding,
            and beside policies that compare queries with stored keys).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, as no question, or an int budget that is not larger than the question.
    """

    name: ClassVar[str] = "finch"
    paper: ClassVar[str] = "arXiv 2408.00167"

    budget: Budget = 0.2
    question: int = 32
    chunk: int | None = None
    rope: Literal["reindex", "original"] = "reindex"

    @property
    def observes(self) -> Window:
        return Question(self.question)

    @property
    def places(self) -> Places:
        return Consecutive() if self.rope == "reindex" else Own()

    @property
    def evict_every(self) -> None:
        return None  # decode appends

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return Quota(max(self.question, entries_for(self.budget, tokens)), self.question)

    def score(self, entries: Entries) -> Tensor:
        """The question's weights, [batch, kv_heads, n]; with `chunk` those of each chunk's best above all others'."""
        mass = entries.mass
        if self.chunk is None:
            return mass
        assert entries.tokens is not None
        # Candidates come first, in position order.
        mass = mass.masked_fill(~entries.candidates, float("-inf"))
        count = entries.candidates.sum(-1, keepdim=True).clamp(min=1)
        room = (entries_of(self.budget, entries.tokens) - self.question).clamp(min=0)[:, None, None]
        number = torch.arange(mass.shape[2], device=mass.device).expand_as(mass)
        start = number // self.chunk * self.chunk
        best = room * torch.minimum(start + self.chunk, count) // count - room * start // count
        by_mass = mass.argsort(dim=-1, descending=True, stable=True)
        order = by_mass.gather(2, (by_mass // self.chunk).argsort(dim=-1, stable=True))
        rank = torch.empty_like(order).scatter_(2, order, number - start)
        highest = mass.amax(-1, keepdim=True).clamp(min=0)
        return torch.where(rank < best, mass + highest + 1, mass)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget)
        self._check_question()
        check_choice(self.rope, "rope", ("reindex", "original"))
        if self.chunk is not None:
            check_count(self.chunk, "chunk", 1)
        check_room(self.budget, self.question, "question")

    def _check_question(self) -> None:
        if not self.question:
            raise PolicyError(
                f"question={self.question!r}: {self.name} keeps what the question at the end of a prompt looks at, and there is "
                "none; give the number of its tokens, as question=len(tokenizer(text)['input_ids']), or use a policy that needs "
                "no question, as key_diff"
            )
        check_count(self.question, "question", 1)
