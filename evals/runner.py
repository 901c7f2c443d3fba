"""Run a plan's points: models outside, samples inside, policies innermost, so that one prompt pass serves them all."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import kvpress
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.evals.answer import (
    Answer,
    Question,
    SharedPass,
    answer,
    answer_batch,
    attempt,
    free_memory,
    make_question,
    record,
)
from kvpress.evals.config import ModelSpec, Plan, Point
from kvpress.evals.environment import describe
from kvpress.evals.metrics import check_library
from kvpress.evals.store import PointStore, StoreError
from kvpress.evals.team import Team, leads, started_together
from kvpress.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loader = Callable[..., "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]


class RunError(ValueError):
    """A run that cannot begin; the message names the point, the limit and the remedy."""


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        answered, failed: samples, now.
        finished, finished_before: points that are complete.
        left_to_others: points that another process is writing.
        lost: points that were begun as often as allowed, and each time their worker was lost.
    """

    answered: int = 0
    failed: int = 0
    finished: int = 0
    finished_before: int = 0
    left_to_others: int = 0
    lost: int = 0

    @property
    def exit_code(self) -> int:
        """1 if something is missing that should be there."""
        return 1 if self.failed or self.left_to_others or self.lost else 0


@dataclass(frozen=True)
class Arm:
    """A point on its model: whether it can share prompt passes, and its directory."""

    point: Point
    shares: bool
    store: PointStore

    @property
    def batches(self) -> bool:
        """Whether samples can be answered together.

        A policy that chooses within a prompt meets ties there, as between two keys of the same token, and how they are
        rounded depends on the batch. It would answer otherwise than alone.
        """
        return all(policy.leaves_prompts_exact for policy in self.point.policies)


@dataclass(frozen=True)
class Group:
    """Points that answer the same questions with the same model."""

    arms: list[Arm]
    questions: list[Question]


class Crew:
    """What computes: this process alone, or at the head of a team."""

    def __init__(self, team: "Team | None" = None) -> None:
        self.team = team

    def load(self, spec: ModelSpec, loader: Loader) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """A model and its tokenizer."""
        if self.team is not None:
            self.team.tell("load", spec)
        loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] = spec.load(loader)
        return loaded

    def record(self, model: "PreTrainedModel", questions: Sequence[Question]) -> SharedPass:
        """See `kvpress.evals.answer.record`."""
        if self.team is not None:
            self.team.tell("record", *questions)
        return record(model, *questions)

    def answer(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        policies: Sequence[kvpress.Policy],
        questions: Sequence[Question],
        shared: SharedPass | None,
    ) -> list[Answer]:
        """See `kvpress.evals.answer.answer_batch`."""
        if len(questions) > 1 or self.team is not None:
            work = partial(answer_batch, model, tokenizer, policies, questions, shared)
        else:
            return [answer(model, tokenizer, policies, questions[0], shared)]
        if self.team is None:
            return work()
        self.team.tell("answer", policies, questions, shared is not None)
        found, reason = attempt(work)
        if not self.team.join(found):
            raise RuntimeError(reason or "another process of the split model failed; its output says why")
        return list(found)


def run(plan: Plan, console: Console | None = None, *, retry: bool = False, loader: Loader = load_model) -> Outcome:
    """Answer every sample of every point that has no row yet, in this process.

    Under torchrun, with a `tp_plan`, every process calls this: the first one runs the plan, the others compute along and
    return an empty outcome.

    Args:
        retry: answer those again that failed.
        loader: makes a model and its tokenizer from name, device and dtype; device_map or tp_plan as keywords where given.

    Raises:
        ConfigError, TaskError, PolicyError, UnsupportedModelError, ModelLoadError, RunError: a point cannot run; before the
            first sample of its model.
        StoreError: a directory cannot be read or written.
    """
    split = [point for point in plan.points if point.fields.tp_plan]
    if not (split and started_together()):
        return _run(plan, Crew(), console or Console(), retry, loader)
    if len(split) < len(plan.points):
        raise RunError("some runs have a tp_plan and some have none; give them configurations of their own")
    team = Team()
    try:
        if not leads():
            team.follow(loader)
            return Outcome()
        try:
            return _run(plan, Crew(team), console or Console(), retry, loader)
        finally:
            team.tell()
    finally:
        team.close()


