"""InfiniteHiP: keys that stand for chunks, lists that stages hand on and when they are made, and where what is read is attended."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError, step
from kvpress import places as module_of_places
from kvpress import prompt as prompt_pass
from kvpress.compat import CACHE
from kvpress.kernels.rope_shift import rope_shift
from kvpress.policies import A2SF, H2O, AdaKV, Finch, HiP, InfiniteHiP, Quest, SnapKV, StreamingLLM, TokenSelect
from kvpress.policies.infinite_hip import entries_of, representatives
from kvpress.policy import Consecutive, Own, Pattern, View
from kvpress.registry import make_policies
from oracles import infinite_hip, snapkv
from support.matrix import kept, prompt, sharp_llama
from support.reads import dense, run, watch

SMALL: dict[str, Any] = {
    "n_sink": 1,
    "n_stream": 2,
    "l_c": (4, 2),
    "k": (8, 4),
    "early_layers": 1,
    "early_k": 6,
    "refresh": (4, 2),
    "block_size": 4,
}
PASSES = [prompt(26), *([token] for token in prompt(8, 1)), prompt(13, 2), *([token] for token in prompt(4, 3))]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def view_of(query, keys, **fields):
    """Rows [batch, heads, rows, d] that are the last of the entries that `keys` [batch, kv_heads, n, d] belong to."""
    batch, kv_heads, n = keys.shape[:3]
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])[: query.shape[-1] // 2]
    options: dict[str, Any] = {
        "layer": 5,
        "layers": 9,
        "query": query,
        "fetch": lambda: keys,
        "positions": torch.arange(n, dtype=torch.int32).expand(batch, kv_heads, n),
        "valid": None,
        "seen": torch.full((batch,), n, dtype=torch.int32),
        "scale": 1.0,
        "softcap": None,
        "turn": lambda x, shift: rope_shift(x, shift, frequencies),
        "state": {},
        "shared": {},
        "length": n,
        "newest": n - 1,
        "places": n,
        "phase": (True, True, True),
    }
    return View(**{**options, **fields})


def listed(pattern, row=0):
    """The entries that a block reads of a sequence; all kv heads have the same list."""
    lists = []
    for head in range(pattern.index.shape[1]):
        member = None if pattern.member is None else pattern.member[row, head].tolist()
        entries = pattern.index[row, head].tolist()
        lists.append([entry for at, entry in enumerate(entries) if member is None or member[at]])
    assert all(one == lists[0] for one in lists) and lists[0] == sorted(set(lists[0]))
    return lists[0]


# ---------------------------------------------------------------------------------------------------- by hand


def stands(scores):
    """Which entry stands for a chunk of given scores, and which were looked at."""
    looked_at, numbers = [], torch.tensor(scores)

    def score(entries):
        looked_at.append(entries.item())
        return numbers[entries], numbers[entries]

    first, last = torch.tensor([[[0]]]), torch.tensor([[[len(scores) - 1]]])
    entry, found = representatives(first, last, (len(scores) - 1).bit_length(), score)
    assert found.item() == pytest.approx(scores[entry.item()])
    return entry.item(), looked_at


def test_the_better_half_by_its_first_key():
    """0 against 4, then 4 against 6, then 6 against 7: the largest, 3, is in the half that was not taken."""
    assert stands([1.0, 0.0, 0.0, 9.0, 2.0, 0.0, 3.0, 4.0]) == (7, [0, 4, 6, 7])
    assert stands([2.0, 3.0, 1.0, 9.0, 1.0, 9.0, 9.0, 9.0]) == (1, [0, 4, 2, 1])


def test_three_keys_are_one_and_two():
    assert stands([1.0, 2.0, 3.0]) == (2, [0, 1, 2])
    assert stands([1.0, 0.0, 3.0])[0] == 0


def test_of_equal_halves_the_left_one():
    assert stands([1.0] * 8)[0] == 0
    assert stands([1.0, 1.0, 2.0, 2.0])[0] == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 96])
def test_the_descent_is_the_oracles(size):
    """Beside each other chunks of all lengths up to it."""
    scores = random(2, 3, size, size, seed=size)
    lengths = torch.arange(1, size + 1)
    first, last = torch.zeros(2, 3, size, dtype=torch.int64), (lengths - 1).expand(2, 3, -1)

    def score(entries):
        found = scores.gather(3, entries[..., None])[..., 0]
        return found, found

    entry, found = representatives(first, last, (size - 1).bit_length(), score)
    for b in range(2):
        for head in range(3):
            for at, length in enumerate(lengths.tolist()):
                of_chunk = scores[b, head, at].tolist().__getitem__
                assert entry[b, head, at] == infinite_hip.stand_in(list(range(length)), of_chunk, of_chunk)
    torch.testing.assert_close(found, scores.gather(3, entry[..., None])[..., 0])


def test_halves_are_compared_at_their_own_places():
    """The first of a left half by its score as that, of a right half likewise; the last one's score is that of a right half."""
    left, right = torch.tensor([5.0, 0.0, 6.0, 1.0]), torch.tensor([3.0, 0.0, 5.5, 6.5])
    first, last = torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 3)
    entry, found = representatives(first, last, 2, lambda at: (left[at], right[at]))
    assert (entry.item(), found.item()) == (3, 6.5)  # 5 < 5.5, then 6 < 6.5
    right[3] = 5.9
    entry, found = representatives(first, last, 2, lambda at: (left[at], right[at]))
    assert (entry.item(), found.item()) == (2, 5.5)


