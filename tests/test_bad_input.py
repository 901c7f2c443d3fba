"""Wrong use: what is refused says the value, the limit and the remedy, and leaves the model as it was."""

import re
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
)
from transformers.cache_utils import Cache, DynamicLayer

import kvpress
from kvpress import PolicyError, UnsupportedModelError
from kvpress.compat import CACHE
from kvpress.layer import KVLayer
from kvpress.policies import (
    H2O,
    TOVA,
    Full,
    HiP,
    InfiniteHiP,
    Quest,
    RecycledAttention,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
)
from kvpress.policy import Quota, Sinks
from support import refusals
from support.models import (
    tiny_bloom,
    tiny_deepseek_v3,
    tiny_falcon,
    tiny_llama,
    tiny_mistral_sliding,
    tiny_opt,
    tiny_t5,
    token_ids,
)

NEW = 4  # tokens generated
LONG = 60  # seconds that a thread may wait for another before the test gives up

POLICIES = {
    "full": Full(),
    "h2o": H2O(budget=4),
    "snapkv": SnapKV(budget=4, window=2),
    "streaming": StreamingLLM(sink=1, recent=3),
    "streaming-original": StreamingLLM(sink=1, recent=3, rope="original"),
}
EVICTING = {name: policy for name, policy in POLICIES.items() if name != "full"}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
every_eviction = pytest.mark.parametrize("policy", EVICTING.values(), ids=EVICTING.keys())


def state(model):
    """All that a patch could leave on a model: every module's attributes, hooks, attention implementation."""
    return {
        name: (
            sorted(vars(module)),
            {key: list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")},
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            getattr(getattr(module, "config", None), "num_hidden_layers", None),
            module.training,
        )
        for name, module in model.named_modules()
    }


@contextmanager
def refused(*words, error=PolicyError, model=None):
    """The block raises `error` with a message that has all the words, and does not change the model."""
    before = None if model is None else state(model)
    with refusals.refused(*words, error=error) as caught:
        yield caught
    if model is not None:
        assert state(model) == before


@contextmanager
def patched(model, policy):
    """A patch that still works and leaves no trace, whatever was refused in it."""
    before, ids = state(model), token_ids(1, 12, seed=9)
    with torch.no_grad():
        dense = model(ids).logits
    with kvpress.patch(model, policy) as handle:
        yield handle
        if model.config._attn_implementation == "kvpress":
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, dense)
            kept = handle.report().total.kept
            assert kept == 12 if handle.policies == [Full()] else kept < 12
    assert state(model) == before
    assert "generate" not in vars(model) and not model.get_decoder()._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


@pytest.fixture
def model():
    return tiny_llama()


def greedy(model, ids, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=NEW, **options)


# ------------------------------------------------------------------ which policy


NAMES = ("full", "h2o", "snapkv", "streaming_llm")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        pytest.param("h2", ("'h2'", "did you mean 'h2o'", *NAMES), id="name-nearest"),
        pytest.param("H2O", ("'H2O'", "did you mean 'h2o'", *NAMES), id="name-case"),
        pytest.param("snap_kv", ("'snap_kv'", "did you mean 'snapkv'", *NAMES), id="name-underscore"),
        pytest.param("streaming", ("'streaming'", "did you mean 'streaming_llm'", *NAMES), id="name-part"),
        pytest.param("zzz", ("unknown policy 'zzz'", *NAMES), id="name-far"),
        pytest.param("", ("unknown policy ''", *NAMES), id="name-empty"),
        pytest.param({"name": "h2"}, ("'h2'", "did you mean 'h2o'"), id="mapping-name"),
        pytest.param({"name": 3}, ("unknown policy 3", *NAMES), id="mapping-name-is-a-number"),
        pytest.param({"budget": 0.2}, ("has no name", "'budget': 0.2", "add name", *NAMES), id="mapping-no-name"),
        pytest.param({}, ("has no name", "add name", *NAMES), id="mapping-empty"),
        pytest.param(
            {"name": "h2o", "buget": 0.2},
            ("h2o has no field 'buget'", "did you mean 'budget'"),
            id="field-nearest",
        ),
        pytest.param(
            {"name": "h2o", "window": 3},
            ("h2o has no field 'window'", "heavy", "recent", "budget"),
            id="field-of-another",
        ),
        pytest.param({"name": "full", "budget": 3}, ("full has no field 'budget'", "none to set"), id="field-of-full"),
        pytest.param({"name": "h2o", "budget": 1.5}, ("budget=1.5", "(0, 1]"), id="value"),
        pytest.param([], ("empty list", *NAMES), id="empty-list"),
        pytest.param((), ("empty list", *NAMES), id="empty-tuple"),
        pytest.param(
            [H2O(budget=4), SnapKV(budget=64)],
            ("h2o(budget=4)", "snapkv(budget=64)", "role 'eviction'", "keep one"),
            id="two-of-a-role",
        ),
        pytest.param(["h2o", "h2o"], ("role 'eviction'", "keep one"), id="the-same-twice"),
        pytest.param([Full(), "h2"], ("did you mean 'h2o'",), id="name-in-a-list"),
        pytest.param(3, ("3 is no policy", "a name", "mapping", "YAML"), id="number"),
        pytest.param(None, ("None is no policy", "a name"), id="none"),
        pytest.param(H2O, ("is no policy", "give H2O(...)"), id="class-instead-of-instance"),
    ],
)
def test_which_policy(model, spec, words):
    """Specs that name no policy, with the nearest name or field where there is one."""
    with refused(*words, model=model):
        kvpress.patch(model, spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            "name: h2o\nbuget: 0.2\n",
            ("policy.yaml", "no field 'buget'", "did you mean 'budget'"),
            id="field",
        ),
        pytest.param("name: h2\n", ("policy.yaml", "'h2'", "did you mean 'h2o'"), id="name"),
        pytest.param("budget: 0.2\n", ("policy.yaml", "has no name", "add name"), id="no-name"),
        pytest.param("", ("policy.yaml", "None is no policy"), id="empty-file"),
        pytest.param("- h2o\n", ("policy.yaml", "no policy"), id="list"),
    ],
)
def test_yaml_content(model, tmp_path, text, words):
    """A YAML file is checked as a mapping is, and the message names the file."""
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    for spec in (path, str(path)):
        with refused(*words, model=model):
            kvpress.patch(model, spec)


