"""Triton kernels of `kvpress.kernels.attention_mass`: the LSE of the rows, then the column sums of exp(score - LSE).

The heads of a group are rows too, in the order of their positions: packed row m is row m // group of head m % group. So K is
read once per kv head, and a tile of packed rows looks at one stretch of positions. A program of the second kernel owns a
tile of keys, goes over the rows that see any of it and writes once: no atomics, the same sums every time.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_attention import capped, temperature_parts
from kvpress.kernels.gpu.launch import cdiv, launch, multiprocessors, power_of_two
from kvpress.kernels.gumbel_noise import TABLE, gumbel_offsets, gumbel_table_on
from kvpress.kernels.launch_shapes import launch_shape, planned

if TYPE_CHECKING:
    from kvpress.kernels.attention_mass import Perturbation

KEYS_PER_SPLIT = 512  # fewer are not worth a program of their own


class Config(NamedTuple):
    """Launch settings: packed rows and keys per tile, and the head dimension padded to a power of two."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@planned
def lse_config(packed: int, head_dim: int, itemsize: int, device: torch.device) -> Config:
    """Settings of the first kernel, which keeps a tile of rows and goes over keys."""
    block_d = max(16, power_of_two(head_dim))
    width = block_d * itemsize  # bytes of a row: the wider, the fewer fit
    most = {256: 128, 512: 64}.get(max(256, width), 16)
    chosen = launch_shape(
        "attention_mass.lse",
        device,
        block_d,
        itemsize,
        block_m=most,
        block_n=64 if width <= 256 else 32,
        num_warps=8 if most == 128 else 4,
        num_stages=3 if width <= 256 else 2,
    )
    return _fitted(chosen, packed, block_d)


@planned
def mass_config(packed: int, head_dim: int, itemsize: int, device: torch.device) -> Config:
    """Settings of the second kernel, which keeps a tile of keys and goes over rows."""
    block_d = max(16, power_of_two(head_dim))
    width = block_d * itemsize
    chosen = launch_shape(
        "attention_mass.mass",
        device,
        block_d,
        itemsize,
        block_m=64 if width <= 256 else 32,
        block_n=128 if width <= 256 else 16384 // width,
        num_warps=8 if width <= 256 else 4,
        num_stages=3 if width <= 256 else 2,
    )
    return _fitted(chosen, packed, block_d)


def _fitted(chosen: dict[str, int], packed: int, block_d: int) -> Config:
    """No more rows per tile than there are, in a power of two that `tl.dot` takes."""
    block_m = max(16, min(chosen["block_m"], power_of_two(packed)))
    num_warps = chosen["num_warps"] if block_m == chosen["block_m"] else min(4, chosen["num_warps"])
    return Config(block_m, chosen["block_n"], block_d, num_warps, chosen["num_stages"])


def split_count(n: int, programs: int, device: torch.device) -> int:
    """Into how many splits the keys of the first kernel go, so that there are about two waves of programs."""
    return max(1, min(cdiv(2 * multiprocessors(device), programs), cdiv(n, KEYS_PER_SPLIT)))


@triton.jit
def tile_scores(b_query, b_key, b_offsets, b_positions, p_noise, scale, softcap, temperature, TABLE: tl.constexpr):
    """(capped q.k * scale + noise) / temperature, float32 [BLOCK_M, BLOCK_N].

    b_query [BLOCK_M, BLOCK_D], b_key [BLOCK_D, BLOCK_N]; b_offsets [BLOCK_M] and b_positions [BLOCK_N] say where in the
    noise table p_noise to read.
    """
    # Three products of TF32 numbers are as exact as one of float32; other types are multiplied exactly as they are.
    b_scores = capped(tl.dot(b_query, b_key.to(b_query.dtype), input_precision="tf32x3") * scale, softcap)
    if p_noise is not None:
        b_scores += tl.load(p_noise + ((b_offsets[:, None] + b_positions[None, :]) & (TABLE - 1)))
    if temperature is not None:
        b_scores = b_scores / temperature
    return b_scores


