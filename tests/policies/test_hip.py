"""HiP: the walk down the tree, what blocks of rows and decode steps read, and what it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from kvpress.policies import A2SF, H2O, AdaKV, HiP, Quest, SnapKV, XAttention
from kvpress.policies.hip import all_products, descend, rounds, some_products
from kvpress.policy import Pattern
from kvpress.registry import make_policies
from oracles import hip, snapkv
from support.matrix import kept, prompt, sharp_llama
from support.reads import dense, run, watch

SMALL: dict[str, Any] = {
    "k": 4,
    "window": 3,
    "sink": 1,
    "block_size": 4,
    "key_block_size": 2,
    "row_stride": 1,
    "dense_layers": 0,
    "refresh": 3,
}
PASSES = [prompt(26), *([token] for token in prompt(8, 1)), prompt(13, 2), *([token] for token in prompt(4, 3))]


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=2)


@pytest.fixture(params=["all at once", "tree"])
def path(request, monkeypatch):
    """How a prompt's search finds the scores: it makes no difference."""
    monkeypatch.setattr("kvpress.policies.hip.COPY_COST", -(10**6) if request.param == "tree" else 10**6)


def found(scores, keep):
    """What is found among leaves of given scores, and which leaves were looked at."""
    looked_at = []

    def score(leaves):
        looked_at.append(leaves[0].tolist())
        return scores[leaves]

    return descend(torch.tensor([len(scores)]), keep, rounds(len(scores), keep), score)[0].tolist(), looked_at


# ---------------------------------------------------------------------------------------------------- by hand


def test_the_best_of_a_hill():
    """64 leaves around 37: the eight best. Of 33 and 41, which are as far from 37, the earlier one is kept."""
    leaves = torch.arange(64)
    assert found(-(leaves - 37.0).abs() / 3, 8)[0] == list(range(33, 41))
    assert found(-(leaves - 37.1).abs() / 3, 8)[0] == list(range(34, 42))


def test_first_ranges():
    """16 leaves in 4 ranges: 0-3, 4-7, 8-11, 12-15; their halves are scored by the leaf in the middle, here the first."""
    _, looked_at = found(torch.zeros(16), 4)
    assert looked_at[0] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert hip.first_ranges(16, 4) == [(0, 3), (4, 7), (8, 11), (12, 15)]


def test_a_range_of_three_by_hand():
    """0-2 becomes 0 and 1-2 (middle 1), 3-4 becomes 3 and 4; then 1-2 becomes 1 and 2, beside 4, which stays as it is."""
    scores = torch.tensor([0.0, 5.0, 1.0, 2.0, 3.0])
    leaves, looked_at = found(scores, 2)
    assert hip.first_ranges(5, 2) == [(0, 2), (3, 4)]  # 2.5 is rounded up
    assert looked_at[0] == [0, 1, 3, 4]
    assert [one for one in looked_at[1] if one in (1, 2, 4)] == [1, 2, 4]
    assert leaves == [1, 4]


@pytest.mark.parametrize("keep", [1, 3, 8, 50])
@pytest.mark.parametrize("leaves", [1, 2, 7, 16, 37, 100])
def test_the_walk_is_the_oracles(leaves, keep):
    scores = torch.rand(5, leaves, generator=torch.Generator().manual_seed(leaves))
    many = descend(torch.full((5,), leaves), keep, rounds(leaves, keep) + 2, lambda at: scores.gather(1, at % leaves))
    for row, got in zip(scores.tolist(), many.tolist(), strict=True):
        expected = hip.walk(leaves, keep, row.__getitem__)
        assert got == expected + [-1] * (keep - len(expected))


def test_searches_of_different_lengths_beside_each_other():
    """More rounds than one needs change nothing."""
    scores, lengths = torch.rand(4, 60, generator=torch.Generator().manual_seed(3)), [3, 8, 9, 60]
    together = descend(torch.tensor(lengths), 8, rounds(60, 8), lambda at: scores.gather(1, at.clamp(max=59)))
    for row, length, got in zip(scores, lengths, together.tolist(), strict=True):
        alone = found(row[:length], 8)[0]
        assert got == alone


def test_nothing_is_lost_to_nan():
    """A leaf without a number never displaces one that has one, and ranges stay ranges."""
    scores = torch.full((16,), float("nan"))
    scores[5] = 1.0
    leaves, _ = found(scores, 4)
    assert 5 in leaves and len(set(leaves)) == 4 and min(leaves) >= 0


