"""vertical_slash_mass and the means of blocks against their definitions."""

import pytest
import torch

from kvpress.kernels import vertical_slash_mass as module
from kvpress.kernels.block_means import block_means, block_scores
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass, vertical_slash_mass_reference


def inputs(rows, n, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + n)
    query = torch.randn(2, heads, rows, 8, generator=generator).to(dtype)
    return query, torch.randn(2, kv_heads, n, 8, generator=generator).to(dtype)


def test_uniform_rows_by_hand():
    """Rows 4 and 5 of six equal entries: 1/5 + 1/6 five times, then 1/6."""
    by_entry, by_distance = vertical_slash_mass(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 6, 4), scale=1.0)
    expected = torch.tensor([0.366667] * 5 + [0.166667])
    for found in (by_entry, by_distance):
        torch.testing.assert_close(found[0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 9), (6, 6), (4, 23), (16, 17)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2), (10, 5)])
@pytest.mark.parametrize("tile", [1, 300, 560, 1 << 24])
def test_equals_the_definition(rows, n, heads, kv_heads, tile, monkeypatch):
    """In tiles of one head, of some, and whole."""
    monkeypatch.setattr(module, "TILE_SCORES", tile)
    query, key = inputs(rows, n, heads, kv_heads)
    for softcap in (None, 1.5):
        found = vertical_slash_mass(query, key, scale=0.7, softcap=softcap)
        expected = vertical_slash_mass_reference(query, key, scale=0.7, softcap=softcap)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.sum(-1), torch.full(one.shape[:2], float(rows)))


def test_half_precision_and_a_buffers_front():
    query, key = inputs(5, 19, dtype=torch.bfloat16)
    expected = vertical_slash_mass(query.float(), key.float(), scale=0.7)
    buffer = torch.full((2, 2, 30, 8), float("nan"), dtype=torch.bfloat16)
    buffer[:, :, :19] = key
    for one, other in zip(vertical_slash_mass(query, buffer[:, :, :19], scale=0.7), expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("first", "rows"), [(0, 8), (0, 9), (6, 9), (3, 1), (5, 2), (4, 4)])
def test_means_of_blocks(first, rows):
    """Over the rows that a block has, wherever they begin and end."""
    x = torch.randn(2, 3, rows, 5, generator=torch.Generator().manual_seed(1))
    found = block_means(x, first, 4)
    at = torch.arange(first, first + rows) // 4
    expected = [x[:, :, at == block].mean(2) for block in at.unique()]
    torch.testing.assert_close(found, torch.stack(expected, dim=2))
    keys = torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block_scores(found, keys), found @ keys.expand(2, 3, 6, 5).transpose(-1, -2))
