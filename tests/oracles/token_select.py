"""TokenSelect in plain Python: which tokens a row of a layer reads, one product and one exponential at a time."""

from dataclasses import dataclass
from math import inf

from oracles.common.llama import Oracle, rotate
from oracles.common.numbers import cosine, dot, softmax
from oracles.common.rules import Rules, top


def widest(votes, width):
    """The largest vote in a window around each, of `width` votes, the extra one of an even width after it."""
    before = (width - 1) // 2
    padded = [-inf] * before + list(votes) + [-inf] * (width - 1 - before)
    return [max(padded[index : index + width]) for index in range(len(votes))]


class Voting(Oracle):
    """Rows read by vote; `chosen` holds for each layer the query of its last vote in decode and what it chose.

    `log` collects (layer, row position, positions read) and `votes` counts the votes of decode steps.
    """

    def run(self, passes):
        self.chosen, self.log, self.votes = {}, [], 0
        return super().run(passes)

    def reads(self, layer, queries, row, positions, decode):
        rules, heads = self.policy, self.config.num_attention_heads
        group = heads // self.config.num_key_value_heads
        start = row // rules.chunk * rules.chunk
        rows = list(range(start, min(start + rules.chunk, len(positions))))
        seen = positions[rows[-1]] + 1
        if seen <= rules.n_init + rules.k + rules.n_local:
            tokens = list(range(seen))
        else:
            if not decode:
                self.chosen.pop(layer, None)
            voted = self.voted(layer, queries, rows, seen, decode)
            tokens = [*range(rules.n_init), *voted, *range(seen - rules.n_local, seen)]
        self.log.append((layer, positions[row], tokens))
        tokens = [token for token in tokens if token <= positions[row]]
        places = list(range(len(tokens)))
        reads = []
        for query_head in range(heads):
            entries = self.heads[layer][query_head // group].entries
            reads.append(([entries[token] for token in tokens], places, places[-1]))
        return reads

    def voted(self, layer, queries, rows, seen, decode):
        """Positions between the first and the last that the heads choose."""
        rules = self.policy
        if not rules.k:
            return []
        whole = queries[rows[0]].flatten().tolist()
        if decode and layer in self.chosen and cosine(whole, self.chosen[layer][0]) >= rules.theta:
            return self.chosen[layer][1]
        candidates = range(rules.n_init, seen - rules.n_local)
        votes = [0.0] * len(candidates)
        for query_head in range(self.config.num_attention_heads):
            for index, vote in enumerate(self.ballot(layer, queries, rows, query_head, candidates)):
                votes[index] += vote
        if rules.pool:
            votes = widest(votes, rules.pool)
        voted = [candidates[index] for index in top(votes, rules.k)]
        if decode:
            self.votes += 1
            self.chosen[layer] = whole, voted
        return voted

    def ballot(self, layer, queries, rows, query_head, candidates):
        """How one query head spreads its vote."""
        rules, kv_heads = self.policy, self.config.num_key_value_heads
        group = self.config.num_attention_heads // kv_heads
        kv_head = query_head % kv_heads if rules.gqa_map == "mod" else query_head // group
        entries, mean = self.heads[layer][kv_head].entries, 0.0
        for i, row in enumerate(rows):
            query = queries[row, query_head]
            mean = mean + (rotate(query, rules.n_local + i, self.theta) if rules.rotate_query else query)
        mean = (mean / len(rows)).tolist()
        return softmax([dot(mean, entries[token].key.tolist()) * rules.vote_scale for token in candidates])


@dataclass(frozen=True)
class TokenSelect(Rules):
    """The rules' numbers; everything is kept."""

    n_init: int = 128
    n_local: int = 512
    k: int = 2048
    chunk: int = 512
    theta: float = 0.9
    rotate_query: bool = True
    pool: int = 0
    vote_scale: float = 1.0
    gqa_map: str = "group"
    runner = Voting
