"""Attention of one new token per sequence over a slot cache, grouped so that K and V are read once per kv head."""

import torch
from einops import reduce, repeat
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.gather_slots import gather_slots


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
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `decode_attention`, in plain float32 with K and V repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    if index is not None:
        key, value = (x.gather(2, index.long()[..., None].expand(-1, -1, -1, x.shape[3])) for x in (key, value))
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
    return (weights @ values).to(query.dtype), mass, scores.logsumexp(dim=-1)[..., 0]


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
    index: Tensor | None = None,
    with_mass: bool = False,
    per_head: bool = False,
    with_lse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax attention of one query row per head over every valid slot, or over those listed.

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads kv head h // (heads / kv_heads).
        key, value: [batch, kv_heads, slots, head_dim], in any order of slots; only the slot dimension may be strided.
        valid: bool [batch, kv_heads, n], False for an empty slot, or [batch, heads, n], False for what a query head does
            not read; None when every head reads all n. There are as many as slots; with `index`, as it lists.
        scale: factor on q.k, from the model.
        softcap: s -> softcap * tanh(s / softcap) on the scaled scores, for models that have it.
        sinks: [heads], one logit per head that takes part in the softmax and has no value (gpt-oss).
        moved: (query, slots): a second query [batch, heads, 1, head_dim] that is used instead on the slots where the
            bool [batch, kv_heads, n] is True (re-indexed positions). This runs in torch, whatever the backend.
        index: int [batch, kv_heads, n], the slots to attend, each in [0, slots) and valid once at most; None for all.
        with_mass: also return the attention weights, summed over the group.
        per_head: the weights are not summed, float32 [batch, heads, n].
        with_lse: also return the logarithm of the softmax's denominator.
        backend: "triton", and "auto" on CUDA, run the Triton kernel. Equal inputs give equal results.

    Returns:
        output: [batch, heads, 1, head_dim] in the dtype of `query`.
        mass: float32 [batch, kv_heads, n] or None. Sums to the group size over the slots (less with sinks).
        lse: float32 [batch, heads] or None: the natural logarithm of the summed exp of all scores and the sink; -inf where
            there are none.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and moved is None and query.dtype != torch.float64:
        from kvpress.kernels.gpu import decode_attention as gpu

        return gpu.decode_attention(
            query,
            key,
            value,
            valid,
            index,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            with_mass=with_mass,
            per_head=per_head,
            with_lse=with_lse,
        )
    if index is not None:
        key, value = gather_slots(key, index), gather_slots(value, index)
    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = query.reshape(batch * kv_heads, group, head_dim)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    plain = not with_mass and not with_lse and softcap is None and sinks is None and moved is None
    if plain and (query.is_cuda or query.dtype == torch.float32):  # torch's CPU kernel is slow on half-precision rows
        mask = None
        if valid is not None:
            mask = torch.zeros(valid.shape, dtype=query.dtype, device=query.device)
            mask = mask.masked_fill_(~valid, float("-inf")).view(batch * kv_heads, 1, -1, slots)
        output = torch.nn.functional.scaled_dot_product_attention(
            rows[:, None], keys[:, None], values[:, None], attn_mask=mask, scale=scale
        )
        return output.reshape(batch, heads, 1, head_dim), None, None

    scores = decode_scores(query, key, scale=scale, moved=moved).view(batch, kv_heads, group, slots)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = torch.finfo(torch.float32).min
    if valid is not None:
        valid = valid.view(batch, kv_heads, -1, slots)
        # The lowest finite number instead of -inf: a sequence with no entry at all gives zeros, not NaN.
        scores = scores.masked_fill(~valid, lowest)
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, group, 1).expand(batch, -1, -1, -1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., :slots]
    if valid is not None:
        weights = weights.masked_fill(~valid, 0.0)
    output = torch.bmm(weights.view(batch * kv_heads, group, slots).to(values.dtype), values)
    mass = lse = None
    if with_mass:
        mass = weights.reshape(batch, heads, slots) if per_head else weights.sum(2)
    if with_lse:
        lse = scores.logsumexp(dim=-1).view(batch, heads)
        lse = lse.masked_fill(lse <= lowest, float("-inf"))
    return output.view(batch, heads, 1, head_dim), mass, lse
