"""Make a plan's runs: models outside, samples inside, policies innermost, so that one prompt pass serves them all."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import kvpress
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.evals.answer import Answer, EncodedSample, attempt, encode_sample, free_memory
from kvpress.evals.config import ModelSpec, Plan, Run
from kvpress.evals.environment import GitError, changed_files, checkout, describe, documentation_tree
from kvpress.evals.executor import DistributedExecutor, Executor, Loader, is_distributed, is_main_process
from kvpress.evals.metrics import check_library
from kvpress.evals.store import ResultsFolder, RunStore, StoreError
from kvpress.models import load_model

SECONDS_PER_LINE = 30.0
HELD = ("seen", "kept", "bytes", "full_bytes")
"""What is noted of the cache after each of several turns."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RunError(ValueError):
    """A run that cannot begin; the message names the run, the limit and the remedy."""


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        answered, failed: samples, now.
        finished, finished_before: runs that are complete.
        left_to_others: runs that another process is writing.
        lost: runs that were begun as often as allowed, and each time their worker was lost.
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
class PreparedRun:
    """A run that its model can have.

    Attributes:
        run: what is run.
        shares: whether it can take its cache from a prompt pass that other runs share.
        store: its directory.
    """

    run: Run
    shares: bool
    store: RunStore

    @property
    def batches(self) -> bool:
        """Whether samples can be answered together.

        A policy that chooses within a prompt meets ties there, as between two keys of the same token, and how they are
        rounded depends on the batch. It would answer otherwise than alone.
        """
        return all(policy.leaves_prompts_exact for policy in self.run.policies)


@dataclass(frozen=True)
class Group:
    """Runs that answer the same samples with the same model.

    Attributes:
        runs: the runs.
        samples: all that they have.
        wanted: those that are answered now.
    """

    runs: list[PreparedRun]
    samples: list[EncodedSample]
    wanted: list[EncodedSample]


@dataclass(frozen=True)
class Portion:
    """A part of a plan's work.

    Attributes:
        indices: of the samples that are answered, in each run; None for all.
        until: no sample is begun after this time of `time.monotonic`.
    """

    indices: frozenset[int] | None = None
    until: float = math.inf


def run_plan(
    plan: Plan,
    console: Console | None = None,
    *,
    retry: bool = False,
    loader: Loader = load_model,
    portion: Portion = Portion(),
) -> Outcome:
    """Answer every sample of every run that has no row yet, in this process.

    Under torchrun, with a `tp_plan`, every process calls this: the first one runs the plan, the others compute along and
    return an empty outcome.

    Args:
        retry: answer those again that failed.
        loader: makes a model and its tokenizer from name, device and dtype; device_map or tp_plan as keywords where given.
        portion: what is done of it now; a run whose samples do not all have a row stays unfinished.

    Raises:
        ConfigError, TaskError, PolicyError, UnsupportedModelError, ModelLoadError, RunError: a run cannot run; before the
            first sample of its model.
        StoreError: a directory cannot be read or written.
    """
    split = [run for run in plan.runs if run.fields.tp_plan]
    if not (split and is_distributed()):
        return _run_plan(plan, Executor(), console or Console(), retry, loader, portion)
    if len(split) < len(plan.runs):
        raise RunError("some runs have a tp_plan and some have none; give them configurations of their own")
    executor = DistributedExecutor()
    try:
        if not is_main_process():
            executor.serve(loader)
            return Outcome()
        try:
            return _run_plan(plan, executor, console or Console(), retry, loader, portion)
        finally:
            executor.stop()
    finally:
        executor.close()


def _run_plan(
    plan: Plan, executor: Executor, console: Console, retry: bool, loader: Loader, portion: Portion
) -> Outcome:
    outcome = Outcome()
    by_model: dict[ModelSpec, list[Run]] = {}
    missing = pending(plan, outcome, retry)
    if missing:
        check_clean(plan.out)
    for run in missing:
        check_library(run.metric)
        by_model.setdefault(run.model, []).append(run)
    for run in {run.samples_id: run for run in missing}.values():
        run.task.check(scored=run.fields.agreement is None)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    lines = Lines(console)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for spec, runs in by_model.items():
            bar = progress.add_task(f"loading {spec.name}", total=None)
            model, tokenizer = executor.load(spec, loader)
            groups = prepare(plan, runs, model, tokenizer, portion)
            progress.update(bar, total=sum(len(group.runs) * len(group.wanted) for group in groups))
            for group in groups:
                advance = partial(_advance, progress, lines, bar)
                run_group(plan, group, executor, model, tokenizer, outcome, advance, retry=retry, until=portion.until)
            progress.remove_task(bar)
            del model, tokenizer
            free_memory()
    return outcome


