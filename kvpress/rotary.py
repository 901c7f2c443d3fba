"""How a layer rotates its queries and keys, told from what it does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.kernels.rope_shift import rope_shift


@dataclass(frozen=True, eq=False)
class Rotary:
    """A layer's rotation by positions.

    Attributes:
        inv_freq: [rotary_dim / 2], the angle of each channel pair per position; empty for a layer that rotates nothing.
        interleaved: channel pairs are (0, 1), (2, 3), ... instead of the two halves.
        trained: how many positions the model was trained for, if its config says so.
    """

    inv_freq: Tensor
    interleaved: bool
    trained: int | None = None

    @property
    def channels(self) -> int:
        """How many channels are rotated, the first ones of a head."""
        return 2 * self.inv_freq.shape[0]


def same_rotation(seen: Sequence[Tensor], positions: Tensor, candidates: Sequence[Rotary]) -> Rotary | None:
    """The one of `candidates` by which vectors of one token differ from position to position; None if none is.

    Args:
        seen: queries and keys, each [positions, heads, 1, head_dim], all of the same token, the first at position 0.
        positions: int [positions].
    """
    for rotary in candidates:
        if all(_is_rotated(x.float(), positions, rotary, 2e-2 if x.dtype == torch.bfloat16 else 5e-3) for x in seen):
            return rotary
    return None


def _is_rotated(x: Tensor, positions: Tensor, rotary: Rotary, tolerance: float) -> bool:
    if rotary.channels > x.shape[-1]:
        return False
    expected = rope_shift(x[:1].expand_as(x), positions, rotary.inv_freq, rotary.interleaved)
    return bool((expected - x).norm() <= tolerance * x.norm())


def same_lengths(near: Tensor, far: Tensor) -> bool:
    """Whether vectors of one token, [.., heads, 1, head_dim], are as long at one position as at another."""
    near, far = near[:1].float().norm(dim=-1), far[:1].float().norm(dim=-1)
    return bool(((far - near).abs() <= 2e-2 * near).all())
