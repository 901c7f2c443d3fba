"""The Triton kernels of page_scores and soft_vote, and what only Triton does in decode_scores (../test_decode_scores.py)."""

import pytest
import torch

from kvpress.kernels.decode_scores import decode_scores, decode_scores_reference
from kvpress.kernels.gpu import decode_attention as launch
from kvpress.kernels.gpu import decode_scores as gpu
from kvpress.kernels.page_bounds import page_bounds
from kvpress.kernels.page_scores import page_scores, page_scores_reference
from kvpress.kernels.soft_vote import soft_vote, soft_vote_reference
from support.accelerator import DEVICE, DTYPES

# NumPy, in the interpreter, says so where a logarithm of zero is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")

BATCH, KV_HEADS = 2, 2
LENGTHS = pytest.mark.parametrize("n", [1, 63, 111], ids="n-{}".format)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256], ids="d-{}".format)
SPLITS = pytest.mark.parametrize("keys_per_split", [128, 16], ids=["one-split", "several-splits"])


def inputs(n, group, head_dim=24, dtype=torch.float32, rows=1, spare=0):
    """A query and the first n of a buffer with `spare` more keys that hold NaN."""
    generator = torch.Generator().manual_seed(n + group)
    query = torch.randn(BATCH, KV_HEADS * group, rows, head_dim, generator=generator)
    keys = torch.randn(BATCH, KV_HEADS, n + spare, head_dim, generator=generator)
    keys[:, :, n:] = float("nan")
    return query.to(DEVICE, dtype), keys.to(DEVICE, dtype)[:, :, :n]


@LENGTHS
@GROUPS
@DTYPES
def test_page_scores_equal_the_definition(n, group, dtype):
    """Pages of 1 and of 7; bounds that are slices of larger buffers with NaN behind."""
    query, key = inputs(n, group, dtype=dtype)
    for page_size in (1, 7):
        bounds = page_bounds(key, None, page_size)
        pages = bounds[0].shape[2]
        buffer = torch.full((2, BATCH, KV_HEADS, pages + 3, 24), float("nan"), dtype=dtype, device=DEVICE)
        buffer[:, :, :, :pages] = torch.stack(bounds)
        scores = page_scores(query, buffer[0, :, :, :pages], buffer[1, :, :, :pages], backend="triton")
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, page_scores_reference(query, *bounds), rtol=1e-5, atol=5e-6)


@HEAD_DIMS
@DTYPES
def test_page_scores_are_bounds(head_dim, dtype):
    """No key of a page scores above its page, and of pages of one entry the bound is the score."""
    query, key = inputs(64, 3, head_dim, dtype)
    scores = decode_scores_reference(query, key, scale=1.0)
    for page_size in (1, 16):
        bounds = page_scores(query, *page_bounds(key, None, page_size), backend="triton")
        highest = scores.unflatten(2, (-1, page_size)).amax(-1)
        assert (bounds >= highest - 1e-4).all()
        if page_size == 1:
            torch.testing.assert_close(bounds, scores, rtol=1e-5, atol=1e-5)


@LENGTHS
@GROUPS
@SPLITS
@pytest.mark.parametrize("rows", [1, 5], ids="{}-rows".format)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_soft_vote_equals_the_definition(n, group, keys_per_split, rows, some, monkeypatch):
    """Sequences with some candidates and without any; NaN in keys that are none is never read."""
    monkeypatch.setattr(launch, "KEYS_PER_SPLIT", keys_per_split)
    query, key = inputs(n, group, rows=rows, spare=3)
    candidates = None
    if some:
        candidates = (torch.rand(BATCH, n, generator=torch.Generator().manual_seed(1)) < 0.6).to(DEVICE)
        candidates[1] = False
    expected = soft_vote_reference(query, key, candidates, scale=1.3)
    if some:
        key = key.masked_fill(~candidates[:, None, :, None], float("nan"))
    votes = soft_vote(query, key, candidates, scale=1.3, backend="triton")
    assert votes.dtype == torch.float32 and votes.shape == (BATCH, n)
    torch.testing.assert_close(votes, expected, rtol=1e-5, atol=2e-6)


