"""Merge entries that leave a cache into entries that stay (EMS)."""

import torch
from torch import Tensor

from kvpress.kernels.backend import Backend, use_triton

# Numbers of one tile of leaving entries (16 MiB in float32).
TILE_NUMBERS = 1 << 22
TINY = torch.finfo(torch.float32).tiny
# Directions whose weighted mean is shorter than this cancel; what is left is rounding.
CANCELLED = 1e-6


def merge_slots_reference(
    keys: Tensor,
    values: Tensor,
    stats: list[Tensor],
    weights: Tensor,
    centres: Tensor,
    rest: Tensor,
    target: Tensor,
    *,
    value_norms: bool = False,
) -> None:
    """The definition of `merge_slots`: one centre at a time."""

    def turned(x: Tensor, share: Tensor) -> Tensor:
        """The first of x [members, d], with the direction of the weighted mean of all directions."""
        norms = x.norm(dim=-1, keepdim=True)
        direction = (share * x / norms.clamp(min=TINY)).sum(0)
        return norms[0] * direction / direction.norm() if direction.norm() > CANCELLED else x[0]

    for b in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            leaving = list(zip(rest[b, head].tolist(), target[b, head].tolist(), strict=True))
            for place, centre in enumerate(centres[b, head].tolist()):
                members = [centre, *(slot for slot, at in leaving if at == place)]
                if len(members) == 1:
                    continue
                share = (weights[b, head, members] / weights[b, head, members].sum())[:, None]
                group, group_values = keys[b, head, members].float(), values[b, head, members].float()
                merged = turned(group_values, share) if value_norms else (share * group_values).sum(0)
                keys[b, head, centre] = turned(group, share).to(keys.dtype)
                values[b, head, centre] = merged.to(values.dtype)
                for stat in stats:
                    stat[b, head, ..., centre] = stat[b, head][..., members].sum(-1)


def merge_slots(
    keys: Tensor,
    values: Tensor,
    stats: list[Tensor],
    weights: Tensor,
    centres: Tensor,
    rest: Tensor,
    target: Tensor,
    *,
    value_norms: bool = False,
    backend: Backend = "auto",
) -> None:
    """Merge entries into others, in place.

    A centre and the entries that go to it become one: the key gets the direction of the weighted mean of their directions
    and the centre's own norm (the centre's own key, should the directions cancel), the value is the weighted mean, and
    statistics are summed. A centre that nothing goes to is not touched; the slots that were merged keep what they held.

    Args:
        keys, values: [batch, kv_heads, n, head_dim]; a slot's channels side by side.
        stats: tensors [batch, kv_heads, ..., n].
        weights: float32 [batch, kv_heads, n], above 0, the weight of each slot in its merge.
        centres: int64 [batch, kv_heads, k], slots that stay, each at most once.
        rest: int64 [batch, kv_heads, m], slots that leave.
        target: int64 [batch, kv_heads, m], index into `centres` for each of `rest`, or -1 for none.
        value_norms: merge values as keys: the direction is averaged, the centre's norm stays.
        backend: "triton" and "auto" on CUDA run the Triton kernels. They sum without atomics, so equal inputs give equal
            results; torch's sums on CUDA do not.

    Raises:
        ValueError: the backend does not exist, or cannot run here.
    """
    if use_triton(backend, keys) and keys.dtype != torch.float64:
        from kvpress.kernels.gpu import merge_slots as gpu

        return gpu.merge_slots(
            keys,
            values,
            stats,
            weights,
            centres,
            rest,
            target,
            value_norms=value_norms,
            tiny=TINY,
            cancelled=CANCELLED,
        )
    merge = _whole if torch.compiler.is_compiling() else _merge
    merge(keys, values, stats, weights, centres, rest, target, value_norms)


def _merge(
    keys: Tensor,
    values: Tensor,
    stats: list[Tensor],
    weights: Tensor,
    centres: Tensor,
    rest: Tensor,
    target: Tensor,
    value_norms: bool,
) -> None:
    """`merge_slots` by torch's operations."""
    batch, kv_heads, k = centres.shape
    bucket = torch.where(target < 0, k, target)  # the last bucket is thrown away
    touched = torch.zeros(batch, kv_heads, k + 1, dtype=torch.bool, device=keys.device)
    touched = touched.scatter_(2, bucket, True)[:, :, :k, None]

    weight = torch.nn.functional.pad(weights.gather(2, centres), (0, 1))
    weight = weight.scatter_add_(2, bucket, weights.gather(2, rest))[:, :, :k, None]
    for buffer, by_norm in ((keys, True), (values, value_norms)):
        slots = centres[..., None].expand(-1, -1, -1, buffer.shape[-1])
        held = buffer.gather(2, slots)
        mean = _summed(buffer, weights, centres, rest, bucket, by_norm) / weight
        if by_norm:
            length, norm = mean.norm(dim=-1, keepdim=True), held.float().norm(dim=-1, keepdim=True)
            mean = torch.where(length > CANCELLED, norm * mean / length.clamp(min=TINY), held.float())
        buffer.scatter_(2, slots, torch.where(touched, mean.to(buffer.dtype), held))
    for stat in stats:
        lead = stat.shape[2:-1]
        wide = (batch, kv_heads, *(1,) * len(lead))
        places, leavers = centres.view(*wide, -1).expand(*stat.shape[:-1], -1), rest.view(*wide, -1)
        moved = stat.gather(-1, leavers.expand(*stat.shape[:-1], -1))
        total = torch.nn.functional.pad(stat.gather(-1, places), (0, 1))
        total.scatter_add_(-1, bucket.view(*wide, -1).expand_as(moved), moved)
        stat.scatter_(-1, places, total[..., :k])


# One operation in a compiled graph: torch's compiler (2.13) fails where it fuses a scatter with the norms that it depends on.
_whole = torch.library.custom_op("kvpress::merge_slots", _merge, mutates_args=("keys", "values", "stats"))


def _summed(x: Tensor, weights: Tensor, centres: Tensor, rest: Tensor, bucket: Tensor, by_norm: bool) -> Tensor:
    """Per centre: its own weighted row of x plus those of the entries in its bucket, float32 [batch, kv_heads, k, d]."""

    def rows(slots: Tensor) -> Tensor:
        row = x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1])).float()
        if by_norm:
            row = row / row.norm(dim=-1, keepdim=True).clamp(min=TINY)
        return row.mul_(weights.gather(2, slots)[..., None])

    total = torch.nn.functional.pad(rows(centres), (0, 0, 0, 1))
    tile = max(1, TILE_NUMBERS // (x.shape[0] * x.shape[1] * x.shape[-1]))
    for start in range(0, rest.shape[2], tile):
        members = rows(rest[:, :, start : start + tile])
        total.scatter_add_(2, bucket[:, :, start : start + tile, None].expand_as(members), members)
    return total[:, :, : centres.shape[2]]
