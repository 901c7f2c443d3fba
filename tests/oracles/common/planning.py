"""Policies that choose what the rows of a prompt read."""

from math import sqrt

from oracles.common.llama import Oracle, rotate
from oracles.full import Full


class Planned(Oracle):
    """A prompt's row reads what `plan` says; decode steps read everything.

    The rules may act over an eviction policy's rules. `log` collects (layer, position of the row) -> what `listed` says, for
    each query head.
    """

    def __init__(self, model, policy):
        super().__init__(model, policy.over)
        self.rules = policy

    def run(self, passes):
        self.log = {}
        return super().run(passes)

    def plan(self, layer, head, queries, keys, scale):
        """What a query head reads in one pass; None for everything.

        queries: {entry: [d] list} of the rows, which are the last entries; keys: [n] lists [d]. Both are rotated.
        """
        raise NotImplementedError

    def listed(self, plan, row):
        """What a plan lists for the row that is entry `row`: blocks, where a plan has a list for each block of rows."""
        return plan[row // self.rules.block_size]

    def reads_entry(self, listed, entry, row):
        """Whether a row reads an entry that is not after it, by what is listed for it."""
        return entry == row or entry // self.rules.block_size in listed

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
            self.plans = [self._plan(layer, queries, head, positions) for head in range(len(reads))]
        narrowed, log = [], []
        for (entries, places, place), plan in zip(reads, self.plans, strict=True):
            own = len(entries) - 1  # what a row may read are the first entries, itself the last of them
            listed = None if plan is None else self.listed(plan, own)
            log.append(listed)
            if plan is not None:
                held = [i for i in range(len(entries)) if self.reads_entry(listed, i, own)]
                entries, places = [entries[i] for i in held], [places[i] for i in held]
            narrowed.append((entries, places, place))
        self.log[layer, positions[row]] = log
        return narrowed

    def _plan(self, layer, queries, head, positions):
        config = self.config
        entries = self.heads[layer][head * config.num_key_value_heads // config.num_attention_heads].entries
        n = len(entries)
        keys = [rotate(entry.key, entry.position, self.theta).tolist() for entry in entries]
        rows = {
            n - len(positions) + row: rotate(queries[row, head], position, self.theta).tolist()
            for row, position in enumerate(positions)
        }
        return self.plan(layer, head, rows, keys, 1 / sqrt(config.head_dim))
