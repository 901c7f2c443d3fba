"""FlexPrefill: each head chooses its pattern and its budget from the prompt itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import PolicyError
from kvpress.kernels.block_means import block_means, block_scores
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass
from kvpress.policy import (
    Pattern,
    PrefillPolicy,
    View,
    check_at_least_zero,
    check_block_size,
    check_count,
    check_share,
    host_has,
    listed_blocks,
)


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(PrefillPolicy):
    """Read, in a prompt, as many blocks as hold a share of the attention, by one of two patterns that each query head chooses.

    The attention of the last `block_size` rows (the probe) is computed exactly. If the mean of these rows and the mean keys
    of the blocks foretell what the probe gives the blocks (the Jensen-Shannon distance of the two distributions is below
    `tau`), the head is query-aware: means of blocks of rows and of entries score all pairs of blocks, and the best pairs are
    read until the share `gamma` is reached. Else the head is vertical-slash: it reads the best columns of blocks and the best
    diagonals of blocks by the probe's attention, as many as entries (or distances) that hold the share `gamma` would fill.
    The first block and the one of the rows themselves are always read. Decode steps are exact, and everything is kept.

    Source: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    ICLR 2025, arXiv 2502.20766, and the authors' code (github.com/bytedance/FlexPrefill). Where the two differ and deviations:

    - Counts of entries become counts of blocks by `block_size` (code: by 128, whatever the block size is).
    - Blocks of distances begin with distance 0 (code: with the farthest one, so that the first is short if the prompt is no
      multiple of a block). What distances of a block reach in the block of entries beside it is left out, as in the code.
    - Query-aware: one share for all pairs of blocks of a head, not one for each block of rows, and the pair with which it
      is crossed is not read (code). The first column and the diagonal, `min_budget` entries of each, are read as well (code).
    - A distribution with zeros has a distance (code: none, which makes the head vertical-slash).
    - With `gamma` 1 and no `max_budget` everything is read. Of equal blocks the earlier one comes first.
    - Blocks are counted from a sequence's first entry in every pass (the authors have one pass). The rows of a later pass (a
      chunk, a turn) may begin inside of a block; means are over the rows and entries that there are. The probe is the last
      rows of the pass, fewer than a block if it has fewer.
    - In a padded batch each sequence is planned alone. The authors have batches of one.
    - Behind an eviction policy blocks are runs of the entries that are kept, which differ between kv heads.
    - Soft-capping acts in the attention and in the probe, not in the means; attention sinks in the attention only (the
      authors' models have neither).
    - q.k of the probe, means, softmax and sums are float32; without Triton a GPU has the probe's q.k in the model's dtype.
    - A pass without a cache is exact attention, as under every policy.

    Args:
        gamma: share of the attention that is read, in (0, 1] (authors: 0.95 for Llama and GLM, 0.9 for Yi and Qwen).
        tau: distance below which a head is query-aware; 0 for never (authors: 0.1).
        min_budget: entries and distances that a head reads at least, rounded up to blocks (authors: 1024 or 512).
        max_budget: that it reads at most of either by the vertical-slash pattern; None for no limit.
        block_size: rows and entries of a block, a power of two.
        min_len: a pass that ends before so many entries is exact; up to two blocks, or `min_budget`, are read whole anyway.

    Raises:
        PolicyError: a value out of range.
    """

    name: ClassVar[str] = "flex_prefill"
    paper: ClassVar[str] = "arXiv 2502.20766"

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int = 128
    min_len: int = 0

    def __post_init__(self) -> None:
        check_share(self.gamma, "gamma")
        check_at_least_zero(self.tau, "tau")
        check_count(self.min_budget, "min_budget", 1)
        check_block_size(self.block_size)
        check_count(self.min_len, "min_len", 0)
        if self.max_budget is not None:
            check_count(self.max_budget, "max_budget", 1)
            if self.max_budget < self.min_budget:
                raise PolicyError(
                    f"max_budget={self.max_budget} is below min_budget={self.min_budget}; give at least as much, or None for "
                    "no limit"
                )

    def plan(self, view: View) -> Pattern | None:
        """The blocks that each query head reads, int64 [batch, heads, row blocks, m]."""
        size, rows, n = self.block_size, view.query.shape[2], view.keys.shape[2]
        least = -(-self.min_budget // size)
        if rows == 1 or n <= max(2, least) * size or n < self.min_len:
            return None
        if self.gamma >= 1 and self.max_budget is None:
            return None
        blocks = -(-n // size)
        most = blocks if self.max_budget is None else min(blocks, -(-self.max_budget // size))
        probe = view.query[:, :, -size:]
        by_entry, by_distance = (
            mass / probe.shape[2]
            for mass in vertical_slash_mass(probe, view.keys, scale=view.scale, softcap=view.softcap)
        )
        columns, diagonals = block_sums(by_entry, size), block_sums(by_distance, size)
        key_means = block_means(view.keys, 0, size)
        foretold = block_scores(probe.float().mean(2, keepdim=True), key_means)[:, :, 0].mul_(view.scale).softmax(-1)
        query_aware = distance(foretold, columns) < self.tau

        wanted = [cover_count(mass, self.gamma) // size + 1 for mass in (by_entry, by_distance)]
        wanted = [count.clamp(least, most).masked_fill_(query_aware, least) for count in wanted]
        first = (n - rows) // size  # the block of the first row
        reads = vertical_slash(best(columns, wanted[0]), best(diagonals, wanted[1]), first)
        if self.tau > 0 and (not host_has(query_aware) or query_aware.any()):
            scores = block_scores(block_means(view.query, n - rows, size), key_means) * view.scale
            reads |= best_pairs(scores, self.gamma) & query_aware[..., None, None]
        return Pattern(blocks=listed_blocks(reads), block_size=size)


def block_sums(mass: Tensor, size: int) -> Tensor:
    """Sums over blocks: [..., n] -> [..., blocks]."""
    return functional.pad(mass, (0, -mass.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The Jensen-Shannon distance of two distributions [..., m], by natural logarithms: from 0 to sqrt(ln 2)."""
    mean = (a + b) / 2
    from_a, from_b = ((torch.xlogy(x, x) - torch.xlogy(x, mean)).sum(-1) for x in (a, b))
    return ((from_a + from_b) / 2).clamp(min=0).sqrt()


def cover_count(mass: Tensor, share: float) -> Tensor:
    """One more than the largest numbers of which together no more than the share is had: [..., n] -> int64 [...]."""
    if share >= 1:
        return torch.full(mass.shape[:-1], mass.shape[-1] + 1, device=mass.device)
    return (mass.sort(dim=-1, descending=True).values.cumsum(-1) <= share).sum(-1) + 1


def best(mass: Tensor, count: Tensor) -> Tensor:
    """The first place and the best of the others, `count` [...] in all: bool, as `mass` [..., m]."""
    ranked = mass.clone()
    ranked[..., 0] = float("inf")
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(mass.shape[-1], device=mass.device) < count[..., None]
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def vertical_slash(columns: Tensor, diagonals: Tensor, first: int) -> Tensor:
    """The pairs of blocks in columns of blocks or on diagonals of blocks.

    Args:
        columns, diagonals: bool [batch, heads, blocks], which blocks of entries and of distances are read.
        first: the first block that holds rows.

    Returns:
        bool [batch, heads, row blocks, blocks].
    """
    place = torch.arange(columns.shape[-1], device=columns.device)
    apart = place[first:, None] - place
    return (columns[..., None, :] | diagonals[..., apart.clamp(min=0)]) & (apart >= 0)


def best_pairs(scores: Tensor, share: float) -> Tensor:
    """Of all pairs of blocks of a head those with the most attention, up to a share of all of it.

    Args:
        scores: float32 [batch, heads, row blocks, blocks]; the row blocks are the last of the blocks.

    Returns:
        bool, likewise.
    """
    rows, blocks = scores.shape[2:]
    place = torch.arange(blocks, device=scores.device)
    visible = place <= place[blocks - rows :, None]
    if share >= 1:
        return visible.expand(scores.shape)
    mass = scores.masked_fill(~visible, float("-inf")).softmax(-1).flatten(2)
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    taken = ordered.cumsum(-1) <= share * rows
    return torch.zeros_like(taken).scatter_(-1, order, taken).unflatten(2, (rows, blocks)) & visible
