"""`report()` says the bytes that a cache really holds, and nothing grows that should not.

What a cache holds is counted without its help: every tensor that Python's garbage collector reaches from it, by storage, so
that a small view that keeps a big buffer alive counts with the whole buffer.
"""

import gc
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvpress
from kvpress.compat import CACHE
from kvpress.policies import EMS, H2O, Full, Quest, RecycledAttention, SnapKV, TidalDecode
from support.matrix import BACK, CASES, prompt, rows_to_ask
from support.models import tiny_llama

PROMPT = 300
TOGETHER = [
    [SnapKV(budget=0.5), Quest(budget=32, page_size=8, dense_layers=0)],
    [SnapKV(budget=100, evict="after_prompt"), RecycledAttention(budget=20, stride=7)],
    [H2O(budget=0.4), TidalDecode(k=16, sparse_layer_start=0)],
]
POLICIES = [[case.policy] for case in CASES] + TOGETHER
POLICIES += [[kvpress.available()[name].at_budget(64)] for name in ("ems", "h2o", "quest", "tidal_decode", "recycled")]
every_policy = pytest.mark.parametrize(
    "policies", POLICIES, ids=["+".join(one.describe().replace(" ", "") for one in several) for several in POLICIES]
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=3, kv_heads=2, head_dim=16)


def reachable(root: Any, beside: tuple[Any, ...] = ()) -> dict[int, int]:
    """Storages that a garbage collector reaches from an object, address -> bytes; what is in `beside` is not followed.

    Code and classes are shared by everything, and so are modules: the model's weights are not the cache's.
    """
    shared = (type, types.ModuleType, types.CodeType, torch.nn.Module)
    pending, seen, found = [root], {id(thing) for thing in beside}, {}
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, shared):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        if isinstance(thing, types.FunctionType):  # its globals are its module's
            pending += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        else:
            pending += gc.get_referents(thing)
    return found


def held_bytes(cache: DynamicCache, handle: kvpress.Handle) -> int:
    """Bytes of the distinct storages behind a cache."""
    # How the model rotates is the model's, one small tensor for all caches.
    return sum(reachable(cache, beside=tuple(handle._patched_forward()._rotary)).values())


def check_truth(handle: kvpress.Handle, cache: DynamicCache, when: str) -> None:
    held = held_bytes(cache, handle)
    assert held > 0
    assert handle.report().total.bytes == pytest.approx(held, rel=0.05), when


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, cache: DynamicCache, mask: torch.Tensor | None = None) -> None:
    model(ids, **{CACHE: cache}, attention_mask=mask, use_cache=True, **rows_to_ask(model, ids.shape[1]))


def texts(*lengths: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([prompt(length, seed + row) for row, length in enumerate(lengths)])


def stages(model: Any, cache: DynamicCache, batch: int = 1) -> Iterator[str]:
    """A prompt, steps past what was spared for them, a second turn, and steps again; named after each."""
    feed(model, texts(*[PROMPT] * batch), cache)
    yield "prompt"
    for step in range(1, 26):
        feed(model, texts(*[1] * batch, seed=step), cache)
        if step in (1, 2, 25):
            yield f"step {step}"
    feed(model, texts(*[3] * batch, seed=50), cache)
    yield "second turn"
    for step in range(3):
        feed(model, texts(*[1] * batch, seed=60 + step), cache)
    yield "step of the second turn"


@every_policy
def test_report_is_what_the_cache_holds(model: Any, policies: list[Any]) -> None:
    with kvpress.patch(model, policies) as handle:
        cache = DynamicCache(config=model.config)
        for when in stages(model, cache):
            check_truth(handle, cache, when)


@every_policy
def test_report_is_what_a_padded_batch_holds(model: Any, policies: list[Any]) -> None:
    """Also when sequences are repeated, reordered and dropped, as beams are."""
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :80] = 0
    ids = texts(PROMPT, PROMPT).masked_fill(mask == 0, 0)
    with kvpress.patch(model, policies) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, ids, cache, mask)
        check_truth(handle, cache, "prompt")
        for step in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            feed(model, texts(1, 1, seed=step), cache, mask)
        check_truth(handle, cache, "steps")
        cache.batch_repeat_interleave(2)
        check_truth(handle, cache, "repeated")
        cache.reorder_cache(torch.tensor([2, 0, 1, 2]))
        check_truth(handle, cache, "reordered")
        cache.batch_select_indices(torch.tensor([1]))
        check_truth(handle, cache, "one left")


