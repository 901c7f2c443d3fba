"""Keep some entries of a slot cache, K, V and positions, in new buffers."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.gather_slots import gather_slots


def compact_slots_reference(
    keys: Tensor, values: Tensor, positions: Tensor, index: Tensor, chosen: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `compact_slots`, slot by slot."""
    shape = (*index.shape[:2], capacity)
    new_keys, new_values = keys.new_zeros(*shape, keys.shape[-1]), values.new_zeros(*shape, values.shape[-1])
    new_positions = positions.new_full(shape, -1)
    for b in range(index.shape[0]):
        for head in range(index.shape[1]):
            for place, slot in enumerate(index[b, head].tolist()):
                new_keys[b, head, place] = keys[b, head, slot]
                new_values[b, head, place] = values[b, head, slot]
                if chosen[b, head, place]:
                    new_positions[b, head, place] = positions[b, head, slot]
    return new_keys, new_values, new_positions


def compact_slots(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    index: Tensor,
    chosen: Tensor,
    capacity: int,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy the indexed slots to the front of fresh buffers; what is not chosen, and what is behind them, is empty.

    Args:
        keys, values: [batch, kv_heads, m, head_dim]; only the slot dimension may be strided.
        positions: int32 [batch, kv_heads, m].
        index: int64 [batch, kv_heads, k] with values in [0, m).
        chosen: bool [batch, kv_heads, k]; a slot that is not chosen is copied and gets position -1.
        capacity: number of slots of the result, at least k.
        out: the result's tensors, contiguous, to be written into (torch only); None to make them.
        backend: "triton" and "auto" on CUDA move all three in one launch of the Triton kernel.

    Returns:
        keys, values, positions with `capacity` slots; K and V are zero and positions -1 behind the first k.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, keys):
        from kvpress.kernels.gpu import gather_slots as gpu

        return gpu.compact_slots(keys, values, positions, index, chosen, capacity)
    k = index.shape[2]
    if out is None:
        new_keys, new_values = (gather_slots(x, index, capacity, backend="torch") for x in (keys, values))
        new_positions = positions.new_empty(*index.shape[:2], capacity)
    else:
        new_keys, new_values, new_positions = out
        for new, old in ((new_keys, keys), (new_values, values)):
            for row, source, target in zip(index.flatten(0, 1), old.flatten(0, 1), new.flatten(0, 1), strict=True):
                torch.index_select(source, 0, row, out=target[:k])
    new_keys[:, :, k:].zero_()
    new_values[:, :, k:].zero_()
    new_positions[:, :, k:] = -1
    new_positions[:, :, :k] = positions.gather(2, index).masked_fill_(~chosen, -1)
    return new_keys, new_values, new_positions
