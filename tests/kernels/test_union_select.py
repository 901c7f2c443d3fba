"""union_select against its definition, and by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvpress.kernels.union_select import union_select, union_select_reference
from support.backends import BACKENDS, on


def some(share, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(shape[-1])) < share


def check(backend, reads, kv_heads, width=None):
    found = union_select(*on(backend, reads), kv_heads, width=width, backend=backend)
    for ours, theirs in zip(found, union_select_reference(reads, kv_heads, width), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


@BACKENDS
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (3, 1), (1, 4), (2, 8)], ids=str)
@pytest.mark.parametrize("n", [1, 17, 64, 111])
def test_equals_the_definition(n, kv_heads, group, share, backend):
    check(backend, some(share, 2, kv_heads * group, n), kv_heads)


@BACKENDS
@pytest.mark.parametrize("width", [1, 5, 40, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_given_width(width, share, backend):
    """The result has it, be the unions smaller, larger or the sequence shorter."""
    check(backend, some(share, 2, 6, 40), 2, width)


@BACKENDS
def test_a_slice_of_a_larger_buffer(backend):
    check(backend, some(0.4, 2, 6, 70)[:, :4, 3:66], 2)


@BACKENDS
def test_no_read_at_all(backend):
    index, member = union_select(*on(backend, torch.zeros(1, 4, 20, dtype=torch.bool)), 2, backend=backend)
    assert index.tolist() == [[[0], [0]]] and not member.any() and member.shape == (1, 4, 1)


def test_a_given_width_waits_for_nothing():
    """Tensors without numbers go through, which cannot be asked for any."""
    with FakeTensorMode():
        index, member = union_select(torch.zeros(2, 6, 40, dtype=torch.bool), 2, width=9)
        assert index.shape == (2, 2, 9) and member.shape == (2, 6, 9)
        with pytest.raises(RuntimeError):
            union_select(torch.zeros(2, 6, 40, dtype=torch.bool), 2)


def test_no_width():
    with pytest.raises(ValueError, match="width=0"):
        union_select(torch.zeros(1, 2, 4, dtype=torch.bool), 1, width=0)


def test_by_hand():
    """Kv head 0: heads read {1, 4} and {4, 5}; kv head 1: {0} and nothing."""
    reads = torch.zeros(1, 4, 6, dtype=torch.bool)
    reads[0, 0, [1, 4]] = reads[0, 1, [4, 5]] = reads[0, 2, 0] = True
    index, member = union_select(reads, 2)
    assert index.tolist() == [[[1, 4, 5], [0, 0, 0]]]
    assert member.int().tolist() == [[[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]]]


def test_every_read_is_there_once():
    reads = torch.rand(3, 8, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    index, member = union_select(reads, 2)
    for b in range(3):
        for head in range(8):
            slots = index[b, head // 4][member[b, head]].tolist()
            assert slots == reads[b, head].nonzero().flatten().tolist()
