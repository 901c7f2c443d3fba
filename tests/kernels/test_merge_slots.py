"""merge_slots against a float64 loop and hand values (E4, E5, E6): its reference, and both paths."""

import pytest
import torch

from kvpress.kernels import merge_slots as module
from kvpress.kernels.merge_slots import merge_slots, merge_slots_reference
from support.backends import BACKENDS, on
from support.merging import BATCH, KV_HEADS, WIDTH, brute, check, copied, inputs

VALUE_NORMS = pytest.mark.parametrize("value_norms", [False, True], ids=["mean-values", "value-norms"])
SIZES = [(23, 7, 12), (2, 1, 1), (40, 3, 37), (63, 1, 62), (111, 8, 90), (9, 8, 1), (9, 8, 0)]


@BACKENDS
@VALUE_NORMS
@pytest.mark.parametrize(("n", "k", "m"), SIZES, ids=str)
@pytest.mark.parametrize("tile", [1, 100, 1 << 22], ids=["single-tiles", "small-tiles", "one-tile"])
@pytest.mark.parametrize("behind", [0, 5], ids=["compact", "slices"])
def test_equals_the_definition(backend, n, k, m, tile, behind, value_norms, monkeypatch):
    """From no member to all of them, whatever the size of the torch path's tiles; what is behind a slice stays."""
    monkeypatch.setattr(module, "TILE_NUMBERS", tile)
    arguments = inputs(backend, n, k, m, behind=behind)
    got = copied(arguments)
    merge_slots(*got, value_norms=value_norms, backend=backend)
    check(got, brute(*arguments, value_norms))
    if behind:
        assert all(x._base[:, :, n:].isnan().all() for x in (*got[:2], got[2][0]))
        assert got[2][1]._base[..., n:].isnan().all()


@VALUE_NORMS
@pytest.mark.parametrize(("n", "k", "m"), SIZES, ids=str)
def test_the_reference_equals_the_definition(n, k, m, value_norms):
    arguments = inputs("torch", n, k, m)
    got = copied(arguments)
    merge_slots_reference(*got, value_norms=value_norms)
    check(got, brute(*arguments, value_norms))


@BACKENDS
@VALUE_NORMS
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (80, 80), (96, 96), (128, 64), (256, 256)], ids=str)
def test_head_dims(backend, width, value_width, value_norms):
    """Widths that are no power of two, and values narrower than keys."""
    arguments = inputs(backend, 63, 7, 40, width, value_width)
    got = copied(arguments)
    merge_slots(*got, value_norms=value_norms, backend=backend)
    check(got, brute(*arguments, value_norms))


@BACKENDS
@VALUE_NORMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_as_precise_as_its_storage(backend, dtype, value_norms):
    """Sums are float32: only what is stored is rounded, in Triton's interpreter to a neighbour for bfloat16."""
    arguments = inputs(backend, 63, 7, 40, 16, dtype=dtype)
    got = copied(arguments)
    merge_slots(*got, value_norms=value_norms, backend=backend)
    check(got, brute(*arguments, value_norms), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@BACKENDS
def test_untouched_slots_keep_every_bit(backend):
    """Centres without members, slots that left, and slots that are neither."""
    arguments = inputs(backend, 63, 20, 12)
    got = copied(arguments)
    merge_slots(*got, backend=backend)
    centres, target = arguments[4], arguments[6]
    touched = torch.zeros(BATCH, KV_HEADS, 63, dtype=torch.bool, device=centres.device)
    for b in range(BATCH):
        for head in range(KV_HEADS):
            touched[b, head, centres[b, head, [t for t in target[b, head].tolist() if t >= 0]]] = True
    assert touched.any() and not touched.all()
    for before, after in ((arguments[0], got[0]), (arguments[1], got[1]), (arguments[2][0], got[2][0])):
        assert torch.equal(before[~touched], after[~touched])
    for before, after in zip(arguments[:2], got[:2], strict=True):
        assert (before[touched] != after[touched]).any(-1).all()


@BACKENDS
@VALUE_NORMS
def test_e4_duplicates_merge_into_themselves(backend, value_norms):
    """E4: members with the centre's own key and value leave them as they are."""
    keys, values, stats, weights, centres, rest, target = inputs(backend)
    target = target.clamp(min=0)
    for x in (keys, values):
        sources = centres.gather(2, target)
        rows = x.gather(2, sources[..., None].expand(-1, -1, -1, WIDTH))
        x.scatter_(2, rest[..., None].expand(-1, -1, -1, WIDTH), rows)
    got = copied([keys, values, stats, weights, centres, rest, target])
    merge_slots(*got, value_norms=value_norms, backend=backend)
    torch.testing.assert_close(got[0], keys, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], values, rtol=1e-6, atol=1e-6)


