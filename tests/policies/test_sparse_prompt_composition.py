"""A policy that plans prompts, one that evicts and one that selects, on one model: against an oracle that does all of it."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import (
    H2O,
    FlexPrefill,
    Full,
    GemFilter,
    H2OPrefill,
    MInference,
    ObservedAttention,
    Packed,
    Quest,
    RecycledAttention,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    XAttention,
)
from kvpress.policy import Policy
from oracles import oracle_of
from support.matrix import kept, prompt, sharp_llama
from support.reads import run, watch
from support.sparse_prompts import check_padded_turns, check_rows

LAYERS = 2
PASSES = [prompt(26), *([token] for token in prompt(5, 1)), prompt(13, 2), *([token] for token in prompt(3, 3))]
STEPS = [*range(26, 31), *range(44, 47)]

X = XAttention, {"stride": 2, "threshold": 0.5, "block_size": 4}
FLEX = FlexPrefill, {"gamma": 0.6, "tau": 0.25, "min_budget": 2, "block_size": 2}
SLASH = MInference, {"default": ("vertical_slash", 2, 4), "sink": 1, "recent": 2, "probe": 4, "block_size": 4}
EXACT = MInference, {**SLASH[1], "default": ("vertical_slash", 3, 3), "expand": "exact"}
SNAP = SnapKV, {"budget": 14, "window": 4, "kernel_size": 3}
LATE = SnapKV, {"budget": 0.5, "window": 3, "kernel_size": 1, "evict": "after_prompt"}
HEAVY = H2O, {"heavy": 7, "recent": 5}
ALL_ROWS = H2OPrefill, {"budget": 12, "recent": 3}
MEAN = ObservedAttention, {"budget": 11}
SINKS = StreamingLLM, {"sink": 2, "recent": 10, "rope": "original"}
QUEST = Quest, {"budget": 8, "page_size": 4, "dense_layers": 1}
TIDAL = TidalDecode, {"k": 5, "sparse_layer_start": 0}
RECYCLED = RecycledAttention, {"budget": 5, "stride": 3}
Parts = tuple[type[Policy], dict[str, Any]]


@dataclass(frozen=True)
class Company:
    """Policies that act together, and an oracle that does what they do."""

    plans: Parts
    evicts: Parts | None
    selects: Parts | None

    @property
    def policies(self) -> list[Policy]:
        return [one[0](**one[1]) for one in (self.selects, self.plans, self.evicts) if one is not None]

    @property
    def id(self) -> str:
        return "+".join(one.name + (f"-{one.expand}" if isinstance(one, MInference) else "") for one in self.policies)

    def oracle(self, model: Any) -> Any:
        """Rules over rules: the outer ones' runner reads prompts, the next one's steps, the innermost say what is kept."""
        rules, runners = (oracle_of(Full)() if self.evicts is None else oracle_of(self.evicts[0])(**self.evicts[1])), []
        for part in (self.selects, self.plans):
            if part is not None:
                rules = oracle_of(part[0])(**part[1], over=rules)
                runners.insert(0, rules.runner)
        return type("Together", tuple(runners), {})(model, rules)


COMPANIES = [
    Company(X, SNAP, QUEST),
    Company(X, HEAVY, TIDAL),
    Company(X, None, RECYCLED),
    Company(X, MEAN, None),
    Company(FLEX, ALL_ROWS, QUEST),
    Company(FLEX, LATE, TIDAL),
    Company(FLEX, HEAVY, None),
    Company(SLASH, SNAP, RECYCLED),
    Company(SLASH, HEAVY, TIDAL),
    Company(SLASH, ALL_ROWS, None),
    Company(EXACT, SINKS, TIDAL),
    Company(EXACT, HEAVY, None),
]
every_company = pytest.mark.parametrize("case", COMPANIES, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=LAYERS)


@every_company
def test_all_act(model, case, monkeypatch):
    """All logits, what is kept after two turns, and what every step reads in every layer and query head."""
    log = {} if case.selects is None else watch(monkeypatch, case.selects[0])
    logits, cache, report = run(model, case.policies, PASSES)
    oracle = case.oracle(model)
    steps = oracle.run(PASSES)
    check_rows(logits, steps)
    assert kept(cache) == steps[-1].kept
    wanted = {key: heads for key, heads in oracle.log.items() if key[0] in STEPS and key[1] < LAYERS}
    assert log == (
        {} if case.selects is None else {key: [sorted(head) for head in heads] for key, heads in wanted.items()}
    )
    assert report.total.density < 1 and (report.total.kept < 40) == (case.evicts is not None)
    assert case.selects is None or report.total.read_share < 1


@pytest.mark.parametrize("case", COMPANIES[::3], ids=lambda case: case.id)
def test_padded(model, case):
    """Each sequence as it is alone, over two turns."""
    check_padded_turns(model, case.policies, case.oracle(model))


@pytest.mark.parametrize("plans", [X, FLEX, SLASH, EXACT], ids=lambda part: part[0].name)
def test_what_a_sparse_prompt_leaves_to_h2o(model, plans):
    """Its sums are of what the rows read: over all entries of a head they are rows times group, as after a full prompt."""
    masses = []
    for policies in ([H2O(budget=500)], [H2O(budget=500), plans[0](**plans[1])]):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), kvpress.patch(model, policies):
            model(torch.tensor([prompt(26)]), **{CACHE: cache})
            model(torch.tensor([prompt(13, 2)]), **{CACHE: cache})
        masses.append(torch.stack([layer.stats["mass"][:, :, :39] for layer in cache.layers]))
    dense, sparse = masses
    torch.testing.assert_close(sparse.sum(-1), torch.full((LAYERS, 1, 2), 39.0 * 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(dense.sum(-1), sparse.sum(-1), atol=1e-3, rtol=0)
    assert (dense - sparse).abs().max() > 0.1


@pytest.mark.parametrize("room", [Packed(residual=500), GemFilter(k=500)], ids=lambda one: one.name)
def test_a_fourth_role_with_room_changes_nothing(model, room):
    """Keys and values that are still exact, and a prompt from which nothing is left out."""
    case = COMPANIES[0]
    expected, cache, _ = run(model, case.policies, PASSES)
    found, other, _ = run(model, [*case.policies, room], PASSES)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[:, -1], b[:, -1], atol=1e-5, rtol=1e-4)
    assert kept(other) == kept(cache)
