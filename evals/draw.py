"""What is hidden in a haystack: random numbers, identifiers and words."""

from functools import cache
from importlib.resources import files
from random import Random
from uuid import UUID

import yaml


@cache
def _words() -> dict[str, list[str]]:
    words: dict[str, list[str]] = yaml.safe_load(
        (files("kvpress.evals") / "data" / "words.yaml").read_text(encoding="utf-8")
    )
    return words


def number(rng: Random, digits: int = 7) -> str:
    """A number of so many digits."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def word(rng: Random) -> str:
    """An adjective and a noun, like quiet-harbor; there are over twenty thousand."""
    return f"{rng.choice(_words()['adjectives'])}-{rng.choice(_words()['nouns'])}"


def uuid(rng: Random) -> str:
    """A random UUID of version 4."""
    return str(UUID(int=rng.getrandbits(128), version=4))


DRAW = {"numbers": number, "words": word, "uuids": uuid}


def distinct(rng: Random, kind: str, count: int) -> list[str]:
    """So many different numbers, words or uuids."""
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(DRAW[kind](rng))
    return list(found)
