"""TokenSelect: what is voted for, what is read where, and when a vote is reused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import prompt as prompt_pass
from kvpress import reindex, step
from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.kernels.rope_shift import rope_shift
from kvpress.layer import KVLayer
from kvpress.policies import H2O, Full, TokenSelect
from kvpress.policies import token_select as module
from kvpress.policy import Consecutive, Roles, Selected, View
from kvpress.rotary import Rotary
from oracles.token_select import TokenSelect as Rules
from support import reads
from support.matrix import CASES, prompt, sharp_llama

SMALL: dict[str, Any] = {"n_init": 2, "n_local": 5, "k": 4, "chunk": 4}
ROOM = 11
HEADS, KV_HEADS, DIM = 4, 2, 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def view(query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor | None = None, **fields: Any) -> View:
    """A layer with `keys` [batch, kv_heads, slots, d] in the order of tokens, or at `positions` [batch, slots]."""
    batch, kv_heads, slots = keys.shape[:3]
    valid = None
    places = torch.arange(slots).expand(batch, slots) if positions is None else positions
    if positions is not None:
        valid = (positions >= 0)[:, None].expand(batch, kv_heads, slots)
    options: dict[str, Any] = {
        "layer": 0,
        "layers": 1,
        "query": query,
        "fetch": lambda: keys,
        "positions": places[:, None].expand(batch, kv_heads, slots).to(torch.int32),
        "valid": valid,
        "seen": (places.amax(1) + 1).to(torch.int32),
        "scale": 1.0,
        "softcap": None,
        "turn": lambda x, shift: rope_shift(x, shift, torch.tensor([1.0, 0.3, 0.1, 0.01])),
        "state": {},
        "shared": {},
        "length": slots,
        "newest": slots - 1,
        "places": slots,
    }
    return View(**{**options, **fields})


def tokens(seen: View, selected: Selected, row: int = 0, head: int = 0) -> list[int]:
    """The positions that are read, in the order in which they are."""
    if selected.index is None:
        held = seen.positions[row, head]
        return held[held >= 0].tolist()
    index = selected.index[row, head]
    if selected.member is not None:
        index = index[selected.member[row, head]]
    return seen.positions[row, head, index].tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


def run(model: Any, policy: Any, passes: list[list[int]]) -> tuple[list[torch.Tensor], Any, Any]:
    """Logits of each pass, the cache and the report."""
    logits, cache, report = reads.run(model, policy, passes)
    return [of_batch[0] for of_batch in logits], cache, report


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[View, Selected]]:
    """What every call of `select` saw and gave."""
    found: list[tuple[View, Selected]] = []
    original = TokenSelect.select

    def spy(self: TokenSelect, view: View) -> Selected:
        selected = original(self, view)
        found.append((replace(view, positions=view.positions.clone()), selected))
        return selected

    monkeypatch.setattr(TokenSelect, "select", spy)
    return found


# ---------------------------------------------------------------------------------------------------- values


def test_defaults() -> None:
    policy = TokenSelect()
    assert (policy.n_init, policy.n_local, policy.k, policy.chunk, policy.theta) == (128, 512, 2048, 512, 0.9)
    assert (policy.rotate_query, policy.pool, policy.vote_scale, policy.gqa_map) == (True, 0, 1.0, "group")
    assert policy.places == Consecutive() and policy.places.moved and policy.roles == ("selection", "prefill")
    assert kvpress.make_policy("token_select") == policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_init": -1}, "n_init=-1"),
        ({"n_local": 0}, "n_local=0"),
        ({"k": -1}, "k=-1"),
        ({"k": 0.5}, "k=0.5"),
        ({"k": True}, "k=True"),
        ({"chunk": 0}, "chunk=0"),
        ({"pool": -1}, "pool=-1"),
        ({"chunk": 600}, "chunk=600 is longer than n_local=512"),
        ({"n_local": 100}, "chunk=512 is longer than n_local=100"),
        ({"theta": float("nan")}, "theta=nan"),
        ({"theta": "0.9"}, "theta='0.9'"),
        ({"theta": True}, "theta=True"),
        ({"vote_scale": 0}, "vote_scale=0"),
        ({"vote_scale": float("inf")}, "vote_scale=inf"),
        ({"rotate_query": 1}, "rotate_query=1"),
        ({"gqa_map": "modulo"}, "gqa_map='modulo'"),
    ],
    ids=str,
)
def test_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as error:
        TokenSelect(**fields)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_eviction_beside_it(model: Any) -> None:
    with pytest.raises(PolicyError, match=r"needs every one in the cache, and h2o\(\) evicts"):
        kvpress.patch(model, [H2O(), TokenSelect()])
    with kvpress.patch(model, [Full(), TokenSelect()]):
        pass


# ---------------------------------------------------------------------------------------------------- what is read


def test_t1_short_texts_are_full_attention(model: Any) -> None:
    """T1: while n_init + k + n_local tokens hold everything, prompts in chunks and decode are full attention."""
    passes = [prompt(7), [5], [6], [7], [8]]
    assert sum(map(len, passes)) == ROOM
    text = torch.tensor([[token for ids in passes for token in ids]])
    with torch.no_grad():
        dense = model(text).logits[0]
    logits, _, report = run(model, TokenSelect(**SMALL), passes)
    torch.testing.assert_close(torch.cat(logits), dense, atol=1e-5, rtol=1e-4)
    assert report.total.read_share == 1
    longer, *_ = run(model, TokenSelect(**SMALL), [*passes, [9]])
    with torch.no_grad():
        dense = model(torch.cat((text, torch.tensor([[9]])), dim=1)).logits[0, -1]
    assert (longer[-1][0] - dense).abs().max() > 1e-2


def test_t4_what_is_read(model: Any, selections: list[Any]) -> None:
    """T4: first, voted and last tokens; the same for all heads, ascending, and exactly n_init + k + n_local of them."""
    run(model, TokenSelect(**SMALL), [prompt(23), [5], [6], prompt(6, 1), [7]])
    sparse = 0
    for seen, selected in selections:
        n, found = int(seen.seen[0]), tokens(seen, selected)
        assert found == tokens(seen, selected, head=1) == sorted(set(found))
        if n <= ROOM:
            assert found == list(range(n))
            continue
        sparse += 1
        assert len(found) == ROOM
        assert found[:2] == [0, 1] and found[-5:] == list(range(n - 5, n))
        assert not set(found[2:-5]) & {0, 1, *range(n - 5, n)}
    assert sparse == 2 * (4 + 2 + 2 + 1)  # layers * (chunks past the room, steps, chunks, step)


def test_the_vote_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The k largest votes of the tokens between, of equals the first."""
    votes = torch.tensor([[3.0, 9, 1, 9, 9, 2, 9]])
    monkeypatch.setattr(module, "soft_vote", lambda *_, **__: votes.clone())
    seen = view(random(1, HEADS, 1, DIM), random(1, KV_HEADS, 14, DIM))
    policy = TokenSelect(n_init=2, n_local=5, k=3, chunk=1)
    assert tokens(seen, policy.select(seen)) == [0, 1, 3, 5, 6, 9, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("pool", "expected"),
    [(0, [4, 9]), (1, [4, 9]), (2, [3, 4]), (3, [3, 4]), (4, [2, 3])],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_pooling_keeps_the_length(
    monkeypatch: pytest.MonkeyPatch, pool: int, expected: list[int], padded: bool
) -> None:
    """Votes spread to their neighbours; a window of even width takes the extra one from behind."""
    votes = torch.tensor([0.0, 0, 8, 0, 0, 0, 0, 7, 0])  # of the tokens 2 .. 10

    def vote(query: torch.Tensor, keys: torch.Tensor, candidates: Any = None, **_: Any) -> torch.Tensor:
        if candidates is None:
            return votes[None].clone()
        return torch.zeros(1, keys.shape[2]).masked_scatter(candidates, votes)

    monkeypatch.setattr(module, "soft_vote", vote)
    positions = None
    if padded:  # holes between the tokens are no neighbours
        positions = torch.tensor([[0, 1, 2, 3, -1, -1, 4, -1, 5, 6, 7, 8, 9, 10, 11, -1, 12]])
    slots = 13 if positions is None else positions.shape[1]
    seen = view(random(1, HEADS, 1, DIM), random(1, KV_HEADS, slots, DIM), positions)
    policy = TokenSelect(n_init=2, n_local=2, k=2, chunk=1, pool=pool)
    assert tokens(seen, policy.select(seen)) == [0, 1, *expected, 11, 12]


def test_query_heads_and_the_keys_they_vote_on() -> None:
    """A head votes on its group's keys, or with "mod" on those of kv head `head % kv_heads`; a brute-force vote."""
    query, keys = random(1, HEADS, 1, DIM), random(1, KV_HEADS, 40, DIM, seed=1)
    seen, found = view(query, keys), {}
    for gqa_map in ("group", "mod"):
        votes = torch.zeros(40)
        for head in range(HEADS):
            owner = head // 2 if gqa_map == "group" else head % 2
            scores = torch.stack([0.7 * query[0, head, 0] @ keys[0, owner, token] for token in range(2, 35)])
            votes[2:35] += scores.softmax(0)
        policy = TokenSelect(**SMALL, rotate_query=False, vote_scale=0.7, gqa_map=gqa_map)
        found[gqa_map] = tokens(seen, policy.select(replace(seen, state={})))
        assert found[gqa_map][2:-5] == sorted(votes.topk(4).indices.tolist())
    assert found["group"] != found["mod"]


def test_the_rotated_query_stands_n_local_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The voting rows stand at n_local, n_local + 1, ... against keys without rotation."""
    query, keys = random(1, HEADS, 3, DIM), random(1, KV_HEADS, 40, DIM, seed=1)
    voted = []
    original = module.soft_vote
    monkeypatch.setattr(module, "soft_vote", lambda q, k, *a, **b: voted.append((q, k)) or original(q, k, *a, **b))
    seen = view(query, keys)
    TokenSelect(**SMALL).select(seen)
    for row in range(3):
        assert seen.turn is not None
        expected = seen.turn(query[:, :, row : row + 1], torch.tensor([5 + row]))
        torch.testing.assert_close(voted[0][0][:, :, row : row + 1], expected)
    assert torch.equal(voted[0][1], keys[:, :, 2:35])


def test_t8_identical_queries_choose_what_one_does() -> None:
    """T8: a chunk of equal queries selects what one of them does (without rotation)."""
    query, keys = random(2, HEADS, 1, DIM), random(2, KV_HEADS, 40, DIM, seed=1)
    policy = TokenSelect(**SMALL, rotate_query=False)
    one, chunk = view(query, keys), view(query.expand(-1, -1, 4, -1), keys)
    single, many = policy.select(one), policy.select(chunk)
    for row in range(2):
        assert tokens(one, single, row) == tokens(chunk, many, row)
    mixed = view(torch.cat((query, random(2, HEADS, 3, DIM, seed=2) * 3), dim=2), keys)
    assert tokens(mixed, policy.select(mixed)) != tokens(one, single)


def test_t7_slot_numbers_do_not_matter() -> None:
    """T7: the same tokens in other slots, with holes between: the same positions, in the same order."""
    query, keys = random(1, HEADS, 1, DIM), random(1, KV_HEADS, 30, DIM, seed=1)
    policy = TokenSelect(**SMALL)
    plain = view(query, keys)
    expected = tokens(plain, policy.select(plain))
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    scattered = torch.cat((keys, 100 * torch.ones(1, KV_HEADS, 7, DIM)), dim=2)[:, :, order]
    positions = torch.cat((torch.arange(30), torch.full((7,), -1)))[order]
    moved = view(query, scattered, positions[None])
    selected = policy.select(moved)
    assert tokens(moved, selected) == expected
    assert selected.index is not None
    read = scattered[0, 0, selected.index[0, 0]]
    assert torch.equal(read, keys[0, 0, torch.tensor(expected)])


def test_t7_permuted_slots_of_a_running_cache(model: Any) -> None:
    """T7: with the slots of a cache shuffled between two steps, the next steps give the same."""
    passes, then = [prompt(25), [5]], [[6], [7], prompt(6, 1), [8]]
    expected, *_ = run(model, TokenSelect(**SMALL, theta=0.3), [*passes, *then])
    cache = DynamicCache(config=model.config)
    with kvpress.patch(model, TokenSelect(**SMALL, theta=0.3)), torch.no_grad():
        for ids in passes:
            model(torch.tensor([ids]), **{CACHE: cache})
        order = torch.randperm(26, generator=torch.Generator().manual_seed(3))
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values, layer.positions):
                tensor[:, :, :26] = tensor[:, :, :26][:, :, order]
            layer.storage.uniform = layer.storage.ordered = False
        found = [model(torch.tensor([ids]), **{CACHE: cache}).logits[0] for ids in then]
    for a, b in zip(found, expected[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- where it is read


def test_t6_places_never_exceed_the_room(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: keys are attended at 0 .. m-1 and the query at the last of these, however long the text."""
    places: list[list[int]] = []
    inside = [False]
    original_turned, original_rotated = reindex.turned, reindex.rotated

    def turned(*args: Any) -> Any:
        inside[0] = True
        try:
            return original_turned(*args)
        finally:
            inside[0] = False

    def rotated(x: torch.Tensor, positions: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        if inside[0]:
            places.append(positions.flatten().tolist())
        return original_rotated(x, positions, rotary)

    for caller in (prompt_pass, step):
        monkeypatch.setattr(caller, "turned", turned)
    monkeypatch.setattr(reindex, "rotated", rotated)
    for length in (30, 90):
        places.clear()
        run(model, TokenSelect(**SMALL), [prompt(length), [5], [6]])
        largest = max(max(numbers) for numbers in places)
        assert largest == ROOM - 1
        assert min(min(numbers) for numbers in places) == 0
        assert places[-2:] == [[ROOM - 1], list(range(ROOM))]  # the last step: the query, the keys


def test_keys_are_cached_without_rotation(model: Any) -> None:
    """Layer 0's cached keys are its projection of the normed embeddings, at every position."""
    text = prompt(30)
    _, cache, _ = run(model, TokenSelect(**SMALL), [text])
    layer = model.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor([text])))
        expected = layer.self_attn.k_proj(hidden).view(1, 30, 2, -1).transpose(1, 2)
    torch.testing.assert_close(cache.layers[0].keys[:, :, :30], expected, atol=1e-5, rtol=1e-5)


