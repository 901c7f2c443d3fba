"""Triton kernel of `kvpress.kernels.skip_attention`: a tile of query rows walks over the entries, and skips tiles of them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_attention import capped
from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two
from kvpress.kernels.launch_shapes import launch_shape, planned


class Config(NamedTuple):
    """Launch settings: the head dimension padded to a power of two, warps and stages. The tile is the caller's."""

    block_d: int
    num_warps: int
    num_stages: int


@planned
def config(tile: int, head_dim: int, itemsize: int, device: torch.device) -> Config:
    """Launch settings from shapes."""
    block_d = max(16, power_of_two(head_dim))
    chosen = launch_shape(
        "skip_attention",
        device,
        tile,
        block_d,
        itemsize,
        num_warps=8 if tile == 128 else 4,
        num_stages=3 if itemsize == 2 and tile * block_d <= 8192 else 2,
    )
    return Config(block_d, **chosen)


# Lengths change from call to call and are never compiled in.
@triton.jit(do_not_specialize=["rows", "n"])
def skip_kernel(
    p_query,
    p_key,
    p_value,
    p_sinks,
    p_output,
    p_lse,
    p_skipped,
    scale,
    softcap,
    skip,
    rows,
    n,
    heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of rows of one query head: p_output [batch, heads, rows, head_dim], p_lse [batch, heads, rows], p_skipped
    [batch, heads, tiles of rows]."""
    # The last rows see the most keys: they go first.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    # [TILE], [BLOCK_D]
    o_n = tl.arange(0, TILE)
    o_m = i_tile * TILE + o_n
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < rows, o_d < HEAD_DIM
    b_at = n - rows + o_m
    p_key += i_batch * stride_kb + (i_head // group) * stride_kh + o_d
    p_value += i_batch * stride_vb + (i_head // group) * stride_vh + o_d
    # [TILE, BLOCK_D]
    m_tile = m_m[:, None] & m_d[None, :]
    p_rows = p_query + i_batch * stride_qb + i_head * stride_qh + o_m.to(tl.int64)[:, None] * stride_qr + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_tile, other=0.0)

    b_max = tl.full((TILE,), float("-inf"), tl.float32)
    b_sum = tl.zeros((TILE,), tl.float32)
    b_acc = tl.zeros((TILE, BLOCK_D), tl.float32)
    skipped = tl.zeros((), tl.int32)
    # Each row sees an entry of the first tile, which is not skipped: from there on its maximum is finite.
    for start in range(0, tl.minimum(n, n - rows + (i_tile + 1) * TILE), TILE):
        b_entry = start + o_n
        b_slot = b_entry.to(tl.int64)
        m_n = b_entry < n
        # [BLOCK_D, TILE]
        b_key = tl.load(p_key[:, None] + b_slot[None, :] * stride_kn, mask=m_d[:, None] & m_n[None, :], other=0.0)
        # [TILE, TILE]
        b_scores = capped(tl.dot(b_query, b_key.to(b_query.dtype), input_precision="tf32x3") * scale, softcap)
        b_scores = tl.where(m_n[None, :] & (b_entry[None, :] <= b_at[:, None]), b_scores, float("-inf"))
        b_in_tile = tl.max(b_scores, axis=1)
        b_new = tl.maximum(b_max, b_in_tile)
        b_counts = m_m & (tl.exp(b_in_tile - b_new) >= skip)
        if tl.max(b_counts.to(tl.int32), axis=0) > 0:
            b_weights = tl.exp(b_scores - b_new[:, None])
            b_decay = tl.exp(b_max - b_new)
            # [TILE, BLOCK_D]
            b_value = tl.load(
                p_value[None, :] + b_slot[:, None] * stride_vn, mask=m_n[:, None] & m_d[None, :], other=0.0
            )
            b_acc = b_acc * b_decay[:, None]
            b_acc += tl.dot(b_weights.to(b_value.dtype), b_value, input_precision="tf32x3")
            b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
            b_max = b_new
        else:
            b_pairs = tl.minimum(tl.maximum(b_at + 1 - start, 0), TILE)
            skipped += tl.sum(tl.where(m_m, b_pairs, 0), axis=0)

    if p_sinks is not None:
        sink = tl.load(p_sinks + i_head).to(tl.float32)
        b_new = tl.maximum(b_max, sink)
        b_decay = tl.exp(b_max - b_new)
        b_sum = b_sum * b_decay + tl.exp(sink - b_new)
        b_acc = b_acc * b_decay[:, None]
        b_max = b_new
    # [TILE]
    i_row = i_batch * heads + i_head
    o_out = i_row * rows + o_m
    p_out = p_output + o_out[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_out, (b_acc / b_sum[:, None]).to(p_output.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + o_out, b_max + tl.log(b_sum), mask=m_m)
    tl.store(p_skipped + i_row * tl.num_programs(0) + i_tile, skipped)


def skip_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    skip: float,
    tile: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kvpress.kernels.skip_attention.skip_attention`, with a `skip` above 0."""
    batch, heads, rows, head_dim = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    skipped = query.new_empty(batch, heads, cdiv(rows, tile), dtype=torch.int32)
    if not output.numel():
        return output, lse, skipped
    chosen = config(tile, head_dim, query.element_size(), query.device)
    launch(
        skip_kernel,
        (cdiv(rows, tile), heads, batch),
        query,
        key,
        value,
        sinks,
        output,
        lse,
        skipped,
        scale,
        softcap,
        skip,
        rows,
        key.shape[2],
        heads,
        heads // key.shape[1],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        TILE=tile,
        HEAD_DIM=head_dim,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return output, lse, skipped
