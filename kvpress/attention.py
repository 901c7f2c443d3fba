"""The attention and mask functions that a patched model calls, registered with transformers under one name each."""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.compat import AttentionInterface, AttentionMaskInterface, causal_mask_function
from kvpress.contexts import no_autocast
from kvpress.errors import PolicyError
from kvpress.evict import in_position_order
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.gather_slots import gather_both
from kvpress.kernels.prompt_attention import prompt_attention
from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.paged import PagedLayer
from kvpress.passes import Pass, Tokens, active_pass, one_row
from kvpress.places import consecutive, last_positions, nearer, rotated, without_rotation
from kvpress.policy import Pattern, Selected, View

NAME = "kvpress"
COMPILED_LAYER = "_kvpress_layer"
"""Attribute of an attention module in a compiled step: which of the layers that the policies act on it is."""


class Switched(str):
    """Our name as a config's attention implementation. A copy of the config gets the name that was there before."""

    original: str

    def __new__(cls, original: str) -> "Switched":
        switched = super().__new__(cls, NAME)
        switched.original = original
        return switched

    def __reduce__(self) -> Any:
        return str, (self.original,)


class Originals:
    """What each patched config's attention implementation was, and how many patched models use the config."""

    def __init__(self) -> None:
        self._by_config: dict[int, tuple[Any, str, int]] = {}

    def switch(self, config: Any) -> None:
        """Switch a config to our implementation."""
        _, name, users = self._by_config.get(id(config), (config, config._attn_implementation, 0))
        self._by_config[id(config)] = (
            config,
            name,
            users + 1,
        )  # holding the config keeps its id from being reused
        config._attn_implementation = Switched(name)

    def restore(self, config: Any) -> None:
        """Undo one `switch`; the last one puts the implementation back."""
        _, name, users = self._by_config.pop(id(config))
        if users > 1:
            self._by_config[id(config)] = config, name, users - 1
        else:
            config._attn_implementation = name

    def name(self, config: Any) -> str:
        """The implementation that the config had."""
        if id(config) not in self._by_config:
            raise PolicyError(
                "attention implementation 'kvpress' is set on a model that is not patched; call kvpress.patch(model, policy), "
                "or model.set_attn_implementation('sdpa')"
            )
        return self._by_config[id(config)][1]


originals = Originals()


