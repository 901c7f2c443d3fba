"""Triton kernels of `kvpress.kernels.vertical_slash_mass`: sums of exp(score - LSE) over rows, by entry and by distance.

The rows' LSE is that of `attention_mass`. Then a program owns a tile of entries, or of distances, of the heads of one kv head,
and writes each of its sums once: no atomics, the same sums every time. A tile of distances is a slanted stretch of entries: all
pairs of a tile of rows and the entries that one of them may have at one of the distances are scored, twice as many as are needed,
and each row is then turned so that a column is a distance.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.attention_mass import row_lse
from kvpress.kernels.gpu.decode_attention import capped
from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two
from kvpress.kernels.launch_shapes import launch_shape, planned


class Config(NamedTuple):
    """Launch settings: rows and entries per tile, and the head dimension padded to a power of two.

    A tile of distances has `block_m` of them, and twice as many entries.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@planned
def config(rows: int, head_dim: int, itemsize: int, device: torch.device) -> Config:
    """Settings from shapes: the wider a row of K, the smaller the tiles; at least 16 rows, for `tl.dot`."""
    block_d = max(16, power_of_two(head_dim))
    width = block_d * itemsize
    chosen = launch_shape(
        "vertical_slash_mass",
        device,
        block_d,
        itemsize,
        block_m=64 if width <= 256 and itemsize == 2 else 32 if width <= 512 else 16,
        block_n=128 if width <= 256 else 64 if width <= 512 else 32,
        num_warps=8 if width <= 256 or itemsize == 4 else 4,
        num_stages=2,
    )
    block_m = max(16, min(chosen["block_m"], power_of_two(rows)))
    num_warps = chosen["num_warps"] if block_m >= 32 or itemsize == 4 else min(4, chosen["num_warps"])
    return Config(block_m, chosen["block_n"], block_d, num_warps, chosen["num_stages"])


@triton.jit
def entry_tile(p_key, o_n, n, stride_kn, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """K of some entries, [BLOCK_D, BLOCK_N]; zeros for those that there are not."""
    o_d = tl.arange(0, BLOCK_D)
    m_tile = (o_d < HEAD_DIM)[:, None] & ((o_n >= 0) & (o_n < n))[None, :]
    return tl.load(p_key + o_n.to(tl.int64)[None, :] * stride_kn + o_d[:, None], mask=m_tile, other=0.0)


@triton.jit
def tile_weights(
    p_query,
    p_lse,
    b_key,
    o_r,
    o_n,
    scale,
    softcap,
    rows,
    n,
    stride_qr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """exp(score - LSE) of rows o_r [BLOCK_M] of one head with entries o_n [BLOCK_N], 0 where a row does not see one."""
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < rows
    p_rows = p_query + o_r.to(tl.int64)[:, None] * stride_qr + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_r[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    b_scores = capped(tl.dot(b_query, b_key.to(b_query.dtype), input_precision="tf32x3") * scale, softcap)
    b_lse = tl.load(p_lse + o_r, mask=m_r, other=0.0)
    m_seen = m_r[:, None] & (o_n >= 0)[None, :] & (o_n[None, :] <= (n - rows + o_r)[:, None])
    return tl.where(m_seen, tl.exp(b_scores - b_lse[:, None]), 0.0)


# Lengths change from call to call and are never compiled in.
@triton.jit(do_not_specialize=["rows", "n", "kv_heads", "group"])
def entry_kernel(
    p_query,
    p_key,
    p_lse,
    p_sums,
    scale,
    softcap,
    rows,
    n,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of a tile of entries over all rows, for each head of a group: p_sums [batch, heads, n], p_lse [batch, heads, rows]."""
    i_list = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_list // kv_heads, i_list % kv_heads
    # [BLOCK_N]
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_key = entry_tile(p_key + i_batch * stride_kb + i_head * stride_kh, o_n, n, stride_kn, HEAD_DIM, BLOCK_D)
    for member in range(0, group):
        i_row = i_list * group + member
        p_rows = p_query + i_batch * stride_qb + (i_head * group + member) * stride_qh
        b_sums = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, rows, BLOCK_M):
            b_weights = tile_weights(
                p_rows, p_lse + i_row * rows, b_key, start + tl.arange(0, BLOCK_M), o_n,
                scale, softcap, rows, n, stride_qr, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            b_sums += tl.sum(b_weights, axis=0)
        tl.store(p_sums + i_row * n + o_n, b_sums, mask=o_n < n)


@triton.jit(do_not_specialize=["rows", "n", "kv_heads", "group"])
def distance_kernel(
    p_query,
    p_key,
    p_lse,
    p_sums,
    scale,
    softcap,
    rows,
    n,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of a tile of BLOCK_M distances over all rows, likewise: p_sums [batch, heads, n]."""
    i_list = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_list // kv_heads, i_list % kv_heads
    p_key += i_batch * stride_kb + i_head * stride_kh
    # [BLOCK_M]
    o_m = tl.arange(0, BLOCK_M)
    nearest = tl.program_id(0) * BLOCK_M
    # Row i has the entry at distance nearest + j in column i - j + BLOCK_M - 1 of what is scored.
    b_column = o_m[:, None] - o_m[None, :] + (BLOCK_M - 1)
    for member in range(0, group):
        i_row = i_list * group + member
        p_rows = p_query + i_batch * stride_qb + (i_head * group + member) * stride_qh
        b_sums = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, rows, BLOCK_M):
            # [2 * BLOCK_M]
            o_n = n - rows + start - nearest - (BLOCK_M - 1) + tl.arange(0, 2 * BLOCK_M)
            b_key = entry_tile(p_key, o_n, n, stride_kn, HEAD_DIM, BLOCK_D)
            b_weights = tile_weights(
                p_rows, p_lse + i_row * rows, b_key, start + o_m, o_n,
                scale, softcap, rows, n, stride_qr, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            b_sums += tl.sum(tl.gather(b_weights, b_column, axis=1), axis=0)
        o_out = nearest + o_m
        tl.store(p_sums + i_row * n + o_out, b_sums, mask=o_out < n)


def vertical_slash_mass(query: Tensor, key: Tensor, *, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.vertical_slash_mass.vertical_slash_mass`."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    by_entry, by_distance = query.new_empty(2, batch, heads, n, dtype=torch.float32)
    if not rows or not by_entry.numel():
        return by_entry.zero_(), by_distance.zero_()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    lse = row_lse(query, key, scale=scale, softcap=softcap)
    chosen = config(rows, head_dim, query.element_size(), query.device)
    numbers = (scale, softcap, rows, n, kv_heads, heads // kv_heads, *query.stride()[:3], *key.stride()[:3])
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": chosen.block_m,
        "BLOCK_D": chosen.block_d,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    for kernel, sums, size, more in (
        (entry_kernel, by_entry, chosen.block_n, {"BLOCK_N": chosen.block_n}),
        (distance_kernel, by_distance, chosen.block_m, {}),
    ):
        launch(kernel, (cdiv(n, size), batch * kv_heads), query, key, lse, sums, *numbers, **options, **more)
    return by_entry, by_distance
