"""merge_slots against its reference, a float64 loop and hand values (E4, E5, E6)."""

import pytest
import torch

from kvpress.kernels import merge_slots as module
from kvpress.kernels.merge_slots import merge_slots, merge_slots_reference

BATCH, KV_HEADS, DIM = 2, 3, 8
VALUE_NORMS = pytest.mark.parametrize("value_norms", [False, True], ids=["mean-values", "value-norms"])


def inputs(n=23, k=7, m=12, seed=0, dtype=torch.float32):
    """Keys, values, stats of three and four dimensions, weights; centres and rest apart; some targets are none."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, KV_HEADS, n, DIM, generator=generator).to(dtype)
    stats = [
        torch.rand(BATCH, KV_HEADS, n, generator=generator),
        torch.rand(BATCH, KV_HEADS, 5, n, generator=generator),
    ]
    weights = torch.rand(BATCH, KV_HEADS, n, generator=generator) + 0.01
    slots = torch.stack([torch.randperm(n, generator=generator) for _ in range(BATCH * KV_HEADS)])
    slots = slots.view(BATCH, KV_HEADS, n)
    target = torch.randint(-1, k, (BATCH, KV_HEADS, m), generator=generator)
    return [keys, values, stats, weights, slots[..., :k], slots[..., k : k + m], target]


def copied(arguments):
    keys, values, stats, *others = arguments
    return [keys.clone(), values.clone(), [stat.clone() for stat in stats], *others]


def brute(keys, values, stats, weights, centres, rest, target, value_norms):
    """In float64, from the definition: new keys, values and statistics."""
    keys, values, stats = keys.double(), values.double(), [stat.double() for stat in stats]
    old_keys, old_values, old_stats = keys.clone(), values.clone(), [stat.clone() for stat in stats]
    for b in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            for place, centre in enumerate(centres[b, head].tolist()):
                leaving = [
                    s for s, t in zip(rest[b, head].tolist(), target[b, head].tolist(), strict=True) if t == place
                ]
                if not leaving:
                    continue
                members = [centre, *leaving]
                share = [weights[b, head, s].item() for s in members]
                share = [x / sum(share) for x in share]
                key, value, direction = (torch.zeros(DIM, dtype=torch.float64) for _ in range(3))
                for x, slot in zip(share, members, strict=True):
                    key += x * old_keys[b, head, slot] / old_keys[b, head, slot].norm()
                    value += x * old_values[b, head, slot]
                    direction += x * old_values[b, head, slot] / old_values[b, head, slot].norm()
                keys[b, head, centre] = old_keys[b, head, centre].norm() * key / key.norm()
                turned = old_values[b, head, centre].norm() * direction / direction.norm()
                values[b, head, centre] = turned if value_norms else value
                for stat, old in zip(stats, old_stats, strict=True):
                    stat[b, head, ..., centre] = sum(old[b, head, ..., slot] for slot in members)
    return keys, values, stats


@VALUE_NORMS
@pytest.mark.parametrize(("n", "k", "m"), [(23, 7, 12), (2, 1, 1), (40, 3, 37), (9, 8, 1), (9, 8, 0)], ids=str)
@pytest.mark.parametrize("tile", [1, 100, 1 << 22], ids=["single-tiles", "small-tiles", "one-tile"])
def test_equals_the_definition(n, k, m, tile, value_norms, monkeypatch):
    """Against the float64 loop and the reference, whatever the size of the tiles."""
    monkeypatch.setattr(module, "TILE_NUMBERS", tile)
    arguments = inputs(n, k, m)
    keys, values, stats = brute(*arguments, value_norms)
    for function in (merge_slots, merge_slots_reference):
        got = copied(arguments)
        function(*got, value_norms=value_norms)
        torch.testing.assert_close(got[0], keys.float(), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(got[1], values.float(), rtol=1e-5, atol=2e-6)
        for stat, expected in zip(got[2], stats, strict=True):
            torch.testing.assert_close(stat, expected.float())


def test_bfloat16_is_as_precise_as_its_storage():
    """The sums are float32: only what is stored is rounded."""
    arguments = inputs(dtype=torch.bfloat16)
    keys, values, _ = brute(*arguments, False)
    got = copied(arguments)
    merge_slots(*got)
    torch.testing.assert_close(got[0], keys.bfloat16(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(got[1], values.bfloat16(), rtol=2**-7, atol=1e-6)


def test_untouched_slots_keep_every_bit():
    """Centres without members, slots that left, and slots that are neither."""
    arguments = inputs()
    got = copied(arguments)
    merge_slots(*got)
    centres, target = arguments[4], arguments[6]
    touched = torch.zeros(BATCH, KV_HEADS, 23, dtype=torch.bool)
    for b in range(BATCH):
        for head in range(KV_HEADS):
            touched[b, head, centres[b, head, [t for t in target[b, head].tolist() if t >= 0]]] = True
    assert touched.any() and not touched.all()
    for before, after in ((arguments[0], got[0]), (arguments[1], got[1])):
        assert torch.equal(before[~touched], after[~touched])
        assert (before[touched] != after[touched]).any(-1).all()
    assert torch.equal(arguments[2][0][~touched], got[2][0][~touched])


@VALUE_NORMS
def test_e4_duplicates_merge_into_themselves(value_norms):
    """E4: members with the centre's own key and value leave them as they are."""
    keys, values, stats, weights, centres, rest, target = inputs()
    target = target.clamp(min=0)
    for x in (keys, values):
        sources = centres.gather(2, target)
        rows = x.gather(2, sources[..., None].expand(-1, -1, -1, DIM))
        x.scatter_(2, rest[..., None].expand(-1, -1, -1, DIM), rows)
    got = copied([keys, values, stats, weights, centres, rest, target])
    merge_slots(*got, value_norms=value_norms)
    torch.testing.assert_close(got[0], keys, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], values, rtol=1e-6, atol=1e-6)


