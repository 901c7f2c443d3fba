"""What is counted while a layer attends. A policy names an observer; what it counts lies in the cache.

An observer is a frozen value with functions of tensors. `Mass` accumulates the attention that every row gives to the
entries, `Window` keeps the last rows of a prompt and asks them once, when entries are scored.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvpress.kernels.attention_mass import Perturbation, attention_mass

NEGLIGIBLE = 1e-12  # a row whose weight has faded to less than this adds nothing to a float32 sum


@dataclass(frozen=True)
class Scores:
    """How a model turns q.k into scores: `scale`, and `softcap` and `sinks` ([heads]) where it has them."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass
class Observed:
    """What an observer has counted in one layer.

    Attributes:
        slots: name -> [batch, kv_heads, ..., capacity] (in pages [batch, slots]): what goes with the entries. It is gathered
            with them, starts at 0 for a new one, and is summed where entries are merged.
        sequences: name -> what goes with the sequences; the batch is the first dimension.
    """

    slots: dict[str, Tensor] = field(default_factory=dict)
    sequences: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """Rows of one pass over the entries of a layer, as an observer sees them.

    Attributes:
        query: [batch, heads, rows, head_dim], rotated at the rows' own positions.
        at: int [batch, rows], those positions; -1 for padding.
        padded: some rows may be padding, or some slots empty.
        in_order: entry i is at position i, and the rows are at the last ones.
        seen: int [batch], real tokens seen of each sequence, those of this pass included.
        scores: how the model scores.
        layer: index of the layer.
        step: decode steps since the latest prompt pass; 0 in the pass itself.
        new_tokens: how many tokens `generate` was asked for, if that is known.
        fetch_positions, fetch_keys: give what `positions` and `keys` are.
    """

    query: Tensor
    at: Tensor
    padded: bool
    in_order: bool
    seen: Tensor
    scores: Scores
    layer: int
    step: int | Tensor
    new_tokens: int | Tensor | None
    fetch_positions: Callable[[], Tensor]
    fetch_keys: Callable[[], Tensor]

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the entries, int32 [batch, kv_heads, n], -1 for an empty slot."""
        return self.fetch_positions()

    @cached_property
    def keys(self) -> Tensor:
        """Keys of the entries at their own positions, [batch, kv_heads, n, head_dim]."""
        return self.fetch_keys()


class Observer:
    """What is counted. All methods but `answer` may change `observed` in place."""

    takes_mass: bool = False
    """Whether the attention's own column sums are all that it needs: then a pass hands them to it."""
    takes_prompt_mass: bool = False
    """Whether a prompt's attention hands them to it, although it may need more of the prompt: an entry's "mass"."""
    needs_every_row: bool = False
    """Whether it must see every row, so that a cache which an unpatched run has filled is of no use."""
    needs_prompt: bool = False
    """Whether it must see the last rows of a prompt pass."""
    where_read: bool = False
    """Whether `answer` is given keys at the places where the newest rows read them, should these be others than their own."""

    def slots(self, shape: tuple[int, int, int], device: Any) -> dict[str, Tensor]:
        """Empty statistics of [batch, kv_heads, capacity] slots."""
        return {}

    def prompt(self, observed: Observed, rows: Rows, mass_known: bool) -> None:
        """Count a prompt pass.

        Args:
            mass_known: the attention has handed its column sums over, and they are in "mass" (see `takes_prompt_mass`).
        """

    def step(self, observed: Observed, rows: Rows, mass: Tensor | None) -> None:
        """Count one row: a decode step's, or one of a prompt that evicts row by row.

        Args:
            mass: what the row gave each entry, float32 [batch, kv_heads, n] (in pages [batch, slots]), by the observer's own
                softmax (see `perturbation`); None where the attention did not count it.
        """

    def perturbation(self, layer: int, step: int | Tensor, new_tokens: int | Tensor | None) -> Perturbation | None:
        """Noise and temperature of the softmax that is counted; None for the attention's own."""
        return None

    def answer(
        self, observed: Observed, positions: Tensor, keys: Callable[[], Tensor], scores: Scores
    ) -> dict[str, Tensor]:
        """What was counted of the first n entries, name -> float32 [batch, kv_heads, n].

        Args:
            positions: int32 [batch, kv_heads, n], -1 for an empty slot.
            keys: gives the keys at their own positions (or see `where_read`), [batch, kv_heads, n, head_dim].
            scores: how the model scores.
        """
        return {}

    def forget_prompt(self, observed: Observed) -> None:
        """Drop what was kept for the eviction after a prompt pass."""


