"""A cache layer whose kv heads share its entries: each holds its own number of them, and only that takes memory.

Slots as in `Slots` are a rectangle: a kv head that keeps less than another would hold empty slots. Here the slots of all kv
heads of a sequence lie in one row of pages, and each page belongs to one kv head. The rectangle is what a prompt pass works
on, one layer after the other; from its eviction to the next prompt pass the entries are in pages.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpress.evict import marked_first
from kvpress.kernels.compact_slots import compact_slots
from kvpress.kernels.paged_attention import paged_attention
from kvpress.layer import KVLayer
from kvpress.observe import Observed, Scores
from kvpress.passes import Tokens
from kvpress.slots import spare_slots

PAGE = 32
"""Slots of a page. A kv head's last page is partly empty; fewer slots would make more and smaller products."""


@dataclass
class Pages:
    """Entries in pages. All tensors have the batch as their first dimension.

    Attributes:
        keys, values: [batch, pages * PAGE, head_dim].
        positions: int32 [batch, pages * PAGE], -1 for an empty slot.
        owner: int64 [batch, pages], the kv head that a page belongs to.
        coming: int64 [batch, kv_heads, steps], the slots of the next entries, as many for every kv head.
        rest, left: int64 [batch, kv_heads], first slot behind those in the kv head's last page, and how many there are.
        stats: name -> [batch, pages * PAGE], numbers that go with the entries, 0 for an empty slot.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    owner: Tensor
    coming: Tensor
    rest: Tensor
    left: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kv_heads(self) -> int:
        return self.coming.shape[1]

    def slots_of_heads(self, width: int) -> tuple[Tensor, Tensor]:
        """The slots of each kv head that hold an entry: int64 and bool [batch, kv_heads, width], False behind the last."""
        of_slot = self.owner.repeat_interleave(PAGE, dim=1)[:, None]
        heads = torch.arange(self.kv_heads, device=of_slot.device)[:, None]
        return marked_first((of_slot == heads) & (self.positions >= 0)[:, None], width)

    def grow(self, pages: int) -> None:
        """Give every kv head so many pages more."""
        batch, slots = self.positions.shape
        new = pages * PAGE
        more = self.kv_heads * new
        pad = torch.nn.functional.pad
        self.keys, self.values = (pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        self.positions = pad(self.positions, (0, more), value=-1)
        self.stats = {name: pad(stat, (0, more)) for name, stat in self.stats.items()}
        heads = torch.arange(self.kv_heads, device=self.owner.device)
        self.owner = torch.cat((self.owner, heads.repeat_interleave(pages).expand(batch, -1)), dim=1)
        # A kv head first fills what its last page has left, and leaves as much of the new ones.
        steps, left = torch.arange(new, device=heads.device), self.left[..., None]
        block = (slots + heads * new)[:, None]
        self.coming = torch.where(steps < left, self.rest[..., None] + steps, block + steps - left)
        self.rest = block[:, 0] + new - self.left


class _Rectangle:
    """An attribute of `Slots`; while the entries are in pages, a copy of it as a rectangle, to look at."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            return self
        return layer.__dict__[self.name] if layer.pages is None else layer.as_rectangle(self.name)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__[self.name] = value