def test_yaml_value(model, tmp_path):
    """A value out of range in a file: the message names value and limit."""
    path = tmp_path / "policy.yml"
    path.write_text("name: h2o\nbudget: 0\n")
    with refused("budget=0", "at least 1", model=model):
        kvpress.patch(model, path)


def test_yaml_missing(model, tmp_path):
    """No such file, or a folder."""
    with refused("nowhere.yaml", "cannot be read", "No such file", "path of a YAML file", model=model):
        kvpress.patch(model, "nowhere.yaml")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with refused("folder.yaml", "cannot be read", "directory", model=model):
        kvpress.patch(model, folder)


@pytest.mark.parametrize(
    "content",
    [b"name: [h2o\n", b"\xff\xfe\x00name", b"name: h2o\n\tbudget: 3\n"],
    ids=["open", "binary", "tab"],
)
def test_yaml_invalid(model, tmp_path, content):
    """Not YAML, or not text: the file is named."""
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    before = state(model)
    with pytest.raises(PolicyError, match=r"policy\.yaml.*YAML"):
        kvpress.patch(model, path)
    assert state(model) == before


def test_finished_policy_is_not_overridden():
    """Overrides go with names and mappings only."""
    with refused("h2o(budget=4)", "finished policy", "budget"):
        kvpress.make_policy(H2O(budget=4), budget=5)


# ------------------------------------------------------------------ which budget


BAD_BUDGETS = [
    pytest.param(0, ("=0 ", "at least 1"), id="0"),
    pytest.param(-3, ("=-3", "at least 1"), id="-3"),
    pytest.param(0.0, ("=0.0", "(0, 1]"), id="0.0"),
    pytest.param(-0.5, ("=-0.5", "(0, 1]"), id="-0.5"),
    pytest.param(1.5, ("=1.5", "above 1", "(0, 1]"), id="1.5"),
    pytest.param(512.0, ("=512.0", "(0, 1]", "512 entries", "=512"), id="512.0"),
    pytest.param(True, ("=True", "bool", "(0, 1]", "int"), id="True"),
    pytest.param(False, ("=False", "bool", "(0, 1]", "int"), id="False"),
    pytest.param(float("nan"), ("=nan", "(0, 1]", "int"), id="nan"),
    pytest.param(float("inf"), ("=inf", "(0, 1]"), id="inf"),
    pytest.param(float("-inf"), ("=-inf", "(0, 1]"), id="-inf"),
    pytest.param("0.2", ("='0.2'", "str", "(0, 1]", "int"), id="str"),
    pytest.param([0.2], ("=[0.2]", "list", "(0, 1]"), id="list"),
]


@pytest.mark.parametrize(("value", "words"), BAD_BUDGETS)
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "streaming_llm"])
def test_budget(model, policy, value, words):
    """Budgets that are no share and no count, in every policy that takes one."""
    with refused("budget", *words, model=model):
        kvpress.patch(model, {"name": policy, "budget": value})


@pytest.mark.parametrize(("value", "words"), BAD_BUDGETS)
def test_recent_of_streaming(value, words):
    """StreamingLLM's window is a budget too."""
    with refused("recent", *words):
        StreamingLLM(recent=value)


@pytest.mark.parametrize(("value", "words"), [case for case in BAD_BUDGETS if case.id not in ("0", "0.0")])
@pytest.mark.parametrize("part", ["heavy", "recent"])
def test_parts_of_h2o(part, value, words):
    """The parts of H2O may be 0, and else follow the same rules."""
    words = [word.replace("at least 1", "at least 0") for word in words]
    with refused(part, *words):
        H2O(**{"heavy": 2, "recent": 2, part: value})


