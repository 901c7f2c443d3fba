"""Skip-softmax: the threshold, what a prompt's rows skip, what that loses, and how its scale is found."""

import math
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kvpress
from kvpress import PolicyError
from kvpress.calibrate import fit
from kvpress.cli import app
from kvpress.kernels.skip_attention import tile_weights
from kvpress.policies import (
    H2O,
    AdaKV,
    Full,
    H2OPrefill,
    ObservedAttention,
    Packed,
    Quest,
    SkipSoftmax,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    XAttention,
)
from kvpress.registry import make_policies
from oracles import skip_softmax, snapkv, streaming_llm
from support.matrix import kept, prompt, sharp_llama
from support.reads import run
from support.sparse_prompts import check_chunks, check_padded_turns, check_rows
from support.tiny_saved import byte_tokenizer, tiny_model

SMALL: dict[str, Any] = {"scale": 7.0, "tile": 4}
PASSES = [prompt(26), *([token] for token in prompt(5, 1)), prompt(13, 2), *([token] for token in prompt(3, 3))]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=2)


def rules(over=None, **fields):
    return skip_softmax.SkipSoftmax(**fields) if over is None else skip_softmax.SkipSoftmax(**fields, over=over)


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    policy = SkipSoftmax()
    assert (policy.scale, policy.target, policy.tile, policy.min_len) == (None, 0.5, 128, 0)
    assert policy.roles == ("prefill",) and not policy.leaves_prompts_exact and policy.kind == "sparse prompt"


def test_the_authors_fit():
    """Their scales for prompts, and the threshold at 65536 entries for a half of the tiles."""
    scales = {0.1: 18.76, 0.3: 104.97, 0.5: 587.18, 0.7: 3293.04, 0.9: 18471.56}
    for target, scale in scales.items():
        policy = SkipSoftmax(target=target)
        assert policy.threshold(1 << 30) * (1 << 30) == pytest.approx(scale, rel=0.003)
    assert SkipSoftmax().threshold(65536) == pytest.approx(0.00896, abs=2e-5)
    assert SkipSoftmax(target=0.9).threshold(1024) == 1.0
    assert SkipSoftmax(scale=3).threshold(6) == 0.5
    assert SkipSoftmax(scale=math.inf).threshold(6) == 1.0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"scale": -1}, "scale=-1 does not work"),
        ({"scale": "3"}, "scale='3'"),
        ({"target": 1.0}, "target=1.0 does not work; give a share of the tiles, from 0 to below 1"),
        ({"target": math.nan}, "target=nan"),
        ({"a": 0}, "a=0 does not work"),
        ({"b": -1}, "b=-1 does not work"),
        ({"tile": 96}, "tile=96 is no power of two"),
        ({"min_len": -1}, "min_len=-1"),
        ({"budget": 0.2}, "budget"),
    ],
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        kvpress.make_policy({"name": "skip_softmax", **fields})


# ---------------------------------------------------------------------------------------------------- on a model


