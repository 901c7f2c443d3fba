"""Kascade: few layers find the entries that matter, the others read what a kv head of theirs has found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.decode_scores import decode_scores
from kvpress.kernels.topk_select import topk_select
from kvpress.kernels.union_select import union_select
from kvpress.policy import (
    Attended,
    Budget,
    Pattern,
    PrefillPolicy,
    Selected,
    SelectionPolicy,
    View,
    check_budget,
    check_count,
    entries_for,
    entries_of,
)

ANCHORS = {32: (0, 2, 8, 13, 14), 36: (0, 2, 7, 14, 23)}
"""By number of layers: what the authors use for Llama 3.1 8B, Qwen3 8B."""
REMEDY = "find them with `kvpress calibrate --policy kascade`"


@dataclass(frozen=True)
class Picked:
    """What an anchor hands to the layers after it.

    Attributes:
        index: int [batch, kv_heads, k], ascending: slots, in a prompt entries before the tile. None where the layers hold
            different entries.
        chosen: bool [batch, kv_heads, k], False where fewer were picked; None when all were.
        marks: bool [batch, kv_heads, positions], what was picked by position, where `index` is None. None in both: everything.
    """

    index: Tensor | None = None
    chosen: Tensor | None = None
    marks: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Kascade(SelectionPolicy, PrefillPolicy):
    """Find in a few layers the entries that matter, head by head, and read those alone in the layers after them.

    Everything is kept. In a decode step an anchor layer sums the attention of each kv head's query heads and picks the `k`
    entries with the most; it reads these itself, and so do the layers up to the next anchor, in which each kv head takes what one
    head of the anchor picked (`head_map`). The first layer is an anchor and reads everything. A prompt is read so, too, `tile`
    rows at a time: their attention is summed, and they read what was picked of the entries before the tile, and the
    tile. Anchors and the map of heads belong to a model: `kvpress calibrate --policy kascade` finds them. Layers are
    numbered among those with full attention, from 0.

    Source: Deshmukh et al., "Kascade: A Practical Sparse Attention Method for Long-Context LLM Inference", arXiv 2512.16391,
    and the authors' code (github.com/microsoft/kascade). Where it is open and deviations:

    - `k` is a share of the entries that the last row of a tile sees, the tile's own among them (code: of the whole prompt).
      A share is never less than `least` entries.
    - The token of a decode step is always among the picked ones (code: it competes).
    - Tiles are counted from the first row of a pass: chunks of a prompt that are a multiple of `tile` change nothing, others cut
      tiles at their ends. A pass of less than a tile is one (code: then each row picks for itself).
    - Of equal entries the earlier one is picked.
    - Without `anchors` those of the authors' files are taken for models of 32 and 36 layers, and else the layers 0, 2 and at
      0.2, 0.4 and 0.6 of the depth; without `head_map` a kv head takes what the head of its own number picked. Both are a
      start for a model that was not calibrated.
    - The search compares sets of twice a tile, the tile among them (code: of 10 %), over needles in novels (code: MuSiQue), and
      takes as few anchors, 3 to 8, as give 0.98 of what all layers would.
    - Where nothing is read less, nothing is picked, and the layers after the anchor read everything, too.
    - Beside an eviction policy, entries are those that are kept. A kv head does without what it does not hold of the other
      head's picks, by position; a head that picks all it holds hands on everything.
    - Soft-capping acts in the scores by which entries are picked, attention sinks in the attention only (the authors' models
      have neither). Scores, softmax and sums are float32 (authors: model's dtype after the softmax).
    - In a padded batch each sequence is planned alone, and a pass without a cache is exact, as under every policy.

    Args:
        k: entries read per kv head; an int, or a share of those that there are (authors: 0.1).
        least: entries that a share means at least (code: 128).
        tile: rows of a prompt that pick together (authors: 32; 128 in their kernels).
        anchors: the layers that pick, from 0.
        head_map: for each layer the kv heads of its anchor whose picks its kv heads take; in an anchor its own.
        decode_only: prompts are exact.

    Raises:
        PolicyError: a value out of range, or anchors or heads of another model.
    """

    name: ClassVar[str] = "kascade"
    paper: ClassVar[str] = "arXiv 2512.16391"
    takes_budget: ClassVar[bool] = True
    calibrated: ClassVar[str | None] = "anchors"

    k: Budget = 0.1
    least: int = 128
    tile: int = 32
    anchors: Sequence[int] | None = None
    head_map: Sequence[Sequence[int]] | None = None
    decode_only: bool = False

    def __post_init__(self) -> None:
        check_budget(self.k, "k")
        check_count(self.least, "least", 1)
        check_count(self.tile, "tile", 1)
        if not isinstance(self.decode_only, bool):
            raise PolicyError(f"decode_only={self.decode_only!r} does not work; give True or False")
        if isinstance(self.k, int) and self.k <= self.tile and not self.decode_only:
            raise PolicyError(
                f"k={self.k} has no room beside tile={self.tile}, whose rows read each other; give a k above {self.tile}, a "
                "smaller tile, or decode_only=True"
            )
        if self.anchors is not None:
            object.__setattr__(self, "anchors", _read_anchors(self.anchors))
        if self.head_map is not None:
            if self.anchors is None:
                raise PolicyError(f"head_map is a map to certain anchors, and anchors is None; give both, or {REMEDY}")
            object.__setattr__(self, "head_map", _read_map(self.head_map, self.anchors))

    @classmethod
    def at_budget(cls, budget: Budget, **fields: Any) -> "Kascade":
        """A share means what it says, however short the prompt; of a few entries the tile is half."""
        check_budget(budget)
        if isinstance(budget, int) and budget <= cls.tile:
            fields = {"tile": max(1, budget // 2), "decode_only": budget == 1, **fields}
        return cls(k=budget, **{"least": 1, **fields})

    @property
    def heads(self) -> Literal["alone", "together", "shared"]:
        return "together"  # a kv head takes what another one picked

    @property
    def leaves_prompts_exact(self) -> bool:
        return self.decode_only

    @property
    def chunk(self) -> int | None:
        return None if self.decode_only else self.tile

    def check_layers(self, layers: int) -> None:
        if self.anchors is not None and self.anchors[-1] >= layers:
            raise PolicyError(
                f"anchors names layer {self.anchors[-1]}, and the model has {layers} attention layers (0 to {layers - 1}): they "
                f"were found for another model; {REMEDY}"
            )
        if self.head_map is not None and len(self.head_map) != layers:
            raise PolicyError(
                f"head_map has {len(self.head_map)} layers, and the model has {layers} attention layers: it was found for another "
                f"model; {REMEDY}"
            )

    def anchor_of(self, layer: int, layers: int) -> int:
        """The layer that picks for a layer, of a model with so many."""
        anchors = self.anchors
        if anchors is None:
            anchors = ANCHORS.get(layers, (0, 2, *(round(share * layers) for share in (0.2, 0.4, 0.6))))
        return max(anchor for anchor in anchors if anchor <= layer)

    def width(self, n: int) -> int:
        """Entries that a row reads of n, in a prompt those of its tile among them."""
        return min(n, max(entries_for(self.k, n), 1 if isinstance(self.k, int) else self.least))

    def select(self, view: View) -> Selected:
        anchor, heads = self._source(view)
        if anchor != view.layer:
            return self._reuse(view, heads)
        kv_heads, n = view.positions.shape[1:]
        width = self.width(n)
        if width == n:
            view.shared["picked"] = Picked()
            return Selected()
        scores = decode_scores(view.query, view.keys, scale=view.scale, moved=view.moved)
        if view.softcap is not None:
            scores = view.softcap * torch.tanh(scores / view.softcap)
        empty = None if view.valid is None else ~view.valid
        if empty is not None:
            scores = scores.masked_fill_(empty.repeat_interleave(scores.shape[1] // kv_heads, dim=1), float("-inf"))
        mass = scores.softmax(dim=-1).unflatten(1, (kv_heads, -1)).sum(2)
        mass = mass.masked_fill_(view.positions == view.seen[:, None, None] - 1, float("inf"))
        if empty is None:
            held = torch.full(view.positions.shape[:2], n, device=mass.device)
        else:
            mass, held = mass.masked_fill_(empty, float("-inf")), n - empty.sum(-1)
        counts = self._counts(held)
        index, chosen = topk_select(mass, counts.clamp(max=width), width)
        picked = Picked(index, None if empty is None else chosen)
        view.shared["picked"] = picked if view.aligned else _by_position(view, picked, held <= counts)
        selected = Selected() if view.layer == 0 else _selected(view, picked.index, picked.chosen)
        return replace(selected, scanned=view.length / 2)

    def plan(self, view: View) -> Pattern | None:
        """What a tile reads: what was picked of the entries before it, and itself."""
        if self.decode_only:
            return None
        anchor, heads = self._source(view)
        rows, n = view.query.shape[2], view.positions.shape[2]
        older = n - rows
        if anchor == view.layer:
            width = max(0, self.width(n) - rows)
            picked = Picked()
            if width < older:
                at = torch.arange(older, n, device=view.query.device).expand(len(view.query), -1)
                mass = attention_mass(view.query, at, view.keys, None, scale=view.scale, softcap=view.softcap)
                picked = Picked(_top(mass[..., :older], width).int())
            view.shared["picked"] = picked if view.aligned else _by_position(view, picked)
            if view.layer == 0:
                return None
        picked = _of_heads(view.shared["picked"], heads)
        index, member = picked.index, picked.chosen
        if picked.marks is not None:
            reads = _marked(view, picked.marks)[..., :older]
            index, member = union_select(reads, reads.shape[1])
        if index is None:
            return None
        own = torch.arange(older, n, device=index.device).expand(*index.shape[:2], -1)
        if member is not None:
            member = torch.cat((member, torch.ones_like(own, dtype=torch.bool)), dim=2)
        return Pattern(index=torch.cat((index.long(), own), dim=2), member=member)

    def _source(self, view: View) -> tuple[int, Sequence[int]]:
        """The anchor of a layer, and the kv heads of it whose picks the layer's kv heads take."""
        anchor, kv_heads = self.anchor_of(view.layer, view.layers), view.positions.shape[1]
        if self.head_map is None:
            return anchor, range(kv_heads)
        heads = self.head_map[view.layer]
        if len(heads) != kv_heads:
            raise PolicyError(
                f"head_map names {len(heads)} kv heads in layer {view.layer}, and the layer has {kv_heads}: it was found for "
                f"another model; {REMEDY}"
            )
        return anchor, heads

    def _counts(self, held: Tensor) -> Tensor:
        """As `width`, of each number of an int tensor; more than there are where `k` or `least` is more."""
        counts = entries_of(self.k, held)
        return counts if isinstance(self.k, int) else counts.clamp(min=self.least)

    def _reuse(self, view: View, heads: Sequence[int]) -> Selected:
        """What a layer reads of its anchor's picks in a decode step."""
        picked = _of_heads(view.shared["picked"], heads)
        if picked.marks is None:
            return Selected() if picked.index is None else _selected(view, picked.index, picked.chosen)
        n = view.positions.shape[2]
        reads = _marked(view, picked.marks)
        index, member = union_select(reads, reads.shape[1], width=view.width(n))
        return _selected(view, index, member)

    def fit(self, prompts: Iterable[Sequence[Attended]]) -> "Kascade":
        """The policy with anchors and map of heads for a model, found on its prompts."""
        likeness, weight, count = torch.zeros(0), torch.zeros(0), 0
        for layers in prompts:
            found = covered(layers, self.tile, 2 * self.tile).double().cpu()
            turns = torch.tensor([layer.turn for layer in layers], dtype=torch.float64)
            likeness, weight = (found, turns) if count == 0 else (likeness + found, weight + turns)
            count += 1
        likeness, weight = likeness / count, weight / count
        gain = weight * likeness.amax(1).mean(-1)  # [anchor, layer]
        layers_count = len(weight)
        everything = choose_anchors(gain, layers_count)[0]
        for number in range(min(3, layers_count), min(8, layers_count) + 1):
            total, anchors = choose_anchors(gain, number)
            if total >= 0.98 * everything:
                break
        head_map = []
        for layer in range(layers_count):
            anchor = max(one for one in anchors if one <= layer)
            own = list(range(likeness.shape[1]))
            columns = likeness[anchor, :, layer].T.tolist()  # [kv heads of the layer][kv heads of the anchor]
            head_map.append(own if anchor == layer else [column.index(max(column)) for column in columns])
        return replace(self, anchors=anchors, head_map=head_map)


def _read_anchors(anchors: Any) -> tuple[int, ...]:
    if not isinstance(anchors, Sequence) or isinstance(anchors, str) or not anchors:
        raise PolicyError(f"anchors={anchors!r} is no list of layers; give one like [0, 2, 8], or {REMEDY}")
    for at, layer in enumerate(anchors):
        check_count(layer, f"anchors[{at}]", 0)
    if anchors[0] != 0 or any(a >= b for a, b in pairwise(anchors)):
        raise PolicyError(f"anchors={list(anchors)!r} does not begin with 0 and ascend; give a list like [0, 2, 8]")
    return tuple(anchors)


def _read_map(head_map: Any, anchors: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    if not isinstance(head_map, Sequence) or isinstance(head_map, str) or not head_map:
        raise PolicyError(f"head_map={head_map!r} is no list of layers; give a list of kv heads for each layer")
    for layer, heads in enumerate(head_map):
        if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads:
            raise PolicyError(f"head_map[{layer}]={heads!r} is no list; give a kv head of the anchor for each kv head")
        anchor = max(one for one in anchors if one <= layer)
        there = len(head_map[anchor])
        for at, head in enumerate(heads):
            check_count(head, f"head_map[{layer}][{at}]", 0)
            if head >= there:
                raise PolicyError(
                    f"head_map[{layer}][{at}]={head} is no kv head of layer {anchor}, its anchor, which has {there}; give one "
                    f"from 0 to {there - 1}"
                )
        if layer == anchor and list(heads) != list(range(there)):
            raise PolicyError(
                f"head_map[{layer}]={list(heads)!r}, and layer {layer} is an anchor, whose kv heads read what they pick; give "
                f"{list(range(there))!r}"
            )
    return tuple(tuple(heads) for heads in head_map)


def _top(mass: Tensor, width: int) -> Tensor:
    """The `width` largest of float [batch, heads, n], int64 [batch, heads, width], ascending."""
    if width == 0:
        return torch.empty(*mass.shape[:2], 0, dtype=torch.int64, device=mass.device)
    return topk_select(mass, torch.full(mass.shape[:2], width, device=mass.device), width)[0]


def _of_heads(picked: Picked, heads: Sequence[int]) -> Picked:
    """What the kv heads of a layer take."""
    if list(heads) == list(range(len(heads))):
        return picked

    def taken(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.stack([x[:, head] for head in heads], dim=1)

    return Picked(taken(picked.index), taken(picked.chosen), taken(picked.marks))


def _selected(view: View, index: Tensor | None, chosen: Tensor | None) -> Selected:
    if chosen is None:
        return Selected(index)
    return Selected(index, chosen, None if view.waits else chosen.sum(-1).clamp(min=1))


def _by_position(view: View, picked: Picked, everything: Tensor | None = None) -> Picked:
    """The same by position, for layers that hold other entries.

    Args:
        everything: bool [batch, kv_heads], the heads that picked all they hold, and hand on all.
    """
    if picked.index is None:
        return picked
    # What was not chosen goes to a place of its own behind the positions, which is cut off.
    places = view.positions.gather(2, picked.index.long()).long()
    if picked.chosen is not None:
        places = places.masked_fill(~picked.chosen, view.places)
    marks = torch.zeros(*places.shape[:2], view.places + 1, dtype=torch.bool, device=places.device)
    marks = marks.scatter_(2, places, True)[..., : view.places]
    return Picked(marks=marks if everything is None else marks | everything[..., None])


def _marked(view: View, marks: Tensor) -> Tensor:
    """Which slots hold a marked position, bool [batch, kv_heads, n]."""
    return marks.gather(2, view.positions.clamp(min=0).long()) & (view.positions >= 0)


def covered(layers: Sequence[Attended], tile: int, k: int) -> Tensor:
    """How much of the attention of each layer's heads the picks of the heads of another layer would hold.

    A head's picks are, for each tile of rows, the k - tile entries before the tile with the most attention. What they hold of
    another head's attention, and what that gives the tile itself, is compared with what its own picks hold; the
    smallest share of all tiles counts.

    Args:
        layers: of one prompt of one sequence.

    Returns:
        float32 [layers, kv_heads, layers, kv_heads]: picks of the first two, attention of the last two.

    Raises:
        PolicyError: the prompt is no longer than k, or layers have different numbers of kv heads.
    """
    n, heads = layers[0].key.shape[2], {layer.key.shape[1] for layer in layers}
    if n <= k:
        raise PolicyError(f"a prompt of {n} tokens has no more than the {k} that are picked; give longer ones")
    if len(heads) > 1:
        raise PolicyError(f"the model's layers have {sorted(heads)} kv heads, and a map needs as many in each")
    count = len(layers) * heads.pop()
    least = layers[0].key.new_ones((count, count), dtype=torch.float32)
    for older in range(tile, n, tile):
        rows = slice(older, min(n, older + tile))
        at = torch.arange(rows.start, rows.stop, device=least.device)[None]
        mass = torch.cat(
            [
                attention_mass(
                    one.query[:, :, rows], at, one.key[:, :, : rows.stop], None, scale=one.scale, softcap=one.softcap
                )[0].to(least.device)
                for one in layers
            ]
        )
        before, own = mass[:, :older], mass[:, older:].sum(1, keepdim=True)
        width = min(older, k - tile)
        picks = torch.zeros_like(before).scatter_(1, _top(before[None], width)[0], 1.0)
        held = before @ picks.T  # [attention, picks]
        least = torch.minimum(least, ((held + own) / (held.diagonal()[:, None] + own)).T)
    return least.unflatten(1, (len(layers), -1)).unflatten(0, (len(layers), -1))


def choose_anchors(gain: Tensor, count: int) -> tuple[float, tuple[int, ...]]:
    """The anchors, layer 0 first, for which the sum of the layers' gains is largest, and that sum.

    Args:
        gain: [layers, layers], what the second layer has of the picks of the first.
        count: of anchors, at most the number of layers.
    """
    rows = gain.tolist()
    layers = len(rows)
    # For the first so many layers alone: the largest sum, and the anchors. Of equal sums the one whose last anchor is earlier.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        stop: (sum(rows[0][:stop]), (0,)) for stop in range(1, layers + 1)
    }
    for number in range(2, count + 1):
        best = {
            stop: max(
                (
                    (best[last][0] + sum(rows[last][last:stop]), (*best[last][1], last))
                    for last in range(number - 1, stop)
                ),
                key=lambda option: option[0],
            )
            for stop in range(number, layers + 1)
        }
    return best[layers]
