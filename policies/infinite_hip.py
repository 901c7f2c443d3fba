"""InfiniteHiP: a block of rows prunes the text in stages, chunks of it by one key of each that is found on a binary descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import PolicyError
from kvpress.kernels.gather_slots import gather_slots
from kvpress.kernels.topk_select import topk_select
from kvpress.policies.hip import entries_held, in_slots, largest_products, second_half, slots_of_entries
from kvpress.policy import (
    Budget,
    Consecutive,
    EvictionPolicy,
    Own,
    Pattern,
    Places,
    Policy,
    PrefillPolicy,
    Selected,
    SelectionPolicy,
    View,
    check_block_size,
    check_count,
    selected_by_groups,
)

Score = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of entries, int64 [batch, heads, chunks]: their scores float32, likewise, as the first of a left and of a right half."""


@dataclass(frozen=True, kw_only=True)
class InfiniteHiP(SelectionPolicy, PrefillPolicy):
    """Read the first keys, the last keys, and the `k` keys between that stages of pruning leave, at consecutive places on request.

    A block of rows starts with the list of all keys between the first `n_sink` and the last `n_stream`. A stage cuts its list
    into chunks of `l_c` keys, scores them and hands on the best, `k` keys together, in their order; the first stage has long
    chunks, the last one short ones. A chunk's score is the largest q.k of a row, a query head, and the key that stands for the
    chunk under this head: the chunk is halved, the half whose first key has the larger q.k is taken, and so on until one key
    is left. All heads of a layer share one list. A decode step is a block of one row; each stage's list serves some steps.

    With `extend` distances are those among the keys that are read: a row is at the place after all keys that it reads, which
    stand at 0, 1, 2, .... So no distance is larger than n_sink + k + n_stream + block_size, and a model reads texts far beyond the
    length that it was trained for. Keys are cached without their rotation then. The stages compare at near places, too: in
    the first `early_layers` layers each key of a chunk at the number of the chunk, and the rows `n_stream` after the last chunk;
    in the layers after them every key `n_stream` before the rows, and the first key of a left half one more.

    Source: Lee et al., "InfiniteHiP: Extending Language Model Context Up to 3 Million Tokens on a Single GPU", arXiv 2502.08910.
    Written from the paper alone; the authors' code was not read. What is left open there is decided so, or differs:

    - The last keys of a block of rows are the `n_stream` before the block's first row and the block's own, so that nothing is
      left out between the list and them. Blocks are counted from the first row of a pass: chunks of a prompt that are
      a multiple of `block_size` change nothing, others cut blocks at their ends.
    - Each `l_c` divides the one before it, as in all of the paper's settings, so chunks are runs of keys that lie side by side.
    - Of equal halves the left one is taken, of equal chunks the earlier.
    - The number of chunks by which the paper's chunk-indexed positions place the query is printed as the length of a chunk; the
      text around it, by which the last chunk is `n_stream` before the query, needs the number of the last chunk.
    - The list of a stage is made anew in the steps 1, 1 + refresh, ... after a prompt. A key that leaves the last ones
      between two such steps is not read until the next.
    - Refuses an eviction policy beside it with `extend`. Else that policy's entries are the text, by their order in each kv head.
    - In a padded batch each sequence chooses alone. Soft-capping and attention sinks act in the attention alone.
    - Keys are not moved to the host (the paper's offloading).
    - q.k of the stages is in the model's dtype on a GPU, float32 on a CPU. On a GPU nothing of the stages has a kernel of its own.
    - Every row of a block is compared, which is much work: on a CPU a prompt of some thousand tokens takes longer than exact
      attention, and only one of some ten thousand less.
    - A pass without a cache is exact attention, as under every policy.

    Args:
        n_sink: first keys, always read (paper: 256).
        n_stream: keys right before a block of rows, always read (paper: 1024).
        l_c: keys of a chunk, for each stage (paper: 256, 32, 8; in the setting "5K" 64, 32, 16).
        k: keys that each stage hands on, whole chunks (paper: 32768, 8192, 2048; "5K" 32768, 16384, 4096).
        early_layers: first layers, among those with full attention, whose last stage hands on `early_k` keys (paper: 3).
        early_k: as many as that, whole chunks (paper: 4096).
        refresh: decode steps that are served by one list of each stage (paper: 16, 8, 4; "fast" 32, 16, 8; "flash" 96, 24, 8).
        block_size: rows of a block, a power of two (paper: 64).
        extend: attend what is read at consecutive places, and select so.
        min_len: rows of a prompt whose block ends before so many entries read everything (authors' code: 8192; paper: 0).

    Raises:
        PolicyError: a value out of range, or lists that do not fit each other.
    """

    name: ClassVar[str] = "infinite_hip"
    paper: ClassVar[str] = "arXiv 2502.08910"
    takes_budget: ClassVar[bool] = True
    takes_share: ClassVar[bool] = False
    notes: ClassVar[str | None] = "the keys that infinite_hip has found"

    n_sink: int = 256
    n_stream: int = 1024
    l_c: Sequence[int] = (256, 32, 8)
    k: Sequence[int] = (32768, 8192, 2048)
    early_layers: int = 3
    early_k: int = 4096
    refresh: Sequence[int] = (16, 8, 4)
    block_size: int = 64
    extend: bool = False
    min_len: int = 0

    def __post_init__(self) -> None:
        for name in ("n_sink", "n_stream", "early_layers", "min_len"):
            check_count(getattr(self, name), name, 0)
        check_block_size(self.block_size, usual="64")
        if not isinstance(self.extend, bool):
            raise PolicyError(f"extend={self.extend!r} does not work; give True or False")
        for name in ("l_c", "k", "refresh"):
            object.__setattr__(self, name, _numbers(getattr(self, name), name))
        for name in ("k", "refresh"):
            if len(getattr(self, name)) != len(self.l_c):
                raise PolicyError(
                    f"{name}={getattr(self, name)!r} has {len(getattr(self, name))} numbers, and l_c={self.l_c!r} "
                    f"{len(self.l_c)}; give one for each stage"
                )
        for longer, shorter in pairwise(self.l_c):
            if longer == shorter or longer % shorter:
                raise PolicyError(
                    f"l_c={self.l_c!r}: chunks of {longer} keys are not cut into shorter ones of {shorter}; let each number be "
                    "smaller than the one before and divide it, as (256, 32, 8)"
                )
        for at, (keys, chunk) in enumerate(zip(self.k, self.l_c, strict=True)):
            _check_whole(keys, f"k[{at}]", chunk)
        check_count(self.early_k, "early_k", 1)
        if self.early_layers:
            _check_whole(self.early_k, "early_k", self.l_c[-1])
        for at, (before, after) in enumerate(pairwise(self.k)):
            if after > before:
                raise PolicyError(
                    f"k={self.k!r}: stage {at + 2} cannot hand on {after} of the {before} keys that it gets; let no number be "
                    "larger than the one before"
                )
        if self.early_layers and len(self.k) > 1 and self.early_k > self.k[-2]:
            raise PolicyError(
                f"early_k={self.early_k} is more than the {self.k[-2]} keys that the last stage gets (k={self.k!r}); give at most "
                f"{self.k[-2]}"
            )

    @classmethod
    def at_budget(cls, budget: Budget, **fields: Any) -> "InfiniteHiP":
        """At most `budget` keys read in a decode step, its own among them: sinks, last and found ones as 1 : 4 : 8.

        Earlier stages hand on 4 and 16 times as many as the last one, as in the paper; the first layers find no more than others.
        """
        l_c = _numbers(fields.get("l_c", cls.l_c), "l_c")
        least = -(-13 * l_c[-1] // 8) + 1
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < least:
            raise PolicyError(
                f"budget={budget!r} cannot be split into sinks, last and found keys; give an int of at least {least}"
            )
        found = max(1, 8 * (budget - 1) // (13 * l_c[-1])) * l_c[-1]
        n_sink = (budget - 1 - found) // 5
        sizes: dict[str, Any] = {"n_sink": n_sink, "n_stream": budget - 1 - found - n_sink}
        wanted = [4 ** (len(l_c) - 1 - at) * found for at in range(len(l_c))]
        keep = [-(-keys // chunk) * chunk for keys, chunk in zip(wanted, l_c, strict=True)]
        return cls(**(sizes | {"k": keep, "early_k": found} | fields))

    @property
    def places(self) -> Places:
        return Consecutive() if self.extend else Own()

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        return "together"

    @property
    def chunk(self) -> int | None:
        return self.block_size

    def check_company(self, others: Sequence[Policy]) -> None:
        for other in others:
            if self.extend and isinstance(other, EvictionPolicy):
                raise PolicyError(
                    f"{self.describe()} places what it reads side by side and needs every token in the cache, and "
                    f"{other.describe()} evicts some; use extend=False, or one of the two"
                )
        SelectionPolicy.check_company(self, others)
        PrefillPolicy.check_company(self, others)

    def kept(self, layer: int, stage: int) -> int:
        """Keys that a stage hands on."""
        last = stage == len(self.k) - 1
        return self.early_k if last and layer < self.early_layers else self.k[stage]

    def phase(self, number: int) -> tuple[bool, ...]:
        """Which stages make their list anew in a step."""
        return tuple(number == 0 or (number - 1) % every == 0 for every in self.refresh)

    def plan(self, view: View) -> Pattern | None:
        """What a block of rows reads."""
        rows, n = view.query.shape[2], view.positions.shape[2]
        stop = n - rows - self.n_stream
        between, stages = stop - self.n_sink, range(len(self.l_c))
        if n < self.min_len or between <= min(self.kept(view.layer, stage) for stage in stages):
            return None
        runs: Tensor | None = None
        ends = torch.full((len(view.query),), stop, device=view.query.device)
        for stage in stages:
            runs, _ = self.prune(view, stage, runs, ends, between, None)
        assert runs is not None
        kv_heads, device = view.positions.shape[1], runs.device
        found, there = entries_of(runs, self.l_c[-1])
        always = [torch.arange(*span, device=device).expand(len(runs), -1) for span in ((0, self.n_sink), (stop, n))]
        index = torch.cat((always[0], found.clamp(max=n - 1), always[1]), dim=1)
        member = functional.pad(there, (self.n_sink, n - stop), value=True)
        index, member = (x[:, None].expand(-1, kv_heads, -1) for x in (index, member))
        return Pattern(index=index, member=None if member.all() else member)

    def select(self, view: View) -> Selected:
        kv_heads, n = view.positions.shape[1:]
        held = entries_held(view)[:, 0]
        stop, order = held - 1 - self.n_stream, slots_of_entries(view)
        runs: Tensor | None = None
        scanned: float | Tensor = 0.0
        for stage in range(len(self.l_c)):
            name = f"stage {stage}"
            if name in view.state and not view.phase[stage]:
                runs = view.state[name]
                continue
            between = max(1, n - 1 - self.n_stream - self.n_sink)
            runs, looked_at = self.prune(view, stage, runs, stop, between, order)
            scanned = scanned + looked_at
            # Of one length, however many there are, so that a step that is replayed finds it where it was.
            most = self.kept(view.layer, stage) // self.l_c[stage]
            view.keep(name, functional.pad(runs, (0, 0, 0, most - runs.shape[1])))
        assert runs is not None
        number = torch.arange(n, device=held.device)
        always = (number < self.n_sink) | (number >= stop[:, None])
        # What is not there goes to a place of its own behind the entries, which is cut off.
        found, there = entries_of(runs, self.l_c[-1])
        reads = torch.zeros(len(held), n + 1, dtype=torch.bool, device=held.device)
        reads = reads.scatter_(1, found.masked_fill(~there, n), True)[:, :n] | always
        most = self.n_sink + self.kept(view.layer, len(self.k) - 1) + self.n_stream + 1
        return selected_by_groups(view, in_slots(view, reads[:, None].expand(-1, kv_heads, -1)), min(n, most), scanned)

    def prune(
        self, view: View, stage: int, runs: Tensor | None, stop: Tensor, between: int, order: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The list of a stage.

        Args:
            view: the layer, with the rows of a block.
            stage: from 0.
            runs: the list of the stage before, as the result; None for the first one.
            stop: int64 [batch], where the list of all keys ends that the first stage gets.
            between: how many these are at most.
            order: in which slots entries are, as of `slots_of_entries`.

        Returns:
            runs: int64 [batch, chunks, 2], ascending, of each chunk the first entry and the one behind its last; behind them
                any in which that is not after the first, for none. At most as many as the stage hands on.
            looked_at: entries whose worth of memory was read per kv head: keys without values, each counted once at most.
        """
        size, keep = self.l_c[stage], self.kept(view.layer, stage) // self.l_c[stage]
        if runs is None:
            first = self.n_sink + size * torch.arange(-(-between // size), device=stop.device)
            first, end = first.expand(len(stop), -1), stop[:, None]
        else:
            parts = size * torch.arange(self.l_c[stage - 1] // size, device=stop.device)
            first = (runs[..., :1] + parts).flatten(1)
            end = runs[..., 1:].expand(-1, -1, len(parts)).flatten(1)
        end = torch.minimum(first + size, end)
        there = first < end
        chunks, depth = there.sum(-1), (size - 1).bit_length()
        entries = (end - first).clamp(min=0).sum(-1)
        group = view.query.shape[1] // view.positions.shape[1]
        seen = torch.minimum(entries, chunks * group * (depth + 1)) * (chunks > keep)
        if first.shape[1] > keep:
            heads = (-1, view.query.shape[1], -1)
            score = self.score(view, chunks, order)
            _, scores = representatives(first[:, None].expand(heads), (end - 1)[:, None].expand(heads), depth, score)
            best = scores.amax(1, keepdim=True).masked_fill(~there[:, None], float("-inf"))
            index, chosen = topk_select(best, chunks.clamp(max=keep)[:, None], keep)
            first, end = (x.gather(1, index[:, 0]) for x in (first, end))
            end = torch.where(chosen[:, 0], end, first)
        return torch.stack((first, end), dim=-1), seen.amax() / 2

    def score(self, view: View, chunks: Tensor, order: Tensor | None) -> Score:
        """How a block's rows score keys that stand for chunks.

        Args:
            chunks: int64 [batch], how many there are.
        """
        keys, query = view.keys, view.query
        batch, kv_heads, n = keys.shape[:3]
        queries = [query]
        by_chunk = self.extend and view.layer < self.early_layers
        if self.extend:
            assert view.turn is not None
            if by_chunk:
                places = [chunks.clamp(min=1) - 1 + self.n_stream]
            else:
                places = [torch.full((1,), self.n_stream + one, device=query.device) for one in (1, 0)]
            queries = [view.turn(query, place) for place in places]

        def score(entries: Tensor) -> tuple[Tensor, Tensor]:
            entries = entries.clamp(0, (n if order is None else order.shape[2]) - 1)  # of a chunk that is none any
            slots = entries.reshape(batch, kv_heads, -1)
            found = gather_slots(keys, slots if order is None else order.gather(2, slots)).view(*entries.shape, -1)
            if by_chunk:
                assert view.turn is not None
                found = view.turn(found, torch.arange(entries.shape[2], device=entries.device)[None, None])
            products = [largest_products(one, found) for one in queries]
            return products[0], products[-1]

        return score


def representatives(first: Tensor, last: Tensor, depth: int, score: Score) -> tuple[Tensor, Tensor]:
    """The entry that stands for each chunk, and its score.

    A chunk is halved `depth` times, and of each two halves the one is taken whose first entry has the larger score, the left one
    if they are equal.

    Args:
        first, last: int64 [batch, heads, chunks], the first and the last entry of each; any numbers for one that is none.
        depth: halvings until one entry is left of the longest chunk; more change nothing.
    """
    left, right = score(first)
    for _ in range(depth):
        middle = second_half(first, last)
        middle_left, middle_right = score(middle)
        better = middle_right > left
        last = torch.where(better, last, torch.maximum(middle - 1, first))
        first = torch.where(better, middle, first)
        left, right = torch.where(better, middle_left, left), torch.where(better, middle_right, right)
    return first, right


def entries_of(runs: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The entries of runs of at most `size` [batch, chunks, 2]: int64 [batch, chunks * size], and which of them are any."""
    entries = runs[..., :1] + torch.arange(size, device=runs.device)
    return entries.flatten(1), (entries < runs[..., 1:]).flatten(1)


def _numbers(value: Any, name: str) -> tuple[int, ...]:
    """A list of numbers of at least 1."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise PolicyError(f"{name}={value!r} is no list of numbers; give one for each stage, as (256, 32, 8)")
    for at, one in enumerate(value):
        check_count(one, f"{name}[{at}]", 1)
    return tuple(value)


def _check_whole(keys: int, name: str, chunk: int) -> None:
    """Raise `PolicyError` unless so many keys are whole chunks."""
    if keys % chunk:
        raise PolicyError(
            f"{name}={keys} is no whole number of chunks of {chunk} keys (l_c); give {max(1, keys // chunk) * chunk}"
        )
