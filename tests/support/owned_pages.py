"""Inputs of `paged_attention`: pages spread evenly over kv heads and not, heads without entries."""

import torch

KV_HEADS = 3
# Kv heads' numbers of pages, one sequence after the other.
SPREADS = {
    "even": [[3, 3, 3], [3, 3, 3]],
    "one-has-all": [[0, 7, 0], [7, 0, 0]],
    "uneven": [[1, 9, 2], [2, 0, 10]],
    "one-page": [[0, 0, 1], [1, 0, 0]],
}


def inputs(spread, page, group, head_dim=32, dtype=torch.float32, empty_slots=float("nan")):
    """Pages in any order; the second sequence's first head with pages has no entry in any; empty slots hold what is told."""
    counts = SPREADS[spread]
    generator = torch.Generator().manual_seed(page + group + head_dim)
    owner = torch.stack([torch.arange(KV_HEADS).repeat_interleave(torch.tensor(row)) for row in counts])
    order = torch.rand(owner.shape, generator=generator).argsort(-1)
    owner, slots = owner.gather(1, order), owner.shape[1] * page
    query = 2 * torch.randn(2, KV_HEADS * group, 1, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, slots, head_dim, generator=generator).to(dtype)
    valid = torch.rand(2, slots, generator=generator) < 0.7
    valid[0, -page] = True
    empty = next(head for head, count in enumerate(counts[1]) if count)
    valid[1, owner[1].repeat_interleave(page) == empty] = False
    key[~valid] = value[~valid] = empty_slots
    return query, key, value, owner, valid


def options(features, heads):
    """The named features, of so many query heads."""
    sinks = torch.linspace(-1, 2, heads)
    return {name: x for name, x in {"softcap": 1.5, "sinks": sinks}.items() if name in features}
