"""Caches of a few slots, and what is written into them and dropped from them: for the tests of write_slot and evict_slot."""

import torch

BATCH, KV_HEADS = 2, 3


def cache(capacity, head_dim=16, dtype=torch.float32, spare=5):
    """keys, values and positions of a random permutation, views of longer buffers; statistics of one row and of four."""
    generator = torch.Generator().manual_seed(capacity)
    keys = torch.randn(BATCH, KV_HEADS, capacity + spare, head_dim, generator=generator).to(dtype)
    values = torch.randn(BATCH, KV_HEADS, capacity + spare, head_dim // 2, generator=generator).to(dtype)
    order = torch.rand(BATCH, KV_HEADS, capacity + spare, generator=generator).argsort(-1).int()
    stats = [torch.rand(BATCH, KV_HEADS, *rows, capacity + spare, generator=generator) for rows in ((), (4,))]
    return keys, values, order, stats


def entry(head_dim=16, dtype=torch.float32):
    """key, value as they come out of a model, heads behind tokens, and the position of each sequence."""
    generator = torch.Generator().manual_seed(1)
    key, value = (
        torch.randn(BATCH, 1, KV_HEADS, width, generator=generator).to(dtype).transpose(1, 2)
        for width in (head_dim, head_dim // 2)
    )
    return key, value, torch.tensor([[1000], [-1]])


def levels(n, seed=0):
    """Scores with many ties and all that is not finite, and positions with empty slots; the last head of all holds nothing."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.5, 1.5, -2.0])
    scores = special[torch.randint(len(special), (BATCH, KV_HEADS, n), generator=generator)]
    positions = torch.stack([torch.randperm(3 * n, generator=generator)[:n] for _ in range(BATCH * KV_HEADS)])
    positions = positions.view(BATCH, KV_HEADS, n).int()
    positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    positions[-1, -1] = -1
    return scores, positions
