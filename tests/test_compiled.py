"""Compiled decode steps give what they give without; layers that do the same in a step share one graph."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor.exc import InductorError

import kvpress
from kvpress import PolicyError, UnsupportedModelError
from kvpress.compat import CACHE
from kvpress.policies import EMS, H2O, Full, HiP, InfiniteHiP, Kascade, Quest, SnapKV, TidalDecode
from support.matrix import GRAPHS
from support.models import tiny_llama, token_ids
from test_families import FAMILIES, batch, build

STEPS = 12


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
    """The same tokens, scores and report, in at most one graph for each kind of step and of layer; these kinds."""
    with kvpress.patch(model, policy) as handle:
        plain = generate(model, inputs)
        told = handle.report().total
    counter, kinds = CompileCounter(), set()
    with kvpress.patch(model, policy) as handle:
        handle.compile(counter if backend == "eager" else backend, mode)
        steps = handle._forward().run
        run = steps.run

        def noted(module, current, index, *arguments):
            step = current.layers[index].step
            if step in current.layers[index].known:  # else it runs as it is
                # What a policy selects is as wide as the slots that there are; else their number is no constant of a graph.
                sizes = {} if "selection" in policy.roles else {"capacity": 0, "places": 0}
                kinds.add((step._replace(**sizes), kind_of_layer(policy, index)))
            return run(module, current, index, *arguments)

        steps.run = noted
        compiled = generate(model, inputs)
        found = handle.report().total
    if backend == "eager":
        assert 1 <= counter.frame_count <= len(kinds), "a step was compiled again, or in parts, or never"
    assert (found.seen, found.kept, found.read_share) == (told.seen, told.kept, told.read_share)
    assert (
        told.bytes <= found.bytes <= 1.05 * told.bytes
    )  # where widths must not change, there are some places to spare
    assert torch.equal(compiled.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(compiled.scores), torch.stack(plain.scores), atol=1e-4, rtol=1e-4)


def kind_of_layer(policy, index):
    """What a policy does in a layer, as far as it differs from layer to layer; and the first, whose index is a constant."""
    by_layer = HiP | InfiniteHiP | Kascade | TidalDecode | Quest
    if isinstance(policy, by_layer) or policy.name in ("keyformer", "pyramid_kv", "knorm"):
        return index
    return index == 0 and "selection" in policy.roles


@pytest.mark.every_case
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.id)
def test_every_policy(case):
    ids = token_ids(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert_same(tiny_llama(layers=3), case.policy, {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family):
    """Also with layers that the policies leave alone, which run as they are."""
    assert_same(build(family), H2O(budget=10), batch())


@pytest.mark.parametrize("policy", [SnapKV(budget=0.5, window=4), EMS(budget=12, recent=2, window=2)], ids=str)
def test_with_inductor(policy):
    """Merging, too: a warning would say that steps run uncompiled."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run uncompiled")
        assert_same(tiny_llama(), policy, {"input_ids": token_ids(1, 24)}, backend="inductor")


def test_in_a_mode_of_inductor():
    policy = SnapKV(budget=0.5, window=4)
    assert_same(tiny_llama(), policy, {"input_ids": token_ids(1, 24)}, backend="inductor", mode="reduce-overhead")


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


# ------------------------------------------------------------------ hooks of the user


def inner(model):
    return model.model.layers[1].self_attn.o_proj


HOOKS = {
    "forward": lambda model, calls: inner(model).register_forward_hook(lambda _, args, out: calls.append(1) or 2 * out),
    "with-kwargs": lambda model, calls: inner(model).register_forward_hook(
        lambda _, args, kwargs, out: calls.append(1) or 2 * out, with_kwargs=True, always_call=True
    ),
    "pre": lambda model, calls: inner(model).register_forward_pre_hook(lambda _, args: calls.append(1) or 2 * args[0]),
    "of-all-modules": lambda model, calls: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: calls.append(1) or 2 * out if module is inner(model) else None
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS.keys())
def test_a_hook_is_called_in_every_step(add, when):
    """Added before the model is compiled, or after the first compiled steps; it counts, and changes what it sees."""
    model, inputs, calls, counter = tiny_llama(), {"input_ids": token_ids(1, 24)}, [], CompileCounter()
    with kvpress.patch(model, H2O(budget=8)):
        hook = add(model, [])
        expected = generate(model, inputs)
        hook.remove()
    with kvpress.patch(model, H2O(budget=8)) as handle:
        hook = add(model, calls) if when == "before" else None
        handle.compile(counter)
        if hook is None:
            generate(model, inputs)
            hook = add(model, calls)
        try:
            with pytest.warns(UserWarning, match="hooks inside LlamaModel .*run uncompiled") as told:
                found = generate(model, inputs)
        finally:
            hook.remove()
        assert len(calls) == STEPS and len(told) == 1
        assert torch.equal(torch.stack(found.scores), torch.stack(expected.scores))
        generate(model, inputs)  # compiled again, or for the first time
        assert counter.frame_count == 1 and len(calls) == STEPS


