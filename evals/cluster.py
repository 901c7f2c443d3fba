"""Make a plan's runs on the workers of a Ray cluster: each run is a task, and each worker keeps the model it has loaded.

Results lie in the same directories, with the same locks and the same resume, as those of a local run; so `out` must be a
folder that every node sees. What a lost worker had answered is there, and another one goes on with it.
"""

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvpress.evals.answer import free_memory
from kvpress.evals.config import ModelSpec, Plan, RayOptions, Run
from kvpress.evals.locations import variables
from kvpress.evals.runner import Outcome, RunError, check_clean, pending, run_plan
from kvpress.evals.store import StoreError, write_whole
from kvpress.evals.tasks import import_tasks, tasks_to_import
from kvpress.models import load_model
from kvpress.registry import import_all, to_import

PATIENCE = 60.0
"""Seconds that a run waits for the lock of a lost worker, which a file server may hold a little longer."""


class Worker:
    """A process of the cluster: makes runs one after the other, and loads a model only if it is another one."""

    def __init__(self, folder: str, variables: dict[str, str]) -> None:
        os.environ.update(variables)
        if Path(folder).is_dir():
            os.chdir(folder)  # relative paths of models and data mean the same as where the run was started
        self._loaded: tuple[Any, Any] | None = None

    def sees(self, mark: str, policies: dict[str, str], tasks: dict[str, str]) -> tuple[str, bool]:
        """This node's name, and whether it has the file. Imports the policies and tasks, which plans that are sent here name
        only."""
        import_all(policies)
        import_tasks(tasks)
        return os.uname().nodename, Path(mark).is_file()

    def run(self, plan: Plan, retry: bool, patience: float) -> Outcome:
        """Make the plan's run; if another process writes it, try again for `patience` seconds."""
        until = time.monotonic() + patience
        while True:
            outcome = run_plan(plan, Console(quiet=True), retry=retry, loader=self._load)
            if not outcome.left_to_others or time.monotonic() > until:
                return outcome
            time.sleep(1)

    def _load(self, *names: str, **placement: Any) -> Any:
        wanted = names, placement
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None
            free_memory()
            self._loaded = wanted, load_model(*names, **placement)
        return self._loaded[1]


