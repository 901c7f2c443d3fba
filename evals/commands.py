"""What `kvpress ablate`, `eval` and `ls` do and show."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvpress.evals.cluster import run_on_ray
from kvpress.evals.config import ModelSpec, Plan, Run
from kvpress.evals.executor import is_main_process
from kvpress.evals.leaderboard import write_leaderboard
from kvpress.evals.pairs import compare_runs
from kvpress.evals.results import label, load_results
from kvpress.evals.runner import Outcome, encode_samples, run_plan
from kvpress.evals.statistics import RULE
from kvpress.evals.store import ResultsFolder, is_locked
from kvpress.models import ModelLoadError, check_model, load_tokenizer


def ablate(
    plan: Plan, console: Console, *, dry_run: bool = False, retry: bool = False, export: Path | None = None
) -> int:
    """Run a plan, or show what it would do; the exit code.

    Args:
        export: also write the runs' results there, as `kvpress.evals.leaderboard.write_leaderboard` does.
    """
    if dry_run:
        _print_table(console, grid(plan))
        for line in cost(plan):
            console.print(line, highlight=False, soft_wrap=True)
        return 0
    outcome = (run_on_ray if plan.launcher == "ray" else run_plan)(plan, console, retry=retry)
    if not is_main_process():
        return 0  # another process says it
    if export is not None:
        write_leaderboard([plan.out], export, only={run.id for run in plan.runs})
    console.print(summary(outcome, plan.out), highlight=False, soft_wrap=True)
    return outcome.exit_code


def summary(outcome: Outcome, out: Path) -> str:
    """An outcome in a line."""
    parts = [f"{outcome.finished} runs finished with {outcome.answered} new answers"]
    if outcome.finished_before:
        parts.append(f"{outcome.finished_before} finished before")
    if outcome.failed:
        parts.append(f"{outcome.failed} samples failed (kvpress ls {out}; --retry runs them again)")
    if outcome.lost:
        parts.append(f"{outcome.lost} runs given up, for their workers were lost each time (ray.attempts)")
    if outcome.left_to_others:
        parts.append(f"{outcome.left_to_others} left to a process that is writing them now")
    return f"{'; '.join(parts)}; results in {out}, kvpress report {out} shows them"


def grid(plan: Plan) -> Table:
    """A plan's runs and how far they are."""
    rows, results = [], ResultsFolder(plan.out)
    for run in plan.runs:
        is_finished = results.finished(run.id) is not None
        answered = 0 if is_finished else len(results.rows(run.id))
        state = "finished" if is_finished else f"{answered} answered" if answered else "new"
        fields = run.fields
        rows.append(
            {
                **_run_cells(run.id, run.policy, fields.model, run.task.label, fields.length, fields.query_aware),
                "state": state,
            }
        )
    return _table(rows)


def cost(plan: Plan) -> Iterable[str]:
    """What is still to be computed, in lines.

    Raises:
        ModelLoadError: a model that cannot be loaded; after the lines about the others.
    """
    results = ResultsFolder(plan.out)
    by_model: dict[ModelSpec, list[Run]] = {}
    for run in plan.runs:
        if results.finished(run.id) is None:
            by_model.setdefault(run.model, []).append(run)
    if not by_model:
        yield f"{len(plan.runs)} runs, all finished; nothing to do"
    failed = []
    for spec, runs in by_model.items():
        what = f"{spec}: {len(runs)} runs"
        try:
            check_model(spec.name)
            tokenizer = load_tokenizer(spec.name)
        except ModelLoadError as error:
            failed.append(str(error))
            yield f"{what}; how many tokens they read is not known"
            continue
        alike: dict[str, list[Run]] = {}
        for run in runs:
            alike.setdefault(run.samples_id, []).append(run)
        answers = passes = tokens = tokens_alone = steps = 0
        for group in alike.values():
            rows = [results.rows(run.id) for run in group]
            for sample in encode_samples(group[0], tokenizer):
                missing = [p for p, held in zip(group, rows, strict=True) if sample.source.index not in held]
                exact = [run for run in missing if all(policy.leaves_prompts_exact for policy in run.policies)]
                prompts = len(missing) - (max(0, len(exact) - 1) if plan.share_prompts else 0)
                answers += len(missing)
                passes += prompts
                tokens += prompts * len(sample.prompt)
                tokens_alone += len(missing) * len(sample.prompt)
                steps += len(missing) * sample.decode_steps
        shared = f" (without sharing: {answers:,} of {tokens_alone:,})" if answers > passes else ""
        yield f"{what}, {answers:,} answers: {passes:,} prompt passes of {tokens:,} tokens{shared}, at most {steps:,} decode steps"
        speed = _speed(plan, results)
        if speed is not None:
            minutes = (tokens * speed[0] + steps * speed[1]) / 60e3
            yield f"about {minutes:.0f} minutes at the median speed of the answers that are in {plan.out}"
    if failed:
        raise ModelLoadError("; ".join(failed))


