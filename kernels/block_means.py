"""Mean vectors of blocks of rows or entries, which stand for the blocks when a prompt's reads are planned."""

import torch
from torch import Tensor


def block_means(x: Tensor, first: int, block_size: int) -> Tensor:
    """The mean of each block's vectors, over those that there are.

    Args:
        x: [batch, heads, rows, head_dim], of the entries from `first` on.
        block_size: block j is the entries [j * block_size, (j + 1) * block_size).

    Returns:
        float32 [batch, heads, blocks, head_dim], from the block of the first row to that of the last one.
    """
    # The blocks at either end may have fewer: they are parts of their own, so that nothing is copied to fill them up.
    rows = x.shape[2]
    start = min(rows, -first % block_size)
    stop = rows - (rows - start) % block_size
    whole = x[:, :, start:stop].unflatten(2, ((stop - start) // block_size, block_size))
    parts = [x[:, :, :start].unsqueeze(2), whole, x[:, :, stop:].unsqueeze(2)]
    return torch.cat([part.mean(3, dtype=torch.float32) for part in parts if part.numel()], dim=2)


def block_scores(query_means: Tensor, key_means: Tensor) -> Tensor:
    """q.k of mean vectors, K not repeated: [batch, heads, r, d], [batch, kv_heads, m, d] -> [batch, heads, r, m]."""
    grouped = query_means.unflatten(1, (key_means.shape[1], -1))
    scores = torch.matmul(grouped.flatten(2, 3), key_means.transpose(-1, -2))
    return scores.unflatten(2, grouped.shape[2:4]).flatten(1, 2)
