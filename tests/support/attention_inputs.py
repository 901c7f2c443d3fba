"""Random queries, keys and values, and features of attention, for the tests of kernels."""

import torch

BATCH, KV_HEADS = 2, 2


def qkv(rows, entries, group, head_dim=16, dtype=torch.float32, seed=0, spare=0):
    """Queries [2, 2 * group, rows, head_dim], and the first `entries` of buffers with `spare` more that hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, KV_HEADS * group, rows, head_dim, generator=generator).to(dtype)
    buffers = torch.randn(2, BATCH, KV_HEADS, entries + spare, head_dim, generator=generator).to(dtype)
    buffers[..., entries:, :] = float("nan")
    return query, buffers[0, :, :, :entries], buffers[1, :, :, :entries]


def step_inputs(slots, *shape, **fields):
    """A decode step's row over so many slots."""
    return qkv(1, slots, *shape, **fields)


def prompt_inputs(rows, past, *shape, **fields):
    """The last `rows` of past + rows entries."""
    return qkv(rows, past + rows, *shape, **fields)


def options(features, entries, query, seed=1):
    """Keyword arguments for the named features; of the last sequence's last kv head no entry is valid."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    if "valid" in features:
        chosen["valid"] = torch.rand(BATCH, KV_HEADS, entries, generator=generator) < 0.6
        chosen["valid"][-1, -1] = False
    if "softcap" in features:
        chosen["softcap"] = 1.5
    if "sinks" in features:
        chosen["sinks"] = torch.randn(query.shape[1], generator=generator)
    if "moved" in features:
        other = torch.randn(query.shape, generator=generator).to(query.dtype)
        chosen["moved"] = other, torch.rand(BATCH, KV_HEADS, entries, generator=generator) < 0.3
    return chosen