@pytest.mark.parametrize("policy", [case.policy for case in BACK], ids=str)
def test_report_is_what_is_left_after_a_crop(model: Any, policy: Any) -> None:
    with kvpress.patch(model, policy) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, texts(PROMPT), cache)
        for step in range(3):
            feed(model, texts(1, seed=step), cache)
        cache.crop(-2)
        check_truth(handle, cache, "cropped")


@pytest.mark.parametrize(
    "policy",
    [
        case.policy
        for case in CASES
        if "eviction" in case.policy.roles
        and case.policy.evict == "each_pass"
        and case.policy.heads != "shared"
        # EMS also keeps the positions of the last rows, a few numbers a layer, made where they are known.
        and not getattr(case.policy.observes, "last_rows", 0)
    ],
    ids=str,
)
def test_what_a_prompt_leaves_is_made_before_its_second_layer(model: Any, policy: Any) -> None:
    """Lasting tensors in between hidden states are what keeps malloc from using their memory again, layer after layer."""
    made: set[int] = set()

    def note(*_: Any) -> None:
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        made.update(tensor.untyped_storage()._cdata for tensor in tensors)

    with kvpress.patch(model, policy) as handle:
        cache = DynamicCache(config=model.config)
        for turn in range(2):
            made.clear()
            hook = model.model.layers[1].register_forward_pre_hook(note)
            feed(model, texts(PROMPT, seed=turn), cache)
            hook.remove()
            left = {
                key
                for layer in cache.layers
                for key in reachable(layer, beside=tuple(handle._patched_forward()._rotary))
            }
            assert left and left <= made, f"turn {turn}"


def test_a_view_that_keeps_a_buffer_alive_is_seen(model: Any) -> None:
    """The count itself: a small view in a layer's closure or list counts with all that it holds."""
    with kvpress.patch(model, Full()) as handle:
        cache = DynamicCache(config=model.config)
        feed(model, texts(PROMPT), cache)
        before = held_bytes(cache, handle)
        big = torch.zeros(1000)
        cache.layers[0].extra = [lambda view=big[:2]: view, {"again": big}]
        assert held_bytes(cache, handle) == before + 4000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, whose allocator is asked")
@every_policy
def test_report_is_what_cuda_allocated(policies: list[Any]) -> None:
    """The same by the allocator's own books: the bytes asked of it that live as long as the cache."""
    model = tiny_llama(layers=3, kv_heads=2, head_dim=16).to("cuda")

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    def run(cache: DynamicCache) -> None:
        feed(model, texts(PROMPT).cuda(), cache)
        for step in range(25):
            feed(model, texts(1, seed=step).cuda(), cache)

    with kvpress.patch(model, policies) as handle:
        run(DynamicCache(config=model.config))  # libraries take their workspaces, tables are made
        handle._facts.clear()  # the report's own tensors are those of the run that is measured
        before = allocated()
        cache = DynamicCache(config=model.config)
        run(cache)
        assert handle.report().total.bytes == pytest.approx(allocated() - before, rel=0.05)


# ---------------------------------------------------------------------------------------------------- growth


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


class Watch(BaseStreamer):
    """Looks at a cache while `generate` runs: after so many tokens, the bytes it holds and the tensors made since."""

    def __init__(self, handle: kvpress.Handle, cache: DynamicCache, at: tuple[int, ...]) -> None:
        self.handle, self.cache, self.at = handle, cache, at
        self.tokens = -1  # the prompt comes first
        self.held: list[int] = []
        self.older = {id(tensor): weakref.ref(tensor) for tensor in live_tensors()}  # others may free theirs meanwhile
        self.tensors: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens in self.at:
            self.held.append(held_bytes(self.cache, self.handle))
            self.tensors.append(sum(not self.is_older(tensor) for tensor in live_tensors()))
            check_truth(self.handle, self.cache, f"token {self.tokens}")

    def is_older(self, tensor: torch.Tensor) -> bool:
        known = self.older.get(id(tensor))
        return known is not None and known() is tensor

    def end(self) -> None:
        pass


