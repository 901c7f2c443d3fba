"""Policies as `kvpress tune` measures them, and what it finds."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import kvpress
from kvpress.evals.config import Run
from kvpress.evals.request import Request
from kvpress.evals.statistics import Difference, Estimate


@dataclass
class Candidate:
    """A policy with its parameters, and what is known of it.

    Attributes:
        runs: its run for each of the plans: "cost", "agreement", and "metric" if there are labels.
        bytes, full_bytes, ms: its cache at the context, what transformers' own would hold there, and a decode step; None until
            they are measured.
        losses: by plan, how much worse than full attention; on the rows that it was measured on last.
        kl: KL divergence per token from full attention on the same rows.
        out: why it cannot win; empty while it can.
    """

    runs: dict[str, Run]
    bytes: int | None = None
    full_bytes: int = 0
    ms: float | None = None
    losses: dict[str, Estimate] = field(default_factory=dict)
    kl: Estimate | None = None
    out: str = ""

    @property
    def label(self) -> str:
        return self.runs["cost"].policy

    @property
    def policy(self) -> kvpress.Policy:
        return self.runs["cost"].policies[0]

    @property
    def is_full(self) -> bool:
        return self.policy.name == "full"

    @property
    def rows(self) -> int:
        """How many rows its loss rests on."""
        return self.losses["agreement"].n if "agreement" in self.losses else 0

    @property
    def loss(self) -> float:
        """The larger of its losses; infinite while none is measured."""
        return max((loss.mean for loss in self.losses.values()), default=math.inf)

    @property
    def least_loss(self) -> float:
        """What the larger loss is at least, beyond chance."""
        return max((loss.low for loss in self.losses.values()), default=-math.inf)

    @property
    def most_loss(self) -> float:
        """What the larger loss is at most, beyond chance."""
        return max((loss.high for loss in self.losses.values()), default=math.inf)


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        request: what was asked for.
        chosen: the recommendation, or what comes nearest; None if no candidate could run.
        meets: whether it holds all limits.
        sentence: the recommendation in words.
        notes: what else a reader should know.
        candidates: all, full attention first.
        path: the YAML file for `kvpress.patch`; None if nothing meets the limits.
        page: the HTML page.
        context: tokens at which costs were measured.
        machine: where.
        reasons: label -> why it was not chosen.
    """

    request: Request
    chosen: Candidate | None
    meets: bool
    sentence: str
    notes: list[str]
    candidates: list[Candidate]
    path: Path | None
    page: Path
    context: int
    machine: str
    reasons: dict[str, str]

    @property
    def policy(self) -> kvpress.Policy | None:
        """The recommended policy, as `kvpress.patch` takes it; None if nothing meets the limits."""
        return self.chosen.policy if self.chosen is not None and self.meets else None


def interval(candidate: Candidate) -> str:
    """A candidate's loss of agreement, with its interval; no zero has a sign."""
    loss = candidate.losses["agreement"]
    text = f"{round(loss.mean, 4) + 0.0:.2%} ({max(0.0, loss.low):.2%} to {loss.high:.2%})"
    if "metric" not in candidate.losses:
        return text
    label = candidate.losses["metric"]
    return f"{text}, and {label.mean:.2%} ({label.low:.2%} to {label.high:.2%}) of the metric,"


def points(apart: Difference) -> str:
    """A paired difference of losses, in points of a hundred."""
    return f"{-100 * apart.mean:+.2f} points ({-100 * apart.high:+.2f} to {-100 * apart.low:+.2f}, {apart.n} rows)"


def size(count: float) -> str:
    """Bytes as they are read best."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
