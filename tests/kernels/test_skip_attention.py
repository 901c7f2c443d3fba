"""skip_attention on both paths against its reference, values by hand, dense attention, and the bound on what is lost."""

import math

import pytest
import torch

from kvpress.kernels.prompt_attention import prompt_attention
from kvpress.kernels.skip_attention import skip_attention, skip_attention_reference, tile_weights
from support.attention_inputs import BATCH, KV_HEADS
from support.attention_inputs import prompt_inputs as inputs
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on
from support.brute import attend, causal, eager

NEAR = {"rtol": 1e-5, "atol": 1e-5}
SHAPES = pytest.mark.parametrize(("rows", "past"), [(50, 0), (32, 16), (37, 29), (1, 40), (64, 3)])


def attended(backend, *tensors, **options):
    """Output, LSE and skipped pairs on the CPU, of tensors that go where the path runs."""
    options = dict(zip(options, on(backend, *options.values()), strict=True))
    return tuple(x.cpu() for x in skip_attention(*on(backend, *tensors), **options, backend=backend))


def sharp(rows, past, group, **fields):
    """Inputs that have tiles of 16 entries with large scores and with small ones, so that tiles are skipped."""
    query, key, value = inputs(rows, past, group, **fields)
    tiles = -(-key.shape[2] // 16)
    levels = 4 * torch.randn(BATCH, KV_HEADS, tiles, generator=torch.Generator().manual_seed(rows))
    query[..., 0] = 2
    key[..., 0] = levels.repeat_interleave(16, dim=2)[:, :, : key.shape[2]]
    return query, key, value


def one_row(logits, width=16):
    """A row that has these logits, and the values 1, 2, ...; each entry stands `16 / 2` times, for tiles of 16 instead of 2."""
    query, key = torch.zeros(1, 1, 1, width), torch.zeros(1, 1, len(logits), width)
    query[..., 0] = 1
    key[0, 0, :, 0] = torch.tensor(logits)
    value = torch.zeros_like(key)
    value[0, 0, :, 0] = 1.0 + torch.arange(len(logits))
    return query, key, value


# ---------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("skip", "output", "mass", "gone"),
    [
        (0.0, 2.652756, 0.0, 0),
        (0.01, 2.652391, 7.9069e-5, 2),
        (0.1, 2.645070, 0.011814, 4),
        (0.5, 2.645070, 0.011814, 4),
    ],
)
def test_by_hand(skip, output, mass, gone):
    """Tiles of two with the logits (5, 4), (1, 0), (4.5, 3), (-4, -5): the last is negligible, then the second, too."""
    tensors = one_row([5.0, 4.0, 1.0, 0.0, 4.5, 3.0, -4.0, -5.0])
    _, full, _ = attended("torch", *tensors, scale=1.0, skip=0.0, tile=2)
    found, lse, skipped = attended("torch", *tensors, scale=1.0, skip=skip, tile=2)
    assert found[0, 0, 0, 0].item() == pytest.approx(output, abs=1e-6)
    assert -math.expm1((lse - full).item()) == pytest.approx(mass, rel=1e-3, abs=1e-7)
    assert skipped.tolist() == [[[gone]]]
    reference, lse_too, as_well = skip_attention_reference(*tensors, scale=1.0, skip=skip, tile=2)
    torch.testing.assert_close((found, lse), (reference, lse_too))
    assert torch.equal(skipped, as_well)


@BACKENDS
def test_by_hand_in_tiles_of_sixteen(backend):
    """The same logits, eight of each: the share of a tile's mass is the same, so the numbers are, too."""
    tensors = one_row([x for x in (5.0, 4.0, 1.0, 0.0, 4.5, 3.0, -4.0, -5.0) for _ in range(8)])
    tensors[2][0, 0, :, 0] = (1.0 + torch.arange(8)).repeat_interleave(8)
    for skip, output, gone in ((0.01, 2.652391, 16), (0.1, 2.645070, 32), (0.5, 2.645070, 32)):
        found, _, skipped = attended(backend, *tensors, scale=1.0, skip=skip, tile=16)
        assert found[0, 0, 0, 0].item() == pytest.approx(output, abs=1e-5)
        assert skipped.tolist() == [[[gone]]]


@BACKENDS
def test_late_scores_skip_nothing_before_them(backend):
    """(0, 0), (5, 5): the first tile is never skipped, and was walked over before the second."""
    tensors = one_row([0.0] * 16 + [5.0] * 16)
    for skip in (0.5, 1.0):
        _, _, skipped = attended(backend, *tensors, scale=1.0, skip=skip, tile=16)
        assert skipped.item() == 0
        _, _, skipped = attended(backend, *one_row([5.0] * 16 + [0.0] * 16), scale=1.0, skip=skip, tile=16)
        assert skipped.item() == 16


