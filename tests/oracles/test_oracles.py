"""The oracle against Hugging Face's own Llama, the spec's hand values, and torch one-liners."""

from itertools import chain
from math import inf
from pathlib import Path

import pytest
import torch

from kvpress.compat import CACHE
from oracles import oracle_of
from oracles.common.llama import Oracle, rope_positions
from oracles.common.rules import (
    CLOSE,
    NearTie,
    column_sums,
    heavy_and_recent,
    pool,
    resolve,
    share,
    sink_and_recent,
    top,
)
from oracles.full import Full
from oracles.h2o import H2O
from oracles.snapkv import SnapKV
from oracles.streaming_llm import StreamingLLM
from support import models


def eager_llama(tied=False, attention="eager", **sizes):
    """A random GQA Llama whose attention is far from uniform; its norms are not ones."""
    return models.tiny_llama(seed=1, attention=attention, tie_word_embeddings=tied, **sizes)


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(models.VOCAB, (count,), generator=generator).tolist()


def split(ids, sizes):
    """Cut `ids` into passes of these sizes."""
    assert sum(sizes) == len(ids)
    ids = iter(ids)
    return [[next(ids) for _ in range(size)] for size in sizes]


PASSES = {
    "prompt": [13],
    "chunks": [5, 1, 6, 2],  # the 1 in the middle is a decode step by definition
    "prompt_decode": [9, 1, 1, 1, 1],
    "turns": [7, 1, 1, 6, 1, 1],
    "one_token_prompt": [1, 1, 1],
}
passes_cases = pytest.mark.parametrize("sizes", PASSES.values(), ids=PASSES.keys())

EVICTING = {
    "streaming": StreamingLLM(sink=2, recent=3),
    "streaming_original": StreamingLLM(sink=2, recent=3, rope="original"),
    "streaming_share": StreamingLLM(budget=0.5),
    "h2o": H2O(heavy=2, recent=2),
    "h2o_share": H2O(budget=0.4),
    "snapkv": SnapKV(budget=5, window=2, kernel_size=3),
    "snapkv_share_max": SnapKV(budget=0.4, window=2, kernel_size=3, pooling="max"),
}
policy_cases = pytest.mark.parametrize("policy", EVICTING.values(), ids=EVICTING.keys())


def test_every_policy_has_its_oracle_in_a_file_of_its_name():
    shipped = models.shipped_policies()
    files = {file.stem for file in Path(__file__).parent.glob("*.py")}
    assert set(shipped) == files - {"__init__", "test_oracles"}
    for policy in shipped.values():
        assert oracle_of(policy).__module__ == f"oracles.{policy.name}"


