"""Inputs of merge_slots, and what it is to compute in a float64 loop."""

import torch

from support.backends import on

BATCH, KV_HEADS, WIDTH = 2, 3, 8


def inputs(backend, n=23, k=7, m=12, width=WIDTH, value_width=None, dtype=torch.float32, behind=0):
    """Keys, values, stats of three and four dimensions, weights; centres and rest apart; some targets are none.

    What has a place for each slot is the front of a buffer with `behind` more slots, of NaN.
    """
    generator = torch.Generator().manual_seed(n)

    def slots(*shape, dim, dtype=torch.float32, low=0.0):
        numbers = torch.rand(BATCH, KV_HEADS, *shape, generator=generator) * (1 - low) + low
        buffer = torch.full((*numbers.shape[:dim], n + behind, *numbers.shape[dim + 1 :]), float("nan"))
        buffer.narrow(dim, 0, n).copy_(numbers)
        return on(backend, buffer.to(dtype))[0].narrow(dim, 0, n)

    keys = slots(n, width, dim=2, dtype=dtype, low=-1.0)
    values = slots(n, value_width or width, dim=2, dtype=dtype, low=-1.0)
    stats, weights = [slots(n, dim=2), slots(5, n, dim=3)], slots(n, dim=2, low=0.01)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(BATCH * KV_HEADS)])
    order = order.view(BATCH, KV_HEADS, n)
    target = torch.randint(-1, k, (BATCH, KV_HEADS, m), generator=generator)
    return [keys, values, stats, weights, *on(backend, order[..., :k], order[..., k : k + m], target)]


def copied(arguments):
    """The same, with buffers of their own behind what is written."""
    keys, values, stats, *others = arguments

    def copy(x):
        whole = x.clone() if x._base is None else x._base.clone()
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return [copy(keys), copy(values), [copy(stat) for stat in stats], *others]


def brute(keys, values, stats, weights, centres, rest, target, value_norms):
    """In float64, from the definition: new keys, values and statistics."""
    keys, values, weights, centres, rest, target = (x.cpu() for x in (keys, values, weights, centres, rest, target))
    keys, values, stats = keys.double(), values.double(), [stat.double().cpu() for stat in stats]
    widths = keys.shape[-1], values.shape[-1], values.shape[-1]
    old_keys, old_values, old_stats = keys.clone(), values.clone(), [stat.clone() for stat in stats]
    for b in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for place, centre in enumerate(centres[b, head].tolist()):
                leaving = [
                    s for s, t in zip(rest[b, head].tolist(), target[b, head].tolist(), strict=True) if t == place
                ]
                if not leaving:
                    continue
                members = [centre, *leaving]
                share = [weights[b, head, s].item() for s in members]
                share = [x / sum(share) for x in share]
                key, value, direction = (torch.zeros(width, dtype=torch.float64) for width in widths)
                for x, slot in zip(share, members, strict=True):
                    key += x * old_keys[b, head, slot] / old_keys[b, head, slot].norm()
                    value += x * old_values[b, head, slot]
                    direction += x * old_values[b, head, slot] / old_values[b, head, slot].norm()
                keys[b, head, centre] = old_keys[b, head, centre].norm() * key / key.norm()
                turned = old_values[b, head, centre].norm() * direction / direction.norm()
                values[b, head, centre] = turned if value_norms else value
                for stat, old in zip(stats, old_stats, strict=True):
                    stat[b, head, ..., centre] = sum(old[b, head, ..., slot] for slot in members)
    return keys, values, stats


def check(got, expected, **tolerance):
    """Keys, values and statistics are those of the float64 loop."""
    for ours, theirs in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, **(tolerance or {"rtol": 1e-5, "atol": 2e-6}))
