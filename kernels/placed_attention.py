"""Attention of rows at any positions, in the midst of the entries and not at their end."""

import torch
from einops import repeat
from torch import Tensor

# Scores of one tile of rows, in float32 numbers (16 MiB).
TILE_SCORES = 1 << 22
# And its rows at most.
TILE_ROWS = 64


def placed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    at: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition of `placed_attention`, in plain float32 with the q x n matrix."""
    group = query.shape[1] // key.shape[1]
    keys, values = (repeat(x.float(), "b h n d -> b (h g) n d", g=group) for x in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(positions > at[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    return (scores.softmax(dim=-1)[..., : len(positions)] @ values).to(query.dtype)


def placed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    at: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q rows over n entries, each row over the entries at its own position and before.

    Args:
        query: [batch, heads, q, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key, value: [batch, kv_heads, n, head_dim], in the order of their positions.
        at: int [q], the positions of the rows, ascending; each is the position of an entry.
        positions: int [n], the positions of the entries, ascending.
        scale, softcap, sinks: as in `prompt_attention`.

    Returns:
        [batch, heads, q, head_dim] in the dtype of `query`.
    """
    batch, heads, rows, _ = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    group = heads // kv_heads
    ends = torch.searchsorted(positions, at, right=True)  # a row sees so many of the first entries
    places = torch.arange(entries, device=query.device)
    output = torch.empty(batch, kv_heads, group, rows, value.shape[-1], dtype=query.dtype, device=query.device)
    grouped = query.unflatten(1, (kv_heads, group))
    column = None if sinks is None else sinks.float().view(1, kv_heads, group, 1, 1)
    tile = max(1, min(TILE_ROWS, TILE_SCORES // (batch * heads * entries)))
    for start in range(0, rows, tile):
        own = grouped[:, :, :, start : start + tile].float()
        own_ends = ends[start : start + tile]
        seen = int(own_ends[-1])  # rows are in order: the last one of the tile sees most
        count = own.shape[3]
        scores = own.flatten(2, 3) @ key[:, :, :seen].float().transpose(2, 3)
        scores = scores.mul_(scale).unflatten(2, (group, count))
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(places[:seen] >= own_ends[:, None], float("-inf"))
        if column is not None:
            scores = torch.cat((scores, column.expand(batch, -1, -1, count, 1)), dim=-1)
        weights = scores.softmax(dim=-1)[..., :seen].flatten(2, 3)
        part = weights @ value[:, :, :seen].float()
        output[:, :, :, start : start + tile] = part.unflatten(2, (group, count)).to(query.dtype)
    return output.flatten(1, 2)
