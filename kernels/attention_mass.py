"""Attention mass: column sums of the softmax weights of a few query rows, without their outputs."""

import torch
from torch import Tensor

# Scores of one tile of rows, in float32 numbers (16 MiB).
TILE_SCORES = 1 << 22


def attention_mass_reference(
    query: Tensor,
    row_positions: Tensor,
    key: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition of `attention_mass`, one row at a time in plain float32."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    mass = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    for b in range(batch):
        for head in range(heads):
            held = positions[b, head // group]
            for row in range(rows):
                visible = (held >= 0) & (held <= row_positions[b, row])
                if row_positions[b, row] < 0 or not visible.any():
                    continue
                scores = key[b, head // group].float() @ query[b, head, row].float() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores.masked_fill(~visible, float("-inf"))
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].float()))
                mass[b, head // group] += scores.softmax(-1)[: held.shape[0]]
    return mass


def attention_mass(
    query: Tensor,
    row_positions: Tensor,
    key: Tensor,
    positions: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax weight that each entry gets from the given rows, summed over the rows and over the group.

    Args:
        query: [batch, heads, rows, head_dim]; query head h reads kv head h // (heads / kv_heads).
        row_positions: int [batch, rows], the position of each row; a row at -1 is padding and adds nothing.
        key: [batch, kv_heads, n, head_dim]; only the entry dimension may be strided.
        positions: int [batch, kv_heads, n]; -1 for an empty slot. A row sees the entries at its position and before.
        scale, softcap, sinks: as in `decode_attention`.

    Returns:
        float32 [batch, kv_heads, n]. Sums to (real rows) * group over the entries (less with sinks).
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    group = heads // kv_heads
    keys = key.flatten(0, 1).float().transpose(1, 2)
    grouped = query.reshape(batch, kv_heads, group, rows, head_dim)
    lowest = torch.finfo(torch.float32).min
    mass = torch.zeros(batch, kv_heads, entries, dtype=torch.float32, device=key.device)
    tile = max(1, TILE_SCORES // (batch * heads * entries))
    for start in range(0, rows, tile):
        tile_rows = grouped[:, :, :, start : start + tile].float() * scale
        count = tile_rows.shape[3]
        scores = torch.bmm(tile_rows.reshape(batch * kv_heads, group * count, head_dim), keys)
        scores = scores.view(batch, kv_heads, group, count, entries)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        at = row_positions[:, None, start : start + tile, None]
        hidden = (positions[:, :, None] > at) | (positions[:, :, None] < 0)
        scores = scores.masked_fill_(hidden[:, :, None], lowest)
        if sinks is not None:
            column = sinks.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, count, 1)
            weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :entries]
        else:
            weights = scores.softmax(dim=-1)
        weights = weights.masked_fill_((hidden | (at < 0))[:, :, None], 0.0)
        mass += weights.sum(dim=(2, 3))
    return mass
