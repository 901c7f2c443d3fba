"""Needle in a haystack: a sentence in a long text, asked for at the end, over a grid of lengths and depths."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvpress.evals import draw
from kvpress.evals.fit import exact
from kvpress.evals.rows import haystack_sentences
from kvpress.evals.task import Sample, check_choice
from kvpress.evals.tasks.grid import GridTask
from kvpress.haystack import CITIES, Haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Kind(NamedTuple):
    """The texts of one kind of needle; {key} is a city, {value} what is asked for."""

    introduction: str
    needle: str
    question: str
    answer_prefix: str
    max_new_tokens: int


def _magic(thing: str, max_new_tokens: int) -> Kind:
    """RULER's sentence, with the answer begun by the needle's own first words."""
    needle = f"One of the special magic {thing} for {{key}} is:"
    return Kind(
        f"Some special magic {thing} are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {thing} afterwards.\n",
        f"{needle} {{value}}.",
        f"\nWhat are all the special magic {thing} for {{key}} mentioned in the provided text?",
        f" {needle}",
        max_new_tokens,
    )


KINDS = {
    "numbers": _magic("numbers", 16),
    "words": _magic("words", 16),
    "uuids": _magic("uuids", 48),
    "sandwich": Kind(
        "",
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
        "\nWhat is the best thing to do in San Francisco?",
        " The best thing to do in San Francisco is",
        32,
    ),
}
SANDWICH = ("eat a sandwich", "Dolores Park", "sunny day")


@dataclass(frozen=True, kw_only=True)
class Needle(GridTask):
    """Prompts of exactly each of `lengths` tokens, with one needle at each of `depths`, `repeats` times.

    Source: G. Kamradt's needle in a haystack, and RULER (arXiv 2404.06654) for the sentences of all kinds but "sandwich",
    which is Kamradt's. Deviations: the answer is begun with the needle's first words, so that small and base models can give
    it; Kamradt's answers are judged by a model, here the score of "sandwich" is the share of its three parts in the answer.

    Args:
        lengths: tokens of the whole prompt: special tokens, chat template, question and answer prefix included.
        depths: where the needle stands in the text, 0 for its start and 1 for its end; at the nearest start of a sentence.
        repeats: samples per length and depth, each with its own text, city and value.
        needle: "numbers", "words", "uuids", or "sandwich".
        haystack: "books", "noise" (five sentences that repeat), a text file, or a folder of .txt files.

    Raises:
        TaskError: a parameter out of range.
    """

    name: ClassVar[str] = "needle"

    needle: str = "numbers"
    haystack: str = "books"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.needle, "needle", list(KINDS))

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        hay = Haystack(tokenizer, haystack_sentences(self.haystack))
        for index, (length, depth) in enumerate(self.grid()):
            rng = self.rng(index)
            first = rng.randrange(len(hay.sentences))
            build = _Builder(self.needle, rng, index, {"length": length, "depth": depth})
            yield exact(self, tokenizer, hay, length, first, depth, build)


class _Builder:
    """The sample of one drawn needle around any two parts of a haystack."""

    def __init__(self, kind: str, rng: Random, index: int, meta: dict[str, float]) -> None:
        self.texts, self.index, self.meta = KINDS[kind], index, meta
        self.key = rng.choice(CITIES)
        self.value = "" if kind == "sandwich" else draw.DRAW[kind](rng)

    def __call__(self, before: str, after: str) -> Sample:
        needle = self.texts.needle.format(key=self.key, value=self.value)
        return Sample(
            index=self.index,
            context=self.texts.introduction + f"{before} {needle}{after}".lstrip(),
            question=self.texts.question.format(key=self.key),
            answers=(self.value,) if self.value else SANDWICH,
            max_new_tokens=self.texts.max_new_tokens,
            answer_prefix=self.texts.answer_prefix.format(key=self.key),
            meta=self.meta,
        )
