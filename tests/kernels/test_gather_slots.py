"""gather_slots against indexing one slot at a time."""

import pytest
import torch

from kvpress.kernels.gather_slots import gather_slots

BATCH, KV_HEADS, SLOTS = 2, 3, 17
TRAILING = pytest.mark.parametrize("trailing", [(), (16,), (80,)], ids=["3-D", "d-16", "d-80"])
CAPACITY = pytest.mark.parametrize("spare", [None, 0, 1, 30], ids=["default", "tight", "one-spare", "many-spare"])


def source(trailing, dtype=torch.float32, strided=False):
    """Slots [batch, kv_heads, SLOTS, ...], all different; strided: the front of a larger buffer."""
    shape = (BATCH, KV_HEADS, SLOTS + (8 if strided else 0), *trailing)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)[:, :, :SLOTS]


def indices(k, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SLOTS, (BATCH, KV_HEADS, k), generator=generator)


@TRAILING
@CAPACITY
@pytest.mark.parametrize("k", [1, 5, SLOTS], ids="k-{}".format)
@pytest.mark.parametrize("strided", [False, True], ids=["compact", "strided"])
def test_equals_one_slot_at_a_time(trailing, spare, k, strided):
    """Any source layout and capacity; indices may repeat and come in any order."""
    slots, index = source(trailing, strided=strided), indices(k)
    capacity = None if spare is None else k + spare
    result = gather_slots(slots, index, capacity)
    assert result.shape == (BATCH, KV_HEADS, capacity or k, *trailing)
    assert result.is_contiguous()
    for b in range(BATCH):
        for head in range(KV_HEADS):
            for target, slot in enumerate(index[b, head].tolist()):
                assert torch.equal(result[b, head, target], slots[b, head, slot])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("spare", [0, 2], ids=["tight", "spare"])
def test_keeps_the_dtype(dtype, spare):
    """Statistics and positions are gathered as well as keys."""
    slots, index = source((), dtype), indices(5)
    result = gather_slots(slots, index, 5 + spare)
    assert result.dtype == dtype
    assert torch.equal(result[:, :, :5], slots.gather(2, index))


@pytest.mark.parametrize("spare", [0, 2], ids=["tight", "spare"])
@pytest.mark.parametrize("strided", [False, True], ids=["compact", "strided"])
def test_is_a_copy(spare, strided):
    """The result shares no memory with the source, not even where every slot is kept."""
    slots = source((16,), strided=strided)
    before = slots.clone()
    everything = torch.arange(SLOTS).expand(BATCH, KV_HEADS, SLOTS)
    result = gather_slots(slots, everything, SLOTS + spare)
    assert torch.equal(result[:, :, :SLOTS], before)
    result.zero_()
    assert torch.equal(slots, before)


def test_a_slice_of_the_batch():
    """One sequence of a batch, itself a view."""
    slots, index = source((16,)), indices(4)
    assert torch.equal(gather_slots(slots[1:], index[1:]), gather_slots(slots, index)[1:])