@HEAD_DIMS
@DTYPES
def test_soft_vote_of_head_dims_and_dtypes(head_dim, dtype):
    """Votes sum to the number of heads."""
    query, key = inputs(63, 3, head_dim, dtype)
    votes = soft_vote(query, key, scale=head_dim**-0.5, backend="triton")
    torch.testing.assert_close(votes, soft_vote_reference(query, key, scale=head_dim**-0.5), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(votes.sum(1), torch.full((BATCH,), 6.0, device=DEVICE), rtol=1e-5, atol=0)


def test_more_heads_and_keys_than_a_tile():
    """More query heads than one step of the vote takes, the last step short, and two tiles of keys."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 11, 1, 16, generator=generator), torch.randn(1, 1, 300, 16, generator=generator)
    votes = soft_vote(query.to(DEVICE), key.to(DEVICE), scale=0.5, backend="triton")
    torch.testing.assert_close(votes.cpu(), soft_vote_reference(query, key, scale=0.5), rtol=1e-5, atol=2e-6)


def test_large_scores():
    """Scores in the thousands neither overflow nor become NaN."""
    query, key = (100 * x for x in inputs(63, 3))
    votes = soft_vote(query, key, scale=1.0, backend="triton")
    torch.testing.assert_close(votes, soft_vote_reference(query, key, scale=1.0), rtol=1e-3, atol=1e-4)


def test_no_keys():
    query, key = inputs(0, 3)
    assert soft_vote(query, key, scale=1.0, backend="triton").shape == (BATCH, 0)


def test_results_in_memory_full_of_nan(monkeypatch):
    """Every number that is returned is written."""
    monkeypatch.setattr(launch, "KEYS_PER_SPLIT", 16)
    query, key = inputs(111, 3)
    expected = soft_vote(query, key, scale=0.3, backend="triton"), gpu.decode_scores(query, key, scale=0.3)[0]
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape, **how: x.new_full(shape, float("nan"), **how))
    found = soft_vote(query, key, scale=0.3, backend="triton"), gpu.decode_scores(query, key, scale=0.3)[0]
    for ours, before in zip(found, expected, strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("group", [1, 3, 8], ids="group-{}".format)
def test_a_query_in_three_parts(group, monkeypatch):
    """As exact as float32: a query of 24 bits, keys of fewer. In the interpreter with float16, as NumPy has no bfloat16."""
    kind = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    monkeypatch.setattr(gpu, "IN_PARTS", {kind})
    query, key = inputs(63, group, 64, spare=3)
    key = key.to(kind)
    scores = decode_scores(query, key, scale=0.3, backend="triton")
    exact = decode_scores_reference(query.double(), key.double(), scale=0.3)
    assert (scores - exact).abs().max() < 4e-6
    monkeypatch.setattr(gpu, "IN_PARTS", set())
    whole = decode_scores(query, key, scale=0.3, backend="triton")
    torch.testing.assert_close(scores, whole, rtol=1e-5, atol=4e-6)
    rounded = decode_scores(query.to(kind).float(), key, scale=0.3, backend="triton")
    assert (rounded - exact).abs().max() > 1e-4  # what a single part leaves out


def test_three_parts_of_bfloat16_have_all_of_a_float32_number():
    """The arithmetic of the kernel, in torch: nothing is left but what lies below the smallest numbers."""
    query = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 6).repeat(1000)
    high = query.bfloat16().float()
    middle = (query - high).bfloat16().float()
    low = (query - high - middle).bfloat16().float()
    assert torch.equal(high.double() + middle.double() + low.double(), query.double())


def test_which_queries_go_in_parts(monkeypatch):
    """A float32 query over bfloat16 keys, and takes the keys' tile; not with a second query, nor for bounds of pages."""
    seen = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, grid, *args, **options: seen.append(options))
    query = torch.zeros(1, 4, 1, 128)
    key = torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)
    gpu.decode_scores(query, key, scale=1.0)
    gpu.decode_scores(query.bfloat16(), key, scale=1.0)
    gpu.decode_scores(query, key, scale=1.0, moved=(query, 3))
    gpu.decode_scores(query, key, scale=1.0, least=key)
    gpu.decode_scores(query, key.half(), scale=1.0)
    assert [options["IN_PARTS"] for options in seen] == [True, False, False, False, False]
    assert [options["BLOCK_N"] for options in seen] == [64, 64, 16, 16, 16]
