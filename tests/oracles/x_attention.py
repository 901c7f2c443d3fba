"""XAttention in plain Python: which blocks of entries a block of rows reads, one product and one exponential at a time."""

from dataclasses import dataclass, field
from typing import Any

from oracles.common.numbers import dot, softmax
from oracles.common.planning import Planned
from oracles.common.rules import check_apart, ranked
from oracles.full import Full


def estimate(queries, keys, scale, stride, block_size):
    """What blocks of rows give blocks of entries: mass[row block][block], for the row blocks that hold rows.

    queries: {entry: [d] list} of the rows, which are the last entries; keys: [n] lists [d].
    """
    n, mass = len(keys), {}
    for cell in range(-(-n // stride)):
        rows = [row for row in range(cell * stride, (cell + 1) * stride) if row in queries]
        if not rows:
            continue
        scores = []
        for other in range(cell + 1):
            total = 0.0
            for row in rows:  # the row at place r of its cell meets the entry at the place that is r from the other end
                entry = other * stride + (cell + 1) * stride - 1 - row
                if entry < n:
                    total += dot(queries[row], keys[entry])
            scores.append(total * scale / stride)
        block = cell * stride // block_size
        of_block = mass.setdefault(block, [0.0] * (block + 1))
        for other, weight in enumerate(softmax(scores)):
            of_block[other * stride // block_size] += weight
    return mass


def choose(mass, block, threshold):
    """The blocks that a block of rows reads, ascending."""
    chosen, enough = {0, block}, threshold * sum(mass)
    others = [other for other in ranked(mass[: block + 1]) if other not in chosen]
    for at, other in enumerate(others):
        reached = sum(mass[one] for one in chosen)
        if threshold < 1:
            check_apart(reached, enough)
            if reached >= enough:
                if at:
                    check_apart(mass[others[at - 1]], mass[other])
                break
        chosen.add(other)
    return sorted(chosen)


class Antidiagonals(Planned):
    """`log` collects (layer, position of the row) -> blocks per query head."""

    def plan(self, layer, head, queries, keys, scale):
        """The blocks of each block of rows; None for everything."""
        rules, n, threshold = self.rules, len(keys), self.rules.threshold
        if n <= 2 * rules.block_size or n < rules.min_len:
            return None
        if not isinstance(threshold, float | int):
            threshold = threshold[layer][head]
        mass = estimate(queries, keys, scale / rules.norm, rules.stride, rules.block_size)
        return {block: choose(of_block, block, threshold) for block, of_block in mass.items()}


@dataclass(frozen=True)
class XAttention:
    """The rules' numbers; what is kept says `over`."""

    stride: int = 16
    threshold: Any = 0.9
    block_size: int = 128
    norm: float = 1.0
    min_len: int = 0
    over: Any = field(default_factory=Full)
    runner = Antidiagonals
