"""Pick entries of a slot cache by index: the one data movement of eviction after a prompt."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def gather_slots(slots: Tensor, index: Tensor, capacity: int | None = None, *, backend: Backend = "auto") -> Tensor:
    """Copy the indexed slots to the front of a fresh buffer.

    Args:
        slots: [batch, kv_heads, m] or [batch, kv_heads, m, head_dim]; only the slot dimension may be strided.
        index: int64 [batch, kv_heads, k] with values in [0, m).
        capacity: number of slots of the result, at least k (default k). Slots past k are uninitialised.
        backend: "triton" and "auto" on CUDA run the Triton kernel.

    Returns:
        [batch, kv_heads, capacity, ...] of the dtype of `slots`.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    batch, kv_heads, k = index.shape
    capacity = k if capacity is None else capacity
    if use_triton(backend, slots):
        from kvpress.kernels.gpu import gather_slots as gpu

        return gpu.gather_slots(slots, index, capacity)
    trailing = slots.shape[3:]
    flat = slots.reshape(batch * kv_heads * slots.shape[2], *trailing) if slots.is_contiguous() else None
    result = slots.new_empty(batch, kv_heads, capacity, *trailing)
    if flat is not None and capacity == k:
        torch.index_select(flat, 0, _flat_index(index, slots.shape[2]), out=result.view(-1, *trailing))
        return result
    for row, source, target in zip(
        index.flatten(0, 1), slots.flatten(0, 1), result.flatten(0, 1), strict=True
    ):  # a strided or padded buffer: one flat gather per kv head, never an expanded index
        target[:k] = source.index_select(0, row)
    return result


def gather_both(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """`gather_slots` of K and of V, [batch, kv_heads, m, head_dim] each, by the same index; it is prepared once."""
    if key.is_cuda or not (key.is_contiguous() and value.is_contiguous()):
        return gather_slots(key, index), gather_slots(value, index)
    rows = _flat_index(index, key.shape[2])
    new_key, new_value = (x.view(-1, x.shape[-1]).index_select(0, rows) for x in (key, value))
    return new_key.view(*index.shape, -1), new_value.view(*index.shape, -1)


def _flat_index(index: Tensor, slots: int) -> Tensor:
    """The index into [batch * kv_heads * slots, ...], flat."""
    batch, kv_heads, _ = index.shape
    starts = torch.arange(0, batch * kv_heads * slots, slots, device=index.device).view(batch, kv_heads, 1)
    return (starts + index).flatten()
