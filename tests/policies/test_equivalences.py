"""Policies that must agree where their papers' rules come to the same: kept sets and logits, from prompt to last step."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import (
    A2SF,
    EMS,
    H2O,
    TOVA,
    A2SFPrefill,
    Full,
    H2OPrefill,
    Kascade,
    Keyformer,
    Quest,
    RecycledAttention,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
)
from kvpress.policy import Mass, Policy, Quota, Selected, View
from support.matrix import kept, prompt, sharp_llama

PROMPT = [24, 1, 1, 1, 1, 1]
TURNS = [24, 1, 1, 1, 6, 1, 1, 5, 1]


class AllRows(SnapKV):
    """SnapKV whose scoring window is the whole prompt, and whose kept window is 4."""

    name = ""

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        return Quota(super().quota(tokens, layer, layers).total, 4)


class PickingEverywhere(TidalDecode):
    """TidalDecode whose every layer from the first that picks on reads what it picked itself."""

    name = ""

    def select(self, view: View) -> Selected:
        first = self.sparse_layer_start
        if view.layer < first:
            return Selected()
        super().select(replace(view, layer=first))
        return super().select(replace(view, layer=first + 1))


class AllRowsEMS(EMS):
    """EMS whose last rows are all rows."""

    name = ""

    @property
    def observes(self) -> Mass:
        return Mass(last_rows=500)


class SeldomH2O(H2O):
    """H2O that evicts in every third step of decode."""

    name = ""

    @property
    def evict_every(self) -> int:
        return 3


@dataclass(frozen=True)
class Pair:
    """Two policies that agree over passes of so many tokens, on a model of these sizes."""

    id: str
    one: Policy
    two: Policy
    passes: list[int] = field(default_factory=lambda: TURNS)
    model: dict[str, int] = field(default_factory=dict)


PAIRS = [
    Pair("h2o-is-a2sf-without-forgetting", H2O(heavy=5, recent=3), A2SF(alpha=1.0, budget=8, recent=3)),
    Pair("h2o-is-a2sf-of-shares", H2O(budget=0.4, recent=0.1), A2SF(alpha=1, budget=0.4, recent=0.1)),
    Pair("a2sf-of-one-kv-head-is-tova", A2SF(alpha=0.0, budget=7), TOVA(budget=7), model={"kv_heads": 1}),
    Pair(
        "a2sf-of-one-kv-head-is-tova-with-recent",
        A2SF(alpha=0.0, budget=7, recent=2, evict="after_prompt"),
        TOVA(budget=7, recent=2, evict="after_prompt"),
        model={"kv_heads": 1},
    ),
    Pair(
        "h2o-without-heavy-is-a-window",
        H2O(heavy=0, recent=7),
        StreamingLLM(sink=0, recent=7, rope="original"),
    ),
    Pair(
        "h2o-without-heavy-is-a-window-reindexed",
        H2O(heavy=0, recent=7, rope="reindex"),
        StreamingLLM(sink=0, recent=7, rope="reindex"),
    ),
    # Of a later turn SnapKV sees the turn's own rows only, so these two agree up to the end of the first answer.
    Pair(
        "snapkv-of-all-rows-is-h2o-prefill",
        AllRows(budget=0.5, window=500, kernel_size=1),
        H2OPrefill(budget=0.5, recent=4),
        PROMPT,
    ),
    Pair(
        "a2sf-prefill-without-forgetting-is-h2o-prefill",
        A2SFPrefill(budget=9, alpha=1.0, recent=4),
        H2OPrefill(budget=9, recent=4),
    ),
    Pair(
        "quest-of-single-entries-is-tidal-decode-picking-in-every-layer",
        Quest(budget=6, page_size=1, dense_layers=1),
        PickingEverywhere(k=6, sparse_layer_start=1),
        model={"layers": 4},
    ),
    Pair(
        "quest-of-single-entries-is-tidal-decode-picking-in-every-layer-by-share",
        Quest(budget=0.3, page_size=1, dense_layers=0),
        PickingEverywhere(k=0.3, sparse_layer_start=0),
        model={"layers": 3},
    ),
    Pair(
        "kascade-of-one-anchor-is-tidal-decode-where-each-head-has-its-own-keys",
        Kascade(k=6, anchors=[0], decode_only=True),
        TidalDecode(k=6, sparse_layer_start=0, correction_layer=9),
        model={"layers": 4, "kv_heads": 4},
    ),
    Pair("recycled-attention-of-full-steps-is-full", RecycledAttention(budget=3, stride=1), Full()),
    Pair(
        "recycled-attention-of-full-steps-is-tidal-decode-with-room",
        RecycledAttention(budget=1, stride=1),
        TidalDecode(k=500, sparse_layer_start=0),
        model={"layers": 4},
    ),
    Pair(
        "keyformer-without-noise-is-h2o",
        Keyformer(budget=10, recent_ratio=0.3, tau_init=1.0, tau_end=1.0, noise="none"),
        H2O(heavy=7, recent=3),
    ),
    Pair(
        "keyformer-without-noise-is-a2sf-without-forgetting",
        Keyformer(budget=0.5, recent_ratio=0.5, tau_init=1.0, tau_end=1.0, noise="none"),
        A2SF(alpha=1.0, budget=0.5, recent=0.25),
    ),
    Pair(
        "ems-without-merging-is-h2o-of-the-same-period",
        AllRowsEMS(budget=9, recent=4, kernel_size=1, tau=2.0, evict_every=3),
        SeldomH2O(heavy=5, recent=4),
    ),
]


@torch.no_grad()
def run(model: Any, policy: Any, passes: list[int], mask: torch.Tensor) -> list[tuple[torch.Tensor, list[Any]]]:
    """The last row's logits of each pass over the batch, and what each sequence then keeps."""
    cache, start, found = DynamicCache(config=model.config), 0, []
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with kvpress.patch(model, policy):
        for index, count in enumerate(passes):
            ids = torch.tensor([prompt(count, 7 * index + row) for row in range(len(mask))])
            at = slice(start, start + count)
            start += count
            got = model(ids, **{CACHE: cache}, attention_mask=mask[:, :start], position_ids=places[:, at])
            found.append((got.logits[:, -1], [kept(cache, row) for row in range(len(mask))]))
    return found