def test_a_far_query_is_moved_exactly() -> None:
    """A query that was rotated at a position past a million comes back as it was."""
    rotary = Rotary(1e6 ** (-torch.arange(4) / 4), False)
    layer = KVLayer(Roles.of([TokenSelect()]), 0, 1, rotary)
    query = random(2, HEADS, 3, DIM)
    seen = torch.tensor([1_000_003, 700_001])
    places = seen[:, None, None] - 3 + torch.arange(3)
    rotated = rope_shift(query, places, rotary.inv_freq)
    torch.testing.assert_close(reindex.unrotated(layer, rotated, seen), query, atol=2e-6, rtol=0)


def test_bfloat16_is_near_float32(model: Any) -> None:
    """Keys are un-rotated from the model's own rounded ones: full attention to the precision of the type."""
    half, roomy = sharp_llama().bfloat16(), TokenSelect(k=64)
    passes = [prompt(40), [5], [6]]
    (exact, *_), (ours, *_), (plain, *_) = (
        run(*pair, passes) for pair in ((model, "full"), (half, roomy), (half, "full"))
    )
    error = (torch.cat(ours).float() - torch.cat(exact)).abs().mean()
    unavoidable = (torch.cat(plain).float() - torch.cat(exact)).abs().mean()
    assert error < 1.5 * unavoidable


