"""The CPU path of `kvpress.kernels.block_sparse_attention` where only blocks of keys are listed.

A query block sees most of what it lists whole: these blocks are copied side by side and attended by PyTorch's flash kernel
without a mask, many query blocks in one call. Those that list about as many go together, because the shorter lists of a
call are filled up. What is left is the edge: the one or two key blocks that the query block itself lies in, where
causality and the rows themselves have to be looked at. Both parts are merged by their log-sum-exp (LSE).
"""

import torch
from torch import Tensor
from torch.nn import functional

# Numbers of K that are copied side by side at a time (4 MiB in float32).
TILE_NUMBERS = 1 << 20


def attend_listed_blocks(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, *, scale: float, block_size: int, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.block_sparse_attention.block_sparse_attention` with `blocks` alone and without softcap."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    lists = blocks.shape[1]
    query_blocks = blocks.shape[2]
    padded = functional.pad(query, (0, 0, 0, query_blocks * block_size - rows))
    # One pair for every list of blocks: [pairs, heads that share the list, block_size, head_dim].
    parts = padded.view(batch, lists, heads // lists, query_blocks, block_size, head_dim).transpose(2, 3).flatten(0, 2)
    firsts = n - rows + torch.arange(query_blocks) * block_size  # entry of each query block's first row
    first = firsts.repeat(batch * lists)
    kv_row = (torch.arange(batch * lists) * kv_heads // lists).repeat_interleave(query_blocks)
    blocks = blocks.flatten(0, 2).long()

    # The whole blocks first, in each list.
    whole = (blocks >= 0) & (blocks < first[:, None] // block_size)  # the edge begins with the first row's block
    counts = whole.sum(dim=-1)
    listed = blocks.gather(1, whole.to(torch.uint8).argsort(dim=-1, descending=True, stable=True))
    order = counts.argsort(descending=True, stable=True)
    lengths = counts[order].tolist()

    output = query.new_empty(parts.shape, dtype=torch.float32)
    lse = output.new_empty(parts.shape[:3])
    width = block_size if (n - rows) % block_size == 0 else 2 * block_size
    step = max(1, TILE_NUMBERS // (width * head_dim))
    for pairs in torch.arange(len(parts)).split(step):
        output[pairs], lse[pairs] = _edge(
            parts[pairs], key, value, blocks[pairs], first[pairs], kv_row[pairs], scale, block_size, width
        )
    tables = [x[:, :, : n // block_size * block_size].reshape(-1, block_size * head_dim) for x in (key, value)]
    place = 0
    while place < len(lengths) and lengths[place]:
        most = lengths[place]
        pairs = order[place : place + max(1, TILE_NUMBERS // (most * block_size * head_dim))]
        pairs = pairs[counts[pairs] > 0]
        place += len(pairs)
        real = torch.arange(most) < counts[pairs, None]
        # A list is filled up with its own first block, which is masked: no block that nobody listed is read.
        taken = torch.where(real, listed[pairs, :most], listed[pairs, :1])
        taken += kv_row[pairs, None] * (n // block_size)
        keys, values = (
            table.index_select(0, taken.flatten()).view(len(pairs), 1, most * block_size, head_dim) for table in tables
        )
        mask = None
        if not real.all():
            mask = query.new_zeros(real.shape).masked_fill_(~real, float("-inf"))
            mask = mask.repeat_interleave(block_size, dim=1)[:, None, None]
        shared = (x.expand(-1, parts.shape[1], -1, -1) for x in (keys, values))
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            parts[pairs], *shared, 0.0, False, attn_mask=mask, scale=scale
        )
        before, part_lse = lse[pairs], part_lse.float()
        both = torch.logaddexp(before, part_lse)
        output[pairs] = output[pairs] * (before - both).exp_()[..., None] + part * (part_lse - both).exp_()[..., None]
        lse[pairs] = both

    output = output.view(batch, lists, query_blocks, -1, block_size, head_dim).transpose(2, 3)
    output = output.reshape(batch, heads, query_blocks * block_size, head_dim)[:, :, :rows]
    lse = lse.view(batch, lists, query_blocks, -1, block_size).transpose(2, 3).reshape(batch, heads, -1)[:, :, :rows]
    if sinks is not None:
        both = torch.logaddexp(lse, sinks.float()[None, :, None])
        output, lse = output * (lse - both).exp_()[..., None], both
    return output.to(query.dtype), lse.contiguous()


def _edge(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    first: Tensor,
    kv_row: Tensor,
    scale: float,
    block_size: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks to the `width` entries from the key block of their first row on.

    Args:
        rows: [pairs, heads, block_size, head_dim].
        blocks: int64 [pairs, m], what each pair lists.
        first, kv_row: int64 [pairs], the entry of its first row, and its row of K flattened to [batch * kv_heads, ...].

    Returns:
        output: float32 [pairs, heads, block_size, head_dim], and lse: float32 [pairs, heads, block_size].
    """
    n = key.shape[2]
    block = first // block_size
    # [pairs, width], [pairs, block_size, 1]
    entries = block[:, None] * block_size + torch.arange(width)
    at = (first[:, None] + torch.arange(block_size))[..., None].clamp(max=n - 1)  # rows beyond the last repeat it
    is_listed = torch.stack([(blocks == (block + i)[:, None]).any(-1) for i in range(width // block_size)], dim=1)
    is_listed = is_listed.repeat_interleave(block_size, dim=1)[:, None]
    visible = (entries[:, None] <= at) & (is_listed | (entries[:, None] == at))
    entries = entries.clamp_(max=n - 1)
    keys, values = (x.flatten(0, 1)[kv_row[:, None], entries].float() for x in (key, value))
    values.masked_fill_(~visible.any(1)[..., None], 0.0)  # what no row reads adds nothing, not even NaN
    scores = torch.matmul(rows.float() * scale, keys[:, None].transpose(-1, -2))
    scores.masked_fill_(~visible[:, None], float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return torch.matmul(scores.sub_(lse[..., None]).exp_(), values[:, None]), lse
