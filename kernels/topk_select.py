"""Exact top-k with one rule for ties: the smaller index wins, and the result is in ascending order."""

import torch
from torch import Tensor


def topk_select(scores: Tensor, counts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the `counts` largest scores of each row, ascending.

    Args:
        scores: float [batch, heads, n]. Entries at -inf are never chosen. NaN counts as the lowest finite score, so
            that it never wins over a number.
        counts: int [batch, heads] or [batch, 1], how many to choose in each row, at most `k`.
        k: width of the result, at most n.

    Returns:
        index: int64 [batch, heads, k], ascending; where fewer than k are chosen the tail repeats a valid index.
        chosen: bool [batch, heads, k], False on that tail.
    """
    n = scores.shape[-1]
    numbers = scores.float().nan_to_num(nan=torch.finfo(torch.float32).min, posinf=float("inf"), neginf=float("-inf"))
    # A stable sort gives ties to the smaller index; torch.topk promises nothing.
    ranked, order = numbers.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(k, device=scores.device)
    chosen = (rank < counts[..., None]) & ~torch.isneginf(ranked[..., :k])
    index = torch.where(chosen, order[..., :k], n).sort(dim=-1).values
    return index.clamp(max=n - 1), index < n
