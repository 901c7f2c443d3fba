"""StreamingLLM by the spec's hand values (section 7.1)."""

import pytest

from kvpress.policies import StreamingLLM
from kvpress.policy import Own, Quota, Sinks
from support.layers import feed, kept, new_layer, prompt, step


def test_spec_s2_r3_n7():
    """s=2, r=3, n=7 keeps {0, 1, 4, 5, 6}."""
    assert kept(prompt(StreamingLLM(sink=2, recent=3), 7)) == [0, 1, 4, 5, 6]


def test_spec_s0_is_a_window():
    """s=0 keeps the last r."""
    assert kept(prompt(StreamingLLM(sink=0, recent=3), 7)) == [4, 5, 6]


@pytest.mark.parametrize("rope", ["reindex", "original"])
@pytest.mark.parametrize("sink", [0, 1, 4], ids="sink-{}".format)
@pytest.mark.parametrize("recent", [1, 3], ids="recent-{}".format)
@pytest.mark.parametrize("passes", [[9], [1], [3, 6], [2, 9, 4]], ids=str)
def test_sinks_and_window_at_every_step(sink, recent, rope, passes):
    """After any passes and steps: the first s and the last r, in every head."""
    layer, seen = new_layer(StreamingLLM(sink=sink, recent=recent, rope=rope)), 0
    for count in [*passes, *[0] * 8]:
        if count:
            prompt(None, count, layer=layer, kv_heads=2)
            seen += count
        else:
            step(layer, kv_heads=2)
            seen += 1
        expected = [at for at in range(seen) if at < sink or at >= seen - recent]
        assert kept(layer) == kept(layer, head=1) == expected


def test_spec_content_does_not_matter():
    """The kept set is the same whatever the keys and values."""
    sets = []
    for seed in range(3):
        layer = new_layer(StreamingLLM(sink=2, recent=3))
        layer.close_prompt(feed(layer, 11, seed=seed, batch=2, kv_heads=2))
        sets += [kept(layer, b, head) for b in range(2) for head in range(2)]
    assert sets == [[0, 1, 8, 9, 10]] * 12


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({"recent": 8}, 100, 12, 8, id="4-sinks-and-recent"),
        pytest.param({"sink": 0, "recent": 8}, 100, 8, 8, id="no-sink"),
        pytest.param({"recent": 0.29}, 100, 33, 29, id="share-of-recent"),
        pytest.param({"recent": 0.1}, 5, 5, 1, id="recent-rounds-up-to-one"),
        pytest.param({"budget": 12}, 100, 12, 8, id="budget"),
        pytest.param({"budget": 5}, 100, 5, 1, id="smallest-budget"),
        pytest.param({"budget": 0.29}, 100, 29, 25, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2}, 99, 19, 15, id="share-rounds-down"),
        pytest.param({"budget": 0.2}, 10, 5, 1, id="share-without-room-for-the-sinks"),
        pytest.param({"budget": 0.2, "sink": 0}, 3, 1, 1, id="share-of-a-short-prompt"),
    ],
)
def test_quota(fields, tokens, total, recent):
    """How many stay, and how many of them are the newest."""
    assert StreamingLLM(**fields).quota(tokens, 0, 1) == Quota(total, recent)


@pytest.mark.parametrize(("rope", "expected"), [("reindex", Sinks(4)), ("original", Own())])
def test_only_reindex_moves_sinks(rope, expected):
    """With rope="original" keys and query stay at their own positions."""
    places = StreamingLLM(recent=8, rope=rope).places
    assert places == expected and places.moved == (rope == "reindex")
    assert StreamingLLM(sink=0, recent=8, rope=rope).places == Own()
