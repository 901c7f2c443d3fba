"""LazyLLM: layer by layer fewer tokens of a prompt go on, and come back when a later token attends to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.topk_select import topk_select
from kvpress.policy import Call, Depth, Feeds, Policy, RoutePolicy, Texts, check_count, check_factor, entries_for

DEPTHS = (0.3, 0.6, 0.9)
"""Where tokens are dropped by default, in shares of the depth."""


@dataclass(frozen=True, kw_only=True)
class LazyLLM(RoutePolicy):
    """Let those tokens stop between two layers that the newest token attends to least.

    After each of a few layers the tokens in play are ranked by the attention that the newest token gives them there, the mean
    over the query heads. The share `rate` of lowest rank stops: the layers behind run on the others and attend nothing else. What
    stops waits with its hidden state. Every decode step ranks all tokens anew, and a token that is among the better ones
    then runs through the layers that it has not seen (revival), so that no layer runs on a token twice. A prompt takes less
    time; the cache ends up smaller, as tokens that never come back have no entries in the layers behind.

    Source: Fu et al., "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference", arXiv 2407.14057. There is no
    code by the authors. What the paper leaves open, and deviations:

    - Layers and rates are not in the paper. The default follows its figure: a share of 0.3 after 30, 60 and 90 % of the layers.
    - The share is one of the tokens in play, rounded down; the newest token never stops. Of equal tokens the earlier ones go on.
      Generated tokens stop as those of the prompt do.
    - A layer's attention decides what goes on to the next one; that of the last layer decides nothing.
    - A token that comes back attends the tokens in play up to its own position. So do new ones: what they read differs from what
      they would have read in a full prompt (this is so in the paper).
    - The decoder goes on with all columns: those that have stopped keep the hidden state that they stopped with.
    - Each sequence of a batch ranks its tokens alone, and layers run on the tokens of all of them end to end in one row. The
      authors have batches of one.
    - Later turns, and the chunks of a prompt, are steps with several new tokens: their last token ranks all that were seen.
    - Since tokens that stopped have no logits, the model must be asked for those of the last token alone (`logits_to_keep=1`, as
      `generate` does), unless so few tokens were seen that none stops. The decoder, called without the model around it, gives
      the hidden states of each sequence's last token, [batch, 1, hidden].
    - Tokens cannot be taken back from the cache, and decode steps cannot be compiled: how many tokens a layer of a step runs on
      depends on the tokens.
    - A pass without a cache is exact, as under every policy.

    Args:
        layers: after which layers tokens stop, from 0, in ascending order; none is the last one. None for the layers at 30, 60
            and 90 % of the depth.
        rate: the share of the tokens in play that stops after each of them, from 0 to 1; or one for each of `layers`.

    Raises:
        PolicyError: a value out of range, a model without one of the layers, or one with layers without full attention; another
            policy beside it. In a call: logits asked for of more than the last token where tokens stop.
        UnsupportedModelError: the model's layers are not a list of modules that it calls one after the other.
    """

    name: ClassVar[str] = "lazy_llm"
    kind: ClassVar[str] = "pruning"
    paper: ClassVar[str] = "arXiv 2407.14057"

    layers: Sequence[int] | None = None
    rate: float | Sequence[float] = 0.3

    def rows(self, depth: Depth) -> Tensor | None:
        n = len(depth.positions)
        stops = self.stopping(n, depth.layer, depth.layers)
        if stops == 0:
            return None
        row = depth.row.clone()
        row[-1] = float("inf")
        index, _ = topk_select(row[None, None], torch.full((1, 1), n - stops, device=row.device), n - stops)
        return torch.zeros(n, dtype=torch.bool, device=row.device).index_fill_(0, index[0, 0], True)

    def stopping(self, tokens: int, layer: int, layers: int) -> int:
        """How many of so many tokens in play stop after a layer."""
        where = self.dropping_layers(layers)
        if layer not in where:
            return 0
        rate = self.rate if isinstance(self.rate, int | float) else self.rate[where.index(layer)]
        return min(tokens - 1, entries_for(float(rate), tokens))

    def dropping_layers(self, layers: int) -> list[int]:
        """The layers after which tokens stop, of a model with so many."""
        if self.layers is not None:
            return list(self.layers)
        return sorted({max(0, entries_for(depth, layers) - 1) for depth in DEPTHS} - {layers - 1})

    def feeds(self, call: Call, texts: Texts) -> Feeds:
        if call.count > 1 and call.rows not in (None, 1):
            self._check_rows(call)
        yield call

    def _check_rows(self, call: Call) -> None:
        """Refuse a call that asks for logits of tokens that may stop."""
        tokens = int(call.places.max()) + 1
        if any(self.stopping(tokens, layer, call.layers) for layer in self.dropping_layers(call.layers)):
            asked = "all" if call.rows == 0 else f"the last {call.rows}"
            raise PolicyError(
                f"{self.describe()} lets some of the {tokens} tokens seen stop, in a prompt of {call.count} tokens, and logits of "
                f"{asked} were asked for, which tokens that stop do not have; ask for those of the last token alone "
                "(logits_to_keep=1, as generate does; not with an assistant), or use rate=0"
            )

    def __post_init__(self) -> None:
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
                raise PolicyError(
                    f"layers={self.layers!r} is no list; give the numbers of layers, as [8, 17, 26], or None"
                )
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                check_count(layer, "a layer of layers", 0)
            if list(self.layers) != sorted(set(self.layers)):
                raise PolicyError(f"layers={self.layers!r} are not in ascending order, each once; sort them")
        if isinstance(self.rate, Sequence) and not isinstance(self.rate, str):
            object.__setattr__(self, "rate", tuple(self.rate))
            for rate in self.rate:
                check_factor(rate, "a rate of rate")
            if self.layers is not None and len(self.layers) != len(self.rate):
                raise PolicyError(
                    f"rate={self.rate!r} has {len(self.rate)} numbers for {len(self.layers)} layers ({self.layers!r}); give one "
                    "for each layer, or one for all"
                )
        else:
            check_factor(self.rate, "rate")

    def check_layers(self, layers: int) -> None:
        where = self.dropping_layers(layers)
        if where and where[-1] >= layers - 1:
            raise PolicyError(
                f"layers={self.layers!r}: no token can stop after layer {where[-1]} of a model with {layers} attention layers; "
                f"give layers from 0 to {layers - 2}"
            )
        if isinstance(self.rate, tuple) and len(self.rate) != len(where):
            raise PolicyError(
                f"rate={self.rate!r} has {len(self.rate)} numbers, and in this model tokens stop after {len(where)} layers "
                f"({where}); give one number for all, or layers too"
            )

    def check_company(self, others: Sequence[Policy]) -> None:
        for other in others:
            if other.roles or other.places.moved:
                raise PolicyError(
                    f"{other.describe()} expects a layer to hold every token that was seen, and under {self.describe()} each layer "
                    "holds others; use one of them"
                )

    @property
    def leaves_prompts_exact(self) -> bool:
        return False

    @property
    def no_hybrids(self) -> str | None:
        return "its other layers would run on tokens that stopped; use another policy"
