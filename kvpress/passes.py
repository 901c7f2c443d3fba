"""The forward pass in progress on this thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpress.errors import UnsupportedModelError
from kvpress.tokens import Ragged, Tokens

if TYPE_CHECKING:
    from kvpress.in_play import InPlay
    from kvpress.layer import KVLayer
    from kvpress.observe import Scores
    from kvpress.policy import Look, Pattern
    from kvpress.step import StepInputs


class Record:
    """What is told of each layer of the prompt passes within `recording`."""

    def attends(self, layer: int, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: "Scores") -> None:
        """A layer is about to attend.

        Args:
            layer: index among the layers that the policies act on.
            tokens: the tokens of the pass.
            query: [batch, heads, count, head_dim], rotated as the model does; key and value: [batch, kv_heads, count, head_dim].
            scores: how the model scores.
        """

    def planned(self, layer: int, rows: slice, pattern: "Pattern | None") -> None:
        """What the prefill policy has planned for some rows of the layer's pass; None for everything."""


@dataclass
class Pass:
    """One forward pass of a patched model.

    Attributes:
        modules: id of each attention module that the policies act on -> index of its layer.
        tokens: the new tokens.
        layers: the cache's layers that the policies act on; empty when the model runs without a cache.
        prompt: whether it is a prompt pass (several tokens, or the first of a cache) or a decode step.
        new_tokens: how many tokens the `generate` that runs was asked for, if one runs and that is known.
        exact: its rows are those of steps that are run once more to be exact: the prefill policy is not asked.
        step: what a decode step brings to its layers, once they are ready for it.
        last_layer: the layer in which a look ends: it raises `Looked`; see `kvpress.policy.Feed`.
        ragged: how the sequences lie in the row that the model runs on; None where each has a row of its own.
        in_play: which tokens each layer runs on, where they may stop in between; it sets `tokens` and `ragged` layer by layer.
        handed: of a prompt pass, what the prefill policy hands from layer to layer, by which rows it was for.
        attended: the layers that have attended so far.
        record: what is told of each layer, if prompts are being recorded.
        seen: if the layers are only looked at, where each leaves the query and key that it attends with; see `kvpress.probe`.
    """

    modules: dict[int, int]
    tokens: Tokens
    layers: "list[KVLayer]"
    prompt: bool
    new_tokens: int | None = None
    exact: bool = False
    step: "StepInputs | None" = None
    record: Record | None = None
    seen: dict[int, tuple[Tensor, Tensor]] | None = None
    last_layer: int | None = None
    ragged: Ragged | None = None
    in_play: "InPlay | None" = None
    handed: dict[Any, dict[str, Any]] = field(default_factory=dict)
    attended: set[int] = field(default_factory=set)

    def attend(self, layer: int, name: str) -> None:
        """Note that a layer attends, which it may do once in a pass.

        Raises:
            UnsupportedModelError: it did before, so that its cache would hold every token twice.
        """
        if layer in self.attended:
            raise UnsupportedModelError(
                f"{name} (layer {layer} of those that the policies act on) runs attention more than once in a pass; kvpress "
                "supports one run over each cache layer. Unpatch the model"
            )
        self.attended.add(layer)

    def check_attended(self) -> None:
        """Raise `UnsupportedModelError` unless every layer that the policies act on has attended."""
        if len(self.attended) < len(self.modules):
            missing = sorted(set(self.modules.values()) - self.attended)
            raise UnsupportedModelError(
                f"layers {missing} of those that the policies act on did not call the attention function in this pass, so their "
                "tokens are not in the cache; kvpress cannot act on this model. Unpatch it, and start a new cache"
            )

    def holds(self, layer: "KVLayer") -> bool:
        """Whether the layer belongs to the cache of this pass."""
        return layer.index < len(self.layers) and self.layers[layer.index] is layer


class Looked(Exception):
    """Ends a look in the layer that it was for: nothing is run of the layers behind."""

    def __init__(self, look: "Look") -> None:
        super().__init__("a look ends here")
        self.look = look


_thread = threading.local()


def active_pass() -> Pass | None:
    """The pass in progress on this thread, if any."""
    return getattr(_thread, "current", None)


def current_record() -> Record | None:
    """What is told of prompt passes on this thread, within `recording`."""
    return getattr(_thread, "record", None)


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Within the block `record` is told of the layers of each prompt pass on this thread."""
    before, _thread.record = current_record(), record
    try:
        yield
    finally:
        _thread.record = before


def expected_tokens() -> int | None:
    """How many tokens the `generate` that runs on this thread was asked for, if that is known."""
    return getattr(_thread, "expected", None)


def in_generate() -> bool:
    """Whether a `generate` runs on this thread, which itself counts the positions after the prompt's."""
    return getattr(_thread, "generates", 0) > 0


def expected_chunk() -> int | None:
    """In how many tokens at a time the `generate` that runs on this thread feeds a prompt; None for all at once."""
    return getattr(_thread, "chunk", None)


@contextmanager
def expecting(new_tokens: int | None, chunk: int | None = None) -> Iterator[None]:
    """Within the block a `generate` runs on this thread; `expected_tokens` and `expected_chunk` are what is given."""
    before = expected_tokens(), expected_chunk()
    _thread.expected, _thread.chunk = new_tokens, chunk
    _thread.generates = getattr(_thread, "generates", 0) + 1
    try:
        yield
    finally:
        _thread.expected, _thread.chunk = before
        _thread.generates -= 1


def wanted_rows() -> int | None:
    """How many of the last rows the model that runs on this thread was asked logits of, 0 for all; None if not known."""
    return getattr(_thread, "rows", None)


@contextmanager
def wanting(rows: int | None) -> Iterator[None]:
    """Within the block a model runs on this thread, and `wanted_rows` is `rows`."""
    before, _thread.rows = wanted_rows(), rows
    try:
        yield
    finally:
        _thread.rows = before


def set_pass(current: Pass | None) -> None:
    """Make `current` the pass in progress on this thread; None when there is none."""
    _thread.current = current
