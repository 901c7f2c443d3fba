"""At which positions entries are attended, where these are not their own.

Two ways. With *raw keys* entries are stored without their rotation, and attended at the consecutive positions 0 .. m-1.
With *re-indexed sinks* entries stay rotated at their own positions, and the query that reads the first of them is rotated
nearer by the number of tokens dropped between.

A model rounds the angle of a position to float32, which far from the start is an error as large as 0.03. What is taken
off a vector is the angle that the model put on, rounding and all; what is put on is exact. So it does not matter how
many tokens were seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.rope_shift import rope_shift
from kvpress.passes import Tokens
from kvpress.rotary import Rotary

EXACT = 1024
"""Up to this position a rounded angle is off by less than 2^-15, which is in the noise of a float32 dot product."""

UNKNOWN = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Turn:
    """A rotation of vectors [batch, heads, rows, head_dim], worked out once for all layers of a pass.

    Attributes:
        cos, sin: float32, broadcast to [batch, heads, rows, head_dim]; 1 and 0 for channels that are not rotated.
        partner: int64 [head_dim], the other channel of each channel's pair.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The vectors turned, in their dtype, computed in float32."""
        turned = torch.mul(x, self.cos)
        return turned.addcmul_(x.index_select(-1, self.partner), self.sin).to(x.dtype)


def turn_between(rotary: Rotary, source: Tensor, target: Tensor, head_dim: int) -> Turn:
    """The rotation from where a model put vectors to where they belong.

    Args:
        rotary: the model's rotation.
        source: int [batch, rows], positions at which the model rotated, with angles rounded to float32.
        target: int [batch, rows], positions to go to, whose angles are not rounded.
        head_dim: channels of a vector.
    """
    inv_freq = rotary.inv_freq.to(source.device, torch.float32)
    half, rest = len(inv_freq), head_dim - rotary.channels
    angle = target[..., None] * inv_freq.double() - (source[..., None].float() * inv_freq).double()
    cos, sin = angle.cos().float(), angle.sin().float()
    pairs = torch.arange(2 * half, device=source.device)
    if rotary.interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        partner = pairs ^ 1
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        partner = pairs.roll(half)
    if rest:
        cos, sin = torch.nn.functional.pad(cos, (0, rest), value=1.0), torch.nn.functional.pad(sin, (0, rest))
        partner = torch.cat((partner, torch.arange(2 * half, head_dim, device=source.device)))
    return Turn(cos[:, None], sin[:, None], partner)


def at_own_positions(x: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
    """A pass's queries or keys [batch, heads, count, head_dim], rotated at their positions without the rounding of angles."""
    if not rotary.channels or (tokens.seen is not None and max(tokens.seen) <= EXACT):
        return x
    key = rotary, "own", x.shape[-1], x.device
    # What is compiled keeps nothing from layer to layer.
    turn: Turn | None = None if torch.compiler.is_compiling() else tokens.turns.get(key)
    if turn is None:
        at = tokens.positions.to(x.device)
        if tokens.seen is not None and not tokens.padded and len(set(tokens.seen)) == 1:
            at = at[:1]
        turn = turn_between(rotary, at, at, x.shape[-1])
        if not torch.compiler.is_compiling():
            tokens.turns[key] = turn
    return turn(x)


def nearer(query: Tensor, gap: int | Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
    """Queries [batch, heads, rows, head_dim] of a pass, rotated back by `gap` positions, an int or int [batch]."""
    key = rotary, gap, query.shape[-1], query.device
    turn: Turn | None = tokens.turns.get(key) if isinstance(gap, int) else None
    if turn is None:
        back = -torch.as_tensor(gap, device=query.device).view(-1, 1)
        turn = turn_between(rotary, torch.zeros_like(back), back, query.shape[-1])
        if isinstance(gap, int):
            tokens.turns[key] = turn
    return turn(query)


def without_rotation(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Vectors [batch, heads, n, head_dim] with the rotation taken off that the model put on.

    Args:
        positions: int, what broadcasts to [batch, heads, n].
    """
    return rope_shift(x, -positions, rotary.inv_freq, rotary.interleaved)


def rotated(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Vectors [batch, heads, n, head_dim] without rotation, rotated to positions that broadcast to [batch, heads, n]."""
    return rope_shift(x, positions, rotary.inv_freq, rotary.interleaved)


def last_positions(seen: Tensor, rows: int) -> Tensor:
    """Positions of the last `rows` real tokens of sequences that have `seen` [batch] of them: int [batch, rows]."""
    return seen[:, None] - rows + torch.arange(rows, device=seen.device)


def consecutive(positions: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """The ranks of entries by their positions.

    Args:
        positions: int32 [batch, kv_heads, n], -1 for what is not there; as many of each kv head.
        ordered: what is there is in the order of its positions.

    Returns:
        int [batch, kv_heads, n] (anything where there is nothing), and how many there are, int [batch].
    """
    there = positions >= 0
    if ordered:
        ranks = there.cumsum(-1) - 1
    else:
        ranks = positions.masked_fill(~there, torch.iinfo(positions.dtype).max).argsort(-1).argsort(-1)
    return ranks, there[:, 0].sum(-1)


def check_consecutive(places: Tensor, tokens: Tokens, offset: Tensor | None, policy: str, remedy: str) -> Tensor:
    """Refuse position ids under which real tokens do not follow one another: images of M-RoPE models, gaps, packed texts.

    Args:
        places: int [batch or 1, count], or with the axes of the model's positions before.
        tokens: the tokens of the pass.
        offset: int64 [batch], how much earlier position ids were ahead of the count of real tokens; None if there is
            nothing to compare with, and `UNKNOWN` for a sequence that has no token yet.
        policy, remedy: for the message.

    Returns:
        int64 [batch], the offset with this pass's tokens.

    Raises:
        PolicyError: as above.
    """
    positions = tokens.positions.to(places.device)
    real = positions >= 0
    ahead = (places.long() - positions).view(-1, *positions.shape)  # [axes, batch, count]
    lowest = torch.where(real, ahead, UNKNOWN).amin(dim=(0, 2))
    highest = torch.where(real, ahead, -UNKNOWN).amax(dim=(0, 2))
    good = (lowest == highest) | (lowest == UNKNOWN)
    if offset is not None:
        offset = offset.to(places.device)
        good &= (lowest == UNKNOWN) | (offset == UNKNOWN) | (lowest == offset)
        lowest = torch.where(lowest == UNKNOWN, offset, lowest)
    if not bool(good.all()):
        row = int(good.logical_not().nonzero()[0, 0])
        raise PolicyError(
            f"the position ids of sequence {row} do not count its tokens one by one (an image or video of a model with M-RoPE, "
            f"a gap, or packed texts), and {policy} attends what it keeps at consecutive positions; {remedy}"
        )
    return lowest