@pytest.mark.parametrize("padding", [[0, 0], [9, 0]], ids=["plain", "left-padded"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.id)
def test_they_agree(pair: Pair, padding: list[int]) -> None:
    model, total = sharp_llama(**pair.model), sum(pair.passes)
    mask = torch.tensor([[0] * pad + [1] * (total - pad) for pad in padding])
    one, two = (run(model, policy, pair.passes, mask) for policy in (pair.one, pair.two))
    for (logits, sets), (other, others) in zip(one, two, strict=True):
        assert sets == others
        torch.testing.assert_close(logits, other, atol=1e-4, rtol=1e-4)
    if "eviction" in pair.one.roles:
        assert len(sets[0][0][0]) < total - padding[0]  # something was dropped


@pytest.mark.parametrize("padding", [[0, 0], [9, 0]], ids=["plain", "left-padded"])
@torch.no_grad()
def test_token_select_without_votes_is_streaming_llm(padding: list[int]) -> None:
    """From the same dense prompt, decode step by step: its window counts the current token, hence one more."""
    model, total = sharp_llama(), 30
    ids = torch.tensor([prompt(total, row) for row in range(2)])
    mask = torch.tensor([[0] * pad + [1] * (total - pad) for pad in padding])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    plain = DynamicCache(config=model.config)
    model(ids[:, :24], **{CACHE: plain}, attention_mask=mask[:, :24], position_ids=places[:, :24])
    found: list[list[torch.Tensor]] = []
    policies: list[tuple[Policy, DynamicCache, int]] = [
        (TokenSelect(n_init=3, k=0, n_local=6, chunk=1), plain, 24),
        (StreamingLLM(sink=3, recent=5), DynamicCache(config=model.config), 0),
    ]
    for policy, cache, start in policies:
        found.append([])
        with kvpress.patch(model, policy):
            if start == 0:
                model(ids[:, :24], **{CACHE: cache}, attention_mask=mask[:, :24], position_ids=places[:, :24])
            for at in range(24, total):
                options: dict[str, Any] = {"attention_mask": mask[:, : at + 1], "position_ids": places[:, at : at + 1]}
                found[-1].append(model(ids[:, at : at + 1], **{CACHE: cache}, **options).logits)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
