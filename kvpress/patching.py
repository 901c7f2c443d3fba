"""Put policies on a loaded model with one call, and take them off without a trace."""

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from kvpress.attention import NAME, originals, register
from kvpress.compiled import check_compiles, compile_steps, is_compiled, undo_compile
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.forwards import replace_forwards, restore_forwards
from kvpress.layer import Facts, KVLayer
from kvpress.paged import PagedLayer
from kvpress.passes import (
    Pass,
    Tokens,
    active_pass,
    current_record,
    enter_pass,
    expected_tokens,
    expecting,
    leave_pass,
    masked_tokens,
    plain_tokens,
)
from kvpress.policy import EvictionPolicy, Policy, SelectionPolicy
from kvpress.registry import PolicySpec, make_policies
from kvpress.report import LayerReport, Report
from kvpress.rotary import Rotary, find_rotary
from kvpress.support import check_cache, find_attention, find_decoder

if TYPE_CHECKING:
    from kvpress.sharing import SharedPrompt

_handles: "weakref.WeakKeyDictionary[Any, Handle]" = weakref.WeakKeyDictionary()
_handles_lock = threading.Lock()


def patch(model: Any, policy: PolicySpec, *, compile: bool = False) -> "Handle":
    """Put a policy on a loaded transformers causal LM.

    From then on `model.generate`, `model(...)` and pipelines over the model use caches that follow the policy, until
    `handle.unpatch()`. The weights are not touched, and nothing is set globally but one attention and one mask name that
    transformers needs to know.

    Args:
        model: a decoder-only `PreTrainedModel`, on its device, with weights.
        policy: a policy, a name ("h2o"), a mapping ({"name": "h2o", "budget": 0.2}), the path of a YAML file that holds
            one, or a list of policies that play different roles.
        compile: run decode steps as a graph compiled by `torch.compile`, see `Handle.compile`.

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
    policies = make_policies(policy)
    decoder = find_decoder(model)
    attention = find_attention(decoder)
    split = getattr(model, "tp_size", None) or 1
    for one in policies:
        if one.joins_heads and split > 1:
            raise UnsupportedModelError(
                f"{one.describe()} decides over all heads of a layer together, and this model's are split over {split} processes "
                "(tp_plan); load it with device_map, or use a policy that decides head by head"
            )
        if isinstance(one, SelectionPolicy):
            one.check_layers(len(attention))
            if one.correct_every and len(DynamicCache(config=decoder.config).layers) > len(attention):
                raise PolicyError(
                    f"{one.describe()} takes decode steps back to compute them again, and {type(model).__name__} has layers "
                    "without full attention, whose cache cannot; use correct_every=0"
                )
    rotary = _rotary(decoder, attention, policies)
    with _handles_lock:
        if decoder in _handles:
            raise PolicyError(
                f"{type(model).__name__} is already patched with {_handles[decoder].describe()}; call kvpress.unpatch(model) first"
            )
        if compile:
            check_compiles(model, decoder)
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
    return _handles.get(model.get_decoder()) if hasattr(model, "get_decoder") else None


def _rotary(decoder: Any, attention: dict[int, Any], policies: list[Policy]) -> list[Rotary]:
    moving = next((policy for policy in policies if policy.moves_positions), None)
    if moving is None:
        return []
    found = [find_rotary(decoder, module) for module in attention.values()]
    if any(rotary is None for rotary in found):
        remedy = "use rope='original'" if hasattr(moving, "rope") else "use another policy"
        raise UnsupportedModelError(
            f"{moving.describe()} re-indexes rotary positions, and {type(decoder).__name__} has none that can be moved "
            f"(learned positions, or frequencies that depend on the length); {remedy}"
        )
    return [rotary for rotary in found if rotary is not None]


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
        self._eviction = next((one for one in policies if isinstance(one, EvictionPolicy)), None)
        self._selection = next((one for one in policies if isinstance(one, SelectionPolicy)), None)
        self._rotary = rotary
        self._raw_keys = any(policy.raw_keys for policy in policies)
        self._model, self._decoder = weakref.ref(model), weakref.ref(decoder)
        self._indices = list(attention)
        self._modules = {id(module): ordinal for ordinal, module in enumerate(attention.values())}
        self._parameters = list(inspect.signature(decoder.forward).parameters)
        self._lock = threading.RLock()
        self._busy = 0
        self._patched = True
        self._facts: dict[int, Facts] = {}
        self._others: dict[int, tuple[int, int]] = {}
        self._cache: weakref.ref[Any] | None = None

        register()
        self._configs = _configs(decoder)
        for config in self._configs:
            originals.switch(config)
        self._hooks = [
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass, always_call=True),
        ]
        replace_forwards(model, decoder)
        self._wraps_generate = hasattr(model, "generate")
        if self._wraps_generate:
            model.generate = _watched(self, model)

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
            if self._busy:
                raise PolicyError(
                    "the model is generating right now; unpatch it when generate() or forward() has returned"
                )
            self._patched = False
        for hook in self._hooks:
            hook.remove()
        for config in self._configs:
            originals.restore(config)
        model, decoder = self._model(), self._decoder()
        if model is not None:
            restore_forwards(model)
        if model is not None and self._wraps_generate:
            model.__dict__.pop("generate", None)
        with _handles_lock:
            if decoder is not None:
                undo_compile(decoder)
                _handles.pop(decoder, None)

    def compile(self, backend: Any = "inductor", mode: str | None = None) -> "Handle":
        """Run decode steps as one graph, compiled at the first of them (which takes a minute or so) and used from then on.

        A step has the same shapes however much the cache holds, so there is one graph for each batch size. Prompts are not
        compiled, nor steps with gradients on, or with a padding mask and no `position_ids` (`generate` gives them).

        Args:
            backend: as in `torch.compile`.
            mode: as in `torch.compile`, for the backend "inductor". With "reduce-overhead" all between the attentions
                becomes CUDA graphs; the attention itself does not, as it counts entries.

        Returns:
            This handle.

        Raises:
            PolicyError: there is no such mode, or it is for another backend, or the handle is unpatched or compiled
                already, or the model is generating right now, or there is no C++ compiler.
            UnsupportedModelError: some of the model's layers are not the policies', or it is spread over devices. In a
                first step: torch cannot make one graph of it.
        """
        decoder = self._decoder()
        with self._lock:
            if not self._patched:
                raise PolicyError(f"this handle ({self.describe()}) is unpatched; patch the model first")
            if self._busy:
                raise PolicyError(
                    "the model is generating right now; compile it when generate() or forward() has returned"
                )
            if is_compiled(decoder):
                raise PolicyError(f"this handle ({self.describe()}) is compiled already")
            check_compiles(self._model(), decoder, backend, mode)
            compile_steps(decoder, backend, mode)
        return self

    def report(self) -> Report:
        """What the policy did in the cache that the model used last.

        Raises:
            PolicyError: the model has not run since it was patched.
        """
        if not self._facts:
            raise PolicyError("nothing to report yet: the model has not run with a cache since it was patched")
        layers = {index: _layer_report(facts) for index, facts in self._facts.items()}
        acted = list(layers.values())
        sequences = _sequences(self._facts)
        for index, (seen, nbytes) in self._others.items():
            layers[index] = LayerReport(seen * sequences, seen * sequences, nbytes, nbytes, 1.0)
        read = sum(facts.read or facts.length for facts in self._facts.values())
        readable = sum(facts.readable or facts.seen for facts in self._facts.values())
        total = LayerReport(
            seen=acted[0].seen,
            kept=sum(layer.kept for layer in acted) / len(acted),
            bytes=sum(layer.bytes for layer in layers.values()),
            full_bytes=sum(layer.full_bytes for layer in layers.values()),
            read_share=read / readable if readable else 1.0,
        )
        return Report(self.describe(), total, dict(sorted(layers.items())))

    def _check_generate(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        assisted = kwargs.get("assistant_model") is not None or any(
            wanted[name] for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
        )
        if self._eviction is not None and assisted:
            raise PolicyError(
                f"assisted decoding takes tokens back from the cache, and {self.describe()} evicts entries for good; leave the "
                "assistant out, or use the policy Full"
            )
        if wanted["assistant_early_exit"]:
            raise PolicyError(
                "assistant_early_exit runs some layers of the model without the others, which a patched model cannot; use an "
                "assistant_model or prompt_lookup_num_tokens, or leave it out"
            )

    def _new_tokens(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or model.generation_config
        number = kwargs.get("max_new_tokens", getattr(config, "max_new_tokens", None))
        return number if isinstance(number, int) else None

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
        decoder = self._decoder()
        cache = copy.deepcopy(prompt.others)
        layers = self._layers(decoder, cache, None, len(prompt.tokens.seen_tensor), prompt.tokens.count)
        for ordinal, index in enumerate(self._indices):
            query, key, value, scores = prompt.layers[ordinal]
            layer = layers[index]
            layer.append(key, value, prompt.tokens)
            if layer.fused_mass:
                # The same for every policy that asks. Keys that are rotated anew may differ in the last bit.
                asked = ordinal, layer.rotary is not None
                if asked in prompt.masses:
                    layer.observe(prompt.masses[asked])
                else:
                    layer.observe_rows(query, prompt.tokens, scores, None, 0)
                    assert layer.mass is not None
                    prompt.masses[asked] = layer.mass[:, :, : layer.length].clone()
            layer.finish_prompt(query, prompt.tokens, scores, None, 0, mass_known=layer.fused_mass)
        cache.layers[:] = layers
        cache.layer_class_to_replicate = None
        self._watch(cache, layers)
        return cache

    @property
    def shares_prompts(self) -> bool:
        """Whether the policies leave the attention of a prompt exact, so that one pass can serve several handles."""
        return all(policy.leaves_prompts_exact for policy in self.policies)

    # ------------------------------------------------------------------ around a forward pass

    def _before_pass(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        inputs = self._check_call(decoder, kwargs)
        batch, count = inputs.shape[:2]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        wants_cache = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if cache is None and not wants_cache:
            self._check_no_checkpointing(decoder)
            tokens = self._tokens(batch, count, mask, inputs.device, None)
            current = Pass(self._modules, self._rotary, tokens, [], prompt=True)
        else:
            self._check_no_training(decoder)
            if cache is None:
                cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
            layers = self._layers(decoder, cache, mask, batch, count)
            tokens = self._tokens(batch, count, mask, inputs.device, layers[self._indices[0]])
            acted = [layers[index] for index in self._indices]
            again = self._feed_again(kwargs, inputs, acted)
            if again:
                tokens = self._tokens(batch, again + count, mask, inputs.device, acted[0])
            prompt = again + count > 1 or acted[0].facts.seen == 0
            current = Pass(
                self._modules,
                self._rotary,
                tokens,
                acted,
                prompt,
                expected_tokens(),
                record=current_record(),
                again=again,
            )
            cache.layers[:] = layers  # only now that nothing can be refused any more
            cache.layer_class_to_replicate = None
            self._watch(cache, layers)
        with self._lock:
            self._busy += 1
        enter_pass(current)
        return (), kwargs

    def _watch(self, cache: Any, layers: list[Any]) -> None:
        """Report on this cache from now on."""
        self._facts = {index: layers[index].facts for index in self._indices}
        self._cache = weakref.ref(cache)

    def _feed_again(self, kwargs: dict[str, Any], inputs: Tensor, acted: list[KVLayer]) -> int:
        """Feed decode steps once more, before this pass's tokens, where the policy wants what they stored exact.

        Decode steps are remembered until there are as many as the policy corrects at a time, or a prompt pass follows. Then
        they are taken back, and `kwargs` bring them again.

        Returns:
            How many there are.
        """
        every = 0 if self._selection is None else self._selection.correct_every
        first, count = acted[0], inputs.shape[1]
        if not every or first.facts.seen == 0:
            return 0
        places = kwargs.get("position_ids")
        if places is None:
            places = torch.arange(first.facts.seen, first.facts.seen + count, device=inputs.device)[None]
        if places.ndim != 2:
            raise PolicyError(
                f"correct_every needs 2-D position_ids, and these have {places.ndim}; use correct_every=0"
            )
        places = places.expand(inputs.shape[0], -1)
        decoded, decoded_at = first.decoded, first.decoded_at
        if decoded is None or decoded_at is None or decoded.ndim != inputs.ndim:  # ids after embeddings start anew
            decoded, decoded_at = inputs[:, :0], places[:, :0]
        again, decoded = decoded.shape[1], torch.cat((decoded.to(inputs.device), inputs), dim=1)
        decoded_at = torch.cat((decoded_at.to(places.device), places), dim=1)
        if count == 1 and again < every:
            first.decoded, first.decoded_at = decoded, decoded_at
            return 0
        if again:
            kwargs["input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"] = decoded
            kwargs["position_ids"] = decoded_at
            kwargs.pop("cache_position", None)
            for layer in acted:
                layer.take_back(again)
        first.decoded = first.decoded_at = None
        return again

    def _after_pass(self, decoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        current = active_pass()
        if current is None or not leave_pass(self._modules):
            return None  # the pass was refused before it began
        with self._lock:
            self._busy -= 1
        self._note_others()
        if not current.again or output is None:
            return None
        count = current.tokens.count - current.again
        if count == 1:  # a decode step, which read everything
            for facts in self._facts.values():
                facts.readable += facts.seen
                facts.read += facts.length
        return _last_columns(output, count)

    def _note_others(self) -> None:
        """Note for the report what the layers hold that the policies leave alone."""
        cache = self._cache() if self._cache is not None else None
        if cache is not None and len(cache.layers) > len(self._facts):
            for index, layer in enumerate(cache.layers):
                if index not in self._facts and getattr(layer, "keys", None) is not None:
                    self._others[index] = layer.keys.shape[-2], _nbytes(layer.keys) + _nbytes(layer.values)

    def _check_call(self, decoder: Any, kwargs: dict[str, Any]) -> Tensor:
        """The pass's input, [batch, count] ids or [batch, count, hidden] embeddings, or what is wrong with the call."""
        if decoder.config._attn_implementation != NAME:
            raise PolicyError(
                f"the attention implementation was changed to {decoder.config._attn_implementation!r} while the model is patched; "
                "unpatch it first, or change it before patching"
            )
        if kwargs.get("output_attentions"):
            raise PolicyError(
                "output_attentions=True is not possible on a patched model; unpatch it to look at attention weights"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise PolicyError(
                f"a {mask.ndim}-D attention mask cannot be used on a patched model; pass a 2-D padding mask, or none"
            )
        if isinstance(mask, dict):
            raise PolicyError(
                "a mapping of attention masks cannot be used on a patched model; pass a 2-D padding mask, or none"
            )
        inputs: Tensor | None = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None or inputs.shape[1] == 0:
            raise PolicyError("the prompt is empty (no tokens); give at least one token")
        if mask is not None and mask.shape[0] != inputs.shape[0]:
            raise PolicyError(
                f"attention_mask has {mask.shape[0]} rows and the input {inputs.shape[0]} sequences; give one row for each"
            )
        return inputs

    def _check_no_training(self, decoder: Any) -> None:
        if decoder.training and torch.is_grad_enabled():
            raise PolicyError(
                "the model is in training mode with gradients on, and a kvpress cache carries none; call model.eval() or use "
                "torch.no_grad() to generate, or use_cache=False (exact attention) or unpatch to train"
            )

    def _check_no_checkpointing(self, decoder: Any) -> None:
        if not (decoder.training and torch.is_grad_enabled()):
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules()):
            raise PolicyError(
                "gradient checkpointing runs the layers again in backward, when the patched pass is over; switch it off, or "
                "unpatch to train"
            )

    def _tokens(self, batch: int, count: int, mask: Tensor | None, device: Any, layer: KVLayer | None) -> Tokens:
        before, before_tensor, seen = None, None, 0
        if layer is not None and layer.is_initialized:
            before, before_tensor, seen = layer.tokens, layer.facts.tokens, layer.facts.seen
            assert before_tensor is not None
            if before_tensor.shape[0] != batch:
                raise PolicyError(
                    f"the cache holds {before_tensor.shape[0]} sequences and the input has {batch}; give as many"
                )
            before_tensor = before_tensor.to(device)
        prompt = count > 1 or seen == 0
        if mask is None:
            if prompt and before is None and before_tensor is not None:
                before = before_tensor.tolist()
            return plain_tokens(batch, count, before, before_tensor, device)
        if mask.shape[1] != seen + count:
            raise PolicyError(
                f"attention_mask has {mask.shape[1]} columns; the cache has seen {seen} tokens and the input has {count}, so it "
                f"must have {seen + count}"
            )
        mask = mask.to(device=device, dtype=torch.bool)
        if prompt and before_tensor is not None:
            known, told = before_tensor.tolist(), mask[:, :seen].sum(1).tolist()
            if known != told:
                raise PolicyError(
                    f"attention_mask calls {told} of the tokens seen before real, and the cache took {known} for real; pass the "
                    "mask of the earlier passes, extended"
                )
            before = known
        return masked_tokens(mask[:, -count:], before, before_tensor, prompt)

    def new_layers(self, cache: DynamicCache) -> list[Any]:
        """The layers that an empty cache of this model gets: ours where the policies act, its own elsewhere."""
        return self._layers(self._decoder(), cache, None, 0, 0)

    def _layers(self, decoder: Any, cache: Any, mask: Tensor | None, batch: int, count: int) -> list[Any]:
        """The cache's layers, with ours in the place of the plain ones that the policies act on."""
        held = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, KVLayer)]
        if held:
            owners = held[0].policy, held[0].selection
            if owners != (self._eviction, self._selection) or len(held) != len(self._indices):
                named = " + ".join(policy.describe() for policy in owners if policy is not None) or "full()"
                raise PolicyError(f"this cache belongs to the policy {named}; start a new one for {self.describe()}")
            return list(cache.layers)
        check_cache(cache)
        # A DynamicCache() without config has no layers yet: it adds plain ones as they are used.
        layers = list(cache.layers) or [DynamicLayer() for _ in DynamicCache(config=decoder.config).layers]
        if len(layers) <= self._indices[-1]:
            raise PolicyError(
                f"the cache has {len(layers)} layers and the model needs {self._indices[-1] + 1}; pass "
                "DynamicCache(config=model.config), or none"
            )
        for ordinal, index in enumerate(self._indices):
            plain = layers[index]
            if type(plain) is not DynamicLayer:
                raise PolicyError(
                    f"layer {index} of the cache is a {type(plain).__name__}, not a plain DynamicLayer; pass "
                    "DynamicCache(config=model.config), or none"
                )
            rotary = self._rotary[ordinal] if self._raw_keys else None
            kind = PagedLayer if self._eviction is not None and self._eviction.shares_heads else KVLayer
            layers[index] = kind(self._eviction, ordinal, len(self._indices), self._selection, rotary)
            if plain.get_seq_length():
                self._adopt(layers[index], plain, mask, batch, count)
        return layers

    def _adopt(self, layer: KVLayer, plain: Any, mask: Tensor | None, batch: int, count: int) -> None:
        """Take over what an unpatched run left in a plain layer."""
        if self._eviction is not None and self._eviction.observes == "every row":
            raise PolicyError(
                f"{self._eviction.describe()} needs the attention of every token, and this cache was filled by an unpatched run; "
                "run the whole prompt on the patched model, or use a policy that looks at the last rows only"
            )
        if self._eviction is not None and self._eviction.observes == "window" and count == 1:
            raise PolicyError(
                f"{self._eviction.describe()} needs the attention of the prompt's last tokens, and this cache was filled by an "
                "unpatched run; give several tokens in the next pass, or run the whole prompt on the patched model"
            )
        seen = plain.get_seq_length()
        if plain.keys.shape[0] != batch:
            raise PolicyError(
                f"the cache holds {plain.keys.shape[0]} sequences and the input has {batch}; give as many"
            )
        earlier = None if mask is None or mask.shape[1] <= seen else mask[:, :seen].to(plain.keys.device, torch.bool)
        if earlier is None:
            tokens = plain_tokens(batch, seen, None, None, plain.keys.device)
        else:
            tokens = masked_tokens(earlier, None, None, prompt=True)
        layer.take_over(plain.keys, plain.values, tokens)


