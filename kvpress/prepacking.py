"""Batches of prompts of different lengths, without running the model on padding."""

from typing import Any

import torch
from torch import Tensor

from kvpress.compat import CACHE, DynamicCache, forward_parameters
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.ids import START, as_lists, check_ids
from kvpress.layer import KVLayer
from kvpress.patching import Handle, handle_of
from kvpress.support import input_device, unwrapped


def prepack(model: Any, prompts: Any) -> dict[str, Any]:
    """Inputs for `generate` of a batch of prompts of different lengths, with a cache that has no padding computed.

    The inputs are those of a batch that is padded on the left. But with this cache the model runs on one row, in which the
    prompts lie end to end, each at its own positions; attention and policies take them apart, and each is attended
    alone. So every policy does with each prompt what it does with the prompt alone. The same goes for chunks of the prompts
    (`prefill_chunk_size`) and later turns. Decode steps are those of a padded batch.

    Source: Zhao et al., "Prepacking: A Simple Method for Fast Prefilling and Increased Throughput in Large Language Models",
    arXiv 2404.09529. The authors fill rows of the longest prompt's length, under a mask with a block for each prompt. Here
    attention needs no mask, so all prompts go into one row, and the last tokens with them.

    Args:
        model: a patched model; under the policy "full" all is exact.
        prompts: the token ids of each prompt, lists or tensors, as `tokenizer(texts)["input_ids"]`. Not padded.

    Returns:
        `input_ids` and `attention_mask` [batch, longest] and an empty cache, by the names of `generate`'s arguments: use it
        once. The model takes them as well; it then counts positions itself.

    Raises:
        PolicyError: the model is not patched, or there is no prompt, or an empty one, or ids that are none of the model's.
        UnsupportedModelError: some layers have no full attention, or the model takes no position ids. In the pass that
            follows: more inputs that come for each token.

    Example:
        >>> with kvpress.patch(model, SnapKV(budget=0.2)):
        ...     output = model.generate(**kvpress.prepack(model, tokenizer(texts)["input_ids"]), max_new_tokens=50)
    """
    prompts = as_lists(prompts)
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        raise PolicyError(f"prompts={prompts!r} is no list of prompts; give a list of token ids for each prompt")
    if any(isinstance(prompt, str) for prompt in prompts):
        raise PolicyError("prompts are texts; give their token ids, as tokenizer(texts)['input_ids']")
    cache = prepacked_cache(model)
    check_ids(unwrapped(model), "prompt", prompts, START)
    ids, mask = left_padded(prompts, input_device(model), _pad_id(unwrapped(model)))
    return {"input_ids": ids, "attention_mask": mask, CACHE: cache}


def prepacked_cache(model: Any) -> DynamicCache:
    """An empty cache of a patched model whose prompts are run without padding.

    Raises:
        PolicyError: the model is not patched.
        UnsupportedModelError: it cannot run several prompts in one row.
    """
    handle = handle_of(model)
    if handle is None:
        raise PolicyError(
            f"{type(model).__name__} is not patched, and only a patched model attends prompts that lie in one row apart; call "
            "kvpress.patch(model, policy) first ('full' leaves everything exact)"
        )
    reason = why_not(model, handle)
    if reason is not None:
        raise UnsupportedModelError(f"{type(unwrapped(model)).__name__} {reason}; give generate a padded batch instead")
    cache = _new_cache(model, handle)
    for layer in cache.layers:
        layer.texts = cache.layers[0].texts
    cache.layers[0].texts.prepacked = True
    return cache


def why_not(model: Any, handle: Handle) -> str | None:
    """What keeps a patched model from running several prompts in one row; None if nothing does."""
    others = sum(not isinstance(layer, KVLayer) for layer in _new_cache(model, handle).layers)
    if others:
        return (
            f"has {others} layers without full attention (sliding windows, recurrent states), which would read prompts that lie "
            "in one row as one text"
        )
    known = forward_parameters(unwrapped(model).get_decoder())
    if "position_ids" not in known:
        return "takes no position_ids, so that prompts in one row cannot each begin at position 0"
    if "logits_to_keep" in known:
        return "makes logits inside of its decoder, of the last tokens of the row alone"
    return None


def _new_cache(model: Any, handle: Handle) -> DynamicCache:
    cache = DynamicCache(config=unwrapped(model).get_decoder().config)
    cache.layers[:] = handle.new_layers(cache)
    cache.layer_class_to_replicate = None
    return cache


def left_padded(sequences: list[list[int]], device: Any, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of ids as a batch that is padded on the left, and its mask: int64 [batch, longest] each."""
    width = max(map(len, sequences))
    pads = [width - len(ids) for ids in sequences]
    ids = torch.tensor([[pad] * n + own for n, own in zip(pads, sequences, strict=True)], device=device)
    columns = torch.arange(width, device=device)
    return ids, (columns >= torch.tensor(pads, device=device)[:, None]).long()


def _pad_id(model: Any) -> int:
    """The id that `generate` itself would pad with; nothing is computed of it."""
    config = getattr(model, "generation_config", None)
    vocab = model.get_input_embeddings().weight.shape[0]
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list | tuple) and found else found
        if isinstance(found, int) and 0 <= found < vocab:
            return found
    return 0
