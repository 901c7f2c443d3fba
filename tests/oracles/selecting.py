"""TidalDecode, Quest and Recycled Attention in plain Python: what each query head reads in a decode step.

The rules may act over an eviction policy's rules (`over`), which say what is held. `log` collects what was read:
(position of the row, layer) -> for each query head the positions.
"""

from dataclasses import dataclass, field
from math import exp, inf, sqrt
from typing import Any

from oracles.llama import Oracle, rotate
from oracles.policies import Full, resolve, top


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


class Selecting(Oracle):
    """A decode step reads what `choose` says; prompts read everything. Decode steps may be run again, exactly."""

    def run(self, passes):
        self.log, self.decoded = {}, []
        self.start()
        return super().run(passes)

    def start(self):
        """Forget everything."""

    def again(self, tokens, decode):
        every = getattr(self.policy, "correct_every", 0)
        if not every:
            return []
        if decode and len(self.decoded) < every:
            self.decoded = self.decoded + tokens
            return []
        again, self.decoded = self.decoded, []
        return again

    def reads(self, layer, queries, row, positions, decode):
        reads = []
        for query_head, (entries, places, place) in enumerate(super().reads(layer, queries, row, positions, decode)):
            query = rotate(queries[row, query_head], place, self.theta).tolist()
            keys = [rotate(e.key, at, self.theta).tolist() for e, at in zip(entries, places, strict=True)]
            reads.append((entries, places, place, query, keys))
        if not decode:
            self.see_prompt(layer, [query for *_, query, _ in reads])
            return [read[:3] for read in reads]
        chosen = self.choose(layer, [([e.position for e in entries], q, k) for entries, _, _, q, k in reads])
        self.log[positions[row], layer] = chosen
        narrowed = []
        for (entries, places, place, *_), wanted in zip(reads, chosen, strict=True):
            held = [i for i, entry in enumerate(entries) if entry.position in wanted]
            narrowed.append(([entries[i] for i in held], [places[i] for i in held], place))
        return narrowed

    def see_prompt(self, layer, queries):
        """A prompt's row, with its query heads."""

    def choose(self, layer, heads):
        """For each query head (positions held, query, keys), all rotated: the positions that it reads."""
        raise NotImplementedError


class Tidal(Selecting):
    def start(self):
        self.picked = None

    def choose(self, layer, heads):
        rules = self.policy
        first, second = rules.sparse_layer_start, rules.correction_layer
        if second is None:
            layers = self.config.num_hidden_layers
            second = max(first + 2, {28: 12, 32: 13, 80: 31}.get(layers, round(layers * 0.4)))
        everything = [positions for positions, _, _ in heads]
        if layer == 0:
            self.picked = None
        if layer in (first, second):
            self.picked = [self.pick(*head) for head in heads]
            return everything
        if self.picked is None:
            return everything
        return [
            [at for at in positions if picked is None or at in picked]
            for positions, picked in zip(everything, self.picked, strict=True)
        ]

    def pick(self, positions, query, keys):
        """The current token and the k - 1 best others; None for all."""
        k = resolve(self.policy.k, len(positions))
        if k >= len(positions):
            return None
        scores = [dot(query, key) for key in keys]
        scores[-1] = inf
        return [positions[i] for i in top(scores, k)]


class Pages(Selecting):
    def choose(self, layer, heads):
        rules, chosen = self.policy, []
        for positions, query, keys in heads:
            size = rules.page_size
            pages = [list(range(start, min(start + size, len(keys)))) for start in range(0, len(keys), size)]
            budget = resolve(rules.budget, len(keys))
            count = max(1, budget // size)
            if layer < rules.dense_layers or budget >= len(keys):
                chosen.append(positions)
                continue
            bounds = [self.bound(query, [keys[i] for i in page]) for page in pages]
            bounds[-1] = inf
            chosen.append([positions[i] for page in top(bounds, count) for i in pages[page]])
        return chosen

    def bound(self, query, keys):
        channels = list(zip(*keys, strict=True))
        return sum(max(q * max(channel), q * min(channel)) for q, channel in zip(query, channels, strict=True))


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
            full = dot(query, then) / sqrt(dot(query, query) * dot(then, then)) < rules.similarity
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
            held.remove(min(held, key=lambda at: (scores[at], -at)))
        held.append(position)

    def rebuild(self, layer, kv_head, logits):
        scores = self.scores(logits)
        positions = sorted(scores)
        self.rooms[layer, kv_head] = room = resolve(self.policy.budget, len(positions))
        self.sets[layer, kv_head] = [positions[i] for i in top([scores[at] for at in positions], room)]

    def scores(self, logits):
        """{position: largest softmax weight (or their sum) over the group}."""
        rows = []
        for row in logits:
            largest = max(row.values())
            total = sum(exp(x - largest) for x in row.values())
            rows.append({at: exp(x - largest) / total for at, x in row.items()})
        reduce = {"max": max, "sum": sum}[self.policy.group_reduce]
        return {at: reduce([row[at] for row in rows]) for at in rows[0]}


@dataclass(frozen=True)
class Over:
    """Keeps what the eviction rules below keep."""

    over: Any = field(default_factory=Full, kw_only=True)

    evict = property(lambda self: self.over.evict)
    rope = property(lambda self: self.over.rope)
    prompt_only = property(lambda self: self.over.prompt_only)

    def keep(self, entries, rows, seen):
        return self.over.keep(entries, rows, seen)


@dataclass(frozen=True)
class TidalDecode(Over):
    k: int | float = 256
    sparse_layer_start: int = 2
    correction_layer: int | None = None
    correct_every: int = 0
    runner = Tidal


@dataclass(frozen=True)
class Quest(Over):
    budget: int | float = 2048
    page_size: int = 16
    dense_layers: int = 2
    runner = Pages


@dataclass(frozen=True)
class RecycledAttention(Over):
    budget: int | float = 4096
    stride: int = 50
    query_stride: int | None = None
    similarity: float | None = None
    group_reduce: str = "max"
    runner = Recycling
