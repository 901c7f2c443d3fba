"""What runs in place of a patched decoder's `forward`: a pass, from the call to its result."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpress.attention import NAME, causal_padding
from kvpress.compat import DynamicCache, DynamicLayer, ModelOutput, cache_argument, forward_parameters, rename_cache
from kvpress.contexts import lasting_tensors, no_autocast
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.in_play import BlockInPlay, InPlay
from kvpress.layer import KVLayer
from kvpress.passes import (
    Looked,
    Pass,
    active_pass,
    current_record,
    expected_chunk,
    expected_tokens,
    in_generate,
    set_pass,
    wanted_rows,
)
from kvpress.places import check_consecutive
from kvpress.policy import Call, Feed, Feeds, Look, Policy, Roles
from kvpress.rotary import Rotary
from kvpress.step import StepInputs, show_last_row
from kvpress.support import check_cache, find_blocks
from kvpress.texts import Texts
from kvpress.tokens import Ragged, Tokens, masked_tokens, plain_tokens
from kvpress.wrapper import Wrapper

if TYPE_CHECKING:
    from kvpress.patching import Handle


class PatchedForward(Wrapper):
    """A decoder's `forward` under policies.

    Args:
        decoder: the module that takes the cache and owns the layers.
        handle: the handle that reports on it.
        policies: the policies.
        attention: layer index -> attention module, of the layers that the policies act on.
        rotary: how each such layer rotates queries and keys, for policies that re-index positions; else empty.
    """

    def __init__(
        self,
        decoder: Any,
        handle: "Handle",
        policies: list[Policy],
        attention: dict[int, torch.nn.Module],
        rotary: list[Rotary],
    ) -> None:
        super().__init__(decoder, "forward")
        self.handle = handle
        self.run = self.inner
        self.roles = Roles.of(policies)
        self.indices = list(attention)
        self.decoder = decoder
        self._rotary = rotary
        self._moving = next((policy for policy in policies if policy.places.moved), None)
        self._modules = {id(module): ordinal for ordinal, module in enumerate(attention.values())}
        self._parameters = forward_parameters(decoder)
        self.cache_argument = cache_argument(decoder)
        blocks = find_blocks(decoder, attention) if self.roles.stops else []
        self._blocks = [(block, BlockInPlay(block, index)) for index, block in enumerate(blocks)]

    def remove(self, owner: Any) -> None:
        for block, wrapper in self._blocks:
            wrapper.remove(block)
        super().remove(owner)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        kwargs = self._named(args, kwargs)
        mask = self._padding(kwargs)
        inputs = self._check_call(kwargs, mask)
        before, run = active_pass(), object()
        try:
            self.handle.begin(run)
            with lasting_tensors():  # all that a layer is given, too: what it keeps may be a view of that
                output = self._run(inputs, mask, kwargs)
        finally:  # whatever ends the pass: Ctrl-C, a generator that is closed, an error
            set_pass(before)
            self.handle.end(run)
        self.handle.note_others()
        return output

    # ------------------------------------------------------------------ the call

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names of the decoder's own."""
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        try:
            rename_cache(kwargs, self.cache_argument)
        except ValueError as error:
            raise PolicyError(str(error)) from error
        return kwargs

    def _check_call(self, kwargs: dict[str, Any], mask: Any) -> Tensor:
        """The pass's input, [batch, count] ids or [batch, count, hidden] embeddings, or what is wrong with the call."""
        found = self.decoder.config._attn_implementation
        if found != NAME:
            raise PolicyError(
                f"the attention implementation was changed to {found!r} while the model is patched; unpatch it first, or change "
                "it before patching"
            )
        if kwargs.get("output_attentions"):
            raise PolicyError(
                "output_attentions=True is not possible on a patched model; unpatch it to look at attention weights"
            )
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise PolicyError(
                f"a {mask.ndim}-D attention mask cannot be used on a patched model; pass a 2-D padding mask, or none"
            )
        inputs: Tensor | None = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None or inputs.shape[1] == 0:
            raise PolicyError("the prompt is empty (no tokens); give at least one token")
        if mask is not None and mask.shape[0] != inputs.shape[0]:
            raise PolicyError(
                f"attention_mask has {mask.shape[0]} rows and the input {inputs.shape[0]} sequences; give one row for each"
            )
        return inputs

    def _padding(self, kwargs: dict[str, Any]) -> Any:
        """The padding mask of a call [batch, tokens], or None.

        A model around the decoder (for images and text) makes a mapping of masks, by kind of layer. The one for full
        attention comes from our mask function; the others stay in `kwargs`.
        """
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, dict):
            return mask
        if "full_attention" not in mask or not hasattr(self.decoder.config, "layer_types"):
            raise PolicyError(
                f"a mapping of attention masks for {', '.join(map(repr, mask))} cannot be used on a patched model; pass a 2-D "
                "padding mask, or none"
            )
        full = mask["full_attention"]
        if isinstance(full, Tensor) and full.ndim == 4:
            full = causal_padding(full)
        kwargs["attention_mask"] = {**mask, "full_attention": None} if len(mask) > 1 else full
        return full

    def _check_no_training(self) -> None:
        if self.decoder.training and torch.is_grad_enabled():
            raise PolicyError(
                "the model is in training mode with gradients on, and a kvpress cache carries none; call model.eval() or use "
                "torch.no_grad() to generate, or use_cache=False (exact attention) or unpatch to train"
            )

    def _check_no_checkpointing(self) -> None:
        if not (self.decoder.training and torch.is_grad_enabled()):
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in self.decoder.modules()):
            raise PolicyError(
                "gradient checkpointing runs the layers again in backward, when the patched pass is over; switch it off, or "
                "unpatch to train"
            )

    # ------------------------------------------------------------------ the pass

    def _run(self, inputs: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """What a call gets: the output of the runs that the route makes of it."""
        batch, count = inputs.shape[:2]
        cache = kwargs.get(self.cache_argument)
        wants_cache = self.decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if cache is None and not wants_cache:
            self._check_no_checkpointing()
            _check_not_packed(kwargs.get("position_ids"), mask)
            tokens = self._tokens(batch, count, mask, inputs.device, None, prompt=True)
            return self._run_pass(Pass(self._modules, tokens, [], prompt=True), kwargs)
        self._check_no_training()
        if cache is None:
            cache = kwargs[self.cache_argument] = DynamicCache(config=self.decoder.config)
        layers = self.layers(cache, mask, batch, count)
        acted = [layers[index] for index in self.indices]
        texts = acted[0].texts
        prompt = self._is_prompt(count, texts)
        tokens = self._tokens(batch, count, mask, inputs.device, texts, prompt)
        _count_on(kwargs, tokens, texts)
        self._check_positions(kwargs.get("position_ids"), tokens, acted[0])
        call = Call(
            inputs,
            kwargs.get("position_ids"),
            places=tokens.positions,
            layers=len(acted),
            rows=wanted_rows(),
            is_chunk=expected_chunk() == count,
        )
        feeds, look, output = self.roles.route.feeds(call, texts), None, None
        while (feed := _following(feeds, look)) is not None:
            look = None
            if feed.last_layer is not None:
                look = self._look(feed, call, mask, kwargs, texts)
                continue
            if feed is not call:
                if feed.back:
                    for layer in acted:
                        layer.take_back(feed.back)
                fed = _mask_of(feed, mask, texts)
                kwargs = _arguments(feed, call, kwargs, fed, self.roles.route.describe())
                prompt = self._is_prompt(feed.count, texts) or feed.columns is not None
                tokens = self._tokens(batch, feed.count, fed, inputs.device, texts, prompt)
            cache.layers[:] = layers  # only now that nothing can be refused any more
            cache.layer_class_to_replicate = None
            self.handle.watch(cache)
            current = Pass(
                self._modules,
                tokens,
                acted,
                prompt,
                new_tokens=expected_tokens(),
                exact=feed.back > 0,
                record=current_record(),
                ragged=None if self.roles.stops else _ragged(tokens, texts),
            )
            if self.roles.stops:
                output = self._run_in_play(current, kwargs, texts)
            else:
                output = self._run_pass(current, _in_one_row(current, feed, call, kwargs))
            if feed.columns is not None:
                _leave_out(feed, feed.columns, call, texts)
            if prompt and count == 1 and feed is not call:  # a decode step all the same, which read everything
                for layer in acted:
                    layer.facts.readable += texts.columns
                    layer.facts.read += layer.facts.length
            output = _from_row(feed.first, output)
        return output

    def _look(self, feed: Feed, call: Call, mask: Tensor | None, kwargs: dict[str, Any], texts: Texts) -> Look:
        """Run the call's tokens alone, without the cache, up to the attention of one layer."""
        own = None if mask is None else mask[:, -feed.count :]
        batch, device = len(feed.tokens), feed.tokens.device
        tokens = self._tokens(batch, feed.count, own, device, None, prompt=True)
        given = _arguments(feed, call, kwargs, own, self.roles.route.describe())
        given |= {self.cache_argument: None, "use_cache": False}
        ragged = _ragged(tokens, texts)
        current = Pass(self._modules, tokens, [], prompt=True, last_layer=feed.last_layer, ragged=ragged)
        set_pass(current)
        try:
            with torch.no_grad():
                self.inner(**_in_one_row(current, feed, call, given))
        except Looked as looked:
            return looked.look
        raise UnsupportedModelError(
            f"layer {feed.last_layer} of {type(self.decoder).__name__} did not call the attention function, so there is nothing to "
            f"choose by; kvpress cannot run {self.roles.route.describe()} on this model"
        )

    def _is_prompt(self, count: int, texts: Texts) -> bool:
        """Whether a run of so many columns is a prompt pass: where tokens may stop, a step has older ones beside its own."""
        return count > 1 or texts.columns == 0 or self.roles.stops

    def _run_in_play(self, current: Pass, kwargs: dict[str, Any], texts: Texts) -> Any:
        """A pass in which tokens may stop: if some do, the caller gets the row of each sequence's newest token."""
        if texts.unfinished:
            raise PolicyError(
                f"the latest pass over this cache was ended by an error, and under {self.roles.route.describe()} its layers may "
                "lack tokens since; start a new cache"
            )
        if current.tokens.columns is not None and not any(map(len, current.tokens.columns)):
            return self._run_pass(current, kwargs)  # nothing but padding
        in_play = current.in_play = InPlay(current)
        texts.unfinished = True
        output = self._run_pass(current, kwargs)
        texts.unfinished = False
        if not in_play.stopped or in_play.call.count == 1:
            return output
        shape, columns = in_play.shape, in_play.newest_columns

        def newest(x: Tensor) -> Tensor:
            return (
                x[torch.arange(len(x), device=x.device), columns.to(x.device)][:, None] if x.shape[:2] == shape else x
            )

        return _each(output, newest)

    def _run_pass(self, current: Pass, kwargs: dict[str, Any]) -> Any:
        set_pass(current)
        if current.prompt:
            output = self.run(**kwargs)
        else:
            takes = getattr(self.run, "takes", None)
            compiled = takes is not None and takes(current, kwargs)
            open_step(current, compiled)
            output = self.run(**kwargs)
            close_step(current)
        current.check_attended()
        return output if current.ragged is None else _apart(output, current.ragged)

    def _check_positions(self, places: Tensor | None, tokens: Tokens, layer: KVLayer) -> None:
        """Refuse position ids that a policy cannot re-index, and note how far they are ahead of the number of tokens.

        On a GPU a decode step waits for the device only if its position ids are the caller's own.
        """
        if self._moving is None:
            return
        seen, offset = layer.texts.columns, layer.texts.offset
        if places is None:  # the model counts columns
            if layer.uniform and not tokens.padded and offset is None:
                return
            places = torch.arange(seen, seen + tokens.count, device=tokens.positions.device)[None]
        if tokens.count == 1 and seen > 0 and places.device.type != "cpu" and in_generate():
            return
        if seen == 0:
            offset = None
        elif offset is None and layer.uniform:
            offset = torch.zeros_like(tokens.seen_tensor, dtype=torch.int64)
        layer.texts.offset = check_consecutive(places, tokens, offset, self._moving.describe())

    def _tokens(
        self, batch: int, count: int, mask: Tensor | None, device: Any, texts: Texts | None, prompt: bool
    ) -> Tokens:
        before, before_tensor, seen = None, None, 0
        if texts is not None and texts.seen_tensor is not None:
            before, before_tensor, seen = texts.seen, texts.seen_tensor, texts.columns
            if before_tensor.shape[0] != batch:
                raise PolicyError(
                    f"the cache holds {before_tensor.shape[0]} sequences and the input has {batch}; give as many"
                )
            before_tensor = before_tensor.to(device)
        if mask is None:
            if prompt and before is None and before_tensor is not None:
                before = before_tensor.tolist()
            return plain_tokens(batch, count, before, before_tensor, device)
        if mask.shape[1] != seen + count:
            raise PolicyError(
                f"attention_mask has {mask.shape[1]} columns; the cache has seen {seen} tokens and the input has {count}, so it "
                f"must have {seen + count}"
            )
        mask = mask.to(device=device, dtype=torch.bool)
        if prompt and texts is not None and before_tensor is not None:
            known, told = texts.real.tolist(), mask[:, :seen].sum(1).tolist()
            if known != told:
                raise PolicyError(
                    f"attention_mask calls {told} of the tokens seen before real, and the cache took {known} for real; pass the "
                    "mask of the earlier passes, extended"
                )
            before = before_tensor.tolist()
        return masked_tokens(mask[:, -count:], before, before_tensor, prompt)

    # ------------------------------------------------------------------ the cache

    def layers(self, cache: Any, mask: Tensor | None, batch: int, count: int) -> list[Any]:
        """The cache's layers, with ours in the place of the plain ones that the policies act on."""
        held = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, KVLayer)]
        if held:
            if held[0].roles != self.roles or len(held) != len(self.indices):
                raise PolicyError(
                    f"this cache belongs to the policy {held[0].roles.describe()}; start a new one for {self.handle.describe()}"
                )
            if not held[0].is_initialized:  # as after a reset
                _share_texts(held)
            return list(cache.layers)
        check_cache(cache)
        # A DynamicCache() without config has no layers yet: it adds plain ones as they are used.
        layers = list(cache.layers) or [DynamicLayer() for _ in DynamicCache(config=self.decoder.config).layers]
        if len(layers) <= self.indices[-1]:
            raise PolicyError(
                f"the cache has {len(layers)} layers and the model needs {self.indices[-1] + 1}; pass "
                "DynamicCache(config=model.config), or none"
            )
        plain_layers = [layers[index] for index in self.indices]
        for ordinal, (index, plain) in enumerate(zip(self.indices, plain_layers, strict=True)):
            if type(plain) is not DynamicLayer:
                raise PolicyError(
                    f"layer {index} of the cache is a {type(plain).__name__}, not a plain DynamicLayer; pass "
                    "DynamicCache(config=model.config), or none"
                )
            rotary = self._rotary[ordinal] if self._rotary else None
            layers[index] = KVLayer(self.roles, ordinal, len(self.indices), rotary)
        _share_texts([layers[index] for index in self.indices])
        for index, plain in zip(self.indices, plain_layers, strict=True):
            if plain.get_seq_length():
                self._adopt(layers[index], plain, mask, batch, count)
        return layers

    def _adopt(self, layer: KVLayer, plain: Any, mask: Tensor | None, batch: int, count: int) -> None:
        """Take over what an unpatched run left in a plain layer."""
        eviction = self.roles.eviction
        if eviction.observes.needs_every_row:
            raise PolicyError(
                f"{eviction.describe()} needs the attention of every token, and this cache was filled by an unpatched run; "
                "run the whole prompt on the patched model, or use a policy that looks at the last rows only"
            )
        if eviction.observes.needs_prompt and count == 1:
            raise PolicyError(
                f"{eviction.describe()} needs the attention of the prompt's last tokens, and this cache was filled by an "
                "unpatched run; give several tokens in the next pass, or run the whole prompt on the patched model"
            )
        seen = plain.get_seq_length()
        if plain.keys.shape[0] != batch:
            raise PolicyError(
                f"the cache holds {plain.keys.shape[0]} sequences and the input has {batch}; give as many"
            )
        earlier = None if mask is None or mask.shape[1] <= seen else mask[:, :seen].to(plain.keys.device, torch.bool)
        if earlier is None:
            tokens = plain_tokens(batch, seen, None, None, plain.keys.device)
        else:
            tokens = masked_tokens(earlier, None, None, prompt=True)
        layer.take_over(plain.keys.detach(), plain.values.detach(), tokens)


