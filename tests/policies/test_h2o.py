"""H2O by the spec's hand values (section 1.7)."""

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import UnsupportedModelError
from kvpress.compat import CACHE
from kvpress.policies import H2O, StreamingLLM
from kvpress.policy import Consecutive, Own, Quota
from support.layers import kept, prompt, random_mass, row, step
from support.matrix import kept as held
from support.matrix import prompt as text
from support.matrix import run, sharp_llama
from support.models import tiny_opt
from support.refusals import refused

ROWS = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.1, 0.6, 0.3]])


def oracle(scores, heavy, recent):
    """Section 1.2 with sorted(): the `heavy` best before the last `recent`, ties to the earlier one."""
    if len(scores) <= heavy + recent:
        return list(range(len(scores)))
    first_recent = len(scores) - recent
    ranked = sorted(range(first_recent), key=lambda index: (-scores[index], index))
    return sorted(ranked[:heavy]) + list(range(first_recent, len(scores)))


def test_h1():
    """H1: [.5, .9, .1, .3] with one heavy and one recent keeps {1, 3}."""
    assert kept(prompt(H2O(heavy=1, recent=1), 4, row(0.5, 0.9, 0.1, 0.3))) == [1, 3]


@pytest.mark.parametrize(
    ("heavy", "recent", "expected"),
    [(1, 1, [0, 2]), (2, 0, [0, 1]), (0, 2, [1, 2])],
    ids=["1+1", "2+0", "0+2"],
)
@pytest.mark.parametrize("as_passes", [[3], [2, 1], [1, 2], [1, 1, 1]], ids=str)
def test_h2(heavy, recent, expected, as_passes):
    """H2: the rows add up to [1.7, 1.0, 0.3], in one pass or in several."""
    torch.testing.assert_close(ROWS.sum(0), torch.tensor([1.7, 1.0, 0.3]))
    layer, seen = None, 0
    for count in as_passes:
        mass = ROWS[seen : seen + count, : seen + count].sum(0).view(1, 1, -1)
        layer = prompt(H2O(heavy=heavy, recent=recent, evict="after_prompt"), count, mass, layer=layer)
        seen += count
    layer.settle()
    assert kept(layer) == expected


@pytest.mark.parametrize("recent", [1, 4, 7], ids="recent-{}".format)
def test_h4_no_heavy_is_a_sliding_window(recent):
    """H4: heavy=0 keeps the last `recent`, as StreamingLLM without sinks does (section 8.1, 3)."""
    layer = prompt(H2O(heavy=0, recent=recent), 10, random_mass(1, 1, 10))
    window = prompt(StreamingLLM(sink=0, recent=recent, rope="original"), 10)
    for seen in range(10, 16):
        assert kept(layer) == kept(window) == list(range(seen - recent, seen))
        step(layer, {0: 100.0, seen: 0.5})
        step(window)


def test_h5_no_recent_is_a_cache_of_heavy_hitters():
    """H5: recent=0 keeps the best accumulated scores alone; even the newest entry may leave."""
    layer = prompt(H2O(heavy=2, recent=0), 4, row(0.1, 2.0, 1.0, 0.5))
    assert kept(layer) == [1, 2]
    step(layer, {4: 0.2})
    assert kept(layer) == [1, 2]
    step(layer, {5: 1.5})
    assert kept(layer) == [1, 5]


@pytest.mark.parametrize("tokens", [5, 12, 33], ids="{}-tokens".format)
@pytest.mark.parametrize("heavy", [0, 1, 3], ids="heavy-{}".format)
@pytest.mark.parametrize("recent", [1, 2], ids="recent-{}".format)
def test_prompt_against_sorted(tokens, heavy, recent):
    """Random scores per sequence and kv head."""
    mass = random_mass(2, 3, tokens)
    layer = prompt(H2O(heavy=heavy, recent=recent), tokens, mass, batch=2, kv_heads=3)
    for b in range(2):
        for head in range(3):
            assert kept(layer, b, head) == oracle(mass[b, head].tolist(), heavy, recent)


@pytest.mark.parametrize(("heavy", "recent"), [(0, 1), (0, 2), (1, 0), (3, 0), (1, 1), (3, 2)], ids=str)
def test_steps_against_sorted(heavy, recent):
    """Decode steps: scores accumulate while an entry stays, and start anew with each entry."""
    weights = random_mass(40, 40).tolist()
    layer = prompt(H2O(heavy=heavy, recent=recent), 6, torch.tensor(weights[0][:6]).view(1, 1, 6))
    scores = dict(enumerate(torch.tensor(weights[0][:6]).tolist()))
    scores = {at: scores[at] for at in oracle(list(scores.values()), heavy, recent)}
    assert kept(layer) == sorted(scores)
    for seen in range(7, 30):
        step(layer, dict(enumerate(weights[seen])))
        scores = {**scores, seen - 1: 0.0}
        scores = {at: score + weights[seen][at] for at, score in scores.items()}
        order = sorted(scores)
        chosen = [order[index] for index in oracle([scores[at] for at in order], heavy, recent)]
        scores = {at: scores[at] for at in chosen}
        assert kept(layer) == chosen


