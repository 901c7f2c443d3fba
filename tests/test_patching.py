"""`patch`, `unpatch` and the handle, as a user meets them."""

import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

import kvpress
from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.policies import H2O, AdaKV, Full, SnapKV, StreamingLLM, TidalDecode
from kvpress.registry import policy_spec
from support.matrix import prompt, sharp_llama


@pytest.fixture
def model() -> Any:
    return sharp_llama()


def trace(model: Any) -> dict[str, Any]:
    """Everything about a model that patching could change."""
    return {
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": [
            (
                name,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._forward_hooks_always_called),
            )
            for name, module in model.named_modules()
        ],
        "implementation": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "config": model.config.to_dict(),
        "forward": [module.forward.__func__ for module in model.modules()],
    }


@pytest.mark.parametrize(
    "policy", [Full(), StreamingLLM(recent=5), H2O(budget=0.3), SnapKV(budget=40)], ids=lambda p: p.name
)
def test_unpatching_leaves_no_trace(model: Any, policy: kvpress.Policy) -> None:
    ids = torch.tensor([prompt(20)])
    before, dense = trace(model), model.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = model(ids).logits
    handle = kvpress.patch(model, policy)
    model.generate(ids, max_new_tokens=5, do_sample=False)
    handle.unpatch()
    assert trace(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), dense)


def test_context_manager_unpatches_after_an_error(model: Any) -> None:
    before = trace(model)
    with pytest.raises(RuntimeError, match="on purpose"), kvpress.patch(model, "full"):
        raise RuntimeError("on purpose")
    assert trace(model) == before


def test_an_error_inside_a_pass_leaves_the_model_usable(model: Any) -> None:
    ids = torch.tensor([prompt(20)])
    with kvpress.patch(model, H2O(budget=8)) as handle:
        hook = model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        inner = model.model.layers[1].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
        )
        with pytest.raises(MemoryError):
            model.generate(ids, max_new_tokens=2)
        inner.remove()
        with pytest.raises(MemoryError):
            model.generate(ids, max_new_tokens=2)
        hook.remove()
        model.generate(ids, max_new_tokens=2)
        assert handle.report().to_dict()["seen"] == 21


