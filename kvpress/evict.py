"""Which entries of a layer go: functions of tensors, from an eviction policy's scores to slots."""

import torch
from torch import Tensor

from kvpress.kernels.topk_select import topk_select
from kvpress.policy import Entries, EvictionPolicy

INFINITE = float("inf")


def priorities(policy: EvictionPolicy, entries: Entries, full: bool) -> Tensor:
    """The policy's scores, float32 [batch, kv_heads, n]: +inf for the newest, which stay, and -inf for empty slots.

    Args:
        policy: the eviction policy.
        entries: the entries.
        full: no slot is known to be empty.
    """
    score = policy.score(entries).float()
    # A score that is not finite must neither protect its entry nor poison the comparison.
    limit = torch.finfo(torch.float32).max
    score = torch.nan_to_num(score, nan=-limit, posinf=limit, neginf=-limit)
    score.masked_fill_(~entries.candidates, INFINITE)
    return score if full else score.masked_fill_(entries.positions < 0, -INFINITE)


def in_position_order(positions: Tensor) -> Tensor:
    """The slots in the order of their positions, empty ones last: int64 [batch, kv_heads, n]."""
    newest_last = torch.where(positions < 0, torch.iinfo(torch.int32).max, positions)
    return newest_last.argsort(dim=-1, stable=True)


def best(priority: Tensor, totals: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The entries that stay after a prompt: int64 [batch, kv_heads, width] ascending, and which of these there are."""
    return topk_select(priority, totals, width)


def victims(priority: Tensor, positions: Tensor, count: int) -> Tensor:
    """The entries that a step drops: those of lowest priority; of equals, the newest.

    Args:
        priority: float32 [batch, kv_heads, n], +inf for what must not be dropped.
        positions: int32 [batch, kv_heads, n].
        count: how many.

    Returns:
        int64 [batch, kv_heads, count], slots.
    """
    if count == 1:
        lowest = priority.amin(dim=-1, keepdim=True)
        return torch.where(priority == lowest, positions, -1).argmax(dim=-1, keepdim=True)
    newest_first = positions.argsort(dim=-1, descending=True, stable=True)
    lowest_first = priority.gather(2, newest_first).argsort(dim=-1, stable=True)
    return newest_first.gather(2, lowest_first[..., :count])


def split_by(held: Tensor, index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What stays and what goes of the slots that hold an entry: two bool [batch, kv_heads, n].

    Args:
        held: bool [batch, kv_heads, n].
        index, chosen: as `best` gives them.
    """
    kept = torch.zeros(held.shape, dtype=torch.uint8, device=index.device)
    kept = kept.scatter_add_(2, index, chosen.to(torch.uint8)) > 0  # what is not chosen may repeat a chosen slot
    return kept, held & ~kept
