"""The attention and mask functions that a patched model calls, registered with transformers under one name each."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from kvpress.errors import PolicyError
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.prompt_attention import prompt_attention
from kvpress.kernels.rope_shift import rope_shift
from kvpress.layer import KVLayer
from kvpress.passes import Pass, Scores, Tokens, active_pass

NAME = "kvpress"


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
        config._attn_implementation = NAME

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
    """No mask for the layers we attend (padding is an empty slot, causality is structural); the original for others."""
    if active_pass() is not None and mask_function is causal_mask_function:
        return None
    original = AttentionMaskInterface().get(originals.name(config))
    return None if original is None else original(*args, mask_function=mask_function, config=config, **kwargs)


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
    current = active_pass()
    index = None if current is None else current.modules.get(id(module))
    if current is None or index is None:
        default = sys.modules[type(module).__module__].eager_attention_forward
        name = originals.name(module.config)
        function = default if name == "eager" else AttentionInterface().get(name, default)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for refused in ("position_bias", "sliding_window"):
        if kwargs.get(refused) is not None:
            raise PolicyError(
                f"{type(module).__name__} passes {refused}, which kvpress does not support; unpatch the model"
            )
    if attention_mask is not None:
        raise PolicyError("a custom attention mask cannot be used on a patched model; pass a 2-D padding mask, or none")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if not current.layers:  # no cache: every policy leaves a single pass exact
        output = _exact(query, key, value, current.tokens, scores)
        return output.transpose(1, 2).contiguous(), None
    layer, tokens = current.layers[index], current.tokens
    with torch.no_grad():
        step = _prompt if current.prompt else _decode
        output = step(layer, tokens, query, key, value, scores, current)
    if query.requires_grad:
        output = _NoBackward.apply(output, query)
    return output.transpose(1, 2).contiguous(), None


def _exact(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, scores: Scores) -> Tensor:
    """Causal attention of one pass without a cache; each padded sequence alone."""
    if tokens.columns is None:
        return prompt_attention(query, key, value, **vars(scores))[0]
    output = torch.zeros_like(query[..., : value.shape[-1]])
    for row, columns in enumerate(tokens.columns):
        only, columns = slice(row, row + 1), columns.to(query.device)
        if len(columns):
            row_query, row_key, row_value = (x[only, :, columns] for x in (query, key, value))
            output[only, :, columns] = prompt_attention(row_query, row_key, row_value, **vars(scores))[0]
    return output


def _prompt(
    layer: KVLayer, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass
) -> Tensor:
    past = layer.length
    layer.append(key, value, tokens)
    observed = layer.policy is not None and layer.policy.observes == "every row"
    valid = layer.valid(past)
    moved = _moved(layer, query, past, current)
    if tokens.columns is None:
        keys, values = layer.used()
        output, mass = prompt_attention(query, keys, values, valid, **vars(scores), moved=moved, with_mass=observed)
        if mass is not None:
            layer.observe(mass)
    else:  # each padded sequence alone: nothing is computed for padding, and no mask is needed
        output = torch.zeros_like(query[..., : value.shape[-1]])
        for row, columns in enumerate(tokens.columns):
            only, columns = slice(row, row + 1), columns.to(query.device)
            if not len(columns):
                continue
            keys, values = layer.used(row, past + len(columns))
            row_valid = None if valid is None else valid[only]
            row_moved = None if moved is None else (moved[0][only, :, columns], moved[1][only])
            output[only, :, columns], mass = prompt_attention(
                query[only, :, columns],
                keys,
                values,
                row_valid,
                **vars(scores),
                moved=row_moved,
                with_mass=observed,
            )
            if mass is not None:
                layer.observe(mass, row)
    if layer.policy is not None:
        if layer.policy.observes == "window":
            layer.remember(query, tokens, scores)
        layer.close_prompt(tokens)
    return output


def _decode(
    layer: KVLayer, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass
) -> Tensor:
    layer.settle()
    layer.append(key, value, tokens)
    observed = layer.policy is not None and layer.policy.observes == "every row"
    keys, values = layer.used()
    moved = _moved(layer, query, layer.length, current)
    output, mass = decode_attention(
        query, keys, values, layer.valid(layer.length), **vars(scores), moved=moved, with_mass=observed
    )
    layer.facts.read += layer.length
    layer.facts.readable += layer.facts.seen
    if layer.policy is not None:
        if mass is not None:
            layer.observe(mass)
        layer.evict_step()
    return output


def _moved(layer: KVLayer, query: Tensor, past: int, current: Pass) -> tuple[Tensor, Tensor] | None:
    """The query for entries that are attended at other positions than their own, and which those are.

    The recent entries that a re-indexing policy keeps stand side by side up to the query, so their distances are right as
    they are; the sinks before them must come nearer by the gap between. Rotating the query back by the gap does that.
    """
    sinks = 0 if layer.policy is None else layer.policy.reindexed_sinks
    if sinks == 0 or past == 0 or layer.facts.tokens is None:
        return None
    rotary = current.rotary[layer.index]
    if layer.uniform and layer.tokens is not None:
        gap = layer.tokens[0] - layer.entries
        if gap == 0:
            return None
        shift = torch.full((query.shape[0],), -gap, dtype=torch.float32, device=query.device)
    else:
        held = (layer.positions[:, 0, : layer.length] >= 0).sum(-1)
        shift = (held - layer.facts.tokens.to(held.device)).float()
    positions = layer.positions[:, :, :past]
    return rope_shift(query, shift, rotary.inv_freq, rotary.interleaved), (positions >= 0) & (positions < sinks)


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
