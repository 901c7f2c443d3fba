"""Kascade: how much is picked and by whom, what prompts and steps read, and the search for anchors."""

from itertools import combinations, product
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kvpress
from kvpress import PolicyError
from kvpress.calibrate import fit, write_policy
from kvpress.cli import app
from kvpress.policies import H2O, AdaKV, Full, Kascade, PyramidKV, Quest, SnapKV, StreamingLLM, XAttention
from kvpress.policies.kascade import choose_anchors, covered
from kvpress.policy import Attended, View
from kvpress.registry import make_policies
from oracles import h2o, kascade, pyramid_kv, snapkv, streaming_llm
from support.matrix import kept, prompt, sharp_llama
from support.reads import run, watch
from support.sparse_prompts import check_chunks, check_padded_turns, check_rows
from support.tiny_saved import byte_tokenizer, tiny_model

LAYERS = 5
MAP = [[0, 1], [1, 1], [0, 1], [0, 1], [1, 0]]
SMALL: dict[str, Any] = {"k": 6, "tile": 4, "anchors": [0, 2, 3], "head_map": MAP}
PASSES = [prompt(26), *([token] for token in prompt(5, 1)), prompt(13, 2), *([token] for token in prompt(3, 3))]
STEPS = [*range(26, 31), *range(44, 47)]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=LAYERS)


def cascade(model, over=None, **fields):
    return kascade.Cascade(model, kascade.Kascade(**fields, **({"over": over} if over else {})))


def view_of(query, keys, **fields):
    """A layer in which every slot holds the entry of its number, and the rows are the last ones."""
    batch, kv_heads, n = keys.shape[:3]
    defaults = {
        "layer": 1,
        "layers": 2,
        "valid": None,
        "seen": torch.full((batch,), n),
        "scale": 1.0,
        "softcap": None,
        "turn": None,
        "state": {},
        "shared": {},
        "length": n,
        "newest": n - 1,
        "places": n,
        "aligned": True,
    }
    positions = torch.arange(n, dtype=torch.int32).expand(batch, kv_heads, n)
    return View(**{**defaults, "query": query, "positions": positions, "fetch": lambda: keys, **fields})


def random_heads(rows, n, seed=0, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, kv_heads, n, 8, generator=generator)
    return torch.randn(1, heads, rows, 8, generator=generator), keys


def most_attended(query, keys, count, softcap=None):
    """For each kv head the entries before the rows with the most attention, in float64, by a full sort."""
    rows, n, group = query.shape[2], keys.shape[2], query.shape[1] // keys.shape[1]
    found = []
    for head, own in enumerate(keys[0].double()):
        scores = query[0, head * group : (head + 1) * group].double() @ own.T
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        mass = scores.masked_fill(torch.ones(rows, n).triu(n - rows + 1) > 0, float("-inf")).softmax(-1).sum((0, 1))
        order = sorted(range(n - rows), key=lambda entry, mass=mass: -mass[entry].item())
        found.append(sorted(order[:count]))
    return found


# ---------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("n", "whole", "before"), [(100, 100, 68), (1000, 128, 96), (2000, 200, 168), (8192, 819, 787)]
)
def test_how_much_is_read(n, whole, before):
    """A tenth, at least 128; of these the tile's own 32."""
    policy = Kascade(anchors=[0, 1])
    assert policy.width(n) == whole
    query, keys = random_heads(32, n)
    pattern = policy.plan(view_of(query, keys))
    if whole == n:
        assert pattern is None
        return
    assert pattern.index.shape[2] == whole and pattern.member is None
    assert pattern.index[0, 0, before:].tolist() == list(range(n - 32, n))
    assert [head[:before] for head in pattern.index[0].tolist()] == most_attended(query, keys, before)
    selected = policy.select(view_of(query[:, :, -1:], keys))
    picked = most_attended(query[:, :, -1:], keys, whole - 1)
    assert selected.index[0].tolist() == [[*head, n - 1] for head in picked]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_soft_capping(softcap):
    """Sums over a group change their order with it."""
    query, keys = random_heads(3, 40, seed=3)
    policy = Kascade(k=9, tile=3, anchors=[0, 1])
    pattern = policy.plan(view_of(query, keys, softcap=softcap))
    assert [head[:6] for head in pattern.index[0].tolist()] == most_attended(query, keys, 6, softcap)
    selected = policy.select(view_of(query[:, :, -1:], keys, softcap=softcap))
    assert [head[:-1] for head in selected.index[0].tolist()] == most_attended(query[:, :, -1:], keys, 8, softcap)


