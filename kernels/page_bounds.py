"""Per page of entries and channel, the smallest and the largest key: bounds on what a page's scores can be."""

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.kernels.backend import Backend, use_triton


def page_bounds_reference(keys: Tensor, counts: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """The definition of `page_bounds`, page by page."""
    batch, kv_heads, n, head_dim = keys.shape
    pages = -(-n // page_size)
    least = torch.zeros(batch, kv_heads, pages, head_dim, dtype=keys.dtype, device=keys.device)
    greatest = torch.zeros_like(least)
    for b in range(batch):
        for head in range(kv_heads):
            held = keys[b, head, : int(counts[b, head])]
            for page, part in enumerate(held.split(page_size)):
                if len(part):
                    least[b, head, page], greatest[b, head, page] = part.amin(0), part.amax(0)
    return least, greatest


def page_bounds(
    keys: Tensor, counts: Tensor | None, page_size: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Bounds of pages of `page_size` consecutive entries, the last one of each kv head perhaps with fewer.

    Args:
        keys: [batch, kv_heads, n, head_dim], the entries in order.
        counts: int [batch, kv_heads], how many of the first ones there are; None for all n.
        page_size: entries of a page.
        backend: "triton" and "auto" on CUDA run the Triton kernel, with the same result.

    Returns:
        least, greatest: [batch, kv_heads, ceil(n / page_size), head_dim] in the dtype of `keys`; zero for a page without
        entries.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, keys) and keys.dtype != torch.float64:
        from kvpress.kernels.gpu import page_bounds as gpu

        return gpu.page_bounds(keys, counts, page_size)
    n = keys.shape[2]
    spare = -n % page_size
    there = None
    if counts is not None:
        there = torch.arange(n + spare, device=keys.device) < counts[..., None]
        there = there.unflatten(2, (-1, page_size))

    def reduced(fill: float, reduce: str) -> Tensor:
        padded = functional.pad(keys, (0, 0, 0, spare), value=fill) if spare else keys
        paged = padded.unflatten(2, (-1, page_size))
        if there is not None:
            paged = paged.masked_fill(~there[..., None], fill)
        bound = getattr(paged, reduce)(dim=3)
        return bound if there is None else bound.masked_fill_(~there.any(-1, keepdim=True), 0.0)

    return reduced(float("inf"), "amin"), reduced(float("-inf"), "amax")


def add_to_page_bounds(
    least: Tensor,
    greatest: Tensor,
    key: Tensor,
    rank: Tensor,
    new: Tensor | None,
    page_size: int,
    *,
    backend: Backend = "auto",
) -> None:
    """Take one more entry per kv head into the bounds, in place.

    Args:
        least, greatest: [batch, kv_heads, pages, head_dim], with room for the entry's page; a page's channels side by side.
        key: [batch, kv_heads, head_dim], the entry's.
        rank: int64 [batch, kv_heads], its number among the entries of its kv head, from 0.
        new: bool [batch, kv_heads], False where there is no entry to add; None to add all.
        page_size: entries of a page.
        backend: "triton" and "auto" on CUDA run the Triton kernel, with the same result.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, key) and key.dtype != torch.float64:
        from kvpress.kernels.gpu import page_bounds as gpu

        return gpu.add_to_page_bounds(least, greatest, key, rank, new, page_size)
    place = (rank // page_size).clamp(min=0)[..., None, None].expand(-1, -1, 1, key.shape[-1])
    first = (rank % page_size == 0)[..., None, None]
    key = key[:, :, None]
    for bound, reduce in ((least, torch.minimum), (greatest, torch.maximum)):
        before = bound.gather(2, place)
        after = torch.where(first, key, reduce(before, key))
        if new is not None:
            after = torch.where(new[..., None, None], after, before)
        bound.scatter_(2, place, after)
