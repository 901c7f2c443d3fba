"""Triton kernels of `kvpress.kernels.page_bounds`: the bounds of all pages, and one more entry per kv head.

Comparisons are made in float32, which holds every number of the narrower types exactly.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two

NUM_WARPS = 4
TILE = 4096  # numbers per step of a program


class Blocks(NamedTuple):
    """Pages of a program, entries of a page per step, and channels of a program."""

    pages: int
    entries: int
    channels: int


def blocks(page_size: int, head_dim: int) -> Blocks:
    """Tile from shapes: rows whole up to 128 channels, pages whole up to 64 entries, and as many pages as make a tile."""
    channels = min(128, power_of_two(head_dim))
    entries = min(64, power_of_two(page_size))
    return Blocks(max(1, min(64, TILE // (channels * entries))), entries, channels)


# Lengths grow in decode and are never compiled in; strides of K are multiples of the head dimension, which has to be known for
# wide loads.
@triton.jit(do_not_specialize=["n", "pages", "kv_heads", "stride_cb", "stride_ch"])
def bounds_kernel(
    p_key,
    p_counts,
    p_least,
    p_greatest,
    n,
    pages,
    kv_heads,
    page_size,
    head_dim,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_cb,
    stride_ch,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of pages and channels of one kv head: p_least, p_greatest [batch * kv_heads, pages, head_dim]."""
    i_row = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // kv_heads, i_row % kv_heads
    held = n
    if p_counts is not None:
        held = tl.minimum(tl.load(p_counts + i_batch * stride_cb + i_head * stride_ch).to(tl.int32), n)
    # [BLOCK_P], [BLOCK_D]
    o_p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < head_dim
    p_key += i_batch * stride_kb + i_head * stride_kh
    # [BLOCK_P, BLOCK_D]
    b_least = tl.full((BLOCK_P, BLOCK_D), float("inf"), tl.float32)
    b_greatest = tl.full((BLOCK_P, BLOCK_D), float("-inf"), tl.float32)
    for start in range(0, page_size, BLOCK_E):
        # [BLOCK_P, BLOCK_E]
        o_e = start + tl.arange(0, BLOCK_E)
        o_n = o_p[:, None] * page_size + o_e[None, :]
        m_n = (o_e < page_size)[None, :] & (o_n < held)
        # [BLOCK_P, BLOCK_E, BLOCK_D]
        p_tile = p_key + o_n[:, :, None] * stride_kn + o_d[None, None, :]
        m_tile = m_n[:, :, None] & m_d[None, None, :]
        b_key = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_least = tl.minimum(b_least, tl.min(tl.where(m_tile, b_key, float("inf")), axis=1))
        b_greatest = tl.maximum(b_greatest, tl.max(tl.where(m_tile, b_key, float("-inf")), axis=1))
    m_held = (o_p * page_size < held)[:, None]  # a page without entries has bounds of zero
    o_out = (i_row * pages + o_p)[:, None] * head_dim + o_d[None, :]
    m_out = (o_p < pages)[:, None] & m_d[None, :]
    tl.store(p_least + o_out, tl.where(m_held, b_least, 0.0).to(p_least.dtype.element_ty), mask=m_out)
    tl.store(p_greatest + o_out, tl.where(m_held, b_greatest, 0.0).to(p_greatest.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["kv_heads", "stride_rb", "stride_rh", "stride_nb", "stride_nh"])
def add_kernel(
    p_least,
    p_greatest,
    p_key,
    p_rank,
    p_new,
    kv_heads,
    page_size,
    head_dim,
    stride_lb,
    stride_lh,
    stride_lp,
    stride_gb,
    stride_gh,
    stride_gp,
    stride_kb,
    stride_kh,
    stride_rb,
    stride_rh,
    stride_nb,
    stride_nh,
    BLOCK_D: tl.constexpr,
):
    """One entry of one kv head into the bounds of its page, of which it may be the first."""
    i_row = tl.program_id(0).to(tl.int64)
    i_batch, i_head = i_row // kv_heads, i_row % kv_heads
    rank = tl.load(p_rank + i_batch * stride_rb + i_head * stride_rh)
    page, first = tl.maximum(rank, 0) // page_size, rank % page_size == 0
    # [BLOCK_D]
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    width = head_dim
    if p_new is not None:  # nothing to add: no channels
        width = tl.where(tl.load(p_new + i_batch * stride_nb + i_head * stride_nh) != 0, head_dim, 0)
    m_d = o_d < width
    b_key = tl.load(p_key + i_batch * stride_kb + i_head * stride_kh + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_least += i_batch * stride_lb + i_head * stride_lh + page * stride_lp + o_d
    p_greatest += i_batch * stride_gb + i_head * stride_gh + page * stride_gp + o_d
    b_least, b_greatest = tl.load(p_least, mask=m_d, other=0.0), tl.load(p_greatest, mask=m_d, other=0.0)
    b_least = tl.where(first, b_key, tl.minimum(b_least.to(tl.float32), b_key))
    b_greatest = tl.where(first, b_key, tl.maximum(b_greatest.to(tl.float32), b_key))
    tl.store(p_least, b_least.to(p_least.dtype.element_ty), mask=m_d)
    tl.store(p_greatest, b_greatest.to(p_greatest.dtype.element_ty), mask=m_d)


def page_bounds(keys: Tensor, counts: Tensor | None, page_size: int) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.page_bounds.page_bounds`."""
    batch, kv_heads, n, head_dim = keys.shape
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    pages = cdiv(n, page_size)
    least, greatest = (keys.new_empty(batch, kv_heads, pages, head_dim) for _ in range(2))
    if not least.numel():
        return least, greatest
    chosen = blocks(page_size, head_dim)
    launch(
        bounds_kernel,
        (cdiv(pages, chosen.pages), batch * kv_heads, cdiv(head_dim, chosen.channels)),
        keys,
        counts,
        least,
        greatest,
        n,
        pages,
        kv_heads,
        page_size,
        head_dim,
        *keys.stride()[:3],
        *((0, 0) if counts is None else counts.stride()),
        BLOCK_P=chosen.pages,
        BLOCK_E=chosen.entries,
        BLOCK_D=chosen.channels,
        num_warps=NUM_WARPS,
    )
    return least, greatest


def add_to_page_bounds(
    least: Tensor, greatest: Tensor, key: Tensor, rank: Tensor, new: Tensor | None, page_size: int
) -> None:
    """As `kvpress.kernels.page_bounds.add_to_page_bounds`, in one launch."""
    batch, kv_heads, head_dim = key.shape
    key = key if key.stride(-1) == 1 else key.contiguous()
    block_d = min(128, power_of_two(head_dim))
    launch(
        add_kernel,
        (batch * kv_heads, cdiv(head_dim, block_d)),
        least,
        greatest,
        key,
        rank,
        new,
        kv_heads,
        page_size,
        head_dim,
        *least.stride()[:3],
        *greatest.stride()[:3],
        *key.stride()[:2],
        *rank.stride(),
        *((0, 0) if new is None else new.stride()),
        BLOCK_D=block_d,
        num_warps=1,
    )
