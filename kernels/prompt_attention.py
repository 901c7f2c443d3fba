"""Exact attention of a prompt pass: q new tokens over what the cache held before and over themselves, causally.

Two ways to the same result, neither with a q x n matrix:

- parts: the entries held before and the new tokens are attended separately by PyTorch's flash kernel and merged by their
  log-sum-exp (LSE). The first part needs no causal mask (all of it is older), the second is an ordinary square causal attention.
- tiles: a tile of query rows sees its whole row of scores at once. Costs more, and gives the attention mass of every
  entry (the column sums that H2O accumulates) from the same scores.

On CUDA flash-attn takes the cases that it has, where it is installed; the attention mass is made from the LSE by
`attention_mass`, and tiles are for what no flash kernel there takes: float32, masks, second queries, and a softcap without
flash-attn.
"""

import torch
from einops import reduce, repeat
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.backend import use_flash_attn, use_torch_flash
from kvpress.kernels.decode_scores import Moved, marked, nested
from kvpress.kernels.exponentials import logsumexp

# Scores of one tile of query rows, in float32 numbers: 4 Mi numbers are 16 MiB, near the size of a last-level cache.
TILE_SCORES = 1 << 22
# And its rows at most: the scores of more rows at 1k to 4k entries leave the caches, and take a fifth to a third longer.
TILE_ROWS = 64
# oneDNN, which multiplies lower precisions on a CPU, keeps a third of a MiB or more for every shape that it has met, up to
# 1024 of them: there a tile's entries are rounded up to a multiple of this.
TILE_STEP = 512