@BACKENDS
@VALUE_NORMS
def test_e5_norms_of_centres_stay(backend, value_norms):
    """E5: a merged key is as long as the centre's was; a value too, if asked for."""
    arguments = inputs(backend)
    got = copied(arguments)
    merge_slots(*got, value_norms=value_norms, backend=backend)
    torch.testing.assert_close(got[0].norm(dim=-1), arguments[0].norm(dim=-1))
    if value_norms:
        torch.testing.assert_close(got[1].norm(dim=-1), arguments[1].norm(dim=-1))


@BACKENDS
def test_e6_values_lie_between_the_members(backend):
    """E6: along any direction a merged value is between the smallest and the largest of its members."""
    arguments = inputs(backend)
    _, values, _, _, centres, rest, target = arguments
    got = copied(arguments)
    merge_slots(*got, backend=backend)
    [directions] = on(backend, torch.randn(WIDTH, 200, generator=torch.Generator().manual_seed(1)))
    for b in range(BATCH):
        for head in range(KV_HEADS):
            for place, centre in enumerate(centres[b, head].tolist()):
                members = [centre, *rest[b, head][target[b, head] == place].tolist()]
                along = values[b, head, members] @ directions
                merged = got[1][b, head, centre] @ directions
                assert (merged >= along.amin(0) - 1e-5).all() and (merged <= along.amax(0) + 1e-5).all()


@BACKENDS
def test_hand_values(backend):
    """Two keys at a right angle with weights 1 and 1: the direction between, the centre's norm; the value the mean."""
    keys, values, stat, weights, one, zero = on(
        backend,
        torch.tensor([[[[3.0, 0.0], [0.0, 5.0]]]]),
        torch.tensor([[[[2.0, 0.0], [0.0, 6.0]]]]),
        torch.tensor([[[1.5, 2.0]]]),
        torch.ones(1, 1, 2),
        torch.ones(1, 1, 1, dtype=torch.long),
        torch.zeros(1, 1, 1, dtype=torch.long),
    )
    merge_slots(keys, values, [stat], weights, zero, one, zero, backend=backend)
    assert keys[0, 0].flatten().tolist() == pytest.approx([3 / 2**0.5, 3 / 2**0.5, 0.0, 5.0])
    assert values[0, 0].tolist() == [[1.0, 3.0], [0.0, 6.0]] and stat.tolist() == [[[3.5, 2.0]]]


@BACKENDS
def test_directions_that_cancel(backend):
    """Opposite keys of the same weight have no mean direction: the centre keeps its own; zeros do not become NaN."""
    [keys] = on(backend, torch.tensor([[[[3.0, 1.0], [-6.0, -2.0], [0.0, 0.0], [0.0, 0.0]]]]))
    weights = torch.tensor([[[1.0, 1.0000002, 1.0, 1.0]]])  # what rounding leaves is no direction
    values, weights = on(backend, torch.ones(1, 1, 4, 2), weights)
    places = on(backend, *(torch.tensor([[x]]) for x in ([0, 2], [1, 3], [0, 1])))
    for function, how in ((merge_slots, {"backend": backend}), (merge_slots_reference, {})):
        merged = keys.clone()
        function(merged, values.clone(), [], weights, *places, **how)
        assert merged[0, 0, [0, 2]].tolist() == [[3.0, 1.0], [0.0, 0.0]]