def column_sums(model, ids):
    """What transformers' own attention weights sum to, per layer [kv_heads, n]."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    return [weights[0].double().unflatten(0, (-1, group)).sum(dim=(1, 2)) for weights in attentions]


def test_h6_right_before_eviction_scores_are_column_sums():
    """H6: after a prompt they are transformers' own column sums, and add up to one per row and query head."""
    model, ids = sharp_llama(), text(30)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.patch(model, H2O(budget=8, evict="after_prompt")):
        model(torch.tensor([ids]), **{CACHE: cache})
    for layer, sums in zip(cache.layers, column_sums(model, ids), strict=True):
        torch.testing.assert_close(layer.stats["mass"][0].double(), sums, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.stats["mass"][0].sum(-1), torch.full((2,), 30.0 * 2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("recent", [1, 3, 5], ids="recent-{}".format)
@pytest.mark.parametrize("passes", [[9], [4, 7], [9, 1, 1, 1, 6, 1, 1]], ids=str)
def test_h7_the_recent_are_always_the_last(recent, passes):
    """H7: after every pass and step the last `recent` positions are those last seen."""
    layer, seen = None, 0
    for count in passes:
        seen += count
        if layer is not None and count == 1:
            step(layer, dict(enumerate(random_mass(seen, seed=seen).tolist())))
        else:
            entries = count + (0 if layer is None else len(kept(layer)))
            layer = prompt(H2O(heavy=2, recent=recent), count, random_mass(1, 1, entries, seed=seen), layer=layer)
        assert kept(layer)[-recent:] == list(range(max(0, seen - recent), seen))
        assert len(kept(layer)) == min(seen, 2 + recent)


@pytest.mark.parametrize("recent", [0, 1, 7], ids="recent-{}".format)
def test_h8_the_smallest_column_sum_goes(recent):
    """H8: with room for N - 1 one entry goes, the smallest of transformers' column sums before the window."""
    model, ids = sharp_llama(), text(30)
    with torch.no_grad(), kvpress.patch(model, H2O(heavy=29 - recent, recent=recent)):
        sets = held(model(torch.tensor([ids]))[CACHE])
    for heads, sums in zip(sets, column_sums(model, ids), strict=True):
        for positions, scores in zip(heads, sums.tolist(), strict=True):
            victim = min(range(30 - recent), key=lambda at: scores[at])
            assert positions == [at for at in range(30) if at != victim]


def test_h8_one_too_many():
    """H8: with room for N - 1 exactly one entry goes, the smallest before the window."""
    mass = row(0.4, 0.9, 0.2, 0.3, 0.05, 0.01)
    assert kept(prompt(H2O(heavy=3, recent=2), 6, mass)) == [0, 1, 3, 4, 5]
    assert kept(prompt(H2O(heavy=4, recent=2), 6, mass)) == list(range(6))


def test_ties_go_to_the_earlier_entry():
    """Of equal scores the earlier position stays, in the prompt and in decode."""
    layer = prompt(H2O(heavy=2, recent=1), 5, torch.ones(1, 1, 5))
    assert kept(layer) == [0, 1, 4]
    step(layer, {5: 1.0})
    assert kept(layer) == [0, 1, 5]


def test_dropped_scores_are_lost():
    """A freed slot starts at zero: its new entry does not inherit the old one's score."""
    layer = prompt(H2O(heavy=2, recent=1), 3, row(5.0, 3.0, 4.0))
    step(layer, {3: 0.1})  # position 1 leaves, its slot takes position 4 in the next step
    assert kept(layer) == [0, 2, 3]
    step(layer, {4: 0.2})
    assert kept(layer) == [0, 2, 4]
    assert layer.stats["mass"][layer.positions == 4].item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({"budget": 8}, 100, 8, 4, id="even-halves"),
        pytest.param({"budget": 9}, 100, 9, 5, id="odd-one-is-recent"),
        pytest.param({"budget": 1}, 100, 1, 1, id="budget-1-is-the-newest"),
        pytest.param({"budget": 0.2}, 100, 20, 10, id="share"),
        pytest.param({"budget": 0.29}, 100, 29, 15, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2}, 99, 19, 10, id="share-rounds-down"),
        pytest.param({"budget": 0.2}, 3, 1, 1, id="share-of-a-short-prompt"),
        pytest.param({"budget": 1.0}, 7, 7, 4, id="everything"),
        pytest.param({"heavy": 3, "recent": 5}, 100, 8, 5, id="both-parts"),
        pytest.param({"heavy": 0.1, "recent": 0.1}, 19, 2, 1, id="both-shares-round-down-each"),
        pytest.param({"heavy": 0.15, "recent": 0.14}, 100, 29, 14, id="both-shares"),
        pytest.param({"heavy": 4, "recent": 0.5}, 10, 9, 5, id="parts-of-two-kinds"),
        pytest.param({"heavy": 0.1, "recent": 0.1}, 5, 1, 1, id="both-shares-round-to-nothing"),
        pytest.param({"heavy": 3, "budget": 8}, 100, 8, 5, id="rest-is-recent"),
        pytest.param({"recent": 3, "budget": 8}, 100, 8, 3, id="rest-is-heavy"),
        pytest.param({"heavy": 8, "budget": 8}, 100, 8, 0, id="all-heavy"),
        pytest.param({"recent": 8, "budget": 8}, 100, 8, 8, id="all-recent"),
        pytest.param({"heavy": 0, "budget": 8}, 100, 8, 8, id="no-heavy"),
        pytest.param({"recent": 0, "budget": 0.5}, 10, 5, 0, id="no-recent-with-a-share"),
        pytest.param({"heavy": 0.05, "budget": 0.2}, 100, 20, 15, id="share-rest-is-recent"),
        pytest.param({"heavy": 3, "recent": 5, "budget": 8}, 100, 8, 5, id="all-three"),
        pytest.param({"heavy": 0.1, "recent": 0.2, "budget": 0.3}, 100, 30, 20, id="all-three-shares"),
        pytest.param({"heavy": 0.2, "budget": 0.2}, 3, 1, 1, id="share-of-one-heavy-rounds-to-none"),
    ],
)
def test_quota(fields, tokens, total, recent):
    """How many stay, and how many of them are the newest."""
    policy = H2O(**fields)
    assert policy.quota(tokens, 0, 1) == policy.quota(tokens, 3, 4) == Quota(total, recent)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.29, 0.5, 1.0, 1, 2, 7], ids=str)