@torch.no_grad()
def open_step(current: Pass, compiled: bool = False) -> None:
    """Make every layer ready for a decode step: what a prompt left for it is done, and there is room.

    Args:
        compiled: the step is to look at tensors alone: what the host counts is told by tensors, too.
    """
    with no_autocast(current.tokens.positions.device):
        for layer in current.layers:
            layer.settle()
            show_last_row(layer)
            layer.open_step(current.tokens, compiled)
    number, tokens = current.layers[0].steps, current.tokens
    if not compiled:
        current.step = StepInputs(tokens, number, current.new_tokens)
        return
    device = tokens.positions.device
    slots = [layer.storage.next_slot for layer in current.layers]
    current.step = StepInputs(
        tokens=Tokens(1, tokens.padded, tokens.positions, None, None, tokens.seen_tensor),
        number=torch.tensor(number, device=device),
        new_tokens=torch.tensor(current.new_tokens or 0, device=device),
        slots=torch.tensor(slots, device=device),
    )


def close_step(current: Pass) -> None:
    """Count a decode step that has been run."""
    tokens = current.tokens
    for layer in current.layers:
        layer.close_step(tokens)
    current.layers[0].texts.advance(1, tokens.seen, tokens.seen_tensor)


def _check_not_packed(position_ids: Any, mask: Tensor | None) -> None:
    """Without a cache and a mask, transformers takes positions that do not count up for sequences packed into one row."""
    if mask is not None or not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return
    if bool((position_ids.diff(dim=1) != 1).any()):
        raise PolicyError(
            "position_ids do not count up by one: without a cache and a mask that means several sequences packed into one row, "
            "which a patched model does not take apart; give each sequence a row, with a 2-D padding mask"
        )


