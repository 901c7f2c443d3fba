"""Attention of one new token per sequence over pages of slots: kv heads may hold different numbers of entries."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton
from kvpress.kernels.decode_attention import decode_attention_reference
from kvpress.kernels.decode_scores import TILE_KEYS
from kvpress.kernels.exponentials import exp_


def paged_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    owner: Tensor,
    valid: Tensor,
    *,
    kv_heads: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `paged_attention`: the valid slots of a head's pages, put together, are an ordinary cache of it."""
    group, page = query.shape[1] // kv_heads, key.shape[1] // owner.shape[1]
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    mass = torch.zeros(key.shape[:2], dtype=torch.float32, device=key.device)
    for b in range(query.shape[0]):
        for head in range(kv_heads):
            of_head = owner[b].repeat_interleave(page) == head
            slots = (of_head & valid[b]).nonzero().flatten()
            heads = slice(head * group, (head + 1) * group)
            if len(slots):
                output[b : b + 1, heads], weights, _ = decode_attention_reference(
                    query[b : b + 1, heads],
                    key[b, slots][None, None],
                    value[b, slots][None, None],
                    scale=scale,
                    softcap=softcap,
                    sinks=None if sinks is None else sinks[heads],
                )
                mass[b, slots] = weights[0, 0]
    return output, mass


def list_pages(owner: Tensor, kv_heads: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The pages of each kv head side by side: what `paged_attention` needs to know of the owners, and keeps as long as they do.

    Args:
        owner: int64 [batch, pages], the kv head of each page.
        kv_heads: number of kv heads.
        backend: "triton", and "auto" on CUDA, run the Triton kernel, with the same result.

    Returns:
        order: int32 [batch, pages], pages in ascending order of their owners, and of their numbers.
        starts: int32 [batch, kv_heads + 1], where each head's begin in `order`; the last is the number of pages.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, owner):
        from kvpress.kernels.gpu import paged_attention as gpu

        return gpu.list_pages(owner, kv_heads)
    order = owner.argsort(dim=-1, stable=True).int()
    heads = torch.arange(kv_heads + 1, device=owner.device)
    starts = (owner[:, None] < heads[:, None]).sum(dim=-1, dtype=torch.int32)
    return order, starts


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    owner: Tensor,
    valid: Tensor,
    *,
    kv_heads: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    with_mass: bool = False,
    lists: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of one query row per head over the pages of its kv head.

    Every page is attended alone by the query heads of its owner, all pages as one batch of small products; then the pages of
    a head are put together by their largest scores and sums. So K and V of a page are read once, and the work is that of the
    pages, however they are spread over the heads.

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads the pages of kv head h // (heads / kv_heads).
        key, value: [batch, pages * page, head_dim], contiguous; finite numbers also in empty slots.
        owner: int64 [batch, pages], the kv head of each page, in any order.
        valid: bool [batch, pages * page], False for an empty slot.
        kv_heads: number of kv heads.
        scale, softcap, sinks: as in `decode_attention`.
        with_mass: also return the attention weights, summed over the group.
        lists: what `list_pages` gives for `owner`, if it was kept; the Triton kernels make it otherwise, at each call.
        backend: "triton", and "auto" on CUDA, run the Triton kernels. Equal inputs give equal results.

    Returns:
        output: [batch, heads, 1, head_dim] in the dtype of `query`; zeros for a head without entries.
        mass: float32 [batch, pages * page], 0 for an empty slot; or None.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import paged_attention as gpu

        return gpu.paged_attention(
            query,
            key,
            value,
            owner,
            valid,
            kv_heads=kv_heads,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            with_mass=with_mass,
            lists=lists,
        )
    batch, heads, _, head_dim = query.shape
    pages, group = owner.shape[1], heads // kv_heads
    row = (owner + kv_heads * torch.arange(batch, device=owner.device)[:, None]).flatten()  # of [batch * kv_heads]
    keys, values = (x.view(batch * pages, -1, x.shape[-1]) for x in (key, value))

    rows = query.reshape(batch * kv_heads, group, head_dim).float() * scale
    tile = max(1, TILE_KEYS // keys[0].numel())
    tiles = zip(rows.index_select(0, row).split(tile), keys.split(tile), strict=True)
    scores = torch.cat(
        [torch.bmm(some, of.float().transpose(1, 2)) for some, of in tiles]
    )  # [batch * pages, group, page]
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~valid.view(batch * pages, 1, -1), float("-inf"))

    # Not -inf where a head has nothing: then exp would see -inf - -inf.
    top = scores.new_full((batch * kv_heads, group), torch.finfo(torch.float32).min)
    top.scatter_reduce_(0, row[:, None].expand(-1, group), scores.amax(-1), "amax")
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, group).expand(batch, -1, -1).reshape_as(top)
        top = torch.maximum(top, column)
    weights = exp_(scores.sub_(top.index_select(0, row)[..., None]))
    total = torch.zeros_like(top).index_add_(0, row, weights.sum(-1))
    if sinks is not None:
        total += (column - top).exp()
    total.clamp_(min=torch.finfo(torch.float32).tiny)

    parts = torch.bmm(weights.to(values.dtype), values).float()  # [batch * pages, group, head_dim]
    output = parts.new_zeros(batch * kv_heads, group, values.shape[-1]).index_add_(0, row, parts) / total[..., None]
    mass = None
    if with_mass:
        mass = (weights / total.index_select(0, row)[..., None]).sum(1).view(batch, -1)
    return output.to(query.dtype).view(batch, heads, 1, -1), mass
