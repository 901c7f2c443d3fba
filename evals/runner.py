"""Run a plan's points: models outside, samples inside, policies innermost, so that one prompt pass serves them all."""

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import kvpress
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.evals.answer import Answer, Question, SharedPass, answer, make_question, record
from kvpress.evals.config import Plan, Point
from kvpress.evals.environment import describe
from kvpress.evals.store import PointStore, StoreError
from kvpress.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loader = Callable[..., "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]


class RunError(ValueError):
    """A run that cannot begin; the message names the point, the limit and the remedy."""


@dataclass
class Outcome:
    """What a run did: counts of samples answered and failed now, and of points done, done before, and left to others."""

    answered: int = 0
    failed: int = 0
    finished: int = 0
    finished_before: int = 0
    left_to_others: int = 0

    @property
    def exit_code(self) -> int:
        """1 if something is missing that should be there."""
        return 1 if self.failed or self.left_to_others else 0


@dataclass(frozen=True)
class Arm:
    """A point on its model: whether it can share prompt passes, and its directory."""

    point: Point
    shares: bool
    store: PointStore


@dataclass(frozen=True)
class Group:
    """Points that answer the same questions with the same model."""

    arms: list[Arm]
    questions: list[Question]


def run(plan: Plan, console: Console | None = None, *, retry: bool = False, loader: Loader = load_model) -> Outcome:
    """Answer every sample of every point that has no row yet.

    Args:
        retry: answer those again that failed.
        loader: makes a model and its tokenizer from name, device and dtype.

    Raises:
        ConfigError, TaskError, PolicyError, UnsupportedModelError, ModelLoadError, RunError: a point cannot run; before the
            first sample of its model.
        StoreError: a directory cannot be read or written.
    """
    console = console or Console()
    outcome = Outcome()
    pending = []
    for point in plan.points:
        mark = PointStore(plan.out / point.id).finished
        if mark is None or (retry and mark["failed"]):
            pending.append(point)
        else:
            outcome.finished_before += 1
            outcome.failed += mark["failed"]
    by_model: dict[tuple[str, str, str], list[Point]] = {}
    for point in pending:
        by_model.setdefault(point.model, []).append(point)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for (name, device, dtype), points in by_model.items():
            bar = progress.add_task(f"loading {name}", total=None)
            model, tokenizer = loader(name, device, dtype)
            groups = prepare(plan, points, model, tokenizer)
            progress.update(bar, total=sum(len(group.arms) * len(group.questions) for group in groups))
            for group in groups:
                tell = partial(_show, progress, bar)
                run_group(plan, group, model, tokenizer, outcome, tell, retry=retry)
            progress.remove_task(bar)
            del model, tokenizer
            _free_memory()
    return outcome


def prepare(
    plan: Plan, points: Iterable[Point], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> list[Group]:
    """The points in groups, with their questions; everything that can be refused is refused here.

    Raises:
        TaskError, PolicyError, UnsupportedModelError, RunError: a point cannot run on this model.
    """
    grouped: dict[str, list[Point]] = {}
    for point in points:
        grouped.setdefault(point.samples_id, []).append(point)
    groups = []
    for alike in grouped.values():
        questions = list(make_questions(alike[0], tokenizer))
        if not questions:
            raise RunError(f"{alike[0].where}: the task has no samples; check its data")
        check_lengths(questions, alike[0], model, plan.allow_extrapolation)
        arms = []
        for point in alike:
            try:
                with kvpress.patch(model, list(point.policies)) as handle:
                    shares = handle.shares_prompts and plan.share_prompts
            except (PolicyError, UnsupportedModelError) as error:
                raise type(error)(f"{point.policy} on {point.fields.model}: {error}") from error
            arms.append(Arm(point, shares, PointStore(plan.out / point.id)))
        groups.append(Group(arms, questions))
    return groups


def make_questions(point: Point, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Question]:
    """The point's samples as token ids."""
    for number, sample in enumerate(point.task.samples(tokenizer)):
        if number == point.fields.samples:
            return
        yield make_question(sample, point.task.prompt(sample, tokenizer), point.fields.query_aware)


def check_lengths(questions: list[Question], point: Point, model: "PreTrainedModel", allow_extrapolation: bool) -> None:
    """Refuse what the model was not made for.

    Raises:
        RunError: a prompt and its answer are longer than the model's positions.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or allow_extrapolation:
        return
    for question in questions:
        length = question.length + question.sample.max_new_tokens
        if length > limit:
            raise RunError(
                f"{point.where}: sample {question.sample.index} has {length} tokens with its answer, and {point.fields.model} "
                f"was made for {limit}; give a smaller length, or allow_extrapolation: true"
            )


def run_group(
    plan: Plan,
    group: Group,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    outcome: Outcome,
    tell: "Callable[[Arm, int, bool], None]",
    *,
    retry: bool = False,
) -> None:
    """Answer what is missing of a group's points, sample by sample.

    Args:
        outcome: counts on.
        tell: called with the arm, how many samples are behind it, and whether they were answered now.
    """
    with ExitStack() as locks:
        mine = []
        for arm in group.arms:
            if not locks.enter_context(arm.store.locked()):
                outcome.left_to_others += 1
                tell(arm, len(group.questions), False)
                continue
            arm.store.open(arm.point.to_dict(), describe(model, arm.point.task.seed))
            check_rows(arm, group.questions)
            mine.append(arm)
        for question in group.questions:
            index = question.sample.index
            rows = [(arm, arm.store.rows.get(index)) for arm in mine]
            missing = [arm for arm, row in rows if row is None or (retry and row["error"] is not None)]
            for arm in mine:
                if arm not in missing:
                    tell(arm, 1, False)
            for arm, row in answer_all(missing, question, model, tokenizer):
                arm.store.add(row)
                outcome.answered += row["error"] is None
                tell(arm, 1, True)
        for arm in mine:
            arm.store.finish(len(group.questions))
            outcome.finished += 1
            outcome.failed += sum(row["error"] is not None for row in arm.store.rows.values())


def check_rows(arm: Arm, questions: list[Question]) -> None:
    """Refuse to go on where the rows that are there answer other prompts.

    Raises:
        StoreError: a row's prompt is not the one that the task makes now.
    """
    hashes = {question.sample.index: question.hash for question in questions}
    for index, row in arm.store.rows.items():
        if hashes.get(index) != row["prompt_hash"]:
            raise StoreError(
                f"{arm.store.folder}: sample {index} was answered for another prompt than {arm.point.task.label} makes now; "
                "move the folder away to run the point anew"
            )


def answer_all(
    arms: list[Arm], question: Question, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """One question's row for each arm, as each is made. An error in one is its row, and the others go on."""
    shared: SharedPass | None = None
    if sum(arm.shares for arm in arms) > 1 and len(question.prompt) > 1:
        shared, _ = attempt(partial(record, model, question))  # where it fails, each runs the prompt itself
    for arm in sorted(arms, key=lambda arm: not arm.shares):
        given = shared if arm.shares else None
        if given is None:
            shared = None  # no other arm needs it: its memory is free for those that run the prompt themselves
        row: dict[str, Any] = {
            "index": question.sample.index,
            "prompt_hash": question.hash,
            "prompt_tokens": question.length,
            "meta": {key: value for key, value in question.sample.meta.items() if key != "classes"},
        }
        found, reason = attempt(partial(answer, model, tokenizer, arm.point.policies, question, given))
        if found is not None:
            measured, reason = attempt(partial(measures, arm.point, question, found))
            row |= measured or {}
        yield arm, row | {"error": reason} | ({} if reason is None else {"score": None})


def measures(point: Point, question: Question, found: Answer) -> dict[str, Any]:
    """What a row says of an answer."""
    if question.scored:
        mean = math.fsum(found.log_probs) / len(found.log_probs)
        score, text = math.exp(mean), ""  # one over the perplexity: the mean probability of a token
        extra = {"perplexity": math.exp(-mean)}
    else:
        score, text, extra = point.task.score(question.sample, found.text), found.text, {}
    return {
        "answer": text,
        "answers": list(question.sample.answers),
        "score": float(score),
        **extra,
        "new_tokens": found.new_tokens,
        **found.held,
        "prompt_ms": found.prompt_ms,
        "token_ms": found.token_ms,
        "shared_prompt": found.shared,
    }


def attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What the work gives, or None and the reason why it failed, in one line."""
    try:
        return work(), None
    except Exception as error:  # one sample must not end the run, whatever goes wrong in it
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        reason = f"{type(error).__name__}: {first}"
    _free_memory()  # outside the block: the error no longer holds the tensors
    return None, reason


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(progress: Progress, bar: Any, arm: Arm, steps: int, now: bool) -> None:
    scores = [row["score"] for row in arm.store.rows.values() if row["score"] is not None]
    score = f", {sum(scores) / len(scores):.2f} over {len(scores)}" if scores and now else ""
    progress.update(bar, advance=steps, description=f"{arm.point.where}: {arm.point.policy}{score}", refresh=now)
