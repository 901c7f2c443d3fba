"""The same results of a patched model's linear layers and MLPs, in less time and memory.

These are no policies: they act under every policy, Full too, and leave the attention alone.
"""

import inspect
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpress.hooks import hooks_inside, watching
from kvpress.support import is_spread

# On a CPU torch multiplies so few float32 rows by a weight matrix on one thread (MKL). See benchmarks/forwards.py.
FEW_ROWS = 32
# Outputs of one part of a split matrix, at least; parts, at most; and numbers of a matrix that is worth splitting.
PART_OUTPUTS, PARTS, SPLIT_SIZE = 32, 64, 1 << 16
# Tokens of a prompt that go through an MLP at a time.
MLP_TOKENS = {"cpu": 512}
MLP_TOKENS_ELSEWHERE = 8192
# Tensors that are nothing but numbers. Others (quantised, split over processes) know their own products.
PLAIN = (Tensor, nn.Parameter)


def replace_forwards(model: nn.Module, decoder: nn.Module) -> None:
    """Let the model's linear layers and MLPs run through this file, until `restore_forwards`.

    A model that is spread over devices or processes stays as it is. A deep copy of the model has them too, as its own.
    """
    if is_spread(model, decoder):
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SPLIT_SIZE:
            _replace(module, linear_of_few_rows)
    for module in decoder.modules():
        mlp = getattr(module, "mlp", None)
        if mlp is not None and _acts_on_each_token(mlp):
            _replace(mlp, mlp_in_tiles)


def restore_forwards(model: nn.Module) -> None:
    """Undo `replace_forwards`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, MethodType) and forward.__func__ in (linear_of_few_rows, mlp_in_tiles):
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


def linear_of_few_rows(self: nn.Linear, input: Tensor) -> Tensor:
    """A linear layer whose weight matrix is split over threads, for a float32 decode step on a CPU.

    Args:
        input: [..., in_features].

    Returns:
        [..., out_features].
    """
    weight, rows = self.weight, input.shape[:-1].numel()
    splits = (
        0 < rows <= FEW_ROWS
        and type(weight) in PLAIN
        and type(input) in PLAIN
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )
    if not splits:
        return functional.linear(input, weight, self.bias)
    parts = math.gcd(weight.shape[0], PARTS)
    while parts > 1 and weight.shape[0] // parts < PART_OUTPUTS:
        parts //= 2
    # Matrices of a batch are on a thread each.
    split = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
    output = torch.bmm(input.reshape(1, rows, -1).expand(parts, -1, -1), split)
    output = output.transpose(0, 1).reshape(*input.shape[:-1], -1)
    return output if self.bias is None else output + self.bias


def mlp_in_tiles(self: nn.Module, hidden: Tensor) -> Tensor:
    """An MLP that a long prompt goes through some tokens at a time, as its intermediate states are a prompt's peak of memory.

    Args:
        hidden: [batch, tokens, hidden_size].

    Returns:
        [batch, tokens, hidden_size].
    """
    whole = type(self).forward
    tile = max(1, MLP_TOKENS.get(hidden.device.type, MLP_TOKENS_ELSEWHERE) // max(1, hidden.shape[0]))
    if hidden.dim() != 3 or hidden.shape[1] <= tile or torch.is_grad_enabled() or self.training:
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
linear_of_few_rows.__name__ = mlp_in_tiles.__name__ = "forward"
