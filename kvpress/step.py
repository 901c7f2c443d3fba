"""A decode step of one layer: store the new entry, choose what is read, attend, observe, evict.

All of it works on tensors: what the host knows of the step was noted before (`KVLayer.open_step`), so that the same functions
run eagerly, within a compiled graph, and where a graph is replayed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpress.contexts import no_autocast
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.decode_scores import Moved
from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.places import rotated, turned, unrotated
from kvpress.policy import Selected, View
from kvpress.tokens import Tokens


@dataclass
class StepInputs:
    """What a decode step brings to every layer.

    Attributes:
        tokens: the new tokens, one for each sequence.
        number: of the step since the latest prompt pass, from 1: an int, or int64 [] where the step is told by tensors.
        new_tokens: how many tokens the `generate` that runs was asked for, likewise; None, or a tensor of 0, where that is
            not known.
        slots: int64 [layers], where each layer's new entry goes, where the step is told by tensors; or [1], of one layer.
        shared: what a selection policy hands from layer to layer.
    """

    tokens: Tokens
    number: int | Tensor
    new_tokens: int | Tensor | None = None
    slots: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    def slot(self, layer: int) -> Tensor | None:
        """Where a layer's new entry goes, int64 [1]; None where the host knows."""
        if self.slots is None:
            return None
        return self.slots if self.slots.shape[0] == 1 else self.slots[layer : layer + 1]

    def of_layer(self, layer: int) -> "StepInputs":
        """The same for one layer alone."""
        return StepInputs(self.tokens, self.number, self.new_tokens, self.slot(layer), self.shared)


def decode_step(
    layer: KVLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores, inputs: StepInputs
) -> Tensor:
    """A layer's part of a decode step that was opened: its output [batch, heads, 1, head_dim] in the dtype of the query.

    Within `torch.autocast` query, key and value may have different dtypes, and others than in the passes before.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value: [batch, kv_heads, 1, head_dim].
        scores: how the model scores.
        inputs: what the step brings.
    """
    with torch.no_grad(), no_autocast(query.device):
        rows, key, value = (x if x.dtype == layer.dtype else x.to(layer.dtype) for x in (query, key, value))
        rows = layer.own_query(rows, inputs.tokens)
        layer.write(key, value, inputs.tokens, inputs.slot(layer.index))
        return attend_row(layer, rows, scores, inputs, inputs.number, selects=layer.roles.selects).to(query.dtype)


def attend_row(
    layer: KVLayer, query: Tensor, scores: Scores, inputs: StepInputs, number: int | Tensor, selects: bool
) -> Tensor:
    """One row over what the cache holds; then the eviction policy acts.

    Args:
        number: of the step since the latest prompt pass; 0 for a prompt's row.
        selects: whether the row reads what the selection policy chooses, which is counted; else everything.
    """
    step, held, tokens = layer.step, layer.storage, inputs.tokens
    assert step is not None
    observed = layer.takes_mass
    valid = None if step.full else held.valid(step.stop)
    if selects:
        view = view_of(layer, query, scores, inputs.shared, step.stop, valid, tokens, inputs)
        output, mass = _attend_selected(layer, view, scores, observed)
    else:
        rows, moved = layer.row_queries(query, tokens, step.stop)
        perturbed = None
        if layer.places.turns_keys:
            assert layer.rotary is not None
            keys, values = held.read(stop=step.stop)
            raw = unrotated(query, tokens.seen_tensor, layer.rotary)
            rows, keys = turned(raw, keys, held.positions[:, :, : step.stop], not layer.evicts, layer.rotary)
            output, mass, _ = decode_attention(rows, keys, values, valid, **vars(scores), with_mass=observed)
        else:
            if not moved and layer.observer.needs_every_row:
                observed, perturbed = True, layer.perturbed(tokens, number, inputs.new_tokens)
            output, mass = held.attend(
                rows, scores, stop=step.stop, valid=valid, moved=moved, perturbed=perturbed, with_mass=observed
            )
    if layer.observer.needs_every_row:
        counted = mass if observed else None
        layer.observe_step(query, tokens, scores, number, inputs.new_tokens, counted)
        if counted is None and selects:
            layer.count_read(view.length / 2)  # the keys of what was not selected, too
    layer.evict_step(tokens)
    return output


