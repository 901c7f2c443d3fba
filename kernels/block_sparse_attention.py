"""Causal attention of a prompt pass in which each block of query rows reads only listed keys.

Keys are listed in three forms, of which a row reads the union: blocks of keys, per query block; columns, keys that all rows
read (the verticals of a vertical-and-slash pattern); diagonals, distances at which rows read (its slashes). Always for a
whole query block: a diagonal that passes it brings the run of keys that its rows have at that distance.
"""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.block_lists import attend_listed_blocks


def listed_keys(
    rows: int,
    n: int,
    heads: int,
    *,
    blocks: Tensor | None = None,
    columns: Tensor | None = None,
    diagonals: Tensor | None = None,
    block_size: int = 64,
) -> Tensor:
    """What each row reads, as a mask: the definition of the lists of `block_sparse_attention`, for tests and for counting.

    Returns:
        bool [batch, heads, rows, n].
    """
    lists = [x for x in (blocks, columns, diagonals) if x is not None]
    batch, past = (lists[0].shape[0] if lists else 1), n - rows
    mask = torch.zeros(batch, heads, rows, n, dtype=torch.bool, device=lists[0].device if lists else None)
    for b in range(batch):
        for head in range(heads):
            of_head = [None if x is None else x[b, head * x.shape[1] // heads] for x in (blocks, columns, diagonals)]
            for block, start in enumerate(range(0, rows, block_size)):
                tile = mask[b, head, start : start + block_size]
                for place in [] if of_head[0] is None else of_head[0][block].tolist():
                    if place >= 0:
                        tile[:, place * block_size : (place + 1) * block_size] = True
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
    block_size: int = 64,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `block_sparse_attention`, in plain float32 with the q x n matrix."""
    heads, rows, n = query.shape[1], query.shape[2], key.shape[2]
    keys, values = (x.float().repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    mask = listed_keys(rows, n, heads, blocks=blocks, columns=columns, diagonals=diagonals, block_size=block_size).to(
        query.device
    )
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
    block_size: int = 64,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last q of n entries, in order, over the entries that are listed for them.

    Query row r is entry n - q + r. Query block t is rows [t * block_size, (t + 1) * block_size), wherever the first row
    is; key block j is entries [j * block_size, (j + 1) * block_size). A row reads itself, and of what is listed for its
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
        block_size: a power of two, as a rule 64 or 128; the Triton kernel has those from 16.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores.
        sinks: [heads], one logit per head that takes part in the softmax and has no value (gpt-oss).
        backend: "triton" and "auto" on CUDA run the Triton kernel.

    Returns:
        output: [batch, heads, q, head_dim of the values] in the dtype of `query`.
        lse: float32 [batch, heads, q], the natural logarithm of the summed exp of what the row read and of the sink.

    Raises:
        ValueError: the block size is no power of two, or below 16 with backend="triton"; the backend does not exist, or cannot
            run here.
    """
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size={block_size} is no power of two; choose 64 or 128")
    if block_size < 16 and backend == "triton":
        raise ValueError(f"block_size={block_size} is too small for backend='triton'; choose 64 or 128, or 'auto'")
    same_width = query.shape[-1] == value.shape[-1]
    if block_size >= 16 and same_width and use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import block_sparse_attention as gpu

        return gpu.block_sparse_attention(
            query,
            key,
            value,
            scale=scale,
            blocks=blocks,
            columns=columns,
            diagonals=diagonals,
            block_size=block_size,
            softcap=softcap,
            sinks=sinks,
        )
    on_cpu = query.device.type == "cpu" and query.dtype != torch.float64
    if on_cpu and same_width and blocks is not None and columns is None and diagonals is None and softcap is None:
        return attend_listed_blocks(query, key, value, blocks, scale=scale, block_size=block_size, sinks=sinks)
    batch, heads, rows, _ = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    output = query.new_empty(batch, heads, rows, value.shape[-1])
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    lists = [x for x in (blocks, columns, diagonals) if x is not None]
    count = heads if any(x.shape[1] == heads for x in lists) else kv_heads  # heads that have lists of their own
    share = heads // count  # query heads with the same lists, and so of the same kv head
    place = torch.arange(block_size, device=query.device)
    for b in range(batch):
        for i in range(count):
            of_head = [
                None if x is None else x[b, i * x.shape[1] // count].long() for x in (blocks, columns, diagonals)
            ]
            keys, values = (x[b, i * share * kv_heads // heads] for x in (key, value))
            same = slice(i * share, (i + 1) * share)
            for start in range(0, rows, block_size):
                first, stop = n - rows + start, min(n, n - rows + start + block_size)
                at = torch.arange(first, stop, device=query.device)
                listed = _listed(of_head, start // block_size, first, stop, place)
                entries = listed.clone()
                entries[at] = True
                index = entries.nonzero()[:, 0]
                visible = (index <= at[:, None]) & (listed[index] | (index == at[:, None]))
                part = query[b, same, start : start + block_size].float() * scale
                scores = part @ keys[index].float().T
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill_(~visible, float("-inf"))
                part_lse = scores.logsumexp(dim=-1)
                if sinks is not None:
                    part_lse = torch.logaddexp(part_lse, sinks[same, None].float())
                weights = scores.sub_(part_lse[..., None]).exp_()
                output[b, same, start : start + block_size] = (weights @ values[index].float()).to(output.dtype)
                lse[b, same, start : start + block_size] = part_lse
    return output, lse


def _listed(lists: list[Tensor | None], block: int, first: int, stop: int, place: Tensor) -> Tensor:
    """Bool [stop], the entries that one head lists for a query block from entry `first` to `stop`."""
    blocks, columns, diagonals = lists
    listed = torch.zeros(stop, dtype=torch.bool, device=place.device)
    wanted = []
    if blocks is not None:
        kept = blocks[block]
        wanted.append((kept[kept >= 0, None] * len(place) + place).flatten())
    if columns is not None:
        wanted.append(columns)
    if diagonals is not None:
        wanted.append((first - diagonals[diagonals >= 0, None] + place).flatten())
    for entries in wanted:
        listed[entries[(entries >= 0) & (entries < stop)]] = True
    return listed
