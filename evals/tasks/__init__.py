"""The tasks, one file each, and how to make one by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kvpress.errors import nearest
from kvpress.evals.task import Task, TaskError
from kvpress.evals.tasks.infinitebench import InfiniteBench
from kvpress.evals.tasks.kv_retrieval import KVRetrieval
from kvpress.evals.tasks.longbench import LongBench
from kvpress.evals.tasks.needle import Needle
from kvpress.evals.tasks.needle_threads import NeedleThreads
from kvpress.evals.tasks.passkey import Passkey
from kvpress.evals.tasks.perplexity import Perplexity
from kvpress.evals.tasks.ruler import Ruler

__all__ = [
    "TASKS",
    "InfiniteBench",
    "KVRetrieval",
    "LongBench",
    "Needle",
    "NeedleThreads",
    "Passkey",
    "Perplexity",
    "Ruler",
    "make_task",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (InfiniteBench, KVRetrieval, LongBench, Needle, NeedleThreads, Passkey, Perplexity, Ruler)
}


def make_task(spec: Task | str | Mapping[str, Any]) -> Task:
    """Build a task.

    Args:
        spec: a task (returned as it is), a name, or a mapping such as {"name": "ruler", "task": "vt", "length": 4096}; lists
            in it may stand for tuples.

    Raises:
        TaskError: an unknown name or field (with the nearest one), a missing field, or a value out of range.
    """
    if isinstance(spec, Task):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TaskError(f"{spec!r} is no task; give a name or a mapping with name: one of {', '.join(TASKS)}")
    values = dict(spec)
    name = values.pop("name", None)
    if name is None:
        raise TaskError(f"{dict(spec)!r} has no name; add name: one of {', '.join(TASKS)}")
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}{nearest(str(name), list(TASKS))}")
    known = [field.name for field in fields(TASKS[name])]
    for key, value in values.items():
        if key not in known:
            raise TaskError(f"{name} has no field {key!r}{nearest(str(key), known)}")
        if isinstance(value, list):
            values[key] = tuple(value)
    return TASKS[name](**values)