@pytest.mark.parametrize("value", [None, (), 1j, b"1"], ids=repr)
def test_snapkv_always_has_a_budget(value):
    """What is no number at all."""
    with refused(f"budget={value!r}", "(0, 1]", "int"):
        SnapKV(budget=value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param(
            {"heavy": 3, "recent": 6, "budget": 8}, ("9", "larger", "budget=8", "lower"), id="parts-too-large"
        ),
        pytest.param({"heavy": 9, "budget": 8}, ("9", "larger", "budget=8", "lower"), id="heavy-too-large"),
        pytest.param({"recent": 9, "budget": 8}, ("9", "larger", "budget=8", "lower"), id="recent-too-large"),
        pytest.param({"recent": 0.3, "budget": 0.2}, ("0.3", "larger", "budget=0.2"), id="share-too-large"),
        pytest.param(
            {"heavy": 0.1, "recent": 0.2, "budget": 0.2},
            ("0.3", "larger", "budget=0.2"),
            id="shares-too-large",
        ),
        pytest.param({"heavy": 1, "recent": 1, "budget": 8}, ("2", "less", "budget=8", "drop"), id="parts-too-small"),
        pytest.param({"heavy": 0, "recent": 0, "budget": 8}, ("0", "less", "budget=8"), id="empty-parts"),
        pytest.param(
            {"heavy": 0.5, "budget": 8},
            ("budget=8", "0.5", "all as entries (int)", "shares (float)"),
            id="share-in-int",
        ),
        pytest.param({"recent": 3, "budget": 0.2}, ("budget=0.2", "3", "int", "float"), id="int-in-share"),
        pytest.param({"heavy": 1, "recent": 0.1, "budget": 8}, ("budget=8", "0.1", "int", "float"), id="mixed-parts"),
        pytest.param({"heavy": 3}, ("heavy=3", "recent=None", "give both", "budget="), id="heavy-alone"),
        pytest.param({"recent": 3}, ("heavy=None", "recent=3", "give both", "budget="), id="recent-alone"),
        pytest.param({"heavy": 0, "recent": 0}, ("heavy=0", "recent=0", "at least one"), id="nothing-to-keep"),
        pytest.param({"heavy": 0.0, "recent": 0}, ("keep nothing", "at least one"), id="nothing-to-keep-as-a-share"),
        pytest.param({"budget": 3, "evict": "never"}, ("evict='never'", "each_pass", "after_prompt"), id="evict"),
    ],
)
def test_h2o(model, fields, words):
    """Parts that do not fit the budget, add up to less, or are given in two kinds."""
    with refused(*words, model=model):
        kvpress.patch(model, {"name": "h2o", **fields})


def test_shares_that_add_up_in_decimals_are_accepted():
    """0.1 + 0.2 is 0.3 here, though not in binary."""
    assert H2O(heavy=0.1, recent=0.2, budget=0.3).quota(100, 0, 1).total == 30
    assert H2O(heavy=0.7, recent=0.1, budget=0.8).quota(100, 0, 1).total == 80


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"kernel_size": 4}, ("kernel_size=4", "even", "odd", "5"), id="even-kernel"),
        pytest.param({"kernel_size": 0}, ("kernel_size=0", "at least 1"), id="kernel-0"),
        pytest.param({"kernel_size": -3}, ("kernel_size=-3", "at least 1"), id="kernel-negative"),
        pytest.param({"kernel_size": 3.0}, ("kernel_size=3.0", "int"), id="kernel-float"),
        pytest.param({"kernel_size": True}, ("kernel_size=True", "int"), id="kernel-bool"),
        pytest.param({"window": 0}, ("window=0", "at least 1"), id="window-0"),
        pytest.param({"window": 0.5}, ("window=0.5", "int"), id="window-share"),
        pytest.param({"budget": 32}, ("budget=32", "window=32", "above 32", "smaller window"), id="budget-is-window"),
        pytest.param({"budget": 8, "window": 9}, ("budget=8", "window=9", "above 9"), id="budget-below-window"),
        pytest.param({"pooling": "mean"}, ("pooling='mean'", "'avg'", "'max'"), id="pooling"),
        pytest.param({"evict": None}, ("evict=None", "each_pass", "after_prompt"), id="evict"),
    ],
)
def test_snapkv(model, fields, words):
    """Windows and kernels that cannot work."""
    with refused(*words, model=model):
        kvpress.patch(model, {"name": "snapkv", **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"recent": 3, "budget": 7}, ("recent=3", "budget=7", "one of them"), id="both"),
        pytest.param({"budget": 4}, ("budget=4", "sink=4", "at least 5"), id="no-room-for-a-recent-token"),
        pytest.param({"budget": 4, "sink": 9}, ("budget=4", "sink=9", "at least 10"), id="no-room-for-the-sinks"),
        pytest.param({"sink": -1, "recent": 3}, ("sink=-1", "at least 0"), id="sink-negative"),
        pytest.param({"sink": 4.0, "recent": 3}, ("sink=4.0", "int"), id="sink-float"),
        pytest.param({"sink": True, "recent": 3}, ("sink=True", "int"), id="sink-bool"),
        pytest.param({"rope": "yarn", "recent": 3}, ("rope='yarn'", "'reindex'", "'original'"), id="rope"),
    ],
)
def test_streaming(model, fields, words):
    """Sinks and windows that contradict each other."""
    with refused(*words, model=model):
        kvpress.patch(model, {"name": "streaming_llm", **fields})


def test_defaults_without_a_budget():
    """With nothing given: H2O's main setting, a share of 0.2, and the StreamingLLM authors' 4 + 512."""
    for tokens in (1, 4, 5, 99, 515, 516, 517, 1000, 131072):
        assert H2O().quota(tokens, 0, 1) == H2O(budget=0.2).quota(tokens, 0, 1)
        assert StreamingLLM().quota(tokens, 0, 1) == StreamingLLM(recent=512).quota(tokens, 0, 1) == Quota(516, 512)
    assert (H2O().describe(), StreamingLLM().describe()) == ("h2o()", "streaming_llm()")


# ------------------------------------------------------------------ which model


