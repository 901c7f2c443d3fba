"""KeyDiff and Knorm: scores of keys alone."""

import pytest
import torch

from kvpress import PolicyError
from kvpress.policies import KeyDiff, Knorm
from kvpress.policy import UNLIMITED, Entries, Quota

KEYS = torch.tensor([[[[2.0, 0.0], [0.0, 1.0], [3.0, 4.0], [-1.0, 0.0]]]])


def entries(keys, empty=()):
    positions = torch.arange(keys.shape[2], dtype=torch.int32).expand(keys.shape[:3]).clone()
    positions[..., list(empty)] = -1
    return Entries(positions, positions >= 0, fetch=lambda: (keys, keys))


def best(scores, count):
    return sorted(scores[0, 0].topk(count).indices.tolist())


def test_key_diff_by_hand():
    """Anchor (0.15, 0.45); cosines 0.316228, 0.948683, 0.948683, -0.316228; the best two are the first and the last."""
    scores = KeyDiff().score(entries(KEYS))
    torch.testing.assert_close(
        scores[0, 0], -torch.tensor([0.316228, 0.948683, 0.948683, -0.316228]), atol=1e-5, rtol=0
    )
    assert best(scores, 2) == [0, 3]


def test_key_diff_does_not_see_the_length_of_a_key():
    scaled = KEYS * torch.tensor([5.0, 0.1, 2.0, 7.0])[:, None]
    torch.testing.assert_close(KeyDiff().score(entries(scaled)), KeyDiff().score(entries(KEYS)))


@pytest.mark.parametrize("policy", [KeyDiff(), Knorm()], ids=lambda policy: policy.name)
def test_what_lies_in_an_empty_slot_does_not_matter(policy):
    with_empty = torch.cat((KEYS, torch.tensor([[[[-40.0, 90.0]]]])), dim=2)
    scores = policy.score(entries(with_empty, empty=[4]))
    torch.testing.assert_close(scores[..., :4], policy.score(entries(KEYS)))


def test_knorm_by_hand():
    """Norms 2, 1, 5, 1: the two of 1 stay."""
    scores = Knorm().score(entries(KEYS))
    torch.testing.assert_close(scores[0, 0], torch.tensor([-2.0, -1.0, -5.0, -1.0]))
    assert best(scores, 2) == [1, 3]


def test_half_precision_keys_are_compared_in_float32():
    long = torch.full((1, 1, 1, 64), 60000.0, dtype=torch.float16)
    assert Knorm().score(entries(long)).item() == pytest.approx(-60000.0 * 8, rel=1e-3)
    assert torch.isfinite(KeyDiff().score(entries(long))).all()


def test_quotas():
    assert KeyDiff().quota(20000, 0, 2) == Quota(8192, 0)
    assert KeyDiff(budget=0.25).quota(100, 0, 2) == Quota(25, 0)
    assert Knorm().quota(100, 0, 2) == Quota(50, 0)
    skipping = Knorm(budget=7, skip_layers=1)
    assert (skipping.quota(100, 0, 2), skipping.quota(100, 1, 2)) == (Quota(UNLIMITED, 0), Quota(7, 0))


@pytest.mark.parametrize("make", [KeyDiff, Knorm])
def test_bad_values(make):
    for fields in ({"budget": 0}, {"budget": 1.5}, {"evict": "each_row"}, {"evict": "never"}):
        with pytest.raises(PolicyError, match=str(next(iter(fields)))):
            make(**fields)
    with pytest.raises(PolicyError, match="skip_layers=-1"):
        Knorm(skip_layers=-1)
