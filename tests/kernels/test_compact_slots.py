"""compact_slots against its reference, slot by slot, on both paths."""

import pytest
import torch

from kvpress.kernels.compact_slots import compact_slots, compact_slots_reference
from support.backends import BACKENDS, on

BATCH, KV_HEADS = 2, 3


def inputs(backend, k, slots=17, dtype=torch.float32, width=16, value_width=16, strided=False):
    """A cache whose numbers are all different, indices in any order, about a third of them not chosen."""
    generator = torch.Generator().manual_seed(k)
    behind = 8 if strided else 0
    keys, values = (
        torch.randn(BATCH, KV_HEADS, slots + behind, d, generator=generator).to(dtype) for d in (width, value_width)
    )
    positions = torch.randint(100, (BATCH, KV_HEADS, slots + behind), generator=generator).int()
    index = torch.rand(BATCH, KV_HEADS, slots, generator=generator).argsort(dim=-1)[..., :k]
    held = [x[:, :, :slots] for x in on(backend, keys, values, positions)]
    return [*held, *on(backend, index, torch.rand(index.shape, generator=generator) < 0.7)]


@BACKENDS
@pytest.mark.parametrize(("slots", "k"), [(17, 1), (17, 5), (17, 17), (111, 40), (111, 63)], ids=str)
@pytest.mark.parametrize("spare", [0, 1, 30, 137], ids="{}-spare".format)
@pytest.mark.parametrize("strided", [False, True], ids=["compact", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (16, 24), (64, 64), (64, 80)], ids=str)
def test_equals_one_slot_at_a_time(backend, slots, k, spare, strided, dtype, width, value_width):
    """Any layout and capacity, values of another width; behind the kept slots is zero, and empty by its position."""
    tensors = inputs(backend, k, slots, dtype, width, value_width, strided)
    result = compact_slots(*tensors, k + spare, backend=backend)
    for tensor, expected in zip(result, compact_slots_reference(*tensors, k + spare), strict=True):
        assert tensor.dtype == expected.dtype and tensor.is_contiguous()
        assert torch.equal(tensor, expected)


@BACKENDS
def test_is_a_copy(backend):
    """The result shares no memory with the cache."""
    tensors = inputs(backend, 17)
    before = [tensor.clone() for tensor in tensors]
    for tensor in compact_slots(*tensors, 17, backend=backend):
        tensor.zero_()
    assert all(torch.equal(tensor, held) for tensor, held in zip(tensors, before, strict=True))
