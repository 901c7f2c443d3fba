"""Two sets of runs beside each other, on the samples that both answered."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvpress.evals.results import Figures, PolicyResult, Result, load_results, settings
from kvpress.evals.statistics import Difference, Estimate, difference, estimate
from kvpress.evals.store import PACKED, StoreError


@dataclass(frozen=True)
class Pair:
    """Two policies, or one that ran twice, on the same samples.

    Attributes:
        first, second: the two, with the samples that both have.
        tasks: of these samples.
        difference: how much better the second is.
        first_score, second_score: their scores.
    """

    first: PolicyResult
    second: PolicyResult
    tasks: list[str]
    difference: Difference
    first_score: Estimate
    second_score: Estimate


def compare_runs(first: Path, second: Path) -> list[Pair]:
    """Each policy of the first folder beside the same policy of the second; where one side has a single policy, beside each of
    the other's.

    Samples are the same if task, form of the question and index are: models, dtypes and versions may differ.

    Args:
        first, second: a run's directory, a folder of runs, or a run's id after the folder that it is packed in (DIR/ID).

    Raises:
        StoreError: a folder without runs, or two without a sample in common.
    """
    sides = [_policies(path) for path in (first, second)]
    alone = any(len(side) == 1 for side in sides)
    found = [
        pair
        for one in sides[0]
        for other in sides[1]
        if alone or one.policy == other.policy
        for pair in [_pair(one, other)]
        if pair is not None
    ]
    if not found:
        held = [
            f"{path} has {', '.join(one.label for one in side)}"
            for path, side in zip((first, second), sides, strict=True)
        ]
        raise StoreError(
            f"{'; '.join(held)}: no policy of both, or no sample of both (task, question and index); give runs of the same task"
        )
    return found


def _policies(path: Path) -> list[PolicyResult]:
    """The policies of a folder, each over all of its samples that have an answer."""
    packed = not path.is_dir() and (path.parent / PACKED).is_file()
    results = load_results([path.parent if packed else path])
    if packed:
        results = [result for result in results if result.id == path.name]
        if not results:
            raise StoreError(
                f"{path.parent / PACKED} has no run {path.name!r}; kvpress ls {path.parent} shows those it has"
            )
    by_policy: dict[str, list[PolicyResult]] = {}
    for setting in settings(results):
        for entry in setting.policies:
            by_policy.setdefault(entry.policy, []).append(entry)
    if not by_policy:
        raise StoreError(f"no sample has an answer yet in {path}; run it first")
    return [
        replace(parts[0], figures=Figures([sample for part in parts for sample in part.figures.samples]))
        for parts in by_policy.values()
    ]


def _pair(first: PolicyResult, second: PolicyResult) -> Pair | None:
    scores = [_scores(entry.figures) for entry in (first, second)]
    common = {task: scores[0][task].keys() & scores[1][task].keys() for task in scores[0].keys() & scores[1].keys()}
    tasks = sorted(task for task, keys in common.items() if keys)
    if not tasks:
        return None
    mine, its = ([{key: one[task][key] for key in sorted(common[task])} for task in tasks] for one in scores)
    apart = difference(its, mine)
    assert apart is not None
    keys = set().union(*common.values())
    one, other = (
        replace(entry, figures=entry.figures.part(lambda result, row: _key(result, row["index"]) in keys))
        for entry in (first, second)
    )
    means = [estimate([list(task.values()) for task in side]) for side in (mine, its)]
    return Pair(one, other, tasks, apart, means[0], means[1])


def _scores(figures: Figures) -> dict[str, dict[tuple[str, int], float]]:
    """Task -> sample -> score."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for result, row in figures.samples:
        found.setdefault(result.config["task"], {})[_key(result, row["index"])] = row["score"]
    return found


def _key(result: Result, index: int) -> tuple[str, int]:
    """A sample, whatever model answers it and however many samples the run has."""
    definition = result.config["definition"]
    asked: Sequence[object] = (definition["task"], definition["query_aware"], definition.get("agreement"))
    return json.dumps(asked, sort_keys=True), index