# ---------------------------------------------------------------------------------------------------- the selection cache


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each vote."""
    votes: list[int] = []
    original = module.soft_vote

    def spy(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        votes.append(query.shape[0])
        return original(query, *args, **options)

    monkeypatch.setattr(module, "soft_vote", spy)
    return votes


@pytest.mark.parametrize(("theta", "per_layer"), [(1.5, 8), (-1.0, 1), (-2.0, 1)], ids=str)
def test_t5_theta(model: Any, monkeypatch: pytest.MonkeyPatch, theta: float, per_layer: int) -> None:
    """T5: above 1 every step votes, at -1 and below the first alone; what is read says so."""
    text, steps = prompt(20), [[token] for token in prompt(8, 1)]
    policy = TokenSelect(**SMALL, theta=theta)
    votes = counted(monkeypatch)
    run(model, policy, [text])
    in_prompt = len(votes)
    votes.clear()
    _, _, report = run(model, policy, [text, *steps])
    assert len(votes) - in_prompt == 2 * per_layer
    scans = range(21, 29) if per_layer == 8 else [21]
    read = 8 * ROOM + sum((n - 7) / 2 for n in scans)
    assert report.total.read_share == pytest.approx(read / sum(range(21, 29)))


def test_t5_a_longer_query_is_no_other_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5: a positive factor on the query changes no decision; a reused vote scans nothing."""
    query, keys, state = random(1, HEADS, 1, DIM), random(1, KV_HEADS, 40, DIM, seed=1), {}
    policy, votes = TokenSelect(**SMALL, theta=0.999), counted(monkeypatch)
    first = policy.select(view(query, keys, state=state))
    assert first.scanned == 33 / 2
    for factor in (0.01, 7.0):
        again = policy.select(view(factor * query, keys, state=state))
        assert again.scanned == 0 and torch.equal(again.index, first.index)  # type: ignore[arg-type]
    assert len(votes) == 1
    assert policy.select(view(-query, keys, state=state)).scanned > 0