class NotAModel(torch.nn.Module):
    """A module of torch that holds a transformers model."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_llama()


def linear():
    return torch.nn.Linear(2, 2)


def on_meta():
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_llama().config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(linear, ("Linear", "PreTrainedModel", "pass the model"), id="linear"),
        pytest.param(NotAModel, ("NotAModel", "PreTrainedModel", "pass the model"), id="wrapper"),
        pytest.param(tiny_t5, ("T5ForConditionalGeneration", "encoder-decoder", "decoder-only"), id="t5"),
        pytest.param(tiny_bloom, ("BloomForCausalLM", "ALiBi", "not supported"), id="bloom"),
        pytest.param(tiny_falcon, ("FalconForCausalLM", "AttentionInterface", "cannot be patched"), id="falcon"),
        pytest.param(tiny_deepseek_v3, ("DeepseekV3ForCausalLM", "latent", "kv_lora_rank=8"), id="deepseek-v3"),
        pytest.param(tiny_mistral_sliding, ("Mistral", "full attention", "sliding window 8"), id="mistral-sliding"),
        pytest.param(on_meta, ("LlamaForCausalLM", "meta device", "load"), id="meta"),
    ],
)
@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_which_model(make, words, policy):
    """Models without what a policy needs, each with its reason."""
    unsupported = make()
    with refused(*words, error=UnsupportedModelError, model=unsupported) as caught:
        kvpress.patch(unsupported, policy)
    assert isinstance(caught.value, TypeError)
    for module in unsupported.modules():
        assert "generate" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("nothing", [None, "gpt2", 3, LlamaForCausalLM], ids=["None", "str", "int", "class"])
def test_no_model_at_all(nothing):
    """What is no module."""
    with refused("PreTrainedModel", error=UnsupportedModelError):
        kvpress.patch(nothing, "full")


def dynamic_ntk():
    return tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})


@pytest.mark.parametrize("make", [tiny_opt, dynamic_ntk], ids=["learned-positions", "dynamic-ntk"])
def test_positions_that_cannot_be_moved(make):
    """Re-indexing needs a rotary embedding that does not depend on the length; the other mode works."""
    model = make()
    words = ("streaming_llm(sink=1, recent=3)", "re-index", "rope='original'")
    with refused(*words, error=UnsupportedModelError, model=model):
        kvpress.patch(model, StreamingLLM(sink=1, recent=3))
    with patched(model, StreamingLLM(sink=1, recent=3, rope="original")):
        greedy(model, token_ids(1, 9))


# ------------------------------------------------------------------ patching and unpatching


@every_policy
def test_patching_twice(model, policy):
    """Refused with what is on the model, which stays; the decoder of a patched model counts as patched."""
    with patched(model, policy):
        before = state(model)
        for target in (model, model.model):
            with refused("already patched", policy.describe(), "kvpress.unpatch(model)", model=model):
                kvpress.patch(target, "full")
        assert state(model) == before
        greedy(model, token_ids(1, 9))


def test_unpatching_twice(model):
    """By the handle and by the function, in either order."""
    for first in ("handle", "function"):
        handle = kvpress.patch(model, "h2o")
        handle.unpatch() if first == "handle" else kvpress.unpatch(model)
        with refused("h2o()", "unpatched already", model=model):
            handle.unpatch()
        with refused("LlamaForCausalLM", "not patched", model=model):
            kvpress.unpatch(model)


@pytest.mark.parametrize("make", [tiny_llama, linear, lambda: None], ids=["llama", "linear", "None"])
def test_unpatching_what_is_not_patched(make):
    """Any object."""
    with refused("not patched"):
        kvpress.unpatch(make())


def test_unpatching_inside_the_with_block(model):
    """The block's end does not complain about it."""
    with kvpress.patch(model, "h2o") as handle:
        handle.unpatch()
    assert "unpatched" in repr(handle)


def test_nothing_to_report(model):
    """Before a run, and after a run without a cache."""
    with patched(model, H2O(budget=4)) as handle:
        with refused("nothing to report", "has not run", model=model):
            handle.report()
        model(token_ids(1, 9), use_cache=False)
        with refused("nothing to report", "with a cache", model=model):
            handle.report()
        greedy(model, token_ids(1, 9))
        assert handle.report().total.kept == 4


def test_attention_changed_while_patched(model):
    """Another attention implementation is noticed at the next call, and unpatching still works."""
    ids = token_ids(1, 9)
    with torch.no_grad():
        dense = model(ids).logits
    handle = kvpress.patch(model, H2O(budget=4))
    model.set_attn_implementation("eager")
    words = ("attention implementation", "'eager'", "while the model is patched", "unpatch")
    with refused(*words, model=model):
        model(ids)
    with refused(*words, model=model):
        greedy(model, ids)
    handle.unpatch()
    assert "generate" not in vars(model) and not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert model.config._attn_implementation in ("sdpa", "eager")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense)


def test_our_attention_without_a_patch(model):
    """The registered name alone does nothing wrong silently."""
    kvpress.patch(model, "full").unpatch()  # the name is known now
    model.set_attn_implementation("kvpress")
    with refused("'kvpress'", "not patched", "kvpress.patch(model, policy)", "sdpa", model=model):
        model(token_ids(1, 9))


class Held(LogitsProcessor):
    """Holds generation at its second token until it is let go."""

    def __init__(self):
        self.calls, self.reached, self.go = 0, threading.Event(), threading.Event()

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 2:
            self.reached.set()
            assert self.go.wait(LONG)
        return scores


