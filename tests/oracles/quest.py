"""Quest in plain Python: whole pages, by the most that a key of theirs can score."""

from dataclasses import dataclass
from math import inf

from oracles.common.rules import resolve, top
from oracles.common.selecting import Over, Selecting


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


@dataclass(frozen=True)
class Quest(Over):
    budget: int | float = 2048
    page_size: int = 16
    dense_layers: int = 2
    runner = Pages
