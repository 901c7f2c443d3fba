"""The Triton kernels of merge_slots against the definition, hand values and float64."""

import pytest
import torch

from kvpress.kernels.gpu import merge_slots as gpu
from kvpress.kernels.merge_slots import merge_slots, merge_slots_reference
from support.accelerator import DEVICE

BATCH, KV_HEADS = 2, 3
VALUE_NORMS = pytest.mark.parametrize("value_norms", [False, True], ids=["mean-values", "value-norms"])
SIZES = pytest.mark.parametrize(
    ("n", "k", "m"), [(2, 1, 1), (63, 7, 12), (63, 1, 62), (111, 8, 90), (9, 8, 1), (9, 8, 0)], ids=str
)


def inputs(n=23, k=7, m=12, width=8, value_width=None, dtype=torch.float32, spare=0):
    """Slices of buffers with `spare` more slots of NaN; stats of three and four dimensions; some targets are none."""
    generator = torch.Generator().manual_seed(n)

    def buffer(*shape, dtype=torch.float32):
        numbers = torch.rand(BATCH, KV_HEADS, *shape, generator=generator)
        return numbers.to(DEVICE, dtype)

    def front(numbers, dim):
        numbers.narrow(dim, n, spare).fill_(float("nan"))
        return numbers.narrow(dim, 0, n)

    keys, values = (front((buffer(n + spare, d) * 4 - 2).to(dtype), 2) for d in (width, value_width or width))
    stats = [front(buffer(n + spare), 2), front(buffer(2, n + spare), 3)]
    weights = front(buffer(n + spare), 2) + 0.01
    slots = torch.stack([torch.randperm(n, generator=generator) for _ in range(BATCH * KV_HEADS)])
    slots = slots.view(BATCH, KV_HEADS, n).to(DEVICE)
    target = torch.randint(-1, k, (BATCH, KV_HEADS, m), generator=generator).to(DEVICE)
    return [keys, values, stats, weights, slots[..., :k], slots[..., k : k + m], target]


def copied(arguments):
    """The same, with buffers of their own behind what is written."""
    keys, values, stats, *others = arguments

    def copy(x):
        whole = x._base.clone() if x._base is not None else x.clone()
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return [copy(keys), copy(values), [copy(stat) for stat in stats], *others]


def compare(arguments, value_norms, **tolerance):
    """What the kernels made is what the definition makes of float32 copies, rounded to the dtype of storage."""
    got, expected = copied(arguments), copied(arguments)
    merge_slots(*got, value_norms=value_norms, backend="triton")
    exact = [expected[0].float(), expected[1].float(), *expected[2:]]
    merge_slots_reference(*exact, value_norms=value_norms)
    for ours, theirs in zip((*got[:2], *got[2]), (*exact[:2], *exact[2]), strict=True):
        torch.testing.assert_close(ours.float(), theirs, **(tolerance or {"rtol": 1e-5, "atol": 2e-6}))
    return got


@VALUE_NORMS
@SIZES
def test_equals_the_definition(n, k, m, value_norms):
    """From no member to all of them, in slices of larger buffers."""
    got = compare(inputs(n, k, m, spare=5), value_norms)
    for x in (*got[:2], got[2][0]):
        assert x._base[:, :, n:].isnan().all()


@VALUE_NORMS
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 80), (96, 96), (128, 64), (256, 256)], ids=str)
def test_head_dims(width, value_width, value_norms):
    """Widths that are no power of two, and values narrower than keys."""
    compare(inputs(63, 7, 40, width, value_width), value_norms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@VALUE_NORMS
def test_half_precision(dtype, value_norms):
    """Sums are float32: only what is stored is rounded, in the interpreter to a neighbour for bfloat16."""
    compare(inputs(63, 7, 40, 16, dtype=dtype), value_norms, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("per_step", [1, 2, 64])
def test_members_in_steps(per_step, monkeypatch):
    """Many members of one centre, a row at a time and all at once, their statistics in several steps."""
    monkeypatch.setattr(gpu, "members_per_step", lambda width: per_step)
    monkeypatch.setattr(gpu, "BLOCK_MEMBERS", 16)
    arguments = inputs(63, 2, 50)
    compare(arguments, False)
    compare(arguments, True)


def test_untouched_slots_keep_every_bit():
    """Centres without members, slots that left, and slots that are neither."""
    arguments = inputs(63, 20, 12)
    got = copied(arguments)
    merge_slots(*got, backend="triton")
    centres, target = arguments[4], arguments[6]
    touched = torch.zeros(BATCH, KV_HEADS, 63, dtype=torch.bool, device=DEVICE)
    for b in range(BATCH):
        for head in range(KV_HEADS):
            touched[b, head, centres[b, head, [t for t in target[b, head].tolist() if t >= 0]]] = True
    assert touched.any() and not touched.all()
    for before, after in ((arguments[0], got[0]), (arguments[1], got[1]), (arguments[2][0], got[2][0])):
        assert torch.equal(before[~touched], after[~touched])
    assert (arguments[0][touched] != got[0][touched]).any(-1).all()


def test_hand_values():
    """Two keys at a right angle with weights 1 and 1: the direction between, the centre's norm; the value the mean."""
    keys = torch.tensor([[[[3.0, 0.0], [0.0, 5.0]]]], device=DEVICE)
    values = torch.tensor([[[[2.0, 0.0], [0.0, 6.0]]]], device=DEVICE)
    stat = torch.tensor([[[1.5, 2.0]]], device=DEVICE)
    one, zero = (torch.full((1, 1, 1), x, device=DEVICE) for x in (1, 0))
    merge_slots(keys, values, [stat], torch.ones(1, 1, 2, device=DEVICE), zero, one, zero, backend="triton")
    assert keys[0, 0].flatten().tolist() == pytest.approx([3 / 2**0.5, 3 / 2**0.5, 0.0, 5.0])
    assert values[0, 0].tolist() == [[1.0, 3.0], [0.0, 6.0]] and stat.tolist() == [[[3.5, 2.0]]]


def test_directions_that_cancel():
    """Opposite keys of the same weight have no mean direction: the centre keeps its own; zeros do not become NaN."""
    keys = torch.tensor([[[[3.0, 1.0], [-6.0, -2.0], [0.0, 0.0], [0.0, 0.0]]]], device=DEVICE)
    values, weights = torch.ones(1, 1, 4, 2, device=DEVICE), torch.tensor([[[1.0, 1.0000002, 1.0, 1.0]]], device=DEVICE)
    places = (torch.tensor([[x]], device=DEVICE) for x in ([0, 2], [1, 3], [0, 1]))
    merge_slots(keys, values, [], weights, *places, backend="triton")
    torch.testing.assert_close(keys[0, 0, [0, 2]].cpu(), torch.tensor([[3.0, 1.0], [0.0, 0.0]]))


def test_equal_inputs_give_equal_results():
    """To the bit, and the order of the members is that of the list."""
    arguments = inputs(111, 3, 100, 16)
    first, again = copied(arguments), copied(arguments)
    for got in (first, again):
        merge_slots(*got, backend="triton")
    for one, other in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(one, other)
