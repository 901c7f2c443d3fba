"""How the Triton kernels of merge_slots go through members. What they compute is in tests/kernels/test_merge_slots.py."""

import pytest
import torch

from kvpress.kernels.gpu import merge_slots as gpu
from kvpress.kernels.merge_slots import merge_slots
from support.merging import brute, check, copied, inputs


@pytest.mark.parametrize("per_step", [1, 2, 64])
@pytest.mark.parametrize("value_norms", [False, True], ids=["mean-values", "value-norms"])
def test_members_in_steps(per_step, value_norms, monkeypatch):
    """Many members of one centre, a row at a time and all at once, their statistics in several steps."""
    monkeypatch.setattr(gpu, "members_per_step", lambda width: per_step)
    monkeypatch.setattr(gpu, "BLOCK_MEMBERS", 16)
    arguments = inputs("triton", 63, 2, 50)
    got = copied(arguments)
    merge_slots(*got, value_norms=value_norms, backend="triton")
    check(got, brute(*arguments, value_norms))


def test_equal_inputs_give_equal_results():
    """To the bit, and the order of the members is that of the list."""
    arguments = inputs("triton", 111, 3, 100, 16)
    first, again = copied(arguments), copied(arguments)
    for got in (first, again):
        merge_slots(*got, backend="triton")
    for one, other in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(one, other)
