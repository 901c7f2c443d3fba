"""Attention mass of a prompt pass in which each block of query rows reads only listed keys; torch on every device."""

import torch
from torch import Tensor

from kvpress.kernels.block_lists import mass_of_lists
from kvpress.kernels.block_sparse_attention import listed_keys


def block_sparse_mass_reference(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    scale: float,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition of `block_sparse_mass`, in plain float32 with the q x n matrix."""
    heads, rows, (kv_heads, n) = query.shape[1], query.shape[2], key.shape[1:3]
    lists = {"blocks": blocks, "columns": columns, "diagonals": diagonals, "distances": distances}
    mask = listed_keys(rows, n, heads, block_size=block_size, key_block_size=key_block_size, **lists).to(query.device)
    scores = query.float() @ key.float().repeat_interleave(heads // kv_heads, dim=1).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores.masked_fill(~mask, float("-inf")) - lse[..., None]).exp()
    return weights.unflatten(1, (kv_heads, -1)).sum(dim=(2, 3))


def block_sparse_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    scale: float,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What the rows of `block_sparse_attention` give each entry: the weights of the listed pairs, and of no others.

    Args:
        query, key, scale, blocks, columns, diagonals, distances, block_size, key_block_size, softcap: as there.
        lse: float32 [batch, heads, q], as it came from there; +inf for a row that is not to count.

    Returns:
        float32 [batch, kv_heads, n], summed over the rows and over the group. Sums to the rows that count times the group
        size over the entries (less with sinks). An entry that nobody listed has 0. Equal inputs give equal results.
    """
    return mass_of_lists(
        query,
        key,
        lse,
        scale=scale,
        blocks=blocks,
        columns=columns,
        diagonals=diagonals,
        distances=distances,
        block_size=block_size,
        key_block_size=key_block_size,
        softcap=softcap,
    )
