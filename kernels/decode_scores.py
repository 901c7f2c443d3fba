"""Scaled q.k of one new token per sequence: what decode attention makes its softmax of, and what a selection ranks."""

import torch
from einops import repeat
from torch import Tensor

# Keys converted to float32 at a time, in numbers (16 MiB).
TILE_KEYS = 1 << 22


def decode_scores_reference(
    query: Tensor, key: Tensor, *, scale: float, moved: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The definition of `decode_scores`, in plain float32 with K repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    keys = repeat(key.float(), "b h n d -> b (h g) n d", g=group)
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if moved is not None:
        other = moved[0].float() @ keys.transpose(-1, -2) * scale
        scores = torch.where(moved[1].repeat_interleave(group, dim=1)[:, :, None], other, scores)
    return scores[:, :, 0]


def decode_scores(query: Tensor, key: Tensor, *, scale: float, moved: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Scores of one query row per head over every slot, in float32 (a bfloat16 score of 30 is off by 0.1).

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key: [batch, kv_heads, slots, head_dim]; only the slot dimension may be strided.
        scale: factor on q.k, from the model.
        moved: (query, slots): a second query [batch, heads, 1, head_dim] that is used instead on the slots where the
            bool [batch, kv_heads, slots] is True (re-indexed positions).

    Returns:
        float32 [batch, heads, slots].
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group, keys = heads // kv_heads, key.flatten(0, 1)
    rows = query.reshape(batch * kv_heads, group, head_dim)
    if moved is None:
        return _products(rows, keys, scale).view(batch, heads, slots)
    # Both queries side by side, so that K is read once.
    moved_rows = moved[0].reshape(batch * kv_heads, group, head_dim)
    both = _products(torch.cat((rows, moved_rows), dim=1), keys, scale).view(batch, kv_heads, 2, group, slots)
    return torch.where(moved[1][:, :, None], both[:, :, 1], both[:, :, 0]).view(batch, heads, slots)


def _products(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled q.k in float32: [batch * kv_heads, rows, slots]."""
    rows = rows.float() * scale
    tile = max(1, TILE_KEYS // (keys.shape[0] * keys.shape[2]))
    if keys.dtype == torch.float32 or keys.shape[1] <= tile:
        return torch.bmm(rows, keys.float().transpose(1, 2))
    return torch.cat([torch.bmm(rows, part.float().transpose(1, 2)) for part in keys.split(tile, dim=1)], dim=-1)
