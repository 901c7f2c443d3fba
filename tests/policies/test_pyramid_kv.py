"""PyramidKV: SnapKV's scores, more entries in lower layers."""

import random

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import PyramidKV, SnapKV
from kvpress.policy import Entries, Quota, Window
from support.layers import random_mass
from support.matrix import kept, prompt, sharp_llama
from support.refusals import refused


def totals(policy, tokens, layers):
    return [policy.quota(tokens, layer, layers).total for layer in range(layers)]


def test_the_authors_numbers():
    """128 entries, window 8, 32 layers: 234 beside the window in the first, 7 less in each, 17 in the last."""
    found = totals(PyramidKV(budget=128), 8000, 32)
    assert [total - 8 for total in found] == [234 - 7 * layer for layer in range(32)]
    assert found[0] - 8 == 234 and found[31] - 8 == 17
    assert sum(total - 8 for total in found) == 4016 > 32 * 120  # steps are rounded down


def test_short_prompts_are_cut_evenly():
    """Below twice the budget beside the window all layers get the budget, and below the budget all stays."""
    policy = PyramidKV(budget=128)
    assert totals(policy, 239, 32) == [128] * 32
    assert totals(policy, 100, 32) == [128] * 32  # more than there is


def test_no_layer_gets_more_than_the_prompt():
    """240 tokens: 232 beside the window in the first layer, 2 * 120 - 232 = 8 in the last, steps of 7."""
    assert totals(PyramidKV(budget=128), 240, 32) == [240 - 7 * layer for layer in range(32)]
    assert totals(PyramidKV(budget=128), 242, 32)[0] == 242
    assert totals(PyramidKV(budget=128), 243, 32)[0] == 242  # from here on the prompt is no limit


@pytest.mark.parametrize(
    ("fields", "tokens", "layers", "expected"),
    [
        pytest.param({"budget": 12, "window": 2, "beta": 5}, 100, 3, [20, 12, 4], id="three-layers"),
        pytest.param({"budget": 12, "window": 2, "beta": 5}, 100, 2, [20, 4], id="two-layers"),
        pytest.param({"budget": 12, "window": 2, "beta": 5}, 100, 1, [12], id="one-layer"),
        pytest.param({"budget": 12, "window": 2, "beta": 1}, 100, 3, [12, 12, 12], id="beta-1-is-even"),
        pytest.param({"budget": 12, "window": 2, "beta": 99}, 100, 3, [22, 12, 2], id="nothing-beside-the-window"),
        pytest.param({"budget": 12, "window": 2, "beta": 5}, 100, 4, [20, 15, 10, 5], id="steps-round-down"),
        pytest.param({"budget": 0.12, "window": 2, "beta": 5}, 100, 3, [20, 12, 4], id="share"),
        pytest.param({"budget": 0.04, "window": 8}, 100, 3, [4, 4, 4], id="share-smaller-than-the-window"),
        pytest.param({"budget": 0.2, "window": 8}, 3, 3, [1, 1, 1], id="share-of-a-short-prompt"),
    ],
)
def test_totals_by_hand(fields, tokens, layers, expected):
    assert totals(PyramidKV(**fields), tokens, layers) == expected


def test_totals_are_a_pyramid_of_the_right_size():
    """Any numbers: from layer to layer not more, never less than the window, the mean at the budget or little above."""
    numbers = random.Random(0)
    for _ in range(2000):
        window, layers = numbers.randint(1, 12), numbers.randint(1, 40)
        budget, tokens = numbers.randint(window + 1, 200), numbers.randint(1, 500)
        policy = PyramidKV(budget=budget, window=window, beta=numbers.randint(1, 30))
        found = totals(policy, tokens, layers)
        assert sorted(found, reverse=True) == found and min(found) >= window
        assert layers * budget <= sum(found) <= layers * budget + layers * (layers - 1) / 2
        assert tokens <= budget or max(found) <= tokens
        assert {policy.quota(tokens, layer, layers).recent for layer in range(layers)} == {window}


