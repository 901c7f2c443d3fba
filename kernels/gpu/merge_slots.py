"""Triton kernels of `kvpress.kernels.merge_slots`: one program per centre gathers its members and writes once.

The leaving entries are sorted by their centre, stably, so a program finds its members side by side and adds them in the order
in which they are listed: no atomics, the same sums every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import launch, power_of_two

NUM_WARPS = 4
TILE = 4096  # numbers of members' rows per step
BLOCK_MEMBERS = 128  # members' statistics per step


def members_per_step(width: int) -> int:
    """Rows of `width` numbers that a program loads at a time."""
    return max(1, min(16, TILE // power_of_two(width)))


@triton.jit
def merge_rows(
    p_rows,
    p_leaving,
    p_weights,
    centre,
    first,
    last,
    stride,
    width,
    tiny,
    cancelled,
    BY_NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the members first .. last - 1 of p_leaving into the row of `centre`, in place; p_rows of one kv head."""
    # [BLOCK_D]
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < width
    p_own = p_rows + centre * stride + o_d
    b_own = tl.load(p_own, mask=m_d, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(b_own * b_own, axis=0))
    weight = tl.load(p_weights + centre)
    b_sum = b_own * weight
    if BY_NORM:
        b_sum = b_own / tl.maximum(norm, tiny) * weight
    for start in range(first, last, BLOCK_R):
        # [BLOCK_R]
        o_r = start + tl.arange(0, BLOCK_R)
        m_r = o_r < last
        b_slot = tl.load(p_leaving + o_r, mask=m_r, other=0)
        b_weight = tl.load(p_weights + b_slot, mask=m_r, other=0.0)
        # [BLOCK_R, BLOCK_D]
        p_tile = p_rows + b_slot[:, None] * stride + o_d[None, :]
        b_rows = tl.load(p_tile, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if BY_NORM:
            b_rows = b_rows / tl.maximum(tl.sqrt(tl.sum(b_rows * b_rows, axis=1)), tiny)[:, None]
        b_sum += tl.sum(b_rows * b_weight[:, None], axis=0)
        weight += tl.sum(b_weight, axis=0)
    b_mean = b_sum / weight
    if BY_NORM:
        length = tl.sqrt(tl.sum(b_mean * b_mean, axis=0))
        b_mean = tl.where(length > cancelled, norm * b_mean / tl.maximum(length, tiny), b_own)
    tl.store(p_own, b_mean.to(p_rows.dtype.element_ty), mask=m_d)


# Lengths change from call to call and are never compiled in; strides of K and V are multiples of the head dimension, which has
# to be known for wide loads.
@triton.jit(do_not_specialize=["k", "m", "n", "kv_heads"])
def rows_kernel(
    p_key,
    p_value,
    p_weights,
    p_centres,
    p_leaving,
    p_starts,
    k,
    m,
    n,
    kv_heads,
    key_width,
    value_width,
    tiny,
    cancelled,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    VALUE_NORMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Key and value of one centre; one without members is not touched.

    p_weights [rows, n], p_centres [rows, k], p_leaving [rows, m] in the order of their centres, p_starts [rows, k + 1].
    """
    i_centre, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // kv_heads, i_row % kv_heads
    first = tl.load(p_starts + i_row * (k + 1) + i_centre)
    last = tl.load(p_starts + i_row * (k + 1) + i_centre + 1)
    if last > first:
        centre = tl.load(p_centres + i_row * k + i_centre)
        p_leaving += i_row * m
        p_weights += i_row * n
        p_key += i_batch * stride_kb + i_head * stride_kh
        merge_rows(
            p_key, p_leaving, p_weights, centre, first, last, stride_kn, key_width, tiny, cancelled, True, BLOCK_R, BLOCK_K
        )  # fmt: skip
        p_value += i_batch * stride_vb + i_head * stride_vh
        merge_rows(
            p_value, p_leaving, p_weights, centre, first, last, stride_vn, value_width, tiny, cancelled, VALUE_NORMS,
            BLOCK_R, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["k", "m", "kv_heads", "stride_sb", "stride_sh", "stride_sl"])
def sums_kernel(
    p_stat,
    p_centres,
    p_leaving,
    p_starts,
    k,
    m,
    kv_heads,
    stride_sb,
    stride_sh,
    stride_sl,
    stride_sn,
    BLOCK_R: tl.constexpr,
):
    """A statistic [batch, kv_heads, rows of it, n] of one centre: its members' are added."""
    i_centre, i_row, i_lead = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.load(p_starts + i_row * (k + 1) + i_centre)
    last = tl.load(p_starts + i_row * (k + 1) + i_centre + 1)
    if last > first:
        p_stat += i_row // kv_heads * stride_sb + i_row % kv_heads * stride_sh + i_lead * stride_sl
        p_own = p_stat + tl.load(p_centres + i_row * k + i_centre) * stride_sn
        # [BLOCK_R]
        b_sum = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(first, last, BLOCK_R):
            o_r = start + tl.arange(0, BLOCK_R)
            m_r = o_r < last
            b_slot = tl.load(p_leaving + i_row * m + o_r, mask=m_r, other=0)
            b_sum += tl.load(p_stat + b_slot * stride_sn, mask=m_r, other=0.0).to(tl.float32)
        own = tl.load(p_own).to(tl.float32)
        tl.store(p_own, (own + tl.sum(b_sum, axis=0)).to(p_stat.dtype.element_ty))


def merge_slots(
    keys: Tensor,
    values: Tensor,
    stats: list[Tensor],
    weights: Tensor,
    centres: Tensor,
    rest: Tensor,
    target: Tensor,
    *,
    value_norms: bool,
    tiny: float,
    cancelled: float,
) -> None:
    """As `kvpress.kernels.merge_slots.merge_slots`, with its two limits."""
    batch, kv_heads, k = centres.shape
    rows, m = batch * kv_heads, rest.shape[2]
    if not rows * k * m:
        return
    ordered, order = target.sort(dim=-1, stable=True)
    leaving, centres, weights = rest.gather(2, order), centres.contiguous(), weights.contiguous()
    places = torch.arange(k + 1, device=target.device, dtype=target.dtype).expand(batch, kv_heads, -1).contiguous()
    starts = torch.searchsorted(ordered, places, out_int32=True)
    widths = keys.shape[-1], values.shape[-1]
    launch(
        rows_kernel,
        (k, rows),
        keys,
        values,
        weights,
        centres,
        leaving,
        starts,
        k,
        m,
        keys.shape[2],
        kv_heads,
        *widths,
        tiny,
        cancelled,
        *keys.stride()[:3],
        *values.stride()[:3],
        VALUE_NORMS=value_norms,
        BLOCK_R=members_per_step(max(widths)),
        BLOCK_K=power_of_two(widths[0]),
        BLOCK_V=power_of_two(widths[1]),
        num_warps=NUM_WARPS,
    )
    for stat in stats:
        stat = stat.view(batch, kv_heads, -1, stat.shape[-1])
        launch(
            sums_kernel,
            (k, rows, stat.shape[2]),
            stat,
            centres,
            leaving,
            starts,
            k,
            m,
            kv_heads,
            *stat.stride(),
            BLOCK_R=BLOCK_MEMBERS,
            num_warps=1,
        )