def test_a_reused_vote_stands_still() -> None:
    """First and last tokens follow the text, what was voted stays, and the query is compared to the one that voted."""
    keys, state = random(1, KV_HEADS, 60, DIM, seed=1), {}
    first, policy = random(1, HEADS, 1, DIM), TokenSelect(**SMALL, theta=0.9)
    angle = torch.tensor(0.3)  # cos 0.3 = 0.955, cos 0.6 = 0.825
    other = random(1, HEADS, 1, DIM, seed=2)
    other = other - (other * first).sum() / (first * first).sum() * first
    other = other * first.norm() / other.norm()
    found = []
    for n, turned in ((40, 0), (43, 1), (44, 2)):
        query = (turned * angle).cos() * first + (turned * angle).sin() * other
        seen = view(query, keys[:, :, :n], state=state)
        selected = policy.select(seen)
        found.append((tokens(seen, selected), selected.scanned))
    (one, scanned), (two, reused), (three, anew) = found
    assert scanned > 0 and reused == 0 and anew > 0  # no drift: the third is near the second, not near the first
    assert two == [0, 1, *one[2:-5], *range(38, 43)]
    assert three[-5:] == list(range(39, 44))


def test_sequences_vote_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one sequence of a batch turned away, that one alone is scanned, and each reads what it reads alone."""
    keys, before, after = (
        random(3, KV_HEADS, 40, DIM, seed=1),
        random(3, HEADS, 1, DIM),
        random(3, HEADS, 1, DIM, seed=4),
    )
    after[[0, 2]] = before[[0, 2]] * 2
    policy, votes, state = TokenSelect(**SMALL), counted(monkeypatch), {}
    policy.select(view(before, keys, state=state))
    seen = view(after, keys, state=state)
    selected = policy.select(seen)
    assert votes == [3, 1]
    assert selected.scanned == pytest.approx(33 / 2 / 3)
    for row in range(3):
        only = slice(row, row + 1)
        alone = view((after if row == 1 else before)[only], keys[only])
        assert tokens(seen, selected, row) == tokens(alone, policy.select(alone))


def test_a_short_sequence_of_a_batch_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a long one: it casts no vote, also with theta at its lowest, and votes when it is long enough."""
    votes, policy, state = counted(monkeypatch), TokenSelect(**SMALL, theta=-1.0), {}
    query, keys = random(2, HEADS, 1, DIM), random(2, KV_HEADS, 40, DIM, seed=1)
    for n, expected in ((10, 1), (11, 0), (12, 1), (13, 0)):
        positions = torch.full((2, 40), -1)
        positions[0, :30], positions[1, :n] = torch.arange(30), torch.arange(n)
        seen, before = view(query, keys, positions, state=state), len(votes)
        selected = policy.select(seen)
        assert len(votes) - before == expected
        assert len(tokens(seen, selected)) == ROOM
        assert len(tokens(seen, selected, row=1)) == min(n, ROOM)
        if n <= ROOM:
            assert tokens(seen, selected, row=1) == list(range(n))


