"""MInference: its patterns by hand and on a model, pattern files, and the search for them."""

import json
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kvpress
from kvpress import PolicyError
from kvpress.calibrate import calibrate_heads
from kvpress.cli import app
from kvpress.kernels.block_sparse_attention import listed_keys
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass
from kvpress.policies import FlexPrefill, Full, MInference, SnapKV
from kvpress.policies.minference import HeadPattern
from kvpress.registry import make_policies
from oracles import minference, snapkv
from support.matrix import prompt, sharp_llama
from support.reads import run
from support.sparse_prompts import check_chunks, check_padded_turns, check_rows
from support.tiny_saved import byte_tokenizer, tiny_model

SIZES: dict[str, Any] = {"sink": 1, "recent": 2, "probe": 4, "n_last": 3, "block_size": 4}
PATTERNS = [
    {0: ["a_shape", 2, 3], 2: ["block_sparse", 2]},
    {0: ["vertical_slash", 3, 6], 1: ["tri_shape", 1, 4], 3: ["dense"]},
]
SMALL = {**SIZES, "patterns": PATTERNS, "default": ["vertical_slash", 2, 4]}
PASSES = [prompt(26), *([token] for token in prompt(5, 1)), prompt(13, 2), *([token] for token in prompt(3, 3))]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=2)


def pairs(policy, patterns, query, keys):
    """What each head's rows read: bool [heads, rows, n]."""
    found = policy.lists(query, keys, [HeadPattern(*one) for one in patterns], scale=1.0, softcap=None)
    rows, n = query.shape[2], keys.shape[2]
    if found is None:
        return torch.ones(query.shape[1], rows, n, dtype=torch.bool).tril(n - rows)
    return listed_keys(rows, n, query.shape[1], block_size=found.block_size, **found.lists)[0]


def at_distance(n, distance, strength=30.0):
    """Query and keys [1, 1, n, n] of which each row looks at the entry at that distance."""
    keys = torch.eye(n)[None, None] * strength
    return keys.roll(distance, dims=2), keys


# ---------------------------------------------------------------------------------------------------- by hand


def test_tiles_and_single_distances():
    """16 entries, tiles of 4, column 0, distances 0 and 5: 41 pairs by themselves, 96 in tiles, which hold the 41."""
    query, keys = at_distance(16, 5)
    fields: dict[str, Any] = {"sink": 1, "recent": 1, "probe": 4, "block_size": 4}
    tile, exact = (
        pairs(MInference(expand=expand, **fields), [("vertical_slash", 1, 2)], query, keys)[0]
        for expand in ("tile", "exact")
    )
    assert (exact.sum(), tile.sum()) == (41, 96) and (tile | ~exact).all()
    apart = torch.arange(16)[:, None] - torch.arange(16)
    assert torch.equal(exact, ((apart == 0) | (apart == 5) | (torch.arange(16) == 0)) & (apart >= 0))


def test_the_best_column_and_the_best_distance():
    """Rows that look at entry 3 and at the one that is 7 before them, before anything is forced."""
    keys = torch.eye(24)[None, None] * 30
    query = (keys.roll(7, dims=2) + keys[:, :, 3:4])[:, :, 12:]
    by_entry, by_distance = vertical_slash_mass(query, keys, scale=1.0)
    assert (by_entry.argmax().item(), by_distance.argmax().item()) == (3, 7)