# --- without eviction: Hugging Face's own forward -------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [{"layers": 3}, {"tied": True}, {"kv_heads": 4}, {"kv_heads": 1}],
    ids=["gqa", "tied", "mha", "mqa"],
)
@passes_cases
def test_full_equals_transformers(sizes, options, attention):
    model = eager_llama(attention=attention, **options)
    passes = split(tokens(sum(sizes)), sizes)
    steps = Oracle(model, Full()).run(passes)
    cache = None
    with torch.no_grad():
        for step, ids in zip(steps, passes, strict=True):
            output = model(torch.tensor([ids]), **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            torch.testing.assert_close(step.logits, output.logits[0], atol=1e-4, rtol=0)
    everything = list(range(sum(sizes)))
    assert all(head == everything for layer in steps[-1].kept for head in layer)


def test_the_tiny_model_distinguishes_heads():
    """Else the tests here would prove little: kv heads and layers keep different entries."""
    model = eager_llama(layers=3)
    [step] = Oracle(model, H2O(budget=6)).run([tokens(20)])
    assert len({tuple(head) for layer in step.kept for head in layer}) >= 5


@policy_cases
def test_a_large_budget_is_full_attention(policy):
    large = {
        StreamingLLM: StreamingLLM(budget=100, rope=getattr(policy, "rope", "original")),
        H2O: H2O(budget=100),
        SnapKV: SnapKV(budget=100),
    }[type(policy)]
    model, passes = eager_llama(), split(tokens(12), [6, 4, 1, 1])
    for step, full in zip(Oracle(model, large).run(passes), Oracle(model, Full()).run(passes), strict=True):
        assert step.kept == full.kept
        torch.testing.assert_close(step.logits, full.logits, atol=1e-5, rtol=0)


# --- with eviction: Hugging Face's forward over the whole text, masked by what the oracle says it kept ---------


def masked_replay(model, passes, steps):
    """One eager forward of all tokens, each layer and head masked to what was held. Returns (logits, attentions).

    A row sees what its layer's kv head held before its pass and its own pass up to itself.
    """
    total = sum(map(len, passes))
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    handles = []
    for layer, block in enumerate(model.model.layers):
        mask = torch.full((1, model.config.num_attention_heads, total, total), -torch.inf)
        start = 0
        for index, ids in enumerate(passes):
            for head in range(model.config.num_attention_heads):
                held = steps[index - 1].kept[layer][head // group] if index else []
                for row in range(start, start + len(ids)):
                    mask[0, head, row, held + list(range(start, row + 1))] = 0
            start += len(ids)

        def set_mask(module, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        handles.append(block.self_attn.register_forward_pre_hook(set_mask, with_kwargs=True))
    with torch.no_grad():
        output = model(torch.tensor([list(chain(*passes))]), output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return output.logits[0], output.attentions


@pytest.mark.parametrize(
    "policy", [p for p in EVICTING.values() if p.rope == "original"], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("sizes", [[10, 1, 1, 1], [6, 5, 1, 1, 4, 1]], ids=["prompt_decode", "turns"])
def test_logits_are_those_of_the_kept_entries(policy, sizes):
    model, passes = eager_llama(layers=3), split(tokens(sum(sizes)), sizes)
    steps = Oracle(model, policy).run(passes)
    logits, _ = masked_replay(model, passes, steps)
    torch.testing.assert_close(torch.cat([step.logits for step in steps]), logits, atol=1e-4, rtol=0)
    [full] = Oracle(model, Full()).run([list(chain(*passes))])
    assert (full.logits[-1] - logits[-1]).abs().max() > 1e-2


@pytest.mark.parametrize("sizes", [[12, 1, 1, 1, 1], [6, 5, 1, 1, 4, 1]], ids=["prompt_decode", "turns"])
def test_h2o_keeps_by_transformers_attention(sizes):
    """H8 and spec 1.2: scores summed from the masked replay's own attention weights."""
    heavy, recent = 3, 2
    model, passes = eager_llama(layers=2), split(tokens(sum(sizes)), sizes)
    steps = Oracle(model, H2O(heavy=heavy, recent=recent)).run(passes)
    _, attentions = masked_replay(model, passes, steps)
    for layer, attention in enumerate(attentions):
        mass = attention[0].unflatten(0, (2, 2)).sum(1)  # [kv_heads, rows, columns]
        for kv_head in range(2):
            held, end = [], 0
            for step, ids in zip(steps, passes, strict=True):
                held = held + list(range(end, end + len(ids)))
                end += len(ids)
                score = mass[kv_head, :end].sum(0)[held[:-recent]]
                held = sorted([held[i] for i in score.topk(heavy).indices]) + held[-recent:]
                assert step.kept[layer][kv_head] == held


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("budget, window", [(8, 3), (8, 6), (3, 6), (9, 40)])
def test_snapkv_keeps_by_transformers_attention(pooling, kernel_size, budget, window):
    """Spec 7.2, also with a window larger than the budget (only the last entries stay) or than a turn."""
    model, passes = eager_llama(layers=2), split(tokens(28), [18, 1, 1, 5, 3])
    steps = Oracle(model, SnapKV(budget, window, kernel_size, pooling)).run(passes)
    _, attentions = masked_replay(model, passes, steps)
    pool1d = {
        "avg": torch.nn.functional.avg_pool1d,
        "max": torch.nn.functional.max_pool1d,
    }[pooling]
    last = min(window, budget)
    for layer, attention in enumerate(attentions):
        mass = attention[0].unflatten(0, (2, 2)).sum(1)
        for kv_head in range(2):
            held, end = [], 0
            for index, (step, ids) in enumerate(zip(steps, passes, strict=True)):
                held = held + list(range(end, end + len(ids)))
                end += len(ids)
                if index == 0 or len(ids) > 1:
                    rows = mass[kv_head, end - min(window, len(ids)) : end].sum(0)
                    pooled = pool1d(rows[None, held[:-last]], kernel_size, 1, kernel_size // 2)[0]
                    order = pooled.sort(descending=True, stable=True).indices[: budget - last]
                    held = sorted([held[i] for i in order]) + held[-last:]
                assert step.kept[layer][kv_head] == held


def test_streaming_reindex_is_a_fresh_prompt_of_what_is_kept():
    """In one layer keys and values depend on their token only, so the kept tokens alone give the logits."""
    model, ids = eager_llama(layers=1), tokens(12)
    steps = Oracle(model, StreamingLLM(sink=2, recent=3)).run(split(ids, [6, 3, 1, 1, 1]))
    position = 6
    for before, step, size in zip(steps, steps[1:], [3, 1, 1, 1], strict=False):
        held = before.kept[0][0]
        new = list(range(position, position + size))
        position += size
        with torch.no_grad():
            fresh = model(torch.tensor([[ids[p] for p in held + new]])).logits[0, -size:]
        torch.testing.assert_close(step.logits, fresh, atol=1e-4, rtol=0)


def test_streaming_rope_modes_differ_only_with_sinks():
    """Without sinks the kept entries are consecutive, and RoPE sees distances only."""
    model, passes = eager_llama(), split(tokens(12), [8, 1, 1, 2])
    for sink, same in [(0, True), (2, False)]:
        a, b = (
            torch.cat([s.logits for s in Oracle(model, StreamingLLM(sink, 4, rope=rope)).run(passes)])
            for rope in ("reindex", "original")
        )
        assert ((a - b).abs().max() < 1e-5) == same


# --- the spec's hand values -----------------------------------------------------------------------------------

H2_ROWS = [{0: 1.0}, {0: 0.6, 1: 0.4}, {0: 0.1, 1: 0.6, 2: 0.3}]


def test_h1_one_heavy_one_recent():
    assert heavy_and_recent([0.5, 0.9, 0.1, 0.3], heavy=1, recent=1) == [1, 3]
    assert heavy_and_recent([0.5, 0.1, 0.1, 0.9], heavy=1, recent=1) == [0, 3]  # the recent do not compete


def test_h2_accumulated_rows():
    sums = column_sums(H2_ROWS)
    assert sums == pytest.approx({0: 1.7, 1: 1.0, 2: 0.3})
    assert heavy_and_recent(list(sums.values()), heavy=1, recent=1) == [0, 2]
    assert heavy_and_recent(list(sums.values()), heavy=2, recent=0) == [0, 1]


def test_h4_no_heavy_is_a_sliding_window():
    model, passes = eager_llama(), split(tokens(12), [7, 1, 1, 2, 1])
    h2o = Oracle(model, H2O(heavy=0, recent=4)).run(passes)
    window = Oracle(model, StreamingLLM(sink=0, recent=4, rope="original")).run(passes)
    for a, b in zip(h2o, window, strict=True):
        assert a.kept == b.kept
        assert torch.equal(a.logits, b.logits)


def test_h5_no_recent_is_a_pure_score_cache():
    oracle = Oracle(eager_llama(), H2O(heavy=5, recent=0))
    [step] = oracle.run([tokens(12)])
    reference = Oracle(eager_llama(), Full())
    reference.run([tokens(12)])
    for layer, kept in enumerate(step.kept):
        for kv_head, positions in enumerate(kept):
            scores = torch.tensor([entry.score for entry in reference.heads[layer][kv_head].entries])
            assert positions == sorted(scores.topk(5).indices.tolist())


def test_h6_every_row_gives_one_per_query_head():
    oracle = Oracle(eager_llama(heads=4, kv_heads=2), Full())
    oracle.run(split(tokens(9), [6, 1, 2]))
    for layer in oracle.heads:
        for head in layer:
            assert sum(entry.score for entry in head.entries) == pytest.approx(2 * 9)


@pytest.mark.parametrize("sizes", [[9, 1, 1, 1, 1, 1], [4, 5, 1, 1, 6, 1]], ids=["prompt_decode", "turns"])
def test_h7_the_recent_are_always_the_last(sizes):
    steps = Oracle(eager_llama(), H2O(heavy=2, recent=3)).run(split(tokens(sum(sizes)), sizes))
    seen = 0
    for step, size in zip(steps, sizes, strict=True):
        seen += size
        for layer in step.kept:
            for positions in layer:
                assert positions[-3:] == [seen - 3, seen - 2, seen - 1]
                assert len(positions) == min(seen, 5)


def test_streaming_hand_values():
    assert sink_and_recent(7, sink=2, recent=3) == [0, 1, 4, 5, 6]
    assert rope_positions([0, 1, 4, 5, 6], "reindex") == [0, 1, 2, 3, 4]
    assert rope_positions([0, 1, 4, 5, 6], "original") == [0, 1, 4, 5, 6]
    [step] = Oracle(eager_llama(), StreamingLLM(sink=2, recent=3)).run([tokens(7)])
    assert step.kept == [[[0, 1, 4, 5, 6]] * 2] * 2


def test_snapkv_pooling_hand_values():
    assert pool([0, 0, 9, 0, 0], 3, "max") == [0, 9, 9, 9, 0]
    assert pool([0, 0, 9, 0, 0], 3, "avg") == [0, 3, 3, 3, 0]
    assert pool([9, 0, 0], 3, "avg") == [3, 3, 0]  # the zero padding counts
    assert pool([-1, -2], 3, "max") == [-1, -1]  # the padding never wins
    assert pool([4, 2, 7], 1, "avg") == pool([4, 2, 7], 1, "max") == [4, 2, 7]


def test_ties_go_to_the_smaller_position():
    assert top([1.0, 3.0, 3.0, 3.0, 2.0], 2) == [1, 2]
    assert heavy_and_recent([1.0] * 6, heavy=2, recent=1) == [0, 1, 5]


def test_a_near_tie_is_no_result():
    """What rounding decides fails by name, and equal scores do not: their order is the rule's."""
    assert top([0.3, 0.1 + 0.2, 0.5], 1) == [2]  # they do not compete
    with pytest.raises(NearTie, match="near tie"):
        top([0.3, 0.1 + 0.2, 0.5], 2)
    assert top([0.3, 0.3, 0.5], 2) == [0, 2] and top([0.0, 0.0], 1) == [0] and top([inf, inf], 1) == [0]
    assert top([1.0, 1.0 + 2 * CLOSE], 1) == [1]


# --- budgets --------------------------------------------------------------------------------------------------


def test_shares_are_exact_decimals():
    assert int(0.29 * 100) == 28 and share(0.29, 100) == 29
    assert share(0.1, 9) == 0 and resolve(0.1, 9) == 1
    assert resolve(1, 50) == 1 and resolve(1.0, 50) == 50


@pytest.mark.parametrize(
    "policy, seen, parts",
    [
        (H2O(budget=7), 99, (3, 4)),
        (H2O(budget=0.01), 10, (0, 1)),
        (H2O(heavy=0.1, recent=0.15), 19, (1, 2)),
        (H2O(heavy=0.1, recent=0.1), 9, (0, 1)),
        (H2O(heavy=3, recent=0.1), 9, (3, 0)),
        (StreamingLLM(sink=4, recent=3), 99, (4, 3)),
        (StreamingLLM(sink=0, recent=0.1), 9, (0, 1)),
        (StreamingLLM(sink=2, recent=0.1), 9, (2, 1)),
        (StreamingLLM(budget=10), 99, (4, 6)),
        (StreamingLLM(budget=3), 99, (4, 1)),
        (StreamingLLM(budget=1), 99, (4, 1)),
    ],
    ids=str,
)
def test_parts_of_a_budget(policy, seen, parts):
    assert policy.parts(seen) == parts


@policy_cases
def test_lengths_after_each_pass(policy):
    """A share follows the prompt passes, not the decode steps; prompt-only policies grow in decode."""
    sizes = [10, 1, 1, 8, 1]
    steps = Oracle(eager_llama(), policy).run(split(tokens(sum(sizes)), sizes))
    totals = {
        "streaming": [5] * 5,
        "streaming_original": [5] * 5,
        "streaming_share": [5, 5, 5, 10, 10],
        "h2o": [4] * 5,
        "h2o_share": [4, 4, 4, 8, 8],
        "snapkv": [5, 6, 7, 5, 6],
        "snapkv_share_max": [4, 5, 6, 8, 9],
    }
    [name] = [name for name, candidate in EVICTING.items() if candidate is policy]
    for step, total in zip(steps, totals[name], strict=True):
        assert all(len(positions) == total for layer in step.kept for positions in layer)


@policy_cases
def test_what_is_evicted_never_returns(policy):
    sizes = [6, 3, 1, 1, 4, 1]
    steps = Oracle(eager_llama(), policy).run(split(tokens(sum(sizes)), sizes))
    seen, before = 0, [[[], []], [[], []]]
    for step, size in zip(steps, sizes, strict=True):
        new = set(range(seen, seen + size))
        seen += size
        for layer in range(2):
            for kv_head in range(2):
                assert set(step.kept[layer][kv_head]) <= set(before[layer][kv_head]) | new
        before = step.kept


# --- evict="after_prompt" -------------------------------------------------------------------------------------

AFTER_PROMPT = {
    "streaming": (StreamingLLM, {"sink": 2, "recent": 4}),
    "streaming_original": (StreamingLLM, {"budget": 0.5, "rope": "original"}),
    "h2o": (H2O, {"heavy": 3, "recent": 3}),
    "h2o_share": (H2O, {"budget": 0.4}),
    "snapkv": (SnapKV, {"budget": 0.4, "window": 3, "kernel_size": 3}),
    "snapkv_max": (SnapKV, {"budget": 6, "window": 4, "pooling": "max"}),
    "snapkv_window_over_budget": (SnapKV, {"budget": 3, "window": 5}),
}


@pytest.mark.parametrize("policy, options", AFTER_PROMPT.values(), ids=AFTER_PROMPT.keys())
@pytest.mark.parametrize("chunks", [[14], [7, 7], [2, 3, 4, 5], [12, 2]], ids=str)
def test_chunks_after_prompt_equal_one_prompt(policy, options, chunks):
    """U7: the same entries stay and the same logits follow, however the prompt is cut."""
    model, ids, decode = eager_llama(), tokens(17), [1, 1, 1]
    once = Oracle(model, policy(**options)).run(split(ids, [14, *decode]))
    late = Oracle(model, policy(**options, evict="after_prompt")).run(split(ids, chunks + decode))
    everything = list(range(14))
    assert all(head == everything for layer in late[len(chunks) - 1].kept for head in layer)
    for a, b in zip(once[1:], late[len(chunks) :], strict=True):
        assert a.kept == b.kept
        torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=0)
    prompt = torch.cat([step.logits for step in late[: len(chunks)]])
    torch.testing.assert_close(prompt, once[0].logits, atol=1e-5, rtol=0)


def test_chunks_that_evict_at_once_differ():
    """The reason for after_prompt: with each_pass the first chunk's choice is final."""
    model, ids = eager_llama(), tokens(14)
    once = Oracle(model, H2O(budget=4)).run([ids])
    chunked = Oracle(model, H2O(budget=4)).run(split(ids, [7, 7]))
    assert once[-1].kept != chunked[-1].kept


def test_snapkv_after_prompt_waits_and_evicts_once():
    """Turn, answer, turn, answer: the cache grows in a turn, shrinks at its first decode step, then grows."""
    sizes = [8, 1, 1, 3, 4, 1, 1]
    steps = Oracle(eager_llama(), SnapKV(budget=5, window=2, evict="after_prompt")).run(
        split(tokens(sum(sizes)), sizes)
    )
    lengths = [len(step.kept[0][0]) for step in steps]
    assert lengths == [8, 6, 7, 10, 14, 6, 7]


@pytest.mark.parametrize("seed", range(4))
def test_snapkv_after_prompt_forgets_the_rows_of_an_earlier_turn(seed):
    """A window longer than the turn scores with the turn's rows only, as each_pass does."""
    model, ids, sizes = eager_llama(), tokens(19, seed), [14, 1, 1, 2, 1]
    options = {"budget": 12, "window": 6, "kernel_size": 1}
    now = Oracle(model, SnapKV(**options)).run(split(ids, sizes))
    late = Oracle(model, SnapKV(**options, evict="after_prompt")).run(split(ids, sizes))
    assert now[-1].kept == late[-1].kept
