"""union_select in many chunks, as the Triton kernels alone work; ../test_union_select.py has what both paths do."""

import pytest
import torch

from kvpress.kernels.gpu import topk_select
from kvpress.kernels.gpu import union_select as gpu
from kvpress.kernels.union_select import union_select, union_select_reference
from support.accelerator import DEVICE


def check(reads, kv_heads, width=None):
    found = union_select(reads.to(DEVICE), kv_heads, width=width, backend="triton")
    for ours, theirs in zip(found, union_select_reference(reads, kv_heads, width), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


def some(share, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(shape[-1])) < share


@pytest.mark.parametrize("most", [1, 3, 64], ids="{}-chunks".format)
def test_several_chunks(most, monkeypatch):
    """More tiles than chunks and as many; unions of very different sizes in one result."""
    monkeypatch.setattr(gpu, "BLOCK", 16)
    monkeypatch.setattr(topk_select, "MOST_CHUNKS", most)
    reads = some(0.3, 2, 6, 111)
    reads[0, :3], reads[1, 3:] = False, True
    reads[1, 0, :], reads[1, 1, 50:] = False, False
    check(reads, 2)
    assert -(-111 // gpu.chunk_size(111, 4, 16, torch.device("cpu"))) == min(7, most)


@pytest.mark.parametrize("most", [1, 64], ids="{}-chunks".format)
@pytest.mark.parametrize("width", [1, 20, 111, 300])
def test_a_given_width(width, most, monkeypatch):
    """Smaller and larger than unions and than the sequence; what is not written would be NaN-like garbage."""
    monkeypatch.setattr(gpu, "BLOCK", 16)
    monkeypatch.setattr(topk_select, "MOST_CHUNKS", most)
    reads = some(0.3, 2, 6, 111)
    reads[0, :3] = False
    original = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: original(*shape, **how).fill_(1))
    check(reads, 2, width)
