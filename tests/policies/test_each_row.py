"""Prompts whose rows are attended and evicted one after the other, as decode steps are."""

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
    AdaKV,
    H2OPrefill,
    Keyformer,
    ObservedAttention,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from kvpress.policy import Policy
from oracles import oracle_of
from support.matrix import EVICTING, Case, check, expect, kept, prompt, run, sharp_llama
from support.refusals import refused

PLAIN_SOFTMAX = {"noise": "none", "tau_init": 1.0, "tau_end": 1.0}
RULES: list[tuple[type[Policy], dict[str, Any]]] = [
    (H2O, {"heavy": 4, "recent": 3}),
    (H2O, {"heavy": 4, "recent": 3, "rope": "reindex"}),
    (TOVA, {"budget": 6}),
    (TOVA, {"budget": 7, "recent": 2}),
    (StreamingLLM, {"sink": 2, "recent": 5, "rope": "original"}),
    (StreamingLLM, {"sink": 2, "recent": 5}),
    (A2SF, {"budget": 7, "alpha": 0.5, "recent": 1}),
    (Keyformer, {"budget": 8, **PLAIN_SOFTMAX}),
    (Keyformer, {"budget": 8, "evict_every": 3, **PLAIN_SOFTMAX}),
    (EMS, {"budget": 9, "window": 3, "recent": 3, "tau": 0.1, "evict_every": 1}),
    (EMS, {"budget": 9, "window": 3, "recent": 3, "tau": 0.1, "evict_every": 4}),
]
PASSES = [prompt(20), [5], [6], prompt(7, 2), [8], [9]]


def name(rule: tuple[type[Policy], dict[str, Any]]) -> str:
    return rule[0](**rule[1]).describe().replace(" ", "")


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp_llama()


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_prompt_is_its_tokens_fed_one_by_one(model: Any, rule: tuple[type[Policy], dict[str, Any]]) -> None:
    """Logits of every row, and what is kept; decode steps and a second turn go on from there."""
    kind, fields = rule
    logits, sets = run(model, kind(**fields, evict="each_row"), PASSES)
    steps, step_sets = run(model, kind(**fields), [[token] for ids in PASSES for token in ids])
    torch.testing.assert_close(torch.cat(logits), torch.cat(steps), atol=1e-4, rtol=1e-4)
    ends = torch.tensor([len(ids) for ids in PASSES]).cumsum(0).tolist()
    assert sets == [step_sets[end - 1] for end in ends]
    dense, _ = run(model, kind(**fields), PASSES[:1])
    assert (logits[0] - dense[0]).abs().max() > 1e-2


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_the_oracle_says_the_same(model: Any, rule: tuple[type[Policy], dict[str, Any]]) -> None:
    kind, fields = rule
    policy = kind(**fields, evict="each_row")
    logits, sets = run(model, policy, PASSES)
    steps = expect(model, Case(policy, oracle_of(kind)(**fields, evict="each_row"), policy), PASSES)
    check(steps, [rows[-1] for rows in logits])
    assert sets == [step.kept for step in steps]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES, ids=name)
@torch.no_grad()
def test_padded_sequences_are_as_alone(model: Any, rule: tuple[type[Policy], dict[str, Any]], side: str) -> None:
    kind, fields = rule
    policy, texts = kind(**fields, evict="each_row"), [prompt(20), prompt(13, 1)]
    padding = [0] * 7
    short = [*padding, *texts[1]] if side == "left" else [*texts[1], *padding]
    ones = [1] * 13
    mask = torch.tensor([[1] * 20, [*padding, *ones] if side == "left" else [*ones, *padding]])
    cache = DynamicCache(config=model.config)
    with kvpress.patch(model, policy):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(torch.tensor([texts[0], short]), attention_mask=mask, position_ids=places, **{CACHE: cache})
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        places = (mask.sum(1) - 1)[:, None]
        logits = model(torch.tensor([[5], [6]]), attention_mask=mask, position_ids=places, **{CACHE: cache}).logits
    for row, (text, token) in enumerate(zip(texts, (5, 6), strict=True)):
        (_, alone), (_, sets) = run(model, policy, [text, [token]])
        torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=1e-4)
        assert kept(cache, row) == sets


def test_memory_holds_no_more_than_a_step_does(model: Any) -> None:
    with torch.no_grad(), kvpress.patch(model, H2O(heavy=4, recent=3, evict="each_row")):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt(60)]), **{CACHE: cache})
    assert all(layer.keys.shape[2] <= 8 for layer in cache.layers)


@pytest.mark.parametrize(
    "kind", [SnapKV, PyramidKV, H2OPrefill, A2SFPrefill, ObservedAttention], ids=lambda kind: kind.name
)
def test_policies_that_evict_after_prompts_only_refuse_it(kind: type[Policy]) -> None:
    with refused("evict='each_row'", kind.name, "after prompts only", "'each_pass'", "'after_prompt'"):
        kind(evict="each_row")  # type: ignore[call-arg]


def test_ada_kv_refuses_it() -> None:
    with refused("evict='each_row'", "ada_kv", "after prompts only"):
        AdaKV(SnapKV(budget=64), evict="each_row")


def test_every_policy_takes_it_or_refuses_it() -> None:
    for case in EVICTING:
        policy: Any = case.policy
        fields = {field.name: getattr(policy, field.name) for field in policy.parameters()} | {"evict": "each_row"}
        if policy.evict_every is None:
            with refused("evict='each_row'", "after prompts only"):
                type(policy)(**fields)
        else:
            assert not type(policy)(**fields).leaves_prompts_exact
