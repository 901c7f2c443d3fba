"""A2SF: accumulated attention that fades with every row."""

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import A2SF, H2O, TOVA
from kvpress.policy import Mass, Quota
from support.brute import attend
from support.layers import attended, kept, prompt, random_mass, rows_that_give
from support.matrix import kept as held
from support.matrix import prompt as text
from support.matrix import run, sharp_llama
from support.refusals import refused

H2_ROWS = [1, 0, 0], [0.6, 0.4, 0], [0.1, 0.6, 0.3]
ALPHAS = pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.95, 1.0], ids="alpha-{}".format)


def random_rows(tokens, seed=0, batch=2, kv_heads=2, group=3):
    """Queries and keys whose attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    query = 1.5 * torch.randn(batch, kv_heads * group, tokens, 4, generator=generator)
    return query, torch.randn(batch, kv_heads, tokens, 4, generator=generator)


def closed_form(query, key, alpha):
    """Sum over the rows q of alpha ** (N - 1 - q) times the row's weights, by the float64 loop, [batch, kv_heads, N]."""
    tokens = key.shape[2]
    total = torch.zeros(key.shape[:3], dtype=torch.float64)
    for at in range(tokens):
        visible = (torch.arange(tokens) <= at).expand(*key.shape[:2], 1, tokens)
        weights = attend(query[:, :, at : at + 1], key, key, visible, scale=1.0)[1]
        total += alpha ** (tokens - 1 - at) * weights
    return total


TURNS = [text(24), [5], [6], [7], text(6, 1), [8], [9]]


