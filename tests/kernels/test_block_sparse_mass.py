"""block_sparse_mass against its reference and against the attention's own weights in float64."""

import pytest
import torch

from kvpress.kernels import block_lists
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.block_sparse_mass import block_sparse_mass, block_sparse_mass_reference
from support.attention_inputs import KV_HEADS
from support.attention_inputs import prompt_inputs as inputs
from support.block_lists import ALL_FORMS, GROUPS, SHAPES, lists, reads


def exact(query, key, seen, softcap=None, sinks=None):
    """Column sums of the softmax in float64, from the pairs that are read."""
    group = query.shape[1] // key.shape[1]
    scores = 0.3 * query.double() @ key.double().repeat_interleave(group, dim=1).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.unflatten(1, (-1, group)).sum((2, 3)).float()


@SHAPES
@GROUPS
@ALL_FORMS
@pytest.mark.parametrize("per_head", [True, False], ids=["per-head", "per-kv-head"])
def test_equals_the_definition(rows, past, group, forms, per_head):
    query, key, value = inputs(rows, past, group)
    chosen = lists(forms, rows, past, KV_HEADS * group if per_head else KV_HEADS)
    options = {"scale": 0.3, "block_size": 16, **chosen}
    _, lse = block_sparse_attention(query, key, value, **options)
    mass = block_sparse_mass(query, key, lse, **options)
    torch.testing.assert_close(mass, block_sparse_mass_reference(query, key, lse, **options), atol=1e-5, rtol=1e-5)
    seen = reads(rows, past, KV_HEADS * group, **chosen)
    torch.testing.assert_close(mass, exact(query, key, seen), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass.sum(-1), torch.full(mass.shape[:2], float(rows * group)), atol=1e-3, rtol=1e-5)
    unread = ~seen.unflatten(1, (KV_HEADS, group)).any(2).any(2)
    assert (mass[unread] == 0).all()


@pytest.mark.parametrize(
    "features", [{"softcap": 1.5}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -0.5])}], ids=str
)
def test_softcap_and_sinks(features):
    query, key, value = inputs(37, 30, 3)
    chosen = lists(("blocks", "columns"), 37, 30, KV_HEADS)
    options = {"scale": 0.3, "block_size": 16, **chosen}
    _, lse = block_sparse_attention(query, key, value, **options, **features)
    capped = {name: one for name, one in features.items() if name == "softcap"}
    mass = block_sparse_mass(query, key, lse, **options, **capped)
    torch.testing.assert_close(
        mass, exact(query, key, reads(37, 30, KV_HEADS * 3, **chosen), **features), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("key_block_size", [1, 2, 8])
@pytest.mark.parametrize("forms", [("blocks",), ("blocks", "columns", "distances")], ids=str)
def test_small_blocks_of_keys(key_block_size, forms):
    query, key, value = inputs(63, 20, 3)
    chosen = lists(forms, 63, 20, KV_HEADS)
    small = torch.Generator().manual_seed(3)
    shape = (*chosen["blocks"].shape[:3], 83 // key_block_size + 1)
    chosen["blocks"] = torch.rand(shape, generator=small).argsort(-1)[..., : shape[-1] // 3]
    options = {"scale": 0.3, "block_size": 16, "key_block_size": key_block_size, **chosen}
    _, lse = block_sparse_attention(query, key, value, **options)
    seen = reads(63, 20, KV_HEADS * 3, key_block_size=key_block_size, **chosen)
    mass = block_sparse_mass(query, key, lse, **options)
    torch.testing.assert_close(mass, exact(query, key, seen), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass, block_sparse_mass_reference(query, key, lse, **options), atol=1e-5, rtol=1e-5)


def test_rows_that_do_not_count():
    query, key, value = inputs(37, 30, 1)
    options = {"scale": 0.3, "block_size": 16, **lists(("blocks",), 37, 30, KV_HEADS)}
    _, lse = block_sparse_attention(query, key, value, **options)
    first, rest = lse.clone(), lse.clone()
    first[:, :, 5:], rest[:, :, :5] = float("inf"), float("inf")
    both = block_sparse_mass(query, key, first, **options) + block_sparse_mass(query, key, rest, **options)
    torch.testing.assert_close(both, block_sparse_mass(query, key, lse, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [1, 1 << 10])
def test_tiles_do_not_show(tile, monkeypatch):
    query, key, value = inputs(63, 20, 3)
    chosen = lists(("blocks", "columns", "diagonals"), 63, 20, KV_HEADS)
    options = {"scale": 0.3, "block_size": 16, **chosen}
    _, lse = block_sparse_attention(query, key, value, **options)
    whole = block_sparse_mass(query, key, lse, **options)
    monkeypatch.setattr(block_lists, "TILE_NUMBERS", tile)
    monkeypatch.setattr(block_lists, "TILE_MARKS", tile)
    torch.testing.assert_close(block_sparse_mass(query, key, lse, **options), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(block_sparse_mass(query, key, lse, **options), block_sparse_mass(query, key, lse, **options))


def test_everything_listed_is_the_dense_mass():
    query, key, value = inputs(40, 24, 3)
    blocks = torch.arange(4).expand(2, KV_HEADS, 3, -1)
    _, lse = block_sparse_attention(query, key, value, scale=0.3, blocks=blocks, block_size=16)
    mass = block_sparse_mass(query, key, lse, scale=0.3, blocks=blocks, block_size=16)
    dense = attention_mass(query, torch.arange(24, 64).expand(2, -1), key, None, scale=0.3)
    torch.testing.assert_close(mass, dense, atol=1e-5, rtol=1e-5)