@pytest.mark.parametrize("size", [1, 2, 8])
def test_products_by_brute_force(size):
    """The largest of all pairs of a row and a key of the leaf; the last leaf may lack keys."""
    generator = torch.Generator().manual_seed(size)
    query, keys = torch.randn(2, 4, 3, 5, 6, generator=generator), torch.randn(2, 2, 19, 6, generator=generator)
    leaves = -(-19 // size)
    expected = torch.empty(2, 4, 3, leaves)
    for b in range(2):
        for head in range(4):
            for block in range(3):
                products = query[b, head, block] @ keys[b, head // 2].T
                expected[b, head, block] = torch.stack([one.max() for one in products.split(size, dim=1)])
    torch.testing.assert_close(all_products(query, keys, size), expected)
    entries = (torch.arange(leaves)[:, None] * size + torch.arange(size)).clamp(max=18).expand(2, 4, 3, -1, -1)
    torch.testing.assert_close(some_products(query, keys, entries.contiguous()), expected)


@pytest.mark.parametrize(("n", "rows"), [(64, 64), (61, 61), (80, 29), (75, 3)])
@pytest.mark.parametrize("tile", [1, 1 << 22], ids=["one-by-one", "together"])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.usefixtures("path")
def test_a_search_is_the_oracles(n, rows, tile, stride, monkeypatch):
    """Each head and block of rows; also where rows begin, or entries end, inside of a block."""
    monkeypatch.setattr("kvpress.policies.hip.TILE_NUMBERS", tile)
    fields = {"k": 8, "block_size": 8, "key_block_size": 2, "row_stride": stride}
    query, keys = torch.randn(2, 2, 4, n, 6, generator=torch.Generator().manual_seed(n))
    query, keys = query[:, :, n - rows :], keys[:, :2]
    got = HiP(**fields).search(query, keys)
    walking = hip.Walking.__new__(hip.Walking)
    walking.rules = hip.HiP(**fields)
    for b in range(2):
        for head in range(4):
            for at, block in enumerate(range((n - rows) // 8, -(-n // 8))):
                seen = min(n, (block + 1) * 8)
                compared = [min(max(row, n - rows), n - 1) for row in range(block * 8, block * 8 + 8, stride)]
                rows_of_block = [query[b, head, row - n + rows].tolist() for row in compared]
                expected = walking.search(rows_of_block, keys[b, head // 2, :seen].tolist())
                assert got[b, head, at].tolist() == expected + [-1] * (4 - len(expected))


# ---------------------------------------------------------------------------------------------------- values


def test_defaults():
    """The paper's numbers, and the proportions of its run on RULER."""
    policy = HiP()
    assert (policy.k, policy.block_size, policy.key_block_size, policy.dense_layers) == (512, 32, 2, 3)
    assert (policy.refresh, policy.row_stride, policy.min_len) == (8, 4, 0)
    assert (policy.window, policy.sink) == (1024 * 512 // 2048, 128 * 512 // 2048)
    assert policy.roles == ("selection", "prefill") and not policy.leaves_prompts_exact
    assert kvpress.make_policy("hip") == policy


@pytest.mark.parametrize("budget", [7, 20, 51, 64, 105, 512, 3000])
@pytest.mark.parametrize("size", [1, 2])
def test_a_budget_is_what_a_head_reads_at_most(budget, size):
    policy = HiP.at_budget(budget, key_block_size=size)
    assert policy.k % size == policy.sink % size == 0
    assert budget - 2 * size < policy.k + policy.sink + policy.window + size - 1 <= budget
    assert HiP.at_budget(budget, key_block_size=size, sink=0).k == policy.k


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 7}, "k=7 is no whole number of blocks of key_block_size=2; give 6"),
        ({"k": 1}, "k=1 is no whole number of blocks of key_block_size=2; give 2"),
        ({"window": 0}, "window=0"),
        ({"sink": -1}, "sink=-1"),
        ({"block_size": 48}, "block_size=48 is no power of two; give 32 or 64"),
        ({"key_block_size": 3}, "key_block_size=3 is no power of two; give 2"),
        ({"key_block_size": 0}, "key_block_size=0 does not work"),
        ({"block_size": 4, "key_block_size": 8}, "key_block_size=8 is larger than block_size=4; give at most 4"),
        ({"row_stride": 0}, "row_stride=0"),
        ({"dense_layers": 1.0}, "dense_layers=1.0"),
        ({"refresh": 0}, "refresh=0"),
        ({"min_len": -1}, "min_len=-1"),
        ({"budget": 6}, "budget=6 cannot be split.*at least 7"),
        ({"budget": 0.5}, "budget=0.5"),
        ({"budget": 100, "key_block_size": 3}, "key_block_size=3 is no power of two"),
    ],
    ids=str,
)
def test_bad_values(fields, reason):
    with pytest.raises(PolicyError, match=reason):
        kvpress.make_policy({"name": "hip", **fields})


def test_a_model_without_a_layer_to_select_in_is_refused(model):
    with pytest.raises(
        PolicyError, match=r"dense_layers=3 leaves no layer to select in.*2 attention layers.*at most 1"
    ):
        kvpress.patch(model, HiP())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([HiP(), XAttention()], r"hip\(\) and x_attention\(\) both play the role 'prefill'"),
        ([HiP(), Quest()], r"hip\(\) and quest\(\) both play the role 'selection'"),
        ([HiP(), A2SF(evict="each_row")], r"a2sf\(.*attends a prompt row by row, and hip\(\) plans"),
        ([HiP(), H2O(rope="reindex")], r"hip\(\) compares queries with rotated keys"),
        ([HiP(), AdaKV(SnapKV())], r"ada_kv\(.*keeps another number of entries in each kv head, and hip\(\) chooses"),
        ([HiP(), H2O()], r"h2o\(.*frees slots in decode, and the leaves.*snapkv"),
    ],
    ids=lambda value: "+".join(p.name for p in value) if isinstance(value, list) else "",
)
def test_refused_pairs(spec, reason):
    with pytest.raises(PolicyError, match=reason):
        make_policies(spec)


# ---------------------------------------------------------------------------------------------------- on a model


def check(logits, steps, row=0):
    for got, step in zip(logits, steps, strict=True):
        torch.testing.assert_close(got[row, -len(step.logits) :], step.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        SMALL,
        {**SMALL, "refresh": 1, "row_stride": 2},
        {**SMALL, "key_block_size": 1, "k": 5, "sink": 0, "window": 1, "refresh": 50},
        {**SMALL, "key_block_size": 4, "k": 8, "sink": 3, "window": 6, "dense_layers": 1},
        {**SMALL, "block_size": 16, "min_len": 30},
    ],
    ids=str,
)
@pytest.mark.usefixtures("path")
def test_prompts_turns_and_steps_are_the_oracles(model, fields, monkeypatch):
    log = watch(monkeypatch, HiP)
    logits, _, _ = run(model, HiP(**fields), PASSES)
    oracle = hip.Walking(model, hip.HiP(**fields))
    check(logits, oracle.run(PASSES))
    for (at, layer), heads in log.items():
        assert heads == oracle.log.get((layer, at), [list(range(at + 1))] * 4)
    assert any(len(head) < at + 1 for (at, _), heads in log.items() for head in heads)


