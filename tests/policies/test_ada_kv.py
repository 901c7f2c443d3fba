"""Ada-KV: how entries are shared, that only what is kept is held, and pages over many steps and turns."""

import copy
import dataclasses

import pytest
import torch
import yaml
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import (
    H2O,
    TOVA,
    A2SFPrefill,
    AdaKV,
    Full,
    H2OPrefill,
    Keyformer,
    ObservedAttention,
    PyramidKV,
    Quest,
    SnapKV,
    TidalDecode,
)
from kvpress.policy import Quota
from kvpress.registry import make_policies
from kvpress.storage import Pages
from kvpress.storage import pages as storage_pages
from oracles.ada_kv import share_out
from support.matrix import CASES, check, expect, kept, prompt, sharp_llama
from support.refusals import refused

SHARED = [case for case in CASES if case.policy.name == "ada_kv"]
INNER = [
    SnapKV(budget=12, window=4, kernel_size=3),
    SnapKV(budget=0.3, window=2, evict="after_prompt"),
    PyramidKV(budget=9, window=3, kernel_size=3, beta=4),
    H2OPrefill(budget=0.4, recent=3),
    A2SFPrefill(budget=9, alpha=0.9, recent=2),
    ObservedAttention(budget=7),
]
every_inner = pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.name)
every_case = pytest.mark.parametrize("case", SHARED, ids=lambda case: case.id)
inf = float("inf")


@pytest.fixture(scope="module")
def model():
    return sharp_llama()


@torch.no_grad()
def feed(model, rows, cache):
    return model(torch.tensor(rows), **{CACHE: cache}).logits


def sizes(cache, row=0):
    """Layer -> kv head -> number of entries."""
    return [[len(head) for head in layer] for layer in kept(cache, row)]


# ---------------------------------------------------------------------------------------------------- sharing


def totals(policy, priority, total):
    return policy.share(torch.tensor([priority]), torch.tensor([total])).tolist()[0]


@pytest.mark.parametrize(
    ("alpha", "normalize", "total", "expected"),
    [
        # 8 places: 9 8 7 6 5 4 of the first head, and then 4 and 3 of the second.
        pytest.param(0.0, False, 4, [6, 2], id="best-of-all"),
        pytest.param(0.25, False, 4, [6, 2], id="floor-of-1"),
        pytest.param(0.75, False, 4, [5, 3], id="floor-of-3"),
        pytest.param(1.0, False, 4, [4, 4], id="uniform"),
        # 6 places; the first head's 4 goes before the second's.
        pytest.param(0.0, False, 3, [6, 0], id="tie"),
        # The best three of the first head have 24 of 39, of the second 9 of 10.5. So the second head's 4 counts 3.43, and
        # stands between the first head's 5 (3.08) and 6 (3.69).
        pytest.param(0.0, True, 3, [5, 1], id="normalised"),
    ],
)
def test_by_hand(alpha, normalize, total, expected):
    scores = [[9.0, 8.0, 7.0, 6.0, 5.0, 4.0], [4.0, 3.0, 2.0, 1.0, 0.25, 0.25]]
    policy = AdaKV(SnapKV(budget=40), alpha=alpha, normalize=normalize)
    assert totals(policy, scores, total) == expected


def test_normalisation_takes_from_a_head_that_is_spread_out():
    """The second head has the best entry, and a tail that will not be kept."""
    scores = [[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0], [4.1, 2.0, 2.0, 1.1, 1.0, 1.0, 1.0, 1.0]]
    plain, scaled = (AdaKV(SnapKV(budget=40), alpha=0.0, normalize=normalize) for normalize in (False, True))
    assert totals(plain, scores, 1) == [1, 1]
    # Parts 4/10 and 4.1/13.2: the first head's 4 and 3 count 1.6 and 1.2, the second's 4.1 counts 1.27.
    assert totals(scaled, scores, 1) == [1, 1]
    scores[1][7] = 3.0
    # Now 4.1/15.2: it counts 1.11.
    assert totals(plain, scores, 1) == [1, 1]
    assert totals(scaled, scores, 1) == [2, 0]


