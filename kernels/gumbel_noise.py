"""Gumbel noise that a seed and the places determine: the same number at the same place, whatever was drawn before.

No random generator is kept anywhere. One table of independent Gumbel(0, 1) numbers is made from the seed, and each row reads
a run of it: the entry at position p reads number `offset + p`, and the offset is a hash of the row's place. So a sequence gets
the same noise alone and in a batch, in one pass and in chunks, on a CPU and on a GPU.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Numbers in the table: positions past it wrap around.
TABLE = 1 << 18


@lru_cache(maxsize=8)
def gumbel_table(seed: int) -> Tensor:
    """The table of a seed, float32 [TABLE], mean 0.5772 and standard deviation 1.2825."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(TABLE, dtype=torch.float64, generator=generator, device="cpu")
    tiny = torch.finfo(torch.float64).tiny
    return uniform.clamp_(min=tiny).log_().neg_().clamp_(min=tiny).log_().neg_().float()


@lru_cache(maxsize=8)
def _table_on(seed: int, device: torch.device) -> Tensor:
    return gumbel_table(seed).to(device)


@torch.compiler.assume_constant_result
def gumbel_table_on(seed: int, device: torch.device) -> Tensor:
    """The table on a device; kept there, because every layer of every step reads it. A constant in a compiled graph."""
    return _table_on(seed, device)


def gumbel_noise(seed: int, layer: int, rows: Tensor, entries: Tensor, heads: int) -> Tensor:
    """Noise for every head, row and entry.

    Args:
        seed: of the table.
        layer: index of the layer, so that layers differ.
        rows: int [batch, rows], the position of each query row.
        entries: int [batch, kv_heads, n], the position of each entry (a negative one, an empty slot, gets any number).
        heads: query heads; head h reads kv head h // (heads / kv_heads).

    Returns:
        float32 [batch, heads, rows, n].
    """
    kv_heads = entries.shape[1]
    offsets = gumbel_offsets(layer, rows, heads)
    where = entries.long().repeat_interleave(heads // kv_heads, dim=1)[:, :, None] + offsets[..., None]
    return gumbel_table_on(seed, entries.device)[where % TABLE]


def gumbel_noise_in_order(seed: int, layer: int, rows: Tensor, count: int, heads: int) -> Tensor:
    """`gumbel_noise` for the entries 0 .. count - 1, as copies of runs of the table."""
    table = gumbel_table_on(seed, rows.device)
    extended = table.repeat(1 + -(-count // TABLE))
    runs = extended.unfold(0, count, 1) if count else extended.new_empty(TABLE, 0)
    offsets = gumbel_offsets(layer, rows, heads)
    return runs.index_select(0, offsets.flatten()).view(*offsets.shape, count)


def gumbel_offsets(layer: int, rows: Tensor, heads: int) -> Tensor:
    """Where each head and row starts to read, int64 [batch, heads, rows]: a multiplicative hash of its place."""
    head = torch.arange(heads, device=rows.device)[:, None]
    place = (rows.long()[:, None] * 1_000_003 + head) * 1_009 + layer
    mixed = (place ^ (place >> 15)) * 0x2C1B3C6D
    mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39
    return (mixed ^ (mixed >> 15)) % TABLE