def test_equal_entries():
    """The earlier ones are picked, and the newest one in any case."""
    zeros = torch.zeros(1, 1, 1, 4)
    policy = Kascade(k=3, tile=1, anchors=[0, 1])
    assert policy.select(view_of(zeros, zeros.expand(1, 1, 9, 4))).index.tolist() == [[[0, 1, 8]]]
    assert policy.plan(view_of(zeros, zeros.expand(1, 1, 9, 4))).index.tolist() == [[[0, 1, 8]]]


def test_a_tile_without_room_reads_itself():
    """A share of a short prompt may be less than a tile."""
    query, keys = random_heads(4, 10)
    pattern = Kascade(k=0.2, least=1, tile=4, anchors=[0, 1]).plan(view_of(query, keys))
    assert pattern.index.tolist() == [[[6, 7, 8, 9]] * 2]


def test_anchors_by_hand():
    gain = torch.tensor([[1, 0.9, 0.5, 0.4], [0, 1, 0.8, 0.7], [0, 0, 1, 0.95], [0, 0, 0, 1]])
    for count, total, anchors in ((1, 2.8, (0,)), (2, 3.85, (0, 2)), (3, 3.95, (0, 1, 2)), (4, 4.0, (0, 1, 2, 3))):
        found = choose_anchors(gain, count)
        assert found == (pytest.approx(total), anchors)


def test_anchors_are_the_best():
    """Of all sets; of equal ones the last anchor is the earliest."""
    for seed in range(20):
        gain = torch.rand(7, 7, generator=torch.Generator().manual_seed(seed)).triu()
        for count in range(1, 8):
            sums = {}
            for rest in combinations(range(1, 7), count - 1):
                anchors = (0, *rest)
                sums[anchors] = sum(gain[max(a for a in anchors if a <= layer), layer].item() for layer in range(7))
            total, anchors = choose_anchors(gain, count)
            assert total == pytest.approx(max(sums.values()), abs=1e-9) and sums[anchors] == pytest.approx(total)
    assert choose_anchors(torch.ones(4, 4), 3)[1] == (0, 1, 2)


def test_coverage_by_hand():
    """Of (.3, .3, .2, .1, .1) the best two hold .2 of (.1, .1, .1, .3, .4), whose own best two hold .7."""
    shares = torch.tensor([[0.3, 0.3, 0.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.3, 0.4]])
    key = torch.cat((shares.log(), torch.full((2, 1), -60.0)), dim=1)[None, :, :, None]
    query = torch.zeros(1, 2, 6, 1)
    query[:, :, 5] = 1  # rows before it look at all alike, and so pick the same
    layer = Attended(query, key, 1.0, None, 0.0)
    found = covered([layer], tile=1, k=3)
    assert found.shape == (1, 2, 1, 2)
    assert found[0, 0, 0, 1].item() == pytest.approx(0.2 / 0.7, abs=1e-6) == pytest.approx(0.285714, abs=1e-6)
    assert found[0, 1, 0, 0].item() == pytest.approx(0.2 / 0.6, abs=1e-6)
    assert found[0, 0, 0, 0] == found[0, 1, 0, 1] == 1


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    policy = Kascade()
    assert (policy.k, policy.least, policy.tile, policy.anchors, policy.head_map) == (0.1, 128, 32, None, None)
    assert policy.roles == ("selection", "prefill") and not policy.leaves_prompts_exact and policy.chunk == 32
    prompts_exact = Kascade(decode_only=True)
    assert prompts_exact.leaves_prompts_exact and prompts_exact.chunk is None
    assert kvpress.make_policy({"name": "kascade", "anchors": [0, 3]}) == Kascade(anchors=(0, 3))
    assert hash(Kascade(**SMALL)) == hash(Kascade(**{**SMALL, "anchors": (0, 2, 3)}))
    assert Kascade.at_budget(0.2) == Kascade(k=0.2, least=1)
    assert Kascade.at_budget(16) == Kascade(k=16, least=1, tile=8)
    assert Kascade.at_budget(1) == Kascade(k=1, least=1, tile=1, decode_only=True)


