"""A prompt pass of one layer: store the entries, attend, observe, evict. Padded sequences are attended alone."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.evict import in_position_order
from kvpress.kernels.block_lists import listed_pairs
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.block_sparse_mass import block_sparse_mass
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.decode_scores import Moved
from kvpress.kernels.gather_slots import gather_both
from kvpress.kernels.prompt_attention import prompt_attention
from kvpress.kernels.skip_attention import skip_attention
from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.passes import Pass
from kvpress.places import Held, rotated, turned, unrotated
from kvpress.policy import Pattern, View
from kvpress.step import StepInputs, attend_row
from kvpress.tokens import Tokens, one_row


def exact_pass(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, scores: Scores) -> Tensor:
    """Causal attention of one pass without a cache; each padded sequence alone."""
    if tokens.columns is None:
        return prompt_attention(query, key, value, **vars(scores))[0]
    output = torch.zeros_like(query[..., : value.shape[-1]])
    for row, columns in enumerate(tokens.columns):
        only, columns = slice(row, row + 1), columns.to(query.device)
        if len(columns):
            row_query, row_key, row_value = (x[only, :, columns] for x in (query, key, value))
            output[only, :, columns] = prompt_attention(row_query, row_key, row_value, **vars(scores))[0]
    return output


def prompt_pass(
    layer: KVLayer, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass
) -> Tensor:
    """A layer's part of a prompt pass with a cache: its output, [batch, heads, count, head_dim].

    Args:
        query: [batch, heads, count, head_dim], in the layer's dtype.
        key, value: [batch, kv_heads, count, head_dim].
        scores: how the model scores.
        current: the pass.
    """
    layer.scores = scores
    if current.record is not None:
        current.record.attends(layer.index, tokens, query, key, value, scores)
    query = layer.own_query(query, tokens)
    if layer.eviction.evict == "each_row":
        return _row_by_row(layer, tokens, query, key, value, scores, current)
    past = layer.length
    if layer is current.layers[0]:
        for one in current.layers:
            one.prepare(key, value, tokens)
    layer.state.clear()
    layer.append(key, value, tokens)
    held = layer.held(tokens, layer.length)
    queries = layer.queries(query, tokens, held)
    if current.in_play is not None:
        output = current.in_play.attend(layer, query, key, value, scores, past)
    elif layer.roles.plans and not current.exact:
        output = _planned(layer, tokens, queries, value, scores, past, held, current)
    else:
        output = _exactly(layer, tokens, queries, value, scores, past, held)
    if layer.evicts:
        layer.observe_prompt(query, tokens, scores, current.new_tokens, past, layer.takes_prompt_mass)
    layer.finish_prompt(query, tokens, scores)
    return output


def _exactly(
    layer: KVLayer, tokens: Tokens, queries: list[Tensor], value: Tensor, scores: Scores, past: int, held: Held
) -> Tensor:
    """The rows of a prompt pass over everything; each padded sequence alone, so that nothing is computed for padding.

    Args:
        queries: as `KVLayer.queries` gives them.
        past: slots that were in use before the pass.
        held: what the layer holds now.
    """
    count, seen = tokens.count, tokens.seen
    assert seen is not None
    if tokens.columns is None:
        if not layer.places.in_chunks or seen == seen[:1] * len(seen):
            return _attend_chunks(layer, queries, scores, past, held, slice(None), seen[0] - count)
        everything = torch.arange(count, device=value.device)
        columns = [everything] * len(seen)
    else:
        columns = [one.to(value.device) for one in tokens.columns]
    output = torch.zeros_like(queries[0][..., : value.shape[-1]])
    for row, own in enumerate(columns):
        if len(own):
            only = slice(row, row + 1)
            rows = [query[only, :, own] for query in queries]
            in_order = replace(held, in_order=held.in_order or past == 0)
            output[only, :, own] = _attend_chunks(layer, rows, scores, past, in_order, only, seen[row] - len(own))
    return output


def _attend_chunks(
    layer: KVLayer, queries: list[Tensor], scores: Scores, past: int, held: Held, only: slice, first: int
) -> Tensor:
    """Rows of a prompt pass (of one sequence, or of all) that follow one another, over the first slots and themselves.

    Args:
        queries: as `KVLayer.queries` gives them, each [batch, heads, rows, head_dim].
        past: slots that were in use before the pass; those of the rows follow.
        held: what the layer holds.
        only: which sequences these are.
        first: the position of the first row.
    """
    outputs = []
    for chunk in layer.places.chunks(first, queries[0].shape[2]):
        rows = [query[:, :, chunk] for query in queries]
        outputs.append(_attend_rows(layer, rows, scores, past + chunk.start, held, only, first + chunk.start))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend_rows(
    layer: KVLayer, queries: list[Tensor], scores: Scores, past: int, held: Held, only: slice, first: int
) -> Tensor:
    """The same for rows that the places do not tell apart; `past` slots are in use before them."""
    query, *others = queries
    stop = past + query.shape[2]
    keys, values = layer.storage.read(only, stop)
    valid = layer.valid(past)
    valid = None if valid is None else valid[only]
    moved: Moved = ()
    if past and others:
        older = layer.storage.positions[only, :, :past]
        moved = list(zip(others, layer.places.slots(first, older, held), strict=False))
    if layer.places.turns_keys:
        assert layer.rotary is not None
        positions = layer.storage.positions[only, :, :stop]
        raw = unrotated(query, positions.amax(dim=(1, 2)) + 1, layer.rotary)
        query, keys = turned(raw, keys, positions, not layer.evicts, layer.rotary)
    output, mass, _ = prompt_attention(
        query, keys, values, valid, **vars(scores), moved=moved, with_mass=layer.takes_prompt_mass
    )
    if mass is not None:
        layer.add_mass(mass, only)
    return output


def _row_by_row(
    layer: KVLayer, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass
) -> Tensor:
    """A prompt pass whose every row is attended and evicted as a decode step is."""
    layer.set_quotas(tokens)
    layer.start(key, value)
    output = torch.empty_like(query[..., : value.shape[-1]])
    before = tokens.seen_tensor - (tokens.positions >= 0).sum(1, dtype=torch.int32)
    for row in range(tokens.count):
        one, step = slice(row, row + 1), one_row(tokens, row, before)
        inputs = StepInputs(step, 0, current.new_tokens)
        layer.open_step(step)
        layer.write(key[:, :, one], value[:, :, one], step)
        output[:, :, one] = attend_row(layer, query[:, :, one], scores, inputs, 0, selects=False)
        layer.close_step(step, counts=False)
        before = step.seen_tensor
    if layer.index == 0:
        layer.texts.advance(tokens.count, tokens.seen, tokens.seen_tensor)
    layer.steps = 0
    return output


def _planned(
    layer: KVLayer,
    tokens: Tokens,
    queries: list[Tensor],
    value: Tensor,
    scores: Scores,
    past: int,
    held: Held,
    current: Pass,
) -> Tensor:
    """A prompt pass whose rows read what the prefill policy plans, each sequence alone unless all hold as many entries."""
    query = queries[0]
    output = torch.zeros_like(query[..., : value.shape[-1]])
    sequences: list[tuple[slice, Tensor | None, int]] = [(slice(None), None, tokens.count)]
    if tokens.columns is not None:
        columns = [one.to(query.device) for one in tokens.columns]
        sequences = [(slice(row, row + 1), one, len(one)) for row, one in enumerate(columns)]
    elif not layer.uniform:
        sequences = [(slice(row, row + 1), None, tokens.count) for row in range(len(query))]
    places = tokens.positions.expand(len(query), -1)
    for only, own, count in sequences:
        ordered = _in_order(layer, only, past, past + count)
        if past and len(queries) > 1:
            ordered = None
        for start in range(0, count, layer.prefill.chunk or max(1, count)):
            chunk = slice(start, min(count, start + (layer.prefill.chunk or count)))
            rows = chunk if own is None else own[chunk]
            part = query[only, :, rows]
            pattern, entries = None, past + chunk.stop
            if ordered is not None:
                keys, values, positions = (x[:, :, : x.shape[2] - count + chunk.stop] for x in ordered[:3])
                seen = places[only][:, rows][:, -1].to(keys.device) + 1
                entries = keys.shape[2]
                shared = current.handed.setdefault((only.start, start), {})
                aligned = past == 0 or not layer.evicts
                view = _view(layer, part, keys, positions, seen, scores, shared, aligned)
                pattern = layer.prefill.plan(view)
            if current.record is not None:
                current.record.planned(layer.index, chunk, pattern)
            layer.facts.pairs += _pairs(part, entries)
            layer.facts.computed = layer.facts.computed + _computed(
                pattern, part, entries
            )  # the sum is of this pass's mode
            if pattern is None:
                parts = [one[only, :, rows] for one in queries]
                output[only, :, rows] = _attend_rows(layer, parts, scores, past + start, held, only, 0)
            elif pattern.skip:
                tile = pattern.block_size
                output[only, :, rows], _, skipped = skip_attention(
                    part, keys, values, skip=pattern.skip, tile=tile, **vars(scores)
                )
                layer.facts.computed = layer.facts.computed - skipped.sum(dtype=torch.float64) / part.shape[1]
            else:
                output[only, :, rows], mass = _attend_pattern(layer, pattern, view.query, keys, values, scores)
                if mass is not None:
                    order = None if ordered is None else ordered[3]
                    layer.add_mass(mass, only, None if order is None else order[..., :entries])
    return output


def _in_order(layer: KVLayer, only: slice, past: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Keys, values and positions of what a sequence (or each of all) holds in the first `stop` slots, in position order.

    With the slots in that order, None where they are. None where kv heads hold different numbers of entries.

    Args:
        past: slots that were in use before the pass; what lies behind is in order.
    """
    held = layer.storage
    (keys, values), positions = held.read(only, stop), held.positions[only, :, :stop]
    if past == 0 or (held.ordered and layer.is_full):
        return keys, values, positions, None
    most = least = held.entries
    if not layer.uniform:
        counts = (positions >= 0).sum(-1)
        most, least = int(counts.max()), int(counts.min())
    if least < most:
        return None
    order = in_position_order(positions)[..., :most]
    return *gather_both(keys, values, order), positions.gather(2, order), order


