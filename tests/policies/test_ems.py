"""EMS: the global-local score, what is merged where, and that nothing else moves."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import observe
from kvpress.compat import CACHE
from kvpress.kernels.attention_mass import attention_mass
from kvpress.policies import EMS, H2O
from kvpress.policy import Dropped, Entries, Quota
from kvpress.tokens import plain_tokens
from oracles import ems as oracle
from support.layers import counted, new_layer
from support.layers import kept as held
from support.matrix import Case, check, conversation, expect, prompt, run, sharp_llama
from support.refusals import refused

BATCH, KV_HEADS, DIM = 2, 3, 8
INF = math.inf


@pytest.fixture(scope="module")
def model():
    return sharp_llama()


SPECIFIED: dict[str, Any] = {"window": 32, "recent": 32, "kernel_size": 1, "align": "mean"}
"""The score before the search: no pooling, both statistics alike, a window that scores and stays."""
THREE = SPECIFIED | {"window": 3, "recent": 3}


# ---------------------------------------------------------------------------------------------------- one layer by hand


def alike(count, seed=0):
    """Keys and values [BATCH, KV_HEADS, count, DIM] in loose clusters, so that many have something like them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, KV_HEADS, count, DIM)
    middles = torch.randn(2, BATCH, KV_HEADS, 1 + count // 5, DIM, generator=generator)
    which = torch.randint(middles.shape[3], shape[:3], generator=generator)[..., None].expand(shape)
    keys, values = (x.gather(2, which) + 0.3 * torch.randn(shape, generator=generator) for x in middles)
    return keys, values


def observed(count, rows, seed=0):
    """What all rows gave each entry, [BATCH, KV_HEADS, count], and what each of the last rows did, [.., rows, count]."""
    generator = torch.Generator().manual_seed(100 + seed)
    last = torch.rand(BATCH, KV_HEADS, rows, count, generator=generator) ** 4
    return 3 * torch.rand(BATCH, KV_HEADS, count, generator=generator) ** 4 + last.sum(2), last


def compress(policy, keys, values, mass, last):
    """A prompt pass of such entries that were observed so; the layer after it."""
    layer, count = new_layer(policy), keys.shape[2]
    tokens = plain_tokens(keys.shape[0], count, None, None, "cpu")
    layer.append(keys.clone(), values.clone(), tokens)
    layer.stats["mass"][:, :, :count] = mass
    layer.stats["rows"][..., :count] = last
    layer.close_prompt(tokens)
    return layer


def merging(keys, values, mass, last, centres):
    """All entries at the slots of their positions; `centres` stay and the others leave."""
    n = keys.shape[2]
    slots = torch.tensor([centres + [at for at in range(n) if at not in centres]]).expand(*keys.shape[:2], n)
    positions = torch.arange(n, dtype=torch.int32).expand(keys.shape[:3])
    seen = {"mass": mass, "last_rows": last.sum(2)}
    entries = Entries(positions, torch.ones_like(positions, dtype=torch.bool), seen, fetch=lambda: (keys, values))
    stay, leave = slots[..., : len(centres)], slots[..., len(centres) :]
    yes = torch.ones_like(slots, dtype=torch.bool)
    return Dropped(entries, stay, yes[..., : len(centres)], leave, yes[..., len(centres) :])


def expected(rules, keys, values, mass, last, total):
    """One kv head by the oracle's rules, merged in float64: {position: (key, value, mass, last)}, and who went where."""
    keys, values = keys.double(), values.double()
    everything, local = mass.tolist(), last.sum(0).tolist()
    scores = oracle.global_local(everything, local)
    centres, rest = rules.split(everything, local, list(range(len(scores))), total)
    members = {centre: [centre] for centre in centres}
    for index in rules.candidates([scores[index] for index in rest], total):
        chosen = rules.nearest(rest[index], centres, keys, values)
        if chosen is not None:
            members[chosen].append(rest[index])
    result = {}
    for centre, group in members.items():
        share = torch.tensor([scores[index] for index in group], dtype=torch.float64)
        share = (share / share.sum())[:, None]
        key = (share * keys[group] / keys[group].norm(dim=-1, keepdim=True)).sum(0)
        value = (share * values[group]).sum(0)
        result[centre] = (keys[centre].norm() * key / key.norm(), value, mass[group].sum(), last[:, group].sum(1))
    return result, members


SETTINGS = [
    SPECIFIED | {"budget": 12, "window": 3, "recent": 3},
    {"budget": 12, "window": 3, "recent": 3},
    {"budget": 12, "window": 5, "recent": 0, "kernel_size": 3, "pooling": "avg", "align": "mean", "global_weight": 0.8},
    {"budget": 12, "window": 3, "recent": 3, "tau": 0.0, "rho": 1.0, "kappa": INF, "global_weight": 0.0},
    {"budget": 11, "window": 3, "recent": 2, "kernel_size": 3, "pooling": "avg", "global_weight": 0.25},
    {"budget": 10, "window": 1, "recent": 4, "n_sink": 2, "rho": 0.5},
    {"budget": 8, "window": 4, "recent": 4, "kappa": 0.5, "tau": 0.2, "global_weight": 1.0},
    {"budget": 0.3, "window": 2, "recent": 2, "kernel_size": 7, "tau": 0.9},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: ",".join(f"{k}={v}" for k, v in setting.items()))
@pytest.mark.parametrize("count", [13, 40])
def test_e9_tensors_and_the_loop_agree(setting, count):
    """E9: the zero class as a masked argmax over all heads is the loop over heads: entries, K, V and statistics."""
    policy, rules = EMS(**setting), oracle.EMS(**setting)
    keys, values = alike(count)
    mass, last = observed(count, policy.window)
    layer = compress(policy, keys, values, mass, last)
    total = policy.quota(count, 0, 1).total
    merges = 0
    for b in range(BATCH):
        for head in range(KV_HEADS):
            want, members = expected(rules, keys[b, head], values[b, head], mass[b, head], last[b, head], total)
            merges += sum(len(group) - 1 for group in members.values())
            assert held(layer, b, head) == sorted(want)
            for slot, at in enumerate(layer.positions[b, head, :total].tolist()):
                key, value, global_, local = want[at]
                torch.testing.assert_close(layer.keys[b, head, slot], key.float(), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(layer.values[b, head, slot], value.float(), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(layer.stats["mass"][b, head, slot], global_)
                torch.testing.assert_close(layer.stats["rows"][b, head, :, slot], local)
    assert merges or count == 13 or setting.get("tau") == 0.9


def test_e1_room_for_everything_changes_nothing():
    """E1: B >= n: no bit of K and V changes (full attention: the invariant U1)."""
    keys, values = alike(12)
    layer = compress(EMS(budget=12, window=3, recent=3), keys, values, *observed(12, 3))
    assert torch.equal(layer.keys[:, :, :12], keys) and torch.equal(layer.values[:, :, :12], values)
    assert held(layer) == list(range(12))


@pytest.mark.parametrize("tau", [1.01, 5.0])
def test_e2_no_merge_is_eviction_by_the_score(tau):
    """E2: tau > 1: what stays is the window and the best scores, and no bit of it changes."""
    keys, values = alike(40)
    mass, last = observed(40, 3)
    layer = compress(EMS(budget=12, tau=tau, rho=1.0, kappa=INF, **THREE), keys, values, mass, last)
    for b in range(BATCH):
        for head in range(KV_HEADS):
            scores = oracle.global_local(mass[b, head].tolist(), last[b, head].sum(0).tolist())
            best = sorted(range(37), key=lambda at: (-scores[at], at))[:9]
            assert held(layer, b, head) == [*sorted(best), 37, 38, 39]
            places = layer.positions[b, head, :12].tolist()
            assert torch.equal(layer.keys[b, head, :12], keys[b, head, places])
            assert torch.equal(layer.values[b, head, :12], values[b, head, places])


def test_e3_everything_merges():
    """E3: tau = 0, rho = 1, kappa = infinity: every entry is in some class, so no statistic is lost."""
    keys, values = alike(40)
    mass, last = observed(40, 3)
    mass[0, 0, 5] = last[0, 0, :, 5] = 0.0  # an entry that nobody looked at is of the rest too
    policy = EMS(budget=12, window=3, recent=3, tau=0.0, rho=1.0, kappa=INF)
    target = policy.merge(merging(keys, values, mass, last, [1, 7, 30])).target
    assert target.shape[2] == 37 and (target >= 0).all() and (target < 3).all()
    layer = compress(policy, keys, values, mass, last)
    torch.testing.assert_close(layer.stats["mass"].sum(-1), mass.sum(-1))
    torch.testing.assert_close(layer.stats["rows"].sum(-1), last.sum(-1))
    some = compress(EMS(budget=12, window=3, recent=3, tau=0.6), keys, values, mass, last)
    assert (some.stats["mass"].sum(-1) < mass.sum(-1)).all()


def test_e4_duplicates():
    """E4: entries that come several times are merged into one that is as each of them was."""
    keys, values = (x.repeat_interleave(4, dim=2) for x in alike(10))
    mass, last = observed(40, 3)
    for offset in range(3):  # the first of each four has the score
        mass[:, :, 1 + offset :: 4] *= 1e-3
        last[..., 1 + offset :: 4] *= 1e-3
    layer = compress(EMS(budget=13, tau=0.999, rho=1.0, kappa=INF, **THREE), keys, values, mass, last)
    assert (layer.stats["mass"].sum(-1) > 0.99 * mass.sum(-1)).all()
    for b in range(BATCH):
        for head in range(KV_HEADS):
            places = layer.positions[b, head, :13].tolist()
            torch.testing.assert_close(layer.keys[b, head, :13], keys[b, head, places], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.values[b, head, :13], values[b, head, places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value_norms", [False, True], ids=["mean-values", "value-norms"])
def test_e5_e6_norms_and_hulls(value_norms):
    """E5: a key is as long as its centre's was. E6: a value lies between its members (or has its centre's norm)."""
    keys, values = alike(40)
    policy = EMS(budget=12, window=3, recent=3, tau=0.0, rho=1.0, kappa=INF, value_norms=value_norms)
    layer = compress(policy, keys, values, *observed(40, 3))
    places = layer.positions[:, :, :12].long()[..., None].expand(-1, -1, -1, DIM)
    before_keys, before_values = keys.gather(2, places), values.gather(2, places)
    torch.testing.assert_close(layer.keys[:, :, :12].norm(dim=-1), before_keys.norm(dim=-1))
    assert (layer.keys[:, :, :12] - before_keys).norm(dim=-1).max() > 0.1
    if value_norms:
        torch.testing.assert_close(layer.values[:, :, :12].norm(dim=-1), before_values.norm(dim=-1))
    else:
        assert (layer.values[:, :, :12] <= values.amax(2, keepdim=True) + 1e-5).all()
        assert (layer.values[:, :, :12] >= values.amin(2, keepdim=True) - 1e-5).all()


@pytest.mark.parametrize("factor", [1024.0, 1 / 1024, 3.7], ids=str)
@pytest.mark.parametrize("which", ["mass", "last"])
def test_e7_scores_are_aligned_by_their_means(factor, which):
    """E7: either score times any number: the same entries, K and V (bit by bit for a power of two)."""
    keys, values = alike(40)
    mass, last = observed(40, 3)
    policy = EMS(budget=12, window=3, recent=3)
    one = compress(policy, keys, values, mass, last)
    scaled = (mass * factor, last) if which == "mass" else (mass, last * factor)
    two = compress(policy, keys, values, *scaled)
    assert torch.equal(one.positions, two.positions)
    exact = {} if factor == 3.7 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one.keys, two.keys, **exact)
    torch.testing.assert_close(one.values, two.values, **exact)


def entries_of(mass, last, positions=None):
    positions = torch.arange(mass.shape[-1], dtype=torch.int32).expand(mass.shape) if positions is None else positions
    return Entries(positions, positions >= 0, {"mass": mass, "last_rows": last})


def test_e8_a_window_of_all_rows_ranks_as_h2o():
    """E8: the two scores are then the same, and their order is that of the accumulated mass."""
    mass, _ = observed(40, 3)
    entries = entries_of(mass, mass.clone())
    for align in ("place", "mean"):
        scores = EMS(kernel_size=1, align=align).score(entries)
        assert torch.equal(scores.argsort(-1), H2O().score(entries).argsort(-1))


@pytest.mark.parametrize("align", ["place", "mean"])
def test_e10_more_of_both_is_not_less(align):
    """E10: an entry that has more than another from all rows and from the last ones scores at least as high."""
    mass, last = observed(40, 3)
    local = last.sum(2)
    scores = EMS(kernel_size=1, align=align).score(entries_of(mass, local))
    dominates = (mass[..., :, None] >= mass[..., None, :]) & (local[..., :, None] >= local[..., None, :])
    assert (scores[..., :, None] >= scores[..., None, :])[dominates].all()
    assert dominates.sum() > 40 * BATCH * KV_HEADS  # more than each entry and itself


def test_score_by_hand():
    """Means over what is held: [4, 1, 1] and [0, 3, 0] are [2, .5, .5] and [0, 3, 0]; an empty slot counts for nothing."""
    mass, last = torch.tensor([[[4.0, 9.0, 1.0, 1.0]]]), torch.tensor([[[0.0, 9.0, 3.0, 0.0]]])
    positions = torch.tensor([[[0, -1, 1, 2]]], dtype=torch.int32)
    policy = EMS(kernel_size=1, align="mean")
    scores = policy.score(entries_of(mass, last, positions))
    torch.testing.assert_close(scores, torch.tensor([[[2.0, 0.0, 3.0, 0.5]]]))
    zeros = torch.zeros_like(mass)
    assert (policy.score(entries_of(zeros, zeros, positions)) == 0).all()


@pytest.mark.parametrize(
    ("pooling", "expected"), [("avg", [0.0, 3.0, 3.0, 4.0, 1.0]), ("max", [0.0, 9.0, 9.0, 9.0, 3.0])]
)
def test_pooling_by_hand(pooling, expected):
    """[0, 0, 9, 0, 3] over 3 neighbours; the last entry is no candidate and gives the one before it nothing."""
    entries = entries_of(torch.zeros(1, 1, 6), torch.tensor([[[0.0, 0.0, 9.0, 0.0, 3.0, 6.0]]]))  # with a mean of 3
    entries = replace(entries, competing=entries.positions < 5)
    got = EMS(kernel_size=3, pooling=pooling, align="mean").score(entries)
    torch.testing.assert_close(3 * got[0, 0, :5], torch.tensor(expected))


@pytest.mark.parametrize("align", ["place", "mean"])
def test_neighbours_are_those_next_to_it_by_position(align):
    """In decode slots come in any order, and some are empty."""
    positions = torch.tensor([[[40, -1, 7, 90, 2, 30]]], dtype=torch.int32)  # in order: 2, 7, 30, 40, 90
    local = torch.tensor([[[5.0, 9.0, 1.0, 0.0, 2.0, 0.0]]])
    entries = entries_of(torch.zeros_like(local), local, positions)
    got = EMS(kernel_size=3, align=align, global_weight=0.0).score(entries)[0, 0, [4, 2, 5, 0, 3]]
    # Pooled: 2, 2, 5, 5, 5 (over a mean of 8 / 5); the places of equals follow the positions.
    expected = [-4.0, -5.0, -1.0, -2.0, -3.0] if align == "place" else [1.25, 1.25, 3.125, 3.125, 3.125]
    assert got.tolist() == expected


def test_the_neighbours_of_what_the_last_rows_look_at_stay():
    """One entry that the last rows look at: with pooling over 5 its two neighbours on either side stay with it."""
    keys, values = alike(40)
    mass, last = torch.ones(BATCH, KV_HEADS, 40), torch.zeros(BATCH, KV_HEADS, 3, 40)
    last[..., 20] = 1.0
    for width, expected in ((1, [0, 1, 2, 3, 20]), (3, [0, 1, 19, 20, 21]), (5, [18, 19, 20, 21, 22])):
        policy = EMS(budget=8, window=3, recent=3, kernel_size=width, align="mean", tau=2.0)
        assert held(compress(policy, keys, values, mass, last)) == [*expected, 37, 38, 39]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"align": "mean"}, [0.0, 4.0, 3.0, 1.0], id="mean"),
        pytest.param({"align": "mean", "global_weight": 0.5}, [0.0, 2.0, 3.0, 1.0], id="mean-half"),
        pytest.param({"align": "mean", "global_weight": 0.0}, [0.0, 0.0, 3.0, 1.0], id="mean-local-alone"),
        pytest.param({}, [-2.0, -1.0, -1.0, -2.0], id="place"),
        pytest.param({"global_weight": 0.5}, [-3.0, -2.0, -1.0, -2.0], id="place-half"),
        pytest.param({"global_weight": 0.0}, [-3.0, -4.0, -1.0, -2.0], id="place-local-alone"),
    ],
)
def test_the_two_are_aligned_by_hand(fields, expected):
    """All rows: [0, 8, 0, 0] over 2 is 4 for entry 1, and places 2, 1, 3, 4. The last ones: [0, 0, 3, 1], and 3, 4, 1, 2."""
    entries = entries_of(torch.tensor([[[0.0, 8.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 3.0, 1.0]]]))
    assert EMS(kernel_size=1, **fields).score(entries).tolist() == [[expected]]


