"""Dual chunk attention: at which distance every token is attended, in prompts and steps, and whom it goes with."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import places
from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.rope_shift import rope_shift
from kvpress.places import Held
from kvpress.policies import (
    H2O,
    TOVA,
    AdaKV,
    DualChunkAttention,
    Full,
    KeyDiff,
    ObservedAttention,
    Quest,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
    XAttention,
)
from kvpress.policy import DualChunk, Roles
from kvpress.rotary import Rotary
from kvpress.tokens import plain_tokens
from oracles import dual_chunk, h2o, key_diff, streaming_llm
from oracles.common.by_keys import ByKeys
from oracles.dual_chunk import Distances, distance
from support.matrix import check, kept, prompt, run, sharp_llama
from support.models import tiny_llama

SMALL: dict[str, Any] = {"chunk_size": 8, "local_size": 3}
PIECE, LIMIT = 5, 8
PASSES = [prompt(23), *([token] for token in prompt(6, 1)), prompt(9, 2), *([token] for token in prompt(3, 3))]
GOLDEN = {
    8: [7, 6, 5, 4, 3, 3, 2, 1, 0],
    10: [7, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0],
    14: [7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 4, 3, 2, 1, 0],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


def distances(value: DualChunk, row: int, in_order: bool) -> list[int]:
    """How far a step's row at a position is from every token up to it: its angle to them, where all vectors are alike.

    The rotation is a tenth of a radian per position, so a product tells distances up to 31.
    """
    rotary = Rotary(torch.tensor([0.1], dtype=torch.float64), False, 8)
    value = value.fitted(rotary)
    vector, at = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.arange(row + 1)
    seen = torch.tensor([row], dtype=torch.int32)

    def arrives(count: int) -> torch.Tensor:
        return rope_shift(vector.expand(1, 1, count, 2), at[None, None, -count:], rotary.inv_freq)

    key = value.store(arrives(row + 1), plain_tokens(1, row + 1, None, None, "cpu"), rotary)
    held = Held(at.view(1, 1, -1).int(), row + 1 if in_order else None, in_order)
    step = plain_tokens(1, 1, [row] if in_order else None, seen, "cpu")
    query, *others = value.queries(arrives(1), step, held, rotary)
    slots = value.slots(row if in_order else seen, held.positions, held)
    scores = decode_scores(query, key, scale=1.0, moved=list(zip(others, slots, strict=False)))
    return [round(number) for number in (scores[0, 0].clamp(-1, 1).acos() / 0.1).tolist()]


# ---------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("in_order", [True, False], ids=["ranges", "marks"])
@pytest.mark.parametrize("row", GOLDEN)
def test_distances_by_hand(row: int, in_order: bool) -> None:
    """The paper's picture: pieces of 5, and 7 at most (a model of 8 positions)."""
    assert distances(DualChunk(8, 3), row, in_order) == GOLDEN[row]
    assert [distance(row, key, 5, 7) for key in range(row + 1)] == GOLDEN[row]


@pytest.mark.parametrize("in_order", [True, False], ids=["ranges", "marks"])
@pytest.mark.parametrize(("chunk", "local"), [(8, 3), (8, 0), (7, 6), (5, 1)])
def test_near_tokens_are_where_they_are_and_none_is_too_far(chunk: int, local: int, in_order: bool) -> None:
    """The `local` nearest tokens (as far as the piece before reaches) have their true distance; none exceeds the limit."""
    piece, limit = chunk - local, max(chunk - local, min(chunk, 7))
    for row in range(26):
        found = distances(DualChunk(chunk, local), row, in_order)
        assert max(found) <= limit
        near = max(min(local, limit - piece + 1, piece), row % piece + 1)
        assert found[::-1][:near] == list(range(min(near, row + 1)))
        assert found == [distance(row, key, piece, limit) for key in range(row + 1)]


