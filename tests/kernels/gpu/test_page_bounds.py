"""The Triton kernels of page_bounds against the definition, to the bit, and entry by entry."""

import pytest
import torch

from kvpress.kernels.gpu import page_bounds as gpu
from kvpress.kernels.page_bounds import add_to_page_bounds, page_bounds, page_bounds_reference
from support.accelerator import DEVICE

BATCH, KV_HEADS = 2, 3
# Numbers are compared and copied, never rounded, so that bfloat16 is right in the interpreter too.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
SIZES = pytest.mark.parametrize(
    ("n", "page_size"), [(1, 1), (1, 16), (63, 1), (63, 16), (111, 7), (111, 16), (111, 100), (64, 64)], ids=str
)


def outside(head_dim):
    """A key that is above or below every other in each channel (NaN would be ignored by a comparison)."""
    return torch.where(torch.arange(head_dim) % 2 == 0, 100.0, -100.0)


def random_keys(n, head_dim=16, dtype=torch.float32, spare=0):
    """The first n entries of buffers with `spare` more that would be a bound."""
    keys = torch.randn(BATCH, KV_HEADS, n + spare, head_dim, generator=torch.Generator().manual_seed(n)).to(dtype)
    keys[:, :, n:] = outside(head_dim).to(dtype)
    return keys.to(DEVICE)[:, :, :n]


@DTYPES
@SIZES
@pytest.mark.parametrize("counted", [False, True], ids=["all", "counts"])
def test_equals_the_definition(n, page_size, counted, dtype):
    """Kv heads with from nothing to everything; NaN in what is behind counts for nothing."""
    keys = random_keys(n, dtype=dtype, spare=5)
    counts = torch.tensor([[n, 0, 1], [n // 2, n, max(0, n - 3)]], device=DEVICE) if counted else None
    whole = torch.full((BATCH, KV_HEADS), n) if counts is None else counts
    if counted:
        behind = torch.arange(n, device=DEVICE)[:, None] >= counts[..., None, None]
        keys = torch.where(behind, outside(16).to(DEVICE, dtype), keys)
    found = page_bounds(keys, counts, page_size, backend="triton")
    for ours, theirs in zip(found, page_bounds_reference(keys, whole, page_size), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("head_dim", [1, 64, 80, 96, 128, 256], ids="d-{}".format)
@pytest.mark.parametrize("page_size", [1, 16, 40], ids="page-{}".format)
def test_head_dims(head_dim, page_size):
    """Head dims that are no power of two, and wider than a program's channels; one tile of pages and several."""
    keys = random_keys(150, head_dim)
    for ours, theirs in zip(
        page_bounds(keys, None, page_size, backend="triton"),
        page_bounds(keys, None, page_size, backend="torch"),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_page_longer_than_a_step(monkeypatch):
    """A page's entries are taken in several steps, the last one short."""
    monkeypatch.setattr(gpu, "blocks", lambda page_size, head_dim: gpu.Blocks(2, 4, 16))
    keys = random_keys(63)
    for page_size in (3, 4, 18):
        expected = page_bounds(keys, None, page_size, backend="torch")
        for ours, theirs in zip(page_bounds(keys, None, page_size, backend="triton"), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_no_entries():
    least, greatest = page_bounds(random_keys(0), None, 16, backend="triton")
    assert least.shape == greatest.shape == (BATCH, KV_HEADS, 0, 16)


@DTYPES
@pytest.mark.parametrize(("n", "page_size"), [(1, 1), (17, 16), (25, 7)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 256], ids="d-{}".format)
def test_one_by_one_is_all_at_once(n, page_size, head_dim, dtype):
    """Entries added in place, in any pace per kv head; a page that nothing reached keeps what it held."""
    keys = random_keys(n, head_dim, dtype)
    pages = -(-n // page_size) + 1
    buffer = torch.full((2, BATCH, KV_HEADS + 1, pages, head_dim), 7.0, dtype=dtype, device=DEVICE)
    buffer[0] = -7.0  # wider than any bound: the first entry of a page replaces it
    least, greatest = buffer[:, :, :KV_HEADS]
    counts = torch.zeros(BATCH, KV_HEADS, dtype=torch.int64, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    while bool((counts < n).any()):
        new = (torch.rand(BATCH, KV_HEADS, generator=generator) < 0.7).to(DEVICE) & (counts < n)
        at = counts.clamp(max=n - 1)[..., None, None].expand(-1, -1, 1, head_dim)
        rank = torch.where(new, counts, counts - 1)
        key = keys.gather(2, at)[:, :, 0]
        add_to_page_bounds(least, greatest, key, rank, new, page_size, backend="triton")
        counts += new
    expected = page_bounds_reference(keys, counts, page_size)
    assert torch.equal(least[:, :, :-1], expected[0]) and torch.equal(greatest[:, :, :-1], expected[1])
    assert (buffer[:, :, :, -1].abs() == 7).all() and (buffer[:, :, KV_HEADS].abs() == 7).all()


def test_all_are_new():
    """Without `new`, and for an entry that is a slice of a larger buffer."""
    keys = random_keys(40, spare=3)
    least, greatest = page_bounds(keys[:, :, :39], None, 8, backend="triton")
    rank = torch.full((BATCH, KV_HEADS), 39, device=DEVICE)
    add_to_page_bounds(least, greatest, keys[:, :, 39], rank, None, 8, backend="triton")
    for ours, theirs in zip((least, greatest), page_bounds(keys, None, 8, backend="torch"), strict=True):
        assert torch.equal(ours, theirs)
