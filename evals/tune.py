"""Which policy at which budget: a search over policies and budgets on a user's own texts, within limits.

First every candidate's cache and time per token are measured at the wanted context, on the user's texts joined. Those within the
limits are then compared with full attention on the texts themselves, on 8 rows, 16, 32, ... After each round the candidates
that can no longer win are dropped, by differences on the same rows that are beyond chance. All of it are runs as `kvpress ablate`
makes them: started again, the search goes on where it was.
"""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console

import kvpress
from kvpress.evals.candidates import Candidate, Tuned, interval, points, size
from kvpress.evals.config import Plan, Run, make_plan
from kvpress.evals.environment import describe
from kvpress.evals.executor import Loader
from kvpress.evals.metrics import check_library
from kvpress.evals.request import BUDGETS, POLICIES, PREFER, Limits, Request, TuneError, read_share, read_size
from kvpress.evals.runner import Portion, RunError, encode_samples, refusal, run_plan
from kvpress.evals.statistics import Difference, Estimate, difference, spread
from kvpress.evals.store import ResultsFolder, make_folder, write_whole
from kvpress.evals.sweep import grids
from kvpress.evals.tune_page import write_page
from kvpress.models import load_model
from kvpress.registry import policy_spec

FIRST_ROUND = 8
"""Rows of the first round."""
STEPS = 32
"""Tokens that are fed one by one when costs are measured."""


def tune(
    model: str,
    data: str | Path,
    *,
    out: str | Path = "tuned.yaml",
    memory: int | str | None = None,
    ms_per_token: float | None = None,
    max_loss: float | str | None = None,
    context: int | None = None,
    policies: Sequence[Any] = POLICIES,
    budgets: Sequence[Any] = BUDGETS,
    metric: str = "",
    columns: Mapping[str, str] | None = None,
    agreement: int = 32,
    samples: int | None = None,
    minutes: float | None = None,
    prefer: str | None = None,
    seed: int = 0,
    query_aware: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    settings: Sequence[str] = (),
    console: Console | None = None,
    loader: Loader = load_model,
) -> Tuned:
    """Find the policy and the budget for a model, texts and limits, and write it where `kvpress.patch` can take it.

    The loss of a policy is measured without labels: full attention's own continuation of each text is fed token by token under
    the policy, and a token counts as lost where another one is the most likely. With a `metric` the answers are scored too,
    and `max_loss` holds for both.

    Args:
        model: hub name or folder of a causal LM, or "smollm2".
        data: a JSON lines file (see `kvpress.evals.tasks.JsonLines`), or the name of a data set on the hub.
        out: the YAML file. The page (.html) and the runs (.runs) lie beside it.
        memory: bytes that the cache of one sequence may have at `context`; "2GiB" and "500MB" are understood.
        ms_per_token: what a decode step may take there.
        max_loss: share of tokens, or of the metric, that may be lost; "1%" is understood.
        context: tokens of the contexts that memory and time are measured at; the longest row's by default.
        policies: names, mappings, YAML files, or classes of your own; full attention is always among them.
        budgets: each meets each policy that takes one: shares, or entries. A policy that takes entries only gets a share of the
            context.
        metric: of the rows' answers.
        columns: what the rows call theirs.
        agreement: how many tokens of full attention's continuation are compared, at most.
        samples: the first so many rows; None for all.
        minutes: after so much time no further row is begun; None for no end.
        prefer: what is best of all that meets the limits: the least "loss", "memory" or "time". By default the least memory where
            `max_loss` is given, else the least loss.
        seed: of the order of the rows.
        query_aware: whether the prompt that is compressed holds the question.
        device: as for `kvpress.models.load_model`.
        dtype: as there.
        settings: other fields of the runs, as NAME=VALUE ("task.chat=false").
        console: where progress goes; None for nowhere.
        loader: makes the model and its tokenizer.

    Raises:
        TuneError, ConfigError, TaskError, RunError, StoreError, PolicyError, ModelLoadError: what cannot work, before it begins.

    Example:
        >>> found = kvpress.tune("smollm2", "my.jsonl", memory="20MiB", context=4000)
        >>> print(found.sentence)
        >>> kvpress.patch(model, found.path)
    """
    limits = Limits(read_size(memory), ms_per_token, read_share(max_loss))
    prefer = prefer or ("loss" if limits.max_loss is None else "memory")
    if prefer not in PREFER:
        raise TuneError(f"prefer={prefer!r} is not known; give one of {', '.join(PREFER)}")
    if prefer != "loss" and limits.max_loss is None:
        raise TuneError(
            f"prefer={prefer!r} without max_loss would take the smallest budget whatever it loses; give max_loss"
        )
    if minutes is not None and minutes <= 0:
        raise TuneError(f"minutes={minutes} is no time; give a number above 0, or leave it out")
    if not policies or not budgets:
        raise TuneError("no policies, or no budgets, to search; give at least one, or leave them out")
    specs = tuple(policy_spec(one) if isinstance(one, kvpress.Policy) else one for one in policies)
    path = Path(out)
    if path.suffix not in (".yaml", ".yml"):
        raise TuneError(f"out={str(out)!r} is no YAML file; give a name that ends with .yaml")
    request = Request(
        model, str(data), limits, path, context, specs, tuple(budgets), metric, dict(columns or {}), agreement,
        samples, minutes, prefer, seed, query_aware, device, dtype, tuple(settings),
    )  # fmt: skip
    search = Search(request, console or Console(quiet=True), loader)
    make_folder(request.runs)
    with _alone(request):
        return search.run()


