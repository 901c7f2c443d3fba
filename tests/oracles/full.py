"""Full in plain Python: everything is kept (spec section 0.8)."""

from dataclasses import dataclass

from oracles.common.rules import Rules


@dataclass(frozen=True)
class Full(Rules):
    """Exact attention (U1)."""
