"""Triton kernel of `kvpress.kernels.write_slot`: a program per kv head writes all of its new entry."""

import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.gather_slots import INTEGERS
from kvpress.kernels.gpu.launch import launch, power_of_two


@triton.jit
def copy_row(p_held, p_new, width, BLOCK: tl.constexpr):
    """Numbers side by side to another place."""
    # [BLOCK]
    o_d = tl.arange(0, BLOCK)
    tl.store(p_held + o_d, tl.load(p_new + o_d, mask=o_d < width, other=0), mask=o_d < width)


# What changes with the capacity is never compiled in; strides of K and V are multiples of the head dimension, which has to be
# known for wide loads.
@triton.jit(
    do_not_specialize=["slot", "kv_heads", "rows", "stride_pb", "stride_ph", "stride_pn", "stride_sb", "stride_sh", "stride_sr",
                       "stride_sn", "stride_ib", "stride_ih", "stride_ab"]
)  # fmt: skip
def write_kernel(
    p_keys,
    p_values,
    p_positions,
    p_stat,
    p_slot,
    p_key,
    p_value,
    p_position,
    slot,
    kv_heads,
    rows,
    key_width,
    value_width,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pb,
    stride_ph,
    stride_pn,
    stride_sb,
    stride_sh,
    stride_sr,
    stride_sn,
    stride_ib,
    stride_ih,
    stride_ab,
    stride_xb,
    stride_xh,
    stride_yb,
    stride_yh,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One kv head's entry into `slot`, or into the one that p_slot [batch, kv_heads] names; p_stat [batch, kv_heads, rows, n].

    With p_key None only the statistic is set to 0.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_batch, i_head = i_row // kv_heads, i_row % kv_heads
    at = slot.to(tl.int64)
    if p_slot is not None:
        at = tl.load(p_slot + i_batch * stride_ib + i_head * stride_ih).to(tl.int64)
    if p_key is not None:
        p_held = p_keys + i_batch * stride_kb + i_head * stride_kh + at * stride_kn
        copy_row(p_held, p_key + i_batch * stride_xb + i_head * stride_xh, key_width, BLOCK_K)
        p_held = p_values + i_batch * stride_vb + i_head * stride_vh + at * stride_vn
        copy_row(p_held, p_value + i_batch * stride_yb + i_head * stride_yh, value_width, BLOCK_V)
        position = tl.load(p_position + i_batch * stride_ab)
        p_held = p_positions + i_batch * stride_pb + i_head * stride_ph + at * stride_pn
        tl.store(p_held, position.to(p_positions.dtype.element_ty))
    if p_stat is not None:
        p_stat += i_batch * stride_sb + i_head * stride_sh + at * stride_sn
        for start in range(0, rows, BLOCK_R):
            # [BLOCK_R]
            o_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            tl.store(p_stat + o_r * stride_sr, tl.zeros((BLOCK_R,), p_stat.dtype.element_ty), mask=o_r < rows)


def write_slot(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    stats: list[Tensor],
    slot: Tensor | int,
    key: Tensor,
    value: Tensor,
    position: Tensor,
) -> None:
    """As `kvpress.kernels.write_slot.write_slot`."""
    batch, kv_heads = positions.shape[:2]
    number, index = 0, None
    strides: tuple[int, ...] = (0, 0)
    if isinstance(slot, int):
        number = slot
    else:
        index = slot.expand(batch, kv_heads)
        strides = index.stride()
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    keys, values, new_key, new_value = (x.view(INTEGERS[x.element_size()]) for x in (keys, values, key, value))
    for place, stat in enumerate([*stats] or [None]):
        rows = 0
        stat_strides: tuple[int, ...] = (0, 0, 0, 0)
        if stat is not None:
            by_row = stat if stat.ndim == 4 else stat.view(batch, kv_heads, -1, stat.shape[-1])
            rows, stat_strides = by_row.shape[2], by_row.stride()
        launch(
            write_kernel,
            (batch * kv_heads,),
            keys,
            values,
            positions,
            stat,
            index,
            new_key if place == 0 else None,
            new_value,
            position,
            number,
            kv_heads,
            rows,
            keys.shape[-1],
            values.shape[-1],
            *keys.stride()[:3],
            *values.stride()[:3],
            *positions.stride(),
            *stat_strides,
            *strides,
            position.stride(0) if position.shape[0] > 1 else 0,
            *new_key.stride()[:2],
            *new_value.stride()[:2],
            BLOCK_K=power_of_two(keys.shape[-1]),
            BLOCK_V=power_of_two(values.shape[-1]),
            BLOCK_R=32,
            num_warps=1,
        )