def pending(plan: Plan, outcome: Outcome, retry: bool) -> list[Run]:
    """The runs that something is missing of; the others are counted as finished before."""
    missing, results = [], ResultsFolder(plan.out)
    for run in plan.runs:
        finished = results.finished(run.id)
        if finished is None or (retry and finished["failed"]):
            missing.append(run)
        else:
            outcome.finished_before += 1
            outcome.failed += finished["failed"]
    return missing


def refusal(run: Run, model: "PreTrainedModel") -> PolicyError | UnsupportedModelError | None:
    """Why a run's policies cannot act on a model; None where they can."""
    try:
        kvpress.patch(model, list(run.policies)).unpatch()
    except (PolicyError, UnsupportedModelError) as error:
        return error
    return None


def check_clean(out: Path) -> None:
    """Refuse to write results below a work tree's docs/ that no commit can make again.

    Raises:
        RunError: files of that work tree, or of the one that kvpress runs from, differ from the commit.
    """
    documented = documentation_tree(out)
    if documented is None:
        return
    for tree in dict.fromkeys(tree for tree in (documented, checkout()) if tree is not None):
        try:
            changed = changed_files(tree)
        except GitError as error:
            raise RunError(
                f"{out} is below docs/, and git cannot say whether {tree} is as its commit has it ({error}); put that right, or "
                "choose an out elsewhere"
            ) from error
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise RunError(
                f"{out} is below docs/, where results are kept that a commit can make again, and in {tree} these files differ "
                f"from the commit: {', '.join(changed[:5])}{more}; commit or stash them, or choose an out elsewhere"
            )


def prepare(
    plan: Plan,
    runs: Iterable[Run],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    portion: Portion = Portion(),
) -> list[Group]:
    """The runs in groups, with their questions; everything that can be refused is refused here.

    Raises:
        TaskError, PolicyError, UnsupportedModelError, RunError: a run cannot run on this model.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.samples_id, []).append(run)
    groups = []
    for alike in grouped.values():
        samples = list(encode_samples(alike[0], tokenizer))
        if not samples:
            raise RunError(f"{alike[0].where}: the task has no samples; check its data")
        check_lengths(samples, alike[0], model, plan.allow_extrapolation)
        prepared = []
        for run in alike:
            try:
                with kvpress.patch(model, list(run.policies)) as handle:
                    shares = handle.shares_prompts and plan.share_prompts
            except (PolicyError, UnsupportedModelError) as error:
                raise type(error)(f"{run.policy} on {run.fields.model}: {error}") from error
            prepared.append(PreparedRun(run, shares, RunStore(plan.out / run.id)))
        chosen = portion.indices
        wanted = [sample for sample in samples if chosen is None or sample.source.index in chosen]
        groups.append(Group(prepared, samples, wanted))
    return groups


def encode_samples(run: Run, tokenizer: "PreTrainedTokenizerBase") -> Iterator[EncodedSample]:
    """The run's samples as token ids."""
    for number, sample in enumerate(run.task.samples(tokenizer)):
        if number == run.fields.samples:
            return
        prompt, tokens = run.task.prompt(sample, tokenizer), run.fields.agreement
        if tokens is not None and sample.max_new_tokens:
            sample = sample.with_answers_of(tokens)
        elif tokens is not None:  # a text that is scored
            prompt = replace(prompt, question=prompt.question[:tokens])
        yield encode_sample(sample, prompt, run.fields.query_aware, tokens is not None)


