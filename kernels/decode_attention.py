"""Attention of one new token per sequence over a slot cache, grouped so that K and V are read once per kv head."""

import math
from typing import Any

import torch
from einops import reduce, repeat
from torch import Tensor

from kvpress.kernels.attention_mass import Perturbation
from kvpress.kernels.backend import Backend, threads, use_triton
from kvpress.kernels.decode_scores import Moved, decode_scores, marked, nested
from kvpress.kernels.exponentials import logsumexp
from kvpress.kernels.gather_slots import gather_both
from kvpress.kernels.gumbel_noise import gumbel_noise

# Fewer slots than this are not worth a second task for an idle thread.
LEAST_PART = 2048


def decode_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: Moved = (),
    index: Tensor | None = None,
    page_size: int = 1,
    perturbed: tuple[Perturbation, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `decode_attention`, in plain float32 with K and V repeated to the query heads."""
    group = query.shape[1] // key.shape[1]
    if index is not None and page_size > 1:
        index, valid = _entries(index, valid, page_size, key.shape[2])
    if index is not None:
        key, value = (x.gather(2, index.long()[..., None].expand(-1, -1, -1, x.shape[3])) for x in (key, value))
    keys, values = (repeat(x.float(), "b h n d -> b (h g) n d", g=group) for x in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) * scale
    for other, slots in moved:
        wide = marked(slots, key).repeat_interleave(group, dim=1)[:, :, None]
        scores = torch.where(wide, other.float() @ keys.transpose(-1, -2) * scale, scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
        if valid is not None:
            wide = valid.repeat_interleave(query.shape[1] // valid.shape[1], dim=1)
            scores = scores.masked_fill(~wide[:, :, None], float("-inf"))
        if sinks is not None:
            column = sinks.float().view(1, -1, 1, 1).expand(query.shape[0], -1, 1, 1)
            scores = torch.cat((scores, column), dim=-1)
        return scores.softmax(dim=-1).nan_to_num()[..., : key.shape[2]], scores.logsumexp(dim=-1)[..., 0]

    weights, lse = softmax(scores)
    observed = weights
    if perturbed is not None:
        perturbation, row, positions = perturbed
        if perturbation.seed is not None:
            at = row if perturbation.fresh else torch.zeros_like(row)
            scores = scores + gumbel_noise(perturbation.seed, perturbation.layer, at, positions, query.shape[1])
        observed, _ = softmax(scores / perturbation.temperature)
    mass = reduce(observed, "b (h g) 1 n -> b h n", "sum", g=group)
    return (weights @ values).to(query.dtype), mass, lse


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: Moved = (),
    index: Tensor | None = None,
    page_size: int = 1,
    perturbed: tuple[Perturbation, Tensor, Tensor] | None = None,
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
        moved: (query, slots) each: another query [batch, heads, 1, head_dim] that is used instead on the slots where the
            bool [batch, kv_heads, n] is True, or on the first so many of the n (re-indexed positions); the later wins.
        index: int [batch, kv_heads, n], the slots to attend, each in [0, slots) and valid once at most; None for all.
        page_size: with more than 1, `index` lists pages of that many slots: int [batch, kv_heads, pages], page j being the
            slots from j * page_size on, as far as there are any; `valid` is of pages too. n is pages * page_size then.
        perturbed: (perturbation, row, positions): the mass is that of softmax((score + noise) / temperature), the output
            that of the plain softmax. Int [batch, 1] and [batch, kv_heads, n] are the positions of the query and of the
            entries, which determine the noise. The sinks are left as they are.
        with_mass: also return the attention weights, summed over the group.
        per_head: the weights are not summed, float32 [batch, heads, n].
        with_lse: also return the logarithm of the softmax's denominator.
        backend: "triton", and "auto" on CUDA, run the Triton kernel. Equal inputs give equal results.

    Returns:
        output: [batch, heads, 1, head_dim] in the dtype of `query`.
        mass: float32 [batch, kv_heads, n], or None without `with_mass`. Sums to the group size over the slots
            (less with sinks).
        lse: float32 [batch, heads] or None: the natural logarithm of the summed exp of all scores and the sink; -inf where
            there are none.

    Raises:
        ValueError: the backend does not exist, or cannot run here; pages, and no list of them; noise or a
            temperature with more than one other query on a GPU.
    """
    if page_size < 1 or (page_size > 1 and index is None):
        raise ValueError(
            f"page_size={page_size} is the size of listed pages; give 1 or more, and `index` with more than 1"
        )
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import decode_attention as gpu

        if len(moved) > 1:  # the kernel has one other query
            return _by_parts(
                query,
                key,
                value,
                valid,
                moved,
                sinks,
                perturbed,
                with_mass,
                per_head,
                with_lse,
                scale=scale,
                softcap=softcap,
                index=index,
                page_size=page_size,
                backend=backend,
            )
        return gpu.decode_attention(
            query,
            key,
            value,
            valid,
            index,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            moved=moved[0] if moved else None,
            perturbed=perturbed,
            page_size=page_size,
            with_mass=with_mass,
            per_head=per_head,
            with_lse=with_lse,
        )
    if index is not None and page_size > 1:
        index, valid = _entries(index, valid, page_size, key.shape[2])
    if index is not None:
        key, value = gather_both(key, value, index)
    if not with_mass and not with_lse and softcap is None and sinks is None and not moved:
        return _plain(query, key, value, valid, scale), None, None

    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scores = decode_scores(query, key, scale=scale, moved=moved, backend="torch").view(batch, kv_heads, group, slots)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # No size is left to `view`: inductor takes one that it has to work out from a number of slots for a dimension of its own.
    hidden = None if valid is None else ~valid.view(batch, kv_heads, valid.shape[1] // kv_heads, slots)
    column = None if sinks is None else sinks.float().view(1, kv_heads, group, 1).expand(batch, -1, -1, -1)
    observed = None
    if with_mass and perturbed is not None:
        observed = _softmax(_with_noise(scores, *perturbed), hidden, column)[0]
    weights, scores = _softmax(scores, hidden, column)
    output = torch.bmm(weights.view(batch * kv_heads, group, slots).to(value.dtype), value.flatten(0, 1))
    mass = lse = None
    if with_mass:
        observed = weights if observed is None else observed
        mass = observed.reshape(batch, heads, slots) if per_head else observed.sum(2)
    if with_lse:
        lse = logsumexp(scores).view(batch, heads)
        lse = lse.masked_fill(lse <= torch.finfo(torch.float32).min, float("-inf"))
    return output.view(batch, heads, 1, head_dim), mass, lse


def _by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    moved: Moved,
    sinks: Tensor | None,
    perturbed: tuple[Perturbation, Tensor, Tensor] | None,
    with_mass: bool,
    per_head: bool,
    with_lse: bool,
    *,
    index: Tensor | None,
    page_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`decode_attention` with each query's slots attended alone, and the parts merged by their LSE."""
    if perturbed is not None:
        raise ValueError(
            f"noise or a temperature does not go with {len(moved)} other queries on a GPU; give one at most"
        )
    if index is not None and page_size > 1:
        index, valid = _entries(index, valid, page_size, key.shape[2])
    slots = key.shape[2] if index is None else index.shape[2]
    like = key if index is None else index[..., None]
    ranges = nested([chosen for _, chosen in moved], slots)
    parts, rest = [], torch.ones(like.shape[:3], dtype=torch.bool, device=key.device)
    for number, (rows, chosen) in reversed(list(enumerate([(query, slots), *moved]))):
        of_part, part = valid, slice(None)
        if ranges is not None:
            part = slice(*ranges[number])
            of_part = None if valid is None else valid[..., part]
        else:
            own = rest & marked(chosen, like)
            rest = rest & ~own
            of_part = own if valid is None else own.repeat_interleave(valid.shape[1] // own.shape[1], dim=1) & valid
        if part.start is not None and part.start == part.stop:
            continue
        keys, values, listed = key, value, None
        if index is None:
            keys, values = key[:, :, part], value[:, :, part]
        else:
            listed = index[:, :, part]
        output, mass, lse = decode_attention(
            rows, keys, values, of_part, index=listed, with_mass=with_mass, per_head=True, with_lse=True, **options
        )
        parts.append((part, output, mass, lse))
    lses = torch.stack([lse for *_, lse in parts if lse is not None])
    if sinks is not None:
        lses = torch.cat((lses, sinks.float().expand(1, len(query), -1)))
    weights = lses.softmax(dim=0).nan_to_num()  # where there is no entry at all, every part has the LSE -inf
    output = torch.zeros_like(parts[0][1], dtype=torch.float32)
    mass = query.new_zeros(*query.shape[:2], slots, dtype=torch.float32) if with_mass else None
    for weight, (part, of_rows, of_slots, _) in zip(weights, parts, strict=False):  # the sinks' weight has no part
        output += weight[..., None, None] * of_rows
        if mass is not None:
            mass[..., part] += weight[..., None] * of_slots
    if mass is not None and not per_head:
        mass = mass.unflatten(1, (key.shape[1], -1)).sum(2)
    return output.to(query.dtype), mass, lses.logsumexp(dim=0) if with_lse else None


def _entries(pages: Tensor, valid: Tensor | None, page_size: int, slots: int) -> tuple[Tensor, Tensor]:
    """The slots of pages [batch, kv_heads, m] and which are read, [batch, heads or kv_heads, m * page_size]."""
    within = torch.arange(page_size, device=pages.device)
    index = (pages[..., None] * page_size + within).flatten(2)
    there = index < slots
    if valid is not None:
        heads = valid.shape[1] // there.shape[1]
        there = there.repeat_interleave(heads, dim=1) & valid.repeat_interleave(page_size, dim=2)
    return index.clamp(max=slots - 1), there


def _plain(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """Attention by torch's own kernel, the group's heads as its rows."""
    batch, heads, _, head_dim = query.shape
    kv_heads, slots = key.shape[1], key.shape[2]
    rows = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    parts = 1 if query.is_cuda else _parts(batch * kv_heads, slots)
    mask = None
    if valid is not None:
        # In parts not -inf: a part of which nothing is valid must not give NaN.
        hidden = float("-inf") if parts == 1 else torch.finfo(query.dtype).min
        mask = torch.zeros(valid.shape, dtype=query.dtype, device=query.device)
        mask = mask.masked_fill_(~valid, hidden).view(batch, kv_heads, valid.shape[1] // kv_heads, slots)
    if parts > 1:
        rows, key, value = (x.flatten(0, 1)[:, None] for x in (rows, key, value))
        mask = None if mask is None else mask.flatten(0, 1)[:, None]
        return _in_parts(rows, key, value, mask, scale, parts).reshape(batch, heads, 1, head_dim)
    output = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, 1, head_dim)


def _parts(tasks: int, slots: int) -> int:
    """Into how many parts to split the slots: torch's kernel gives each kv head to one thread, and some would idle."""
    count = threads()
    parts = count // math.gcd(tasks, count)  # the fewest with which all threads have the same to do
    return parts if tasks < 4 * count and slots >= parts * LEAST_PART else 1


def _in_parts(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, parts: int) -> Tensor:
    """Attention over equal parts of the slots and over the rest, merged by their LSE: [tasks, group, head_dim]."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    each = keys.shape[2] // parts
    split = parts * each
    keys_in_parts, values_in_parts = (x[:, 0, :split].unflatten(1, (parts, each)) for x in (keys, values))
    mask_in_parts = None if mask is None else mask[:, 0, :, :split].unflatten(2, (parts, each)).transpose(1, 2)
    output, lse = flash(
        rows.expand(-1, parts, -1, -1), keys_in_parts, values_in_parts, attn_mask=mask_in_parts, scale=scale
    )
    if split < keys.shape[2]:
        rest_mask = None if mask is None else mask[..., split:]
        rest, rest_lse = flash(rows, keys[:, :, split:], values[:, :, split:], attn_mask=rest_mask, scale=scale)
        output, lse = torch.cat((output, rest), dim=1), torch.cat((lse, rest_lse), dim=1)
    return (output * lse.softmax(dim=1)[..., None]).sum(1).to(rows.dtype)


def _with_noise(scores: Tensor, perturbation: Perturbation, row: Tensor, positions: Tensor) -> Tensor:
    """(scores + noise) / temperature, a new tensor [batch, kv_heads, group, n]."""
    if perturbation.seed is None:
        return scores / perturbation.temperature
    at = row if perturbation.fresh else torch.zeros_like(row)
    heads = scores.shape[1] * scores.shape[2]
    noise = gumbel_noise(perturbation.seed, perturbation.layer, at, positions, heads)
    return noise.view_as(scores).add_(scores).div_(perturbation.temperature)


def _softmax(scores: Tensor, hidden: Tensor | None, column: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over what is not hidden and the sinks' column: weights without that column, and the masked scores with it.

    The lowest finite number stands for -inf: a sequence with no entry at all gives zeros, not NaN.
    """
    slots = scores.shape[-1]
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    if column is not None:
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1)[..., :slots]
    return weights if hidden is None else weights.masked_fill(hidden, 0.0), scores
