"""Decode steps that are recorded once and replayed: on a GPU one launch for a whole step, attention and eviction in it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpress.compat import CACHE
from kvpress.passes import Pass, active_pass

# What a call may bring beside ids or embeddings and positions: none of it matters to a step.
LEFT_OUT = {"attention_mask", "use_cache", "cache_position", "return_dict"}


class Recording(Protocol):
    """What was done in a step, on the tensors of that step."""

    def replay(self) -> None:
        """Do it again, on what is in these tensors now."""


Record = Callable[[Callable[[], None]], Recording]
"""Calls a function and records what it does."""


class CudaGraph:
    """A CUDA graph of what a function does on the current device.

    Args:
        function: waits for nothing, and reads no number from the host that changes.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            function()

    def replay(self) -> None:
        """Do it again."""
        self._graph.replay()


class ReplayedSteps:
    """A decoder's `forward` whose decode steps are recorded, one recording for each kind of step, and replayed.

    A recording is of the tensors of one cache: a cache whose tensors are made anew (it grows, a prompt comes, beams change)
    is recorded anew, at the second step of a kind; the first runs as it is.

    Args:
        forward: the bound `forward` of the decoder.
        cache: the name under which it takes its cache.
        record: makes a recording.
    """

    def __init__(self, forward: Any, cache: str, record: Record = CudaGraph) -> None:
        self.forward = forward
        self._cache = cache
        self._record = record

    def takes(self, current: Pass, kwargs: dict[str, Any]) -> bool:
        """Whether a decode step that is called so can be replayed."""
        return not torch.is_grad_enabled()

    def __call__(self, **kwargs: Any) -> Any:
        current, cache = active_pass(), kwargs.get(self._cache)
        if current is None or current.prompt or current.step is None or current.step.slots is None:
            return self.forward(**kwargs)
        layers, step = current.layers, current.step
        inputs = step_inputs(current, {name: value for name, value in kwargs.items() if name != self._cache})
        if inputs is None:
            return self.forward(**kwargs)
        first = layers[0]
        known = all(layer.step in layer.known for layer in layers)
        for layer in layers:
            assert layer.step is not None
            layer.known.add(layer.step)
        if not known:  # what policies keep from step to step is made in the first
            first.recordings.clear()
            return self.forward(**kwargs)
        told = {"number": step.number, "slots": step.slots, "new_tokens": step.new_tokens}
        now = {**inputs, "positions": step.tokens.positions, "seen": step.tokens.seen_tensor}
        now |= {name: value for name, value in told.items() if isinstance(value, Tensor)}
        kind = (*(layer.step for layer in layers), *((name, x.shape, x.dtype) for name, x in now.items()))
        if kind not in first.recordings:
            first.recordings[kind] = self._recorded(current, {name: x.clone() for name, x in now.items()}, inputs)
        recording, held, output = first.recordings[kind]
        for name, tensor in held.items():
            tensor.copy_(now[name])
        recording.replay()
        current.attended.update(range(len(layers)))
        result = type(output)(**{name: x.clone() if isinstance(x, Tensor) else x for name, x in output.items()})
        result[CACHE] = cache
        return result

    def _recorded(self, current: Pass, held: dict[str, Tensor], inputs: dict[str, Tensor]) -> Any:
        """A recording of the step, the tensors that it reads, and its output."""
        step, outputs = current.step, []
        assert step is not None
        tokens = replace(step.tokens, positions=held["positions"], seen_tensor=held["seen"], turns={})
        current.step = replace(
            step,
            tokens=tokens,
            number=held["number"],
            slots=held["slots"],
            new_tokens=held.get("new_tokens"),
            shared={},
        )
        given = {name: held[name] for name in inputs}

        def run() -> None:
            current.attended.clear()
            outputs.append(self.forward(**given, use_cache=False, **{self._cache: None}))

        return self._record(run), held, outputs[-1]


def step_inputs(current: Pass, kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that a step needs of a call's arguments; None for a call that is run as it is."""
    if kwargs.get("return_dict") is False:
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
    return inputs
