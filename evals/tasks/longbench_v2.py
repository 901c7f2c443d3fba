"""LongBench v2: questions with four choices about long texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvpress.evals import draw
from kvpress.evals.fit import fill
from kvpress.evals.metrics import chosen_letter
from kvpress.evals.rows import Kind, haystack_sentences, hub_rows, read_rows
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count, encode
from kvpress.evals.tasks.longbench import cut_middle, decode
from kvpress.haystack import CITIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "zai-org/LongBench-v2"
CHOICES = "ABCD"
FIELDS: dict[str, Kind] = {
    "context": str, "question": str, **{f"choice_{letter}": str for letter in CHOICES}, "answer": str, "difficulty": str,
    "length": str,
}  # fmt: skip
BEFORE = "Please read the following text and answer the question below.\n\n<text>\n"
BEFORE_QUESTION = "\n</text>\n\nWhat is the correct answer to this question: "
AFTER_CHOICES = '\n\nFormat your response as follows: "The correct answer is (insert answer here)".'


class Protocol(NamedTuple):
    """What differs between those who report numbers."""

    truncate: str
    max_new_tokens: int


PROTOCOLS = {"official": Protocol("middle", 128), "nv": Protocol("tail", 16)}


@dataclass(frozen=True, kw_only=True)
class LongBenchV2(Task):
    """One of four choices, whose letter the answer has to name: "The correct answer is (B)". Guessing gives 25.

    Source: Bai et al., "LongBench v2", arXiv 2412.15204, and the authors' code (THUDM/LongBench), whose prompt without chain of
    thought and whose way to find the letter these are. Deviations: answers are greedy, where the authors sample with
    temperature 0.1; the prompt is tokenised in two parts, the context and what follows it. With `protocol="nv"` tokens and
    truncation are those of NVIDIA's kvpress; its code counts an answer only if there is nothing else in it.

    Args:
        protocol: "official" (128 new tokens, the middle is cut out of long prompts) or "nv" (16, the end of the context is cut).
        truncate: "middle" or "tail" instead of the protocol's.
        max_length: tokens of the prompt at most, before the chat template is added; None cuts nothing.
        length: for drawn rows, tokens of the whole prompt at most: four facts in a novel, one of them asked for, the values
            of all four to choose from. None for the official rows.
        repeats: drawn rows.
        haystack: of drawn rows: "books", "noise", a text file, or a folder of .txt files.
        limit: of official rows, the first so many; None for all.
        data_dir: a folder with longbench_v2.jsonl, the rows of the official data.json, one a line; None loads from the hub.

    Raises:
        TaskError: an unknown protocol, a number out of range, or `length` together with `data_dir`.
    """

    name: ClassVar[str] = "longbench_v2"
    metric = "multiple_choice"

    protocol: str = "official"
    truncate: str | None = None
    max_length: int | None = None
    length: int | None = None
    repeats: int = 20
    haystack: str = "books"
    limit: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.protocol, "protocol", list(PROTOCOLS))
        if self.truncate is not None:
            check_choice(self.truncate, "truncate", ["middle", "tail"])
        check_count(self.repeats, "repeats", 1)
        for name, least in (("max_length", 2), ("length", 1), ("limit", 1)):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name, least)
        if self.length is not None and self.data_dir is not None:
            both = f"length={self.length} and data_dir={self.data_dir!r}"
            raise TaskError(f"{both}: the rows have their own length, which max_length cuts; drop one")

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        if self.length is not None:
            yield from self._drawn_samples(tokenizer, self.length)
            return
        for index, row in enumerate(self._rows()):
            if index == self.limit:
                return
            meta = {
                "id": row.get("_id", index),
                "groups": {"difficulty": row["difficulty"], "length of the text": row["length"]},
            }
            yield self._sample(index, row, meta, tokenizer)

    def score(self, sample: Sample, answer: str) -> float:
        return float(chosen_letter(answer) == sample.answers[0])

    def _sample(
        self, index: int, row: dict[str, Any], meta: dict[str, Any], tokenizer: "PreTrainedTokenizerBase"
    ) -> Sample:
        choices = "\n".join(f"({letter}) {row[f'choice_{letter}'].strip()}" for letter in CHOICES)
        context = BEFORE + row["context"].strip()
        question = f"{BEFORE_QUESTION}{row['question'].strip()}\nChoices:\n{choices}{AFTER_CHOICES}"
        protocol = PROTOCOLS[self.protocol]
        if self.max_length is not None:
            cut = cut_middle if (self.truncate or protocol.truncate) == "middle" else cut_tail
            context, question = cut(tokenizer, context, question, self.max_length)
        return Sample(
            index=index,
            context=context,
            question=question,
            answers=(row["answer"],),
            max_new_tokens=protocol.max_new_tokens,
            meta=meta,
        )

    def _rows(self) -> Iterator[dict[str, Any]]:
        source = f"https://huggingface.co/datasets/{HUB}"
        how = f"save the rows of data.json of {source} as longbench_v2.jsonl, one a line, in a data_dir"
        if self.data_dir is not None:
            path = Path(self.data_dir).expanduser() / "longbench_v2.jsonl"
            rows, what = read_rows(path, FIELDS, how), str(path)
        else:
            rows, what = hub_rows("LongBench v2", FIELDS, how, HUB, split="train"), "LongBench v2"
        for number, row in enumerate(rows, 1):
            if row["answer"] not in CHOICES or len(row["answer"]) != 1:
                raise TaskError(
                    f"{what}, row {number}: answer is {row['answer'][:40]!r}; give one of {', '.join(CHOICES)}"
                )
            yield row

    def _drawn_samples(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> Iterator[Sample]:
        sentences = haystack_sentences(self.haystack)
        guess = length // 30
        for index in range(self.repeats):

            def build(size: int, index: int = index) -> Sample:
                row = draw_row(self.rng(index), size, sentences)
                return self._sample(index, row, {"length": length}, tokenizer)

            guess = fill(self, tokenizer, build, length, guess)
            yield build(guess)


def draw_row(rng: Random, size: int, sentences: list[str]) -> dict[str, Any]:
    """Four facts about cities in `size` sentences of a text, in the official schema."""
    cities, values = rng.sample(CITIES, 4), draw.distinct(rng, "words", 4)
    first = rng.randrange(len(sentences))
    shares = [rng.random() for _ in cities]
    text = [sentences[(first + at) % len(sentences)] for at in range(size)]
    facts = [f"The special magic word for {city} is {value}." for city, value in zip(cities, values, strict=True)]
    for share, fact in sorted(zip(shares, facts, strict=True), reverse=True):
        text.insert(int(share * (size + 1)), fact)
    asked = rng.randrange(4)
    choices = dict(zip((f"choice_{letter}" for letter in CHOICES), rng.sample(values, 4), strict=True))
    (answer,) = (name[-1] for name, value in choices.items() if value == values[asked])
    return {
        "context": " ".join(text),
        "question": f"What is the special magic word for {cities[asked]}?",
        **choices,
        "answer": answer,
    }


def cut_tail(tokenizer: "PreTrainedTokenizerBase", context: str, question: str, max_length: int) -> tuple[str, str]:
    """Both texts, the context without its end if they have more than `max_length` tokens together.

    Raises:
        TaskError: the question alone has as many.
    """
    before, after = encode(tokenizer, context, special=True), encode(tokenizer, question, special=False)
    room = max_length - len(after)
    if room < 1:
        raise TaskError(f"max_length={max_length}, but a question alone has {len(after)} tokens; raise it")
    return (context if len(before) <= room else decode(tokenizer, before[:room])), question