@pytest.mark.parametrize(("weight", "local"), [(1.0, 10), (0.5, 14), (0.25, 16), (0.0, 20)])
def test_places_share_the_budget(weight, local):
    """Where the two look at different entries, 20 places beside the recent ones are shared in the ratio weight to 1."""
    keys, values = alike(100)
    mass, last = torch.zeros(BATCH, KV_HEADS, 100), torch.zeros(BATCH, KV_HEADS, 3, 100)
    mass[..., :40] = torch.arange(40, 0, -1.0)
    last[..., 50:90] = torch.arange(40, 0, -1.0)
    policy = EMS(budget=24, window=3, recent=4, kernel_size=1, global_weight=weight, tau=2.0)
    kept = held(compress(policy, keys, values, mass, last))
    assert len([at for at in kept if 50 <= at < 90]) == pytest.approx(local, abs=1) and len(kept) == 24
    assert kept == [*range(24 - 4 - sum(50 <= at < 90 for at in kept)), *(at for at in kept if at >= 50)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"rho": 0.9}, 4, id="0.9: .4 + .3 + .15 are not enough, the next is needed"),
        pytest.param({"rho": 0.8}, 3, id="0.8"),
        pytest.param({"rho": 0.39}, 1, id="0.39: reached by the first"),
        pytest.param({"rho": 0.41}, 2, id="0.41"),
        pytest.param({"rho": 1.0}, 6, id="1: all, also what has no score"),
        pytest.param({"rho": 0.0}, 0, id="0: none"),
        pytest.param({"rho": 1.0, "kappa": 2}, 4, id="twice the budget of 2"),
        pytest.param({"rho": 1.0, "kappa": 1.25}, 2, id="1.25 times 2 is 2"),
        pytest.param({"rho": 1.0, "kappa": 0}, 0, id="kappa 0: none"),
        pytest.param({"rho": 0.8, "kappa": INF}, 3, id="no limit"),
    ],
)
def test_candidates_by_hand(fields, expected):
    """How many of a rest with the scores .4, .3, .15, .1, .05, 0 may be merged, beside two centres."""
    shares = torch.tensor([[[0.5, 0.15, 0.4, 0.05, 0.3, 0.0, 0.1, 0.7]]])
    same = torch.ones(1, 1, 8, 4)
    policy = EMS(budget=100, tau=0.0, **THREE, **fields)
    target = policy.merge(merging(same, same, shares, shares[:, :, None], [0, 7])).target
    ranks = torch.tensor([2, 0, 4, 1, 5, 3])  # of the slots 1 .. 6
    assert torch.equal(target[0, 0] >= 0, ranks < expected)


