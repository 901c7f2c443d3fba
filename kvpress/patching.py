"""Put policies on a loaded model with one call, and take them off without a trace."""

import copy
import functools
import inspect
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.attention import originals, register
from kvpress.compat import DynamicCache, check_decoder, check_transformers
from kvpress.compiled import CompiledSteps, check_compiles
from kvpress.contexts import lasting_tensors, no_autocast
from kvpress.decoder import PatchedForward
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.forwards import replace_forwards, restore_forwards
from kvpress.layer import Facts, KVLayer
from kvpress.linear import check_variable
from kvpress.passes import expecting, wanting
from kvpress.places import INSTEAD
from kvpress.policy import EvictionPolicy, Policy, Roles, RoutePolicy
from kvpress.probe import find_rotary
from kvpress.registry import PolicySpec, make_policies, make_policy
from kvpress.replay import ReplayedSteps
from kvpress.report import LayerReport, Report
from kvpress.rotary import Rotary
from kvpress.support import find_attention, find_blocks, find_decoder, unwrapped
from kvpress.texts import Texts
from kvpress.wrapper import Wrapper

if TYPE_CHECKING:
    from kvpress.sharing import SharedPrompt

_handles: "weakref.WeakKeyDictionary[Any, Handle]" = weakref.WeakKeyDictionary()
_handles_lock = threading.Lock()


def patch(model: Any, policy: PolicySpec, *, compile: bool = False, **fields: Any) -> "Handle":
    """Put a policy on a loaded transformers causal LM.

    From then on `model.generate`, `model(...)` and pipelines over the model use caches that follow the policy, until
    `handle.unpatch()`. The weights are not touched, and nothing is set globally but one attention and one mask name that
    transformers needs to know.

    Args:
        model: a decoder-only `PreTrainedModel`, on its device, with weights; or a PEFT model of one.
        policy: a policy, a name ("h2o"), a mapping ({"name": "h2o", "budget": 0.2}), the path of a YAML file that holds
            one, or a list of policies that play different roles.
        compile: run decode steps as a graph compiled by `torch.compile`, see `Handle.compile`.
        fields: of the policy that a name, mapping or path means: `patch(model, "h2o", budget=0.2)`.

    Returns:
        A handle: `report()`, `unpatch()`, and a context manager that unpatches at its end.

    Raises:
        PolicyError: the policy does not exist or its values do not work, or the model is patched already.
        UnsupportedModelError: the model cannot be patched. In both cases the model is as it was.

    Example:
        >>> with kvpress.patch(model, H2O(budget=0.2)) as handle:
        ...     model.generate(**inputs, max_new_tokens=50)
        ...     print(handle.report())
    """
    policies = make_policies(make_policy(policy, **fields) if fields else policy)
    check_transformers(KVLayer)
    check_variable()
    model = unwrapped(model)
    decoder = find_decoder(model)
    attention = find_attention(decoder)
    check_decoder(decoder)
    split = getattr(model, "tp_size", None) or 1
    for one in policies:
        if one.heads != "alone" and split > 1:
            raise UnsupportedModelError(
                f"{one.describe()} decides over all heads of a layer together, and this model's are split over {split} processes "
                "(tp_plan); load it with device_map, or use a policy that decides head by head"
            )
        one.check_layers(len(attention))
        hybrid = len(DynamicCache(config=decoder.config).layers) > len(attention)
        if hybrid and isinstance(one, RoutePolicy) and one.no_hybrids is not None:
            raise PolicyError(
                f"{one.describe()} cannot act on {type(model).__name__}, which has layers without full attention: {one.no_hybrids}"
            )
    with _handles_lock:
        if decoder in _handles:
            raise PolicyError(
                f"{type(model).__name__} is already patched with {_handles[decoder].describe()}; call kvpress.unpatch(model) first"
            )
        if Roles.of(policies).stops:
            find_blocks(decoder, attention)  # which refuses a model that has none
        if compile:
            check_compiles(model, decoder)
            _check_steps_compile(policies)
        rotary = _rotary(decoder, attention, policies)
        handle = Handle(model, decoder, policies, attention, rotary)
        _handles[decoder] = handle
    if compile:
        handle.compile()
    return handle


