"""Saved runs gathered for a report: settings, the policies in each, and figures of any part of their samples."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from kvpress.evals.config import AGREEMENT
from kvpress.evals.statistics import Difference, Estimate, difference, estimate, spread
from kvpress.evals.store import find_runs

REFERENCE = ["full"]
"""The policies' names of what the others are compared with."""
Row = dict[str, Any]
Key = tuple[str, int | str]
"""A sample: `samples_id` and index; or a pair of samples: `samples_id` and what both have in common."""


@dataclass(frozen=True)
class Result:
    """One run, with its samples' latest rows.

    Attributes:
        path: its directory, or the runs.jsonl that it is packed in.
        config: as in config.json.
        sessions: the environment of each session, in order.
        rows: index -> row.
        finished: whether no sample is missing.
    """

    path: Path
    config: dict[str, Any]
    sessions: list[dict[str, Any]]
    rows: dict[int, Row]
    finished: bool

    @property
    def id(self) -> str:
        return str(self.config["id"])

    @property
    def query_aware(self) -> bool:
        return bool(self.config["definition"]["query_aware"])

    @property
    def machine(self) -> str:
        """Where the latest session ran."""
        last = self.sessions[-1]
        return f"{last['dtype']} on {last['hardware']}"

    @property
    def is_reference(self) -> bool:
        """Whether full attention answered."""
        return bool(self.config["policy_names"] == REFERENCE)

    @property
    def answered(self) -> list[Row]:
        return [row for row in self.rows.values() if row["error"] is None]

    @property
    def failed(self) -> int:
        return len(self.rows) - len(self.answered)

    @property
    def figures(self) -> "Figures":
        """Of all the run's samples."""
        return Figures([(self, row) for row in self.answered], self.failed)


@dataclass(frozen=True)
class Figures:
    """Samples of one policy, and what was measured over them.

    Attributes:
        samples: each with the run that it belongs to.
        failed: samples that have no answer.
    """

    samples: list[tuple[Result, Row]]
    failed: int = 0

    @cached_property
    def runs(self) -> list[str]:
        """The runs' ids."""
        return list(dict.fromkeys(result.id for result, _ in self.samples))

    @cached_property
    def scores(self) -> dict[str, dict[Key, float]]:
        """Task -> sample -> score."""
        found: dict[str, dict[Key, float]] = {}
        for result, row in self.samples:
            found.setdefault(result.config["task"], {})[result.config["samples_id"], row["index"]] = row["score"]
        return found

    @cached_property
    def estimate(self) -> Estimate | None:
        """The mean score over tasks, with its interval."""
        return estimate([list(scores.values()) for scores in self.scores.values()]) if self.samples else None

    def difference(self, reference: "Figures | None") -> Difference | None:
        """How much better than a reference on the same samples."""
        if reference is None:
            return None
        tasks = [task for task in self.scores if task in reference.scores]
        return difference([self.scores[task] for task in tasks], [reference.scores[task] for task in tasks])

    def part(self, wanted: Callable[[Result, Row], bool]) -> "Figures":
        """The same for some of the samples."""
        return Figures([(result, row) for result, row in self.samples if wanted(result, row)])

    def detail(self, name: str) -> float | None:
        """The mean of one of the further figures that a task gives of answers, over those that have it."""
        values = [row["details"][name] for _, row in self.samples if name in row.get("details", {})]
        return statistics.fmean(values) if values else None

    @property
    def turns(self) -> int:
        """The most turns that a sample has."""
        return max((len(row.get("turns", [])) for _, row in self.samples), default=0)

    def turn(self, number: int) -> "Figures":
        """The same for the turn of this number, from 0, of the samples that have one."""
        return Figures(
            [(result, row | row["turns"][number]) for result, row in self.samples if len(row.get("turns", [])) > number]
        )

    def mean(self, name: str) -> float | None:
        values = self._values(name)
        return statistics.fmean(values) if values else None

    @property
    def least_density(self) -> float:
        """The least share of a prompt's attention that was computed; 1 where that is not known."""
        return min(self._values("density"), default=1.0)

    def median(self, name: str) -> float | None:
        values = self._values(name)
        return statistics.median(values) if values else None

    def share(self, name: str, of: str) -> float | None:
        """The sum of one measure over that of another."""
        total = sum(self._values(of))
        return sum(self._values(name)) / total if total else None

    def ratio(self, name: str, reference: "Figures") -> float | None:
        """Median over the samples that both have of a measure over that of a reference."""
        beside = {(result.config["samples_id"], row["index"]): row[name] for result, row in reference.samples}
        found = [
            row[name] / other
            for result, row in self.samples
            if (other := beside.get((result.config["samples_id"], row["index"]))) and row[name] is not None
        ]
        return statistics.median(found) if found else None

    @cached_property
    def kl(self) -> Estimate | None:
        """KL divergence per token from full attention, in nats, where answers were compared with its."""
        values = self._values("kl")
        return spread(values) if values else None

    @cached_property
    def prompts_shared(self) -> bool:
        return any(row["shared_prompt"] for _, row in self.samples)

    def _values(self, name: str) -> list[float]:
        return [row[name] for _, row in self.samples if row.get(name) is not None]


