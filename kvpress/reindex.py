"""How a layer attends entries at other positions than their own, see `kvpress.places`."""

import torch
from torch import Tensor

from kvpress.layer import KVLayer
from kvpress.passes import Tokens
from kvpress.places import consecutive, last_positions, nearer, rotated, without_rotation


def unrotated(layer: KVLayer, query: Tensor, seen: Tensor) -> Tensor:
    """The query of a sequence's last rows without its rotation, in float32.

    Taking exactly the rotation off that the model put on, and rotating anew, keeps the angles small and so exact:
    turning by the difference would leave the rounding of a far position's angle in the scores.

    Args:
        query: [batch, heads, rows, head_dim], rotated at the last positions of the sequence.
        seen: int [batch], real tokens seen.
    """
    assert layer.rotary is not None
    places = last_positions(seen.to(query.device), query.shape[2])
    return without_rotation(query.float(), places[:, None], layer.rotary)


def turned(layer: KVLayer, query: Tensor, keys: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys rotated to the ranks of their positions, and the query's rows to the last ranks, those of their own keys.

    Args:
        query: [batch, heads, rows, head_dim], the last rows of the sequence, not rotated.
        keys: [batch, kv_heads, n, head_dim], not rotated; as many of each kv head.
        positions: int32 [batch, kv_heads, n], -1 for what is not there; None when all are there, in order.
    """
    assert layer.rotary is not None
    if positions is None:
        ranks = torch.arange(keys.shape[2], device=keys.device)[None, None]
        held = torch.full((1,), keys.shape[2], device=keys.device)
    else:  # without eviction slots were only ever appended
        ranks, held = consecutive(positions, ordered=not layer.evicts)
    places = last_positions(held, query.shape[2])
    rows = rotated(query, places[:, None], layer.rotary).to(keys.dtype)
    return rows, rotated(keys, ranks, layer.rotary)


def moved_rows(layer: KVLayer, query: Tensor, tokens: Tokens, past: int, only: slice) -> tuple[Tensor, Tensor] | None:
    """The query for entries that are attended at other positions than their own, and which those are of the first `past`."""
    other = moved_query(layer, query, tokens, layer.length, only) if past else None
    return None if other is None else (other, _sinks(layer, past, only))


def moved_row(layer: KVLayer, query: Tensor, tokens: Tokens, stop: int | None) -> tuple[Tensor, Tensor | int] | None:
    """The same for the row of a decode step.

    In an unpadded batch the number of those entries is enough: they are the first, as sinks are never dropped.
    """
    other = moved_query(layer, query, tokens, stop)
    if other is None:
        return None
    if layer.uniform:
        return other, min(layer.reindexed_sinks, layer.storage.capacity if stop is None else stop)
    return other, _sinks(layer, stop, slice(None))


def moved_query(
    layer: KVLayer, query: Tensor, tokens: Tokens, stop: int | None, only: slice = slice(None)
) -> Tensor | None:
    """The query for the sinks of a re-indexing policy, [batch, heads, rows, head_dim]; None if they are where they were.

    The recent entries that the policy keeps stand side by side up to the query, so their distances are right as they are;
    the sinks before them must come nearer by the gap between. Rotating the query back by the gap does that.
    """
    if layer.rotary is None or layer.reindexed_sinks == 0:
        return None
    gap: int | Tensor
    if layer.uniform and tokens.seen is not None:
        gap = tokens.seen[0] - layer.entries_now
        if gap == 0:
            return None
    else:
        held = (layer.storage.positions[only, 0, :stop] >= 0).sum(-1)
        gap = tokens.seen_tensor.to(held.device)[only] - held
    return nearer(query, gap, tokens, layer.rotary)


def _sinks(layer: KVLayer, stop: int | None, only: slice) -> Tensor:
    """Which of the first `stop` slots hold a sink that is re-indexed, bool [batch, kv_heads, stop]."""
    positions = layer.storage.positions[only, :, :stop]
    return (positions >= 0) & (positions < layer.reindexed_sinks)
