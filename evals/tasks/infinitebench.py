"""InfiniteBench's retrieval tasks: a pass key, a number with repeated digits, a value of a JSON object."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvpress.evals import draw
from kvpress.evals.fit import fill
from kvpress.evals.metrics import first_number, word_in_answer
from kvpress.evals.rows import NOISE, hub_rows, read_rows
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count, check_depths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "xinrongzhang2022/InfiniteBench"
REVISION = "90f0394333616266d9fe85824ceaf505093cbaa5"
FIELDS: dict[str, type | tuple[type, ...]] = {"context": str, "input": str, "answer": (str, list)}
HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. {find}. "
    "I will quiz you about the important information there."
)


class Kind(NamedTuple):
    """The texts of one of the tasks."""

    introduction: str
    answer_prefix: str
    max_new_tokens: int
    metric: str


KINDS = {
    "passkey": Kind(HIDDEN.format(find="Find it and memorize them"), "\n\nThe pass key is", 6, "first_number"),
    "number_string": Kind(HIDDEN.format(find="Find it"), "\n\nThe sequence of digits is", 12, "first_number"),
    "kv_retrieval": Kind(
        "Extract the value corresponding to the specified key in the JSON object below.", "", 50, "word_in_answer"
    ),
}


@dataclass(frozen=True, kw_only=True)
class InfiniteBench(Task):
    """The three retrieval tasks that have no text of their own.

    Source: Zhang et al., "InfiniteBench", arXiv 2402.13718; prompts, new tokens and scores are the authors' (those for
    YaRN-Mistral, the ones with an answer prefix). The official rows have about 100 thousand tokens; `length` draws rows of the
    same form at any length instead.

    Args:
        task: "passkey", "number_string" or "kv_retrieval".
        length: tokens of the whole prompt at most, for drawn samples; None for the official rows.
        depths: of drawn samples: where the answer stands in the context, 0 for its start and 1 for its end.
        repeats: drawn samples per depth.
        limit: of official rows, the first so many; None for all.
        data_dir: a folder with `task`.jsonl in the official schema; None loads it from the hub.

    Raises:
        TaskError: a parameter out of range, or `length` together with `data_dir`.
    """

    name: ClassVar[str] = "infinitebench"

    task: str = "passkey"
    length: int | None = None
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 4
    limit: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.task, "task", list(KINDS))
        check_depths(self.depths)
        check_count(self.repeats, "repeats", 1)
        if self.limit is not None:
            check_count(self.limit, "limit", 1)
        if self.length is not None:
            check_count(self.length, "length", 1)
            if self.data_dir is not None:
                raise TaskError(
                    f"length={self.length} and data_dir={self.data_dir!r}: the rows have their own length; drop one"
                )

    @property
    def metric(self) -> str:
        return KINDS[self.task].metric

    @property
    def label(self) -> str:
        return f"{self.name}/{self.task}"

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        if self.length is not None:
            yield from self._drawn_samples(tokenizer, self.length)
            return
        for index, row in enumerate(self._rows()):
            if index == self.limit:
                return
            yield self._sample(index, row, {})

    def score(self, sample: Sample, answer: str) -> float:
        metric = first_number if self.metric == "first_number" else word_in_answer
        return max(metric(answer, truth) for truth in sample.answers)

    def _sample(self, index: int, row: dict[str, Any], meta: dict[str, Any]) -> Sample:
        kind, answer = KINDS[self.task], row["answer"]
        return Sample(
            index=index,
            context=f"{kind.introduction}\n\n{row['context']}",
            question=f"\n\n{row['input']}",
            answers=tuple(map(str, answer)) if isinstance(answer, list) else (answer,),
            max_new_tokens=kind.max_new_tokens,
            answer_prefix=kind.answer_prefix,
            meta=meta,
        )

    def _rows(self) -> Iterator[dict[str, Any]]:
        how = f"put {self.task}.jsonl from https://huggingface.co/datasets/{HUB} into a folder and set data_dir to it"
        if self.data_dir is not None:
            return read_rows(Path(self.data_dir).expanduser() / f"{self.task}.jsonl", FIELDS, how)
        url = f"https://huggingface.co/datasets/{HUB}/resolve/{REVISION}/{self.task}.jsonl"
        return hub_rows(f"InfiniteBench's {self.task}", FIELDS, how, "json", data_files=url, split="train")

    def _drawn_samples(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> Iterator[Sample]:
        draw_row: Callable[[int, float, int], dict[str, Any]] = {
            "passkey": self._passkey,
            "number_string": self._number_string,
            "kv_retrieval": self._kv_retrieval,
        }[self.task]
        guess = length // 40
        for index in range(self.repeats * len(self.depths)):
            depth = self.depths[index % len(self.depths)]

            def build(size: int, index: int = index, depth: float = depth) -> Sample:
                return self._sample(index, draw_row(index, depth, size), {"length": length, "depth": depth})

            guess = fill(self, tokenizer, build, length, guess)
            yield build(guess)

    def _passkey(self, index: int, depth: float, size: int) -> dict[str, Any]:
        key = draw.number(self.rng(index), 5)
        context = _in_noise(f"The pass key is {key}. Remember it. {key} is the pass key.", depth, size)
        return {"context": context, "input": "What is the pass key?", "answer": key}

    def _number_string(self, index: int, depth: float, size: int) -> dict[str, Any]:
        """Ten digits, five of them drawn and five doubled, so that neighbours are often the same."""
        rng = self.rng(index)
        digits = [str(rng.randrange(10)) for _ in range(5)]
        for _ in range(5):
            at = rng.randrange(len(digits))
            digits.insert(at, digits[at])
        key = "".join(digits)
        hidden = f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
        return {"context": _in_noise(hidden, depth, size), "input": "What is the sequence of digits?", "answer": key}

    def _kv_retrieval(self, index: int, depth: float, size: int) -> dict[str, Any]:
        ids = draw.distinct(self.rng(index), "uuids", 2 * (size + 1))
        pairs = list(zip(ids[2::2], ids[3::2], strict=True))
        pairs.insert(round(depth * size), (ids[0], ids[1]))
        data = ", ".join(f'"{key}": "{value}"' for key, value in pairs)
        question = f'Key: "{ids[0]}"\nThe value associated with the specified key is: '
        return {"context": f"JSON data:\n{{{data}}}", "input": question, "answer": ids[1]}


def _in_noise(hidden: str, depth: float, size: int) -> str:
    lines = [" ".join(NOISE)] * size
    lines.insert(round(depth * size), hidden)
    return "\n".join(lines)
