"""The tasks, one file each, and how to make one by name."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from kvpress import outside
from kvpress.errors import nearest
from kvpress.evals.task import Task, TaskError
from kvpress.evals.tasks.infinitebench import InfiniteBench
from kvpress.evals.tasks.instructions import Instructions
from kvpress.evals.tasks.json_lines import JsonLines
from kvpress.evals.tasks.kv_retrieval import KVRetrieval
from kvpress.evals.tasks.longbench import LongBench
from kvpress.evals.tasks.longbench_v2 import LongBenchV2
from kvpress.evals.tasks.needle import Needle
from kvpress.evals.tasks.needle_threads import NeedleThreads
from kvpress.evals.tasks.paraphrased_needle import ParaphrasedNeedle
from kvpress.evals.tasks.passkey import Passkey
from kvpress.evals.tasks.perplexity import Perplexity
from kvpress.evals.tasks.reasoning import Reasoning
from kvpress.evals.tasks.ruler import Ruler
from kvpress.evals.tasks.scbench import SCBench

__all__ = [
    "TASKS",
    "InfiniteBench",
    "Instructions",
    "JsonLines",
    "KVRetrieval",
    "LongBench",
    "LongBenchV2",
    "Needle",
    "NeedleThreads",
    "ParaphrasedNeedle",
    "Passkey",
    "Perplexity",
    "Reasoning",
    "Ruler",
    "SCBench",
    "find_task",
    "import_tasks",
    "make_task",
    "task_origin",
    "tasks_to_import",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        InfiniteBench,
        Instructions,
        JsonLines,
        KVRetrieval,
        LongBench,
        LongBenchV2,
        Needle,
        NeedleThreads,
        ParaphrasedNeedle,
        Passkey,
        Perplexity,
        Reasoning,
        Ruler,
        SCBench,
    )
}


OUTSIDE = outside.Kind("task", Task, "kvpress.tasks", "kvpress.evals.tasks", "kvpress.evals.Task", TaskError)


def find_task(name: Any) -> type[Task]:
    """The class that is meant by a name, a dotted path (package.module:MyTask) or a file (./my_task.py:MyTask).

    Names are the package's, those that installed distributions registered as entry points of the group `kvpress.tasks`, and
    those of imported subclasses of `Task`.

    Raises:
        TaskError: there is none, or the name means two.
    """
    found: type[Task] = outside.find_class(name, TASKS, OUTSIDE)
    return found


def task_origin(task: Task) -> str:
    """Where a task's class comes from if that is not the package: class and hash of the file that defines it; else empty."""
    return outside.identity(type(task)) if outside.is_outside(type(task), OUTSIDE) else ""


def tasks_to_import(tasks: Iterable[Task]) -> dict[str, str]:
    """What another process has to import (see `import_tasks`) before it can unpickle these tasks: path -> origin."""
    return outside.to_import(map(type, tasks), OUTSIDE)


def import_tasks(wanted: Mapping[str, str]) -> None:
    """Import the classes that another process found with `tasks_to_import`.

    Raises:
        TaskError: one cannot be imported here, or is defined by other code than there.
    """
    outside.import_all(wanted, OUTSIDE)


def make_task(spec: Task | str | Mapping[str, Any]) -> Task:
    """Build a task.

    Args:
        spec: a task (returned as it is), a name, a class of your own as "package.module:MyTask" or "./my_task.py:MyTask", or a
            mapping such as {"name": "ruler", "task": "vt", "length": 4096} with such a name; lists in it may stand for tuples.

    Raises:
        TaskError: an unknown name or field (with the nearest one), a class that cannot be imported, a missing field, or a value
            out of range.
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    known_tasks = ", ".join(outside.names(TASKS, OUTSIDE))
    if not isinstance(spec, Mapping):
        raise TaskError(f"{spec!r} is no task; give a name or a mapping with name: one of {known_tasks}")
    values = dict(spec)
    name = values.pop("name", None)
    if name is None:
        raise TaskError(f"{dict(spec)!r} has no name; add name: one of {known_tasks}")
    cls = find_task(name)
    known = [field.name for field in fields(cls)]
    for key, value in values.items():
        if key not in known:
            raise TaskError(f"{name} has no field {key!r}{nearest(str(key), known)}")
        if isinstance(value, list):
            values[key] = tuple(value)
    return cls(**values)
