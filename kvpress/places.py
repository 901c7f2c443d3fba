"""At which positions entries are attended: the only owner of a model's rotation.

A policy names one of these values. `Own` leaves everything where the model put it. Elsewhere a row has several queries, each
for some of the slots (`Sinks`, `DualChunk`), or keys are stored without their rotation and rotated where they are read
(`Consecutive`). Rotary attention depends on distances only, so another query is as good as other keys.

A model rounds the angle of a position to float32, which far from the start is an error as large as 0.03. What is taken
off a vector is the angle that the model put on, rounding and all; what is put on is exact. So it does not matter how
many tokens were seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.rope_shift import rope_shift
from kvpress.rotary import Rotary
from kvpress.tokens import Tokens

EXACT = 1024
"""Up to this position a rounded angle is off by less than 2^-15, which is in the noise of a float32 dot product."""

UNKNOWN = torch.iinfo(torch.int64).max
INSTEAD = "use rope='original' where the policy has it, or another policy"


@dataclass(frozen=True)
class Held:
    """What a layer holds when rows are about to read it, those of their own pass included.

    Attributes:
        positions: int32 [batch, kv_heads, slots], -1 for an empty slot.
        entries: how many each kv head holds; None where they hold different numbers, or only the device knows.
        in_order: slot i is known to hold the entry at position i, in every sequence and kv head.
    """

    positions: Tensor
    entries: int | None
    in_order: bool


class Places:
    """At which positions entries are attended. Of the queries that a row has, the first reads every slot that no other does."""

    moved: ClassVar[bool] = True
    """Whether some are attended at other positions than their own."""
    own_keys: ClassVar[bool] = True
    """Whether keys are stored as the model rotated them, so that a selection or prefill policy may compare them with a query."""
    turns_keys: ClassVar[bool] = False
    """Whether keys are rotated when they are read, by `turned`."""
    in_chunks: ClassVar[bool] = False
    """Whether `chunks` and `slots` ask where rows are, so that sequences of different lengths are attended one by one."""

    def fitted(self, rotary: Rotary) -> "Places":
        """The same for a layer of a model: what depends on the length that it was trained for is set.

        Raises:
            PolicyError: it does not fit the model.
        """
        return self

    def store(self, key: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
        """A pass's keys as they are stored: [batch, kv_heads, count, head_dim]."""
        return at_own_positions(key, tokens, rotary)

    def own_query(self, query: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
        """A pass's queries [batch, heads, count, head_dim], as the other methods and observers take them."""
        return at_own_positions(query, tokens, rotary)

    def in_place(self, keys: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
        """Stored keys [batch, kv_heads, n, head_dim], rotated at their own positions, int32 [batch, kv_heads, n]."""
        return keys

    def as_read(self, keys: Tensor, positions: Tensor, seen: Tensor, rotary: Rotary) -> Tensor:
        """The same, where queries at their own positions have the distances at which the newest rows read them.

        Args:
            seen: int32 [batch], real tokens of each sequence.
        """
        return self.in_place(keys, positions, rotary)

    def queries(self, query: Tensor, tokens: Tokens, held: Held, rotary: Rotary) -> list[Tensor]:
        """The queries of a pass's rows, each of the shape of `query`."""
        return [query]

    def slots(self, first: int | Tensor, positions: Tensor, held: Held) -> list[Tensor | int]:
        """Which slots the queries behind the first one read; of two queries that read a slot the later counts.

        Args:
            first: position of the first of the rows, an int, or int [batch] in a decode step.
            positions: int32 [batch, kv_heads, n], of the slots (of some sequences) that are older than the rows, or of all
                in a decode step.
            held: what the layer holds.

        Returns:
            For each, but not for last ones that read nothing: bool [batch, kv_heads, n], or how many of the first.
        """
        return []

    def chunks(self, first: int, count: int) -> list[slice]:
        """The rows of a prompt pass in runs, each of which `slots` answers for as a whole.

        Args:
            first: position of the first row.
            count: how many rows there are.
        """
        return [slice(0, count)]


@dataclass(frozen=True)
class Own(Places):
    """At their own."""

    moved = False


@dataclass(frozen=True)
class Sinks(Places):
    """The first `count` positions right before the most recent ones that are kept (StreamingLLM).

    The recent entries stand side by side up to the query, so their distances are right as they are; the sinks before them must
    come nearer by the gap between. Rotating the query back by the gap does that.
    """

    count: int

    def queries(self, query: Tensor, tokens: Tokens, held: Held, rotary: Rotary) -> list[Tensor]:
        if not rotary.channels:
            return [query]
        gap: int | Tensor
        if held.entries is not None and tokens.seen is not None:
            gap = tokens.seen[0] - held.entries
            if gap == 0:
                return [query]
        else:
            gap = tokens.seen_tensor.to(query.device) - (held.positions[:, 0] >= 0).sum(-1)
        return [query, nearer(query, gap, tokens, rotary)]

    def slots(self, first: int | Tensor, positions: Tensor, held: Held) -> list[Tensor | int]:
        if held.entries is not None:  # as sinks are never dropped, they are the first
            return [min(self.count, positions.shape[2])]
        return [(positions >= 0) & (positions < self.count)]


@dataclass(frozen=True)
class Consecutive(Places):
    """What is read at 0 .. m-1, so that no distance exceeds the number of entries read. Keys are stored without their rotation."""

    own_keys = False
    turns_keys = True

    def store(self, key: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
        return without_rotation(key, tokens.positions.to(key.device)[:, None], rotary)

    def own_query(self, query: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
        return query

    def in_place(self, keys: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
        return rotated(keys, positions.clamp(min=0), rotary)

    def as_read(self, keys: Tensor, positions: Tensor, seen: Tensor, rotary: Rotary) -> Tensor:
        # Side by side up to the newest row, which is at its own position.
        ranks, held = consecutive(positions, ordered=False)
        at = ranks + (seen.to(positions.device) - held)[:, None, None]
        return rotated(keys, at.masked_fill(positions < 0, 0), rotary)


@dataclass(frozen=True)
class DualChunk(Places):
    """Never further than `limit`, whatever the length of the text (dual chunk attention).

    The text is cut into pieces of `chunk - local` positions, and a key is stored at its place in its piece. A row has three
    queries: for its own piece, where the distances are right; for the piece before, where they are right up to `limit`; and
    for all older ones, which it reads from `limit`.

    Attributes:
        chunk: None for three quarters of the length that the model was trained for.
        local: how many of the newest positions always have their true distance, less than `chunk` (more than a piece is as
            many as a piece); None for an eighth of the trained length.
        limit: the largest distance; None for `chunk`, or the largest that the model was trained for if that is less.
    """

    chunk: int | None = None
    local: int | None = None
    limit: int | None = None

    own_keys = False
    in_chunks = True

    @property
    def piece(self) -> int:
        """Positions of a piece, for values that are fitted to a model."""
        assert self.chunk is not None and self.local is not None
        return self.chunk - self.local

    def fitted(self, rotary: Rotary) -> "DualChunk":
        trained, chunk, local = rotary.trained, self.chunk, self.local
        if chunk is None or local is None:
            if trained is None:
                raise PolicyError(
                    "the length that the model was trained for is not in its config (max_position_embeddings), and the sizes of "
                    "dual chunk attention come from it; give chunk_size and local_size"
                )
            chunk = max(2, 3 * trained // 4) if chunk is None else chunk
            local = min(chunk - 1, trained // 8) if local is None else local
        if local >= chunk:
            raise PolicyError(
                f"local_size={local} leaves no piece of chunk_size={chunk} (the model was trained for {trained} positions); give "
                f"a local_size below {chunk}, or a larger chunk_size"
            )
        limit = chunk if self.limit is None else self.limit
        if trained is not None:
            if chunk - local > trained:
                raise PolicyError(
                    f"pieces of chunk_size - local_size = {chunk - local} positions are longer than the {trained} that the model "
                    f"was trained for; give a chunk_size of at most {trained}"
                )
            limit = max(chunk - local, min(limit, trained - 1))
        return DualChunk(chunk, local, limit)

    def store(self, key: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
        return self._turned(key, tokens, rotary, "piece", lambda at: at % self.piece)

    def own_query(self, query: Tensor, tokens: Tokens, rotary: Rotary) -> Tensor:
        return query

    def in_place(self, keys: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
        at = positions.clamp(min=0)
        return rope_shift(keys, at - at % self.piece, rotary.inv_freq, rotary.interleaved)

    def queries(self, query: Tensor, tokens: Tokens, held: Held, rotary: Rotary) -> list[Tensor]:
        if not rotary.channels:
            return [query]
        piece, limit = self.piece, self.limit
        assert limit is not None
        own = self._turned(query, tokens, rotary, "piece", lambda at: at % piece)
        if tokens.seen is not None and max(tokens.seen) <= piece:
            return [own]
        before = self._turned(query, tokens, rotary, "before", lambda at: (at % piece + piece).clamp(max=limit))
        older = self._turned(query, tokens, rotary, "older", lambda at: torch.full_like(at, limit))
        return [own, before, older]

    def slots(self, first: int | Tensor, positions: Tensor, held: Held) -> list[Tensor | int]:
        start = first // self.piece * self.piece
        if isinstance(start, Tensor):
            start = start.to(positions.device)[:, None, None]
        elif held.in_order:
            return [stop for stop in (start, start - self.piece) if stop > 0]
        return [positions < start, positions < start - self.piece]

    def chunks(self, first: int, count: int) -> list[slice]:
        cuts = [0, *range(self.piece - first % self.piece, count, self.piece), count]
        return [slice(*cut) for cut in pairwise(cuts)]

    def _turned(self, x: Tensor, tokens: Tokens, rotary: Rotary, name: str, to: Callable[[Tensor], Tensor]) -> Tensor:
        if name == "piece" and tokens.seen is not None and max(tokens.seen) <= min(EXACT, self.piece):
            return x
        return turned_to(x, tokens, rotary, (name, self), to)


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
    if tokens.seen is not None and max(tokens.seen) <= EXACT:
        return x
    return turned_to(x, tokens, rotary, "own", lambda at: at)


def turned_to(x: Tensor, tokens: Tokens, rotary: Rotary, name: Any, to: Callable[[Tensor], Tensor]) -> Tensor:
    """A pass's queries or keys [batch, heads, count, head_dim], rotated where `to` says instead of at their positions.

    Args:
        name: of what `to` does, by which the rotation is found again in the next layer.
        to: gives int [batch, count] positions for those of the tokens.
    """
    if not rotary.channels:
        return x
    key = rotary, name, x.shape[-1], x.device
    # What is compiled keeps nothing from layer to layer.
    turn: Turn | None = None if torch.compiler.is_compiling() else tokens.turns.get(key)
    if turn is None:
        at = tokens.positions.to(x.device)
        if tokens.seen is not None and not tokens.padded and len(set(tokens.seen)) == 1:
            at = at[:1]
        turn = turn_between(rotary, at, to(at), x.shape[-1])
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


def unrotated(query: Tensor, seen: Tensor, rotary: Rotary) -> Tensor:
    """The query of a sequence's last rows without its rotation, in float32.

    Taking exactly the rotation off that the model put on, and rotating anew, keeps the angles small and so exact:
    turning by the difference would leave the rounding of a far position's angle in the scores.

    Args:
        query: [batch, heads, rows, head_dim], rotated at the last positions of the sequence.
        seen: int [batch], real tokens seen.
    """
    places = last_positions(seen.to(query.device), query.shape[2])
    return without_rotation(query.float(), places[:, None], rotary)


def turned(
    query: Tensor, keys: Tensor, positions: Tensor | None, ordered: bool, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """Keys rotated to the ranks of their positions, and the query's rows to the last ranks, those of their own keys.

    Args:
        query: [batch, heads, rows, head_dim], the last rows of the sequence, not rotated.
        keys: [batch, kv_heads, n, head_dim], not rotated; as many of each kv head.
        positions: int32 [batch, kv_heads, n], -1 for what is not there; None when all are there, in order.
        ordered: what is there is in the order of its positions.
    """
    if positions is None:
        ranks = torch.arange(keys.shape[2], device=keys.device)[None, None]
        held = torch.full((1,), keys.shape[2], device=keys.device)
    else:
        ranks, held = consecutive(positions, ordered)
    places = last_positions(held, query.shape[2])
    rows = rotated(query, places[:, None], rotary).to(keys.dtype)
    return rows, rotated(keys, ranks, rotary)


def check_consecutive(places: Tensor, tokens: Tokens, offset: Tensor | None, policy: str) -> Tensor:
    """Refuse position ids under which real tokens do not follow one another: images of M-RoPE models, gaps, packed texts.

    Args:
        places: int [batch or 1, count], or with the axes of the model's positions before.
        tokens: the tokens of the pass.
        offset: int64 [batch], how much earlier position ids were ahead of the count of real tokens; None if there is
            nothing to compare with, and `UNKNOWN` for a sequence that has no token yet.
        policy: for the message.

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
            f"a gap, or packed texts), and {policy} attends what it keeps at consecutive positions; {INSTEAD}"
        )
    return lowest