# Lengths change from call to call and are never compiled in, nor are strides that change with them.
@triton.jit(do_not_specialize=["rows", "n", "past", "per_split", "kv_heads", "stride_ab", "stride_pb", "stride_ph"])
def lse_kernel(
    p_query,
    p_row_positions,
    p_key,
    p_positions,
    p_offsets,
    p_noise,
    p_temperature,
    p_sinks,
    p_lse,
    scale,
    softcap,
    temperature,
    rows,
    n,
    past,
    per_split,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ab,
    stride_pb,
    stride_ph,
    TABLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """LSE of a tile of rows over one split of the keys: p_lse [splits, batch, heads, rows], -inf for nothing.

    p_positions is None where entry i is at position i; row r is at past + r then.
    """
    if p_temperature is not None:
        temperature = tl.load(p_temperature)
    i_split = tl.program_id(2)
    i_batch, i_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    # [BLOCK_M]
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows * group
    o_r = (o_m // group).to(tl.int64)
    o_h = i_head * group + o_m % group
    o_out = (i_batch * kv_heads * group + o_h) * rows + o_r
    # [BLOCK_M, BLOCK_D]
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_rows = p_query + i_batch * stride_qb + o_h[:, None] * stride_qh + o_r[:, None] * stride_qr + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_key += i_batch * stride_kb + i_head * stride_kh

    first = i_split * per_split
    last = tl.minimum(first + per_split, n)
    # [BLOCK_M]
    if p_positions is None:
        b_at = past + o_m // group
        last = tl.minimum(last, past + tl.max(o_m, axis=0) // group + 1)
    else:
        b_at = tl.load(p_row_positions + i_batch * stride_ab + o_r, mask=m_m, other=-1)
        p_positions += i_batch * stride_pb + i_head * stride_ph
    b_offsets = tl.zeros((BLOCK_M,), tl.int32)
    if p_offsets is not None:
        b_offsets = tl.load(p_offsets + o_out, mask=m_m, other=0)

    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    if p_sinks is not None:  # a sink belongs to the first split
        b_sink = tl.load(p_sinks + o_h, mask=m_m, other=float("-inf")).to(tl.float32)
        b_max = tl.where(i_split == 0, b_sink, float("-inf"))
        b_sum = tl.where(b_max > float("-inf"), 1.0, 0.0)

    for start in range(first, last, BLOCK_N):
        # [BLOCK_N]
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_positions = o_n
        if p_positions is not None:
            b_positions = tl.load(p_positions + o_n, mask=m_n, other=-1)
        m_n = m_n & (b_positions >= 0)
        # [BLOCK_D, BLOCK_N]
        p_tile = p_key + o_n.to(tl.int64)[None, :] * stride_kn + o_d[:, None]
        b_key = tl.load(p_tile, mask=m_d[:, None] & m_n[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_scores = tile_scores(b_query, b_key, b_offsets, b_positions, p_noise, scale, softcap, temperature, TABLE)
        m_seen = m_n[None, :] & (b_positions[None, :] <= b_at[:, None])
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no NaN from -inf - -inf
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_scores - b_shift[:, None]), axis=1)
        b_max = b_new

    p_part = p_lse + i_split.to(tl.int64) * tl.num_programs(1) * group * rows
    tl.store(p_part + o_out, b_max + tl.log(b_sum), mask=m_m)


@triton.jit(do_not_specialize=["rows", "n", "past", "kv_heads", "stride_ab", "stride_pb", "stride_ph", "stride_wb"])
def mass_kernel(
    p_query,
    p_row_positions,
    p_key,
    p_positions,
    p_offsets,
    p_noise,
    p_temperature,
    p_weights,
    p_lse,
    p_mass,
    scale,
    softcap,
    temperature,
    rows,
    n,
    past,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_ab,
    stride_pb,
    stride_ph,
    stride_wb,
    TABLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over all packed rows of weight * exp(score - LSE), for one tile of keys: p_mass [batch, kv_heads, n]."""
    if p_temperature is not None:
        temperature = tl.load(p_temperature)
    i_batch, i_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    # [BLOCK_N]
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_entry = o_n < n
    b_positions = o_n
    first = 0
    if p_positions is None:  # rows before the tile's first key see none of it
        first = tl.maximum(tl.program_id(0) * BLOCK_N - past, 0) * group
    else:
        p_held = p_positions + i_batch * stride_pb + i_head * stride_ph + o_n
        b_positions = tl.load(p_held, mask=m_entry, other=-1)
    m_n = m_entry & (b_positions >= 0)
    # [BLOCK_D, BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_tile = p_key + i_batch * stride_kb + i_head * stride_kh + o_n.to(tl.int64)[None, :] * stride_kn + o_d[:, None]
    b_key = tl.load(p_tile, mask=m_d[:, None] & m_n[None, :], other=0.0)

    # Summed element by element and over the tile's rows only at the end: no exchange between threads in the loop.
    b_mass = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, rows * group, BLOCK_M):
        # [BLOCK_M]
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < rows * group
        o_r = (o_m // group).to(tl.int64)
        o_h = i_head * group + o_m % group
        o_row = (i_batch * kv_heads * group + o_h) * rows + o_r
        b_at = past + o_m // group
        if p_positions is not None:
            b_at = tl.load(p_row_positions + i_batch * stride_ab + o_r, mask=m_m, other=-1)
        b_offsets = tl.zeros((BLOCK_M,), tl.int32)
        if p_offsets is not None:
            b_offsets = tl.load(p_offsets + o_row, mask=m_m, other=0)
        # [BLOCK_M, BLOCK_D]
        p_rows = p_query + i_batch * stride_qb + o_h[:, None] * stride_qh + o_r[:, None] * stride_qr + o_d[None, :]
        b_query = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_scores = tile_scores(b_query, b_key, b_offsets, b_positions, p_noise, scale, softcap, temperature, TABLE)
        b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
        m_seen = m_m[:, None] & m_n[None, :] & (b_positions[None, :] <= b_at[:, None])
        b_weights = tl.where(m_seen, tl.exp(b_scores - b_lse[:, None]), 0.0)
        if p_weights is not None:
            b_weights *= tl.load(p_weights + i_batch * stride_wb + o_r, mask=m_m, other=0.0)[:, None]
        b_mass += b_weights
    p_out = p_mass + (i_batch * kv_heads + i_head) * n + o_n
    tl.store(p_out, tl.sum(b_mass, axis=0), mask=m_entry)


def row_lse(query: Tensor, key: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """LSE of the scores of the last rows, each over the entries up to its own: float32 [batch, heads, rows].

    Args:
        query: [batch, heads, rows, head_dim], those of the last entries, and key: [batch, kv_heads, n, head_dim]; channels side
            by side.
    """
    rows, n = query.shape[2], key.shape[2]
    scoring, strides = (scale, softcap, None, rows, n, n - rows), (*query.stride()[:3], *key.stride()[:3], 0, 0, 0)
    return _row_lse(query, key, None, None, None, None, None, None, scoring, strides, None)


def _row_lse(
    query: Tensor,
    key: Tensor,
    at: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
    noise: Tensor | None,
    warmth: Tensor | None,
    sinks: Tensor | None,
    scoring: tuple[Any, ...],
    strides: tuple[int, ...],
    splits: int | None,
) -> Tensor:
    """The first kernel, from what its launch takes: float32 [batch, heads, rows]."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    group = heads // kv_heads
    chosen = lse_config(rows * group, head_dim, query.element_size(), query.device)
    tiles = cdiv(rows * group, chosen.block_m)
    if splits is None:
        splits = split_count(n, tiles * batch * kv_heads, query.device)
    per_split = cdiv(cdiv(n, splits), chosen.block_n) * chosen.block_n
    splits = cdiv(n, per_split)
    parts = query.new_empty(splits, batch, heads, rows, dtype=torch.float32)
    launch(
        lse_kernel,
        (tiles, batch * kv_heads, splits),
        query,
        at,
        key,
        positions,
        offsets,
        noise,
        warmth,
        sinks,
        parts,
        *scoring,
        per_split,
        kv_heads,
        group,
        *strides,
        TABLE=TABLE,
        HEAD_DIM=head_dim,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return parts[0] if splits == 1 else parts.logsumexp(dim=0)


def attention_mass(
    query: Tensor,
    row_positions: Tensor,
    key: Tensor,
    positions: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    row_weights: Tensor | None,
    perturbation: "Perturbation | None",
    lse: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """As `kvpress.kernels.attention_mass.attention_mass`.

    Args:
        splits: number of splits of the first kernel, for tests; by default from the shapes.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    group = heads // kv_heads
    mass = query.new_empty(batch, kv_heads, n, dtype=torch.float32)
    if not rows or not mass.numel():
        return mass.zero_()
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    if positions is not None:
        row_positions, positions = (
            x.to(torch.int32) if x.stride(-1) == 1 else x.to(torch.int32).contiguous()
            for x in (row_positions, positions)
        )
    if row_weights is not None:
        row_weights = row_weights.float().contiguous()
    offsets = noise = temperature = warmth = None
    if perturbation is not None:
        temperature, warmth = temperature_parts(perturbation.temperature)
        temperature = None if temperature == 1 and warmth is None else temperature
        if perturbation.seed is not None:
            places = row_positions if perturbation.fresh else torch.zeros_like(row_positions)
            offsets = gumbel_offsets(perturbation.layer, places, heads).to(torch.int32)
            noise = gumbel_table_on(perturbation.seed, query.device)

    scoring = (scale, softcap, temperature, rows, n, n - rows)
    strides = (
        *query.stride()[:3],
        *key.stride()[:3],
        *((0, 0, 0) if positions is None else (row_positions.stride(0), *positions.stride()[:2])),
    )
    at = None if positions is None else row_positions
    if lse is None:
        lse = _row_lse(query, key, at, positions, offsets, noise, warmth, sinks, scoring, strides, splits)
    chosen = mass_config(rows * group, head_dim, query.element_size(), query.device)
    launch(
        mass_kernel,
        (cdiv(n, chosen.block_n), batch * kv_heads),
        query,
        at,
        key,
        positions,
        offsets,
        noise,
        warmth,
        row_weights,
        lse.float().contiguous(),
        mass,
        *scoring,
        kv_heads,
        group,
        *strides,
        0 if row_weights is None else row_weights.stride(0),
        TABLE=TABLE,
        HEAD_DIM=head_dim,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return mass