def test_quota_is_never_empty(budget):
    """Whatever the prompt's length: at least one entry, and recent fits the total."""
    for tokens in range(1, 200):
        quota = H2O(budget=budget).quota(tokens, 0, 1)
        assert quota.total >= 1 and 0 <= quota.recent <= quota.total


TURNS = [text(20), [5], [6], [7], text(5, 1), [8], [9]]


def test_reindex_is_a_fresh_prompt_of_what_is_kept():
    """In one layer with one kv head what is kept, as a prompt of its own, gives the unpatched model's same logits."""
    model = sharp_llama(layers=1, kv_heads=1)
    ids = [token for turn in TURNS for token in turn]
    before, seen = [], 0
    passes = run(model, H2O(heavy=4, recent=3, rope="reindex"), TURNS)
    for turn, logits, [[positions]] in zip(TURNS, *passes, strict=True):
        new = list(range(seen, seen + len(turn)))
        seen += len(turn)
        with torch.no_grad():
            fresh = model(torch.tensor([[ids[at] for at in before + new]])).logits[0, -len(turn) :]
        torch.testing.assert_close(logits, fresh, atol=1e-4, rtol=1e-4)
        before = positions
    assert before != list(range(seen - 7, seen))  # heavy hitters far behind were held


def test_rope_modes_differ_once_something_is_dropped():
    """The first prompt is the same; afterwards distances are others, unless only a window was kept."""
    model = sharp_llama()
    for heavy, same in ((4, False), (0, True)):
        (one, *then), (two, *other) = (
            run(model, H2O(heavy=heavy, recent=6, rope=rope), TURNS)[0] for rope in ("original", "reindex")
        )
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        far = max((a - b).abs().max() for a, b in zip(then, other, strict=True))
        assert far < 1e-4 if same else far > 1e-2


def test_reindex_needs_a_rotary_embedding():
    """A model without one is refused, before anything is changed; original positions work."""
    model = tiny_opt()
    with pytest.raises(UnsupportedModelError, match="rotary"):
        kvpress.patch(model, H2O(budget=4, rope="reindex"))
    kvpress.patch(model, H2O(budget=4)).unpatch()


def test_defaults():
    """20 % in equal halves at original positions, as in the paper's main results."""
    policy = H2O()
    assert (policy.budget, policy.heavy, policy.recent, policy.rope) == (None, None, None, "original")
    assert all(policy.quota(n, 0, 1) == H2O(budget=0.2).quota(n, 0, 1) for n in (1, 4, 5, 99, 1000, 131072))
    assert policy.places == Own() and H2O(rope="reindex").places == Consecutive()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"rope": "none"}, ("rope='none'", "'original'", "'reindex'"), id="rope"),
        pytest.param({"budget": 0}, ("budget=0", "at least 1"), id="no-budget"),
        pytest.param({"heavy": -1, "recent": 2}, ("heavy=-1", "at least 0"), id="negative"),
        pytest.param({"heavy": 3}, ("heavy=3", "recent=None", "give both"), id="half"),
        pytest.param({"heavy": 0, "recent": 0}, ("heavy=0", "recent=0", "at least one"), id="nothing"),
        pytest.param({"heavy": 5, "recent": 5, "budget": 8}, ("10", "budget=8", "lower"), id="too-large"),
        pytest.param({"heavy": 1, "recent": 5, "budget": 8}, ("6", "budget=8", "drop"), id="too-small"),
        pytest.param({"heavy": 0.1, "budget": 8}, ("0.1", "budget=8", "all as"), id="two-kinds"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        H2O(**fields)
