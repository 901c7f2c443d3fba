"""write_slot against its definition."""

import pytest
import torch

from kvpress.kernels.write_slot import write_slot, write_slot_reference
from support.slot_inputs import BATCH, KV_HEADS, cache, entry

SLOTS = {
    "number": 7,
    "own": torch.tensor([[3, 0, 11], [5, 5, 2]]),
    "own-int32": torch.tensor([[3, 0, 11], [5, 5, 2]], dtype=torch.int32),
    "one": torch.tensor([[4]]),
}


@pytest.mark.parametrize("slot", SLOTS.values(), ids=list(SLOTS))
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("views", [False, True], ids=["whole", "views"])
def test_equals_the_definition(slot, backend, views):
    """One slot of each head changes and nothing else, also in views of longer buffers."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (it is optional)")
    held = cache(12)
    expected = cache(12)
    if views:
        held, expected = (
            (*(x[:, :, :12] for x in found[:3]), [stat[..., :12] for stat in found[3]]) for found in (held, expected)
        )
    write_slot(*held, slot, *entry(), backend=backend)
    write_slot_reference(*expected, slot, *entry())
    for ours, theirs in zip((*held[:3], *held[3]), (*expected[:3], *expected[3]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("position", [torch.tensor([9]), torch.tensor([[9]]), torch.tensor([9, 9])], ids=str)
def test_forms_of_the_position(position):
    keys, values, positions, stats = cache(12)
    write_slot(keys, values, positions, stats, 3, *entry()[:2], position)
    assert (positions[:, :, 3] == 9).all() and all((stat[..., 3] == 0).all() for stat in stats)


def test_no_statistics():
    keys, values, positions, _ = cache(12)
    write_slot(keys, values, positions, [], torch.zeros(BATCH, KV_HEADS, dtype=torch.int64), *entry())
    assert torch.equal(keys[:, :, 0], entry()[0][:, :, 0])


def test_what_is_refused():
    """A slot behind the last, and a dtype that the cache has not: before anything is written."""
    keys, values, positions, stats = cache(12)
    before = keys.clone()
    for slot in (17, -1):
        with pytest.raises(ValueError, match=f"slot={slot} is none of the 17 slots"):
            write_slot(keys, values, positions, stats, slot, *entry())
    with pytest.raises(ValueError, match="float16"):
        write_slot(keys, values, positions, stats, 0, *entry(dtype=torch.float16))
    assert torch.equal(keys, before)