def test_sizes_come_from_the_model() -> None:
    """Three quarters and an eighth of the trained length; the limit stays within it."""

    def fitted(trained: int | None, *sizes: int | None) -> tuple[int | None, int | None, int | None]:
        value = DualChunk(*sizes).fitted(Rotary(torch.ones(1), False, trained))
        return value.chunk, value.local, value.limit

    assert fitted(8192) == (6144, 1024, 6144)
    assert fitted(32768, 8192, 1024) == (8192, 1024, 8192)
    assert fitted(8192, 8192, 1024) == (8192, 1024, 8191)
    assert fitted(8, 10, 2) == (10, 2, 8)
    assert fitted(None, 10, 2) == (10, 2, 10)
    with pytest.raises(PolicyError, match=r"not in its config.*give chunk_size and local_size"):
        fitted(None, 10, None)


def test_no_distance_exceeds_the_limit(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the text: keys are rotated to 0 .. piece-1, and queries to the limit at most, in prompts and steps."""
    targets: list[torch.Tensor] = []
    original = places.turn_between

    def spy(rotary: Rotary, source: torch.Tensor, target: torch.Tensor, head_dim: int) -> Any:
        targets.append(target)
        return original(rotary, source, target, head_dim)

    monkeypatch.setattr(places, "turn_between", spy)
    for length in (30, 90):
        targets.clear()
        run(model, DualChunkAttention(**SMALL), [prompt(length), [5], [6], prompt(7)])
        assert len(targets) == 4 * 3  # of a pass, for all layers: keys and queries in their piece, before, older
        assert max(int(target.max()) for target in targets) == LIMIT
        assert min(int(target.min()) for target in targets) == 0
        assert all(int(target.max()) < PIECE for target in targets[::3])


def test_far_tokens_are_moved_exactly() -> None:
    """Keys and queries that were rotated past a million stand where near ones would, as exactly."""
    rotary = Rotary(1e6 ** (-torch.arange(4) / 4), False)
    value = DualChunk(80, 30).fitted(Rotary(rotary.inv_freq, False, 512))
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([1_000_003, 700_001], dtype=torch.int32)
    tokens = plain_tokens(2, 4, before.tolist(), before, "cpu")
    arrived = rope_shift(x, tokens.positions[:, None], rotary.inv_freq)
    at = tokens.positions[:, None] % 50
    held = Held(torch.zeros(2, 1, 1), None, False)
    torch.testing.assert_close(
        value.store(arrived, tokens, rotary), rope_shift(x, at, rotary.inv_freq), atol=2e-6, rtol=0
    )
    own, second, older = value.queries(arrived, tokens, held, rotary)
    for found, place in ((own, at), (second, (at + 50).clamp(max=80)), (older, torch.full_like(at, 80))):
        torch.testing.assert_close(found, rope_shift(x, place, rotary.inv_freq), atol=3e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- whole models


def expected(model: Any, passes: list[list[int]], **fields: Any) -> list[Any]:
    return Distances(model, dual_chunk.DualChunkAttention(**(fields or SMALL))).run(passes)


@pytest.mark.parametrize("fields", [SMALL, {"chunk_size": 5, "local_size": 4}, {"chunk_size": 600, "local_size": 593}])
def test_prompts_turns_and_steps(model: Any, fields: dict[str, int]) -> None:
    """Every row of the first prompt, of steps, and of a second turn that begins within a piece."""
    logits, _ = run(model, DualChunkAttention(**fields), PASSES)
    for step, found in zip(expected(model, PASSES, **fields), logits, strict=True):
        torch.testing.assert_close(found, step.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(5, 10, 15), (1, 2, 21), (12,), (4, 9)], ids=str)
def test_chunks_of_a_prompt(model: Any, cuts: tuple[int, ...]) -> None:
    """A prompt in chunks, which end with pieces or within them, is the whole prompt."""
    ids = prompt(23)
    whole = torch.cat(run(model, DualChunkAttention(**SMALL), [ids])[0])
    bounds = [0, *cuts, len(ids)]
    chunks = [ids[start:stop] for start, stop in pairwise(bounds)]
    torch.testing.assert_close(
        torch.cat(run(model, DualChunkAttention(**SMALL), chunks)[0]), whole, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_padded_sequences_and_turns_are_as_alone(model: Any) -> None:
    """Three lengths, a padded prompt, steps, an unpadded second turn, steps."""
    lengths, policy = (23, 4, 11), DualChunkAttention(**SMALL)
    first = [prompt(length, seed) for seed, length in enumerate(lengths)]
    later = [prompt(13, 10 + seed) for seed in range(3)]
    ids = torch.tensor([[0] * (23 - len(one)) + one for one in first])
    mask = (torch.arange(23) >= torch.tensor([[23 - length] for length in lengths])).long()
    turns = torch.tensor(later)
    cache, found = DynamicCache(config=model.config), []
    with kvpress.patch(model, policy):
        for start, stop in ((0, 0), (0, 1), (1, 2), (2, 11), (11, 12), (12, 13)):
            new = turns[:, start:stop] if stop else ids
            mask = torch.cat((mask, torch.ones_like(turns[:, start:stop])), dim=1)
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            found.append(model(new, attention_mask=mask, position_ids=at, **{CACHE: cache}).logits[:, -1])
    for row in range(3):
        text = later[row]
        steps = expected(model, [first[row], text[:1], text[1:2], text[2:11], text[11:12], text[12:]])
        check(steps, [logits[row] for logits in found])


@pytest.mark.parametrize("length", [5, 1500])
@torch.no_grad()
def test_a_text_of_one_piece_is_exact(length: int) -> None:
    """The dense model's logits, below and above where angles are rounded."""
    model = tiny_llama(max_position_embeddings=4096)
    policy = DualChunkAttention(**SMALL) if length == 5 else DualChunkAttention()
    ids = torch.tensor([prompt(length)])
    dense = model(ids).logits
    with kvpress.patch(model, policy):
        cache = DynamicCache(config=model.config)
        found = [model(part, **{CACHE: cache}).logits for part in (ids[:, :-1], ids[:, -1:])]
    torch.testing.assert_close(torch.cat(found, dim=1), dense, atol=1e-5 if length == 5 else 1e-4, rtol=1e-5)


def test_bfloat16_is_near_float32(model: Any) -> None:
    """Keys and queries are rotated anew from the model's own rounded ones: to the precision of the type."""
    half, policy, passes = sharp_llama().bfloat16(), DualChunkAttention(**SMALL), [prompt(40), [5], [6]]
    exact, ours = (torch.cat(run(one, policy, passes)[0]).float() for one in (model, half))
    dense, plain = (torch.cat(run(one, Full(), passes)[0]).float() for one in (model, half))
    assert (ours - exact).abs().mean() < 1.5 * (plain - dense).abs().mean()


# ---------------------------------------------------------------------------------------------------- values and company


def test_values() -> None:
    policy = DualChunkAttention()
    assert (policy.chunk_size, policy.local_size, policy.roles) == (None, None, ())
    assert policy.places == DualChunk() and policy.places.moved and not policy.places.own_keys
    assert not policy.leaves_prompts_exact and kvpress.make_policy("dual_chunk") == policy
    roles = Roles.of([Full(), DualChunkAttention(**SMALL)])
    assert roles.places == DualChunk(8, 3) and not (roles.evicts or roles.selects or roles.plans or roles.routes)
    assert roles.describe() == "dual_chunk(chunk_size=8, local_size=3)" and roles != Roles()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 1}, "chunk_size=1 "),
        ({"chunk_size": 0.5}, "chunk_size=0.5"),
        ({"local_size": -1}, "local_size=-1"),
        ({"local_size": True}, "local_size=True"),
        ({"chunk_size": 8, "local_size": 8}, "local_size=8 leaves no piece of chunk_size=8; give at most 7"),
    ],
    ids=str,
)
def test_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        DualChunkAttention(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_size": 600, "local_size": 80}, "520 positions are longer than the 512.*at most 512"),
        ({"local_size": 384}, "local_size=384 leaves no piece of chunk_size=384 .*512 positions.*below 384"),
    ],
    ids=str,
)
def test_a_model_that_it_does_not_fit(model: Any, fields: dict[str, Any], message: str) -> None:
    """It is refused when it is patched, and left as it was."""
    before = model.config._attn_implementation
    with pytest.raises(PolicyError, match=message):
        kvpress.patch(model, DualChunkAttention(**fields))
    assert model.config._attn_implementation == before


