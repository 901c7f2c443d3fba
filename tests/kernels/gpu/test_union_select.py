"""The Triton kernels of union_select against the definition."""

import pytest
import torch

from kvpress.kernels.gpu import union_select as gpu
from kvpress.kernels.union_select import union_select, union_select_reference
from support.accelerator import DEVICE


def check(reads, kv_heads):
    found = union_select(reads.to(DEVICE), kv_heads, backend="triton")
    for ours, theirs in zip(found, union_select_reference(reads, kv_heads), strict=True):
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
    monkeypatch.setattr(gpu, "MOST_CHUNKS", most)
    reads = some(0.3, 2, 6, 111)
    reads[0, :3], reads[1, 3:] = False, True
    reads[1, 0, :], reads[1, 1, 50:] = False, False
    check(reads, 2)
    assert -(-111 // gpu.chunk_size(111, 4, 132)) == min(7, most)


def test_no_read_at_all():
    index, member = union_select(torch.zeros(1, 4, 20, dtype=torch.bool, device=DEVICE), 2, backend="triton")
    assert index.tolist() == [[[0], [0]]] and not member.any() and member.shape == (1, 4, 1)


def test_strides():
    """A slice of a larger buffer."""
    check(some(0.4, 2, 6, 70)[:, :4, 3:66], 2)
