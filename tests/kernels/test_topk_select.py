"""topk_select against sorted(); gpu/test_topk_select.py has what only the Triton kernels do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress.kernels.topk_select import topk_select
from support.backends import BACKENDS, TRITON_DEVICE, on

NAN, INF = float("nan"), float("inf")
LIMIT = torch.finfo(torch.float32).max


def oracle(row, count):
    """Indices of the `count` largest, ascending: NaN is as the lowest number, -inf never chosen."""
    cleaned = [-LIMIT if math.isnan(score) else score for score in row]
    candidates = [index for index, score in enumerate(cleaned) if score != -INF]
    return sorted(sorted(candidates, key=lambda index: (-cleaned[index], index))[:count])


def chosen_by(backend, scores, counts, k):
    """What an operation's path chooses, on the CPU."""
    return [x.cpu() for x in topk_select(*on(backend, scores, counts), k, backend=backend)]


def select(backend, row, count, k):
    """One row's chosen indices as a list, after checking the shape and the tail."""
    index, chosen = chosen_by(backend, torch.tensor([[row]]), torch.tensor([[count]]), k)
    assert index.shape == chosen.shape == (1, 1, k) and index.dtype == torch.int64 and chosen.dtype == torch.bool
    assert ((index >= 0) & (index < len(row))).all()
    held = chosen.flatten().tolist()
    assert held == sorted(held, reverse=True), "the tail that is not chosen comes last"
    return index[chosen].tolist()


@BACKENDS
@pytest.mark.parametrize(
    ("row", "count", "expected"),
    [
        pytest.param([3.0, 1.0, 2.0], 2, [0, 2], id="ascending-order"),
        pytest.param([0.5, 0.5, 0.5, 0.5], 2, [0, 1], id="constant-row"),
        pytest.param([1.0, 2.0, 2.0, 2.0, 0.0], 2, [1, 2], id="tie-at-the-border"),
        pytest.param([0.0, -0.0, 0.0], 2, [0, 1], id="signed-zeros-tie"),
        pytest.param([NAN, 1.0, NAN, -5.0], 2, [1, 3], id="nan-after-finite"),
        pytest.param([NAN, 1.0, NAN], 2, [0, 1], id="nan-fills-up"),
        pytest.param([NAN, NAN, NAN], 2, [0, 1], id="all-nan"),
        pytest.param([1.0, INF, 2.0, INF], 2, [1, 3], id="plus-inf-first"),
        pytest.param([1.0, LIMIT, INF, 3.0], 1, [2], id="plus-inf-above-the-largest"),
        pytest.param([-INF, 1.0, -INF, 2.0], 2, [1, 3], id="minus-inf-never"),
        pytest.param([-INF, 1.0, -INF], 2, [1], id="minus-inf-not-even-to-fill-up"),
        pytest.param([-INF, -INF], 2, [], id="all-minus-inf"),
        pytest.param([-INF, NAN, -LIMIT], 2, [1, 2], id="nan-before-minus-inf"),
        pytest.param([1.0, 2.0], 0, [], id="count-0"),
        pytest.param([7.0], 1, [0], id="one-entry"),
        pytest.param([1e-45, 0.0, 2e-45], 2, [0, 2], id="denormals"),
    ],
)
def test_by_hand(row, count, expected, backend):
    """Small rows whose answer is plain to see."""
    assert select(backend, row, count, min(2, len(row))) == expected
    assert oracle(row, count) == expected


@BACKENDS
def test_counts_per_row(backend):
    """Each row has its own count; one count for all heads works too."""
    scores = torch.tensor([[[1.0, 3.0, 2.0, 4.0]] * 2, [[4.0, 3.0, 2.0, 1.0]] * 2])
    index, chosen = chosen_by(backend, scores, torch.tensor([[0, 1], [2, 3]]), 3)
    assert chosen.sum(-1).tolist() == [[0, 1], [2, 3]]
    assert index[0, 1, 0] == 3 and index[1, 0, :2].tolist() == [0, 1] and index[1, 1].tolist() == [0, 1, 2]
    index, chosen = chosen_by(backend, scores, torch.tensor([[1], [3]]), 3)
    assert chosen.sum(-1).tolist() == [[1, 1], [3, 3]]
    assert index[0, :, 0].tolist() == [3, 3] and index[1].tolist() == [[0, 1, 2]] * 2


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=["fp64", "fp16", "bf16"])
def test_other_dtypes(dtype, backend):
    """Scores of another floating dtype follow the same rules; the input is not written to."""
    if backend == "triton" and dtype == torch.bfloat16 and TRITON_DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16")
    scores = torch.tensor([[[1.0, NAN, 3.0, -INF, INF, 3.0]]], dtype=dtype)
    before = scores.clone()
    index, chosen = chosen_by(backend, scores, torch.tensor([[5]]), 6)
    assert index[chosen].tolist() == [0, 1, 2, 4, 5]
    index, chosen = chosen_by(backend, scores, torch.tensor([[2]]), 2)
    assert index[chosen].tolist() == [2, 4]
    torch.testing.assert_close(scores, before, equal_nan=True, rtol=0, atol=0)


@BACKENDS
@pytest.mark.parametrize("n", [63, 1000, 4097], ids="n-{}".format)
@pytest.mark.parametrize("levels", [1, 5, 100_000], ids="{}-levels".format)
def test_long_rows(n, levels, backend):
    """Rows long enough for any sorting network, with few and with many distinct values."""
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(levels, (2, 2, n), generator=generator).float()
    k = n // 3
    index, chosen = chosen_by(backend, scores, torch.full((2, 1), k), k)
    assert chosen.all()
    for row, picked in zip(scores.flatten(0, 1).tolist(), index.flatten(0, 1).tolist(), strict=True):
        assert picked == oracle(row, k)


SPECIAL = st.sampled_from([NAN, INF, -INF, LIMIT, -LIMIT])
VALUES = SPECIAL | st.sampled_from([0.0, -0.0, 1.0, -1.0]) | st.floats(width=32)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_property(data):
    """Any rows, any counts, against sorted()."""
    batch, heads, n = (data.draw(st.integers(1, high)) for high in (2, 3, 12))
    k = data.draw(st.integers(1, n))
    rows = data.draw(st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=batch * heads, max_size=batch * heads))
    counts = data.draw(st.lists(st.integers(0, k), min_size=batch * heads, max_size=batch * heads))
    scores = torch.tensor(rows).view(batch, heads, n)
    index, chosen = topk_select(scores, torch.tensor(counts).view(batch, heads), k)
    assert ((index >= 0) & (index < n)).all()
    for row, count, picked, held in zip(
        rows, counts, index.flatten(0, 1).tolist(), chosen.flatten(0, 1).tolist(), strict=True
    ):
        expected = oracle(row, count)
        assert picked[: len(expected)] == expected
        assert held == [True] * len(expected) + [False] * (k - len(expected))


def test_in_one_graph():
    """Compiled, it branches on no number, and gives the same."""
    scores = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0))
    counts = torch.full((2, 1), 5)
    compiled = torch.compile(lambda x, y: topk_select(x, y, 5), fullgraph=True, backend="eager")
    for found, expected in zip(compiled(scores, counts), topk_select(scores, counts, 5), strict=True):
        assert torch.equal(found, expected)
