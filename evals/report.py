"""A report of what runs left on disk: report.html, report.md and report.csv."""

import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvpress.evals.page import page
from kvpress.evals.results import (
    Columns,
    PolicyResult,
    Result,
    Setting,
    breakdowns,
    differences,
    gap,
    load_results,
    measures,
    settings,
    turn_columns,
)
from kvpress.evals.statistics import RULE, Difference
from kvpress.evals.store import StoreError, csv_text, make_folder, write_whole


def write_report(
    folders: Sequence[Path], out: Path, title: str = "kvpress evaluation", only: Container[str] | None = None
) -> list[Path]:
    """Gather all runs in and below the folders, and write the report's three files.

    Args:
        only: ids of the runs that count; None for all.

    Raises:
        StoreError: a folder without results, a broken file, or an `out` that cannot be written.
    """
    results = [result for result in load_results(folders) if only is None or result.id in only]
    found = settings(results)
    if not found:
        raise StoreError(
            f"no sample has an answer yet in {', '.join(map(str, folders))}; run kvpress ablate or eval first"
        )
    make_folder(out)
    # Relative paths: a folder of results stays whole when it is moved.
    links = {r.id: quote(Path(os.path.relpath(r.path, out)).as_posix()) + "/" * r.path.is_dir() for r in results}
    written = {
        "report.html": page(title, found, results, notes(results), links),
        "report.md": markdown(title, found, notes(results)),
        "report.csv": csv_text(rows_of(results, links)),
    }
    for name, text in written.items():
        write_whole(out / name, text)
    return [out / name for name in written]


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader should know before the figures."""
    found = []
    failed, unfinished = sum(r.failed for r in results), sum(not r.finished for r in results)
    if failed:
        found.append(f"{failed} sample(s) failed and are left out; their rows say why (error).")
    if unfinished:
        found.append(f"{unfinished} of {len(results)} runs are not finished.")
    commits = {session["commit"] or session["kvpress"] for result in results for session in result.sessions}
    if len(commits) > 1:
        found.append(f"The runs were made with {len(commits)} versions of kvpress: {', '.join(sorted(commits))}.")
    return found


def rows_of(results: Sequence[Result], links: dict[str, str]) -> list[dict[str, Any]]:
    """One flat row per run, with numbers as they were measured; `score@turnN` and `kept@turnN` where samples have turns."""
    rows: list[dict[str, Any]] = []
    turns = max((result.figures.turns for result in results), default=0)
    details = dict.fromkeys(name for result in results for row in result.answered for name in row.get("details", {}))
    for result, apart in zip(results, differences(results), strict=True):
        config, figures, last = result.config, result.figures, result.sessions[-1]
        mean = figures.estimate
        rows.append(
            {
                "run": result.id,
                "policy": config["policy"],
                "kind": config["kind"],
                "budget": config["budget"],
                "model": config["definition"]["model"],
                "dtype": last["dtype"],
                "hardware": last["hardware"],
                "task": config["task"],
                "metric": config["metric"],
                "length": config["length"],
                "seed": config["seed"],
                "query_aware": result.query_aware,
                "finished": result.finished,
                "n": len(figures.samples),
                "failed": figures.failed,
                "score": mean and mean.mean,
                "score_low": mean and mean.low,
                "score_high": mean and mean.high,
                "to_full": apart and apart.mean,
                "to_full_low": apart and apart.low,
                "to_full_high": apart and apart.high,
                "to_full_n": apart and apart.n,
                "to_full_significant": apart and apart.significant,
                "kl": figures.kl and figures.kl.mean,
                "bytes": figures.mean("bytes"),
                "bytes_of_full": figures.share("bytes", "full_bytes"),
                "tokens_seen": figures.mean("seen"),
                "tokens_kept": figures.mean("kept"),
                "read_share": figures.mean("read_share"),
                "density": figures.mean("density"),
                "new_tokens": figures.mean("new_tokens"),
                "cut_off": figures.mean("cut_off"),
                "tokens_kept_most": figures.mean("peak_kept"),
                "prompt_ms": figures.median("prompt_ms"),
                "prompt_shared": figures.prompts_shared,
                "token_ms": figures.median("token_ms"),
                "commit": last["commit"],
                "kvpress": last["kvpress"],
                "path": links[result.id],
            }
        )
        rows[-1] |= {name: figures.detail(name) for name in details}
        for number in range(turns):  # the last columns, and only where samples have turns
            part = figures.turn(number)
            rows[-1][f"score@turn{number + 1}"] = part.estimate and part.estimate.mean
            rows[-1][f"kept@turn{number + 1}"] = part.share("kept", "seen")
    return rows


def markdown(title: str, found: Sequence[Setting], warnings: Sequence[str]) -> str:
    """The policies' table of each setting."""
    lines = [f"# {title}", ""]
    for warning in warnings:
        lines += [f"> {warning}", ""]
    for setting in found:
        lines += [f"## {setting.title}", "", f"{setting.machine}; tasks: {', '.join(setting.tasks)}", ""]
        more = measures(setting)
        heads = ["policy", "n", "score", "95 %", "to full", *more, "MiB", "of full", "read", "token ms", "runs"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [_line(setting, i) for i in range(len(setting.policies))]
        lines.append("")
        for by, columns in (breakdowns(setting) | ({"turn": turn_columns(setting)} if setting.turns else {})).items():
            gaps = [gap(columns, by, entry.figures) for entry in setting.policies]
            heads = ["policy", *columns, *[" − ".join(columns)] * any(gaps)]
            lines += [f"Score by {by}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for entry, apart in zip(setting.policies, gaps, strict=True):
                lines.append(_parts_line(entry, columns, [_points(apart)] * any(gaps)))
            lines.append("")
    lines.append(
        f"Scores and differences to full attention in points of a hundred, with 95 % bootstrap intervals. {RULE}. "
        "*: lacks samples that others have. "
        "Bytes and times are measured."
    )
    return "\n".join(lines) + "\n"


def _parts_line(entry: PolicyResult, columns: Columns, more: Sequence[str]) -> str:
    means = [part(entry.figures).estimate for part in columns.values()]
    cells = (entry.label, *("–" if mean is None else f"{mean.mean * 100:.1f}" for mean in means), *more)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _points(apart: Difference | None) -> str:
    return "–" if apart is None else f"{apart.mean * 100:+.1f}{'' if apart.significant else ' n.s.'}"


def _line(setting: Setting, index: int) -> str:
    entry = setting.policies[index]
    figures, mean = entry.figures, entry.figures.estimate
    assert mean is not None
    scale = 100
    more = [(measure(figures), form) for measure, form in measures(setting).values()]
    to_full = _points(None if entry.is_reference else figures.difference(setting.reference))
    token_ms = figures.median("token_ms")
    share = figures.share("bytes", "full_bytes")
    cells = (
        entry.label + ("" if entry.complete else " *"),
        len(figures.samples),
        f"{mean.mean * scale:.1f}",
        f"{mean.low * scale:.1f} to {mean.high * scale:.1f}",
        to_full,
        *("–" if value is None else form.format(value) for value, form in more),
        f"{(figures.mean('bytes') or 0) / 2**20:.2f}",
        "–" if share is None else f"{share:.1%}",
        f"{figures.mean('read_share') or 0:.1%}",
        "–" if token_ms is None else f"{token_ms:.1f}",
        " ".join(figures.runs),
    )
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
