"""One line per policy, task family and length, as leaderboards of KV-cache compression have it, in a CSV file."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from kvpress.evals.results import PolicyResult, Result, Setting, load_results, settings
from kvpress.evals.store import StoreError, csv_text, make_folder, run_paths, write_whole


def write_leaderboard(folders: Sequence[Path], path: Path, only: Container[str] | None = None) -> int:
    """Write what the runs in and below the folders found, best score first within each data set; how many lines.

    | column | meaning |
    |---|---|
    | `dataset`, `length` | the task's family, and the length it was asked for; empty where it has none |
    | `tasks` | how many of the family's tasks the score is the mean of |
    | `model`, `policy`, `kind`, `budget` | what ran; `policy` with the fields that differ from their defaults |
    | `compression_ratio` | share of the seen tokens that the cache did *not* hold at the end: 0 for full attention |
    | `query_aware` | whether the compressed prompt held the question |
    | `score`, `score_low`, `score_high` | mean over tasks, times 100, and its 95 % interval |
    | `to_full` | difference to full attention on the same samples, in points |
    | `n`, `failed` | samples |
    | `kept_bytes`, `kept_of_full` | what the cache held at the end; over what transformers' own would hold |
    | `read_share` | entries that decode steps read, of those full attention reads |
    | `density` | pairs of a prompt's attention that were computed, of those full attention computes |
    | `prompt_ms`, `ms_per_token` | medians; of a whole batch where `batch` is above 1 |
    | `dtype_hardware`, `commit`, `runs` | where it ran, with which version, and the runs' ids |

    Folders that are not there, or hold no run, are passed over.

    Args:
        only: ids of the runs that count; None for all.

    Raises:
        StoreError: no sample has an answer, or the file cannot be written.
    """
    results = load_results([folder for folder in folders if run_paths(folder)])
    rows = rows_of([result for result in results if only is None or result.id in only])
    if not rows:
        raise StoreError(f"no sample has an answer yet, so that there is nothing to write to {path}")
    make_folder(path.parent)
    write_whole(path, csv_text(rows))
    return len(rows)


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The lines, as `write_leaderboard` says."""
    by_length: dict[int | None, list[Result]] = {}
    for result in results:
        by_length.setdefault(result.config["length"], []).append(result)
    rows = [
        _row(length, setting, entry)
        for length, alike in by_length.items()
        for setting in settings(alike)
        for entry in setting.policies
    ]
    return sorted(
        rows,
        key=lambda row: (row["dataset"], row["length"] or 0, row["model"], not row["query_aware"], -row["score"]),
    )


def _row(length: int | None, setting: Setting, entry: PolicyResult) -> dict[str, Any]:
    figures, mean = entry.figures, entry.figures.estimate
    assert mean is not None  # a setting lists those that have answers
    apart = None if entry.is_reference else figures.difference(setting.reference)
    budgets = {None if entry.is_reference else result.config["budget"] for result, _ in figures.samples}
    seen, kept = figures.mean("seen") or 0.0, figures.mean("kept") or 0.0
    last = figures.samples[0][0].sessions[-1]
    return {
        "dataset": setting.family,
        "length": length,
        "tasks": len(figures.scores),
        "model": setting.model,
        "policy": entry.policy,
        "kind": entry.kind,
        "budget": budgets.pop() if len(budgets) == 1 else None,
        "compression_ratio": round(1 - kept / seen, 4) if seen else None,
        "query_aware": setting.query_aware,
        "score": round(100 * mean.mean, 2),
        "score_low": round(100 * mean.low, 2),
        "score_high": round(100 * mean.high, 2),
        "to_full": apart and round(100 * apart.mean, 2),
        "n": len(figures.samples),
        "failed": figures.failed,
        "kept_bytes": _rounded(figures.mean("bytes"), 0),
        "kept_of_full": _rounded(figures.share("bytes", "full_bytes"), 4),
        "read_share": _rounded(figures.mean("read_share"), 4),
        "density": _rounded(figures.mean("density"), 4),
        "prompt_ms": _rounded(figures.median("prompt_ms"), 2),
        "ms_per_token": _rounded(figures.median("token_ms"), 3),
        "batch": _rounded(figures.median("batch"), 0),
        "dtype_hardware": setting.machine,
        "commit": last["commit"] or last["kvpress"],
        "runs": " ".join(figures.runs),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)