@pytest.mark.parametrize(("heavy", "recent"), [(4, 3), (0, 6), (6, 0), (0.3, 0.1)], ids=str)
def test_a1_without_forgetting_it_is_h2o(heavy, recent):
    """A1: the same sets and outputs with the same split."""
    model = sharp_llama()
    one, sets = run(model, A2SF(alpha=1, budget=heavy + recent, recent=recent), TURNS)
    two, others = run(model, H2O(budget=heavy + recent, recent=recent), TURNS)
    assert sets == others
    for logits, other in zip(one, two, strict=True):
        torch.testing.assert_close(logits, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("passes", [[12], [5, 7], [9, 1, 1, 1]], ids=str)
def test_a2_alpha_0_looks_at_the_last_row_only(passes):
    """A2: what the rows before saw does not matter, and the kept set is the best of the last row's weights."""
    query, key = random_rows(12)
    other = query.clone()
    other[:, :, :-1] = random_rows(12, seed=1)[0][:, :, :-1]
    policy = A2SF(alpha=0, budget=12 if len(passes) == 4 else 5, evict="after_prompt")
    layer, _ = attended(policy, query, key, passes)
    same, _ = attended(policy, other, key, passes)
    torch.testing.assert_close(layer.stats["mass"], same.stats["mass"], atol=0, rtol=0)
    whole = (torch.arange(12) <= 11).expand(2, 2, 1, 12)
    last = attend(query[:, :, 11:], key, key, whole, scale=1.0)[1]
    torch.testing.assert_close(layer.stats["mass"][:, :, :12].double(), last, atol=1e-6, rtol=1e-5)
    if len(passes) < 4:
        layer.settle()
        for b in range(2):
            for head in range(2):
                assert kept(layer, b, head) == sorted(last[b, head].topk(5).indices.tolist())


@pytest.mark.parametrize(
    ("alpha", "scores", "kept_of_two"),
    [
        (0.1, [0.17, 0.64, 0.30], [1, 2]),
        (0.5, [0.65, 0.80, 0.30], [0, 1]),
        (1.0, [1.7, 1.0, 0.3], [0, 1]),
        (0.0, [0.1, 0.6, 0.3], [1, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("passes", [[3], [2, 1], [1, 2], [1, 1, 1]], ids=str)
def test_a3(alpha, scores, kept_of_two, passes):
    """A3: the rows [1, 0, 0], [.6, .4, 0], [.1, .6, .3], of which the one entry too many depends on alpha."""
    query, key = rows_that_give(*H2_ROWS)
    layer, _ = attended(A2SF(alpha=alpha, budget=3), query, key, passes)
    torch.testing.assert_close(layer.stats["mass"][0, 0, :3], torch.tensor(scores))
    _, sets = attended(A2SF(alpha=alpha, budget=2), query, key, passes)
    assert sets[-1] == [[kept_of_two]]


@ALPHAS
@pytest.mark.parametrize("tokens", [1, 2, 40], ids="{}-tokens".format)
def test_a4_recursion_equals_the_closed_form(alpha, tokens):
    """A4: row by row, in one weighted column sum, or in chunks, while nothing is evicted."""
    query, key = random_rows(tokens)
    expected = closed_form(query, key, alpha)
    for passes in ([tokens], [1] * tokens, [tokens // 3, tokens - tokens // 3]):
        passes = [count for count in passes if count]
        layer, _ = attended(A2SF(alpha=alpha, budget=100), query, key, passes)
        torch.testing.assert_close(layer.stats["mass"][:, :, :tokens].double(), expected, atol=1e-5, rtol=1e-6)


@ALPHAS
def test_a5_the_scores_sum_to_a_geometric_series(alpha):
    """A5: (1 - alpha ** (n + 1)) / (1 - alpha) per query head after row n, never above 1 / (1 - alpha)."""
    query, key = random_rows(30, group=1)
    for tokens in (1, 7, 30):
        layer, _ = attended(A2SF(alpha=alpha, budget=100), query[:, :, :tokens], key[:, :, :tokens], [1] * tokens)
        sums = layer.stats["mass"][:, :, :tokens].sum(-1)
        expected = tokens if alpha == 1 else (1 - alpha**tokens) / (1 - alpha)
        torch.testing.assert_close(sums, torch.full_like(sums, expected), atol=1e-4, rtol=1e-5)
        assert alpha == 1 or (sums <= 1 / (1 - alpha) + 1e-4).all()


@pytest.mark.parametrize("factor", [2.0**-20, 1e-3, 7.3, 1e6], ids=str)
def test_a6_a_factor_on_all_scores_changes_nothing(factor):
    """A6: the kept set depends on the ranking alone."""
    mass = random_mass(2, 3, 20)
    policy = A2SF(budget=8, recent=2)
    one = prompt(policy, 20, mass, batch=2, kv_heads=3)
    two = prompt(policy, 20, factor * mass, batch=2, kv_heads=3)
    assert torch.equal(one.positions, two.positions)


def test_even_the_newest_may_leave():
    """Nothing is protected unless `recent` says so."""
    query, key = rows_that_give([1, 0, 0], [0.6, 0.4, 0], [0.5, 0.4, 0.1])
    for passes in ([3], [2, 1]):
        assert attended(A2SF(alpha=0, budget=2), query, key, passes)[1][-1] == [[[0, 1]]]
        assert attended(A2SF(alpha=0, budget=2, recent=1), query, key, passes)[1][-1] == [[[0, 2]]]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9, 1.0], ids="alpha-{}".format)
def test_a_sequential_prompt_is_its_tokens_one_by_one(alpha):
    """Every row attends and evicts as a decode step does; memory never holds more than one entry too many."""
    model, ids = sharp_llama(), text(30)
    fields = {"alpha": alpha, "budget": 6, "recent": 1}
    with torch.no_grad(), kvpress.patch(model, A2SF(evict="each_row", **fields)):
        cache = DynamicCache(config=model.config)
        logits = model(torch.tensor([ids]), **{CACHE: cache}).logits[0]
    assert all(layer.keys.shape[2] <= 7 for layer in cache.layers)
    steps, sets = run(model, A2SF(**fields), [[token] for token in ids])
    torch.testing.assert_close(logits, torch.cat(steps), atol=1e-4, rtol=1e-4)
    assert held(cache) == sets[-1]
    [dense], _ = run(model, A2SF(**fields), [ids])
    assert (logits - dense).abs().max() > 1e-2


def test_a_sequential_prompt_without_forgetting_or_groups_is_tova():
    """With alpha=0 and one kv head a sequential prompt is TOVA, fed one token at a time."""
    model, ids = sharp_llama(kv_heads=1), text(30)
    [logits], [kept_at_once] = run(model, A2SF(alpha=0, budget=6, evict="each_row"), [ids])
    steps, sets = run(model, TOVA(budget=6), [[token] for token in ids])
    torch.testing.assert_close(logits, torch.cat(steps), atol=1e-4, rtol=1e-4)
    assert kept_at_once == sets[-1]


def test_a_sequential_share_is_of_the_whole_prompt():
    """The budget is known before the first row: a share of the prompt, not of what was seen so far."""
    model, ids = sharp_llama(), text(30)
    [share], share_sets = run(model, A2SF(budget=0.2, evict="each_row"), [ids])
    [entries], entry_sets = run(model, A2SF(budget=6, evict="each_row"), [ids])
    assert torch.equal(share, entries) and share_sets == entry_sets


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({}, 100, 20, 0, id="defaults"),
        pytest.param({"budget": 8, "recent": 3}, 100, 8, 3, id="entries"),
        pytest.param({"budget": 8, "recent": 8}, 100, 8, 8, id="all-recent"),
        pytest.param({"budget": 0.29, "recent": 0.1}, 100, 29, 10, id="shares"),
        pytest.param({"budget": 0.2, "recent": 0.2}, 3, 1, 0, id="shares-of-a-short-prompt"),
        pytest.param({"budget": 0.2, "recent": 0}, 3, 1, 0, id="no-recent"),
    ],
)
def test_quota(fields, tokens, total, recent):
    """How many stay, and how many of them are the newest."""
    assert A2SF(**fields).quota(tokens, 0, 1) == A2SF(**fields).quota(tokens, 3, 4) == Quota(total, recent)


def test_defaults():
    """The authors' default, in the middle of the paper's best range; nothing protected; a dense prompt."""
    policy = A2SF()
    assert (policy.alpha, policy.recent, policy.budget, policy.evict) == (0.2, 0, 0.2, "each_pass")
    assert policy.observes == Mass(fading=0.2) and policy.leaves_prompts_exact
    assert not A2SF(evict="each_row").leaves_prompts_exact


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"alpha": 1.5}, ("alpha=1.5", "0 to 1"), id="alpha-above"),
        pytest.param({"alpha": -0.1}, ("alpha=-0.1", "0 to 1"), id="alpha-below"),
        pytest.param({"alpha": float("nan")}, ("alpha=nan", "0 to 1"), id="alpha-nan"),
        pytest.param({"alpha": True}, ("alpha=True", "0 to 1"), id="alpha-bool"),
        pytest.param({"alpha": "slow"}, ("alpha='slow'", "0 to 1"), id="alpha-text"),
        pytest.param({"budget": 0}, ("budget=0", "at least 1"), id="no-budget"),
        pytest.param({"recent": -1}, ("recent=-1", "at least 0"), id="negative"),
        pytest.param({"budget": 4, "recent": 5}, ("recent=5", "budget=4", "lower"), id="too-recent"),
        pytest.param({"budget": 4, "recent": 0.5}, ("recent=0.5", "budget=4", "both as"), id="two-kinds"),
        pytest.param({"evict": "fast"}, ("evict='fast'", "'each_pass'", "'after_prompt'", "'each_row'"), id="evict"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        A2SF(**fields)


@torch.no_grad()
def test_without_a_cache_a_sequential_prompt_is_exact():
    """There is nothing to evict from: the model's own result."""
    model, ids = sharp_llama(), torch.tensor([text(30)])
    expected = model(ids, use_cache=False).logits
    with kvpress.patch(model, A2SF(budget=6, evict="each_row")):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
