"""HiP: each block of rows walks down a tree over the entries to those that score highest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import PolicyError
from kvpress.kernels.gather_slots import gather_slots
from kvpress.kernels.topk_select import topk_select
from kvpress.kernels.union_select import union_select
from kvpress.policy import (
    Budget,
    Pattern,
    Policy,
    PrefillPolicy,
    Selected,
    SelectionPolicy,
    View,
    check_block_size,
    check_count,
    selected_by_groups,
)

# Numbers that a tile of a prompt's search has: of keys that are copied side by side, or of products.
TILE_NUMBERS = 1 << 22
# To copy a key takes as long as to compare it with so many rows.
COPY_COST = 64


@dataclass(frozen=True, kw_only=True)
class HiP(SelectionPolicy, PrefillPolicy):
    """Read, in prompts and in decode, the `k` keys that a search down a tree finds, the first keys, and a window.

    Keys are cut into small blocks, the leaves of a tree. For each query head and block of rows all leaves up to the last row
    are divided into as many ranges as leaves may be read. Every range is halved, each half is scored by the leaf in its
    middle (the largest q.k of a row of the block and a key of the leaf), and the better half of all halves is kept, until
    a range is one leaf. So only some hundred keys are looked at in each of a logarithmic number of rounds, and the leaves
    found hold high scores where scores of neighbours are alike. The rows then read these leaves, the first `sink` keys, and a
    window. A decode step is a block of one row; the leaves that it finds serve the steps after it, too.

    Source: Lee et al., "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning", arXiv 2406.09827.
    Written from the paper alone; the authors' code was not read. What is left open there is decided so, or differs:

    - Where nothing is said of sink and window, they are to `k` as in the paper's run on RULER (128 and 1024 to 2048).
    - The window of a block of rows begins `window` keys before the block's second row, so each row reads at least so many up to
      itself, and its own block. Sink and window are whole leaves, and read besides the `k` keys.
    - The leaves of the block of rows itself compete for the `k` keys, and there rows are compared with later keys, too.
    - Every fourth row of a block is compared. Of SmolLM2's attention in 2048 tokens of a novel (two layers, k=256) this finds
      77.8 %, all rows 78.1 %, every eighth 77.3 %.
    - Of equal scores the earlier leaf is kept. A range of one leaf is halved no more, and competes as it is.
    - Where leaves are few enough all are kept. A prompt that is not longer than `k` is exact.
    - Blocks and leaves are counted from a sequence's first entry in every pass. The rows of a later pass (a chunk, a turn) may
      begin inside of a block, which then has the rows that there are; a pass of one row is exact.
    - Each query head of a group chooses by itself; K and V are not repeated. In decode what a group chose is read once, and each
      head attends to its own.
    - In a padded batch each sequence chooses alone. Beside an eviction policy leaves are runs of the entries that are kept.
    - Soft-capping and attention sinks act in the attention alone (the order of scores does not change by soft-capping).
    - q.k of the search is in the model's dtype on a GPU, float32 on a CPU. On a GPU the attention of prompts has no kernel of
      its own for blocks of keys that are smaller than those of rows.
    - A pass without a cache is exact attention, as under every policy.

    Args:
        k: keys that the search keeps, whole leaves (paper: 512; 2048 for RULER).
        window: last keys, read by every row (paper: 1024 for RULER).
        sink: first keys, always read (paper: 128 for RULER).
        block_size: rows of a block, a power of two (paper: 32, or 64).
        key_block_size: keys of a leaf, a power of two up to `block_size` (paper: 2).
        row_stride: every so-many-th row of a block is compared, from its first row on; 1 for all (paper: rows may be skipped).
        dense_layers: first layers, among those with full attention, that read everything (paper: 3 for models of 7B, else 4).
        refresh: decode steps that are served by one search; 1 for a new one in each step (paper: 8).
        min_len: a prompt pass that ends before so many entries is exact.

    Raises:
        PolicyError: a value out of range, no layer left to select in, or an eviction policy beside it that frees slots in
            decode.
    """

    name: ClassVar[str] = "hip"
    paper: ClassVar[str] = "arXiv 2406.09827"
    takes_budget: ClassVar[bool] = True
    takes_share: ClassVar[bool] = False
    notes: ClassVar[str | None] = "the leaves that hip has found"

    k: int = 512
    window: int = 256
    sink: int = 32
    block_size: int = 32
    key_block_size: int = 2
    row_stride: int = 4
    dense_layers: int = 3
    refresh: int = 8
    min_len: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("k", 1), ("window", 1), ("row_stride", 1), ("refresh", 1)):
            check_count(getattr(self, name), name, minimum)
        for name in ("sink", "dense_layers", "min_len"):
            check_count(getattr(self, name), name, 0)
        check_block_size(self.block_size, usual="32 or 64")
        check_block_size(self.key_block_size, "key_block_size", "2")
        if self.key_block_size > self.block_size:
            raise PolicyError(
                f"key_block_size={self.key_block_size} is larger than block_size={self.block_size}; give at most "
                f"{self.block_size}"
            )
        if self.k % self.key_block_size:
            nearest = max(1, self.k // self.key_block_size) * self.key_block_size
            raise PolicyError(
                f"k={self.k} is no whole number of blocks of key_block_size={self.key_block_size}; give {nearest}"
            )

    @classmethod
    def at_budget(cls, budget: Budget, **fields: Any) -> "HiP":
        """At most `budget` keys read by a head in a decode step: sinks, window and found ones in the proportion 1 : 8 : 16."""
        size = fields.get("key_block_size", cls.key_block_size)
        check_block_size(size, "key_block_size", "2")
        least = -(-25 * size // 8)  # with less there would be no window
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
            raise PolicyError(
                f"budget={budget!r} cannot be split into sinks, window and found keys; give an int of at least {least}"
            )
        # The window may begin inside of a leaf, which is read whole.
        sink, window = budget // 25 // size * size, 8 * budget // 25 - (size - 1)
        k = (budget - sink - window - (size - 1)) // size * size
        return cls(**({"k": k, "window": window, "sink": sink} | fields))

    def check_layers(self, layers: int) -> None:
        if self.dense_layers >= layers:
            raise PolicyError(
                f"dense_layers={self.dense_layers} leaves no layer to select in, of a model with {layers} attention layers; give "
                f"at most {layers - 1}"
            )

    def check_company(self, others: Sequence[Policy]) -> None:
        SelectionPolicy.check_company(self, others)
        PrefillPolicy.check_company(self, others)

    @property
    def keep(self) -> int:
        """Leaves that a search keeps."""
        return self.k // self.key_block_size

    @property
    def sink_leaves(self) -> int:
        """Leaves that hold the first keys."""
        return -(-self.sink // self.key_block_size)

    def plan(self, view: View) -> Pattern | None:
        """The leaves that each query head reads in a prompt, int32 [batch, heads, row blocks, m]."""
        rows, n = view.query.shape[2], view.keys.shape[2]
        if rows == 1 or n <= self.k or n < self.min_len or view.layer < self.dense_layers:
            return None
        size, leaf, device = self.block_size, self.key_block_size, view.query.device
        found = self.search(view.query, view.keys)
        begins = torch.arange((n - rows) // size * size, n, size, device=device)  # each block's first row
        held = _leaves((begins + size).clamp(max=n), leaf)
        # What the first keys and the window have is not listed twice.
        start = ((begins - self.window + 1).clamp(min=0) // leaf).clamp(min=self.sink_leaves)
        found = found.masked_fill_((found < self.sink_leaves) | (found >= start[:, None]), -1)
        first = torch.arange(self.sink_leaves, device=device).expand(len(begins), -1)
        last = start[:, None] + torch.arange((self.window + size - 2) // leaf + 1, device=device)
        always = torch.cat((first, last), dim=1)
        always = always.masked_fill_(always >= held[:, None], -1).int()
        blocks = torch.cat((found, always.expand(*found.shape[:2], -1, -1)), dim=-1)
        return Pattern(blocks=blocks, block_size=size, key_block_size=leaf)

    def search(self, query: Tensor, keys: Tensor) -> Tensor:
        """The leaves that blocks of rows find.

        Args:
            query: [batch, heads, rows, head_dim], those of the last entries.
            keys: [batch, kv_heads, n, head_dim].

        Returns:
            int32 [batch, heads, row blocks, keep], ascending, -1 behind them where there are fewer. The row blocks are the last
            of the blocks, those that hold rows.
        """
        batch, heads, rows, head_dim = query.shape
        n, size, leaf, device = keys.shape[2], self.block_size, self.key_block_size, query.device
        past = n - rows
        begins = range(past // size * size, n, size)
        found = torch.empty(batch, heads, len(begins), self.keep, dtype=torch.int32, device=device)
        in_block = torch.arange(0, size, self.row_stride, device=device)
        all_leaves = -(-n // leaf)
        # In a prompt that is not long it is faster to score all leaves at once than to copy those that are looked at.
        looked_at, compared = 2 * self.keep * rounds(all_leaves, self.keep), len(in_block)
        whole = all_leaves * compared <= looked_at * (compared + COPY_COST)
        numbers = compared * n // 2 if whole else 2 * self.k * head_dim  # half of the entries are seen on average
        step = max(1, TILE_NUMBERS // (batch * heads * numbers))
        for start in range(0, len(begins), step):
            some = begins[start : start + step]
            stop = min(n, some[-1] + size)
            first = torch.arange(some.start, some.stop, size, device=device)
            # A row that is not there is the nearest one that is, which does not change the largest product.
            tile = query[:, :, (first[:, None] + in_block - past).clamp_(0, rows - 1)]
            if whole:
                score = partial(torch.gather, all_products(tile, keys[:, :, :stop], leaf), -1)
            else:
                score = partial(self._of_leaves, tile, keys)
            leaves = _leaves((first + size).clamp(max=n), leaf).expand(batch, heads, -1)
            found[:, :, start : start + step] = descend(leaves, self.keep, rounds(-(-stop // leaf), self.keep), score)
        return found

    def _of_leaves(self, query: Tensor, keys: Tensor, leaves: Tensor) -> Tensor:
        """`some_products` of leaves, the last of which may lack entries."""
        return some_products(query, keys, _entries(leaves, self.key_block_size).clamp_(max=keys.shape[2] - 1))

    def phase(self, number: int) -> bool:
        """Whether a step searches anew."""
        return number == 0 or (number - 1) % self.refresh == 0

    def select(self, view: View) -> Selected:
        if view.layer < self.dense_layers:
            return Selected()
        batch, kv_heads, n = view.positions.shape
        group, leaf, device = view.query.shape[1] // kv_heads, self.key_block_size, view.query.device
        held = entries_held(view)
        scanned: float | Tensor = 0.0
        if view.phase or "found" not in view.state:
            view.keep("found", self._found(view, held))
            scanned = self._scanned(view, group)
        count = -(-n // leaf)
        number = torch.arange(count, device=device)
        start = (held - self.window).clamp(min=0) // leaf
        always = (number < self.sink_leaves) | (number >= start[..., None])
        # What was not found goes to a place of its own behind the leaves, which is cut off.
        found = view.state["found"].long()
        reads = torch.zeros(batch, found.shape[1], count + 1, dtype=torch.bool, device=device)
        reads = reads.scatter_(2, torch.where(found < 0, count, found), True)[..., :count]
        reads = (reads | always.repeat_interleave(group, dim=1)).repeat_interleave(leaf, dim=2)[..., :n]
        most = group * self.k + self.sink_leaves * leaf + self.window + leaf - 1
        return selected_by_groups(view, in_slots(view, reads), min(n, most), scanned)

    def _found(self, view: View, held: Tensor) -> Tensor:
        """The leaves that a step's row finds: int32 [batch, heads, keep], -1 where there are fewer.

        Args:
            held: int64 [batch, kv_heads], entries that there are.
        """
        kv_heads, n = view.positions.shape[1:]
        group, leaf, order = view.query.shape[1] // kv_heads, self.key_block_size, slots_of_entries(view)
        of_head = held.repeat_interleave(group, dim=1)
        last = (of_head - 1).clamp(min=0)[..., None, None]

        def score(leaves: Tensor) -> Tensor:
            entries = torch.minimum(_entries(leaves, leaf), last)
            if order is not None:
                entries = order.gather(2, entries.view(len(order), kv_heads, -1)).view(entries.shape)
            return some_products(view.query[:, :, None], view.keys, entries[:, :, None])[:, :, 0]

        return descend(_leaves(of_head, leaf), self.keep, rounds(-(-n // leaf), self.keep), score).int()

    def _scanned(self, view: View, group: int) -> Tensor:
        """Entries whose worth of memory a step's search reads: keys without values, each counted once at most."""
        length = torch.as_tensor(view.length, device=view.query.device)
        leaves, looked_at = _leaves(length, self.key_block_size), torch.zeros_like(length)
        for done in range(rounds(-(-view.positions.shape[2] // self.key_block_size), self.keep)):
            looked_at += (leaves > self.keep << done) * (2 * self.k * group)
        return torch.minimum(looked_at, length) / 2


def entries_held(view: View) -> Tensor:
    """How many entries each kv head holds in a decode step: int64 [batch, kv_heads]."""
    if view.valid is None:
        return torch.full(view.positions.shape[:2], view.positions.shape[2], device=view.query.device)
    return view.valid.sum(-1)


def slots_of_entries(view: View) -> Tensor | None:
    """In which slots a step's entries are, without the empty ones between: int64 [batch, kv_heads, n]; None for the first ones."""
    if view.valid is None or view.in_front:
        return None
    kv_heads, n = view.positions.shape[1:]
    return union_select(view.valid, kv_heads, width=view.width(n))[0]


def in_slots(view: View, reads: Tensor) -> Tensor:
    """Of marks of entries those of the slots that they are in: bool [batch, heads or kv_heads, n] both."""
    if view.valid is None:
        return reads
    group = reads.shape[1] // view.positions.shape[1]
    rank = (view.valid.cumsum(-1) - 1).clamp(min=0)
    return reads.gather(2, rank.repeat_interleave(group, dim=1)) & view.valid.repeat_interleave(group, dim=1)


def rounds(leaves: int, keep: int) -> int:
    """Rounds until ranges of so many leaves, `keep` of them, are single leaves."""
    done = 0
    while keep << done < leaves:
        done += 1
    return done


def descend(leaves: Tensor, keep: int, rounds: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Find leaves of high scores by halving ranges of them.

    Args:
        leaves: int64 [...], how many there are for each search.
        keep: ranges that a search goes on with, and leaves that it finds.
        rounds: as `rounds` says for the largest of `leaves`; more change nothing.
        score: scores of leaves, int64 [..., 2 * keep] -> float, likewise; of those that stand for nothing any number.

    Returns:
        int64 [..., keep], ascending; where there are fewer leaves all of them, and -1 behind.
    """
    n, place = leaves[..., None], torch.arange(keep, device=leaves.device)
    # Ranges from `first` to `last`; one whose last is before its first is none.
    first = torch.where(n > keep, _share(place, n, keep), place)
    last = torch.where(n > keep, _share(place + 1, n, keep) - 1, torch.where(place < n, place, place - 1))
    for _ in range(rounds):
        middle = second_half(first, last)  # of a single leaf, the first half is none
        first = torch.stack((first, middle), dim=-1).flatten(-2)
        last = torch.stack((middle - 1, last), dim=-1).flatten(-2)
        scores = score(((first + last) >> 1).clamp(min=0)).masked_fill(last < first, float("-inf"))
        counts = torch.full((1, 1), keep, device=leaves.device)
        best, chosen = (
            x.view(*scores.shape[:-1], keep) for x in topk_select(scores.flatten(0, -2)[None], counts, keep)
        )
        first = first.gather(-1, best)
        last = torch.where(chosen, last.gather(-1, best), first - 1)
    return torch.where(first <= last, first, -1)


def second_half(first: Tensor, last: Tensor) -> Tensor:
    """Where the second half of a range begins: in the middle, rounded up; of a range of one it is the whole."""
    return (first + last + 1) >> 1


def _share(place: Tensor, n: Tensor, keep: int) -> Tensor:
    """Where range `place` of `keep` ranges over n leaves begins: place * n / keep, halves rounded up."""
    return (2 * place * n + keep) // (2 * keep)


def some_products(query: Tensor, keys: Tensor, entries: Tensor) -> Tensor:
    """The largest product of some rows and the keys of each leaf; the keys are copied side by side.

    Args:
        query: [batch, heads, blocks, rows, head_dim].
        keys: [batch, kv_heads, n, head_dim].
        entries: int64 [batch, heads, blocks, leaves, keys of a leaf], into the n.

    Returns:
        float32 [batch, heads, blocks, leaves].
    """
    batch, kv_heads = keys.shape[:2]
    found = gather_slots(keys, entries.view(batch, kv_heads, -1)).view(*entries.shape[:3], -1, keys.shape[-1])
    return largest_products(query, found).unflatten(-1, entries.shape[3:]).amax(-1)


def largest_products(query: Tensor, keys: Tensor) -> Tensor:
    """The largest product of some rows [..., rows, head_dim] and each of m keys [..., m, head_dim]: float32 [..., m]."""
    keys = _computed(keys)
    return (query.to(keys.dtype) @ keys.transpose(-1, -2)).amax(-2).float()


def all_products(query: Tensor, keys: Tensor, size: int) -> Tensor:
    """The same of all leaves of `size` keys, the last of which may lack some: float32 [batch, heads, blocks, leaves]."""
    batch, kv_heads, n, head_dim = keys.shape
    products = _computed(query).reshape(batch, kv_heads, -1, head_dim) @ _computed(keys).transpose(-1, -2)
    best = products.view(*query.shape[:4], n).amax(3).float()
    return functional.pad(best, (0, -n % size), value=float("-inf")).unflatten(-1, (-1, size)).amax(-1)


def _computed(x: Tensor) -> Tensor:
    """As it is multiplied: float32 on a CPU, where that is fastest."""
    return x.float() if x.device.type == "cpu" else x


def _entries(leaves: Tensor, size: int) -> Tensor:
    """The entries of leaves [...]: [..., size], of which the last leaf may lack some."""
    return leaves[..., None] * size + torch.arange(size, device=leaves.device)


def _leaves(entries: Tensor, size: int) -> Tensor:
    """How many leaves hold so many entries."""
    return (entries + size - 1) // size
