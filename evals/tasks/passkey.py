"""Passkey retrieval: a number in sentences that repeat."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpress.evals import draw
from kvpress.evals.fit import exact
from kvpress.evals.rows import NOISE
from kvpress.evals.task import Sample, check_count
from kvpress.evals.tasks.grid import GridTask
from kvpress.haystack import Haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)


@dataclass(frozen=True, kw_only=True)
class Passkey(GridTask):
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

    digits: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.digits, "digits", 1)

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        hay = Haystack(tokenizer, NOISE)
        for index, (length, depth) in enumerate(self.grid()):
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