@pytest.mark.parametrize("rows", [1, 5])
def test_chunks_of_one_are_an_exact_top_k(rows):
    """The keys with the largest product with any row of any head."""
    query, keys = random(2, 4, rows, 8), random(2, 2, 60, 8, seed=1)
    policy = InfiniteHiP(n_sink=3, n_stream=4, l_c=(1,), k=(7,), refresh=(1,), early_layers=0, early_k=7)
    pattern = policy.plan(view_of(query, keys))
    stop = 60 - rows - 4
    best = (query @ keys.repeat_interleave(2, dim=1).transpose(2, 3)).amax((1, 2))
    for row in range(2):
        found = (best[row, 3:stop].topk(7).indices + 3).sort().values.tolist()
        assert listed(pattern, row) == [0, 1, 2, *found, *range(stop, 60)]


def test_pairs_are_scored_by_their_better_key():
    """Chunks of two: by the largest product of either key; the last one of an odd number is alone."""
    query, keys = random(1, 4, 3, 8), random(1, 2, 28, 8, seed=1)
    policy = InfiniteHiP(n_sink=1, n_stream=3, l_c=(2,), k=(6,), refresh=(1,), early_layers=0, early_k=6)
    best = (query @ keys.repeat_interleave(2, dim=1).transpose(2, 3)).amax((0, 1, 2))[1:22]
    pairs = torch.stack([one.amax() for one in best.split(2)])
    assert len(pairs) == 11
    chosen = pairs.topk(3).indices.sort().values.tolist()
    found = [e for pair in chosen for e in (1 + 2 * pair, 2 + 2 * pair) if e < 22]
    assert listed(policy.plan(view_of(query, keys))) == [0, *found, *range(22, 28)]


def test_a_chunk_that_lacks_keys_is_read_as_it_is():
    """The best chunk is the last one, of one key: fewer keys are read, and no key twice."""
    query, keys = torch.ones(1, 2, 1, 4), torch.zeros(2, 2, 12, 4)
    keys[0, :, 9] = 3.0
    keys[1, :, 2] = 3.0
    policy = InfiniteHiP(n_sink=1, n_stream=1, l_c=(4,), k=(4,), refresh=(1,), early_layers=0, early_k=4)
    pattern = policy.plan(view_of(query.expand(2, -1, -1, -1), keys))  # chunks 1-4, 5-8, 9
    assert listed(pattern, 0) == [0, 9, 10, 11]
    assert listed(pattern, 1) == [0, 1, 2, 3, 4, 10, 11]


