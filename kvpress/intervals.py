"""Intervals of measured shares."""

import math


def wilson_interval(found: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion; 95 % for the default `z`.

    Raises:
        ValueError: `n` below 1, or `found` outside 0 to `n`.
    """
    if n < 1 or not 0 <= found <= n:
        raise ValueError(f"{found} of {n} is no proportion")
    share, spread = found / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # at the ends the bound is the share itself, which rounding must not miss
    return (0.0 if found == 0 else centre - half), (1.0 if found == n else centre + half)