def _share_texts(layers: list[KVLayer]) -> None:
    """Let the layers of a new cache share what is known of its sequences."""
    for layer in layers:
        layer.texts = layers[0].texts


def _ragged(tokens: Tokens, texts: Texts) -> Ragged | None:
    """How the sequences of a prompt pass go into one row; None where each has its own, as those without padding."""
    if not texts.prepacked or tokens.columns is None:
        return None
    ragged = Ragged(tokens.columns, tokens.count)
    return ragged if ragged.total else None  # a pass may be all padding


def _in_one_row(current: Pass, feed: Feed, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass, for the row in which its sequences lie where they do."""
    ragged, places = current.ragged, kwargs.get("position_ids")
    if ragged is None:
        return kwargs
    places = current.tokens.positions.clamp(min=0).long() if places is None else places
    row = Feed(ragged.joined(feed.tokens), ragged.joined(places, places.ndim - 2))
    return _arguments(row, call, kwargs, None, "kvpress.prepack")


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A decoder's output (hidden states, in whatever they are nested) with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _each(value, change)
        return output
    return tuple(_each(item, change) for item in output) if isinstance(output, tuple) else output


def _apart(output: Any, ragged: Ragged) -> Any:
    """A decoder's output, each sequence in a row of its own again."""
    return _each(output, lambda x: ragged.apart(x) if x.shape[:2] == (1, ragged.total) else x)


def _following(feeds: Feeds, look: Look | None) -> Feed | None:
    """The next run of a route, which is sent what the last one was for."""
    try:
        return feeds.send(look)
    except StopIteration:
        return None


def _count_on(kwargs: dict[str, Any], tokens: Tokens, texts: Texts) -> None:
    """Give a call the position ids of its tokens where the model could not count them itself.

    It does not know of tokens of its sequences that a route left out, nor of padding that it was not run on.
    """
    places: Tensor | None = kwargs.get("position_ids")
    if places is None and (texts.prepacked or texts.left_out is not None):
        kwargs["position_ids"] = tokens.positions.clamp(min=0).long()
    elif places is not None and texts.left_out is not None:
        kwargs["position_ids"] = places - texts.left_out.to(places.device)[:, None]


def _leave_out(feed: Feed, columns: Tensor, call: Call, texts: Texts) -> None:
    """Count the columns of a call that its run did not have."""
    chosen = columns >= 0
    real = (call.places >= 0).sum(1) - chosen.sum(1)
    kept = torch.where(chosen, feed.tokens, -1) if feed.tokens.ndim == 2 else None
    texts.leave_out(call.count - feed.count, real, kept)


def _mask_of(feed: Feed, mask: Tensor | None, texts: Texts) -> Tensor | None:
    """The padding mask of a feed, the columns before it included; None where none of them is padding."""
    if feed.columns is None:
        return None if mask is None else mask[:, : texts.columns + feed.count]
    chosen = feed.columns >= 0
    if mask is None:
        if bool(chosen.all()):
            return None
        mask = chosen.new_ones(len(chosen), texts.columns)
    return torch.cat((mask[:, : texts.columns], chosen.to(mask.device, mask.dtype)), dim=1)


def _arguments(feed: Feed, call: Call, kwargs: dict[str, Any], mask: Tensor | None, describe: str) -> dict[str, Any]:
    """A call's arguments with a feed's tokens, and their mask, in the place of its own; `describe` names who makes feeds."""
    name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
    others = {key: value for key, value in kwargs.items() if key != "cache_position"}
    for key in others.keys() - {name, "position_ids", "attention_mask"}:
        if isinstance(others[key], Tensor) and others[key].shape[:2] == call.tokens.shape[:2]:
            raise PolicyError(
                f"this call brings {key} for each token, and {describe} runs other tokens in its place; leave {key} out, or do "
                f"without {describe}"
            )
    if not isinstance(others.get("attention_mask"), dict):
        others["attention_mask"] = mask
    return {**others, name: feed.tokens, "position_ids": feed.positions}


def _from_row(first: int, output: Any) -> Any:
    """A decoder's output without the rows before the first."""
    return _each(output, lambda x: x[:, first:]) if first else output