@contextmanager
def _alone(request: Request) -> Iterator[None]:
    """One search at a time writes there."""
    lock = FileLock(str(request.runs / ".tune.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TuneError(
            f"another kvpress tune is writing {request.runs} now; wait until it ends (started again, this one uses what it "
            "measured), or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


class Search:
    """One search: its plans, and the candidates as far as they are measured.

    Raises:
        ConfigError, TaskError, PolicyError, TuneError: candidates or rows that cannot work.
    """

    def __init__(self, request: Request, console: Console, loader: Loader) -> None:
        self.request, self.console, self.loader = request, console, loader
        self.notes: list[str] = []
        self.plans: dict[str, Plan] = {"agreement": self._plan({"agreement": request.agreement})}
        self.plans["agreement"].runs[0].task.check(scored=bool(request.metric))
        if request.metric:
            self.plans["metric"] = self._plan({})
            check_library(request.metric)

    def run(self) -> Tuned:
        """Measure, decide, and write the files."""
        request = self.request
        with self.console.status(f"loading {request.model}"):
            self.model, self.tokenizer = self.loader(*self._place)
        self.context = self._check_rows()
        self.plans["cost"] = self._cost_plan()
        ids = zip(*(plan.runs for plan in self.plans.values()), strict=True)
        self.candidates = [Candidate(dict(zip(self.plans, runs, strict=True))) for runs in ids]
        self.full = next(candidate for candidate in self.candidates if candidate.is_full)
        self._refuse_what_cannot_run()
        self._measure_costs()
        self._measure_losses()
        return self._decide()

    @property
    def _place(self) -> tuple[str, str, str]:
        run = self.plans["agreement"].runs[0]
        return run.model.name, run.model.device, run.model.dtype

    @cached_property
    def order(self) -> list[int]:
        """The rows in the order in which rounds take them."""
        order = list(range(self.row_count))
        random.Random(f"kvpress tune {self.request.seed}").shuffle(order)
        return order

    def _plan(self, fields: dict[str, Any], task: dict[str, Any] | None = None) -> Plan:
        """The runs of all candidates for one thing that is measured, in the same order for each."""
        request = self.request
        defaults = {
            "model": request.model,
            "device": request.device,
            "dtype": request.dtype,
            "task": task or request.task,
            "query_aware": request.query_aware,
            **({} if request.samples is None or task else {"samples": request.samples}),
            **fields,
        }
        settings = [one for one in request.settings if task is None or not one.startswith("task.")]
        sweep = grids(request.policies, request.budgets, request.context)
        tree = {"out": str(request.runs), "defaults": defaults, "sweep": sweep}
        return make_plan(tree, {(): "kvpress tune"}, settings)

    def _check_rows(self) -> int:
        """How many tokens the contexts have that costs are measured at; refuses rows and contexts that are too long."""
        run = self.plans["agreement"].runs[0]
        samples = list(encode_samples(run, self.tokenizer))
        self.row_count, lengths = len(samples), [sample.longest for sample in samples]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        context = self.request.context or max(lengths)
        if max(lengths) > context:
            row = run.task.name_of(samples[longest].source)
            raise TuneError(
                f"{row} has {max(lengths)} tokens with its answer, and --context says {context}; raise it, or shorten the row"
            )
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and context > limit:
            raise TuneError(f"--context {context}, but {self.request.model} was made for {limit} tokens; lower it")
        if context < 2:
            raise TuneError(f"--context {context} is no context; give at least 2 tokens")
        middle = sorted(lengths)[len(lengths) // 2]
        if middle < context / 2:
            self.notes.append(
                f"Half of the rows have fewer than {middle:,} tokens, and the context is {context:,}: the loss at such lengths is "
                "not measured. Longer rows would tell."
            )
        if self.row_count < 20:
            self.notes.append(f"{self.row_count} rows tell only large differences apart; 40 or more are better.")
        return context

    def _cost_plan(self) -> Plan:
        """One text of the context's length: the rows' own, one after the other, again and again if they are too short."""
        run = self.plans["agreement"].runs[0]
        texts = [f"{sample.context}{sample.question}" for sample in run.task.samples(self.tokenizer)]
        text = "\n\n".join(texts)
        have = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        text = "\n\n".join([text] * (self.context // max(1, have - 1) + 1))
        path = self.request.runs / "joined.txt"
        write_whole(path, text)
        scored = min(STEPS, self.context // 2)
        task = {
            "name": "perplexity",
            "text": str(path),
            "length": self.context - scored,
            "scored": scored,
            "stretches": 1,
        }
        return self._plan({"query_aware": False}, task)

    def _refuse_what_cannot_run(self) -> None:
        for candidate in self.candidates:
            error = refusal(candidate.runs["cost"], self.model)
            if error is not None and candidate.is_full:
                raise error
            candidate.out = "" if error is None else f"cannot act on this model: {error}"

    def _run(self, name: str, candidates: Sequence[Candidate], portion: Portion) -> None:
        """Answer what is missing of the candidates' runs of one plan."""
        runs = tuple(candidate.runs[name] for candidate in candidates)
        outcome = run_plan(
            replace(self.plans[name], runs=runs),
            self.console,
            retry=True,
            loader=lambda *_: (self.model, self.tokenizer),
            portion=portion,
        )
        if outcome.left_to_others:
            raise RunError(f"another process writes runs in {self.request.runs}; wait until it ends")

    def _measure_costs(self) -> None:
        alive = [candidate for candidate in self.candidates if not candidate.out]
        self._say(f"{len(alive)} candidates: cache and time per token at {self.context:,} tokens")
        self._run("cost", alive, Portion())
        results, limits = ResultsFolder(self.request.runs), self.request.limits
        for candidate in alive:
            row = results.rows(candidate.runs["cost"].id)[0]
            if row["error"] is not None:
                candidate.out = f"failed at {self.context:,} tokens: {row['error']}"
                continue
            candidate.bytes, candidate.full_bytes, candidate.ms = row["bytes"], row["full_bytes"], row["token_ms"]
            over = []
            if limits.memory is not None and row["bytes"] > limits.memory:
                over.append(f"its cache has {size(row['bytes'])}, the limit is {size(limits.memory)}")
            if limits.ms_per_token is not None and (row["token_ms"] or 0.0) > limits.ms_per_token:
                over.append(f"a token takes {row['token_ms']:.1f} ms, the limit is {limits.ms_per_token:g} ms")
            candidate.out = "; ".join(over)
        if all(candidate.out for candidate in self.candidates):
            nearest = min((c for c in alive if c.bytes is not None), key=self._excess, default=None)
            if nearest is not None:
                nearest.out = ""  # its loss is worth knowing

    def _excess(self, candidate: Candidate) -> float:
        """How many times the limits of memory and time a candidate needs, at the worst."""
        limits, parts = self.request.limits, [0.0]
        if limits.memory is not None:
            parts.append((candidate.bytes or 0) / limits.memory)
        if limits.ms_per_token is not None:
            parts.append((candidate.ms or 0.0) / limits.ms_per_token)
        return max(parts)

    def _measure_losses(self) -> None:
        """Rounds over more and more rows, until one candidate is left, the rows are all used, or the time is over."""
        minutes = self.request.minutes
        until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        count = min(FIRST_ROUND, self.row_count)
        while True:
            alive = [candidate for candidate in self.candidates if not candidate.out]
            rows = self.order[:count]
            self._say(f"{len(alive)} candidates on {count} of {self.row_count} rows")
            measured = [self.full, *(candidate for candidate in alive if not candidate.is_full)]
            for name in self.plans:
                if name != "cost":
                    self._run(name, measured, Portion(frozenset(rows), until))
            self._take_up(measured, rows)
            self._drop(alive)
            alive = [candidate for candidate in alive if not candidate.out]
            if time.monotonic() > until:
                self.notes.append(
                    f"The time ({minutes:g} minutes) was over before all {self.row_count} rows were used."
                )
                break
            if count == self.row_count or not alive or (len(alive) == 1 and self._is_certain(alive[0])):
                break
            count = min(2 * count, self.row_count)

    def _is_certain(self, candidate: Candidate) -> bool:
        limit = self.request.limits.max_loss
        return limit is None or candidate.most_loss <= limit or candidate.least_loss > limit

    def _scores(self, results: ResultsFolder, run: Run, rows: Sequence[int], name: str = "score") -> dict[int, float]:
        found = results.rows(run.id)
        return {i: found[i][name] for i in sorted(rows) if i in found and found[i]["error"] is None}

    def _take_up(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> None:
        """What the rows say of each candidate."""
        results = ResultsFolder(self.request.runs)
        for candidate in candidates:
            for name in self.plans:
                if name == "cost":
                    continue
                own, full = (self._scores(results, c.runs[name], rows) for c in (candidate, self.full))
                apart = difference([own], [full])
                if candidate.is_full and apart is not None:  # compared with itself
                    candidate.losses[name] = Estimate(0.0, 0.0, 0.0, apart.n)
                elif apart is not None:
                    candidate.losses[name] = Estimate(-apart.mean, -apart.high, -apart.low, apart.n)
                failed = [i for i in rows if i in full and i not in own and i in results.rows(candidate.runs[name].id)]
                if failed and not candidate.is_full:
                    reason = results.rows(candidate.runs[name].id)[failed[0]]["error"]
                    candidate.out = f"failed on {len(failed)} rows: {reason}"
            divergences = self._scores(results, candidate.runs["agreement"], rows, "kl")
            candidate.kl = spread(list(divergences.values())) if divergences else None
        if not self.full.losses:
            if not any(results.rows(self.full.runs[name].id) for name in self.plans if name != "cost"):
                raise TuneError(
                    f"the time ({self.request.minutes:g} minutes) was over before a row was measured; give more, or fewer "
                    "policies; what was measured is kept"
                )
            raise RunError(
                f"full attention failed on every row, and nothing can be compared; the rows in {self.request.runs} say why"
            )
        self.measured_rows = rows

    def _drop(self, alive: Sequence[Candidate]) -> None:
        """Note of each candidate that cannot win any more why not."""
        limit, known = self.request.limits.max_loss, [c for c in alive if c.losses and not c.out]
        for candidate in known:
            if limit is not None and candidate.least_loss > limit:
                candidate.out = f"loses {interval(candidate)}, more than {limit:.2%} beyond chance"
        known = [candidate for candidate in known if not candidate.out]
        if self.request.prefer == "loss":
            leader = min(known, key=self._rank, default=None)
            for candidate in known:
                apart = None if candidate is leader or leader is None else self._apart(candidate, leader)
                if apart is not None and apart.significant and apart.mean < 0:
                    candidate.out = f"loses more than {leader.label if leader else ''}: {points(apart)}"
        elif limit is not None:
            for candidate in known:
                sure = [c for c in known if c.most_loss <= limit and self._rank(c) < self._rank(candidate)]
                if sure:
                    best = min(sure, key=self._rank)
                    candidate.out = (
                        f"costs more than {best.label}, which loses at most {best.most_loss:.2%} beyond chance"
                    )

    def _apart(self, candidate: Candidate, other: Candidate) -> Difference | None:
        """How much better a candidate agrees than another, on the same rows."""
        results = ResultsFolder(self.request.runs)
        own, its = (self._scores(results, c.runs["agreement"], self.measured_rows) for c in (candidate, other))
        return difference([own], [its])

    def _rank(self, candidate: Candidate) -> tuple[float, ...]:
        """The smaller the better, of those within the limits."""
        kl = math.inf if candidate.kl is None else candidate.kl.mean
        cost = {"loss": candidate.loss, "memory": candidate.bytes or 0, "time": candidate.ms or 0.0}
        return cost[self.request.prefer], candidate.loss, kl, candidate.bytes or 0, self.candidates.index(candidate)

    def _decide(self) -> Tuned:
        limit = self.request.limits.max_loss
        known = [c for c in self.candidates if len(c.losses) == len(self.plans) - 1 and c.bytes is not None]
        within = [c for c in known if self._excess(c) <= 1]
        good = [c for c in within if not c.out and (limit is None or c.loss <= limit)]
        meets = bool(good)
        chosen: Candidate | None
        if meets:
            chosen = min(good, key=self._rank)
        elif within:
            chosen = min(within, key=lambda candidate: candidate.loss)
        else:
            chosen = min(known, key=self._excess, default=None)
        reasons = {c.label: self._reason(c, chosen) for c in self.candidates if c is not chosen}
        path = None
        if meets and chosen is not None:
            path = self.request.out
            text = yaml.safe_dump(policy_spec(chosen.policy), sort_keys=False)
            write_whole(path, f"# {self.request.command}\n{text}")
        found = Tuned(
            self.request, chosen, meets, self._sentence(chosen, meets, good), self.notes, self.candidates, path,
            self.request.page, self.context, self._machine(), reasons,
        )  # fmt: skip
        write_page(found)
        return found

    def _machine(self) -> str:
        there = describe(self.model, self.request.seed)
        return f"{there['dtype']} on {there['hardware']}"

    def _reason(self, candidate: Candidate, chosen: Candidate | None) -> str:
        """Why a candidate was not chosen."""
        if candidate.out:
            return candidate.out
        limit = self.request.limits.max_loss
        if candidate.bytes is None or not candidate.losses or chosen is None:
            return "the time was over before it was measured"
        if limit is not None and candidate.loss > limit:
            return f"loses {interval(candidate)}; the limit is {limit:.2%}, and more rows may put it within"
        if self.request.prefer == "memory":
            return f"its cache has {size(candidate.bytes)}, {size(candidate.bytes - (chosen.bytes or 0))} more"
        if self.request.prefer == "time":
            return f"a token takes {(candidate.ms or 0) - (chosen.ms or 0):.1f} ms more"
        apart = self._apart(candidate, chosen)
        return "" if apart is None else f"not better: {points(apart)}{'' if apart.significant else ' (n.s.)'}"

    def _sentence(self, chosen: Candidate | None, meets: bool, good: Sequence[Candidate]) -> str:
        """The recommendation, what it costs, and how sure it is."""
        if chosen is None:
            return "No candidate could be measured; the reasons are in the table."
        cost = (
            f"at {self.context:,} tokens its cache has {size(chosen.bytes or 0)} (full attention {size(self.full.bytes or 0)}) "
            f"and a token takes {chosen.ms or 0:.1f} ms ({self.full.ms or 0:.1f} ms); "
            + (
                f"it is what the loss is measured against, on {chosen.rows} rows"
                if chosen.is_full
                else f"it loses {interval(chosen)} of full attention's tokens, on {chosen.rows} rows"
            )
        )
        if not meets:
            limit, over = self.request.limits, []
            if limit.memory is not None and (chosen.bytes or 0) > limit.memory:
                over.append(f"memory {size(limit.memory)}")
            if limit.ms_per_token is not None and (chosen.ms or 0) > limit.ms_per_token:
                over.append(f"{limit.ms_per_token:g} ms per token")
            if limit.max_loss is not None and chosen.loss > limit.max_loss:
                over.append(f"a loss of {limit.max_loss:.2%}")
            return f"Nothing meets the limits. {chosen.label} comes nearest, and misses {' and '.join(over)}: {cost}."
        limit_loss = self.request.limits.max_loss
        sure = ""
        if limit_loss is not None and chosen.most_loss > limit_loss:
            sure = (
                f" Chance may have put it within {limit_loss:.2%}: up to {chosen.most_loss:.2%} is possible, and more rows would "
                "tell."
            )
        if self.request.prefer == "loss":
            tied = []
            for other in good:
                apart = None if other is chosen else self._apart(other, chosen)
                if apart is not None and not apart.significant:
                    tied.append(other.label)
            if tied:
                sure += (
                    f" These rows do not tell it from {', '.join(tied[:3])}{' and others' if len(tied) > 3 else ''}."
                )
        what = (
            "Full attention itself meets the limits, no policy is needed" if chosen.is_full else f"Take {chosen.label}"
        )
        return f"{what}: {cost}.{sure}"

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
