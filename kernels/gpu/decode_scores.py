"""Triton kernel of `kvpress.kernels.decode_scores` and `kvpress.kernels.page_scores`: q.k, or its bound, of one row per head.

The bound of a page is two products, of the query's positive part with the greatest key and of its negative part with the
least: one pass over both, in the same kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_attention import config, moved_parts, splits_of
from kvpress.kernels.gpu.launch import launch

# Keys of these types are multiplied with a float32 query in three parts. Not float16, whose smallest numbers a part may fall below.
IN_PARTS = {torch.bfloat16}


# Lengths grow in decode and are never compiled in; strides of K are multiples of the head dimension, which has to be known for
# wide loads.
@triton.jit(
    do_not_specialize=["count", "per_split", "kv_heads", "group", "moved", "stride_mb", "stride_ob", "stride_oh"]
)
def scores_kernel(
    p_query,
    p_key,
    p_least,
    p_mask,
    p_other,
    p_moved,
    p_scores,
    p_lse,
    scale,
    count,
    per_split,
    kv_heads,
    group,
    moved,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_mb,
    stride_ob,
    stride_oh,
    IN_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One split of one kv head: p_scores [batch * heads, count], and p_lse [batch * heads, splits] unless it is None.

    With p_least, p_key is the greatest key of a page and the score the bound. Where p_mask [batch, count] is False nothing is
    read and the score is -inf. With p_other [batch * heads, head_dim] that query scores the first `moved` keys, or those that
    p_moved marks. IN_PARTS: the query is float32, and multiplied in three parts of the keys' type.
    """
    # Three products of TF32 numbers are as exact as one of float32, but those of 256 channels do not fit the registers.
    PRECISION: tl.constexpr = "tf32x3" if BLOCK_D < 256 else "ieee"
    i_row, i_split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_batch, i_head = (i_row // kv_heads).to(tl.int64), (i_row % kv_heads).to(tl.int64)
    first = i_split * per_split
    last = tl.minimum(first + per_split, count)

    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < group, o_d < HEAD_DIM
    o_out = (i_batch * kv_heads + i_head) * group + o_m  # int64, rows of what is written
    # [BLOCK_M, BLOCK_D]
    p_rows = p_query + i_batch * stride_qb + (i_head * group + o_m)[:, None] * stride_qh + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_key += i_batch * stride_kb + i_head * stride_kh
    if p_least is not None:
        p_least += i_batch * stride_lb + i_head * stride_lh
        b_negative = tl.where(b_query < 0, b_query, 0.0).to(b_query.dtype)
        b_query = tl.where(b_query > 0, b_query, 0.0).to(b_query.dtype)
    if p_other is not None:
        p_rows = p_other + o_out[:, None] * HEAD_DIM + o_d[None, :]
        b_other = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)

    if IN_PARTS:  # what a part leaves out is the next part's; three of 8 bits have all 24 of a float32 number
        kind = p_key.dtype.element_ty
        b_high = b_query.to(kind)
        b_rest = b_query - b_high.to(tl.float32)
        b_middle = b_rest.to(kind)
        b_low = (b_rest - b_middle.to(tl.float32)).to(kind)

    # [BLOCK_M]
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, last, BLOCK_N):
        # [BLOCK_N]
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        m_read = m_n
        if p_mask is not None:
            m_read = tl.load(p_mask + i_batch * stride_mb + o_n, mask=m_n, other=0) != 0
        # [BLOCK_D, BLOCK_N]
        m_tile = m_d[:, None] & m_read[None, :]
        b_key = tl.load(p_key + o_n.to(tl.int64)[None, :] * stride_kn + o_d[:, None], mask=m_tile, other=0.0)
        # [BLOCK_M, BLOCK_N]
        if IN_PARTS:
            b_scores = tl.dot(b_low, b_key)
            b_scores = tl.dot(b_middle, b_key, b_scores)
            b_scores = tl.dot(b_high, b_key, b_scores)
        else:
            b_scores = tl.dot(b_query, b_key.to(b_query.dtype), input_precision=PRECISION)
        if p_least is not None:
            b_key = tl.load(p_least + o_n.to(tl.int64)[None, :] * stride_ln + o_d[:, None], mask=m_tile, other=0.0)
            b_scores = tl.dot(b_negative, b_key.to(b_query.dtype), b_scores, input_precision=PRECISION)
        if p_other is not None:
            m_moved = o_n < moved
            if p_moved is not None:
                p_marks = p_moved + i_batch * stride_ob + i_head * stride_oh + o_n
                m_moved = tl.load(p_marks, mask=m_n, other=0) != 0
            # Twice three products of wide float32 tiles would not fit the registers.
            b_others = tl.dot(b_other, b_key.to(b_query.dtype), input_precision="ieee")
            b_scores = tl.where(m_moved[None, :], b_others, b_scores)
        b_scores *= scale
        if p_mask is not None:
            b_scores = tl.where(m_read[None, :], b_scores, float("-inf"))
        tl.store(p_scores + o_out[:, None] * count + o_n[None, :], b_scores, mask=m_m[:, None] & m_n[None, :])
        if p_lse is not None:
            b_scores = tl.where(m_read[None, :], b_scores, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no NaN from -inf - -inf
            b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_scores - b_shift[:, None]), axis=1)
            b_max = b_new
    if p_lse is not None:
        tl.store(p_lse + o_out * splits + i_split, b_max + tl.log(b_sum), mask=m_m)


def decode_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    moved: tuple[Tensor, Tensor | int] | None = None,
    least: Tensor | None = None,
    mask: Tensor | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `kvpress.kernels.decode_scores.decode_scores`, or as `page_scores` with `least`.

    Args:
        least: with it `key` is the greatest keys of pages.
        mask: bool [batch, n], the keys that are scored; -inf elsewhere.
        with_lse: also return float32 [batch, heads], the natural logarithm of the summed exp of the scores.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, count = key.shape[1], key.shape[2]
    group, rows = heads // kv_heads, batch * kv_heads
    # A float32 query of raw keys keeps the keys' tiles and their tensor cores. In all other cases keys are read as they are and
    # take the query's type in registers, so that has to hold them.
    in_parts = query.dtype == torch.float32 and key.dtype in IN_PARTS and moved is None and least is None
    query = query.to(torch.promote_types(query.dtype, key.dtype))
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    least, mask = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (least, mask))
    other, first, marks = moved_parts(moved, query.dtype)
    itemsize = key.element_size() if in_parts else query.element_size()
    chosen = config(group, head_dim, itemsize, query.device)
    splits, per_split = splits_of(count, rows, chosen.block_n, query.device)
    scores = query.new_empty(batch, heads, count, dtype=torch.float32)
    lse = query.new_empty(batch, heads, splits, dtype=torch.float32) if with_lse else None
    if scores.numel():
        launch(
            scores_kernel,
            (rows, splits),
            query,
            key,
            least,
            mask,
            other,
            marks,
            scores,
            lse,
            scale,
            count,
            per_split,
            kv_heads,
            group,
            first,
            *query.stride()[:2],
            *key.stride()[:3],
            *((0, 0, 0) if least is None else least.stride()[:3]),
            0 if mask is None else mask.stride(0),
            *((0, 0) if marks is None else marks.stride()[:2]),
            IN_PARTS=in_parts,
            HEAD_DIM=head_dim,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            BLOCK_D=chosen.block_d,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages if itemsize == 2 else 2,  # of pages a step has two tiles
        )
    return scores, None if lse is None else lse.logsumexp(dim=-1)
