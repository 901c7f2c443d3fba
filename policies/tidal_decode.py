"""TidalDecode: choose once for many layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.topk_select import topk_select
from kvpress.policy import (
    Budget,
    Call,
    EvictionPolicy,
    Feed,
    Feeds,
    Policy,
    RoutePolicy,
    Selected,
    SelectionPolicy,
    Texts,
    View,
    check_budget,
    check_count,
    entries_for,
    entries_of,
    selected_by_groups,
)

CORRECTION_LAYERS = {28: 12, 32: 13, 80: 31}
"""By number of layers: what the authors use for Llama 3.2 3B, Llama 3 and 3.1 8B, Llama 3 70B."""


@dataclass(frozen=True, kw_only=True)
class TidalDecode(SelectionPolicy, RoutePolicy):
    """Find the tokens that matter in two layers, and read only those in the layers after them.

    Everything is kept. In each decode step the layers before `sparse_layer_start` read everything; that layer reads
    everything, too, and each of its query heads picks the `k` entries of highest q.k, the current token among them. The
    layers after it read the picked positions alone, query head by query head, until `correction_layer` reads everything and
    picks anew for the rest. The next step starts over. Prompts are exact. Layers are numbered among those with full
    attention, from 0.

    Source: Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    arXiv 2410.05076, and the authors' code. Deviations:

    - The current token is always picked, in the place of the k-th entry (in the authors' accuracy code it competes; their
      kernels keep its page).
    - The entries that a group's query heads picked are read once, and each head attends to its own (the authors repeat K and
      V to the query heads).
    - A head that holds no more than `k` entries where it picks reads everything in the layers after, too (the authors'
      kernels do the same). Beside an eviction policy, a layer that does not hold a picked position does without it.
    - Cache correction is described in the paper and not in the code. Here, after `correct_every` decode steps, their tokens
      are fed again with the next one in one exact pass, whose result the next token takes. A prompt pass corrects all
      steps before it.

    Args:
        k: entries read per query head in the sparse layers; int, or float share of what is held (authors: 256 for the
            most part, 4096 on LongBench).
        sparse_layer_start: the layer that picks first.
        correction_layer: the layer that picks again; past the last layer there is no second pick. None takes the authors'
            choice for models of 28, 32 and 80 layers (12, 13, 31) and else the layer at 0.4 of the depth, at least
            `sparse_layer_start + 2`. (Llama 2 7B and LongChat 7B do better with 7.)
        correct_every: decode steps after which the K and V that they stored are computed again, exactly; 0 for never.

    Raises:
        PolicyError: a value out of range; or a model without a layer `sparse_layer_start`.
    """

    name: ClassVar[str] = "tidal_decode"
    paper: ClassVar[str] = "arXiv 2410.05076"
    takes_budget: ClassVar[bool] = True
    calibrated: ClassVar[str | None] = "correction_layer"

    k: Budget = 256
    sparse_layer_start: int = 2
    correction_layer: int | None = None
    correct_every: int = 0

    def __post_init__(self) -> None:
        check_budget(self.k, "k")
        check_count(self.sparse_layer_start, "sparse_layer_start", 0)
        check_count(self.correct_every, "correct_every", 0)
        if self.correction_layer is not None:
            check_count(self.correction_layer, "correction_layer", 1)
            if self.correction_layer <= self.sparse_layer_start:
                raise PolicyError(
                    f"correction_layer={self.correction_layer} is not after sparse_layer_start={self.sparse_layer_start}, "
                    "which picks first; give a later layer, or one past the last for no second pick"
                )

    @classmethod
    def at_budget(cls, budget: Budget, **fields: Any) -> "TidalDecode":
        return cls(k=budget, **fields)

    def calibration_values(self, layers: int) -> list[int]:
        return list(range(self.sparse_layer_start + 1, layers))

    def check_layers(self, layers: int) -> None:
        if self.sparse_layer_start >= layers:
            raise PolicyError(
                f"sparse_layer_start={self.sparse_layer_start} picks in no layer of a model with {layers} attention layers "
                f"(0 to {layers - 1}); give at most {layers - 1}"
            )

    def check_company(self, others: Sequence[Policy]) -> None:
        super().check_company(others)
        for other in others:
            if self.correct_every and isinstance(other, EvictionPolicy):
                raise PolicyError(
                    f"correct_every={self.correct_every} takes decode steps back, and {other.describe()} evicts entries for "
                    "good; use correct_every=0"
                )

    def picking_layers(self, layers: int) -> tuple[int, int]:
        """The layers that pick, of a model with so many; the second may be past the last."""
        first, second = self.sparse_layer_start, self.correction_layer
        if second is None:
            second = max(first + 2, CORRECTION_LAYERS.get(layers, round(0.4 * layers)))
        return first, second

    @property
    def no_hybrids(self) -> str | None:
        return (
            "its decode steps cannot be taken back there to be run again; use correct_every=0"
            if self.correct_every
            else None
        )

    def feeds(self, call: Call, texts: Texts) -> Feeds:
        """Remember decode steps until there are `correct_every`, or a prompt pass follows; then feed them once more, before it."""
        feed: Feed = call
        if self.correct_every and texts.columns:
            places = call.positions
            if places is None:
                places = torch.arange(texts.columns, texts.columns + call.count, device=call.tokens.device)[None]
            if places.ndim != 2:
                raise PolicyError(
                    f"correct_every needs 2-D position_ids, and these have {places.ndim}; use correct_every=0"
                )
            tokens, places = texts.behind_inputs(call.tokens, places.expand(len(call.tokens), -1))
            steps = tokens.shape[1] - call.count
            if call.count == 1 and steps < self.correct_every:
                texts.inputs, texts.places = tokens, places
            else:
                texts.forget_inputs()
                if steps:
                    feed = Feed(tokens, places, back=steps, first=steps)
        yield feed

    def select(self, view: View) -> Selected:
        if view.layer in self.picking_layers(view.layers):
            view.shared.clear()
            view.shared["picked"] = self._pick(view)
            return Selected(scanned=view.length / 2)
        picked = view.shared.get("picked")
        if picked is None:
            return Selected()
        selected: Selected | None = view.shared.get("selected")
        if selected is None:
            kv_heads, n = view.positions.shape[1:]
            group = view.query.shape[1] // kv_heads
            reads = picked.gather(2, view.positions.clamp(min=0).long().repeat_interleave(group, dim=1))
            if view.valid is not None:
                reads &= view.valid.repeat_interleave(group, dim=1)
            selected = selected_by_groups(view, reads, min(n, group * self._width(n)))
            if view.aligned:
                view.shared["selected"] = selected
        return selected

    def _width(self, n: int) -> int:
        """Entries that a head picks of n at most."""
        return min(n, max(1, entries_for(self.k, n)))

    def _pick(self, view: View) -> Tensor | None:
        """Which positions each query head picks, bool [batch, heads, positions]; None if all read everything."""
        kv_heads, n = view.positions.shape[1:]
        width = self._width(n)
        if width == n:
            return None
        batch, heads = view.query.shape[:2]
        positions = view.positions.repeat_interleave(heads // kv_heads, dim=1)
        scores = decode_scores(view.query, view.keys, scale=view.scale, moved=view.moved)
        scores = scores.masked_fill_(positions == view.seen[:, None, None] - 1, float("inf"))
        scores = scores.masked_fill_(positions < 0, float("-inf"))
        held = (positions >= 0).sum(-1)
        counts = entries_of(self.k, held)
        index, chosen = topk_select(scores, counts.clamp(max=width), width)
        # What was not chosen goes to a place of its own behind the positions, which is cut off.
        places = torch.where(chosen, positions.gather(2, index), view.places).long()
        picked = torch.zeros(batch, heads, view.places + 1, dtype=torch.bool, device=scores.device)
        picked = picked.scatter_(2, places, True)[..., : view.places]
        return picked | (held <= counts)[..., None]