@pytest.mark.parametrize("expand", ["tile", "exact"])
def test_shapes(expand):
    """What each kind reads of 24 entries in blocks of 4, beside what has to be read at any rate."""
    query, keys = (torch.randn(1, 1, 24, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    policy = MInference(expand=expand, **SIZES)
    apart, place = torch.arange(24)[:, None] - torch.arange(24), torch.arange(24)
    causal = apart >= 0
    a_shape = ((place < 2) | (apart < 5)) & causal
    found = pairs(policy, [("a_shape", 2, 5)], query, keys)[0]
    assert not (a_shape & ~found).any()
    if expand == "exact":
        assert torch.equal(found, a_shape)
    else:  # the window of a block is that of all its rows
        assert torch.equal(found, ((place < 2) | (place > (place // 4 * 4 - 5)[:, None])) & causal)
    tri_shape = pairs(policy, [("tri_shape", 2, 5)], query, keys)[0]
    assert torch.equal(tri_shape[20:], causal[20:]) and torch.equal(tri_shape[:20], found[:20])
    slashes = pairs(policy, [("vertical_slash", 0, 0)], query, keys)[0]
    assert slashes[:, 0].all() and (slashes | (apart > 1) | ~causal).all()
    blocks = pairs(policy, [("block_sparse", 2)], query, keys)[0]
    assert torch.equal(blocks.sum(1), torch.minimum(place + 1, 5 + place % 4))
    assert (blocks | (place[:, None] // 4 != place // 4) | ~causal).all()


def test_block_means_by_hand():
    """The nearest of four blocks of two, with and without the rows' own."""
    keys = torch.tensor([[1.0], [0.0], [3.0], [5.0], [2.0], [2.0], [0.0], [0.0], [1.0]]).view(1, 1, 9, 1)
    for force, rows in ((True, [1, 0, 0, 0, 0, 0, 1, 1, 1]), (False, [0, 0, 1, 1, 0, 0, 0, 0, 1])):
        policy = MInference(block_size=2, force_diagonal=force)
        found = pairs(policy, [("block_sparse", 2 if force else 1)], keys[:, :, -1:], keys)[0]
        assert found[-1].int().tolist() == ([0, 0, 1, 1, 0, 0, 0, 0, 1] if force else rows)


@pytest.mark.parametrize("expand", ["tile", "exact"])
@pytest.mark.parametrize(
    "pattern",
    [
        ("vertical_slash", 24, 0),
        ("vertical_slash", 0, 24),
        ("block_sparse", 6),
        ("a_shape", 10, 14),
        ("tri_shape", 0, 24),
        ("dense",),
    ],
    ids=str,
)
def test_room_for_everything_is_dense(pattern, expand):
    """Also beside a head that reads less, where the lists have it all."""
    query, keys = (torch.randn(1, 2, 24, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    policy = MInference(expand=expand, **SIZES)
    assert policy.lists(query, keys, [HeadPattern(*pattern)] * 2, scale=1.0, softcap=None) is None
    found = pairs(policy, [pattern, ("a_shape", 1, 1)], query, keys)
    assert found[0].sum() == 24 * 25 / 2 and found[1].sum() < 24 * 25 / 2


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    policy = MInference()
    assert policy.of_layer(7, 2) == [HeadPattern("vertical_slash", 1000, 6096)] * 2
    assert (policy.sink, policy.recent, policy.probe, policy.n_last, policy.block_size) == (30, 100, 64, 100, 64)
    assert (policy.expand, policy.starting_layer, policy.force_diagonal, policy.min_len) == ("tile", -1, True, 0)
    assert policy.roles == ("prefill",) and policy.kind == "sparse prompt" and policy.describe() == "minference()"
    assert hash(MInference(**SMALL)) == hash(MInference(**SMALL))
    assert kvpress.make_policy({"name": "minference", "patterns": PATTERNS}) == MInference(patterns=PATTERNS)


def test_files(tmp_path):
    """As the search writes them, and as the authors ship them; the same patterns make the same policy."""
    own, theirs = tmp_path / "own.json", tmp_path / "theirs.json"
    own.write_text(json.dumps([{"0": ["a_shape", 2, 3, 0.25]}, {"1": ["vertical_slash", 30, 40], "0": ["dense"]}]))
    theirs.write_text(
        json.dumps([{"0": ["stream_llm", 2, 3, 1]}, {"0": ["dense", 0], "1": ["vertical_and_slash", 30, 40, 9]}])
    )
    policy = MInference(patterns=own)
    assert policy == MInference(patterns=str(theirs))
    assert policy.of_layer(0, 2) == [HeadPattern("a_shape", 2, 3), HeadPattern("vertical_slash", 1000, 6096)]
    assert policy.of_layer(1, 2) == [HeadPattern("dense"), HeadPattern("vertical_slash", 30, 40)]
    again = kvpress.make_policy(yaml.safe_load(yaml.safe_dump(kvpress.registry.policy_spec(policy))))
    assert again == policy and len(policy.describe()) < 150


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"patterns": "none.json"}, "patterns='none.json' cannot be read: No such file"),
        ({"patterns": 3}, "patterns has no list of layers but a int"),
        ({"patterns": []}, "patterns has no list of layers"),
        ({"patterns": [3]}, "patterns, layer 0: give an object of heads"),
        ({"patterns": [{"a": ["dense"]}]}, "patterns, layer 0: head 'a' is no number"),
        ({"patterns": [{"0": ["dense"]}, {"5": ["b_shape", 3]}]}, "patterns, layer 1, head 5.*'b_shape'.*'a_shape'"),
        ({"patterns": [{"0": ["a_shape", 3]}]}, "layer 0, head 0.* has 1 of the 2 sizes of a_shape"),
        ({"patterns": [{"0": ["a_shape", 3, 0]}]}, "layer 0, head 0.*size 2=0.*at least 1"),
        ({"patterns": [{"0": ["block_sparse", 0.5]}]}, "layer 0, head 0.*size 1=0.5"),
        ({"default": "dense"}, "default='dense' is no pattern"),
        ({"default": ["vertical_slash", -1, 4]}, "default's size 1=-1"),
        ({"expand": "blocks"}, "expand='blocks'.*'tile', 'exact'"),
        ({"sink": -1}, "sink=-1"),
        ({"recent": 0}, "recent=0"),
        ({"probe": 0}, "probe=0"),
        ({"n_last": 0}, "n_last=0"),
        ({"block_size": 48}, "block_size=48 is no power of two"),
        ({"starting_layer": -2}, "starting_layer=-2"),
        ({"min_len": -1}, "min_len=-1"),
    ],
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        kvpress.make_policy({"name": "minference", **fields})


def test_a_file_that_is_no_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("- a: 3")
    with pytest.raises(PolicyError, match=r"patterns file .*a.json is no JSON"):
        MInference(patterns=path)


def test_patterns_of_another_model(model):
    with pytest.raises(PolicyError, match="patterns has 3 layers, and the model has 2 attention layers"):
        kvpress.patch(model, MInference(patterns=[{}] * 3))
    with (
        kvpress.patch(model, MInference(patterns=[{}, {"4": ["dense"]}], **SIZES)),
        pytest.raises(PolicyError, match="patterns names head 4 of layer 1, and the layer has 4 query heads"),
    ):
        model(torch.tensor([prompt(20)]))


# ---------------------------------------------------------------------------------------------------- on a model


def shaped(model, over=None, **fields):
    return minference.Shaped(model, minference.MInference(**fields, **({"over": over} if over else {})))


@torch.no_grad()
@pytest.mark.parametrize("expand", ["tile", "exact"])
@pytest.mark.parametrize("force_diagonal", [True, False], ids=["forced", "free"])
def test_heads_of_all_kinds(model, expand, force_diagonal):
    """Each head by its own pattern, in a prompt and in a later turn."""
    fields = {**SMALL, "expand": expand, "force_diagonal": force_diagonal}
    logits, _, _ = run(model, MInference(**fields), PASSES)
    oracle = shaped(model, **fields)
    check_rows(logits, oracle.run(PASSES))
    assert [len(read) < 26 for read in oracle.log[1, 25]] == [True, False, True, False]


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{"starting_layer": 1}, {"min_len": 30}, {"patterns": None}], ids=["layers", "short", "default"]
)
def test_where_it_acts(model, fields):
    logits, _, _ = run(model, MInference(**{**SMALL, **fields}), PASSES)
    check_rows(logits, shaped(model, **{**SMALL, **fields}).run(PASSES))


@torch.no_grad()
def test_room_for_everything_on_a_model(model):
    ids = torch.tensor([prompt(41)])
    dense = model(ids).logits
    with kvpress.patch(model, MInference()):  # 41 entries are within the 100 nearest
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[8, 18], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts):
    """Tiles are counted from the first entry, and each pass has a probe of its own."""
    check_chunks(model, MInference(**SMALL), shaped(model, **SMALL), cuts)


def test_beside_eviction_and_padding(model):
    policies = [MInference(**SMALL), SnapKV(budget=14, window=4, kernel_size=3)]
    oracle = shaped(model, snapkv.SnapKV(budget=14, window=4, kernel_size=3), **SMALL)
    check_padded_turns(model, policies, oracle)


def test_bfloat16_is_finite():
    model = sharp_llama(layers=2).to(torch.bfloat16)
    for policy in (MInference(**SMALL), MInference(**SMALL, expand="exact")):
        assert all(one.isfinite().all() for one in run(model, policy, PASSES)[0])
    assert not torch.equal(run(model, policy, PASSES)[0][0], run(model, Full(), PASSES)[0][0])


# ---------------------------------------------------------------------------------------------------- the search

CANDIDATES = (("a_shape", 2, 4), ("vertical_slash", 2, 4), ("block_sparse", 3))


def attend(query, keys, values, mask):
    scores = (query @ keys.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ values


def test_what_candidates_lose():
    """Errors and recalls of heads, from the masks and float64 attention."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    policy = MInference(**SIZES, candidates=CANDIDATES)
    error, recall = policy.try_heads(query, key, value, scale=1.0, softcap=None, sinks=None)
    wide = [x.double().repeat_interleave(2, dim=1) for x in (key, value)]
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    dense = attend(query.double(), *wide, causal)
    kept = (query.double() @ wide[0].transpose(-1, -2)).masked_fill(~causal, float("-inf")).softmax(-1)
    for at, candidate in enumerate(CANDIDATES):
        mask = pairs(policy, [candidate] * 4, query, key)
        off = attend(query.double(), *wide, mask) - dense
        expected = off.square().sum((0, 2, 3)).sqrt() / dense.square().sum((0, 2, 3)).sqrt()
        torch.testing.assert_close(error[at], expected.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(recall[at], (kept * mask).sum(-1)[0, :, 20:].mean(-1).float(), atol=1e-5, rtol=1e-4)


def test_the_search_finds_each_heads_pattern(model):
    """The least error, or the most recall, over two prompts; as with a policy of that pattern alone."""
    policy = MInference(**SIZES, candidates=CANDIDATES)
    prompts = [prompt(40), prompt(33, 1)]
    for metric in ("error", "recall"):
        found = calibrate_heads(model, policy, prompts, metric)
        assert [len(heads) for heads in found] == [4, 4]
        tried = []
        for ids in prompts:
            recorded = kvpress.record_prompt(model, torch.tensor([ids]))
            tried.append([policy.try_heads(*layer[:3], **vars(layer[3])) for layer in recorded.layers])
        for layer, heads in enumerate(found):
            error, recall = (torch.stack([one[layer][at] for one in tried]).mean(0) for at in range(2))
            best = error.argmin(0) if metric == "error" else recall.argmax(0)
            assert [tuple(one.value)[: len(CANDIDATES[at])] for one, at in zip(heads, best, strict=True)] == [
                CANDIDATES[at] for at in best
            ]
            for head, one in enumerate(heads):
                assert one.error == pytest.approx(error[best[head], head].item(), abs=1e-6)
                assert one.recall == pytest.approx(recall[best[head], head].item(), abs=1e-6)


def test_what_cannot_be_searched(model):
    with pytest.raises(PolicyError, match=r"candidates: \['a_shape', 1024, 4096\] reads all of a prompt of 40 tokens"):
        calibrate_heads(model, MInference(), [prompt(40)])
    with pytest.raises(PolicyError, match="metric='mass'"):
        calibrate_heads(model, MInference(), [prompt(40)], "mass")
    with pytest.raises(PolicyError, match="there is no prompt"):
        calibrate_heads(model, MInference(), [])
    with pytest.raises(PolicyError, match="full has nothing to choose head by head"):
        calibrate_heads(model, Full(), [prompt(40)])
    for fields, reason in (
        ({"candidates": []}, "has no patterns"),
        ({"candidates": [["b"]]}, r"candidates\[0\]'s kind"),
    ):
        with pytest.raises(PolicyError, match=reason):
            MInference(**fields)


def test_the_command(tmp_path, monkeypatch):
    """From the options to both files, and a model that runs with them."""
    tokenizer = byte_tokenizer()
    small = tiny_model(tokenizer)
    monkeypatch.setattr("kvpress.cli.load", lambda *_: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    given = {
        "name": "minference",
        "candidates": [["a_shape", 4, 100], ["vertical_slash", 30, 100], ["block_sparse", 2]],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    arguments = ["calibrate", "--policy", "mine.yaml", "--lengths", "400", "--samples", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", "found.yaml"])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "found.json").read_text())
    assert all(pattern[-1] >= 0 for heads in table for pattern in heads.values())
    with kvpress.patch(small, tmp_path / "found.yaml") as handle:
        assert handle.policies[0] == MInference(patterns=table, candidates=given["candidates"])
        small(torch.tensor([prompt(300)]))
    for name in ("found.json", "found.yaml"):  # the second names the first, wherever both are
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert kvpress.make_policy(tmp_path / "elsewhere" / "found.yaml").patterns == handle.policies[0].patterns
    short = CliRunner().invoke(app, ["calibrate", "--policy", "minference", "--lengths", "400", "--samples", "1"])
    assert short.exit_code == 2 and "reads all of a prompt of 400 tokens" in " ".join(short.output.split())


def test_refused_pairs():
    with pytest.raises(PolicyError, match=r"minference\(\) and flex_prefill\(\) both play the role 'prefill'"):
        make_policies([MInference(), FlexPrefill()])
