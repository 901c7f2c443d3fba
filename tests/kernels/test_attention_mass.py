"""attention_mass on both paths against its reference and a float64 loop.

gpu/test_attention_mass.py has what only the Triton kernels do.
"""

import pytest
import torch

from kvpress.kernels import attention_mass as module
from kvpress.kernels.attention_mass import attention_mass, attention_mass_reference
from kvpress.kernels.prompt_attention import prompt_attention
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on
from support.brute import attend

# NumPy, in Triton's interpreter, says so where a logarithm of zero is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")

BATCH, KV_HEADS = 2, 2
FEATURES = [(), ("softcap",), ("sinks",), ("softcap", "sinks")]
ALL_FEATURES = pytest.mark.parametrize("features", FEATURES, ids=lambda names: "+".join(names) or "plain")
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
TILES = pytest.mark.parametrize("tile_scores", [1, 3000, 1 << 22], ids=["row-tiles", "small-tiles", "one-tile"])


NEAR = {"rtol": 1e-5, "atol": 5e-6}  # the rounding of float32 sums, whatever the dtype of Q and K


def mass_of(backend, *tensors, scale=0.3, **chosen):
    """The operation's result on the CPU, of tensors that go where the path runs."""
    chosen = dict(zip(chosen, on(backend, *chosen.values()), strict=True))
    return attention_mass(*on(backend, *tensors), scale=scale, **chosen, backend=backend).cpu()


def inputs(rows, entries, group, head_dim=16, dtype=torch.float32, seed=0, holes=True):
    """Entries in any order, some slots empty; rows at random positions, the first of sequence 0 padding."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, KV_HEADS * group, rows, head_dim, generator=generator).to(dtype)
    key = torch.randn(BATCH, KV_HEADS, entries, head_dim, generator=generator).to(dtype)
    order = [torch.randperm(2 * entries, generator=generator)[:entries] for _ in range(BATCH * KV_HEADS)]
    positions = torch.stack(order).view(BATCH, KV_HEADS, entries).int()
    row_positions = torch.randint(2 * entries, (BATCH, rows), generator=generator).int()
    if holes:
        positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
        row_positions[0, 0] = -1
    return query, row_positions, key, positions


def options(features, query):
    generator = torch.Generator().manual_seed(1)
    chosen = {"softcap": 1.5} if "softcap" in features else {}
    if "sinks" in features:
        chosen["sinks"] = torch.randn(query.shape[1], generator=generator)
    return chosen


def visibility(row_positions, positions):
    """Bool [batch, kv_heads, rows, n]: an entry is seen by the rows at its position and after."""
    rows, held = row_positions.tolist(), positions.tolist()
    return torch.tensor(
        [
            [[[0 <= place <= at for place in places] for at in rows[sequence]] for places in heads]
            for sequence, heads in enumerate(held)
        ]
    )


@BACKENDS
@pytest.mark.parametrize(("rows", "entries"), [(1, 1), (1, 63), (7, 63), (32, 111)], ids=str)
@GROUPS
@ALL_FEATURES
@TILES
def test_equals_the_definition(rows, entries, group, features, tile_scores, backend, monkeypatch):
    """Padding rows, empty slots and any order of entries, against the loop and the reference."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, row_positions, key, positions = inputs(rows, entries, group)
    chosen = options(features, query)
    visible = visibility(row_positions, positions)
    _, expected = attend(query, key, key, visible, scale=0.3, **chosen)
    mass = mass_of(backend, query, row_positions, key, positions, **chosen)
    assert mass.dtype == torch.float32 and mass.shape == positions.shape
    torch.testing.assert_close(mass, expected.float(), **NEAR)
    if rows < 32 and tile_scores == 1:
        reference = attention_mass_reference(query, row_positions, key, positions, scale=0.3, **chosen)
        torch.testing.assert_close(reference, expected.float(), **NEAR)


@BACKENDS_AND_DTYPES
@GROUPS
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256], ids="d-{}".format)
def test_is_as_precise_as_float32(dtype, group, head_dim, backend):
    """Whatever the dtype of Q and K, scores and sums are float32: the error stays at its rounding."""
    query, row_positions, key, positions = inputs(9, 63, group, head_dim, dtype)
    _, expected = attend(query, key, key, visibility(row_positions, positions), scale=head_dim**-0.5)
    mass = mass_of(backend, query, row_positions, key, positions, scale=head_dim**-0.5)
    torch.testing.assert_close(mass, expected.float(), rtol=1e-5, atol=1e-6)


