"""union_select against its definition, and by hand."""

import pytest
import torch

from kvpress.kernels.union_select import union_select, union_select_reference


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3), (3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("n", [1, 17, 64])
def test_equals_the_definition(n, kv_heads, group, share):
    reads = torch.rand(2, kv_heads * group, n, generator=torch.Generator().manual_seed(n)) < share
    index, member = union_select(reads, kv_heads)
    expected_index, expected_member = union_select_reference(reads, kv_heads)
    assert torch.equal(index, expected_index) and torch.equal(member, expected_member)


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
