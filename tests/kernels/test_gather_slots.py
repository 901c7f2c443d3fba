"""gather_slots against indexing one slot at a time, on both paths."""

import pytest
import torch

from kvpress.kernels.gather_slots import gather_slots
from support.backends import BACKENDS, on

BATCH, KV_HEADS = 2, 3
# Slots are moved, never computed with, so bfloat16 is right in Triton's interpreter too.
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool]
SPARE = pytest.mark.parametrize("spare", [0, 2], ids=["tight", "spare"])
STRIDED = pytest.mark.parametrize("behind", [0, 8], ids=["compact", "strided"])


def source(backend, slots=17, width=16, dtype=torch.float32, behind=0):
    """Slots [batch, kv_heads, slots(, width)], the front of a buffer with so many `behind` them."""
    shape = (BATCH, KV_HEADS, slots + behind) + (() if width is None else (width,))
    numbers = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return on(backend, numbers)[0][:, :, :slots]


def indices(backend, slots, k):
    """In any order, with repetitions."""
    index = torch.randint(slots, (BATCH, KV_HEADS, k), generator=torch.Generator().manual_seed(1))
    return on(backend, index)[0]


@BACKENDS
@pytest.mark.parametrize("width", [None, 16, 80, 96, 256, 300], ids="d-{}".format)
@pytest.mark.parametrize("spare", [None, 0, 1, 30], ids=["default", "tight", "one-spare", "many-spare"])
@pytest.mark.parametrize(("slots", "k"), [(1, 1), (17, 17), (63, 5), (111, 63)], ids=str)
@STRIDED
def test_equals_one_slot_at_a_time(backend, width, spare, slots, k, behind):
    """Any row width, source layout and capacity; indices may repeat and come in any order."""
    held, index = source(backend, slots, width, behind=behind), indices(backend, slots, k)
    capacity = None if spare is None else k + spare
    result = gather_slots(held, index, capacity, backend=backend)
    assert result.shape == (BATCH, KV_HEADS, capacity or k, *held.shape[3:])
    assert result.is_contiguous()
    for b in range(BATCH):
        for head in range(KV_HEADS):
            for target, slot in enumerate(index[b, head].tolist()):
                assert torch.equal(result[b, head, target], held[b, head, slot])


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [None, 16], ids=["3-D", "4-D"])
@SPARE
def test_keeps_the_dtype(backend, dtype, width, spare):
    """Statistics and positions are gathered as well as keys, by indices of 32 bits too."""
    slots, index = source(backend, width=width, dtype=dtype), indices(backend, 17, 5)
    result = gather_slots(slots, index.int(), 5 + spare, backend=backend)
    where = index if width is None else index[..., None].expand(-1, -1, -1, width)
    assert result.dtype == dtype
    assert torch.equal(result[:, :, :5], slots.gather(2, where))


@BACKENDS
@SPARE
@STRIDED
def test_is_a_copy(backend, spare, behind):
    """The result shares no memory with the source, not even where every slot is kept."""
    slots = source(backend, behind=behind)
    before = slots.clone()
    everything = torch.arange(17, device=slots.device).expand(BATCH, KV_HEADS, 17)
    result = gather_slots(slots, everything, 17 + spare, backend=backend)
    assert torch.equal(result[:, :, :17], before)
    result.zero_()
    assert torch.equal(slots, before)


@BACKENDS
def test_a_slice_of_the_batch(backend):
    """One sequence of a batch, itself a view."""
    slots, index = source(backend), indices(backend, 17, 4)
    part = gather_slots(slots[1:], index[1:], backend=backend)
    assert torch.equal(part, gather_slots(slots, index, backend=backend)[1:])


@BACKENDS
def test_no_slots(backend):
    empty = gather_slots(source(backend), indices(backend, 17, 0), backend=backend)
    assert empty.shape == (BATCH, KV_HEADS, 0, 16)
