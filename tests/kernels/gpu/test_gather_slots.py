"""The Triton kernel of gather_slots and compact_slots against indexing and the reference."""

import pytest
import torch

from kvpress.kernels.compact_slots import compact_slots, compact_slots_reference
from kvpress.kernels.gather_slots import gather_slots
from support.accelerator import DEVICE

BATCH, KV_HEADS = 2, 3
# The kernel moves integers, so bfloat16 is right in the interpreter too.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]


def indices(slots, k):
    """In any order, with repetitions."""
    return torch.randint(slots, (BATCH, KV_HEADS, k), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def buffer(slots, width, dtype=torch.float32, spare=0):
    """[BATCH, KV_HEADS, slots(, width)], the front of a buffer with `spare` more slots."""
    shape = (BATCH, KV_HEADS, slots + spare) + (() if width is None else (width,))
    numbers = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(DEVICE, dtype)[:, :, :slots]


@pytest.mark.parametrize("width", [None, 16, 80, 96, 256, 300], ids=str)
@pytest.mark.parametrize(("slots", "k"), [(1, 1), (63, 5), (111, 63)], ids=str)
@pytest.mark.parametrize("spare", [0, 9], ids=["compact", "strided"])
def test_gather(width, slots, k, spare):
    """Any row width and source layout, with and without room behind the gathered slots."""
    source, index = buffer(slots, width, spare=spare), indices(slots, k)
    where = index if width is None else index[..., None].expand(-1, -1, -1, width)
    for capacity in (None, k + 7):
        result = gather_slots(source, index, capacity, backend="triton")
        assert result.is_contiguous() and result.shape[2] == (capacity or k)
        assert torch.equal(result[:, :, :k], source.gather(2, where))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [None, 16], ids=str)
def test_keeps_the_dtype(dtype, width):
    source, index = buffer(21, width, dtype), indices(21, 5)
    result = gather_slots(source, index.int(), backend="triton")
    assert result.dtype == dtype
    assert torch.equal(result, gather_slots(source, index, backend="torch"))


def test_no_slots():
    """Nothing to gather is no launch."""
    assert gather_slots(buffer(5, 16), indices(5, 0), backend="triton").shape == (BATCH, KV_HEADS, 0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value_width", [64, 80], ids="v-{}".format)
@pytest.mark.parametrize(("k", "capacity"), [(1, 1), (40, 63), (63, 200)], ids=str)
def test_compact(dtype, value_width, k, capacity):
    """K, V and positions in one pass; what is not chosen has no position, what is behind is zero."""
    generator = torch.Generator().manual_seed(2)
    keys, values = buffer(111, 64, dtype, 9), buffer(111, value_width, dtype)
    positions, index = buffer(111, None, torch.int32, 5), indices(111, k)
    chosen = (torch.rand(index.shape, generator=generator) < 0.7).to(DEVICE)
    result = compact_slots(keys, values, positions, index, chosen, capacity, backend="triton")
    expected = compact_slots_reference(keys, values, positions, index, chosen, capacity)
    for tensor, other in zip(result, expected, strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other)
