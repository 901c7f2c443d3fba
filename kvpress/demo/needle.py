"""Needles in a haystack: a sentence with a number, hidden at a depth of real text and asked for at the end.

The sentence is RULER's (arXiv 2404.06654). The prompt ends with the needle's own first words, so that a base model or a
very small one can answer by going on, and the answer has to be read out of the cache, digit by digit.
"""

import random
from dataclasses import dataclass

from kvpress import haystack

INTRODUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
NEEDLE = "One of the special magic numbers for {city} is: {number}."
QUESTION = (
    "\nWhat are all the special magic numbers for {city} mentioned in the provided text? "
    "One of the special magic numbers for {city} is:"
)


class PromptError(ValueError):
    """A prompt that cannot be made; the message names the value and its limit."""


@dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
        input_ids: the prompt's tokens.
        length: how many there are.
        depth: where the needle was asked for, 0 for the start of the text, 1 for its end.
        start: index in `input_ids` of the needle's first token: the sentence start nearest to `depth`.
        number: the answer.
    """

    input_ids: list[int]
    length: int
    depth: float
    start: int
    city: str
    number: str
    seed: int


class Haystack(haystack.Haystack):
    """The shipped books, and needles in them."""

    def needle(self, length: int, depth: float, seed: int) -> Needle:
        """A prompt of exactly `length` tokens; the same arguments give the same prompt.

        Args:
            length: tokens of the prompt, question included.
            depth: in [0, 1].
            seed: chooses the text, the city and the number.

        Raises:
            PromptError: a depth outside [0, 1], or a length that the instructions and the needle alone exceed.
        """
        if not 0 <= depth <= 1:
            raise PromptError(f"depth {depth} is outside [0, 1]")
        rng = random.Random(f"needle {length} {depth} {seed}")
        city, number = rng.choice(haystack.CITIES), str(rng.randint(1_000_000, 9_999_999))
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        before = bos + self.encode(INTRODUCTION)
        needle = self.encode(" " + NEEDLE.format(city=city, number=number))
        after = self.encode(QUESTION.format(city=city))
        room = length - len(before) - len(needle) - len(after)
        if room < 0:
            raise PromptError(f"a needle prompt of {length} tokens is too short; it needs at least {length - room}")
        text, at = self.cut(room, rng.randrange(len(self.sentences)), depth)
        return Needle(
            before + text[:at] + needle + text[at:] + after,
            length,
            depth,
            len(before) + at,
            city,
            number,
            seed,
        )


def is_found(needle: Needle, answer: str) -> bool:
    """Whether the answer holds the needle's number; a longer number that contains it is another number."""
    return haystack.has_word(answer, needle.number)
