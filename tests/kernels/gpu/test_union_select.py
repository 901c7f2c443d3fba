"""The Triton kernels of union_select against the definition."""

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


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
@pytest.mark.parametrize("n", [1, 63, 111], ids="n-{}".format)
def test_equals_the_definition(n, group, share):
    check(some(share, 2, 2 * group, n), 2)


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


def test_no_read_at_all():
    index, member = union_select(torch.zeros(1, 4, 20, dtype=torch.bool, device=DEVICE), 2, backend="triton")
    assert index.tolist() == [[[0], [0]]] and not member.any() and member.shape == (1, 4, 1)


def test_strides():
    """A slice of a larger buffer."""
    check(some(0.4, 2, 6, 70)[:, :4, 3:66], 2)