@pytest.mark.parametrize(
    ("layers", "anchors"),
    [
        (32, [0, 2, 8, 13, 14]),
        (36, [0, 2, 7, 14, 23]),
        (30, [0, 2, 6, 12, 18]),
        (5, [0, 1, 2, 3]),
        (2, [0, 1]),
        (1, [0]),
    ],
)
def test_default_anchors(layers, anchors):
    assert sorted({Kascade().anchor_of(layer, layers) for layer in range(layers)}) == anchors


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"k": 0}, "k=0 is too small"),
        ({"k": 1.5}, "k=1.5 is above 1"),
        ({"k": 32}, r"k=32 has no room beside tile=32.*decode_only=True"),
        ({"least": 0}, "least=0 does not work"),
        ({"tile": 0}, "tile=0 does not work"),
        ({"tile": 16.0}, "tile=16.0 does not work"),
        ({"decode_only": 1}, "decode_only=1 does not work; give True or False"),
        ({"anchors": []}, r"anchors=\[\] is no list of layers"),
        ({"anchors": "found.json"}, "anchors='found.json' is no list of layers"),
        ({"anchors": [0, -2]}, r"anchors\[1\]=-2 does not work"),
        ({"anchors": [1, 2]}, r"anchors=\[1, 2\] does not begin with 0"),
        ({"anchors": [0, 2, 2]}, r"anchors=\[0, 2, 2\] does not begin with 0 and ascend"),
        ({"head_map": [[0]]}, "anchors is None; give both"),
        ({"anchors": [0], "head_map": 3}, "head_map=3 is no list of layers"),
        ({"anchors": [0], "head_map": [0, 1]}, r"head_map\[0\]=0 is no list"),
        ({"anchors": [0], "head_map": [[0, 1], [0, 2]]}, r"head_map\[1\]\[1\]=2 is no kv head of layer 0, .*has 2"),
        ({"anchors": [0], "head_map": [[0, 1], [0, "a"]]}, r"head_map\[1\]\[1\]='a' does not work"),
        ({"anchors": [0, 1], "head_map": [[0, 1], [1, 0]]}, r"head_map\[1\]=\[1, 0\], and layer 1 is an anchor"),
        ({"budget": 0.2, "k": 0.1}, "budget=0.2"),
    ],
    ids=str,
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason) as caught:
        kvpress.make_policy({"name": "kascade", **fields})
    assert "\n" not in str(caught.value)


def test_anchors_of_another_model(model):
    with pytest.raises(PolicyError, match=r"anchors names layer 7, and the model has 5 attention layers \(0 to 4\)"):
        kvpress.patch(model, Kascade(anchors=[0, 7]))
    with pytest.raises(PolicyError, match="head_map has 2 layers, and the model has 5 attention layers"):
        kvpress.patch(model, Kascade(anchors=[0], head_map=[[0, 1], [1, 0]]))
    for decode_only in (False, True):
        policy = Kascade(anchors=[0], head_map=[[0, 1, 2]] * LAYERS, decode_only=decode_only)
        with pytest.raises(PolicyError, match="head_map names 3 kv heads in layer 0, and the layer has 2"):
            run(model, policy, PASSES[:2])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([Kascade(), XAttention()], r"kascade\(\) and x_attention\(\) both play the role 'prefill'"),
        ([Kascade(), Quest()], r"kascade\(\) and quest\(\) both play the role 'selection'"),
        ([Kascade(), AdaKV(SnapKV())], r"ada_kv\(.*keeps another number of entries in each kv head, and kascade\(\)"),
        ([Kascade(), H2O(rope="reindex")], r"kascade\(\) compares queries with rotated keys"),
        ([Kascade(), H2O(evict="each_row")], r"h2o\(.*attends a prompt row by row, and kascade\(\) plans"),
    ],
    ids=lambda value: "+".join(p.name for p in value) if isinstance(value, list) else "",
)
def test_refused_pairs(spec, reason):
    with pytest.raises(PolicyError, match=reason):
        make_policies(spec)