@every_policy
def test_unpatch_from_another_thread(model, policy):
    """While another thread generates, unpatching is refused, and generation completes as if not tried."""
    ids, held, results = token_ids(1, 9), Held(), []
    with patched(model, policy) as handle:
        expected = greedy(model, ids)
        thread = threading.Thread(target=lambda: results.append(greedy(model, ids, logits_processor=[held])))
        thread.start()
        try:
            assert held.reached.wait(LONG)
            for unpatch in (handle.unpatch, lambda: kvpress.unpatch(model)):
                with refused("generating right now", "unpatch it when", model=model):
                    unpatch()
        finally:
            held.go.set()
            thread.join(LONG)
        assert torch.equal(results[0], expected)


class Tries(StoppingCriteria):
    """Calls a function at every token and keeps what it raised."""

    def __init__(self, function):
        self.function, self.errors = function, []

    def __call__(self, input_ids, scores, **kwargs):
        try:
            self.function()
        except Exception as error:
            self.errors.append(error)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@every_policy
@pytest.mark.parametrize("way", ["handle", "function"])
def test_unpatch_from_a_callback(model, policy, way):
    """On the generating thread itself it is refused too, at every token."""
    ids = token_ids(1, 9)
    with patched(model, policy) as handle:
        expected = greedy(model, ids)
        tries = Tries(handle.unpatch if way == "handle" else lambda: kvpress.unpatch(model))
        assert torch.equal(greedy(model, ids, stopping_criteria=[tries]), expected)
        assert len(tries.errors) == NEW
        for error in tries.errors:
            assert isinstance(error, PolicyError) and re.search("generating right now.*unpatch it when", str(error))


def test_unpatch_from_a_hook_in_forward(model):
    """Also in the middle of a bare forward pass."""
    errors = []

    def hook(*args):
        try:
            kvpress.unpatch(model)
        except PolicyError as error:
            errors.append(str(error))

    with patched(model, H2O(budget=4)):
        registered = model.model.layers[0].register_forward_hook(hook)
        model(token_ids(1, 9))
        registered.remove()
    assert errors and all("generating right now" in error for error in errors)


def test_unpatch_after_generation_failed(model):
    """An exception in a callback ends generation, and unpatching works afterwards."""

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("from the callback")

    with patched(model, H2O(budget=4)), pytest.raises(RuntimeError, match="from the callback"):
        greedy(model, token_ids(1, 9), logits_processor=[Fails()])


# ------------------------------------------------------------------ caches that cannot be taken over


class FakeQuantizedCache(QuantizedCache):
    """A quantised cache that needs no quantisation library."""

    def __init__(self, config):
        Cache.__init__(self, layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])


CACHES = {
    "static": (lambda config: StaticCache(config=config, max_cache_len=64), "StaticCache"),
    "quantized": (FakeQuantizedCache, "FakeQuantizedCache"),
    "offloaded": (lambda config: DynamicCache(config=config, offloading=True), "offload"),
    "encoder-decoder": (
        lambda config: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
        "EncoderDecoderCache",
    ),
}


@pytest.mark.parametrize(("make", "word"), CACHES.values(), ids=CACHES.keys())
@every_policy
def test_caches(model, policy, make, word):
    """Caches with storage of their own, by forward and by generate; they are not touched."""
    with patched(model, policy):
        for run in (model, lambda ids, **kwargs: greedy(model, ids, **kwargs)):
            cache = make(model.config)
            with refused(word, "DynamicCache", model=model):
                run(token_ids(1, 9), **{CACHE: cache})
            assert not any(isinstance(layer, KVLayer) for layer in getattr(cache, "layers", []))


@pytest.mark.parametrize("cache", [(), [], {}, "cache"], ids=["tuple", "list", "dict", "str"])
def test_what_is_no_cache(model, cache):
    """Old-style tuples and other objects."""
    with patched(model, "h2o"), refused(type(cache).__name__, "DynamicCache", model=model):
        model(token_ids(1, 9), **{CACHE: cache})


def test_cache_of_another_depth(model):
    """A cache with fewer layers than the model."""
    cache = DynamicCache(config=tiny_llama(layers=1).config)
    with (
        patched(model, H2O(budget=4)),
        refused("layer", "1", "DynamicCache(config=model.config)", model=model),
    ):
        model(token_ids(1, 9), **{CACHE: cache})
    assert len(cache.layers) == 1 and not isinstance(cache.layers[0], KVLayer)


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized"])
@pytest.mark.parametrize("way", ["argument", "config"])
@every_policy
def test_cache_implementation(model, policy, way, name):
    """generate(cache_implementation=...) is refused before it starts."""
    config = GenerationConfig(cache_implementation=name, max_new_tokens=NEW)
    options = {"cache_implementation": name} if way == "argument" else {"generation_config": config}
    with patched(model, policy), refused(f"cache_implementation='{name}'", "leave it out", model=model):
        model.generate(token_ids(1, 9), **options)


def test_cache_implementation_by_position(model):
    """The generation config as the second positional argument."""
    config = GenerationConfig(cache_implementation="static", max_new_tokens=NEW)
    with patched(model, H2O(budget=4)), refused("tatic", model=model):
        model.generate(token_ids(1, 9), config)


# ------------------------------------------------------------------ assisted decoding


ASSISTED = {
    "assistant": lambda: {"assistant_model": tiny_llama(layers=1, seed=1)},
    "prompt-lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "early-exit": lambda: {"assistant_early_exit": 1},
}
assisted = pytest.mark.parametrize("options", ASSISTED.values(), ids=ASSISTED.keys())


