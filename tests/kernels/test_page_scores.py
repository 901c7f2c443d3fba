"""page_scores against its definition, by hand, and as bounds."""

import pytest
import torch

from kvpress.kernels.page_bounds import page_bounds
from kvpress.kernels.page_scores import page_scores, page_scores_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random_keys(n, dtype=torch.float32, seed=0):
    return torch.randn(2, 3, n, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