def test_heads_share_a_list_by_the_best_of_them():
    """One head sees one key, the other two: the list has the two largest scores, whosever they are."""
    query, keys = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 20, 4)
    query[0, 0, 0, 0] = query[0, 1, 0, 1] = 1.0
    keys[0, 0, 3, 0], keys[0, 1, 8, 1], keys[0, 1, 12, 1] = 1.0, 5.0, 4.0
    policy = InfiniteHiP(n_sink=0, n_stream=2, l_c=(1,), k=(2,), refresh=(1,), early_layers=0, early_k=2)
    assert listed(policy.plan(view_of(query, keys))) == [8, 12, 17, 18, 19]


def test_chunks_without_numbers_are_last():
    query, keys = random(1, 2, 1, 4), random(1, 2, 21, 4, seed=1)
    keys[:, :, :10] = float("nan")
    policy = InfiniteHiP(n_sink=0, n_stream=2, l_c=(2,), k=(6,), refresh=(1,), early_layers=0, early_k=6)
    found = listed(policy.plan(view_of(query, keys)))
    assert found[-3:] == [18, 19, 20] and len(found) == 9 and min(found) >= 10


# ---------------------------------------------------------------------------------------------------- at which places


def scores_of(policy, layer, query, keys, runs_before=None, monkeypatch=None):
    """Rotations that a stage asks for: (what was rotated, by how much)."""
    asked = []
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def turn(x, shift):
        asked.append((tuple(x.shape), shift.flatten().tolist()))
        return rope_shift(x, shift, frequencies)

    policy.plan(view_of(query, keys, layer=layer, turn=turn))
    return asked


def test_early_layers_place_keys_by_the_numbers_of_their_chunks():
    """5 chunks: the query is 3 behind the last of them, number 4; keys are at 0 to 4."""
    query, keys = random(1, 4, 2, 8), random(1, 2, 16, 8, seed=1)
    policy = InfiniteHiP(
        n_sink=1, n_stream=3, l_c=(2,), k=(4,), refresh=(1,), early_layers=1, early_k=4, extend=True, block_size=2
    )
    asked = scores_of(policy, 0, query, keys)
    assert asked == [((1, 4, 2, 8), [7]), *([((1, 4, 5, 8), [0, 1, 2, 3, 4])] * 2)]


def test_later_layers_place_the_first_of_a_left_half_one_before_that_of_a_right_half():
    """A query at n_stream + 1 against keys at 0 and at 1 is one at n_stream + 1 and at n_stream against keys at 0."""
    query, keys = random(1, 4, 2, 8), random(1, 2, 16, 8, seed=1)
    policy = InfiniteHiP(
        n_sink=1, n_stream=3, l_c=(2,), k=(4,), refresh=(1,), early_layers=1, early_k=4, extend=True, block_size=2
    )
    assert scores_of(policy, 1, query, keys) == [((1, 4, 2, 8), [4]), ((1, 4, 2, 8), [3])]
    pattern = policy.plan(view_of(query, keys, layer=1))
    wide, frequencies = keys.repeat_interleave(2, dim=1), torch.tensor([1.0, 0.3, 0.1, 0.01])

    def at(x, place):
        return rope_shift(x, torch.tensor([place]), frequencies)

    left, right = (torch.einsum("bhrd,bhnd->hrn", at(query, 4), at(wide, place)).amax(1) for place in (0, 1))
    chunks = []  # 10 keys from 1 on
    for first in range(1, 11, 2):
        chosen = torch.where(right[:, first + 1] > left[:, first], first + 1, first)
        chunks.append(right.gather(1, chosen[:, None]).max())
    best = torch.stack(chunks).topk(2).indices.sort().values.tolist()
    assert listed(pattern) == [0, *(e for one in best for e in (1 + 2 * one, 2 + 2 * one)), *range(11, 16)]