def test_equal_scores_are_candidates_in_order():
    """Of a rest with equal scores the earlier ones may be merged."""
    same, scores = torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6)
    policy = EMS(budget=100, rho=1.0, kappa=1.0, **THREE)
    given = merging(same, same, scores, scores[:, :, None], [4, 1])
    assert (policy.merge(given).target[0, 0] >= 0).tolist() == [True, True, False, False]  # 0 and 2 of 0, 2, 3, 5
    backwards = replace(given, entries=replace(given.entries, positions=given.entries.positions.flip(-1)))
    assert (policy.merge(backwards).target[0, 0] >= 0).tolist() == [False, False, True, True]


def test_equal_centres_the_earlier_one():
    """Of centres that are equally alike it is the one at the earlier position, in whatever slots they are."""
    same, scores = torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6)
    given = merging(same, same, scores, scores[:, :, None], [4, 1, 5])
    assert (EMS(budget=100, rho=1.0, **THREE).merge(given).target == 1).all()
    backwards = replace(given, entries=replace(given.entries, positions=given.entries.positions.flip(-1)))
    assert (EMS(budget=100, rho=1.0, **THREE).merge(backwards).target == 2).all()


@pytest.mark.parametrize(("raw", "expected"), [(False, -1), (True, 0)], ids=["clamped", "raw"])
def test_two_opposites(raw, expected):
    """Opposite keys and opposite values have a product of 1, and merge only with `raw_product`."""
    keys = torch.tensor([[[[1.0, 2.0], [-1.0, -2.0]]]])
    scores = torch.ones(1, 1, 2)
    policy = EMS(budget=100, raw_product=raw, rho=1.0, **THREE)
    assert policy.merge(merging(keys, keys, scores, scores[:, :, None], [0])).target.item() == expected