@pytest.mark.parametrize("kernel_size", [1, 3, 7], ids="kernel-{}".format)
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_scores_are_those_of_snapkv(kernel_size, pooling):
    mass = random_mass(2, 3, 30)
    positions = torch.arange(30, dtype=torch.int32).expand(mass.shape)
    entries = Entries(positions, positions < 26, {"mass": mass})
    fields = {"budget": 12, "window": 4, "kernel_size": kernel_size, "pooling": pooling}
    assert torch.equal(PyramidKV(**fields).score(entries), SnapKV(**fields).score(entries))
    assert PyramidKV(**fields).observes == Window(4)


def test_a_model_keeps_a_pyramid():
    """Each layer holds its number in every kv head, the window among them; decode appends; the report says it."""
    model = sharp_llama(layers=3)
    policy = PyramidKV(budget=12, window=2, kernel_size=3, beta=5)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, policy) as handle:
        model(torch.tensor([prompt(100)]), **{CACHE: cache})
        assert [[len(head) for head in layer] for layer in kept(cache)] == [[20] * 2, [12] * 2, [4] * 2]
        assert all(head[-2:] == [98, 99] for layer in kept(cache) for head in layer)
        for token in (5, 6):
            model(torch.tensor([[token]]), **{CACHE: cache})
        assert [[len(head) for head in layer] for layer in kept(cache)] == [[22] * 2, [14] * 2, [6] * 2]
        layers = handle.report().to_dict()["layers"]
    assert [layer["kept"] for layer in layers] == [22, 14, 6]
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert sizes[0] > sizes[1] > sizes[2]


def test_even_layers_are_snapkv():
    """With beta=1 every layer keeps what SnapKV keeps there."""
    model, fields = sharp_llama(), {"budget": 12, "window": 3, "kernel_size": 3, "pooling": "avg"}
    sets = []
    for policy in (PyramidKV(beta=1, **fields), SnapKV(**fields)):
        with torch.no_grad(), kvpress.patch(model, policy):
            sets.append(kept(model(torch.tensor([prompt(40)]))[CACHE]))
    assert sets[0] == sets[1]


def test_defaults():
    """The authors' LongBench runs, and the larger of the paper's budgets."""
    policy = PyramidKV()
    assert (policy.budget, policy.window, policy.kernel_size, policy.pooling, policy.beta) == (2048, 8, 7, "max", 20)
    assert policy.quota(1000, 0, 32) == Quota(2048, 8)


def test_fields_are_listed_as_of_a_method_of_its_own():
    """Those that it has from SnapKV, too, come before those of all eviction policies; the defaults are its own."""
    listed = {field.name: field.default for field in PyramidKV.parameters()}
    assert listed == {"budget": 2048, "window": 8, "kernel_size": 7, "pooling": "max", "beta": 20, "evict": "each_pass"}
    assert list(listed) == ["budget", "window", "kernel_size", "pooling", "beta", "evict"]
    policy = PyramidKV(budget=0.5, window=4, beta=5, evict="after_prompt")
    assert policy.describe() == "pyramid_kv(budget=0.5, window=4, beta=5, evict='after_prompt')"
    assert kvpress.make_policy({"name": "pyramid_kv", "budget": 0.5, "window": 4, "beta": 5}) == PyramidKV(
        budget=0.5, window=4, beta=5
    )
    assert SnapKV(budget=0.5, window=4, kernel_size=7, pooling="max") != PyramidKV(budget=0.5, window=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"budget": 8}, ("budget=8", "window=8", "above 8"), id="no-room"),
        pytest.param({"window": 0}, ("window=0", "at least 1"), id="no-window"),
        pytest.param({"kernel_size": 4}, ("kernel_size=4", "odd", "5"), id="even"),
        pytest.param({"pooling": "sum"}, ("pooling='sum'", "'avg'", "'max'"), id="pooling"),
        pytest.param({"beta": 0}, ("beta=0", "at least 1"), id="beta"),
        pytest.param({"beta": 2.5}, ("beta=2.5", "int"), id="beta-share"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        PyramidKV(**fields)
