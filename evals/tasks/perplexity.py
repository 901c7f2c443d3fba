"""Perplexity: how likely a text's continuation is after a long context."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpress.evals.rows import read_text
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("dense", "decode", "sequential")


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """Stretches of a text in two parts: `sample.context` is read, and `sample.question` is what comes next and is scored.

    There is nothing to generate (`max_new_tokens` is 0, no answers): `kvpress.score(model, prompt.context, prompt.question,
    mode=task.mode).perplexity`, or one forward pass over both for "dense". That is exact under every policy that evicts or
    selects after a prompt's own attention, and says nothing about it.

    Args:
        text: "books", a text file, or a folder of .txt files.
        length: tokens of a context.
        scored: tokens of a continuation.
        stretches: how many, one after the other from the text's start; fewer where it ends.
        mode: "decode" (the context in one pass, the continuation token by token), "sequential" (all token by token), or "dense".

    Raises:
        TaskError: a parameter out of range, or `chat=True`.
    """

    name: ClassVar[str] = "perplexity"
    metric = "perplexity"

    text: str = "books"
    length: int = 2000
    scored: int = 200
    stretches: int = 5
    mode: str = "decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.length, "length", 1)
        check_count(self.scored, "scored", 1)
        check_count(self.stretches, "stretches", 1)
        check_choice(self.mode, "mode", MODES)
        if self.chat:
            raise TaskError("chat=True, but perplexity is that of a plain text; drop chat")

    @property
    def wants_chat(self) -> bool:
        return False

    @property
    def unseen_because(self) -> str:
        return "perplexity has no question to compress with"

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        ids = encode(tokenizer, read_text(self.text), special=False)
        size = self.length + self.scored
        if len(ids) < size:
            raise TaskError(
                f"length={self.length} and scored={self.scored}, but {self.text!r} has {len(ids)} tokens; lower them"
            )
        for index in range(min(self.stretches, len(ids) // size)):
            stretch = ids[index * size : (index + 1) * size]
            context, rest = (
                tokenizer.decode(part, clean_up_tokenization_spaces=False)
                for part in (stretch[: self.length], stretch[self.length :])
            )
            yield Sample(index, context, rest, (), 0, meta={"length": self.length, "mode": self.mode})

    def score(self, sample: Sample, answer: str) -> float:
        raise TaskError("perplexity has no answers to score; use kvpress.score(model, prompt.context, prompt.question)")
