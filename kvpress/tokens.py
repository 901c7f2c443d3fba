"""The tokens that a pass brings: which are real, and at which positions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths end to end in one row, so that the model runs on no padding; they are attended apart.

    Attributes:
        columns: the columns of each sequence's real tokens in the padded batch, int64 [real] each, ascending.
        count: columns of the padded batch.
    """

    columns: list[Tensor]
    count: int

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return sum(len(columns) for columns in self.columns)

    def joined(self, x: Tensor, batch_dim: int = 0) -> Tensor:
        """Of [..., batch, count, ...] the real tokens in one row, [..., 1, total, ...]; a batch of 1 means all sequences."""
        row = [
            x.select(batch_dim, sequence if x.shape[batch_dim] > 1 else 0).index_select(batch_dim, columns.to(x.device))
            for sequence, columns in enumerate(self.columns)
        ]
        return torch.cat(row, dim=batch_dim).unsqueeze(batch_dim)

    def apart(self, row: Tensor, dim: int = 1) -> Tensor:
        """The inverse: of [1, ..., total, ...] with the tokens in `dim`, [batch, ..., count, ...], zero where there is padding."""
        padded = row.new_zeros(len(self.columns), *row.shape[1:dim], self.count, *row.shape[dim + 1 :])
        own = row.split([len(columns) for columns in self.columns], dim)
        for sequence, (columns, tokens) in enumerate(zip(self.columns, own, strict=True)):
            padded[sequence].index_copy_(dim - 1, columns.to(row.device), tokens[0])
        return padded


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
