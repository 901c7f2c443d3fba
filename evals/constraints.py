"""Instructions whose keeping can be checked: how a reply has to look, in the style of IFEval (arXiv 2311.07911), in our words."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Kind:
    """A kind of instruction; `text` may have {n}, {word} and {phrase}, and `holds` gets them by name.

    Attributes:
        text: what the model is told.
        holds: whether a reply (without white space around it) keeps it.
        clashes: kinds that cannot be kept together with it.
        counts: what {n} is drawn from.
    """

    text: str
    holds: Callable[[str, int, str, str], bool]
    clashes: frozenset[str] = frozenset()
    counts: tuple[int, ...] = (1,)


def _words(reply: str) -> int:
    return len(reply.split())


def _times(reply: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", reply, flags=re.IGNORECASE))


def _bullets(reply: str) -> int:
    return len(re.findall(r"^\s*[*-]\s+\S", reply, flags=re.MULTILINE))


def _parts(reply: str) -> int:
    return sum(bool(part.strip()) for part in re.split(r"^\s*\*\*\*\s*$", reply, flags=re.MULTILINE))


def _quoted(reply: str) -> bool:
    return len(reply) > 2 and reply[0] == reply[-1] == '"'


_ENDS = frozenset({"ends with", "quoted", "postscript"})
KINDS: dict[str, Kind] = {
    "lowercase": Kind(
        "Write your whole reply in lowercase letters.",
        lambda reply, n, word, phrase: reply == reply.lower(),
        frozenset({"uppercase", "postscript", "title"}),
    ),
    "uppercase": Kind(
        "Write your whole reply in capital letters.",
        lambda reply, n, word, phrase: reply == reply.upper(),
        frozenset({"lowercase"}),
    ),
    "no commas": Kind("Do not use any commas.", lambda reply, n, word, phrase: "," not in reply),
    "ends with": Kind(
        'End your reply with this sentence and nothing after it: "{phrase}"',
        lambda reply, n, word, phrase: reply.rstrip('"').lower().endswith(phrase.lower()),
        _ENDS - {"ends with"},
    ),
    "quoted": Kind(
        "Put your whole reply in double quotation marks.",
        lambda reply, n, word, phrase: _quoted(reply),
        (_ENDS | {"title", "bullets", "parts"}) - {"quoted"},
    ),
    "postscript": Kind(
        'Add a postscript at the end that begins with "P.S."',
        lambda reply, n, word, phrase: re.search(r"^\W*P\.\s?S\.", reply, flags=re.MULTILINE) is not None,
        (_ENDS | {"lowercase"}) - {"postscript"},
    ),
    "title": Kind(
        "Give your reply a title in double angle brackets, like <<A Title>>.",
        lambda reply, n, word, phrase: re.search(r"<<[^<>\n]*\S[^<>\n]*>>", reply) is not None,
        frozenset({"quoted", "lowercase"}),
    ),
    "bullets": Kind(
        'Use exactly {n} bullet points, each on a line of its own that begins with "* ".',
        lambda reply, n, word, phrase: _bullets(reply) == n,
        frozenset({"quoted", "parts"}),
        (2, 3, 4),
    ),
    "parts": Kind(
        "Write exactly {n} parts and put a line with nothing but three stars (***) between them.",
        lambda reply, n, word, phrase: _parts(reply) == n and "***" in reply,
        frozenset({"quoted", "bullets"}),
        (2, 3),
    ),
    "uses a word": Kind(
        'Use the word "{word}" at least {n} times.',
        lambda reply, n, word, phrase: _times(reply, word) >= n,
        frozenset({"avoids a word"}),
        (1, 2, 3),
    ),
    "avoids a word": Kind(
        'Never use the word "{word}".',
        lambda reply, n, word, phrase: not _times(reply, word),
        frozenset({"uses a word"}),
    ),
    "at least": Kind(
        "Use at least {n} words.",
        lambda reply, n, word, phrase: _words(reply) >= n,
        frozenset({"at most"}),
        (30, 50),
    ),
    "at most": Kind(
        "Use at most {n} words.",
        lambda reply, n, word, phrase: _words(reply) <= n,
        frozenset({"at least"}),
        (60, 80),
    ),
}


@dataclass(frozen=True)
class Constraint:
    """One instruction with what was drawn for it."""

    kind: str
    n: int
    word: str
    phrase: str

    @property
    def text(self) -> str:
        return KINDS[self.kind].text.format(n=self.n, word=self.word, phrase=self.phrase)

    def holds(self, reply: str) -> bool:
        """Whether a reply keeps it; an empty one keeps nothing."""
        reply = reply.strip()
        return bool(reply) and KINDS[self.kind].holds(reply, self.n, self.word, self.phrase)


def draw_constraints(rng: Random, count: int, words: Sequence[str], phrases: Sequence[str]) -> list[Constraint]:
    """So many of different kinds that can be kept together."""
    found: list[Constraint] = []
    for kind in rng.sample(sorted(KINDS), len(KINDS)):
        if len(found) < count and not any(one.kind in KINDS[kind].clashes for one in found):
            found.append(Constraint(kind, rng.choice(KINDS[kind].counts), rng.choice(words), rng.choice(phrases)))
    return found
