"""Skip-softmax: a prompt's attention leaves out tiles whose weights turn out to be negligible, as it comes to them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvpress.errors import PolicyError
from kvpress.kernels.skip_attention import tile_weights
from kvpress.policy import (
    Attended,
    EvictionPolicy,
    Pattern,
    Policy,
    PrefillPolicy,
    View,
    check_at_least_zero,
    check_block_size,
    check_count,
    check_finite,
)


@dataclass(frozen=True, kw_only=True)
class SkipSoftmax(PrefillPolicy):
    """Skip, in a prompt, the tiles of entries in which no row has a score near the largest one that it has met.

    Rows and entries are cut into tiles. A tile of rows walks over the tiles of entries from the first one on, and skips a tile if
    in each row exp(largest score in the tile - largest score so far) is below scale / (entries): no exponentials, no values.
    Nothing is estimated, and all scores are computed: what is saved on a GPU is the half of the attention that comes after
    them, and on a CPU no time at all. Decode steps are exact, and everything is kept.

    What a row loses of its probability mass is at most `scale` times the share of the tiles that it skips, which says little for a
    `scale` above 1; what it really loses, `kvpress inspect --policy skip_softmax` measures head by head.

    Source: Yuan et al., "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv 2512.12087, and NVIDIA's
    Model-Optimizer, whose fit for Qwen3-30B-A3B the coefficients are. Where these are open and deviations:

    - Prompts only; the authors skip in decode steps, too.
    - The threshold is never above 1, with which a tile is skipped that has no row's largest score so far: the first tile is
      always read.
    - Each query head skips by itself. Tiles of rows are counted from the first row of a pass, those of entries from the first
      entry, and the entries are those up to the pass's last row: another division of a prompt into passes skips others.
    - The search for `scale` (`fit`) is one pass over some texts: the share of tiles that any threshold skips is known from the
      largest weight of each tile (Model-Optimizer: RULER's prompts, and a fit over several targets).
    - Attention sinks and soft-capping: a sink is no entry, and not in the largest score; a capped score is.
    - In a padded batch each sequence is walked over alone.
    - Behind an eviction policy entries are those that are kept, in the order of their positions. Policies that add up the attention
      of all rows (H2O) are refused, as what is skipped is not known.
    - A pass without a cache is exact attention, as under every policy.

    Args:
        scale: the threshold times the number of entries; 0 skips nothing. None for a * exp(b * target).
        target: the share of tiles to be skipped, in [0, 1), which gives `scale` where it is None, and is what
            `kvpress calibrate --policy skip_softmax` fits `scale` to.
        a: factor of the model (authors, Qwen3-30B-A3B: 7.9189).
        b: exponent of the model (authors, Qwen3-30B-A3B: 8.6152).
        tile: rows and entries of a tile, a power of two (authors: 128).
        min_len: a pass that ends before so many entries is exact.

    Raises:
        PolicyError: a value out of range, or a policy beside it that adds up the attention of all rows.
    """

    name: ClassVar[str] = "skip_softmax"
    paper: ClassVar[str] = "arXiv 2512.12087"
    calibrated: ClassVar[str | None] = "scale"

    scale: float | None = None
    target: float = 0.5
    a: float = 7.9189
    b: float = 8.6152
    tile: int = 128
    min_len: int = 0

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_at_least_zero(self.scale, "scale")
        check_finite(self.target, "target")
        if not 0 <= self.target < 1:
            raise PolicyError(f"target={self.target!r} does not work; give a share of the tiles, from 0 to below 1")
        check_finite(self.a, "a", above=0)
        check_finite(self.b, "b", above=0)
        check_block_size(self.tile, "tile")
        check_count(self.min_len, "min_len", 0)

    def check_company(self, others: "Sequence[Policy]") -> None:
        super().check_company(others)
        for other in others:
            if isinstance(other, EvictionPolicy) and other.observes.takes_mass and self.threshold(1) > 0:
                raise PolicyError(
                    f"{other.describe()} adds up the attention of all rows, and {self.describe()} does not know that of the tiles "
                    "it skips; use a policy that looks at a prompt's last rows, as snapkv, or scale=0"
                )

    def threshold(self, entries: int) -> float:
        """Below which weight, beside the largest one so far, a tile is skipped in a pass that ends with so many entries."""
        scale = self.a * math.exp(self.b * self.target) if self.scale is None else self.scale
        return min(1.0, scale / entries)

    def plan(self, view: View) -> Pattern | None:
        """The threshold; None where nothing can be skipped."""
        n = view.positions.shape[2]
        skip = self.threshold(n)
        if n <= self.tile or n < self.min_len or skip == 0:
            return None
        return Pattern(skip=skip, block_size=self.tile)

    def fit(self, prompts: Iterable[Sequence[Attended]]) -> "SkipSoftmax":
        """The policy with the `scale` that skips the share `target` of a model's tiles, of all layers and heads together."""
        found: list[torch.Tensor] = []
        reachable = 0  # tiles that hold no row's largest score so far
        for layers in prompts:
            for layer in layers:
                n = layer.key.shape[2]
                if n <= 2 * self.tile:
                    raise PolicyError(
                        f"a prompt of {n} tokens has no more than two tiles of {self.tile}, which says too little; give "
                        "longer ones (--lengths 4000)"
                    )
                weights = tile_weights(layer.query, layer.key, scale=layer.scale, tile=self.tile, softcap=layer.softcap)
                weights = weights[weights >= 0].cpu()
                reachable += int((weights < 1).sum())
                found.append(weights * n)
        scales = torch.cat(found).sort().values
        if self.target > reachable / len(scales):
            raise PolicyError(
                f"target={self.target} of the tiles cannot be skipped: on these prompts {reachable / len(scales):.0%} can, the "
                "others hold a row's largest score so far; give a smaller target, or longer prompts"
            )
        return replace(self, scale=float(f"{scales[int(self.target * len(scales))].item():.4g}"))
