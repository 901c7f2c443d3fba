"""MInference: each head reads a prompt by a pattern that was found for it beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.kernels.block_means import block_means, block_scores
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.prompt_attention import prompt_attention
from kvpress.kernels.vertical_slash_mass import vertical_slash_mass
from kvpress.policy import (
    Pattern,
    PrefillPolicy,
    View,
    check_block_size,
    check_choice,
    check_count,
    listed_blocks,
    on_device,
    read_table,
)

KINDS = {"a_shape": 2, "tri_shape": 2, "vertical_slash": 2, "block_sparse": 1, "dense": 0}
"""Kinds of patterns, and how many sizes each has."""
ALIASES = {"stream_llm": "a_shape", "vertical_and_slash": "vertical_slash"}
"""Names in the authors' files."""


class HeadPattern(NamedTuple):
    """What one query head reads.

    a_shape(a, b): the first `a` entries and the last `b` before each row. tri_shape(a, b): the same, and the last rows
    everything. vertical_slash(a, b): the best `a` entries and the best `b` distances. block_sparse(a): the best `a` blocks of
    each block of rows. dense: everything.
    """

    kind: str
    a: int = 0
    b: int = 0

    def reads_all(self, n: int, block_size: int) -> bool:
        """Whether that is everything of n entries."""
        if self.kind == "vertical_slash":
            return max(self.a, self.b) >= n
        if self.kind == "block_sparse":
            return self.a * block_size >= n
        return self.kind == "dense" or self.a + self.b >= n


