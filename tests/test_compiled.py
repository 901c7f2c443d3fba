"""Decode steps as one compiled graph give what they give without, and are compiled once."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import kvpress
from kvpress import PolicyError, UnsupportedModelError
from kvpress.compat import CACHE
from kvpress.policies import H2O, Full, SnapKV
from matrix import CASES
from models import tiny_llama, token_ids
from test_families import FAMILIES, batch, build

STEPS = 12
HYBRID = {"gemma3", "gemma2-softcap", "gpt-oss-sinks"}  # they have sliding layers, which the policies leave alone


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def generate(model, inputs):
    return model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_scores=True, return_dict_in_generate=True
    )


def assert_same(model, policy, inputs, backend="eager", mode=None):
    with kvpress.patch(model, policy) as handle:
        plain = generate(model, inputs)
        told = handle.report().to_dict()
    counter = CompileCounter()
    with kvpress.patch(model, policy) as handle:
        handle.compile(counter if backend == "eager" else backend, mode)
        compiled = generate(model, inputs)
        if backend == "eager":
            assert counter.frame_count == 1, "a step was compiled again, or in parts, or never"
        assert handle.report().to_dict() == told
    assert torch.equal(compiled.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(compiled.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_policy_in_one_graph(case):
    ids = token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert_same(tiny_llama(layers=3), case.policy, {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - HYBRID))
def test_every_family_in_one_graph(family):
    assert_same(build(family), H2O(budget=10), batch())


def test_with_inductor():
    assert_same(tiny_llama(), SnapKV(budget=0.5, window=4), {"input_ids": token_ids(1, 24)}, backend="inductor")


def test_in_a_mode_of_inductor_attention_stays_out_of_cuda_graphs():
    """A graph would replay how many entries there were."""
    policy = SnapKV(budget=0.5, window=4)
    assert_same(tiny_llama(), policy, {"input_ids": token_ids(1, 24)}, backend="inductor", mode="reduce-overhead")
    assert torch.Tag.cudagraph_unsafe in torch.ops.kvpress.attend_step.default.tags


def test_nothing_is_compiled_again_for_longer_prompts_or_bare_steps():
    model = tiny_llama()
    with kvpress.patch(model, H2O(budget=8), compile=True), torch.inference_mode():
        model.generate(token_ids(1, 20), max_new_tokens=4, do_sample=False)
        with torch.compiler.set_stance("fail_on_recompile"):
            model.generate(token_ids(1, 57), max_new_tokens=30, do_sample=False)
            output = model(token_ids(1, 31))
            for _ in range(3):
                output = model(output.logits[:, -1:].argmax(-1), **{CACHE: output[CACHE]})
            assert output[CACHE].get_seq_length() == 34


def test_steps_with_gradients_are_not_compiled():
    model, counter = tiny_llama(), CompileCounter()
    with kvpress.patch(model, Full()) as handle:
        handle.compile(counter)
        output = model(token_ids(1, 9))
        model(token_ids(1, 1), **{CACHE: output[CACHE]})
    assert counter.frame_count == 0


def test_unpatching_leaves_no_trace():
    model = tiny_llama()
    before = [set(module.__dict__) for module in model.modules()]
    with kvpress.patch(model, Full(), compile=True):
        assert [set(module.__dict__) for module in model.modules()] != before
    assert [set(module.__dict__) for module in model.modules()] == before


def test_a_patched_model_that_the_user_compiles():
    model, ids = tiny_llama(), token_ids(1, 24)
    with kvpress.patch(model, H2O(budget=8)), torch.no_grad():
        plain = model.generate(ids, max_new_tokens=5, do_sample=False)
        compiled = torch.compile(model, backend="eager")
        output, tokens = compiled(ids), ids
        for _ in range(5):
            new = output.logits[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, new), dim=1)
            output = compiled(new, **{CACHE: output[CACHE]})
    assert torch.equal(tokens, plain)


def test_refused_before_anything_is_changed(monkeypatch):
    hybrid = build("gemma3")
    with pytest.raises(UnsupportedModelError, match="1 layers that the policies leave alone"):
        kvpress.patch(hybrid, Full(), compile=True)
    kvpress.patch(hybrid, Full()).unpatch()  # it was left unpatched

    model = tiny_llama()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PolicyError, match="no-such-compiler"):
        kvpress.patch(model, Full(), compile=True)
    monkeypatch.delenv("CXX")
    handle = kvpress.patch(model, Full())
    for backend, mode in (("inductor", "fastest"), ("eager", "reduce-overhead")):
        with pytest.raises(PolicyError, match=f"mode='{mode}' with backend='{backend}'.*max-autotune"):
            handle.compile(backend, mode)
    handle.compile()
    with pytest.raises(PolicyError, match="compiled already"):
        handle.compile()
    handle.unpatch()
    with pytest.raises(PolicyError, match="is unpatched"):
        handle.compile()
