"""Quest: pages by brute force, bounds as they grow, and what they cost."""

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.kernels.page_bounds import page_bounds
from kvpress.policies import Quest, SnapKV
from kvpress.registry import make_policies
from oracles import quest
from support.matrix import prompt, sharp_llama
from support.reads import check_oracle, dense, run, watch

PASSES = [prompt(26), *([token] for token in prompt(7, 1)), prompt(5, 2), *([token] for token in prompt(4, 3))]
STEPS = [*range(26, 33), *range(38, 42)]
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=LAYERS)


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 8, "page_size": 4},
        {"budget": 7, "page_size": 3, "dense_layers": 0},
        {"budget": 0.5, "page_size": 5, "dense_layers": 1},
        {"budget": 0.01, "page_size": 4, "dense_layers": 0},
        {"budget": 5, "page_size": 1, "dense_layers": 0},
    ],
    ids=str,
)
def test_reads_and_logits_are_the_oracles(model, fields, monkeypatch):
    log = watch(monkeypatch, Quest)
    logits, _, _ = run(model, Quest(**fields), PASSES)
    check_oracle(quest.Pages(model, quest.Quest(**fields)), PASSES, logits, log)
    assert {at for at, _ in log} == set(STEPS)


def test_a_page_of_one_entry_is_exact_top_k(model, monkeypatch):
    """By a full sort of the logits of each query head, the current token among them (section's page size 1)."""
    saw, original = {}, Quest.select

    def keep(self, view):
        saw[int(view.seen[0]) - 1, view.layer] = view.query.clone(), view.keys.clone()
        return original(self, view)

    monkeypatch.setattr(Quest, "select", keep)
    log = watch(monkeypatch, Quest)
    run(model, Quest(budget=6, page_size=1, dense_layers=0), PASSES)
    for (at, layer), (query, keys) in saw.items():
        for head in range(4):
            logits = (keys[0, head // 2].double() @ query[0, head, 0].double()).tolist()
            best = sorted(range(at), key=lambda j, logits=logits: -logits[j])[:5]
            assert log[at, layer][head] == sorted([*best, at])


@pytest.mark.parametrize("budget", [42, 2048, 1.0], ids=str)
def test_a_budget_for_all_is_dense(model, budget, monkeypatch):
    """Also where it is not a number of whole pages."""
    log = watch(monkeypatch, Quest)
    logits, _, report = run(model, Quest(budget=budget, page_size=8, dense_layers=0), PASSES)
    torch.testing.assert_close(torch.cat(logits, dim=1), dense(model, PASSES)[0], atol=1e-5, rtol=1e-4)
    assert report.total.read_share == 1
    assert all(log[at, layer] == [list(range(at + 1))] * 4 for at, layer in log)


@pytest.mark.parametrize("dense_layers", [0, 1, 3])
def test_dense_layers_read_everything(model, dense_layers, monkeypatch):
    log = watch(monkeypatch, Quest)
    _, cache, _ = run(model, Quest(budget=4, page_size=4, dense_layers=dense_layers), PASSES)
    for (at, layer), heads in log.items():
        assert (heads == [list(range(at + 1))] * 4) == (layer < dense_layers)
    assert [bool(layer.state) for layer in cache.layers] == [layer >= dense_layers for layer in range(LAYERS)]


def test_the_last_page_is_always_read_and_counts(model, monkeypatch):
    """With room for one page that is the last one, full or not."""
    log = watch(monkeypatch, Quest)
    run(model, Quest(budget=7, page_size=4, dense_layers=0), PASSES)
    for (at, _), heads in log.items():
        assert heads == [list(range(at // 4 * 4, at + 1))] * 4


def test_bounds_grow_with_the_cache(model):
    """After every decode step they are what they would be from scratch, for each layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, Quest(budget=8, page_size=4, dense_layers=1)):
        model(torch.tensor([prompt(21)]), **{CACHE: cache})
        for token in prompt(30, 1):
            model(torch.tensor([[token]]), **{CACHE: cache})
            for layer in cache.layers[1:]:
                expected = page_bounds(layer.storage.read(stop=layer.length)[0], None, 4)
                pages = expected[0].shape[2]
                assert torch.equal(layer.state["least"][:, :, :pages], expected[0])
                assert torch.equal(layer.state["greatest"][:, :, :pages], expected[1])
                assert pages <= layer.state["least"].shape[2] <= pages + 2
        model(torch.tensor([prompt(3, 2)]), **{CACHE: cache})
        assert not any(layer.state for layer in cache.layers)


def test_dense_until_there_are_more_pages_than_the_budget(model, monkeypatch):
    """Nothing is selected up to 28 entries; from then on it is, with the right bounds."""
    log = watch(monkeypatch, Quest)
    passes = [prompt(24), *([token] for token in prompt(10, 1))]
    run(model, Quest(budget=28, page_size=4, dense_layers=0), passes)
    for (at, _), heads in log.items():
        assert all((len(head) == at + 1) == (at < 28) for head in heads)
        assert all(len(head) <= 28 for head in heads)


def test_pages_of_a_padded_batch_are_those_of_each_sequence(model, monkeypatch):
    texts = [[0] * 9 + prompt(9, 4), prompt(18, 5)]
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    steps = [[[token], [token + 1]] for token in prompt(6, 6)]
    policy = Quest(budget=8, page_size=4, dense_layers=0)
    logs, original = [], Quest.select
    for row in range(2):
        monkeypatch.setattr(Quest, "select", original)
        log = watch(monkeypatch, Quest, row)
        run(model, policy, [texts, *steps], mask)
        monkeypatch.setattr(Quest, "select", original)
        alone = watch(monkeypatch, Quest)
        run(model, policy, [texts[row][9 * (row == 0) :], *(step[row] for step in steps)])
        assert log == alone
        logs.append(log)
    assert logs[0] != logs[1]


def test_bounds_after_the_longest_sequence_left(model):
    """The one that stays is short enough to be read whole for some steps; its bounds are not those of before."""
    ids, mask = torch.tensor([prompt(34, 4), [0] * 18 + prompt(16, 5)]), torch.ones(2, 34, dtype=torch.long)
    mask[1, :18] = 0
    policy, cache = Quest(budget=20, page_size=4, dense_layers=0), DynamicCache(config=model.config)
    found, tail = [], prompt(12, 6)
    with torch.no_grad(), kvpress.patch(model, policy):
        for step in range(13):
            if step == 2:
                cache.batch_select_indices(torch.tensor([1]))
                mask = mask[1:]
            new = ids if step == 0 else torch.tensor([[tail[step - 1]]] * len(mask))
            mask = mask if step == 0 else torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            output = model(new, **{CACHE: cache}, attention_mask=mask, position_ids=places)
            found.append(output.logits[-1, -1])
    alone, _, _ = run(model, policy, [prompt(16, 5), *([token] for token in tail)])
    for got, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(got, expected[0, -1], atol=1e-4, rtol=1e-4)


def test_a_padded_token_in_decode_is_in_no_page(model):
    """A sequence whose step is padding reads afterwards as if it had not been."""
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[0, 21] = 0
    policy = Quest(budget=8, page_size=4, dense_layers=0)
    texts, steps = [prompt(20, 4), prompt(20, 5)], [[[token], [token + 1]] for token in prompt(6, 6)]
    logits, _, _ = run(model, policy, [texts, *steps], mask)
    alone, _, _ = run(model, policy, [texts[0], *(step[0] for index, step in enumerate(steps) if index != 1)])
    for got, expected in zip(logits[:2] + logits[3:], alone, strict=True):
        torch.testing.assert_close(got[0, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_report_counts_bounds(model, monkeypatch):
    """A step reads the pages of the union and two rows of bounds a page; the bounds are in the bytes."""
    log = watch(monkeypatch, Quest)
    passes = [prompt(64), *([token] for token in prompt(3, 1))]
    _, cache, report = run(model, Quest(budget=8, page_size=4), passes)
    readable = 65 + 66 + 67
    assert [report.layers[layer].read_share for layer in (0, 1)] == [1.0, 1.0]
    for index in (2, 3):
        pages = [len({p // 4 for head in log[at, index][:2] for p in head}) for at in (64, 65, 66)]
        others = [len({p // 4 for head in log[at, index][2:] for p in head}) for at in (64, 65, 66)]
        expected = sum(4 * max(a, b) + 17 for a, b in zip(pages, others, strict=True))
        assert report.layers[index].read_share == pytest.approx(expected / readable)
        layer = cache.layers[index]
        bounds = layer.state["least"].nbytes + layer.state["greatest"].nbytes
        assert bounds == 2 * 2 * 18 * 8 * 4
        assert report.layers[index].bytes == report.layers[0].bytes + bounds
    assert report.total.kept == 67


def test_defaults():
    policy = Quest()
    assert (policy.budget, policy.page_size, policy.dense_layers) == (2048, 16, 2)
    assert Quest.at_budget(0.25) == Quest(budget=0.25) and kvpress.make_policy("quest") == policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 15}, "budget=15 is less than one page of page_size=16; give at least 16"),
        ({"budget": 0}, "budget=0 is too small"),
        ({"budget": 2.0}, "budget=2.0 is above 1"),
        ({"page_size": 0}, "page_size=0 does not work; give an int of at least 1"),
        ({"page_size": 1.0}, "page_size=1.0 does not work"),
        ({"dense_layers": -1}, "dense_layers=-1 does not work"),
    ],
    ids=str,
)
def test_bad_values(fields, message):
    with pytest.raises(PolicyError) as caught:
        Quest(**fields)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_model_without_a_layer_to_select_in_is_refused():
    with pytest.raises(
        PolicyError, match=r"dense_layers=2 leaves no layer to select in.*2 attention layers.*at most 1"
    ):
        kvpress.patch(sharp_llama(), Quest())


@pytest.mark.parametrize("company", ["h2o", "streaming_llm"])
def test_company_that_frees_slots_is_refused(company):
    with pytest.raises(PolicyError, match=rf"{company}\(.*frees slots in decode.*bounds.*snapkv"):
        make_policies([company, "quest"])
    make_policies([SnapKV(), "quest"])
