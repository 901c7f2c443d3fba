"""Merge entries that leave a cache into entries that stay (EMS)."""

import torch
from torch import Tensor


def merge_slots_reference(
    keys: Tensor, values: Tensor, stats: list[Tensor], weights: Tensor, centres: Tensor, rest: Tensor, target: Tensor
) -> None:
    """The definition of `merge_slots`: one centre at a time."""
    for b in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for place, centre in enumerate(centres[b, head].tolist()):
                members = [
                    slot
                    for slot, at in zip(rest[b, head].tolist(), target[b, head].tolist(), strict=True)
                    if at == place
                ]
                if not members:
                    continue
                members = [centre, *members]
                share = weights[b, head, members] / weights[b, head, members].sum()
                group = keys[b, head, members].float()
                direction = (share[:, None] * group / group.norm(dim=-1, keepdim=True)).sum(0)
                keys[b, head, centre] = (group[0].norm() * direction / direction.norm()).to(keys.dtype)
                values[b, head, centre] = (share[:, None] * values[b, head, members].float()).sum(0).to(values.dtype)
                for stat in stats:
                    stat[b, head, ..., centre] = stat[b, head][..., members].sum(-1)


def merge_slots(
    keys: Tensor, values: Tensor, stats: list[Tensor], weights: Tensor, centres: Tensor, rest: Tensor, target: Tensor
) -> None:
    """Merge entries into others, in place.

    A centre and the entries that go to it become one: the key gets the direction of the weighted mean of their directions
    and the centre's own norm, the value is the weighted mean, and statistics are summed. A centre that nothing goes to is
    not touched; the slots that were merged keep what they held.

    Args:
        keys, values: [batch, kv_heads, n, head_dim].
        stats: tensors [batch, kv_heads, ..., n].
        weights: float32 [batch, kv_heads, n], positive, the weight of each slot in its merge.
        centres: int64 [batch, kv_heads, k], slots that stay, each at most once.
        rest: int64 [batch, kv_heads, m], slots that leave.
        target: int64 [batch, kv_heads, m], index into `centres` for each of `rest`, or -1 for none.
    """
    batch, kv_heads, k = centres.shape
    bucket = torch.where(target < 0, k, target)  # the last bucket is thrown away

    def gathered(x: Tensor, slots: Tensor) -> Tensor:
        return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1])).float()

    def summed(own: Tensor, members: Tensor) -> Tensor:
        """Per centre: its own row plus those of its members, [batch, kv_heads, k, d]."""
        total = torch.cat((own, torch.zeros_like(own[:, :, :1])), dim=2)
        return total.scatter_add_(2, bucket[..., None].expand_as(members), members)[:, :, :k]

    centre_weight, rest_weight = weights.gather(2, centres)[..., None], weights.gather(2, rest)[..., None]
    weight = summed(centre_weight, rest_weight)
    touched = torch.zeros(batch, kv_heads, k + 1, dtype=torch.bool, device=keys.device)
    touched = touched.scatter_(2, bucket, True)[:, :, :k, None]

    centre_keys, rest_keys = gathered(keys, centres), gathered(keys, rest)
    norm = centre_keys.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    direction = summed(
        centre_weight * centre_keys / norm.clamp(min=tiny),
        rest_weight * rest_keys / rest_keys.norm(dim=-1, keepdim=True).clamp(min=tiny),
    )
    merged_keys = norm * direction / direction.norm(dim=-1, keepdim=True).clamp(min=tiny)
    merged_values = summed(centre_weight * gathered(values, centres), rest_weight * gathered(values, rest)) / weight
    for buffer, merged in ((keys, merged_keys), (values, merged_values)):
        slots = centres[..., None].expand(-1, -1, -1, buffer.shape[-1])
        held = buffer.gather(2, slots)
        buffer.scatter_(2, slots, torch.where(touched, merged.to(buffer.dtype), held))
    for stat in stats:
        lead = stat.shape[2:-1]
        wide = (batch, kv_heads, *(1,) * len(lead))
        places, leavers = centres.view(*wide, -1).expand(*stat.shape[:-1], -1), rest.view(*wide, -1)
        moved = stat.gather(-1, leavers.expand(*stat.shape[:-1], -1))
        total = torch.nn.functional.pad(stat.gather(-1, places), (0, 1))
        total.scatter_add_(-1, bucket.view(*wide, -1).expand_as(moved), moved)
        stat.scatter_(-1, places, total[..., :k])