def test_tau_is_enough():
    """A similarity of exactly tau merges."""
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]])
    scores = torch.ones(1, 1, 3)
    given = merging(keys, keys, scores, scores[:, :, None], [0])
    assert EMS(budget=100, rho=1.0, tau=1.0, **THREE).merge(given).target.tolist() == [[[0, -1]]]


def test_sinks_stay():
    """The first tokens stay although nobody looks at them, inside the budget."""
    keys, values = alike(40)
    mass, last = observed(40, 3)
    mass[..., :4] = last[..., :4] = 0.0
    for sinks in (0, 1, 4):
        layer = compress(EMS(budget=12, n_sink=sinks, **THREE), keys, values, mass, last)
        assert all(
            [at for at in held(layer, b, head) if at < 4] == list(range(sinks)) and len(held(layer, b, head)) == 12
            for b in range(BATCH)
            for head in range(KV_HEADS)
        )


@pytest.mark.parametrize("keep", [False, True], ids=["sums", "own-score"])
def test_keep_centre_score(keep):
    """Merged statistics are the sums, or stay the centre's own."""
    keys, values = alike(40)
    mass, last = observed(40, 3)
    policy = EMS(budget=12, window=3, recent=3, tau=0.0, rho=1.0, keep_centre_score=keep)
    layer = compress(policy, keys, values, mass, last)
    places = layer.positions[:, :, :12].long()
    own, now = mass.gather(2, places), layer.stats["mass"][:, :, :12]
    assert torch.equal(own, now) if keep else (now.sum(-1) > own.sum(-1)).all()