# ---------------------------------------------------------------------------------------------------- on a model


@pytest.mark.parametrize(
    "fields",
    [{}, {"head_map": None}, {"anchors": [0], "head_map": None}, {"k": 0.3, "least": 5}, {"decode_only": True}],
    ids=["map", "own heads", "one anchor", "share", "decode only"],
)
def test_prompts_and_steps(model, fields, monkeypatch):
    """What is read in every step, layer and query head, and all logits, in two turns."""
    fields = {**SMALL, **fields}
    log = watch(monkeypatch, Kascade)
    logits, _, report = run(model, Kascade(**fields), PASSES)
    oracle = cascade(model, **fields)
    check_rows(logits, oracle.run(PASSES))
    assert log == {key: heads for key, heads in oracle.log.items() if key[0] in STEPS and key[1] < LAYERS}
    assert (report.total.density < 0.8) != (fields.get("decode_only") is True)
    assert report.total.read_share < 0.8


@pytest.mark.parametrize("fields", [{"k": 500}, {"k": 1.0, "least": 1}, {"k": 0.1, "least": 500}], ids=str)
def test_room_for_everything(model, fields):
    expected, _, _ = run(model, Full(), PASSES)
    for more in ({}, {"anchors": None, "head_map": None}, {"decode_only": True}):
        logits, _, report = run(model, Kascade(**{**SMALL, **fields, **more}), PASSES)
        for one, other in zip(logits, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert report.total.read_share == report.total.density == 1


@pytest.mark.parametrize("cuts", [[26], [8, 18], [12, 8, 6], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts):
    """Tiles are counted from the first row of a pass: whole tiles at a time give what the whole prompt gives."""
    logits = check_chunks(model, Kascade(**SMALL), cascade(model, **SMALL), cuts)
    if all(sum(cuts[:i]) % 4 == 0 for i in range(len(cuts))):
        whole, _, _ = run(model, Kascade(**SMALL), [prompt(26)])
        torch.testing.assert_close(torch.cat(logits, dim=1), whole[0], atol=1e-5, rtol=1e-4)


SNAP: dict[str, Any] = {"budget": 14, "window": 4, "kernel_size": 3}


@pytest.mark.parametrize(
    ("evicts", "over"),
    [
        ([], None),
        ([SnapKV(**SNAP)], snapkv.SnapKV(**SNAP)),
        ([SnapKV(**SNAP, evict="after_prompt")], snapkv.SnapKV(**SNAP, evict="after_prompt")),
        ([H2O(heavy=8, recent=6)], h2o.H2O(heavy=8, recent=6)),
        (
            [StreamingLLM(sink=2, recent=12, rope="original")],
            streaming_llm.StreamingLLM(sink=2, recent=12, rope="original"),
        ),
    ],
    ids=str,
)
def test_beside_eviction_and_padding(model, evicts, over):
    """A second turn and the steps read what kv heads hold of another head's picks; padded sequences as they are alone."""
    oracle = cascade(model, over, **SMALL)
    logits, cache, _ = run(model, [Kascade(**SMALL), *evicts], PASSES)
    steps = oracle.run(PASSES)
    check_rows(logits, steps)
    assert kept(cache) == steps[-1].kept
    check_padded_turns(model, [Kascade(**SMALL), *evicts], oracle)


def test_layers_that_hold_different_numbers_of_entries(model):
    fields: dict[str, Any] = {"budget": 9, "window": 3, "kernel_size": 3, "beta": 4}
    runner = type("Pyramid", (kascade.Cascade, pyramid_kv.PyramidKV.runner), {})
    oracle = runner(model, kascade.Kascade(**SMALL, over=pyramid_kv.PyramidKV(**fields)))
    logits, cache, _ = run(model, [Kascade(**SMALL), PyramidKV(**fields)], PASSES)
    steps = oracle.run(PASSES)
    check_rows(logits, steps)
    assert kept(cache) == steps[-1].kept and len({len(layer[0]) for layer in steps[-1].kept}) > 1


def test_where_a_plan_does_not_fit_rows_are_exact(model):
    """Sinks that come nearer: a second turn is as without the policy."""
    evicts = StreamingLLM(sink=2, recent=12)
    passes = [prompt(20), [3], [4], prompt(13, 2)]  # only the last has more than 20
    expected, _, _ = run(model, evicts, passes)
    found, _, _ = run(model, [evicts, Kascade(**{**SMALL, "k": 20})], passes)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_one_anchor_serves_all(model, monkeypatch):
    """In every step the layers behind read what the first one picked, head by head."""
    log = watch(monkeypatch, Kascade)
    run(model, Kascade(k=6, tile=4, anchors=[0]), PASSES)
    for at in STEPS:
        assert log[at, 0] == [list(range(at + 1))] * 4
        assert all(log[at, layer] == log[at, 1] for layer in range(1, LAYERS))
        assert [len(head) for head in log[at, 1]] == [6] * 4 and log[at, 1][0] != log[at, 1][2]


def test_every_layer_an_anchor(model, monkeypatch):
    """Tiles of one row: each row of each layer reads its own k best entries and itself, the first layer all."""
    plans, original = [], Kascade.plan

    def seen(self, view):
        pattern = original(self, view)
        plans.append((view, pattern))
        return pattern

    monkeypatch.setattr(Kascade, "plan", seen)
    run(model, Kascade(k=5, tile=1, anchors=list(range(LAYERS))), PASSES[:1])
    assert len(plans) == 26 * LAYERS
    for view, pattern in plans:
        n = view.keys.shape[2]
        if view.layer == 0 or n <= 5:
            assert pattern is None
            continue
        best = most_attended(view.query * view.scale, view.keys, 4)
        assert pattern.index[0].tolist() == [[*head, n - 1] for head in best]


def test_renumbered_heads(model):
    """The heads of a layer in another order, with that order in the map, say the same."""
    other = sharp_llama(layers=LAYERS)
    attention = other.model.layers[4].self_attn
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.copy_(linear.weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (2, -1)).flip(1).flatten(1, 2))
    fields = {**SMALL, "head_map": [*MAP[:4], [1, 1]]}
    for mine, theirs in (([1, 0], [0, 1]), ([1, 1], [1, 1]), ([0, 1], [1, 0])):
        one, _, _ = run(model, Kascade(**{**fields, "head_map": [*MAP[:4], mine]}), PASSES)
        two, _, _ = run(other, Kascade(**{**fields, "head_map": [*MAP[:4], theirs]}), PASSES)
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_is_counted(model):
    """Pairs of tiles of 4 rows, of which an anchor but the first layer and the layers after it read 6; and of steps 6 of 27."""
    _, _, report = run(model, Kascade(**SMALL), PASSES[:2])
    there = 26 * 27 / 2
    tiles = [(start, min(4, 26 - start)) for start in range(0, 26, 4)]
    computed = sum(min(6 - rows, start) * rows + rows * (rows + 1) / 2 for start, rows in tiles)
    assert report.layers[0].density == 1
    assert all(report.layers[layer].density == pytest.approx(computed / there) for layer in range(1, LAYERS))
    shares = {0: 1.5, 1: 6 / 27, 2: 6 / 27 + 0.5, 3: 6 / 27 + 0.5, 4: 6 / 27}
    assert {layer: one.read_share for layer, one in report.layers.items()} == pytest.approx(shares)


def test_bfloat16_is_finite():
    model = sharp_llama(layers=LAYERS).to(torch.bfloat16)
    logits, _, _ = run(model, Kascade(**SMALL), PASSES)
    assert all(one.isfinite().all() for one in logits)
    assert not torch.equal(logits[0], run(model, Full(), PASSES)[0][0])


# ---------------------------------------------------------------------------------------------------- the search


def test_the_search(model):
    """Anchors and heads by plain loops over the attention of an unpatched model."""
    prompts = [prompt(30, 5), prompt(23, 6)]
    found = fit(model, Kascade(k=6, tile=4), prompts)
    assert (found.k, found.tile) == (6, 4) and "generate" not in vars(model)
    likeness, weight = torch.zeros(LAYERS, 2, LAYERS, 2, dtype=torch.float64), torch.zeros(LAYERS, dtype=torch.float64)
    for ids in prompts:
        one, turns = by_hand(ids)
        likeness, weight = likeness + one / 2, weight + turns / 2
    gain = weight * likeness.amax(1).mean(-1)
    best = [
        max(
            sum(gain[max(a for a in (0, *rest) if a <= layer), layer].item() for layer in range(LAYERS))
            for rest in combinations(range(1, LAYERS), count - 1)
        )
        for count in range(1, LAYERS + 1)
    ]
    count = next(count for count in range(3, LAYERS + 1) if best[count - 1] >= 0.98 * best[-1])
    total, anchors = choose_anchors(gain, count)
    assert total == pytest.approx(best[count - 1]) and found.anchors == anchors and len(anchors) == count
    for layer, heads in enumerate(found.head_map):
        anchor = max(a for a in anchors if a <= layer)
        if anchor == layer:
            assert heads == (0, 1)
        for head, source in enumerate(heads):
            assert likeness[anchor, source, layer, head] == likeness[anchor, :, layer, head].max()


@torch.no_grad()
def by_hand(ids, tile=4):
    """What picks hold of attention, and how far attention turns the stream, from transformers' own attention weights."""
    model = sharp_llama(layers=LAYERS)
    model.set_attn_implementation("eager")
    added = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, output: added.append(output[0]))
    output = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    streams = output.hidden_states[:LAYERS]
    turns = [1 - torch.cosine_similarity(x, x + y, dim=-1).mean().item() for x, y in zip(streams, added, strict=True)]
    weights = [one[0].double().unflatten(0, (2, 2)).sum(1) for one in output.attentions]  # [kv heads, rows, entries]
    n = len(ids)
    likeness = torch.ones(LAYERS, 2, LAYERS, 2, dtype=torch.float64)
    for start in range(tile, n, tile):
        mass = torch.stack([one[:, start : start + tile].sum(1) for one in weights])
        own = mass[..., start:].sum(-1)
        picks = [[sorted(range(start), key=lambda j, m=m: -m[j].item())[:tile] for m in heads] for heads in mass]
        for a, b in product(product(range(LAYERS), range(2)), repeat=2):
            held = sum(mass[b][j].item() for j in picks[a[0]][a[1]]) + own[b].item()
            best = sum(mass[b][j].item() for j in picks[b[0]][b[1]]) + own[b].item()
            likeness[(*a, *b)] = min(likeness[(*a, *b)], held / best)
    return likeness, torch.tensor(turns, dtype=torch.float64)


