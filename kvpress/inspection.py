"""How much of the exact attention's probability mass lies in what a policy reads or keeps of a prompt, by layer and head.

The prompt runs under the policy. In each layer the exact attention is computed beside it, from the same queries and keys, some rows
at a time: what of it lies in the pairs that the policy reads is the recall.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.ids import as_lists, check_ids
from kvpress.kernels.block_lists import listed_rows
from kvpress.kernels.skip_attention import tile_weights
from kvpress.layer import KVLayer
from kvpress.observe import Scores
from kvpress.passes import Record, recording
from kvpress.patching import Handle, patch
from kvpress.policy import Pattern, Policy, Roles, check_count
from kvpress.registry import PolicySpec
from kvpress.support import input_device
from kvpress.tokens import Tokens

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

TILE_NUMBERS = 1 << 20  # attention weights that are made at a time (4 MiB)
LAST = 64  # last rows whose attention to what is left of a prompt is looked at


@dataclass(frozen=True)
class Reads:
    """What rows of one layer read, and what mass it holds. Maps are of cells: cell (i, j) is some rows and some entries.

    Attributes:
        density: float64 [heads], of the pairs of a row and an entry that the exact attention computes, the share that is read.
        recall: float64 [heads], the share of the rows' attention that lies in these pairs, mean over the rows.
        kept: float32 [heads, row cells, entry cells], of the pairs of a cell the share that is read; 0 where there are none.
        mass: likewise, what of the attention of the cell's rows lies in the cell, mean over the rows: a row of cells sums to 1.
        held: likewise, what of `mass` lies in the pairs that are read.
    """

    density: Tensor
    recall: Tensor
    kept: Tensor
    mass: Tensor
    held: Tensor


@dataclass(frozen=True)
class Inspection:
    """What a policy reads and keeps of one prompt. Prints as tables.

    Attributes:
        policy: the policies, as a report names them.
        tokens: of the prompt.
        cell: tokens of a cell of the maps.
        prompt: layer of the model -> what the rows of the prompt read; empty unless a policy plays the prefill role.
        after: layer of the model -> what is left for the rows to come, and what the last rows of the prompt would find of their
            attention in it; a map has one row of cells. Empty unless a policy evicts.
        last: how many last rows these are.
    """

    policy: str
    tokens: int
    cell: int
    prompt: dict[int, Reads]
    after: dict[int, Reads]
    last: int

    def to_dict(self) -> dict[str, Any]:
        """Density and recall of each head, as lists by layer, under `prompt` and `after`; the maps are left out."""
        parts = {
            name: [
                {"layer": layer, "density": reads.density.tolist(), "recall": reads.recall.tolist()}
                for layer, reads in layers.items()
            ]
            for name, layers in (("prompt", self.prompt), ("after", self.after))
        }
        return {"policy": self.policy, "tokens": self.tokens, "last": self.last, **parts}

    def parts(self) -> dict[str, dict[int, Reads]]:
        """What there is to see, by what it is called."""
        parts = {
            f"read by the {self.tokens} rows of the prompt": self.prompt,
            f"kept after the prompt, by the attention of its last {self.last} rows": self.after,
        }
        return {title: layers for title, layers in parts.items() if layers}

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.table import Table
        from rich.text import Text

        for title, layers in self.parts().items():
            yield Text(f"{self.policy}: {title}")
            table = Table()
            for heading in ("layer", "density", "recall", "least recall", "of head"):
                table.add_column(heading, justify="right")
            for layer, reads in layers.items():
                table.add_row(str(layer), *_cells(reads.density, reads.recall), str(int(reads.recall.argmin())))
            table.add_section()
            densities, recalls = (
                torch.cat([getattr(reads, name) for reads in layers.values()]) for name in ("density", "recall")
            )
            table.add_row("all", *_cells(densities, recalls), "")
            yield table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _cells(density: Tensor, recall: Tensor) -> list[str]:
    return [f"{value:.1%}" for value in (density.mean().item(), recall.mean().item(), recall.min().item())]


@torch.no_grad()
def inspect(model: Any, policy: PolicySpec, input_ids: Any, *, cells: int = 32, **fields: Any) -> Inspection:
    """Run one prompt under a policy, and look at what its rows read and what is kept of it.

    Takes several times as long as the prompt alone. What is held besides are three maps of at most `cells` x `cells` numbers for
    each head, and a few tiles of rows.

    Args:
        model: a model that is not patched.
        policy: as in `kvpress.patch`: one that says what a prompt's rows read (the prefill role), or one that evicts, or both.
        input_ids: of one prompt, a list or a tensor [n] or [1, n], at least two tokens.
        cells: most cells of a map along each side.
        fields: of the policy that a name, mapping or path means.

    Raises:
        PolicyError: the policy reads and keeps everything, shortens prompts, or reads prompts as short as this one exactly;
            or the ids do not work, or the model is patched.
        UnsupportedModelError: the model cannot be patched.

    Example:
        >>> found = kvpress.inspect(model, XAttention(threshold=0.9), input_ids)
        >>> print(found)  # density and recall of each layer
        >>> found.prompt[3].recall  # of layer 3, by head
    """
    check_count(cells, "cells", 1)
    ids = _one_prompt(model, input_ids)
    with patch(model, policy, **fields) as handle:
        roles = Roles.of(handle.policies)
        _check_acts(handle, roles, len(ids))
        record = _Prompt(len(ids), _cell_size(len(ids), cells), roles.evicts)
        with recording(record):
            output = model(torch.tensor([ids], device=input_device(model)), use_cache=True, logits_to_keep=1)
        layers = {index: one for index, one in enumerate(output[CACHE].layers) if isinstance(one, KVLayer)}
        for layer in layers.values():
            layer.settle()
        prompt = {index: record.meters[one.index].reads() for index, one in layers.items()} if roles.plans else {}
        after = {index: record.left(one) for index, one in layers.items()} if roles.evicts else {}
        return Inspection(handle.describe(), len(ids), record.cell, prompt, after, record.last)


def _one_prompt(model: Any, input_ids: Any) -> list[int]:
    """The ids of one prompt as a list."""
    ids = as_lists(input_ids)
    if isinstance(ids, list) and ids and all(isinstance(one, list) for one in ids):
        if len(ids) > 1:
            raise PolicyError(f"input_ids has {len(ids)} sequences, and one prompt is inspected; give one of them")
        ids = ids[0]
    check_ids(model, "prompt", [ids])
    if len(ids) < 2:
        raise PolicyError("a prompt of 1 token cannot be inspected; give at least 2")
    return list(ids)


def _check_acts(handle: Handle, roles: Roles, tokens: int) -> None:
    """Raise `PolicyError` if there is nothing to see."""
    if roles.routes:
        raise PolicyError(
            f"{roles.route.describe()} leaves tokens of a prompt out, so that there are no rows to compare; see what it left by "
            "handle.report() and its kept_text, and inspect policies that read less of a prompt (x_attention) or evict (snapkv)"
        )
    if not roles.plans and not roles.evicts:
        raise PolicyError(
            f"{handle.describe()} reads all of a prompt and keeps all of it, so that there is nothing to inspect; choose a policy "
            "that reads less of a prompt (x_attention, flex_prefill, minference, hip, infinite_hip, kascade, token_select, "
            "skip_softmax) or evicts (snapkv)"
        )
    least = _least_length(roles.prefill)
    if least > tokens and not roles.evicts:
        raise PolicyError(
            f"{roles.prefill.describe()} reads a prompt of {tokens} tokens exactly, as it is shorter than min_len={least}; give a "
            "longer one, or set min_len lower"
        )


def _least_length(policy: Policy) -> int:
    """The policy's `min_len`, where it has one."""
    return int(getattr(policy, "min_len", 0))