@assisted
@every_eviction
def test_assisted_decoding_refused(model, policy, options):
    """What takes tokens back cannot work on a cache that evicts: refused before it starts."""
    ids = token_ids(1, 4).repeat(1, 4)
    [name] = options()
    with patched(model, policy), refused("ssisted", name, f"leave {name} out", policy.describe(), "Full", model=model):
        greedy(model, ids, **options())


@assisted
def test_assisted_decoding_with_full(model, options):
    """Under Full it works and gives what greedy decoding gives; early exit may be refused, but cleanly."""
    ids = token_ids(1, 4).repeat(1, 4)
    expected = greedy(model, ids)
    with patched(model, "full"):
        before = state(model)
        try:
            assert torch.equal(greedy(model, ids, **options()), expected)
        except PolicyError as error:
            assert "assistant_early_exit" in options() and "assist" in str(error)
        assert state(model) == before


SELECTING = {
    "quest": (Quest(budget=500, page_size=4, dense_layers=0), Quest(budget=8, page_size=4, dense_layers=0)),
    "tidal": (TidalDecode(k=500, sparse_layer_start=0), TidalDecode(k=5, sparse_layer_start=0)),
    "tidal-corrected": (TidalDecode(k=500, sparse_layer_start=0, correct_every=2), None),
    "recycled": (RecycledAttention(budget=500, stride=3), None),
    "token-select": (TokenSelect(k=500), None),
    "hip": (HiP(k=500, dense_layers=0), None),
    "infinite-hip": (InfiniteHiP(n_stream=500), None),
}
HELPERS = {name: options for name, options in ASSISTED.items() if name != "early-exit"}


@pytest.mark.parametrize("options", HELPERS.values(), ids=HELPERS.keys())
@pytest.mark.parametrize("roomy", [pair[0] for pair in SELECTING.values()], ids=SELECTING.keys())
def test_assisted_decoding_under_policies_that_select(model, roomy, options):
    """They keep everything, so that tokens can be taken back; with room for all the text is that of greedy decoding."""
    ids = token_ids(1, 4).repeat(1, 6)
    expected = model.generate(ids, do_sample=False, max_new_tokens=24)
    with kvpress.patch(model, roomy):
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=24, **options()), expected)


@pytest.mark.parametrize("policy", [SELECTING["quest"][1], SELECTING["tidal"][1]], ids=["quest", "tidal"])
def test_tokens_that_are_taken_back_leave_nothing_in_a_selection(model, policy):
    """Passes of which some tokens are taken back, as assisted decoding does, and the same passes without those tokens."""
    passes = [(token_ids(1, 20), 0), (token_ids(1, 5, 1), 2), (token_ids(1, 1, 2), 0), (token_ids(1, 1, 3), 0)]
    passes += [(token_ids(1, 4, 4), 1), (token_ids(1, 1, 5), 0), (token_ids(1, 1, 6), 0)]
    cropped, alone = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with kvpress.patch(model, policy), torch.no_grad():
        for ids, back in passes:
            kept = ids.shape[1] - back
            found = model(ids, **{CACHE: cropped}).logits[:, :kept]
            cropped.crop(-back)
            torch.testing.assert_close(found, model(ids[:, :kept], **{CACHE: alone}).logits, atol=1e-4, rtol=1e-4)


def test_crop_of_an_evicted_cache(model):
    """By hand, too, a cache that evicts gives nothing back."""
    with patched(model, H2O(budget=4)):
        cache = model(token_ids(1, 9))[CACHE]
        with refused("take back 2 tokens", "h2o(budget=4)", "Full", model=model):
            cache.crop(-2)


# ------------------------------------------------------------------ calls that cannot work


@every_policy
def test_empty_prompt(model, policy):
    """No tokens, by forward and by generate."""
    empty = torch.zeros(1, 0, dtype=torch.long)
    with patched(model, policy):
        for run in (model, lambda ids: greedy(model, ids), lambda ids: model(ids, use_cache=False)):
            with refused("prompt is empty", "at least one token", model=model):
                run(empty)
        with refused("prompt is empty", "at least one token", model=model):
            model(inputs_embeds=torch.zeros(1, 0, 32))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        pytest.param(torch.zeros(1, 1, 9, 9), ("4-D", "2-D padding mask"), id="4-D"),
        pytest.param(torch.ones(1, 9, 9), ("3-D", "2-D padding mask"), id="3-D"),
        pytest.param(torch.ones(9), ("1-D", "2-D padding mask"), id="1-D"),
        pytest.param({"full_attention": None}, ("mapping", "2-D padding mask"), id="mapping"),
        pytest.param(torch.ones(1, 8), ("8 columns", "must have 9"), id="short"),
        pytest.param(torch.ones(1, 12), ("12 columns", "must have 9"), id="long"),
        pytest.param(torch.ones(2, 9), ("2", "1"), id="more-rows"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@every_policy
def test_mask(model, policy, use_cache, mask, words):
    """Masks of another kind, length or batch; nothing is left in progress."""
    with patched(model, policy), refused("mask", *words, model=model):
        model(token_ids(1, 9), attention_mask=mask, use_cache=use_cache)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "ones"])
@every_policy
def test_mask_with_fewer_rows_than_the_batch(model, policy, padded):
    """A row without a mask must not be guessed."""
    mask = torch.ones(2, 9)
    mask[0, :3] = 0 if padded else 1
    with patched(model, policy), refused("mask", "2", "3", model=model):
        model(token_ids(3, 9), attention_mask=mask)