@pytest.mark.parametrize("cuts", [[26], [8, 18], [8, 12, 6], [5, 9, 12], [13, 1, 12]])
def test_chunks(model, cuts):
    """Blocks are counted from the first entry: whole blocks at a time give what the whole prompt gives."""
    ids = prompt(26)
    passes = [ids[sum(cuts[:i]) : sum(cuts[: i + 1])] for i in range(len(cuts))]
    logits, _, _ = run(model, HiP(**SMALL), passes)
    check(logits, hip.Walking(model, hip.HiP(**SMALL)).run(passes))
    if all(sum(cuts[:i]) % 4 == 0 for i in range(len(cuts))):
        whole, _, _ = run(model, HiP(**SMALL), [ids])
        torch.testing.assert_close(torch.cat(logits, dim=1), whole[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"k": 500}, {"window": 500}, {"sink": 500}, {"min_len": 500}], ids=str)
def test_room_for_everything_is_dense(model, fields):
    """Prompts and turns; steps where they read everything, too."""
    logits, _, report = run(model, HiP(**{**SMALL, **fields}), PASSES)
    expected = dense(model, PASSES)[0]
    exact = len(PASSES[0]) if "min_len" in fields else None
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, :exact], expected[:, :exact], atol=1e-5, rtol=1e-4)
    assert report.total.density == pytest.approx(1)
    if "k" in fields:
        assert report.total.read_share == 1


def test_padded_sequences_are_as_alone(model):
    texts, mask = [[0] * 8 + prompt(16, 4), prompt(24, 5)], torch.ones(2, 24 + 7 + 14 + 2, dtype=torch.long)
    mask[0, :8] = 0
    steps, later = ([[[token], [token + 1]] for token in prompt(count, 6)] for count in (7, 2))
    turn = [prompt(14, 6), prompt(14, 7)]
    logits, _, _ = run(model, HiP(**SMALL), [texts, *steps, turn, *later], mask)
    oracle = hip.Walking(model, hip.HiP(**SMALL))
    for row in range(2):
        alone = [texts[row][8 * (row == 0) :], *(s[row] for s in steps), turn[row], *(s[row] for s in later)]
        check(logits, oracle.run(alone), row)


