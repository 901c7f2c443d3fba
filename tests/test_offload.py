"""Weights that accelerate keeps elsewhere between passes: the same texts, caches and figures as with weights in place."""

from typing import Any

import pytest
import torch

import kvpress
from kvpress import UnsupportedModelError
from kvpress.policies import H2O, AdaKV, Full, SnapKV, StreamingLLM, TidalDecode, TokenSelect
from support.models import tiny_llama, token_ids

accelerate = pytest.importorskip("accelerate")

OPTIONS = {"max_new_tokens": 5, "do_sample": False}
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def dispatched(model: Any, folder: Any, **layers: str) -> Any:
    places = {**PLACES, **{f"model.layers.{name[1:]}": place for name, place in layers.items()}}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "cpu-and-buffers": lambda model, folder: accelerate.cpu_offload(model, "cpu", offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
    "a-layer-on-disk": lambda model, folder: dispatched(model, folder, _0="disk", _1="cpu"),
    "all-layers-on-disk": lambda model, folder: dispatched(model, folder, _0="disk", _1="disk"),
    "whole-model-at-once": lambda model, folder: accelerate.cpu_offload_with_hook(model, "cpu")[0],
}
POLICIES = [
    Full(),
    StreamingLLM(recent=6),
    H2O(budget=9, rope="reindex"),
    TokenSelect(k=5, n_local=4, n_init=2, chunk=4),
    TidalDecode(k=5, sparse_layer_start=0),
    AdaKV(SnapKV(budget=8, window=2)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_offloaded_weights(policy: Any, way: Any, tmp_path: Any) -> None:
    model, ids = tiny_llama(), token_ids(2, 40)
    with kvpress.patch(model, policy) as handle:
        expected = model.generate(ids, **OPTIONS)
        figures = handle.report().to_dict()
    way(model, tmp_path)
    dense = model.generate(ids, **OPTIONS)
    with kvpress.patch(model, policy) as handle:
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
        assert handle.report().to_dict() == figures
    assert torch.equal(model.generate(ids, **OPTIONS), dense)


def test_offloading_a_patched_model() -> None:
    model, ids = tiny_llama(intermediate_size=2048), token_ids(2, 40)
    dense = model.generate(ids, **OPTIONS)
    with kvpress.patch(model, H2O(budget=9)):
        expected = model.generate(ids, **OPTIONS)
        accelerate.cpu_offload(model, "cpu")
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
    assert torch.equal(model.generate(ids, **OPTIONS), dense)


def test_scores_and_shared_prompts_of_an_offloaded_model() -> None:
    model, text, policy = tiny_llama(), token_ids(1, 30)[0].tolist(), H2O(budget=9)

    def results() -> Any:
        prompt = kvpress.record_prompt(model, token_ids(1, 40))
        with kvpress.patch(model, policy) as handle:
            handle.adopt_prompt(prompt)
            return kvpress.score(model, text[:20], text[20:]).log_probs, handle.report().to_dict()

    expected = results()
    accelerate.cpu_offload(model, "cpu")
    assert results() == expected


def test_compiling_an_offloaded_model_is_refused() -> None:
    model = accelerate.cpu_offload(tiny_llama(), "cpu")
    with pytest.raises(UnsupportedModelError, match=r"offloaded .*cpu_offload.*leave compile out"):
        kvpress.patch(model, Full(), compile=True)
    kvpress.patch(model, Full()).unpatch()


@pytest.mark.parametrize("offload_the_rest", [False, True])
def test_weights_that_nobody_brings_are_refused(offload_the_rest: bool) -> None:
    model = tiny_llama()
    if offload_the_rest:
        accelerate.cpu_offload(model.model.layers[0], "cpu")
    model.model.layers[1].to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"no weights \(9 parameters, as layers.1.self_attn.q_proj.weight\)"
    ):
        kvpress.patch(model, Full())
