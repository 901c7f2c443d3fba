"""Whatever ends a pass, whoever else wraps the model, and however it is copied: the model stays usable and whole."""

import copy
import functools
import gc
import io
import os
import pickle
import signal
import threading

import pytest
import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.passes import active_pass
from kvpress.policies import H2O, Full, Keyformer, SnapKV, StreamingLLM, TidalDecode
from support.matrix import prompt, sharp_llama

OPTIONS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model():
    return sharp_llama()


@pytest.fixture
def ids():
    return torch.tensor([prompt(20)])


# ------------------------------------------------------------------ what ends a pass


class Interrupted(BaseException):
    """An end that `except Exception` does not see."""


def interrupt_in(model, ending, at=1):
    """A hook in the middle of a pass that ends it at its call number `at`."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == at:
            ending()

    return model.model.layers[1].mlp.register_forward_pre_hook(hook)


def raising(error):
    def ending():
        raise error

    return ending


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the handler runs between two bytecodes
        pass


ENDINGS = {
    "ctrl-c": (ctrl_c, KeyboardInterrupt),
    "system-exit": (raising(SystemExit(1)), SystemExit),
    "generator-exit": (raising(GeneratorExit()), GeneratorExit),
    "base-exception": (raising(Interrupted()), Interrupted),
    "error": (raising(MemoryError("no room")), MemoryError),
}
RUNS = {
    "generate": lambda model, ids: model.generate(ids, **OPTIONS),
    "forward": lambda model, ids: model(ids),
    "score": lambda model, ids: kvpress.score(model, ids[0].tolist(), [3, 4, 5, 6]),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("at", [1, 2], ids=["prompt", "step"])
def test_whatever_ends_a_pass_the_model_is_free_again(model, ids, ending, run, at):
    if run == "forward" and at == 2:
        pytest.skip("one forward is one pass")
    end, error = ENDINGS[ending]
    expected = model.generate(ids, **OPTIONS)
    handle = kvpress.patch(model, Full())
    hook = interrupt_in(model, end, at)
    with pytest.raises(error):
        RUNS[run](model, ids)
    hook.remove()
    assert active_pass() is None
    assert torch.equal(model.generate(ids, **OPTIONS), expected)
    handle.compile("eager")
    handle.unpatch()
    kvpress.patch(model, H2O(budget=8)).unpatch()
    assert torch.equal(model.generate(ids, **OPTIONS), expected)


def test_a_with_block_lets_the_interrupt_through(model, ids):
    """The error that ended the pass arrives, not one of `unpatch`, and the model is unpatched."""
    hook = interrupt_in(model, ctrl_c)
    with pytest.raises(KeyboardInterrupt), kvpress.patch(model, H2O(budget=8)):
        model.generate(ids, **OPTIONS)
    hook.remove()
    assert "forward" not in vars(model.model) and "generate" not in vars(model)


def test_a_compiled_run_that_is_interrupted(model, ids):
    torch.compiler.reset()
    with kvpress.patch(model, H2O(budget=8)) as handle:
        expected = model.generate(ids, **OPTIONS)
        handle.compile("eager")
        model.generate(ids, **OPTIONS)
        step = handle._forward().run
        inner = step._run
        step._run = lambda *_: raising(KeyboardInterrupt())()
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, **OPTIONS)
        step._run = inner
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_in_the_midst_of_a_pass(model, ids):
    """What it leaves behind blocks no other thread."""
    handle = kvpress.patch(model, H2O(budget=8))
    hook = interrupt_in(model, raising(SystemExit()))
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=OPTIONS)
    thread.start()
    thread.join()
    hook.remove()
    model.generate(ids, **OPTIONS)
    handle.unpatch()


def test_a_pass_within_a_pass_gives_way_to_the_outer_one(model, ids):
    """A hook of one patched model that runs another one."""
    other = sharp_llama(seed=2)
    with kvpress.patch(model, H2O(budget=8)), kvpress.patch(other, SnapKV(budget=9, window=3, kernel_size=1)):
        alone, inner = model.generate(ids, **OPTIONS), []
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: inner.append(other.generate(ids, **OPTIONS)))
        assert torch.equal(model.generate(ids, **OPTIONS), alone)
        hook.remove()
        assert len(inner) == 4 and torch.equal(inner[0], other.generate(ids, **OPTIONS))


def test_no_unpatching_while_it_generates(model, ids):
    with kvpress.patch(model, Full()) as handle:
        refusals = []

        def hook(*_):
            with pytest.raises(kvpress.PolicyError, match="generating right now"):
                handle.unpatch()
            refusals.append(1)

        model.model.layers[0].register_forward_pre_hook(hook)
        model.generate(ids, **OPTIONS)
        assert len(refusals) == 4


# ------------------------------------------------------------------ what others put on the model


def test_a_generate_of_ones_own_is_wrapped_and_restored(model, ids):
    calls = []
    plain = model.generate

    def own(*args, **kwargs):
        calls.append(kwargs.get("max_new_tokens"))
        return plain(*args, do_sample=False, **kwargs)

    model.generate = own
    with kvpress.patch(model, H2O(budget=8)) as handle:
        model.generate(ids, max_new_tokens=3)
        assert calls == [3] and handle.report().total.kept == 8
    assert vars(model)["generate"] is own


def test_a_partial_generate_is_checked_with_what_it_adds(model, ids):
    model.generate = functools.partial(model.generate, prompt_lookup_num_tokens=2)
    own = model.generate
    with kvpress.patch(model, H2O(budget=8)), pytest.raises(kvpress.PolicyError, match="takes tokens back"):
        model.generate(ids, max_new_tokens=3)
    assert vars(model)["generate"] is own


def test_a_partial_generate_tells_how_many_tokens_are_wanted(model, ids):
    """Keyformer's temperature rises over them."""
    policy = Keyformer(budget=9)
    with kvpress.patch(model, policy):
        expected = model.generate(ids, **OPTIONS, return_dict_in_generate=True, output_logits=True).logits
    model.generate = functools.partial(model.generate, **OPTIONS)
    with kvpress.patch(model, policy):
        found = model.generate(ids, return_dict_in_generate=True, output_logits=True).logits
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_what_is_set_while_patched_stays(model, ids):
    expected = model.generate(ids, **OPTIONS)
    handle = kvpress.patch(model, Full())
    model.generate = functools.partial(model.generate, **OPTIONS)
    later = model.generate
    handle.unpatch()
    assert vars(model)["generate"] is later
    assert torch.equal(model.generate(ids), expected)