@pytest.fixture
def distances(monkeypatch):
    """The largest distance between a query and a key of each call in which keys were placed anew."""
    found, inside, current = [], [False], []
    original_turned, original_rotated = module_of_places.turned, module_of_places.rotated

    def turned(*args):
        inside[0] = True
        try:
            return original_turned(*args)
        finally:
            inside[0] = False
            rows, keys = current
            current.clear()
            assert keys.min() == 0
            found.append(int(rows.max() - keys.min()))

    def rotated(x, positions, rotary):
        if inside[0]:
            current.append(positions)
        return original_rotated(x, positions, rotary)

    for caller in (prompt_pass, step):
        monkeypatch.setattr(caller, "turned", turned)
    monkeypatch.setattr(module_of_places, "rotated", rotated)
    return found


@pytest.mark.parametrize("length", [30, 90])
@pytest.mark.parametrize("l_c", [(4, 2), (5, 1)], ids=str)
def test_no_distance_is_larger_than_what_is_read(model, distances, length, l_c):
    """Before the last stage's chunks run out, too: n_sink + k + n_stream + block_size, however long the text."""
    policy = InfiniteHiP(**{**SMALL, "l_c": l_c, "k": (20, 4), "early_k": 4}, extend=True)
    run(model, policy, [prompt(length), *([token] for token in prompt(5, 1)), prompt(11, 2), [7]])
    assert len(distances) > 20
    assert 1 + 4 + 2 < max(distances) <= 1 + 4 + 2 + 4


def test_with_own_places_keys_stay_where_they_are(model, distances):
    assert InfiniteHiP().places == Own() and InfiniteHiP(extend=True).places == Consecutive()
    run(model, InfiniteHiP(**SMALL), PASSES[:3])
    assert distances == []


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    """The paper's numbers."""
    policy = InfiniteHiP()
    assert (policy.n_sink, policy.n_stream, policy.block_size) == (256, 1024, 64)
    assert (policy.extend, policy.min_len) == (False, 0)
    assert (policy.l_c, policy.k, policy.refresh) == ((256, 32, 8), (32768, 8192, 2048), (16, 8, 4))
    assert (policy.early_layers, policy.early_k) == (3, 4096)
    assert [policy.kept(layer, stage) for layer in (2, 3) for stage in range(3)] == [
        *(32768, 8192, 4096),
        *(32768, 8192, 2048),
    ]
    assert policy.roles == ("selection", "prefill") and not policy.leaves_prompts_exact and policy.chunk == 64
    assert kvpress.make_policy("infinite_hip") == policy
    five = {"l_c": [64, 32, 16], "k": [32768, 16384, 4096], "refresh": [96, 24, 8]}
    assert hash(kvpress.make_policy({"name": "infinite_hip", **five})) == hash(
        InfiniteHiP(**{k: tuple(v) for k, v in five.items()})
    )


def test_which_steps_make_which_lists():
    """Counted from a prompt; all of them where nothing is known of what came before."""
    policy = InfiniteHiP()
    phases = {number: policy.phase(number) for number in range(34)}
    assert phases[0] == phases[1] == phases[17] == phases[33] == (True, True, True)
    assert phases[9] == phases[25] == (False, True, True)
    assert phases[5] == phases[13] == (False, False, True)
    assert phases[2] == phases[16] == phases[18] == (False, False, False)


