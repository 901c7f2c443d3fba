"""union_select against its definition, and by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvpress.kernels.union_select import union_select, union_select_reference


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("n", [1, 17, 64])
def test_equals_the_definition(n, kv_heads, group, share):
    reads = torch.rand(2, kv_heads * group, n, generator=torch.Generator().manual_seed(n)) < share
    index, member = union_select(reads, kv_heads)
    expected_index, expected_member = union_select_reference(reads, kv_heads)
    assert torch.equal(index, expected_index) and torch.equal(member, expected_member)


@pytest.mark.parametrize("width", [1, 5, 40, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_a_given_width(width, share):
    """The result has it, be the unions smaller, larger or the sequence shorter."""
    reads = torch.rand(2, 6, 40, generator=torch.Generator().manual_seed(0)) < share
    for found, expected in zip(
        union_select(reads, 2, width=width), union_select_reference(reads, 2, width), strict=True
    ):
        assert torch.equal(found, expected) and found.shape[-1] == width


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