def test_the_file(model, tmp_path):
    """Written with a list in a line, and read again as the same policy; for this model only."""
    path = tmp_path / "found.yaml"
    write_policy(path, Kascade(**SMALL))
    assert "anchors: [0, 2, 3]\nhead_map:\n- [0, 1]\n- [1, 1]\n" in path.read_text()
    with kvpress.patch(model, path) as handle:
        assert handle.policies[0] == Kascade(**SMALL)
    with pytest.raises(PolicyError, match="anchors names layer 3, and the model has 2 attention layers"):
        kvpress.patch(sharp_llama(layers=2), path)


def test_what_cannot_be_searched(model):
    with pytest.raises(PolicyError, match="a prompt of 64 tokens has no more than the 64 that are picked"):
        fit(model, Kascade(), [prompt(64)])
    with pytest.raises(PolicyError, match="there is no prompt"):
        fit(model, Kascade(), [])
    with pytest.raises(PolicyError, match="quest is not fitted to a model"):
        fit(model, Quest(), [prompt(40)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_command(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    small = tiny_model(tokenizer)
    monkeypatch.setattr("kvpress.cli.load", lambda *_: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", "--policy", "kascade", "--lengths", "400", "--samples", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", "found.yaml"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "kascade(anchors=(0," in said and said.endswith("written to found.yaml")
    written = yaml.safe_load((tmp_path / "found.yaml").read_text())
    layers = small.config.num_hidden_layers
    assert written["anchors"][0] == 0 and len(written["head_map"]) == layers
    with kvpress.patch(small, tmp_path / "found.yaml"):
        small(torch.tensor([prompt(300)]))
    short = CliRunner().invoke(app, ["calibrate", "--policy", "kascade", "--lengths", "10", "--samples", "1"])
    assert short.exit_code == 2
