"""Triton kernels of `kvpress.kernels.paged_attention`: the pages of each kv head, attention in splits of them, and the merge.

The kv heads of a sequence have different numbers of pages, which only the device knows. A split has the same number of pages for
all of them, and there are as many programs as splits could be however the pages are spread: head h's splits begin at number
starts[h] // per_split + h, where starts[h] is the number of pages of the heads before it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_attention import (
    BLOCK_SPLITS,
    capped,
    config,
    split_count,
    weigh_blocks,
)
from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two

BLOCK_PAGES = 1024  # owners looked at at a time
LIST_WARPS = 4


@triton.jit(do_not_specialize=["pages", "kv_heads"])
def list_kernel(p_owner, p_pages, p_starts, pages, kv_heads, BLOCK: tl.constexpr):
    """The pages of one kv head in ascending order, behind those of the heads before it: p_pages [batch, pages].

    p_starts [batch, kv_heads + 1] says where each head's begin; the last is where they end.
    """
    i_row = tl.program_id(0)
    i_batch, i_head = (i_row // kv_heads).to(tl.int64), i_row % kv_heads
    p_owner += i_batch * pages
    p_pages += i_batch * pages
    p_starts += i_batch * (kv_heads + 1)
    # [BLOCK]
    b_before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pages, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_owner = tl.load(p_owner + o_n, mask=o_n < pages, other=kv_heads)
        b_before += (b_owner < i_head).to(tl.int32)
    place = tl.sum(b_before, axis=0)
    tl.store(p_starts + i_head, place)
    for start in range(0, pages, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_own = (tl.load(p_owner + o_n, mask=o_n < pages, other=kv_heads) == i_head).to(tl.int32)
        tl.store(p_pages + place + tl.cumsum(b_own, axis=0) - 1, o_n, mask=b_own != 0)
        place += tl.sum(b_own, axis=0)
    tl.store(p_starts + kv_heads, place, mask=i_head == kv_heads - 1)


@triton.jit(do_not_specialize=["pages", "per_split", "kv_heads", "group"])
def pages_kernel(
    p_query,
    p_key,
    p_value,
    p_valid,
    p_pages,
    p_starts,
    p_output,
    p_lse,
    p_scores,
    scale,
    softcap,
    pages,
    per_split,
    kv_heads,
    group,
    stride_qb,
    stride_qh,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One split: online softmax of a kv head's query heads over `per_split` of its pages, or fewer.

    Writes p_output [batch, splits, group, head_dim] and p_lse [batch, splits, group] where the split has pages, and the scores,
    -inf in empty slots, to p_scores [batch, group, slots] unless it is None.
    """
    i_split, i_batch, splits = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    # [BLOCK_H]: the last head whose splits do not begin behind this one
    o_h = tl.arange(0, BLOCK_H)
    p_starts += i_batch * (kv_heads + 1)
    b_splits = tl.load(p_starts + o_h, mask=o_h < kv_heads, other=0) // per_split + o_h
    i_head = tl.sum(((b_splits <= i_split) & (o_h < kv_heads)).to(tl.int32), axis=0) - 1
    start = tl.load(p_starts + i_head)
    first = start + (i_split - start // per_split - i_head) * per_split
    last = tl.minimum(first + per_split, tl.load(p_starts + i_head + 1))

    slots = pages.to(tl.int64) * PAGE_SIZE
    p_key += i_batch * slots * HEAD_DIM
    p_value += i_batch * slots * HEAD_DIM
    p_valid += i_batch * slots
    p_pages += i_batch * pages
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < group, o_d < HEAD_DIM
    # [BLOCK_M, BLOCK_D]
    p_rows = p_query + i_batch * stride_qb + (i_head.to(tl.int64) * group + o_m)[:, None] * stride_qh + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)

    # [BLOCK_M], [BLOCK_M], [BLOCK_M, BLOCK_D]
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for entry in range(0, (last - first) * PAGE_SIZE, BLOCK_N):
        # [BLOCK_N]
        o_n = entry + tl.arange(0, BLOCK_N)
        o_page = first + o_n // PAGE_SIZE
        m_n = o_page < last
        b_slot = tl.load(p_pages + o_page, mask=m_n, other=0).to(tl.int64) * PAGE_SIZE + o_n % PAGE_SIZE
        m_read = tl.load(p_valid + b_slot, mask=m_n, other=0) != 0
        # [BLOCK_D, BLOCK_N]
        p_tile = p_key + b_slot[None, :] * HEAD_DIM + o_d[:, None]
        b_key = tl.load(p_tile, mask=m_d[:, None] & m_read[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_scores = tl.dot(b_query, b_key.to(b_query.dtype), input_precision="ieee") * scale
        b_scores = tl.where(m_read[None, :], capped(b_scores, softcap), float("-inf"))
        if p_scores is not None:
            p_kept = p_scores + (i_batch * group + o_m)[:, None] * slots + b_slot[None, :]
            tl.store(p_kept, b_scores, mask=m_m[:, None] & m_n[None, :])
        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no NaN from -inf - -inf
        b_weights = tl.exp(b_scores - b_shift[:, None])
        b_decay = tl.exp(b_max - b_shift)
        # [BLOCK_N, BLOCK_D]
        p_tile = p_value + b_slot[:, None] * HEAD_DIM + o_d[None, :]
        b_value = tl.load(p_tile, mask=m_read[:, None] & m_d[None, :], other=0.0)
        b_acc = b_acc * b_decay[:, None]
        b_acc += tl.dot(b_weights.to(b_value.dtype), b_value, input_precision="ieee")
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
        b_max = b_new

    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    m_out = o_m < tl.where(first < last, group, 0)
    o_part = (i_batch * splits + i_split) * group + o_m
    tl.store(p_output + o_part[:, None] * HEAD_DIM + o_d[None, :], b_out, mask=m_out[:, None] & m_d[None, :])
    tl.store(p_lse + o_part, b_max + tl.log(b_sum), mask=m_out)


@triton.jit(do_not_specialize=["splits", "per_split", "heads", "group"])
def merge_kernel(
    p_parts,
    p_part_lse,
    p_starts,
    p_sinks,
    p_output,
    p_lse,
    splits,
    per_split,
    heads,
    group,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query head: its splits' outputs weighed by their LSE, and its sink; p_output [rows, head_dim], p_lse [rows]."""
    i_row = tl.program_id(0)
    i_batch, i_query = (i_row // heads).to(tl.int64), i_row % heads
    i_head, i_member = i_query // group, i_query % group
    p_starts += i_batch * (heads // group + 1) + i_head
    start, stop = tl.load(p_starts), tl.load(p_starts + 1)
    first = start // per_split + i_head
    last = first + (stop - start + per_split - 1) // per_split
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    # [], [], [BLOCK_D]
    b_max = tl.full((), float("-inf"), tl.float32)
    b_sum = tl.zeros((), tl.float32)
    b_acc = tl.zeros((BLOCK_D,), tl.float32)
    if p_sinks is not None:  # a key without a value
        b_max = tl.load(p_sinks + i_query).to(tl.float32)
        b_sum = tl.where(b_max > float("-inf"), 1.0, 0.0)
    for begin in range(first, last, BLOCK_S):
        # [BLOCK_S]
        o_s = begin + tl.arange(0, BLOCK_S)
        m_s = o_s < last
        o_part = (i_batch * splits + o_s) * group + i_member
        b_lse = tl.load(p_part_lse + o_part, mask=m_s, other=float("-inf"))
        # [BLOCK_S, BLOCK_D]
        p_tile = p_parts + o_part[:, None] * HEAD_DIM + o_d[None, :]
        b_parts = tl.load(p_tile, mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weights, b_decay = tl.exp(b_lse - b_shift), tl.exp(b_max - b_shift)
        b_acc = b_acc * b_decay + tl.sum(b_parts * b_weights[:, None], axis=0)
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=0)
        b_max = b_new
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)
    tl.store(p_output + i_row.to(tl.int64) * HEAD_DIM + o_d, b_out.to(p_output.dtype.element_ty), mask=m_d)
    tl.store(p_lse + i_row, b_max + tl.log(b_sum))


@triton.jit(do_not_specialize=["pages", "kv_heads", "group"])
def weigh_kernel(
    p_scores,
    p_lse,
    p_owner,
    p_mass,
    pages,
    kv_heads,
    group,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention weights of a tile of slots, summed over the group: p_mass [batch, slots], p_scores [batch, group, slots]."""
    i_batch = tl.program_id(1).to(tl.int64)
    slots = pages.to(tl.int64) * PAGE_SIZE
    # [BLOCK_M], [BLOCK_N]
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_tile = (o_m < group)[:, None] & (o_n < slots)[None, :]
    b_owner = tl.load(p_owner + i_batch * pages + o_n // PAGE_SIZE, mask=o_n < slots, other=0)
    # [BLOCK_M, BLOCK_N]
    b_lse = tl.load(p_lse + (i_batch * kv_heads + b_owner)[None, :] * group + o_m[:, None], mask=m_tile, other=0.0)
    b_shift = tl.where(b_lse == float("-inf"), 0.0, b_lse)  # a head without entries has scores of -inf only
    p_tile = p_scores + (i_batch * group + o_m)[:, None] * slots + o_n[None, :]
    b_weights = tl.exp(tl.load(p_tile, mask=m_tile, other=float("-inf")) - b_shift)
    tl.store(p_mass + i_batch * slots + o_n, tl.sum(b_weights, axis=0), mask=o_n < slots)


def list_pages(owner: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.paged_attention.list_pages`."""
    batch, pages = owner.shape
    owner = owner.contiguous()
    order = owner.new_empty(batch, pages, dtype=torch.int32)
    starts = owner.new_empty(batch, kv_heads + 1, dtype=torch.int32)
    launch(
        list_kernel, (batch * kv_heads,), owner, order, starts, pages, kv_heads, BLOCK=BLOCK_PAGES, num_warps=LIST_WARPS
    )
    return order, starts


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    owner: Tensor,
    valid: Tensor,
    *,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    with_mass: bool,
    lists: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `kvpress.kernels.paged_attention.paged_attention`; scores are kept for the mass, 4 bytes per slot and query head."""
    batch, heads, _, head_dim = query.shape
    pages, group = owner.shape[1], heads // kv_heads
    page_size = key.shape[1] // pages
    query = query if query.stride(-1) == 1 else query.contiguous()
    key, value, owner, valid = (x.contiguous() for x in (key, value, owner, valid))
    chosen = config(group, head_dim, key.element_size(), query.device)
    per_split = cdiv(pages, split_count(pages * page_size, batch, query.device))
    splits = pages // per_split + kv_heads
    blocks = weigh_blocks(group)

    order, starts = list_pages(owner, kv_heads) if lists is None else lists
    parts = query.new_empty(batch, splits, group, head_dim, dtype=torch.float32)
    part_lse = query.new_empty(batch, splits, group, dtype=torch.float32)
    output = query.new_empty(batch, heads, 1, head_dim)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    scores = mass = None
    if with_mass:
        scores = query.new_empty(batch, group, pages * page_size, dtype=torch.float32)
        mass = query.new_empty(batch, pages * page_size, dtype=torch.float32)

    launch(
        pages_kernel,
        (splits, batch),
        query,
        key,
        value,
        valid,
        order,
        starts,
        parts,
        part_lse,
        scores,
        scale,
        softcap,
        pages,
        per_split,
        kv_heads,
        group,
        *query.stride()[:2],
        PAGE_SIZE=page_size,
        HEAD_DIM=head_dim,
        BLOCK_H=power_of_two(kv_heads),
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    launch(merge_kernel, (batch * heads,),
        parts, part_lse, starts, sinks, output, lse, splits, per_split, heads, group,
        HEAD_DIM=head_dim, BLOCK_S=BLOCK_SPLITS, BLOCK_D=chosen.block_d,
    )  # fmt: skip
    if mass is not None:
        launch(
            weigh_kernel,
            (cdiv(pages * page_size, blocks["BLOCK_N"]), batch),
            scores,
            lse,
            owner,
            mass,
            pages,
            kv_heads,
            group,
            PAGE_SIZE=page_size,
            **blocks,
        )
    return output, mass
