"""Recycled Attention in plain Python: a step of full attention chooses for the steps after it."""

from dataclasses import dataclass

from oracles.common.numbers import cosine, softmax
from oracles.common.rules import check_apart, resolve, top
from oracles.common.selecting import Over, Selecting


class Recycling(Selecting):
    def start(self):
        self.sets, self.rooms, self.steps = {}, {}, {}
        self.query, self.rows, self.is_full = {}, {}, {}

    def see_prompt(self, layer, queries):
        self.query[layer] = [x for query in queries for x in query]
        self.steps[layer] = 0
        for kv_head in range(self.config.num_key_value_heads):
            self.sets.pop((layer, kv_head), None)

    def choose(self, layer, heads):
        rules, kv_heads = self.policy, self.config.num_key_value_heads
        group = len(heads) // kv_heads
        for kv_head in range(kv_heads):
            if (layer, kv_head) not in self.sets:
                held = heads[kv_head * group][0][:-1]
                logits = [{at: x for at, x in row.items() if at in held} for row in self.rows[layer, kv_head]]
                self.rebuild(layer, kv_head, logits)
        self.steps[layer] += 1
        full, query = False, [x for _, query, _ in heads for x in query]
        if rules.similarity is None:
            full = self.steps[layer] % rules.stride == 0
        elif self.steps[layer] % rules.query_stride == 0:
            then = self.query[layer]
            full = cosine(query, then) < rules.similarity
        self.is_full[layer] = full
        if full:
            self.query[layer] = query
            return [positions for positions, _, _ in heads]
        return [
            [at for at in positions if at in self.sets[layer, index // group] or at == positions[-1]]
            for index, (positions, _, _) in enumerate(heads)
        ]

    def observe(self, layer, kv_head, position, mass, logits, decode):
        super().observe(layer, kv_head, position, mass, logits, decode)
        self.rows[layer, kv_head] = logits
        if not decode:
            return
        if self.is_full[layer]:
            self.rebuild(layer, kv_head, logits)
            return
        held = self.sets[layer, kv_head]
        if len(held) >= self.rooms[layer, kv_head]:
            scores = self.scores(logits)
            lowest, *others = sorted(held, key=lambda at: (scores[at], -at))
            if others:
                check_apart(scores[lowest], scores[others[0]])
            held.remove(lowest)
        held.append(position)

    def rebuild(self, layer, kv_head, logits):
        scores = self.scores(logits)
        positions = sorted(scores)
        self.rooms[layer, kv_head] = room = resolve(self.policy.budget, len(positions))
        self.sets[layer, kv_head] = [positions[i] for i in top([scores[at] for at in positions], room)]

    def scores(self, logits):
        """{position: largest softmax weight (or their sum) over the group}."""
        rows = [dict(zip(row, softmax(list(row.values())), strict=True)) for row in logits]
        reduce = {"max": max, "sum": sum}[self.policy.group_reduce]
        return {at: reduce([row[at] for row in rows]) for at in rows[0]}


@dataclass(frozen=True)
class RecycledAttention(Over):
    budget: int | float = 4096
    stride: int = 50
    query_stride: int | None = None
    similarity: float | None = None
    group_reduce: str = "max"
    runner = Recycling
