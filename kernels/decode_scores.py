"""Scaled q.k of one new token per sequence: what decode attention makes its softmax of, and what a selection ranks."""

from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton

# Keys converted to float32 at a time, in numbers (16 MiB).
TILE_KEYS = 1 << 22


Moved = Sequence[tuple[Tensor, Tensor | int]]
"""Other queries, each for some of the slots: (query, the bool of those slots, or how many of the first). The later wins."""


def decode_scores_reference(query: Tensor, key: Tensor, *, scale: float, moved: Moved = ()) -> Tensor:
    """The definition of `decode_scores`, in plain float32 with K repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    keys = repeat(key.float(), "b h n d -> b (h g) n d", g=group)
    scores = query.float() @ keys.transpose(-1, -2) * scale
    for other, slots in moved:
        wide = marked(slots, key).repeat_interleave(group, dim=1)[:, :, None]
        scores = torch.where(wide, other.float() @ keys.transpose(-1, -2) * scale, scores)
    return scores[:, :, 0]


def decode_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    moved: Moved = (),
    backend: Backend = "auto",
) -> Tensor:
    """Scores of one query row per head over every slot, in float32 (a bfloat16 score of 30 is off by 0.1).

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key: [batch, kv_heads, slots, head_dim]; only the slot dimension may be strided.
        scale: factor on q.k, from the model.
        moved: (query, slots) each: another query [batch, heads, 1, head_dim] that is used instead on the slots where the
            bool [batch, kv_heads, slots] is True, or on the first so many (re-indexed positions); the later wins.
        backend: "triton" and "auto" on CUDA run the Triton kernel.

    Returns:
        float32 [batch, heads, slots].

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import decode_scores as gpu

        scores = gpu.decode_scores(query, key, scale=scale, moved=moved[0] if moved else None)[0]
        for other, slots in moved[1:]:
            wide = marked(slots, key).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = torch.where(wide, gpu.decode_scores(other, key, scale=scale, moved=None)[0], scores)
        return scores
    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group, keys = heads // kv_heads, key.flatten(0, 1)
    rows = [one.reshape(batch * kv_heads, group, head_dim) for one in (query, *(other for other, _ in moved))]
    if not moved:
        return _products(rows[0], keys, scale).view(batch, heads, slots)
    if (firsts := nested([slots for _, slots in moved], slots)) is not None:
        scores = torch.empty(batch * kv_heads, group, slots, dtype=torch.float32, device=key.device)
        for one, (start, stop) in zip(rows, firsts, strict=True):
            scores[..., start:stop] = _products(one, keys[:, start:stop], scale)
        return scores.view(batch, heads, slots)
    # All queries side by side, so that K is read once.
    every = _products(torch.cat(rows, dim=1), keys, scale).view(batch, kv_heads, len(rows), group, slots)
    scores = every[:, :, 0]
    for number, (_, chosen) in enumerate(moved, 1):
        scores = torch.where(marked(chosen, key)[:, :, None], every[:, :, number], scores)
    return scores.reshape(batch, heads, slots)


def marked(slots: Tensor | int, key: Tensor) -> Tensor:
    """The slots of one of `Moved` as bool [batch, kv_heads, n], for keys [batch, kv_heads, n, head_dim]."""
    if isinstance(slots, Tensor):
        return slots
    return (torch.arange(key.shape[2], device=key.device) < slots).expand(key.shape[:3])


def nested(firsts: Sequence[Tensor | int], slots: int) -> list[tuple[int, int]] | None:
    """The range (start, stop) of slots that each query reads, the plain one's first; None unless all are first so many.

    Args:
        firsts: how many first slots each other query is for.
        slots: that there are.
    """
    ranges, stop = [], slots
    for first in firsts:
        if not isinstance(first, int):
            return None
        first = min(first, slots)
        if first > stop:
            return None
        ranges.append((first, stop))
        stop = first
    return [*ranges, (0, stop)]


def _products(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled q.k in float32: [batch * kv_heads, rows, slots]."""
    rows = rows.float() * scale
    tile = max(1, TILE_KEYS // (keys.shape[0] * keys.shape[2]))
    if keys.dtype == torch.float32 or keys.shape[1] <= tile:
        return torch.bmm(rows, keys.float().transpose(1, 2))
    return torch.cat([torch.bmm(rows, part.float().transpose(1, 2)) for part in keys.split(tile, dim=1)], dim=-1)
