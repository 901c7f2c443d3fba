"""evict_slot against its definition, and by hand."""

import pytest
import torch

from kvpress.kernels.evict_slot import evict_slot, evict_slot_reference
from support.slot_inputs import BATCH, KV_HEADS, levels

RECENTS = {"none": 0, "some": 5, "all": 1000}


@pytest.mark.parametrize("limits", [None, (4, 13)], ids=["always", "limits"])
@pytest.mark.parametrize("recent", RECENTS.values(), ids=list(RECENTS))
@pytest.mark.parametrize("n", [1, 6, 17])
def test_equals_the_definition(n, recent, limits):
    for seed in range(5):
        scores, positions = levels(n, seed)
        seen, recents = torch.tensor([3 * n, 3 * n - 2]), torch.full((2,), recent)
        limit = None if limits is None else torch.tensor(limits)
        expected = positions.clone()
        slots = evict_slot_reference(scores, expected, seen, recents, limit)
        found = evict_slot(scores, positions, seen, recents, limit)
        assert torch.equal(found, slots) and found.dtype == torch.int64 and torch.equal(positions, expected)


def test_by_hand():
    """The lowest of the older ones; of equals the newest; -inf and NaN are equal to the lowest number."""
    scores = torch.tensor([[[3.0, 1.0, 1.0, 0.0], [float("nan"), -float("inf"), 5.0, 0.0]]])
    positions = torch.tensor([[[0, 2, 1, 3], [1, 0, 2, 3]]], dtype=torch.int32)
    slots = evict_slot(scores, positions, torch.tensor([4]), torch.tensor([1]))
    assert slots.tolist() == [[1, 0]]
    assert positions.tolist() == [[[0, -1, 1, 3], [-1, 0, 2, 3]]]


def test_a_full_cache_is_one_with_less_to_look_at():
    scores = torch.rand(BATCH, KV_HEADS, 9, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9, dtype=torch.int32).repeat(BATCH, KV_HEADS, 1)
    other = positions.clone()
    seen, recents = torch.tensor([9, 9]), torch.tensor([2, 3])
    assert torch.equal(
        evict_slot(scores, positions, seen, recents), evict_slot(scores, other, seen, recents, full=True)
    )
    assert torch.equal(positions, other) and (positions < 0).sum() == BATCH * KV_HEADS


def test_a_head_within_its_limit_names_its_first_empty_slot():
    scores = torch.zeros(1, 1, 4)
    positions = torch.tensor([[[5, -1, 4, -1]]], dtype=torch.int32)
    before = positions.clone()
    slot = evict_slot(scores, positions, torch.tensor([6]), torch.tensor([0]), torch.tensor([2]))
    assert slot.tolist() == [[1]] and torch.equal(positions, before)
