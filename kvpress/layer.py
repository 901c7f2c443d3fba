"""One layer of the cache under its policies: what is observed, what stays."""

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.evict import best, in_position_order, marked_first, priorities, split_by, victims
from kvpress.kernels.attention_mass import Perturbation
from kvpress.kernels.gather_slots import gather_both
from kvpress.kernels.merge_slots import merge_slots
from kvpress.observe import Observed, Rows, Scores, newest_rows
from kvpress.passes import Tokens
from kvpress.places import at_own_positions, rotated, without_rotation
from kvpress.policy import Consecutive, Dropped, Entries, Roles, Sinks
from kvpress.rotary import Rotary
from kvpress.slots import Facts, Slots, spare_slots

__all__ = ["Facts", "KVLayer"]


class KVLayer(Slots):
    """K and V of one attention layer in slots, and the policies that act on them.

    Args:
        roles: the policies.
        index, count: which of how many layers the policies act on.
        rotary: how the layer rotates queries and keys, for a policy that attends entries at other positions than their own.

    Attributes:
        raw_keys: whether keys are stored without their rotation.
        reindexed_sinks: how many first tokens are attended nearer than they stand, by the number of tokens dropped since.
    """

    def __init__(self, roles: Roles, index: int, count: int, rotary: Rotary | None = None) -> None:
        self.roles = roles
        self.eviction, self.selection, self.prefill = roles.eviction, roles.selection, roles.prefill
        self.evicts, self.observer = roles.evicts, roles.eviction.observes
        self.index = index
        self.count = count
        self.rotary = rotary
        places = roles.places
        self.raw_keys = rotary is not None and isinstance(places, Consecutive)
        rotates = rotary is not None and rotary.channels > 0
        self.reindexed_sinks = places.count if isinstance(places, Sinks) and rotates else 0
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.pending = False  # a prompt waits for its eviction (evict="after_prompt")
        self.scores: Scores | None = None  # how the model scores
        self.largest: int | None = None  # the largest quota of a sequence; None before the first prompt
        self.totals: Tensor | None = None  # int32 [batch], each sequence's quota
        self.recents: Tensor | None = None  # int32 [batch], how much of it is for the newest entries
        self.steps = 0  # decode steps since the latest prompt pass
        self.last_row: Tensor | None = None  # [batch, heads, 1, head_dim], the last query of a prompt
        self.last_position: Tensor | None = None  # int32 [batch, 1]
        self.last_unread = False  # the policy has not seen yet what that row reads

    def slot_limit(self) -> int | None:
        every = self.eviction.evict_every
        return None if every is None or self.largest is None else self.largest + every

    def stored_key(self, key: Tensor, tokens: Tokens) -> Tensor:
        if self.rotary is None:
            return key
        if self.raw_keys:
            return without_rotation(key, tokens.positions.to(key.device)[:, None], self.rotary)
        return at_own_positions(key, tokens, self.rotary)

    def own_query(self, query: Tensor, tokens: Tokens) -> Tensor:
        """A pass's queries, [batch, heads, count, head_dim], at their own positions, as exactly as the keys are at theirs."""
        if self.rotary is None or self.raw_keys:
            return query
        return at_own_positions(query, tokens, self.rotary)

    def spare(self, length: int, prompt: bool) -> int:
        if self.evicts and prompt:
            return 0  # a prompt is compacted right after its attention
        return spare_slots(length)

    def new_stats(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        return self.observer.slots(shape, device)

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not once a policy evicts."""
        return not self.evicts

    def check_crop(self, removed: int) -> None:
        if self.evicts:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: {self.eviction.describe()} evicts entries. Assisted and "
                "prompt-lookup decoding need a policy that keeps everything, as Full, or a model that is not patched"
            )
        super().check_crop(removed)

    def take_back(self, removed: int) -> None:
        super().take_back(removed)
        self.last_unread = False

    # ------------------------------------------------------------------ observing

    @property
    def observed(self) -> Observed:
        """What the observer has counted."""
        return Observed(self.stats, self.notes)

    @property
    def takes_mass(self) -> bool:
        """Whether the attention hands out all that the observer counts."""
        return self.observer.takes_mass

    @property
    def takes_prompt_mass(self) -> bool:
        """The same for a prompt's attention, which hands it out only where all rows read everything."""
        return self.takes_mass and not self.roles.plans

    def add_mass(self, mass: Tensor, rows: slice = slice(None)) -> None:
        """Add what a prompt pass gave, float32 [batch, kv_heads, n], to the first n slots (of some sequences)."""
        self.stats["mass"][rows, :, : mass.shape[2]] += mass

    def observe_prompt(self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, past: int) -> None:
        """Let the observer see a prompt pass.

        Args:
            query: [batch, heads, count, head_dim], the rows, rotated at their own positions; the entries are those in the
                slots in use.
            tokens: the tokens of the pass.
            scores: how the model scores.
            new_tokens: how many tokens the caller wants generated, if that is known.
            past: slots that were in use before the pass.
        """
        in_order = past == 0 and self.uniform
        self.observer.prompt(self.observed, self._rows(query, tokens, scores, new_tokens, not self.uniform, in_order))

    def observe_step(
        self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, mass: Tensor | None
    ) -> None:
        """Let the observer see one row, and what it gave each entry, where the attention counted that."""
        rows = self._rows(query, tokens, scores, new_tokens, tokens.padded, in_order=False)
        self.observer.step(self.observed, rows, mass)

    def perturbed(self, tokens: Tokens, new_tokens: int | None) -> tuple[Perturbation, Tensor, Tensor] | None:
        """Noise and temperature of what is observed of a row, for `decode_attention`; None for none."""
        perturbation = self.observer.perturbation(self.index, self.steps, new_tokens)
        if perturbation is None:
            return None
        at = tokens.positions.expand(self.positions.shape[0], -1).to(self.positions.device)
        return perturbation, at, self.positions[:, :, : self.length]

    def _rows(
        self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, padded: bool, in_order: bool
    ) -> Rows:
        return Rows(
            query=query,
            at=tokens.positions.expand(query.shape[0], -1),
            padded=padded,
            in_order=in_order,
            seen=tokens.seen_tensor,
            scores=scores,
            layer=self.index,
            step=self.steps,
            new_tokens=new_tokens,
            fetch_positions=lambda: self.positions[:, :, : self.length],
            fetch_keys=self._keys_in_place,
        )

    def _keys_in_place(self) -> Tensor:
        """Keys of the slots in use, rotated at the entries' own positions, as the queries that observe them are at theirs."""
        keys, _ = self.used()
        if self.rotary is None or not self.raw_keys:
            return keys
        return rotated(keys, self.positions[:, :, : self.length].clamp(min=0), self.rotary)

    # ------------------------------------------------------------------ eviction

    def prepare(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Before a prompt pass fills any layer: make what its eviction will leave, by the first layer's key and value.

        Args:
            key, value: [batch, kv_heads, count, head_dim].
            tokens: the tokens of the pass.
        """
        self.made = None
        if not self.evicts or self.eviction.evict != "each_pass" or key.device.type != "cpu":
            return
        self.set_quotas(tokens)
        new = tokens.count if tokens.columns is None else max(len(columns) for columns in tokens.columns)
        assert self.largest is not None
        self.make_buffers(key, value, self._capacity(min(self.largest, self.length + new)))

    def _capacity(self, width: int) -> int:
        """Slots to make for `width` entries that a prompt leaves."""
        every = self.eviction.evict_every
        return width + (spare_slots(width) if every is None else every)

    def take_over(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store what a layer without policy held; the policy acts at the end of the next pass, which still sees it all."""
        self.append(key.to(value.dtype), value, tokens)
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
        self.steps = 0

    def finish_prompt(
        self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, past: int, mass_known: bool
    ) -> None:
        """After a prompt pass was attended: let the observer see it (unless all it wants is known), and evict."""
        if self.selection.observes_reads:
            self._keep_last_row(query, tokens)
        if not self.evicts:
            return
        self.steps = 0
        self.scores = scores
        if not mass_known:
            self.observe_prompt(query, tokens, scores, new_tokens, past)
        self.close_prompt(tokens)

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
        if self.made is None:
            self.set_quotas(tokens)
        self.pending = self.eviction.evict == "after_prompt"
        if not self.pending:
            self._evict_prompt()
        self.made = None
        self._held_changed()

    def settle(self) -> None:
        """Do the eviction that the prompt left for the first decode step."""
        if self.pending:
            self.pending = False
            self._evict_prompt()
            self._held_changed()

    def _evict_prompt(self) -> None:
        assert self.largest is not None and self.totals is not None
        if self.length and not (self.uniform and self.entries <= self.largest):
            order = None if self.ordered else in_position_order(self.positions[:, :, : self.length])
            priority = priorities(self.eviction, self._entries(order), self.is_full)
            totals, width = self.quotas(priority)
            index, chosen = best(priority, totals, width)
            index = index if order is None else order.gather(2, index)
            if self.eviction.merges:
                self._merge_rest(index, chosen)
            self.compact(index, chosen, self._capacity(width))
        self.observer.forget_prompt(self.observed)

    def quotas(self, priority: Tensor) -> tuple[Tensor, int]:
        """How many entries stay, int [batch, kv_heads] or [batch, 1], and at least the largest of these numbers.

        Args:
            priority: float32 [batch, kv_heads, n], the scores, as `EvictionPolicy.share` gets them.
        """
        assert self.largest is not None and self.totals is not None
        return self.totals[:, None], min(self.largest, self.length)

    def evict_step(self) -> None:
        """End a decode step: where a quota is exceeded drop the entries of lowest priority; of equals, the newest."""
        every = self.eviction.evict_every
        if every is None or self.largest is None or (self.uniform and self.entries < self.largest + every):
            return
        assert self.totals is not None
        positions = self.positions[:, :, : self.length]
        priority = priorities(self.eviction, self._entries(), self.is_full)
        if not self.is_full:
            priority.masked_fill_(positions < 0, float("inf"))
        going = victims(priority, positions, every)
        over = None
        if not self.uniform:
            over = (positions >= 0).sum(-1, keepdim=True) >= self.totals[:, None, None] + every
        if self.eviction.merges:
            self._merge_victims(going, over)
        if over is None:
            positions.scatter_(2, going, -1)
            self.free = going.squeeze(-1) if every == 1 else None
            self.entries -= every
        else:
            positions.scatter_(2, going, torch.where(over, -1, positions.gather(2, going)))

    def _entries(self, order: Tensor | None = None) -> Entries:
        """The slots in use as the policy sees them, in the order of int64 [batch, kv_heads, n] slots where that is given."""
        assert self.recents is not None and self.texts.seen_tensor is not None
        positions = self.positions[:, :, : self.length]
        observed: dict[str, Tensor] = {}
        if self.scores is not None:
            observed = self.observer.answer(self.observed, positions, self._keys_in_place, self.scores)
        if order is not None:
            positions = positions.gather(2, order)
            observed = {name: counted.gather(2, order) for name, counted in observed.items()}
        tokens = self.texts.seen_tensor.to(positions.device)
        candidates = positions < (tokens - self.recents)[:, None, None]
        if not self.is_full:
            candidates &= positions >= 0

        def fetch() -> tuple[Tensor, Tensor]:
            keys, values = self._keys_in_place(), self.used()[1]
            return (keys, values) if order is None else gather_both(keys, values, order)

        return Entries(positions, candidates, observed, tokens, self.index, self.count, fetch)

    # ------------------------------------------------------------------ merging

    def _merge_rest(self, index: Tensor, chosen: Tensor) -> None:
        """Merge what a prompt pass drops into what stays, where the policy assigns it."""
        kept, dropped = split_by(self.positions[:, :, : self.length] >= 0, index, chosen)
        width = int(dropped.sum(-1).max())
        if width:
            self._merge(*marked_first(kept, index.shape[2]), *marked_first(dropped, width))

    def _merge_victims(self, going: Tensor, over: Tensor | None) -> None:
        """Merge what a decode step drops into what stays."""
        slots = torch.arange(self.length, device=going.device).expand(*going.shape[:2], -1)
        kept = self.positions[:, :, : self.length] >= 0
        kept = kept.scatter(2, going, False)
        is_rest = torch.ones_like(going, dtype=torch.bool) if over is None else over.expand_as(going)
        self._merge(slots, kept, going, is_rest)

    def _merge(self, centres: Tensor, is_centre: Tensor, rest: Tensor, is_rest: Tensor) -> None:
        merge = self.eviction.merge(Dropped(self._entries(), centres, is_centre, rest, is_rest))
        if merge is None:
            return
        keys, values = self.used()
        stats = [stat[..., : self.length] for stat in self.stats.values()] if merge.sum_statistics else []
        target = merge.target.masked_fill(~is_rest, -1)
        merge_slots(keys, values, stats, merge.weights, centres, rest, target, value_norms=merge.value_norms)
