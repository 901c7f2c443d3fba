"""Policies that exist for these tests only, one for each hook of the interface that few policies use."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import A2SF, SnapKV
from kvpress.policy import (
    Consecutive,
    EvictionPolicy,
    Own,
    Pattern,
    PrefillPolicy,
    Quota,
    Selected,
    SelectionPolicy,
    View,
)
from support.matrix import kept, prompt, sharp_llama


@dataclass(frozen=True, kw_only=True)
class Newest(EvictionPolicy):
    """Keeps the newest."""

    total: int = 6
    every: int = 1
    raw: bool = False

    @property
    def evict_every(self):
        return self.every

    @property
    def places(self):
        return Consecutive() if self.raw else Own()

    def quota(self, tokens, layer, layers):
        return Quota(self.total, self.total)

    def score(self, entries):
        return entries.positions.float()


@dataclass(frozen=True, kw_only=True)
class ReadAll(SelectionPolicy):
    """Selects every slot by its index."""

    raw: bool = False

    @property
    def places(self):
        return Consecutive() if self.raw else Own()

    def select(self, view: View) -> Selected:
        n = view.keys.shape[2]
        return Selected(torch.arange(n).expand(*view.positions.shape[:2], n), view.valid)


@dataclass(frozen=True, kw_only=True)
class PlanAll(ReadAll, PrefillPolicy):
    """Also plans every entry for each chunk of a prompt: by its index, or in blocks."""

    chunk: int | None = None
    block_size: int | None = None

    def plan(self, view: View) -> Pattern:
        assert view.valid is None and (view.positions.diff(dim=2) > 0).all()
        shape, n = view.positions.shape[:2], view.keys.shape[2]
        if self.block_size is None:
            return Pattern(index=torch.arange(n).expand(*shape, n))
        first, blocks = (n - view.query.shape[2]) // self.block_size, -(-n // self.block_size)
        return Pattern(blocks=torch.arange(blocks).expand(*shape, blocks - first, blocks), block_size=self.block_size)


@torch.no_grad()
def logits(model, policy, passes, mask=None):
    cache = DynamicCache(config=model.config)
    with kvpress.patch(model, policy):
        found = [
            model(torch.tensor(ids), **{CACHE: cache}, attention_mask=None if mask is None else mask[:, :stop]).logits
            for ids, stop in passes
        ]
    return found, cache


def conversation(rows=1):
    stop, passes = 0, []
    for count, seed in ((17, 0), (1, 1), (1, 2), (5, 3), (1, 4)):
        stop += count
        passes.append(([prompt(count, seed + 10 * row) for row in range(rows)], stop))
    return passes


def test_selecting_everything_is_full():
    """By index, with unrotated keys, with prompts in chunks: all the same as reading everything, padded too."""
    model = sharp_llama()
    mask = torch.ones(3, 25, dtype=torch.long)
    mask[0, :9], mask[1, :2] = 0, 0
    for passes, padding in ((conversation(), None), (conversation(3), mask)):
        expected, _ = logits(model, "full", passes, padding)
        for policy in (
            ReadAll(),
            ReadAll(raw=True),
            PlanAll(),
            PlanAll(chunk=4),
            PlanAll(raw=True, chunk=3),
            PlanAll(block_size=4),
            PlanAll(chunk=3, block_size=2),
            PlanAll(chunk=5, block_size=4, raw=True),
        ):
            found, _ = logits(model, policy, passes, padding)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a[:, -1], b[:, -1], atol=1e-4, rtol=1e-4)


def test_rows_one_by_one_are_decode_steps():
    """A prompt that is evicted row by row is the same as its tokens fed one at a time."""
    model, text = sharp_llama(), prompt(20)
    found, cache = logits(model, Newest(evict="each_row"), [([text], 20)])
    single, other = logits(model, Newest(), [([[token]], at + 1) for at, token in enumerate(text)])
    for at in range(20):
        torch.testing.assert_close(found[0][:, at], single[at][:, 0], atol=1e-5, rtol=1e-4)
    assert [sorted(x.positions.flatten().tolist()) for x in cache.layers] == [
        sorted(x.positions.flatten().tolist()) for x in other.layers
    ]


def test_consecutive_places_slide_like_a_window():
    """With the newest only, consecutive places are the same distances as the original ones."""
    model = sharp_llama()
    expected, _ = logits(model, Newest(), conversation())
    found, _ = logits(model, Newest(raw=True), conversation())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_evicting_every_few_steps():
    """Between evictions entries are tolerated; then as many leave as came."""
    model, counts = sharp_llama(), []
    cache = DynamicCache(config=model.config)
    with kvpress.patch(model, Newest(every=3)), torch.no_grad():
        for ids in ([prompt(17)], *([[token]] for token in range(5, 13))):
            model(torch.tensor(ids), **{CACHE: cache})
            counts.append((cache.layers[0].positions >= 0).sum(-1).flatten().tolist())
            held = sorted(at for at in cache.layers[1].positions[0, 0].tolist() if at >= 0)
            seen = cache.get_seq_length()
            assert held == list(range(seen - len(held), seen))
    assert [count[0] for count in counts] == [6, 7, 8, 6, 7, 8, 6, 7, 8]
    assert all(a == b for a, b in counts)


@pytest.mark.parametrize("policy", [SnapKV(budget=8, window=3), A2SF(budget=8, alpha=0.5)], ids=["window", "every-row"])
def test_what_is_observed_does_not_depend_on_how_keys_are_stored(policy):
    """Rows that observe apart from the attention see unrotated keys where their entries stand."""

    class Raw(type(policy)):
        name = ""
        places = Consecutive()

    model = sharp_llama()
    raw = Raw(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)})
    (_, one), (_, two) = (logits(model, each, [([prompt(40)], 40)]) for each in (policy, raw))
    assert kept(one) == kept(two)
