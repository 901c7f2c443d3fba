"""What a group of query heads reads together, so that each entry is read once for all of them."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def union_select_reference(reads: Tensor, kv_heads: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The definition of `union_select`, entry by entry."""
    batch, heads, n = reads.shape
    group = heads // kv_heads
    unions = [
        [[j for j in range(n) if any(reads[b, h * group + g, j] for g in range(group))] for h in range(kv_heads)]
        for b in range(batch)
    ]
    if width is None:
        width = max(1, max(len(union) for row in unions for union in row))
    unions = [[union[:width] for union in row] for row in unions]
    index = torch.zeros(batch, kv_heads, width, dtype=torch.int64, device=reads.device)
    member = torch.zeros(batch, heads, width, dtype=torch.bool, device=reads.device)
    for b in range(batch):
        for head in range(heads):
            for place, j in enumerate(unions[b][head // group]):
                index[b, head // group, place] = j
                member[b, head, place] = reads[b, head, j]
    return index, member


def union_select(
    reads: Tensor, kv_heads: int, *, width: int | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Per kv head the entries that any query head of its group reads, and who reads which.

    Args:
        reads: bool [batch, heads, n]; query head h belongs to kv head h // (heads / kv_heads).
        kv_heads: number of kv heads.
        width: of the result, where no union is larger: heads that read k entries each have a union of at most k times their
            group's size. Of a larger one the last entries are left out. Nothing waits for the device then. None for the size of
            the largest union, which the host waits for.
        backend: "triton" and "auto" on CUDA run the Triton kernels, with the same result.

    Returns:
        index: int64 [batch, kv_heads, k], ascending; a smaller union is followed by zeros. k is `width`, or the largest union
            and at least 1.
        member: bool [batch, heads, k], whether the query head reads that entry; False behind a union.

    Raises:
        ValueError: the backend does not exist, or cannot run here; a width below 1.
    """
    if width is not None and width < 1:
        raise ValueError(f"width={width} holds no entry; give 1 or more, or None for the largest union")
    if use_triton(backend, reads):
        from kvpress.kernels.gpu import union_select as gpu

        return gpu.union_select(reads, kv_heads, width)
    batch, heads, n = reads.shape
    union = reads.view(batch, kv_heads, heads // kv_heads, n).any(dim=2)
    rank = union.cumsum(dim=-1)  # of an entry in its union, from 1
    counts = rank[..., -1:]
    if width is None:
        width = max(1, int(counts.max()))
    # Entries outside of the union, and those beyond the width, go to a place of their own behind it, which is cut off.
    entries = torch.arange(n, device=reads.device).expand(batch, kv_heads, n)
    index = torch.zeros(batch, kv_heads, width + 1, dtype=torch.int64, device=reads.device)
    index = index.scatter_(2, torch.where(union, rank - 1, width).clamp_(max=width), entries)[..., :width]
    filled = torch.arange(width, device=reads.device) < counts
    index = index * filled
    wide = index.repeat_interleave(heads // kv_heads, dim=1)
    member = reads.gather(2, wide) & filled.repeat_interleave(heads // kv_heads, dim=1)
    return index, member
