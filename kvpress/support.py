"""Which models and caches can be patched, decided before anything is changed."""

import ast
import inspect
import sys
import textwrap
from collections import Counter
from typing import Any

import torch

from kvpress.compat import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache, PreTrainedModel
from kvpress.errors import PolicyError, UnsupportedModelError


def unwrapped(model: Any) -> Any:
    """The transformers model that a PEFT model wraps; any other model as it is."""
    if isinstance(model, PreTrainedModel):
        return model
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model.base_model.model if hasattr(model, "peft_config") else model  # adapters of several kinds


def find_decoder(model: Any) -> Any:
    """The module of a causal LM that takes the cache and owns the layers.

    Raises:
        UnsupportedModelError: the model is not one that kvpress can patch.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers PreTrainedModel; pass the model itself"
        )
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; kvpress patches decoder-only models")
    if (
        _value(config, "alibi")
        or _value(config, "position_embedding_type") == "alibi"
        or config.model_type in ("bloom", "mpt")
    ):
        raise UnsupportedModelError(
            f"{name} uses ALiBi biases, which depend on slots that eviction moves; not supported"
        )
    if _value(config, "index_topk"):
        raise UnsupportedModelError(
            f"{name} has indexed sparse attention (index_topk={_value(config, 'index_topk')}): an indexer with a cache of its own "
            "chooses what a token reads; not supported"
        )
    if _value(config, "kv_lora_rank"):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank={_value(config, 'kv_lora_rank')}); not supported yet"
        )
    if _value(config, "num_kv_shared_layers"):
        raise UnsupportedModelError(f"{name} shares K and V between layers; not supported")
    if _value(config, "cross_attention_layers") or _value(config, "add_cross_attention"):
        raise UnsupportedModelError(f"{name} has cross-attention layers; not supported")
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModelError(f"{name} keeps a cache of its own kind, not a DynamicCache; not supported")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not decoder._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not call its attention through transformers' AttentionInterface, so it cannot be patched"
        )
    _check_causal(name, model.config, config, decoder.config)
    missing = _without_weights(decoder)
    if missing:
        raise UnsupportedModelError(
            f"{name} is on the meta device and has no weights ({len(missing)} parameters, as {missing[0]}); load them first "
            "(from_pretrained, to_empty)"
        )
    return decoder


def find_attention(decoder: Any) -> dict[int, torch.nn.Module]:
    """Layer index -> attention module, for the layers with full attention and a plain cache of their own.

    Raises:
        UnsupportedModelError: there is none, or one of them attends in a way that kvpress does not know.
    """
    name = type(decoder).__name__
    try:
        layers = DynamicCache(config=decoder.config).layers
    except AttributeError as error:
        raise UnsupportedModelError(f"transformers can make no cache for {name} from its config ({error})") from error
    kinds = [type(layer).__name__ for layer in layers]
    plain = [type(layer) is DynamicLayer for layer in layers]
    if any("Index" in kind for kind in kinds):
        raise UnsupportedModelError(f"{name} has indexed sparse attention: {_count(kinds)}; not supported")
    if not any(plain):
        raise UnsupportedModelError(f"{name} has no layer with full attention and a plain cache: {_why(layers)}")
    if not _uses_mask_functions(type(decoder)):
        raise UnsupportedModelError(
            f"{name} makes its attention masks itself, not by transformers' create_causal_mask, so that causality and padding "
            "cannot be told apart; not supported"
        )
    found: dict[int, torch.nn.Module] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if (
            isinstance(index, int)
            and type(module).__name__.endswith("Attention")
            and index < len(plain)
            and plain[index]
        ):
            found.setdefault(index, module)
    missing = sorted(index for index, is_plain in enumerate(plain) if is_plain and index not in found)
    if missing:
        raise UnsupportedModelError(
            f"{name} has no attention module with layer_idx for layers {missing} of its cache (layers that run several times, or "
            "another kind of layer); not supported"
        )
    for kind, module in {type(module): module for module in found.values()}.items():
        if getattr(module, "is_causal", True) is False:
            _refuse_bidirectional(name, f"{kind.__name__}.is_causal is False", decoder.config)
        _check_attention_call(name, kind)
    return dict(sorted(found.items()))


def find_blocks(decoder: Any, attention: dict[int, torch.nn.Module]) -> list[torch.nn.Module]:
    """The decoder's layers as it calls them one after the other, each with one of the attention modules in it.

    Raises:
        UnsupportedModelError: there is no list of such modules.
    """
    for blocks in decoder.modules():
        if isinstance(blocks, torch.nn.ModuleList) and len(blocks) == len(attention):
            inside = [{id(child) for child in block.modules()} for block in blocks]
            if all(id(module) in ids for module, ids in zip(attention.values(), inside, strict=True)):
                return list(blocks)
    raise UnsupportedModelError(
        f"{type(decoder).__name__} has no list of {len(attention)} layers with one attention module each, so tokens cannot stop "
        "between them; use another policy"
    )


def _uses_mask_functions(decoder: type) -> bool:
    """Whether the file of a decoder's class, or of one that it is derived from, knows transformers' mask functions."""
    files = {sys.modules[kind.__module__] for kind in decoder.__mro__ if issubclass(kind, PreTrainedModel)}
    files.discard(sys.modules[PreTrainedModel.__module__])
    return any(hasattr(file, name) for file in files for name in ("create_causal_mask", "create_masks_for_generate"))


def _value(config: Any, name: str) -> Any:
    """A field of a config; None if it has none; any layer's own if the layers differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # a field that differs from layer to layer
        return next((one for layer in config.per_layer_config if (one := getattr(layer, name, None))), None)