def unpatch(model: Any) -> None:
    """Take the policy off a patched model.

    Raises:
        PolicyError: the model is not patched, or it is generating right now.
    """
    handle = handle_of(model)
    if handle is None:
        raise PolicyError(f"{type(model).__name__} is not patched; nothing to take off")
    handle.unpatch()


def handle_of(model: Any) -> "Handle | None":
    """The handle of a patched model; None if it is not patched."""
    model = unwrapped(model)
    return _handles.get(model.get_decoder()) if hasattr(model, "get_decoder") else None


def _rotary(decoder: Any, attention: dict[int, Any], policies: list[Policy]) -> list[Rotary]:
    moving = next((policy for policy in policies if policy.places.moved), None)
    if moving is None:
        return []
    try:
        found = find_rotary(decoder, attention, _configs(decoder))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{moving.describe()} re-indexes rotary positions, and that cannot be done: {error}; {INSTEAD}"
        ) from None
    for rotary in found:
        moving.places.fitted(rotary)  # which refuses a model that they do not fit
    return found


class Handle:
    """A patched model's policy: report on it, take it off. Made by `patch`."""

    def __init__(
        self,
        model: Any,
        decoder: Any,
        policies: list[Policy],
        attention: dict[int, Any],
        rotary: list[Rotary],
    ) -> None:
        self.policies = policies
        self._model, self._decoder = weakref.ref(model), weakref.ref(decoder)
        self._lock = threading.Lock()
        self._running: set[object] = set()
        self._patched = True
        self._facts: dict[int, Facts] = {}
        self._texts = Texts()
        self._others: dict[int, tuple[int, int]] = {}
        self._cache: weakref.ref[Any] | None = None

        register()
        self._configs = _configs(decoder)
        for config in self._configs:
            originals.switch(config)
        self._forward = weakref.ref(PatchedForward(decoder, self, policies, attention, rotary))
        replace_forwards(model, decoder)
        routes = Roles.of(policies).routes and model is not decoder
        self._whole = weakref.ref(PatchedModel(model)) if routes else None
        self._generate = weakref.ref(PatchedGenerate(model, self)) if hasattr(model, "generate") else None

    def describe(self) -> str:
        """The policies with the fields that differ from their defaults."""
        return " + ".join(policy.describe() for policy in self.policies)

    def __repr__(self) -> str:
        return f"<kvpress handle: {self.describe()}{'' if self._patched else ', unpatched'}>"

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._patched:
            self.unpatch()

    def unpatch(self) -> None:
        """Put the model back as it was: the same attributes, hooks, attention implementation and results.

        Raises:
            PolicyError: it is unpatched already, or generating right now (in another thread, or in a callback).
        """
        with self._lock:
            if not self._patched:
                raise PolicyError(f"this handle ({self.describe()}) is unpatched already")
            if self._running:
                raise PolicyError(
                    "the model is generating right now; unpatch it when generate() or forward() has returned"
                )
            self._patched = False
        for config in self._configs:
            originals.restore(config)
        model, decoder = self._model(), self._decoder()
        if model is not None:
            restore_forwards(model)
        forward = self._forward()
        if decoder is not None and forward is not None and isinstance(forward.run, CompiledSteps):
            forward.run.remove(decoder)
        for wrapper, owner in ((self._generate, model), (self._whole, model), (self._forward, decoder)):
            held = None if wrapper is None else wrapper()
            if held is not None and owner is not None:
                held.remove(owner)
        with _handles_lock:
            if decoder is not None:
                _handles.pop(decoder, None)

    def compile(self, backend: Any = "inductor", mode: str | None = None) -> "Handle":
        """Run decode steps as one graph, attention, selection and eviction in it, made at the first of them.

        Compiling takes a minute or so. There is one graph for each batch size and kind of step: a cache that grows, one that
        is full, a step in which entries go. How much the cache holds makes no difference. The first step of a kind after a
        prompt is not compiled, nor are prompts, steps with gradients on, or with a padding mask and no `position_ids`
        (`generate` gives them).

        Args:
            backend: as in `torch.compile`; or "replay" for no compiler: on a CUDA device a step is recorded as a CUDA graph
                and replayed, with the package's own kernels.
            mode: as in `torch.compile`, for the backend "inductor".

        Returns:
            This handle.

        Raises:
            PolicyError: there is no such mode, or it is for another backend, or the handle is unpatched or compiled
                already, or the model is generating right now, or there is no C++ compiler, or no CUDA device.
            UnsupportedModelError: some of the model's layers are not the policies', or it is spread over devices. In a
                first step: torch cannot make one graph of it.
        """
        decoder, forward = self._decoder(), self._forward()
        with self._lock:
            if not self._patched or forward is None:
                raise PolicyError(f"this handle ({self.describe()}) is unpatched; patch the model first")
            if self._running:
                raise PolicyError(
                    "the model is generating right now; compile it when generate() or forward() has returned"
                )
            if forward.run is not forward.inner:
                raise PolicyError(f"this handle ({self.describe()}) is compiled already")
            check_compiles(self._model(), decoder, backend, mode)
            _check_steps_compile(self.policies)
            if backend == "replay":
                forward.run = ReplayedSteps(forward.inner, forward.cache_argument)
            else:
                forward.run = CompiledSteps(decoder, forward.inner, backend, mode)
        return self

    def report(self, cache: Any = None) -> Report:
        """What the policy did in a cache.

        Args:
            cache: a cache of this handle's policies; None for the one that the model used last. `generate` may use several:
                with `guidance_scale` the last one is that of the unconditional prompt, and its output has the other one.

        Raises:
            PolicyError: the model has not run since it was patched, or the cache is of other policies, or of none.
        """
        if cache is not None:
            known, texts, others = _facts_of(cache), _texts_of(cache), _others_of(cache)
            if not known or not self._owns(cache):
                raise PolicyError(
                    f"this cache was not filled under {self.describe()}; there is nothing to report on it"
                )
        elif not self._facts:
            raise PolicyError("nothing to report yet: the model has not run with a cache since it was patched")
        else:
            known, texts, others = self._facts, self._texts, self._others
        layers = {index: _layer_report(facts, texts) for index, facts in known.items()}
        acted = list(layers.values())
        assert texts.seen_tensor is not None
        for index, (seen, nbytes) in others.items():
            every = seen * len(texts.seen_tensor)
            layers[index] = LayerReport(every, every, nbytes, nbytes, 1.0)
        read = sum(facts.all_read or facts.length for facts in known.values())
        readable = sum(facts.readable or texts.columns for facts in known.values())
        pairs = sum(facts.pairs for facts in known.values())
        total = LayerReport(
            seen=acted[0].seen,
            kept=sum(layer.kept for layer in acted) / len(acted),
            bytes=sum(layer.bytes for layer in layers.values()) + texts.nbytes,
            full_bytes=sum(layer.full_bytes for layer in layers.values()),
            read_share=read / readable if readable else 1.0,
            density=sum(float(facts.computed) for facts in known.values()) / pairs if pairs else 1.0,
        )
        kept = None if texts.kept_ids is None else [[one for one in row if one >= 0] for row in texts.kept_ids.tolist()]
        return Report(self.describe(), total, dict(sorted(layers.items())), kept)

    def _owns(self, cache: Any) -> bool:
        """Whether a cache's layers are those of this handle's policies."""
        layer = next(layer for layer in cache.layers if isinstance(layer, KVLayer))
        return bool(layer.roles == Roles.of(self.policies))

    def check_generate(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = config or model.generation_config
        wanted = {
            name: kwargs.get(name, getattr(config, name, None))
            for name in ("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit")
        }
        if wanted["cache_implementation"] not in (None, "dynamic", "dynamic_full", "hybrid"):
            raise PolicyError(
                f"cache_implementation={wanted['cache_implementation']!r} has storage of its own that a policy cannot evict from; "
                "leave it out"
            )
        asked = {"assistant_model": kwargs.get("assistant_model") is not None, **wanted}
        helpers = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        helper = next((name for name in helpers if asked[name]), None)
        evicts = any(isinstance(policy, EvictionPolicy) for policy in self.policies)
        if evicts and helper:
            raise PolicyError(
                f"assisted decoding (here by {helper}) takes tokens back from the cache, and {self.describe()} evicts entries for "
                f"good; leave {helper} out, or use a policy that keeps every entry: Full, or one that selects what is read"
            )
        if wanted["assistant_early_exit"]:
            raise PolicyError(
                "assistant_early_exit runs some layers of the model without the others, which a patched model cannot; use an "
                "assistant_model or prompt_lookup_num_tokens, or leave it out"
            )

    def expected(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
        """What a call of `generate` says of the passes to come: its `max_new_tokens` and `prefill_chunk_size`."""
        config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or model.generation_config
        names = ("max_new_tokens", "prefill_chunk_size")
        numbers = [kwargs.get(name, getattr(config, name, None)) for name in names]
        return [number if isinstance(number, int) else None for number in numbers]

    def adopt_prompt(self, prompt: "SharedPrompt") -> DynamicCache:
        """A cache as this handle's policies leave it after a prompt, made from one that was recorded.

        Args:
            prompt: what `kvpress.record_prompt` gave for the same model.

        Raises:
            PolicyError: a policy changes the prompt's own attention, so that its prompt cannot be shared.
        """
        if not self.shares_prompts:
            raise PolicyError(
                f"{self.describe()} does not leave the attention of a prompt exact, so that its prompt cannot be shared; run it"
            )
        with torch.no_grad(), lasting_tensors(), no_autocast(prompt.logits.device):
            return self._adopt_prompt(prompt)

    def _adopt_prompt(self, prompt: "SharedPrompt") -> DynamicCache:
        forward = self._patched_forward()
        cache = copy.deepcopy(prompt.others)
        layers = forward.layers(cache, None, len(prompt.tokens.seen_tensor), prompt.tokens.count)
        for ordinal, index in enumerate(forward.indices):
            query, key, value, scores = prompt.layers[ordinal]
            layer = layers[index]
            query = layer.own_query(query, prompt.tokens)
            layer.append(key, value, prompt.tokens)
            if layer.evicts:
                # The mass is the same for every policy that asks. Keys that are rotated anew may differ in the last bit.
                asked = ordinal, layer.places.own_keys
                known = layer.takes_prompt_mass and asked in prompt.masses
                if known:
                    layer.add_mass(prompt.masses[asked])
                layer.observe_prompt(query, prompt.tokens, scores, None, 0, known)
                if layer.takes_prompt_mass and not known:
                    prompt.masses[asked] = layer.stats["mass"][:, :, : layer.length].clone()
            layer.finish_prompt(query, prompt.tokens, scores)
        cache.layers[:] = layers
        cache.layer_class_to_replicate = None
        self.watch(cache)
        return cache

    @property
    def shares_prompts(self) -> bool:
        """Whether the policies leave the attention of a prompt exact, so that one pass can serve several handles."""
        return all(policy.leaves_prompts_exact for policy in self.policies)

    def new_layers(self, cache: DynamicCache) -> list[Any]:
        """The layers that an empty cache of this model gets: ours where the policies act, its own elsewhere."""
        return self._patched_forward().layers(cache, None, 0, 0)

    def _patched_forward(self) -> PatchedForward:
        forward = self._forward()
        if forward is None or not self._patched:
            raise PolicyError(f"this handle ({self.describe()}) is unpatched; patch the model first")
        return forward

    # ------------------------------------------------------------------ told by what runs

    def begin(self, run: object) -> None:
        """A pass or a `generate` begins: no unpatching until `end`."""
        self._running.add(run)

    def end(self, run: object) -> None:
        """It has ended, however; `begin` may not have been reached."""
        self._running.discard(run)

    def watch(self, cache: Any) -> None:
        """Report on this cache from now on."""
        self._facts, self._texts = _facts_of(cache), _texts_of(cache)
        self._cache = weakref.ref(cache)

    def note_others(self) -> None:
        """Note for the report what the layers hold that the policies leave alone."""
        cache = self._cache() if self._cache is not None else None
        if cache is not None and len(cache.layers) > len(self._facts):
            self._others = _others_of(cache)


class PatchedModel(Wrapper):
    """A model's `forward` that lets the decoder inside know of how many rows logits are wanted."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, "forward")
        self._signature = inspect.signature(type(model).forward)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        with wanting(self._rows(args, kwargs)):
            return self.inner(*args, **kwargs)

    def _rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """The last rows whose logits are wanted, 0 for all, or for a list of rows; None for a model that does not say."""
        if "logits_to_keep" not in self._signature.parameters:
            return None
        wanted = kwargs.get("logits_to_keep")
        if wanted is None:
            names = list(self._signature.parameters)[1:]
            wanted = dict(zip(names, args, strict=False)).get("logits_to_keep", 0)
        return wanted if isinstance(wanted, int) else 0


class PatchedGenerate(Wrapper):
    """`model.generate` that refuses what cannot work before it starts, and holds off unpatching while it runs.

    What the user has put on the instance, as a `functools.partial`, is wrapped as the class's own is.
    """

    def __init__(self, model: Any, handle: Handle) -> None:
        super().__init__(model, "generate")
        self.handle = handle
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        told, known = args, kwargs
        if isinstance(self.inner, functools.partial):
            told, known = (*self.inner.args, *args), {**self.inner.keywords, **kwargs}
        model, run = self._model(), object()
        self.handle.check_generate(model, told, known)
        try:
            self.handle.begin(run)
            with expecting(*self.handle.expected(model, told, known)):
                return self.inner(*args, **kwargs)
        finally:
            self.handle.end(run)


def _check_steps_compile(policies: list[Policy]) -> None:
    """Raise `PolicyError` if decode steps are no graphs, whatever the model."""
    roles = Roles.of(policies)
    if roles.stops:
        raise PolicyError(
            f"under {roles.route.describe()} the tokens themselves decide on how many of them each layer of a decode step runs, "
            "which is no graph; leave compile out"
        )


def _configs(decoder: Any) -> list[Any]:
    """The config objects that the decoder's modules read their attention implementation from, each once."""
    found = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _facts_of(cache: Any) -> dict[int, Facts]:
    """Layer index -> the facts of a cache's layers that policies act on."""
    return {index: layer.facts for index, layer in enumerate(cache.layers) if isinstance(layer, KVLayer)}


def _texts_of(cache: Any) -> Texts:
    """The sequences of a cache; those of a new one if it has no layer that policies act on."""
    return next((layer.texts for layer in cache.layers if isinstance(layer, KVLayer)), Texts())


def _others_of(cache: Any) -> dict[int, tuple[int, int]]:
    """Layer index -> entries and bytes of a cache's layers that policies leave alone."""
    return {
        index: (layer.keys.shape[-2], _nbytes(layer.keys) + _nbytes(layer.values))
        for index, layer in enumerate(cache.layers)
        if not isinstance(layer, KVLayer) and getattr(layer, "keys", None) is not None
    }


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _layer_report(facts: Facts, texts: Texts) -> LayerReport:
    assert facts.positions is not None and texts.seen_tensor is not None
    return LayerReport(
        seen=int(texts.real.sum()),
        kept=int((facts.positions >= 0).sum()) / facts.kv_heads,
        bytes=facts.nbytes,
        full_bytes=facts.entry_bytes * texts.columns,
        read_share=facts.all_read / facts.readable if facts.readable else facts.length / max(1, texts.columns),
        density=facts.density,
    )
