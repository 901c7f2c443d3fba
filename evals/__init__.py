"""Evaluation tasks and their metrics: what to ask a model, and how right its answer is.

>>> from kvpress.evals import make_task
>>> task = make_task({"name": "needle", "lengths": [4000], "depths": [0, 0.5, 1]})
>>> for sample in task.samples(tokenizer):
...     prompt = task.prompt(sample, tokenizer)  # prompt.context and prompt.question: token ids
...     task.score(sample, answer)  # 0 to 1
"""

from kvpress.evals.task import Prompt, Sample, Task, TaskError, Turn
from kvpress.evals.tasks import TASKS, make_task

__all__ = ["TASKS", "Prompt", "Sample", "Task", "TaskError", "Turn", "make_task"]
