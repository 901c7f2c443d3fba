"""What a policy is: a frozen dataclass of hyper-parameters and pure functions from tensors to scores.

A policy plays a *role*. This version has one: eviction, which says what a cache layer keeps. A policy without a role
(`Full`) leaves everything exact. The runtime owns all state: it lives with the cache, never on the policy.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpress.errors import PolicyError

Budget = float | int
"""A float in (0, 1] is a share of the prompt's length, an int is entries per layer and kv head."""


def check_budget(value: Any, name: str = "budget", minimum: int = 1) -> None:
    """Raise `PolicyError` unless `value` is an int of at least `minimum` or a float in (0, 1] (0.0 if minimum is 0)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PolicyError(
            f"{name}={value!r} is a {type(value).__name__}; give a float share in (0, 1] or an int >= {minimum}"
        )
    if isinstance(value, int) and value < minimum:
        raise PolicyError(
            f"{name}={value} is too small; an int means entries per layer and kv head, at least {minimum}"
        )
    if isinstance(value, float):
        if math.isnan(value):
            raise PolicyError(f"{name}=nan is not a number; give a float share in (0, 1] or an int >= {minimum}")
        if value < 0 or (value == 0 and minimum > 0):
            raise PolicyError(f"{name}={value} is too small; a float is a share of the prompt in (0, 1]")
        if value > 1:
            remedy = f"; for {value:g} entries write {name}={int(value)}" if value.is_integer() else ""
            raise PolicyError(f"{name}={value} is above 1; a float is a share of the prompt in (0, 1]{remedy}")


def check_count(value: Any, name: str, minimum: int) -> None:
    """Raise `PolicyError` unless `value` is an int (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise PolicyError(f"{name}={value!r} does not work; give an int of at least {minimum}")


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise `PolicyError` unless `value` is one of `choices`."""
    if value not in choices:
        raise PolicyError(f"{name}={value!r} does not work; choose one of {', '.join(map(repr, choices))}")


def entries_for(budget: Budget, tokens: int) -> int:
    """Entries that a budget allows for a prompt of `tokens` real tokens; a share is rounded down."""
    if isinstance(budget, int):
        return budget
    # The small term keeps a share exact that has no exact binary form: 0.29 of 100 is 29, not 28.
    return math.floor(budget * tokens + 1e-9)


@dataclass(frozen=True)
class Quota:
    """What one sequence may keep in one layer and kv head.

    Attributes:
        total: entries kept in all, at least 1.
        recent: how many of them are the newest entries, kept whatever their score; at most `total`.
    """

    total: int
    recent: int


@dataclass(frozen=True)
class Entries:
    """The entries of one cache layer, as an eviction policy sees them.

    At the end of a prompt pass they come in position order with empty slots last; in a decode step in slot order.

    Attributes:
        positions: int32 [batch, kv_heads, n], original positions, -1 for an empty slot.
        candidates: bool [batch, kv_heads, n], the entries that compete for what `Quota.recent` leaves over.
        mass: float32 [batch, kv_heads, n], the attention that each entry got from the rows that the policy observes,
            summed over the group; None when it observes none.
    """

    positions: Tensor
    candidates: Tensor
    mass: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):  # noqa: B024 (only roles have abstract methods)
    """Base of all policies; see `docs/architecture.md` and the README's section on writing one."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "exact"
    paper: ClassVar[str] = ""
    takes_budget: ClassVar[bool] = False
    role: ClassVar[str | None] = None

    @classmethod
    def parameters(cls) -> list[Field[Any]]:
        """The hyper-parameters, those of the method itself before those that all policies of its role have."""
        inherited = {field.name for base in cls.__mro__[1:] if is_dataclass(base) for field in fields(base)}
        return sorted(fields(cls), key=lambda field: field.name in inherited)

    def describe(self) -> str:
        """The name with every hyper-parameter that differs from its default, as `h2o(budget=0.2)`."""
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in self.parameters()
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class EvictionPolicy(Policy):
    """A policy that decides which entries a cache layer keeps.

    After a pass the runtime keeps, per sequence, layer and kv head, the `Quota.recent` newest entries and the
    best-scored of the others up to `Quota.total`; ties go to the earlier position.

    Args:
        evict: "each_pass" brings the cache to its budget at the end of every prompt pass (chunk, turn);
            "after_prompt" waits for the first decode step, so that chunking a prompt never changes what is kept, at the
            price of holding the whole prompt until then.
    """

    kind: ClassVar[str] = "evicting"
    takes_budget: ClassVar[bool] = True
    role: ClassVar[str | None] = "eviction"

    observes: ClassVar[Literal["nothing", "every row", "window"]] = "nothing"
    """Whose attention mass `Entries.mass` holds: no row's, every row's since the entry came in (accumulated over passes),
    or that of the last `observed_window` rows of the prompt pass."""
    drops_in_decode: ClassVar[bool] = True
    """Whether every decode step evicts too, or the cache grows by one entry a step."""

    evict: Literal["each_pass", "after_prompt"] = "each_pass"

    def __post_init__(self) -> None:
        check_choice(self.evict, "evict", ("each_pass", "after_prompt"))

    @property
    def observed_window(self) -> int:
        """Rows observed by a policy that observes a "window"."""
        return 0

    @property
    def reindexed_sinks(self) -> int:
        """Number of first positions that are attended as if they stood right before the kept recent ones; 0 for none."""
        return 0

    @abstractmethod
    def quota(self, tokens: int, layer: int, layers: int) -> Quota:
        """What may stay of a sequence that had `tokens` real tokens when its latest prompt pass ended.

        Args:
            tokens: real tokens (no padding) of the sequence.
            layer: index among the layers that the policy acts on, from 0.
            layers: number of such layers.
        """

    @abstractmethod
    def score(self, entries: Entries) -> Tensor:
        """Score each entry, float [batch, kv_heads, n]; only the values at `entries.candidates` count."""


def pool_scores(scores: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Pool scores over neighbours, stride 1, keeping the length.

    Args:
        scores: float [batch, heads, n].
        kernel_size: odd width of the window.
        pooling: "avg" counts the zeros past the ends; "max" does not.

    Returns:
        float [batch, heads, n].
    """
    if pooling == "avg":
        return torch.nn.functional.avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
    return torch.nn.functional.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
