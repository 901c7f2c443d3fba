"""decode_attention over pages: the same as over the slots that they have."""

import pytest
import torch

from kvpress.kernels.decode_attention import decode_attention, decode_attention_reference

BATCH, KV_HEADS, GROUP = 2, 2, 3


def inputs(slots, dtype=torch.float32):
    generator = torch.Generator().manual_seed(slots)
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 16, generator=generator).to(dtype)
    key, value = torch.randn(2, BATCH, KV_HEADS, slots, 16, generator=generator).to(dtype)
    return query, key, value


@pytest.mark.parametrize("function", [decode_attention, decode_attention_reference], ids=["fast", "reference"])
@pytest.mark.parametrize("rows", [KV_HEADS, KV_HEADS * GROUP], ids=["kv-head", "head"])
def test_by_hand(function, rows):
    """Pages 2 and 0 of ten slots, four each: page 2 has slots 8 and 9 alone, and the last head or row skips page 0."""
    query, key, value = inputs(10)
    index = torch.tensor([2, 0]).expand(BATCH, KV_HEADS, 2)
    valid = torch.ones(BATCH, rows, 2, dtype=torch.bool)
    valid[1, -1, 1] = False
    options = {"scale": 0.3, "index": index, "page_size": 4}
    output, mass, _ = function(
        query, key, value, valid, **options, **({"with_mass": True} if function is decode_attention else {})
    )
    assert mass.shape == (BATCH, KV_HEADS, 8) and (mass[:, :, 2:4] == 0).all()
    slots = torch.tensor([8, 9, 0, 1, 2, 3])
    for b in range(BATCH):
        for head in range(KV_HEADS * GROUP):
            own = slots[:2] if not valid[b, head * rows // (KV_HEADS * GROUP), 1] else slots
            keys, values = key[b, head // GROUP, own], value[b, head // GROUP, own]
            weights = (query[b, head] @ keys.T * 0.3).softmax(-1)
            torch.testing.assert_close(output[b, head], weights @ values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("slots", "page_size"), [(1, 16), (63, 16), (64, 16), (111, 7)], ids=str)
def test_all_pages_are_all_slots(slots, page_size, dtype):
    """Every page, in order, with and without weights."""
    query, key, value = inputs(slots, dtype)
    pages = torch.arange(-(-slots // page_size)).expand(BATCH, KV_HEADS, -1)
    expected, expected_mass, _ = decode_attention_reference(query, key, value, scale=0.3)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-3}
    output, mass, _ = decode_attention(query, key, value, scale=0.3, index=pages, page_size=page_size, with_mass=True)
    torch.testing.assert_close(output, expected, **tolerance)
    torch.testing.assert_close(mass[:, :, :slots], expected_mass, rtol=1e-4, atol=1e-5)
    output, _, _ = decode_attention(query, key, value, scale=0.3, index=pages, page_size=page_size)
    torch.testing.assert_close(output, expected, **tolerance)


@pytest.mark.parametrize(("page_size", "index"), [(16, None), (0, torch.zeros(2, 2, 1, dtype=torch.int64))], ids=str)
def test_bad_pages_are_refused(page_size, index):
    with pytest.raises(ValueError, match=f"page_size={page_size} "):
        decode_attention(*inputs(20), scale=0.3, index=index, page_size=page_size)