@BACKENDS
@GROUPS
@TILES
def test_u5_sums_to_real_rows_times_group(group, tile_scores, backend, monkeypatch):
    """U5: each real row that sees an entry gives one per query head; padding rows give nothing."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, row_positions, key, positions = inputs(9, 63, group)
    mass = mass_of(backend, query, row_positions, key, positions)
    sees = visibility(row_positions, positions).any(-1).sum(-1)
    torch.testing.assert_close(mass.sum(-1), sees.float() * group, **NEAR)
    assert (mass[positions < 0] == 0).all()


@BACKENDS
def test_rows_that_see_nothing(backend):
    """Only padding rows, or only entries that are younger or empty: zeros, never NaN."""
    query, _, key, positions = inputs(5, 21, 3)
    padding = torch.full((BATCH, 5), -1, dtype=torch.int32)
    assert (mass_of(backend, query, padding, key, positions) == 0).all()
    first = torch.zeros(BATCH, 5, dtype=torch.int32)
    assert (mass_of(backend, query, first, key, positions.clamp(min=0) + 1) == 0).all()
    assert (mass_of(backend, query, first, key, torch.full_like(positions, -1)) == 0).all()


@BACKENDS
def test_position_zero_is_visible(backend):
    """Position 0 is an entry, not an empty slot; a row at 0 sees it and nothing else."""
    query, _, key, _ = inputs(1, 3, 1)
    positions = torch.tensor([2, 0, 1], dtype=torch.int32).expand(BATCH, KV_HEADS, 3)
    mass = mass_of(backend, query, torch.zeros(BATCH, 1, dtype=torch.int32), key, positions)
    assert (mass == torch.tensor([0.0, 1.0, 0.0])).all()


@BACKENDS
def test_all_rows_equal_the_prompts_own_mass(backend):
    """With every row of a prompt the result is the column sums that prompt_attention returns."""
    query, _, key, _ = inputs(63, 63, 3, holes=False)
    places = torch.arange(63, dtype=torch.int32)
    mass = mass_of(backend, query, places.expand(BATCH, 63), key, places.expand(BATCH, KV_HEADS, 63), scale=0.25)
    _, expected, _ = prompt_attention(query, key, key, scale=0.25, with_mass=True)
    torch.testing.assert_close(mass, expected, **NEAR)


@BACKENDS_AND_DTYPES
def test_slice_of_a_larger_buffer(dtype, backend):
    """Keys past those in use are never read."""
    query, row_positions, key, positions = inputs(9, 63, 3, dtype=dtype)
    buffer = torch.full((BATCH, KV_HEADS, 80, 16), float("nan"), dtype=dtype)
    buffer[:, :, :63] = key
    mass = mass_of(backend, query, row_positions, buffer[:, :, :63], positions)
    torch.testing.assert_close(mass, mass_of(backend, query, row_positions, key, positions), **NEAR)


@BACKENDS
def test_u6_heads_do_not_leak(backend):
    """U6: permuting the kv heads with their groups permutes the mass."""
    query, row_positions, key, positions = inputs(9, 63, 3)
    flipped = query.unflatten(1, (KV_HEADS, 3)).flip(1).flatten(1, 2)
    mass = mass_of(backend, query, row_positions, key, positions)
    other = mass_of(backend, flipped, row_positions, key.flip(1), positions.flip(1))
    torch.testing.assert_close(other.flip(1), mass, **NEAR)


def weighted(query, row_positions, key, positions, weights, **chosen):
    """The float64 loop row by row, each row times its weight."""
    visible = visibility(row_positions, positions)
    total = torch.zeros(positions.shape, dtype=torch.float64)
    for row in range(query.shape[2]):
        at = slice(row, row + 1)
        _, mass = attend(query[:, :, at], key, key, visible[:, :, at], scale=0.3, **chosen)
        total += weights[:, row].double()[:, None, None] * mass
    return total


def in_order(rows, entries, group, dtype=torch.float32):
    """Entry i at position i, the rows at the last positions."""
    query, _, key, _ = inputs(rows, entries, group, dtype=dtype, holes=False)
    places = torch.arange(entries, dtype=torch.int32)
    return query, places[entries - rows :].expand(BATCH, rows), key, places.expand(BATCH, KV_HEADS, entries)


@BACKENDS
@pytest.mark.parametrize(("rows", "entries"), [(1, 1), (1, 63), (7, 63), (32, 111)], ids=str)
@GROUPS
@ALL_FEATURES
@TILES
def test_row_weights(rows, entries, group, features, tile_scores, backend, monkeypatch):
    """A factor on each row of each sequence, against the loop and the reference; padding rows, empty slots."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, row_positions, key, positions = inputs(rows, entries, group)
    chosen = options(features, query)
    weights = torch.rand(BATCH, rows, generator=torch.Generator().manual_seed(2))
    expected = weighted(query, row_positions, key, positions, weights, **chosen)
    mass = mass_of(backend, query, row_positions, key, positions, row_weights=weights, **chosen)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass, expected.float(), **NEAR)
    if rows < 32 and tile_scores == 1:
        reference = attention_mass_reference(
            query, row_positions, key, positions, scale=0.3, row_weights=weights, **chosen
        )
        torch.testing.assert_close(reference, expected.float(), **NEAR)


