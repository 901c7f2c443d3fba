"""Long reasoning: problems of mathematics whose answers a model works out token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvpress.evals.metrics import boxed, boxed_strict
from kvpress.evals.rows import Kind, hub_rows, read_rows
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count, check_flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS: dict[str, Kind] = {"problem": str, "answer": (str, int)}
QUESTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


class Part(NamedTuple):
    """A data set: where it is, how long answers may be, and which box NVIDIA's kvpress reads."""

    hub: str
    split: str
    max_new_tokens: int
    first_box: bool


PARTS = {
    "math500": Part("HuggingFaceH4/MATH-500", "test", 8192, True),
    "aime24": Part("HuggingFaceH4/aime_2024", "train", 32768, False),
    "aime25": Part("math-ai/aime25", "test", 32768, False),
    "arithmetic": Part("", "", 1024, False),
}
"""All but `arithmetic`, which is drawn."""
GROUPS = ("level", "subject")


@dataclass(frozen=True, kw_only=True)
class Reasoning(Task):
    """MATH-500, AIME, or drawn problems: what a policy that evicts while the answer is written does to it.

    The prompt is short and the answer long, so only policies that evict or select in decode act here, and their budget should be
    entries. Beside the share of right answers, reports have what has to be looked at with it: the tokens written (policies that
    lose something tend to write more), the share of answers that were cut off, the most entries held, and the budget over
    what full attention wrote and read, not over their own longer answers.

    Source: MATH-500 (Hendrycks et al., arXiv 2103.03874; Lightman et al., arXiv 2305.20050) and AIME, as evaluations of
    reasoning under compression use them. The score is that of the last \\boxed{...}, braces balanced, compared as numbers or as
    simplified LaTeX. `strict` in a row and in reports is NVIDIA's kvpress's: what stands between "boxed{" (the first of
    MATH-500, the last of AIME) and the next "}" is the answer to the letter. Deviation: greedy, one answer each, where papers
    average over sampled ones.

    Args:
        dataset: "math500", "aime24", "aime25", or "arithmetic": sums and products of several steps, drawn here.
        max_new_tokens: of an answer; None for 8192 (MATH-500), 32768 (AIME), 1024 (drawn).
        thinking: whether the chat template is asked to let the model think, where it can be.
        steps: of a drawn problem.
        repeats: drawn problems.
        limit: of the rows, the first so many; None for all.
        data_dir: a folder with `dataset`.jsonl, whose rows have problem and answer; None loads from the hub.

    Raises:
        TaskError: an unknown data set, a number out of range, or `data_dir` for drawn problems.
    """

    name: ClassVar[str] = "reasoning"
    metric = "boxed"

    dataset: str = "math500"
    max_new_tokens: int | None = None
    thinking: bool = False
    steps: int = 4
    repeats: int = 20
    limit: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.dataset, "dataset", list(PARTS))
        check_flag(self.thinking, "thinking")
        check_count(self.steps, "steps", 1)
        check_count(self.repeats, "repeats", 1)
        for name in ("max_new_tokens", "limit"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name, 1)
        if self.dataset == "arithmetic" and self.data_dir is not None:
            raise TaskError(f"data_dir={self.data_dir!r}, but arithmetic is drawn; drop it, or name another dataset")

    @property
    def label(self) -> str:
        return f"{self.name}/{self.dataset}"

    @property
    def thinks(self) -> bool:
        return self.thinking

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        most = self.max_new_tokens or PARTS[self.dataset].max_new_tokens
        for index, row in enumerate(self._rows()):
            if index == self.limit:
                return
            yield Sample(
                index=index,
                context=row["problem"],
                question=QUESTION,
                answers=(str(row["answer"]),),
                max_new_tokens=most,
                meta={
                    "id": row.get("unique_id", row.get("id", index)),
                    "groups": {name: str(row[name]) for name in GROUPS if row.get(name) is not None},
                },
            )

    def score(self, sample: Sample, answer: str) -> float:
        return boxed(answer, sample.answers[0])

    def details(self, sample: Sample, answer: str) -> dict[str, float]:
        return {"strict": boxed_strict(answer, sample.answers[0], first=PARTS[self.dataset].first_box)}

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.dataset == "arithmetic":
            return (draw_problem(self.rng(index), self.steps) for index in range(self.repeats))
        part, name = PARTS[self.dataset], f"{self.dataset}.jsonl"
        how = f"save the rows of https://huggingface.co/datasets/{part.hub} as {name}, one a line, in a data_dir"
        if self.data_dir is not None:
            return read_rows(Path(self.data_dir).expanduser() / name, FIELDS, how)
        return hub_rows(self.dataset, FIELDS, how, part.hub, split=part.split)


def draw_problem(rng: Random, steps: int) -> dict[str, Any]:
    """A box of marbles that grows and shrinks, in the schema of MATH-500."""
    count = rng.randrange(5, 30)
    told = [f"A box holds {count} marbles."]
    for _ in range(steps):
        kind, number = rng.choice(("in", "out", "times")), rng.randrange(2, 10)
        if kind == "out" and number >= count:
            kind = "in"
        if kind == "times":
            number = 2 + number % 2
            count *= number
            told.append(f"Then the number of marbles in it is made {number} times as large.")
        else:
            count += number if kind == "in" else -number
            told.append(f"Then {number} marbles are {'put into it' if kind == 'in' else 'taken out of it'}.")
    told.append("How many marbles does the box hold at the end?")
    return {"problem": " ".join(told), "answer": str(count), "level": steps}