# ---------------------------------------------------------------------------------------------------- in a model


def test_defaults():
    """The paper's budget, and what the reconstruction chose."""
    policy = EMS()
    assert (policy.budget, policy.window, policy.recent, policy.n_sink, policy.evict_every) == (256, 4, 32, 0, 32)
    assert (policy.kernel_size, policy.pooling, policy.align, policy.global_weight) == (7, "max", "place", 1.0)
    assert (policy.rho, policy.kappa, policy.tau) == (0.9, 4.0, 0.6)
    assert not (policy.raw_product or policy.value_norms or policy.keep_centre_score)
    assert kvpress.make_policy("ems") == policy
    assert "reconstruction" in EMS.__doc__.splitlines()[0]


@pytest.mark.parametrize("every", [1, 5, 32])
def test_e11_every_head_has_the_budget(model, every):
    """E11: exactly B entries per head after a compression, at increasing positions; B + what came since in between."""
    passes = [prompt(40), *([token] for token in prompt(40, 1))]
    sets = run(model, EMS(budget=12, window=4, recent=4, tau=0.1, evict_every=every), passes)[1]
    for step, layers in enumerate(sets):
        for head in (head for layer in layers for head in layer):
            assert len(head) == 12 + step % every
            assert all(a < b for a, b in pairwise(head))
            assert head[-4:] == list(range(36 + step, 40 + step))


