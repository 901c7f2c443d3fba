"""Find out how a model rotates its keys, by looking at what it does."""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.rope_shift import rope_shift


@dataclass(frozen=True)
class Rotary:
    """A model's rotary embedding: `inv_freq` [rotary_dim / 2], and whether channel pairs are interleaved."""

    inv_freq: Tensor
    interleaved: bool


def find_rotary(decoder: Any, attention: Any) -> Rotary | None:
    """The rotary embedding of an attention module, or None if positions cannot be moved by one rotation.

    The pairing of channels is probed: the model's own function rotates a vector, and the result is compared with both
    conventions. Frequencies that depend on the current length (dynamic NTK, LongRoPE) give None.
    """
    embedding = getattr(decoder, "rotary_emb", None)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if embedding is None or rotate is None:
        return None
    layer_type = getattr(attention, "layer_type", None)
    rope_type, inv_freq = getattr(embedding, "rope_type", "default"), getattr(embedding, "inv_freq", None)
    if isinstance(rope_type, dict):  # one embedding for several layer types (Gemma 3)
        rope_type, inv_freq = rope_type.get(layer_type), getattr(embedding, f"{layer_type}_inv_freq", None)
    if inv_freq is None or rope_type in ("dynamic", "longrope", None):
        return None

    device = inv_freq.device
    position = torch.tensor([[3]], device=device)
    vector = torch.linspace(
        -1, 1, attention.head_dim if hasattr(attention, "head_dim") else attention.head_size, device=device
    )
    vector = vector.view(1, 1, 1, -1)
    takes_type = "layer_type" in inspect.signature(embedding.forward).parameters
    with torch.no_grad():
        cos, sin = embedding(vector, position, **({"layer_type": layer_type} if takes_type else {}))
        expected, _ = rotate(vector, vector, cos, sin)
    scaling = getattr(embedding, f"{layer_type}_attention_scaling", getattr(embedding, "attention_scaling", 1.0))
    factor = torch.ones_like(vector)
    factor[..., : 2 * inv_freq.shape[0]] = scaling
    for interleaved in (False, True):
        moved = rope_shift(vector, position.flatten(), inv_freq, interleaved) * factor
        if torch.allclose(moved, expected.to(moved.dtype), atol=1e-4):
            return Rotary(inv_freq, interleaved)
    return None
