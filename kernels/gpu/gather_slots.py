"""Triton kernel of `kvpress.kernels.gather_slots` and `kvpress.kernels.compact_slots`: rows to the front of new buffers.

Numbers are moved, not computed with: tensors are looked at as integers of their width, so every dtype takes the same kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.kernels.gpu.launch import cdiv, launch, power_of_two

NUM_WARPS = 4
TILE = 4096  # numbers per tile
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def blocks(width: int) -> tuple[int, int]:
    """Rows per program and numbers of a row per step, for rows of that many numbers."""
    block_d = min(256, power_of_two(width))
    return max(1, min(256, TILE // block_d)), block_d


@triton.jit
def copy_rows(p_source, p_target, b_slot, m_slot, o_k, m_k, stride_m, width, BLOCK_D: tl.constexpr):
    """Rows at b_slot [BLOCK_K] of one head to rows o_k; 0 where not m_slot."""
    for start in range(0, width, BLOCK_D):
        # [BLOCK_K, BLOCK_D]
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d[None, :] < width
        b_row = tl.load(p_source + b_slot[:, None] * stride_m + o_d[None, :], mask=m_slot[:, None] & m_d, other=0)
        tl.store(p_target + o_k[:, None] * width + o_d[None, :], b_row, mask=m_k[:, None] & m_d)


# The number of slots changes in decode and is never compiled in, nor are strides that change with it; those of K and V are
# multiples of the head dimension, which has to be known for wide loads.
@triton.jit(
    do_not_specialize=["k", "capacity", "kv_heads", "stride_pb", "stride_ph", "stride_ib", "stride_ih", "stride_cb",
                       "stride_ch"]
)  # fmt: skip
def gather_kernel(
    p_key,
    p_value,
    p_positions,
    p_index,
    p_chosen,
    p_new_key,
    p_new_value,
    p_new_positions,
    k,
    capacity,
    kv_heads,
    key_width,
    value_width,
    stride_kb,
    stride_kh,
    stride_km,
    stride_vb,
    stride_vh,
    stride_vm,
    stride_pb,
    stride_ph,
    stride_ib,
    stride_ih,
    stride_cb,
    stride_ch,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of the new slots of one kv head: rows of key, and of value and positions unless they are None.

    Slots from k on are filled with zeros, positions there and where p_chosen is False with -1.
    """
    i_row = tl.program_id(1).to(tl.int64)
    i_batch, i_head = i_row // kv_heads, i_row % kv_heads
    # [BLOCK_K]
    o_k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    m_k, m_slot = o_k < capacity, o_k < k
    b_slot = tl.load(p_index + i_batch * stride_ib + i_head * stride_ih + o_k, mask=m_slot, other=0).to(tl.int64)
    p_key += i_batch * stride_kb + i_head * stride_kh
    p_new_key += i_row * capacity * key_width
    copy_rows(p_key, p_new_key, b_slot, m_slot, o_k, m_k, stride_km, key_width, BLOCK_D)
    if p_value is not None:
        p_value += i_batch * stride_vb + i_head * stride_vh
        p_new_value += i_row * capacity * value_width
        copy_rows(p_value, p_new_value, b_slot, m_slot, o_k, m_k, stride_vm, value_width, BLOCK_D)
    if p_positions is not None:
        m_slot = tl.load(p_chosen + i_batch * stride_cb + i_head * stride_ch + o_k, mask=m_slot, other=0) != 0
        p_held = p_positions + i_batch * stride_pb + i_head * stride_ph + b_slot
        tl.store(p_new_positions + i_row * capacity + o_k, tl.load(p_held, mask=m_slot, other=-1), mask=m_k)


def _plain(tensor: Tensor) -> Tensor:
    """As integers, a slot's numbers next to each other: [batch, kv_heads, m, width]."""
    if tensor.ndim == 3:
        tensor = tensor[..., None]
    elif tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor.view(INTEGERS[tensor.element_size()])


def _launch(
    keys: Tensor,
    values: Tensor | None,
    positions: Tensor | None,
    index: Tensor,
    chosen: Tensor | None,
    new: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    batch, kv_heads, k = index.shape
    capacity = new[0].shape[2]
    if not new[0].numel():
        return
    keys, values = _plain(keys), None if values is None else _plain(values)
    index = index if index.stride(-1) == 1 else index.contiguous()
    positions, chosen = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (positions, chosen))
    block_k, block_d = blocks(keys.shape[-1])
    launch(
        gather_kernel,
        (cdiv(capacity, block_k), batch * kv_heads),
        keys,
        values,
        positions,
        index,
        chosen,
        *(None if x is None else x.view(INTEGERS[x.element_size()]) for x in new),
        k,
        capacity,
        kv_heads,
        keys.shape[-1],
        0 if values is None else values.shape[-1],
        *keys.stride()[:3],
        *((0, 0, 0) if values is None else values.stride()[:3]),
        *((0, 0) if positions is None else positions.stride()[:2]),
        *index.stride()[:2],
        *((0, 0) if chosen is None else chosen.stride()[:2]),
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
    )


def gather_slots(slots: Tensor, index: Tensor, capacity: int) -> Tensor:
    """As `kvpress.kernels.gather_slots.gather_slots`; the slots past k are zero."""
    result = slots.new_empty(*index.shape[:2], capacity, *slots.shape[3:])
    _launch(slots, None, None, index, None, (result, None, None))
    return result


def compact_slots(
    keys: Tensor, values: Tensor, positions: Tensor, index: Tensor, chosen: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kvpress.kernels.compact_slots.compact_slots`, in one launch."""
    shape = (*index.shape[:2], capacity)
    new = keys.new_empty(*shape, keys.shape[-1]), values.new_empty(*shape, values.shape[-1]), positions.new_empty(shape)
    _launch(keys, values, positions, index, chosen, new)
    return new