def check_lengths(samples: list[EncodedSample], run: Run, model: "PreTrainedModel", allow_extrapolation: bool) -> None:
    """Refuse what the model was not made for.

    Raises:
        RunError: a prompt and its answer are longer than the model's positions.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or allow_extrapolation:
        return
    for sample in samples:
        if sample.longest > limit:
            raise RunError(
                f"{run.where}: {run.task.name_of(sample.source)} has {sample.longest} tokens with its answer, and "
                f"{run.fields.model} was made for {limit}; shorten it, give a smaller length, or allow_extrapolation: true"
            )


def run_group(
    plan: Plan,
    group: Group,
    executor: Executor,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    outcome: Outcome,
    advance: "Callable[[PreparedRun, int, bool], None]",
    *,
    retry: bool = False,
    until: float = math.inf,
) -> None:
    """Answer what is missing of a group's runs, sample by sample, or batch by batch of like samples.

    Args:
        outcome: counts on.
        advance: called with the run, how many samples are behind it, and whether they were answered now.
        until: see `Portion`.
    """
    with ExitStack() as locks:
        mine = []
        for prepared in group.runs:
            if not locks.enter_context(prepared.store.locked()):
                outcome.left_to_others += 1
                advance(prepared, len(group.wanted), False)
                continue
            prepared.store.open(prepared.run.to_dict(), describe(model, prepared.run.task.seed))
            check_rows(prepared, group.samples)
            mine.append(prepared)
        for missing, samples in batches(mine, group.wanted, plan.batch_size, retry):
            if time.monotonic() > until:
                break
            for prepared in mine:
                if prepared not in missing:
                    advance(prepared, len(samples), False)
            for prepared, row in answer_all(executor, missing, samples, model, tokenizer):
                prepared.store.add(row)
                outcome.answered += row["error"] is None
                advance(prepared, 1, True)
        for prepared in mine:
            if len(prepared.store.rows) < len(group.samples):
                continue
            prepared.store.finish(len(group.samples))
            outcome.finished += 1
            outcome.failed += sum(row["error"] is not None for row in prepared.store.rows.values())


def batches(
    runs: list[PreparedRun], samples: Iterable[EncodedSample], size: int, retry: bool
) -> Iterator[tuple[list[PreparedRun], list[EncodedSample]]]:
    """The samples, up to `size` of one shape together, with the runs that each of them is missing in."""
    waiting: dict[tuple[Any, ...], list[EncodedSample]] = {}
    for sample in samples:
        rows = [prepared.store.rows.get(sample.source.index) for prepared in runs]
        missing = tuple(i for i, row in enumerate(rows) if row is None or (retry and row["error"] is not None))
        alike = waiting.setdefault((missing, sample.shape), [])
        alike.append(sample)
        if len(alike) == size:
            yield [runs[i] for i in missing], alike
            del waiting[missing, sample.shape]
    for (missing, _), alike in waiting.items():
        yield [runs[i] for i in missing], alike


def check_rows(prepared: PreparedRun, samples: list[EncodedSample]) -> None:
    """Refuse to go on where the rows that are there answer other prompts.

    Raises:
        StoreError: a row's prompt is not the one that the task makes now.
    """
    hashes = {sample.source.index: sample.hash for sample in samples}
    for index, row in prepared.store.rows.items():
        if hashes.get(index) != row["prompt_hash"]:
            raise StoreError(
                f"{prepared.store.folder}: sample {index} was answered for another prompt than {prepared.run.task.label} makes "
                "now; move the folder, and its line in a runs.jsonl beside it, away to make the run anew"
            )


def answer_all(
    executor: Executor,
    runs: list[PreparedRun],
    samples: list[EncodedSample],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> Iterator[tuple[PreparedRun, dict[str, Any]]]:
    """The rows of samples of one shape for each run, as they are made. An error in one is its row, and the others go on."""
    compared = samples[0].compared
    shares = sum(prepared.shares for prepared in runs) > 1 and len(samples[0].prompt) > 1
    shared, failure = None, None
    for share in dict.fromkeys((shares, False)):  # where the first fails, each runs the prompt itself
        if shared is None and (share or compared):
            shared, failure = attempt(partial(executor.record, model, tokenizer, samples, share))
    if shared is None and compared:
        for sample in samples:
            if len(samples) > 1:
                yield from answer_all(executor, runs, [sample], model, tokenizer)
                continue
            for prepared in runs:
                yield prepared, row_of(prepared.run, sample, None, f"full attention, which is compared with: {failure}")
        return
    for prepared in sorted(runs, key=lambda prepared: not prepared.shares):
        if shared is not None and not prepared.shares:
            # no other run needs the prompt: its memory is free for those that run it themselves
            shared = shared.without_prompt() if compared else None
        answers, reason = None, None
        if prepared.batches or len(samples) == 1:
            answers, reason = attempt(
                partial(executor.answer, model, tokenizer, prepared.run.policies, samples, shared)
            )
        if answers is None and len(samples) > 1:  # or it was too much at once, perhaps
            for sample in samples:
                yield from answer_all(executor, [prepared], [sample], model, tokenizer)
            continue
        for sample, found in zip(samples, answers or [None] * len(samples), strict=True):
            yield prepared, row_of(prepared.run, sample, found, reason)


def row_of(run: Run, sample: EncodedSample, found: Answer | None, failure: str | None) -> dict[str, Any]:
    """The row of a sample; `failure` says why there is no answer, None if there is one."""
    row: dict[str, Any] = {
        "index": sample.source.index,
        "prompt_hash": sample.hash,
        "prompt_tokens": sample.length,
        "meta": {key: value for key, value in sample.source.meta.items() if key != "classes"},
    }
    if found is not None:
        measured, failure = attempt(partial(measures, run, sample, found))
        row |= measured or {}
    return row | {"error": failure} | ({} if failure is None else {"score": None})


def measures(run: Run, sample: EncodedSample, found: Answer) -> dict[str, Any]:
    """What a row says of an answer."""
    extra: dict[str, Any] = {}
    if sample.scored:
        mean = math.fsum(found.log_probs) / len(found.log_probs)
        score = math.exp(mean)  # one over the perplexity: the mean probability of a token
        extra["perplexity"] = math.exp(-mean)
    else:
        turns: list[dict[str, Any]] = []
        for turn, asked in enumerate(sample.source.each_turn):
            row: dict[str, Any] = {"answer": found.texts[turn], "answers": list(asked.answers)}
            if sample.compared:
                row |= {"score": statistics.fmean(found.same[turn]), "kl": statistics.fmean(found.divergences[turn])}
            else:
                row["score"] = float(run.task.score(asked, found.texts[turn]))
                row["details"] = run.task.details(asked, found.texts[turn])
            turns.append(row)
        if not sample.compared:
            score = statistics.fmean(turn["score"] for turn in turns)
            extra["cut_off"] = found.cut / len(turns)
            names = dict.fromkeys(name for turn in turns for name in turn["details"])
            extra["details"] = {
                name: statistics.fmean(turn["details"][name] for turn in turns if name in turn["details"])
                for name in names
            } | found.spans
        if len(turns) > 1:
            held = [{name: totals[name] for name in HELD} for totals in found.turn_totals]
            extra["turns"] = [turn | totals for turn, totals in zip(turns, held, strict=True)]
    if sample.compared:  # over tokens, not over turns
        score = statistics.fmean(chain(*found.same))
        extra["kl"] = statistics.fmean(chain(*found.divergences))
    return {
        "answer": "\n\n".join(found.texts),
        "answers": list(sample.source.answers),
        "score": float(score),
        **extra,
        "new_tokens": found.new_tokens,
        **found.totals,
        "prompt_ms": found.prompt_ms,
        "token_ms": found.token_ms,
        "shared_prompt": found.shared,
        "batch": found.batch,
    }


class Lines:
    """Progress where there is no terminal: a line every half minute.

    Args:
        console: where to; nothing is written to a terminal, which has a bar.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._next = console, time.monotonic() + SECONDS_PER_LINE

    def tell(self, progress: Progress) -> None:
        """Write how far the last task is, if it is time."""
        if not self._console.is_terminal and time.monotonic() > self._next:
            self._next = time.monotonic() + SECONDS_PER_LINE
            task = progress.tasks[-1]
            self._console.print(
                f"{task.completed:.0f} of {task.total:.0f}: {task.description}", highlight=False, soft_wrap=True
            )


def _advance(progress: Progress, lines: Lines, bar: Any, prepared: PreparedRun, steps: int, now: bool) -> None:
    scores = [row["score"] for row in prepared.store.rows.values() if row["score"] is not None]
    score = f", {sum(scores) / len(scores):.2f} over {len(scores)}" if scores and now else ""
    progress.update(bar, advance=steps, description=f"{prepared.run.where}: {prepared.run.policy}{score}", refresh=now)
    lines.tell(progress)