def test_a_forward_of_ones_own_is_wrapped_and_restored(model, ids):
    decoder, calls = model.model, []
    plain = decoder.forward

    def own(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    decoder.forward = own
    with kvpress.patch(model, H2O(budget=8)) as handle:
        model.generate(ids, **OPTIONS)
        assert handle.report().total.kept == 8
    assert vars(decoder)["forward"] is own and len(calls) == 4


def test_a_forward_that_is_wrapped_while_patched(model, ids):
    """It stays, and runs the plain model once the policy is off."""
    expected, decoder = model.generate(ids, **OPTIONS), model.model
    handle = kvpress.patch(model, H2O(budget=4))
    wrapped = decoder.forward
    decoder.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    model.generate(ids, **OPTIONS)
    assert handle.report().total.kept == 4
    handle.unpatch()
    assert torch.equal(model.generate(ids, **OPTIONS), expected)
    with kvpress.patch(model, Full()):
        assert torch.equal(model.generate(ids, **OPTIONS), expected)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_of_the_user_see_what_they_saw(model, ids, before):
    seen = []

    def add():
        model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True)
        model.model.register_forward_hook(lambda _, args, output: seen.append(type(output).__name__))

    if before:
        add()
    with kvpress.patch(model, H2O(budget=8)):
        if not before:
            add()
        model(ids)
    assert len(seen) == 2 and CACHE in seen[0] and seen[1] == "BaseModelOutputWithPast"


# ------------------------------------------------------------------ copies


def deep(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("clone", [deep, pickled, saved])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    "policy",
    [Full(), H2O(budget=4), StreamingLLM(recent=4), TidalDecode(k=3, sparse_layer_start=0)],
    ids=lambda p: p.name,
)
def test_a_copy_is_an_unpatched_model(model, ids, clone, policy, compiled):
    torch.compiler.reset()
    expected = model.generate(ids, **OPTIONS)
    implementation = model.config._attn_implementation
    with kvpress.patch(model, policy) as handle:
        if compiled:
            handle.compile("eager")
        under = model.generate(ids, **OPTIONS)
        twin = clone(model)
        assert twin.config._attn_implementation == implementation
        assert torch.equal(twin.generate(ids, **OPTIONS), expected)
        assert torch.equal(model.generate(ids, **OPTIONS), under)
        with pytest.raises(kvpress.PolicyError, match="not patched"):
            kvpress.unpatch(twin)
        with kvpress.patch(twin, policy):
            assert torch.equal(twin.generate(ids, **OPTIONS), under)
    del model, handle
    gc.collect()
    assert torch.equal(twin.generate(ids, **OPTIONS), expected)
    torch.compiler.reset()


def test_a_shallow_copy_shares_the_patched_decoder(model, ids):
    with kvpress.patch(model, H2O(budget=4)) as handle:
        expected = model.generate(ids, **OPTIONS)
        twin = copy.copy(model)
        del model
        assert torch.equal(twin.generate(ids, **OPTIONS), expected)
        assert handle.report().total.kept == 4


@pytest.mark.filterwarnings("ignore")
def test_quantizing_a_patched_model(model, ids):
    """torch's dynamic quantisation copies the model."""
    with kvpress.patch(model, H2O(budget=4)):
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        found = quantized.generate(ids, **OPTIONS)
    assert torch.equal(quantized.generate(ids, **OPTIONS), found)
    with kvpress.patch(quantized, H2O(budget=4)) as handle:
        quantized.generate(ids, **OPTIONS)
        assert handle.report().total.kept == 4


# ------------------------------------------------------------------ a config that two models share


@torch.no_grad()
def test_an_unpatched_model_that_shares_the_config_keeps_its_masks(model):
    """Padded too, which needs a mask: ours is for the layers of patched models alone."""
    other = sharp_llama(seed=2)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    ids = torch.tensor([[0] * 7 + prompt(13), prompt(20, 1)])
    mask = (ids != 0).long()
    expected = other(ids, attention_mask=mask).logits
    with kvpress.patch(model, H2O(budget=4)):
        assert torch.equal(other(ids, attention_mask=mask).logits, expected)