def _cell_size(tokens: int, cells: int) -> int:
    """Tokens of a cell: a power of two, or a multiple of 64, so that its edges are those of blocks."""
    least = -(-tokens // cells)
    return 1 << (least - 1).bit_length() if least < 64 else -(-least // 64) * 64


class _Meter:
    """Adds up what rows of one layer read, row by row.

    Args:
        heads: query heads.
        rows: of cells.
        columns: of cells.
        cell: tokens of a cell.
        device: where the attention is.
    """

    def __init__(self, heads: int, rows: int, columns: int, cell: int, device: torch.device) -> None:
        self.cell = cell
        self.sums = {name: torch.zeros(heads, rows, columns, device=device) for name in ("kept", "mass", "held")}
        self.pairs = torch.zeros(1, rows, columns, device=device)
        self.counts = torch.zeros(rows, device=device)
        # float64 [heads]: pairs that are read, mass, and mass in these pairs.
        self.totals = torch.zeros(3, heads, dtype=torch.float64, device=device)

    def add(self, cells: Tensor, weights: Tensor, reads: Tensor, allowed: Tensor) -> None:
        """Rows more, and the first n entries, whole cells of them.

        Args:
            cells: int64 [rows], the row of cells of each.
            weights: float32 [heads, rows, n], the attention, which sums to 1 in each row.
            reads: bool [heads, rows, n], the pairs that are read.
            allowed: bool [rows, n], those that there are.
        """
        read = reads.float()
        pooled = [x.unflatten(-1, (-1, self.cell)).sum(-1) for x in (read, weights, read * weights)]
        columns = pooled[0].shape[-1]
        for name, x in zip(self.sums, pooled, strict=True):
            self.sums[name][..., :columns].index_add_(1, cells, x)
        self.totals += torch.stack([x.sum((1, 2), dtype=torch.float64) for x in pooled])
        self.pairs[..., :columns].index_add_(1, cells, allowed[None].float().unflatten(-1, (-1, self.cell)).sum(-1))
        self.counts.index_add_(0, cells, torch.ones(len(cells), device=cells.device))

    def reads(self) -> Reads:
        """What was added up, on the CPU."""
        read, mass, held = self.totals.cpu()
        rows = self.counts[:, None].clamp(min=1)
        return Reads(
            density=read / self.pairs.sum(dtype=torch.float64).item(),
            recall=held / mass,
            kept=(self.sums["kept"] / self.pairs.clamp(min=1)).cpu(),
            mass=(self.sums["mass"] / rows).cpu(),
            held=(self.sums["held"] / rows).cpu(),
        )


class _Prompt(Record):
    """Measures each layer of one prompt pass of one sequence while it attends.

    Args:
        tokens: of the prompt.
        cell: tokens of a cell.
        evicts: whether the attention of the last rows is to be kept for what eviction leaves.
    """

    def __init__(self, tokens: int, cell: int, evicts: bool) -> None:
        self.tokens, self.cell, self.columns = tokens, cell, -(-tokens // cell)
        self.evicts, self.last = evicts, min(LAST, tokens)
        self.meters: dict[int, _Meter] = {}
        self.ends: dict[
            int, Tensor
        ] = {}  # by layer, float32 [heads, n]: what the last rows give the entries, mean over them

    def attends(self, layer: int, tokens: Tokens, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> None:
        self.query, self.scores = query[0], scores
        self.key = functional.pad(key[0].float(), (0, 0, 0, self.columns * self.cell - self.tokens))
        self.meters[layer] = _Meter(len(self.query), self.columns, self.columns, self.cell, query.device)
        if self.evicts:
            given = self.ends[layer] = torch.zeros(len(self.query), self.key.shape[1], device=query.device)
            for first, last in self._tiles(slice(self.tokens - self.last, self.tokens)):
                weights, _ = self._weights(first, last)
                given[:, : weights.shape[-1]] += weights.sum(1) / self.last

    def planned(self, layer: int, rows: slice, pattern: Pattern | None) -> None:
        heads, meter = len(self.query), self.meters[layer]
        tiles = None if pattern is None or not pattern.skip else self._tiles_read(rows, pattern)
        for first, last in self._tiles(rows):
            weights, allowed = self._weights(first, last)
            reads = allowed[None]
            if pattern is not None:
                if tiles is None:
                    found = _reads(pattern, first, last, rows, weights.device)
                else:
                    size = pattern.block_size
                    of_rows = torch.arange(first - rows.start, last - rows.start, device=tiles.device) // size
                    found = tiles[:, of_rows].repeat_interleave(size, dim=2)[..., :last]
                reads = functional.pad(found, (0, weights.shape[-1] - last)) & allowed
            reads = reads.repeat_interleave(heads // len(reads), dim=0)
            at = torch.arange(first, last, device=reads.device)
            meter.add(at // self.cell, weights, reads, allowed)

    def _tiles_read(self, rows: slice, pattern: Pattern) -> Tensor:
        """Which tiles of entries each tile of rows does not skip, bool [heads, tiles of rows, tiles of entries]."""
        query, key = self.query[None, :, rows], self.key[None, :, : rows.stop]
        scale, softcap = self.scores.scale, self.scores.softcap
        return tile_weights(query, key, scale=scale, tile=pattern.block_size, softcap=softcap)[0] >= pattern.skip

    def left(self, layer: KVLayer) -> Reads:
        """What a layer holds after the prompt, for the attention of its last rows."""
        weights = self.ends[layer.index]
        positions = layer.storage.positions[0].to(weights.device)
        entries = torch.arange(weights.shape[-1], device=weights.device)
        held = torch.zeros(len(positions), self.tokens + 1, dtype=torch.bool, device=weights.device)
        held.scatter_(1, torch.where(positions >= 0, positions, self.tokens).long(), True)
        held = functional.pad(held[:, :-1], (0, len(entries) - self.tokens))
        meter = _Meter(len(weights), 1, self.columns, self.cell, weights.device)
        reads = held.repeat_interleave(len(weights) // len(held), dim=0)[:, None]
        meter.add(torch.zeros_like(entries[:1]), weights[:, None], reads, (entries < self.tokens)[None])
        return meter.reads()

    def _tiles(self, rows: slice) -> Iterator[tuple[int, int]]:
        """The rows in parts whose attention is made at a time."""
        step = max(1, TILE_NUMBERS // (len(self.query) * rows.stop))
        for first in range(rows.start, rows.stop, step):
            yield first, min(rows.stop, first + step)

    def _weights(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The exact attention of some rows, to the whole cells up to the last row; a sink has no part in it.

        Returns:
            float32 [heads, rows, entries], and which pairs there are, bool [rows, entries].
        """
        key = self.key[:, : -(-last // self.cell) * self.cell]
        rows = self.query[:, first:last].float().unflatten(0, (len(key), -1)).flatten(1, 2)
        scores = ((rows * self.scores.scale) @ key.transpose(1, 2)).view(-1, last - first, key.shape[1])
        if self.scores.softcap is not None:
            scores = self.scores.softcap * torch.tanh(scores / self.scores.softcap)
        at = torch.arange(first, last, device=key.device)
        allowed = torch.arange(key.shape[1], device=key.device) <= at[:, None]
        bias = torch.zeros_like(scores[0]).masked_fill_(~allowed, float("-inf"))
        return scores.add_(bias).softmax(-1), allowed


def _reads(pattern: Pattern, first: int, last: int, rows: slice, device: torch.device) -> Tensor:
    """Which of the first `last` entries the rows from `first` on read, of those planned together; perhaps some after themselves.

    Returns:
        bool [heads or kv_heads, last - first, last].
    """
    n = rows.stop
    if any(one is not None for one in pattern.lists.values()):
        begin = rows.start - rows.start % pattern.block_size  # the first block may begin before the rows
        return listed_rows(first - begin, last - begin, n - begin, n, **pattern.lists, **pattern.sizes)[0]
    index = torch.arange(n, device=device)[None] if pattern.index is None else pattern.index[0]
    member = torch.ones_like(index, dtype=torch.bool) if pattern.member is None else pattern.member[0]
    counts = torch.zeros(len(member), n, dtype=torch.int64, device=device)
    entries = counts.scatter_add_(1, index.expand_as(member), member.long()) > 0
    return entries[:, None, :last].expand(-1, last - first, -1)
