"""The Triton kernels of write_slot and evict_slot against the definitions."""

import pytest
import torch

from kvpress.kernels.evict_slot import evict_slot, evict_slot_reference
from kvpress.kernels.gpu import evict_slot as evict_module
from kvpress.kernels.gpu import write_slot as write_module
from kvpress.kernels.write_slot import write_slot, write_slot_reference
from support.accelerator import DEVICE, DTYPES
from support.slot_inputs import BATCH, KV_HEADS, cache, entry, levels


@pytest.mark.parametrize("head_dim", [16, 80, 128], ids="d-{}".format)
@pytest.mark.parametrize("form", ["number", "own", "one"])
@DTYPES
def test_write(head_dim, form, dtype):
    """Into views of longer buffers, of keys that are wider than values."""
    slot = {"number": 63, "own": torch.tensor([[3, 0, 62], [5, 5, 2]]), "one": torch.tensor([[4]])}[form]
    expected, held = (
        (*(x[:, :, :64] for x in (keys, values, positions)), [stat[..., :64] for stat in stats])
        for keys, values, positions, stats in (cache(64, head_dim, dtype) for _ in range(2))
    )
    write_slot_reference(*expected, slot, *entry(head_dim, dtype))
    on_device = (*(x.to(DEVICE) for x in held[:3]), [stat.to(DEVICE) for stat in held[3]])
    new = (x.to(DEVICE) for x in entry(head_dim, dtype))
    write_slot(*on_device, slot if form == "number" else slot.to(DEVICE), *new, backend="triton")
    for ours, theirs in zip((*on_device[:3], *on_device[3]), (*expected[:3], *expected[3]), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_write_is_one_launch(monkeypatch):
    """And one for each further statistic."""
    counted, original = [], write_module.launch
    monkeypatch.setattr(
        write_module, "launch", lambda *args, **options: (counted.append(1), original(*args, **options))
    )
    keys, values, positions, stats = cache(8)
    for some, wanted in (([], 1), (stats[:1], 1), (stats, 2)):
        counted.clear()
        tensors = [x.to(DEVICE) for x in (keys, values, positions)]
        write_slot(*tensors, [x.to(DEVICE) for x in some], 3, *(x.to(DEVICE) for x in entry()), backend="triton")
        assert len(counted) == wanted


@pytest.mark.parametrize("limits", [None, (4, 60)], ids=["always", "limits"])
@pytest.mark.parametrize("recent", [0, 5, 1000], ids="recent-{}".format)
@pytest.mark.parametrize(("n", "block"), [(1, 4096), (63, 4096), (300, 256), (600, 256)], ids=str)
def test_evict(n, block, recent, limits, monkeypatch):
    """In one step of the program and in several; the slots are those of the definition, and so is what stays."""
    monkeypatch.setattr(evict_module, "BLOCK", block)
    scores, positions = levels(n, seed=n)
    seen, recents = torch.tensor([3 * n, 3 * n - 2]), torch.full((2,), recent, dtype=torch.int32)
    limit = None if limits is None else torch.tensor(limits, dtype=torch.int32)
    expected = positions.clone()
    slots = evict_slot_reference(scores, expected, seen, recents, limit)
    held = torch.full((BATCH, KV_HEADS, n + 7), -5, dtype=torch.int32, device=DEVICE)
    held[:, :, :n] = positions.to(DEVICE)
    given = (x if x is None else x.to(DEVICE) for x in (seen, recents, limit))
    found = evict_slot(scores.to(DEVICE), held[:, :, :n], *given, backend="triton")
    assert torch.equal(found.cpu(), slots) and found.dtype == torch.int64
    assert torch.equal(held[:, :, :n].cpu(), expected) and (held[:, :, n:] == -5).all()


@DTYPES
def test_evict_by_scores_of_another_kind(dtype):
    """Half precision, the same for all heads, and read by a step of two."""
    scores = torch.randn(BATCH, 1, 40, 2, generator=torch.Generator().manual_seed(0)).to(dtype)[..., 0]
    scores = scores.expand(BATCH, KV_HEADS, 40)
    positions = torch.arange(40, dtype=torch.int32).repeat(BATCH, KV_HEADS, 1)
    expected, seen, recents = positions.clone(), torch.tensor([40, 40]), torch.tensor([4, 4])
    slots = evict_slot_reference(scores, expected, seen, recents)
    held = positions.to(DEVICE)
    found = evict_slot(scores.to(DEVICE), held, seen.to(DEVICE), recents.to(DEVICE), backend="triton")
    assert torch.equal(found.cpu(), slots) and torch.equal(held.cpu(), expected)
