"""The same results of a patched model's linear layers and MLPs, in less time and memory.

These are no policies: they act under every policy, Full too, and leave the attention alone.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from kvpress.hooks import hooks_inside, watching
from kvpress.linear import PLAIN, choose_forwards, is_chosen
from kvpress.support import is_spread

# Tokens of a prompt that go through an MLP at a time.
MLP_TOKENS = {"cpu": 512}
MLP_TOKENS_ELSEWHERE = 8192


def replace_forwards(model: nn.Module, decoder: nn.Module) -> None:
    """Let the model's linear layers run in the form that is fastest here, and its MLPs in tiles, until `restore_forwards`.

    A model that is spread over devices or processes stays as it is. A deep copy of the model has them too, as its own.
    """
    if is_spread(model, decoder):
        return
    for layer, forward in choose_forwards(module for module in model.modules() if type(module) is nn.Linear).items():
        _replace(layer, forward)
    for module in decoder.modules():
        mlp = getattr(module, "mlp", None)
        if mlp is not None and _acts_on_each_token(mlp):
            _replace(mlp, mlp_in_tiles)


def restore_forwards(model: nn.Module) -> None:
    """Undo `replace_forwards`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, MethodType) and (forward.__func__ is mlp_in_tiles or is_chosen(forward.__func__)):
            del module.forward


def _replace(module: nn.Module, function: Callable[..., Any]) -> None:
    own = MethodType(type(module).forward, module)  # a model from a file that was written while it was patched has it
    if module.__dict__.get("forward", own) == own:  # else somebody wrapped it
        module.forward = MethodType(function, module)


def _acts_on_each_token(mlp: nn.Module) -> bool:
    """Whether a module is a plain MLP of transformers: one input, no experts (whose routers report what they chose)."""
    inputs = list(inspect.signature(type(mlp).forward).parameters)[1:]
    experts = any(hasattr(mlp, name) for name in ("router", "experts", "gate"))
    return type(mlp).__name__.endswith("MLP") and len(inputs) == 1 and not experts


def mlp_in_tiles(self: nn.Module, hidden: Tensor) -> Tensor:
    """An MLP that a long prompt goes through some tokens at a time, as its intermediate states are a prompt's peak of memory.

    Args:
        hidden: [batch, tokens, hidden_size].

    Returns:
        [batch, tokens, hidden_size].
    """
    whole = type(self).forward
    if hidden.dim() != 3 or hidden.shape[1] == 1:
        return whole(self, hidden)
    tile = max(1, MLP_TOKENS.get(hidden.device.type, MLP_TOKENS_ELSEWHERE) // max(1, hidden.shape[0]))
    if hidden.shape[1] <= tile or torch.is_grad_enabled() or self.training:
        return whole(self, hidden)
    if watching(hooks_inside(self)) or _is_quantised(self):  # a hook expects to see all tokens at once
        return whole(self, hidden)
    first = whole(self, hidden[:, :tile])
    output = first.new_empty(hidden.shape)  # within `torch.autocast` not in the dtype of `hidden`
    output[:, :tile] = first
    for start in range(tile, hidden.shape[1], tile):
        output[:, start : start + tile] = whole(self, hidden[:, start : start + tile])
    return output


def _is_quantised(module: nn.Module) -> bool:
    """Whether some weights are not plain numbers of 16 bits or more: a scale for the input may be that of all its tokens."""
    if any(type(weight) not in PLAIN or weight.element_size() < 2 for weight in module.parameters()):
        return True
    return any(type(child).__module__.startswith("torch.ao.") for child in module.modules())


# A method is pickled as its owner and its name: a model that is read from a file gets the `forward` of its class.
mlp_in_tiles.__name__ = "forward"