@torch.no_grad()
@pytest.mark.parametrize("fields", [SMALL, {"scale": 0.5, "tile": 2}, {"scale": math.inf, "tile": 4}], ids=str)
def test_what_is_skipped(model, fields):
    """Tile by tile, over a prompt, steps and a second turn, in every layer and query head."""
    logits, cache, report = run(model, SkipSoftmax(**fields), PASSES)
    oracle = skip_softmax.Skipping(model, rules(**fields))
    steps = oracle.run(PASSES)
    check_rows(logits, steps)
    assert kept(cache) == steps[-1].kept
    everything = [list(range(26 // fields["tile"] + 1))] * 4
    assert oracle.log[0, 25] != everything or oracle.log[1, 25] != everything
    assert report.total.density < 1


@torch.no_grad()
def test_zero_and_short_passes_are_dense(model):
    ids = torch.tensor([prompt(41)])
    dense = model(ids).logits
    exact = run(model, Full(), [prompt(41)])[0][0]
    for policy in (SkipSoftmax(scale=0), SkipSoftmax(), SkipSoftmax(scale=9, tile=4, min_len=42)):
        found, _, report = run(model, policy, [prompt(41)])
        assert torch.equal(found[0], exact) and report.total.density == 1
    with kvpress.patch(model, SkipSoftmax(scale=1e-30, tile=4)):  # walked over, and nothing skipped
        torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[26], [8, 18], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts):
    check_chunks(model, SkipSoftmax(**SMALL), skip_softmax.Skipping(model, rules(**SMALL)), cuts)


@pytest.mark.parametrize(
    ("evicts", "over"),
    [
        (None, None),
        (SnapKV(budget=14, window=4, kernel_size=3), snapkv.SnapKV(budget=14, window=4, kernel_size=3)),
        (
            StreamingLLM(sink=2, recent=12, rope="original"),
            streaming_llm.StreamingLLM(sink=2, recent=12, rope="original"),
        ),
    ],
    ids=str,
)
def test_beside_eviction(model, evicts, over):
    """A second turn walks over what is kept, in the order of positions; padded sequences each as it is alone."""
    policies = [SkipSoftmax(**SMALL), *([] if evicts is None else [evicts])]
    oracle = skip_softmax.Skipping(model, rules(over, **SMALL))
    logits, cache, _ = run(model, policies, PASSES)
    steps = oracle.run(PASSES)
    check_rows(logits, steps)
    assert kept(cache) == steps[-1].kept
    assert any(head is not None and head != list(range(max(head) + 1)) for head in oracle.log[0, 43])
    check_padded_turns(model, policies, oracle)


def test_beside_selection_and_storage(model):
    """Prompts skip, steps read what the other chooses; packed entries are walked over as they are read."""
    sparse, _, _ = run(model, SkipSoftmax(**SMALL), PASSES[:1])
    for other in (Quest(budget=8, page_size=4, dense_layers=0), TidalDecode(k=3, sparse_layer_start=0)):
        both, _, report = run(model, [other, SkipSoftmax(**SMALL)], PASSES[:4])
        torch.testing.assert_close(both[0], sparse[0])
        assert report.total.read_share < 0.9 and report.total.density < 1
    packed, _, _ = run(model, [Packed(), SkipSoftmax(**SMALL)], PASSES[:1])
    torch.testing.assert_close(packed[0], sparse[0])


def test_where_a_walk_does_not_fit_rows_are_exact(model):
    """Sinks that come nearer, and kv heads that hold different numbers of entries: as without it."""
    roomy = SkipSoftmax(**SMALL, min_len=27)  # the first turn is too short, the second is not
    for evicts in (StreamingLLM(sink=2, recent=12), AdaKV(SnapKV(budget=14, window=4, kernel_size=3), alpha=0.2)):
        expected, _, _ = run(model, evicts, PASSES)
        passes, _, _ = run(model, [evicts, roomy], PASSES)
        for a, b in zip(passes, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("evicts", [H2O(budget=0.4), H2OPrefill(budget=0.4), ObservedAttention(budget=0.4)], ids=str)
def test_what_counts_all_attention_is_refused(model, evicts):
    for policies in ([evicts, SkipSoftmax()], [SkipSoftmax(), evicts]):
        with pytest.raises(PolicyError, match=r"adds up the attention of all rows.*snapkv, or scale=0"):
            make_policies(policies)
    expected, _, _ = run(model, evicts, PASSES)
    found, _, _ = run(model, [evicts, SkipSoftmax(scale=0)], PASSES)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_refused_pairs():
    with pytest.raises(PolicyError, match=r"skip_softmax\(\) and x_attention\(\) both play the role 'prefill'"):
        make_policies([SkipSoftmax(), XAttention()])


def test_bfloat16_is_finite():
    model = sharp_llama(layers=2).to(torch.bfloat16)
    logits, _, _ = run(model, SkipSoftmax(**SMALL), PASSES)
    assert all(one.isfinite().all() for one in logits)
    assert not torch.equal(logits[0], run(model, Full(), PASSES)[0][0])


# ---------------------------------------------------------------------------------------------------- what is seen of it


def test_the_mass_that_is_lost_is_measured(model):
    """`inspect`: density and recall of each head, against the tiles of the oracle and transformers' own weights."""
    ids = prompt(26)
    found = kvpress.inspect(model, SkipSoftmax(**SMALL), ids)
    oracle = skip_softmax.Skipping(model, rules(**SMALL))
    oracle.run([ids])
    _, _, report = run(model, SkipSoftmax(**SMALL), [ids])
    eager = sharp_llama(layers=2)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(torch.tensor([ids]), output_attentions=True).attentions[0][0].double()
    for layer in range(2):
        for head in range(4):
            read = [[j for j in range(row + 1) if j // 4 in oracle.log[layer, row][head]] for row in range(26)]
            pairs = sum(map(len, read))
            assert found.prompt[layer].density[head].item() == pytest.approx(pairs / (26 * 27 / 2))
            if layer == 0:  # the second layer's queries come out of what was skipped in the first
                mass = sum(weights[head, row, js].sum().item() for row, js in enumerate(read)) / 26
                assert found.prompt[layer].recall[head].item() == pytest.approx(mass, abs=1e-5)
        assert found.prompt[layer].density.mean().item() == pytest.approx(report.layers[layer].density)
    assert 0.5 < found.prompt[0].recall.min() < 0.999


# ---------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_the_search(model, target):
    """The share of the tiles that the scale it finds skips is the one aimed at, on two prompts of different lengths."""
    prompts = [prompt(64, 5), prompt(43, 6)]
    found = fit(model, SkipSoftmax(target=target, tile=2), prompts)
    assert (found.target, found.tile) == (target, 2) and found.scale > 0
    skipped = there = 0
    for ids in prompts:
        for query, key, _, scores in kvpress.record_prompt(model, torch.tensor([ids])).layers:
            weights = tile_weights(query, key, scale=scores.scale, tile=2)
            skipped += ((weights >= 0) & (weights < found.threshold(len(ids)))).sum().item()
            there += (weights >= 0).sum().item()
    assert skipped / there == pytest.approx(target, abs=2 / there + 1e-3)


def test_what_cannot_be_searched(model):
    with pytest.raises(PolicyError, match="a prompt of 256 tokens has no more than two tiles of 128"):
        fit(model, SkipSoftmax(), [prompt(256)])
    with pytest.raises(PolicyError, match=r"target=0.9 of the tiles cannot be skipped: on these prompts \d+% can"):
        fit(model, SkipSoftmax(target=0.9, tile=4), [prompt(40)])


def test_the_command(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    small = tiny_model(tokenizer)
    monkeypatch.setattr("kvpress.cli.load", lambda *_: (small, tokenizer))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: skip_softmax\ntile: 32\ntarget: 0.03\n")
    arguments = ["calibrate", "--policy", "mine.yaml", "--lengths", "400", "--samples", "1", "--out", "found.yaml"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert set(written) == {"name", "scale", "target", "tile"}
    with kvpress.patch(small, tmp_path / "found.yaml") as handle:
        assert handle.policies[0] == SkipSoftmax(scale=written["scale"], target=0.03, tile=32)
        small(torch.tensor([prompt(300)]))
