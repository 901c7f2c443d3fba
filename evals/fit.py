"""Prompts of a wanted length, counted as the model will read them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvpress.evals.task import Sample, Task, TaskError
from kvpress.haystack import Haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def largest(count: Callable[[int], int], limit: int, guess: int) -> int | None:
    """The largest n with count(n) <= limit, for a count that grows with n; None if there is none.

    Args:
        count: tokens of a prompt of size n.
        limit: tokens that it may have.
        guess: where to look first.
    """
    top = 16 * max(limit, 1)  # enough for what stops growing: there are only so many documents
    low, high, step = -1, top + 1, 1  # low fits, high does not
    n = min(max(guess, 0), top)
    while high - low > 1:
        if count(n) <= limit:
            low = n
        else:
            high = n
        if low > -1 and high <= top:
            n = (low + high) // 2
        else:  # one side is not known yet: look further out, twice as far each time
            n = min(low + step, top) if low > -1 else max(high - step, 0)
            step *= 2
    return low if low > -1 else None


def fill(
    task: Task, tokenizer: "PreTrainedTokenizerBase", build: Callable[[int], Sample], limit: int, guess: int
) -> int:
    """The largest size whose sample has a prompt of at most `limit` tokens.

    Args:
        task: makes the prompts.
        tokenizer: counts.
        build: the sample of a size: the larger, the longer.
        limit: tokens that the prompt may have.
        guess: where to look first.

    Raises:
        TaskError: not even size 0 fits.
    """
    size = largest(lambda n: task.prompt(build(n), tokenizer).length, limit, guess)
    if size is None:
        least = task.prompt(build(0), tokenizer).length
        raise TaskError(f"a prompt of {limit} tokens is too short for {task.label}; raise length by {least - limit}")
    return size


def exact(
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    haystack: Haystack,
    length: int,
    first: int,
    depth: float,
    build: Callable[[str, str], Sample],
) -> Sample:
    """A sample whose whole prompt has exactly `length` tokens.

    The hay is cut at a token, but the prompt is tokenised as a whole, and where pieces meet it may come out a token longer or
    shorter. So the cut is moved until the count is right; where no cut of this hay is, the hay begins one sentence later.

    Args:
        task: makes the prompts.
        tokenizer: counts.
        haystack: the hay.
        length: tokens wanted.
        first: the sentence that the hay begins with.
        depth: where to part the hay, 0 for its start and 1 for its end.
        build: a sample from the two parts of the hay.

    Raises:
        TaskError: the rest of the prompt alone is longer, or no cut gives the length.
    """
    empty = task.prompt(build("", ""), tokenizer).length
    if length < empty:
        raise TaskError(
            f"length={length} is too short for {task.label}: its prompt without any text has {empty} tokens"
        )
    for later in range(20):
        room, tried = length - empty, set()
        while room >= 0 and room not in tried:
            tried.add(room)
            text, at = haystack.cut(room, first + later, depth)
            sample = build(
                *(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (text[:at], text[at:]))
            )
            missing = length - task.prompt(sample, tokenizer).length
            if missing == 0:
                return sample
            room += missing
    raise TaskError(
        f"length={length}: no text of exactly this length for {task.label} with this tokenizer; try {length + 1}"
    )
