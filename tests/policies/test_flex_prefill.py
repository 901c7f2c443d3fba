"""FlexPrefill: the distance, the counts, both patterns, and what a prompt's rows read."""

from math import log, sqrt
from typing import Any

import pytest
import torch

import kvpress
from kvpress import PolicyError
from kvpress.policies import H2O, AdaKV, FlexPrefill, Full, Quest, SnapKV, XAttention
from kvpress.policies.flex_prefill import best, best_pairs, block_sums, cover_count, distance, vertical_slash
from kvpress.policy import listed_blocks
from kvpress.registry import make_policies
from oracles import flex_prefill, snapkv
from support.matrix import prompt, sharp_llama
from support.reads import run
from support.sparse_prompts import check_chunks, check_padded_turns, check_rows

SMALL: dict[str, Any] = {"gamma": 0.6, "tau": 0.25, "min_budget": 2, "block_size": 2}
PASSES = [prompt(26), *([token] for token in prompt(5, 1)), prompt(13, 2), *([token] for token in prompt(3, 3))]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=2)


# ---------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([1.0, 0.0], [0.0, 1.0], sqrt(log(2))),
        ([0.6, 0.4], [0.4, 0.6], 0.141900),
        ([0.5, 0.5, 0.0], [0.7, 0.3, 0.0], 0.144934),
    ],
)
def test_distance(a, b, apart):
    """Also with zeros, in one of the distributions and in both."""
    assert distance(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(apart, abs=1e-5)
    assert sqrt(flex_prefill.divergence(a, b)) == pytest.approx(apart, abs=1e-6)


def test_cover_count():
    """Of 512 equal ones 460 hold no more than 0.9; one that holds everything is above the share by itself."""
    uniform, one = torch.full((512,), 1 / 512), torch.eye(512)[3]
    found = cover_count(torch.stack((uniform, one)), 0.9)
    assert found.tolist() == [461, 1]
    assert (found // 128 + 1).tolist() == [4, 1]
    assert cover_count(uniform, 1.0) == 513  # everything, whatever rounding does to the sum


def test_equal_pairs_in_order():
    """Shares of rows of 1, 2, 3 and 4 blocks: totals up to 3.5 of 3.6 are read, (3, 2) and (3, 3) are not."""
    reads = best_pairs(torch.zeros(1, 1, 4, 4), 0.9)[0, 0]
    left_out = torch.ones(4, 4).tril().bool() & ~reads
    assert left_out.nonzero().tolist() == [[3, 2], [3, 3]] and not reads.triu(1).any()
    scores = {i: [0.0] * (i + 1) for i in range(4)}
    assert flex_prefill.cover_pairs(scores, 0.9) == {tuple(pair) for pair in reads.nonzero().tolist()}
    # the diagonal brings one of them back
    first = torch.zeros(1, 1, 4, dtype=torch.bool).index_fill(2, torch.tensor(0), True)
    reads = reads | vertical_slash(first, first, 0)[0, 0]
    assert reads[3].tolist() == [True, True, False, True]
    assert torch.equal(best_pairs(torch.zeros(1, 1, 4, 4), 1.0)[0, 0], torch.ones(4, 4).tril().bool())


def test_verticals_and_slashes():
    """Six blocks, of which the last three hold rows: columns 0 and 2, distances 0 and 3."""
    columns, diagonals = torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    columns[..., [0, 2]] = True
    diagonals[..., [0, 3]] = True
    reads = vertical_slash(columns, diagonals, 3)
    assert listed_blocks(reads)[0, 0].tolist() == [[0, 2, 3, -1], [0, 1, 2, 4], [0, 2, 5, -1]]


def test_the_best_and_the_first():
    mass = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.1]]).expand(4, 5)
    chosen = best(mass, torch.tensor([1, 2, 3, 5]))
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[0], [0, 1], [0, 1, 3], [0, 1, 2, 3, 4]]
    assert block_sums(torch.arange(5.0), 2).tolist() == [1.0, 5.0, 4.0]


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    policy = FlexPrefill()
    assert (policy.gamma, policy.tau, policy.min_budget, policy.max_budget) == (0.95, 0.1, 1024, None)
    assert (policy.block_size, policy.min_len) == (128, 0)
    assert policy.roles == ("prefill",) and not policy.leaves_prompts_exact and policy.kind == "sparse prompt"
    assert kvpress.make_policy("flex_prefill", gamma=0.9) == FlexPrefill(gamma=0.9)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gamma": 0}, "gamma=0 does not work; give a number above 0"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": "0.9"}, "gamma='0.9'"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"min_budget": 0}, "min_budget=0"),
        ({"min_budget": 0.5}, "min_budget=0.5"),
        ({"max_budget": 512}, "max_budget=512 is below min_budget=1024"),
        ({"max_budget": 0}, "max_budget=0"),
        ({"block_size": 96}, "block_size=96 is no power of two"),
        ({"block_size": 0}, "block_size=0"),
        ({"min_len": -1}, "min_len=-1"),
        ({"budget": 0.2}, "budget"),
    ],
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        kvpress.make_policy({"name": "flex_prefill", **fields})


