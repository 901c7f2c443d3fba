"""What `kvpress tune` is asked for: limits, candidates, texts."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLICIES = (
    "streaming_llm", "h2o", "tova", "snapkv", "pyramid_kv", "ada_kv", "key_diff", "quest", "tidal_decode",
)  # fmt: skip
"""What is searched where nothing else is said: the common ones of each kind."""
BUDGETS = (0.1, 0.25, 0.5, 0.75)
PREFER = ("loss", "memory", "time")
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class TuneError(ValueError):
    """A search that cannot begin; the message names the value, the limit and the remedy."""


@dataclass(frozen=True)
class Limits:
    """What a policy has to hold; None for no limit.

    Attributes:
        memory: bytes of the cache of one sequence at the context.
        ms_per_token: milliseconds of a decode step there.
        max_loss: share of the tokens that may differ from full attention's, and of the metric that may be lost.
    """

    memory: int | None = None
    ms_per_token: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if self.memory is None and self.ms_per_token is None and self.max_loss is None:
            raise TuneError(
                "no limit to search within; give memory (2GiB), ms_per_token (40) or max_loss (0.01), one or several of them"
            )
        for name in ("memory", "ms_per_token"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TuneError(f"{name}={value} leaves room for nothing; give a number above 0")
        if self.max_loss is not None and not 0 <= self.max_loss < 1:
            raise TuneError(f"max_loss={self.max_loss} is no share; give a number from 0 to 1, or a percentage (1%)")


@dataclass(frozen=True)
class Request:
    """What is asked for; see `tune`."""

    model: str
    data: str
    limits: Limits
    out: Path
    context: int | None
    policies: tuple[Any, ...]
    budgets: tuple[Any, ...]
    metric: str
    columns: Mapping[str, str]
    agreement: int
    samples: int | None
    minutes: float | None
    prefer: str
    seed: int
    query_aware: bool
    device: str
    dtype: str
    settings: tuple[str, ...]

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.out.with_suffix(".runs")

    @property
    def page(self) -> Path:
        return self.out.with_suffix(".html")

    @property
    def task(self) -> dict[str, Any]:
        """The user's rows as a task."""
        is_name = not Path(self.data).expanduser().exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", self.data)
        of_hub = bool(is_name) and not self.data.endswith((".jsonl", ".json"))
        spec: dict[str, Any] = {"name": "jsonl", "dataset" if of_hub else "path": self.data}
        return spec | {"columns": dict(self.columns), "metric": self.metric}

    @property
    def command(self) -> str:
        """What repeats the search in a shell."""
        words = ["kvpress", "tune", "--model", self.model, "--data", self.data, "--out", str(self.out)]
        given = {
            "memory": self.limits.memory,
            "ms-per-token": self.limits.ms_per_token,
            "max-loss": self.limits.max_loss,
            "context": self.context,
            "policies": ",".join(map(str, self.policies)) if self.policies != POLICIES else None,
            "budgets": ",".join(map(str, self.budgets)) if self.budgets != BUDGETS else None,
            "metric": self.metric or None,
            "columns": ",".join(f"{role}={name}" for role, name in self.columns.items()) or None,
            "agreement": self.agreement,
            "samples": self.samples,
            "minutes": self.minutes,
            "prefer": self.prefer,
            "seed": self.seed,
            "device": self.device if self.device != "auto" else None,
            "dtype": self.dtype if self.dtype != "auto" else None,
        }
        for name, value in given.items():
            words += [] if value is None else [f"--{name}", str(value)]
        words += [] if self.query_aware else ["--no-query-aware"]
        for setting in self.settings:
            words += ["--set", setting]
        return shlex.join(words)


def read_size(value: int | str | None) -> int | None:
    """Bytes of "2GiB", "1.5 GB", "500M", or a number.

    Raises:
        TuneError: it is none of these.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(value).lower())
    if found is None or found[2] not in UNITS:
        raise TuneError(f"memory={value!r} is no size; write 2GiB, 500MB, or bytes")
    return int(float(found[1]) * UNITS[found[2]])


def read_share(value: float | str | None) -> float | None:
    """A share, of a number or a percentage.

    Raises:
        TuneError: it is none.
    """
    try:
        if isinstance(value, str) and value.strip().endswith("%"):
            return float(value.strip()[:-1]) / 100
        return None if value is None else float(value)
    except ValueError as error:
        raise TuneError(f"max_loss={value!r} is no share; write 0.01 or 1%") from error
