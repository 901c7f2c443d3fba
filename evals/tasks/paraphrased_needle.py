"""Paraphrased needles: a fact in a long text, asked for in other words than its own, beside the same in its own words."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from kvpress.evals.fit import exact
from kvpress.evals.rows import haystack_sentences
from kvpress.evals.task import Sample, TaskError, check_choice, check_counts
from kvpress.evals.tasks.grid import GridTask
from kvpress.haystack import Haystack, split_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDINGS = ("literal", "paraphrased")
INTRODUCTION = "Some facts about people are hidden within the following text. Memorize them; a question follows.\n"
FRAME = "\n\n{question} Answer with the name alone."
ANSWER_PREFIX = " The name is"


@cache
def words() -> dict[str, Any]:
    """The people, and the relations with their facts, questions and things."""
    found: dict[str, Any] = yaml.safe_load(
        (files("kvpress.evals") / "data" / "paraphrases.yaml").read_text(encoding="utf-8")
    )
    return found


@dataclass(frozen=True, kw_only=True)
class ParaphrasedNeedle(GridTask):
    """Who does what: a fact at a depth of a text, asked for literally and in other words.

    The paraphrased question has no content word of the fact ("Freya keeps a parrot in the bedroom." "Which person owns a talking
    bird?"), so that it is answered by meaning, not by equal tokens. The literal one is its control: the same text, the same
    fact. A policy that keeps what looks like the question, or like anything else by its words alone, loses more on the first:
    the gap that reports show. Run it with `query_aware: false`, as the question is to be unknown when the text is compressed.

    Source: after Modarressi et al., "NoLiMa", arXiv 2502.05167, whose data may not be shipped. Facts and questions are our own
    (`evals/data/paraphrases.yaml`), one score per name, lengths to the token.

    Args:
        lengths: tokens of the whole prompt.
        depths: where the fact stands, 0 for the text's start and 1 for its end.
        repeats: facts per length and depth.
        wordings: "literal", "paraphrased", or both; both ask the same things of the same texts.
        distractors: how many other facts of the same relation, about other people and things, stand anywhere in the text: one or
            several numbers, each with the same facts.
        haystack: "books", "noise" (five sentences that repeat), a text file, or a folder of .txt files.

    Raises:
        TaskError: a parameter out of range.
    """

    name: ClassVar[str] = "paraphrased_needle"

    lengths: tuple[int, ...] = (1000, 4000, 16000)
    depths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    wordings: tuple[str, ...] = WORDINGS
    distractors: tuple[int, ...] = (0, 3)
    haystack: str = "books"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.wordings, tuple) or not self.wordings:
            raise TaskError(f"wordings={self.wordings!r} is no list; give one or both of {', '.join(WORDINGS)}")
        for wording in self.wordings:
            check_choice(wording, "wordings", WORDINGS)
        check_counts(self.distractors, "distractors", 0)
        most = min(len(relation["things"]) for relation in words()["relations"]) - 1
        if max(self.distractors) > most:
            raise TaskError(
                f"distractors={self.distractors!r}: a relation has {most} other things; give at most {most}"
            )

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        hay, index = Haystack(tokenizer, haystack_sentences(self.haystack)), 0
        for cell, (length, depth) in enumerate(self.grid()):
            for distractors in self.distractors:
                for wording in self.wordings:
                    rng = self.rng(cell)  # equal draws for all of a cell
                    first = rng.randrange(len(hay.sentences))
                    meta = {
                        "length": length,
                        "depth": depth,
                        "groups": {"wording": wording, "distractors": distractors},
                        "pairs": {"wording": f"{cell} {distractors}", "distractors": f"{cell} {wording}"},
                    }
                    build = _Builder(rng, index, wording, distractors, meta)
                    yield exact(self, tokenizer, hay, length, first, depth, build)
                    index += 1


class _Builder:
    """The sample of one drawn fact, and of others, around any two parts of a haystack."""

    def __init__(self, rng: Random, index: int, wording: str, distractors: int, meta: dict[str, Any]) -> None:
        self.index, self.meta = index, meta
        relation = rng.choice(words()["relations"])
        things = rng.sample(sorted(relation["things"]), len(relation["things"]))
        names = rng.sample(words()["names"], len(things))
        self.name = names[0]
        self.fact, *others = (
            relation["fact"].format(name=name, thing=thing) for name, thing in zip(names, things, strict=True)
        )
        # (share of the text before it, fact), later ones first: so the places of the others stay as they are
        self.others = sorted(((rng.random(), other) for other in others[:distractors]), reverse=True)
        asked = things[0] if wording == "literal" else relation["things"][things[0]]
        self.question = FRAME.format(question=relation[wording].format(thing=asked))

    def __call__(self, before: str, after: str) -> Sample:
        parts = [[sentence for sentence in split_sentences(text) if sentence] for text in (before, after)]
        count = len(parts[0])
        total = count + len(parts[1])
        for share, other in self.others:
            at = int(share * (total + 1))
            if at <= count:
                parts[0].insert(at, other)
            else:
                parts[1].insert(at - count, other)
        return Sample(
            index=self.index,
            context=INTRODUCTION + " ".join([*parts[0], self.fact, *parts[1]]),
            question=self.question,
            answers=(self.name,),
            max_new_tokens=16,
            answer_prefix=ANSWER_PREFIX,
            meta=self.meta,
        )