class ByKeysAtDistances(Distances, ByKeys):
    """Keys decide what stays; every pair has the distance of its chunks."""


@dataclass(frozen=True)
class WithH2O(h2o.H2O):
    chunk_size: int | None = None
    local_size: int | None = None
    runner = Distances


@dataclass(frozen=True)
class WithStreaming(streaming_llm.StreamingLLM):
    chunk_size: int | None = None
    local_size: int | None = None
    runner = Distances


@dataclass(frozen=True)
class WithKeyDiff(key_diff.KeyDiff):
    chunk_size: int | None = None
    local_size: int | None = None
    runner = ByKeysAtDistances


@pytest.mark.parametrize(
    ("policy", "rules", "fields"),
    [
        (H2O, WithH2O, {"heavy": 6, "recent": 5}),
        (H2O, WithH2O, {"budget": 0.6, "evict": "after_prompt"}),
        (H2O, WithH2O, {"heavy": 6, "recent": 5, "evict": "each_row"}),
        (StreamingLLM, WithStreaming, {"sink": 2, "recent": 11, "rope": "original"}),
        (KeyDiff, WithKeyDiff, {"budget": 14}),
    ],
    ids=str,
)
@torch.no_grad()
def test_with_an_eviction_policy(model: Any, policy: type[Any], rules: type[Any], fields: dict[str, Any]) -> None:
    """What stays is chosen by the attention that was, or by keys at their own positions, and attended by chunks."""
    logits, sets = run(model, [policy(**fields), DualChunkAttention(**SMALL)], PASSES)
    oracle = rules(**fields, **SMALL)
    steps = oracle.runner(model, oracle).run(PASSES)
    for step, found, held in zip(steps, logits, sets, strict=True):
        torch.testing.assert_close(found, step.logits, atol=1e-4, rtol=1e-4)
        if fields.get("evict") != "after_prompt":
            assert held == step.kept
    ids = torch.tensor([[0] * 9 + prompt(14), prompt(23, 4)])
    with kvpress.patch(model, [policy(**fields), DualChunkAttention(**SMALL)]):
        cache = DynamicCache(config=model.config)
        padded = model(ids, attention_mask=(ids > 0).long(), **{CACHE: cache}).logits[:, -1]
    for row, alone in enumerate((prompt(14), prompt(23, 4))):
        (step,) = oracle.runner(model, oracle).run([alone])
        torch.testing.assert_close(padded[row], step.logits[-1], atol=1e-4, rtol=1e-4)
        if fields.get("evict") != "after_prompt":
            assert kept(cache, row) == step.kept


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SnapKV(), r"snapkv\(\) ranks tokens by what rows would give them at their own positions"),
        (TOVA(), r"tova\(\) ranks tokens"),
        (AdaKV(ObservedAttention(budget=9)), "keeps different numbers of entries in a layer's kv heads"),
        (Quest(), r"quest\(\) compares queries with rotated keys, and dual_chunk\(\) does not store them"),
        (TidalDecode(), r"tidal_decode\(\) compares"),
        (XAttention(), r"x_attention\(\) compares"),
        (TokenSelect(), r"dual_chunk\(\) and token_select\(\) both have tokens attended at other positions"),
        (StreamingLLM(), r"streaming_llm\(\) both have tokens attended at other positions"),
        (H2O(rope="reindex"), r"h2o\(rope='reindex'\) both have tokens attended"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_refused_company(model: Any, other: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        kvpress.patch(model, [DualChunkAttention(), other])


def test_a_cache_of_other_chunks_is_refused(model: Any) -> None:
    cache, ids = DynamicCache(config=model.config), torch.tensor([prompt(9)])
    with torch.no_grad(), kvpress.patch(model, DualChunkAttention(**SMALL)):
        model(ids, **{CACHE: cache})
    message = r"belongs to the policy dual_chunk\(chunk_size=8, local_size=3\)"
    with torch.no_grad(), kvpress.patch(model, Full()), pytest.raises(PolicyError, match=message):
        model(ids, **{CACHE: cache})