def test_the_newest_do_not_compete():
    """They stay in every head, and the floor is of what is beside them."""
    scores = [[9.0, 8.0, 7.0, 6.0, inf, inf], [1.0, 1.0, 1.0, 1.0, inf, inf]]
    assert totals(AdaKV(SnapKV(budget=40), alpha=0.0, normalize=False), scores, 4) == [6, 2]
    assert totals(AdaKV(SnapKV(budget=40), alpha=0.5, normalize=False), scores, 4) == [5, 3]


def test_a_head_gets_no_more_than_it_has():
    """What a head cannot use, as it holds less than the mean, goes to the others."""
    scores = [[1.0, -inf, -inf, -inf, -inf, -inf], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]]
    for alpha in (0.0, 0.5):
        assert totals(AdaKV(SnapKV(budget=40), alpha=alpha), scores, 3) == [1, 5] if alpha else [0, 6]
        assert totals(AdaKV(SnapKV(budget=40), alpha=alpha), scores, 5) == [1, 6]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.29, 0.9, 1.0])
def test_against_lists(seed, alpha, normalize):
    """Numbers of three sequences with different budgets, with many ties, against sorting."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9, (3, 4, 11), generator=generator).float() ** 2
    scores[:, 1] *= 3
    scores[:, 2, 5:] = -inf
    budgets = torch.tensor([2, 5, 10])
    counts = AdaKV(SnapKV(budget=40), alpha=alpha, normalize=normalize).share(scores, budgets)
    for b in range(3):
        heads = [[score for score in head if score > -inf] for head in scores[b].tolist()]
        expected = share_out(heads, [int(budgets[b])] * 4, alpha, normalize)
        assert counts[b].tolist() == [len(head) for head in expected]


@pytest.mark.parametrize("value", [0.0, 1e-38, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
def test_extreme_scores(value):
    """Nothing, next to nothing and the ends of float32: the number of entries is right, and every head has its floor."""
    scores = torch.full((1, 3, 20), value)
    scores[0, 1, :5] = 1.0
    counts = AdaKV(SnapKV(budget=40), alpha=0.5).share(scores, torch.tensor([8]))
    assert counts.sum() == 24 and counts.min() >= 4


@every_case
def test_heads_of_the_matrix_keep_different_numbers(model, case):
    """Or the trap matrix would say nothing."""
    uneven = 0
    for seed in range(3):
        with kvpress.patch(model, case.policy):
            cache = DynamicCache(config=model.config)
            feed(model, [prompt(23, seed)], cache)
            feed(model, [[5]], cache)
        uneven += any(len(set(layer)) > 1 for layer in sizes(cache))
    assert uneven


@every_inner
def test_layers_hold_what_they_hold_under_the_inner_policy(model, inner):
    """To the entry, in every layer and sequence, at every step and turn."""
    texts = [prompt(40, 0), prompt(40, 1)]
    counts = []
    for policy in (inner, AdaKV(inner)):
        cache, seen = DynamicCache(config=model.config), []
        with kvpress.patch(model, policy):
            for rows in (texts, [[5], [6]], [prompt(9, 2), prompt(9, 3)], [[7], [8]]):
                feed(model, rows, cache)
                seen.append([[sum(layer) for layer in sizes(cache, row)] for row in range(2)])
        counts.append(seen)
    assert counts[0] == counts[1]


@every_inner
def test_alpha_1_is_the_inner_policy(model, inner):
    """Bit for bit: positions, logits and bytes."""
    results = []
    for policy in (inner, AdaKV(inner, alpha=1)):
        cache, logits, positions = DynamicCache(config=model.config), [], []
        with kvpress.patch(model, policy) as handle:
            for rows in ([prompt(40, 0), prompt(40, 1)], [[5], [6]], [prompt(9, 2), prompt(9, 3)], [[7], [8]]):
                logits.append(feed(model, rows, cache))
                positions.append([layer.positions.clone() for layer in cache.layers])
            results.append((logits, positions, handle.report().to_dict()["bytes"]))
    (one, places, nbytes), (two, other_places, other_nbytes) = results
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for x, y in zip(places, other_places, strict=True) for a, b in zip(x, y, strict=True))
    assert nbytes == other_nbytes


@every_inner
def test_pages_of_even_heads_are_the_inner_policy(model, inner, monkeypatch):
    """The same through pages: where all heads get as many, positions are the inner policy's and logits to rounding."""
    monkeypatch.setattr(AdaKV, "heads", "shared")
    results = []
    for policy in (inner, AdaKV(inner, alpha=1)):
        cache, logits, sets = DynamicCache(config=model.config), [], []
        with kvpress.patch(model, policy):
            for rows in (
                [prompt(40, 0), prompt(40, 1)],
                *([[5], [6]] for _ in range(40)),
                [prompt(9), prompt(9)],
                [[7], [8]],
            ):
                logits.append(feed(model, rows, cache))
                sets.append([kept(cache, row) for row in range(2)])
        results.append((logits, sets))
    assert isinstance(cache.layers[0].storage, Pages)
    assert results[0][1] == results[1][1]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- what is held and read


