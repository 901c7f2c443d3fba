"""Full attention."""

from dataclasses import dataclass
from typing import ClassVar

from kvpress.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep and read everything: exact attention over our cache, the baseline of every comparison.

    The result is that of the unpatched model; entries are written in place instead of being concatenated at every step,
    and K and V are read once per kv head.
    """

    name: ClassVar[str] = "full"
