"""H2OPrefill: column sums of the whole prompt, decode appends."""

import pytest
import torch

from kvpress.policies import H2OPrefill
from kvpress.policy import Quota
from support.layers import attended, kept, prompt, random_mass, row, rows_that_give, step
from support.refusals import refused


def oracle(scores, total, recent):
    """The best before the last `recent`, and those."""
    first_recent = len(scores) - recent
    ranked = sorted(range(first_recent), key=lambda index: (-scores[index], index))
    return sorted(ranked[: total - recent]) + list(range(first_recent, len(scores)))


def test_hand_values():
    """Rows [1], [.6, .4], [.1, .6, .3], [.1, .2, .3, .4] sum to [1.8, 1.2, .6, .4]."""
    query, key = rows_that_give([1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.6, 0.3, 0], [0.1, 0.2, 0.3, 0.4])
    layer, [[[positions]]] = attended(H2OPrefill(budget=3, recent=1, evict="after_prompt"), query, key, [4])
    torch.testing.assert_close(layer.stats["mass"][0, 0, :4], torch.tensor([1.8, 1.2, 0.6, 0.4]))
    assert positions == [0, 1, 2, 3]
    layer.settle()
    assert kept(layer) == [0, 1, 3]
    assert attended(H2OPrefill(budget=2, recent=1), query, key, [4])[1] == [[[[0, 3]]]]


@pytest.mark.parametrize("tokens", [8, 9, 31], ids="{}-tokens".format)
@pytest.mark.parametrize("recent", [0, 1, 5], ids="recent-{}".format)
def test_prompt_against_sorted(tokens, recent):
    """Random scores per sequence and kv head; a prompt that fits stays whole."""
    mass = random_mass(2, 3, tokens)
    layer = prompt(H2OPrefill(budget=8, recent=recent), tokens, mass, batch=2, kv_heads=3)
    for b in range(2):
        for head in range(3):
            assert kept(layer, b, head) == oracle(mass[b, head].tolist(), 8, recent)


def test_decode_appends_and_never_evicts():
    """The cache grows by one entry a step, whatever the scores."""
    layer = prompt(H2OPrefill(budget=5, recent=2), 12, random_mass(1, 1, 12))
    held = kept(layer)
    for seen in range(12, 24):
        step(layer, {held[0]: 0.0, seen: 0.5})
        assert kept(layer) == [*held, *range(12, seen + 1)]


def test_later_passes_compress_again():
    """By all that an entry has received, in steps too."""
    layer = prompt(H2OPrefill(budget=3, recent=1), 4, row(3.0, 2.0, 1.0, 0.5))
    assert kept(layer) == [0, 1, 3]
    step(layer, {3: 9.0, 4: 0.1})
    prompt(None, 2, torch.zeros(1, 1, 6), layer=layer)
    assert kept(layer) == [0, 3, 6]


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({}, 5000, 2048, 32, id="defaults"),
        pytest.param({"budget": 64}, 100, 64, 32, id="int"),
        pytest.param({"budget": 0.5}, 100, 50, 32, id="share"),
        pytest.param({"budget": 0.29, "recent": 0}, 100, 29, 0, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2}, 100, 20, 20, id="share-smaller-than-recent"),
        pytest.param({"budget": 0.2}, 3, 1, 1, id="share-of-a-short-prompt"),
    ],
)
def test_quota(fields, tokens, total, recent):
    """The values of KVCache-Factory by default; how many stay, and how many of them are the newest."""
    assert H2OPrefill(**fields).quota(tokens, 0, 1) == Quota(total, recent)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"budget": 1.5}, ("budget=1.5", "(0, 1]"), id="share"),
        pytest.param({"budget": 32}, ("budget=32", "recent=32", "above 32"), id="no-room"),
        pytest.param({"recent": -1}, ("recent=-1", "at least 0"), id="negative"),
        pytest.param({"recent": 0.5}, ("recent=0.5", "int"), id="no-count"),
        pytest.param({"evict": "never"}, ("evict='never'", "each_pass"), id="evict"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        H2OPrefill(**fields)
