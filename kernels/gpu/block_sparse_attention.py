"""Triton kernel of `kvpress.kernels.block_sparse_attention`: a tile of query rows goes over the keys listed for it.

A row begins with itself, so it never lacks a key. Then come the columns, the diagonals and the blocks, and each leaves
out what came before it, so that nothing is counted twice. Two tables tell: which entries are columns, and which distances
the diagonals cover. Both are per head and as long as the sequence; no list is made per query block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.block_lists import run_table
from kvpress.kernels.gpu.decode_attention import capped
from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two
from kvpress.kernels.launch_shapes import launch_shape, planned


class Config(NamedTuple):
    """Launch settings: rows and keys per tile, at most a block, and the head dimension padded to a power of two."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@planned
def config(block_size: int, head_dim: int, itemsize: int, device: torch.device) -> Config:
    """Launch settings from shapes: the wider a row of K, the smaller the tiles."""
    block_d = max(16, power_of_two(head_dim))
    width = block_d * itemsize
    block_m, block_n = (128, 64) if width <= 256 else (64, 32) if width <= 512 and itemsize == 2 else (32, 32)
    chosen = launch_shape(
        "block_sparse_attention",
        device,
        block_size,
        block_d,
        itemsize,
        block_m=block_m,
        block_n=block_n,
        num_warps=8 if min(block_size, block_m) == 128 else 4,
        num_stages=3 if width <= 256 else 2,
    )
    block_m, block_n = min(block_size, chosen["block_m"]), min(block_size, chosen["block_n"])
    return Config(block_m, block_n, block_d, chosen["num_warps"], chosen["num_stages"])


