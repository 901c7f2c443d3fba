"""Models with quantised weights: torchao's kinds, and torch's own dynamic one, quantised before patching or after."""

import copy
from typing import Any

import pytest
import torch

import kvpress
from kvpress import patching
from kvpress.policies import H2O, Full
from support.matrix import CASES
from support.models import tiny_llama, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
WEIGHT_ONLY = {
    "int8": lambda q: q.Int8WeightOnlyConfig(),
    "float8": lambda q: q.Float8WeightOnlyConfig(),
    "intx": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4),
}
DYNAMIC = {
    "int8-dynamic": lambda q: q.Int8DynamicActivationInt8WeightConfig(),
    "int8-intx-dynamic": lambda q: q.Int8DynamicActivationIntxWeightConfig(),
}


def build() -> Any:
    """MLPs that are worth splitting, so that they run through ours."""
    return tiny_llama(hidden_size=64, intermediate_size=2048, max_position_embeddings=2048)


def quantize(model: Any, config: Any) -> Any:
    """The model, its linear layers quantised in place by torchao; float32 elsewhere."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, config(quantization))
    return model


def dequantized(model: Any) -> Any:
    """A plain model with the weights that a quantised one computes with."""
    plain = build()
    for module, quantised in zip(plain.modules(), model.modules(), strict=True):
        if type(module) is torch.nn.Linear:
            module.weight = torch.nn.Parameter(quantised.weight.dequantize().float())
    return plain


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack(model.generate(ids, **OPTIONS).logits)


def check(policy: Any, config: Any, when: str) -> None:
    ids = token_ids(2, 40)
    with kvpress.patch(dequantized(quantize(build(), config)), policy) as handle:
        expected, kept = logits(handle._model(), ids), handle.report().total.kept
    model = quantize(build(), config) if when == "before" else build()
    with kvpress.patch(model, policy) as handle:
        if when == "after":
            quantize(model, config)
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-3, rtol=1e-3)
        assert handle.report().total.kept == kept


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("policy", [Full(), H2O(budget=9)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())
def test_quantised_weights_are_as_the_plain_ones_they_stand_for(config: Any, policy: Any, when: str) -> None:
    check(policy, config, when)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_quantised_weights_under_every_policy(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit what the policy gives where all modules run their own code."""
    model, ids = quantize(build(), WEIGHT_ONLY["int8"]), token_ids(2, 40)
    with kvpress.patch(model, case.policy):
        found = logits(model, ids)
    monkeypatch.setattr(patching, "replace_forwards", lambda *_: None)
    with kvpress.patch(model, case.policy):
        assert torch.equal(logits(model, ids), found)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("config", (WEIGHT_ONLY | DYNAMIC).values(), ids=(WEIGHT_ONLY | DYNAMIC).keys())
def test_each_layer_and_mlp_gives_what_its_class_gives(config: Any, when: str) -> None:
    """Bit by bit, in a step and in a prompt: where the input is quantised, too, its scale is that of the same tokens."""
    generator = torch.Generator().manual_seed(0)
    model = quantize(build(), config) if when == "before" else build()
    with kvpress.patch(model, Full()):
        if when == "after":
            quantize(model, config)
        mlp = model.model.layers[0].mlp
        for count in (1, 3, 1300):
            hidden = torch.randn(1, count, 64, generator=generator)
            hidden[0, 0] *= 30
            for module in (mlp, mlp.up_proj):
                assert torch.equal(module(hidden), type(module).forward(module, hidden))
        model.generate(token_ids(1, 20), max_new_tokens=3)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_torchs_dynamic_quantisation(when: str) -> None:
    """One scale for all tokens of a layer's input, so that a long prompt must not go through an MLP in tiles."""

    def dynamic(model: Any) -> Any:
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    hidden = torch.randn(1, 1300, 64, generator=torch.Generator().manual_seed(0))
    hidden[0, 0] *= 30
    plain = dynamic(build())
    expected = plain.model.layers[0].mlp(hidden)
    if when == "before":
        with kvpress.patch(plain, Full()):
            assert torch.equal(plain.model.layers[0].mlp(hidden), expected)
            plain.generate(token_ids(1, 20), max_new_tokens=3)
        return
    model = build()
    with kvpress.patch(model, Full()):
        copied = dynamic(model)  # of a copy
        assert torch.equal(copied.model.layers[0].mlp(hidden), expected)
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        assert torch.equal(model.model.layers[0].mlp(hidden), expected)
        model.generate(token_ids(1, 20), max_new_tokens=3)


def test_a_deep_copy_of_a_layer_is_its_own() -> None:
    """It has its own weights, also while the model that it was copied from is patched."""
    model, hidden = build(), torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    with kvpress.patch(model, Full()):
        twin = copy.deepcopy(model.model.layers[0].mlp)
    with torch.no_grad():
        torch.testing.assert_close(twin(hidden), model.model.layers[0].mlp(hidden))
        twin.down_proj.weight.zero_()
        assert not twin(hidden).any() and model.model.layers[0].mlp(hidden).any()