# ---------------------------------------------------------------------------------------------------- on a model


def flexible(model, over=None, **fields):
    return flex_prefill.Flexible(model, flex_prefill.FlexPrefill(**fields, **({"over": over} if over else {})))


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [SMALL, {**SMALL, "tau": 0.9}, {**SMALL, "tau": 0, "max_budget": 8}], ids=["both", "aware", "slash"]
)
def test_patterns(model, fields):
    """Each head by itself, in a prompt and in a later turn: heads of both kinds, of one, of the other."""
    logits, _, _ = run(model, FlexPrefill(**fields), PASSES)
    oracle = flexible(model, **fields)
    check_rows(logits, oracle.run(PASSES))
    assert set(oracle.patterns.values()) == {0.25: {True, False}, 0.9: {True}, 0: {False}}[fields["tau"]]
    assert all(0 in blocks and 12 in blocks for blocks in oracle.log[0, 25])
    assert any(len(blocks) < 13 for blocks in oracle.log[0, 25])


@torch.no_grad()
def test_a_share_of_one_is_dense(model):
    ids = torch.tensor([prompt(41)])
    dense = model(ids).logits
    # With a limit that does not bind the lists are made, all of them.
    for max_budget in (None, 500):
        for tau in (0.0, 0.9):
            policy = FlexPrefill(gamma=1, tau=tau, min_budget=1, max_budget=max_budget, block_size=4)
            with kvpress.patch(model, policy):
                torch.testing.assert_close(model(ids).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cuts", [[26], [8, 18], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts):
    """Each pass has a probe of its own; blocks are counted from the first entry."""
    check_chunks(model, FlexPrefill(**SMALL), flexible(model, **SMALL), cuts)


def test_beside_eviction_and_padding(model):
    """A second turn reads blocks of what is kept; padded sequences each as it is alone."""
    policies = [FlexPrefill(**SMALL), SnapKV(budget=14, window=4, kernel_size=3)]
    oracle = flexible(model, snapkv.SnapKV(budget=14, window=4, kernel_size=3), **SMALL)
    check_padded_turns(model, policies, oracle)


def test_kv_heads_are_as_if_repeated():
    """A model with K and V repeated to all heads gives the same."""
    grouped = sharp_llama(layers=2)
    wide = sharp_llama(layers=2, heads=4, kv_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].view(2, 8, -1)
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    wide.load_state_dict(weights)
    runs = [run(one, FlexPrefill(**SMALL), PASSES)[0] for one in (grouped, wide)]
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_where_it_reads_everything(dtype):
    """Prompts up to two blocks, below `min_len`, within `min_budget`, of one row; and without a cache."""
    model = sharp_llama(layers=2).to(dtype)
    ids = torch.tensor([prompt(30)])
    with torch.no_grad():
        full, _, _ = run(model, Full(), [ids[0].tolist()])
        for fields in ({"block_size": 16}, {"min_len": 31}, {"min_budget": 30}):
            got, _, _ = run(model, FlexPrefill(**{**SMALL, **fields}), [ids[0].tolist()])
            assert torch.equal(got[0], full[0])
        dense = model(ids).logits
        with kvpress.patch(model, FlexPrefill(**SMALL)):
            torch.testing.assert_close(model(ids, use_cache=False).logits, dense, atol=1e-2, rtol=1e-2)
            assert not torch.allclose(model(ids).logits, dense, atol=5e-2)
            assert model(ids).logits.isfinite().all()


def test_beside_a_selection(model):
    """Prompts are FlexPrefill's, steps are Quest's."""
    sparse, _, _ = run(model, FlexPrefill(**SMALL), PASSES[:1])
    both, _, report = run(model, [Quest(budget=8, page_size=4, dense_layers=0), FlexPrefill(**SMALL)], PASSES[:4])
    torch.testing.assert_close(both[0], sparse[0])
    assert report.total.read_share < 0.8


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([FlexPrefill(), XAttention()], r"flex_prefill\(\) and x_attention\(\) both play the role 'prefill'"),
        ([FlexPrefill(), H2O(rope="reindex")], r"flex_prefill\(\) compares queries with rotated keys"),
    ],
    ids=lambda value: "+".join(p.name for p in value) if isinstance(value, list) else "",
)
def test_refused_pairs(spec, reason):
    with pytest.raises(PolicyError, match=reason):
        make_policies(spec)
    make_policies([FlexPrefill(), AdaKV(SnapKV(budget=64, window=4))])
