"""XAttention in plain Python: which blocks of entries a block of rows reads, one product and one exponential at a time."""

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from oracles.common.llama import Oracle, rotate
from oracles.common.numbers import dot, softmax
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


class Antidiagonals(Oracle):
    """A prompt's row reads the blocks that its block chooses; decode steps read everything.

    The rules may act over an eviction policy's rules. `log` collects (layer, position of the row) -> blocks per query head.
    """

    def __init__(self, model, policy):
        super().__init__(model, policy.over)
        self.rules = policy

    def run(self, passes):
        self.log = {}
        return super().run(passes)

    def row(self, layer, queries, row, positions, decode):
        self.sees_all = decode
        if not decode and not isinstance(
            self.policy, Full
        ):  # an eviction policy counts what a row would give everything
            self.sees_all = True
            super().row(layer, queries, row, positions, decode)
            self.sees_all = False
        return super().row(layer, queries, row, positions, decode)

    def observe(self, *seen):
        if self.sees_all:
            super().observe(*seen)

    def reads(self, layer, queries, row, positions, decode):
        reads = super().reads(layer, queries, row, positions, decode)
        if self.sees_all:
            return reads
        if row == 0:
            self.blocks = [self.plan(layer, queries, head, positions) for head in range(len(reads))]
        narrowed, size = [], self.rules.block_size
        for (entries, places, place), blocks in zip(reads, self.blocks, strict=True):
            if blocks is not None:
                # What a row may read are the first entries, itself the last of them.
                wanted = blocks[(len(entries) - 1) // size]
                held = [i for i in range(len(entries)) if i // size in wanted]
                entries, places = [entries[i] for i in held], [places[i] for i in held]
            narrowed.append((entries, places, place))
        self.log[layer, positions[row]] = [
            None if blocks is None else blocks[(len(read[0]) - 1) // size]
            for blocks, read in zip(self.blocks, reads, strict=True)
        ]
        return narrowed

    def plan(self, layer, queries, head, positions):
        """The blocks of each block of rows, by one query head; None for everything."""
        rules, config = self.rules, self.config
        entries = self.heads[layer][head * config.num_key_value_heads // config.num_attention_heads].entries
        n, threshold = len(entries), rules.threshold
        if n <= 2 * rules.block_size or n < rules.min_len:
            return None
        if not isinstance(threshold, float | int):
            threshold = threshold[layer][head]
        keys = [rotate(entry.key, entry.position, self.theta).tolist() for entry in entries]
        rows = {
            n - len(positions) + row: rotate(queries[row, head], position, self.theta).tolist()
            for row, position in enumerate(positions)
        }
        scale = 1 / sqrt(config.head_dim) / rules.norm
        mass = estimate(rows, keys, scale, rules.stride, rules.block_size)
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
