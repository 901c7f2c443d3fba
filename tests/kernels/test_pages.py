"""page_bounds and page_scores against their definitions, by hand, and as bounds."""

import pytest
import torch

from kvpress.kernels.page_bounds import add_to_page_bounds, page_bounds, page_bounds_reference
from kvpress.kernels.page_scores import page_scores, page_scores_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SIZES = pytest.mark.parametrize(("n", "page_size"), [(1, 1), (5, 1), (16, 16), (17, 16), (50, 7), (3, 8)], ids=str)


def random_keys(n, dtype=torch.float32, seed=0):
    return torch.randn(2, 3, n, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@SIZES
@pytest.mark.parametrize("counted", [False, True], ids=["all", "counts"])
def test_bounds_equal_the_definition(n, page_size, counted, dtype):
    """With counts, kv heads hold from nothing to everything; what is behind is never looked at."""
    keys = random_keys(n, dtype)
    counts = torch.tensor([[n, 0, 1], [n // 2, n, max(0, n - 3)]]) if counted else None
    whole = torch.full((2, 3), n) if counts is None else counts
    if counted:
        keys = keys.masked_fill(torch.arange(n)[:, None] >= counts[..., None, None], float("nan"))
    found, expected = page_bounds(keys, counts, page_size), page_bounds_reference(keys, whole, page_size)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


@DTYPES
@SIZES
def test_one_by_one_is_all_at_once(n, page_size, dtype):
    """Entries added in place, in any pace per kv head."""
    keys = random_keys(n, dtype)
    pages = -(-n // page_size) + 1
    greatest = torch.full((2, 3, pages, 10), 7.0, dtype=dtype)  # wider than any bound: a page's first entry replaces it
    least = -greatest
    counts = torch.zeros(2, 3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    while bool((counts < n).any()):
        new = (torch.rand(2, 3, generator=generator) < 0.7) & (counts < n)
        at = counts.clamp(max=n - 1)[..., None, None].expand(-1, -1, 1, 10)
        rank = torch.where(new, counts, counts - 1)
        add_to_page_bounds(least, greatest, keys.gather(2, at)[:, :, 0], rank, new, page_size)
        counts += new
    expected = page_bounds(keys, None, page_size)
    assert torch.equal(least[:, :, : pages - 1], expected[0]) and torch.equal(greatest[:, :, : pages - 1], expected[1])
    assert (least[:, :, pages - 1] == -7).all()


@DTYPES
@pytest.mark.parametrize("group", [1, 4])
def test_scores_equal_the_definition(group, dtype):
    least, greatest = page_bounds(random_keys(50, dtype), None, 7)
    query = torch.randn(2, 3 * group, 1, 10, generator=torch.Generator().manual_seed(2)).to(dtype)
    scores = page_scores(query, least, greatest)
    assert scores.dtype == torch.float32 and scores.shape == (2, 3 * group, 8)
    torch.testing.assert_close(scores, page_scores_reference(query, least, greatest))


def test_by_hand():
    """Keys (1, -2) and (-1, 3), query (2, -1): 2 + 2 = 4, which the first key reaches."""
    keys = torch.tensor([[[[1.0, -2.0], [-1.0, 3.0]]]])
    least, greatest = page_bounds(keys, None, 2)
    assert least.tolist() == [[[[-1.0, -2.0]]]] and greatest.tolist() == [[[[1.0, 3.0]]]]
    assert page_scores(torch.tensor([[[[2.0, -1.0]]]]), least, greatest).tolist() == [[[4.0]]]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_no_key_of_a_page_scores_above_its_bound(page_size):
    """For one entry a page the bound is the score itself."""
    keys = random_keys(64, seed=3)
    query = torch.randn(2, 6, 1, 10, generator=torch.Generator().manual_seed(4))
    bounds = page_scores(query, *page_bounds(keys, None, page_size))
    scores = (query @ keys.repeat_interleave(2, dim=1).transpose(-1, -2))[:, :, 0]
    highest = scores.unflatten(2, (-1, page_size)).amax(-1)
    assert (bounds >= highest - 1e-5).all()
    if page_size == 1:
        torch.testing.assert_close(bounds, scores)
