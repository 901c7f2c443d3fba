"""The soft vote against hand-computed numbers, its reference and its definition."""

import math

import pytest
import torch

from kvpress.kernels.soft_vote import soft_vote, soft_vote_reference


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_t3_a_loud_head_has_one_vote() -> None:
    """T3: heads 1 and 2 outvote a head whose raw scores are larger."""
    scores = torch.tensor([[0.0, 10.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    keys = torch.eye(3)[None, None]  # of one kv head, so that q.k are the query's own numbers
    votes = soft_vote(scores[None, :, None], keys, scale=1.0)[0]
    assert votes.tolist() == pytest.approx([1.574, 1.213, 0.213], abs=6e-4)
    assert votes.argmax() == 0
    assert scores.sum(0).argmax() == 1


def test_t2_every_head_has_one_vote() -> None:
    """T2: votes sum to the number of heads, whatever constant is added to a head's scores."""
    query, key = random(2, 6, 3, 8), random(2, 2, 50, 8, seed=1)
    votes = soft_vote(query, key, scale=0.7)
    assert votes.sum(1).tolist() == pytest.approx([6, 6], abs=1e-4)
    # A channel that is 1 in every key adds a constant to each head's scores: the query's number there.
    key[..., 0] = 1.0
    before = soft_vote(query, key, scale=0.7)
    query[..., 0] += random(2, 6, 1, seed=2)
    torch.testing.assert_close(soft_vote(query, key, scale=0.7), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 37), (5, 64), (3, 129)], ids=str)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_reference(dtype: torch.dtype, heads: int, kv_heads: int, rows: int, n: int, some: bool) -> None:
    query, key = random(3, heads, rows, 8).to(dtype), random(3, kv_heads, n + 5, 8, seed=1).to(dtype)[:, :, 2 : n + 2]
    candidates = None
    if some:
        candidates = random(3, n, seed=2) > 0
        candidates[1] = False  # a sequence without any
    votes = soft_vote(query, key, candidates, scale=1.3)
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes, soft_vote_reference(query, key, candidates, scale=1.3), atol=1e-5, rtol=1e-5)


def test_definition() -> None:
    """Entry by entry in plain Python."""
    query, key, candidates = random(1, 4, 2, 3), random(1, 2, 6, 3, seed=1), [0, 2, 3, 5]
    expected = [0.0] * 6
    for head in range(4):
        mean = [(a + b) / 2 for a, b in zip(*query[0, head].tolist(), strict=True)]
        at = {
            j: math.exp(2 * sum(x * y for x, y in zip(mean, key[0, head // 2, j].tolist(), strict=True)))
            for j in candidates
        }
        for j in candidates:
            expected[j] += at[j] / sum(at.values())
    mask = torch.tensor([[j in candidates for j in range(6)]])
    assert soft_vote(query, key, mask, scale=2.0)[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_keys_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision keys are converted a tile at a time, with the same result."""
    from kvpress.kernels import decode_scores

    query, key = random(2, 4, 1, 8).bfloat16(), random(2, 2, 100, 8, seed=1).bfloat16()
    whole = soft_vote(query, key, scale=1.0)
    monkeypatch.setattr(decode_scores, "TILE_KEYS", 2 * 2 * 8 * 7)
    torch.testing.assert_close(soft_vote(query, key, scale=1.0), whole, atol=1e-6, rtol=1e-5)