def test_short_prompts_fill_up_first(model):
    """A prompt below the budget grows to budget + period before anything happens; until then it is full attention."""
    passes = [prompt(8), *([token] for token in prompt(15, 1))]
    logits, sets = run(model, EMS(budget=12, window=4, recent=4, evict_every=5), passes)
    assert [len(step[0][0]) for step in sets] == [8, 9, 10, 11, 12, 13, 14, 15, 16, 12, 13, 14, 15, 16, 12, 13]
    for got, want in zip(logits[:10], run(model, "full", passes[:10])[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_merging_matters(model):
    """The logits after merging are not those after dropping, and both agree with the oracle."""
    passes = conversation(7)
    outcomes = []
    for tau in (0.0, 2.0):
        fields: dict[str, Any] = {"budget": 9, "window": 3, "recent": 3, "tau": tau, "evict_every": 3}
        case = Case(EMS(**fields), oracle.EMS(**fields), EMS())
        outcomes.append(run(model, case.policy, passes)[0])
        check(expect(model, case, passes), [logits[-1] for logits in outcomes[-1]])
    assert (outcomes[0][-1] - outcomes[1][-1]).abs().max() > 0.1


def test_local_score_is_that_of_the_last_rows(model):
    """`Entries.last_rows` after prompts, chunks and steps: the softmax of exactly the last rows, merged or not."""
    with torch.no_grad(), kvpress.patch(model, EMS(budget=100, window=5)):
        cache = DynamicCache(config=model.config)
        rows = 0
        for ids in ([5], prompt(3, 1), prompt(13, 2), [6], [7], prompt(2, 3), [8]):
            model(torch.tensor([ids]), **{CACHE: cache})
            rows += len(ids)
            for layer in cache.layers:
                last = counted(layer)["last_rows"]
                assert torch.allclose(last.sum(-1), torch.tensor(2.0 * min(rows, 5)), atol=1e-4)
                held_rows = sorted(layer.notes["rows.at"][0].tolist())
                assert [at for at in held_rows if at >= 0] == list(range(max(0, rows - 5), rows))
                entries = last[0, 0, layer.positions[0, 0, : layer.length] == rows - 1]
                assert (entries > 0).all()


def test_sequences_of_unlike_length_in_full_slots(model):
    """Shares that round down to the same number and then to two: no slot of the shorter sequence is empty, and its newest
    entry, which the longer one's extra place repeats, stays what it is."""
    fields: dict[str, Any] = {"budget": 0.5, "window": 2, "recent": 2, "tau": 0.0, "evict_every": 2}
    case = Case(EMS(**fields), oracle.EMS(**fields), EMS())
    texts = [[prompt(17, 0), prompt(3, 2), [5], [6]], [prompt(16, 1), prompt(3, 3), [7], [8]]]
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, 0] = 0
    logits: list[list[Any]] = [[], []]
    with torch.no_grad(), kvpress.patch(model, case.policy):
        cache, stop = DynamicCache(config=model.config), 0
        for one, two in zip(*texts, strict=True):
            ids = torch.tensor([one, two if len(two) == len(one) else [0, *two]])
            stop += len(one)
            places = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, -len(one) :]
            out = model(ids, **{CACHE: cache}, attention_mask=mask[:, :stop], position_ids=places).logits
            for index in range(2):
                logits[index].append(out[index, -1])
    for index in range(2):
        check(expect(model, case, texts[index]), logits[index], cache, index)