@BACKENDS
@GROUPS
@TILES
def test_row_weights_of_one_and_of_zero(group, tile_scores, backend, monkeypatch):
    """Ones change nothing; a row of weight zero adds nothing; a sequence's weights are its own."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, row_positions, key, positions = inputs(9, 63, group)
    plain = mass_of(backend, query, row_positions, key, positions)
    ones = torch.ones(BATCH, 9)
    mass = mass_of(backend, query, row_positions, key, positions, row_weights=ones)
    torch.testing.assert_close(mass, plain, **NEAR)
    ones[1, 4:] = 0
    mass = mass_of(backend, query, row_positions, key, positions, row_weights=ones)
    torch.testing.assert_close(mass[0], plain[0], **NEAR)
    first = mass_of(backend, query[:, :, :4], row_positions[:, :4], key, positions)
    torch.testing.assert_close(mass[1], first[1], **NEAR)


@BACKENDS
@pytest.mark.parametrize(("rows", "entries"), [(1, 1), (63, 63), (7, 63), (32, 111), (70, 140), (40, 300)], ids=str)
@GROUPS
@ALL_FEATURES
@TILES
@pytest.mark.parametrize("weigh", [False, True], ids=["plain", "weighed"])
def test_without_positions(rows, entries, group, features, tile_scores, weigh, backend, monkeypatch):
    """positions=None says that entries are in order and the rows at the end: the result of saying so by positions."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, row_positions, key, positions = in_order(rows, entries, group)
    chosen = options(features, query)
    weights = torch.rand(BATCH, rows, generator=torch.Generator().manual_seed(2)) if weigh else None
    mass = mass_of(backend, query, row_positions, key, None, row_weights=weights, **chosen)
    explicit = mass_of(backend, query, row_positions, key, positions, row_weights=weights, **chosen)
    torch.testing.assert_close(mass, explicit, **NEAR)
    if tile_scores > 1:
        ones = torch.ones(BATCH, rows) if weights is None else weights
        expected = weighted(query, row_positions, key, positions, ones, **chosen)
        torch.testing.assert_close(mass, expected.float(), **NEAR)


@BACKENDS
def test_without_positions_against_the_definition(backend):
    """The reference, at a length with several tiles of several rows each."""
    query, row_positions, key, positions = in_order(9, 40, 2)
    weights = torch.rand(BATCH, 9, generator=torch.Generator().manual_seed(2))
    mass = mass_of(backend, query, row_positions, key, None, row_weights=weights)
    expected = attention_mass_reference(query, row_positions, key, positions, scale=0.3, row_weights=weights)
    torch.testing.assert_close(mass, expected, **NEAR)


def test_a_forgetting_factor_weighs_rows():
    """Weights alpha ** (rows after it) give the recursion mass = alpha * mass + (the row's weights)."""
    query, row_positions, key, positions = in_order(21, 21, 3)
    for alpha in (0.0, 0.5, 0.95):
        weights = alpha ** torch.arange(20.0, -1.0, -1.0).expand(BATCH, -1)
        mass = mass_of("torch", query, row_positions, key, None, row_weights=weights)
        step = torch.zeros_like(mass)
        for row in range(21):
            at = slice(row, row + 1)
            step = alpha * step + mass_of("torch", query[:, :, at], row_positions[:, at], key, positions)
        torch.testing.assert_close(mass, step, **NEAR)
