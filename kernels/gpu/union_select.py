"""Triton kernels of `kvpress.kernels.union_select`: count each chunk's union, then write it behind those before it.

As in `topk_select` a row goes in chunks to several programs, and nothing is summed by atomics. In between the host waits for the
width of the largest union, as it does in torch, unless the width is given.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two
from kvpress.kernels.gpu.topk_select import MOST_CHUNKS, chunk_size

BLOCK = 1024  # entries per tile
NUM_WARPS = 4


@triton.jit
def union_tile(p_reads, o_n, m_n, n, group, BLOCK: tl.constexpr):
    """int32 [BLOCK], whether any head of the group reads the entry; p_reads [group, n]."""
    b_union = tl.zeros((BLOCK,), tl.int32)
    for head in range(0, group):
        b_union = b_union | tl.load(p_reads + head * n.to(tl.int64) + o_n, mask=m_n, other=0).to(tl.int32)
    return b_union


@triton.jit(do_not_specialize=["n", "chunk", "group"])
def count_kernel(p_reads, p_counts, n, chunk, group, BLOCK: tl.constexpr):
    """How many entries of one chunk the union has: p_counts [rows, chunks], p_reads [rows, group, n]."""
    i_row, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    p_reads += i_row * group * n
    first = i_chunk * chunk
    last = tl.minimum(first + chunk, n)
    b_count = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, last, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_count += union_tile(p_reads, o_n, o_n < last, n, group, BLOCK)
    tl.store(p_counts + i_row * chunks + i_chunk, tl.sum(b_count, axis=0))


@triton.jit(do_not_specialize=["n", "chunk", "group", "width"])
def write_kernel(
    p_reads, p_counts, p_index, p_member, n, chunk, group, width, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr
):
    """Write one chunk of the union, and who of the group reads it: p_index [rows, width], p_member [rows, group, width].

    What lies beyond the width is left out. Each chunk also writes a part of what no entry has a place in.
    """
    i_row, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_chunk = tl.arange(0, BLOCK_CHUNKS)
    b_counts = tl.load(p_counts + i_row * chunks + o_chunk, mask=o_chunk < chunks, other=0)
    held = tl.sum(b_counts, axis=0)
    before = tl.sum(tl.where(o_chunk < i_chunk, b_counts, 0), axis=0)
    p_reads += i_row * group * n
    p_index += i_row * width
    p_member += i_row * group * width
    first = i_chunk * chunk
    last = tl.minimum(first + chunk, n)
    for start in range(first, last, BLOCK):
        # [BLOCK]
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < last
        b_union = union_tile(p_reads, o_n, m_n, n, group, BLOCK)
        b_place = before + tl.cumsum(b_union, axis=0) - 1
        m_union = (b_union != 0) & (b_place < width)
        tl.store(p_index + b_place, o_n.to(tl.int64), mask=m_union)
        for head in range(0, group):
            b_reads = tl.load(p_reads + head * n.to(tl.int64) + o_n, mask=m_union, other=0)
            tl.store(p_member + head * width.to(tl.int64) + b_place, b_reads, mask=m_union)
        before += tl.sum(b_union, axis=0)
    # The tail that no entry has a place in, each chunk a part of it.
    share = (width + chunks - 1) // chunks
    last = tl.minimum((i_chunk + 1) * share, width)
    for start in range(i_chunk * share, last, BLOCK):
        # [BLOCK]
        o_n = start + tl.arange(0, BLOCK)
        m_tail = (o_n >= held) & (o_n < last)
        tl.store(p_index + o_n, tl.zeros((BLOCK,), tl.int64), mask=m_tail)
        for head in range(0, group):
            tl.store(p_member + head * width.to(tl.int64) + o_n, tl.zeros((BLOCK,), tl.int1), mask=m_tail)


def union_select(reads: Tensor, kv_heads: int, width: int | None) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.union_select.union_select`, in two launches."""
    batch, heads, n = reads.shape
    rows, group, reads = batch * kv_heads, heads // kv_heads, reads.contiguous()
    chunk = chunk_size(n, rows, BLOCK, reads.device)
    chunks = cdiv(n, chunk)
    counts = torch.empty(rows, chunks, dtype=torch.int32, device=reads.device)
    launch(count_kernel, (rows, chunks), reads, counts, n, chunk, group, BLOCK=BLOCK, num_warps=NUM_WARPS)
    if width is None:
        width = max(1, int(counts.sum(dim=1).max()))
    index = torch.empty(batch, kv_heads, width, dtype=torch.int64, device=reads.device)
    member = torch.empty(batch, heads, width, dtype=torch.bool, device=reads.device)
    launch(write_kernel, (rows, chunks),
        reads, counts, index, member, n, chunk, group, width,
        BLOCK=BLOCK, BLOCK_CHUNKS=power_of_two(MOST_CHUNKS), num_warps=NUM_WARPS,
    )  # fmt: skip
    return index, member
