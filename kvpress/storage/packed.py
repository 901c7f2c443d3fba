"""Keys and values as small integers with a scale and a zero for every few channels, the newest ones exact beside them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.gather_slots import gather_both, gather_slots
from kvpress.kernels.write_slot import write_slot
from kvpress.storage.base import NewStats, Storage, gather_stats
from kvpress.tokens import Tokens

PARTS = ("codes", "scale", "zero")


@dataclass
class Buffers:
    """Slots that hold nothing yet, shapes as in `PackedSlots`."""

    slots: dict[str, Tensor]
    positions: Tensor
    stats: dict[str, Tensor]


def group_size(width: int, most: int) -> int:
    """The largest number of channels, at most so many, into which `width` channels can be grouped evenly."""
    return max(size for size in range(1, min(width, most) + 1) if width % size == 0)


def pack(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each vector as integers of `bits` bits, groups of channels between their least and their greatest number.

    scale = (greatest - least) / (2 ** bits - 1), zero = least, code = round((x - zero) / scale), half to even.

    Args:
        x: [..., width], finite.
        bits: 2, 4 or 8.
        group: channels that share a scale and a zero; it divides the width.

    Returns:
        codes: uint8 [..., bytes], 8 / bits codes in a byte, the first in the lowest bits.
        scale, zero: float32 (float64 for float64) [..., width / group]; a group of equal numbers has scale 0.
    """
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group))
    least, greatest = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    levels = (1 << bits) - 1
    scale = (greatest - least) / levels
    codes = ((grouped - least) / torch.where(scale > 0, scale, 1)).round_().clamp_(0, levels)
    codes = codes.to(torch.uint8).flatten(-2)
    if bits < 8:
        each = 8 // bits
        codes = functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
        codes = (codes << _shifts(bits, codes)).sum(-1, dtype=torch.uint8)
    return codes, scale[..., 0], least[..., 0]


def unpack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, width: int) -> Tensor:
    """What `pack` packed, [..., width] in the dtype of the scale: code * scale + zero, off by half a scale at most."""
    if bits < 8:
        codes = ((codes[..., None] >> _shifts(bits, codes)) & ((1 << bits) - 1)).flatten(-2)[..., :width]
    grouped = codes.unflatten(-1, (zero.shape[-1], -1)).to(scale.dtype)
    return torch.addcmul(zero[..., None], grouped, scale[..., None]).flatten(-2)


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