@VALUE_NORMS
def test_e5_norms_of_centres_stay(value_norms):
    """E5: a merged key is as long as the centre's was; a value too, if asked for."""
    arguments = inputs()
    got = copied(arguments)
    merge_slots(*got, value_norms=value_norms)
    torch.testing.assert_close(got[0].norm(dim=-1), arguments[0].norm(dim=-1))
    if value_norms:
        torch.testing.assert_close(got[1].norm(dim=-1), arguments[1].norm(dim=-1))


def test_e6_values_lie_between_the_members():
    """E6: along any direction a merged value is between the smallest and the largest of its members."""
    arguments = inputs()
    _, values, _, _, centres, rest, target = arguments
    got = copied(arguments)
    merge_slots(*got)
    directions = torch.randn(DIM, 200, generator=torch.Generator().manual_seed(1))
    for b in range(BATCH):
        for head in range(KV_HEADS):
            for place, centre in enumerate(centres[b, head].tolist()):
                members = [centre, *rest[b, head][target[b, head] == place].tolist()]
                along = values[b, head, members] @ directions
                merged = got[1][b, head, centre] @ directions
                assert (merged >= along.amin(0) - 1e-5).all() and (merged <= along.amax(0) + 1e-5).all()


def test_hand_values():
    """Two keys at a right angle with weights 1 and 1: the direction between, the centre's norm; the value the mean."""
    keys = torch.tensor([[[[3.0, 0.0], [0.0, 5.0]]]])
    values = torch.tensor([[[[2.0, 0.0], [0.0, 6.0]]]])
    stat = torch.tensor([[[1.5, 2.0]]])
    one, zero = torch.ones(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long)
    merge_slots(keys, values, [stat], torch.ones(1, 1, 2), zero, one, zero)
    torch.testing.assert_close(keys[0, 0], torch.tensor([[3 / 2**0.5, 3 / 2**0.5], [0.0, 5.0]]))
    torch.testing.assert_close(values[0, 0], torch.tensor([[1.0, 3.0], [0.0, 6.0]]))
    torch.testing.assert_close(stat[0, 0], torch.tensor([3.5, 2.0]))


@pytest.mark.parametrize("function", [merge_slots, merge_slots_reference], ids=["fast", "reference"])
def test_directions_that_cancel(function):
    """Opposite keys of the same weight have no mean direction: the centre keeps its own key; zeros do not become NaN."""
    keys = torch.tensor([[[[3.0, 1.0], [-6.0, -2.0], [0.0, 0.0], [0.0, 0.0]]]])
    values = torch.ones(1, 1, 4, 2)
    centres, rest, target = torch.tensor([[[0, 2]]]), torch.tensor([[[1, 3]]]), torch.tensor([[[0, 1]]])
    weights = torch.tensor([[[1.0, 1.0000002, 1.0, 1.0]]])  # what rounding leaves is no direction
    function(keys, values, [], weights, centres, rest, target)
    torch.testing.assert_close(keys[0, 0, [0, 2]], torch.tensor([[3.0, 1.0], [0.0, 0.0]]))


def test_slices_of_larger_buffers():
    """Views of the slots in use are written in place; what is behind them is not read or written."""
    arguments = inputs()
    expected = copied(arguments)
    merge_slots(*expected)
    buffers = [torch.full((BATCH, KV_HEADS, 40, DIM), float("nan")) for _ in range(2)]
    wide = [torch.full((*stat.shape[:-1], 40), float("nan")) for stat in arguments[2]]
    for buffer, x in zip(buffers, arguments[:2], strict=True):
        buffer[:, :, :23] = x
    for buffer, stat in zip(wide, arguments[2], strict=True):
        buffer[..., :23] = stat
    views = [*(buffer[:, :, :23] for buffer in buffers), [stat[..., :23] for stat in wide]]
    merge_slots(*views, *arguments[3:])
    for got, want in zip((*views[:2], *views[2]), (*expected[:2], *expected[2]), strict=True):
        assert torch.equal(got, want)
    assert all(buffer[:, :, 23:].isnan().all() for buffer in buffers)
    assert all(stat[..., 23:].isnan().all() for stat in wide)