class PagedLayer(KVLayer):
    """A layer whose kv heads share its entries: after an eviction its entries are in pages.

    Attributes:
        pages: where the entries are, or None while a prompt has not been evicted.
        keys, values, positions: as in `Slots`; while there are pages, copies made when they are asked for.
        length: slots of the longest kv head.
    """

    keys = _Rectangle()
    values = _Rectangle()
    positions = _Rectangle()

    def reset(self) -> None:
        self.pages: Pages | None = None
        self.taken = 0  # of the slots in `pages.coming`
        super().reset()

    # ------------------------------------------------------------------ from the rectangle to pages, and back

    def quotas(self, priority: Tensor) -> tuple[Tensor, int]:
        assert self.totals is not None
        totals = self.eviction.share(priority, self.totals)
        return totals, max(1, int(totals.max()))

    def make_buffers(self, key: Tensor, value: Tensor, capacity: int) -> None:
        """Nothing: how many pages there will be depends on the scores."""

    def compact(self, index: Tensor, chosen: Tensor, capacity: int) -> None:
        """Keep the chosen slots at index, [batch, kv_heads, k], in pages: at least one slot is left free in each head's last."""
        batch, kv_heads, k = index.shape
        held = chosen.sum(-1)
        pages = held // PAGE + 1
        ends = pages.cumsum(-1)
        free = pages * PAGE - held
        count, steps, longest = torch.stack((ends.max(), free.min(), held.max())).tolist()

        number = torch.arange(count, device=index.device).expand(batch, -1).contiguous()
        owner = torch.searchsorted(ends, number, right=True).clamp(max=kv_heads - 1)
        head = owner.repeat_interleave(PAGE, dim=1)
        first = (ends - pages) * PAGE
        rank = torch.arange(count * PAGE, device=index.device) - first.gather(1, head)
        source = (index + self.positions.shape[2] * torch.arange(kv_heads, device=index.device)[:, None]).flatten(1)
        source = source.gather(1, head * k + rank.clamp(min=0, max=k - 1))
        moved = _take(self.keys, self.values, self.positions, self.stats, source, rank < held.gather(1, head))

        rest = first + held
        coming = rest[..., None] + torch.arange(steps, device=index.device)
        self.pages = Pages(*moved[:3], owner, coming, rest + steps, free - steps, moved[3])
        self.taken = 0
        self.keys = self.values = self.positions = None
        self.stats = {}
        self.length = self.entries = longest
        self.uniform = False
        self.free = None
        self.state.clear()
        self._note_length()

    def _unpack(self, new: int) -> None:
        """Make the rectangle again, with room for `new` tokens."""
        pages = self.pages
        assert pages is not None
        capacity = self.length + new
        index, chosen = pages.slots_of_heads(self.length)
        index, chosen = (torch.nn.functional.pad(x, (0, new)) for x in (index, chosen))
        shape = (*index.shape[:2], capacity)
        moved = _take(
            pages.keys[:, None],
            pages.values[:, None],
            pages.positions[:, None],
            {name: stat[:, None] for name, stat in pages.stats.items()},
            index.flatten(1),
            chosen.flatten(1),
        )
        self.pages = None
        self.keys, self.values, self.positions = (x.unflatten(1, shape[1:]) for x in moved[:3])
        self.stats = {name: stat.unflatten(1, shape[1:]) for name, stat in moved[3].items()}
        self._held_changed()

    def as_rectangle(self, name: str) -> Tensor:
        """A copy of keys, values [batch, kv_heads, length, head_dim] or positions [batch, kv_heads, length]."""
        pages = self.pages
        assert pages is not None
        index, chosen = pages.slots_of_heads(self.length)
        rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
        held: Tensor = getattr(pages, name)[rows, index]
        return held.masked_fill(~chosen, -1) if name == "positions" else held * chosen[..., None]

    # ------------------------------------------------------------------ decode steps

    def append(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        if self.pages is not None and tokens.count > 1:
            self._unpack(tokens.count)
        super().append(key, value, tokens)
        self._note_length()

    def _reserve(self, key: Tensor, value: Tensor, new: int) -> None:
        if self.pages is None:
            super()._reserve(key, value, new)
        elif self.taken == self.pages.coming.shape[2]:
            mean = self.pages.positions.shape[1] // self.pages.kv_heads
            self.pages.grow(-(-spare_slots(mean) // PAGE))
            self.taken = 0
            self._held_changed()

    def _write_behind(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        pages = self.pages
        if pages is None:
            super()._write_behind(key, value, tokens)
            return
        batch, slots = pages.positions.shape
        at = pages.coming[..., self.taken]
        at = (at + slots * torch.arange(batch, device=at.device)[:, None]).flatten()
        pages.keys.view(batch * slots, -1).index_copy_(0, at, key.reshape(len(at), -1))
        pages.values.view(batch * slots, -1).index_copy_(0, at, value.reshape(len(at), -1))
        pages.positions.view(-1).index_copy_(0, at, tokens.positions.expand(batch, pages.kv_heads).reshape(-1))
        self.taken += 1

    def attend(self, query: Tensor, scores: Scores, with_mass: bool) -> tuple[Tensor, Tensor | None]:
        """One row per sequence, query [batch, heads, 1, head_dim], over the pages: its output and the mass of each slot."""
        pages = self.pages
        assert pages is not None
        return paged_attention(
            query,
            pages.keys,
            pages.values,
            pages.owner,
            pages.positions >= 0,
            kv_heads=pages.kv_heads,
            **vars(scores),
            with_mass=with_mass,
        )

    @property
    def observed(self) -> Observed:
        return super().observed if self.pages is None else Observed(self.pages.stats, self.notes)

    # ------------------------------------------------------------------ bookkeeping

    def _note_length(self) -> None:
        """What a step reads of a kv head, on average: pages are read whole."""
        if self.pages is not None:
            self.facts.length = self.pages.positions.shape[1] / self.pages.kv_heads

    def _held_changed(self) -> None:
        if self.pages is None:
            super()._held_changed()
            return
        pages = self.pages
        self._note_held(pages.keys, pages.values, pages.positions, pages.kv_heads)

    def _holders(self) -> list[dict[str, Any]]:
        more = [] if self.pages is None else [vars(self.pages), self.pages.stats]
        return super()._holders() + more


def _take(
    keys: Tensor, values: Tensor, positions: Tensor, stats: dict[str, Tensor], index: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Copy slots of all kv heads together into one row per sequence.

    Args:
        keys, values: [batch, kv_heads, n, head_dim].
        positions: int32 [batch, kv_heads, n].
        stats: name -> [batch, kv_heads, n].
        index: int64 [batch, m], slots in [0, kv_heads * n).
        chosen: bool [batch, m], False for what becomes an empty slot.

    Returns:
        keys, values [batch, m, head_dim], positions and stats [batch, m].
    """
    rows = [x.flatten(1, 2)[:, None] for x in (keys, values, positions)]
    moved = compact_slots(rows[0], rows[1], rows[2], index[:, None], chosen[:, None], index.shape[1])
    taken = {name: stat.flatten(1, 2).gather(1, index).masked_fill_(~chosen, 0.0) for name, stat in stats.items()}
    return moved[0][:, 0], moved[1][:, 0], moved[2][:, 0], taken
