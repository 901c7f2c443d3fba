"""compact_slots against its reference, slot by slot."""

import pytest
import torch

from kvpress.kernels.compact_slots import compact_slots, compact_slots_reference

BATCH, KV_HEADS, SLOTS = 2, 3, 17


def inputs(k, dtype=torch.float32, value_dim=16, strided=False):
    """A cache whose numbers are all different, indices in any order, about a third of them not chosen."""
    generator = torch.Generator().manual_seed(k)
    spare = 8 if strided else 0
    keys, values = (
        torch.randn(BATCH, KV_HEADS, SLOTS + spare, d, generator=generator).to(dtype)[:, :, :SLOTS]
        for d in (16, value_dim)
    )
    positions = torch.randint(100, (BATCH, KV_HEADS, SLOTS + spare), generator=generator).int()[:, :, :SLOTS]
    index = torch.rand(BATCH, KV_HEADS, SLOTS, generator=generator).argsort(dim=-1)[..., :k]
    return keys, values, positions, index, torch.rand(index.shape, generator=generator) < 0.7


@pytest.mark.parametrize("k", [1, 5, SLOTS], ids="k-{}".format)
@pytest.mark.parametrize("spare", [0, 1, 30], ids="{}-spare".format)
@pytest.mark.parametrize("strided", [False, True], ids=["compact", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_one_slot_at_a_time(k, spare, strided, dtype):
    """Any layout and capacity; what is behind the kept slots is zero, and empty by its position."""
    tensors = inputs(k, dtype, strided=strided)
    result = compact_slots(*tensors, k + spare)
    for tensor, expected in zip(result, compact_slots_reference(*tensors, k + spare), strict=True):
        assert tensor.dtype == expected.dtype and tensor.is_contiguous()
        assert torch.equal(tensor, expected)


def test_values_of_another_width():
    """Head dims of K and V may differ."""
    tensors = inputs(5, value_dim=24)
    for tensor, expected in zip(compact_slots(*tensors, 9), compact_slots_reference(*tensors, 9), strict=True):
        assert torch.equal(tensor, expected)


def test_is_a_copy():
    """The result shares no memory with the cache."""
    tensors = inputs(SLOTS)
    before = [tensor.clone() for tensor in tensors]
    for tensor in compact_slots(*tensors, SLOTS):
        tensor.zero_()
    assert all(torch.equal(tensor, held) for tensor, held in zip(tensors, before, strict=True))
