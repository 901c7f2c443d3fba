"""antidiagonal_mass on both paths against its definition, and against the attention itself where cells are single entries.

tests/policies/test_x_attention.py has what the policy chooses by it.
"""

import pytest
import torch

from kvpress.kernels import antidiagonal_mass as module
from kvpress.kernels.antidiagonal_mass import antidiagonal_mass, antidiagonal_mass_reference
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, TRITON_DEVICE, needs_triton, on

# NumPy, in Triton's interpreter, says so where a logarithm of zero is what is meant, or an exponential is masked.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

NEAR = {"rtol": 1e-5, "atol": 1e-5}
TILES = pytest.mark.parametrize("tile_scores", [1, 1 << 24], ids=["tiles", "one-tile"])
# Rows that begin and end inside of a cell and of a block; one row; a whole prompt.
SHAPES = pytest.mark.parametrize(
    ("n", "rows"), [(32, 32), (29, 29), (40, 13), (37, 1), (35, 7), (1, 1), (5, 3)], ids=str
)


def inputs(n, rows, group=2, kv_heads=2, head_dim=6, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(n + rows + group)
    query = torch.randn(batch, kv_heads * group, rows, head_dim, generator=generator).to(dtype)
    return query, torch.randn(batch, kv_heads, n, head_dim, generator=generator).to(dtype)


def mass_of(backend, query, keys, scale=0.7, **sizes):
    """The operation's result on the CPU, of tensors that go where the path runs."""
    return antidiagonal_mass(*on(backend, query, keys), scale=scale, **sizes, backend=backend).cpu()


@BACKENDS
def test_by_hand(backend):
    """z(1, 0) = 2 * 1 + 1 * 3 = 5, so sigmoid(5 / 2) of it against the 0 of the diagonal cell."""
    query, keys = torch.tensor([[[[0.0], [0.0], [1.0], [2.0]]]]), torch.tensor([[[[1.0], [3.0], [0.0], [0.0]]]])
    mass = mass_of(backend, query, keys, scale=1.0, stride=2, block_size=2)
    torch.testing.assert_close(mass[0, 0], torch.tensor([[1.0, 0.0], [0.924142, 0.075858]]), atol=1e-6, rtol=0)


@BACKENDS
def test_uniform_rows_by_hand(backend):
    zeros = torch.zeros(1, 1, 16, 4)
    mass = mass_of(backend, zeros, zeros, stride=2, block_size=4)
    expected = [
        [2.0, 0.0, 0.0, 0.0],
        [1.166667, 0.833333, 0.0, 0.0],
        [0.733333, 0.733333, 0.533333, 0.0],
        [0.535714, 0.535714, 0.535714, 0.392857],
    ]
    torch.testing.assert_close(mass[0, 0], torch.tensor(expected), atol=1e-6, rtol=0)


@BACKENDS
@SHAPES
@pytest.mark.parametrize("sizes", [(4, 8), (1, 4), (8, 8), (2, 16)], ids=str)
@pytest.mark.parametrize("group", [1, 3], ids="group-{}".format)
@TILES
def test_equals_the_definition(n, rows, sizes, group, tile_scores, backend, monkeypatch):
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, keys = inputs(n, rows, group)
    options = {"stride": sizes[0], "block_size": sizes[1], "softcap": None if rows % 2 else 1.5}
    mass = mass_of(backend, query, keys, **options)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass, antidiagonal_mass_reference(query, keys, scale=0.7, **options), **NEAR)


@BACKENDS_AND_DTYPES
@pytest.mark.parametrize("head_dim", [16, 80, 128], ids="d-{}".format)
def test_is_as_precise_as_float32(dtype, head_dim, backend):
    """Of Q and K as they are rounded: scores and sums are float32."""
    query, keys = inputs(40, 24, head_dim=head_dim, dtype=dtype)
    options = {"scale": head_dim**-0.5, "stride": 4, "block_size": 16}
    expected = mass_of("torch", query.double(), keys.double(), **options)
    torch.testing.assert_close(mass_of(backend, query, keys, **options), expected, **NEAR)


@BACKENDS
@pytest.mark.parametrize("block_size", [8, 64, 256], ids="block-{}".format)
def test_stride_one_is_the_attention_itself(block_size, backend):
    """Also where a block has more cells than a tile; the last block is a part of one."""
    query, keys = inputs(300, 300, head_dim=8, batch=1)
    mass = mass_of(backend, query, keys, scale=0.3, stride=1, block_size=block_size)
    scores = 0.3 * query.double() @ keys.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    weights = scores.masked_fill(torch.ones(300, 300).triu(1) > 0, float("-inf")).softmax(-1)
    spare = -300 % block_size
    weights = torch.nn.functional.pad(weights, (0, spare, 0, spare)).unflatten(3, (-1, block_size))
    torch.testing.assert_close(mass, weights.unflatten(2, (-1, block_size)).sum((3, 5)).float(), **NEAR)


@BACKENDS
def test_sums_are_the_cells_that_hold_rows(backend):
    """Rows 37 to 99 in cells of 4 and blocks of 16: the block of row 37 has 2 cells that hold rows and one more behind."""
    mass = mass_of(backend, *inputs(100, 63), stride=4, block_size=16)
    expected = torch.tensor([3.0, 4.0, 4.0, 4.0, 1.0]).expand(2, 4, 5)
    torch.testing.assert_close(mass.sum(-1), expected, **NEAR)
    blocks = torch.arange(7)
    assert (mass.masked_fill(blocks <= blocks[2:, None], 0.0) == 0).all()


@BACKENDS_AND_DTYPES
def test_slice_of_a_larger_buffer(dtype, backend):
    """What lies past the entries in use is never read; rows may be a slice, too."""
    query, keys = inputs(37, 21, dtype=dtype)
    buffer = torch.full((2, 2, 48, 6), float("nan"), dtype=dtype)
    buffer[:, :, :37] = keys
    wide = torch.full((2, 4, 30, 6), float("nan"), dtype=dtype)
    wide[:, :, 9:] = query
    options = {"stride": 4, "block_size": 8}
    found = mass_of(backend, wide[:, :, 9:], buffer[:, :, :37], **options)
    assert torch.equal(found, mass_of(backend, query, keys, **options))


@BACKENDS
def test_equal_inputs_equal_results(backend):
    query, keys = inputs(200, 150, head_dim=16)
    options = {"stride": 2, "block_size": 16}
    assert torch.equal(mass_of(backend, query, keys, **options), mass_of(backend, query, keys, **options))


@BACKENDS
def test_large_scores(backend):
    """A cell that has all of the weight, and scores that exp alone cannot hold."""
    query, keys = inputs(32, 32)
    mass = mass_of(backend, query * 300, keys * 300, stride=2, block_size=8)
    assert mass.isfinite().all()
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 4, 4), 4.0), **NEAR)


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_splits(splits):
    """Cells of entries that several programs share, also where no row of a tile sees a split."""
    from kvpress.kernels.gpu import antidiagonal_mass as gpu

    query, keys = (x.to(TRITON_DEVICE) for x in inputs(300, 290, head_dim=16, batch=1))
    mass = gpu.antidiagonal_mass(query, keys, scale=0.3, stride=1, block_size=8, softcap=None, splits=splits).cpu()
    torch.testing.assert_close(
        mass, mass_of("torch", query.cpu(), keys.cpu(), scale=0.3, stride=1, block_size=8), **NEAR
    )
