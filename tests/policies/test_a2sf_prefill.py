"""A2SFPrefill: weighted column sums of the prompt, decode appends."""

import pytest
import torch

from kvpress.policies import A2SFPrefill
from kvpress.policy import Mass, Quota
from support.brute import attend
from support.layers import attended, kept, rows_that_give
from support.refusals import refused


def weighted_sums(query, key, alpha):
    """Each row's weights times alpha for every row after it, by the float64 loop."""
    tokens = key.shape[2]
    total = torch.zeros(key.shape[:3], dtype=torch.float64)
    for at in range(tokens):
        visible = (torch.arange(tokens) <= at).expand(*key.shape[:2], 1, tokens)
        total = alpha * total + attend(query[:, :, at : at + 1], key, key, visible, scale=1.0)[1]
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.95, 1.0], ids="alpha-{}".format)
@pytest.mark.parametrize("recent", [0, 1, 5], ids="recent-{}".format)
@pytest.mark.parametrize("tokens", [8, 9, 33], ids="{}-tokens".format)
def test_prompt_against_sorted(alpha, recent, tokens):
    """The last `recent` and the best of the others, from the queries on, for a group of three."""
    generator = torch.Generator().manual_seed(tokens)
    query = 1.5 * torch.randn(2, 6, tokens, 4, generator=generator)
    key = torch.randn(2, 2, tokens, 4, generator=generator)
    scores = weighted_sums(query, key, alpha).tolist()
    _, [sets] = attended(A2SFPrefill(budget=8, alpha=alpha, recent=recent), query, key, [tokens])
    for b in range(2):
        for head in range(2):
            old = range(tokens - recent)
            best = sorted(old, key=lambda at: -scores[b][head][at])[: 8 - recent]
            assert sets[b][head] == sorted(best) + list(range(tokens - recent, tokens))


def test_hand_values():
    """Rows [1], [.6, .4], [.1, .6, .3] with alpha=0.1: token 0 leaves where the plain sum would drop token 2."""
    query, key = rows_that_give([1, 0, 0], [0.6, 0.4, 0], [0.1, 0.6, 0.3])
    assert attended(A2SFPrefill(budget=2, alpha=0.1, recent=0), query, key, [3])[1] == [[[[1, 2]]]]
    assert attended(A2SFPrefill(budget=2, alpha=1, recent=0), query, key, [3])[1] == [[[[0, 1]]]]
    assert attended(A2SFPrefill(budget=2, alpha=1, recent=1), query, key, [3])[1] == [[[[0, 2]]]]


def test_decode_appends_and_never_evicts():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 24, 4, generator=generator)
    layer, sets = attended(A2SFPrefill(budget=5, alpha=0.5, recent=2), query, key, [12] + [1] * 12)
    for seen, [[positions]] in enumerate(sets, 12):
        assert positions == [*sets[0][0][0], *range(12, seen)]
    assert len(kept(layer)) == 5 + 12


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({}, 5000, 256, 16, id="defaults"),
        pytest.param({"budget": 0.5}, 100, 50, 16, id="share"),
        pytest.param({"budget": 0.29, "recent": 4}, 100, 29, 4, id="share-0.29-is-29"),
        pytest.param({"budget": 0.1}, 100, 10, 10, id="share-smaller-than-recent"),
        pytest.param({"budget": 0.2}, 3, 1, 1, id="share-of-a-short-prompt"),
    ],
)
def test_quota(fields, tokens, total, recent):
    assert A2SFPrefill(**fields).quota(tokens, 0, 1) == Quota(total, recent)


def test_defaults():
    """The authors' current code."""
    policy = A2SFPrefill()
    assert (policy.budget, policy.alpha, policy.recent) == (256, 0.95, 16)
    assert policy.observes == Mass(fading=0.95) and policy.evict_every is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"alpha": 1.01}, ("alpha=1.01", "0 to 1"), id="alpha"),
        pytest.param({"budget": 16}, ("budget=16", "recent=16", "above 16"), id="no-room"),
        pytest.param({"budget": 2.0}, ("budget=2.0", "budget=2"), id="share"),
        pytest.param({"recent": -1}, ("recent=-1", "at least 0"), id="negative"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        A2SFPrefill(**fields)
