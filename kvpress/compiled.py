"""Decode steps of a patched model in compiled graphs: each decoder layer is one, attention, selection and eviction in it."""

import os
import shutil
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import InductorError

from kvpress.attention import TRACING
from kvpress.compat import Cache, DynamicCache
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.hooks import hooks_inside, suspended, watching
from kvpress.layer import KVLayer
from kvpress.passes import Pass, active_pass
from kvpress.step import StepInputs
from kvpress.support import find_attention, is_spread
from kvpress.wrapper import Wrapper


class CompiledSteps:
    """A decoder's `forward` whose layers run in compiled graphs in decode steps.

    A graph gets a cache's layer as what it is made of: tensors, which it changes in place. What the host knows of a step
    (`kvpress.layer.Step`) is a constant of a graph, so there is one for each kind of step: while the cache grows, when it is
    full, when entries go. Layers that do the same share a graph, and how many slots there are is not a constant of it.

    The first step of a kind after a prompt runs as it is, as policies make there what they keep from step to step. So does
    every step, with one warning, while somebody has a hook on a module inside: a graph would call it when it is made and
    never again. So does a step for which torch makes no further graph.

    Args:
        decoder: the module that owns the layers.
        forward: its bound `forward`.
        backend, mode: as in `torch.compile`.
    """

    def __init__(self, decoder: Any, forward: Any, backend: Any, mode: str | None) -> None:
        self.forward = forward
        self.decoder_name = type(decoder).__name__
        self._hooks = hooks_inside(decoder)
        self._told: set[str] = set()
        self._without: set[Any] = set()  # kinds of step for which torch makes no graph
        self._run = torch.compile(run_layer, fullgraph=True, backend=backend, mode=mode)
        # One that somebody has wrapped runs as it is.
        self.layers = [CompiledLayer(self, module) for module in layers_of(decoder) if "forward" not in vars(module)]

    def remove(self, decoder: Any) -> None:
        """Give the decoder's layers their own `forward` back."""
        for module in decoder.modules():
            for wrapper in self.layers:
                if vars(module).get("forward") is wrapper:
                    wrapper.remove(module)

    def takes(self, current: Pass, kwargs: dict[str, Any]) -> bool:
        """Whether a decode step that is called so can run in graphs."""
        if torch.is_grad_enabled() or wants_more(self.forward.__self__, kwargs):
            return False
        watchers = watching(self._hooks)
        if watchers:
            self.warn(
                "hooks",
                f"hooks inside {self.decoder_name} ({len(watchers)}, as {watchers[0]!r}) must be called in each decode step, so "
                "decode steps run uncompiled until they are removed",
            )
        return not watchers

    def __call__(self, **kwargs: Any) -> Any:
        current = active_pass()
        if current is not None and current.prompt:
            self._hooks = hooks_inside(self.forward.__self__)  # a module may have been replaced
        if current is None or current.step is None or current.step.slots is None:
            return self.forward(**kwargs)
        with suspended(self._hooks):  # those that transformers has left, which have nothing to do
            return self.forward(**kwargs)

    def run(self, module: Any, current: Pass, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decoder layer's part of a step, in its graph.

        Raises:
            UnsupportedModelError: torch makes no graph of it.
        """
        layer, inputs = current.layers[index], current.step
        kind = layer.step
        assert kind is not None and inputs is not None
        if kind not in layer.known or kind in self._without:
            layer.known.add(kind)
            return type(module).forward(module, *args, **kwargs)
        for buffer, dim in layer.storage.slot_dims():
            torch._dynamo.maybe_mark_dynamic(buffer, dim)
        # One graph for callers in inference mode and out of it: torch makes another for tensors that were made inside.
        args, kwargs = tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}
        try:
            output = self._run(module, layer, inputs.of_layer(index), args, kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # raised before anything of the step is done
            self._without.add(kind)
            self.warn(
                "graphs",
                f"torch makes at most {torch._dynamo.config.recompile_limit} graphs of one function, for all batch sizes, dtypes, "
                "kinds of step and models in this process, so some decode steps run uncompiled; raise "
                "torch._dynamo.config.recompile_limit",
            )
            return type(module).forward(module, *args, **kwargs)
        except InductorError as error:  # the compiler's own fault, likewise
            self._without.add(kind)
            reason = str(error).strip().splitlines()[0]
            self.warn(
                "compiler",
                f"torch's compiler failed on a step of {type(module).__name__} ({reason}), so such steps run uncompiled",
            )
            return type(module).forward(module, *args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(
                f"a step of {type(module).__name__} is not one graph for torch.compile ({reason}); patch the model without "
                "compile=True"
            ) from error
        current.attend(index, type(module).__name__)
        return output

    def warn(self, kind: str, what: str) -> None:
        """Warn once of each kind."""
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(what, stacklevel=2)


class CompiledLayer(Wrapper):
    """A decoder layer's `forward` that runs in a compiled graph in the decode steps that are compiled."""

    def __init__(self, steps: CompiledSteps, module: Any) -> None:
        super().__init__(module, "forward")
        self._steps = steps
        self._inside = [id(child) for child in module.modules()]
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        current = active_pass()
        if not self.active or current is None or current.step is None or current.step.slots is None:
            return self.inner(*args, **kwargs)
        index = next(current.modules[one] for one in self._inside if one in current.modules)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return self._steps.run(self._module, current, index, args, kwargs)


def wants_more(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for what is inside (hidden states, router logits): transformers takes that by hooks."""
    asked = {name for name, value in kwargs.items() if name.startswith("output_") and value}
    return bool(asked) or any(
        getattr(decoder.config, f"output_{name}", False) for name in ("hidden_states", "router_logits")
    )


def run_layer(module: Any, layer: KVLayer, inputs: StepInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled: a decoder layer without a cache, whose attention finds ours in `TRACING`."""
    TRACING.layer, TRACING.inputs = layer, inputs
    output = type(module).forward(module, *args, **kwargs)
    TRACING.layer = TRACING.inputs = None
    return output


def plain(value: Any) -> Any:
    """An argument of a compiled layer, not as one that was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def layers_of(decoder: Any) -> list[Any]:
    """The modules that hold an attention module which the policies act on, in order."""
    owners = {id(child): module for module in decoder.modules() for child in module.children()}
    return [owners[id(attention)] for attention in find_attention(decoder).values()]


def check_compiles(model: Any, decoder: Any, backend: Any = "inductor", mode: str | None = None) -> None:
    """Raise an error if a step of the model cannot be one graph, or `backend` could not build it.

    Raises:
        PolicyError: there is no compiler for the backend, or it has no such mode.
        UnsupportedModelError: the model is spread over devices, or has layers that the policies leave alone and is to be
            replayed.
    """
    name = type(model).__name__
    others = len(DynamicCache(config=decoder.config).layers) - len(find_attention(decoder))
    if others and backend == "replay":
        raise UnsupportedModelError(
            f"{name} has {others} layers that the policies leave alone, and a step that is replayed knows no cache but theirs; use "
            "another backend"
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