def register() -> None:
    """Make the two functions known to transformers. Idempotent; changes no model."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, mask_function: Any = causal_mask_function, config: Any = None, **kwargs: Any) -> Any:
    """No mask for the layers we attend (padding is an empty slot, causality is structural); the original elsewhere.

    Elsewhere is a layer that the policies leave alone, another model that shares the config, and a model around the decoder
    (for images and text) that makes the masks before it calls the decoder, which takes the padding out of them.
    """
    # What is compiled cannot ask for the pass in progress.
    if mask_function is causal_mask_function and (torch.compiler.is_compiling() or active_pass() is not None):
        return None
    original = AttentionMaskInterface().get(originals.name(config))
    return None if original is None else original(*args, mask_function=mask_function, config=config, **kwargs)


def causal_padding(mask: Tensor) -> Tensor:
    """The padding mask that a causal mask was made with.

    Args:
        mask: [batch, 1, rows, tokens], True or 0 where a row sees a token.

    Returns:
        bool [batch, tokens].

    Raises:
        PolicyError: the mask is not causal.
    """
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    real = sees[:, -1]  # the last row sees all that are
    rows, tokens = sees.shape[1:]
    places = torch.arange(tokens, device=mask.device)
    causal = places <= places[tokens - rows :, None]
    differs = (sees != (causal & real[:, None])) & real[:, tokens - rows :, None]  # a row of padding may see anything
    if bool(differs.any()):
        raise PolicyError(
            "the attention mask that came with this input is not just causal (the tokens of an image see each other in both "
            "directions, or a mask of your own); kvpress attends causally. Give text alone, or unpatch the model"
        )
    return real


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend a layer of a patched model: by its policies, or, for a layer they leave alone, as the model did before.

    Args:
        module: the attention module.
        query: [batch, heads, q, head_dim].
        key, value: [batch, kv_heads, q, head_dim], the new tokens only (a layer left alone gets what its cache returns).

    Returns:
        [batch, q, heads, head_dim] and None.
    """
    layer = getattr(module, COMPILED_LAYER, None)
    if layer is not None and torch.compiler.is_compiling():
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend_step(query, key, value, kwargs.get("s_aux"), layer, scale, kwargs.get("softcap")), None
    current = active_pass()
    index = None if current is None else current.modules.get(id(module))
    if current is None or index is None:
        default = sys.modules[type(module).__module__].eager_attention_forward
        name = originals.name(module.config)
        function = default if name == "eager" else AttentionInterface().get(name, default)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    current.attend(index, type(module).__name__)
    if current.seen is not None:  # a probe: what one token alone attends to is its own value
        current.seen[index] = query, key
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None
    for refused in ("position_bias", "sliding_window"):
        if kwargs.get(refused) is not None:
            raise PolicyError(
                f"{type(module).__name__} passes {refused}, which kvpress does not support; unpatch the model"
            )
    if attention_mask is not None:
        raise PolicyError(
            f"{type(module).__name__} was given an attention mask that is not just causal, made by the model itself (tokens that "
            "see each other in both directions, or sequences packed into one row); kvpress attends causally"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if not current.layers:  # no cache: every policy leaves a single pass exact
        with no_autocast(query.device):
            rows, key = _in_dtype(value.dtype, query, key)
            output = _exact(rows, key, value, current.tokens, scores).to(query.dtype)
        return output.transpose(1, 2).contiguous(), None
    output = _attend(query, key, value, scores, current, index)
    if query.requires_grad:
        output = _NoBackward.apply(output, query)
    return output.transpose(1, 2).contiguous(), None


# A CUDA graph would replay the numbers of entries that it was captured with: the tag keeps the operation out of one.
@torch.library.custom_op("kvpress::attend_step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """A decode step's attention in one layer of the pass in progress, as one operation of a compiled graph.

    That it also writes to the cache is nothing a graph needs to know: layers depend on one another, so they stay in order.

    Args:
        query: [batch, heads, 1, head_dim].
        key, value: [batch, kv_heads, 1, head_dim].
        layer: which of the layers that the policies act on.

    Returns:
        [batch, 1, heads, head_dim].
    """
    current = active_pass()
    assert current is not None
    current.attend(layer, "attention")
    output = _attend(query, key, value, Scores(scale, softcap, sinks), current, layer)
    return output.transpose(1, 2).contiguous()


@attend_step.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass, index: int) -> Tensor:
    """A layer's part of a pass with a cache, in the dtype of the layer's entries; the output in that of the query.

    Within `torch.autocast` query, key and value may have different dtypes, and others than in the passes before.
    """
    layer = current.layers[index]
    with torch.no_grad(), no_autocast(query.device):
        dtype = layer.dtype if layer.is_initialized else value.dtype
        rows, key, value = _in_dtype(dtype, query, key, value)
        step = _prompt if current.prompt else _decode
        return step(layer, current.tokens, rows, key, value, scores, current).to(query.dtype)


def _in_dtype(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)


def _exact(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, scores: Scores) -> Tensor:
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


def _prompt(
    layer: KVLayer, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass
) -> Tensor:
    layer.scores = scores
    arrived, query = query, layer.own_query(query, tokens)
    if layer.eviction.evict == "each_row":
        return _row_by_row(layer, tokens, query, key, value, scores, current)
    past = layer.length
    if layer is current.layers[0]:
        for one in current.layers:
            one.prepare(key, value, tokens)
    layer.state.clear()
    layer.append(key, value, tokens)
    if layer.roles.plans and not current.exact:
        output = _planned(layer, tokens, query, scores, current, past)
    elif tokens.columns is None:
        output = _attend_rows(layer, query, scores, current, past, slice(None), layer.length)
    else:  # each padded sequence alone: nothing is computed for padding, and no mask is needed
        output = torch.zeros_like(query[..., : value.shape[-1]])
        for row, columns in enumerate(tokens.columns):
            only, columns = slice(row, row + 1), columns.to(query.device)
            if len(columns):
                stop = past + len(columns)
                output[only, :, columns] = _attend_rows(
                    layer, query[only, :, columns], scores, current, past, only, stop
                )
    if current.record is not None:
        current.record.append((tokens, arrived, key, value, scores))
    layer.finish_prompt(query, tokens, scores, current.new_tokens, past, mass_known=layer.takes_prompt_mass)
    return output


def _attend_rows(
    layer: KVLayer, query: Tensor, scores: Scores, current: Pass, past: int, only: slice, stop: int
) -> Tensor:
    """The rows of a prompt pass (of one sequence, or of all) over the first `stop` slots, the rows' own ones last."""
    keys, values = layer.used(only, stop)
    valid = layer.valid(past)
    valid = None if valid is None else valid[only]
    moved = _moved(layer, query, past, current, only)
    if layer.raw_keys:
        positions = layer.positions[only, :, :stop]
        raw = _unrotated(layer, query, positions.amax(dim=(1, 2)) + 1)
        query, keys = _turned(layer, raw, keys, positions)
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
    output = torch.empty_like(query[..., : value.shape[-1]])
    before = tokens.seen_tensor - (tokens.positions >= 0).sum(1, dtype=torch.int32)
    for row in range(tokens.count):
        one, step = slice(row, row + 1), one_row(tokens, row, before)
        layer.append(key[:, :, one], value[:, :, one], step)
        layer.texts.advance(0, step.seen, step.seen_tensor)  # each layer goes through the rows anew
        output[:, :, one] = _read(layer, step, query[:, :, one], scores, current)
        before = step.seen_tensor
    layer.texts.advance(0, tokens.seen, tokens.seen_tensor)
    return output


def _planned(layer: KVLayer, tokens: Tokens, query: Tensor, scores: Scores, current: Pass, past: int) -> Tensor:
    """A prompt pass whose rows read what the prefill policy plans, each sequence alone unless all hold as many entries."""
    output = torch.zeros_like(query[..., : layer.values.shape[-1]])
    sequences: list[tuple[slice, Tensor | None, int]] = [(slice(None), None, tokens.count)]
    if tokens.columns is not None:
        columns = [one.to(query.device) for one in tokens.columns]
        sequences = [(slice(row, row + 1), one, len(one)) for row, one in enumerate(columns)]
    elif not layer.uniform:
        sequences = [(slice(row, row + 1), None, tokens.count) for row in range(len(query))]
    places = tokens.positions.expand(len(query), -1)
    for only, own, count in sequences:
        held = _in_order(layer, only, past, past + count)
        if past and _moved_query(layer, query[only, :, :1], current, only) is not None:
            held = None
        for start in range(0, count, layer.prefill.chunk or max(1, count)):
            chunk = slice(start, min(count, start + (layer.prefill.chunk or count)))
            rows = chunk if own is None else own[chunk]
            part, stop = query[only, :, rows], past + chunk.stop
            pattern = None
            if held is not None:
                keys, values, positions = (x[:, :, : x.shape[2] - count + chunk.stop] for x in held)
                seen = places[only][:, rows][:, -1].to(keys.device) + 1
                view = _view(layer, part, scores, current, only, stop, seen)
                view = replace(view, keys=keys, positions=positions, valid=None, state={}, shared={}, moved=None)
                pattern = layer.prefill.plan(view)
            if pattern is None:
                output[only, :, rows] = _attend_rows(layer, part, scores, current, past + start, only, stop)
            else:
                output[only, :, rows] = _attend_pattern(layer, pattern, view.query, keys, values, scores)
    return output


def _in_order(layer: KVLayer, only: slice, past: int, stop: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Keys, values and positions of what a sequence (or each of all) holds in the first `stop` slots, in position order.

    None where kv heads hold different numbers of entries.

    Args:
        past: slots that were in use before the pass; what lies behind is in order.
    """
    (keys, values), positions = layer.used(only, stop), layer.positions[only, :, :stop]
    if past == 0 or (layer.ordered and layer.is_full):
        return keys, values, positions
    most = least = layer.entries
    if not layer.uniform:
        counts = (positions >= 0).sum(-1)
        most, least = int(counts.max()), int(counts.min())
    if least < most:
        return None
    order = in_position_order(positions)[..., :most]
    return *gather_both(keys, values, order), positions.gather(2, order)


def _attend_pattern(
    layer: KVLayer, pattern: Pattern, query: Tensor, keys: Tensor, values: Tensor, scores: Scores
) -> Tensor:
    """Rows of a prompt over what they read of the entries, which are in position order, the rows' own ones last."""
    if pattern.index is not None:
        keys, values = gather_both(keys, values, pattern.index)
    if layer.raw_keys:
        query, keys = _turned(layer, query, keys, None)
    if pattern.blocks is None:
        attend = decode_attention if query.shape[2] == 1 else prompt_attention
        return attend(query, keys, values, **vars(scores))[0]
    # The rows' first block may begin before them.
    before = (keys.shape[2] - query.shape[2]) % pattern.block_size
    rows = functional.pad(query, (0, 0, before, 0))
    output, _ = block_sparse_attention(
        rows, keys, values, blocks=pattern.blocks, block_size=pattern.block_size, **vars(scores)
    )
    return output[:, :, before:]


def _decode(
    layer: KVLayer, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores, current: Pass
) -> Tensor:
    if layer.index == 0:
        for one in current.layers:  # before the first counts the token of this step
            one.settle()
    layer.steps += 1
    if layer.last_unread:
        _show_last_row(layer, scores, current)
    query = layer.own_query(query, tokens)
    layer.append(key, value, tokens)
    layer.facts.readable += layer.texts.columns
    output = _read(layer, tokens, query, scores, current, decode=True)
    if layer.state:
        layer.facts.nbytes = layer.nbytes
    return output


def _show_last_row(layer: KVLayer, scores: Scores, current: Pass) -> None:
    """Show the selection policy what the prompt's last row reads of what was kept, before the first decode step."""
    layer.last_unread = False
    assert layer.last_row is not None and layer.last_position is not None
    keys, values = layer.used()
    seen = layer.last_position.view(-1).to(keys.device) + 1
    view = _view(layer, layer.last_row, scores, current, slice(None), layer.length, seen)
    valid = layer.valid(layer.length)
    if not layer.uniform:
        valid = (view.positions >= 0) & (view.positions < seen[:, None, None])
    _, weights, _ = decode_attention(view.query, keys, values, valid, **vars(scores), with_mass=True, per_head=True)
    assert weights is not None
    layer.selection.after_read(view, Selected(), weights)


def _read(layer: KVLayer, tokens: Tokens, query: Tensor, scores: Scores, current: Pass, decode: bool = False) -> Tensor:
    """One row over what the cache holds; then the eviction policy acts.

    In a decode step the row reads what the selection policy chooses, and that is counted; a prompt's row is exact.
    """
    observed = layer.takes_mass
    read = float(layer.length)
    if layer.roles.selects and decode:
        view = _view(layer, query, scores, current, slice(None), layer.length, tokens.seen_tensor.to(query.device))
        output, mass, read = _read_selected(layer, view, scores, observed)
    elif isinstance(layer, PagedLayer) and layer.pages is not None:
        observed = layer.observer.needs_every_row
        output, mass = layer.attend(query, scores, with_mass=observed)
        read = layer.facts.length
    else:
        keys, values = layer.used()
        moved = _moved_row(layer, query, layer.length, current)
        turned, perturbed = query, None
        if layer.raw_keys:
            raw = _unrotated(layer, query, tokens.seen_tensor)
            turned, keys = _turned(layer, raw, keys, layer.positions[:, :, : layer.length])
        elif moved is None and layer.observer.needs_every_row:
            observed, perturbed = True, layer.perturbed(tokens, current.new_tokens)
        output, mass, _ = decode_attention(
            turned,
            keys,
            values,
            layer.valid(layer.length),
            **vars(scores),
            moved=moved,
            perturbed=perturbed,
            with_mass=observed,
        )
    if decode:
        layer.facts.read += read
    if layer.observer.needs_every_row:
        counted = mass if observed else None
        layer.observe_step(query, tokens, scores, current.new_tokens, counted)
        if counted is None and layer.roles.selects and decode:
            layer.facts.read += layer.length / 2  # the keys of what was not selected, too
    layer.evict_step()
    return output


def _view(layer: KVLayer, query: Tensor, scores: Scores, current: Pass, only: slice, stop: int, seen: Tensor) -> View:
    """The first `stop` slots of the layer (of one sequence) and the rows that are about to read them."""
    keys, _ = layer.used(only, stop)
    valid = layer.valid(stop)
    turn = None
    if layer.raw_keys:
        assert layer.rotary is not None
        turn = partial(rotated, rotary=layer.rotary)
        query = _unrotated(layer, query, seen)
    return View(
        layer=layer.index,
        layers=layer.count,
        query=query,
        keys=keys,
        positions=layer.positions[only, :, :stop],
        valid=None if valid is None else valid[only],
        seen=seen,
        scale=scores.scale,
        softcap=scores.softcap,
        turn=turn,
        state=layer.state,
        shared=current.shared,
        rows=only,
        moved=_moved_row(layer, query, stop, current, only) if query.shape[2] == 1 else None,
        aligned=not layer.evicts,
    )


def _read_selected(
    layer: KVLayer, view: View, scores: Scores, observed: bool = False
) -> tuple[Tensor, Tensor | None, float]:
    """Attend what the selection policy chooses for one row: output, mass per slot if it is observed, entries read per kv head."""
    selection = layer.selection
    selected = selection.select(view)
    with_mass = observed or selection.observes_reads
    stop, query = view.keys.shape[2], view.query
    index = None
    if selected.index is None:
        keys, values = layer.used(view.rows, stop)
        member, read = view.valid, float(stop)
    elif not layer.raw_keys:  # the kernel reads the listed slots where they are
        keys, values, index = layer.keys[view.rows], layer.values[view.rows], selected.index
        member, read = selected.member, float(index.shape[2])
    else:
        keys, values = gather_both(layer.keys[view.rows], layer.values[view.rows], selected.index)
        member, read = selected.member, float(keys.shape[2])
    if layer.raw_keys:
        places = None  # everything is there and in order
        if member is not None or layer.evicts:
            places = view.positions if selected.index is None else view.positions.gather(2, selected.index)
            places = places if member is None else places.masked_fill(~member, -1)
        query, keys = _turned(layer, query, keys, places)
    moved = view.moved
    if moved is not None and selected.index is not None:
        slots = moved[1]
        chosen = selected.index < slots if isinstance(slots, int) else slots.gather(2, selected.index)
        moved = moved[0], chosen
    output, mass, _ = decode_attention(
        query,
        keys,
        values,
        member,
        **vars(scores),
        moved=moved,
        index=index,
        with_mass=with_mass,
        per_head=selection.observes_reads,
    )
    if mass is not None and selection.observes_reads:
        selection.after_read(view, selected, mass)
        mass = mass.unflatten(1, (keys.shape[1], -1)).sum(2)
    if mass is not None and selected.index is not None:
        mass = mass.new_zeros(mass.shape[0], mass.shape[1], stop).scatter_add_(2, selected.index, mass)
    return output, mass if observed else None, read + selected.scanned


def _unrotated(layer: KVLayer, query: Tensor, seen: Tensor) -> Tensor:
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


def _turned(layer: KVLayer, query: Tensor, keys: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
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
    turned = rotated(query, places[:, None], layer.rotary).to(keys.dtype)
    return turned, rotated(keys, ranks, layer.rotary)


def _moved(layer: KVLayer, query: Tensor, past: int, current: Pass, only: slice) -> tuple[Tensor, Tensor] | None:
    """The query for entries that are attended at other positions than their own, and which those are of the first `past`."""
    other = _moved_query(layer, query, current, only) if past else None
    return None if other is None else (other, _sinks(layer, past, only))


def _moved_row(
    layer: KVLayer, query: Tensor, stop: int, current: Pass, only: slice = slice(None)
) -> tuple[Tensor, Tensor | int] | None:
    """The same for a single row, of the first `stop` slots.

    In an unpadded batch their number is enough: they are the first, as sinks are never dropped.
    """
    other = _moved_query(layer, query, current, only)
    if other is None:
        return None
    if layer.uniform:
        return other, min(layer.reindexed_sinks, stop)
    return other, _sinks(layer, stop, only)


def _moved_query(layer: KVLayer, query: Tensor, current: Pass, only: slice) -> Tensor | None:
    """The query for the sinks of a re-indexing policy, [batch, heads, rows, head_dim]; None if they are where they were.

    The recent entries that the policy keeps stand side by side up to the query, so their distances are right as they are;
    the sinks before them must come nearer by the gap between. Rotating the query back by the gap does that.
    """
    if layer.rotary is None or layer.reindexed_sinks == 0 or layer.texts.seen_tensor is None:
        return None
    gap: int | Tensor
    if layer.uniform and layer.texts.seen is not None:
        gap = layer.texts.seen[0] - layer.entries
        if gap == 0:
            return None
    else:
        held = (layer.positions[only, 0, : layer.length] >= 0).sum(-1)
        gap = layer.texts.seen_tensor.to(held.device)[only] - held
    return nearer(query, gap, current.tokens, layer.rotary)


def _sinks(layer: KVLayer, stop: int, only: slice) -> Tensor:
    """Which of the first `stop` slots hold a sink that is re-indexed, bool [batch, kv_heads, stop]."""
    positions = layer.positions[only, :, :stop]
    return (positions >= 0) & (positions < layer.reindexed_sinks)


class _NoBackward(torch.autograd.Function):
    """Lets a forward pass outside `torch.no_grad` through and refuses its backward, which would miss the cache."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise PolicyError(
            "a kvpress cache carries no gradients; run with use_cache=False (exact attention) or unpatch the model to train"
        )