def run_on_ray(plan: Plan, console: Console | None = None, *, retry: bool = False) -> Outcome:
    """Answer every sample of every run that has no row yet, run by run on a cluster's workers.

    Each run makes its own prompt passes.

    Args:
        retry: answer those again that failed.

    Raises:
        RunError: Ray is missing, there is no cluster at the address, no node has what a worker needs (any more), a node does
            not see the results' folder, or workers cannot start.
        ConfigError, TaskError, PolicyError, UnsupportedModelError, ModelLoadError, RunError, StoreError: as `run`; what is
            answered until then is kept.
    """
    console = console or Console()
    outcome = Outcome()
    plan = replace(plan, out=plan.out.resolve())
    missing = pending(plan, outcome, retry)
    if not missing:
        return outcome
    check_clean(plan.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _connected(plan.ray) as ray, _marked(plan.out) as mark, progress:
        bar = progress.add_task("runs", total=len(missing))
        for done in _WorkerPool(ray, plan, missing, mark, retry):
            for field in fields(Outcome):
                setattr(outcome, field.name, getattr(outcome, field.name) + getattr(done, field.name))
            progress.advance(bar)
    return outcome


@dataclass
class _WorkerHandle:
    """A worker of the cluster: its Ray actor, and the model that it has loaded."""

    actor: Any
    model: ModelSpec | None = None


class _WorkerPool:
    """Workers, and the runs that they make; iterating gives each run's outcome as it is done."""

    def __init__(self, ray: Any, plan: Plan, runs: list[Run], mark: Path, retry: bool) -> None:
        self._ray, self._plan, self._waiting, self._mark, self._retry = ray, plan, runs, mark, retry
        self._attempts = dict.fromkeys((run.id for run in runs), 0)
        self._needs = _needs(ray, plan.ray, runs)
        found = {name for run in runs for name in variables(run.fields.model)}
        actor = ray.remote(num_cpus=self._needs["CPU"], num_gpus=self._needs["GPU"], max_restarts=0)(Worker)
        self._make = lambda: actor.remote(os.getcwd(), {name: os.environ[name] for name in found})
        self._policies = to_import(policy for run in runs for policy in run.policies)
        self._tasks = tasks_to_import(run.task for run in runs)
        self._starting: dict[Any, _WorkerHandle] = {}
        self._idle: list[_WorkerHandle] = []
        self._busy: dict[Any, tuple[_WorkerHandle, Run]] = {}
        self._failed_starts = 0

    def __iter__(self) -> Iterator[Outcome]:
        try:
            while self._waiting or self._busy:
                self._start()
                self._assign()
                refs = [*self._starting, *self._busy]
                done, _ = self._ray.wait(refs, timeout=5)  # then look again what room there is
                for ref in done:
                    if ref in self._starting:
                        self._started(ref)
                    elif (outcome := self._ended(ref)) is not None:
                        yield outcome
        finally:
            workers = [*self._starting.values(), *self._idle, *(worker for worker, _ in self._busy.values())]
            for worker in workers:
                self._ray.kill(worker.actor)

    def _start(self) -> None:
        """Start as many workers as there is room and work for."""
        room = sum(_fitting(node, self._needs) for node in _nodes(self._ray))
        if self._plan.ray.workers is not None:
            room = min(room, self._plan.ray.workers)
        here = len(self._starting) + len(self._idle) + len(self._busy)
        if not room and not here:
            raise RunError(
                f"{_lacking(self._ray, self._needs)}; what was answered is kept: started again, the run goes on"
            )
        for _ in range(min(room, len(self._waiting) + len(self._busy)) - here):
            worker = _WorkerHandle(self._make())
            self._starting[worker.actor.sees.remote(str(self._mark), self._policies, self._tasks)] = worker

    def _started(self, ref: Any) -> None:
        worker = self._starting.pop(ref)
        try:
            name, sees = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # a policy that cannot be imported there
            raise (error.cause or error) from None
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= self._plan.ray.attempts:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise RunError(
                    f"{self._failed_starts} workers could not start ({lines[-1] if lines else type(error).__name__}); every node "
                    "needs kvpress-toolkit[ray] in the same Python"
                ) from error
            return
        self._failed_starts = 0
        if not sees:
            raise RunError(
                f"node {name} does not see {self._plan.out}; out must be a folder that all nodes share (and writable on each)"
            )
        self._idle.append(worker)

    def _assign(self) -> None:
        """Give each idle worker a run, if there is one of the model that it has loaded."""
        while self._idle and self._waiting:
            worker = self._idle.pop()
            run = next((run for run in self._waiting if run.model == worker.model), self._waiting[0])
            self._waiting.remove(run)
            worker.model = run.model
            patience = PATIENCE if self._attempts[run.id] else 0.0
            self._attempts[run.id] += 1
            alone = replace(self._plan, runs=(run,), launcher="local")
            self._busy[worker.actor.run.remote(alone, self._retry, patience)] = worker, run

    def _ended(self, ref: Any) -> Outcome | None:
        """A run's outcome; None if its worker was lost and the run waits again."""
        worker, run = self._busy.pop(ref)
        try:
            outcome: Outcome = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # what the run itself refused
            self._ray.kill(worker.actor)
            raise (error.cause or error) from None
        except self._ray.exceptions.RayError:  # the worker, or its node, is gone
            self._ray.kill(worker.actor)
            if self._attempts[run.id] >= self._plan.ray.attempts:
                return Outcome(lost=1)
            self._waiting.insert(0, run)
            return None
        self._idle.append(worker)
        return outcome


@contextmanager
def _connected(options: RayOptions) -> Iterator[Any]:
    """Ray, connected to the cluster at the address, to one that runs here, or to one started for this block."""
    try:
        import ray
    except ImportError as error:
        raise RunError("launcher: ray needs Ray; run: pip install 'kvpress-toolkit[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    address = options.address or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdigit():  # where nobody listens Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # no server, no right, another version: they have no common class
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunError(
            f"cannot connect to a Ray cluster at {address} ({first}); start one (ray start --head), or give ray.address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _marked(out: Path) -> Iterator[Path]:
    """A file in the results' folder by which workers tell that it is the same one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {out} ({error.strerror}); choose another out") from error
    mark = out / f".shared-{uuid.uuid4().hex}"
    write_whole(mark, "")
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _needs(ray: Any, options: RayOptions, runs: list[Run]) -> dict[str, float]:
    """What a worker needs of a node.

    Raises:
        RunError: no node has that.
    """
    gpus = options.num_gpus
    if gpus is None:
        may_use = any(run.fields.device != "cpu" for run in runs)
        gpus = float(may_use and any(node.get("GPU", 0) >= 1 for node in _nodes(ray)))
    needs = {"CPU": options.num_cpus, "GPU": gpus}
    if not any(_fitting(node, needs) for node in _nodes(ray)):
        raise RunError(_lacking(ray, needs))
    return needs


def _nodes(ray: Any) -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fitting(node: dict[str, float], needs: dict[str, float]) -> int:
    """How many workers fit on an empty node."""
    return min(int(node.get(name, 0) / number) for name, number in needs.items() if number)


def _lacking(ray: Any, needs: dict[str, float]) -> str:
    nodes = _nodes(ray)
    have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "none"
    return (
        f"no node has ray.num_cpus={needs['CPU']:g} and ray.num_gpus={needs['GPU']:g} for a worker (nodes: {have}); lower them, or "
        "add a node"
    )