def page_bytes(layer, dtype_bytes):
    """Bytes of a page: K, V, positions, statistics, and its owner."""
    slot = 2 * layer.keys.shape[-1] * dtype_bytes + 4 + 4 * len(layer.storage.stats)
    return storage_pages.PAGE * slot + 8


@every_inner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_are_those_of_the_heads_pages(inner, dtype, monkeypatch):
    """After a prompt each kv head has the pages that its entries and one more need, and small tables; nothing else."""
    page = 4
    monkeypatch.setattr(storage_pages, "PAGE", page)
    model = sharp_llama().to(dtype)
    policy = AdaKV(dataclasses.replace(inner, budget=100, evict="each_pass"))
    with kvpress.patch(model, policy) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, [prompt(400)], cache)
        held, report = sizes(cache), handle.report().to_dict()["layers"]
        assert any(len({count // page for count in layer}) > 1 for layer in held)
        for layer, counts, figures in zip(cache.layers, held, report, strict=True):
            pages = sum(count // page + 1 for count in counts)
            window = sum(note.nbytes for note in layer.notes.values())
            steps = min(page - count % page for count in counts)
            tables = 8 * len(counts) * (steps + 2) + 4 + 4 + window  # upcoming slots and quotas
            tables += 4 * (pages + len(counts) + 1)  # the pages of each head
            assert layer.nbytes == figures["bytes"] == pages * page_bytes(layer, dtype.itemsize) + tables
            assert figures["kept"] == sum(counts) / len(counts)
            assert figures["read_share"] == pages * page / len(counts) / 400


def test_growing_takes_a_page_for_each_head(model):
    """Nothing is held for later but the slots of a page: 100 steps, each head's number and bytes at each."""
    policy = AdaKV(SnapKV(budget=40, window=4))
    with kvpress.patch(model, policy) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, [prompt(100)], cache)
        start = sizes(cache)
        for step in range(1, 101):
            feed(model, [[5]], cache)
            for layer, before in zip(cache.layers, start, strict=True):
                now = layer.positions.shape[2]
                assert now == max(before) + step
                slots = layer.storage.paged_positions.shape[1]
                assert sum(before) + 2 * step <= slots <= sum(before) + 2 * step + 2 * 2 * storage_pages.PAGE
                assert layer.storage.paged_keys.untyped_storage().nbytes() == slots * 8 * 4
        figures = handle.report().to_dict()["layers"]
        for layer, one in zip(cache.layers, figures, strict=True):
            assert abs(one["bytes"] - layer.nbytes) == 0
    assert sizes(cache) == [[count + 100 for count in layer] for layer in start]


def test_what_steps_read_is_counted(model, monkeypatch):
    """The report's share is the slots whose K and V the attention was given."""
    read, original = [], storage_pages.paged_attention

    def count(query, key, value, owner, valid, **options):
        read.append(key.shape[1] / options["kv_heads"])
        assert key.shape == value.shape and key.untyped_storage().nbytes() == key.nbytes
        return original(query, key, value, owner, valid, **options)

    monkeypatch.setattr(storage_pages, "paged_attention", count)
    with kvpress.patch(model, AdaKV(SnapKV(budget=40, window=4))) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, [prompt(200)], cache)
        assert not read
        for _ in range(50):
            feed(model, [[5]], cache)
        share = handle.report().to_dict()["read_share"]
    assert len(read) == 2 * 50
    assert share == pytest.approx(sum(read) / (2 * sum(range(201, 251))))
    assert share < 0.5


def test_keys_and_values_shown_are_those_of_the_positions(model):
    """What `keys` and `values` show of a paged layer is what an unpatched run computes at the positions shown."""
    rows = [prompt(50, 0), prompt(50, 1)]
    plain = DynamicCache(config=model.config)
    feed(model, rows, plain)
    with kvpress.patch(model, AdaKV(SnapKV(budget=20, window=4))):
        cache = DynamicCache(config=model.config)
        feed(model, rows, cache)
    layer, dense = cache.layers[0], plain.layers[0]
    assert isinstance(layer.storage, Pages)
    seen = 0
    for b in range(2):
        for head in range(2):
            for slot, position in enumerate(layer.positions[b, head].tolist()):
                for shown, exact in ((layer.keys, dense.keys), (layer.values, dense.values)):
                    expected = exact[b, head, position] if position >= 0 else torch.zeros(8)
                    torch.testing.assert_close(shown[b, head, slot], expected, atol=1e-6, rtol=1e-6)
                seen += position >= 0
    assert seen == 80


# ---------------------------------------------------------------------------------------------------- many steps and turns


@pytest.mark.parametrize("page", [1, 3, 4])
@every_case
def test_small_pages_over_turns(model, case, page, monkeypatch):
    """Pages that fill and grow at every few steps, packed and unpacked again and again, against the oracle."""
    monkeypatch.setattr(storage_pages, "PAGE", page)
    steps = [[token] for token in prompt(14, 8)]
    passes = [prompt(20, 0), *steps, prompt(6, 1), *steps[:6], prompt(2, 2), *steps[:3]]
    with kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        logits = [feed(model, [ids], cache)[0, -1] for ids in passes]
    assert cache.layers[0].storage.owner.shape[1] > 2
    check(expect(model, case, passes), logits, cache)


@pytest.mark.parametrize("page", [2, 32])
@every_case
def test_padded_batch_over_turns(model, case, page, monkeypatch):
    """Sequences of different lengths have different numbers of pages; reordered and forked in between."""
    monkeypatch.setattr(storage_pages, "PAGE", page)
    first, second = [prompt(7, 0), prompt(30, 1)], [prompt(5, 2), prompt(2, 3)]
    mask = torch.tensor([[0] * 23 + [1] * 7, [1] * 30])
    ids = torch.tensor([[0] * 23 + first[0], first[1]])
    tokens = prompt(9, 4)
    logits = []

    @torch.no_grad()
    def masked(rows, cache):
        nonlocal mask
        columns = torch.tensor([[int(token != 0) for token in row] for row in rows])
        mask = torch.cat((mask, columns), dim=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -len(rows[0]) :]
        return model(torch.tensor(rows), **{CACHE: cache}, attention_mask=mask, position_ids=places).logits

    with torch.no_grad(), kvpress.patch(model, case.policy):
        cache = DynamicCache(config=model.config)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(ids, **{CACHE: cache}, attention_mask=mask, position_ids=places)
        for token in tokens:
            masked([[token], [token]], cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        mask = mask[[1, 0]]
        fork = copy.deepcopy(cache)
        masked([[9], [9]], fork)
        mask = mask[:, :-1]
        masked([[0, 0, 0, *second[1]], second[0]], cache)
        for token in tokens[:4]:
            logits.append(masked([[token], [token]], cache)[:, -1])
    for row, which in enumerate((1, 0)):
        passes = [first[which], *([token] for token in tokens), second[which], *([token] for token in tokens[:4])]
        check(expect(model, case, passes), [got[row] for got in logits], cache, row)


# ---------------------------------------------------------------------------------------------------- company and values


def test_selection_is_refused_where_heads_share():
    """A selecting policy needs as many entries in every head; with alpha=1 there are."""
    with pytest.raises(PolicyError, match=r"another number of entries.*tidal_decode.*snapkv") as caught:
        make_policies([AdaKV(SnapKV(budget=64)), TidalDecode(k=8)])
    assert "\n" not in str(caught.value)
    assert len(make_policies([Quest(), AdaKV(SnapKV(budget=64), alpha=1)])) == 2


def test_defaults():
    """The authors' floor, and their normalisation."""
    policy = AdaKV()
    assert (policy.inner, policy.alpha, policy.normalize, policy.evict) == (SnapKV(), 0.2, True, "each_pass")
    assert policy.quota(9000, 0, 32) == Quota(2048, 32)
    assert policy == AdaKV(SnapKV()) and hash(policy) == hash(AdaKV(SnapKV()))
    assert policy.describe() == "ada_kv()"
    assert AdaKV(PyramidKV(budget=64)).describe() == "ada_kv(inner=pyramid_kv(budget=64))"


def test_waits_as_the_inner_policy_waits():
    assert AdaKV(SnapKV(evict="after_prompt")).evict == "after_prompt"
    assert AdaKV(SnapKV(), evict="after_prompt").evict == "after_prompt"


def test_from_mappings(tmp_path):
    """A mapping or a file names the inner policy as it names a policy; a budget is the inner policy's."""
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({"name": "ada_kv", "alpha": 0.3, "inner": {"name": "h2o_prefill", "recent": 4}}))
    assert kvpress.make_policy(file) == AdaKV(H2OPrefill(recent=4), alpha=0.3)
    assert kvpress.make_policy(file, budget=0.25) == AdaKV(H2OPrefill(recent=4, budget=0.25), alpha=0.3)
    assert kvpress.make_policy("ada_kv", budget=100) == AdaKV(SnapKV(budget=100))
    assert kvpress.make_policy("ada_kv", inner="pyramid_kv", budget=100) == AdaKV(PyramidKV(budget=100))
    with pytest.raises(PolicyError, match="unknown policy 'pyramid'"):
        kvpress.make_policy("ada_kv", inner="pyramid")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"alpha": 1.2}, ("alpha=1.2", "0 to 1"), id="alpha"),
        pytest.param({"alpha": "all"}, ("alpha='all'",), id="alpha-word"),
        pytest.param({"normalize": 2}, ("normalize=2", "True"), id="normalize"),
        pytest.param({"inner": "snapkv"}, ("inner='snapkv'", "SnapKV(budget=1024)"), id="a-name"),
        pytest.param({"inner": Full()}, ("inner=full()", "no evicting policy"), id="full"),
        pytest.param({"inner": TidalDecode()}, ("tidal_decode", "no evicting policy"), id="selecting"),
        pytest.param({"inner": H2O()}, ("inner=h2o", "after a prompt", "SnapKV"), id="decode"),
        pytest.param({"inner": TOVA()}, ("inner=tova", "after a prompt"), id="tova"),
        pytest.param({"inner": Keyformer()}, ("inner=keyformer", "after a prompt"), id="keyformer"),
        pytest.param({"inner": AdaKV()}, ("shares heads already",), id="itself"),
        pytest.param({"evict": "never"}, ("evict='never'",), id="evict"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        AdaKV(**fields)