@dataclass(frozen=True)
class PolicyResult:
    """One policy with its parameters, over all samples of a setting.

    Attributes:
        policy: as it describes itself.
        names: of the policies that act together.
        kind: what it does, as `Policy.kind`.
        complete: whether it answered every sample that any policy of the setting answered.
    """

    policy: str
    names: list[str]
    kind: str
    figures: Figures
    complete: bool

    @property
    def label(self) -> str:
        return label(self.policy)

    @property
    def is_reference(self) -> bool:
        return self.names == REFERENCE


@dataclass(frozen=True)
class Setting:
    """Policies that can be compared: one model in one precision on one machine, one form of the question, one family of tasks."""

    model: str
    machine: str
    query_aware: bool
    family: str
    policies: list[PolicyResult] = field(default_factory=list)

    @property
    def reference(self) -> Figures | None:
        """Full attention, if it ran."""
        return next((entry.figures for entry in self.policies if entry.is_reference), None)

    @property
    def title(self) -> str:
        form = (
            "the compressed prompt holds the question"
            if self.query_aware
            else "compressed before the question is known"
        )
        return f"{self.family} on {self.model}, {form}"

    @property
    def percent(self) -> bool:
        """Whether scores are shown in percent; else they are probabilities of tokens, with three digits."""
        return self.family != "perplexity"

    @property
    def tasks(self) -> list[str]:
        return sorted({task for entry in self.policies for task in entry.figures.scores})

    @property
    def turns(self) -> int:
        """The most turns that a sample has; 0 where there is one question."""
        return max(entry.figures.turns for entry in self.policies)

    @property
    def details(self) -> list[str]:
        """The further figures that the tasks give of answers."""
        rows = (row for entry in self.policies for _, row in entry.figures.samples)
        return list(dict.fromkeys(name for row in rows for name in row.get("details", {})))

    @property
    def reasons(self) -> bool:
        """Whether answers are long, so that what they cost belongs beside their score."""
        return any(result.config["metric"] == "boxed" for entry in self.policies for result, _ in entry.figures.samples)

    @property
    def plans(self) -> bool:
        """Whether some policy read less of a prompt than there is."""
        return any(entry.figures.least_density < 1 for entry in self.policies)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Name -> the groups that samples belong to by their `meta["groups"]`, in the order in which they come."""
        found: dict[str, dict[str, None]] = {}
        for entry in self.policies:
            for _, row in entry.figures.samples:
                for name, group in row["meta"].get("groups", {}).items():
                    found.setdefault(name, {})[str(group)] = None
        return {name: list(groups) for name, groups in found.items()}

    @property
    def lengths(self) -> list[str]:
        """In order, from the shortest."""
        found = {length_of(row) for entry in self.policies for _, row in entry.figures.samples}
        return [name for _, name in sorted(found)]


Columns = dict[str, Callable[[Figures], Figures]]
"""A table's columns: what each is called, and the samples that it is about."""


def breakdowns(setting: Setting) -> dict[str, Columns]:
    """What scores are shown by, and the parts: tasks, lengths and the groups of the tasks' own, where there are several."""

    def part(value: Callable[[Result, Row], str], wanted: str) -> Callable[[Figures], Figures]:
        return lambda figures: figures.part(lambda result, row: value(result, row) == wanted)

    def group(name: str) -> Callable[[Result, Row], str]:
        return lambda result, row: str(row["meta"].get("groups", {}).get(name))

    values: dict[str, tuple[Callable[[Result, Row], str], list[str]]] = {
        "task": (lambda result, row: str(result.config["task"]), setting.tasks),
        "length of the prompt, in tokens": (lambda result, row: length_of(row)[1], setting.lengths),
        **{name: (group(name), groups) for name, groups in setting.groups.items()},
    }
    found = {by: {name: part(value, name) for name in names} for by, (value, names) in values.items()}
    return {name: columns for name, columns in found.items() if len(columns) > 1}


def gap(columns: Columns, by: str, figures: Figures) -> Difference | None:
    """How much better the first of two groups was than the second on paired samples; None where they are not two, or not paired."""
    if len(columns) != 2:
        return None
    sides: list[dict[str, dict[Key, float]]] = []
    for part in columns.values():
        sides.append({})
        for result, row in part(figures).samples:
            pair = row["meta"].get("pairs", {}).get(by)
            if pair is not None:
                scores = sides[-1].setdefault(result.config["task"], {})
                scores[result.config["samples_id"], pair] = row["score"]
    tasks = [task for task in sides[0] if task in sides[1]]
    return difference([sides[0][task] for task in tasks], [sides[1][task] for task in tasks])


