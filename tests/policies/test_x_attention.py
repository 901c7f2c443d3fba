"""XAttention: the estimate, the choice of blocks, and what a prompt's rows read."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kvpress
from kvpress import PolicyError
from kvpress.calibrate import fit, write_table
from kvpress.cli import app
from kvpress.kernels.antidiagonal_mass import antidiagonal_mass
from kvpress.policies import A2SF, H2O, AdaKV, Full, Quest, SnapKV, StreamingLLM, TidalDecode, TokenSelect, XAttention
from kvpress.policies.x_attention import best_blocks
from kvpress.policy import Attended
from kvpress.registry import make_policies
from oracles import h2o, snapkv, streaming_llm, x_attention
from support.matrix import kept, prompt, sharp_llama
from support.reads import run
from support.sparse_prompts import check_chunks, check_padded_turns, check_rows
from support.tiny_saved import byte_tokenizer, tiny_model

SMALL: dict[str, Any] = {"stride": 2, "threshold": 0.5, "block_size": 4}
PASSES = [prompt(26), *([token] for token in prompt(5, 1)), prompt(13, 2), *([token] for token in prompt(3, 3))]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=2)


def mass_of(query, keys, **fields):
    """Of one head: lists [n][d], the rows being the last entries."""
    query, keys = (torch.tensor(x, dtype=torch.float32)[None, None] for x in (query, keys))
    return antidiagonal_mass(query, keys, **{"scale": 1.0, **fields})[0, 0]


def chosen(mass, *thresholds):
    """The blocks of each block of rows, per head."""
    found = best_blocks(mass, thresholds)[0]
    return [[sorted(one for one in row if one >= 0) for row in head] for head in found.tolist()]


# ---------------------------------------------------------------------------------------------------- by hand


def test_antidiagonal_by_hand():
    """z(1, 0) = 2 * 1 + 1 * 3 = 5, so half of it against the 0 of the diagonal cell."""
    mass = mass_of([[0.0], [0.0], [1.0], [2.0]], [[1.0], [3.0], [0.0], [0.0]], stride=2, block_size=2)
    torch.testing.assert_close(mass, torch.tensor([[1.0, 0.0], [0.924142, 0.075858]]), atol=1e-6, rtol=0)


def test_uniform_rows():
    zeros = [[0.0]] * 16
    mass = mass_of(zeros, zeros, stride=2, block_size=4)
    expected = [
        [2.0, 0.0, 0.0, 0.0],
        [1.166667, 0.833333, 0.0, 0.0],
        [0.733333, 0.733333, 0.533333, 0.0],
        [0.535714, 0.535714, 0.535714, 0.392857],
    ]
    torch.testing.assert_close(mass, torch.tensor(expected), atol=1e-6, rtol=0)
    low, high, all_of_it = chosen(mass.expand(1, 3, -1, -1), 0.6, 0.9, 1.0)
    assert low == [[0], [0, 1], [0, 2], [0, 1, 3]]
    assert high == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]] == all_of_it


def test_a_block_that_crosses_the_share_is_read():
    mass = torch.tensor([[[[0.1, 0.4, 0.3, 0.1, 0.1]]]])
    for threshold, blocks in [
        (0.0, [0, 4]),
        (0.2, [0, 4]),
        (0.3, [0, 1, 4]),
        (0.7, [0, 1, 2, 4]),
        (0.95, [0, 1, 2, 3, 4]),
    ]:
        assert chosen(mass, threshold) == [[blocks]]


def test_stride_one_is_the_attention_itself():
    query, keys = torch.randn(2, 1, 4, 32, 8, generator=torch.Generator().manual_seed(0))
    keys = keys[:, :2]
    mass = antidiagonal_mass(query, keys, scale=0.3, stride=1, block_size=8)
    scores = 0.3 * query @ keys.repeat_interleave(2, dim=1).transpose(-1, -2)
    weights = scores.masked_fill(torch.ones(32, 32).triu(1) > 0, float("-inf")).softmax(-1)
    torch.testing.assert_close(mass, weights.view(1, 4, 4, 8, 4, 8).sum((3, 5)))


@pytest.mark.parametrize(("n", "rows"), [(32, 32), (29, 29), (40, 13), (37, 1), (35, 7)])
@pytest.mark.parametrize("tile", [1, 1 << 24])
def test_estimate_is_the_oracles(n, rows, tile, monkeypatch):
    """Also where rows and entries end, or rows begin, inside of a cell; in tiles and whole."""
    monkeypatch.setattr("kvpress.kernels.antidiagonal_mass.TILE_SCORES", tile)
    query, keys = torch.randn(2, 2, 4, n, 6, generator=torch.Generator().manual_seed(n))
    query, keys = query[:, :, n - rows :], keys[:, :2]
    mass = antidiagonal_mass(query, keys, scale=0.7, stride=4, block_size=8)
    for b in range(2):
        for head in range(4):
            of_rows = {n - rows + i: row for i, row in enumerate(query[b, head].tolist())}
            expected = x_attention.estimate(of_rows, keys[b, head // 2].tolist(), 0.7, 4, 8)
            assert len(expected) == mass.shape[2]
            for found, (block, row) in zip(mass[b, head].tolist(), sorted(expected.items()), strict=True):
                assert found == pytest.approx(row + [0.0] * (mass.shape[3] - block - 1), abs=1e-5)


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    policy = XAttention()
    assert (policy.stride, policy.threshold, policy.block_size, policy.norm, policy.min_len) == (16, 0.9, 128, 1.0, 0)
    assert policy.roles == ("prefill",) and not policy.leaves_prompts_exact and policy.kind == "sparse prompt"
    assert kvpress.make_policy({"name": "x_attention", "threshold": [[0.5, 1], [0.3, 0.2]]}) == XAttention(
        threshold=((0.5, 1), (0.3, 0.2))
    )
    assert hash(XAttention(threshold=[[0.5]])) == hash(XAttention(threshold=((0.5,),)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"stride": 0}, "stride=0"),
        ({"stride": 3}, "stride=3 does not divide block_size=128"),
        ({"block_size": 96}, "block_size=96 is no power of two"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": 0}, "threshold=0 does not work; give a number above 0 and at most 1"),
        ({"threshold": [[0.5, 0.0]]}, r"threshold\[0\]\[1\]=0.0"),
        ({"threshold": "0.9"}, "threshold='0.9' cannot be read"),
        ({"threshold": [0.5, 0.6]}, r"threshold\[0\]=0.5 is no list"),
        ({"threshold": [[0.5, -1]]}, r"threshold\[0\]\[1\]=-1"),
        ({"norm": 0}, "norm=0"),
        ({"min_len": -1}, "min_len=-1"),
        ({"budget": 0.2}, "budget"),
    ],
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        kvpress.make_policy({"name": "x_attention", **fields})


def test_thresholds_of_another_model(model):
    with pytest.raises(PolicyError, match="numbers for 3 layers, and the model has 2"):
        kvpress.patch(model, XAttention(threshold=[[0.5] * 4] * 3))
    with (
        kvpress.patch(model, XAttention(threshold=[[0.5] * 3] * 2, block_size=4, stride=2)),
        pytest.raises(
            PolicyError, match=r"threshold\[0\] has 3 numbers, and the layer has 4 query heads: they were found for"
        ),
    ):
        model(torch.tensor([prompt(20)]))


# ---------------------------------------------------------------------------------------------------- on a model


def rules(over=None, **fields):
    return x_attention.XAttention(**fields) if over is None else x_attention.XAttention(**fields, over=over)


@torch.no_grad()
def test_thresholds_per_layer_and_head(model):
    """A head that reads everything beside one that reads two blocks."""
    threshold = [[1.0, 0.01, 0.5, 0.3], [0.01] * 4]
    fields = {**SMALL, "threshold": threshold}
    logits, _, _ = run(model, XAttention(**fields), PASSES)
    oracle = x_attention.Antidiagonals(model, rules(**fields))
    check_rows(logits, oracle.run(PASSES))
    assert oracle.log[0, 25] == [[0, 1, 2, 3, 4, 5, 6], [0, 6], *oracle.log[0, 25][2:]]


@torch.no_grad()
def test_threshold_one_is_dense(model):
    ids = torch.tensor([prompt(41)])
    dense = model(ids).logits
    with kvpress.patch(model, XAttention(threshold=1.0, stride=2, block_size=4)):
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)
    nearly = [[1.0, 1.0, 1.0, 0.9999999]] * 2  # through the block lists, all of them
    with kvpress.patch(model, XAttention(threshold=nearly, stride=1, block_size=4)):
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[26], [8, 18], [8, 12, 6], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts):
    """Blocks are counted from the first entry: whole blocks at a time give what the whole prompt gives."""
    logits = check_chunks(model, XAttention(**SMALL), x_attention.Antidiagonals(model, rules(**SMALL)), cuts)
    if all(sum(cuts[:i]) % 4 == 0 for i in range(len(cuts))):
        whole, _, _ = run(model, XAttention(**SMALL), [prompt(26)])
        torch.testing.assert_close(torch.cat(logits, dim=1), whole[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("evicts", "over"),
    [
        (None, None),
        (SnapKV(budget=14, window=4, kernel_size=3), snapkv.SnapKV(budget=14, window=4, kernel_size=3)),
        (H2O(heavy=8, recent=6), h2o.H2O(heavy=8, recent=6)),
        (
            StreamingLLM(sink=2, recent=12, rope="original"),
            streaming_llm.StreamingLLM(sink=2, recent=12, rope="original"),
        ),
    ],
    ids=str,
)
def test_beside_eviction(model, evicts, over):
    """A second turn reads blocks of what is kept, in the order of positions; padded sequences each as it is alone."""
    policies = [XAttention(**SMALL), *([] if evicts is None else [evicts])]
    oracle = x_attention.Antidiagonals(model, rules(over, **SMALL))
    logits, cache, _ = run(model, policies, PASSES)
    steps = oracle.run(PASSES)
    check_rows(logits, steps)
    assert kept(cache) == steps[-1].kept
    assert any(head is not None and head != list(range(max(head) + 1)) for head in oracle.log[0, 43])
    check_padded_turns(model, policies, oracle)


def test_beside_a_selection(model):
    """Prompts are XAttention's, steps are Quest's."""
    sparse, _, _ = run(model, XAttention(**SMALL), PASSES[:1])
    quest = Quest(budget=8, page_size=4, dense_layers=0)
    both, _, report = run(model, [quest, XAttention(**SMALL)], PASSES[:4])
    torch.testing.assert_close(both[0], sparse[0])
    assert report.total.read_share < 0.8
    roomy, _, _ = run(model, [replace(quest, budget=500), XAttention(**SMALL)], PASSES)
    alone, _, _ = run(model, XAttention(**SMALL), PASSES)
    for a, b in zip(roomy, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_corrected_steps_are_exact(model):
    """What TidalDecode feeds again is attended exactly."""
    passes = [prompt(26), *([token] for token in prompt(5, 1))]
    tidal = TidalDecode(k=3, sparse_layer_start=0, correct_every=4)
    dense = TidalDecode(k=500, sparse_layer_start=0)
    found, _, _ = run(model, [tidal, XAttention(**SMALL)], passes)
    exact, _, _ = run(model, [dense, XAttention(**SMALL)], passes)
    torch.testing.assert_close(found[-1], exact[-1], atol=1e-5, rtol=1e-4)


def test_where_a_plan_does_not_fit_rows_are_exact(model):
    """Sinks that come nearer, and kv heads that hold different numbers of entries: as without the prefill policy."""
    # The first turn is too short to be planned, the second is not.
    roomy = replace(XAttention(**SMALL), min_len=27)
    for evicts in (StreamingLLM(sink=2, recent=12), AdaKV(SnapKV(budget=14, window=4, kernel_size=3), alpha=0.2)):
        expected, _, _ = run(model, evicts, PASSES)
        passes, _, _ = run(model, [evicts, roomy], PASSES)
        for a, b in zip(passes, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([XAttention(), TokenSelect()], r"x_attention\(\) and token_select\(\) both play the role 'prefill'"),
        ([TokenSelect(), Quest()], r"token_select\(\) and quest\(\) both play the role 'selection'"),
        ([XAttention(), A2SF(evict="each_row")], r"a2sf\(.*attends a prompt row by row, and x_attention\(\) plans"),
        ([XAttention(), H2O(rope="reindex")], r"x_attention\(\) compares queries with rotated keys.*rope='original'"),
    ],
    ids=lambda value: "+".join(p.name for p in value) if isinstance(value, list) else "",
)
def test_refused_pairs(spec, reason):
    for one in (spec, spec[::-1]):
        with pytest.raises(PolicyError, match=reason if one is spec else None):
            make_policies(one)


def test_prompts_are_not_shared(model):
    recorded = kvpress.record_prompt(model, torch.tensor([prompt(20)]))
    with kvpress.patch(model, XAttention(**SMALL)) as handle:
        assert not handle.shares_prompts
        with pytest.raises(PolicyError, match="x_attention"):
            handle.adopt_prompt(recorded)


def test_without_a_cache_it_is_exact(model):
    ids = torch.tensor([prompt(30)])
    with torch.no_grad():
        dense = model(ids).logits
        with kvpress.patch(model, [Full(), XAttention(**SMALL)]):
            torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- the search


@torch.no_grad()
def by_hand(ids, share, size, stride):
    """The thresholds of each layer's heads on one prompt, by loops over transformers' own attention weights."""
    model = sharp_llama(layers=2)
    recorded = kvpress.record_prompt(model, torch.tensor([ids]))
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    found = []
    for (query, key, _, scores), weights in zip(recorded.layers, attentions, strict=True):
        found.append([])
        for head in range(query.shape[1]):
            rows = dict(enumerate(query[0, head].tolist()))
            estimate = x_attention.estimate(rows, key[0, head // 2].tolist(), scores.scale, stride, size)
            taken = total = 0.0
            for block, estimated in estimate.items():
                mine = weights[0, head, block * size : (block + 1) * size].double()
                true = [mine[:, j * size : (j + 1) * size].sum().item() for j in range(block + 1)]
                ranked = sorted(range(block + 1), key=lambda j, true=true: -true[j])
                count = next(c for c in range(1, block + 2) if sum(true[j] for j in ranked[:c]) >= share * sum(true))
                least = min(estimated[j] for j in ranked[:count])
                taken += sum(one for one in estimated if one >= least)
                total += sum(estimated)
            found[-1].append(taken / total)
    return found


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_search(model, share):
    """Of two prompts, one of which ends inside of a block, the larger thresholds."""
    prompts = [prompt(40, 5), prompt(35, 6)]
    found = fit(model, XAttention(threshold=share, stride=2, block_size=4), prompts)
    assert (found.stride, found.block_size) == (2, 4) and "generate" not in vars(model)
    each = [by_hand(ids, share, 4, 2) for ids in prompts]
    expected = [[max(pair) for pair in zip(*heads, strict=True)] for heads in zip(*each, strict=True)]
    assert each[0] != expected and each[1] != expected
    for layer, heads in zip(found.threshold, expected, strict=True):
        assert layer == pytest.approx(heads, abs=1e-5)
    assert len({one for heads in found.threshold for one in heads}) > 4


def test_all_that_is_wanted_may_be_everything(model):
    """Whoever wants all of the attention reads everything, by thresholds of 1."""
    found = fit(model, XAttention(threshold=1.0, stride=2, block_size=4), [prompt(30)])
    assert found.threshold == ((1.0,) * 4,) * 2
    ids = torch.tensor([prompt(41)])
    with torch.no_grad():
        dense = model(ids).logits
        with kvpress.patch(model, found):
            torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)


def test_soft_capping_is_in_the_attention_that_is_wanted():
    """With a low cap the attention is even, and more blocks are wanted."""
    query, key = 4 * torch.randn(2, 1, 1, 64, 8, generator=torch.Generator().manual_seed(1))
    policy = XAttention(stride=1, block_size=8)
    sharp, even = (policy.fit([[Attended(query, key, 1.0, cap, 0.0)]]).threshold[0][0] for cap in (None, 0.01))
    assert sharp < even
    mass = antidiagonal_mass(query, key, scale=1.0, softcap=2.0, stride=1, block_size=8)[0, 0]
    scores = 2.0 * torch.tanh(query[0, 0] @ key[0, 0].T / 2.0)
    weights = scores.masked_fill(torch.ones(64, 64).triu(1) > 0, float("-inf")).softmax(-1)
    torch.testing.assert_close(mass, weights.view(8, 8, 8, 8).sum((1, 3)))


@torch.no_grad()
def test_the_file(model, tmp_path):
    """Its thresholds are read as if they had been given, and belong to the model."""
    path = tmp_path / "found.json"
    found = fit(model, XAttention(**SMALL), [prompt(40)])
    write_table(path, found.threshold)
    from_file = kvpress.make_policy("x_attention", **{**SMALL, "threshold": str(path)})
    assert from_file == found == XAttention(**{**SMALL, "threshold": path})
    logits, _, _ = run(model, from_file, PASSES)
    check_rows(logits, x_attention.Antidiagonals(model, rules(**{**SMALL, "threshold": found.threshold})).run(PASSES))
    other = sharp_llama(layers=3)
    with pytest.raises(
        PolicyError, match=r"numbers for 2 layers, and the model has 3 .* found for another model; find them"
    ):
        kvpress.patch(other, from_file)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, r"threshold='.*found.json' cannot be read: No such file or directory; give a JSON file"),
        ("[[0.5", "threshold file .*found.json is no JSON"),
        ('{"0": [0.5]}', "threshold file .*found.json has no list of layers but a dict"),
        ("[]", "threshold file .*found.json has no list of layers"),
        ("[[0.5, 0.6], 0.5]", r"threshold file .*found.json\[1\]=0.5 is no list"),
        ("[[0.5, 1.5]]", r"threshold file .*found.json\[0\]\[1\]=1.5 does not work"),
        ('[[0.5, "0.5"]]', r"threshold file .*found.json\[0\]\[1\]='0.5' does not work"),
        ("[[NaN]]", r"threshold file .*found.json\[0\]\[0\]=nan does not work"),
    ],
)
def test_a_file_that_does_not_work(text, reason, tmp_path):
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PolicyError, match=reason):
        XAttention(threshold=str(path))


def test_what_cannot_be_searched(model):
    with pytest.raises(PolicyError, match="a prompt of 256 tokens has no more than two blocks of 128"):
        fit(model, XAttention(), [prompt(256)])
    with pytest.raises(PolicyError, match="threshold has a number for each head already"):
        fit(model, XAttention(threshold=[[0.5] * 4] * 2), [prompt(400)])
    with pytest.raises(PolicyError, match="there is no prompt"):
        fit(model, XAttention(), [])


def test_the_command(tmp_path, monkeypatch):
    """From the options to both files, and a model that runs with them."""
    tokenizer = byte_tokenizer()
    small = tiny_model(tokenizer)
    monkeypatch.setattr("kvpress.cli.load", lambda *_: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    arguments = ["calibrate", "--policy", "x_attention", "--lengths", "400", "--samples", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", "found.yaml"])
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "found.json").read_text())
    assert yaml.safe_load((tmp_path / "found.yaml").read_text()) == {"name": "x_attention", "threshold": "found.json"}
    said = " ".join(result.output.split())
    assert f"threshold of {len(table)} layers, " in said and said.endswith(
        "written to found.json, which found.yaml names"
    )
    with kvpress.patch(small, tmp_path / "found.yaml") as handle:
        assert handle.policies[0] == XAttention(threshold=table)
        small(torch.tensor([prompt(300)]))
    (tmp_path / "elsewhere").mkdir()
    elsewhere = CliRunner().invoke(app, [*arguments, "--out", "elsewhere/found.yaml"])
    assert elsewhere.exit_code == 0, elsewhere.output
    monkeypatch.chdir("/")
    assert kvpress.make_policy(tmp_path / "elsewhere" / "found.yaml") == XAttention(threshold=table)
    monkeypatch.chdir(tmp_path)
    set_ = CliRunner().invoke(app, ["inspect", "--set", "threshold=found.json", "--length", "400"])
    assert set_.exit_code == 0 and "recall" in set_.output, set_.output
    same = CliRunner().invoke(app, [*arguments, "--out", "found.json"])
    assert same.exit_code == 2 and "is where threshold is written" in " ".join(same.output.split())