@BACKENDS
def test_one_row_that_needs_a_tile_keeps_it(backend):
    """Of sixteen rows one has a large score in the second tile of entries; another head's row does not count."""
    query, key = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 48, 16)
    key[..., :16, 0] = 9.0
    key[..., 16:32, 1] = 9.0
    query[..., 0] = 1.0
    query[0, 0, 7, 1] = 1.0
    _, _, skipped = attended(backend, query, key, key, scale=1.0, skip=0.01, tile=16)
    visible = 16 * 17 // 2  # pairs in the rows' own tile
    assert skipped.tolist() == [[[visible], [16 * 16 + visible]]]


# ---------------------------------------------------------------------------------------------------- by brute force


def loops(query, key, value, *, scale, skip, tile, softcap=None, sinks=None):
    """What is read of each tile of rows, entry by entry in float64: bool [batch, heads, rows, n]."""
    batch, heads, rows, _ = query.shape
    n, group = key.shape[2], heads // key.shape[1]
    reads = torch.zeros(batch, heads, rows, n, dtype=torch.bool)
    for b in range(batch):
        for head in range(heads):
            scores = (query[b, head].double() @ key[b, head // group].double().T * scale).tolist()
            if softcap is not None:
                scores = [[softcap * math.tanh(one / softcap) for one in row] for row in scores]
            for first in range(0, rows, tile):
                of_tile = range(first, min(rows, first + tile))
                largest = dict.fromkeys(of_tile, -math.inf)
                for start in range(0, n, tile):
                    seen = {row: range(start, min(start + tile, n - rows + row + 1)) for row in of_tile}
                    tops = {row: max(scores[row][j] for j in js) for row, js in seen.items() if len(js)}
                    after = {row: max(largest[row], top) for row, top in tops.items()}
                    if any(math.exp(tops[row] - after[row]) >= skip for row in tops):
                        largest |= after
                        for row, js in seen.items():
                            reads[b, head, row, js.start : max(js.start, js.stop)] = True
    return reads


@BACKENDS
@SHAPES
@pytest.mark.parametrize("group", [1, 3], ids="group-{}".format)
@pytest.mark.parametrize("skip", [1e-3, 0.05, 1.0], ids="skip-{}".format)
def test_equals_the_definition(rows, past, group, skip, backend):
    query, key, value = sharp(rows, past, group)
    found = attended(backend, query, key, value, scale=0.5, skip=skip, tile=16)
    reads = loops(query, key, value, scale=0.5, skip=skip, tile=16)
    wide = [x.repeat_interleave(group, dim=1) for x in (key, value)]
    torch.testing.assert_close(found[0], attend(query, *wide, reads, scale=0.5)[0].float(), **NEAR)
    every = causal(BATCH, query.shape[1], rows, rows + past)
    gone = torch.stack([part.sum((2, 3)) for part in (every & ~reads).split(16, dim=2)], dim=2)
    assert torch.equal(found[2], gone.int())
    expected = skip_attention_reference(query, key, value, scale=0.5, skip=skip, tile=16)
    torch.testing.assert_close(found[:2], expected[:2], **NEAR)
    assert torch.equal(found[2], expected[2]) and found[1].dtype == torch.float32


def test_something_is_skipped_there():
    """Control: in the cases above the larger thresholds skip some tiles, and not all."""
    shares = []
    for skip in (1e-3, 0.05, 1.0):
        tensors = sharp(37, 29, 3)
        _, _, skipped = attended("torch", *tensors, scale=0.5, skip=skip, tile=16)
        shares.append(skipped.sum().item() / causal(BATCH, 3 * KV_HEADS, 37, 66).sum().item())
    assert 0 <= shares[0] < shares[1] < shares[2] < 0.9 and shares[1] > 0.01


@BACKENDS
@pytest.mark.parametrize("features", [("softcap",), ("sinks",), ("softcap", "sinks")], ids="+".join)
def test_softcap_and_sinks(features, backend):
    query, key, value = sharp(20, 37, 3)
    options = {"scale": 0.5, "skip": 0.1} | ({"softcap": 4.0} if "softcap" in features else {})
    if "sinks" in features:
        options["sinks"] = 3 * torch.randn(query.shape[1], generator=torch.Generator().manual_seed(2))
    output, lse, skipped = attended(backend, query, key, value, tile=16, **options)
    reads = loops(query, key, value, tile=16, **options)
    wide = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    chosen = {name: one for name, one in options.items() if name != "skip"}
    torch.testing.assert_close(output, attend(query, *wide, reads, **chosen)[0].float(), **NEAR)
    expected = skip_attention_reference(query, key, value, tile=16, **options)
    torch.testing.assert_close((output, lse), expected[:2], **NEAR)
    assert torch.equal(skipped, expected[2]) and skipped.sum() > 0


# ---------------------------------------------------------------------------------------------------- what is promised


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_zero_is_the_exact_attention(dtype, backend):
    """Bit by bit; and a threshold that nothing is below comes near it."""
    tensors = sharp(50, 37, 1, dtype=dtype)
    output, lse, skipped = attended(backend, *tensors, scale=0.5, skip=0.0, tile=16)
    exact, _, exact_lse = (
        None if x is None else x.cpu() for x in prompt_attention(*on(backend, *tensors), scale=0.5, with_lse=True)
    )
    assert torch.equal(output, exact) and torch.equal(lse, exact_lse)
    assert skipped.shape == (BATCH, KV_HEADS, 4) and skipped.sum() == 0
    walked, walked_lse, skipped = attended(backend, *tensors, scale=0.5, skip=1e-30, tile=16)
    assert skipped.sum() == 0
    torch.testing.assert_close(walked_lse, exact_lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(walked, exact, **(NEAR if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}))


def test_more_is_skipped_with_a_larger_threshold_and_the_bound_holds():
    """300 random cases: what is skipped grows with the threshold, the mass that is lost and the output stay within the bound."""
    lost = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        rows, past, tile = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 20), (0, 20), (0, 3))
        )
        tile = 2**tile
        query, key, value = torch.randn(3, 1, 1, rows + past, 4, generator=generator)
        query = 3 * query[:, :, past:]
        exact, _, full = prompt_attention(query, key, value, scale=0.7, with_lse=True)
        weights = tile_weights(query, key, scale=0.7, tile=tile)
        before = torch.zeros_like(weights, dtype=torch.bool)
        for skip in (0.001, 0.03, 0.3, 1.0):
            output, lse, skipped = skip_attention(query, key, value, scale=0.7, skip=skip, tile=tile)
            gone = (weights >= 0) & (weights < skip)
            assert (gone >= before).all()
            assert torch.equal(skipped > 0, gone.any(-1))
            before = gone
            mass = -torch.expm1(lse - full)
            bound = gone.sum(-1).repeat_interleave(tile, dim=-1)[..., :rows] * tile * skip
            assert (mass <= bound + 1e-5).all()
            off = (output - exact).norm(dim=-1)
            assert (off <= 2 * mass.clamp(min=0) * value.norm(dim=-1).max() + 1e-5).all()
            lost += int((mass > 1e-3).sum())
    assert lost > 1000