@dataclass(frozen=True)
class Nothing(Observer):
    """Nothing is counted."""


@dataclass(frozen=True)
class Noise:
    """Gumbel noise on the scores, and a temperature that moves in equal steps over the decode steps (Keyformer).

    Attributes:
        start, end: temperature in a prompt pass, and after `steps` decode steps.
        steps: how many those are; None for what `generate` was asked for, and `usual_steps` where that is not known.
        seed: of the noise; None for none.
        fresh: new noise for every row, or one number per head and entry.
        usual_steps: see `steps`.
    """

    start: float = 1.0
    end: float = 1.0
    steps: int | None = None
    seed: int | None = None
    fresh: bool = True
    usual_steps: int = 128

    def at(self, layer: int, step: int | Tensor, new_tokens: int | Tensor | None) -> Perturbation:
        """The noise of one pass."""
        length: int | Tensor = self.steps or self.usual_steps
        if self.steps is None and isinstance(new_tokens, Tensor):
            length = torch.where(new_tokens > 0, new_tokens, self.usual_steps)
        elif self.steps is None and new_tokens is not None:
            length = new_tokens
        done = (step.double() / length).clamp(max=1.0) if isinstance(step, Tensor) else min(1.0, step / length)
        return Perturbation(self.start + (self.end - self.start) * done, self.seed, layer, fresh=self.fresh)


@dataclass(frozen=True)
class Mass(Observer):
    """The softmax weight that each entry got from every row since it came in, summed over its group, in float32.

    Answers "mass", and "last_rows" where those are asked for.

    Attributes:
        fading: factor in [0, 1] on what was accumulated, for every row that comes after it. 0 looks at the last row alone.
        noise: of the softmax that is counted; None counts the attention's own.
        last_rows: also count what the last so many rows gave.
    """

    fading: float = 1.0
    noise: Noise | None = None
    last_rows: int = 0

    needs_every_row = True

    @property
    def takes_mass(self) -> bool:  # type: ignore[override]
        return self.takes_prompt_mass and self.last_rows == 0

    @property
    def takes_prompt_mass(self) -> bool:  # type: ignore[override]
        return self.fading == 1 and self.noise is None

    def slots(self, shape: tuple[int, int, int], device: Any) -> dict[str, Tensor]:
        stats = {"mass": torch.zeros(shape, dtype=torch.float32, device=device)}
        if self.last_rows:
            rows = (*shape[:2], self.last_rows, shape[2])
            stats["rows"] = torch.zeros(rows, dtype=torch.float32, device=device)
        return stats

    def perturbation(self, layer: int, step: int | Tensor, new_tokens: int | Tensor | None) -> Perturbation | None:
        return None if self.noise is None else self.noise.at(layer, step, new_tokens)

    def prompt(self, observed: Observed, rows: Rows, mass_known: bool) -> None:
        options: dict[str, Any] = {
            **vars(rows.scores),
            "perturbation": self.perturbation(rows.layer, rows.step, rows.new_tokens),
        }
        if not mass_known:
            self._count(observed, rows, options)
        if self.last_rows:
            self._keep_last_rows(observed, rows, options)

    def _count(self, observed: Observed, rows: Rows, options: dict[str, Any]) -> None:
        held, query, at = observed.slots["mass"], rows.query, rows.at
        if self.fading != 1:
            held *= (self.fading ** (at >= 0).sum(1).float())[:, None, None]
        if self.fading < 1 and query.shape[2] > 1:
            query, at = newest_rows(query, at, _rows_that_count(self.fading), not rows.padded)
        age = (rows.seen.to(at.device)[:, None] - 1 - at).clamp(min=0)
        weights = None if self.fading == 1 else self.fading ** age.float()
        positions = None if rows.in_order and rows.query.shape[2] > 1 else rows.positions
        counted = attention_mass(query, at, rows.keys, positions, row_weights=weights, **options)
        held[:, :, : counted.shape[2]] += counted

    def step(self, observed: Observed, rows: Rows, mass: Tensor | None) -> None:
        if mass is None:
            self.prompt(observed, rows, mass_known=False)
            return
        held = observed.slots["mass"][..., : mass.shape[-1]]
        if rows.padded:
            there = (rows.at >= 0).to(mass.device).view(-1, *(1,) * (mass.ndim - 1))
            mass = mass.masked_fill(~there, 0.0)
            if self.fading != 1:
                held.mul_(torch.where(there, self.fading, 1.0))
        elif self.fading != 1:
            held.mul_(self.fading)
        held.add_(mass)
        if self.last_rows:
            self._push_rows(observed, mass[:, :, None], rows.at.to(mass.device))

    def answer(
        self, observed: Observed, positions: Tensor, keys: Callable[[], Tensor], scores: Scores
    ) -> dict[str, Tensor]:
        n = positions.shape[2]
        answers = {"mass": observed.slots["mass"][:, :, :n]}
        if self.last_rows:
            answers["last_rows"] = observed.slots["rows"].sum(2)[:, :, :n]
        return answers

    def _keep_last_rows(self, observed: Observed, rows: Rows, options: dict[str, Any]) -> None:
        query, at = newest_rows(rows.query, rows.at, self.last_rows, not rows.padded)
        seen = [
            attention_mass(query[:, :, i : i + 1], at[:, i : i + 1], rows.keys, rows.positions, **options)
            for i in range(at.shape[1])
        ]
        self._push_rows(observed, torch.stack(seen, dim=2), at)

    def _push_rows(self, observed: Observed, seen: Tensor, at: Tensor) -> None:
        """Put rows that were just seen, [batch, kv_heads, rows, n] at positions [batch, rows], among the last ones kept.

        Their order means nothing.
        """
        held, n = observed.slots["rows"], seen.shape[3]
        places = observed.sequences.get("rows.at")
        if places is None:
            places = at.new_full((at.shape[0], self.last_rows), -1)
        if at.shape[1] == 1:  # it takes the place of the oldest
            oldest = places.argmin(dim=1, keepdim=True)
            real = at >= 0
            place = oldest[:, None, :, None].expand(-1, held.shape[1], -1, n)
            there = held[..., :n]
            there.scatter_(2, place, torch.where(real[:, None, :, None], seen, there.gather(2, place)))
            newest = torch.where(real, at.to(places.dtype), places.gather(1, oldest))
            observed.sequences["rows.at"] = places.scatter_(1, oldest, newest)
            return
        places = torch.cat((places, at.to(places.dtype)), dim=1)
        newest = places.topk(self.last_rows, dim=1).indices.sort(dim=1).values
        both = torch.cat((held[..., :n], seen), dim=2)
        index = newest[:, None, :, None].expand(-1, both.shape[1], -1, n)
        held[..., :n] = both.gather(2, index)
        observed.sequences["rows.at"] = places.gather(1, newest)