def soak(policy: Any) -> Watch:
    """Generate 2000 tokens after a short prompt, with one layer, so that it does not take long."""
    model = tiny_llama(layers=1, kv_heads=2, head_dim=16)
    with kvpress.patch(model, policy) as handle:
        cache = DynamicCache(config=model.config)
        watch = Watch(handle, cache, at=(200, 800, 1400, 2000))
        ids = texts(100)
        output = model.generate(
            ids, **{CACHE: cache}, max_new_tokens=2000, do_sample=False, streamer=watch, use_cache=True
        )
    assert output.shape == (1, 2100) and len(watch.held) == 4
    return watch


@pytest.mark.parametrize("policy", [H2O(budget=40), EMS(budget=40, recent=8)], ids=str)
def test_an_evicting_policy_stays_flat(policy: Any) -> None:
    """2000 tokens later, not a byte and not a tensor more."""
    watch = soak(policy)
    assert len(set(watch.held)) == 1
    assert len(set(watch.tensors)) == 1
    slots = 40 + policy.evict_every
    # K, V, the position, and for H2O and EMS statistics: what 2000 tokens would hold is 30 times as much.
    assert watch.held[0] < 2 * slots * (2 * 16 * 4 + 4 + 4 * (1 + policy.observes.last_rows)) * 1.1


@pytest.mark.parametrize(
    "policy", [Quest(budget=64, page_size=16, dense_layers=0), RecycledAttention(budget=64)], ids=str
)
def test_a_selecting_policy_grows_by_its_entries(policy: Any) -> None:
    """Bytes follow the tokens, with a 32nd to spare; the number of tensors does not."""
    watch = soak(policy)
    assert len(set(watch.tensors)) == 1
    for tokens, held in zip((200, 800, 1400, 2000), watch.held, strict=True):
        entries = 100 + tokens
        needed = 2 * entries * (2 * 16 * 4 + 4)  # kv heads, K and V in float32 with a position
        bounds = 2 * -(-entries // 16) * 2 * 16 * 4 if isinstance(policy, Quest) else 0
        # at least without the token that was generated last, which has not been fed yet
        assert (needed + bounds) * 0.99 < held < (needed + bounds) * 1.05 + 5000


def test_fifty_rounds_leave_nothing() -> None:
    """Patch, generate, unpatch, with every policy in turn: no tensor, object, hook or name more than before."""
    from kvpress.attention import originals
    from kvpress.patching import _handles

    model, ids = tiny_llama(layers=4), texts(60)
    names = list(kvpress.available())
    kept: list[weakref.ref[Any]] = []

    def round_(number: int) -> None:
        with kvpress.patch(model, names[number % len(names)]) as handle:
            cache = DynamicCache(config=model.config)
            model.generate(ids, **{CACHE: cache}, max_new_tokens=4, do_sample=False)
            handle.report()
            kept.extend((weakref.ref(handle), weakref.ref(cache.layers[0])))

    def state() -> dict[str, Any]:
        decoder = model.get_decoder()
        return {
            "tensors": len(live_tensors()),
            "hooks": [len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)],
            "hook tables": [
                len(table) for table in (decoder._forward_hooks_with_kwargs, decoder._forward_hooks_always_called)
            ],
            "attributes": sorted(model.__dict__),
            "attention": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
            "masks": sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys()),
            "policies": sorted(kvpress.available()),
            "patched": (len(_handles), len(originals._by_config)),
            "in use": model.config._attn_implementation,
        }

    for number in range(len(names)):  # tables that are made once, and names that stay registered
        round_(number)
    before = state()
    objects = len(gc.get_objects())
    for number in range(50):
        round_(number)
    assert state() == before
    assert not any(there() is not None for there in kept)
    # Objects come and go with the interpreter's own caches; a leak would be at least one in each of 50 rounds.
    assert len(gc.get_objects()) - objects - len(kept) < 50
