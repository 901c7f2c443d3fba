"""The forward pass in progress on this thread, and the tokens it brings."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from kvpress.layer import KVLayer
    from kvpress.step import StepInputs


@dataclass(frozen=True)
class Tokens:
    """The new tokens of one pass, the same for every layer.

    Attributes:
        count: columns fed, padding included.
        padded: some of them may be padding.
        positions: int32 [batch, count], the position of each token among its sequence's real ones, -1 for padding.
        columns: for a padded prompt pass, the columns of each sequence's real tokens, int64 [real] each; else None.
        seen: real tokens per sequence after the pass; None where only the device knows (a decode step with a mask).
        seen_tensor: int32 [batch], the same on the device.
        turns: rotations of vectors at these positions, worked out once for all layers, see `kvpress.places`.
    """

    count: int
    padded: bool
    positions: Tensor
    columns: list[Tensor] | None
    seen: list[int] | None
    seen_tensor: Tensor
    turns: dict[Any, Any] = field(default_factory=dict, compare=False)


def plain_tokens(batch: int, count: int, before: list[int] | None, before_tensor: Tensor | None, device: Any) -> Tokens:
    """The tokens of a pass without padding, after `before` real tokens per sequence (None for a new cache)."""
    if before_tensor is None:
        before, before_tensor = [0] * batch, torch.zeros(batch, dtype=torch.int32, device=device)
    positions = before_tensor[:, None]
    if count > 1:
        positions = positions + torch.arange(count, dtype=torch.int32, device=device)
    seen = None if before is None else [number + count for number in before]
    return Tokens(count, before is None, positions, None, seen, before_tensor + count)


def masked_tokens(new: Tensor, before: list[int] | None, before_tensor: Tensor | None, prompt: bool) -> Tokens:
    """The tokens of a pass with a padding mask.

    Args:
        new: bool [batch, count], the mask's columns for the tokens of this pass.
        before, before_tensor: real tokens per sequence before it, as in `Tokens`; None for a new cache.
        prompt: a prompt pass may wait for the device once; a decode step may not.
    """
    batch, count = new.shape
    if (prompt or new.device.type == "cpu") and bool(new.all()):
        return plain_tokens(batch, count, before, before_tensor, new.device)
    if before_tensor is None:
        before, before_tensor = [0] * batch, torch.zeros(batch, dtype=torch.int32, device=new.device)
    steps = new.to(torch.int32).cumsum(dim=1, dtype=torch.int32)
    positions = torch.where(new, before_tensor[:, None] + steps - 1, -1)
    seen_tensor = before_tensor + steps[:, -1]
    if not prompt:
        return Tokens(count, True, positions, None, None, seen_tensor)
    columns = [row.nonzero().flatten() for row in new]
    return Tokens(count, True, positions, columns, seen_tensor.tolist(), seen_tensor)


def one_row(tokens: Tokens, row: int, before_tensor: Tensor | None) -> Tokens:
    """One column of a pass as a decode step's tokens; `before_tensor` int32 [batch], real tokens seen before it."""
    positions = tokens.positions[:, row : row + 1]
    new = (positions[:, 0] >= 0).to(torch.int32)
    seen_tensor = new.expand_as(tokens.seen_tensor) if before_tensor is None else before_tensor + new
    if tokens.columns is not None or tokens.seen is None:
        return Tokens(1, True, positions, None, None, seen_tensor)
    seen = [number - tokens.count + row + 1 for number in tokens.seen]
    return Tokens(1, tokens.padded, positions, None, seen, seen_tensor)


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
        attended: the layers that have attended so far.
        record: if prompts are being recorded, where each layer appends the tokens, query, key, value and `Scores`.
        seen: if the layers are only looked at, where each leaves the query and key that it attends with; see `kvpress.probe`.
    """

    modules: dict[int, int]
    tokens: Tokens
    layers: "list[KVLayer]"
    prompt: bool
    new_tokens: int | None = None
    exact: bool = False
    step: "StepInputs | None" = None
    record: list[Any] | None = None
    seen: dict[int, tuple[Tensor, Tensor]] | None = None
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


_thread = threading.local()


def active_pass() -> Pass | None:
    """The pass in progress on this thread, if any."""
    return getattr(_thread, "current", None)


def current_record() -> list[Any] | None:
    """Where prompt passes on this thread are recorded, within `recording`."""
    return getattr(_thread, "record", None)


@contextmanager
def recording() -> Iterator[list[Any]]:
    """Within the block a prompt pass leaves its tokens, queries, keys and values, layer by layer, in the list given out."""
    before, _thread.record = current_record(), []
    try:
        yield _thread.record
    finally:
        _thread.record = before


def expected_tokens() -> int | None:
    """How many tokens the `generate` that runs on this thread was asked for, if that is known."""
    return getattr(_thread, "expected", None)


def in_generate() -> bool:
    """Whether a `generate` runs on this thread, which itself counts the positions after the prompt's."""
    return getattr(_thread, "generates", 0) > 0


@contextmanager
def expecting(new_tokens: int | None) -> Iterator[None]:
    """Within the block a `generate` runs on this thread, and `expected_tokens` is `new_tokens`."""
    before, _thread.expected = expected_tokens(), new_tokens
    _thread.generates = getattr(_thread, "generates", 0) + 1
    try:
        yield
    finally:
        _thread.expected = before
        _thread.generates -= 1


def set_pass(current: Pass | None) -> None:
    """Make `current` the pass in progress on this thread; None when there is none."""
    _thread.current = current
