"""Attention of one new token per sequence over a slot cache, grouped so that K and V are read once per kv head."""

import torch
from einops import reduce, repeat
from torch import Tensor

# Keys converted to float32 at a time, in numbers (16 MiB).
TILE_KEYS = 1 << 22


def decode_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `decode_attention`, in plain float32 with K and V repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    keys, values = (repeat(x.float(), "b h n d -> b (h g) n d", g=group) for x in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if moved is not None:
        other = moved[0].float() @ keys.transpose(-1, -2) * scale
        scores = torch.where(moved[1].repeat_interleave(group, dim=1)[:, :, None], other, scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if valid is not None:
        wide = valid.repeat_interleave(query.shape[1] // valid.shape[1], dim=1)
        scores = scores.masked_fill(~wide[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(query.shape[0], -1, 1, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num()[..., : key.shape[2]]
    mass = reduce(weights, "b (h g) 1 n -> b h n", "sum", g=group)
    return (weights @ values).to(query.dtype), mass


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: tuple[Tensor, Tensor] | None = None,
    with_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of one query row per head over every valid slot.

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key, value: [batch, kv_heads, slots, head_dim], in any order of slots; only the slot dimension may be strided.
        valid: bool [batch, kv_heads, slots], False for an empty slot, or [batch, heads, slots], False for what a query head
            does not read; None when every head reads every slot.
        scale: factor on q.k, from the model.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores, for models that have it.
        sinks: [heads], one logit per head that takes part in the softmax and has no value (gpt-oss).
        moved: (query, slots): a second query [batch, heads, 1, head_dim] that is used instead on the slots where the
            bool [batch, kv_heads, slots] is True (re-indexed positions).
        with_mass: also return the attention weights, summed over the group.

    Returns:
        output: [batch, heads, 1, head_dim] in the dtype of `query`.
        mass: float32 [batch, kv_heads, slots] or None. Sums to the group size over the slots (less with sinks).
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = query.reshape(batch * kv_heads, group, head_dim)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    plain = not with_mass and softcap is None and sinks is None and moved is None
    if plain and (query.is_cuda or query.dtype == torch.float32):  # torch's CPU kernel is slow on half-precision rows
        mask = None
        if valid is not None:
            mask = torch.zeros(valid.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill_(~valid, float("-inf")).view(batch * kv_heads, 1, -1, slots)
        output = torch.nn.functional.scaled_dot_product_attention(
            rows[:, None], keys[:, None], values[:, None], attn_mask=mask, scale=scale
        )
        return output.reshape(batch, heads, 1, head_dim), None

    if moved is None:
        scores = _scores(rows, keys, scale).view(batch, kv_heads, group, slots)
    else:  # both queries side by side, so that K is read once
        moved_rows = moved[0].reshape(batch * kv_heads, group, head_dim)
        both = _scores(torch.cat((rows, moved_rows), dim=1), keys, scale).view(batch, kv_heads, 2, group, slots)
        scores = torch.where(moved[1][:, :, None], both[:, :, 1], both[:, :, 0])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if valid is not None:
        valid = valid.view(batch, kv_heads, -1, slots)
        # The lowest finite number instead of -inf: a sequence with no entry at all gives zeros, not NaN.
        scores = scores.masked_fill(~valid, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, group, 1).expand(batch, -1, -1, -1)
        weights = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :slots]
    else:
        weights = scores.softmax(dim=-1)
    if valid is not None:
        weights = weights.masked_fill(~valid, 0.0)
    output = torch.bmm(weights.view(batch * kv_heads, group, slots).to(values.dtype), values)
    return output.view(batch, heads, 1, head_dim), weights.sum(2) if with_mass else None


def _scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Scaled q.k in float32 (a bfloat16 score of 30 is off by 0.1): [batch * kv_heads, rows, slots]."""
    rows = rows.float() * scale
    tile = max(1, TILE_KEYS // (keys.shape[0] * keys.shape[2]))
    if keys.dtype == torch.float32 or keys.shape[1] <= tile:
        return torch.bmm(rows, keys.float().transpose(1, 2))
    return torch.cat([torch.bmm(rows, part.float().transpose(1, 2)) for part in keys.split(tile, dim=1)], dim=-1)