def prompt_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: Moved = (),
) -> tuple[Tensor, Tensor]:
    """The definition of `prompt_attention`, in plain float32 with the q x n matrix."""
    group = query.shape[1] // key.shape[1]
    rows, entries = query.shape[2], key.shape[2]
    past = entries - rows
    keys, values = (repeat(x.float(), "b h n d -> b (h g) n d", g=group) for x in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    for other, slots in moved:
        shifted = functional.pad(marked(slots, key[:, :, :past]), (0, rows)).repeat_interleave(group, dim=1)
        scores = torch.where(shifted[:, :, None], other.float() @ keys.transpose(-1, -2) * scale, scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(rows, entries, dtype=torch.bool, device=query.device).tril(past)
    if valid is not None:
        visible = visible & functional.pad(valid, (0, rows), value=True).repeat_interleave(group, dim=1)[:, :, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., :entries]
    mass = reduce(weights, "b (h g) q n -> b h n", "sum", g=group)
    return (weights @ values).to(query.dtype), mass


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: Moved = (),
    with_mass: bool = False,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Causal attention of the last q of n entries over all n.

    Args:
        query: [batch, heads, q, head_dim], the new tokens; query head h reads kv head h // (heads / kv_heads).
        key, value: [batch, kv_heads, n, head_dim]: n - q entries held before, in any order, all older than the new
            tokens, then the q new ones in order. Only the entry dimension may be strided.
        valid: bool [batch, kv_heads, n - q], False for an empty slot among the older ones; None when none is empty.
        scale: factor on q.k, from the model.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores.
        sinks: [heads], one logit per head that takes part in the softmax and has no value (gpt-oss).
        moved: (query, slots) each: another query of the shape of `query` that is used instead on the older entries where
            the bool [batch, kv_heads, n - q] is True, or on the first so many (re-indexed positions); the later wins.
        with_mass: also return the attention weights, summed over the rows and over the group.
        with_lse: also return the logarithm of each row's softmax denominator.

    Returns:
        output: [batch, heads, q, head_dim] in the dtype of `query`.
        mass: float32 [batch, kv_heads, n] or None. Sums to q times the group size over the entries (less with sinks).
        lse: float32 [batch, heads, q] or None: the natural logarithm of the summed exp of all scores and the sink.
    """
    past = key.shape[2] - query.shape[2]
    lse: Tensor | None
    plain = past == 0 or (valid is None and not moved)
    in_ranges = past == 0 or (valid is None and nested([slots for _, slots in moved], past) is not None)
    if plain and sinks is None and use_flash_attn(query, value):
        output, lse = _flash(query, key, value, scale, softcap)
    elif past == 0 and softcap is None and sinks is None and not with_mass and not with_lse:
        return _causal(query, key, value, scale), None, None
    elif softcap is None and _flash_takes_parts(query, value, plain if with_mass else in_ranges, with_mass):
        output, lse = _in_parts(query, key, value, valid, scale, sinks, moved)
    else:
        output, tiles_mass, lse = _in_tiles(query, key, value, valid, scale, softcap, sinks, moved, with_lse)
        return output, tiles_mass if with_mass else None, lse
    mass: Tensor | None = None
    if with_mass:
        at = torch.arange(past, key.shape[2], dtype=torch.int32, device=query.device).expand(query.shape[0], -1)
        # Older entries are in any order, but each row sees all of them: as if they were in order.
        mass = attention_mass(query, at, key, None, scale=scale, softcap=softcap, lse=lse)
    return output, mass, lse if with_lse else None


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Its layout is [batch, rows, heads, head_dim]; of more entries than rows it takes the rows for the last ones."""
    from flash_attn import flash_attn_func

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    capped = 0.0 if softcap is None else softcap
    output, lse, _ = flash_attn_func(
        query, key, value, softmax_scale=scale, causal=True, softcap=capped, return_attn_probs=True
    )
    return output.transpose(1, 2), lse


def _flash_takes_parts(query: Tensor, value: Tensor, unmasked: bool, with_mass: bool) -> bool:
    """Whether parts are attended by PyTorch's flash kernel. On a CPU the mass costs less in tiles, which have the scores."""
    if query.device.type == "cpu":
        return not with_mass
    return unmasked and use_torch_flash(query, value)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rows = query.flatten(0, 1).unflatten(0, (-1, query.shape[1] // key.shape[1]))
    # Each kv head is one "batch" whose G heads share K and V through a stride of zero: nothing is repeated in memory.
    keys, values = (x.flatten(0, 1)[:, None].expand(-1, rows.shape[1], -1, -1) for x in (key, value))
    output = functional.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=scale)
    # The one copy makes the layout that the model goes on with, [batch, rows, heads, head_dim].
    output = output.unflatten(0, (query.shape[0], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return output.transpose(1, 2)


def _in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    moved: Moved,
) -> tuple[Tensor, Tensor]:
    heads, past = query.shape[1], key.shape[2] - query.shape[2]
    (older_key, new_key), (older_value, new_value) = ((x[:, :, :past], x[:, :, past:]) for x in (key, value))
    parts = [_part(query, new_key, new_value, None, scale, causal=True)]
    rows = [query, *(other for other, _ in moved)]
    if (ranges := nested([slots for _, slots in moved], past)) is not None:
        for one, (start, stop) in zip(rows, ranges, strict=True):
            if start < stop:
                mask = None if valid is None else valid[..., start:stop]
                parts.append(_part(one, older_key[:, :, start:stop], older_value[:, :, start:stop], mask, scale))
    elif past:
        rest = torch.ones(older_key.shape[:3], dtype=torch.bool, device=key.device) if valid is None else valid
        masks = []
        for _, slots in reversed(moved):
            own = marked(slots, older_key)
            masks.append(rest & own)
            rest = rest & ~own
        masks = [rest, *reversed(masks)]
        parts += [_part(one, older_key, older_value, mask, scale) for one, mask in zip(rows, masks, strict=True)]
    if len(parts) == 1 and sinks is None:
        return parts[0]

    lses = torch.stack([lse for _, lse in parts])
    if sinks is not None:
        lses = torch.cat((lses, sinks.float().view(1, 1, heads, 1).expand(1, *lses.shape[1:])))
    weights = lses.softmax(dim=0)
    output = torch.zeros(parts[0][0].shape, dtype=torch.float32, device=query.device)
    for weight, (part_output, _) in zip(weights, parts, strict=False):  # the sinks' weight has no part
        output += weight[..., None] * part_output
    return output.to(query.dtype), lses.float().logsumexp(dim=0)


def _part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention over some entries by PyTorch's flash kernel: [batch, heads, q, head_dim], and LSE [batch, heads, q].

    Args:
        mask: bool [batch, kv_heads, n], which entries there are; on a CPU only.
        causal: there are as many entries as rows, and a row sees those up to its own.
    """
    batch, heads, q, head_dim = query.shape
    kv_heads = key.shape[1]
    if query.device.type != "cpu":  # this kernel knows groups
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return output, lse
    rows = query.reshape(batch * kv_heads, heads // kv_heads, q, head_dim)
    keys, values = (x.flatten(0, 1)[:, None].expand(-1, rows.shape[1], -1, -1) for x in (key, value))
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
        bias = bias.view(batch * kv_heads, 1, 1, -1)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, 0.0, causal, attn_mask=bias, scale=scale
    )
    output, lse = output.reshape(batch, heads, q, -1), lse.reshape(batch, heads, q)
    if mask is not None:  # a part without entries has weight zero; the operator says LSE 0 for it
        empty = ~mask.any(-1).repeat_interleave(heads // kv_heads, dim=1)
        lse = lse.masked_fill(empty[..., None], float("-inf"))
    return output, lse


def _in_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    moved: Moved,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, heads, q, head_dim = query.shape
    kv_heads, entries = key.shape[1], key.shape[2]
    group, past = heads // kv_heads, entries - q
    lowest = torch.finfo(torch.float32).min
    keys, values = key.flatten(0, 1).float(), value.flatten(0, 1)
    rows = query.reshape(batch * kv_heads, group, q, head_dim)
    others = [
        (other.reshape(batch * kv_heads, group, q, head_dim), marked(slots, key[:, :, :past]))
        for other, slots in (moved if past else ())
    ]
    ranges = nested([slots for _, slots in moved], past) if others else None
    alone = 0 if ranges is None else ranges[0][0]  # entries that other queries read whatever is marked
    empty = None if valid is None else ~valid.reshape(batch * kv_heads, 1, 1, past)
    column = None if sinks is None else sinks.float().view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, -1, -1)

    # In the layout that the model goes on with, so that it copies nothing.
    output = torch.empty(batch, q, kv_heads, group, value.shape[-1], dtype=query.dtype, device=query.device)
    mass = torch.zeros(batch * kv_heads, entries, dtype=torch.float32, device=query.device)
    lse = output.new_empty(batch * kv_heads, group, q, dtype=torch.float32) if with_lse else None
    tile = max(16, min(TILE_ROWS, TILE_SCORES // (batch * heads * entries)))
    step = 1 if value.dtype == torch.float32 or value.device.type != "cpu" else TILE_STEP
    future = torch.ones(tile, tile + step - 1, dtype=torch.bool, device=query.device).triu_(1)
    for start in range(0, q, tile):
        stop = min(q, start + tile)
        seen = min(
            entries, -(-(past + stop) // step) * step
        )  # what any row of the tile may see, and what fills the shape
        tile_rows = (
            rows[:, :, start:stop].float().mul_(scale)
            if rows.dtype != torch.float32
            else rows[:, :, start:stop] * scale
        )
        scores = torch.bmm(tile_rows.flatten(1, 2), keys[:, alone:seen].transpose(1, 2))
        scores = scores.view(batch * kv_heads, group, stop - start, seen - alone)
        parts = [scores]
        for number, (other_rows, slots) in enumerate(others, 1):
            first, last = (0, past) if ranges is None else ranges[number]
            other = other_rows[:, :, start:stop].float().mul(scale).flatten(1, 2)
            other = torch.bmm(other, keys[:, first:last].transpose(1, 2)).view(*scores.shape[:3], last - first)
            if ranges is None:
                chosen = slots.reshape(batch * kv_heads, 1, 1, past)
                scores[..., :past] = torch.where(chosen, other, scores[..., :past])
            else:
                parts.append(other)
        if len(parts) > 1:
            scores = torch.cat(parts[::-1], dim=-1)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores[..., past + start :].masked_fill_(future[: stop - start, : seen - past - start], lowest)
        if empty is not None and past:
            scores[..., :past].masked_fill_(empty, lowest)
        if column is not None:
            tile_column = column.reshape(batch * kv_heads, group, 1, 1).expand(-1, -1, stop - start, 1)
            scores = torch.cat((scores, tile_column), dim=-1)
        weights = scores.softmax(dim=-1)[..., :seen]
        if lse is not None:
            lse[:, :, start:stop] = logsumexp(scores)
        mass[:, :seen] += weights.sum(dim=(1, 2))
        tile_weights = weights.to(values.dtype).flatten(1, 2)
        tile_output = torch.bmm(tile_weights, values[:, :seen]).view(batch, kv_heads, group, stop - start, -1)
        output[:, start:stop] = tile_output.permute(0, 3, 1, 2, 4)
    lse = None if lse is None else lse.view(batch, heads, q)
    return output.flatten(2, 3).transpose(1, 2), mass.view(batch, kv_heads, entries), lse