@every_policy
def test_mask_of_a_later_pass(model, policy):
    """A mask for the new tokens alone, or one that changes its mind about earlier padding."""
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with patched(model, policy):
        cache = model(ids, attention_mask=mask)[CACHE]
        seen = cache.get_seq_length()
        with refused("4 columns", "seen 9", "must have 13", model=model):
            model(ids[:, :4], attention_mask=torch.ones(2, 4), **{CACHE: cache})
        with refused("[9, 9]", "[6, 9]", "extended", model=model):
            model(ids[:, :4], attention_mask=torch.ones(2, 13), **{CACHE: cache})
        assert cache.get_seq_length() == seen
        with torch.no_grad():
            model(ids[:, :4], attention_mask=torch.cat((mask, torch.ones(2, 4)), dim=1), **{CACHE: cache})
        assert cache.get_seq_length() == 13


@every_policy
def test_another_batch_than_the_cache(model, policy):
    """Two sequences on the cache of one."""
    with patched(model, policy):
        cache = model(token_ids(1, 9))[CACHE]
        with refused("holds 1 sequences", "has 2", "give as many", model=model):
            model(token_ids(2, 1), **{CACHE: cache})


@every_policy
def test_output_attentions(model, policy):
    """There are no attention weights to give out."""
    ids = token_ids(1, 9)
    with patched(model, policy):
        with refused("output_attentions=True", "unpatch", model=model):
            model(ids, output_attentions=True)
        with refused("output_attentions=True", "unpatch", model=model):
            greedy(model, ids, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("run", ["forward", "generate"])
@every_policy
def test_output_attentions_in_the_config(model, policy, run):
    """Nor when the model's config asks for them: refused or without, never weights of something else."""
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    handle = kvpress.patch(model, policy)
    try:
        if run == "forward":
            output = model(token_ids(1, 9))
        else:
            output = greedy(model, token_ids(1, 9), return_dict_in_generate=True)
        given = getattr(output, "attentions", None) or ()
        assert all(weights is None for weights in given)
    except PolicyError as error:
        assert "output_attentions" in str(error)
    handle.unpatch()


# ------------------------------------------------------------------ gradients


MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


def gradients(model, mask=None, **options):
    """Gradients of every parameter for a loss over the real tokens of two sequences."""
    model.zero_grad()
    logits = model(token_ids(2, 9), attention_mask=mask, **options).logits
    weight = torch.ones(2, 9) if mask is None else mask
    (logits * weight[..., None]).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@every_policy
@pytest.mark.parametrize("use_cache", [True, None], ids=["use-cache", "default"])
def test_training_with_a_cache(model, policy, use_cache):
    """Refused in training mode while gradients are on; fine without gradients."""
    model.train()
    ids = token_ids(1, 9)
    with patched(model, policy):
        words = ("training mode", "gradients", "model.eval()", "torch.no_grad()", "use_cache=False")
        with refused(*words, model=model):
            model(ids, use_cache=use_cache)
        with torch.no_grad():
            model(ids, use_cache=use_cache)
        greedy(model, ids)


@every_policy
@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
def test_training_without_a_cache(model, policy, mask):
    """With use_cache=False a pass is exact, and so are its gradients."""
    model.train()
    expected = gradients(model, mask, use_cache=False)
    with patched(model, policy):
        for name, gradient in gradients(model, mask, use_cache=False).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "padded"])
