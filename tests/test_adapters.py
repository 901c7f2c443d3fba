"""Models that PEFT wraps: `patch` finds the model inside, and the adapters act as they do without a policy."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.patching import handle_of
from kvpress.policies import H2O, Full, SnapKV, StreamingLLM
from support.models import tiny_llama, token_ids

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
ADAPTED = ["q_proj", "v_proj", "up_proj", "down_proj"]


def base() -> Any:
    """Linear layers that are worth splitting, so that they run through ours."""
    return tiny_llama(hidden_size=64, intermediate_size=2048, max_position_embeddings=2048)


def lora(kind: str = "LoraConfig", **fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    return getattr(peft, kind)(**{"task_type": "CAUSAL_LM", "target_modules": ADAPTED, **fields})


def lora_model(model: Any = None, **fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model or base(), lora(r=4, init_lora_weights=False, **fields)).eval()


def mixed_model() -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.PeftMixedModel(base(), lora(r=4, init_lora_weights=False)).eval()


def ia3_model() -> Any:
    peft = pytest.importorskip("peft")
    config = lora(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    return peft.get_peft_model(base(), config).eval()


def prompt_model() -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()


KINDS = {
    "lora": lora_model,
    "dora": lambda: lora_model(use_dora=True),
    "no-task": lambda: lora_model(task_type=None),
    "mixed": mixed_model,
    "ia3": ia3_model,
    "prompt-tuning": prompt_model,
}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack(model.generate(input_ids=ids, **OPTIONS).logits)


@pytest.mark.parametrize("policy", [Full(), StreamingLLM(recent=500), H2O(budget=500)], ids=lambda p: p.name)
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_with_room_for_all_an_adapted_model_gives_what_it_gave(make: Any, policy: Any) -> None:
    model, ids = make(), token_ids(2, 40)
    dense = logits(model, ids)
    with kvpress.patch(model, policy) as handle:
        torch.testing.assert_close(logits(model, ids), dense, atol=1e-4, rtol=1e-4)
        assert handle_of(model) is handle
    assert handle_of(model) is None
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("policy", [H2O(budget=9), SnapKV(budget=9, window=2)], ids=lambda p: p.name)
def test_a_policy_acts_on_an_adapted_model_as_on_the_same_weights_merged(policy: Any) -> None:
    """The reference is a plain model, whose weights have the adapters in them."""
    model, ids = lora_model(), token_ids(2, 40)
    merged = lora_model().merge_and_unload()
    with kvpress.patch(merged, policy) as handle:
        expected, figures = logits(merged, ids), handle.report().to_dict()
        score = kvpress.score(merged, ids[0].tolist(), [3, 4, 5])
    handle = kvpress.patch(model, policy)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    assert handle.report().to_dict() == figures
    assert kvpress.score(model, ids[0].tolist(), [3, 4, 5]).sum == pytest.approx(score.sum, abs=1e-3)
    with torch.no_grad():
        assert model(input_ids=ids)[CACHE].layers[0].positions.shape[2] < 40
    kvpress.unpatch(model)


def test_scores_of_a_padded_batch() -> None:
    """The model inside takes positions, whatever the signature of PEFT's forward says."""
    model, contexts = lora_model(), [[3, 4, 5, 6, 7, 8, 9], [5, 6, 7]]
    alone = [kvpress.score(model, context, [4, 5]).sum for context in contexts]
    together = kvpress.score(model, contexts, [[4, 5], [4, 5]])
    assert [one.sum for one in together] == pytest.approx(alone, abs=1e-4)


def test_adapters_that_come_merge_and_go_while_it_is_patched() -> None:
    ids = token_ids(2, 40)
    plain, adapted = logits(base(), ids), logits(lora_model(), ids)
    inside = base()

    def check(model: Any, expected: torch.Tensor) -> None:
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-3, rtol=1e-3)

    with kvpress.patch(inside, Full()):
        model = lora_model(inside)
        check(model, adapted)
        with model.disable_adapter():
            check(model, plain)
        model.merge_adapter()
        check(model, adapted)
        model.unmerge_adapter()
        check(model, adapted)
        check(model.unload(), plain)
    check(inside, plain)
    assert not any("forward" in vars(module) for module in inside.modules())


@pytest.mark.parametrize("interface", ["get_base_model", "mixed"])
def test_anything_with_the_interface_of_peft(interface: str) -> None:
    """Without peft installed."""
    model, ids = base(), token_ids(1, 20)
    wrapped = SimpleNamespace(get_base_model=lambda: model)
    if interface == "mixed":
        wrapped = SimpleNamespace(peft_config={}, base_model=SimpleNamespace(model=model))
    with kvpress.patch(wrapped, H2O(budget=8)) as handle:
        model.generate(ids, max_new_tokens=2)
        assert handle.report().total.kept == 8
        assert handle_of(wrapped) is handle_of(model) is handle
        kvpress.unpatch(wrapped)
    with pytest.raises(kvpress.UnsupportedModelError, match="Linear is not a transformers PreTrainedModel"):
        kvpress.patch(SimpleNamespace(get_base_model=lambda: torch.nn.Linear(2, 2)), Full())