def turn_columns(setting: Setting) -> Columns:
    """The turns of a setting's samples."""
    return {f"turn {number + 1}": partial(Figures.turn, number=number) for number in range(setting.turns)}


Measure = Callable[[Figures], float | None]


def measures(setting: Setting) -> dict[str, tuple[Measure, str]]:
    """What tables show beside a setting's scores: heading -> the figure, and its format."""

    def detail(name: str) -> Measure:
        def mean(figures: Figures) -> float | None:
            found = figures.detail(name)
            return None if found is None else 100 * found

        return mean

    def percent(name: str) -> Measure:
        def mean(figures: Figures) -> float | None:
            found = figures.mean(name)
            return None if found is None else 100 * found

        return mean

    def of_full(figures: Figures) -> float | None:
        held, full = figures.mean("peak_kept"), setting.reference and setting.reference.mean("seen")
        return 100 * held / full if held is not None and full else None

    found: dict[str, tuple[Measure, str]] = {f"{name}, %": (detail(name), "{:.1f}") for name in setting.details}
    if setting.plans:
        found["density, %"] = percent("density"), "{:.1f}"
    if setting.reasons:
        found |= {
            "new tokens": (lambda figures: figures.mean("new_tokens"), "{:.0f}"),
            "cut off, %": (percent("cut_off"), "{:.1f}"),
            "most entries": (lambda figures: figures.mean("peak_kept"), "{:.0f}"),
            "of full's length, %": (of_full, "{:.1f}"),
        }
    return found


def label(policy: str) -> str:
    """A described policy as short as it is clear: h2o(0.25)."""
    return policy.replace("budget=", "")


def length_of(row: Row) -> tuple[float, str]:
    """A sample's length, to sort by and to show: the one it was made for, else tokens up to a power of two."""
    length = row["meta"].get("length")
    if isinstance(length, int | float):
        return length, f"{length:g}"
    limit = 1024
    while limit < row["prompt_tokens"]:
        limit *= 2
    return limit, f"to {limit // 1024}k"


def load_results(folders: Sequence[Path]) -> list[Result]:
    """All runs in and below the folders; of one that is there twice, what has more answers.

    Raises:
        StoreError: a folder without results, or a broken file.
    """
    found: dict[str, Result] = {}
    for saved in find_runs(folders):
        result = Result(saved.path, saved.config, saved.sessions, saved.rows, saved.finished is not None)
        if result.sessions and (result.id not in found or len(result.answered) > len(found[result.id].answered)):
            found[result.id] = result
    return sorted(found.values(), key=_order)


def differences(results: Sequence[Result]) -> list[Difference | None]:
    """Of each run to full attention on the same samples; None for full attention, and where it did not run."""
    references = {result.config["samples_id"]: result.figures for result in results if result.is_reference}
    return [
        None if result.is_reference else result.figures.difference(references.get(result.config["samples_id"]))
        for result in results
    ]


def settings(results: Iterable[Result]) -> list[Setting]:
    """The results that have answers, by what can be compared and averaged."""
    by_setting: dict[tuple[str, str, bool, str], list[Result]] = {}
    for result in results:
        family = result.config["definition"]["task"]["name"]
        if result.config["metric"] == AGREEMENT:
            family = f"agreement with full attention, {family}"
        key = (result.config["definition"]["model"], result.machine, result.query_aware, family)
        by_setting.setdefault(key, []).append(result)
    found = []
    for key, members in by_setting.items():
        by_policy: dict[str, list[Result]] = {}
        for result in members:
            by_policy.setdefault(result.config["policy"], []).append(result)
        everything = {(r.config["samples_id"], row["index"]) for r in members for row in r.answered}
        policies = []
        for policy, own in by_policy.items():
            samples = [(result, row) for result in own for row in result.answered]
            if samples:
                config, failed = own[0].config, sum(result.failed for result in own)
                figures = Figures(samples, failed)
                complete = sum(map(len, figures.scores.values())) == len(everything)
                policies.append(PolicyResult(policy, config["policy_names"], config["kind"], figures, complete))
        if policies:
            found.append(Setting(*key, policies))
    return found


def _order(result: Result) -> tuple[Any, ...]:
    budget = result.config["budget"]
    names = result.config["policy_names"]
    return (not result.is_reference, names, budget is None, isinstance(budget, int), budget or 0, result.config["policy"],
            result.config["task"], result.config["length"] or 0, not result.query_aware)  # fmt: skip
