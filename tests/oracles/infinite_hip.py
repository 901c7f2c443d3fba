"""InfiniteHiP in plain Python: stages of pruning for each block of rows, one product at a time."""

from dataclasses import dataclass, field
from math import floor
from typing import Any

from oracles.common.llama import rotate
from oracles.common.numbers import dot
from oracles.common.planning import Planned
from oracles.common.rules import check_apart, top
from oracles.full import Full


def stand_in(chunk, as_left, as_right):
    """Which of a chunk's items stands for it: the better half, by its first item, until one is left."""
    while len(chunk) > 1:
        middle = floor((len(chunk) - 1) / 2 + 0.5)  # the second half begins there, counted from 0
        left, right = chunk[:middle], chunk[middle:]
        one, other = as_left(left[0]), as_right(right[0])
        check_apart(one, other)
        chunk = right if other > one else left
    return chunk[0]


def cut(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def stage(items, size, keep, scores_of_head):
    """What is left of a list: the best `keep` items in whole chunks.

    scores_of_head: for each head, chunk number -> two functions from an item to its score, as a left and as a right half.
    """
    chunks = cut(items, size)
    scores = []
    for number, chunk in enumerate(chunks):
        best = []
        for scores_of in scores_of_head:
            as_left, as_right = scores_of(number, len(chunks))
            best.append(as_right(stand_in(chunk, as_left, as_right)))
        scores.append(max(best))
    return [item for number in top(scores, keep // size) for item in chunks[number]]


class Pruning(Planned):
    """`log` collects (layer, position of the row) -> for each query head the entries (by their place) that it reads.

    `lists` has of each (layer, position of a block's last row) the list of all keys and those that the stages made of it.
    """

    def run(self, passes):
        self.found, self.steps, self.lists = {}, {}, {}
        return super().run(passes)

    def listed(self, plan, row):
        return plan[row]

    def reads_entry(self, listed, entry, row):
        return listed is None or entry in listed

    def plan_heads(self, layer, queries, positions, heads):
        rules, n = self.rules, len(self.heads[layer][0].entries)
        self.found, self.steps, plan = {}, {}, {}
        before = n - len(positions)
        for rows in cut(list(range(len(positions))), rules.block_size):
            first, seen = before + rows[0], before + rows[-1] + 1
            listed = None
            if seen >= rules.min_len:
                everything = list(range(rules.n_sink, first - rules.n_stream))
                lists = self.stages(layer, queries, {row: positions[row] for row in rows}, everything)
                self.lists[layer, positions[rows[-1]]] = lists
                listed = self.visible(lists[-1], first, seen)
            plan |= {before + row: listed for row in rows}
        return [plan] * heads

    def visible(self, found, first, seen):
        """The entries that a block reads whose first row is entry `first`."""
        rules = self.rules
        return [e for e in range(seen) if e in found or e < rules.n_sink or e >= first - rules.n_stream]

    def kept(self, layer, number):
        rules = self.rules
        last = number == len(rules.l_c) - 1
        return rules.early_k if last and layer < rules.early_layers else rules.k[number]

    def stages(self, layer, queries, rows, everything, known=()):
        """All lists, from that of all keys to the last one.

        known: lists that are not made anew, or None in their places.
        """
        lists = [everything]
        for number, size in enumerate(self.rules.l_c):
            if number < len(known) and known[number] is not None:
                lists.append(known[number])
                continue
            keep, items = self.kept(layer, number), lists[-1]
            if len(cut(items, size)) > keep // size:
                heads = range(self.config.num_attention_heads)
                items = stage(items, size, keep, [self.scores(layer, queries, rows, head) for head in heads])
            lists.append(items)
        return lists

    def scores(self, layer, queries, rows, head):
        """How a head scores entries: (number of the chunk, chunks) -> two functions of an entry."""
        rules, config = self.rules, self.config
        entries = self.heads[layer][head * config.num_key_value_heads // config.num_attention_heads].entries
        turned = {}

        def at(kind, vector, place):
            if (kind, place) not in turned:
                turned[kind, place] = rotate(vector, place, self.theta).tolist()
            return turned[kind, place]

        def best(entry, key_place, query_place):
            key = at(entry, entries[entry].key, key_place)
            return max(dot(at(("q", row), queries[row, head], query_place(p)), key) for row, p in rows.items())

        def scores_of(number, chunks):
            if not rules.extend:
                both = lambda entry: best(entry, entries[entry].position, lambda p: p)  # noqa: E731
                return both, both
            if layer < rules.early_layers:
                both = lambda entry: best(entry, number, lambda p: min(p, chunks - 1 + rules.n_stream))  # noqa: E731
                return both, both
            near = [lambda entry, place=place: best(entry, place, lambda p: rules.n_stream + 1) for place in (0, 1)]
            return near[0], near[1]

        return scores_of

    def reads(self, layer, queries, row, positions, decode):
        reads = super().reads(layer, queries, row, positions, decode)
        if decode:
            reads = self.step(layer, queries, row, positions, reads)
        if not self.rules.extend:
            return reads
        return [(entries, list(range(len(entries))), len(entries) - 1) for entries, _, _ in reads]

    def step(self, layer, queries, row, positions, reads):
        """A decode step: lists whose own steps are over are made anew."""
        rules, n = self.rules, len(reads[0][0])
        self.steps[layer] = self.steps.get(layer, 0) + 1
        due = [(self.steps[layer] - 1) % every == 0 for every in rules.refresh]
        known = self.found.get(layer, [None] * (len(due) + 1))[1:]
        known = [None if new else one for new, one in zip(due, known, strict=True)]
        everything = list(range(rules.n_sink, n - 1 - rules.n_stream))
        self.found[layer] = self.stages(layer, queries, {row: positions[row]}, everything, known)
        self.lists[layer, positions[row]] = self.found[layer]
        held = self.visible(self.found[layer][-1], n - 1, n)
        self.log[layer, positions[row]] = [[entries[i].position for i in held] for entries, _, _ in reads]
        return [([entries[i] for i in held], [places[i] for i in held], place) for entries, places, place in reads]


@dataclass(frozen=True)
class InfiniteHiP:
    """The rules' numbers; what is kept says `over`."""

    n_sink: int = 256
    n_stream: int = 1024
    l_c: tuple = (256, 32, 8)
    k: tuple = (32768, 8192, 2048)
    early_layers: int = 3
    early_k: int = 4096
    refresh: tuple = (16, 8, 4)
    block_size: int = 64
    extend: bool = False
    min_len: int = 0
    over: Any = field(default_factory=Full)
    runner = Pruning