CANDIDATES = (
    HeadPattern("a_shape", 1024, 4096),
    HeadPattern("vertical_slash", 30, 2048),
    HeadPattern("vertical_slash", 100, 1800),
    HeadPattern("vertical_slash", 500, 1500),
    HeadPattern("vertical_slash", 3000, 200),
    HeadPattern("block_sparse", 100),
)
"""What the search compares, if nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class MInference(PrefillPolicy):
    """Read, in a prompt, what each query head's pattern says: a shape, or entries and distances, or blocks of entries.

    Four kinds of pattern (`HeadPattern`): an A-shape reads the first entries and a window; a tri-shape lets the last rows read
    everything besides; vertical-slash reads single entries and single distances, those with the most attention of the last
    `probe` rows; block-sparse reads for each block of rows the blocks of entries whose mean key is nearest to the mean query. The
    patterns come from a search over a text (`kvpress calibrate --policy minference`), from the authors' files, or are one
    for all heads. Decode steps are exact, and everything is kept.

    Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", arXiv
    2407.02490, and the authors' code (github.com/microsoft/MInference). Where the two differ and deviations:

    - The first `sink` entries and the nearest `recent` distances are always among those of vertical-slash, whose sizes are
      at least that (code; the paper forces none. The code searches with 30 distances, and lets the sizes be 30 and 50).
    - expand="tile" reads what the authors' kernel reads: a block of rows reads whole the run of `block_size` entries that lies
      at a distance before it; the run that would begin before the first entry begins with it. expand="exact" reads the
      distances of the paper row by row; then more is masked, and nothing is faster. The window of an A-shape is treated
      likewise (authors: row by row).
    - A tri-shape's last `n_last` rows (code) read everything, and so do the others in the block of the first of them.
    - Block-sparse: means are over the entries that there are, and no block is added behind the last one (code: one, where the
      length is a multiple of the block). With `force_diagonal` the block of the rows themselves is among those that are read
      (code: not forced, but then a row still reads itself).
    - The search compares the candidates of the paper's Table 7 as they stand (paper: adjusted to equal cost in its kernels) by the
      error of the output, or the mass that is kept. The code searches over others, and stores most winners as vertical-slash.
    - Blocks are counted from a sequence's first entry in every pass; the probe and the last rows are those of the pass (the
      authors have one pass). Of equal scores the earlier one comes first.
    - In a padded batch each sequence is planned alone. The authors have batches of one.
    - Behind an eviction policy entries and distances are counted among those that are kept, which differ between kv heads.
    - Soft-capping acts in the attention and in the probe, not in the means; attention sinks in the attention only (the
      authors' models have neither).
    - q.k of the probe, means, softmax and sums are float32; without Triton a GPU has the probe's q.k in the model's dtype.
    - A pass without a cache is exact attention, as under every policy.

    Args:
        patterns: for each layer that the policy acts on the patterns of its query heads; or a JSON file that has them: a list
            with an object for each layer, from the head's number to [kind, sizes, ...] ("stream_llm" and
            "vertical_and_slash" are known, too; a score behind the sizes is passed over). None for `default` everywhere.
        default: the pattern of heads that are not named (code: vertical-slash with 1000 entries and 6096 distances).
        expand: "tile" or "exact".
        sink: first entries that vertical-slash reads anyway (code: 30).
        recent: shortest distances that it reads anyway (code: 100).
        probe: last rows whose attention chooses entries and distances (64).
        n_last: last rows of a tri-shape (code: 100).
        force_diagonal: whether block-sparse reads the block of the rows themselves.
        candidates: the patterns that `kvpress calibrate` compares (the paper's Table 7).
        starting_layer: layers before it are exact (code: -1, none is).
        block_size: rows and entries of a block, a power of two (64).
        min_len: a pass that ends before so many entries is exact.

    Raises:
        PolicyError: a value out of range, a file that cannot be read, or patterns of another model.
    """

    name: ClassVar[str] = "minference"
    paper: ClassVar[str] = "arXiv 2407.02490"
    calibrated: ClassVar[str | None] = "patterns"
    in_file: ClassVar[bool] = True

    patterns: str | Path | Sequence[Any] | None = None
    default: Sequence[Any] = ("vertical_slash", 1000, 6096)
    expand: str = "tile"
    sink: int = 30
    recent: int = 100
    probe: int = 64
    n_last: int = 100
    force_diagonal: bool = True
    candidates: Sequence[Any] = CANDIDATES
    starting_layer: int = -1
    block_size: int = 64
    min_len: int = 0

    def __post_init__(self) -> None:
        check_choice(self.expand, "expand", ("tile", "exact"))
        check_count(self.sink, "sink", 0)
        check_count(self.recent, "recent", 1)
        for name in ("probe", "n_last"):
            check_count(getattr(self, name), name, 1)
        check_block_size(self.block_size)
        check_count(self.starting_layer, "starting_layer", -1)
        check_count(self.min_len, "min_len", 0)
        object.__setattr__(self, "default", tuple(read_pattern(self.default, "default")))
        if not _is_list(self.candidates) or not self.candidates:
            raise PolicyError(
                f"candidates={self.candidates!r} has no patterns; give a list like [['a_shape', 128, 512]]"
            )
        found = tuple(tuple(read_pattern(one, f"candidates[{at}]")) for at, one in enumerate(self.candidates))
        object.__setattr__(self, "candidates", found)
        if self.patterns is not None:
            object.__setattr__(self, "patterns", read_patterns(self.patterns))

    @property
    def _layers(self) -> "tuple[tuple[tuple[Any, ...], ...], ...] | None":
        """What `patterns` was read into."""
        return self.patterns  # type: ignore[return-value]

    def check_layers(self, layers: int) -> None:
        if self._layers is not None and len(self._layers) != layers:
            raise PolicyError(
                f"patterns has {len(self._layers)} layers, and the model has {layers} attention layers: they were found for "
                "another model; search with `kvpress calibrate --policy minference`"
            )

    def of_layer(self, layer: int, heads: int) -> list[HeadPattern]:
        """The pattern of each query head of a layer.

        Raises:
            PolicyError: there is one for a head that the layer does not have.
        """
        found = [HeadPattern(*self.default)] * heads
        for head, *pattern in () if self._layers is None else self._layers[layer]:
            if head >= heads:
                raise PolicyError(
                    f"patterns names head {head} of layer {layer}, and the layer has {heads} query heads: they were found for "
                    "another model; search with `kvpress calibrate --policy minference`"
                )
            found[head] = HeadPattern(*pattern)
        return found

    def plan(self, view: View) -> Pattern | None:
        """What each query head reads."""
        heads, n = view.query.shape[1], view.keys.shape[2]
        if view.query.shape[2] == 1 or n < self.min_len or view.layer < self.starting_layer:
            return None
        patterns = self.of_layer(view.layer, heads)
        return self.lists(view.query, view.keys, patterns, scale=view.scale, softcap=view.softcap)

    def lists(
        self, query: Tensor, keys: Tensor, patterns: Sequence[HeadPattern], *, scale: float, softcap: float | None
    ) -> Pattern | None:
        """What rows read by a pattern for each query head; None for everything.

        Args:
            query: [batch, heads, rows, head_dim], those of the last entries.
            keys: [batch, kv_heads, n, head_dim].
            patterns: one for each head.
        """
        n, size, device = keys.shape[2], self.block_size, query.device
        patterns = [
            one._replace(a=max(one.a, self.sink), b=max(one.b, self.recent)) if one.kind == "vertical_slash" else one
            for one in patterns
        ]
        patterns = [HeadPattern("dense") if one.reads_all(n, size) else one for one in patterns]
        if all(one.kind == "dense" for one in patterns):
            return None

        def which(*kinds: str) -> Tensor:
            return on_device([one.kind in kinds for one in patterns], torch.bool, device)[:, None]

        singles = [one if one.kind not in ("dense", "block_sparse") else HeadPattern("dense") for one in patterns]
        columns = _first(max(one.a for one in singles), device)
        slashes = _first(max(one.b for one in singles), device)
        if any(one.kind == "vertical_slash" for one in patterns):
            probe = query[:, :, -self.probe :]
            by_entry, by_distance = vertical_slash_mass(probe, keys, scale=scale, softcap=softcap)
            by_entry[..., : self.sink] = float("inf")
            by_distance[..., : self.recent] = float("inf")
            ranked = which("vertical_slash")
            columns = torch.where(ranked, _order(by_entry)[..., : columns.shape[-1]], columns)
            slashes = torch.where(ranked, _order(by_distance)[..., : slashes.shape[-1]], slashes)
        columns = _cut(columns.expand(len(query), len(patterns), -1), [one.a for one in singles])
        slashes = _cut(slashes.expand(len(query), len(patterns), -1), [one.b for one in singles])

        # [batch, heads, row blocks, blocks]
        blocks, first = -(-n // size), (n - query.shape[2]) // size
        any_block = any(one.kind in ("dense", "tri_shape", "block_sparse") for one in patterns)
        shape = (len(query), len(patterns), blocks - first, blocks if any_block else 1)
        reads = torch.zeros(shape, dtype=torch.bool, device=device)
        if self.expand == "tile":
            reads[..., 0] = _cut_off(slashes, blocks, size)[..., first:]
        if any_block:
            place = torch.arange(blocks, device=device)
            is_last = place[first:, None] >= (n - self.n_last) // size
            reads |= which("dense")[..., None] | (which("tri_shape")[..., None] & is_last)
            if any(one.kind == "block_sparse" for one in patterns):
                counts = [one.a if one.kind == "block_sparse" else 0 for one in patterns]
                reads |= self._best_blocks(query, keys, on_device(counts, torch.int64, device))
            reads &= place <= place[first:, None]
        lists: dict[str, Any] = {
            "blocks": listed_blocks(reads),
            "columns": columns,
            "distances" if self.expand == "exact" else "diagonals": slashes,
        }
        return Pattern(block_size=size, **{name: one for name, one in lists.items() if one.shape[-1]})

    def _best_blocks(self, query: Tensor, keys: Tensor, counts: Tensor) -> Tensor:
        """For each block of rows the blocks of nearest means, `counts` [heads] of them: bool [batch, heads, row blocks, blocks]."""
        n, size = keys.shape[2], self.block_size
        past = n - query.shape[2]
        scores = block_scores(block_means(query, past, size), block_means(keys, 0, size))
        place = torch.arange(scores.shape[3], device=scores.device)
        own = place[past // size :, None]
        if self.force_diagonal:
            scores.masked_fill_(place == own, float("inf"))
        order = _order(scores.masked_fill_(place > own, float("-inf")))
        taken = (place < counts[:, None, None]).expand(scores.shape)
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    @property
    def head_values(self) -> Sequence[HeadPattern]:
        return [HeadPattern(*one) for one in self.candidates]

    def try_heads(self, query: Tensor, key: Tensor, value: Tensor, **scores: Any) -> tuple[Tensor, Tensor]:
        heads, n = query.shape[1], key.shape[2]
        dense, _, full = prompt_attention(query, key, value, with_lse=True, **scores)
        assert full is not None
        errors, recalls = [], []
        for one in self.head_values:
            pattern = self.lists(query, key, [one] * heads, scale=scores["scale"], softcap=scores["softcap"])
            if pattern is None:
                raise PolicyError(
                    f"candidates: {list(one)} reads all of a prompt of {n} tokens, so that nothing can be compared; give longer "
                    "prompts (--lengths 30000), or smaller candidates in a policy file"
                )
            lists = pattern.lists
            output, lse = block_sparse_attention(query, key, value, block_size=pattern.block_size, **lists, **scores)
            off = (output.float() - dense.float()).square().sum((0, 2, 3)) / dense.float().square().sum((0, 2, 3))
            errors.append(off.sqrt())
            # Of the rows from 2500 on, as the authors' code, or of the later half of a short prompt.
            late = slice(min(2500, query.shape[2] // 2), None)
            recalls.append((lse - full)[..., late].exp().mean((0, 2)))
        return torch.stack(errors), torch.stack(recalls)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def read_pattern(spec: Any, name: str) -> HeadPattern:
    """A pattern from [kind, sizes, ...].

    Raises:
        PolicyError: naming it `name`, if it is none.
    """
    if not _is_list(spec) or not spec:
        raise PolicyError(f"{name}={spec!r} is no pattern; give a list like ['vertical_slash', 1000, 6096]")
    kind = ALIASES.get(spec[0], spec[0]) if isinstance(spec[0], str) else spec[0]
    check_choice(kind, f"{name}'s kind", tuple(KINDS))
    sizes = list(spec[1 : 1 + KINDS[kind]])
    if len(sizes) < KINDS[kind]:
        raise PolicyError(f"{name}={list(spec)!r} has {len(sizes)} of the {KINDS[kind]} sizes of {kind}; give all")
    for place, value in enumerate(sizes):
        # An A-shape without a window, or no blocks at all, would leave a row itself alone.
        check_count(value, f"{name}'s size {place + 1}", 0 if len(sizes) == 2 and place == 0 else 1)
    return HeadPattern(kind, *sizes)


def read_patterns(source: Any) -> tuple[tuple[tuple[Any, ...], ...], ...]:
    """For each layer (head, kind, a, b) of the heads that are named, from a file or from what would stand in it.

    Raises:
        PolicyError: the file cannot be read, or names no patterns.
    """
    where = "patterns"
    if isinstance(source, str | Path):
        source, where = read_table(source, where), f"patterns file {source}"
    if not _is_list(source) or not source:
        raise PolicyError(f"{where} has no list of layers but a {type(source).__name__}; give one object per layer")
    layers = []
    for layer, heads in enumerate(source):
        if not isinstance(heads, Mapping):
            if not _is_list(heads) or not all(_is_list(one) and one for one in heads):
                raise PolicyError(
                    f"{where}, layer {layer}: give an object of heads, like {{'0': ['a_shape', 128, 4096]}}"
                )
            heads = {one[0]: one[1:] for one in heads}
        found = []
        for head, pattern in heads.items():
            if not str(head).isdecimal():
                raise PolicyError(f"{where}, layer {layer}: head {head!r} is no number; name heads from 0")
            found.append((int(head), *read_pattern(pattern, f"{where}, layer {layer}, head {head}: pattern")))
        layers.append(tuple(sorted(found)))
    return tuple(layers)


def _first(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def _order(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)


def _cut(numbers: Tensor, counts: Sequence[int]) -> Tensor:
    """Of [batch, heads, m] the first so many of each head, -1 behind them."""
    kept = _first(numbers.shape[-1], numbers.device) < on_device(counts, torch.int64, numbers.device)[:, None]
    return numbers.masked_fill(~kept, -1)


def _cut_off(diagonals: Tensor, blocks: int, size: int) -> Tensor:
    """Which blocks of rows have a run that would begin before the first entry: bool [batch, heads, blocks].

    It does where the block's first row is entry a and there is a diagonal between a and a + size.
    """
    inside = torch.where((diagonals >= 0) & (diagonals % size > 0), diagonals // size, blocks)
    table = torch.zeros(*diagonals.shape[:2], blocks + 1, dtype=torch.bool, device=diagonals.device)
    return table.scatter_(-1, inside, True)[..., :blocks]
