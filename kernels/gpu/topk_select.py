"""Triton kernels of `kvpress.kernels.topk_select`: find the k-th largest score digit by digit, then collect.

Scores become 32-bit integers of the same order. The threshold, the integer of the k-th largest, is found from its highest
digit (8 bits) to its lowest: count how often each digit occurs among the scores that agree with the digits found so
far; the threshold's digit is the largest at which as many scores as are still wanted have it or a larger one. A row goes
in chunks to several programs, each of which counts its own chunk; the next launch adds the chunks' counts up. So
nothing is summed by atomics, every launch depends on shapes only, and equal inputs give equal results. A row of up to
`ONE_TILE` scores is one tile of one program, which does all of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import cdiv, launch, multiprocessors, power_of_two
from kvpress.kernels.launch_shapes import launch_shape, planned

DIGITS = 4  # of 8 bits
BLOCK = 2048  # scores per tile
BLOCK_CHUNKS = 8  # chunks whose counts are added at a time
MOST_CHUNKS = 64  # every program reads all chunks' counts of its row
ONE_TILE = 8192  # scores that one program takes at once: the pages of 131,072 entries
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
def count_digits(b_keys, m_n, DIGIT: tl.constexpr):
    """int32 [256], how often each digit occurs among the keys with m_n."""
    b_digits = ((b_keys >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    # What is masked out is counted as digit 0 and taken off again: `tl.histogram` has no mask in every version.
    b_counts = tl.histogram(tl.where(m_n, b_digits, 0), 256)
    return b_counts - tl.where(tl.arange(0, 256) == 0, tl.sum((~m_n).to(tl.int32), axis=0), 0)


@triton.jit
def narrow(b_total, prefix, wanted):
    """One more digit of a row's threshold, from the counts [256] of that digit.

    Returns:
        the digits found so far as one number, and how many scores with exactly these digits are wanted.
    """
    o_bin = tl.arange(0, 256)
    b_from = tl.sum(b_total, axis=0) - tl.cumsum(b_total, axis=0) + b_total  # with this digit or a larger one
    digit = tl.maximum(tl.sum((b_from >= wanted).to(tl.int32), axis=0) - 1, 0)
    wanted -= tl.sum(tl.where(o_bin > digit, b_total, 0), axis=0)
    return (prefix << 8) | digit.to(tl.uint32), wanted


@triton.jit
def refine(p_counts, prefix, wanted, chunks, BLOCK_CHUNKS: tl.constexpr):
    """As `narrow`, from every chunk's counts of a digit, p_counts [chunks, 256]."""
    o_bin = tl.arange(0, 256)
    # [256]
    b_total = tl.zeros((256,), tl.int32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        o_chunk = start + tl.arange(0, BLOCK_CHUNKS)
        # [BLOCK_CHUNKS, 256]
        b_counts = tl.load(p_counts + o_chunk[:, None] * 256 + o_bin[None, :], mask=o_chunk[:, None] < chunks, other=0)
        b_total += tl.sum(b_counts, axis=0)
    return narrow(b_total, prefix, wanted)


@triton.jit
def write_chosen(p_index, p_chosen, b_keys, o_n, m_n, threshold, ties, above, equal, held, n, k, BLOCK: tl.constexpr):
    """Write a tile's chosen indices behind what came before it; p_index, p_chosen [k] of one row.

    Chosen is what lies above the threshold, and of what equals it the first `ties`. `above` and `equal` say how many of either
    there are before the tile, `held` how many are chosen in all.

    Returns:
        `above` and `equal` behind the tile.
    """
    b_above = (m_n & (b_keys > threshold)).to(tl.int32)
    b_equal = (m_n & (b_keys == threshold)).to(tl.int32)
    b_above_rank = above + tl.cumsum(b_above, axis=0)  # from 1, like the next
    b_equal_rank = equal + tl.cumsum(b_equal, axis=0)
    m_chosen = (b_above == 1) | ((b_equal == 1) & (b_equal_rank <= ties))
    b_place = b_above_rank + tl.minimum(b_equal_rank, ties) - 1
    tl.store(p_index + b_place, o_n.to(tl.int64), mask=m_chosen)
    # k is at most n, so that the tiles cover the result's width too: the tail that nothing is written to.
    m_k = m_n & (o_n < k)
    tl.store(p_chosen + o_n, o_n < held, mask=m_k)
    tl.store(p_index + o_n, tl.zeros((BLOCK,), tl.int64) + (n - 1), mask=m_k & (o_n >= held))
    return above + tl.sum(b_above, axis=0), equal + tl.sum(b_equal, axis=0)


@triton.jit(do_not_specialize=["n", "heads", "k", "stride_sb", "stride_sh", "stride_nb", "stride_nh"])
def tile_kernel(
    p_scores,
    p_wanted,
    p_index,
    p_chosen,
    n,
    heads,
    k,
    stride_sb,
    stride_sh,
    stride_nb,
    stride_nh,
    BLOCK: tl.constexpr,
):
    """A whole row in one tile: the threshold's digits one after the other, then what is chosen."""
    i_row = tl.program_id(0).to(tl.int64)
    i_batch, i_head = i_row // heads, i_row % heads
    # [BLOCK]
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < n
    b_scores = tl.load(p_scores + i_batch * stride_sb + i_head * stride_sh + o_n, mask=m_n, other=0.0)
    b_keys = ordered(b_scores.to(tl.float32))
    wanted = tl.load(p_wanted + i_batch * stride_nb + i_head * stride_nh).to(tl.int32)
    ties = tl.minimum(tl.maximum(wanted, 0), k)
    threshold = tl.full((), 0, tl.uint32)
    m_same = m_n  # agrees with the digits found so far
    for DIGIT in tl.static_range(4):
        if DIGIT > 0:
            m_same = m_n & ((b_keys >> (32 - 8 * DIGIT)) == threshold)
        threshold, ties = narrow(count_digits(b_keys, m_same, DIGIT), threshold, ties)
    ties = tl.where(threshold == 0, 0, ties)  # the threshold is -inf: fewer candidates than wanted
    held = tl.sum((m_n & (b_keys > threshold)).to(tl.int32), axis=0) + ties
    write_chosen(
        p_index + i_row * k, p_chosen + i_row * k, b_keys, o_n, m_n, threshold, ties, 0, 0, held, n, k, BLOCK
    )  # fmt: skip


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
        prefix, wanted = refine(p_row + (DIGIT - 1) * chunks * 256, prefix, wanted, chunks, BLOCK_CHUNKS)
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
        b_counts += count_digits(b_keys, m_n, DIGIT)
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
    """Write one chunk's chosen indices behind those of the chunks before it: p_index, p_chosen [rows, k]."""
    i_row, i_chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_batch, i_head = i_row // heads, i_row % heads
    p_row = p_counts + i_row * 4 * chunks * 256
    p_before = p_state + i_row * 8 + 6
    prefix, wanted = tl.load(p_before).to(tl.uint32, bitcast=True), tl.load(p_before + 1)
    threshold, ties = refine(p_row + 3 * chunks * 256, prefix, wanted, chunks, BLOCK_CHUNKS)

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
        above, equal = write_chosen(
            p_index + i_row * k, p_chosen + i_row * k, b_keys, o_n, m_n, threshold, ties, above, equal, held, n, k, BLOCK
        )  # fmt: skip


def chunk_size(n: int, rows: int, block: int, device: torch.device) -> int:
    """Scores per program: about two waves of programs, a row in `MOST_CHUNKS` at most, and whole tiles of `block`."""
    chunks = max(1, min(MOST_CHUNKS, cdiv(2 * multiprocessors(device), rows)))
    return cdiv(cdiv(n, chunks), block) * block


@planned
def shape(block: int, device: torch.device) -> dict[str, int]:
    """Launch settings of the kernels that go over a row in chunks."""
    return launch_shape("topk_select", device, block=block, num_warps=NUM_WARPS)


def topk_select(scores: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.topk_select.topk_select`: in one launch for up to `ONE_TILE` scores, in five for more."""
    batch, heads, n = scores.shape
    rows = batch * heads
    index = torch.empty(batch, heads, k, dtype=torch.int64, device=scores.device)
    chosen = torch.empty(batch, heads, k, dtype=torch.bool, device=scores.device)
    if rows == 0 or n == 0:
        return index, chosen
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    counts = counts.expand(batch, heads)
    if n <= ONE_TILE:
        block = max(256, power_of_two(n))
        launch(tile_kernel, (rows,),
            scores, counts, index, chosen, n, heads, k, *scores.stride()[:2], *counts.stride(),
            BLOCK=block, num_warps=max(4, block // 512),
        )  # fmt: skip
        return index, chosen
    tile = shape(BLOCK, scores.device)
    chunk = chunk_size(n, rows, tile["block"], scores.device)
    chunks = cdiv(n, chunk)
    partial = torch.empty(rows, DIGITS, chunks, 256, dtype=torch.int32, device=scores.device)
    state = torch.empty(rows, DIGITS, 2, dtype=torch.int32, device=scores.device)
    sizes, strides = (n, chunk, heads, k), scores.stride()[:2]
    blocks: dict[str, Any] = {"BLOCK": tile["block"], "BLOCK_CHUNKS": BLOCK_CHUNKS, "num_warps": tile["num_warps"]}
    for digit in range(DIGITS):
        launch(
            count_kernel,
            (rows, chunks),
            scores,
            counts,
            partial,
            state,
            *sizes,
            *strides,
            *counts.stride(),
            DIGIT=digit,
            **blocks,
        )
    launch(collect_kernel, (rows, chunks), scores, partial, state, index, chosen, *sizes, *strides, **blocks)
    return index, chosen
