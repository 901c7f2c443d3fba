"""ObservedAttention: the mean over the rows that can see an entry."""

import pytest
import torch

from kvpress import PolicyError
from kvpress.policies import ObservedAttention
from kvpress.policy import Entries, Quota
from support.layers import attended, kept, prompt, random_mass, row, rows_that_give, step


def score(mass, tokens):
    """The policy's scores of entries in position order."""
    positions = torch.arange(mass.shape[-1], dtype=torch.int32).expand(mass.shape)
    return ObservedAttention().score(Entries(positions, positions >= 0, {"mass": mass}, tokens=torch.tensor(tokens)))


def test_h3():
    """H3: [1.7, 1.0, 0.3] of three rows are [1.7 / 3, 1.0 / 2, 0.3 / 1]."""
    torch.testing.assert_close(score(row(1.7, 1.0, 0.3), [3]), row(0.5667, 0.5, 0.3), atol=1e-4, rtol=0)
    query, key = rows_that_give([1, 0, 0], [0.6, 0.4, 0], [0.1, 0.6, 0.3])
    assert attended(ObservedAttention(budget=2), query, key, [3])[1] == [[[[0, 1]]]]


def test_the_newest_has_no_protection_and_age_no_advantage():
    """Two entries with the same sum: the later one, seen by fewer rows, stays; the newest may leave."""
    assert kept(prompt(ObservedAttention(budget=1), 4, row(1.2, 1.1, 1.2, 0.4))) == [2]
    assert kept(prompt(ObservedAttention(budget=2), 4, row(1.2, 1.1, 1.2, 0.7))) == [2, 3]


def test_each_sequence_counts_its_own_rows():
    """Of a padded batch: three tokens, and five."""
    mass = torch.tensor([[[3.0, 2.0, 1.0, 0.0, 0.0]], [[5.0, 4.0, 3.0, 2.0, 1.0]]])
    scores = score(mass, [3, 5])
    torch.testing.assert_close(scores[0, 0, :3], torch.ones(3))
    torch.testing.assert_close(scores[1, 0], torch.ones(5))


@pytest.mark.parametrize("tokens", [7, 8, 31], ids="{}-tokens".format)
def test_prompt_against_sorted(tokens):
    """Random scores per sequence and kv head; a prompt that fits stays whole."""
    mass = random_mass(2, 3, tokens)
    layer = prompt(ObservedAttention(budget=7), tokens, mass, batch=2, kv_heads=3)
    for b in range(2):
        for head in range(3):
            means = [x / (tokens - at) for at, x in enumerate(mass[b, head].tolist())]
            assert kept(layer, b, head) == sorted(sorted(range(tokens), key=lambda at: -means[at])[:7])


def test_decode_appends_and_never_evicts():
    layer = prompt(ObservedAttention(budget=5), 12, random_mass(1, 1, 12))
    held = kept(layer)
    for seen in range(12, 24):
        step(layer, {seen: 0.5})
        assert kept(layer) == [*held, *range(12, seen + 1)]


def test_later_passes_divide_by_all_rows_since():
    """An entry's rows are all that came after it: here the steps decide."""
    layer = prompt(ObservedAttention(budget=2), 3, row(1.5, 1.2, 0.1))
    assert kept(layer) == [0, 1]  # 1.5 / 3 and 1.2 / 2
    step(layer, {3: 0.3})
    prompt(None, 2, row(0.0, 0.0, 0.0, 0.2, 0.3), layer=layer)
    # Now 1.5 / 6, 1.2 / 5, 0.3 / 3, 0.2 / 2 and 0.3 / 1.
    assert kept(layer) == [0, 5]


def test_defaults_and_quota():
    assert ObservedAttention().budget == 0.2
    assert ObservedAttention(budget=9).quota(100, 0, 1) == Quota(9, 0)
    assert ObservedAttention(budget=0.29).quota(100, 0, 1) == Quota(29, 0)
    assert ObservedAttention(budget=0.2).quota(3, 0, 1) == Quota(1, 0)


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -1, float("nan"), "half", True], ids=str)
def test_bad_values(budget):
    with pytest.raises(PolicyError, match="budget=") as caught:
        ObservedAttention(budget=budget)
    assert "\n" not in str(caught.value)
