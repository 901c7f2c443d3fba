"""Haystacks: text as tokenised sentences, of any length, with places where a needle may go."""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOOKS = ("pride_and_prejudice.txt", "moby_dick.txt", "alice.txt")

CITIES = (
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Lima",
    "Kyoto",
    "Cairo",
    "Boston",
    "Madrid",
    "Prague",
    "Dublin",
    "Havana",
    "Perth",
)


def book_text() -> str:
    """The shipped chapters of three public-domain novels."""
    return " ".join((files("kvpress") / "data" / book).read_text(encoding="utf-8") for book in BOOKS)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, with single spaces in them."""
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?][”’])\s+", " ".join(text.split()))


def has_word(text: str, word: str) -> bool:
    """Whether a text holds a word or number by itself: 123 is not in 1234, but it is in "123." and "123rd"."""
    before, after = ("[0-9]" if char.isdigit() else "[A-Za-z]" for char in (word[0], word[-1]))
    return re.search(f"(?<!{before}){re.escape(word)}(?!{after})", text) is not None


class Haystack:
    """Sentences, each tokenised with a space in front, that go round and round.

    Args:
        tokenizer: of the model that will read them.
        sentences: in their order; the shipped books by default.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", sentences: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        sentences = split_sentences(book_text()) if sentences is None else sentences
        self.sentences = [self.encode(" " + sentence) for sentence in sentences]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def cut(self, room: int, first: int, depth: float) -> tuple[list[int], int]:
        """Exactly `room` tokens from sentence `first` on, the last sentence cut where they end.

        Returns:
            The tokens, and where something can be put at `depth`, 0 for the text's start and 1 for its end: the nearest index
            at which a sentence starts or the text ends.
        """
        text: list[int] = []
        starts = []
        while len(text) < room:
            starts.append(len(text))
            text += self.sentences[first % len(self.sentences)]
            first += 1
        starts.append(room)
        return text[:room], min(starts, key=lambda start: abs(start - depth * room))