def _run(plan: Plan, crew: Crew, console: Console, retry: bool, loader: Loader) -> Outcome:
    outcome = Outcome()
    by_model: dict[ModelSpec, list[Point]] = {}
    for point in pending(plan, outcome, retry):
        check_library(point.task.metric)
        by_model.setdefault(point.model, []).append(point)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for spec, points in by_model.items():
            bar = progress.add_task(f"loading {spec.name}", total=None)
            model, tokenizer = crew.load(spec, loader)
            groups = prepare(plan, points, model, tokenizer)
            progress.update(bar, total=sum(len(group.arms) * len(group.questions) for group in groups))
            for group in groups:
                tell = partial(_show, progress, bar)
                run_group(plan, group, crew, model, tokenizer, outcome, tell, retry=retry)
            progress.remove_task(bar)
            del model, tokenizer
            free_memory()
    return outcome


def pending(plan: Plan, outcome: Outcome, retry: bool) -> list[Point]:
    """The points that something is missing of; the others are counted as finished before."""
    missing = []
    for point in plan.points:
        mark = PointStore(plan.out / point.id).finished
        if mark is None or (retry and mark["failed"]):
            missing.append(point)
        else:
            outcome.finished_before += 1
            outcome.failed += mark["failed"]
    return missing


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
    crew: Crew,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    outcome: Outcome,
    tell: "Callable[[Arm, int, bool], None]",
    *,
    retry: bool = False,
) -> None:
    """Answer what is missing of a group's points, sample by sample, or batch by batch of like samples.

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
        for missing, questions in batches(mine, group.questions, plan.batch_size, retry):
            for arm in mine:
                if arm not in missing:
                    tell(arm, len(questions), False)
            for arm, row in answer_all(crew, missing, questions, model, tokenizer):
                arm.store.add(row)
                outcome.answered += row["error"] is None
                tell(arm, 1, True)
        for arm in mine:
            arm.store.finish(len(group.questions))
            outcome.finished += 1
            outcome.failed += sum(row["error"] is not None for row in arm.store.rows.values())


def batches(
    arms: list[Arm], questions: Iterable[Question], size: int, retry: bool
) -> Iterator[tuple[list[Arm], list[Question]]]:
    """The questions, up to `size` of one shape together, with the arms that each of them is missing in."""
    waiting: dict[tuple[Any, ...], list[Question]] = {}
    for question in questions:
        rows = [arm.store.rows.get(question.sample.index) for arm in arms]
        missing = tuple(i for i, row in enumerate(rows) if row is None or (retry and row["error"] is not None))
        alike = waiting.setdefault((missing, question.shape), [])
        alike.append(question)
        if len(alike) == size:
            yield [arms[i] for i in missing], alike
            del waiting[missing, question.shape]
    for (missing, _), alike in waiting.items():
        yield [arms[i] for i in missing], alike


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
    crew: Crew,
    arms: list[Arm],
    questions: list[Question],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> Iterator[tuple[Arm, dict[str, Any]]]:
    """The rows of questions of one shape for each arm, as they are made. An error in one is its row, and the others go on."""
    shared: SharedPass | None = None
    if sum(arm.shares for arm in arms) > 1 and len(questions[0].prompt) > 1:
        shared, _ = attempt(partial(crew.record, model, questions))  # where it fails, each runs the prompt itself
    for arm in sorted(arms, key=lambda arm: not arm.shares):
        given = shared if arm.shares else None
        if given is None:
            shared = None  # no other arm needs it: its memory is free for those that run the prompt themselves
        answers, reason = None, None
        if arm.batches or len(questions) == 1:
            answers, reason = attempt(partial(crew.answer, model, tokenizer, arm.point.policies, questions, given))
        if answers is None and len(questions) > 1:  # or it was too much at once, perhaps
            for question in questions:
                yield from answer_all(crew, [arm], [question], model, tokenizer)
            continue
        for question, found in zip(questions, answers or [None] * len(questions), strict=True):
            row: dict[str, Any] = {
                "index": question.sample.index,
                "prompt_hash": question.hash,
                "prompt_tokens": question.length,
                "meta": {key: value for key, value in question.sample.meta.items() if key != "classes"},
            }
            failure = reason
            if found is not None:
                measured, failure = attempt(partial(measures, arm.point, question, found))
                row |= measured or {}
            yield arm, row | {"error": failure} | ({} if failure is None else {"score": None})


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
        "batch": found.batch,
    }


def _show(progress: Progress, bar: Any, arm: Arm, steps: int, now: bool) -> None:
    scores = [row["score"] for row in arm.store.rows.values() if row["score"] is not None]
    score = f", {sum(scores) / len(scores):.2f} over {len(scores)}" if scores and now else ""
    progress.update(bar, advance=steps, description=f"{arm.point.where}: {arm.point.policy}{score}", refresh=now)