def test_training_with_gradient_checkpointing(model, mask, reentrant):
    """Checkpointing recomputes the layers in backward: the gradients are right, or it is refused."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = gradients(model, mask, use_cache=False)
    handle = kvpress.patch(model, H2O(budget=4))
    try:
        found = gradients(model, mask, use_cache=False)
    except PolicyError as error:
        assert "checkpointing" in str(error)
    else:
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    finally:
        handle.unpatch()


@every_policy
def test_eval_without_no_grad(model, policy):
    """A forward that nobody differentiates works without torch.no_grad(); its backward is refused."""
    ids = token_ids(1, 9)
    with patched(model, policy):
        output = model(ids)
        with torch.no_grad():
            torch.testing.assert_close(output.logits, model(ids).logits)
        with refused("no gradients", "use_cache=False", "unpatch", model=model):
            output.logits.sum().backward()
        step = model(ids[:, :1], **{CACHE: output[CACHE]})
        with refused("no gradients", "use_cache=False", "unpatch", model=model):
            step.logits.sum().backward()


# ------------------------------------------------------------------ caches that change hands


@every_policy
def test_our_cache_without_a_patch(model, policy):
    """A cache that a policy filled is refused by the unpatched model, by forward and by generate."""
    ids = token_ids(1, 9)
    with patched(model, policy):
        cache = model(ids)[CACHE]
    words = ("filled by a model patched with kvpress", "same policy", "new")
    with refused(*words, model=model):
        model(ids[:, :1], **{CACHE: cache})
    with refused(*words, model=model):
        greedy(model, ids.repeat(1, 2), **{CACHE: cache})
    with patched(model, policy), torch.no_grad():
        model(ids[:, :1], **{CACHE: cache})  # the same policy may go on


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(H2O(budget=4), Full(), id="h2o-to-full"),
        pytest.param(H2O(budget=4), H2O(budget=5), id="h2o-to-another-budget"),
        pytest.param(H2O(budget=4), SnapKV(budget=4, window=2), id="h2o-to-snapkv"),
        pytest.param(Full(), H2O(budget=4), id="full-to-h2o"),
        pytest.param(StreamingLLM(recent=3), StreamingLLM(recent=3, rope="original"), id="another-rope"),
    ],
)
@pytest.mark.parametrize("run", ["forward", "generate"])
def test_cache_of_another_policy(model, first, second, run):
    """A cache belongs to its policy, down to the fields."""
    ids = token_ids(1, 9)
    with patched(model, first):
        cache = model(ids)[CACHE]
    words = ("belongs to the policy", first.describe(), "start a new", second.describe())
    with patched(model, second), refused(*words, model=model):
        if run == "forward":
            model(ids[:, :1], **{CACHE: cache})
        else:
            greedy(model, ids.repeat(1, 2), **{CACHE: cache})


ADOPTING = {name: policy for name, policy in POLICIES.items() if name != "h2o"}


def plain_cache(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **{CACHE: DynamicCache()}, use_cache=True)[CACHE]


@pytest.mark.parametrize("policy", ADOPTING.values(), ids=ADOPTING.keys())
@pytest.mark.parametrize("count", [1, 4], ids=["step", "prompt"])
@pytest.mark.parametrize("rows", [1, 2], ids=["one", "padded-batch"])
@torch.no_grad()
def test_cache_of_an_unpatched_run(model, policy, count, rows):
    """What an unpatched run left is taken over; the next pass still sees all of it, then the policy acts."""
    ids, new = token_ids(rows, 9), token_ids(rows, count, seed=1)
    mask = torch.ones(rows, 9 + count, dtype=torch.long)
    mask[1:, :3] = 0
    dense = model(torch.cat((ids, new), dim=1), attention_mask=mask).logits[:, 9:]
    cache = plain_cache(model, ids, mask[:, :9])
    with patched(model, policy):
        if isinstance(policy, SnapKV) and count == 1:  # no row of the prompt is there to score with
            with refused("snapkv", "unpatched run", "several tokens", "whole prompt", model=model):
                model(new, attention_mask=mask, **{CACHE: cache})
            assert cache.get_seq_length() == 9
            return
        logits = model(new, attention_mask=mask, **{CACHE: cache}).logits
        if not isinstance(policy.places, Sinks) and (policy == Full() or count > 1):
            torch.testing.assert_close(logits, dense)
        assert logits.isfinite().all()
        assert all(isinstance(layer, KVLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 9 + count
        held = [(layer.positions[0, 0] >= 0).sum().item() for layer in cache.layers]
        if policy == Full():
            assert held == [9 + count] * 2
        else:
            assert held == [4, 4]


@torch.no_grad()
def test_second_turn_on_the_cache_of_an_unpatched_run(model):
    """generate goes on where an unpatched generate ended; under Full with the same tokens."""
    options = {CACHE: DynamicCache(), "return_dict_in_generate": True}
    first = greedy(model, token_ids(1, 9), **options)
    text = torch.cat((first.sequences, token_ids(1, 5, seed=2)), dim=1)
    expected = greedy(model, text)
    with patched(model, "full"):
        assert torch.equal(greedy(model, text, **{CACHE: first[CACHE]}), expected)


@pytest.mark.parametrize("count", [1, 4], ids=["step", "prompt"])
def test_h2o_needs_every_token(model, count):
    """H2O cannot score what it did not see; the cache stays usable without the patch."""
    ids = token_ids(1, 9)
    cache = plain_cache(model, ids)
    with (
        patched(model, H2O(budget=4)),
        refused("h2o(budget=4)", "every token", "unpatched run", "whole prompt", model=model),
    ):
        model(ids[:, :count], **{CACHE: cache})
    with torch.no_grad():
        model(ids[:, :count], **{CACHE: cache})


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("policy", ADOPTING.values(), ids=ADOPTING.keys())
@torch.no_grad()
def test_refused_call_leaves_the_cache(model, policy, filled):
    """A call that is refused for another reason has not taken the cache over."""
    ids = token_ids(1, 9)
    cache = plain_cache(model, ids) if filled else DynamicCache(config=model.config)
    seen = cache.get_seq_length()
    with patched(model, policy), refused("must have", model=model):
        model(ids[:, :4], attention_mask=torch.ones(1, 2), **{CACHE: cache})
    assert cache.get_seq_length() == seen
    assert not any(isinstance(layer, KVLayer) for layer in cache.layers)
    model(ids[:, :4], **{CACHE: cache})


@torch.no_grad()
def test_cache_of_a_smaller_model(model):
    """A cache with fewer layers than the model has."""
    small = tiny_llama(layers=1)
    cache = plain_cache(small, token_ids(1, 9))
    with patched(model, "full"), refused("cache has 1 layers", "model needs 2", "DynamicCache(config", model=model):
        model(token_ids(1, 4), **{CACHE: cache})


@pytest.mark.parametrize("policy", [TOVA(budget=8), TokenSelect(), RecycledAttention(query_stride=5, similarity=0.8)])
def test_heads_that_decide_together_on_a_split_model(model, policy):
    """No process of a tensor-parallel model holds all heads; what decides head by head works."""
    model._tp_size = 2
    with refused("over all heads of a layer together", "2 processes", error=UnsupportedModelError, model=model):
        kvpress.patch(model, policy)
    with kvpress.patch(model, RecycledAttention()):
        pass