def test_only_what_is_kept_is_held(model):
    """The report's bytes: the budget and its period, with the last rows' statistics; reads follow."""
    with kvpress.patch(model, EMS(budget=40, window=4, recent=4, evict_every=8)) as handle:
        model.generate(torch.tensor([prompt(400)]), max_new_tokens=17, do_sample=False, pad_token_id=0)
        total = handle.report().total
    assert total.kept == 40
    assert 0.1 * total.full_bytes < total.bytes < 0.2 * total.full_bytes
    # Eight steps fill the slots of the period, eight more find some of them empty, which are read over.
    assert total.read_share == pytest.approx((44.5 + 48) / 2 / 408.5, rel=0.005)


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({}, 1000, 256, 32, id="defaults"),
        pytest.param({"budget": 33}, 100, 33, 32, id="one-beside-the-recent"),
        pytest.param({"budget": 0.29, "recent": 8}, 100, 29, 8, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2}, 100, 20, 20, id="share-smaller-than-the-recent"),
        pytest.param({"budget": 0.2}, 3, 1, 1, id="share-of-a-short-prompt"),
    ],
)
def test_quota(fields, tokens, total, recent):
    assert EMS(**fields).quota(tokens, 0, 1) == EMS(**fields).quota(tokens, 3, 4) == Quota(total, recent)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"budget": 0}, ("budget=0",), id="budget-0"),
        pytest.param({"budget": 2.5}, ("budget=2.5", "above 1"), id="budget-2.5"),
        pytest.param({"budget": 32}, ("budget=32", "recent=32", "above 32"), id="budget-is-the-recent"),
        pytest.param({"budget": 36, "n_sink": 4}, ("budget=36", "recent + n_sink=36"), id="budget-is-all-protected"),
        pytest.param({"window": 0}, ("window=0", "at least 1"), id="window-0"),
        pytest.param({"recent": -1}, ("recent=-1", "at least 0"), id="recent-negative"),
        pytest.param({"recent": 0.5}, ("recent=0.5", "an int"), id="recent-share"),
        pytest.param({"kernel_size": 4}, ("kernel_size=4", "even", "5"), id="kernel-even"),
        pytest.param({"kernel_size": 0}, ("kernel_size=0", "at least 1"), id="kernel-0"),
        pytest.param({"pooling": "sum"}, ("pooling='sum'", "'avg', 'max'"), id="pooling"),
        pytest.param({"align": "max"}, ("align='max'", "'place', 'mean'"), id="align"),
        pytest.param({"global_weight": -0.1}, ("global_weight=-0.1", "0 to 1"), id="global-weight-negative"),
        pytest.param({"global_weight": 1.5}, ("global_weight=1.5", "0 to 1"), id="global-weight-above-1"),
        pytest.param({"global_weight": "all"}, ("global_weight='all'",), id="global-weight-text"),
        pytest.param({"n_sink": -1}, ("n_sink=-1", "at least 0"), id="sink-negative"),
        pytest.param({"rho": 1.1}, ("rho=1.1", "0 to 1"), id="rho"),
        pytest.param({"kappa": -1}, ("kappa=-1", "at least 0"), id="kappa-negative"),
        pytest.param({"kappa": float("nan")}, ("kappa=nan",), id="kappa-nan"),
        pytest.param({"tau": -0.1}, ("tau=-0.1", "at least 0"), id="tau-negative"),
        pytest.param({"tau": "0.6"}, ("tau='0.6'",), id="tau-text"),
        pytest.param({"raw_product": "yes"}, ("raw_product='yes'", "True, False"), id="raw-product"),
        pytest.param({"value_norms": None}, ("value_norms=None",), id="value-norms"),
        pytest.param({"keep_centre_score": 2}, ("keep_centre_score=2",), id="keep-centre-score"),
        pytest.param({"evict_every": 0}, ("evict_every=0", "at least 1"), id="evict-every-0"),
        pytest.param({"evict": "never"}, ("evict='never'",), id="evict"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        EMS(**fields)


def test_a_prompt_scores_all_rows_once(model, monkeypatch):
    """The mass of all rows comes from the prompt's attention itself; only the last rows are asked again."""
    asked = []

    def count(query, *arguments, **options):
        asked.append(query.shape[2])
        return attention_mass(query, *arguments, **options)

    monkeypatch.setattr(observe, "attention_mass", count)
    with torch.no_grad(), kvpress.patch(model, EMS(budget=12, window=3, recent=3)):
        model(torch.tensor([prompt(40)]), **{CACHE: DynamicCache(config=model.config)})
    assert asked == [1, 1, 1] * model.config.num_hidden_layers