def _pairs(query: Tensor, entries: int) -> int:
    """Pairs of the last rows of so many entries, [batch, heads, rows, head_dim], and what is not after them; of one head."""
    batch, rows = query.shape[0], query.shape[2]
    return batch * (rows * (entries - rows) + rows * (rows + 1) // 2)


def _computed(pattern: Pattern | None, query: Tensor, entries: int) -> float | Tensor:
    """How many of these a pattern reads."""
    if pattern is None:
        return _pairs(query, entries)
    if pattern.index is not None:
        entries = pattern.index.shape[2]
    lists = pattern.lists
    if all(one is None for one in lists.values()):
        left_out = 0 if pattern.member is None else (~pattern.member).sum() / pattern.member.shape[1] * query.shape[2]
        return _pairs(query, entries) - left_out
    before = (entries - query.shape[2]) % pattern.block_size
    return listed_pairs(query.shape[2] + before, entries, skip=before, **pattern.sizes, **lists)


def _attend_pattern(
    layer: KVLayer, pattern: Pattern, query: Tensor, keys: Tensor, values: Tensor, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """Rows of a prompt over what they read of the entries, which are in position order, the rows' own ones last.

    Returns:
        output, and what the rows gave each entry, float32 [batch, kv_heads, entries], where that is counted.
    """
    n, with_mass = keys.shape[2], layer.takes_prompt_mass
    if pattern.index is not None:
        keys, values = gather_both(keys, values, pattern.index)
    if layer.places.turns_keys:
        assert layer.rotary is not None
        places = None
        if pattern.member is not None:
            places = torch.where(pattern.member, torch.arange(keys.shape[2], device=keys.device), -1)
        query, keys = turned(query, keys, places, True, layer.rotary)
    lists = pattern.lists
    if all(one is None for one in lists.values()):
        member = pattern.member
        if query.shape[2] == 1:
            output, mass, _ = decode_attention(query, keys, values, member, **vars(scores), with_mass=with_mass)
        else:
            older = None if member is None else member[:, :, : -query.shape[2]]
            output, mass, _ = prompt_attention(query, keys, values, older, **vars(scores), with_mass=with_mass)
        if mass is not None and pattern.index is not None:
            mass = mass.new_zeros(*mass.shape[:2], n).scatter_add_(2, pattern.index, mass)
        return output, mass
    # The rows' first block may begin before them.
    before = (n - query.shape[2]) % pattern.block_size
    rows = functional.pad(query, (0, 0, before, 0))
    output, lse = block_sparse_attention(rows, keys, values, **pattern.sizes, **lists, **vars(scores))
    mass = None
    if with_mass:
        lse[:, :, :before] = float("inf")  # these do not count
        scale, softcap = scores.scale, scores.softcap
        mass = block_sparse_mass(rows, keys, lse, scale=scale, softcap=softcap, **pattern.sizes, **lists)
    return output[:, :, before:], mass


def _view(
    layer: KVLayer,
    query: Tensor,
    keys: Tensor,
    positions: Tensor,
    seen: Tensor,
    scores: Scores,
    shared: dict[str, Any],
    aligned: bool,
) -> View:
    """Rows of a prompt and the entries up to them, in position order, as a prefill policy sees them."""
    turn = None
    if layer.places.turns_keys:
        assert layer.rotary is not None
        turn = partial(rotated, rotary=layer.rotary)
        query = unrotated(query, seen, layer.rotary)
    return View(
        layer=layer.index,
        layers=layer.count,
        query=query,
        fetch=lambda: keys,
        positions=positions,
        valid=None,
        seen=seen,
        scale=scores.scale,
        softcap=scores.softcap,
        turn=turn,
        state={},
        shared=shared,
        length=positions.shape[2],
        newest=positions.shape[2] - 1,
        places=layer.texts.columns,
        aligned=aligned,
    )