def show_last_row(layer: KVLayer) -> None:
    """Show the selection policy what the prompt's last row reads of what was kept, before the first decode step."""
    if not layer.last_unread:
        return
    layer.last_unread = False
    query, position, scores = layer.last_row, layer.last_position, layer.scores
    assert query is not None and position is not None and scores is not None
    stop = layer.length
    keys, values = layer.storage.read(stop=stop)
    seen = position.view(-1).to(keys.device) + 1
    tokens = Tokens(1, not layer.uniform, position, None, None, seen)
    valid = layer.valid(stop)
    view = view_of(layer, query, scores, {}, stop, valid, tokens, None)
    if not layer.uniform:
        valid = (view.positions >= 0) & (view.positions < seen[:, None, None])
    _, weights, _ = decode_attention(view.query, keys, values, valid, **vars(scores), with_mass=True, per_head=True)
    assert weights is not None
    layer.selection.after_read(view, Selected(), weights)


def view_of(
    layer: KVLayer,
    query: Tensor,
    scores: Scores,
    shared: dict[str, Any],
    stop: int | None,
    valid: Tensor | None,
    tokens: Tokens,
    inputs: StepInputs | None,
) -> View:
    """The first slots of a layer and the row that is about to read them, as a selection policy sees them."""
    held = layer.storage
    positions = held.positions[:, :, :stop]
    length: int | Tensor = positions.shape[2]
    newest: int | Tensor = length - 1
    step = layer.step
    told = None if inputs is None else inputs.slot(layer.index)
    if step is not None and step.slot == "told" and told is not None:
        newest, length = told, told[0] + 1
    elif step is not None and isinstance(step.slot, int):
        newest = step.slot
    turn: Callable[[Tensor, Tensor], Tensor] | None = None
    moved: Moved = ()
    if layer.places.turns_keys:
        assert layer.rotary is not None
        turn = partial(rotated, rotary=layer.rotary)
        query = unrotated(query, tokens.seen_tensor, layer.rotary)
    else:
        query, moved = layer.row_queries(query, tokens, stop)
    return View(
        layer=layer.index,
        layers=layer.count,
        query=query,
        fetch=lambda: held.read(stop=stop)[0],
        positions=positions,
        valid=valid,
        seen=tokens.seen_tensor.to(query.device),
        scale=scores.scale,
        softcap=scores.softcap,
        turn=turn,
        state=layer.state,
        shared=shared,
        length=length,
        newest=newest,
        places=layer.position_limit,
        phase=None if step is None else step.phase,
        waits=step is None or (step.stop is not None and query.device.type == "cpu"),
        moved=moved,
        aligned=not layer.evicts,
        in_front=layer.uniform,
    )


def _attend_selected(layer: KVLayer, view: View, scores: Scores, observed: bool) -> tuple[Tensor, Tensor | None]:
    """Attend what the selection policy chooses: output, and the mass of each slot if it is observed."""
    selection, held, step = layer.selection, layer.storage, layer.step
    assert step is not None
    selected = selection.select(view)
    with_mass = observed or selection.observes_reads
    index, query = selected.index, view.query
    member = view.valid if index is None else selected.member
    if layer.places.turns_keys:
        assert layer.rotary is not None
        keys, values = held.read(stop=step.stop, index=index)
        places = None  # everything is there and in order
        if member is not None or layer.evicts:
            places = view.positions if index is None else view.positions.gather(2, index)
            places = places if member is None else places.masked_fill(~member, -1)
        query, keys = turned(query, keys, places, not layer.evicts, layer.rotary)
        output, mass, _ = decode_attention(
            query, keys, values, member, **vars(scores), with_mass=with_mass, per_head=selection.observes_reads
        )
    else:
        moved = view.moved
        if index is not None:
            moved = [
                (other, index < slots if isinstance(slots, int) else slots.gather(2, index)) for other, slots in moved
            ]
        output, mass = held.attend(
            query,
            scores,
            stop=step.stop,
            valid=member,
            index=index,
            moved=moved,
            with_mass=with_mass,
            per_head=selection.observes_reads,
        )
    if index is None:
        layer.count_read(view.length + selected.scanned)
    elif selected.count is None:
        layer.count_read(index.shape[2] + selected.scanned)
    else:
        layer.count_read(selected.count.amax() + selected.scanned)
    if mass is not None and selection.observes_reads:
        selection.after_read(view, selected, mass)
        mass = mass.unflatten(1, (view.positions.shape[1], -1)).sum(2)
    if mass is not None and index is not None:
        whole = mass.new_zeros(*mass.shape[:2], view.positions.shape[2])
        mass = whole.scatter_add_(2, index, mass)
    return output, mass if observed else None