def test_a_hook_on_a_module_that_was_put_in_later():
    model, calls = tiny_llama(), []
    with kvpress.patch(model, H2O(budget=8)) as handle:
        handle.compile("eager")
        generate(model, {"input_ids": token_ids(1, 24)})
        new = torch.nn.Linear(32, 32, bias=False)
        model.model.layers[1].self_attn.o_proj = new
        new.register_forward_hook(lambda *_: calls.append(1))
        with pytest.warns(UserWarning, match="run uncompiled"):
            generate(model, {"input_ids": token_ids(1, 24)})
    assert len(calls) == STEPS


def test_hooks_around_the_decoder_do_not_keep_it_from_being_compiled():
    model, calls, counter = tiny_llama(), [], CompileCounter()
    model.model.register_forward_hook(lambda *_: calls.append(1))
    with kvpress.patch(model, H2O(budget=8)) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.compile(counter)
        generate(model, {"input_ids": token_ids(1, 24)})
    assert counter.frame_count == 1 and len(calls) == STEPS


@pytest.mark.parametrize("when", ["before", "after"])
def test_hidden_states_once_and_the_steps_stay_compiled(when):
    """transformers leaves hooks on a model that gave its hidden states."""
    model, counter, ids = tiny_llama(), CompileCounter(), token_ids(1, 24)
    with kvpress.patch(model, H2O(budget=8)) as handle, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        if when == "before":
            model(ids, output_hidden_states=True)
        expected = generate(model, {"input_ids": ids})
        handle.compile(counter)
        generate(model, {"input_ids": ids})
        if when == "after":
            assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        found = generate(model, {"input_ids": ids})
    assert counter.frame_count == 1
    assert torch.equal(found.sequences, expected.sequences)


def test_more_batch_sizes_than_torch_makes_graphs_of():
    """The last ones run uncompiled, and are right; the first ones stay compiled."""
    model, counter = tiny_llama(), CompileCounter()
    texts = [{"input_ids": token_ids(batch, 24)} for batch in (1, 2, 3)]
    with kvpress.patch(model, H2O(budget=8)):
        expected = [generate(model, text).sequences for text in texts]
    with kvpress.patch(model, H2O(budget=8)) as handle, torch._dynamo.config.patch(recompile_limit=1):
        handle.compile(counter)
        with pytest.warns(UserWarning, match="at most 1 graphs.*recompile_limit") as told:
            found = [generate(model, text).sequences for text in [*texts, texts[0]]]
        assert len([one for one in told if one.category is UserWarning]) == 1
    assert counter.frame_count == 1
    assert all(map(torch.equal, found, [*expected, expected[0]]))


def test_where_the_compiler_fails_steps_run_uncompiled():
    model, inputs = tiny_llama(), {"input_ids": token_ids(1, 24)}

    def failing(*_):
        raise InductorError(KeyError("buf1"), KeyError)

    with kvpress.patch(model, H2O(budget=8)) as handle:
        expected = generate(model, inputs).sequences
        handle.compile("eager")
        handle._forward().run._run = failing
        with pytest.warns(UserWarning, match="torch's compiler failed on a step of LlamaDecoderLayer .*buf1"):
            found = generate(model, inputs).sequences
    assert torch.equal(found, expected)


def test_patching_again_and_other_models_use_the_graph_there_is():
    counter = CompileCounter()
    for seed in (0, 0, 1):
        model = tiny_llama(seed=seed, hidden_size=64, intermediate_size=2048)  # with linear layers of our own
        for _ in range(2):
            with kvpress.patch(model, H2O(budget=8)) as handle:
                handle.compile(counter)
                generate(model, {"input_ids": token_ids(1, 24)})
    assert counter.frame_count == 1


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
    handle = kvpress.patch(build("gemma3"), Full())
    with pytest.raises(UnsupportedModelError, match="1 layers that the policies leave alone"):
        handle.compile("replay")

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