def test_every_way_to_name_a_policy(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("name: h2o\nbudget: 0.25\n")
    for spec in (
        H2O(budget=0.25),
        {"name": "h2o", "budget": 0.25},
        str(file),
        file,
        [H2O(budget=0.25)],
        ["full", file],
    ):
        with kvpress.patch(model, spec) as handle:
            assert handle.describe().endswith("h2o(budget=0.25)")
    with kvpress.patch(model, "full") as handle:
        assert repr(handle) == "<kvpress handle: full()>"


def test_available_lists_policies_with_one_line_each() -> None:
    found = kvpress.available()
    assert {"full", "h2o", "snapkv", "streaming_llm"} <= set(found)
    for name, cls in found.items():
        assert cls.name == name
        assert (cls.__doc__ or "").strip().splitlines()[0].endswith((".", "comparison."))


def test_a_policy_of_ones_own_is_one_class(model: Any) -> None:
    """Defined anywhere, it is found by its name."""
    from dataclasses import dataclass

    from kvpress.policy import Entries, EvictionPolicy, Quota, entries_for

    @dataclass(frozen=True, kw_only=True)
    class KeepOldest(EvictionPolicy):
        """Keep the oldest entries."""

        name = "keep_oldest_of_test"
        budget: float = 0.5

        def quota(self, tokens: int, layer: int, layers: int) -> Quota:
            return Quota(max(1, entries_for(self.budget, tokens)), 0)

        def score(self, entries: Entries) -> torch.Tensor:
            return -entries.positions.float()

    with torch.no_grad(), kvpress.patch(model, {"name": "keep_oldest_of_test", "budget": 0.25}):
        cache = model(torch.tensor([prompt(20)]))[CACHE]
    assert cache.layers[0].positions[0, 0].tolist()[:5] == [0, 1, 2, 3, 4]


def test_report_prints_and_counts(model: Any) -> None:
    with kvpress.patch(model, H2O(budget=10)) as handle:
        model.generate(torch.tensor([prompt(30), prompt(30, 1)]), max_new_tokens=6, do_sample=False)
        report = handle.report()
    figures = report.to_dict()
    assert set(figures) == {"policy", "seen", "kept", "bytes", "full_bytes", "read_share", "density", "layers"}
    assert (figures["seen"], figures["kept"]) == (70, 20)
    assert (
        figures["full_bytes"] == 2 * 35 * 2 * 2 * 2 * 8 * 4
    )  # layers, tokens, K and V, sequences, kv heads, D, float32
    assert figures["bytes"] == sum(layer["bytes"] for layer in figures["layers"]) < figures["full_bytes"] / 2
    # Decode steps 31 .. 35 read 11 slots each (10 kept and the new one).
    assert figures["read_share"] == pytest.approx(5 * 11 / (31 + 32 + 33 + 34 + 35))
    text = str(report)
    assert "h2o(budget=10)" in text and "0-1" in text and "total" in text and len(text.splitlines()) > 6


def test_report_on_a_cache_of_several(model: Any) -> None:
    """With `guidance_scale` each step runs twice, for the prompt and for none (or a negative one), with a cache each."""
    ids, negative = torch.tensor([prompt(30)]), torch.tensor([prompt(12, 1)])
    options = dict(max_new_tokens=6, do_sample=False, guidance_scale=1.5, negative_prompt_ids=negative)
    dense = model.generate(ids, **options)
    with kvpress.patch(model, Full()):
        assert torch.equal(model.generate(ids, **options), dense)
    with kvpress.patch(model, H2O(budget=10)) as handle:
        output = model.generate(ids, **options, return_dict_in_generate=True)
        assert handle.report().total.seen == 12 + 5
        figures = handle.report(output[CACHE])
        assert (figures.total.seen, figures.total.kept) == (30 + 5, 10)
        assert figures.layers.keys() == {0, 1}
    with kvpress.patch(model, H2O(budget=8)) as other:
        for cache in (output[CACHE], DynamicCache(config=model.config)):
            with pytest.raises(kvpress.PolicyError, match=r"not filled under h2o\(budget=8\)"):
                other.report(cache)


def test_report_survives_the_cache(model: Any) -> None:
    """The keys and values of a finished run are not held for the report's sake."""
    with kvpress.patch(model, Full()) as handle:
        layer = weakref.ref(model(torch.tensor([prompt(30)]))[CACHE].layers[0])
        gc.collect()
        assert layer() is None
        assert handle.report().to_dict()["kept"] == 30


def test_pipeline(model: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(97)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w2", pad_token="w0", padding_side="left")
    texts = [" ".join(f"w{token}" for token in prompt(count, count)) for count in (12, 25)]
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = dict(max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=2)
    dense = write(texts, **options)
    with kvpress.patch(model, Full()):
        assert write(texts, **options) == dense
    with kvpress.patch(model, H2O(budget=0.4)) as handle:
        batched = write(texts, **options)
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        assert handle.report().to_dict()["kept"] == sum(length * 2 // 5 for length in lengths)
        alone = [write([text], **options)[0] for text in texts]
    assert batched == alone


def test_threads_share_a_patched_model(model: Any) -> None:
    texts = [prompt(10 + index, index) for index in range(6)]
    with kvpress.patch(model, H2O(budget=0.4)):
        alone = [model.generate(torch.tensor([text]), max_new_tokens=8, do_sample=False) for text in texts]
        results: dict[int, torch.Tensor] = {}

        def work(index: int) -> None:
            results[index] = model.generate(torch.tensor([texts[index]]), max_new_tokens=8, do_sample=False)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[index], alone[index]) for index in range(6))


def test_a_forgotten_patch_does_not_keep_the_model_alive() -> None:
    model = sharp_llama()
    kvpress.patch(model, H2O(budget=8))
    model.generate(torch.tensor([prompt(20)]), max_new_tokens=3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_patching_many_times_grows_nothing(model: Any) -> None:
    from kvpress.attention import originals
    from kvpress.patching import _handles

    ids = torch.tensor([prompt(20)])
    before = len(_handles), len(originals._by_config)
    for _ in range(20):
        with kvpress.patch(model, H2O(budget=8)):
            model.generate(ids, max_new_tokens=2)
    assert (len(_handles), len(originals._by_config)) == before


def test_without_a_cache_every_policy_is_exact(model: Any) -> None:
    """use_cache=False: one exact pass (U8: scoring a text in one pass does not see a policy)."""
    texts = [prompt(9), prompt(20, 1)]
    ids = torch.tensor([[0] * 11 + texts[0], texts[1]])
    mask = torch.tensor([[0] * 11 + [1] * 9, [1] * 20])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        dense = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        with kvpress.patch(model, H2O(budget=4)):
            ours = model(ids, attention_mask=mask, position_ids=places, use_cache=False)
    assert ours.get(CACHE) is None
    torch.testing.assert_close(ours.logits[mask.bool()], dense[mask.bool()], atol=1e-5, rtol=1e-4)


def test_a_cache_of_ones_own(model: Any) -> None:
    """A DynamicCache with or without a config is filled in place; none at all works too."""
    ids = torch.tensor([prompt(20)])
    with torch.no_grad(), kvpress.patch(model, H2O(budget=8)):
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            assert model(ids, **{CACHE: cache})[CACHE] is cache
            assert cache.layers[1].positions.shape[2] == 9
        assert model(ids)[CACHE].get_seq_length() == 20


def test_import_changes_nothing_and_patching_registers_one_name() -> None:
    code = """
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
before = set(attention), set(masks)
import kvpress, kvpress.policies, kvpress.patching
assert (set(attention), set(masks)) == before
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, intermediate_size=16, vocab_size=9))
kvpress.patch(model, "full").unpatch()
assert set(attention) - before[0] == {"kvpress"} and set(masks) - before[1] == {"kvpress"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(sys.prefix))


def test_a_name_with_fields(model):
    """Those of the policy, as `make_policy` takes them; 20% is a share."""
    for budget in (0.2, "20%"):
        with kvpress.patch(model, "h2o", budget=budget) as handle:
            assert list(handle.policies) == [H2O(budget=0.2)]
    with pytest.raises(PolicyError, match="h2o has no field 'window'"):
        kvpress.patch(model, "h2o", window=3)
    with pytest.raises(PolicyError, match="is a finished policy"):
        kvpress.patch(model, H2O(budget=0.2), budget=0.3)


def test_a_policys_mapping_makes_it_again():
    for policy in (H2O(budget=0.2), AdaKV(SnapKV(budget=64, window=8), alpha=0.3), TidalDecode(k=99)):
        spec = policy_spec(policy)
        assert kvpress.make_policy(yaml.safe_load(yaml.safe_dump(spec))) == policy
