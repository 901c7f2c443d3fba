"""One recorded prompt pass serves every policy that leaves it exact."""

import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress import PolicyError
from kvpress.compat import CACHE
from support.matrix import CASES, check, expect, kept, prompt, sharp_llama
from support.models import token_ids
from test_families import build

every_policy = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
STEPS = [7, 8, 9]


@pytest.fixture(scope="module")
def model():
    return sharp_llama()


@every_policy
@torch.no_grad()
def test_equals_a_pass_of_its_own(model, case):
    """What is kept and said afterwards is what the oracle says of the policy's own pass."""
    text = prompt(23)
    shared = kvpress.record_prompt(model, torch.tensor([text]))
    with kvpress.patch(model, case.policy) as handle:
        if not handle.shares_prompts:
            with pytest.raises(PolicyError, match="cannot be shared"):
                handle.adopt_prompt(shared)
            return
        cache = handle.adopt_prompt(shared)
        logits = [shared.logits[0]]
        for token in STEPS:
            logits.append(model(torch.tensor([[token]]), **{CACHE: cache}).logits[0, -1])
        assert handle.report().total.seen == 23 + len(STEPS)
    check(expect(model, case, [text, *([token] for token in STEPS)]), logits, cache)


@every_policy
@torch.no_grad()
def test_padded_batch(model, case):
    texts = [prompt(9), prompt(20, 1)]
    ids = torch.tensor([[0] * 11 + texts[0], texts[1]])
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    shared = kvpress.record_prompt(model, ids, mask)
    with kvpress.patch(model, case.policy) as handle:
        if not handle.shares_prompts:
            return
        cache = handle.adopt_prompt(shared)
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        at = torch.tensor([[9], [20]])
        logits = model(torch.tensor([[5], [6]]), attention_mask=mask, position_ids=at, **{CACHE: cache}).logits
    for row, (text, token) in enumerate(zip(texts, (5, 6), strict=True)):
        check(expect(model, case, [text, [token]]), [shared.logits[row], logits[row, -1]], cache, row)


@torch.no_grad()
def test_the_order_of_policies_does_not_matter(model):
    """What one counted of a prompt and left to the others is what each would count itself, bit by bit."""
    policies = [case.policy for case in CASES if case.policy.leaves_prompts_exact and "eviction" in case.policy.roles]
    policies.append(kvpress.make_policy("h2o", budget=100))  # evicts nothing: its statistics go on in place
    ids = torch.tensor([prompt(23)])

    def adopted(policy, shared):
        with kvpress.patch(model, policy) as handle:
            cache = handle.adopt_prompt(shared)
            model(torch.tensor([[7]]), **{CACHE: cache})
        return [tensor.clone() for layer in cache.layers for tensor in (layer.positions, *layer.stats.values())]

    alone = [adopted(policy, kvpress.record_prompt(model, ids)) for policy in policies]
    for order in (1, -1):
        shared = kvpress.record_prompt(model, ids)
        for policy, expected in list(zip(policies, alone, strict=True))[::order]:
            found = adopted(policy, shared)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), policy
    assert {rotated for _, rotated in shared.masses} == {False, True}


@torch.no_grad()
def test_forks_are_their_own(model):
    """Two caches of one prompt, and the prompt itself, do not meet."""
    shared = kvpress.record_prompt(model, torch.tensor([prompt(20)]))
    before = [[tensor.clone() for tensor in layer[:3]] for layer in shared.layers]
    with kvpress.patch(model, {"name": "h2o", "budget": 6}) as handle:
        one, two = handle.adopt_prompt(shared), handle.adopt_prompt(shared)
        sets = kept(two)
        for token in STEPS:
            model(torch.tensor([[token]]), **{CACHE: one})
        assert kept(two) == sets != kept(one)
    for layer, old in zip(shared.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer[:3], old, strict=True))
    assert shared.nbytes == sum(tensor.nbytes for layer in old_layers(shared) for tensor in layer)


def old_layers(shared):
    return [layer[:3] for layer in shared.layers]


@torch.no_grad()
def test_layers_left_alone():
    """A sliding layer's entries come along, one copy for each cache."""
    model, ids = build("gemma3"), token_ids(1, 14)
    expected = model(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1]
    shared = kvpress.record_prompt(model, ids)
    with kvpress.patch(model, "full") as handle:
        for _ in range(2):
            cache = handle.adopt_prompt(shared)
            found = model(ids[:, :1], **{CACHE: cache}).logits[:, -1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_wrong_use(model):
    with kvpress.patch(model, "full"), pytest.raises(PolicyError, match="already patched"):
        kvpress.record_prompt(model, torch.tensor([prompt(5)]))
    with pytest.raises(PolicyError, match="at least 2"):
        kvpress.record_prompt(model, torch.tensor([prompt(1)]))
    assert "generate" not in vars(model)
    assert isinstance(model(torch.tensor([prompt(5)]))[CACHE], DynamicCache)
