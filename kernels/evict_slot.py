"""Drop the entry of lowest priority of each kv head in a decode step, and say which slot the next entry goes into."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton


def evict_slot_reference(
    scores: Tensor, positions: Tensor, seen: Tensor, recents: Tensor, limits: Tensor | None = None
) -> Tensor:
    """The definition of `evict_slot`, head by head; changes `positions`."""
    batch, kv_heads, n = positions.shape
    slots = torch.zeros(batch, kv_heads, dtype=torch.int64, device=positions.device)
    largest = torch.finfo(torch.float32).max
    for b in range(batch):
        for head in range(kv_heads):
            held = positions[b, head].tolist()
            order = []
            for slot, position in enumerate(held):
                if position < 0:
                    continue
                score = scores[b, head, slot].float().item()
                score = min(max(score, -largest), largest) if score == score else -largest
                recent = position >= int(seen[b]) - int(recents[b])
                order.append((recent, 0.0 if recent else score, -position, slot))
            if limits is not None and len(order) <= int(limits[b]):
                slots[b, head] = next((slot for slot in range(n) if held[slot] < 0), 0)
                continue
            slots[b, head] = min(order)[3] if order else 0
            positions[b, head, slots[b, head]] = -1
    return slots


def evict_slot(
    scores: Tensor,
    positions: Tensor,
    seen: Tensor,
    recents: Tensor,
    limits: Tensor | None = None,
    *,
    out: Tensor | None = None,
    full: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Empty the slot of each kv head whose entry has the lowest score; of equals, the newest.

    The newest entries are dropped last: those whose position is at least `seen - recents`. A score that is not finite counts as
    the largest finite number, or the lowest (also NaN). Nothing waits for the device.

    Args:
        scores: float [batch, kv_heads, n], the larger the better.
        positions: int32 [batch, kv_heads, n], -1 for an empty slot; the dropped entries' become -1, in place.
        seen: int [batch], tokens that each sequence has seen.
        recents: int [batch], how many of the newest are dropped last.
        limits: int [batch]; a head that holds no more entries than that drops nothing. None to drop one of each head.
        out: int64 [batch, kv_heads], contiguous, filled and returned; None for a new one.
        full: every slot is known to hold an entry (torch only, which then has less to do).
        backend: "triton" and "auto" on CUDA do it in one launch of the Triton kernel.

    Returns:
        int64 [batch, kv_heads], the slot that was emptied, into which the next entry may go; of a head that drops nothing its
        first empty slot, 0 if it has none.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, scores):
        from kvpress.kernels.gpu import evict_slot as gpu

        return gpu.evict_slot(scores, positions, seen, recents, limits, out)
    largest = torch.finfo(torch.float32).max
    priority = torch.nan_to_num(scores.float(), nan=-largest, posinf=largest, neginf=-largest)
    spared = positions >= (seen - recents)[:, None, None]
    if not full:
        spared |= positions < 0
    priority.masked_fill_(spared, float("inf"))
    lowest = priority.amin(dim=-1, keepdim=True)
    slot = torch.where(priority == lowest, positions, -1).argmax(dim=-1, keepdim=True)
    if limits is None:
        positions.scatter_(2, slot, -1)
    else:
        empty = positions < 0
        over = (~empty).sum(-1, keepdim=True) > limits[:, None, None]
        slot = torch.where(over, slot, empty.to(torch.uint8).argmax(dim=-1, keepdim=True))
        positions.scatter_(2, slot, torch.where(over, -1, positions.gather(2, slot)))
    return slot[..., 0] if out is None else out.copy_(slot[..., 0])
