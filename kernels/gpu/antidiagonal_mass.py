"""Triton kernels of `kvpress.kernels.antidiagonal_mass`: the LSE of each cell of rows, then the sums of blocks of exp(score - LSE).

Both make their scores anew, so that none are stored. A score is a product of `stride` rows with as many entries, added up over
one place of the cells after the other. Rows are packed: a block of rows of one head after that of the next head of the group, so
that K is read once for them, and a tile of rows looks at one stretch of entries. No atomics: equal inputs give equal results.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_attention import capped
from kvpress.kernels.gpu.launch import cdiv, launch, multiprocessors, power_of_two
from kvpress.kernels.launch_shapes import launch_shape, planned

CELLS_PER_SPLIT = 512  # fewer are not worth a program of their own


class Config(NamedTuple):
    """Launch settings: cells of rows and of entries per tile, and channels of one product."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@planned
def config(packed: int, cells: int, head_dim: int, itemsize: int, device: torch.device) -> Config:
    """Settings of both kernels from shapes; no more cells of rows per tile than there are, and 16 for `tl.dot`.

    Where a cell is a block, a tile has as many sums as scores: it is half as wide.
    """
    half = itemsize == 2
    chosen = launch_shape(
        "antidiagonal_mass",
        device,
        head_dim,
        itemsize,
        block_m=128 if half else 64,
        block_n=128 if half else 64,
        block_d=64 if half and head_dim % 64 == 0 else 32,
        num_warps=8 if half else 4,
        num_stages=3,
    )
    block_m = max(16, min(chosen["block_m"], power_of_two(packed)))
    block_d = max(16, min(chosen["block_d"], power_of_two(head_dim)))
    num_warps = chosen["num_warps"] if block_m >= 64 else min(4, chosen["num_warps"])
    block_n = chosen["block_n"] if cells > 1 else min(64, chosen["block_n"])
    return Config(block_m, block_n, block_d, num_warps, chosen["num_stages"])


def split_count(cells: int, programs: int, device: torch.device) -> int:
    """Into how many splits the cells of entries of the first kernel go, so that there are about two waves of programs."""
    return max(1, min(cdiv(2 * multiprocessors(device), programs), cdiv(cells, CELLS_PER_SPLIT)))


