"""Keys and values as the model makes them, in a rectangle of slots: as many of each kv head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.compact_slots import compact_slots
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.gather_slots import gather_both
from kvpress.kernels.write_slot import write_slot
from kvpress.observe import Scores
from kvpress.storage.base import NewStats, Storage, gather_stats
from kvpress.storage.pages import Pages
from kvpress.tokens import Tokens


@dataclass
class Buffers:
    """What `Slots.keep` fills: shapes as in `Slots`, statistics zero, the rest uninitialised."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    stats: dict[str, Tensor]


class Slots(Storage):
    """Keys and values in slots, in the model's dtype.

    Args:
        new_stats: makes what is counted of the entries.

    Attributes:
        keys, values: [batch, kv_heads, capacity, head_dim]; finite numbers also in empty slots.
        made: buffers for the `keep` at the end of the pass in progress, see `make`.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, new_stats: NewStats) -> None:
        super().__init__()
        self.new_stats = new_stats

    @property
    def capacity(self) -> int:
        return self.positions.shape[2] if hasattr(self, "positions") else 0

    def put(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        start = self.length
        if tokens.columns is None:
            stop = start + tokens.count
            self.keys[:, :, start:stop] = key
            self.values[:, :, start:stop] = value
            self.positions[:, :, start:stop] = tokens.positions[:, None]
            self.note_put(tokens.count, tokens.padded)
            return
        for row, columns in enumerate(tokens.columns):
            columns = columns.to(key.device)
            stop = start + len(columns)
            self.keys[row, :, start:stop] = key[row, :, columns]
            self.values[row, :, start:stop] = value[row, :, columns]
            self.positions[row, :, start:stop] = tokens.positions[row, columns]
        self.note_put(max(len(columns) for columns in tokens.columns), tokens.padded)

    def write(self, slot: int | Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        write_slot(self.keys, self.values, self.positions, list(self.stats.values()), slot, key, value, positions)

    def reserve(self, capacity: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        if capacity <= self.capacity:
            return
        key, value = (self.keys, self.values) if like is None else like
        shape = (*key.shape[:2], capacity)
        keys, values = key.new_empty(*shape, key.shape[-1]), value.new_empty(*shape, value.shape[-1])
        positions = torch.full(shape, -1, dtype=torch.int32, device=key.device)
        stats = self.new_stats(shape, key.device)
        used = slice(0, self.length)
        if self.length:
            keys[:, :, used] = self.keys[:, :, used]
            values[:, :, used] = self.values[:, :, used]
            positions[:, :, used] = self.positions[:, :, used]
            for name, stat in stats.items():
                stat[..., used] = self.stats[name][..., used]
        # An empty slot is read, with weight zero, where another sequence holds more: it must hold finite numbers.
        keys[:, :, self.length :].zero_()
        values[:, :, self.length :].zero_()
        self.keys, self.values, self.positions, self.stats = keys, values, positions, stats

    def keep(self, index: Tensor, chosen: Tensor, capacity: int) -> None:
        k, out, made = index.shape[2], None, self.made
        if made is not None and self._fit(made, capacity):
            out, stats = (made.keys, made.values, made.positions), made.stats
        else:
            stats = self.new_stats((*index.shape[:2], capacity), index.device)
        self.keys, self.values, self.positions = compact_slots(
            self.keys, self.values, self.positions, index, chosen, capacity, out=out
        )
        gather_stats(self.stats, index, stats)
        self.stats = stats
        self.length = self.entries = k
        self.ordered = True

    def share(self, index: Tensor, chosen: Tensor) -> Storage:
        return Pages.of(self, index, chosen)

    def make(self, key: Tensor, value: Tensor, capacity: int) -> None:
        shape = (*key.shape[:2], capacity)
        keys, values = key.new_empty(*shape, key.shape[-1]), value.new_empty(*shape, value.shape[-1])
        positions = torch.empty(shape, dtype=torch.int32, device=key.device)
        self.made = Buffers(keys, values, positions, self.new_stats(shape, key.device))

    def holders(self) -> list[dict[str, Any]]:
        made = [] if self.made is None else [vars(self.made), self.made.stats]
        return [*super().holders(), *made]

    def _fit(self, made: Buffers, capacity: int) -> bool:
        """Whether the buffers are such as this layer needs; they were made by the first layer's keys and values."""
        return all(
            new.shape == (*held.shape[:2], capacity, held.shape[3])
            and new.dtype == held.dtype
            and new.device == held.device
            for new, held in ((made.keys, self.keys), (made.values, self.values))
        )

    def read(
        self, rows: slice = slice(None), stop: int | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[rows, :, :stop], self.values[rows, :, :stop]
        return (keys, values) if index is None else gather_both(self.keys[rows], self.values[rows], index)

    def attend(
        self,
        query: Tensor,
        scores: Scores,
        *,
        stop: int | None,
        valid: Tensor | None,
        index: Tensor | None = None,
        rows: slice = slice(None),
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # The kernel reads the listed slots where they are.
        keys, values = self.read(rows, stop if index is None else None)
        output, mass, _ = decode_attention(query, keys, values, valid, index=index, **vars(scores), **options)
        return output, mass

    def slot_dims(self) -> list[tuple[Tensor, int]]:
        stats = [(stat, stat.ndim - 1) for stat in self.stats.values()]
        return [(self.keys, 2), (self.values, 2), (self.positions, 2), *stats]

    @property
    def entry_bytes(self) -> int:
        batch, kv_heads = self.positions.shape[:2]
        row = self.keys.shape[-1] * self.keys.element_size() + self.values.shape[-1] * self.values.element_size()
        return batch * kv_heads * row
