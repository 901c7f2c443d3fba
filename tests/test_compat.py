"""The world that `patch` relies on: looked at, and refused with a reason where it is another one."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import kvpress
from kvpress import UnsupportedModelError, compat
from kvpress.compat import CACHE, cache_argument
from kvpress.layer import KVLayer
from kvpress.policies import H2O, Full
from support.matrix import prompt, sharp_llama


@pytest.fixture
def model():
    return sharp_llama()


def refuses(model, *words):
    with pytest.raises(UnsupportedModelError) as caught:
        kvpress.patch(model, Full())
    for word in (transformers.__version__, "expected", "found", compat.TESTED, *words):
        assert word in str(caught.value)
    assert "forward" not in vars(model.model) and "generate" not in vars(model)


def test_the_name_of_the_cache(model):
    assert CACHE == cache_argument(model) == cache_argument(model.model)
    assert CACHE in model(torch.tensor([prompt(5)]))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_callers_may_use_any_name_that_transformers_takes(model, name):
    """The decoder as well, which the policies stand before."""
    if name == "cache" != CACHE:
        pytest.skip("this transformers does not know the name yet")
    ids = torch.tensor([prompt(12)])
    with kvpress.patch(model, H2O(budget=6)), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for callee in (model, model.model):
            cache = transformers.DynamicCache(config=model.config)
            assert callee(ids, **{name: cache})[CACHE] is cache
            assert isinstance(cache.layers[0], KVLayer)


def test_a_decoder_that_still_uses_the_old_name(model, monkeypatch):
    """As code that comes with a checkpoint may."""
    decoder, plain = model.model, type(model.model).forward

    def remote(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **rest
    ):
        return plain(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **rest,
        )

    ids = torch.tensor([prompt(12)])
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(type(decoder), "forward", remote)
    with kvpress.patch(model, Full()) as handle:
        output = decoder(ids, **{CACHE: transformers.DynamicCache(config=model.config)})
        assert isinstance(output[CACHE].layers[0], KVLayer)
        assert handle.report().total.seen == 12
    monkeypatch.undo()
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)


def test_both_names_at_once(model):
    decoder = model.model
    caches = {name: transformers.DynamicCache(config=model.config) for name in ("cache", "past_key_values")}
    with kvpress.patch(model, Full()), pytest.raises(kvpress.PolicyError, match="two names of one argument"):
        decoder.forward(torch.tensor([prompt(5)]), **caches)


# ------------------------------------------------------------------ another world


def test_a_new_method_of_cache_layers(model, monkeypatch):
    monkeypatch.setattr(KVLayer, "__abstractmethods__", frozenset({"defragment"}))
    refuses(model, "cache layers that implement", "defragment")


def test_another_update_of_caches(model, monkeypatch):
    monkeypatch.setattr(compat.Cache, "update", lambda self, states, layer_idx: None)
    refuses(model, "Cache.update(key_states, value_states, layer_idx, ...)", "update(states, layer_idx)")


@pytest.mark.parametrize("registry", ["AttentionInterface", "AttentionMaskInterface"])
def test_a_registry_without_register(model, monkeypatch, registry):
    class Other:
        get = None

    monkeypatch.setattr(compat, registry, Other)
    refuses(model, "Other.register")


def test_mask_functions_of_another_kind(model, monkeypatch):
    class Masks(compat.AttentionMaskInterface):
        def get(self, *_):
            return lambda cache_position, mask_function: None

    monkeypatch.setattr(compat, "AttentionMaskInterface", Masks)
    refuses(model, "q_length", "cache_position")


def test_a_decoder_whose_cache_has_a_third_name(model, monkeypatch):
    def forward(self, input_ids=None, attention_mask=None, state=None):
        return None

    monkeypatch.setattr(type(model.model), "forward", forward)
    refuses(model, "a cache (cache or past_key_values)", "forward(input_ids, attention_mask, state)")


def test_attention_functions_of_another_kind(model, monkeypatch):
    module = inspect.getmodule(type(model.model))
    monkeypatch.setattr(module, "eager_attention_forward", lambda layer, states: None)
    refuses(model, "(module, query, key, value, attention_mask, ...)", "(layer, states)")


def test_a_name_that_is_gone():
    """Nothing but the reason is left of the import error."""
    code = """
import sys, transformers.masking_utils as masks
del masks.causal_mask_function
import kvpress
try:
    kvpress.patch
except kvpress.UnsupportedModelError as error:
    assert "causal_mask_function" in str(error) and "tested are transformers" in str(error), error
else:
    raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix))


# ------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("version", "warns"),
    [("99.1.0", True), ("99.1.0.dev0", True), (compat.NEWEST_TESTED, False), (compat.OLDEST_TESTED, False)],
)
def test_one_warning_for_what_is_newer_than_tested(model, monkeypatch, version, warns):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(compat, "_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            kvpress.patch(model, Full()).unpatch()
    told = [str(one.message) for one in caught if "newer than what kvpress was tested with" in str(one.message)]
    assert len(told) == warns and all(version in text for text in told)


def test_no_deprecated_name_is_used(tmp_path):
    """A patched run, by the README's way and by hand, under FutureWarning as an error and without a word in the log."""
    code = """
import logging, sys
import torch, transformers
records = []
class Records(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger("transformers").addHandler(Records())
import kvpress
from kvpress.policies import H2O
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=16, vocab_size=9,
    bos_token_id=1, eos_token_id=2)).eval()
ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
with kvpress.patch(model, H2O(budget=0.5)) as handle:
    model.generate(ids, max_new_tokens=3, do_sample=False)
    str(handle.report())
    kvpress.score(model, [3, 4, 5], [6, 7])
shared = kvpress.record_prompt(model, ids)
with kvpress.patch(model, H2O(budget=0.5), compile=True) as handle:
    cache = handle.adopt_prompt(shared)
    handle._forward().run._step = handle._forward().inner
    with torch.no_grad():
        model(ids[:, :1], **{kvpress.compat.CACHE: cache})
told = [text for text in records if "deprecated" in text]
assert not told, told
"""
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True, cwd=tmp_path)
