"""Passkey retrieval: a number in sentences that repeat."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpress.evals import draw
from kvpress.evals.fit import exact
from kvpress.evals.metrics import words_found
from kvpress.evals.rows import NOISE
from kvpress.evals.task import Sample, Task, check_count, check_counts, check_depths
from kvpress.haystack import Haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Prompts of exactly each of `lengths` tokens, with a pass key at each of `depths`, `repeats` times.

    Source: Mohtashami and Jaggi, "Landmark Attention", arXiv 2305.16300. Deviation: the text goes on in single sentences,
    so that the pass key can stand between any two of them.

    Args:
        lengths: tokens of the whole prompt: special tokens, chat template, question and answer prefix included.
        depths: where the pass key stands, 0 for the text's start and 1 for its end; at the nearest start of a sentence.
        repeats: samples per length and depth.
        digits: of the pass key.

    Raises:
        TaskError: a parameter out of range.
    """

    name: ClassVar[str] = "passkey"
    metric = "words_found"

    lengths: tuple[int, ...] = (1000, 2000, 4000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 1
    digits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.lengths, "lengths", 1)
        check_depths(self.depths)
        check_count(self.repeats, "repeats", 1)
        check_count(self.digits, "digits", 1)

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        hay = Haystack(tokenizer, NOISE)
        grid = [(length, depth) for _ in range(self.repeats) for length in self.lengths for depth in self.depths]
        for index, (length, depth) in enumerate(grid):
            key = draw.number(self.rng(index), self.digits)

            def build(
                before: str, after: str, index: int = index, key: str = key, length: int = length, depth: float = depth
            ) -> Sample:
                hidden = f" The pass key is {key}. Remember it. {key} is the pass key."
                return Sample(
                    index=index,
                    context=INTRODUCTION + (before + hidden + after).lstrip(),
                    question="\nWhat is the pass key?",
                    answers=(key,),
                    max_new_tokens=self.digits + 3,
                    answer_prefix=" The pass key is",
                    meta={"length": length, "depth": depth},
                )

            yield exact(self, tokenizer, hay, length, 0, depth, build)

    def score(self, sample: Sample, answer: str) -> float:
        return words_found(answer, sample.answers)