def compare(first: Path, second: Path, console: Console) -> None:
    """Show how two runs, or the runs of two folders, differ on the same samples.

    Raises:
        StoreError: a folder without runs, or two without a sample in common.
    """
    pairs = compare_runs(first, second)
    rows = [
        {
            "policy": pair.first.label
            if pair.first.label == pair.second.label
            else f"{pair.first.label} → {pair.second.label}",
            "task": ", ".join(pair.tasks),
            "n": str(pair.difference.n),
            "score": f"{100 * pair.first_score.mean:.1f} → {100 * pair.second_score.mean:.1f}",
            "difference": f"{100 * pair.difference.mean:+.1f}" + ("" if pair.difference.significant else " n.s."),
            "95 %": f"{100 * pair.difference.low:+.1f} to {100 * pair.difference.high:+.1f}",
            "cache": change(pair.first.figures.mean("bytes"), pair.second.figures.mean("bytes")),
            "ms per token": change(pair.first.figures.median("token_ms"), pair.second.figures.median("token_ms")),
        }
        for pair in pairs
    ]
    _print_table(console, _table(rows))
    console.print(f"{first} → {second}, scores in points of a hundred. {RULE}.", highlight=False, soft_wrap=True)


def change(first: float | None, second: float | None) -> str:
    """A measure as a share of what it was."""
    return "–" if not first or second is None else f"x {second / first:.2f}"


def _speed(plan: Plan, results: ResultsFolder) -> tuple[float, float] | None:
    """Median milliseconds per prompt token and per decode step of what is there already."""
    rows = [row for run in plan.runs for row in results.rows(run.id).values() if row["error"] is None]
    prompts = [row["prompt_ms"] / row["prompt_tokens"] for row in rows]
    steps = [row["token_ms"] for row in rows if row["token_ms"] is not None]
    return (statistics.median(prompts), statistics.median(steps)) if prompts and steps else None


def ls(folders: Sequence[Path], console: Console) -> None:
    """List the runs in and below folders."""
    rows = []
    for result in load_results(list(folders)):
        figures, config = result.figures, result.config
        state = "finished" if result.finished else "running" if is_locked(result.path) else "unfinished"
        failed = f", {figures.failed} failed" if figures.failed else ""
        model = config["definition"]["model"]
        rows.append(
            {
                **_run_cells(result.id, config["policy"], model, config["task"], config["length"], result.query_aware),
                "n": str(len(figures.samples)),
                "score": "–" if figures.estimate is None else f"{figures.estimate.mean:.3f}",
                "state": state + failed,
            }
        )
    _print_table(console, _table(rows))


def _run_cells(run: str, policy: str, model: str, task: str, length: int | None, query_aware: bool) -> dict[str, str]:
    """The cells that say which run it is."""
    return {
        "run": run,
        "policy": label(policy),
        "model": model,
        "task": task,
        "length": "" if length is None else str(length),
        "question": "seen" if query_aware else "unseen",
    }


def _table(rows: Sequence[dict[str, str]]) -> Table:
    """A column per name; without lengths if there are none, and without models if there is only one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    kinds = {name: {row[name] for row in rows} for name in (rows[0] if rows else ())}
    shown = [name for name, kind in kinds.items() if kind != {""} and (name != "model" or len(kind) > 1)]
    for name in shown:
        right = name in ("length", "n", "score")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name == "run")
    for row in rows:
        table.add_row(*(escape(row[name]) for name in shown))
    return table


def _print_table(console: Console, table: Table) -> None:
    """As wide as the terminal; where there is none, as wide as it is: no search finds a name that is broken in two."""
    (console if console.is_terminal else Console(file=console.file, width=1000)).print(table)
