"""One layer of the cache: slots with positions.

The order of slots means nothing; each slot carries the original position of its entry. So padding is an empty slot,
evicting one entry and storing the next is one write into the freed slot, and compaction after a prompt is one gather.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpress.errors import PolicyError
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.gather_slots import gather_slots
from kvpress.kernels.topk_select import topk_select
from kvpress.passes import Scores, Tokens, active_pass
from kvpress.policy import Entries, EvictionPolicy


def spare_slots(length: int) -> int:
    """Slots to spare in a buffer of `length` entries that grows in decode: few, and copied seldom enough not to matter."""
    return max(8, length // 32)


@dataclass
class Facts:
    """What a report needs of a layer; outlives the layer's keys and values.

    Attributes:
        seen: columns fed so far, padding included.
        tokens: int32 [batch], real tokens seen per sequence.
        positions: the layer's `positions`.
        entry_bytes: bytes of K and V of one column, over the batch and all kv heads.
        nbytes: bytes held now.
        length: slots that a decode step would read now.
        read, readable: slots read in decode steps so far, and what full attention would have read.
    """

    seen: int = 0
    tokens: Tensor | None = None
    positions: Tensor | None = None
    entry_bytes: int = 0
    nbytes: int = 0
    length: int = 0
    read: int = 0
    readable: int = 0


class KVLayer(CacheLayerMixin):
    """K and V of one attention layer in slots.

    Attributes:
        keys, values: [batch, kv_heads, capacity, head_dim].
        positions: int32 [batch, kv_heads, capacity], original position of each entry, -1 for an empty slot.
        nbytes: bytes of all tensors held, statistics included.

    Args:
        policy: the eviction policy, or None to keep everything.
        index, count: which of how many layers the policy acts on.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    keys: Tensor
    values: Tensor
    positions: Tensor

    def __init__(self, policy: EvictionPolicy | None, index: int, count: int) -> None:
        super().__init__()
        self.policy = policy
        self.index = index
        self.count = count
        self.reset()

    def reset(self) -> None:
        """Drop everything, as if the cache were new."""
        self.keys = self.values = self.positions = None  # type: ignore[assignment]
        self.is_initialized = False
        self.length = 0  # slots in use, some perhaps empty
        self.uniform = True  # every sequence and kv head holds the same number of entries
        self.entries = 0  # that number, while uniform
        self.ordered = True  # slots in use are in position order
        self.free: Tensor | None = None  # int64 [batch, kv_heads], the slot that the last step emptied
        self.pending = False  # a prompt waits for its eviction (evict="after_prompt")
        self.mass: Tensor | None = None  # float32 [batch, kv_heads, capacity], accumulated attention
        self.window: Tensor | None = None  # [batch, heads, rows, head_dim], last rows of a prompt not yet evicted
        self.window_positions: Tensor | None = None  # int32 [batch, rows]
        self.scores: Scores | None = None  # how the model scores, for the rows in `window`
        self.largest: int | None = None  # the largest quota of a sequence; None before the first prompt
        self.totals: Tensor | None = None  # int32 [batch], each sequence's quota
        self.recents: Tensor | None = None  # int32 [batch], how much of it is for the newest entries
        self.tokens: list[int] | None = None  # real tokens seen per sequence, if the host knows; else see facts.tokens
        self.facts = Facts()

    # ------------------------------------------------------------------ what a pass does

    def append(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store the new entries of a pass: in free slots, or behind those in use.

        Args:
            key, value: [batch, kv_heads, count, head_dim] with the count of `tokens`.
            tokens: the tokens of the pass.
        """
        if tokens.padded:
            self.uniform = False
        limit = self._decode_limit()
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
        self.tokens = tokens.seen
        self.facts.tokens = tokens.seen_tensor
        self.facts.seen += tokens.count
        self.facts.length = self.length

    def _decode_limit(self) -> int | None:
        """Slots that decode steps need at most, the largest quota and the new entry; None if they only append."""
        if self.policy is None or not self.policy.drops_in_decode or self.largest is None:
            return None
        return self.largest + 1

    def _write_free(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        batch, kv_heads, capacity = self.positions.shape
        free = self.free if self.free is not None else (self.positions < 0).to(torch.uint8).argmax(-1)
        flat = (torch.arange(batch * kv_heads, device=free.device) * capacity).add_(free.flatten())
        self.keys.view(-1, self.keys.shape[-1]).index_copy_(0, flat, key.reshape(batch * kv_heads, -1))
        self.values.view(-1, self.values.shape[-1]).index_copy_(0, flat, value.reshape(batch * kv_heads, -1))
        self.positions.view(-1).index_copy_(0, flat, tokens.positions.expand(batch, kv_heads).reshape(-1))
        if self.mass is not None:
            self.mass.view(-1).index_fill_(0, flat, 0.0)
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
        spare = spare_slots(needed)
        limit = self._decode_limit()
        if self.policy is not None and (new > 1 or not self.is_initialized):
            spare = 0  # a prompt is compacted right after its attention
        elif limit is not None:
            spare = max(0, min(spare, limit - needed))
        self._resize(key, value, needed + spare)

    def _resize(self, key: Tensor, value: Tensor, capacity: int) -> None:
        batch, kv_heads = key.shape[:2]
        shape = (batch, kv_heads, capacity)
        keys, values = key.new_empty(*shape, key.shape[-1]), value.new_empty(*shape, value.shape[-1])
        positions = torch.full(shape, -1, dtype=torch.int32, device=key.device)
        mass = None
        if self.policy is not None and self.policy.observes == "every row":
            mass = torch.zeros(shape, dtype=torch.float32, device=key.device)
        used = slice(0, self.length)
        if self.length:
            keys[:, :, used] = self.keys[:, :, used]
            values[:, :, used] = self.values[:, :, used]
            positions[:, :, used] = self.positions[:, :, used]
            if mass is not None and self.mass is not None:
                mass[:, :, used] = self.mass[:, :, used]
        # An empty slot is read, with weight zero, where another sequence holds more: it must hold finite numbers.
        keys[:, :, self.length :].zero_()
        values[:, :, self.length :].zero_()
        self.keys, self.values, self.positions, self.mass = keys, values, positions, mass
        if not self.is_initialized:
            self.is_initialized = True
            self.dtype, self.device = key.dtype, key.device
        self._held_changed()

    def used(self, row: int | None = None, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots in use (of one sequence, up to `stop`), views [batch or 1, kv_heads, n, head_dim]."""
        rows = slice(None) if row is None else slice(row, row + 1)
        stop = self.length if stop is None else stop
        return self.keys[rows, :, :stop], self.values[rows, :, :stop]

    def valid(self, stop: int) -> Tensor | None:
        """Bool [batch, kv_heads, stop], which of the first `stop` slots hold an entry; None when all are known to."""
        if self.uniform and self.entries == self.length:
            return None
        return self.positions[:, :, :stop] >= 0

    def observe(self, mass: Tensor, row: int | None = None) -> None:
        """Add a pass's attention mass, float32 [batch or 1, kv_heads, n], to the first n slots (of one sequence)."""
        assert self.mass is not None
        held = self.mass if row is None else self.mass[row : row + 1]
        held[:, :, : mass.shape[2]] += mass

    def remember(self, query: Tensor, tokens: Tokens, scores: Scores) -> None:
        """Keep the last real rows of a prompt pass, query [batch, heads, count, head_dim], for a policy with a window."""
        assert self.policy is not None
        rows, positions = query, tokens.positions.expand(query.shape[0], -1)
        if self.window is not None and self.window_positions is not None:
            rows = torch.cat((self.window, rows), dim=2)
            positions = torch.cat((self.window_positions, positions), dim=1)
        size = min(self.policy.observed_window, rows.shape[2])
        if self.uniform:
            self.window, self.window_positions = rows[:, :, -size:].clone(), positions[:, -size:].clone()
        else:
            newest = positions.topk(size, dim=1).indices.sort(dim=1).values
            index = newest[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
            self.window, self.window_positions = rows.gather(2, index), positions.gather(1, newest)
        self.scores = scores

    # ------------------------------------------------------------------ eviction

    def take_over(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store what a layer without policy held; the policy acts at the end of the next pass, which still sees it all."""
        self.append(key, value, tokens)
        if self.policy is not None:
            self._set_quotas(tokens)
            self.pending = True

    def close_prompt(self, tokens: Tokens) -> None:
        """End a prompt pass: set the quotas by what was seen, and evict now or at the first decode step."""
        assert self.policy is not None
        self._set_quotas(tokens)
        self.pending = self.policy.evict == "after_prompt"
        if not self.pending:
            self._evict_prompt()
        self._held_changed()

    def _set_quotas(self, tokens: Tokens) -> None:
        assert self.policy is not None and tokens.seen is not None
        quotas = [self.policy.quota(seen, self.index, self.count) for seen in tokens.seen]
        self.largest = max(quota.total for quota in quotas)
        device = self.positions.device
        self.totals = torch.tensor([quota.total for quota in quotas], dtype=torch.int32, device=device)
        self.recents = torch.tensor([quota.recent for quota in quotas], dtype=torch.int32, device=device)

    def settle(self) -> None:
        """Do the eviction that the prompt left for the first decode step."""
        if self.pending:
            self.pending = False
            self._evict_prompt()
            self._held_changed()

    def _evict_prompt(self) -> None:
        assert self.policy is not None and self.largest is not None and self.totals is not None
        if self.length and not (self.uniform and self.entries <= self.largest):
            positions = self.positions[:, :, : self.length]
            mass = self._observed_mass(positions)
            order = None
            if not self.ordered:
                newest_last = torch.where(positions < 0, torch.iinfo(torch.int32).max, positions)
                order = newest_last.argsort(dim=-1, stable=True)
                positions = positions.gather(2, order)
                mass = None if mass is None else mass.gather(2, order)
            width = min(self.largest, self.length)
            index, chosen = topk_select(self._priority(positions, mass), self.totals[:, None], width)
            self._compact(index if order is None else order.gather(2, index), chosen)
        self.window = self.window_positions = None

    def _observed_mass(self, positions: Tensor) -> Tensor | None:
        assert self.policy is not None
        if self.policy.observes == "every row":
            assert self.mass is not None
            return self.mass[:, :, : self.length]
        if self.policy.observes == "window":
            assert self.window is not None and self.window_positions is not None and self.scores is not None
            keys, _ = self.used()
            return attention_mass(self.window, self.window_positions, keys, positions, **vars(self.scores))
        return None

    def _priority(self, positions: Tensor, mass: Tensor | None) -> Tensor:
        """The policy's scores, with the newest entries on top at +inf and empty slots at -inf."""
        assert self.policy is not None and self.recents is not None and self.facts.tokens is not None
        oldest_recent = self.facts.tokens.to(positions.device) - self.recents
        valid = positions >= 0
        recent = positions >= oldest_recent[:, None, None]
        score = self.policy.score(Entries(positions, valid & ~recent, mass)).float()
        # A score that is not finite must neither protect its entry nor poison the comparison.
        limit = torch.finfo(torch.float32).max
        score = torch.nan_to_num(score, nan=-limit, posinf=limit, neginf=-limit)
        return score.masked_fill_(recent, float("inf")).masked_fill_(~valid, float("-inf"))

    def _compact(self, index: Tensor, chosen: Tensor) -> None:
        """Keep the slots at index, int64 [batch, kv_heads, k]; those not `chosen` become empty."""
        assert self.policy is not None
        k = index.shape[2]
        capacity = k + (1 if self.policy.drops_in_decode else spare_slots(k))
        positions = torch.full((*index.shape[:2], capacity), -1, dtype=torch.int32, device=index.device)
        positions[:, :, :k] = self.positions.gather(2, index).masked_fill_(~chosen, -1)
        self.keys = gather_slots(self.keys, index, capacity)
        self.values = gather_slots(self.values, index, capacity)
        self.keys[:, :, k:].zero_()
        self.values[:, :, k:].zero_()
        self.positions = positions
        if self.mass is not None:
            self.mass = torch.nn.functional.pad(self.mass.gather(2, index), (0, capacity - k))
        self.length = self.entries = self.facts.length = k
        self.ordered = True
        self.free = None

    def evict_step(self) -> None:
        """End a decode step: where a quota is exceeded drop the entry of lowest priority; of equals, the newest."""
        assert self.policy is not None and self.largest is not None and self.totals is not None
        if not self.policy.drops_in_decode or (self.uniform and self.entries <= self.largest):
            return
        positions = self.positions[:, :, : self.length]
        mass = None if self.mass is None else self.mass[:, :, : self.length]
        priority = self._priority(positions, mass).masked_fill_(positions < 0, float("inf"))
        lowest = priority.amin(dim=-1, keepdim=True)
        victim = torch.where(priority == lowest, positions, -1).argmax(dim=-1, keepdim=True)
        if self.uniform:
            positions.scatter_(2, victim, -1)
            self.free = victim.squeeze(-1)
            self.entries -= 1
        else:
            over = (positions >= 0).sum(-1, keepdim=True) > self.totals[:, None, None]
            positions.scatter_(2, victim, torch.where(over, -1, positions.gather(2, victim)))

    # ------------------------------------------------------------------ bookkeeping

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for _, tensor in self._tensors())

    def _held_changed(self) -> None:
        self.facts.positions = self.positions
        self.facts.nbytes = self.nbytes
        batch, kv_heads = self.positions.shape[:2]
        row = self.keys.shape[-1] * self.keys.element_size() + self.values.shape[-1] * self.values.element_size()
        self.facts.entry_bytes = batch * kv_heads * row

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a batch dimension that the layer holds."""
        names = (
            "keys",
            "values",
            "positions",
            "mass",
            "window",
            "window_positions",
            "free",
            "totals",
            "recents",
        )
        for name in names:
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        for name, tensor in list(self._tensors()):
            setattr(self, name, change(tensor))
        assert self.facts.tokens is not None
        self.facts.tokens = change(self.facts.tokens)
        batch = self.positions.shape[0]
        self.tokens = self.tokens[:1] * batch if self.tokens is not None and len(set(self.tokens)) == 1 else None
        self._held_changed()

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
        return self.facts.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Columns *seen*, with padding: `generate` takes positions and the start of a second turn from it."""
        return self.facts.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # the older name

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not once a policy evicts."""
        return self.policy is None

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number.

        Raises:
            PolicyError: the policy evicts, or the batch is padded: what is gone cannot be brought back.
        """
        # Before transformers 5.23 a positive number is the length to keep.
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.facts.seen - tokens_to_remove
        if removed <= 0 or not self.is_initialized:
            return
        if self.policy is not None or not self.uniform:
            reason = "its batch is padded" if self.policy is None else f"{self.policy.describe()} evicts entries"
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: {reason}. Assisted and prompt-lookup decoding need the "
                "policy Full on an unpadded batch, or a model that is not patched"
            )
        removed = min(removed, self.length)
        self.length = self.entries = self.facts.length = self.length - removed
        self.facts.seen -= removed
        self.positions[:, :, self.length :] = -1
        assert self.facts.tokens is not None
        self.facts.tokens = self.facts.tokens - removed
        self.tokens = None if self.tokens is None else [seen - removed for seen in self.tokens]

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
