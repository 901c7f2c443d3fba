"""Slots with positions: what one layer of the cache holds, and the interface that transformers wants of it.

The order of slots means nothing; each slot carries the original position of its entry. So padding is an empty slot,
evicting one entry and storing the next is one write into the freed slot, and compaction after a prompt is one gather.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress.compat import CacheLayerMixin
from kvpress.contexts import lasting_tensors
from kvpress.errors import PolicyError
from kvpress.kernels.compact_slots import compact_slots
from kvpress.passes import Tokens, active_pass
from kvpress.texts import Texts


def spare_slots(length: int) -> int:
    """Slots to spare in a buffer of `length` entries that grows in decode: few, and copied seldom enough not to matter."""
    return max(8, length // 32)


@dataclass
class Buffers:
    """What an eviction fills: shapes as in `Slots`, statistics zero, the rest uninitialised."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    stats: dict[str, Tensor]


@dataclass
class Facts:
    """What a report needs of a layer; outlives the layer's keys and values.

    Attributes:
        positions: the layer's `positions`, or all slots of its kv heads in one row.
        kv_heads: how many kv heads there are.
        entry_bytes: bytes of K and V of one column, over the batch and all kv heads.
        nbytes: bytes held now.
        length: slots that a decode step would read now, of a kv head on average.
        read, readable: entries read in decode steps so far, and what full attention would have read.
    """

    positions: Tensor | None = None
    kv_heads: int = 1
    entry_bytes: int = 0
    nbytes: int = 0
    length: float = 0
    read: float = 0
    readable: int = 0


