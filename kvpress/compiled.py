"""Decode steps of a patched model as one compiled graph, attention, selection and eviction in it."""

import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor

from kvpress.attention import COMPILED_LAYER, TRACING
from kvpress.compat import CACHE, DynamicCache
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.hooks import hooks_inside, watching
from kvpress.layer import KVLayer
from kvpress.passes import Pass, active_pass
from kvpress.step import StepInputs
from kvpress.support import find_attention, is_spread

# What a call may bring beside ids or embeddings and positions: none of it matters to the graph of a step.
LEFT_OUT = {"attention_mask", "use_cache", "cache_position", "return_dict"}


class CompiledSteps:
    """A decoder's `forward` that runs decode steps in a compiled graph, and all other passes as they are.

    The graph gets the cache's layers as what they are made of: tensors, which it changes in place. What the host knows of a
    step (`kvpress.layer.Step`) is a constant of a graph, so there is one for each kind of step: while the cache grows, when
    it is full, when entries go. How many slots there are is not among them: a graph serves every number.

    The first step of a kind after a prompt runs as it is, as policies make there what they keep from step to step. So does
    every step, with one warning, while somebody has a hook on a module inside: a graph would call it when it is made and
    never again. So does a step for which torch makes no further graph.

    Args:
        forward: the bound `forward` of the decoder.
        cache: the name under which it takes its cache.
        backend, mode: as in `torch.compile`.
    """

    def __init__(self, forward: Any, cache: str, backend: Any, mode: str | None) -> None:
        self.forward = forward
        self._cache = cache
        self._step = torch.compile(self._traced, fullgraph=True, backend=backend, mode=mode)
        self._hooks = hooks_inside(forward.__self__)
        self._without: set[Any] = set()  # kinds of step for which torch makes no graph
        self._told: set[str] = set()

    def _traced(self, layers: list[KVLayer], step: StepInputs, inputs: dict[str, Tensor]) -> Any:
        TRACING.layers = layers
        TRACING.inputs = StepInputs(step.tokens, step.number, step.new_tokens, step.slots, {})
        output = self.forward(**inputs, use_cache=False, **{self._cache: None})
        TRACING.layers = TRACING.inputs = None
        return output

    def takes(self, current: Pass, kwargs: dict[str, Any]) -> bool:
        """Whether a decode step that is called so can run in a graph."""
        others = {name: value for name, value in kwargs.items() if name != self._cache}
        if step_inputs(current, others) is None:
            return False
        watchers = watching(self._hooks)
        if watchers:
            self._warn(
                "hooks",
                f"hooks inside {type(self.forward.__self__).__name__} ({len(watchers)}, as {watchers[0]!r}) must be called in each "
                "decode step, so decode steps run uncompiled until they are removed",
            )
        return not watchers

    def __call__(self, **kwargs: Any) -> Any:
        current, cache = active_pass(), kwargs.get(self._cache)
        if current is None or current.prompt or current.step is None or current.step.slots is None:
            if current is not None and current.prompt:
                self._hooks = hooks_inside(self.forward.__self__)  # a module may have been replaced
            return self.forward(**kwargs)
        inputs = step_inputs(current, {name: value for name, value in kwargs.items() if name != self._cache})
        assert inputs is not None
        kinds = tuple(layer.step for layer in current.layers)
        shapes = (kinds, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        known = all(layer.step in layer.known for layer in current.layers)
        if not known or shapes in self._without:
            output = self.forward(**kwargs)
            for layer in current.layers:
                assert layer.step is not None
                layer.known.add(layer.step)
            return output
        for layer in current.layers:
            mark_slots(layer)
        try:
            output = self._step(current.layers, current.step, inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # raised before anything of the step is done
            self._without.add(shapes)
            self._warn(
                "graphs",
                f"torch makes at most {torch._dynamo.config.recompile_limit} graphs of one function, for all batch sizes, dtypes, "
                "kinds of step and models in this process, so some decode steps run uncompiled; raise "
                "torch._dynamo.config.recompile_limit",
            )
            return self.forward(**kwargs)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(
                f"a step of {type(self.forward.__self__).__name__} is not one graph for torch.compile ({reason}); patch the model "
                "without compile=True"
            ) from error
        current.attended.update(range(len(current.layers)))
        output[CACHE] = cache
        return output

    def _warn(self, kind: str, what: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(what, stacklevel=2)


def mark_slots(layer: KVLayer) -> None:
    """Tell torch that a layer's number of slots is no constant."""
    for buffer, dim in layer.storage.slot_dims():
        torch._dynamo.maybe_mark_dynamic(buffer, dim)


def step_inputs(current: Pass, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that a compiled step needs of a call's arguments; None for a call that is run as it is."""
    if current.prompt or not current.layers or torch.is_grad_enabled() or kwargs.get("return_dict") is False:
        return None
    given = {name: value for name, value in kwargs.items() if name not in LEFT_OUT}
    inputs = {name: value for name, value in given.items() if value is not None and value is not False}
    if any(not isinstance(value, Tensor) for value in inputs.values()):
        return None
    positions = current.tokens.positions
    if "position_ids" not in inputs:
        if kwargs.get("attention_mask") is not None:
            return None  # a model may count positions by its mask
        inputs["position_ids"] = torch.tensor([[current.layers[0].texts.columns]], device=positions.device)
    # Without a mask transformers looks in the positions for sequences that are packed in one.
    inputs["attention_mask"] = torch.ones(len(current.tokens.seen_tensor), 1, dtype=torch.bool, device=positions.device)
    # One graph for callers in inference mode and out of it: torch makes another for tensors that were made inside.
    return {name: value.clone() if value.is_inference() else value for name, value in inputs.items()}


def check_compiles(model: Any, decoder: Any, backend: Any = "inductor", mode: str | None = None) -> None:
    """Raise an error if a step of the model cannot be one graph, or `backend` could not build it.

    Raises:
        PolicyError: there is no compiler for the backend, or it has no such mode.
        UnsupportedModelError: there are layers that the policies leave alone, or the model is spread over devices.
    """
    name = type(model).__name__
    others = len(DynamicCache(config=decoder.config).layers) - len(find_attention(decoder))
    if others:
        raise UnsupportedModelError(
            f"{name} has {others} layers that the policies leave alone, and a compiled step knows no cache but theirs; leave "
            "compile out"
        )
    if is_spread(model, decoder):
        raise UnsupportedModelError(
            f"{name} is spread over devices or processes, or offloaded (device_map, tp_plan, cpu_offload), which is not one graph; "
            "leave compile out"
        )
    if mode is not None:
        known = [*torch._inductor.list_mode_options()]
        if backend != "inductor" or mode not in known:
            raise PolicyError(f"mode={mode!r} with backend={backend!r}: 'inductor' alone has modes, {', '.join(known)}")
    on_cpu = next(decoder.parameters()).device.type == "cpu"
    if backend == "replay" and not next(decoder.parameters()).is_cuda:
        raise PolicyError(
            f"backend='replay' records CUDA graphs, and {name} is on {next(decoder.parameters()).device}; use another backend"
        )
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++"]
    if backend == "inductor" and on_cpu and not any(shutil.which(name) for name in names):
        raise PolicyError(
            f"compile=True builds C++ code on a CPU, and there is no compiler ({' or '.join(names)}); install one (Debian: "
            "apt install g++), or leave compile out"
        )


def mark_layers(decoder: Any) -> None:
    """Tell each attention module which of the layers that the policies act on it is: what is compiled cannot look it up."""
    for index, module in enumerate(find_attention(decoder).values()):
        setattr(module, COMPILED_LAYER, index)


def unmark_layers(decoder: Any) -> None:
    """Undo `mark_layers`, if it was called."""
    for module in decoder.modules():
        vars(module).pop(COMPILED_LAYER, None)
