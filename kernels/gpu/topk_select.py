"""Triton kernels of `kvpress.kernels.topk_select`: find the k-th largest score digit by digit, then collect.

Scores become 32-bit integers of the same order. The threshold, the integer of the k-th largest, is found from its highest
digit (8 bits) to its lowest: count how often each digit occurs among the scores that agree with the digits found so
far; the threshold's digit is the largest at which as many scores as are still wanted have it or a larger one. A row goes
in chunks to several programs, each of which counts its own chunk; the next launch adds the chunks' counts up. So
nothing is summed by atomics, every launch depends on shapes only, and equal inputs give equal results.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.decode_attention import multiprocessors

DIGITS = 4  # of 8 bits
BLOCK = 2048  # scores per tile
BLOCK_CHUNKS = 8  # chunks whose counts are added at a time
MOST_CHUNKS = 64  # every program reads all chunks' counts of its row
NUM_WARPS = 8


@triton.jit
def ordered(b_scores):
    """uint32 of the order of float32 scores: NaN as the lowest finite number, -0 as 0, and 0 for -inf."""
    b_scores = tl.where(b_scores != b_scores, -3.4028234663852886e38, b_scores)
    b_scores = tl.where(b_scores == 0.0, 0.0, b_scores)
    b_bits = b_scores.to(tl.int32, bitcast=True)
    # Of a negative number all bits are flipped, of another one the sign.
    b_keys = tl.where(b_bits < 0, ~b_bits, b_bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(b_scores == float("-inf"), 0, b_keys)


@triton.jit
def refine(p_counts, prefix, wanted, chunks, BLOCK_CHUNKS: tl.constexpr):
    """One more digit of a row's threshold, from every chunk's counts of that digit, p_counts [chunks, 256].

    Returns:
        the digits found so far as one number, how many scores with exactly these digits are wanted, and this digit.
    """
    o_bin = tl.arange(0, 256)
    # [256]
    b_total = tl.zeros((256,), tl.int32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        o_chunk = start + tl.arange(0, BLOCK_CHUNKS)
        # [BLOCK_CHUNKS, 256]
        b_counts = tl.load(p_counts + o_chunk[:, None] * 256 + o_bin[None, :], mask=o_chunk[:, None] < chunks, other=0)
        b_total += tl.sum(b_counts, axis=0)
    b_from = tl.sum(b_total, axis=0) - tl.cumsum(b_total, axis=0) + b_total  # with this digit or a larger one
    digit = tl.maximum(tl.sum((b_from >= wanted).to(tl.int32), axis=0) - 1, 0)
    wanted -= tl.sum(tl.where(o_bin > digit, b_total, 0), axis=0)
    return (prefix << 8) | digit.to(tl.uint32), wanted, digit


@triton.jit(do_not_specialize=["n", "chunk", "heads", "k", "stride_sb", "stride_sh", "stride_nb", "stride_nh"])
def count_kernel(
    p_scores,
    p_wanted,
    p_counts,
    p_state,
    n,
    chunk,
    heads,
    k,
    stride_sb,
    stride_sh,
    stride_nb,
    stride_nh,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Count one chunk's digits: of a row's scores that start as the threshold does.

    Writes p_counts [rows, 4, chunks, 256] at DIGIT. p_state [rows, 4, 2] hands the threshold's first DIGIT digits and how
    many scores with exactly these are wanted to the next launch.
    """
    i_row, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_batch, i_head = i_row // heads, i_row % heads
    p_row = p_counts + i_row * 4 * chunks * 256
    if DIGIT == 0:
        prefix = tl.full((), 0, tl.uint32)
        wanted = tl.load(p_wanted + i_batch * stride_nb + i_head * stride_nh).to(tl.int32)
        wanted = tl.minimum(tl.maximum(wanted, 0), k)
    else:
        p_before = p_state + i_row * 8 + (DIGIT - 1) * 2
        prefix, wanted = tl.load(p_before).to(tl.uint32, bitcast=True), tl.load(p_before + 1)
        prefix, wanted, _ = refine(p_row + (DIGIT - 1) * chunks * 256, prefix, wanted, chunks, BLOCK_CHUNKS)
    if i_chunk == 0:
        tl.store(p_state + i_row * 8 + DIGIT * 2, prefix.to(tl.int32, bitcast=True))
        tl.store(p_state + i_row * 8 + DIGIT * 2 + 1, wanted)

    first = i_chunk * chunk
    last = tl.minimum(first + chunk, n)
    b_counts = tl.zeros((256,), tl.int32)
    for start in range(first, last, BLOCK):
        # [BLOCK]
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < last
        b_scores = tl.load(p_scores + i_batch * stride_sb + i_head * stride_sh + o_n, mask=m_n, other=0.0)
        b_keys = ordered(b_scores.to(tl.float32))
        if DIGIT > 0:
            m_n = m_n & ((b_keys >> (32 - 8 * DIGIT)) == prefix)
        b_digits = ((b_keys >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
        # What is masked out is counted as digit 0 and taken off again: `tl.histogram` has no mask in every version.
        b_counts += tl.histogram(tl.where(m_n, b_digits, 0), 256)
        b_counts -= tl.where(tl.arange(0, 256) == 0, tl.sum((~m_n).to(tl.int32), axis=0), 0)
    tl.store(p_row + (DIGIT * chunks + i_chunk) * 256 + tl.arange(0, 256), b_counts)


@triton.jit(do_not_specialize=["n", "chunk", "heads", "k", "stride_sb", "stride_sh"])
def collect_kernel(
    p_scores,
    p_counts,
    p_state,
    p_index,
    p_chosen,
    n,
    chunk,
    heads,
    k,
    stride_sb,
    stride_sh,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Write one chunk's chosen indices behind those of the chunks before it.

    Chosen is what lies above the threshold, and of what equals it the first few. p_index, p_chosen [rows, k].
    """
    i_row, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_batch, i_head = i_row // heads, i_row % heads
    p_row = p_counts + i_row * 4 * chunks * 256
    p_before = p_state + i_row * 8 + 6
    prefix, wanted = tl.load(p_before).to(tl.uint32, bitcast=True), tl.load(p_before + 1)
    threshold, ties, _ = refine(p_row + 3 * chunks * 256, prefix, wanted, chunks, BLOCK_CHUNKS)

    # Above the threshold is what differs from it first in a larger digit, and every digit was counted. The digits at
    # which chunks are counted are those of the threshold.
    o_bin = tl.arange(0, 256)
    above = tl.full((), 0, tl.int32)  # in the chunks before this one
    all_above = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)  # in the chunks before this one
    for digit in tl.static_range(4):
        found = ((threshold >> (24 - 8 * digit)) & 255).to(tl.int32)
        for start in range(0, chunks, BLOCK_CHUNKS):
            o_chunk = start + tl.arange(0, BLOCK_CHUNKS)
            # [BLOCK_CHUNKS, 256]
            p_tile = p_row + (digit * chunks + o_chunk)[:, None] * 256 + o_bin[None, :]
            b_counts = tl.load(p_tile, mask=o_chunk[:, None] < chunks, other=0)
            # [BLOCK_CHUNKS]
            b_above = tl.sum(tl.where(o_bin[None, :] > found, b_counts, 0), axis=1)
            m_before = o_chunk < i_chunk
            all_above += tl.sum(b_above, axis=0)
            above += tl.sum(tl.where(m_before, b_above, 0), axis=0)
            if digit == 3:
                b_equal = tl.sum(tl.where(o_bin[None, :] == found, b_counts, 0), axis=1)
                equal += tl.sum(tl.where(m_before, b_equal, 0), axis=0)
    ties = tl.where(threshold == 0, 0, ties)  # the threshold is -inf: fewer candidates than wanted
    held = all_above + ties

    first = i_chunk * chunk
    last = tl.minimum(first + chunk, n)
    for start in range(first, last, BLOCK):
        # [BLOCK]
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < last
        b_scores = tl.load(p_scores + i_batch * stride_sb + i_head * stride_sh + o_n, mask=m_n, other=0.0)
        b_keys = ordered(b_scores.to(tl.float32))
        b_above = (m_n & (b_keys > threshold)).to(tl.int32)
        b_equal = (m_n & (b_keys == threshold)).to(tl.int32)
        b_above_rank = above + tl.cumsum(b_above, axis=0)  # from 1, like the next
        b_equal_rank = equal + tl.cumsum(b_equal, axis=0)
        m_chosen = (b_above == 1) | ((b_equal == 1) & (b_equal_rank <= ties))
        b_place = b_above_rank + tl.minimum(b_equal_rank, ties) - 1
        tl.store(p_index + i_row * k + b_place, o_n.to(tl.int64), mask=m_chosen)
        # k is at most n, so that the chunks cover the result's width too: the tail that nothing is written to.
        m_k = m_n & (o_n < k)
        tl.store(p_chosen + i_row * k + o_n, o_n < held, mask=m_k)
        tl.store(p_index + i_row * k + o_n, tl.zeros((BLOCK,), tl.int64) + (n - 1), mask=m_k & (o_n >= held))
        above += tl.sum(b_above, axis=0)
        equal += tl.sum(b_equal, axis=0)


def chunk_size(n: int, rows: int, processors: int) -> int:
    """Scores per program: about two waves of programs, a row in `MOST_CHUNKS` at most, and whole tiles."""
    chunks = max(1, min(MOST_CHUNKS, triton.cdiv(2 * processors, rows)))
    return triton.cdiv(triton.cdiv(n, chunks), BLOCK) * BLOCK


def topk_select(scores: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.topk_select.topk_select`, in five launches."""
    batch, heads, n = scores.shape
    rows = batch * heads
    index = torch.empty(batch, heads, k, dtype=torch.int64, device=scores.device)
    chosen = torch.empty(batch, heads, k, dtype=torch.bool, device=scores.device)
    if rows == 0 or n == 0:
        return index, chosen
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    counts = counts.expand(batch, heads)
    chunk = chunk_size(n, rows, multiprocessors(scores.device))
    chunks = triton.cdiv(n, chunk)
    partial = torch.empty(rows, DIGITS, chunks, 256, dtype=torch.int32, device=scores.device)
    state = torch.empty(rows, DIGITS, 2, dtype=torch.int32, device=scores.device)
    sizes, strides = (n, chunk, heads, k), scores.stride()[:2]
    blocks: dict[str, Any] = {"BLOCK": BLOCK, "BLOCK_CHUNKS": BLOCK_CHUNKS, "num_warps": NUM_WARPS}
    for digit in range(DIGITS):
        count_kernel[(rows, chunks)](
            scores, counts, partial, state, *sizes, *strides, *counts.stride(), DIGIT=digit, **blocks
        )
    collect_kernel[(rows, chunks)](scores, partial, state, index, chosen, *sizes, *strides, **blocks)
    return index, chosen


def compile_cases() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int]]:
    """(kernel, signature, constexprs, num_warps, num_stages) of the launches in use."""
    blocks = {"BLOCK": BLOCK, "BLOCK_CHUNKS": BLOCK_CHUNKS}
    buffers = {"p_counts": "*i32:16", "p_state": "*i32:16"}
    numbers = dict.fromkeys(("n", "chunk", "heads", "k", "stride_sb", "stride_sh"), "i32")
    for dtype in ("fp32", "bf16"):
        scores = {"p_scores": f"*{dtype}:16"}
        for digit in range(DIGITS):
            wanted = {"p_wanted": "*i32:16", "stride_nb": "i32", "stride_nh": "i32"}
            yield count_kernel, {**scores, **wanted, **buffers, **numbers}, {"DIGIT": digit, **blocks}, NUM_WARPS, 3
        results = {"p_index": "*i64:16", "p_chosen": "*i1:16"}
        yield collect_kernel, {**scores, **buffers, **results, **numbers}, blocks, NUM_WARPS, 3