@dataclass(frozen=True)
class Window(Observer):
    """The softmax weight that each entry gets from the last `rows` rows of a prompt, summed over them and the group.

    The rows are kept from pass to pass until the prompt's eviction asks what they give. Answers "mass" there, and nothing in
    decode.
    """

    rows: int

    needs_prompt = True

    def prompt(self, observed: Observed, rows: Rows, mass_known: bool) -> None:
        query, at = rows.query, rows.at
        held = observed.sequences
        if "window" in held:
            query = torch.cat((held["window"], query), dim=2)
            at = torch.cat((held["window.at"], at), dim=1)
        query, held["window.at"] = newest_rows(query, at, self.rows, not rows.padded)
        held["window"] = query.clone()

    def answer(
        self, observed: Observed, positions: Tensor, keys: Callable[[], Tensor], scores: Scores
    ) -> dict[str, Tensor]:
        held = observed.sequences
        if "window" not in held:
            return {}
        return {"mass": attention_mass(held["window"], held["window.at"], keys(), positions, **vars(scores))}

    def forget_prompt(self, observed: Observed) -> None:
        for name in ("window", "window.at"):
            observed.sequences.pop(name, None)


def newest_rows(query: Tensor, at: Tensor, size: int, unpadded: bool) -> tuple[Tensor, Tensor]:
    """The last `size` real rows of each sequence, in order: query [batch, heads, size, head_dim], positions [batch, size]."""
    size = min(size, query.shape[2])
    if unpadded:
        return query[:, :, -size:], at[:, -size:]
    newest = at.topk(size, dim=1).indices.sort(dim=1).values
    index = newest[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index), at.gather(1, newest)


def _rows_that_count(fading: float) -> int:
    """How many last rows have a weight of at least `NEGLIGIBLE`, when each row's is `fading` times the next one's."""
    rows, weight = 1, fading
    while weight >= NEGLIGIBLE:
        rows, weight = rows + 1, weight * fading
    return rows