@pytest.mark.parametrize("evict", ["each_pass", "after_prompt"])
def test_beside_an_eviction_after_the_prompt(model, evict):
    """Leaves are runs of what is kept."""
    fields = {"budget": 14, "window": 4, "kernel_size": 3, "evict": evict}
    rules = hip.HiP(**SMALL, over=snapkv.SnapKV(**fields))
    logits, cache, _ = run(model, [HiP(**SMALL), SnapKV(**fields)], PASSES)
    steps = hip.Walking(model, rules).run(PASSES)
    check(logits, steps)
    assert kept(cache) == steps[-1].kept


def test_searches_are_every_few_steps(model, monkeypatch):
    """Steps 1, 4 and 7 after a prompt; a search's leaves stay until the next; a new prompt forgets them."""
    searches, original = [], HiP._found

    def noted(self, view, held):
        searches.append((int(view.seen[0]) - 1, view.layer))
        return original(self, view, held)

    monkeypatch.setattr(HiP, "_found", noted)
    run(model, HiP(**{**SMALL, "dense_layers": 1}), PASSES)
    assert searches == [(at, 1) for at in (26, 29, 32, 47, 50)]


def test_after_steps_were_taken_back_a_search_is_made(model):
    """As an unbroken run gives it: steps 27 and 28 are taken back, and 27 is searched for again."""
    policy, cache = HiP(**{**SMALL, "refresh": 100}), DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, policy):
        model(torch.tensor([prompt(26)]), **{CACHE: cache})
        for token in (3, 4, 5):
            model(torch.tensor([[token]]), **{CACHE: cache})
        cache.crop(27)
        got = model(torch.tensor([[9]]), **{CACHE: cache}).logits[0, -1]
    fresh = replace(policy, refresh=1)
    expected, _, _ = run(model, fresh, [prompt(26), [3], [9]])
    torch.testing.assert_close(got, expected[-1][0, -1], atol=1e-5, rtol=1e-4)


def test_changing_a_token_changes_nothing_before_its_block(model):
    """A block's rows are compared with each other's keys, and with none behind the block."""
    ids = prompt(30)
    other = [*ids[:21], (ids[21] - 2) % 50 + 3, *ids[22:]]
    (a,), _, _ = run(model, HiP(**SMALL), [ids])
    (b,), _, _ = run(model, HiP(**SMALL), [other])
    torch.testing.assert_close(a[:, :20], b[:, :20], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(a[:, 21], b[:, 21])


@pytest.mark.parametrize("budget", [6, 10])
def test_lists_hold_no_leaf_twice_and_no_more_than_the_budget(budget):
    query, keys = torch.randn(2, 1, 4, 70, 8, generator=torch.Generator().manual_seed(0))
    policy = HiP(k=budget, window=5, sink=3, block_size=8, key_block_size=2, dense_layers=0)
    view = FakeView(query[:, :, 13:], keys[:, :2])
    pattern = policy.plan(view)
    assert isinstance(pattern, Pattern) and pattern.sizes == {"block_size": 8, "key_block_size": 2}
    assert pattern.blocks.shape[:3] == (1, 4, 8)  # the rows begin with entry 13, in block 1
    for head in pattern.blocks[0].tolist():
        for block, listed in enumerate(head, 1):
            leaves = [one for one in listed if one >= 0]
            assert len(set(leaves)) == len(leaves) and max(leaves) <= (min(70, block * 8 + 8) - 1) // 2
            assert {0, 1} <= set(leaves)
            assert set(range(max(0, block * 8 - 4) // 2, -(-min(70, block * 8 + 8) // 2))) <= set(leaves)
            assert len(leaves) <= budget // 2 + 2 + (5 + 8 - 1) // 2 + 1


class FakeView:
    """What `plan` looks at."""

    def __init__(self, query, keys):
        self.query, self.keys, self.layer = query, keys, 0


def test_report_counts_searches(model):
    """A step reads what its widest group chose; one that searches also keys of a round, but none more than once."""
    passes = [prompt(120), *([token] for token in prompt(4, 1))]
    monkey = pytest.MonkeyPatch()
    try:
        log = watch(monkey, HiP)
        _, _, report = run(model, HiP(**{**SMALL, "dense_layers": 1}), passes)
    finally:
        monkey.undo()
    assert report.layers[0].read_share == 1
    groups = [
        [set().union(*heads[2 * kv : 2 * kv + 2]) for kv in (0, 1)] for heads in (log[at, 1] for at in range(120, 124))
    ]
    read = sum(max(map(len, of_step)) for of_step in groups)
    # 61 leaves and 2 of them kept: 5 rounds, each of 4 leaves of 2 keys for 2 heads, less than the 121 keys that there are
    searched = min(5 * 4 * 2 * 2, 121) / 2 + min(5 * 4 * 2 * 2, 124) / 2
    assert report.layers[1].read_share == pytest.approx((read + searched) / (121 + 122 + 123 + 124))
