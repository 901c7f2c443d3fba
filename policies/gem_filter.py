"""GemFilter: an early layer picks the tokens of a prompt that the model then reads."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.topk_select import topk_select
from kvpress.policy import (
    Budget,
    Call,
    Feed,
    Feeds,
    Look,
    RoutePolicy,
    Texts,
    check_budget,
    check_count,
    check_pooling,
    entries_of,
    pool_scores,
)

FILTER_LAYERS = {40: 19}
"""By number of layers: what the authors use for Mistral Nemo 12B. Their 13 for Llama 3.1 8B (32 layers) is 0.42 of the depth."""


@dataclass(frozen=True, kw_only=True)
class GemFilter(RoutePolicy):
    """Run a prompt through the first layers, and what these find through the whole model.

    A prompt of more than `k` tokens is looked at first: the layers up to `r` run on it, nothing of it is stored, and the
    layers behind are not run. There the query of the prompt's last token is multiplied with every key, summed over the query
    heads, and smoothed over neighbours. The `k` tokens of the highest sums, in their order, are the prompt that the whole
    model then runs, at positions 0 .. k-1, and decode goes on from there. `handle.report().kept_text(tokenizer)` shows them.

    Source: Shi et al., "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token
    Reduction", arXiv 2409.17422, and the authors' code (github.com/SalesforceAIResearch/GemFilter). Where the two leave
    something open, and deviations:

    - q.k after the rotary embedding, without scale and softmax; soft-capping does not act in it (code). The sums are float32
      (authors: the model's dtype), and of equal tokens the earlier ones are picked.
    - The smoothing counts zeros past both ends (code). Each sequence of a padded batch is looked at and picks alone, and its
      short prompt ends in the last column. The authors have batches of one.
    - Nothing is protected, not even the first token or the question (code); `keep_first` and `keep_last` are additions.
    - The attention of layer `r` itself is not computed.
    - Later turns, which the authors do not have, are prompts like the first: one of more than `k` tokens is looked at alone,
      without what the cache holds, and what it picks goes behind that. So is a chunk that is fed by hand. `generate` with
      `prefill_chunk_size` is refused: the last token of a chunk asks for nothing.
    - Since tokens that are not picked have no logits, the model must be asked for those of the last token alone
      (`logits_to_keep=1`, as `generate` does); else a prompt of more than `k` tokens is refused. The decoder, called without the
      model around it, gives the hidden states of each sequence's last token, [batch, 1, hidden].
    - Other policies see the short prompt as the prompt: a budget that is a share is one of its length.
    - A pass without a cache is exact, as under every policy.

    Args:
        k: tokens that a prompt is cut to; int, or float share of each sequence's tokens (authors: 1024).
        r: the layer that picks, from 0; None takes the authors' choice for models of 32 and 40 layers (13, 19; they use 19 for
            Phi 3.5 mini, with 32), and else the layer at 0.42 of the depth.
        kernel_size: odd width of the smoothing.
        keep_first: tokens at the start that are always picked, within `k`; 1 keeps a start token.
        keep_last: tokens at the end that are always picked, within `k`; 32 keeps what a chat template ends with.

    Raises:
        PolicyError: a value out of range, a model without a layer `r`, or one with layers without full attention. In a call: a
            prompt that must be cut, and logits asked for of more than its last token, or a prompt in chunks, or position ids
            with several axes.
    """

    name: ClassVar[str] = "gem_filter"
    kind: ClassVar[str] = "short prompt"
    paper: ClassVar[str] = "arXiv 2409.17422"
    takes_budget: ClassVar[bool] = True

    k: Budget = 1024
    r: int | None = None
    kernel_size: int = 5
    keep_first: int = 0
    keep_last: int = 0

    def feeds(self, call: Call, texts: Texts) -> Feeds:
        if call.count == 1:
            yield call
            return
        real = call.places >= 0
        count = real.sum(1)
        picks = torch.minimum(entries_of(self.k, count), count)
        if bool((picks == count).all()):
            yield call
            return
        self._check_call(call)
        look = yield Feed(call.tokens, call.positions, last_layer=self.filter_layer(call.layers))
        assert look is not None
        columns = self.pick(look, real, picks)
        del look  # as large as a layer's queries and keys
        yield call.only(columns)

    def pick(self, look: Look, real: Tensor, picks: Tensor) -> Tensor:
        """The columns that are picked, ascending: int64 [batch, most picks], -1 in front where a sequence picks fewer.

        Args:
            look: query [batch, heads, n, head_dim] and key [batch, kv_heads, n, head_dim] of the layer that picks.
            real: bool [batch, n], False for padding.
            picks: int64 [batch], how many tokens each sequence picks.
        """
        # Each sequence's own tokens in front, so that neighbours are neighbours in it.
        order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        number, count = torch.arange(real.shape[1], device=real.device), real.sum(1, keepdim=True)
        last = order.gather(1, (count - 1).clamp(min=0))[:, None, :, None]
        query = look.query.gather(2, last.expand(-1, look.query.shape[1], 1, look.query.shape[3]))
        sums = decode_scores(query, look.key.contiguous(), scale=1.0).sum(1).gather(1, order)
        sums = sums.masked_fill(number >= count, 0.0)
        sums = pool_scores(sums[:, None], self.kernel_size, "avg")[:, 0]
        always = (number < self.keep_first) | (number >= count - self.keep_last)
        sums = sums.masked_fill(always, float("inf")).masked_fill(number >= count, float("-inf"))
        width = int(picks.max())
        index, chosen = topk_select(sums[:, None], picks[:, None], width)
        columns = order.gather(1, index[:, 0]).masked_fill(~chosen[:, 0], -1)
        return columns.gather(1, chosen[:, 0].to(torch.uint8).argsort(dim=1, stable=True))

    def filter_layer(self, layers: int) -> int:
        """The layer that picks in a model with so many."""
        return FILTER_LAYERS.get(layers, 42 * layers // 100) if self.r is None else self.r

    def _check_call(self, call: Call) -> None:
        cuts = f"{self.describe()} cuts a prompt of {call.count} tokens"
        if call.is_chunk:
            raise PolicyError(
                f"{cuts}, by what its last token asks for, and with prefill_chunk_size={call.count} these are no whole prompt; "
                "leave prefill_chunk_size out"
            )
        if call.rows not in (None, 1):
            asked = "all" if call.rows == 0 else f"the last {call.rows}"
            raise PolicyError(
                f"{cuts}, and logits of {asked} were asked for, which tokens that are left out do not have; ask for those of "
                "the last token alone (logits_to_keep=1, as generate does; not with an assistant), or give a larger k "
                f"(k={call.count})"
            )
        if call.positions is not None and call.positions.ndim != 2:
            raise PolicyError(
                f"{cuts} and numbers what is left from 0, and these position_ids have {call.positions.ndim} axes (a model for "
                "images); use another policy"
            )

    def __post_init__(self) -> None:
        check_budget(self.k, "k")
        check_pooling(self.kernel_size, "avg")
        if self.r is not None:
            check_count(self.r, "r", 0)
        for name in ("keep_first", "keep_last"):
            check_count(getattr(self, name), name, 0)
        if isinstance(self.k, int) and self.keep_first + self.keep_last > self.k:
            raise PolicyError(
                f"keep_first={self.keep_first} and keep_last={self.keep_last} are more than k={self.k}; give a larger k, or "
                "smaller numbers"
            )

    @classmethod
    def at_budget(cls, budget: Budget, **fields: object) -> "GemFilter":
        return cls(k=budget, **fields)  # type: ignore[arg-type]

    def check_layers(self, layers: int) -> None:
        if self.filter_layer(layers) >= layers:
            raise PolicyError(
                f"r={self.r} is past the last of the {layers} attention layers of this model; give a layer from 0 to {layers - 1}"
            )

    @property
    def leaves_prompts_exact(self) -> bool:
        return False

    @property
    def no_hybrids(self) -> str | None:
        return "their cache would count the short prompt, and the caller the whole one; use another policy"
