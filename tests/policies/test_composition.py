"""A policy that evicts and one that selects, together: against an oracle that does both, and pairs that are refused."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kvpress
from kvpress import PolicyError
from kvpress.policies import A2SF, H2O, Quest, RecycledAttention, SnapKV, StreamingLLM, TidalDecode
from kvpress.policy import Policy
from kvpress.registry import make_policies
from oracles import oracle_of
from support.matrix import kept, prompt, sharp_llama
from support.reads import run, watch

LAYERS = 5
PASSES = [prompt(26), *([token] for token in prompt(6, 1)), prompt(6, 2), *([token] for token in prompt(4, 3))]
STEPS = [*range(26, 32), *range(38, 42)]


@dataclass(frozen=True)
class Pair:
    """Two policies and what their oracles are."""

    evicts: Policy
    selects: Policy
    oracle: Any

    @property
    def id(self) -> str:
        return f"{self.evicts.describe()}+{self.selects.describe()}".replace(" ", "")


def pair(one: type[Policy], fields: dict[str, Any], two: type[Policy], more: dict[str, Any]) -> Pair:
    rules = oracle_of(two)(**more, over=oracle_of(one)(**fields))
    return Pair(one(**fields), two(**more), rules)


SNAP = {"budget": 14, "window": 4, "kernel_size": 3}
LATE = {"budget": 0.5, "window": 3, "kernel_size": 1, "evict": "after_prompt"}
TIDAL = {"k": 5, "sparse_layer_start": 1, "correction_layer": 3}
PAIRS = [
    pair(SnapKV, SNAP, TidalDecode, TIDAL),
    pair(SnapKV, LATE, TidalDecode, {"k": 0.4, "sparse_layer_start": 0, "correction_layer": 2}),
    pair(SnapKV, SNAP, Quest, {"budget": 8, "page_size": 4, "dense_layers": 1}),
    pair(SnapKV, LATE, Quest, {"budget": 0.5, "page_size": 3, "dense_layers": 0}),
    pair(H2O, {"heavy": 6, "recent": 4}, TidalDecode, TIDAL),
    pair(H2O, {"budget": 0.4}, TidalDecode, {"k": 6, "sparse_layer_start": 0}),
    pair(H2O, {"budget": 0.4, "evict": "after_prompt"}, TidalDecode, {"k": 4, "sparse_layer_start": 0}),
    pair(StreamingLLM, {"sink": 3, "recent": 9}, TidalDecode, TIDAL),
    pair(StreamingLLM, {"sink": 2, "recent": 10, "rope": "original"}, TidalDecode, {**TIDAL, "k": 0.3}),
    pair(SnapKV, SNAP, RecycledAttention, {"budget": 5, "stride": 3}),
    pair(SnapKV, LATE, RecycledAttention, {"budget": 0.4, "query_stride": 2, "similarity": 0.2}),
]
every_pair = pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=LAYERS)


@every_pair
def test_both_act(model, case, monkeypatch):
    """What is read in every step, layer and query head, what is kept after every pass, and the logits."""
    log = watch(monkeypatch, type(case.selects))
    logits, cache, report = run(model, [case.evicts, case.selects], PASSES)
    oracle = case.oracle.runner(model, case.oracle)
    steps = oracle.run(PASSES)
    for got, step in zip(logits, steps, strict=True):
        torch.testing.assert_close(got[0, -1], step.logits[-1], atol=1e-4, rtol=1e-4)
    assert log == {key: [sorted(head) for head in heads] for key, heads in oracle.log.items()}
    assert {at for at, _ in log} == set(STEPS)
    assert kept(cache) == steps[-1].kept
    assert report.total.kept < 40


@every_pair
def test_both_act_on_a_padded_batch(model, case):
    """Each sequence as it is alone; one may hold no more than is read, and so read everything, where another chooses."""
    texts, mask = [[0] * 8 + prompt(12, 4), prompt(20, 5)], torch.ones(2, 26, dtype=torch.long)
    mask[0, :8] = 0
    steps = [[[token], [token + 1]] for token in prompt(6, 6)]
    logits, cache, _ = run(model, [case.selects, case.evicts], [texts, *steps], mask)
    for row in range(2):
        oracle = case.oracle.runner(model, case.oracle)
        expected = oracle.run([texts[row][8 * (row == 0) :], *(step[row] for step in steps)])
        for got, step in zip(logits, expected, strict=True):
            torch.testing.assert_close(got[row, -1], step.logits[-1], atol=1e-4, rtol=1e-4)
        assert kept(cache, row) == expected[-1].kept


@pytest.mark.parametrize(
    "evicts",
    [H2O(budget=12), StreamingLLM(sink=2, recent=8), A2SF(budget=10, alpha=0.5), SnapKV(**SNAP)],
    ids=lambda p: p.describe(),
)
def test_a_selection_with_room_leaves_the_eviction_as_it_is(model, evicts):
    """Picking everything in one layer is reading everything in the next, whatever that layer holds."""
    expected, cache, _ = run(model, evicts, PASSES)
    for selects in (TidalDecode(k=500, sparse_layer_start=0), TidalDecode(k=1.0, sparse_layer_start=0)):
        found, other, _ = run(model, [evicts, selects], PASSES)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert kept(other) == kept(cache)


def test_prompts_evicted_row_by_row_are_exact_beside_a_selection(model):
    """The selection policy acts in decode alone: a prompt whose rows evict as they come is as without it."""
    evicts = A2SF(budget=10, alpha=0.5, evict="each_row")
    expected, cache, _ = run(model, evicts, PASSES[:1])
    found, other, _ = run(model, [evicts, TidalDecode(k=2, sparse_layer_start=0)], PASSES[:1])
    torch.testing.assert_close(found[0], expected[0])
    assert kept(other) == kept(cache)


def test_reads_of_both_are_counted(model, monkeypatch):
    """SnapKV keeps 14 of 26; Quest reads 2 pages and the bounds of 4."""
    policies = [SnapKV(**SNAP), Quest(budget=8, page_size=4, dense_layers=1)]
    log = watch(monkeypatch, Quest)
    _, _, report = run(model, policies, PASSES[:2])
    assert report.layers[0].read_share == pytest.approx(15 / 27)
    for layer in range(1, LAYERS):
        assert report.layers[layer].read_share <= (4 * 4 + 4) / 27
        assert all(len(head) <= 8 for head in log[26, layer])
    assert report.total.kept == 15


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([H2O(budget=12), Quest()], r"h2o\(budget=12\) frees slots in decode, and the bounds of quest's pages"),
        ([StreamingLLM(), Quest()], r"streaming_llm\(.*frees slots in decode"),
        ([H2O(budget=12), RecycledAttention()], r"h2o\(budget=12\) frees slots in decode, and recycled's sets"),
        ([StreamingLLM(), RecycledAttention()], r"streaming_llm\(.*frees slots in decode"),
        ([TidalDecode(correct_every=8), H2O()], r"correct_every=8 takes decode steps back, and h2o\(.*evicts"),
        ([TidalDecode(correct_every=8), SnapKV()], r"correct_every=8 takes decode steps back, and snapkv\(\) evicts"),
        (
            [TidalDecode(), H2O(rope="reindex")],
            r"tidal_decode\(\) compares queries with rotated keys, and h2o\(.*rope='original'",
        ),
        ([TidalDecode(), Quest()], r"tidal_decode\(\) and quest\(\) both play the role 'selection'"),
    ],
    ids=lambda value: "+".join(p.name for p in value) if isinstance(value, list) else "",
)
def test_refused_pairs(spec, reason):
    """In either order, with the reason in one line."""
    with pytest.raises(PolicyError, match=reason) as caught:
        make_policies(spec)
    assert "\n" not in str(caught.value)
    if "both play" not in reason:
        with pytest.raises(PolicyError, match=reason):
            make_policies(spec[::-1])
    model = sharp_llama(layers=LAYERS)
    with pytest.raises(PolicyError, match=reason):
        kvpress.patch(model, spec)
    kvpress.patch(model, "full").unpatch()
