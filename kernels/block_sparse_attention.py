"""Causal attention of a prompt pass in which each block of query rows reads only listed keys.

Keys are listed in four forms, of which a row reads the union: blocks of keys, per query block; columns, keys that all rows
read (the verticals of a vertical-and-slash pattern); diagonals, distances at which query blocks read (its slashes), each with
the run of keys that the rows of the block have at that distance; distances at which each row reads one key.
"""

from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.block_lists import attend_lists


def listed_keys(
    rows: int,
    n: int,
    heads: int,
    *,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
) -> Tensor:
    """What each row reads, as a mask: the definition of the lists of `block_sparse_attention`, for tests and for counting.

    Returns:
        bool [batch, heads, rows, n].
    """
    lists = [x for x in (blocks, columns, diagonals, distances) if x is not None]
    batch, past, size = (lists[0].shape[0] if lists else 1), n - rows, key_block_size or block_size
    mask = torch.zeros(batch, heads, rows, n, dtype=torch.bool, device=lists[0].device if lists else None)
    for b in range(batch):
        for head in range(heads):
            of_head = [None if x is None else x[b, head * x.shape[1] // heads] for x in (blocks, columns, diagonals)]
            for distance in [] if distances is None else distances[b, head * distances.shape[1] // heads].tolist():
                if distance >= 0:
                    mask[b, head].diagonal(past - distance).fill_(True)
            for block, start in enumerate(range(0, rows, block_size)):
                tile = mask[b, head, start : start + block_size]
                for place in [] if of_head[0] is None else of_head[0][block].tolist():
                    if place >= 0:
                        tile[:, place * size : (place + 1) * size] = True
                for column in [] if of_head[1] is None else of_head[1].tolist():
                    if column >= 0:
                        tile[:, column] = True
                for diagonal in [] if of_head[2] is None else of_head[2].tolist():
                    first = past + start - diagonal
                    if diagonal >= 0:
                        tile[:, max(0, first) : max(0, first + block_size)] = True
    own = torch.arange(past, n, device=mask.device)
    mask[:, :, torch.arange(rows), own] = True
    return mask & (torch.arange(n, device=mask.device) <= own[:, None])


def block_sparse_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `block_sparse_attention`, in plain float32 with the q x n matrix."""
    heads, rows, n = query.shape[1], query.shape[2], key.shape[2]
    keys, values = (x.float().repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    lists = {"blocks": blocks, "columns": columns, "diagonals": diagonals, "distances": distances}
    mask = listed_keys(rows, n, heads, block_size=block_size, key_block_size=key_block_size, **lists).to(query.device)
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp()[..., :n]
    return (weights @ values).to(query.dtype), lse


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    distances: Tensor | None = None,
    block_size: int = 64,
    key_block_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last q of n entries, in order, over the entries that are listed for them.

    Query row r is entry n - q + r. Query block t is rows [t * block_size, (t + 1) * block_size), wherever the first row
    is; key block j is entries [j * key_block_size, (j + 1) * key_block_size). A row reads itself, and of what is listed for its
    query block whatever is not after it. Nothing else is loaded.

    Args:
        query: [batch, heads, q, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key, value: [batch, kv_heads, n, head_dim]; only the entry dimension may be strided. Values may have another
            head_dim.
        scale: factor on q.k, from the model.
        blocks: int [batch, heads or kv_heads, query blocks, m], the key blocks of each query block in any order, each at
            most once; -1 for none.
        columns: int [batch, heads or kv_heads, m], entries that every query block reads, each at most once; -1 for none.
        diagonals: int [batch, heads or kv_heads, m], distances d of 0 or more, each at most once, -1 for none: a query
            block whose first row is entry a reads the entries from a - d to a - d + block_size - 1.
        distances: int [batch, heads or kv_heads, m], distances d of 0 or more, each at most once, -1 for none: each row
            reads the entry d before it. What a query block's rows read so together is loaded, and masked row by row; torch only.
        block_size: a power of two, as a rule 64 or 128; the Triton kernel has those from 16.
        key_block_size: a power of two, at most `block_size`, which it is by default; smaller ones are torch only.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores.
        sinks: [heads], one logit per head that takes part in the softmax and has no value (gpt-oss).
        backend: "triton" and "auto" on CUDA run the Triton kernel; "auto" does not where something is torch only.

    Returns:
        output: [batch, heads, q, head_dim of the values] in the dtype of `query`.
        lse: float32 [batch, heads, q], the natural logarithm of the summed exp of what the row read and of the sink.

    Raises:
        ValueError: a block size is no power of two, or that of keys is the larger one; with backend="triton" a block size
            below 16, two different ones, or `distances`; the backend does not exist, or cannot run here.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size={block_size} is no power of two; choose 64 or 128")
    key_block_size = block_size if key_block_size is None else key_block_size
    if key_block_size < 1 or key_block_size & (key_block_size - 1) or key_block_size > block_size:
        raise ValueError(
            f"key_block_size={key_block_size} is no power of two up to block_size={block_size}; choose a smaller power of two"
        )
    if key_block_size < block_size and backend == "triton":
        raise ValueError(
            f"key_block_size={key_block_size} below block_size={block_size} is for backend='torch' or 'auto'; leave it out"
        )
    if block_size < 16 and backend == "triton":
        raise ValueError(f"block_size={block_size} is too small for backend='triton'; choose 64 or 128, or 'auto'")
    if distances is not None and backend == "triton":
        raise ValueError("distances are for backend='torch' or 'auto'; diagonals are their form for whole query blocks")
    same_width = query.shape[-1] == value.shape[-1]
    lists: dict[str, Any] = {"blocks": blocks, "columns": columns, "diagonals": diagonals}
    options: dict[str, Any] = {"scale": scale, "block_size": block_size, "softcap": softcap, "sinks": sinks}
    one_size = block_size >= 16 and key_block_size == block_size
    for_triton = one_size and same_width and query.dtype != torch.float64 and distances is None
    if use_triton(backend, query) and for_triton:
        from kvpress.kernels.gpu import block_sparse_attention as gpu

        return gpu.block_sparse_attention(query, key, value, **lists, **options)
    return attend_lists(query, key, value, distances=distances, key_block_size=key_block_size, **lists, **options)