class PackedSlots(Storage):
    """Keys and values in slots, packed (`pack`), and those of the newest tokens also exactly as they came.

    An entry is read exactly while its token is among the newest `residual` of its sequence; what a prompt pass brings is
    read exactly until that pass is over (`end_prompt`), by its own rows and by what scores the entries that it leaves. All
    other entries are read as they were packed once, when they came: nothing is ever packed again.

    Exact entries are found by their positions, not by their slots: the token at position p has its place p % residual in a
    ring, for all kv heads. So whatever moves or drops slots leaves the ring as it is.

    Reading unpacks what is read into new tensors of the model's dtype: one layer's, at a time.

    Args:
        new_stats: makes what is counted of the entries.
        bits: of a code: 2, 4 or 8.
        group: channels that share a scale and a zero, at most.
        residual: newest tokens that are kept exactly; 0 for none.

    Attributes:
        groups: "keys", "values" -> channels that share a scale and a zero.
        slots: "keys.codes", "keys.scale", "keys.zero" and the same of "values" -> [batch, kv_heads, capacity, ...].
        recent: "keys", "values" -> [batch, kv_heads, residual + 1, head_dim]; padding goes to the last place.
        recent_positions: int32 [batch, kv_heads, residual + 1], which token is in a place; -1 for none.
        coming: during a prompt pass what it brought, "keys" and "values" -> [batch, kv_heads, new, head_dim].
        past: slots that were in use before that pass.
        made: buffers for the `keep` at the end of the pass in progress, see `make`.
    """

    def __init__(self, new_stats: NewStats, bits: int, group: int, residual: int) -> None:
        super().__init__()
        self.new_stats = new_stats
        self.bits, self.group, self.residual = bits, group, residual
        self.groups: dict[str, int] = {}
        self.slots: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}
        self.coming: dict[str, Tensor] = {}
        self.past = 0

    @property
    def capacity(self) -> int:
        return self.positions.shape[2] if hasattr(self, "positions") else 0

    # ------------------------------------------------------------------ storing

    def put(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        batch, positions = len(key), tokens.positions.expand(len(key), -1)
        counts = [key.shape[2]] * batch
        if tokens.columns is None:
            key, value = key.contiguous(), value.contiguous()
        else:  # each sequence's real tokens in the first slots, zeros behind them
            columns = [one.to(key.device) for one in tokens.columns]
            counts = [len(one) for one in columns]
            key, value = (_in_front(x, columns, 2) for x in (key, value))
            positions = _in_front(positions + 1, columns, 1) - 1
        new = slice(self.length, self.length + key.shape[2])
        for name, packed in self._packed(key, value).items():
            self.slots[name][:, :, new] = packed
        self.positions[:, :, new] = positions[:, None]
        for row, count in enumerate(counts if self.residual else []):
            newest = slice(max(0, count - self.residual), count)
            place = self._places(positions[row, newest])
            self.recent["keys"][row][:, place] = key[row][:, newest]
            self.recent["values"][row][:, place] = value[row][:, newest]
            self.recent_positions[row][:, place] = positions[row, newest]
        self.coming, self.past = {"keys": key, "values": value}, self.length
        self.note_put(key.shape[2], tokens.padded)

    def end_prompt(self) -> None:
        super().end_prompt()
        self.coming = {}

    def write(self, slot: int | Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        new, stats = self._packed(key, value), list(self.stats.values())
        for part in PARTS:
            one, two = f"keys.{part}", f"values.{part}"
            write_slot(self.slots[one], self.slots[two], self.positions, stats, slot, new[one], new[two], positions)
        if self.residual:
            recent, place = self.recent, self._places(positions)
            write_slot(recent["keys"], recent["values"], self.recent_positions, [], place, key, value, positions)

    def reserve(self, capacity: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        if capacity <= self.capacity:
            return
        if not self.recent:
            assert like is not None
            self._start(*like)
        new, used = self._empty(capacity), slice(0, self.length)
        if self.length:
            new.positions[:, :, used] = self.positions[:, :, used]
            for name, buffer in new.slots.items():
                buffer[:, :, used] = self.slots[name][:, :, used]
            for name, stat in new.stats.items():
                stat[..., used] = self.stats[name][..., used]
        self._take(new)

    def keep(self, index: Tensor, chosen: Tensor, capacity: int) -> None:
        k, new, self.made = index.shape[2], self.made, None
        if new is None or not self._fit(new, capacity):
            new = self._empty(capacity)
        for name, buffer in new.slots.items():
            buffer[:, :, :k] = gather_slots(self.slots[name], index)
        new.positions[:, :, :k] = self.positions.gather(2, index).masked_fill_(~chosen, -1)
        gather_stats(self.stats, index, new.stats)
        self._take(new)
        self.coming = {}
        self.length = self.entries = k
        self.ordered = True

    def make(self, key: Tensor, value: Tensor, capacity: int) -> None:
        if not self.recent:
            self._start(key, value)
        self.made = self._empty(capacity)

    def _fit(self, made: Buffers, capacity: int) -> bool:
        """Whether the buffers are such as this layer needs; they were made by the first layer's keys and values."""
        return all(
            new.shape == (*held.shape[:2], capacity, held.shape[3])
            and new.dtype == held.dtype
            and new.device == held.device
            for new, held in ((made.slots[name], self.slots[name]) for name in self.slots)
        )

    def _take(self, new: Buffers) -> None:
        self.slots, self.positions, self.stats = new.slots, new.positions, new.stats

    def _start(self, key: Tensor, value: Tensor) -> None:
        """Make the ring, for entries as key and value [batch, kv_heads, n, head_dim]."""
        for name, x in (("keys", key), ("values", value)):
            self.groups[name] = group_size(x.shape[3], self.group)
            self.recent[name] = x.new_zeros(*x.shape[:2], self.residual + 1, x.shape[3])
        shape = *key.shape[:2], self.residual + 1
        self.recent_positions = torch.full(shape, -1, dtype=torch.int32, device=key.device)

    def _empty(self, capacity: int) -> Buffers:
        """Buffers of so many slots; what is never written there is unpacked to zeros."""
        shape, device = (*self.recent["keys"].shape[:2], capacity), self.recent["keys"].device
        rows = self._packed(*(x[:, :, :1] for x in self.recent.values()))
        slots = {name: row.new_zeros(*shape, row.shape[3]) for name, row in rows.items()}
        positions = torch.full(shape, -1, dtype=torch.int32, device=device)
        return Buffers(slots, positions, self.new_stats(shape, device))

    def _packed(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Packed keys and values by the names of `slots`."""
        packed: dict[str, Tensor] = {}
        for name, x in (("keys", key), ("values", value)):
            parts = zip(PARTS, pack(x, self.bits, self.groups[name]), strict=True)
            packed |= {f"{name}.{part}": held for part, held in parts}
        return packed

    def _places(self, positions: Tensor) -> Tensor:
        """Where tokens at int32 positions are in the ring if they are there, int64 of the same shape."""
        return torch.where(positions < 0, self.residual, positions % self.residual).long()

    # ------------------------------------------------------------------ reading

    def read(
        self, rows: slice = slice(None), stop: int | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if not self.coming or (stop is not None and stop <= self.past):
            return self._unpacked(rows, stop, index)
        stop = self.capacity if stop is None else stop
        new = [self.coming[name][rows, :, : stop - self.past] for name in ("keys", "values")]
        if self.past or stop > self.length:
            held = self._unpacked(rows, self.past, None)
            more = (0, 0, 0, max(0, stop - self.length))
            new = [functional.pad(torch.cat(both, dim=2), more) for both in zip(held, new, strict=True)]
        return (new[0], new[1]) if index is None else gather_both(new[0], new[1], index)

    def _unpacked(self, rows: slice, stop: int | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `read`, from what is packed, and exactly what is in the ring."""
        found = []
        for name, recent in self.recent.items():
            held = [self.slots[f"{name}.{part}"][rows, :, : stop if index is None else None] for part in PARTS]
            codes, scale, zero = held if index is None else [gather_slots(x, index) for x in held]
            found.append(unpack(codes, scale, zero, self.bits, recent.shape[3]).to(recent.dtype))
        if not self.residual:
            return found[0], found[1]
        positions = self.positions[rows]
        positions = positions[:, :, :stop] if index is None else positions.gather(2, index)
        place = self._places(positions)
        # An empty slot is at -1, as is the place that it looks into: what it then has is finite, and has no weight.
        is_exact = (self.recent_positions[rows].gather(2, place) == positions)[..., None]
        exact = gather_both(self.recent["keys"][rows], self.recent["values"][rows], place)
        return torch.where(is_exact, exact[0], found[0]), torch.where(is_exact, exact[1], found[1])

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """Keys of all slots, unpacked: [batch, kv_heads, capacity, head_dim]."""
        return self.read()[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values, likewise."""
        return self.read()[1]

    # ------------------------------------------------------------------ bookkeeping

    def holders(self) -> list[dict[str, Any]]:
        made = [] if self.made is None else [vars(self.made), self.made.slots, self.made.stats]
        return [*super().holders(), self.slots, self.recent, self.coming, *made]

    def slot_dims(self) -> list[tuple[Tensor, int]]:
        stats = [(stat, stat.ndim - 1) for stat in self.stats.values()]
        return [*((buffer, 2) for buffer in self.slots.values()), (self.positions, 2), *stats]

    @property
    def entry_bytes(self) -> int:
        return sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in self.recent.values())


def _in_front(x: Tensor, columns: list[Tensor], dim: int) -> Tensor:
    """The listed columns of each sequence in front along a dimension of x, [batch, ...]; zeros behind them."""
    shape = list(x.shape)
    shape[dim] = max(len(one) for one in columns)
    moved = x.new_zeros(shape)
    for row, one in enumerate(columns):
        moved[row].narrow(dim - 1, 0, len(one)).copy_(x[row].index_select(dim - 1, one))
    return moved
