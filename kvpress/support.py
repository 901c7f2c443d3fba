"""Which models and caches can be patched, decided before anything is changed."""

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
        getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
        or config.model_type in ("bloom", "mpt")
    ):
        raise UnsupportedModelError(
            f"{name} uses ALiBi biases, which depend on slots that eviction moves; not supported"
        )
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank={config.kv_lora_rank}); not supported yet"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{name} shares K and V between layers; not supported")
    if getattr(config, "cross_attention_layers", None) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} has cross-attention layers; not supported")
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or not decoder._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not call its attention through transformers' AttentionInterface, so it cannot be patched"
        )
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
        UnsupportedModelError: there is none.
    """
    plain = [type(layer) is DynamicLayer for layer in DynamicCache(config=decoder.config).layers]
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
    name = type(decoder).__name__
    if not any(plain):
        raise UnsupportedModelError(
            f"{name} has no layer with full attention (sliding window {getattr(decoder.config, 'sliding_window', None)}); "
            "its cache is bounded already and a policy has nothing to act on"
        )
    missing = sorted(index for index, is_plain in enumerate(plain) if is_plain and index not in found)
    if missing:
        raise UnsupportedModelError(
            f"{name} has no attention module with layer_idx for layers {missing}; not supported"
        )
    return dict(sorted(found.items()))


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
