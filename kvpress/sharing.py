"""One prompt pass for several policies.

Policies that leave the attention of a prompt exact differ only in what they observe of it and keep. So the pass is made
once, and each policy's cache is made from its queries, keys and values.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpress.compat import CACHE, DynamicCache
from kvpress.errors import PolicyError
from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.passes import Record, recording
from kvpress.patching import patch
from kvpress.support import unwrapped
from kvpress.tokens import Tokens


@dataclass(frozen=True)
class SharedPrompt:
    """What a recorded prompt pass left; `handle.adopt_prompt(prompt)` makes a policy's cache from it.

    Attributes:
        logits: [batch, vocab], of the last position (a left-padded batch's last real tokens).
        tokens: the tokens of the pass.
        layers: query [batch, heads, n, head_dim], key and value [batch, kv_heads, n, head_dim], and how the model scores, for
            each layer that policies act on.
        others: a cache without those layers' entries: what the layers that policies leave alone hold.
        masses: attention mass of each entry, float32 [batch, kv_heads, n], by place in `layers` and whether it was computed
            from keys that are rotated anew; counted when the first policy asks for it, and kept for the next.
    """

    logits: Tensor
    tokens: Tokens
    layers: list[tuple[Tensor, Tensor, Tensor, Any]]
    others: DynamicCache
    masses: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded queries, keys and values."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer[:3])


class _Layers(Record):
    """Keeps what every layer attends with."""

    def __init__(self) -> None:
        self.tokens: Tokens | None = None
        self.layers: list[tuple[Tensor, Tensor, Tensor, Scores]] = []

    def attends(self, layer: int, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> None:
        self.tokens = tokens
        self.layers.append((query, key, value, scores))


@torch.no_grad()
def record_prompt(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> SharedPrompt:
    """Run a prompt once, with full attention, and keep what several policies need of it.

    Holds the queries, keys and values of all layers until the result is dropped.

    Args:
        model: a model that is not patched.
        input_ids: int [batch, n], at least two tokens.
        attention_mask: [batch, n], 0 for padding; or None.

    Raises:
        PolicyError: the model is patched, or the prompt is too short to be a prompt pass.
        UnsupportedModelError: the model cannot be patched.

    Example:
        >>> prompt = kvpress.record_prompt(model, input_ids)
        >>> for policy in (H2O(budget=0.2), SnapKV(budget=0.2)):
        ...     with kvpress.patch(model, policy) as handle:
        ...         cache = handle.adopt_prompt(prompt)
        ...         model(prompt.logits.argmax(-1, keepdim=True), cache=cache)
    """
    if input_ids.shape[1] < 2:
        raise PolicyError(f"a prompt of {input_ids.shape[1]} token(s) is not worth recording; give at least 2")
    places = {}
    if attention_mask is not None and "position_ids" in inspect.signature(unwrapped(model).forward).parameters:
        # As `generate` does: each sequence at its own positions, which not every policy's choice is indifferent to.
        places["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    record = _Layers()
    with patch(model, "full"), recording(record):
        output = model(input_ids, attention_mask=attention_mask, use_cache=True, logits_to_keep=1, **places)
    cache = output[CACHE]
    others = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, KVLayer):
            others.layers[index] = layer
    assert record.tokens is not None
    return SharedPrompt(output.logits[:, -1], record.tokens, record.layers, others)
