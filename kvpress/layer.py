"""One layer of the cache under its policies: what is observed, what stays."""

from typing import Any

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.attention_mass import Perturbation, attention_mass
from kvpress.kernels.merge_slots import merge_slots
from kvpress.kernels.topk_select import topk_select
from kvpress.passes import Scores, Tokens
from kvpress.places import at_own_positions, rotated, without_rotation
from kvpress.policy import Entries, EvictionPolicy, Merging, SelectionPolicy
from kvpress.rotary import Rotary
from kvpress.slots import Facts, Slots, spare_slots

__all__ = ["Facts", "KVLayer"]

NEGLIGIBLE = 1e-12  # a row whose weight has decayed to less than this adds nothing to a float32 sum


class KVLayer(Slots):
    """K and V of one attention layer in slots, and the policies that act on them.

    Args:
        policy: the eviction policy, or None to keep everything.
        index, count: which of how many layers the policies act on.
        selection: the selection policy, or None to read everything.
        rotary: how the layer rotates queries and keys, for a policy that attends entries at other positions than their own.

    Attributes:
        raw_keys: whether keys are stored without their rotation.
        reindexed_sinks: how many first tokens are attended nearer than they stand, by the number of tokens dropped since.
    """

    def __init__(
        self,
        policy: EvictionPolicy | None,
        index: int,
        count: int,
        selection: SelectionPolicy | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        self.policy = policy
        self.selection = selection
        self.index = index
        self.count = count
        self.rotary = rotary
        self.raw_keys = rotary is not None and any(one is not None and one.raw_keys for one in (policy, selection))
        moves_sinks = policy is not None and rotary is not None and rotary.channels > 0
        self.reindexed_sinks = policy.reindexed_sinks if policy is not None and moves_sinks else 0
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.pending = False  # a prompt waits for its eviction (evict="after_prompt")
        self.window: Tensor | None = None  # [batch, heads, rows, head_dim], last rows of a prompt not yet evicted
        self.window_positions: Tensor | None = None  # int32 [batch, rows]
        self.scores: Scores | None = None  # how the model scores, for the rows in `window`
        self.row_positions: Tensor | None = None  # int32 [batch, rows], the rows of stats["rows"], -1 for none
        self.largest: int | None = None  # the largest quota of a sequence; None before the first prompt
        self.totals: Tensor | None = None  # int32 [batch], each sequence's quota
        self.recents: Tensor | None = None  # int32 [batch], how much of it is for the newest entries
        self.steps = 0  # decode steps since the latest prompt pass
        self.last_row: Tensor | None = None  # [batch, heads, 1, head_dim], the last query of a prompt
        self.last_position: Tensor | None = None  # int32 [batch, 1]
        self.last_unread = False  # the policy has not seen yet what that row reads
        self.decoded: Tensor | None = None  # [batch, steps(, hidden)], inputs of decode steps to be computed again
        self.decoded_at: Tensor | None = None  # int64 [batch, steps], their position ids

    @property
    def mass(self) -> Tensor | None:
        """Accumulated attention, float32 [batch, kv_heads, capacity], for a policy that observes every row."""
        return self.stats.get("mass")

    def slot_limit(self) -> int | None:
        if self.policy is None or not self.policy.drops_in_decode or self.largest is None:
            return None
        return self.largest + self.policy.evict_every

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
        if self.policy is not None and prompt:
            return 0  # a prompt is compacted right after its attention
        return spare_slots(length)

    def new_stats(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor]:
        if self.policy is None or self.policy.observes != "every row":
            return {}
        stats = {"mass": torch.zeros(shape, dtype=torch.float32, device=device)}
        if self.policy.observed_window:
            rows = (*shape[:2], self.policy.observed_window, shape[2])
            stats["rows"] = torch.zeros(rows, dtype=torch.float32, device=device)
        return stats

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be taken back: not once a policy evicts."""
        return self.policy is None

    def check_crop(self, removed: int) -> None:
        if self.policy is not None:
            raise PolicyError(
                f"this cache cannot take back {removed} tokens: {self.policy.describe()} evicts entries. Assisted and "
                "prompt-lookup decoding need a policy that keeps everything, as Full, or a model that is not patched"
            )
        super().check_crop(removed)

    def take_back(self, removed: int) -> None:
        super().take_back(removed)
        self.last_unread = False
        if self.decoded is not None and self.decoded_at is not None:
            left = max(0, self.decoded.shape[1] - removed)
            self.decoded = self.decoded[:, :left].clone() if left else None
            self.decoded_at = self.decoded_at[:, :left].clone() if left else None

    # ------------------------------------------------------------------ observing

    @property
    def fused_mass(self) -> bool:
        """Whether the policy's statistics are the plain attention weights, which the attention can hand out."""
        policy = self.policy
        if policy is None or policy.observes != "every row":
            return False
        return policy.forgetting == 1 and policy.observed_window == 0 and policy.perturbation(0, None, 0) is None

    def observe(self, mass: Tensor, rows: slice = slice(None)) -> None:
        """Add a pass's attention mass, float32 [batch, kv_heads, n], to the first n slots (of some sequences)."""
        assert self.mass is not None
        self.mass[rows, :, : mass.shape[2]] += mass

    def observe_row(self, mass: Tensor, tokens: Tokens) -> None:
        """Add what one row saw, float32 [batch, kv_heads, n], to the first n slots, as the policy weighs rows.

        A sequence that has nothing in this pass is left as it is.
        """
        assert self.policy is not None and self.mass is not None
        held, decay = self.mass[..., : mass.shape[2]], self.policy.forgetting
        if tokens.padded:
            real = (tokens.positions >= 0).to(mass.device)[:, None]
            mass = mass.masked_fill(~real, 0.0)
            if decay != 1:
                held.mul_(torch.where(real, decay, 1.0))
        elif decay != 1:
            held.mul_(decay)
        held.add_(mass)
        if self.policy.observed_window:
            at = tokens.positions.expand(mass.shape[0], -1).to(mass.device)
            self._push_rows(mass[:, :, None], at)

    def perturbed(self, tokens: Tokens, new_tokens: int | None) -> tuple[Perturbation, Tensor, Tensor] | None:
        """Noise and temperature of what the policy observes in a row, for `decode_attention`; None for none."""
        assert self.policy is not None
        perturbation = self.policy.perturbation(self.steps, new_tokens, self.index)
        if perturbation is None:
            return None
        at = tokens.positions.expand(self.positions.shape[0], -1).to(self.positions.device)
        return perturbation, at, self.positions[:, :, : self.length]

    def observe_rows(self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, past: int) -> None:
        """Add what a pass's rows saw, for a policy that weighs rows, perturbs scores or also looks at the last rows.

        Args:
            query: [batch, heads, count, head_dim], the rows, rotated at their own positions; the entries are those in the
                slots in use.
            tokens: the tokens of the pass.
            scores: how the model scores.
            new_tokens: how many tokens the caller wants generated, if that is known.
            past: slots that were in use before the pass.
        """
        policy, mass = self.policy, self.mass
        assert policy is not None and mass is not None
        keys = self._keys_in_place()
        row_positions = tokens.positions.expand(query.shape[0], -1)
        positions = self.positions[:, :, : self.length]
        structural = past == 0 and self.uniform and query.shape[2] > 1  # entry i is at position i
        options: dict[str, Any] = {
            **vars(scores),
            "perturbation": policy.perturbation(self.steps, new_tokens, self.index),
        }
        decay = policy.forgetting
        if decay != 1:
            mass *= (decay ** (row_positions >= 0).sum(1).float())[:, None, None]
        rows, at = query, row_positions
        if decay < 1 and query.shape[2] > 1:
            rows, at = newest_rows(query, row_positions, _rows_that_count(decay), self.uniform)
        age = (tokens.seen_tensor.to(at.device)[:, None] - 1 - at).clamp(min=0)
        weights = None if decay == 1 else decay ** age.float()
        mass[:, :, : self.length] += attention_mass(
            rows, at, keys, None if structural else positions, row_weights=weights, **options
        )
        if policy.observed_window:
            self._keep_last_rows(query, row_positions, keys, positions, options)

    def _keys_in_place(self) -> Tensor:
        """Keys of the slots in use, rotated at the entries' own positions, as the queries that observe them are at theirs."""
        keys, _ = self.used()
        if self.rotary is None or not self.raw_keys:
            return keys
        return rotated(keys, self.positions[:, :, : self.length].clamp(min=0), self.rotary)

    def _keep_last_rows(
        self, query: Tensor, row_positions: Tensor, keys: Tensor, positions: Tensor, options: dict[str, Any]
    ) -> None:
        assert self.policy is not None
        size = self.policy.observed_window
        rows, at = newest_rows(query, row_positions, size, self.uniform)
        seen = torch.stack(
            [
                attention_mass(rows[:, :, i : i + 1], at[:, i : i + 1], keys, positions, **options)
                for i in range(at.shape[1])
            ],
            dim=2,
        )
        self._push_rows(seen, at)

    def _push_rows(self, seen: Tensor, at: Tensor) -> None:
        """Put rows that were just seen, [batch, kv_heads, rows, n] at positions [batch, rows], among the last ones kept.

        Their order means nothing.
        """
        assert self.policy is not None
        held, size = self.stats["rows"], self.policy.observed_window
        if self.row_positions is None:
            self.row_positions = at.new_full((at.shape[0], size), -1)
        if at.shape[1] == 1:  # it takes the place of the oldest
            oldest = self.row_positions.argmin(dim=1, keepdim=True)
            real = at >= 0
            place = oldest[:, None, :, None].expand(-1, held.shape[1], -1, seen.shape[3])
            there = held[..., : self.length]
            there.scatter_(2, place, torch.where(real[:, None, :, None], seen, there.gather(2, place)))
            newest = torch.where(real, at.to(self.row_positions.dtype), self.row_positions.gather(1, oldest))
            self.row_positions.scatter_(1, oldest, newest)
            return
        places = torch.cat((self.row_positions, at.to(self.row_positions.dtype)), dim=1)
        newest = places.topk(size, dim=1).indices.sort(dim=1).values
        both = torch.cat((held[..., : self.length], seen), dim=2)
        index = newest[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3])
        held[..., : self.length] = both.gather(2, index)
        self.row_positions = places.gather(1, newest)

    def remember(self, query: Tensor, tokens: Tokens, scores: Scores) -> None:
        """Keep the last real rows of a prompt pass, query [batch, heads, count, head_dim], for a policy with a window."""
        assert self.policy is not None
        rows, positions = query, tokens.positions.expand(query.shape[0], -1)
        if self.window is not None and self.window_positions is not None:
            rows = torch.cat((self.window, rows), dim=2)
            positions = torch.cat((self.window_positions, positions), dim=1)
        self.window, self.window_positions = newest_rows(rows, positions, self.policy.observed_window, self.uniform)
        self.window = self.window.clone()
        self.scores = scores

    # ------------------------------------------------------------------ eviction

    def prepare(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Before a prompt pass fills any layer: make what its eviction will leave, by the first layer's key and value.

        Args:
            key, value: [batch, kv_heads, count, head_dim].
            tokens: the tokens of the pass.
        """
        self.made = None
        if self.policy is None or self.policy.evict != "each_pass" or key.device.type != "cpu":
            return
        self.set_quotas(tokens)
        new = tokens.count if tokens.columns is None else max(len(columns) for columns in tokens.columns)
        assert self.largest is not None
        self.make_buffers(key, value, self._capacity(min(self.largest, self.length + new)))

    def _capacity(self, width: int) -> int:
        """Slots to make for `width` entries that a prompt leaves."""
        assert self.policy is not None
        return width + (self.policy.evict_every if self.policy.drops_in_decode else spare_slots(width))

    def take_over(self, key: Tensor, value: Tensor, tokens: Tokens) -> None:
        """Store what a layer without policy held; the policy acts at the end of the next pass, which still sees it all."""
        self.append(key, value, tokens)
        if self.policy is not None:
            self.set_quotas(tokens)
            self.pending = True

    def set_quotas(self, tokens: Tokens) -> None:
        """Set what each sequence may keep from now on, by the tokens it has seen when the pass ends."""
        assert self.policy is not None and tokens.seen is not None
        quotas = [self.policy.quota(seen, self.index, self.count) for seen in tokens.seen]
        self.largest = max(quota.total for quota in quotas)
        device = tokens.positions.device
        self.totals = torch.tensor([quota.total for quota in quotas], dtype=torch.int32, device=device)
        self.recents = torch.tensor([quota.recent for quota in quotas], dtype=torch.int32, device=device)
        self.steps = 0

    def finish_prompt(
        self, query: Tensor, tokens: Tokens, scores: Scores, new_tokens: int | None, past: int, mass_known: bool
    ) -> None:
        """After a prompt pass was attended: observe what the policy asks for (but the mass, if it is known), and evict."""
        if self.selection is not None and self.selection.observes_reads:
            self._keep_last_row(query, tokens)
        if self.policy is None:
            return
        self.steps = 0
        if self.policy.observes == "every row" and not mass_known:
            self.observe_rows(query, tokens, scores, new_tokens, past)
        if self.policy.observes == "window":
            self.remember(query, tokens, scores)
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
        assert self.policy is not None
        if self.made is None:
            self.set_quotas(tokens)
        self.pending = self.policy.evict == "after_prompt"
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
        assert self.policy is not None and self.largest is not None and self.totals is not None
        if self.length and not (self.uniform and self.entries <= self.largest):
            positions = self.positions[:, :, : self.length]
            mass, last = self._observed()
            order = None
            if not self.ordered:
                newest_last = torch.where(positions < 0, torch.iinfo(torch.int32).max, positions)
                order = newest_last.argsort(dim=-1, stable=True)
                positions = positions.gather(2, order)
                mass, last = (x if x is None else x.gather(2, order) for x in (mass, last))
            priority = self._priority(positions, mass, last)
            totals, width = self.quotas(priority)
            index, chosen = topk_select(priority, totals, width)
            index = index if order is None else order.gather(2, index)
            if self.policy.merges:
                self._merge_rest(index, chosen)
            self.compact(index, chosen, self._capacity(width))
        self.window = self.window_positions = None

    def quotas(self, priority: Tensor) -> tuple[Tensor, int]:
        """How many entries stay, int [batch, kv_heads] or [batch, 1], and at least the largest of these numbers.

        Args:
            priority: float32 [batch, kv_heads, n], the scores, as `EvictionPolicy.head_totals` gets them.
        """
        assert self.largest is not None and self.totals is not None
        return self.totals[:, None], min(self.largest, self.length)

    def evict_step(self) -> None:
        """End a decode step: where a quota is exceeded drop the entries of lowest priority; of equals, the newest."""
        assert self.policy is not None and self.largest is not None and self.totals is not None
        every = self.policy.evict_every
        if not self.policy.drops_in_decode or (self.uniform and self.entries < self.largest + every):
            return
        positions = self.positions[:, :, : self.length]
        priority = self._priority(positions, *self._observed())
        if not self.is_full:
            priority.masked_fill_(positions < 0, float("inf"))
        if every == 1:
            lowest = priority.amin(dim=-1, keepdim=True)
            victims = torch.where(priority == lowest, positions, -1).argmax(dim=-1, keepdim=True)
        else:
            newest_first = positions.argsort(dim=-1, descending=True, stable=True)
            lowest_first = priority.gather(2, newest_first).argsort(dim=-1, stable=True)
            victims = newest_first.gather(2, lowest_first[..., :every])
        over = None
        if not self.uniform:
            over = (positions >= 0).sum(-1, keepdim=True) >= self.totals[:, None, None] + every
        if self.policy.merges:
            self._merge_victims(victims, over)
        if over is None:
            positions.scatter_(2, victims, -1)
            self.free = victims.squeeze(-1) if every == 1 else None
            self.entries -= every
        else:
            positions.scatter_(2, victims, torch.where(over, -1, positions.gather(2, victims)))

    def _observed(self) -> tuple[Tensor | None, Tensor | None]:
        """Per slot in use: the mass that the policy asked for, and that of the last rows where it asked for both."""
        assert self.policy is not None
        if self.mass is not None:
            last = self.stats["rows"].sum(2)[:, :, : self.length] if "rows" in self.stats else None
            return self.mass[:, :, : self.length], last
        if self.window is not None:
            assert self.window_positions is not None and self.scores is not None
            keys = self._keys_in_place()
            positions = self.positions[:, :, : self.length]
            return attention_mass(self.window, self.window_positions, keys, positions, **vars(self.scores)), None
        return None, None

    def _entries(self, positions: Tensor, mass: Tensor | None, last: Tensor | None) -> Entries:
        assert self.recents is not None and self.facts.tokens is not None
        tokens = self.facts.tokens.to(positions.device)
        candidates = positions < (tokens - self.recents)[:, None, None]
        if not self.is_full:
            candidates &= positions >= 0
        return Entries(positions, candidates, mass, last, tokens)

    def _priority(self, positions: Tensor, mass: Tensor | None, last: Tensor | None) -> Tensor:
        """The policy's scores, with the newest entries on top at +inf and empty slots at -inf."""
        assert self.policy is not None
        entries = self._entries(positions, mass, last)
        score = self.policy.score(entries).float()
        # A score that is not finite must neither protect its entry nor poison the comparison.
        limit = torch.finfo(torch.float32).max
        score = torch.nan_to_num(score, nan=-limit, posinf=limit, neginf=-limit)
        score.masked_fill_(~entries.candidates, float("inf"))
        return score if self.is_full else score.masked_fill_(positions < 0, float("-inf"))

    # ------------------------------------------------------------------ merging

    def _merge_rest(self, index: Tensor, chosen: Tensor) -> None:
        """Merge what a prompt pass drops into what stays, where the policy assigns it."""
        held = self.positions[:, :, : self.length] >= 0
        kept = torch.zeros(held.shape, dtype=torch.uint8, device=index.device)
        kept = kept.scatter_add_(2, index, chosen.to(torch.uint8)) > 0  # what is not chosen may repeat a chosen slot
        dropped = held & ~kept
        width = int(dropped.sum(-1).max())
        if width:
            self._merge(*marked_first(kept, index.shape[2]), *marked_first(dropped, width))

    def _merge_victims(self, victims: Tensor, over: Tensor | None) -> None:
        """Merge what a decode step drops into what stays."""
        slots = torch.arange(self.length, device=victims.device).expand(*victims.shape[:2], -1)
        kept = self.positions[:, :, : self.length] >= 0
        kept = kept.scatter(2, victims, False)
        is_rest = torch.ones_like(victims, dtype=torch.bool) if over is None else over.expand_as(victims)
        self._merge(slots, kept, victims, is_rest)

    def _merge(self, centres: Tensor, is_centre: Tensor, rest: Tensor, is_rest: Tensor) -> None:
        assert self.policy is not None
        keys, values = self.used()
        entries = self._entries(self.positions[:, :, : self.length], *self._observed())
        merge = self.policy.assign(Merging(entries, keys, values, centres, is_centre, rest, is_rest))
        stats = [stat[..., : self.length] for stat in self.stats.values()] if merge.sum_statistics else []
        target = merge.target.masked_fill(~is_rest, -1)
        merge_slots(keys, values, stats, merge.weights, centres, rest, target, value_norms=merge.value_norms)


def marked_first(marks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Slots in ascending order, the marked ones before the others: the first k, and which of them are marked."""
    slots = marks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return slots, marks.gather(2, slots)


def newest_rows(query: Tensor, positions: Tensor, size: int, unpadded: bool) -> tuple[Tensor, Tensor]:
    """The last `size` real rows of each sequence, in order: query [batch, heads, size, head_dim], positions [batch, size]."""
    size = min(size, query.shape[2])
    if unpadded:
        return query[:, :, -size:], positions[:, -size:]
    newest = positions.topk(size, dim=1).indices.sort(dim=1).values
    index = newest[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index), positions.gather(1, newest)


def _rows_that_count(decay: float) -> int:
    """How many last rows have a weight of at least `NEGLIGIBLE`, when each row's is `decay` times the next one's."""
    rows, weight = 1, decay
    while weight >= NEGLIGIBLE:
        rows, weight = rows + 1, weight * decay
    return rows