def test_tile_weights_say_what_is_skipped(monkeypatch):
    """By loops; also where few scores are made at a time."""
    query, key, _ = sharp(37, 29, 3)
    weights = tile_weights(query, key, scale=0.5, tile=16)
    assert weights.shape == (BATCH, 3 * KV_HEADS, 3, 5)
    for b, head, t, j in torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist():
        scores = key[b, head // 3] @ query[b, head, 16 * t : 16 * t + 16].T * 0.5
        found = [-1.0]
        for r, row in enumerate(scores.T):
            seen = row[: 29 + 16 * t + r + 1]
            if len(seen) > 16 * j:
                found.append((seen[16 * j : 16 * j + 16].max() - seen[: 16 * j + 16].max()).exp().item())
        assert weights[b, head, t, j].item() == pytest.approx(max(found), abs=1e-5)
    monkeypatch.setattr("kvpress.kernels.skip_attention.TILE_SCORES", 1)
    torch.testing.assert_close(tile_weights(query, key, scale=0.5, tile=16), weights)


@BACKENDS_AND_DTYPES
@pytest.mark.parametrize("head_dim", [64, 80, 128], ids="d-{}".format)
def test_is_as_precise_as_eager_attention(head_dim, dtype, backend):
    """Where nothing is skipped the error against float64 is at most twice that of eager attention in that precision."""
    query, key, value = inputs(63, 21, 3, head_dim, dtype)
    wide = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    seen = causal(BATCH, query.shape[1], 63, 84)
    expected = attend(query, *wide, seen, scale=head_dim**-0.5)[0]
    torch_error = (eager(query, *wide, seen, scale=head_dim**-0.5).double() - expected).abs().max()
    output, _, skipped = attended(backend, query, key, value, scale=head_dim**-0.5, skip=1e-30, tile=16)
    assert output.dtype == dtype and skipped.sum() == 0
    assert (output.double() - expected).abs().max() <= 2 * torch_error + 1e-6


@BACKENDS
def test_strided_entries_and_the_buffer_behind_them(backend):
    """Views into larger buffers, whose rest is NaN, are read in place; equal inputs give equal results."""
    query, key, value = sharp(17, 29, 1, spare=30)
    expected = attended(backend, query, key.contiguous(), value.contiguous(), scale=0.5, skip=0.1, tile=16)
    for _ in range(2):
        for one, other in zip(
            attended(backend, query, key, value, scale=0.5, skip=0.1, tile=16), expected, strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"skip": -0.1}, "skip=-0.1 does not work; give a number from 0"),
        ({"skip": 1.5}, "skip=1.5 does not work"),
        ({"skip": math.nan}, "skip=nan does not work"),
        ({"tile": 48}, "tile=48 is no power of two"),
        (
            {"tile": 8, "backend": "triton"},
            "tile=8 with heads of 16 in torch.float32 is not for backend='triton'.* 16 to 32",
        ),
        ({"backend": "cuda"}, "backend='cuda' does not exist"),
    ],
)
def test_bad_values(fields, reason):
    with pytest.raises(ValueError, match=reason):
        skip_attention(*inputs(20, 3, 3), **{"scale": 0.5, "skip": 0.1, **fields})
