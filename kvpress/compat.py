"""What depends on the version of transformers. All of it is here, found by looking at what is installed.

transformers renames and moves things every few weeks. The rest of the package takes from here what it needs, under one
name, and `check_transformers` says before anything is changed if something is not as it is expected.
"""

import inspect
import warnings
from dataclasses import fields
from typing import Any

import transformers
from packaging.version import Version

from kvpress.errors import UnsupportedModelError

OLDEST_TESTED, NEWEST_TESTED = "5.6.0", "5.24.0"
TESTED = f"tested are transformers {OLDEST_TESTED} to {NEWEST_TESTED}"

try:
    from transformers import AttentionInterface, DynamicCache, PreTrainedModel
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
    from transformers.modeling_outputs import BaseModelOutputWithPast
    from transformers.utils import ModelOutput
except ImportError as error:
    raise UnsupportedModelError(
        f"kvpress cannot import what it needs of transformers {transformers.__version__} ({error}); {TESTED}"
    ) from error

__all__ = [
    "CACHE",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "EncoderDecoderCache",
    "ModelOutput",
    "PreTrainedModel",
    "cache_argument",
    "causal_mask_function",
    "check_decoder",
    "check_transformers",
    "forward_parameters",
    "rename_cache",
]

# The newest first.
_CACHE_NAMES = ("cache", "past_key_values")
CACHE: str = next(
    (name for name in _CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)}),
    _CACHE_NAMES[0],
)
"""What this transformers calls the cache, in calls and in outputs: "cache"; before 5.24 "past_key_values"."""

# What the attention function is called with, and what a mask function is told, at least.
_ATTENTION_ARGUMENTS = ("module", "query", "key", "value", "attention_mask")
_MASK_ARGUMENTS = {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"}


def forward_parameters(module: Any) -> list[str]:
    """The names that a module's `forward` takes its arguments by, whatever somebody put before it on the instance."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def cache_argument(module: Any) -> str:
    """The name under which a module takes its cache. Code that comes with a checkpoint may use an older one than ours."""
    known = forward_parameters(module)
    return next((name for name in _CACHE_NAMES if name in known), CACHE)


def rename_cache(kwargs: dict[str, Any], name: str) -> None:
    """Give the cache among the arguments of a call the name that the callee knows, whichever the caller used.

    Raises:
        ValueError: it is there twice.
    """
    for other in _CACHE_NAMES:
        if other != name and other in kwargs:
            if kwargs.get(name) is not None:
                raise ValueError(f"{other} and {name} are two names of one argument; pass {name} alone")
            kwargs[name] = kwargs.pop(other)


def check_transformers(layer: type) -> None:
    """Raise an error unless the installed transformers calls caches, attention and masks as this package expects.

    Args:
        layer: our class of cache layers.

    Raises:
        UnsupportedModelError: it says what was expected and what was found.
    """
    abstract = sorted(getattr(layer, "__abstractmethods__", ()))
    if abstract:
        _refuse(f"cache layers that implement {', '.join(_layer_methods())}", f"more: {', '.join(abstract)}")
    update = list(inspect.signature(Cache.update).parameters)
    if update[:4] != ["self", "key_states", "value_states", "layer_idx"]:
        _refuse("Cache.update(key_states, value_states, layer_idx, ...)", f"update({', '.join(update[1:])})")
    for registry in (AttentionInterface, AttentionMaskInterface):
        for method in ("register", "get"):
            if not hasattr(registry, method):
                _refuse(f"{registry.__name__}.{method}", "none")
    mask = AttentionMaskInterface().get("sdpa")
    told = set(inspect.signature(mask).parameters) if callable(mask) else set()
    if not told >= _MASK_ARGUMENTS:
        _refuse(f"mask functions that take {', '.join(sorted(_MASK_ARGUMENTS))}", ", ".join(sorted(told)) or "none")
    _warn_once_if_newer()


def check_decoder(decoder: Any) -> None:
    """Raise an error unless a decoder and the attention functions of its file are called as this package expects.

    Raises:
        UnsupportedModelError: it says what was expected and what was found.
    """
    name, known = type(decoder).__name__, forward_parameters(decoder)
    wanted = {"attention_mask": ("attention_mask",), "a cache": _CACHE_NAMES, "tokens": ("input_ids", "inputs_embeds")}
    for what, names in wanted.items():
        if not any(argument in known for argument in names):
            _refuse(f"that {name}.forward takes {what} ({' or '.join(names)})", f"forward({', '.join(known)})")
    module = inspect.getmodule(type(decoder))
    eager = getattr(module, "eager_attention_forward", None)
    if eager is not None:
        found = tuple(inspect.signature(eager).parameters)
        if found[: len(_ATTENTION_ARGUMENTS)] != _ATTENTION_ARGUMENTS:
            _refuse(f"attention functions ({', '.join(_ATTENTION_ARGUMENTS)}, ...)", f"({', '.join(found)})")


def _layer_methods() -> list[str]:
    return sorted(getattr(CacheLayerMixin, "__abstractmethods__", ()))


def _refuse(expected: str, found: str) -> None:
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} is not as kvpress knows it: expected {expected}; found {found}. "
        f"Install a version that is known to work: {TESTED}"
    )


_warned = False


def _warn_once_if_newer() -> None:
    global _warned
    installed = Version(transformers.__version__)
    if not _warned and installed.release > Version(NEWEST_TESTED).release:
        _warned = True
        warnings.warn(
            f"transformers {transformers.__version__} is newer than what kvpress was tested with; {TESTED}",
            stacklevel=4,
        )
