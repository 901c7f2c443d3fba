"""What `kvpress ablate`, `eval` and `ls` do and show."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvpress.evals.cluster import run_on_ray
from kvpress.evals.config import ModelSpec, Plan, Point
from kvpress.evals.leaderboard import write_leaderboard
from kvpress.evals.results import label, load_results
from kvpress.evals.runner import Outcome, make_questions, run
from kvpress.evals.store import PointStore, is_locked, read_rows
from kvpress.evals.team import leads
from kvpress.models import ModelLoadError, load_tokenizer


def ablate(
    plan: Plan, console: Console, *, dry_run: bool = False, retry: bool = False, export: Path | None = None
) -> int:
    """Run a plan, or show what it would do; the exit code.

    Args:
        export: also write the runs' results there, as `kvpress.evals.leaderboard.write_leaderboard` does.
    """
    if dry_run:
        console.print(grid(plan))
        for line in cost(plan):
            console.print(line, highlight=False, soft_wrap=True)
        return 0
    outcome = (run_on_ray if plan.launcher == "ray" else run)(plan, console, retry=retry)
    if not leads():
        return 0  # another process says it
    if export is not None:
        write_leaderboard([plan.out / point.id for point in plan.points], export)
    console.print(said(outcome, plan.out), highlight=False, soft_wrap=True)
    return outcome.exit_code


def said(outcome: Outcome, out: Path) -> str:
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
    """A plan's points and how far they are."""
    table = _table("run", "policy", "model", "task", "length", "question", "state")
    for point in plan.points:
        folder = plan.out / point.id
        mark = PointStore(folder).finished
        rows = 0 if mark else len(read_rows(folder))
        state = "finished" if mark else f"{rows} answered" if rows else "new"
        length = "" if point.fields.length is None else str(point.fields.length)
        table.add_row(
            point.id,
            escape(label(point.policy)),
            escape(point.fields.model),
            point.task.label,
            length,
            _question(point.fields.query_aware),
            state,
        )
    return table


def cost(plan: Plan) -> Iterable[str]:
    """What the points that are not finished will compute, in lines."""
    by_model: dict[ModelSpec, list[Point]] = {}
    for point in plan.points:
        if PointStore(plan.out / point.id).finished is None:
            by_model.setdefault(point.model, []).append(point)
    if not by_model:
        yield f"{len(plan.points)} runs, all finished; nothing to do"
    for spec, points in by_model.items():
        what = f"{spec}: {len(points)} runs"
        try:
            tokenizer = load_tokenizer(spec.name)
        except ModelLoadError as error:
            yield f"{what}; how many tokens they read is not known: {error}"
            continue
        alike: dict[str, list[Point]] = {}
        for point in points:
            alike.setdefault(point.samples_id, []).append(point)
        samples = passes = alone = tokens = tokens_alone = steps = 0
        for group in alike.values():
            questions = list(make_questions(group[0], tokenizer))
            sharing = (
                sum(all(p.leaves_prompts_exact for p in point.policies) for point in group) if plan.share_prompts else 0
            )
            runs = len(group) - (sharing - 1 if sharing > 1 else 0)
            length = sum(len(question.prompt) for question in questions)
            fed = sum(len(question.steps) + max(0, question.sample.max_new_tokens - 1) for question in questions)
            samples += len(questions) * len(group)
            passes += runs * len(questions)
            alone += len(group) * len(questions)
            tokens += runs * length
            tokens_alone += len(group) * length
            steps += len(group) * fed
        shared = f" (without sharing: {alone:,} of {tokens_alone:,})" if alone > passes else ""
        yield f"{what}, {samples:,} answers: {passes:,} prompt passes of {tokens:,} tokens{shared}, at most {steps:,} decode steps"
        speed = _speed(plan)
        if speed is not None:
            minutes = (tokens * speed[0] + steps * speed[1]) / 60e3
            yield f"about {minutes:.0f} minutes or less at the median speed of the answers that are in {plan.out}"


def _speed(plan: Plan) -> tuple[float, float] | None:
    """Median milliseconds per prompt token and per decode step of what is there already."""
    rows = [row for point in plan.points for row in read_rows(plan.out / point.id).values() if row["error"] is None]
    prompts = [row["prompt_ms"] / row["prompt_tokens"] for row in rows]
    steps = [row["token_ms"] for row in rows if row["token_ms"] is not None]
    return (statistics.median(prompts), statistics.median(steps)) if prompts and steps else None


def ls(folders: Sequence[Path], console: Console) -> None:
    """List the runs in and below folders."""
    table = _table("run", "policy", "task", "length", "question", "n", "score", "state")
    for result in load_results(list(folders)):
        figures, config = result.figures, result.config
        state = "finished" if result.finished else "running" if is_locked(result.folder) else "unfinished"
        failed = f", {figures.failed} failed" if figures.failed else ""
        table.add_row(
            result.id,
            escape(label(config["policy"])),
            config["task"],
            "" if config["length"] is None else str(config["length"]),
            _question(result.query_aware),
            str(len(figures.samples)),
            "–" if figures.estimate is None else f"{figures.estimate.mean:.3f}",
            state + failed,
        )
    console.print(table)


def _question(query_aware: bool) -> str:
    return "seen" if query_aware else "unseen"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        right = name in ("length", "n", "score")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name == "run")
    return table