@pytest.mark.parametrize("budget", [14, 27, 105, 512, 4000])
@pytest.mark.parametrize("fields", [{}, {"l_c": [4, 2]}, {"l_c": [3]}], ids=str)
def test_a_budget_is_what_a_step_reads_at_most(budget, fields):
    if fields:
        fields = {**fields, "refresh": [2] * len(fields["l_c"])}
    policy = InfiniteHiP.at_budget(budget, **fields)
    assert policy.n_sink + policy.k[-1] + policy.n_stream + 1 == budget
    assert policy.early_k == policy.k[-1]
    assert all(keys >= 4 * after for keys, after in zip(policy.k, policy.k[1:], strict=False))
    if budget > 100:
        assert policy.k[-1] == pytest.approx(budget * 8 / 13, rel=0.2)
        assert policy.n_stream == pytest.approx(4 * policy.n_sink, abs=5)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n_sink": -1}, "n_sink=-1 does not work"),
        ({"n_stream": 1.5}, "n_stream=1.5 does not work"),
        ({"early_layers": -1}, "early_layers=-1 does not work"),
        ({"early_k": 0}, "early_k=0 does not work"),
        ({"min_len": True}, "min_len=True does not work"),
        ({"block_size": 48}, "block_size=48 is no power of two; give 64"),
        ({"extend": 1}, "extend=1 does not work; give True or False"),
        ({"l_c": 256}, "l_c=256 is no list of numbers; give one for each stage"),
        ({"l_c": "256"}, "l_c='256' is no list of numbers"),
        ({"l_c": []}, r"l_c=\[\] is no list of numbers"),
        ({"l_c": [256, 32, 0]}, r"l_c\[2\]=0 does not work"),
        ({"refresh": [16, 0, 4]}, r"refresh\[1\]=0 does not work; give an int of at least 1"),
        ({"k": [32768, 8192.0, 2048]}, r"k\[1\]=8192.0 does not work"),
        ({"k": [8192, 2048]}, r"k=\(8192, 2048\) has 2 numbers, and l_c=\(256, 32, 8\) 3; give one for each stage"),
        ({"refresh": [4]}, r"refresh=\(4,\) has 1 numbers, and l_c=\(256, 32, 8\) 3"),
        ({"l_c": [8, 32, 256]}, r"l_c=\(8, 32, 256\): chunks of 8 keys are not cut into shorter ones of 32"),
        ({"l_c": [32, 32, 8]}, "chunks of 32 keys are not cut into shorter ones of 32"),
        ({"l_c": [256, 48, 8]}, "chunks of 256 keys are not cut into shorter ones of 48.*divide it"),
        ({"k": [32768, 8192, 2047]}, r"k\[2\]=2047 is no whole number of chunks of 8 keys \(l_c\); give 2040"),
        ({"k": [100, 64, 8], "early_k": 8}, r"k\[0\]=100 is no whole number of chunks of 256 keys \(l_c\); give 256"),
        ({"early_k": 4097}, r"early_k=4097 is no whole number of chunks of 8 keys \(l_c\); give 4096"),
        ({"k": [8192, 16384, 2048]}, r"stage 2 cannot hand on 16384 of the 8192 keys that it gets"),
        ({"k": [32768, 2048, 1024]}, "early_k=4096 is more than the 2048 keys that the last stage gets.*at most 2048"),
        ({"budget": 13}, "budget=13 cannot be split.*at least 14"),
        ({"budget": 0.5}, "budget=0.5"),
        ({"budget": 100, "l_c": [0]}, r"l_c\[0\]=0 does not work"),
    ],
    ids=str,
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        kvpress.make_policy({"name": "infinite_hip", **fields})


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([InfiniteHiP(), HiP()], r"infinite_hip\(\) and hip\(\) both play the role"),
        ([InfiniteHiP(), Quest()], r"infinite_hip\(\) and quest\(\) both play the role 'selection'"),
        ([InfiniteHiP(extend=True), TokenSelect()], "both play the role"),
        ([InfiniteHiP(), A2SF(evict="each_row")], r"a2sf\(.*attends a prompt row by row, and infinite_hip\(\) plans"),
        ([InfiniteHiP(), H2O(rope="reindex")], r"infinite_hip\(\) compares queries with rotated keys"),
        ([InfiniteHiP(), AdaKV(SnapKV())], r"ada_kv\(.*keeps another number of entries in each kv head"),
        ([InfiniteHiP(), H2O()], r"h2o\(.*frees slots in decode, and the keys.*snapkv"),
        ([InfiniteHiP(extend=True), SnapKV()], r"infinite_hip\(extend=True\) places.*snapkv\(\) evicts.*extend=False"),
        ([InfiniteHiP(extend=True), Finch()], r"infinite_hip\(extend=True\) places.*finch\(\) evicts"),
        ([InfiniteHiP(extend=True), StreamingLLM()], r"infinite_hip\(extend=True\) places.*streaming_llm\(\) evicts"),
    ],
    ids=lambda value: "+".join(p.describe() for p in value) if isinstance(value, list) else "",
)
def test_refused_pairs(spec, reason):
    with pytest.raises(PolicyError, match=reason):
        make_policies(spec)


