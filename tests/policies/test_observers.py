"""An observer of one's own: what it counts follows the entries through everything that happens to a cache."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.kernels.attention_mass import attention_mass
from kvpress.policies import AdaKV
from kvpress.policy import Consecutive, EvictionPolicy, Observer, Own, Quota
from support.matrix import kept, prompt, sharp_llama


@dataclass(frozen=True)
class Witnesses(Observer):
    """How many rows have seen each entry since it came in. While it is held that is every row: seen - position."""

    needs_every_row = True

    def slots(self, shape, device):
        return {"witnesses": torch.zeros(shape, device=device)}

    def prompt(self, observed, rows, mass_known):
        entries, at = rows.positions[:, :, None], rows.at[:, None, :, None]
        counted = ((entries >= 0) & (entries <= at)).sum(2)
        observed.slots["witnesses"][..., : counted.shape[-1]] += counted

    def step(self, observed, rows, mass):
        if mass is None:
            self.prompt(observed, rows, False)
            return
        real = (rows.at >= 0).view(-1, *(1,) * (mass.ndim - 1))
        observed.slots["witnesses"][..., : mass.shape[-1]] += (mass > 0) & real

    def answer(self, observed, positions, keys, scores):
        return {"witnesses": observed.slots["witnesses"][..., : positions.shape[2]]}


@dataclass(frozen=True, kw_only=True)
class Scattered(EvictionPolicy):
    """Keeps entries by a number that has nothing to do with their order, and checks what was counted of them."""

    budget: int = 7
    every: int | None = 1
    moved: bool = False

    @property
    def observes(self):
        return Witnesses()

    @property
    def evict_every(self):
        return self.every

    @property
    def places(self):
        return Consecutive() if self.moved else Own()

    def quota(self, tokens, layer, layers):
        return Quota(self.budget + layer, 2)

    def score(self, entries):
        held = entries.positions >= 0
        ages = entries.tokens[:, None, None] - entries.positions
        assert torch.equal(entries.observed["witnesses"][held].long(), ages[held].long())
        heads = torch.arange(entries.positions.shape[1])[:, None]
        return ((entries.positions + 1) * (7919 + 13 * heads) % 31).float()


POLICIES = [
    Scattered(),
    Scattered(every=3),
    Scattered(evict="after_prompt"),
    Scattered(evict="each_row"),
    Scattered(every=None),
    Scattered(moved=True),
    AdaKV(Scattered(every=None), alpha=0.3),
]


def check_counts(cache: Any) -> None:
    """Every entry held was seen by all rows from its own on, in each sequence, layer and kv head."""
    for layer in cache.layers:
        positions = getattr(layer.storage, "paged_positions", layer.positions)
        counted = layer.stats["witnesses"]
        held = positions >= 0
        tokens = layer.texts.seen_tensor.view(-1, *(1,) * (positions.ndim - 1))
        assert held.any() and torch.equal(counted[held].long(), (tokens - positions)[held].long())


@pytest.mark.parametrize("pad", [0, 9], ids=["plain", "left-padded"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.describe())
@torch.no_grad()
def test_what_is_counted_follows_the_entries(policy: Any, pad: int) -> None:
    """Prompts, chunks, turns and steps; sequences swapped and repeated as beam search does."""
    model, cache = sharp_llama(), DynamicCache()
    mask, rows, at = torch.ones(2, 44, dtype=torch.long), 2, 0
    mask[0, :pad] = 0
    with kvpress.patch(model, policy):
        for index, count in enumerate((24, 1, 1, 1, 1, 1, 7, 1, 1, 4, 1, 1)):
            ids = torch.tensor([prompt(count, 10 * index + row) for row in range(rows)])
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, at : at + count]
            at += count
            model(ids, attention_mask=mask[:, :at], position_ids=places, **{CACHE: cache})
            check_counts(cache)
            if index == 3:
                cache.reorder_cache(torch.tensor([1, 0]))
                mask = mask.flip(0)
            if index == 8:
                cache.batch_repeat_interleave(2)
                mask, rows = mask.repeat_interleave(2, dim=0), 4
    held = (cache.layers[0].positions >= 0).sum(-1)
    assert held.max() < 44  # something was dropped


@dataclass(frozen=True)
class Peaks(Observer):
    """The most that any one row gave to an entry, summed over the group."""

    needs_every_row = True

    def slots(self, shape, device):
        return {"peak": torch.zeros(shape, device=device)}

    def prompt(self, observed, rows, mass_known):
        for row in range(rows.at.shape[1]):
            one = slice(row, row + 1)
            given = attention_mass(
                rows.query[:, :, one], rows.at[:, one], rows.keys, rows.positions, **vars(rows.scores)
            )
            self.step(observed, rows, given)

    def step(self, observed, rows, mass):
        held = observed.slots["peak"][..., : mass.shape[-1]]
        torch.maximum(held, mass, out=held)

    def answer(self, observed, positions, keys, scores):
        return {"peak": observed.slots["peak"][..., : positions.shape[2]]}


@dataclass(frozen=True, kw_only=True)
class KeepPeaks(EvictionPolicy):
    """Keeps the entries that one row looked at most."""

    budget: int = 8

    @property
    def observes(self):
        return Peaks()

    def quota(self, tokens, layer, layers):
        return Quota(self.budget, 1)

    def score(self, entries):
        return entries.observed["peak"]


@torch.no_grad()
def test_a_policy_scores_by_it() -> None:
    """What one layer keeps of a prompt, from transformers' own attention weights."""
    model, text = sharp_llama(layers=1), prompt(27)
    model.set_attn_implementation("eager")
    [weights] = model(torch.tensor([text]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    peaks: Tensor = weights[0].unflatten(0, (2, 2)).sum(1).amax(1)  # [kv_heads, entries]
    expected = [sorted([*head[:26].topk(7).indices.tolist(), 26]) for head in peaks]
    with kvpress.patch(model, KeepPeaks()):
        cache = model(torch.tensor([text]))[CACHE]
    assert kept(cache) == [expected]
