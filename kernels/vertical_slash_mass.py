"""What the last rows of a prompt attend to, summed by entry and by distance (the verticals and slashes of a pattern)."""

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.backend import Backend, use_triton

# Scores of one tile, in numbers.
TILE_SCORES = 1 << 24


def vertical_slash_mass_reference(
    query: Tensor, key: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `vertical_slash_mass`: one pair at a time."""
    batch, heads, rows, _ = query.shape
    n = key.shape[2]
    by_entry, by_distance = torch.zeros(2, batch, heads, n, device=query.device)
    for b in range(batch):
        for head in range(heads):
            keys = key[b, head * key.shape[1] // heads].float()
            for row in range(rows):
                at = n - rows + row
                scores = keys[: at + 1] @ query[b, head, row].float() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                for entry, weight in enumerate(scores.softmax(-1)):
                    by_entry[b, head, entry] += weight
                    by_distance[b, head, at - entry] += weight
    return by_entry, by_distance


def vertical_slash_mass(
    query: Tensor, key: Tensor, *, scale: float, softcap: float | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last rows, summed over the rows for each entry and for each distance; K is not repeated.

    Args:
        query: [batch, heads, rows, head_dim], those of the last entries; few, since rows x n scores are computed.
        key: [batch, kv_heads, n, head_dim].
        scale: factor on q.k.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores.
        backend: "triton" and "auto" on CUDA run the Triton kernels: products are exact, sums float32, no scores are stored, equal
            inputs give equal results. The torch path multiplies in the dtype of `query` on a GPU, in float32 on a CPU.

    Returns:
        by_entry, by_distance: float32 [batch, heads, n]. Place d of the second is what rows gave the entry d before them.
        The sum over n of either is the number of rows.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import vertical_slash_mass as gpu

        return gpu.vertical_slash_mass(query, key, scale=scale, softcap=softcap)
    batch, heads, rows, _ = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    group = heads // kv_heads
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    by_entry, by_distance = query.new_empty(2, batch * kv_heads, group, n, dtype=torch.float32)
    parts, keys = query.reshape(batch * kv_heads, group, rows, -1), key.flatten(0, 1)
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    at_once = max(1, TILE_SCORES // (rows * n))  # query heads
    kv_step, step = max(1, at_once // group), min(group, at_once)
    for first in range(0, batch * kv_heads, kv_step):
        kv = slice(first, first + kv_step)
        transposed = keys[kv].to(dtype)[:, None].transpose(-1, -2)
        for start in range(0, group, step):
            some = slice(start, start + step)
            tile = parts[kv, some].to(dtype) * scale
            scores = torch.matmul(tile.flatten(1, 2), transposed[:, 0]).float().view(*tile.shape[:3], n)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores[..., n - rows :].masked_fill_(future, float("-inf"))
            weights = scores.softmax(dim=-1)
            by_entry[kv, some] = weights.sum(2)
            # Row r of the flipped weights has the distance of the last row at place 0 - (rows - 1 - r). Read as rows that
            # are one place shorter, each row begins one place later: then a column is a distance.
            skewed = functional.pad(weights.flip(-1), (0, rows)).flatten(2)[..., : rows * (n + rows - 1)]
            skewed = skewed.unflatten(2, (rows, n + rows - 1))
            by_distance[kv, some] = skewed.sum(2)[..., rows - 1 :]
    return by_entry.view(batch, heads, n), by_distance.view(batch, heads, n)
