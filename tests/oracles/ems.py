"""The reconstruction of EMS in plain Python, one kv head at a time."""

import math
from dataclasses import dataclass

from oracles.common.llama import Oracle, rotate
from oracles.common.rules import Rules, check_apart, pool, ranked, resolve, top


def over_mean(numbers):
    return [number / max(sum(numbers) / len(numbers), 1e-6) for number in numbers]


def global_local(everything, last):
    """The larger of two scores, each divided by its mean."""
    return [max(pair) for pair in zip(over_mean(everything), over_mean(last), strict=True)]


def places(scores):
    """1 for the largest, 2 for the next; of equals the earlier comes first."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return [order.index(index) + 1 for index in range(len(scores))]


def unit(vector):
    return vector / max(vector.norm().item(), 1e-30)


class EMSOracle(Oracle):
    """Each entry also has `last`: {row's position: mass of that row}, for the last `window` rows."""

    def observe(self, layer, kv_head, position, mass, logits, decode):
        super().observe(layer, kv_head, position, mass, logits, decode)
        for entry in self.heads[layer][kv_head].entries:
            rows = entry.__dict__.setdefault("last", {})
            rows[position] = mass.get(entry.position, 0.0)
            for row in [row for row in rows if row <= position - self.policy.window]:
                del rows[row]

    def evict(self, layer, prompt_seen, decode=False):
        total = resolve(self.policy.budget, prompt_seen)
        for head in self.heads[layer]:
            head.rows = []
            count = len(head.entries)
            if count > total and not (decode and count < total + self.policy.evict_every):
                head.entries = self.compress(head.entries, total)

    def compress(self, entries, total):
        """The entries that stay, with others merged into them."""
        everything, last = [entry.score for entry in entries], [sum(entry.last.values()) for entry in entries]
        scores = global_local(everything, last)
        centres, rest = self.policy.split(everything, last, [entry.position for entry in entries], total)
        keys = [rotate(entry.key, entry.position, self.theta) for entry in entries]
        members = {centre: [centre] for centre in centres}
        for index in self.policy.candidates([scores[index] for index in rest], total):
            chosen = self.policy.nearest(rest[index], centres, keys, [entry.value for entry in entries])
            if chosen is not None:
                members[chosen].append(rest[index])
        merged = [self.merge(entries, keys, scores, members[centre]) for centre in centres]
        for index, (key, value, score, last) in zip(centres, merged, strict=True):
            entry = entries[index]
            entry.key, entry.value = rotate(key, -entry.position, self.theta), value
            entry.score, entry.last = score, last
        return [entries[index] for index in centres]

    def merge(self, entries, keys, scores, members):
        """Key, value and the two scores of a centre (the first member) with its members."""
        first, policy = members[0], self.policy
        weights = [max(scores[index], 1e-12) for index in members]
        shares = [weight / sum(weights) for weight in weights]
        values = [entries[index].value for index in members]
        key = sum(share * unit(keys[index]) for share, index in zip(shares, members, strict=True))
        value = sum(share * x for share, x in zip(shares, values, strict=True))
        if policy.value_norms:
            value = sum(share * unit(x) for share, x in zip(shares, values, strict=True))
            value = values[0].norm() * unit(value)
        if len(members) == 1:
            key, value = keys[first], values[0]
        counted = members[:1] if policy.keep_centre_score else members
        score = sum(entries[index].score for index in counted)
        rows = {row for index in counted for row in entries[index].last}
        last = {row: sum(entries[index].last.get(row, 0.0) for index in counted) for row in rows}
        return keys[first].norm() * unit(key), value, score, last


@dataclass(frozen=True)
class EMS(Rules):
    """Spec section 6.3."""

    budget: int | float = 256
    window: int = 4
    recent: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    align: str = "place"
    global_weight: float = 1.0
    n_sink: int = 0
    rho: float = 0.9
    kappa: float = 4
    tau: float = 0.6
    raw_product: bool = False
    value_norms: bool = False
    keep_centre_score: bool = False
    evict_every: int = 32
    runner = EMSOracle

    def split(self, everything, last, positions, total):
        """(centres, rest), indices: the last `recent`, the first tokens and the best up to `total`; and the others."""
        count = len(positions)
        first = count - min(self.recent, total, count)
        local = pool(over_mean(last)[:first], self.kernel_size, self.pooling)
        if self.align == "mean":
            scores = [self.global_weight * score for score in over_mean(everything)[:first]]
            scores = [max(pair) for pair in zip(scores, local, strict=True)]
        else:
            weight = self.global_weight
            scores = [place / weight if weight else math.inf for place in places(everything[:first])]
            scores = [-min(pair) for pair in zip(scores, places(local), strict=True)]
        ranks = [math.inf if positions[index] < self.n_sink else scores[index] for index in range(first)]
        kept = top(ranks, total - (count - first)) + list(range(first, count))
        return kept, [index for index in range(count) if index not in kept]

    def candidates(self, scores, total):
        """Indices of the best of `scores` that together have the share rho of them, at most kappa * total."""
        order, chosen = ranked(scores), []
        for index in order:
            before, enough = sum(scores[other] for other in chosen), self.rho * sum(scores)
            if self.rho < 1:
                check_apart(before, enough)
            if len(chosen) + 1 > self.kappa * total or (self.rho < 1 and before >= enough):
                break
            chosen.append(index)
        if 0 < len(chosen) < len(order):
            check_apart(scores[chosen[-1]], scores[order[len(chosen)]])
        return chosen

    def nearest(self, index, centres, keys, values):
        """The centre that entry `index` goes to, or None."""
        best, chosen = self.tau, None
        for centre in centres:
            cosines = [(unit(x[index]) @ unit(x[centre])).item() for x in (keys, values)]
            if not self.raw_product:
                cosines = [max(0.0, cosine) for cosine in cosines]
            product = cosines[0] * cosines[1]
            check_apart(product, best)
            if product > best or (product == best and chosen is None):
                best, chosen = product, centre
        return chosen
