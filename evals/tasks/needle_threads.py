"""Threads of keys through a JSON object: a value is the next key, until one is not."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, ClassVar

from kvpress.evals import draw
from kvpress.evals.fit import fill
from kvpress.evals.metrics import words_found
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count
from kvpress.evals.tasks.kv_retrieval import json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTIONS = {
    "single": "The JSON object below maps keys to values. Find the value of a key.",
    "multi_step": (
        "The JSON object below maps keys to values. A value can itself be a key of the object. "
        "Begin with a key, look up its value, look that up in turn, and go on until a value is no key. Find this last value."
    ),
    "branching": (
        "The JSON object below maps each key to a list of values. A value can itself be a key of the object. "
        "Begin with a key, choose among its values the one that is a key, and go on until none is. "
        "At the end of the longest thread a key has a single value. Find this last value."
    ),
}
Objects = list[tuple[str, list[str]]]


@dataclass(frozen=True, kw_only=True)
class NeedleThreads(Task):
    """Follow one or more threads of keys through a JSON object of random UUIDs.

    Source: in the style of Roberts et al., "Needle Threading", arXiv 2411.05000. Deviations: instructions and branching are our
    own (a key has a list of values, of which one goes on), and lengths are counted in tokens.

    Args:
        kind: "single" asks for the value of a key; "multi_step" for the end of a thread of `steps` lookups; "branching" for
            the end of a thread each of whose keys but the last has `branches` values, all but one dead ends.
        length: tokens of the whole prompt at most; as many pairs as fit.
        steps: lookups from the first key to the last value; 1 for "single".
        branches: values of a key for "branching".
        threads: that are asked for at once; the score is the share of their ends that the answer names.
        direction: where the next key of a thread stands: "forward" is later in the object, "backward" earlier, "any" either.
        repeats: samples.

    Raises:
        TaskError: a parameter out of range.
    """

    name: ClassVar[str] = "needle_threads"
    metric = "words_found"

    kind: str = "multi_step"
    length: int = 4000
    steps: int | None = None
    branches: int = 2
    threads: int = 1
    direction: str = "forward"
    repeats: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.kind, "kind", list(INSTRUCTIONS))
        check_choice(self.direction, "direction", ["forward", "backward", "any"])
        check_count(self.length, "length", 1)
        if self.steps is not None:
            check_count(self.steps, "steps", 1 if self.kind == "single" else 2)
            if self.kind == "single" and self.steps != 1:
                raise TaskError(f"steps={self.steps}, but kind='single' is one lookup; use kind='multi_step'")
        check_count(self.branches, "branches", 2)
        check_count(self.threads, "threads", 1)
        check_count(self.repeats, "repeats", 1)

    @property
    def label(self) -> str:
        return f"{self.name}/{self.kind}"

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        guess = self.length // 50
        for index in range(self.repeats):
            guess = fill(self, tokenizer, partial(self._sample, index), self.length, guess)
            yield self._sample(index, guess)

    def score(self, sample: Sample, answer: str) -> float:
        return words_found(answer, sample.answers)

    def _sample(self, index: int, extra: int) -> Sample:
        """The sample with `extra` pairs besides those of the threads."""
        rng = self.rng(index)
        steps = self.steps or (1 if self.kind == "single" else 4)
        width = self.branches if self.kind == "branching" else 1
        ids = iter(draw.distinct(rng, "uuids", self.threads * (steps * (width + 1) + 1) + extra * (width + 1)))
        threads = [[next(ids) for _ in range(steps + 1)] for _ in range(self.threads)]
        entries = []
        for thread in threads:
            for key, value in pairwise(thread[:-1]):
                values = [value, *(next(ids) for _ in range(width - 1))]
                rng.shuffle(values)
                entries.append((key, values))
            entries.append((thread[-2], [thread[-1]]))
        # as often as in a thread, the others have a single value too: it tells nothing by itself
        single = self.rng(index, "fillers")
        fillers = [
            (next(ids), [next(ids) for _ in range(1 if single.random() < 1 / steps else width)]) for _ in range(extra)
        ]
        starts, ends = [thread[0] for thread in threads], tuple(thread[-1] for thread in threads)
        return Sample(
            index=index,
            context=f"{INSTRUCTIONS[self.kind]}\n\n{self._layout(rng, entries, fillers, steps)}",
            question=_question(starts, self.kind),
            answers=ends,
            max_new_tokens=48 * self.threads,
            meta={"length": self.length, "pairs": len(entries) + extra, "steps": steps, "threads": self.threads},
        )

    def _layout(self, rng: Random, entries: Objects, fillers: Objects, steps: int) -> str:
        """The object's text: the entries of each thread at random places, in the thread's direction."""
        total = len(entries) + len(fillers)
        places = rng.sample(range(total), len(entries))
        for begin in range(0, len(places), steps):
            if self.direction != "any":
                places[begin : begin + steps] = sorted(
                    places[begin : begin + steps], reverse=self.direction == "backward"
                )
        placed = dict(zip(places, entries, strict=True))
        others = iter(fillers)
        lines = [placed[at] if at in placed else next(others) for at in range(total)]
        return json_object((key, values if self.kind == "branching" else values[0]) for key, values in lines)


def _question(starts: list[str], kind: str) -> str:
    what = "value" if kind == "single" else "last value"
    if len(starts) == 1:
        return f'\n\nKey: "{starts[0]}"\nIts {what}:'
    keys = ", ".join(f'"{start}"' for start in starts)
    return f"\n\nKeys: {keys}\nTheir {what}s, in this order:"
