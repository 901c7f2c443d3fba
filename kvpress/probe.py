"""Look at how each layer of a model rotates queries and keys, by running it on single tokens at several positions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress.attention import originals, register
from kvpress.compat import forward_parameters
from kvpress.errors import UnsupportedModelError
from kvpress.passes import Pass, active_pass, set_pass
from kvpress.rotary import Rotary, same_lengths, same_rotation
from kvpress.tokens import plain_tokens

FAR = 1 << 20  # further than any length from which on a model scales its queries by their position


def find_rotary(decoder: Any, attention: dict[int, Any], configs: Sequence[Any]) -> list[Rotary]:
    """How each attention layer rotates; a layer that rotates nothing has a rotation without channels.

    Every layer's queries and keys are taken where they reach the attention function, so what counts is the layer's own
    call: layers without rotation, partial and interleaved rotation, and whatever else is done to queries and keys after it.

    Args:
        decoder: the module that owns the layers.
        attention: layer index -> attention module.
        configs: the config objects that the modules read their attention implementation from.

    Raises:
        UnsupportedModelError: entries cannot be moved to other positions by one rotation.
    """
    name = type(decoder).__name__
    candidates = _candidates(decoder)
    last = getattr(decoder.config, "max_position_embeddings", None) or 64
    positions = torch.tensor([0, 1, 3, min(63, last - 1)])
    near = _run(decoder, attention, configs, positions)
    found = []
    for index, seen in zip(attention, near, strict=True):
        rotary = same_rotation(seen, positions, candidates)
        if rotary is None:
            raise UnsupportedModelError(
                f"the queries and keys of layer {index} of {name} at a position are not those of position 0, rotated (its "
                "positions are of another kind, or more is done after the rotation: a norm with weights, a scale by the position)"
            )
        found.append(rotary)
    for index, seen, beyond in zip(
        attention, near, _run(decoder, attention, configs, torch.tensor([FAR])), strict=True
    ):
        if not all(map(same_lengths, seen, beyond)):
            raise UnsupportedModelError(f"layer {index} of {name} scales its queries or keys by their position")
    return found


def _candidates(decoder: Any) -> list[Rotary]:
    """The rotations that the decoder's frequencies allow, and none at all."""
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                raise UnsupportedModelError(
                    f"{type(decoder).__name__} has rotary positions of the type {kind!r}, whose frequencies depend on the length"
                )
    frequencies = [
        buffer
        for name, buffer in decoder.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq") and buffer.ndim == 1
    ]
    trained = getattr(decoder.config, "max_position_embeddings", None)
    found = [Rotary(buffer, interleaved, trained) for buffer in frequencies for interleaved in (False, True)]
    return [*found, Rotary(torch.empty(0), False, trained)]


@torch.no_grad()
def _run(
    decoder: Any, attention: dict[int, Any], configs: Sequence[Any], positions: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Query and key of one token at each of the positions as each layer attends them, [positions, heads, 1, head_dim].

    The token is alone in its sequence, so that a layer's input does not depend on how the layers before it rotate.
    """
    device = decoder.get_input_embeddings().weight.device
    device = positions.device if device.type == "meta" else device  # accelerate moves what its layers get
    ids = torch.full((len(positions), 1), decoder.config.vocab_size // 2, device=device)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    modules = {id(module): ordinal for ordinal, module in enumerate(attention.values())}
    tokens = plain_tokens(len(positions), 1, None, None, device)
    if "position_ids" not in forward_parameters(decoder):
        raise UnsupportedModelError(f"{type(decoder).__name__} takes no position_ids")
    training = [module for module in decoder.modules() if module.training]
    register()
    for config in configs:
        originals.switch(config)
    before = active_pass()
    try:
        current = Pass(modules, tokens, [], prompt=True, seen=seen)
        set_pass(current)
        decoder.eval()
        decoder.forward(input_ids=ids, position_ids=positions[:, None].to(device), use_cache=False)
        current.check_attended()
    finally:
        set_pass(before)
        for config in configs:
            originals.restore(config)
        for module in training:
            module.training = True
    return [seen[ordinal] for ordinal in range(len(attention))]