# Why a policy cannot act on a cache layer, by its class.
_KINDS = {
    "DynamicSlidingWindowLayer": "sliding-window attention, whose cache is bounded already",
    "LinearAttentionLayer": "a recurrent state of fixed size instead of keys and values",
    "LinearAttentionAndFullAttentionLayer": "attention and a recurrent state in one cache layer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "sliding-window attention and a recurrent state in one cache layer",
    "DummyLayer": "no cache",
}


def _why(layers: list[Any]) -> str:
    """What a cache's layers are, with the reason why a policy cannot act on them."""
    counts = Counter(type(layer).__name__ for layer in layers)
    windows = {layer.sliding_window for layer in layers if getattr(layer, "sliding_window", None)}
    window = f" (sliding window {', '.join(str(one) for one in sorted(windows))})" if windows else ""
    parts = [f"{count} with {_KINDS.get(kind, 'a cache of its own kind')} ({kind})" for kind, count in counts.items()]
    return f"{'; '.join(parts) or 'it has no layers'}{window}. A policy has nothing to act on"


def _count(kinds: list[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())


def _check_causal(name: str, *configs: Any) -> None:
    for config in configs:
        if _value(config, "is_causal") is False:
            _refuse_bidirectional(name, "config.is_causal is False", config)
        # "vision" is about blocks of image tokens, which are refused when they come.
        if _value(config, "use_bidirectional_attention") in (True, "all"):
            found = f"config.use_bidirectional_attention is {config.use_bidirectional_attention!r}"
            _refuse_bidirectional(name, found, config)


def _refuse_bidirectional(name: str, found: str, config: Any) -> None:
    decoder = _value(config, "is_decoder") is False and hasattr(config, "add_cross_attention")
    remedy = "; load it with is_decoder=True to make it a causal LM" if decoder else ""
    raise UnsupportedModelError(
        f"{name} attends in both directions ({found}), and what a token gives then depends on those after it; a cache needs "
        f"causal attention{remedy}"
    )


# What attention modules hand to the attention function, and kvpress honours or may ignore.
_KNOWN_ARGUMENTS = {
    "attention_mask",
    "dropout",
    "is_causal",
    "output_attentions",
    "position_ids",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
    "use_cache",
}


def _check_attention_call(name: str, kind: Any) -> None:
    """Look at how a class of attention modules calls the attention function: once, with what kvpress knows.

    What the source does not show, a pass finds (`Pass.attend`).
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = [ast.unparse(call.func) for call in calls]
    for call, function in zip(calls, called, strict=True):
        if function.endswith(".update") and len(call.args) > 2 and ast.unparse(call.args[2]) != "self.layer_idx":
            raise UnsupportedModelError(
                f"{name}'s {kind.__name__} stores keys and values under another layer than its own "
                f"({ast.unparse(call.args[2])}), as layers that run several times in a pass do; not supported"
            )
    attends = [call for call, function in zip(calls, called, strict=True) if function == "attention_interface"]
    where = f"{name}'s {kind.__name__}"
    if not attends:
        if any(function.split(".")[-1] in ("softmax", "scaled_dot_product_attention") for function in called):
            raise UnsupportedModelError(
                f"{where} does not call its attention through transformers' AttentionInterface, so it cannot be patched"
            )
        return
    if len(attends) > 1:
        raise UnsupportedModelError(
            f"{where} runs attention {len(attends)} times in a pass over one cache layer; kvpress supports one"
        )
    named = {word.arg: ast.unparse(word.value) for word in attends[0].keywords if word.arg is not None}
    unknown = sorted(set(named) - _KNOWN_ARGUMENTS)
    if unknown:
        raise UnsupportedModelError(f"{where} hands its attention {', '.join(unknown)}, which kvpress does not know")
    mask = (
        ast.unparse(attends[0].args[4]) if len(attends[0].args) > 4 else named.get("attention_mask", "attention_mask")
    )
    if mask != "attention_mask":
        raise UnsupportedModelError(
            f"{where} makes an attention mask of its own ({mask}), which kvpress does not know; not supported"
        )


def is_spread(model: Any, decoder: Any) -> bool:
    """Whether the model lies on several devices or is offloaded (accelerate's hooks), or is split over processes (tp_plan)."""
    hooked = any(_placements(module) for module in decoder.modules())
    return hooked or (getattr(model, "tp_size", None) or 1) > 1


def input_device(model: Any) -> torch.device:
    """Where a model wants its token ids: on its embedding's device, or where accelerate brings that for a pass."""
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":
        found = [hook.execution_device for hook in _placements(embedding) if hook.execution_device is not None]
        device = torch.device(found[0]) if found else device
    return device


def _placements(module: Any) -> list[Any]:
    """The hooks by which accelerate brings a module's weights and inputs to a device."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _without_weights(decoder: Any) -> list[str]:
    """The parameters that are on the meta device and that accelerate does not bring from elsewhere for a pass."""
    brought: set[int] = set()
    for module in decoder.modules():
        for hook in _placements(module):
            if getattr(hook, "offload", False):
                brought.update(map(id, module.parameters(recurse=hook.place_submodules)))
    return [name for name, held in decoder.named_parameters() if held.is_meta and id(held) not in brought]


def check_cache(cache: Any) -> None:
    """Raise `PolicyError` unless the cache is one that can be taken over."""
    remedy = "pass DynamicCache(config=model.config), or none"
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise PolicyError(f"a cache of type {type(cache).__name__} cannot be taken over; {remedy}")
    if not isinstance(cache, DynamicCache):
        raise PolicyError(f"{type(cache).__name__} has storage of its own that a policy cannot evict from; {remedy}")
    if getattr(cache, "offloading", False):
        raise PolicyError(
            f"a cache with offloading moves its layers between passes, which slots do not support; {remedy}"
        )
