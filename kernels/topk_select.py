"""Exact top-k with one rule for ties: the smaller index wins, and the result is in ascending order."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def topk_select(scores: Tensor, counts: Tensor, k: int, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Indices of the `counts` largest scores of each row, ascending.

    Args:
        scores: float [batch, heads, n]. Entries at -inf are never chosen. NaN counts as the lowest finite score, so
            that it never wins over a number.
        counts: int [batch, heads] or [batch, 1], how many to choose in each row, at most `k`.
        k: width of the result, at most n.
        backend: "triton", and "auto" on CUDA, run the Triton kernel, with the same result.

    Returns:
        index: int64 [batch, heads, k], ascending; where fewer than k are chosen the tail repeats a valid index.
        chosen: bool [batch, heads, k], False on that tail.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, scores):
        from kvpress.kernels.gpu import topk_select as gpu

        return gpu.topk_select(scores, counts, k)
    n = scores.shape[-1]
    numbers = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min, posinf=float("inf"), neginf=float("-inf"))
    # On a CPU looking at numbers costs nothing; a graph cannot branch on them.
    waits = numbers.device.type == "cpu" and not torch.compiler.is_compiling()
    if waits and k and bool((counts == k).all()):
        least = numbers.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        taken = numbers >= least
        # As a rule nothing ties with the k-th best, and what reaches it is the result. Each row has at least k of these.
        if int(taken.sum()) == least.numel() * k and not bool(torch.isneginf(least).any()):
            index = taken.nonzero()[:, -1].view(*scores.shape[:2], k)
            return index, torch.ones_like(index, dtype=torch.bool)
    # Not a stable sort of all n: only the k-th best is needed. Whatever equals it is taken from the front, as many as fit.
    best = numbers.topk(k, dim=-1).values
    counts = counts.long().clamp(max=k)[..., None]
    least = best.gather(-1, (counts - 1).clamp(min=0).expand(*scores.shape[:2], 1))
    above = numbers > least
    tied = (numbers == least) & ~torch.isneginf(least)
    taken = above | (tied & (tied.cumsum(-1) <= counts - above.sum(-1, keepdim=True)))
    taken &= counts > 0
    place = torch.where(taken, taken.cumsum(-1) - 1, k)
    entries = torch.arange(n, device=scores.device).expand_as(place)
    index = torch.full((*scores.shape[:2], k + 1), n, device=scores.device).scatter_(-1, place, entries)[..., :k]
    return index.clamp(max=n - 1), index < n