def _configs(decoder: Any) -> list[Any]:
    """The config objects that the decoder's modules read their attention implementation from, each once."""
    found = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _watched(handle: Handle, model: Any) -> Callable[..., Any]:
    """`model.generate` that refuses what cannot work before it starts, and holds off unpatching while it runs."""
    generate = type(model).generate
    reference = weakref.ref(model)

    @functools.wraps(generate)
    def watched(*args: Any, **kwargs: Any) -> Any:
        handle._check_generate(reference(), args, kwargs)
        with handle._lock:
            handle._busy += 1
        try:
            with expecting(handle._new_tokens(reference(), args, kwargs)):
                return generate(reference(), *args, **kwargs)
        finally:
            with handle._lock:
                handle._busy -= 1

    return watched


def _last_columns(output: Any, count: int) -> Any:
    """A decoder's output (hidden states, in whatever they are nested) of the last columns alone."""
    if isinstance(output, Tensor):
        return output[:, -count:]
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _last_columns(value, count)
        return output
    return tuple(_last_columns(item, count) for item in output) if isinstance(output, tuple) else output


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sequences(facts: dict[int, Facts]) -> int:
    tokens = next(iter(facts.values())).tokens
    return 1 if tokens is None else tokens.shape[0]


def _layer_report(facts: Facts) -> LayerReport:
    assert facts.positions is not None and facts.tokens is not None
    return LayerReport(
        seen=int(facts.tokens.sum()),
        kept=int((facts.positions >= 0).sum()) / facts.kv_heads,
        bytes=facts.nbytes,
        full_bytes=facts.entry_bytes * facts.seen,
        read_share=facts.read / facts.readable if facts.readable else facts.length / max(1, facts.seen),
    )