@triton.jit
def attend(
    b_acc,
    b_max,
    b_sum,
    b_query,
    b_at,
    b_entry,
    m_read,
    m_d,
    p_key,
    p_value,
    stride_kn,
    stride_vn,
    scale,
    softcap,
):
    """Online softmax over one tile of keys: those at b_entry [BLOCK_N] with m_read, for the rows that come after them.

    p_key, p_value [BLOCK_D] point to the first entry of the head. A row has read itself before: its maximum is finite.
    """
    b_slot = b_entry.to(tl.int64)
    # [BLOCK_D, BLOCK_N]
    b_key = tl.load(p_key[:, None] + b_slot[None, :] * stride_kn, mask=m_d[:, None] & m_read[None, :], other=0.0)
    # [BLOCK_M, BLOCK_N]
    b_scores = capped(tl.dot(b_query, b_key.to(b_query.dtype), input_precision="tf32x3") * scale, softcap)
    b_scores = tl.where(m_read[None, :] & (b_entry[None, :] < b_at[:, None]), b_scores, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
    b_weights = tl.exp(b_scores - b_new[:, None])
    b_decay = tl.exp(b_max - b_new)
    # [BLOCK_N, BLOCK_D]
    b_value = tl.load(p_value[None, :] + b_slot[:, None] * stride_vn, mask=m_read[:, None] & m_d[None, :], other=0.0)
    b_acc = b_acc * b_decay[:, None]
    b_acc += tl.dot(b_weights.to(b_value.dtype), b_value, input_precision="tf32x3")
    return b_acc, b_new, b_sum * b_decay + tl.sum(b_weights, axis=1)


# Lengths change from call to call and are never compiled in.
@triton.jit(do_not_specialize=["rows", "n", "query_blocks", "block_width", "column_width", "run_width"])
def block_sparse_kernel(
    p_query,
    p_key,
    p_value,
    p_columns,
    p_column_counts,
    p_is_column,
    p_runs,
    p_run_counts,
    p_is_run,
    p_blocks,
    p_block_counts,
    p_sinks,
    p_output,
    p_lse,
    scale,
    softcap,
    rows,
    n,
    query_blocks,
    column_width,
    run_width,
    block_width,
    heads,
    group,
    column_share,
    run_share,
    block_share,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of rows of one query head: p_output [batch, heads, rows, head_dim] and p_lse [batch, heads, rows].

    Lists of heads / share heads, ascending, p_x_counts saying how many of them the query block reads:
        p_columns [batch, ., column_width], p_is_column [batch, ., n];
        p_runs [batch, ., run_width], where a run of BLOCK_SIZE distances begins, p_is_run [batch, ., n + BLOCK_SIZE];
        p_blocks [batch, ., query_blocks, block_width], in any order, -1 for none.
    A distance is that from the last row of the query block to the key.
    """
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    # The last rows see the most keys: they go first.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head, i_batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_block = i_tile * BLOCK_M // BLOCK_SIZE
    last = n - rows + i_block * BLOCK_SIZE + BLOCK_SIZE - 1  # entry of the query block's last row, beyond n perhaps

    # [BLOCK_M], [BLOCK_D]
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < rows, o_d < HEAD_DIM
    b_at = n - rows + o_m
    p_key += i_batch * stride_kb + (i_head // group) * stride_kh + o_d
    p_value += i_batch * stride_vb + (i_head // group) * stride_vh + o_d
    # [BLOCK_M, BLOCK_D]
    m_tile = m_m[:, None] & m_d[None, :]
    p_rows = p_query + i_batch * stride_qb + i_head * stride_qh + o_m.to(tl.int64)[:, None] * stride_qr + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_tile, other=0.0)

    # The row itself.
    b_own = b_at.to(tl.int64)[:, None]
    b_key = tl.load(p_key[None, :] + b_own * stride_kn, mask=m_tile, other=0.0).to(b_query.dtype).to(tl.float32)
    b_max = capped(tl.sum(b_query.to(tl.float32) * b_key, axis=1) * scale, softcap)
    b_sum = tl.full((BLOCK_M,), 1.0, tl.float32)
    b_acc = tl.load(p_value[None, :] + b_own * stride_vn, mask=m_tile, other=0.0).to(tl.float32)

    o_n = tl.arange(0, BLOCK_N)
    if p_columns is not None:
        i_list = i_batch * (heads // column_share) + i_head // column_share
        count = tl.load(p_column_counts + i_list * query_blocks + i_block)
        for start in range(0, count, BLOCK_N):
            # [BLOCK_N]
            m_read = start + o_n < count
            b_entry = tl.load(p_columns + i_list * column_width + start + o_n, mask=m_read, other=0)
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_query, b_at, b_entry, m_read, m_d,
                p_key, p_value, stride_kn, stride_vn, scale, softcap,
            )  # fmt: skip
        p_is_column += i_list * n
    if p_runs is not None:
        i_list = i_batch * (heads // run_share) + i_head // run_share
        p_is_run += i_list * (n + BLOCK_SIZE)
        count = tl.load(p_run_counts + i_list * query_blocks + i_block)
        for part in range(0, count * PARTS):
            # [BLOCK_N], the farthest of the run first: keys in ascending order. What the next run has is left to it.
            i_run = part // PARTS
            run = tl.load(p_runs + i_list * run_width + i_run)
            following = tl.load(p_runs + i_list * run_width + i_run + 1, mask=i_run + 1 < run_width, other=2147483647)
            b_entry = last - run - (BLOCK_SIZE - 1) + part % PARTS * BLOCK_N + o_n
            m_read = (b_entry >= 0) & (b_entry < n) & (last - b_entry < following)
            m_read = m_read & (tl.load(p_is_run + last - b_entry, mask=m_read, other=0) != 0)
            if p_columns is not None:
                m_read = m_read & (tl.load(p_is_column + b_entry, mask=m_read, other=1) == 0)
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_query, b_at, b_entry, m_read, m_d,
                p_key, p_value, stride_kn, stride_vn, scale, softcap,
            )  # fmt: skip
    if p_blocks is not None:
        i_list = (i_batch * (heads // block_share) + i_head // block_share) * query_blocks + i_block
        count = tl.load(p_block_counts + i_list)
        for part in range(0, count * PARTS):
            # [BLOCK_N]
            block = tl.load(p_blocks + i_list * block_width + part // PARTS).to(tl.int32)
            b_entry = block * BLOCK_SIZE + part % PARTS * BLOCK_N + o_n
            m_read = (block >= 0) & (b_entry < n) & (b_entry <= last)
            if p_columns is not None:
                m_read = m_read & (tl.load(p_is_column + b_entry, mask=m_read, other=1) == 0)
            if p_runs is not None:
                m_read = m_read & (tl.load(p_is_run + last - b_entry, mask=m_read, other=1) == 0)
            b_acc, b_max, b_sum = attend(
                b_acc, b_max, b_sum, b_query, b_at, b_entry, m_read, m_d,
                p_key, p_value, stride_kn, stride_vn, scale, softcap,
            )  # fmt: skip

    if p_sinks is not None:
        sink = tl.load(p_sinks + i_head).to(tl.float32)
        b_new = tl.maximum(b_max, sink)
        b_decay = tl.exp(b_max - b_new)
        b_sum = b_sum * b_decay + tl.exp(sink - b_new)
        b_acc = b_acc * b_decay[:, None]
        b_max = b_new
    # [BLOCK_M]
    o_out = (i_batch * heads + i_head) * rows + o_m
    p_out = p_output + o_out[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_out, (b_acc / b_sum[:, None]).to(p_output.dtype.element_ty), mask=m_tile)
    tl.store(p_lse + o_out, b_max + tl.log(b_sum), mask=m_m)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    blocks: Tensor | None,
    columns: Tensor | None,
    diagonals: Tensor | None,
    block_size: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `kvpress.kernels.block_sparse_attention.block_sparse_attention`."""
    batch, heads, rows, head_dim = query.shape
    n = key.shape[2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    if not output.numel():
        return output, lse
    query_blocks = cdiv(rows, block_size)
    lasts = torch.arange(1, query_blocks + 1, device=query.device) * block_size + (n - rows - 1)

    columns, column_counts, is_column = _columns(columns, lasts, n)
    runs, run_counts, is_run = _runs(diagonals, lasts, n, block_size)
    block_counts = None
    if blocks is not None and blocks.shape[-1]:
        blocks, block_counts = blocks.contiguous(), _reach(blocks, lasts // block_size)
    else:
        blocks = None

    chosen = config(block_size, head_dim, query.element_size(), query.device)
    lists = (columns, runs, blocks)
    launch(
        block_sparse_kernel,
        (cdiv(rows, chosen.block_m), heads, batch),
        query,
        key,
        value,
        columns,
        column_counts,
        is_column,
        runs,
        run_counts,
        is_run,
        blocks,
        block_counts,
        sinks,
        output,
        lse,
        scale,
        softcap,
        rows,
        n,
        query_blocks,
        *(0 if x is None else x.shape[-1] for x in lists),
        heads,
        heads // key.shape[1],
        *(1 if x is None else heads // x.shape[1] for x in lists),
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return output, lse


def _ascending(numbers: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The real ones of the last dimension in ascending order, int32 with the rest behind, and how many they are."""
    ordered = numbers.int().masked_fill(~real, torch.iinfo(torch.int32).max).sort(dim=-1).values
    return ordered, real.sum(dim=-1, dtype=torch.int32)


def _reach(blocks: Tensor, own: Tensor) -> Tensor:
    """How many places of each list [..., query blocks, m] hold all that is read: int32 [..., query blocks].

    Lists are as a rule wider than what they hold, which comes first: nothing is sorted. What is -1 before that is passed over.

    Args:
        own: [query blocks], the last block that each query block sees.
    """
    place = torch.arange(1, blocks.shape[-1] + 1, dtype=torch.int32, device=blocks.device)
    return (place * ((blocks >= 0) & (blocks <= own[:, None]))).amax(dim=-1)


def _columns(columns: Tensor | None, lasts: Tensor, n: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The columns in order, how many of them each query block reads, and which entries are columns."""
    if columns is None:
        return None, None, None
    real = (columns >= 0) & (columns < n)
    ordered, _ = _ascending(columns, real)
    ends = lasts.int().expand(*columns.shape[:2], -1).contiguous()
    counts = torch.searchsorted(ordered, ends, right=True, out_int32=True)
    table = torch.zeros(*columns.shape[:2], n + 1, dtype=torch.uint8, device=columns.device)
    table.scatter_(2, torch.where(real, columns, n).long(), 1)
    return ordered, counts, table[..., :n].contiguous()


def _runs(
    diagonals: Tensor | None, lasts: Tensor, n: int, size: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Runs of `size` distances that cover the diagonals', how many each query block reads, and which distances are.

    A diagonal d is the distances from d to d + size - 1, seen from the query block's last row. Diagonals that touch or
    overlap are one stretch, which is cut into runs from its start: diagonals side by side cost no more keys than
    they have. The last run of a stretch may reach into the next stretch.
    """
    if diagonals is None:
        return None, None, None
    real = (diagonals >= 0) & (diagonals < n)
    starts = torch.where(real, diagonals, n + size).long().sort(dim=-1).values
    table = run_table(diagonals, n, size).to(torch.uint8)

    fresh = torch.ones_like(starts, dtype=torch.bool)  # begins a stretch
    fresh[..., 1:] = starts[..., 1:] - starts[..., :-1] > size
    stretch = torch.where(fresh, starts, -1).cummax(dim=-1).values
    needed = (starts - stretch + 2 * size - 1) // size  # runs of the stretch up to the end of this diagonal
    adds = fresh.clone()
    adds[..., 1:] |= needed[..., 1:] > needed[..., :-1]
    runs, _ = _ascending(stretch + (needed - 1) * size, adds & (starts < n))
    ends = lasts.int().expand(*runs.shape[:2], -1).contiguous()
    return runs, torch.searchsorted(runs, ends, right=True, out_int32=True), table
