"""Write one new entry per kv head into a slot of a cache: a freed one, or the next."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def write_slot_reference(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    stats: list[Tensor],
    slot: Tensor | int,
    key: Tensor,
    value: Tensor,
    position: Tensor,
) -> None:
    """The definition of `write_slot`, head by head."""
    batch, kv_heads = positions.shape[:2]
    for b in range(batch):
        for head in range(kv_heads):
            at = slot if isinstance(slot, int) else int(slot.expand(batch, kv_heads)[b, head])
            keys[b, head, at] = key[b, head, 0]
            values[b, head, at] = value[b, head, 0]
            positions[b, head, at] = position.flatten()[b if position.numel() > 1 else 0]
            for stat in stats:
                stat[b, head, ..., at] = 0


def write_slot(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    stats: list[Tensor],
    slot: Tensor | int,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    backend: Backend = "auto",
) -> None:
    """Store an entry per sequence and kv head, in place; its statistics begin at 0. Nothing waits for the device.

    Args:
        keys, values: [batch, kv_heads, capacity, head_dim], each with a head dimension of its own.
        positions: int32 [batch, kv_heads, capacity].
        stats: tensors [batch, kv_heads, ..., capacity] that go with the entries.
        slot: where the entry goes, in [0, capacity): a number for all, or int [batch, kv_heads] (or what expands to that) on the
            device, as `evict_slot` returns it.
        key, value: [batch, kv_heads, 1, head_dim], in the dtype of `keys` and of `values`.
        position: int [batch] or [batch, 1], or [1] or [1, 1] for all sequences.
        backend: "triton" and "auto" on CUDA do it in one launch of the Triton kernel, and one for each statistic but the first.

    Raises:
        ValueError: the backend does not exist, or cannot run here; a number that is no slot; other dtypes than the cache's.
    """
    batch, kv_heads, capacity = positions.shape
    if isinstance(slot, int) and not 0 <= slot < capacity:
        raise ValueError(f"slot={slot} is none of the {capacity} slots; give 0 to {capacity - 1}, or make room first")
    if (key.dtype, value.dtype) != (keys.dtype, values.dtype):
        raise ValueError(
            f"key and value are {key.dtype} and {value.dtype}, and the cache's are {keys.dtype} and {values.dtype}; convert them"
        )
    if use_triton(backend, keys):
        from kvpress.kernels.gpu import write_slot as gpu

        gpu.write_slot(keys, values, positions, stats, slot, key, value, position)
        return
    position = position.reshape(-1, 1)
    if isinstance(slot, int):
        keys.narrow(2, slot, 1).copy_(key)
        values.narrow(2, slot, 1).copy_(value)
        positions.select(2, slot).copy_(position)
        for stat in stats:
            stat[..., slot] = 0
        return
    at = slot.long().expand(batch, kv_heads)
    rows = (torch.arange(batch * kv_heads, device=at.device) * capacity).add_(at.flatten())
    for held, new in ((keys, key), (values, value)):
        if held.is_contiguous():
            held.view(-1, held.shape[-1]).index_copy_(0, rows, new.reshape(batch * kv_heads, -1))
        else:
            held.scatter_(2, at[:, :, None, None].expand(-1, -1, 1, held.shape[-1]), new)
    positions.scatter_(2, at[..., None], position[..., None].to(positions.dtype).expand(batch, kv_heads, 1))
    for stat in stats:
        where = at.view(batch, kv_heads, *(1,) * (stat.ndim - 2)).expand(*stat.shape[:-1], 1)
        stat.scatter_(-1, where, 0)
