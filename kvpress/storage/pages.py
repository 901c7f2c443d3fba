"""Keys and values in pages, for kv heads that hold different numbers of entries: only what they hold takes memory.

In a rectangle of slots a kv head that keeps less than another would hold empty ones. Here the slots of all kv heads of a
sequence lie in one row of pages, and each page belongs to one kv head.
"""

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.compact_slots import compact_slots
from kvpress.kernels.paged_attention import list_pages, paged_attention
from kvpress.observe import Scores
from kvpress.storage.base import Storage, marked_first, spare_slots
from kvpress.tokens import Tokens

PAGE = 32
"""Slots of a page. A kv head's last page is partly empty; fewer slots would make more and smaller products."""


class Pages(Storage):
    """What an eviction leaves of a layer whose kv heads share its entries, made by `Pages.of`; decode steps append to it.

    All tensors have the batch as their first dimension.

    Attributes:
        paged_keys, paged_values: [batch, pages * PAGE, head_dim].
        paged_positions: int32 [batch, pages * PAGE], -1 for an empty slot.
        owner: int64 [batch, pages], the kv head that a page belongs to.
        order, starts: the pages of each kv head side by side, as `list_pages` gives them.
        coming: int64 [batch, kv_heads, steps], the slots of the next entries, as many for every kv head; `write` takes an
            index into these.
        rest, left: int64 [batch, kv_heads], first slot behind those in the kv head's last page, and how many there are.
        stats: name -> [batch, pages * PAGE], numbers that go with the entries, 0 for an empty slot.
        taken: of the slots in `coming`.
        length: slots of the longest kv head.
        keys, values, positions: copies as in `Slots`, [batch, kv_heads, length, ...], made when they are asked for.
    """

    paged_keys: Tensor
    paged_values: Tensor
    paged_positions: Tensor
    owner: Tensor
    order: Tensor
    starts: Tensor
    coming: Tensor
    rest: Tensor
    left: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0
        self.uniform = False

    @classmethod
    def of(cls, slots: Storage, index: Tensor, chosen: Tensor) -> "Pages":
        """The chosen slots at index, [batch, kv_heads, k], in pages: at least one slot is left free in each head's last."""
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
        source = (index + slots.positions.shape[2] * torch.arange(kv_heads, device=index.device)[:, None]).flatten(1)
        source = source.gather(1, head * k + rank.clamp(min=0, max=k - 1))
        there = rank < held.gather(1, head)

        self = cls()
        self.paged_keys, self.paged_values, self.paged_positions, self.stats = _take(
            slots.keys, slots.values, slots.positions, slots.stats, source, there
        )
        self._own(owner, kv_heads)
        rest = first + held
        self.coming = rest[..., None] + torch.arange(steps, device=index.device)
        self.rest, self.left = rest + steps, free - steps
        self.length = self.entries = longest
        return self

    def _own(self, owner: Tensor, kv_heads: int) -> None:
        self.owner = owner
        self.order, self.starts = list_pages(owner, kv_heads)

    def for_prompt(self, empty: Storage, new: int) -> Storage:
        """The same entries as a rectangle, in an empty `Slots`, with room for `new` more."""
        index, chosen = self._slots_of_heads(self.length)
        index, chosen = (torch.nn.functional.pad(x, (0, new)) for x in (index, chosen))
        shape = (*index.shape[:2], self.length + new)
        moved = _take(
            self.paged_keys[:, None],
            self.paged_values[:, None],
            self.paged_positions[:, None],
            {name: stat[:, None] for name, stat in self.stats.items()},
            index.flatten(1),
            chosen.flatten(1),
        )
        empty.keys, empty.values, empty.positions = (x.unflatten(1, shape[1:]) for x in moved[:3])
        empty.stats = {name: stat.unflatten(1, shape[1:]) for name, stat in moved[3].items()}
        empty.length = empty.entries = self.length
        empty.uniform = False
        return empty

    def _slots_of_heads(self, width: int) -> tuple[Tensor, Tensor]:
        """The slots of each kv head that hold an entry: int64 and bool [batch, kv_heads, width], False behind the last."""
        of_slot = self.owner.repeat_interleave(PAGE, dim=1)[:, None]
        heads = torch.arange(self.kv_heads, device=of_slot.device)[:, None]
        return marked_first((of_slot == heads) & (self.paged_positions >= 0)[:, None], width)

    def _rectangle(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of paged numbers as [batch, kv_heads, length, ...], and which of them there are."""
        index, chosen = self._slots_of_heads(self.length)
        rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
        return held[rows, index], chosen

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        held, chosen = self._rectangle(self.paged_keys)
        return held * chosen[..., None]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        held, chosen = self._rectangle(self.paged_values)
        return held * chosen[..., None]

    @property
    def positions(self) -> Tensor:  # type: ignore[override]
        held, chosen = self._rectangle(self.paged_positions)
        return held.masked_fill(~chosen, -1)

    @property
    def all_positions(self) -> Tensor:
        return self.paged_positions

    def valid(self, stop: int | None) -> Tensor | None:
        return None

    @property
    def capacity(self) -> int:
        """Entries that there is room for in the longest kv head."""
        return self.length - self.taken + self.coming.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.coming.shape[1]

    @property
    def row_length(self) -> float:
        """Pages are read whole."""
        return self.paged_positions.shape[1] / self.kv_heads

    def put(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        raise NotImplementedError("a prompt pass works on `for_prompt`")

    def keep(self, index: Tensor, chosen: Tensor, capacity: int) -> None:
        raise NotImplementedError("a prompt pass works on `for_prompt`")

    @property
    def next_slot(self) -> int:
        return self.taken

    def note_written(self) -> None:
        self.length += 1
        self.taken += 1

    def write(self, slot: int | Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        batch, slots = self.paged_positions.shape
        at = self.coming[..., slot] if isinstance(slot, int) else self.coming.index_select(2, slot)[..., 0]
        at = (at + slots * torch.arange(batch, device=at.device)[:, None]).flatten()
        self.paged_keys.view(batch * slots, -1).index_copy_(0, at, key.reshape(len(at), -1))
        self.paged_values.view(batch * slots, -1).index_copy_(0, at, value.reshape(len(at), -1))
        self.paged_positions.view(-1).index_copy_(0, at, positions.expand(batch, self.kv_heads).reshape(-1))

    def reserve(self, capacity: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Give every kv head so many pages more."""
        if capacity <= self.capacity:
            return
        batch, slots = self.paged_positions.shape
        pages = -(-spare_slots(slots // self.kv_heads) // PAGE)
        new = pages * PAGE
        more = self.kv_heads * new
        pad = torch.nn.functional.pad
        self.paged_keys, self.paged_values = (pad(x, (0, 0, 0, more)) for x in (self.paged_keys, self.paged_values))
        self.paged_positions = pad(self.paged_positions, (0, more), value=-1)
        self.stats = {name: pad(stat, (0, more)) for name, stat in self.stats.items()}
        heads = torch.arange(self.kv_heads, device=self.owner.device)
        self._own(torch.cat((self.owner, heads.repeat_interleave(pages).expand(batch, -1)), dim=1), self.kv_heads)
        # A kv head first fills what its last page has left, and leaves as much of the new ones.
        steps, left = torch.arange(new, device=heads.device), self.left[..., None]
        block = (slots + heads * new)[:, None]
        self.coming = torch.where(steps < left, self.rest[..., None] + steps, block + steps - left)
        self.rest = block[:, 0] + new - self.left
        self.taken = 0

    def read(
        self, rows: slice = slice(None), stop: int | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.keys[rows, :, :stop], self.values[rows, :, :stop]

    def attend(
        self, query: Tensor, scores: Scores, *, with_mass: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One row per sequence over all pages; the mass is [batch, pages * PAGE]."""
        return paged_attention(
            query,
            self.paged_keys,
            self.paged_values,
            self.owner,
            self.paged_positions >= 0,
            kv_heads=self.kv_heads,
            **vars(scores),
            with_mass=with_mass,
            lists=(self.order, self.starts),
        )

    def slot_dims(self) -> list[tuple[Tensor, int]]:
        stats = [(stat, 1) for stat in self.stats.values()]
        rows = [(self.paged_keys, 1), (self.paged_values, 1), (self.paged_positions, 1), (self.owner, 1), (self.order, 1)]
        return [*rows, (self.coming, 2), *stats]

    @property
    def entry_bytes(self) -> int:
        row = (
            self.paged_keys.shape[-1] * self.paged_keys.element_size()
            + self.paged_values.shape[-1] * self.paged_values.element_size()
        )
        return self.paged_positions.shape[0] * self.kv_heads * row


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
