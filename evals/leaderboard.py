"""One line per policy, task family and length, as leaderboards of KV-cache compression have it, in a CSV file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpress.evals.results import Arm, Result, Setting, load_results, settings
from kvpress.evals.store import CONFIG, StoreError, csv_text, make_folder, write_whole


def write_leaderboard(folders: Sequence[Path], path: Path) -> int:
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
    | `prompt_ms`, `ms_per_token` | medians; of a whole batch where `batch` is above 1 |
    | `dtype_hardware`, `commit`, `runs` | where it ran, with which version, and the directories |

    Folders that are not there, or hold no run, are passed over.

    Raises:
        StoreError: no sample has an answer, or the file cannot be written.
    """
    there = [folder for folder in folders if folder.is_dir() and any(folder.rglob(CONFIG))]
    rows = rows_of(load_results(there)) if there else []
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
        _row(length, setting, arm)
        for length, alike in by_length.items()
        for setting in settings(alike)
        for arm in setting.arms
    ]
    return sorted(
        rows,
        key=lambda row: (row["dataset"], row["length"] or 0, row["model"], not row["query_aware"], -row["score"]),
    )


def _row(length: int | None, setting: Setting, arm: Arm) -> dict[str, Any]:
    figures, mean = arm.figures, arm.figures.estimate
    assert mean is not None  # an arm has answers
    apart = None if arm.is_reference else figures.difference(setting.reference)
    budgets = {None if arm.is_reference else result.config["budget"] for result, _ in figures.samples}
    seen, kept = figures.mean("seen") or 0.0, figures.mean("kept") or 0.0
    last = figures.samples[0][0].sessions[-1]
    return {
        "dataset": setting.family,
        "length": length,
        "tasks": len(figures.scores),
        "model": setting.model,
        "policy": arm.policy,
        "kind": arm.kind,
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
