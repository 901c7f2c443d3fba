"""An upper bound on q.k over the keys of a page, from the page's bounds alone."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def page_scores_reference(query: Tensor, least: Tensor, greatest: Tensor) -> Tensor:
    """The definition of `page_scores`: per channel the larger of the two products, summed."""
    group = query.shape[1] // least.shape[1]
    low, high = (bound.float().repeat_interleave(group, dim=1) for bound in (least, greatest))
    return torch.maximum(query.float() * low, query.float() * high).sum(-1)


def page_scores(query: Tensor, least: Tensor, greatest: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The largest value that q.k can take over keys between the bounds, in float32.

    A channel with a positive query takes the upper bound, one with a negative query the lower; so the maximum is two
    matrix products, over the positive and the negative part of the query.

    Args:
        query: [batch, heads, 1, head_dim]; query head h reads kv head h // (heads / kv_heads).
        least, greatest: [batch, kv_heads, pages, head_dim], `least` nowhere above `greatest`, all finite.
        backend: "triton" and "auto" on CUDA run the Triton kernel, which reads each bound once and copies none.

    Returns:
        float32 [batch, heads, pages].

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, query) and query.dtype != torch.float64:
        from kvpress.kernels.gpu import decode_scores as gpu

        return gpu.decode_scores(query, greatest, scale=1.0, least=least)[0]
    batch, heads, _, head_dim = query.shape
    kv_heads, pages = least.shape[1], least.shape[2]
    rows = query.float().view(batch * kv_heads, heads // kv_heads, head_dim)
    scores = torch.bmm(rows.clamp(max=0), least.flatten(0, 1).float().transpose(1, 2))
    scores = scores.baddbmm_(rows.clamp(min=0), greatest.flatten(0, 1).float().transpose(1, 2))
    return scores.view(batch, heads, pages)
