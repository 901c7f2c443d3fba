"""Triton kernels of `kvpress.kernels.decode_attention`: splits of the keys, then their merge and the weights from the LSE."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import cdiv, launch, multiprocessors, power_of_two
from kvpress.kernels.gumbel_noise import TABLE, gumbel_offsets, gumbel_table_on
from kvpress.kernels.launch_shapes import launch_shape, planned

if TYPE_CHECKING:
    from kvpress.kernels.attention_mass import Perturbation

BLOCK_SPLITS = 16  # partial results merged at a time
KEYS_PER_SPLIT = 128  # fewer are not worth a program of their own


class Config(NamedTuple):
    """Launch settings of the attention kernel.

    Attributes:
        block_m: query heads of one kv head, padded to what `tl.dot` takes.
        block_n: keys per tile.
        block_d: head dimension, padded to a power of two.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


@planned
def config(group: int, head_dim: int, itemsize: int, device: torch.device, listed: bool = False) -> Config:
    """Launch settings from shapes: a tile of K is 16 KiB where registers allow, less in float32 and for large groups.

    Where slots are listed a tile's addresses are loaded before the tile, which takes two stages of the pipeline: with three or
    four, K and V have one buffer each, and loading does not go on while the tensor cores work.
    """
    block_m, block_d = max(16, power_of_two(group)), max(16, power_of_two(head_dim))
    tile = 4096 if block_m >= 64 else 16384 if itemsize == 2 and block_m == 16 else 8192
    chosen = launch_shape(
        "decode_attention.listed" if listed else "decode_attention",
        device,
        block_m,
        block_d,
        itemsize,
        block_n=max(16, min(64, tile // (block_d * itemsize))),
        num_warps=4 if block_m <= 32 else 8,
        num_stages=5 if listed and itemsize == 2 and block_m <= 32 else 3,
    )
    return Config(block_m, block_d=block_d, **chosen)


@planned
def split_shape(keys: int, device: torch.device) -> tuple[int, int]:
    """How many programs there are to be, about two waves, and the least number of keys for one of them."""
    chosen = launch_shape("decode_attention.split", device, waves=2, keys=keys)
    return chosen["waves"] * multiprocessors(device), chosen["keys"]


def split_count(count: int, rows: int, device: torch.device) -> int:
    """Into how many splits `count` keys go, so that with `rows` kv heads there are about two waves of programs."""
    programs, keys = split_shape(KEYS_PER_SPLIT, device)
    return max(1, min(cdiv(programs, rows), cdiv(count, keys)))


def splits_of(count: int, rows: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """How many splits `count` keys of `rows` kv heads go into, and the keys of a split, in whole tiles."""
    per_split = max(1, cdiv(cdiv(count, split_count(count, rows, device)), block_n)) * block_n
    return max(1, cdiv(count, per_split)), per_split


@planned
def weigh_blocks(group: int) -> dict[str, int]:
    """Tile of the kernel that makes weights of scores: a kv head's query heads, and keys."""
    block_m = power_of_two(group)
    return {"BLOCK_M": block_m, "BLOCK_N": max(16, min(256, 4096 // block_m))}


@triton.jit
def capped(b_scores, softcap):
    """softcap * tanh(scores / softcap), or the scores where it is None."""
    if softcap is not None:
        # tanh by its definition: Triton has none of its own. Where exp overflows it gives 1.
        b_scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * b_scores / softcap) + 1.0))
    return b_scores


# Lengths grow in decode and are never compiled in, nor are strides that grow with them; those of K and V are multiples of the
# head dimension, which has to be known for wide loads.
@triton.jit(
    do_not_specialize=["count", "per_split", "slots", "kv_heads", "group", "moved", "stride_ib", "stride_ih", "stride_mb",
                       "stride_mh", "stride_pb", "stride_ph", "stride_ob", "stride_oh"]
)  # fmt: skip
def attend_kernel(
    p_query,
    p_key,
    p_value,
    p_index,
    p_valid,
    p_sinks,
    p_other,
    p_moved,
    p_positions,
    p_offsets,
    p_noise,
    p_temperature,
    p_output,
    p_lse,
    p_scores,
    p_perturbed_lse,
    scale,
    softcap,
    temperature,
    count,
    per_split,
    slots,
    kv_heads,
    group,
    moved,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ib,
    stride_ih,
    stride_mb,
    stride_mh,
    stride_pb,
    stride_ph,
    stride_ob,
    stride_oh,
    TABLE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One split of one kv head: online softmax of its query heads over a range of keys, of listed keys or listed pages.

    Writes p_output [batch * heads, splits, head_dim] and p_lse [batch * heads, splits], and the scores, -inf where a
    head does not look, to p_scores [batch * heads, count] unless it is None. With p_perturbed_lse, which is as p_lse, these
    scores and that LSE are of (score + noise) / temperature; the noise of an entry is read from the table p_noise, and the
    temperature from p_temperature if that is given. With p_other [batch * heads, head_dim] that query scores the first `moved`
    entries, or those that p_moved marks.
    """
    i_row, i_split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_batch, i_head = (i_row // kv_heads).to(tl.int64), (i_row % kv_heads).to(tl.int64)
    first = i_split * per_split
    last = tl.minimum(first + per_split, count)
    if p_temperature is not None:
        temperature = tl.load(p_temperature)

    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < group, o_d < HEAD_DIM
    o_heads = i_head * group + o_m
    o_out = (i_batch * kv_heads + i_head) * group + o_m  # int64, rows of what is written
    p_key += i_batch * stride_kb + i_head * stride_kh
    p_value += i_batch * stride_vb + i_head * stride_vh
    # [BLOCK_M, BLOCK_D]
    p_rows = p_query + i_batch * stride_qb + o_heads[:, None] * stride_qh + o_d[None, :]
    b_query = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)
    if p_other is not None:
        p_rows = p_other + o_out[:, None] * HEAD_DIM + o_d[None, :]
        b_other = tl.load(p_rows, mask=m_m[:, None] & m_d[None, :], other=0.0)

    # [BLOCK_M], [BLOCK_M], [BLOCK_M, BLOCK_D]
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if p_offsets is not None:
        b_offsets = tl.load(p_offsets + o_out, mask=m_m, other=0)
        p_positions += i_batch * stride_pb + i_head * stride_ph
    if p_sinks is not None:  # a sink is a key without a value; it belongs to the first split
        b_sinks = tl.load(p_sinks + o_heads, mask=m_m, other=float("-inf")).to(tl.float32)
        b_max = tl.where(i_split == 0, b_sinks, b_max)
        b_sum = tl.where(b_max > float("-inf"), 1.0, 0.0)
    b_perturbed_max, b_perturbed_sum = b_max, b_sum

    for start in range(first, last, BLOCK_N):
        # [BLOCK_N]; o_i counts what is listed, entries or pages
        o_n = start + tl.arange(0, BLOCK_N)
        o_i = o_n
        if PAGE_SIZE > 1:
            o_i = o_n // PAGE_SIZE
        m_last = o_n < last
        m_n = m_last
        b_slot = o_n.to(tl.int64)
        if p_index is not None:
            b_slot = tl.load(p_index + i_batch * stride_ib + i_head * stride_ih + o_i, mask=m_n, other=0).to(tl.int64)
        if PAGE_SIZE > 1:
            b_slot = b_slot * PAGE_SIZE + o_n % PAGE_SIZE
            m_n = m_n & (b_slot < slots)  # the last page may be short
        # [BLOCK_M, BLOCK_N], and whether any head looks: the rest is not read
        m_seen = m_m[:, None] & m_n[None, :]
        m_read = m_n
        if p_valid is not None:
            p_mask = p_valid + i_batch * stride_mb
            if PER_HEAD:
                p_see = p_mask + o_heads[:, None] * stride_mh + o_i[None, :]
                m_seen = tl.load(p_see, mask=m_seen, other=0) != 0
                m_read = tl.max(m_seen.to(tl.int32), axis=0) != 0
            else:
                m_read = tl.load(p_mask + i_head * stride_mh + o_i, mask=m_n, other=0) != 0
                m_seen = m_m[:, None] & m_read[None, :]
        # [BLOCK_D, BLOCK_N]
        p_tile = p_key + b_slot[None, :] * stride_kn + o_d[:, None]
        b_key = tl.load(p_tile, mask=m_d[:, None] & m_read[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_scores = tl.dot(b_query, b_key.to(b_query.dtype), input_precision="ieee") * scale
        if p_other is not None:
            m_moved = o_n < moved
            if p_moved is not None:
                p_marks = p_moved + i_batch * stride_ob + i_head * stride_oh + o_n
                m_moved = tl.load(p_marks, mask=m_n, other=0) != 0
            b_others = tl.dot(b_other, b_key.to(b_query.dtype), input_precision="ieee") * scale
            b_scores = tl.where(m_moved[None, :], b_others, b_scores)
        b_scores = tl.where(m_seen, capped(b_scores, softcap), float("-inf"))
        if p_scores is not None:
            b_kept = b_scores
            if p_perturbed_lse is not None:
                if p_noise is not None:
                    b_positions = tl.load(p_positions + o_n, mask=m_n, other=0)
                    b_kept += tl.load(p_noise + ((b_offsets[:, None] + b_positions[None, :]) & (TABLE - 1)))
                b_kept = b_kept / temperature
                b_new = tl.maximum(b_perturbed_max, tl.max(b_kept, axis=1))
                b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_perturbed_sum = b_perturbed_sum * tl.exp(b_perturbed_max - b_shift)
                b_perturbed_sum += tl.sum(tl.exp(b_kept - b_shift[:, None]), axis=1)
                b_perturbed_max = b_new
            p_kept = p_scores + o_out[:, None] * count + o_n[None, :]
            tl.store(p_kept, b_kept, mask=m_m[:, None] & m_last[None, :])

        b_new = tl.maximum(b_max, tl.max(b_scores, axis=1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # nothing seen yet: no NaN from -inf - -inf
        b_weights = tl.exp(b_scores - b_shift[:, None])
        b_decay = tl.exp(b_max - b_shift)
        # [BLOCK_N, BLOCK_D]
        p_tile = p_value + b_slot[:, None] * stride_vn + o_d[None, :]
        b_value = tl.load(p_tile, mask=m_read[:, None] & m_d[None, :], other=0.0)
        b_acc = b_acc * b_decay[:, None]
        b_acc += tl.dot(b_weights.to(b_value.dtype), b_value, input_precision="ieee")
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
        b_max = b_new

    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    o_part = o_out * splits + i_split
    p_out = p_output + o_part[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_out, b_out.to(p_output.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(p_lse + o_part, b_max + tl.log(b_sum), mask=m_m)
    if p_perturbed_lse is not None:
        tl.store(p_perturbed_lse + o_part, b_perturbed_max + tl.log(b_perturbed_sum), mask=m_m)


@triton.jit
def merge_splits(
    p_parts, p_part_lse, row, splits, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One query head's output [BLOCK_D] and LSE: its splits' outputs weighed by their LSE."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    # [], [], [BLOCK_D]
    b_max = tl.full((), float("-inf"), tl.float32)
    b_sum = tl.zeros((), tl.float32)
    b_acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        # [BLOCK_S]
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < splits
        b_lse = tl.load(p_part_lse + row * splits + o_s, mask=m_s, other=float("-inf"))
        # [BLOCK_S, BLOCK_D]
        p_tile = p_parts + (row * splits + o_s)[:, None] * HEAD_DIM + o_d[None, :]
        b_parts = tl.load(p_tile, mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weights, b_decay = tl.exp(b_lse - b_shift), tl.exp(b_max - b_shift)
        b_acc = b_acc * b_decay + tl.sum(b_parts * b_weights[:, None], axis=0)
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=0)
        b_max = b_new
    return b_acc / tl.where(b_sum > 0, b_sum, 1.0), b_max + tl.log(b_sum)


@triton.jit
def lse_of_splits(p_part_lse, o_rows, m_rows, splits, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """The LSE of some rows, float32 [BLOCK_M], from those of their splits; 0 where it is -inf or not m_rows."""
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        # [BLOCK_M, BLOCK_S]
        o_s = start + tl.arange(0, BLOCK_S)
        m_tile = m_rows[:, None] & (o_s < splits)[None, :]
        b_lse = tl.load(p_part_lse + o_rows[:, None] * splits + o_s[None, :], mask=m_tile, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=1))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_lse - b_shift[:, None]), axis=1)
        b_max = b_new
    return tl.where(b_sum > 0, b_max + tl.log(b_sum), 0.0)  # a head without keys has scores of -inf only


@triton.jit(do_not_specialize=["splits", "count", "group", "merging"])
def finish_kernel(
    p_parts,
    p_part_lse,
    p_output,
    p_lse,
    p_scores,
    p_scores_lse,
    p_mass,
    splits,
    count,
    group,
    merging,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is left after the splits of a kv head: the merge of its query heads, and the weights of its keys, side by side.

    The first `merging` programs, none or `group`, merge a query head each: p_output [rows, head_dim], p_lse [rows]. Each of the
    others makes weights exp(score - LSE) of a tile of keys, unless p_scores is None: in the scores' place, or summed over the
    group in p_mass.

    p_part_lse [kv rows * group, splits], as p_scores_lse, which is that of the scores p_scores [kv rows * group, count];
    p_mass [kv rows, count].
    """
    i_program, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if i_program < merging:
        row = i_row * group + i_program
        b_out, lse = merge_splits(p_parts, p_part_lse, row, splits, HEAD_DIM, BLOCK_S, BLOCK_D)
        o_d = tl.arange(0, BLOCK_D)
        tl.store(p_output + row * HEAD_DIM + o_d, b_out.to(p_output.dtype.element_ty), mask=o_d < HEAD_DIM)
        tl.store(p_lse + row, lse)
    elif p_scores is not None:
        # [BLOCK_M], [BLOCK_N]
        o_m = tl.arange(0, BLOCK_M)
        o_n = (i_program - merging) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m, m_n = o_m < group, o_n < count
        o_rows = i_row * group + o_m
        b_lse = lse_of_splits(p_scores_lse, o_rows, m_m, splits, BLOCK_M, BLOCK_S)
        # [BLOCK_M, BLOCK_N]
        p_tile = p_scores + o_rows[:, None] * count + o_n[None, :]
        m_tile = m_m[:, None] & m_n[None, :]
        b_weights = tl.exp(tl.load(p_tile, mask=m_tile, other=float("-inf")) - b_lse[:, None])
        if p_mass is None:
            tl.store(p_tile, b_weights, mask=m_tile)
        else:
            tl.store(p_mass + i_row * count + o_n, tl.sum(b_weights, axis=0), mask=m_n)


def temperature_parts(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    """What kernels take of a temperature: the number, or the tensor [] where it lies on the device, float32."""
    return (1.0, temperature.float()) if isinstance(temperature, Tensor) else (float(temperature), None)


def moved_parts(
    moved: tuple[Tensor, Tensor | int] | None, dtype: torch.dtype
) -> tuple[Tensor | None, int, Tensor | None]:
    """What kernels take of `moved`: the second query, and for how many first slots, or the marks of those it is for."""
    if moved is None:
        return None, 0, None
    query, slots = moved[0].to(dtype).contiguous(), moved[1]
    if isinstance(slots, int):
        return query, slots, None
    return query, 0, slots if slots.stride(-1) == 1 else slots.contiguous()


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    index: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    moved: tuple[Tensor, Tensor | int] | None,
    perturbed: "tuple[Perturbation, Tensor, Tensor] | None",
    page_size: int,
    with_mass: bool,
    per_head: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `kvpress.kernels.decode_attention.decode_attention`, in two launches, or in one where one split is enough and no mass
    is wanted.

    The scores are kept for the weights, 4 bytes per query head and key: reading K again would be 2 * head_dim bytes per
    kv head and key.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    group, rows = heads // kv_heads, batch * kv_heads
    count = key.shape[2] if index is None else index.shape[2] * page_size
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    valid, index = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (valid, index))
    chosen = config(group, head_dim, key.element_size(), query.device, index is not None)
    splits, per_split = splits_of(count, rows, chosen.block_n, query.device)

    positions = offsets = noise = temperature = warmth = perturbed_lse = None
    if perturbed is not None and with_mass:
        perturbation, row, positions = perturbed
        positions = positions.to(torch.int32)
        positions = positions if positions.stride(-1) == 1 else positions.contiguous()
        temperature, warmth = temperature_parts(perturbation.temperature)
        perturbed_lse = query.new_empty(batch, heads, splits, dtype=torch.float32)
        if perturbation.seed is not None:
            at = row if perturbation.fresh else torch.zeros_like(row)
            offsets = gumbel_offsets(perturbation.layer, at, heads).to(torch.int32)
            noise = gumbel_table_on(perturbation.seed, query.device)

    other, first, marks = moved_parts(moved, query.dtype)
    output = query.new_empty(batch, heads, 1, head_dim)
    lse = query.new_empty(batch, heads, dtype=torch.float32)
    scores = mass = None
    if with_mass:
        scores = query.new_empty(batch, heads, count, dtype=torch.float32)
        if not per_head:
            mass = query.new_empty(batch, kv_heads, count, dtype=torch.float32)
    parts, part_lse = output, lse
    if splits > 1:
        parts = query.new_empty(batch * heads, splits, head_dim, dtype=torch.float32)
        part_lse = query.new_empty(batch * heads, splits, dtype=torch.float32)
    launch(
        attend_kernel,
        (rows, splits),
        query,
        key,
        value,
        index,
        valid,
        sinks,
        other,
        marks,
        positions,
        offsets,
        noise,
        warmth,
        parts,
        part_lse,
        scores,
        perturbed_lse,
        scale,
        softcap,
        temperature,
        count,
        per_split,
        key.shape[2],
        kv_heads,
        group,
        first,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        *((0, 0) if index is None else index.stride()[:2]),
        *((0, 0) if valid is None else valid.stride()[:2]),
        *((0, 0) if positions is None else positions.stride()[:2]),
        *((0, 0) if marks is None else marks.stride()[:2]),
        TABLE=TABLE,
        PAGE_SIZE=page_size,
        PER_HEAD=valid is not None and valid.shape[1] != kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        BLOCK_D=chosen.block_d,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    merging = group if splits > 1 else 0
    tile = weigh_blocks(group)
    weighing = 0 if scores is None else cdiv(count, tile["BLOCK_N"])
    if merging + weighing:
        launch(
            finish_kernel,
            (merging + weighing, rows),
            parts,
            part_lse,
            output,
            lse,
            scores,
            part_lse if perturbed_lse is None else perturbed_lse,
            mass,
            splits,
            count,
            group,
            merging,
            HEAD_DIM=head_dim,
            BLOCK_S=BLOCK_SPLITS,
            BLOCK_D=chosen.block_d,
            **tile,
        )
    return output, scores if per_head else mass, lse if with_lse else None
