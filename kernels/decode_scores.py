"""Scaled q.k of one new token per sequence: what decode attention makes its softmax of, and what a selection ranks."""

import torch
from einops import repeat
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton

# Keys converted to float32 at a time, in numbers (16 MiB).
TILE_KEYS = 1 << 22


def decode_scores_reference(
    query: Tensor, key: Tensor, *, scale: float, moved: tuple[Tensor, Tensor | int] | None = None
) -> Tensor:
    """The definition of `decode_scores`, in plain float32 with K repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    keys = repeat(key.float(), "b h n d -> b (h g) n d", g=group)
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if moved is not None:
        other = moved[0].float() @ keys.transpose(-1, -2) * scale
        slots = moved[1]
        if isinstance(slots, int):
            slots = (torch.arange(key.shape[2], device=key.device) < slots).expand(key.shape[:3])
        scores = torch.where(slots.repeat_interleave(group, dim=1)[:, :, None], other, scores)
    return scores[:, :, 0]


def decode_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    moved: tuple[Tensor, Tensor | int] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Scores of one query row per head over every slot, in float32 (a bfloat16 score of 30 is off by 0.1).

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key: [batch, kv_heads, slots, head_dim]; only the slot dimension may be strided.
        scale: factor on q.k, from the model.
        moved: (query, slots): a second query [batch, heads, 1, head_dim] that is used instead on the slots where the
            bool [batch, kv_heads, slots] is True, or on the first so many (re-indexed positions).
        backend: "triton" and "auto" on CUDA run the Triton kernel.

    Returns:
        float32 [batch, heads, slots].

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import decode_scores as gpu

        return gpu.decode_scores(query, key, scale=scale, moved=moved)[0]
    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group, keys = heads // kv_heads, key.flatten(0, 1)
    rows = query.reshape(batch * kv_heads, group, head_dim)
    if moved is None:
        return _products(rows, keys, scale).view(batch, heads, slots)
    moved_rows = moved[0].reshape(batch * kv_heads, group, head_dim)
    if isinstance(moved[1], int):
        scores = _products(rows, keys, scale)
        scores[..., : moved[1]] = _products(moved_rows, keys[:, : moved[1]], scale)
        return scores.view(batch, heads, slots)
    # Both queries side by side, so that K is read once.
    both = _products(torch.cat((rows, moved_rows), dim=1), keys, scale).view(batch, kv_heads, 2, group, slots)
    return torch.where(moved[1][:, :, None], both[:, :, 1], both[:, :, 0]).view(batch, heads, slots)


def _products(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled q.k in float32: [batch * kv_heads, rows, slots]."""
    rows = rows.float() * scale
    tile = max(1, TILE_KEYS // (keys.shape[0] * keys.shape[2]))
    if keys.dtype == torch.float32 or keys.shape[1] <= tile:
        return torch.bmm(rows, keys.float().transpose(1, 2))
    return torch.cat([torch.bmm(rows, part.float().transpose(1, 2)) for part in keys.split(tile, dim=1)], dim=-1)
