"""LongBench v1: 21 data sets of question answering, summaries, few-shot learning, retrieval and code."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from kvpress.evals import metrics
from kvpress.evals.rows import Kind, hub_rows, read_rows
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "zai-org/LongBench"
REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
FIELDS: dict[str, Kind] = {"input": str, "context": str, "answers": list, "length": int}
METRICS: dict[str, Callable[..., float]] = {
    "qa_f1": metrics.qa_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge": metrics.rouge,
    "rouge_zh": metrics.rouge_zh,
    "classification": metrics.classification,
    "retrieval": metrics.retrieval,
    "count": metrics.count,
    "code_sim": metrics.code_sim,
}


@cache
def datasets() -> dict[str, dict[str, Any]]:
    """Name -> kind, metric, new tokens, prompt, ..., in the official order."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(
        (files("kvpress.evals") / "data" / "longbench.yaml").read_text(encoding="utf-8")
    )
    return table


@dataclass(frozen=True, kw_only=True)
class LongBench(Task):
    """One of LongBench's data sets.

    Source: Bai et al., "LongBench", arXiv 2308.14508, and the authors' code, whose prompts, new tokens, truncation, chat
    rule, first-line rule and metrics these are. Deviations: see `kvpress.evals.metrics.rouge` and `code_sim`; the prompt is
    tokenised in two parts, the context and what follows it; the official code ends an answer of samsum at its first newline
    after one token, here `meta["stop"]` names the newline and the first line is scored, as there.

    A score is the largest over the right answers. `meta["bucket"]` is LongBench-E's, by the row's length in words.

    Args:
        dataset: its name, see `datasets()`.
        max_length: tokens of the prompt; what is longer loses its middle, before the chat template is added, as in the
            official code. None cuts nothing. The official choice is the model's window without the new tokens.
        e: LongBench-E's rows, whose lengths are even; 13 data sets have them.
        limit: the first so many rows; None for all.
        data_dir: a folder with `dataset`.jsonl (`dataset`_e.jsonl) in the official schema; None loads from the hub.

    Raises:
        TaskError: an unknown data set, one without LongBench-E rows, or a number out of range.
    """

    name: ClassVar[str] = "longbench"

    dataset: str = "hotpotqa"
    max_length: int | None = None
    e: bool = False
    limit: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.dataset, "dataset", list(datasets()))
        if self.max_length is not None:
            check_count(self.max_length, "max_length", 2)
        if self.limit is not None:
            check_count(self.limit, "limit", 1)
        if self.e and not self._entry.get("e"):
            those = ", ".join(name for name, entry in datasets().items() if entry.get("e"))
            raise TaskError(f"e=True, but {self.dataset} has no LongBench-E rows; these have: {those}")

    @property
    def _entry(self) -> dict[str, Any]:
        return datasets()[self.dataset]

    @property
    def metric(self) -> str:
        return str(self._entry["metric"])

    @property
    def label(self) -> str:
        return f"{self.name}/{self.dataset}{'_e' if self.e else ''}"

    @property
    def wants_chat(self) -> bool:
        return bool(self._entry.get("chat", True))

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        before, _, after = self._entry["prompt"].partition("{context}")
        stop = {"stop": "\n"} if self.dataset == "samsum" else {}
        for index, row in enumerate(self._rows()):
            if index == self.limit:
                return
            context, question = before + row["context"], after.replace("{input}", row["input"])
            if self.max_length is not None:
                context, question = cut_middle(tokenizer, context, question, self.max_length)
            yield Sample(
                index=index,
                context=context,
                question=question,
                answers=tuple(map(str, row["answers"])),
                max_new_tokens=self._entry["max_new_tokens"],
                meta={
                    "id": row.get("_id", index),
                    "words": row["length"],
                    "bucket": bucket(row["length"]),
                    "classes": row.get("all_classes"),
                    **stop,
                },
            )

    def score(self, sample: Sample, answer: str) -> float:
        if self._entry.get("first_line"):
            answer = answer.lstrip("\n").split("\n")[0]
        metric = METRICS[self.metric]
        extra = [sample.meta["classes"]] if self.metric == "classification" else []
        return max(metric(answer, truth, *extra) for truth in sample.answers)

    def _rows(self) -> Iterator[dict[str, Any]]:
        name = self.label.removeprefix("longbench/")
        required = FIELDS | {"all_classes": list} if self.metric == "classification" else FIELDS
        how = f"unzip data.zip of https://huggingface.co/datasets/{HUB} and set data_dir to its folder data"
        if self.data_dir is not None:
            path = Path(self.data_dir).expanduser() / f"{name}.jsonl"
            return read_rows(path, required, how)
        # the data set's own loading script no longer runs (datasets 4), but its archive can be read
        url = f"zip://data/{name}.jsonl::https://huggingface.co/datasets/{HUB}/resolve/{REVISION}/data.zip"
        return hub_rows(f"LongBench's {name}", required, how, "json", data_files=url, split="train")


def bucket(words: int) -> str:
    """LongBench-E's groups of lengths."""
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"


def cut_middle(tokenizer: "PreTrainedTokenizerBase", context: str, question: str, max_length: int) -> tuple[str, str]:
    """Both texts, without the middle of the two together if they have more than `max_length` tokens.

    Half of `max_length`, rounded down, stays at either end.
    """
    before, after = encode(tokenizer, context, special=True), encode(tokenizer, question, special=False)
    if len(before) + len(after) <= max_length:
        return context, question
    half = max_length // 2
    tail = before[len(before) - max(0, half - len(after)) :]
    cut = decode(tokenizer, before[:half]) + decode(tokenizer, tail)
    return cut, question if len(after) <= half else decode(tokenizer, after[-half:])


def decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The text of these tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
