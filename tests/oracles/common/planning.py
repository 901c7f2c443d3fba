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
        counts_reads = self.policy.counts_reads
        # Else an eviction policy counts what a row would give everything.
        if not decode and not counts_reads and not isinstance(self.policy, Full):
            self.sees_all = True
            super().row(layer, queries, row, positions, decode)
            self.sees_all = False
        return super().row(layer, queries, row, positions, decode)

    def observe(self, *seen):
        if self.sees_all or self.policy.counts_reads:
            super().observe(*seen)

    def reads(self, layer, queries, row, positions, decode):
        reads = super().reads(layer, queries, row, positions, decode)
        if self.sees_all:
            return reads
        if row == 0:
            self.plans = self.plan_heads(layer, queries, positions, len(reads))
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

    def plan_heads(self, layer, queries, positions, heads):
        """The plan of each query head."""
        scale = 1 / sqrt(self.config.head_dim)
        return [self.plan(layer, head, *self.inputs(layer, queries, head, positions), scale) for head in range(heads)]

    def inputs(self, layer, queries, head, positions):
        """What `plan` is given of a query head: its rows and the keys."""
        config = self.config
        entries = self.heads[layer][head * config.num_key_value_heads // config.num_attention_heads].entries
        n = len(entries)
        keys = [rotate(entry.key, entry.position, self.theta).tolist() for entry in entries]
        rows = {
            n - len(positions) + row: rotate(queries[row, head], position, self.theta).tolist()
            for row, position in enumerate(positions)
        }
        return rows, keys
