"""Key-value retrieval: one value out of a JSON object of random identifiers."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kvpress.evals import draw
from kvpress.evals.fit import fill
from kvpress.evals.metrics import words_found
from kvpress.evals.rows import read_rows
from kvpress.evals.task import Sample, Task, TaskError, check_count, check_depths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTRODUCTION = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
HOW_TO_GET = (
    "get it from https://github.com/nelson-liu/lost-in-the-middle (kv_retrieval_data, unzipped), "
    "or drop data_dir to draw pairs"
)
Pairs = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class KVRetrieval(Task):
    """One key of a JSON object, asked for at the end.

    Source: Liu et al., "Lost in the Middle", arXiv 2307.03172; the prompt is the authors'. With `data_dir` the pairs are
    theirs too, and the asked pair is moved to the depth as they do it.

    Args:
        pairs: in the object.
        length: instead of `pairs`: the most that fit into this many tokens, counting the whole prompt.
        depths: where the asked pair stands, 0 for the first and 1 for the last.
        repeats: samples per depth; with `data_dir`, rows.
        data_dir: a folder with the authors' file for that number of pairs (75, 140 or 300).

    Raises:
        TaskError: a parameter out of range, or `length` together with `data_dir`.
    """

    name: ClassVar[str] = "kv_retrieval"
    metric = "words_found"

    pairs: int = 75
    length: int | None = None
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 4
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.pairs, "pairs", 1)
        check_depths(self.depths)
        check_count(self.repeats, "repeats", 1)
        if self.length is not None:
            check_count(self.length, "length", 1)
            if self.data_dir is not None:
                raise TaskError(
                    f"length={self.length} and data_dir={self.data_dir!r}: the rows have their own length; drop one"
                )

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        rows = self._rows() if self.data_dir is not None else None
        others = self.pairs - 1 if self.length is None else self.length // 50
        for index in range(self.repeats * len(self.depths)):
            repeat, depth = index // len(self.depths), self.depths[index % len(self.depths)]

            def build(others: int, index: int = index, repeat: int = repeat, depth: float = depth) -> Sample:
                pairs = rows[repeat] if rows is not None else self._draw(index, others)
                return _sample(index, pairs, depth)

            if self.length is not None:
                others = fill(self, tokenizer, build, self.length, others)
            yield build(others)

    def score(self, sample: Sample, answer: str) -> float:
        return words_found(answer, sample.answers)

    def _draw(self, index: int, others: int) -> Pairs:
        """The asked pair, and so many others after it; more begin with the same ones."""
        drawn = draw.distinct(self.rng(index), "uuids", 2 + 2 * others)
        return list(zip(drawn[::2], drawn[1::2], strict=True))

    def _rows(self) -> list[Pairs]:
        """The authors' rows, the asked pair first."""
        assert self.data_dir is not None
        path = Path(self.data_dir).expanduser() / f"kv-retrieval-{self.pairs}_keys.jsonl"
        rows: list[Pairs] = []
        for row in read_rows(path, {"ordered_kv_records": list, "key": str, "value": str}, HOW_TO_GET):
            asked = (row["key"], row["value"])
            pairs = [(key, value) for key, value in row["ordered_kv_records"]]
            if asked not in pairs:
                raise TaskError(
                    f"{path}, row {len(rows) + 1}: the key {row['key']} with its value is not among the pairs"
                )
            rows.append([asked, *(pair for pair in pairs if pair != asked)])
        if len(rows) < self.repeats:
            raise TaskError(f"repeats={self.repeats}, but {path} has {len(rows)} rows; set repeats to at most that")
        return rows


def _sample(index: int, pairs: Pairs, depth: float) -> Sample:
    (key, value), others = pairs[0], pairs[1:]
    at = round(depth * len(others))
    placed = [*others[:at], (key, value), *others[at:]]
    return Sample(
        index=index,
        context=INTRODUCTION + json_object(placed),
        question=f'\n\nKey: "{key}"\nCorresponding value:',
        answers=(value,),
        max_new_tokens=48,
        meta={"pairs": len(pairs), "depth": depth},
    )


def json_object(entries: Iterable[tuple[str, str | list[str]]]) -> str:
    """The authors' layout: an entry a line."""
    return "{" + ",\n ".join(f'"{key}": {json.dumps(value)}' for key, value in entries) + "}"
