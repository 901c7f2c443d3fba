"""TOVA: the last row's weights over all heads of a layer."""

import pytest
import torch

from kvpress.policies import TOVA
from kvpress.policy import Quota
from support.brute import attend
from support.layers import attended, kept, prompt, rows_that_give, step
from support.refusals import refused

MASS = torch.tensor([[[0.5, 0.1, 0.3, 0.1], [0.0, 0.6, 0.1, 0.3]]])  # sums to [.5, .7, .4, .4] over the heads


@pytest.mark.parametrize(("budget", "expected"), [(1, [1]), (2, [0, 1]), (3, [0, 1, 2])], ids=str)
def test_all_heads_keep_the_same(budget, expected):
    """By the sum over the kv heads; of equal sums the earlier entry stays."""
    layer = prompt(TOVA(budget=budget), 4, MASS, kv_heads=2)
    assert kept(layer) == kept(layer, head=1) == expected


def test_recent_protects_the_newest():
    """As NVIDIA's port does with the last token; the authors protect none."""
    layer = prompt(TOVA(budget=2, recent=1), 4, MASS, kv_heads=2)
    assert kept(layer) == kept(layer, head=1) == [1, 3]


def test_a_step_drops_one_entry():
    """In decode one entry leaves a step, in all heads the same one; a slot holds the same token in each of them."""
    layer = prompt(TOVA(budget=3), 4, MASS, kv_heads=2)
    for seen, weights in enumerate([{1: 1.0}, {0: 1.0}, {5: 1.0, 6: 1.0}], 4):
        step(layer, weights | {seen: 3.0}, kv_heads=2)
        assert kept(layer) == kept(layer, head=1) and len(kept(layer)) == 3
        assert (layer.positions[:, 0] == layer.positions[:, 1]).all()


def test_only_the_last_row_counts():
    """Rows [1], [.9, .1], [.2, .5, .3]: the last one decides, though token 0 has the largest sum."""
    query, key = rows_that_give([1, 0, 0], [0.9, 0.1, 0], [0.2, 0.5, 0.3])
    for passes in ([3], [1, 2], [2, 1], [1, 1, 1]):
        assert attended(TOVA(budget=2), query, key, passes)[1][-1] == [[[1, 2]]]


@pytest.mark.parametrize("passes", [[20], [8, 12], [14, 1, 1, 1, 1, 1, 1], [9, 1, 1, 5, 1, 1, 1, 1]], ids=str)
def test_against_a_loop(passes):
    """Queries and keys in, positions out: after every pass the entries that its last row weighs most."""
    generator = torch.Generator().manual_seed(3)
    query = 1.5 * torch.randn(2, 4, 20, 4, generator=generator)
    key = torch.randn(2, 2, 20, 4, generator=generator)
    _, sets = attended(TOVA(budget=6), query, key, passes)
    for b in range(2):
        held, seen = [], 0
        for count, found in zip(passes, sets, strict=True):
            held, seen = held + list(range(seen, seen + count)), seen + count
            visible = torch.ones(1, 2, 1, len(held), dtype=torch.bool)
            last, keys = query[b : b + 1, :, seen - 1 : seen], key[b : b + 1, :, held]
            weights = attend(last, keys, keys, visible, scale=1.0)[1].sum(1)[0]
            held = sorted(held[index] for index in weights.topk(min(6, len(held))).indices.tolist())
            assert found[b] == [held, held]


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({}, 80, 10, 0, id="defaults"),
        pytest.param({"budget": 8, "recent": 1}, 100, 8, 1, id="entries"),
        pytest.param({"budget": 0.29}, 100, 29, 0, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2, "recent": 2}, 3, 1, 1, id="share-of-a-short-prompt"),
    ],
)
def test_quota(fields, tokens, total, recent):
    assert TOVA(**fields).quota(tokens, 0, 1) == Quota(total, recent)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"budget": 0}, ("budget=0", "at least 1"), id="no-budget"),
        pytest.param({"budget": 2, "recent": 2}, ("budget=2", "recent=2", "above 2"), id="no-room"),
        pytest.param({"recent": 0.1}, ("recent=0.1", "int"), id="no-count"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        TOVA(**fields)
