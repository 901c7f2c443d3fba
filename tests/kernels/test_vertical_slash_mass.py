"""vertical_slash_mass and the means of blocks against their definitions."""

import pytest
import torch

from kvpress.kernels import vertical_slash_mass as module
from kvpress.kernels.block_means import block_means, block_scores
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass, vertical_slash_mass_reference
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on

# NumPy, in Triton's interpreter, says so where a logarithm of zero is what is meant, or an exponential is masked.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")


def mass_of(backend, query, key, **options):
    """The operation's results on the CPU, of tensors that go where the path runs."""
    return tuple(x.cpu() for x in vertical_slash_mass(*on(backend, query, key), **options, backend=backend))


def inputs(rows, n, heads=4, kv_heads=2, head_dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + n)
    query = torch.randn(2, heads, rows, head_dim, generator=generator).to(dtype)
    return query, torch.randn(2, kv_heads, n, head_dim, generator=generator).to(dtype)


@BACKENDS
def test_uniform_rows_by_hand(backend):
    """Rows 4 and 5 of six equal entries: 1/5 + 1/6 five times, then 1/6."""
    by_entry, by_distance = mass_of(backend, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 6, 4), scale=1.0)
    expected = torch.tensor([0.366667] * 5 + [0.166667])
    for found in (by_entry, by_distance):
        torch.testing.assert_close(found[0, 0], expected, atol=1e-6, rtol=0)


@BACKENDS
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 9), (6, 6), (4, 23), (16, 17)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2), (10, 5)])
@pytest.mark.parametrize("tile", [1, 300, 560, 1 << 24])
def test_equals_the_definition(rows, n, heads, kv_heads, tile, backend, monkeypatch):
    """In tiles of one head, of some, and whole."""
    monkeypatch.setattr(module, "TILE_SCORES", tile)
    query, key = inputs(rows, n, heads, kv_heads)
    for softcap in (None, 1.5):
        found = mass_of(backend, query, key, scale=0.7, softcap=softcap)
        expected = vertical_slash_mass_reference(query, key, scale=0.7, softcap=softcap)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.sum(-1), torch.full(one.shape[:2], float(rows)))


@BACKENDS
@pytest.mark.parametrize(("rows", "n"), [(20, 300), (64, 300), (100, 300), (130, 131), (64, 64)])
@pytest.mark.parametrize("head_dim", [16, 80, 256], ids="d-{}".format)
def test_many_rows(rows, n, head_dim, backend):
    """Several tiles of rows, entries and distances, some of them in part, against a float64 loop over diagonals."""
    query, key = inputs(rows, n, head_dim=head_dim)
    found = mass_of(backend, query, key, scale=head_dim**-0.5)
    scores = head_dim**-0.5 * query.double() @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    weights = scores.masked_fill(torch.ones(rows, n).triu(n - rows + 1) > 0, float("-inf")).softmax(-1)
    slanted = torch.stack([weights.diagonal(n - rows - d, -2, -1).sum(-1) for d in range(n)], dim=-1)
    for one, other in zip(found, (weights.sum(2), slanted), strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5, rtol=1e-5)


@BACKENDS_AND_DTYPES
def test_half_precision_and_a_buffers_front(dtype, backend):
    """As float32 of what Q and K are rounded to; what lies behind the entries is never read."""
    query, key = inputs(5, 19, dtype=dtype)
    expected = mass_of("torch", query.float(), key.float(), scale=0.7)
    buffer = torch.full((2, 2, 30, 8), float("nan"), dtype=dtype)
    buffer[:, :, :19] = key
    for one, other in zip(mass_of(backend, query, buffer[:, :, :19], scale=0.7), expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


@BACKENDS
def test_equal_inputs_equal_results(backend):
    query, key = inputs(40, 200)
    once, again = (mass_of(backend, query, key, scale=0.7) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@BACKENDS
def test_large_scores(backend):
    """A row that gives one entry everything, and scores that exp alone cannot hold."""
    query, key = inputs(9, 30)
    for one in mass_of(backend, query * 300, key * 300, scale=1.0):
        assert one.isfinite().all()
        torch.testing.assert_close(one.sum(-1), torch.full((2, 4), 9.0))


@pytest.mark.parametrize(("first", "rows"), [(0, 8), (0, 9), (6, 9), (3, 1), (5, 2), (4, 4)])
def test_means_of_blocks(first, rows):
    """Over the rows that a block has, wherever they begin and end."""
    x = torch.randn(2, 3, rows, 5, generator=torch.Generator().manual_seed(1))
    found = block_means(x, first, 4)
    at = torch.arange(first, first + rows) // 4
    expected = [x[:, :, at == block].mean(2) for block in at.unique()]
    torch.testing.assert_close(found, torch.stack(expected, dim=2))
    keys = torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block_scores(found, keys), found @ keys.expand(2, 3, 6, 5).transpose(-1, -2))
