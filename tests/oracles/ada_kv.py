"""Ada-KV in plain Python: the kv heads of a layer share its entries, by the scores of an inner policy's rules."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

from oracles.a2sf import Fading
from oracles.a2sf_prefill import A2SFPrefill
from oracles.common.llama import Oracle
from oracles.common.rules import check_apart, column_sums, pool, ranked, resolve
from oracles.h2o_prefill import H2OPrefill
from oracles.observed_attention import ObservedAttention
from oracles.pyramid_kv import PyramidKV
from oracles.snapkv import SnapKV


def budget_of(inner, layer, layers, seen):
    """(entries a kv head keeps on average, how many of them are the newest)."""
    if isinstance(inner, PyramidKV):
        total = inner.total_in(layer, layers, seen)
        return total, min(inner.window, total)
    total = resolve(inner.budget, seen)
    newest = {SnapKV: "window", H2OPrefill: "recent", A2SFPrefill: "recent"}.get(type(inner))
    return total, min(getattr(inner, newest), total) if newest else 0


def scores_of(inner, entries, rows, seen):
    """The inner rules' scores of the entries that compete, which come before the newest."""
    if isinstance(inner, SnapKV | PyramidKV):
        mass = column_sums(rows[-inner.window :])
        return pool([mass.get(entry.position, 0.0) for entry in entries], inner.kernel_size, inner.pooling)
    if isinstance(inner, ObservedAttention):
        return [entry.score / len(range(entry.position, seen)) for entry in entries]
    return [entry.score for entry in entries]


def share_out(scores, rooms, alpha, normalize):
    """Which candidates stay: for each kv head the indices, ascending.

    Args:
        scores: for each kv head its candidates' scores.
        rooms: for each kv head the entries that it would keep if all kept as many.
    """
    kept, offers = [], []
    for number, (head, room) in enumerate(zip(scores, rooms, strict=True)):
        order, sure = ranked(head), floor(Fraction(str(alpha)) * room)
        kept.append(order[:sure])
        part = sum(head[at] for at in order[:room]) / sum(head) if normalize and sum(head) else 1.0
        offers += [(-head[at] * part, number, at) for at in order[sure:]]
    offers, free = sorted(offers), sum(rooms) - sum(map(len, kept))
    if 0 < free < len(offers):
        check_apart(offers[free - 1][0], offers[free][0])
    for _, number, at in offers[:free]:
        kept[number].append(at)
    return [sorted(head) for head in kept]


class Sharing(Oracle):
    """All kv heads of a layer evict together."""

    def evict(self, layer, prompt_seen, decode=False):
        inner, heads = self.policy.inner, self.heads[layer]
        total, newest = budget_of(inner, layer, len(self.heads), prompt_seen)
        last = [[e for e in head.entries if e.position >= prompt_seen - newest] for head in heads]
        others = [[e for e in head.entries if e.position < prompt_seen - newest] for head in heads]
        scores = [scores_of(inner, o, head.rows, prompt_seen) for o, head in zip(others, heads, strict=True)]
        rooms = [total - len(entries) for entries in last]
        kept = share_out(scores, rooms, self.policy.alpha, self.policy.normalize)
        for head, before, indices, behind in zip(heads, others, kept, last, strict=True):
            head.entries = [before[index] for index in indices] + behind
            head.rows = []


class FadingSharing(Sharing, Fading):
    """The same where what an entry has gathered fades; the inner rules know how fast."""

    def observe(self, layer, kv_head, position, mass, logits, decode):
        for entry in self.heads[layer][kv_head].entries:
            entry.score *= self.policy.inner.alpha
        Oracle.observe(self, layer, kv_head, position, mass, logits, decode)


@dataclass(frozen=True)
class AdaKV:
    """See `Sharing`."""

    inner: object
    alpha: float = 0.2
    normalize: bool = True
    rope = "original"
    prompt_only = True

    @property
    def evict(self):
        return self.inner.evict

    @property
    def runner(self):
        return FadingSharing if isinstance(self.inner, A2SFPrefill) else Sharing
