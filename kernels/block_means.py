"""Mean vectors of blocks of rows or entries, which stand for the blocks when a prompt's reads are planned."""

import torch
from torch import Tensor
from torch.nn import functional


def block_means(x: Tensor, first: int, block_size: int) -> Tensor:
    """The mean of each block's vectors, over those that there are.

    Args:
        x: [batch, heads, rows, head_dim], of the entries from `first` on.
        block_size: block j is the entries [j * block_size, (j + 1) * block_size).

    Returns:
        float32 [batch, heads, blocks, head_dim], from the block of the first row to that of the last one.
    """
    rows, before = x.shape[2], first % block_size
    after = -(before + rows) % block_size
    sums = functional.pad(x, (0, 0, before, after)).unflatten(2, (-1, block_size)).sum(3, dtype=torch.float32)
    counts = torch.full((sums.shape[2], 1), float(block_size), device=x.device)
    counts[0] -= before
    counts[-1] -= after
    return sums / counts


def block_scores(query_means: Tensor, key_means: Tensor) -> Tensor:
    """q.k of mean vectors, K not repeated: [batch, heads, r, d], [batch, kv_heads, m, d] -> [batch, heads, r, m]."""
    grouped = query_means.unflatten(1, (key_means.shape[1], -1))
    scores = torch.matmul(grouped.flatten(2, 3), key_means.transpose(-1, -2))
    return scores.unflatten(2, grouped.shape[2:4]).flatten(1, 2)