# ---------------------------------------------------------------------------------------------------- on a model


def check(logits, steps, row=0):
    for got, one in zip(logits, steps, strict=True):
        torch.testing.assert_close(got[row, -len(one.logits) :], one.logits, atol=1e-4, rtol=1e-4)


VARIANTS = [
    SMALL,
    {**SMALL, "refresh": (1, 1), "early_layers": 0},
    {**SMALL, "l_c": (8, 4, 1), "k": (16, 8, 3), "early_k": 3, "refresh": (6, 3, 2), "n_sink": 0, "n_stream": 0},
    {**SMALL, "l_c": (3,), "k": (6,), "refresh": (50,), "n_sink": 3, "n_stream": 6},
    {**SMALL, "l_c": (6, 2), "k": (6, 2), "early_k": 2, "refresh": (2, 5), "block_size": 16, "min_len": 30},
]


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_prompts_turns_and_steps_are_the_oracles(model, fields, extend, monkeypatch):
    log = watch(monkeypatch, InfiniteHiP)
    fields = {**fields, "extend": extend}
    logits, _, _ = run(model, InfiniteHiP(**fields), PASSES)
    oracle = infinite_hip.Pruning(model, infinite_hip.InfiniteHiP(**fields))
    check(logits, oracle.run(PASSES))
    for (at, layer), heads in log.items():
        assert heads == oracle.log[layer, at]
    assert any(len(head) < at + 1 for (at, _), heads in log.items() for head in heads)


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("cuts", [[26], [8, 18], [8, 12, 6], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts, extend):
    """Blocks are counted from a pass's first row: whole blocks at a time give what the whole prompt gives."""
    fields = {**SMALL, "extend": extend}
    ids = prompt(26)
    passes = [ids[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
    logits, _, _ = run(model, InfiniteHiP(**fields), passes)
    check(logits, infinite_hip.Pruning(model, infinite_hip.InfiniteHiP(**fields)).run(passes))
    if all(sum(cuts[:i]) % 4 == 0 for i in range(len(cuts))):
        whole, _, _ = run(model, InfiniteHiP(**fields), [ids])
        torch.testing.assert_close(torch.cat(logits, dim=1), whole[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{"k": (500, 500), "early_k": 500, "refresh": (1, 1)}, {"n_stream": 500}, {"n_sink": 500}, {"min_len": 500}],
    ids=str,
)
def test_room_for_everything_is_dense(model, fields, extend):
    """Prompts and turns; steps where they read everything, too (with lists made in each)."""
    logits, _, report = run(model, InfiniteHiP(**{**SMALL, **fields}, extend=extend), PASSES)
    expected = dense(model, PASSES)[0]
    exact = len(PASSES[0]) if "min_len" in fields else None
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, :exact], expected[:, :exact], atol=1e-4, rtol=1e-4)
    assert report.total.density == pytest.approx(1)
    if "min_len" not in fields:
        assert report.total.read_share == 1


@pytest.mark.parametrize("extend", [False, True])
def test_padded_sequences_are_as_alone(model, extend):
    fields = {**SMALL, "extend": extend}
    texts, mask = [[0] * 8 + prompt(16, 4), prompt(24, 5)], torch.ones(2, 24 + 7 + 14 + 2, dtype=torch.long)
    mask[0, :8] = 0
    steps, later = ([[[token], [token + 1]] for token in prompt(count, 6)] for count in (7, 2))
    turn = [prompt(14, 6), prompt(14, 7)]
    logits, _, _ = run(model, InfiniteHiP(**fields), [texts, *steps, turn, *later], mask)
    oracle = infinite_hip.Pruning(model, infinite_hip.InfiniteHiP(**fields))
    for row in range(2):
        alone = [texts[row][8 * (row == 0) :], *(s[row] for s in steps), turn[row], *(s[row] for s in later)]
        check(logits, oracle.run(alone), row)


@pytest.mark.parametrize("extend", [False, True])
def test_sequences_of_a_batch_may_read_different_numbers_of_keys(model, extend):
    """Where the last chunk lacks keys, and one sequence takes it and another does not."""
    fields = {**SMALL, "l_c": (5,), "k": (5,), "early_k": 5, "refresh": (2,), "extend": extend}
    texts = [prompt(25, seed) for seed in range(4)]
    patterns, original = [], InfiniteHiP.plan

    def noted(self, view):
        patterns.append(original(self, view))
        return patterns[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InfiniteHiP, "plan", noted)
        logits, _, _ = run(model, InfiniteHiP(**fields), [texts, [[5]] * 4])
    counts = [p.member.sum(-1)[:, 0].tolist() for p in patterns if p is not None and p.member is not None]
    assert any(len(set(one)) > 1 for one in counts)
    oracle = infinite_hip.Pruning(model, infinite_hip.InfiniteHiP(**fields))
    for row, ids in enumerate(texts):
        check(logits, oracle.run([ids, [5]]), row)


@pytest.mark.parametrize("evict", ["each_pass", "after_prompt"])
def test_beside_an_eviction_after_the_prompt(model, evict):
    """The text is what is kept, by its order in each kv head."""
    fields = {"budget": 14, "window": 4, "kernel_size": 3, "evict": evict}
    rules = infinite_hip.InfiniteHiP(**SMALL, over=snapkv.SnapKV(**fields))
    logits, cache, _ = run(model, [InfiniteHiP(**SMALL), SnapKV(**fields)], PASSES)
    steps = infinite_hip.Pruning(model, rules).run(PASSES)
    check(logits, steps)
    assert kept(cache) == steps[-1].kept


def watch_stages(monkeypatch):
    """(position of a block's last row, layer, stage) -> (entries that a stage got, or None for all, entries that it hands on)."""
    log, original = {}, InfiniteHiP.prune

    def entries(self, runs, stage):
        found, there = entries_of(runs, self.l_c[stage])
        return found[0][there[0]].tolist()

    def noted(self, view, stage, runs, *args):
        new, looked_at = original(self, view, stage, runs, *args)
        got = None if runs is None else entries(self, runs, stage - 1)
        log[int(view.seen[0]) - 1, view.layer, stage] = got, entries(self, new, stage)
        return new, looked_at

    monkeypatch.setattr(InfiniteHiP, "prune", noted)
    return log


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_lists_are_in_order_within_the_list_before_and_no_longer_than_k(model, fields, extend, monkeypatch):
    """And they are the oracle's, in prompts and in steps."""
    log, fields = watch_stages(monkeypatch), {**fields, "extend": extend}
    policy = InfiniteHiP(**fields)
    run(model, policy, PASSES)
    oracle = infinite_hip.Pruning(model, infinite_hip.InfiniteHiP(**fields))
    oracle.run(PASSES)
    shorter = 0
    for (at, layer, stage), (got, found) in log.items():
        assert found == sorted(set(found)) and len(found) <= policy.kept(layer, stage)
        everything = oracle.lists[layer, at][0]
        assert set(found) <= set(everything if got is None else got)
        shorter += len(found) < len(everything if got is None else got)
        assert found == oracle.lists[layer, at][stage + 1]
    assert shorter


def test_first_and_last_keys_are_always_read(model, monkeypatch):
    patterns, original = [], InfiniteHiP.plan

    def noted(self, view):
        pattern = original(self, view)
        patterns.append((view.positions.shape[2], view.query.shape[2], pattern))
        return pattern

    monkeypatch.setattr(InfiniteHiP, "plan", noted)
    log = watch(monkeypatch, InfiniteHiP)
    policy = InfiniteHiP(**{**SMALL, "n_sink": 2, "n_stream": 3})
    run(model, policy, PASSES)
    sparse = [(n, rows, pattern) for n, rows, pattern in patterns if pattern is not None]
    assert len(sparse) > 8 and all(isinstance(pattern, Pattern) for *_, pattern in sparse)
    for n, rows, pattern in sparse:
        assert {0, 1, *range(n - rows - 3, n)} <= set(listed(pattern))
        assert len(listed(pattern)) <= 2 + 6 + 3 + rows
    for (at, _), heads in log.items():
        for head in heads:
            assert {0, 1, *range(at - 3, at + 1)} <= set(head) and len(head) <= 2 + 6 + 3 + 1


def test_each_stage_is_made_anew_in_its_own_steps(model, monkeypatch):
    """Steps 1, 5 of the first stage and 1, 3, 5, 7 of the second, from the list of the first as it is then."""
    log = watch_stages(monkeypatch)
    run(model, InfiniteHiP(**SMALL), PASSES)
    made = defaultdict(list)
    for at, layer, stage in log:
        if layer == 1 and (26 <= at < 34 or at >= 47):
            made[stage].append(at)
    assert made == {0: [26, 30, 47], 1: [26, 28, 30, 32, 47, 49]}
    for at, before in ((28, 26), (32, 30), (49, 47)):
        assert log[at, 1, 1][0] == log[before, 1, 0][1]


def test_after_steps_were_taken_back_all_lists_are_made_anew(model):
    """As an unbroken run gives it: steps 27 and 28 are taken back."""
    policy, cache = InfiniteHiP(**{**SMALL, "refresh": (100, 100)}), DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, policy):
        model(torch.tensor([prompt(26)]), **{CACHE: cache})
        for token in (3, 4, 5):
            model(torch.tensor([[token]]), **{CACHE: cache})
        cache.crop(27)
        got = model(torch.tensor([[9]]), **{CACHE: cache}).logits[0, -1]
    expected, _, _ = run(model, replace(policy, refresh=(1, 1)), [prompt(26), [3], [9]])
    torch.testing.assert_close(got, expected[-1][0, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("extend", [False, True])
def test_changing_a_token_changes_nothing_before_its_block(model, extend):
    """Rows of a block choose together among keys before it."""
    ids = prompt(30)
    other = [*ids[:21], (ids[21] - 2) % 50 + 3, *ids[22:]]
    policy = InfiniteHiP(**SMALL, extend=extend)
    (a,), _, _ = run(model, policy, [ids])
    (b,), _, _ = run(model, policy, [other])
    torch.testing.assert_close(a[:, :20], b[:, :20], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(a[:, 21], b[:, 21])


def test_within_what_is_read_extended_places_are_the_own_ones(model):
    """Where nothing lies between the keys that are read, distances are as they are."""
    fields = {**SMALL, "n_sink": 0, "k": (8, 2), "early_k": 2}
    short = [prompt(4 + 2 + 2)]
    own, _, _ = run(model, InfiniteHiP(**fields), short)
    extended, _, _ = run(model, InfiniteHiP(**fields, extend=True), short)
    torch.testing.assert_close(own[0], extended[0], atol=1e-4, rtol=1e-4)
    long = [prompt(26)]
    own, _, _ = run(model, InfiniteHiP(**fields), long)
    extended, _, _ = run(model, InfiniteHiP(**fields, extend=True), long)
    assert not torch.allclose(own[0][:, -1], extended[0][:, -1], atol=1e-2)


def test_report_counts_what_the_stages_look_at(model):
    """Steps read 1 + 4 + 2 + 1 keys of the last layer; a stage that is made anew looks at keys, half an entry each."""
    fields = {**SMALL, "early_layers": 0, "early_k": 4}
    passes = [prompt(120), *([token] for token in prompt(4, 1))]
    _, _, report = run(model, InfiniteHiP(**fields), passes)
    read = 4 * (1 + 4 + 2 + 1)
    # Step 1: 117 keys in 30 chunks of 4, three keys of each for each of the two heads of a group, more than the 4 that there are.
    # Steps 1 and 3: 8 keys in 4 chunks of 2, both of each.
    looked_at = 117 / 2 + 2 * 8 / 2
    for layer in range(2):
        assert report.layers[layer].read_share == pytest.approx((read + looked_at) / (121 + 122 + 123 + 124))
    there = 120 * 121 / 2
    computed = sum(min(block * 4 + row, 1 + 4 + 2 + row) for block in range(30) for row in range(1, 5))
    assert report.total.density == pytest.approx(computed / there, rel=0.02)
