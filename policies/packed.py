"""Packed: keys and values in a few bits, those of the newest tokens exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvpress.errors import PolicyError
from kvpress.policy import EvictionPolicy, Policy, StoragePolicy, check_choice, check_count
from kvpress.storage import NewStats, PackedSlots, Storage


@dataclass(frozen=True, kw_only=True)
class Packed(StoragePolicy):
    """Hold keys and values as integers of 8, 4 or 2 bits, and those of the newest tokens exactly, too.

    Of each token and kv head every `group` channels share a scale and a zero: the least number is code 0, the greatest the
    highest code, and what is read is off by half a scale at most. With 8 bits a cache takes 0.56 of the bytes in bfloat16 and
    0.28 of those in float32, with 4 bits 0.31 and 0.16, and `residual` tokens more.

    What is exact when: in a prompt pass, the entries that it brings, for its own rows and for what scores them at its end; at
    any time, the entries of the newest `residual` tokens of a sequence, those of the pass in progress included. A prompt that
    comes in one pass is attended exactly; its chunks and later turns read what came before as it was packed. Entries are
    packed once, as they come, and never again. Works with every policy that evicts, selects or plans, except those named below.

    Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750 (abstract) and the
    authors' code (github.com/jy-yuan/KIVI), whose form for values this is. Deviations:

    - Keys are packed like values, by token. KIVI packs them by channel, 32 tokens together, which few bits need: some channels
      of keys are large in every token. By token every entry can be dropped alone, whatever evicts; prefer 8 or 4 bits.
    - 8 bits are the default (authors: 2, and 4 for models whose query heads share kv heads); scale and zero are float32
      (authors: the model's dtype), a group of equal numbers has scale 0, rounding is half to even.
    - `group` is a limit: the largest divisor of the head dimension that is no larger is used (authors: 32).
    - The newest `residual` tokens are always exact, also while a policy evicts some of them (authors: 32 to 128; their keys lose
      all of that at once whenever so many have come).
    - A token is packed when it comes, not when it leaves the newest ones, so that these are held twice.
    - Attention unpacks what it reads, one layer at a time (authors: within their kernel), so that steps save memory, not time.
    - Keys are packed as they are stored: rotated, or not rotated under policies that place tokens anew.

    Args:
        bits: of each number, 8, 4 or 2.
        group: channels that share a scale and a zero, at most.
        residual: newest tokens of each sequence that are exact; 0 for none.

    Raises:
        PolicyError: a value out of range; beside it, a policy that merges entries (EMS), or whose kv heads share a layer's
            entries (AdaKV).
    """

    name: ClassVar[str] = "packed"
    paper: ClassVar[str] = "arXiv 2402.02750"

    bits: int = 8
    group: int = 64
    residual: int = 32

    def storage(self, layer: int, layers: int, new_stats: NewStats) -> Storage:
        return PackedSlots(new_stats, self.bits, self.group, self.residual)

    def check_company(self, others: Sequence[Policy]) -> None:
        for other in others:
            if not isinstance(other, EvictionPolicy):
                continue
            if other.merges:
                raise PolicyError(
                    f"{other.describe()} merges what it drops into keys and values that stay, and {self.describe()} never "
                    "packs an entry again; use an eviction policy that drops, as h2o or snapkv"
                )
            if other.heads == "shared":
                raise PolicyError(
                    f"{other.describe()} leaves a different number of entries to each kv head, in pages, which "
                    f"{self.describe()} does not pack; use an eviction policy that keeps as many of each, as snapkv"
                )

    def __post_init__(self) -> None:
        check_choice(self.bits, "bits", (2, 4, 8))
        check_count(self.group, "group", 1)
        check_count(self.residual, "residual", 0)