@triton.jit
def cell_scores(
    p_query,
    p_key,
    b_head,
    b_row,
    m_row,
    b_entry,
    rows,
    n,
    stride_qh,
    stride_qr,
    stride_kn,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of q.k along antidiagonals, float32 [BLOCK_M, BLOCK_N].

    b_row [BLOCK_M] is a cell's first row, perhaps before the first there is, b_head its query head and m_row whether it counts;
    b_entry [BLOCK_N] is a cell's first entry. What lies outside counts as zeros.
    """
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    p_query += b_head * stride_qh
    b_scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, STRIDE * PARTS):
        place = step // PARTS
        # [BLOCK_D]
        o_d = step % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < HEAD_DIM
        # [BLOCK_M], [BLOCK_N]: the last row meets the first entry.
        b_at, b_slot = b_row + (STRIDE - 1 - place), b_entry + place
        m_at, m_slot = m_row & (b_at >= 0) & (b_at < rows), b_slot < n
        p_rows = p_query[:, None] + b_at.to(tl.int64)[:, None] * stride_qr + o_d[None, :]
        p_keys = p_key + b_slot.to(tl.int64)[None, :] * stride_kn + o_d[:, None]
        b_query = tl.load(p_rows, mask=m_at[:, None] & m_d[None, :], other=0.0)
        b_key = tl.load(p_keys, mask=m_d[:, None] & m_slot[None, :], other=0.0)
        # Three products of TF32 numbers are as exact as one of float32; other types are multiplied exactly as they are.
        b_scores = tl.dot(b_query, b_key.to(b_query.dtype), b_scores, input_precision="tf32x3")
    return b_scores


# Lengths change from call to call and are never compiled in.
@triton.jit(do_not_specialize=["rows", "n", "row_blocks", "per_split", "kv_heads", "group"])
def lse_kernel(
    p_query,
    p_key,
    p_lse,
    scale,
    softcap,
    rows,
    n,
    row_blocks,
    per_split,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    CELLS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LSE of a tile of packed cells of rows over one split of the cells of entries: p_lse [splits, batch * kv_heads, packed]."""
    i_split, i_list = tl.program_id(2), tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_list // kv_heads, i_list % kv_heads
    past = n - rows
    packed = row_blocks.to(tl.int64) * group * CELLS
    # [BLOCK_M]
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < packed
    o_pair = o_m // CELLS
    b_cell = (past // (CELLS * STRIDE) + o_pair // group) * CELLS + o_m % CELLS
    b_head = i_head * group + o_pair % group
    p_query += i_batch * stride_qb
    p_key += i_batch * stride_kb + i_head * stride_kh

    first = i_split * per_split
    last = tl.minimum(tl.minimum(first + per_split, (n + STRIDE - 1) // STRIDE), tl.max(b_cell, axis=0) + 1)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, last, BLOCK_N):
        # [BLOCK_N]
        o_n = start + tl.arange(0, BLOCK_N)
        # [BLOCK_M, BLOCK_N]
        b_scores = cell_scores(
            p_query, p_key, b_head, b_cell * STRIDE - past, m_m, o_n * STRIDE, rows, n,
            stride_qh, stride_qr, stride_kn, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        m_seen = (o_n < last)[None, :] & (o_n[None, :] <= b_cell[:, None])
        b_scores = tl.where(m_seen, capped(b_scores * scale, softcap), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no NaN from -inf - -inf
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_scores - b_shift[:, None]), axis=1)
        b_max = b_new
    p_lse += (i_split.to(tl.int64) * tl.num_programs(1) + i_list) * packed
    tl.store(p_lse + o_m, b_max + tl.log(b_sum), mask=m_m)


@triton.jit(do_not_specialize=["rows", "n", "row_blocks", "blocks", "kv_heads", "group"])
def mass_kernel(
    p_query,
    p_key,
    p_lse,
    p_mass,
    scale,
    softcap,
    rows,
    n,
    row_blocks,
    blocks,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    CELLS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of a tile of blocks of rows and blocks of entries: p_mass [batch, heads, row_blocks, blocks].

    A tile has PAIRS pairs of a block of rows and a head, and BLOCKS blocks of entries. A block of more cells than a tile has is
    gone over in parts. A tile that no row sees is zeros.
    """
    PAIRS: tl.constexpr = (BLOCK_M + CELLS - 1) // CELLS
    BLOCKS: tl.constexpr = (BLOCK_N + CELLS - 1) // CELLS
    ROW_CELLS: tl.constexpr = BLOCK_M // PAIRS
    KEY_CELLS: tl.constexpr = BLOCK_N // BLOCKS
    KEY_PARTS: tl.constexpr = CELLS // KEY_CELLS
    PARTS: tl.constexpr = CELLS // ROW_CELLS * KEY_PARTS
    key_tiles = (blocks + BLOCKS - 1) // BLOCKS
    i_tile, j_tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    i_list = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_list // kv_heads, i_list % kv_heads
    past, pairs = n - rows, row_blocks.to(tl.int64) * group
    first = past // (CELLS * STRIDE)
    p_query += i_batch * stride_qb
    p_key += i_batch * stride_kb + i_head * stride_kh
    p_lse += i_list * pairs * CELLS
    # [BLOCK_M], [BLOCK_N]
    o_m, o_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    b_pair, b_block = i_tile * PAIRS + o_m // ROW_CELLS, j_tile * BLOCKS + o_n // KEY_CELLS
    m_pair = b_pair < pairs
    b_head = i_head * group + b_pair % group

    parts = tl.where(j_tile * BLOCKS <= first + ((i_tile + 1) * PAIRS - 1) // group, PARTS, 0)
    b_mass = tl.zeros((PAIRS, BLOCKS), tl.float32)
    for part in range(0, parts):
        # [BLOCK_M], [BLOCK_N]
        b_place = part // KEY_PARTS * ROW_CELLS + o_m % ROW_CELLS
        b_cell = (first + b_pair // group) * CELLS + b_place
        b_other = b_block * CELLS + part % KEY_PARTS * KEY_CELLS + o_n % KEY_CELLS
        # [BLOCK_M, BLOCK_N]
        b_scores = cell_scores(
            p_query, p_key, b_head, b_cell * STRIDE - past, m_pair, b_other * STRIDE, rows, n,
            stride_qh, stride_qr, stride_kn, STRIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        b_lse = tl.load(p_lse + b_pair.to(tl.int64) * CELLS + b_place, mask=m_pair, other=0.0)
        m_real = m_pair & ((b_cell + 1) * STRIDE > past) & (b_cell * STRIDE < n)  # has rows
        m_seen = m_real[:, None] & (b_other[None, :] <= b_cell[:, None])
        b_weights = tl.where(m_seen, tl.exp(capped(b_scores * scale, softcap) - b_lse[:, None]), 0.0)
        b_mass += tl.sum(tl.sum(tl.reshape(b_weights, (PAIRS, ROW_CELLS, BLOCKS, KEY_CELLS)), axis=3), axis=1)

    # [PAIRS], [BLOCKS]
    o_pair, o_block = i_tile * PAIRS + tl.arange(0, PAIRS), j_tile * BLOCKS + tl.arange(0, BLOCKS)
    o_row = ((i_batch * kv_heads + i_head) * group + o_pair % group) * row_blocks + o_pair // group
    p_out = p_mass + o_row[:, None] * blocks + o_block[None, :]
    tl.store(p_out, b_mass, mask=(o_pair < pairs)[:, None] & (o_block < blocks)[None, :])


def antidiagonal_mass(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    stride: int,
    block_size: int,
    softcap: float | None,
    splits: int | None = None,
) -> Tensor:
    """As `kvpress.kernels.antidiagonal_mass.antidiagonal_mass`.

    Args:
        splits: number of splits of the first kernel, for tests; by default from the shapes.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, n = keys.shape[1:3]
    group, cells = heads // kv_heads, block_size // stride
    blocks = cdiv(n, block_size)
    row_blocks = blocks - (n - rows) // block_size
    mass = query.new_empty(batch, heads, row_blocks, blocks, dtype=torch.float32)
    if not mass.numel():
        return mass
    query, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys))
    packed = row_blocks * group * cells
    chosen = config(packed, cells, head_dim, query.element_size(), query.device)
    tiles = cdiv(packed, chosen.block_m)
    if splits is None:
        splits = split_count(cdiv(n, stride), tiles * batch * kv_heads, query.device)
    per_split = cdiv(cdiv(cdiv(n, stride), splits), chosen.block_n) * chosen.block_n
    splits = cdiv(cdiv(n, stride), per_split)
    parts = query.new_empty(splits, batch * kv_heads, packed, dtype=torch.float32)
    strides = (*query.stride()[:3], *keys.stride()[:3])
    options = {
        "CELLS": cells,
        "STRIDE": stride,
        "HEAD_DIM": head_dim,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_D": chosen.block_d,
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    launch(
        lse_kernel,
        (tiles, batch * kv_heads, splits),
        query,
        keys,
        parts,
        scale / stride,
        softcap,
        rows,
        n,
        row_blocks,
        per_split,
        kv_heads,
        group,
        *strides,
        **options,
    )
    lse = parts[0] if splits == 1 else parts.logsumexp(dim=0)
    row_tiles = cdiv(row_blocks * group, cdiv(chosen.block_m, cells))
    key_tiles = cdiv(blocks, cdiv(chosen.block_n, cells))
    launch(
        mass_kernel,
        (row_tiles * key_tiles, batch * kv_heads),
        query,
        keys,
        lse,
        mass,
        scale / stride,
        softcap,
        rows,
        n,
        row_blocks,
        blocks,
        kv_heads,
        group,
        *strides,
        **options,
    )
    return mass