def test_prompts_vote_anew(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection cache is not used for prompts, not even for a chunk of one row, and is forgotten after each."""
    votes, policy = counted(monkeypatch), TokenSelect(**SMALL, theta=-1.0)
    run(model, policy, [prompt(17)])  # the fifth chunk has one row
    assert len(votes) == 2 * 3  # at 12, 16 and 17 tokens
    run(model, policy, [prompt(17), [5], [6]])
    assert len(votes) == 2 * (3 + 3 + 1)
    votes.clear()
    run(model, policy, [prompt(17), [5], prompt(5, 1), [6], [7]])
    assert len(votes) == 2 * (3 + 1 + 2 + 1)


def test_the_matrix_reuses_votes(model: Any) -> None:
    """The situations of the trap matrix meet both: votes cast, and votes reused."""
    case = next(case for case in CASES if isinstance(case.oracle, Rules) and case.oracle.theta == 0.3)
    oracle = case.oracle.runner(model, case.oracle)
    oracle.run([prompt(23), *([token] for token in prompt(9, 1))])
    assert 2 < oracle.votes < 2 * 9


def test_at_budget():
    """So many entries are read, in the proportion of the defaults; a share of an unknown length cannot be."""
    for budget in (21, 100, 512, 2688):
        policy = TokenSelect.at_budget(budget)
        assert policy.n_init + policy.n_local + policy.k == budget
        assert policy.chunk <= policy.n_local
    assert TokenSelect.at_budget(2688) == TokenSelect()
    assert kvpress.make_policy("token_select", budget=2688, theta=1.5) == TokenSelect(theta=1.5)
    for wrong in (0.2, 20, True):
        with pytest.raises(kvpress.PolicyError, match="at least 21"):
            TokenSelect.at_budget(wrong)
