"""Quest: pages that may hold what the query looks for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import PolicyError
from kvpress.kernels.page_bounds import add_to_page_bounds, page_bounds
from kvpress.kernels.page_scores import page_scores
from kvpress.kernels.topk_select import topk_select
from kvpress.kernels.union_select import union_select
from kvpress.policy import (
    Budget,
    Selected,
    SelectionPolicy,
    View,
    check_budget,
    check_count,
    entries_for,
    entries_of,
    selected_by_groups,
)


@dataclass(frozen=True, kw_only=True)
class Quest(SelectionPolicy):
    """Read the pages whose keys could score highest, judged by their smallest and largest key per channel.

    Everything is kept, in pages of `page_size` consecutive entries. Per page, kv head and channel the smallest and the
    largest key are kept beside; with them no key of the page can score above sum_c max(q_c * min_c, q_c * max_c). In each
    decode step and layer, from `dense_layers` on, each query head reads the `budget // page_size` pages of highest bound, the
    last page always among them. Prompts are exact.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, and the
    authors' code. Deviations:

    - The last page counts towards the budget and is always read, as in the authors' kernels (in their accuracy code it
      competes, and three pages are read at least).
    - The pages that a group's query heads chose are read once, and each head attends to its own (the authors repeat K and V
      to the query heads).
    - Beside an eviction policy pages are runs of the entries that were kept.
    - The bounds are made in the first decode step after a prompt pass, from all keys (the authors: in the prompt pass);
      the report does not count that as read by the step.

    Args:
        budget: entries read per query head, in whole pages (or everything, where that is no more); int, or float share of
            what is held (authors: 512 to 4096). A share of less than a page reads the last page.
        page_size: entries of a page; 1 makes the choice exact.
        dense_layers: first layers, among those with full attention, that read everything.

    Raises:
        PolicyError: a value out of range, an int budget smaller than a page, no layer left to select in, or an eviction
            policy beside it that frees slots in decode.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "arXiv 2406.10774"
    takes_budget: ClassVar[bool] = True
    notes: ClassVar[str | None] = "the bounds of quest's pages"

    budget: Budget = 2048
    page_size: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count(self.page_size, "page_size", 1)
        check_count(self.dense_layers, "dense_layers", 0)
        if isinstance(self.budget, int) and self.budget < self.page_size:
            raise PolicyError(
                f"budget={self.budget} is less than one page of page_size={self.page_size}; give at least {self.page_size}, or "
                "smaller pages"
            )

    def check_layers(self, layers: int) -> None:
        if self.dense_layers >= layers:
            raise PolicyError(
                f"dense_layers={self.dense_layers} leaves no layer to select in, of a model with {layers} attention layers; give "
                f"at most {layers - 1}"
            )

    def select(self, view: View) -> Selected:
        if view.layer < self.dense_layers:
            return Selected()
        batch, kv_heads, n = view.positions.shape
        group = view.query.shape[1] // kv_heads
        order = None
        if view.valid is None:
            held = torch.full((batch, kv_heads), n, device=view.query.device)
        else:
            held = view.valid.sum(-1)
            if not view.in_front:  # pages are runs of entries, as they would be without the empty slots between them
                order, _ = union_select(view.valid, kv_heads, width=view.width(n))
                n = order.shape[2]
        pages = -(-n // self.page_size)
        entries = max(1, entries_for(self.budget, n))
        if entries >= n or entries // self.page_size >= pages:
            view.state.clear()  # no bounds are kept where everything is read
            return Selected()
        least, greatest = self._bounds(view, held, order, pages)
        scores = page_scores(view.query, least, greatest)[..., :pages]
        allowed = entries_of(self.budget, held)
        held_pages = (held + self.page_size - 1) // self.page_size
        counts = torch.where(allowed >= held, held_pages, (allowed // self.page_size).clamp(min=1))
        if view.valid is None:
            scores[..., -1] = float("inf")
        else:
            page = torch.arange(pages, device=scores.device)
            last, past = page == held_pages[..., None] - 1, page >= held_pages[..., None]
            scores = scores.unflatten(1, (kv_heads, group))
            scores = scores.masked_fill(last[:, :, None], float("inf")).masked_fill(past[:, :, None], float("-inf"))
            scores = scores.flatten(1, 2)
        width = min(pages, -(-entries // self.page_size))
        index, chosen = topk_select(scores, counts.repeat_interleave(group, dim=1), width)
        # What was not chosen goes to a place of its own behind the pages, which is cut off.
        reads = torch.zeros(*index.shape[:2], pages + 1, dtype=torch.bool, device=index.device)
        reads = reads.scatter_(2, index.masked_fill(~chosen, pages), True)[..., :pages]
        together = selected_by_groups(view, reads, min(pages, group * width))
        assert together.index is not None and together.member is not None
        slots, member = self._entries(together.index, together.member, held)
        slots = slots if order is None else order.gather(2, slots)
        count = None if together.count is None else together.count * self.page_size
        return Selected(slots, member, count, scanned=pages if view.waits else held_pages.amax())

    def _bounds(self, view: View, held: Tensor, order: Tensor | None, pages: int) -> tuple[Tensor, Tensor]:
        """The bounds of the pages, the newest entry's included: [batch, kv_heads, at least `pages`, head_dim] each."""
        state = view.state
        if "least" not in state:
            keys = view.keys
            if order is not None:
                keys = keys.gather(2, order[..., None].expand(-1, -1, -1, keys.shape[-1]))
            counts = None if view.valid is None else held
            state["least"], state["greatest"] = self._with_room(*page_bounds(keys, counts, self.page_size), pages)
        else:
            if pages > state["least"].shape[2]:
                state["least"], state["greatest"] = self._with_room(state["least"], state["greatest"], pages)
            new = None if view.valid is None else view.newest_of(view.valid)
            add_to_page_bounds(
                state["least"], state["greatest"], view.newest_of(view.keys), held - 1, new, self.page_size
            )
        return state["least"], state["greatest"]

    def _with_room(self, least: Tensor, greatest: Tensor, pages: int) -> tuple[Tensor, Tensor]:
        """The bounds with room for so many pages, and some to spare for the entries to come."""
        spare = max(1, pages // 32) + pages - least.shape[2]
        return functional.pad(least, (0, 0, 0, spare)), functional.pad(greatest, (0, 0, 0, spare))

    def _entries(self, pages: Tensor, member: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of pages [batch, kv_heads, u] and who reads them; a last page has entries that are not there."""
        within = torch.arange(self.page_size, device=pages.device)
        entries = (pages[..., None] * self.page_size + within).flatten(2)
        last = held[..., None] - 1
        member = member[..., None].expand(-1, -1, -1, self.page_size).unflatten(1, (pages.shape[1], -1))
        member = member & (entries <= last).view(*pages.shape[:2], 1, -1, self.page_size)
        return torch.minimum(entries, last.clamp(min=0)), member.flatten(3).flatten(1, 2)