class Slots(CacheLayerMixin):
    """K, V and per-entry statistics of one attention layer, in slots.

    Attributes:
        keys, values: [batch, kv_heads, capacity, head_dim].
        positions: int32 [batch, kv_heads, capacity], original position of each entry, -1 for an empty slot.
        stats: name -> [batch, kv_heads, ..., capacity], numbers that go with the entries; a new entry starts at 0.
        state: name -> what a selection policy keeps from step to step; a tensor has the batch as its first dimension.
        notes: name -> what an observer keeps of the sequences, likewise.
        dtype: of keys and values, once there are some: that of the values of the first pass.
        nbytes: bytes of all tensors held, statistics and state included.
        index: which of the cache's layers that policies act on.
        texts: the cache's sequences, which all of these layers share; the first one changes them.
    """

    index = 0
    is_sliding = False
    is_compileable = False
    supports_early_init = False

    keys: Tensor
    values: Tensor
    positions: Tensor
    dtype: torch.dtype

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Drop everything, as if the cache were new."""
        self.keys = self.values = self.positions = None  # type: ignore[assignment]
        self.is_initialized = False
        self.stats: dict[str, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.notes: dict[str, Tensor] = {}
        self.length = 0  # slots in use, some perhaps empty
        self.uniform = True  # every sequence and kv head holds the same number of entries
        self.entries = 0  # that number, while uniform
        self.ordered = True  # slots in use are in position order
        self.free: Tensor | None = None  # int64 [batch, kv_heads], the slot that the last step emptied
        self.made: Buffers | None = None  # for the eviction at the end of the pass in progress
        self.texts = Texts()
        self.facts = Facts()

    # ------------------------------------------------------------------ what the layer above decides

    def slot_limit(self) -> int | None:
        """Slots that decode steps need at most; None if they only append."""
        return None

    def spare(self, length: int, prompt: bool) -> int:
        """Slots to leave unused when a buffer for `length` entries is made, in a prompt pass or in decode."""
        return spare_slots(length)

    def new_stats(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        """Empty statistics for [batch, kv_heads, capacity]."""
        return {}

    def stored_key(self, key: Tensor, tokens: Tokens) -> Tensor:
        """A pass's keys, [batch, kv_heads, count, head_dim], as they are stored."""
        return key

    # ------------------------------------------------------------------ storing

    def append(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store the new entries of a pass: in free slots, or behind those in use.

        Args:
            key, value: [batch, kv_heads, count, head_dim] with the count of `tokens`, both in the layer's dtype.
            tokens: the tokens of the pass.
        """
        if tokens.padded:
            self.uniform = False
        key = self.stored_key(key, tokens)
        limit = self.slot_limit()
        if tokens.count == 1 and limit is not None and self.length >= limit:
            self._write_free(key, value, tokens)
            new = 1
        else:
            new = tokens.count if tokens.columns is None else max(len(columns) for columns in tokens.columns)
            self._reserve(key, value, new)
            self._write_behind(key, value, tokens)
            if self.length and not self.uniform:
                self.ordered = False
            self.length += new
        self.entries += new
        if self.index == 0:
            self.texts.advance(tokens.count, tokens.seen, tokens.seen_tensor)
        self.facts.length = self.length
        if tokens.count > 1:  # a prompt pass dropped what was kept from step to step, perhaps without new buffers
            self.facts.nbytes = self.nbytes

    def _write_free(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        batch, kv_heads, capacity = self.positions.shape
        free = self.free if self.free is not None else (self.positions < 0).to(torch.uint8).argmax(-1)
        flat = (torch.arange(batch * kv_heads, device=free.device) * capacity).add_(free.flatten())
        self.keys.view(-1, self.keys.shape[-1]).index_copy_(0, flat, key.reshape(batch * kv_heads, -1))
        self.values.view(-1, self.values.shape[-1]).index_copy_(0, flat, value.reshape(batch * kv_heads, -1))
        self.positions.view(-1).index_copy_(0, flat, tokens.positions.expand(batch, kv_heads).reshape(-1))
        for stat in self.stats.values():
            at = free.view(batch, kv_heads, *(1,) * (stat.ndim - 2)).expand(*stat.shape[:-1], 1)
            stat.scatter_(-1, at, 0.0)
        self.free = None
        self.ordered = False

    def _write_behind(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        start = self.length
        if tokens.columns is None:
            stop = start + tokens.count
            self.keys[:, :, start:stop] = key
            self.values[:, :, start:stop] = value
            self.positions[:, :, start:stop] = tokens.positions[:, None]
            return
        for row, columns in enumerate(tokens.columns):
            columns = columns.to(key.device)
            stop = start + len(columns)
            self.keys[row, :, start:stop] = key[row, :, columns]
            self.values[row, :, start:stop] = value[row, :, columns]
            self.positions[row, :, start:stop] = tokens.positions[row, columns]

    def _reserve(self, key: Tensor, value: Tensor, new: int) -> None:
        """Make room for `new` more slots behind those in use."""
        needed = self.length + new
        if self.is_initialized and needed <= self.positions.shape[2]:
            return
        limit, spare = self.slot_limit(), self.spare(needed, new > 1 or not self.is_initialized)
        if limit is not None:
            spare = max(0, min(spare, limit - needed))
        self._resize(key, value, needed + spare)

    def _resize(self, key: Tensor, value: Tensor, capacity: int) -> None:
        batch, kv_heads = key.shape[:2]
        shape = (batch, kv_heads, capacity)
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
        if not self.is_initialized:
            self.is_initialized = True
            self.dtype, self.device = key.dtype, key.device
        self._held_changed()

    def used(self, rows: slice = slice(None), stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots in use (of some sequences, up to `stop`), views [batch, kv_heads, n, head_dim]."""
        stop = self.length if stop is None else stop
        return self.keys[rows, :, :stop], self.values[rows, :, :stop]

    @property
    def is_full(self) -> bool:
        """Whether every slot in use is known to hold an entry."""
        return self.uniform and self.entries == self.length

    def valid(self, stop: int) -> Tensor | None:
        """Bool [batch, kv_heads, stop], which of the first `stop` slots hold an entry; None when all are known to."""
        return None if self.is_full or stop == 0 else self.positions[:, :, :stop] >= 0

    def compact(self, index: Tensor, chosen: Tensor, capacity: int) -> None:
        """Keep the slots at index, int64 [batch, kv_heads, k], in new buffers; those not `chosen` become empty."""
        k, out, made = index.shape[2], None, self.made
        if made is not None and self._fit(made, capacity):
            out, stats = (made.keys, made.values, made.positions), made.stats
        else:
            stats = self.new_stats((*index.shape[:2], capacity), index.device)
        self.keys, self.values, self.positions = compact_slots(
            self.keys, self.values, self.positions, index, chosen, capacity, out=out
        )
        for name, stat in self.stats.items():
            where = index.view(*index.shape[:2], *(1,) * (stat.ndim - 3), k).expand(*stat.shape[:-1], k)
            stats[name][..., :k] = stat.gather(-1, where)
        self.stats = stats
        self.length = self.entries = self.facts.length = k
        self.ordered = True
        self.free = None
        self.state.clear()

    def make_buffers(self, key: Tensor, value: Tensor, capacity: int) -> None:
        """Make what `compact` fills before the pass of key and value [batch, kv_heads, count, head_dim] needs its memory.

        A layer that makes lasting tensors, however small, in the midst of a pass has malloc cut them off the memory that the
        pass's hidden states were in. What is left is just too small for the next layer's, which take new memory: after
        30 layers the process holds several times what is in use.
        """
        shape = (*key.shape[:2], capacity)
        keys, values = key.new_empty(*shape, key.shape[-1]), value.new_empty(*shape, value.shape[-1])
        positions = torch.empty(shape, dtype=torch.int32, device=key.device)
        self.made = Buffers(keys, values, positions, self.new_stats(shape, key.device))

    def _fit(self, made: Buffers, capacity: int) -> bool:
        """Whether the buffers are such as this layer needs; they were made by the first layer's keys and values."""
        return all(
            new.shape == (*held.shape[:2], capacity, held.shape[3])
            and new.dtype == held.dtype
            and new.device == held.device
            for new, held in ((made.keys, self.keys), (made.values, self.values))
        )

    # ------------------------------------------------------------------ bookkeeping

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    def _held_changed(self) -> None:
        self._note_held(self.keys, self.values, self.positions, self.positions.shape[1])

    def _note_held(self, keys: Tensor, values: Tensor, positions: Tensor, kv_heads: int) -> None:
        self.facts.positions, self.facts.kv_heads = positions, kv_heads
        self.facts.nbytes = self.nbytes
        row = keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
        self.facts.entry_bytes = positions.shape[0] * kv_heads * row

    def _tensors(self) -> Iterator[Tensor]:
        yield from (tensor for holder in self._holders() for tensor in holder.values() if isinstance(tensor, Tensor))

    def _holders(self) -> list[dict[str, Any]]:
        """The mappings that hold tensors with the batch as first dimension."""
        return [self.__dict__, self.stats, self.state, self.notes]

    def _change_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        with lasting_tensors():
            for holder in self._holders():
                for name, tensor in list(holder.items()):
                    if isinstance(tensor, Tensor):
                        holder[name] = change(tensor)
        self._held_changed()

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change_tensors(change)
        if self.index == 0:
            with lasting_tensors():
                self.texts.change_batch(change)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was saved: its tensors may just have been made in `torch.inference_mode`."""
        self.__dict__.update(state)

        def lasting(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        self._change_tensors(lasting)
        with lasting_tensors():
            self.texts.change_tensors(lasting)

    # ------------------------------------------------------------------ transformers' cache layer interface

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first pass allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values through to the attention function, which stores them."""
        current = active_pass()
        if current is None or not current.holds(self):
            raise PolicyError(
                "this cache was filled by a model patched with kvpress and cannot be used without it; patch the model with "
                "the same policy, or start with a new cache"
            )
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys as the mask sees them: all that was seen."""
        return self.texts.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns *seen*, with padding: `generate` takes positions and the start of a second turn from it."""
        return self.texts.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # the older name

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back."""
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number.

        Raises:
            PolicyError: the policy evicts, or the batch is padded: slots are not in the order of tokens then.
        """
        # Before transformers 5.23 a positive number is the length to keep. Behind the first layer the texts are shorter already.
        length = self.texts.columns if self.index == 0 else self.length
        removed = -tokens_to_remove if tokens_to_remove <= 0 else length - tokens_to_remove
        if removed <= 0 or not self.is_initialized:
            return
        self.check_crop(removed)
        with lasting_tensors():
            self.take_back(min(removed, self.length))

    def take_back(self, removed: int) -> None:
        """Remove the last slots, which must be those of the last columns: of decode steps, or of an unpadded batch."""
        kept = self.length - removed
        if self.index == 0:
            real = None if self.uniform else (self.positions[:, 0, kept : self.length] >= 0).sum(-1).int()
            self.texts.take_back(removed, real)
        self.length = self.entries = self.facts.length = kept
        self.positions[:, :, kept:] = -1
        self.state.clear()
        self.facts.nbytes = self.nbytes

    def check_crop(self, removed: int) -> None:
        """Raise `PolicyError` unless the last tokens can be taken back."""
        if not self.uniform:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: its batch is padded. Assisted and prompt-lookup decoding need "
                "an unpadded batch, or a model that is not patched"
            )

    def offload(self) -> None:
        """Refused: slots stay on their device."""
        raise PolicyError("a kvpress cache cannot be offloaded; pass a DynamicCache without offloading, or no cache")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences for beam search."""
        self._change_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._change_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given sequences."""
        self._change_batch(lambda tensor: tensor[indices.to(tensor.device)])
