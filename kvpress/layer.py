"""One layer of the cache: what transformers wants of it, and the policies that act on it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kvpress.compat import CacheLayerMixin
from kvpress.contexts import lasting_tensors
from kvpress.errors import PolicyError
from kvpress.evict import best, in_position_order, priorities, split_by, victims
from kvpress.kernels.attention_mass import Perturbation
from kvpress.kernels.decode_scores import Moved
from kvpress.kernels.evict_slot import evict_slot
from kvpress.kernels.gather_slots import gather_both
from kvpress.kernels.merge_slots import merge_slots
from kvpress.observe import Observed, Rows, Scores, newest_rows
from kvpress.passes import active_pass
from kvpress.places import Held, Own, Places
from kvpress.policy import Dropped, Entries, Roles
from kvpress.rotary import Rotary
from kvpress.storage import Slots, Storage, spare_slots
from kvpress.storage.base import marked_first
from kvpress.texts import Texts
from kvpress.tokens import Tokens

__all__ = ["Facts", "KVLayer"]


@dataclass
class Facts:
    """What a report needs of a layer; outlives the layer's keys and values.

    Attributes:
        positions: the layer's positions, or those of all slots of its kv heads in one row.
        kv_heads: how many kv heads there are.
        entry_bytes: bytes of K and V of one column, over the batch and all kv heads.
        nbytes: bytes held now.
        length: slots that a decode step would read now, of a kv head on average.
        read, readable: entries read in decode steps so far, and what full attention would have read.
        computed, pairs: pairs of a row and an entry not after it that planned prompt passes computed, of a query head on
            average and summed over the sequences, and all that there were.
        counted: float64 [], what decode steps read of which only the device knows how much, or None.
    """

    positions: Tensor | None = None
    kv_heads: int = 1
    entry_bytes: int = 0
    nbytes: int = 0
    length: float = 0
    read: float = 0
    readable: int = 0
    computed: float | Tensor = 0.0
    pairs: int = 0
    counted: Tensor | None = None

    @property
    def all_read(self) -> float:
        """Entries read in decode steps so far."""
        return self.read + (0.0 if self.counted is None else float(self.counted))

    @property
    def density(self) -> float:
        """Of the pairs of planned prompt passes the share that was computed."""
        return float(self.computed) / self.pairs if self.pairs else 1.0


def rounded_up(count: int) -> int:
    """The next number of a few: at most an eighth larger, and 64 at least."""
    unit = max(64, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit


class Step(NamedTuple):
    """What the host knows of a decode step of one layer before it is run; the step itself looks at tensors alone.

    A compiled step is compiled for these, so nothing in them may change from step to step: there the slot is told by a
    tensor, and all the slots that there are, are looked at.

    Attributes:
        slot: where the new entries go, behind those in use; "told" where the pass has it in a tensor; "freed" for the slot
            that the last step freed, "empty" for the first empty one of each kv head.
        stop: slots that are looked at; None for all.
        full: each of these holds an entry.
        evicts: whether each kv head drops entries at the end, or those do that have too many.
        phase: what the selection policy makes of the number of the step.
        places: positions are below it.
        capacity: slots that there are.
    """

    slot: int | Literal["told", "freed", "empty"]
    stop: int | None
    full: bool
    evicts: Literal["no", "all", "over"]
    phase: Any
    places: int
    capacity: int


class KVLayer(CacheLayerMixin):
    """K and V of one attention layer, what is counted of them, and the policies that act on them.

    Args:
        roles: the policies.
        index, count: which of how many layers the policies act on.
        rotary: how the layer rotates queries and keys, for a policy that attends entries at other positions than their own.

    Attributes:
        keys, values: [batch, kv_heads, slots, head_dim]; copies where the storage holds them otherwise.
        positions: int32 [batch, kv_heads, slots], original position of each entry, -1 for an empty slot.
        storage: what holds these.
        state: name -> what a selection policy keeps from step to step; a tensor has the batch as its first dimension.
        notes: name -> what an observer keeps of the sequences, likewise.
        waiting: what stopped before this layer, likewise; see `kvpress.in_play`.
        dtype: of keys and values, once there are some: that of the values of the first pass.
        nbytes: bytes of all tensors held, statistics and state included.
        texts: the cache's sequences, which all of these layers share; the first one changes them.
        places: at which positions its entries are attended.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    dtype: torch.dtype

    def __init__(self, roles: Roles, index: int, count: int, rotary: Rotary | None = None) -> None:
        self.roles = roles
        self.eviction, self.selection, self.prefill = roles.eviction, roles.selection, roles.prefill
        self.evicts, self.observer = roles.evicts, roles.eviction.observes
        self.index = index
        self.count = count
        self.rotary = rotary
        self.places: Places = Own() if rotary is None else roles.places.fitted(rotary)
        self.reset()

    def reset(self) -> None:
        """Drop everything, as if the cache were new."""
        self.is_initialized = False
        self.storage: Storage = self._new_storage()
        self.state: dict[str, Any] = {}
        self.notes: dict[str, Tensor] = {}
        self.waiting: dict[str, Tensor] = {}
        self.texts = Texts()
        self.facts = Facts()
        self.pending = False  # a prompt waits for its eviction (evict="after_prompt")
        self.scores: Scores | None = None  # how the model scores
        self.largest: int | None = None  # the largest quota of a sequence; None before the first prompt
        self.totals: Tensor | None = None  # int32 [batch], each sequence's quota
        self.recents: Tensor | None = None  # int32 [batch], how much of it is for the newest entries
        self.steps = 0  # decode steps since the latest prompt pass
        self.last_row: Tensor | None = None  # [batch, heads, 1, head_dim], the last query of a prompt
        self.last_position: Tensor | None = None  # int32 [batch, 1]
        self.last_unread = False  # the policy has not seen yet what that row reads
        self.free: Tensor | None = None  # int64 [batch, kv_heads], the slot that the last step emptied
        self.has_freed = False  # it is known to be that
        self.step: Step | None = None  # the decode step in progress
        self.known: set[Step] = set()  # kinds of step that were run since the tensors are those that they are
        self.recordings: dict[Any, Any] = {}  # of whole steps, see kvpress.replay; the first layer has them

    def _new_storage(self) -> Storage:
        return self.roles.storage.storage(self.index, self.count, self.observer.slots)

    # ------------------------------------------------------------------ what it holds

    @property
    def keys(self) -> Tensor | None:
        return self.storage.keys if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self.storage.values if self.is_initialized else None

    @property
    def positions(self) -> Tensor:
        return self.storage.positions if self.is_initialized else None  # type: ignore[return-value]

    @property
    def stats(self) -> dict[str, Tensor]:
        return self.storage.stats

    @property
    def length(self) -> int:
        """Slots in use, some perhaps empty."""
        return self.storage.length

    @property
    def uniform(self) -> bool:
        """Whether every sequence and kv head holds the same number of entries."""
        return self.storage.uniform

    @property
    def is_full(self) -> bool:
        """Whether every slot in use is known to hold an entry."""
        return self.storage.uniform and self.storage.entries == self.storage.length

    def valid(self, stop: int) -> Tensor | None:
        """Bool [batch, kv_heads, stop], which of the first `stop` slots hold an entry; None when all are known to."""
        return None if self.is_full or stop == 0 else self.storage.positions[:, :, :stop] >= 0

    def _stored_key(self, key: Tensor, tokens: Tokens) -> Tensor:
        """A pass's keys, [batch, kv_heads, count, head_dim], as they are stored."""
        return key if self.rotary is None else self.places.store(key, tokens, self.rotary)

    def own_query(self, query: Tensor, tokens: Tokens) -> Tensor:
        """A pass's queries, [batch, heads, count, head_dim], at their own positions, as exactly as the keys are at theirs."""
        return query if self.rotary is None else self.places.own_query(query, tokens, self.rotary)

    def held(self, tokens: Tokens, stop: int | None = None) -> Held:
        """What the first slots hold when the rows of a pass are about to read them, which are stored already."""
        storage = self.storage
        entries = self.entries_now if storage.uniform else None
        known = entries is not None and tokens.seen is not None and not tokens.padded
        in_order = known and storage.ordered and tokens.seen == [entries] * len(tokens.seen or [])
        return Held(storage.positions[:, :, :stop], entries, in_order)

    def queries(self, query: Tensor, tokens: Tokens, held: Held) -> list[Tensor]:
        """The queries that a pass's rows read the slots with, each [batch, heads, count, head_dim]."""
        return [query] if self.rotary is None else self.places.queries(query, tokens, held, self.rotary)

    def row_queries(self, query: Tensor, tokens: Tokens, stop: int | None) -> tuple[Tensor, Moved]:
        """The query of a decode step's row, and the other queries that read some of the first slots instead."""
        if not self.places.moved:
            return query, ()
        held = self.held(tokens, stop)
        first, *others = self.queries(query, tokens, held)
        if not others:
            return first, ()
        at = tokens.seen[0] - 1 if held.in_order and tokens.seen is not None else tokens.positions[:, 0]
        return first, list(zip(others, self.places.slots(at, held.positions, held), strict=False))

    # ------------------------------------------------------------------ storing a prompt

    def append(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store the entries of a prompt pass behind those in use.

        Args:
            key, value: [batch, kv_heads, count, head_dim] with the count of `tokens`, both in the layer's dtype.
            tokens: the tokens of the pass.
        """
        key = self._stored_key(key, tokens)
        new = tokens.count if tokens.columns is None else max(len(columns) for columns in tokens.columns)
        self.storage = self.storage.for_prompt(Slots(self.observer.slots), new)
        if not self.is_initialized:
            self.dtype, self.device = key.dtype, key.device
        self._reserve(max(1, self.storage.length + new), (key, value))  # a pass may be all padding
        self.is_initialized = True
        self.storage.put(key, value, tokens)
        if self.index == 0:
            self.texts.advance(tokens.count, tokens.seen, tokens.seen_tensor)
        self._held_changed()

    def _reserve(self, needed: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Have room for `needed` entries of a kv head, in a prompt pass for its keys and values."""
        if needed <= self.storage.capacity:
            return
        limit, prompt = self.slot_limit, like is not None
        spare = 0 if self.evicts and prompt else spare_slots(needed)  # a prompt is compacted right after its attention
        if limit is not None:
            spare = max(0, min(spare, limit - needed))
        self.storage.reserve(needed + spare, like)
        self.known.clear()
        if not prompt:
            self._held_changed()

    @property
    def slot_limit(self) -> int | None:
        """Slots that decode steps need at most; None if they only append."""
        every = self.eviction.evict_every
        return None if every is None or self.largest is None else self.largest + every

    # ------------------------------------------------------------------ a decode step

    def start(self, key: Tensor, value: Tensor) -> None:
        """Before the first row of a prompt that evicts row by row: have a slot for it."""
        if not self.is_initialized:
            self.dtype, self.device = key.dtype, key.device
            self.storage.reserve(1, (key, value))
            self.is_initialized = True

    def open_step(self, tokens: Tokens, compiled: bool = False) -> None:
        """Before a decode step: have room, and note what the host knows of it.

        Args:
            tokens: the tokens of the step.
            compiled: it is to look at tensors alone.
        """
        self.steps += 1
        held, limit = self.storage, self.slot_limit
        appends = limit is None or held.length < limit
        if appends and held.length == held.capacity:
            self._reserve(held.length + 1)
        stop = held.length + appends
        uniform = held.uniform and not tokens.padded
        evicts: Literal["no", "all", "over"] = "no"
        if self.eviction.evict_every is not None and self.largest is not None:
            if not uniform:
                evicts = "over"
            elif held.entries + 1 >= self.largest + self.eviction.evict_every:
                evicts = "all"
        slot: int | Literal["told", "freed", "empty"] = "freed" if self.has_freed else "empty"
        if appends:
            slot = "told" if compiled else held.next_slot
        full = uniform and held.entries + 1 == stop and not (compiled and stop < held.capacity)
        phase = self.selection.phase(self.steps)
        places = held.capacity if not self.evicts else self.texts.columns + 1
        if compiled:
            self.step = Step(slot, None, full, evicts, phase, rounded_up(places), held.capacity)
        else:
            self.step = Step(slot, stop, full, evicts, phase, places, 0)
        if self.roles.selects and self.facts.counted is None:
            self.facts.counted = torch.zeros((), dtype=torch.float64, device=held.positions.device)

    @property
    def entries_now(self) -> int:
        """How many entries every kv head holds, that of a step in progress included; while `uniform`."""
        return self.storage.entries + (self.step is not None)

    @property
    def position_limit(self) -> int:
        """Positions of entries are below it."""
        return self.texts.columns if self.step is None else self.step.places

    def count_read(self, read: float | Tensor) -> None:
        """Count entries that a step reads of each kv head, where a selection policy chose them."""
        if self.step is None:
            return
        if isinstance(read, Tensor) or self.step.stop is None:
            assert self.facts.counted is not None
            self.facts.counted.add_(read)
        else:
            self.facts.read += read

    def write(self, key: Tensor, value: Tensor, tokens: Tokens, told: Tensor | None = None) -> None:
        """Store the new entry of a decode step.

        Args:
            key, value: [batch, kv_heads, 1, head_dim].
            tokens: the token.
            told: int64 [1], the slot, if the step is told by a tensor.
        """
        assert self.step is not None
        slot: int | Tensor
        if self.step.slot == "told":
            assert told is not None
            slot = told
        elif self.step.slot == "freed":
            assert self.free is not None
            slot = self.free
        elif self.step.slot == "empty":
            slot = (self.storage.positions < 0).to(torch.uint8).argmax(-1)
        else:
            slot = self.step.slot
        self.storage.write(slot, self._stored_key(key, tokens), value, tokens.positions)

    def close_step(self, tokens: Tokens, counts: bool = True) -> None:
        """After a decode step: note what it has changed.

        Args:
            tokens: the tokens of the step.
            counts: whether the report counts it; not a prompt's row.
        """
        step, held = self.step, self.storage
        assert step is not None
        limit = self.slot_limit
        if limit is None or held.length < limit:
            held.note_written()
        else:
            held.ordered = False
        if tokens.padded:
            held.uniform = held.ordered = False
        held.entries += 1
        every = self.eviction.evict_every
        if step.evicts == "all" and every is not None:
            held.entries -= every
        self.has_freed = step.evicts != "no" and every == 1 and not self.eviction.merges
        self.step = None
        self.facts.length = held.row_length
        if counts:
            self.facts.readable += self.texts.columns + 1
            if not self.roles.selects:
                self.facts.read += held.row_length
        if self.state:
            self.facts.nbytes = self.nbytes

    # ------------------------------------------------------------------ observing

    @property
    def observed(self) -> Observed:
        """What the observer has counted."""
        return Observed(self.storage.stats, self.notes)

    @property
    def takes_mass(self) -> bool:
        """Whether the attention hands out all that the observer counts."""
        return self.observer.takes_mass

    @property
    def takes_prompt_mass(self) -> bool:
        """Whether a prompt's attention hands out the mass that the observer counts: of a sparse prompt what its rows read.

        Where not everything is read, or tokens are attended at other places than their own, and the observer needs more than
        that, it asks for all of it over all entries, at their own.
        """
        apart = (self.places.moved or self.roles.plans) and not self.takes_mass
        return self.observer.takes_prompt_mass and not apart

    def add_mass(self, mass: Tensor, rows: slice = slice(None), slots: Tensor | None = None) -> None:
        """Add what a prompt pass gave, float32 [batch, kv_heads, n], to the first n slots (of some sequences), or to `slots`."""
        held = self.stats["mass"][rows]
        if slots is None:
            held[:, :, : mass.shape[2]] += mass
        else:
            held.scatter_add_(2, slots, mass)

    def observe_prompt(
        self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, past: int, mass_known: bool
    ) -> None:
        """Let the observer see a prompt pass.

        Args:
            query: [batch, heads, count, head_dim], the rows, rotated at their own positions; the entries are those in the
                slots in use.
            tokens: the tokens of the pass.
            scores: how the model scores.
            new_tokens: how many tokens the caller wants generated, if that is known.
            past: slots that were in use before the pass.
            mass_known: the mass that the rows gave was added already.
        """
        in_order = past == 0 and self.uniform
        stop = self.storage.length
        rows = self._rows(query, tokens, scores, 0, new_tokens, not self.uniform, in_order, stop)
        self.observer.prompt(self.observed, rows, mass_known)

    def observe_step(
        self,
        query: Tensor,
        tokens: Tokens,
        scores: Scores,
        number: int | Tensor,
        new_tokens: int | Tensor | None,
        mass: Tensor | None,
    ) -> None:
        """Let the observer see one row, and what it gave each entry, where the attention counted that.

        Args:
            number: of the step since the latest prompt pass, from 1.
        """
        assert self.step is not None
        rows = self._rows(query, tokens, scores, number, new_tokens, tokens.padded, False, self.step.stop)
        self.observer.step(self.observed, rows, mass)

    def perturbed(
        self, tokens: Tokens, number: int | Tensor, new_tokens: int | Tensor | None
    ) -> tuple[Perturbation, Tensor, Tensor] | None:
        """Noise and temperature of what is observed of a row, for `decode_attention`; None for none."""
        assert self.step is not None
        perturbation = self.observer.perturbation(self.index, number, new_tokens)
        if perturbation is None:
            return None
        positions = self.storage.positions[:, :, : self.step.stop]
        return perturbation, tokens.positions.expand(positions.shape[0], -1).to(positions.device), positions

    def _rows(
        self,
        query: Tensor,
        tokens: Tokens,
        scores: Scores,
        number: int | Tensor,
        new_tokens: int | Tensor | None,
        padded: bool,
        in_order: bool,
        stop: int | None,
    ) -> Rows:
        return Rows(
            query=query,
            at=tokens.positions.expand(query.shape[0], -1),
            padded=padded,
            in_order=in_order,
            seen=tokens.seen_tensor,
            scores=scores,
            layer=self.index,
            step=number,
            new_tokens=new_tokens,
            fetch_positions=lambda: self.storage.positions[:, :, :stop],
            fetch_keys=lambda: self._keys_in_place(stop),
        )

    def _keys_in_place(self, stop: int | None = None) -> Tensor:
        """Keys of the first slots, rotated at the entries' own positions, as the queries that observe them are at theirs."""
        keys, _ = self.storage.read(stop=stop)
        if self.rotary is None or self.places.own_keys:
            return keys
        return self.places.in_place(keys, self.storage.positions[:, :, :stop], self.rotary)

    def _keys_as_read(self, stop: int | None = None) -> Tensor:
        """The same, rotated where queries at their own positions read them as the newest rows do."""
        keys, _ = self.storage.read(stop=stop)
        assert self.texts.seen_tensor is not None
        if self.rotary is None:
            return keys
        return self.places.as_read(keys, self.storage.positions[:, :, :stop], self.texts.seen_tensor, self.rotary)

    # ------------------------------------------------------------------ eviction

    def prepare(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Before a prompt pass fills any layer: make what its eviction will leave, by the first layer's key and value.

        Args:
            key, value: [batch, kv_heads, count, head_dim].
            tokens: the tokens of the pass.
        """
        if not self.evicts or self.eviction.evict != "each_pass" or key.device.type != "cpu":
            return
        self.set_quotas(tokens)
        new = tokens.count if tokens.columns is None else max(len(columns) for columns in tokens.columns)
        assert self.largest is not None
        if self.eviction.heads != "shared":  # else it depends on the scores
            self.storage.make(key, value, self._capacity(min(self.largest, self.storage.length + new)))

    def _capacity(self, width: int) -> int:
        """Slots to make for `width` entries that a prompt leaves."""
        every = self.eviction.evict_every
        return width + (spare_slots(width) if every is None else every)

    def take_over(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store what a layer without policy held; the policy acts at the end of the next pass, which still sees it all."""
        self.append(key.to(value.dtype), value, tokens)
        self.storage.end_prompt()
        self._held_changed()
        self.steps = -1
        if self.evicts:
            self.set_quotas(tokens)
            self.pending = True

    def set_quotas(self, tokens: Tokens) -> None:
        """Set what each sequence may keep from now on, by the tokens it has seen when the pass ends."""
        assert tokens.seen is not None
        quotas = [self.eviction.quota(seen, self.index, self.count) for seen in tokens.seen]
        self.largest = max(quota.total for quota in quotas)
        device = tokens.positions.device
        self.totals = torch.tensor([quota.total for quota in quotas], dtype=torch.int32, device=device)
        self.recents = torch.tensor([quota.recent for quota in quotas], dtype=torch.int32, device=device)

    def finish_prompt(self, query: Tensor, tokens: Tokens, scores: Scores) -> None:
        """After a prompt pass was attended and observed: evict."""
        self.steps = 0
        self.scores = scores
        self.known.clear()
        if self.selection.observes_reads:
            self._keep_last_row(query, tokens)
        if self.evicts:
            self.close_prompt(tokens)
        self.storage.end_prompt()
        self._held_changed()

    def _keep_last_row(self, query: Tensor, tokens: Tokens) -> None:
        rows, positions = query, tokens.positions.expand(query.shape[0], -1)
        if tokens.padded and self.last_row is not None and self.last_position is not None:
            # A sequence that has nothing in this pass keeps its row of an earlier one.
            rows = torch.cat((self.last_row, rows), dim=2)
            positions = torch.cat((self.last_position, positions), dim=1)
        row, self.last_position = newest_rows(rows, positions, 1, not tokens.padded)
        self.last_row, self.last_unread = row.clone(), True

    def close_prompt(self, tokens: Tokens) -> None:
        """End a prompt pass: set the quotas by what was seen, and evict now or at the first decode step."""
        if self.storage.made is None:  # else `prepare` has done it
            self.set_quotas(tokens)
        self.pending = self.eviction.evict == "after_prompt"
        if not self.pending:
            self._evict_prompt()

    def settle(self) -> None:
        """Do the eviction that the prompt left for the first decode step."""
        if self.pending:
            self.pending = False
            self._evict_prompt()
            self._held_changed()

    def _evict_prompt(self) -> None:
        assert self.largest is not None and self.totals is not None and self.texts.seen_tensor is not None
        held = self.storage
        if held.length and not (held.uniform and held.entries <= self.largest):
            order = None if held.ordered else in_position_order(held.positions[:, :, : held.length])
            entries = self._entries(self.texts.seen_tensor, held.length, self.is_full, order)
            priority = priorities(self.eviction, entries, self.is_full)
            totals, width = self.totals[:, None], min(self.largest, held.length)
            shared = self.eviction.heads == "shared"
            if shared:
                totals = self.eviction.share(priority, self.totals)
                width = max(1, int(totals.max()))
            index, chosen = best(priority, totals, width)
            index = index if order is None else order.gather(2, index)
            if self.eviction.merges:
                self._merge_rest(index, chosen)
            if shared:
                self.storage = held.share(index, chosen)
            else:
                held.keep(index, chosen, self._capacity(width))
            self.has_freed = False
            self.state.clear()
            self.known.clear()
        self.observer.forget_prompt(self.observed)

    def evict_step(self, tokens: Tokens) -> None:
        """End a decode step: where a quota is exceeded drop the entries of lowest priority; of equals, the newest."""
        step, every = self.step, self.eviction.evict_every
        assert step is not None
        if step.evicts == "no":
            return
        assert self.totals is not None and self.recents is not None and every is not None
        positions = self.storage.positions[:, :, : step.stop]
        entries = self._entries(tokens.seen_tensor, step.stop, step.full)
        if every == 1 and not self.eviction.merges:
            scores, limits = self.eviction.score(entries), self.totals if step.evicts == "over" else None
            seen = tokens.seen_tensor.to(positions.device)
            # In one place from step to step, for what is replayed.
            out = self.free if self.free is not None and self.free.shape == positions.shape[:2] else None
            self.free = evict_slot(scores, positions, seen, self.recents, limits, out=out, full=step.full)
            return
        priority = priorities(self.eviction, entries, step.full)
        if not step.full:
            priority.masked_fill_(positions < 0, float("inf"))
        going = victims(priority, positions, every)
        over = None
        if step.evicts == "over":
            over = (positions >= 0).sum(-1, keepdim=True) >= self.totals[:, None, None] + every
        if self.eviction.merges:
            self._merge_victims(going, over, tokens)
        if over is not None:
            positions.scatter_(2, going, torch.where(over, -1, positions.gather(2, going)))
            return
        positions.scatter_(2, going, -1)

    def _entries(self, seen: Tensor, stop: int | None, full: bool, order: Tensor | None = None) -> Entries:
        """The first slots as the policy sees them, in the order of int64 [batch, kv_heads, n] slots where that is given.

        Args:
            seen: int32 [batch], real tokens seen.
            full: every one of the slots is known to hold an entry.
        """
        assert self.recents is not None
        positions = self.storage.positions[:, :, :stop]
        observed: dict[str, Tensor] = {}
        if self.scores is not None:
            keys = self._keys_as_read if self.observer.where_read else self._keys_in_place
            observed = self.observer.answer(self.observed, positions, lambda: keys(stop), self.scores)
        if order is not None:
            positions = positions.gather(2, order)
            observed = {name: counted.gather(2, order) for name, counted in observed.items()}
        tokens, recents = seen.to(positions.device), self.recents

        def candidates() -> Tensor:
            older = positions < (tokens - recents)[:, None, None]
            return older if full else older & (positions >= 0)

        def fetch() -> tuple[Tensor, Tensor]:
            keys, values = self._keys_in_place(stop), self.storage.read(stop=stop)[1]
            return (keys, values) if order is None else gather_both(keys, values, order)

        return Entries(positions, candidates, observed, tokens, self.index, self.count, fetch)

    # ------------------------------------------------------------------ merging

    def _merge_rest(self, index: Tensor, chosen: Tensor) -> None:
        """Merge what a prompt pass drops into what stays, where the policy assigns it."""
        kept, dropped = split_by(self.storage.positions[:, :, : self.storage.length] >= 0, index, chosen)
        width = int(dropped.sum(-1).max())
        if width:
            assert self.texts.seen_tensor is not None
            entries = self._entries(self.texts.seen_tensor, self.storage.length, self.is_full)
            self._merge(entries, *marked_first(kept, index.shape[2]), *marked_first(dropped, width))

    def _merge_victims(self, going: Tensor, over: Tensor | None, tokens: Tokens) -> None:
        """Merge what a decode step drops into what stays."""
        assert self.step is not None
        entries = self._entries(tokens.seen_tensor, self.step.stop, self.step.full)
        kept = entries.positions >= 0
        slots = torch.arange(kept.shape[2], device=going.device).expand(*going.shape[:2], -1)
        kept = kept.scatter(2, going, False)
        is_rest = torch.ones_like(going, dtype=torch.bool) if over is None else over.expand_as(going)
        self._merge(entries, slots, kept, going, is_rest)

    def _merge(self, entries: Entries, centres: Tensor, is_centre: Tensor, rest: Tensor, is_rest: Tensor) -> None:
        merge = self.eviction.merge(Dropped(entries, centres, is_centre, rest, is_rest))
        if merge is None:
            return
        n = entries.positions.shape[2]
        keys, values = self.storage.read(stop=n)
        stats = [stat[..., :n] for stat in self.stats.values()] if merge.sum_statistics else []
        target = merge.target.masked_fill(~is_rest, -1)
        merge_slots(keys, values, stats, merge.weights, centres, rest, target, value_norms=merge.value_norms)

    # ------------------------------------------------------------------ bookkeeping

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    def _held_changed(self) -> None:
        held, facts = self.storage, self.facts
        facts.positions = held.all_positions
        facts.kv_heads = held.kv_heads
        facts.nbytes, facts.entry_bytes, facts.length = self.nbytes, held.entry_bytes, held.row_length

    def _tensors(self) -> Iterator[Tensor]:
        yield from (tensor for holder in self._holders() for tensor in holder.values() if isinstance(tensor, Tensor))

    def _holders(self) -> list[dict[str, Any]]:
        """The mappings that hold tensors with the batch as first dimension."""
        return [self.__dict__, self.state, self.notes, self.waiting, *self.storage.holders()]

    def _change_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        with lasting_tensors():
            for holder in self._holders():
                for name, tensor in list(holder.items()):
                    if isinstance(tensor, Tensor):
                        holder[name] = change(tensor)
        self.known.clear()
        self._held_changed()

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change_tensors(change)
        if self.index == 0:
            with lasting_tensors():
                self.texts.change_batch(change)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recordings": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was saved: its tensors may just have been made in `torch.inference_mode`."""
        self.__dict__.update(state)

        def lasting(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        self._change_tensors(lasting)
        with lasting_tensors():
            self.texts.change_tensors(lasting)
            for name, value in vars(self.facts).items():
                if isinstance(value, Tensor):
                    setattr(self.facts, name, lasting(value))

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
        """Whether the last tokens can be taken back: not where a policy evicts, or lets tokens stop."""
        return not self.evicts and not self.roles.stops

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number.

        Raises:
            PolicyError: the policy evicts or lets tokens stop, or the batch is padded: slots are not in the order of tokens then.
        """
        # Before transformers 5.23 a positive number is the length to keep. Behind the first layer the texts are shorter already.
        length = self.texts.columns if self.index == 0 else self.length + self.texts.skipped
        removed = -tokens_to_remove if tokens_to_remove <= 0 else length - tokens_to_remove
        if removed <= 0 or not self.is_initialized:
            return
        if self.evicts:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: {self.eviction.describe()} evicts entries. Assisted and "
                "prompt-lookup decoding need a policy that keeps everything, as Full, or a model that is not patched"
            )
        if self.roles.stops:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: under {self.roles.route.describe()} each layer has run on others. "
                "Start a new cache; assisted and prompt-lookup decoding need another policy"
            )
        if self.index == 0 and self.texts.columns - removed < self.texts.fixed:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: {self.roles.route.describe()} left tokens out of the prompt that "
                f"ended {self.texts.columns - self.texts.fixed} tokens ago; take back at most these, or start a new cache"
            )
        if not self.uniform:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: its batch is padded. Assisted and prompt-lookup decoding need "
                "an unpadded batch, or a model that is not patched"
            )
        with lasting_tensors():
            self.take_back(min(removed, self.length))

    def take_back(self, removed: int) -> None:
        """Remove the last slots, which must be those of the last columns: of decode steps, or of an unpadded batch."""
        held = self.storage
        kept = held.length - removed
        if self.index == 0:
            real = None if held.uniform else (held.positions[:, 0, kept : held.length] >= 0).sum(-1).int()
            self.texts.take_back(removed, real)
        held.length = held.entries = kept
        held.positions[:, :, kept:] = -1
        self.state.clear()
        self.known.clear()
        self.steps, self.last_unread = -1, False
        self._held_changed()

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
