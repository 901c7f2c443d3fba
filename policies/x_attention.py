"""XAttention: a prompt's rows read the blocks whose antidiagonals promise attention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import PolicyError
from kvpress.kernels.antidiagonal_mass import antidiagonal_mass
from kvpress.policy import (
    Attended,
    Pattern,
    PrefillPolicy,
    View,
    check_block_size,
    check_count,
    check_finite,
    check_share,
    host_has,
    on_device,
    read_table,
)

REMEDY = "find them with `kvpress calibrate --policy x_attention`"


@dataclass(frozen=True, kw_only=True)
class XAttention(PrefillPolicy):
    """Read, in a prompt, the blocks that hold a share of the attention, as far as sums over antidiagonals tell.

    Rows and entries are cut into cells of `stride`. The score of a cell of rows with one of entries is the sum of q.k along
    its antidiagonal, so that every row and every entry has a part in it, at a `stride`-th of the work. The softmax of these
    scores, summed over blocks of `block_size`, estimates what attention a block of rows gives a block of entries. Each query
    head and block of rows then reads the first block, its own, and of the others the best ones until what is read makes up
    the share `threshold`. Decode steps are exact, and everything is kept.

    Source: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428, and the authors' code
    (github.com/mit-han-lab/x-attention). Where the two differ and deviations:

    - The first block and the one of the rows themselves are always read, and count towards the share (code).
    - The block with which the share is reached is read, too. Of equal blocks the earlier one comes first.
    - With `threshold` 1 everything is read (in the code what rounding leaves over may be missed).
    - Blocks are counted from a sequence's first entry in every pass. The rows of a later pass (a chunk, a turn) may begin
      inside of a block; rows and entries that a cell lacks count as zeros, and a cell without rows has no share in its block.
    - In a padded batch each sequence is planned alone. The authors have batches of one.
    - Behind an eviction policy blocks are runs of the entries that are kept, which differ between kv heads.
    - Soft-capping and attention sinks act in the attention, not in the estimate (the authors' models have neither).
    - q.k of the cells, softmax and sums are float32 (authors: model's dtype); without Triton a GPU has q.k in the model's dtype.
    - Thresholds per head are those of the authors' script (`fit`), one pass over some texts; the search of the paper, a dynamic
      programme over the heads, and the authors' tables are not here.
    - A pass without a cache is exact attention, as under every policy.

    Args:
        stride: side of a cell, a divisor of `block_size` (authors: 8 or 16).
        threshold: share of the estimated attention that is read, in (0, 1]; or a list for each layer that the policy acts on,
            with one for each query head; or a JSON file that has such lists (authors: 0.9, or found per head).
        block_size: rows and entries of a block, a power of two.
        norm: divides the scores of cells besides `stride`.
        min_len: a pass that ends before so many entries is exact (authors: none are); up to two blocks are read whole anyway.

    Raises:
        PolicyError: a value out of range, a file that cannot be read, or thresholds of another model.
    """

    name: ClassVar[str] = "x_attention"
    paper: ClassVar[str] = "arXiv 2503.16428"
    calibrated: ClassVar[str | None] = "threshold"
    in_file: ClassVar[bool] = True

    stride: int = 16
    threshold: float | str | Path | Sequence[Sequence[float]] = 0.9
    block_size: int = 128
    norm: float = 1.0
    min_len: int = 0

    def __post_init__(self) -> None:
        check_count(self.stride, "stride", 1)
        check_block_size(self.block_size)
        check_count(self.min_len, "min_len", 0)
        check_finite(self.norm, "norm", above=0)
        if self.block_size % self.stride:
            raise PolicyError(f"stride={self.stride} does not divide block_size={self.block_size}; give 8 or 16")
        object.__setattr__(self, "threshold", _read_thresholds(self.threshold))

    def check_layers(self, layers: int) -> None:
        if isinstance(self.threshold, tuple) and len(self.threshold) != layers:
            raise PolicyError(
                f"threshold has numbers for {len(self.threshold)} layers, and the model has {layers} attention layers: they were "
                f"found for another model; {REMEDY}, or give one number"
            )

    def plan(self, view: View) -> Pattern | None:
        """The blocks that each query head reads, int64 [batch, heads, row blocks, m]."""
        heads, n = view.query.shape[1], view.keys.shape[2]
        if n <= 2 * self.block_size or n < self.min_len:
            return None
        thresholds = self._thresholds(view.layer, heads)
        if min(thresholds) >= 1:
            return None
        mass = antidiagonal_mass(
            view.query,
            view.keys,
            scale=view.scale / self.norm,
            stride=self.stride,
            block_size=self.block_size,
        )
        return Pattern(blocks=best_blocks(mass, thresholds), block_size=self.block_size)

    def _thresholds(self, layer: int, heads: int) -> list[float]:
        """One for each query head of a layer."""
        if not isinstance(self.threshold, tuple):
            return [float(self.threshold)] * heads  # type: ignore[arg-type]
        if len(self.threshold[layer]) != heads:
            raise PolicyError(
                f"threshold[{layer}] has {len(self.threshold[layer])} numbers, and the layer has {heads} query heads: they were "
                f"found for another model; {REMEDY}, or give one number"
            )
        return list(self.threshold[layer])

    def fit(self, prompts: Iterable[Sequence[Attended]]) -> "XAttention":
        """The policy with a threshold for each layer and query head of a model, in place of its one `threshold`.

        That is taken for the share of the exact attention that is to be read: for each block of rows the fewest blocks that
        hold so much are the ones wanted. A head's threshold is the share of the estimated attention in all blocks whose
        estimate is no less than the least one of those wanted; of several prompts the largest.
        """
        if isinstance(self.threshold, tuple):
            raise PolicyError(
                "threshold has a number for each head already; to fit them again, give the one share that is to be read, as 0.9"
            )
        found: list[Tensor] = []  # of each layer [heads]
        for layers in prompts:
            one = [self._fitted(layer) for layer in layers]
            found = [torch.maximum(a, b) for a, b in zip(found, one, strict=True)] if found else one
        return replace(self, threshold=[[round(share, 6) for share in heads.tolist()] for heads in found])

    def _fitted(self, layer: Attended) -> Tensor:
        """The thresholds of a layer's query heads on one prompt, float64 [heads] on the CPU."""
        n, size = layer.key.shape[2], self.block_size
        if n <= 2 * size:
            raise PolicyError(
                f"a prompt of {n} tokens has no more than two blocks of {size}, which are read anyway; give longer ones "
                "(--lengths 2000)"
            )
        share = self._thresholds(0, 1)[0]
        true = antidiagonal_mass(
            layer.query, layer.key, scale=layer.scale, softcap=layer.softcap, stride=1, block_size=size
        )[0]
        estimate = antidiagonal_mass(
            layer.query, layer.key, scale=layer.scale / self.norm, stride=self.stride, block_size=size
        )[0]
        order = true.argsort(dim=-1, descending=True, stable=True)
        reached = functional.pad(true.gather(-1, order).double().cumsum(-1), (1, -1))  # by those before
        wanted = reached < share * true.double().sum(-1, keepdim=True)
        least = estimate.gather(-1, order).masked_fill_(~wanted, float("inf")).amin(-1, keepdim=True)
        estimate = estimate.double()
        taken = estimate.masked_fill(estimate < least, 0.0).sum((1, 2))
        return (taken / estimate.sum((1, 2))).cpu()


def _read_thresholds(given: Any) -> float | tuple[tuple[float, ...], ...]:
    """One threshold, or those of the heads of each layer; from a file, if that is what is given."""
    where = "threshold"
    if isinstance(given, str | Path):
        given, where = read_table(given, where), f"threshold file {given}"
        if not isinstance(given, list) or not given:
            raise PolicyError(f"{where} has no list of layers but a {type(given).__name__}; {REMEDY}")
    if not isinstance(given, Sequence):
        check_share(given, where)
        return float(given)
    for layer, heads in enumerate(given):
        if not isinstance(heads, Sequence) or isinstance(heads, str):
            raise PolicyError(f"{where}[{layer}]={heads!r} is no list; give one number per layer and query head")
        for head, share in enumerate(heads):
            check_share(share, f"{where}[{layer}][{head}]")
    return tuple(tuple(heads) for heads in given)


def best_blocks(mass: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The first block, that of the rows, and the best of the others until the threshold's share of the mass is reached.

    Args:
        mass: float32 [batch, heads, row blocks, blocks], as `antidiagonal_mass` gives it.
        thresholds: shares, one for each head.

    Returns:
        int64 [batch, heads, row blocks, m], -1 behind the last one chosen; m as in `listed_blocks`.
    """
    rows, blocks = mass.shape[2:]
    place = torch.arange(blocks, device=mass.device)
    own = place[blocks - rows :, None]
    ranked = mass.masked_fill((place == 0) | (place == own), float("inf")).masked_fill_(place > own, float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    reached = functional.pad(mass.gather(-1, order).cumsum(-1), (1, -1))  # by those before
    share = on_device(thresholds, torch.float32, mass.device).view(-1, 1, 1)
    wanted = (reached < share * mass.sum(-1, keepdim=True)) | (share >= 1)
    wanted = (wanted & (order <= own)) | (order == 0) | (order == own)
    width = int(wanted.sum(-1).max()) if host_has(wanted) else blocks
    return order.masked_fill_(~wanted, -1)[..., :width]
