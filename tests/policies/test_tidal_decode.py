"""TidalDecode: which positions are read where, by brute force and against dense attention."""

import pytest
import torch

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.kernels.decode_attention import decode_attention
from kvpress.policies import Full, TidalDecode
from kvpress.registry import make_policies
from oracles import tidal_decode
from support.matrix import prompt, sharp_llama
from support.reads import check_oracle, dense, run, watch
from support.spies import replace_decode_attention

LAYERS = 7
PASSES = [prompt(24), *([token] for token in prompt(6, 1)), prompt(5, 2), *([token] for token in prompt(3, 3))]
STEPS = [*range(24, 30), *range(35, 38)]  # positions of the decode steps


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=LAYERS)


@pytest.fixture(scope="module")
def exact(model):
    return dense(model, PASSES)


SETTINGS = [
    {"k": 7},  # with 6 two scores are 1e-6 apart, and which is larger depends on the processor
    {"k": 4, "sparse_layer_start": 1, "correction_layer": 3},
    {"k": 0.3, "sparse_layer_start": 0, "correction_layer": 5},
    {"k": 1, "sparse_layer_start": 1, "correction_layer": 50},
    {"k": 5, "sparse_layer_start": 1, "correction_layer": 4, "correct_every": 2},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_reads_and_logits_are_the_oracles(model, fields, monkeypatch):
    log = watch(monkeypatch, TidalDecode)
    logits, _, _ = run(model, TidalDecode(**fields), PASSES)
    check_oracle(tidal_decode.Tidal(model, tidal_decode.TidalDecode(**fields)), PASSES, logits, log)
    assert {at for at, _ in log} == set(STEPS if "correct_every" not in fields else (24, 25, 27, 28, 35, 36))


@pytest.mark.parametrize("k", [38, 1000, 1.0], ids=str)
def test_d1_room_for_all_is_full_attention(model, exact, k):
    logits, _, report = run(model, TidalDecode(k=k), PASSES)
    torch.testing.assert_close(torch.cat(logits, dim=1), exact[0], atol=1e-5, rtol=1e-4)
    assert report.total.read_share > 1  # the two layers that pick look at the keys twice


@pytest.mark.parametrize("past", [LAYERS, LAYERS + 1, 500])
def test_d2_a_correction_layer_past_the_last_leaves_one_pick(model, past, monkeypatch):
    log = watch(monkeypatch, TidalDecode)
    run(model, TidalDecode(k=5, correction_layer=past), PASSES)
    for at in STEPS:
        assert all(log[at, layer] == [list(range(at + 1))] * 4 for layer in (0, 1, 2))
        assert all(log[at, layer] == log[at, 3] for layer in range(3, LAYERS))
        assert all(len(head) == 5 for head in log[at, 3])


def test_d3_when_every_layer_picks_all_is_dense():
    model = sharp_llama(layers=2)
    logits, _, _ = run(model, TidalDecode(k=1, sparse_layer_start=0, correction_layer=1), PASSES)
    torch.testing.assert_close(torch.cat(logits, dim=1), dense(model, PASSES)[0], atol=1e-5, rtol=1e-4)


def test_d4_sets_are_the_top_k_and_persist(model, monkeypatch):
    """By brute force from the keys and queries that the layer saw: a full sort of the logits of each query head."""
    first, second, k = 1, 4, 6
    queries = {}
    original = TidalDecode.select

    def keep(self, view):
        queries[int(view.seen[0]) - 1, view.layer] = view.query.clone(), view.keys.clone()
        return original(self, view)

    monkeypatch.setattr(TidalDecode, "select", keep)
    log = watch(monkeypatch, TidalDecode)
    run(model, TidalDecode(k=k, sparse_layer_start=first, correction_layer=second), PASSES)
    for at in STEPS:
        for layer, users in ((first, range(first + 1, second)), (second, range(second + 1, LAYERS))):
            query, keys = queries[at, layer]
            for head in range(4):
                logits = (keys[0, head // 2].double() @ query[0, head, 0].double()).tolist()
                others = sorted(range(at), key=lambda j, logits=logits: -logits[j])[: k - 1]
                for user in users:
                    assert log[at, user][head] == sorted([*others, at])
        assert log[at, first + 1] != log[at, second + 1]


def test_heads_of_a_group_have_their_own_sets(model, monkeypatch):
    log = watch(monkeypatch, TidalDecode)
    run(model, TidalDecode(k=4), PASSES)
    assert any(log[at, 3][0] != log[at, 3][1] for at in STEPS)


def test_d5_what_comes_before_the_first_sparse_layer_is_dense(model, exact, monkeypatch):
    """K and V of layers up to l0 + 1 and attention outputs up to l0, at every step; the next ones are not."""
    start, original, outputs = 2, decode_attention, {}

    def spy(*args, **options):
        result = original(*args, **options)
        outputs.setdefault(policy_name[0], []).append(result[0].clone())
        return result

    replace_decode_attention(monkeypatch, spy)
    policy_name = ["full"]
    run(model, Full(), PASSES)
    policy_name[0] = "tidal"
    _, cache, _ = run(model, TidalDecode(k=3, sparse_layer_start=start, correction_layer=5), PASSES)
    assert len(outputs["full"]) == len(outputs["tidal"]) == LAYERS * len(STEPS)
    differs = set()
    for index, (a, b) in enumerate(zip(outputs["full"], outputs["tidal"], strict=True)):
        layer = index % LAYERS
        if layer <= start:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        elif not torch.allclose(a, b, atol=1e-3):
            differs.add(layer)
    assert differs == set(range(start + 1, LAYERS))
    for layer in range(LAYERS):
        held = slice(0, cache.layers[layer].length)
        for ours, plain in (
            (cache.layers[layer].keys[:, :, held], exact[1].layers[layer].keys),
            (cache.layers[layer].values[:, :, held], exact[1].layers[layer].values),
        ):
            assert torch.allclose(ours, plain, atol=1e-4) == (layer <= start + 1)
            torch.testing.assert_close(ours[:, :, :24], plain[:, :, :24], atol=1e-4, rtol=1e-4)


def test_d6_a_sparse_layer_is_dense_attention_with_the_rest_masked(model, monkeypatch):
    from kvpress import step

    seen, original = [], step._attend_selected

    def spy(layer, view, scores, observed=False):
        keys, values = (x.clone() for x in layer.storage.read(stop=layer.step.stop))
        result = original(layer, view, scores, observed)
        seen.append((int(view.seen[0]) - 1, view.layer, view.query.clone(), keys, values, result[0].clone()))
        return result

    monkeypatch.setattr(step, "_attend_selected", spy)
    log = watch(monkeypatch, TidalDecode)
    run(model, TidalDecode(k=4, sparse_layer_start=1, correction_layer=4), PASSES)
    sparse = 0
    for at, layer, query, keys, values, output in seen:
        for head in range(4):
            logits = keys[0, head // 2].double() @ query[0, head, 0].double() * keys.shape[-1] ** -0.5
            outside = [j for j in range(at + 1) if j not in log[at, layer][head]]
            logits[outside] = -float("inf")
            sparse += bool(outside)
            expected = logits.softmax(-1) @ values[0, head // 2].double()
            torch.testing.assert_close(output[0, head, 0].double(), expected, atol=1e-5, rtol=1e-4)
    assert sparse == 4 * 4 * len(STEPS)  # layers 2, 3, 5, 6


def test_sparse_layers_do_not_touch_other_keys(model, monkeypatch):
    """With the keys and values that a sparse layer did not select replaced by NaN, its output is the same."""
    original, poisoned = decode_attention, []

    def spy(query, key, value, valid=None, index=None, **options):
        if index is not None:
            rest = torch.ones(key.shape[:3], dtype=torch.bool).scatter_(2, index, False)[..., None]
            poisoned.append(int(rest.sum()))
            key, value = key.masked_fill(rest, float("nan")), value.masked_fill(rest, float("nan"))
        return original(query, key, value, valid, index=index, **options)

    expected, _, _ = run(model, TidalDecode(k=3), PASSES)
    replace_decode_attention(monkeypatch, spy)
    found, _, _ = run(model, TidalDecode(k=3), PASSES)
    assert len(poisoned) == (LAYERS - 4) * len(STEPS) and min(poisoned) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_d7_corrected_entries_are_the_dense_ones(model, exact, every):
    """After every pass all entries but those of the steps since the last correction are exact, in every layer."""
    from transformers import DynamicCache

    cache, waiting, seen, inexact = DynamicCache(config=model.config), 0, 0, 0
    with torch.no_grad(), kvpress.patch(model, TidalDecode(k=2, correct_every=every)):
        for ids in PASSES:
            logits = model(torch.tensor([ids]), **{CACHE: cache}).logits
            assert logits.shape[1] == len(ids)
            corrects = len(ids) > 1 or waiting == every
            waiting = 0 if corrects else waiting + 1
            if corrects:
                torch.testing.assert_close(logits, exact[0][:, seen : seen + len(ids)], atol=1e-4, rtol=1e-4)
            seen += len(ids)
            assert cache.get_seq_length() == seen
            good = seen - waiting
            for ours, plain in zip(cache.layers, exact[1].layers, strict=True):
                assert ours.length == seen
                for a, b in ((ours.keys, plain.keys), (ours.values, plain.values)):
                    torch.testing.assert_close(a[:, :, :good], b[:, :, :good], atol=1e-4, rtol=1e-4)
                    inexact += not torch.allclose(a[:, :, good:seen], b[:, :, good:seen], atol=1e-3)
    assert inexact  # without the correction they would differ


def test_correction_of_a_padded_batch(model):
    """Left padding, a batch, then a second turn with padding in the middle: as each sequence alone."""
    texts, mask = [[0] * 7 + prompt(9, 4), prompt(16, 5)], torch.ones(2, 28, dtype=torch.long)
    mask[0, :7] = 0
    mask[1, 21:23] = 0
    steps = [[[token], [token + 1]] for token in prompt(5, 6)]
    turn = [prompt(4, 7), [0, 0, *prompt(2, 8)]]
    more = [[[token], [token + 1]] for token in prompt(3, 9)]
    policy = TidalDecode(k=3, correct_every=2)
    logits, _, _ = run(model, policy, [texts, *steps, turn, *more], mask)
    for row, first, second in ((0, texts[0][7:], turn[0]), (1, texts[1], turn[1][2:])):
        passes = [first, *(step[row] for step in steps), second, *(step[row] for step in more)]
        alone, _, _ = run(model, policy, passes)
        for got, expected in zip(logits, alone, strict=True):
            torch.testing.assert_close(got[row, -1], expected[0, -1], atol=1e-4, rtol=1e-4)


def test_correction_cuts_hidden_states_and_counts_its_reads(model):
    from transformers import DynamicCache

    policy = TidalDecode(k=2, correct_every=1)
    with torch.no_grad(), kvpress.patch(model, policy) as handle:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([PASSES[0]]), **{CACHE: cache})
        model(torch.tensor([[5]]), **{CACHE: cache})
        before = handle.report().layers[3].read_share
        output = model(torch.tensor([[6]]), **{CACHE: cache}, output_hidden_states=True)
        assert {tuple(states.shape) for states in output.hidden_states} == {(1, 1, 32)}
        nested = model(torch.tensor([[7]]), **{CACHE: cache}, return_dict=False)
        assert nested[0].shape[1] == 1
        nested = model(torch.tensor([[8]]), **{CACHE: cache}, return_dict=False)
        assert nested[0].shape[1] == 1
        assert before < 0.2 < handle.report().layers[3].read_share  # two sparse steps, two that read everything
        assert handle.report().total.seen == 28


def test_correction_by_embeddings(model):
    embed = model.get_input_embeddings()
    policy, expected = TidalDecode(k=2, correct_every=2), []
    expected, _, _ = run(model, policy, PASSES)
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, policy):
        for ids, logits in zip(PASSES, expected, strict=True):
            got = model(inputs_embeds=embed(torch.tensor([ids])), **{CACHE: cache}).logits
            torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)


def test_correction_with_a_helper_model(model):
    """Assisted decoding takes tokens back itself; with room for all it is the same as without a policy."""
    ids = torch.tensor([prompt(20)])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "assistant_model": sharp_llama(seed=9)}
    expected = model.generate(ids, **options)
    for every in (0, 2):
        with kvpress.patch(model, TidalDecode(k=1.0, correct_every=every)):
            assert torch.equal(model.generate(ids, **options), expected)


def test_correction_needs_all_layers_and_no_eviction(model):
    with pytest.raises(PolicyError, match=r"correct_every=2 takes decode steps back, and h2o.*evicts.*correct_every=0"):
        make_policies(["h2o", TidalDecode(correct_every=2)])
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    hybrid = Gemma2ForCausalLM(config).eval()
    kvpress.patch(hybrid, TidalDecode(sparse_layer_start=0)).unpatch()
    with pytest.raises(PolicyError, match="layers without full attention"):
        kvpress.patch(hybrid, TidalDecode(sparse_layer_start=0, correct_every=2))
    assert not hybrid.model._forward_pre_hooks


def test_d8_the_first_token_is_dense(model, exact):
    logits, _, _ = run(model, TidalDecode(k=1), PASSES[:1])
    torch.testing.assert_close(logits[0], exact[0][:, :24], atol=1e-5, rtol=1e-4)


def test_nothing_survives_a_step(model, monkeypatch):
    """What is read in a step does not depend on the picks of the step before: swapping a token there changes them."""
    log = watch(monkeypatch, TidalDecode)
    run(model, TidalDecode(k=3), PASSES)
    assert len({str(log[at, 3]) for at in STEPS}) == len(STEPS)


def test_report_counts_what_is_read(model, monkeypatch):
    """Picking layers read everything and the keys once more; sparse ones the union of a group's sets, at least."""
    log = watch(monkeypatch, TidalDecode)
    _, _, report = run(model, TidalDecode(k=4, sparse_layer_start=1, correction_layer=4), PASSES[:4])
    readable = 25 + 26 + 27
    unions = [
        max(len(set(log[at, 2][0] + log[at, 2][1])), len(set(log[at, 2][2] + log[at, 2][3]))) for at in (24, 25, 26)
    ]
    shares = {index: layer.read_share * readable for index, layer in report.layers.items()}
    for layer, entries in {0: readable, 1: 1.5 * readable, 2: sum(unions), 3: sum(unions), 4: 1.5 * readable}.items():
        assert shares[layer] == pytest.approx(entries)
    assert sum(unions) <= 3 * 8
    assert report.total.kept == 27


@pytest.mark.parametrize(
    ("layers", "start", "expected"),
    [
        (32, 2, (2, 13)),
        (28, 2, (2, 12)),
        (80, 2, (2, 31)),
        (30, 2, (2, 12)),
        (40, 2, (2, 16)),
        (4, 2, (2, 4)),
        (2, 0, (0, 2)),
    ],
    ids=str,
)
def test_default_correction_layer(layers, start, expected):
    assert TidalDecode(sparse_layer_start=start).picking_layers(layers) == expected


def test_defaults():
    policy = TidalDecode()
    assert (policy.k, policy.sparse_layer_start, policy.correction_layer, policy.correct_every) == (256, 2, None, 0)
    assert TidalDecode.at_budget(64) == TidalDecode(k=64)
    assert TidalDecode.takes_budget and kvpress.make_policy("tidal_decode") == policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k=0 is too small"),
        ({"k": 1.5}, "k=1.5 is above 1"),
        ({"k": "many"}, "k='many' is a str"),
        ({"sparse_layer_start": -1}, "sparse_layer_start=-1 does not work; give an int of at least 0"),
        ({"correction_layer": 2}, "correction_layer=2 is not after sparse_layer_start=2"),
        ({"correction_layer": 1, "sparse_layer_start": 5}, "correction_layer=1 is not after sparse_layer_start=5"),
        ({"correction_layer": 0.4}, "correction_layer=0.4 does not work"),
        ({"correct_every": -1}, "correct_every=-1 does not work"),
        ({"correct_every": True}, "correct_every=True does not work"),
    ],
    ids=str,
)
def test_bad_values(fields, message):
    with pytest.raises(PolicyError, match=message.replace("(", r"\(")) as caught:
        TidalDecode(**fields)
    assert "\n" not in str(caught.value)


def test_a_model_without_the_layer_is_refused():
    model = sharp_llama()
    with pytest.raises(PolicyError, match=r"sparse_layer_start=2 picks in no layer of a model with 2 .*at most 1"):
        kvpress.patch(model, TidalDecode())
    kvpress.patch(model, TidalDecode(sparse_layer_start=1)).unpatch()
