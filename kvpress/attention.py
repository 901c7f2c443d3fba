"""The attention and mask functions that a patched model calls, registered with transformers under one name each."""

import sys
from typing import Any

import torch
from torch import Tensor

from kvpress.compat import AttentionInterface, AttentionMaskInterface, causal_mask_function
from kvpress.contexts import no_autocast
from kvpress.errors import PolicyError
from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.passes import Looked, Pass, active_pass
from kvpress.policy import Look
from kvpress.prompt import exact_pass, prompt_pass
from kvpress.step import StepInputs, decode_step

NAME = "kvpress"


class Tracing:
    """What the attention of a layer that is being compiled cannot get from its arguments; set within what is compiled."""

    layer: KVLayer | None = None
    inputs: StepInputs | None = None


TRACING = Tracing()


class Switched(str):
    """Our name as a config's attention implementation. A copy of the config gets the name that was there before."""

    original: str

    def __new__(cls, original: str) -> "Switched":
        switched = super().__new__(cls, NAME)
        switched.original = original
        return switched

    def __reduce__(self) -> Any:
        return str, (self.original,)


class Originals:
    """What each patched config's attention implementation was, and how many patched models use the config."""

    def __init__(self) -> None:
        self._by_config: dict[int, tuple[Any, str, int]] = {}

    def switch(self, config: Any) -> None:
        """Switch a config to our implementation."""
        _, name, users = self._by_config.get(id(config), (config, config._attn_implementation, 0))
        self._by_config[id(config)] = (
            config,
            name,
            users + 1,
        )  # holding the config keeps its id from being reused
        config._attn_implementation = Switched(name)

    def restore(self, config: Any) -> None:
        """Undo one `switch`; the last one puts the implementation back."""
        _, name, users = self._by_config.pop(id(config))
        if users > 1:
            self._by_config[id(config)] = config, name, users - 1
        else:
            config._attn_implementation = name

    def name(self, config: Any) -> str:
        """The implementation that the config had."""
        if id(config) not in self._by_config:
            raise PolicyError(
                "attention implementation 'kvpress' is set on a model that is not patched; call kvpress.patch(model, policy), "
                "or model.set_attn_implementation('sdpa')"
            )
        return self._by_config[id(config)][1]


originals = Originals()


def register() -> None:
    """Make the two functions known to transformers. Idempotent; changes no model."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, mask_function: Any = causal_mask_function, config: Any = None, **kwargs: Any) -> Any:
    """No mask for the layers we attend (padding is an empty slot, causality is structural); the original elsewhere.

    Elsewhere is a layer that the policies leave alone, another model that shares the config, and a model around the decoder
    (for images and text) that makes the masks before it calls the decoder, which takes the padding out of them.
    """
    compiling = torch.compiler.is_compiling()
    current = None if compiling else active_pass()  # what is compiled cannot ask for it
    if mask_function is causal_mask_function and (compiling or current is not None):
        return None
    if current is not None and current.ragged is not None:
        return None  # without a cache transformers itself tells the sequences of a row apart
    original = AttentionMaskInterface().get(originals.name(config))
    return None if original is None else original(*args, mask_function=mask_function, config=config, **kwargs)


def causal_padding(mask: Tensor) -> Tensor:
    """The padding mask that a causal mask was made with.

    Args:
        mask: [batch, 1, rows, tokens], True or 0 where a row sees a token.

    Returns:
        bool [batch, tokens].

    Raises:
        PolicyError: the mask is not causal.
    """
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    real = sees[:, -1]  # the last row sees all that are
    rows, tokens = sees.shape[1:]
    places = torch.arange(tokens, device=mask.device)
    causal = places <= places[tokens - rows :, None]
    differs = (sees != (causal & real[:, None])) & real[:, tokens - rows :, None]  # a row of padding may see anything
    if bool(differs.any()):
        raise PolicyError(
            "the attention mask that came with this input is not just causal (the tokens of an image see each other in both "
            "directions, or a mask of your own); kvpress attends causally. Give text alone, or unpatch the model"
        )
    return real


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend a layer of a patched model: by its policies, or, for a layer they leave alone, as the model did before.

    Args:
        module: the attention module.
        query: [batch, heads, q, head_dim].
        key, value: [batch, kv_heads, q, head_dim], the new tokens only (a layer left alone gets what its cache returns).

    Returns:
        [batch, q, heads, head_dim] and None.
    """
    if torch.compiler.is_compiling() and TRACING.layer is not None:
        assert TRACING.inputs is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
        return decode_step(TRACING.layer, query, key, value, scores, TRACING.inputs).transpose(1, 2), None
    current = active_pass()
    index = None if current is None else current.modules.get(id(module))
    if current is None or index is None:
        default = sys.modules[type(module).__module__].eager_attention_forward
        name = originals.name(module.config)
        function = default if name == "eager" else AttentionInterface().get(name, default)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    current.attend(index, type(module).__name__)
    ragged = current.ragged
    if ragged is not None:
        query, key, value = (ragged.apart(x, dim=2) for x in (query, key, value))
    if index == current.last_layer:
        raise Looked(Look(query, key))
    if current.seen is not None:  # a probe: what one token alone attends to is its own value
        current.seen[index] = query, key
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None
    for refused in ("position_bias", "sliding_window"):
        if kwargs.get(refused) is not None:
            raise PolicyError(
                f"{type(module).__name__} passes {refused}, which kvpress does not support; unpatch the model"
            )
    if attention_mask is not None:
        raise PolicyError(
            f"{type(module).__name__} was given an attention mask that is not just causal, made by the model itself (tokens that "
            "see each other in both directions, or sequences packed into one row); kvpress attends causally"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if not current.layers:  # no cache: every policy leaves a single pass exact
        with no_autocast(query.device):
            rows, key = (x if x.dtype == value.dtype else x.to(value.dtype) for x in (query, key))
            output = exact_pass(rows, key, value, current.tokens, scores).to(query.dtype)
    else:
        output = _attend(query, key, value, scores, current, index)
        if query.requires_grad:
            output = _NoBackward.apply(output, query)
    output = output.transpose(1, 2)
    return (output.contiguous() if ragged is None else ragged.joined(output)), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass, index: int) -> Tensor:
    """A layer's part of a pass with a cache; the output in the dtype of the query."""
    layer = current.layers[index]
    if not current.prompt:
        assert current.step is not None
        return decode_step(layer, query, key, value, scores, current.step)
    with torch.no_grad(), no_autocast(query.device):
        # Within `torch.autocast` query, key and value may have different dtypes, and others than in the passes before.
        dtype = layer.dtype if layer.is_initialized else value.dtype
        rows, key, value = (x if x.dtype == dtype else x.to(dtype) for x in (query, key, value))
        return prompt_pass(layer, current.tokens, rows, key, value, scores, current).to(query.dtype)


class _NoBackward(torch.autograd.Function):
    """Lets a forward pass outside `torch.no_grad` through and refuses its backward, which would miss the cache."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise PolicyError(
            "a kvpress cache carries no gradients; run with use_cache=False (exact attention) or unpatch the model to train"
        )
