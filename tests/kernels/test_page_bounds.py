"""page_bounds against its definition, to the bit, and entry by entry, on both paths."""

import pytest
import torch

from kvpress.kernels.page_bounds import add_to_page_bounds, page_bounds, page_bounds_reference
from support.backends import BACKENDS, on

BATCH, KV_HEADS = 2, 3
# Numbers are compared and copied, never rounded, so that bfloat16 is right in Triton's interpreter too.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
SIZES = pytest.mark.parametrize(
    ("n", "page_size"),
    [(1, 1), (1, 16), (3, 8), (5, 1), (16, 16), (17, 16), (50, 7), (63, 1), (63, 16), (111, 7), (111, 100), (64, 64)],
    ids=str,
)


def outside(head_dim):
    """A key that is above or below every other in each channel (a comparison would pass over NaN)."""
    return torch.where(torch.arange(head_dim) % 2 == 0, 100.0, -100.0)


def random_keys(backend, n, head_dim=16, dtype=torch.float32, behind=0):
    """The first n entries of buffers with so many `behind` them that would be a bound."""
    keys = torch.randn(BATCH, KV_HEADS, n + behind, head_dim, generator=torch.Generator().manual_seed(n)).to(dtype)
    keys[:, :, n:] = outside(head_dim).to(dtype)
    return on(backend, keys)[0][:, :, :n]


def equal(found, expected, dtype):
    return all(ours.dtype == dtype and torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@BACKENDS
@DTYPES
@SIZES
@pytest.mark.parametrize("counted", [False, True], ids=["all", "counts"])
@pytest.mark.parametrize("behind", [0, 5], ids=["compact", "slice"])
def test_equals_the_definition(backend, n, page_size, counted, behind, dtype):
    """With counts, kv heads hold from nothing to everything; what is behind is never looked at."""
    keys = random_keys(backend, n, dtype=dtype, behind=behind)
    counts = torch.tensor([[n, 0, 1], [n // 2, n, max(0, n - 3)]], device=keys.device) if counted else None
    whole = torch.full((BATCH, KV_HEADS), n, device=keys.device) if counts is None else counts
    if counted:
        unheld = torch.arange(n, device=keys.device)[:, None] >= counts[..., None, None]
        keys = torch.where(unheld, outside(16).to(keys), keys)
    found = page_bounds(keys, counts, page_size, backend=backend)
    assert equal(found, page_bounds_reference(keys, whole, page_size), dtype)


@BACKENDS
@pytest.mark.parametrize("head_dim", [1, 10, 64, 80, 96, 128, 256], ids="d-{}".format)
@pytest.mark.parametrize("page_size", [1, 16, 40], ids="page-{}".format)
def test_head_dims(backend, head_dim, page_size):
    """Head dims that are no power of two, and wider than a program's channels; one tile of pages and several."""
    keys = random_keys(backend, 150, head_dim)
    whole = torch.full((BATCH, KV_HEADS), 150, device=keys.device)
    found = page_bounds(keys, None, page_size, backend=backend)
    assert equal(found, page_bounds_reference(keys, whole, page_size), torch.float32)


@BACKENDS
def test_no_entries(backend):
    least, greatest = page_bounds(random_keys(backend, 0), None, 16, backend=backend)
    assert least.shape == greatest.shape == (BATCH, KV_HEADS, 0, 16)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("n", "page_size"), [(1, 1), (5, 1), (17, 16), (25, 7), (3, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [10, 16, 80, 256], ids="d-{}".format)
def test_one_by_one_is_all_at_once(backend, n, page_size, head_dim, dtype):
    """Entries added in place, in any pace per kv head; a page that nothing reached keeps what it held."""
    keys = random_keys(backend, n, head_dim, dtype)
    pages = -(-n // page_size) + 1
    buffer = torch.full((2, BATCH, KV_HEADS + 1, pages, head_dim), 7.0, dtype=dtype, device=keys.device)
    buffer[0] = -7.0  # wider than any bound: the first entry of a page replaces it
    least, greatest = buffer[:, :, :KV_HEADS]
    counts = torch.zeros(BATCH, KV_HEADS, dtype=torch.int64, device=keys.device)
    generator = torch.Generator().manual_seed(1)
    while bool((counts < n).any()):
        new = (torch.rand(BATCH, KV_HEADS, generator=generator) < 0.7).to(keys.device) & (counts < n)
        at = counts.clamp(max=n - 1)[..., None, None].expand(-1, -1, 1, head_dim)
        rank = torch.where(new, counts, counts - 1)
        add_to_page_bounds(least, greatest, keys.gather(2, at)[:, :, 0], rank, new, page_size, backend=backend)
        counts += new
    assert equal((least[:, :, :-1], greatest[:, :, :-1]), page_bounds_reference(keys, counts, page_size), dtype)
    assert (buffer[:, :, :, -1].abs() == 7).all() and (buffer[:, :, KV_HEADS].abs() == 7).all()


@BACKENDS
def test_all_are_new(backend):
    """Without `new`, and for an entry that is a slice of a larger buffer."""
    keys = random_keys(backend, 40, behind=3)
    least, greatest = page_bounds(keys[:, :, :39], None, 8, backend=backend)
    rank = torch.full((BATCH, KV_HEADS), 39, device=keys.device)
    add_to_page_bounds(least, greatest, keys[:, :, 39], rank, None, 8, backend=backend)
    whole = torch.full((BATCH, KV_HEADS), 40, device=keys.device)
    assert equal((least, greatest), page_bounds_reference(keys, whole, 8), torch.float32)
