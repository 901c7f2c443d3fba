"""PyramidKV: SnapKV with more entries in lower layers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvpress.policies.snapkv import SnapKV
from kvpress.policy import Quota, check_count


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Keep what the last rows of the prompt attend to, more of it in lower layers than in upper ones.

    Scores are those of `SnapKV`: the softmax weights of the last `window` rows of the prompt pass, summed over the rows and the
    group and pooled over neighbours. The `b = budget - window` entries beside the window are spread over the layers: the last
    layer gets about b / beta, the first 2 b less that, and those between fall in equal steps. Decode appends and never evicts.

    Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069,
    and the authors' code (github.com/Zefan-Cai/KVCache-Factory). As there, a prompt of less than 2 b tokens is cut evenly,
    no layer gets more than the prompt has, and steps are rounded down, so the layers together hold a few percent more than
    their number times `budget`: compare methods at equal bytes. Deviations:

    - One set per kv head, by the sum over its query heads before pooling (authors: one per query head by default).
    - A budget smaller than the window keeps the last `budget` tokens (a share of a short prompt can be that small); as an
      int it is refused.
    - A model of one layer gets `budget`.
    - Later prompt passes compress again: their last rows score all entries still held.
    - The authors' options of merging what is dropped are left out.

    Args:
        budget: entries kept per kv head after a prompt pass, mean over the layers; int, or float share of the prompt's length
            (paper: 128 and 2048, the default).
        window: last rows of the prompt that score, and are always kept (authors' LongBench runs: 8).
        kernel_size: odd width of the pooling over neighbours; 1 is no pooling (authors' LongBench runs: 7).
        pooling: "max" (authors' LongBench runs) or "avg".
        beta: how much less the last layer gets than the mean; 1 is the same for all layers (authors: 20).
        evict: see `EvictionPolicy`.

    Raises:
        PolicyError: a value out of range, an even `kernel_size`, or an int budget that is not larger than `window`.
    """

    name: ClassVar[str] = "pyramid_kv"
    paper: ClassVar[str] = "arXiv 2406.02069"

    window: int = 8
    kernel_size: int = 7
    pooling: Literal["avg", "max"] = "max"
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.beta, "beta", 1)

    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        even = super().quota(tokens, layer, layers)
        beside = even.total - self.window
        if beside <= 0 or layers == 1 or tokens < max(even.total, 2 * beside):
            return even
        last = beside // self.beta
        first = 2 * beside - last
        if first >= tokens - self.window:  # the first layer keeps the whole prompt, and the others get the rest
            first = tokens - self.window
            last = 2 * beside - first
        step = (first - last) // (layers - 1)
        return Quota(first - layer * step + self.window, self.window)
