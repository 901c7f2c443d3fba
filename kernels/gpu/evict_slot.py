"""Triton kernel of `kvpress.kernels.evict_slot`: a program per kv head goes over its slots once.

Score and position become one 64-bit number, whose order is that in which entries are dropped: the score's bits first, then
the positions from the newest on. So the smallest number is found in any order of slots, and there are no ties.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import launch, power_of_two
from kvpress.kernels.gpu.topk_select import ordered

BLOCK = 4096  # slots per step of a program


# The number of slots and what changes with it is never compiled in.
@triton.jit(
    do_not_specialize=["n", "kv_heads", "stride_sb", "stride_sh", "stride_pb", "stride_ph", "stride_ab", "stride_rb", "stride_lb"]
)  # fmt: skip
def evict_kernel(
    p_scores,
    p_positions,
    p_seen,
    p_recents,
    p_limits,
    p_slot,
    n,
    kv_heads,
    stride_sb,
    stride_sh,
    stride_pb,
    stride_ph,
    stride_ab,
    stride_rb,
    stride_lb,
    BLOCK: tl.constexpr,
):
    """One kv head: p_slot [batch * kv_heads], and -1 into p_positions [batch, kv_heads, n] there."""
    LAST: tl.constexpr = 0x7FFFFFFF
    i_row = tl.program_id(0).to(tl.int64)
    i_batch, i_head = i_row // kv_heads, i_row % kv_heads
    p_scores += i_batch * stride_sb + i_head * stride_sh
    p_positions += i_batch * stride_pb + i_head * stride_ph
    first_recent = tl.load(p_seen + i_batch * stride_ab) - tl.load(p_recents + i_batch * stride_rb)

    # [BLOCK]: the smallest number so far and its slot, the first empty slot so far, and how many entries there are
    b_least = tl.full((BLOCK,), 0x7FFFFFFFFFFFFFFF, tl.int64)
    b_slot = tl.full((BLOCK,), LAST, tl.int32)
    b_empty = tl.full((BLOCK,), LAST, tl.int32)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        # [BLOCK]
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < n
        b_positions = tl.load(p_positions + o_n, mask=m_n, other=-1)
        m_held = b_positions >= 0
        b_scores = tl.load(p_scores + o_n, mask=m_held, other=0.0).to(tl.float32)
        b_scores = tl.where(b_scores == float("inf"), 3.4028234663852886e38, b_scores)
        b_scores = tl.where(b_scores == float("-inf"), -3.4028234663852886e38, b_scores)
        b_scores = tl.where(b_positions >= first_recent, float("inf"), b_scores)
        b_number = (ordered(b_scores).to(tl.int64) << 31) | (LAST - b_positions).to(tl.int64)
        m_less = m_held & (b_number < b_least)
        b_least = tl.where(m_less, b_number, b_least)
        b_slot = tl.where(m_less, o_n, b_slot)
        b_empty = tl.minimum(b_empty, tl.where(m_n & (b_positions < 0), o_n, LAST))
        b_count += m_held.to(tl.int32)

    least = tl.min(b_least, axis=0)
    slot = tl.min(tl.where(b_least == least, b_slot, LAST), axis=0)
    drops = slot < LAST
    if p_limits is not None:
        drops = drops & (tl.sum(b_count, axis=0) > tl.load(p_limits + i_batch * stride_lb))
    empty = tl.min(b_empty, axis=0)
    slot = tl.where(drops, slot, tl.where(empty < LAST, empty, 0))
    tl.store(p_slot + i_row, slot.to(tl.int64))
    tl.store(p_positions + slot, -1, mask=drops)


def evict_slot(
    scores: Tensor, positions: Tensor, seen: Tensor, recents: Tensor, limits: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """As `kvpress.kernels.evict_slot.evict_slot`."""
    batch, kv_heads, n = positions.shape
    slot = torch.empty(batch, kv_heads, dtype=torch.int64, device=positions.device) if out is None else out
    if not slot.numel() or not n:
        return slot.zero_()
    scores = scores if scores.stride(-1) == 1 or n == 1 else scores.contiguous()
    block = max(256, min(BLOCK, power_of_two(n)))
    launch(
        evict_kernel,
        (batch * kv_heads,),
        scores,
        positions,
        seen,
        recents,
        limits,
        slot,
        n,
        kv_heads,
        *scores.stride()[:2],
        *positions.stride()[:2],
        seen.stride(0),
        recents.stride(0),
        0 if limits is None else limits.stride(0),
        BLOCK=block,
        num_warps=max(4, block // 512),
    )
    return slot
