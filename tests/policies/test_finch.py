"""FINCH: what the question at the end of a prompt looks at, attended at consecutive places."""

import math

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.observe import Observed, Scores
from kvpress.places import Consecutive, rotated
from kvpress.policies import AdaKV, Finch, Quest
from kvpress.policy import Entries
from kvpress.rotary import Rotary
from oracles.finch import scores as by_rows
from support.matrix import both, check, conversation, expect, kept, prompt, run, sharp_llama
from support.models import tiny_opt
from support.refusals import refused

WEIGHTS = [(3.0, 1, 1, 1, 1, 0), (1.0, 1, 1, 1, 2, 2)]  # of the last two of six rows


@pytest.fixture(scope="module")
def model():
    return sharp_llama()


# ------------------------------------------------------------------ scores


def observed(weights, held=None, kv_heads=1):
    """What `Finch` counts where the last rows have these softmax weights: keys of one channel for each entry."""
    count, n = len(weights), len(weights[0])
    key = torch.eye(n)[None, None].expand(1, kv_heads, n, n)
    query = torch.tensor(weights).log().clamp(min=-1e4)[None, None].expand(1, kv_heads, count, n)
    positions = torch.arange(n).expand(1, kv_heads, n) if held is None else held
    at = torch.arange(n - count, n)[None]
    counted = Observed({}, {"window": query, "window.at": at})
    return Finch(question=count).observes.answer(counted, positions.int(), lambda: key, Scores(1.0))["mass"]


def test_the_specifications_scores():
    """N=6, w=2: factors 5 and 6, and the mean over both rows."""
    expected = [1.446429, 0.732143, 0.732143, 0.732143]
    torch.testing.assert_close(observed(WEIGHTS)[0, 0, :4], torch.tensor(expected), atol=1e-6, rtol=0)
    rows = [{i: weight / sum(row) for i, weight in enumerate(row) if i <= 4 + r} for r, row in enumerate(WEIGHTS)]
    assert by_rows(rows, range(4)) == pytest.approx(expected, abs=1e-6)


def test_a_row_counts_the_entries_that_its_kv_head_holds():
    """Of kv heads with different numbers of entries, each its own."""
    held = torch.tensor([[[0, 1, 2, 3, 4, 5], [-1, 1, -1, 3, 4, 5]]])
    got = observed(WEIGHTS, held, kv_heads=2)[0]
    torch.testing.assert_close(got[0], observed(WEIGHTS)[0, 0])
    first = 3 * 1 / 3 + 4 * 1 / 6  # entry 3 of the second head: rows see 3 and 4 of its entries
    assert got[1, 3] == pytest.approx(first / 2, abs=1e-6)
    assert got[1, 0] == got[1, 2] == 0


def test_even_rows_count_alike():
    """Rows whose weights are even give each entry 1, however many they see; a plain mean prefers what is seen by few."""
    rows = [[1.0] * (5 + i) + [0.0] * (4 - i) for i in range(5)]
    torch.testing.assert_close(observed(rows)[0, 0, :5], torch.ones(5), atol=1e-5, rtol=0)


def chosen(mass, policy, tokens):
    n = len(mass)
    positions = torch.arange(n, dtype=torch.int32)[None, None]
    candidates = positions < tokens - policy.question
    entries = Entries(positions, candidates, {"mass": torch.tensor([[mass]])}, torch.tensor([tokens]))
    room = policy.quota(tokens, 0, 1).total - policy.question
    score = policy.score(entries)[0, 0].masked_fill(~candidates[0, 0], -math.inf)
    return sorted(score.topk(room).indices.tolist())


def test_chunks_choose_among_themselves():
    """8 tokens and a question of 2, 5 of 10 kept: 3 of 8; after 3, 6 and 8 of them 1, 2 and 3."""
    mass = [9.0, 8, 7, 1, 3, 2, 4, 5, 50, 50]
    assert chosen(mass, Finch(budget=5, question=2), 10) == [0, 1, 2]
    assert chosen(mass, Finch(budget=0.5, question=2, chunk=3), 10) == [0, 4, 7]
    assert chosen(mass, Finch(budget=5, question=2, chunk=1), 10) == [2, 5, 7]
    assert chosen(mass, Finch(budget=5, question=2, chunk=100), 10) == [0, 1, 2]
    assert chosen([0.0] * 10, Finch(budget=5, question=2, chunk=3), 10) == [0, 3, 6]  # of equals the earlier


# ------------------------------------------------------------------ places


def test_a_budget_for_everything_changes_nothing(model):
    passes = conversation(4)
    dense, _ = run(model, "full", passes)
    ours, sets = run(model, Finch(budget=500, question=4), passes)
    for got, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert sets[-1][0][0] == list(range(sum(map(len, passes))))


@torch.no_grad()
def test_keys_stand_at_consecutive_places():
    """With one layer a kept token's key and value depend on it alone: the model on what is kept, from 0, says the same."""
    model = sharp_llama(layers=1, heads=2, kv_heads=1)
    ids = prompt(30)
    with kvpress.patch(model, Finch(budget=9, question=3)):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([ids]), **{CACHE: cache})
        short = [ids[place] for place in kept(cache)[0][0]]
        assert len(short) == 9 and short[-3:] == ids[-3:]
        for token in (5, 6, 7):
            got = model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1]
            short.append(token)
            expected = model(torch.tensor([short]), use_cache=False).logits[0, -1]  # exact, at 0 .. m-1
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        turn = [8, 9, 10]
        got = model(torch.tensor([turn]), **{CACHE: cache}).logits[0]
        expected = model(torch.tensor([short + turn]), use_cache=False).logits[0, -3:]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_later_turns_are_scored_where_they_read():
    """Entries side by side up to the newest row: distances to it are what they are in the attention."""
    rotary = Rotary(torch.tensor([0.7, 0.1]), False)
    keys = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    positions, seen = torch.tensor([[[9, 2, -1, 20]]], dtype=torch.int32), torch.tensor([21], dtype=torch.int32)
    got = Consecutive().as_read(keys, positions, seen, rotary)
    expected = rotated(keys, torch.tensor([[[19, 18, 0, 20]]], dtype=torch.int32), rotary)
    torch.testing.assert_close(got[:, :, [0, 1, 3]], expected[:, :, [0, 1, 3]])


@pytest.mark.parametrize("rope", ["reindex", "original"])
def test_two_turns_are_the_oracles(model, rope):
    case = both(Finch, {"budget": 500}, budget=0.4, question=3, rope=rope)
    passes = conversation(5)
    logits, sets = run(model, case.policy, passes)
    steps = expect(model, case, passes)
    check(steps, [one[-1] for one in logits])
    assert sets == [step.kept for step in steps]


# ------------------------------------------------------------------ quotas, company, bad input


@pytest.mark.parametrize(
    ("budget", "tokens", "total"), [(0.2, 100, 20), (0.29, 100, 29), (50, 1000, 50), (0.1, 40, 8), (0.5, 3, 8)]
)
def test_the_question_is_within_the_budget_and_always_stays(budget, tokens, total):
    quota = Finch(budget=budget, question=8).quota(tokens, 0, 2)
    assert (quota.total, quota.recent) == (total, 8)


def test_a_share_without_room_keeps_the_question(model):
    with kvpress.patch(model, Finch(budget=0.1, question=6)):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(20)]), **{CACHE: cache})
        assert kept(cache)[1][0] == list(range(14, 20))


def test_company(model):
    with refused("finch(question=4)", "rope='original'"):
        kvpress.patch(model, [Finch(question=4), Quest(budget=8, page_size=4, dense_layers=0)])
    with kvpress.patch(
        model, [Finch(question=4, budget=12, rope="original"), Quest(budget=8, page_size=4, dense_layers=0)]
    ) as handle:
        model.generate(torch.tensor([prompt(40)]), max_new_tokens=4, do_sample=False)
        assert handle.report().total.kept == 12 + 3
    with refused("finch(question=4)", "more than evict"):
        AdaKV(Finch(question=4))
    with kvpress.patch(model, AdaKV(Finch(question=4, budget=12, rope="original"))) as handle:
        model.generate(torch.tensor([prompt(40)]), max_new_tokens=4, do_sample=False)
        assert handle.report().total.kept == 12 + 3


def test_a_model_without_rotary_embedding():
    with refused("finch()", "rope='original'", error=kvpress.UnsupportedModelError):
        kvpress.patch(tiny_opt(), Finch())
    kvpress.patch(tiny_opt(), Finch(rope="original")).unpatch()


def test_bad_values():
    for question in (0, None):
        with refused(
            f"question={question}", "the question at the end", "len(tokenizer(text)['input_ids'])", "key_diff"
        ):
            Finch(question=question)
    for fields, words in (
        ({"question": -1}, ("question=-1", "at least 1")),
        ({"question": 2.5}, ("question=2.5", "at least 1")),
        ({"question": "What?"}, ("question='What?'", "at least 1")),
        ({"chunk": 0}, ("chunk=0", "at least 1")),
        ({"rope": "none"}, ("rope='none'", "'reindex'")),
        ({"budget": 8, "question": 8}, ("budget=8", "question=8")),
        ({"budget": 1.5}, ("budget=1.5",)),
    ):
        with refused(*words):
            Finch(**fields)
    assert kvpress.make_policy("finch", budget=0.3, question=5) == Finch(budget=0.3, question=5)
    assert Finch(question=9).describe() == "finch(question=9)"
