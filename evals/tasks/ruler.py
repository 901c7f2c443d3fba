"""RULER: 13 synthetic tasks of retrieval, tracing, counting and question answering, at any length."""

import math
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from kvpress.evals import draw
from kvpress.evals.corpora import Corpus, read_hotpotqa, read_squad
from kvpress.evals.fit import fill, largest
from kvpress.evals.metrics import string_match_all, string_match_any
from kvpress.evals.rows import NOISE, Kind, hub_rows, read_rows, read_text
from kvpress.evals.task import Sample, Task, TaskError, check_choice, check_count
from kvpress.haystack import book_text, split_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Niah(NamedTuple):
    """One of the needle tasks.

    Attributes:
        haystack: "noise" and "needle" stand a line each, "text" goes on in sentences.
        key_kind: what the needles' keys are, see `draw`.
        value_kind: what their values are.
        keys: how many keys there are.
        values: how many values each key has.
        queries: how many keys are asked for.
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("text"),
    "niah_single_3": Niah("text", value_kind="uuids"),
    "niah_multikey_1": Niah("text", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Niah("text", values=4),
    "niah_multiquery": Niah("text", keys=4, queries=4),
}
NEW_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
HUB = "simonjegou/ruler"
READY_LENGTHS = (4096, 8192, 16384)
FIELDS: dict[str, Kind] = {
    "context": str, "question": str, "answer_prefix": str, "answer": list, "task": str, "max_new_tokens": int,
}  # fmt: skip
NIAH_DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
VT_INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
VT_EXAMPLE_TOKENS = 500
VT_HOPS = 4
CWE_INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_COMMON = 10
FWE_INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
QA_RULE = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


class Text(NamedTuple):
    """A sample's texts."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """One of RULER's 13 tasks, generated here.

    Source: Hsieh et al., "RULER", arXiv 2404.06654, and the authors' code (NVIDIA/RULER, commit c3f5e3b4): task definitions,
    prompts, new tokens and scores are theirs. As there, `length` counts the new tokens too, and a prompt holds as much
    haystack as fits. Deviations:

    - The text around needles is `haystack`, not Paul Graham's essays (which may be given), from its start. It ends at a word.
    - Words come from lists of our own; those of cwe from the shipped books, and are made up when these do not suffice.
    - Each sample is fitted by itself, and nothing is shuffled in the same way for all samples.
    - The example in front of vt is drawn for each sample, as are the words of cwe's.

    With `rows="leaderboard"` the samples are the ready rows behind the leaderboard of NVIDIA's kvpress (`simonjegou/ruler`: RULER's
    own generator, 500 rows a task, lengths in tokens of Llama 3.1), and control characters are taken out of answers, as there. In
    that protocol the context is compressed alone: `query_aware: false`; a table of it is the mean over the 13 tasks. What is
    fed in one pass there, the question, is fed token by token here: the same for policies that act on prompts only, while
    those that evict in decode evict at its tokens too.

    Args:
        task: niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, vt, cwe, fwe, qa_1, qa_2.
        length: tokens of the whole prompt, chat template included, and the answer, at most.
        rows: "drawn", or "leaderboard" for the ready ones, of length 4096, 8192 or 16384.
        repeats: drawn samples.
        limit: of ready rows, the first so many of the task; None for all.
        haystack: "books", a text file, or a folder of .txt files; for the tasks that hide needles in text.
        data_dir: for qa_1 and qa_2 a folder with squad.json (SQuAD 2.0's dev set) or hotpotqa.json (HotpotQA's distractor dev
            set); of ready rows, a folder with 4096.jsonl, ...; None loads from the hub.

    Raises:
        TaskError: an unknown task, a number out of range, or a length without ready rows.
    """

    name: ClassVar[str] = "ruler"

    task: str = "niah_single_2"
    length: int = 4096
    rows: str = "drawn"
    repeats: int = 20
    limit: int | None = None
    haystack: str = "books"
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.task, "task", list(NEW_TOKENS))
        check_count(self.length, "length", 1)
        check_choice(self.rows, "rows", ["drawn", "leaderboard"])
        check_count(self.repeats, "repeats", 1)
        if self.limit is not None:
            check_count(self.limit, "limit", 1)
        if self.rows == "leaderboard" and self.length not in READY_LENGTHS:
            known = ", ".join(map(str, READY_LENGTHS))
            raise TaskError(f"length={self.length}, but the leaderboard has rows of {known} tokens; give one of these")

    @property
    def metric(self) -> str:
        return "string_match_any" if self.task.startswith("qa") else "string_match_all"

    @property
    def label(self) -> str:
        return f"{self.name}/{self.task}"

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        if self.rows == "leaderboard":
            yield from self._ready_samples()
            return
        write = self._writer(tokenizer)
        limit, guess = self.length - NEW_TOKENS[self.task], self.length // 10
        for index in range(self.repeats):

            def build(size: int, index: int = index) -> Sample:
                return self._sample(index, write(index, size))

            guess = fill(self, tokenizer, build, limit, guess)
            yield build(guess)

    def score(self, sample: Sample, answer: str) -> float:
        match = string_match_any if self.metric == "string_match_any" else string_match_all
        if self.rows == "leaderboard":
            answer = re.sub(r"[\x00-\x1f]", "", answer)
        return match(answer, sample.answers)

    def _ready_samples(self) -> Iterator[Sample]:
        """The leaderboard's rows of this task."""
        source = f"https://huggingface.co/datasets/{HUB}"
        how = f"save the rows of {self.length} of {source} as {self.length}.jsonl, one a line, in a data_dir"
        if self.data_dir is not None:
            rows = read_rows(Path(self.data_dir).expanduser() / f"{self.length}.jsonl", FIELDS, how)
        else:
            rows = hub_rows("RULER's ready rows", FIELDS, how, HUB, str(self.length), split="test")
        index = 0
        for row in rows:
            if row["task"] != self.task or index == self.limit:
                continue
            yield Sample(
                index=index,
                context=row["context"],
                question=row["question"],
                answers=tuple(map(str, row["answer"])),
                max_new_tokens=row["max_new_tokens"],
                answer_prefix=row["answer_prefix"],
                meta={"length": self.length},
            )
            index += 1
        if not index:
            raise TaskError(f"there are no rows of {self.task} among the ready ones of {self.length} tokens; {how}")

    def _sample(self, index: int, text: Text) -> Sample:
        return Sample(
            index=index,
            context=text.context,
            question=text.question,
            answers=tuple(text.answers),
            max_new_tokens=NEW_TOKENS[self.task],
            answer_prefix=text.answer_prefix,
            meta={"length": self.length},
        )

    def _writer(self, tokenizer: "PreTrainedTokenizerBase") -> Callable[[int, int], Text]:
        """What writes sample `index` with so much haystack: the more, the longer, and with equal draws."""
        if self.task in NIAH:
            kind = NIAH[self.task]
            words = read_text(self.haystack).split() if kind.haystack == "text" else []
            return lambda index, size: write_niah(self.rng(index), kind, size, words)
        if self.task == "vt":
            return lambda index, size: write_vt(self.rng(index), size, tokenizer)
        if self.task == "cwe":
            return lambda index, size: write_cwe(self.rng(index), size, short=self.length < 4096)
        if self.task == "fwe":
            vocabulary = max(4, (self.length - NEW_TOKENS["fwe"]) // 50)
            return lambda index, size: write_fwe(self.rng(index), size, vocabulary)
        corpus = read_squad(self.data_dir) if self.task == "qa_1" else read_hotpotqa(self.data_dir)
        if self.repeats > len(corpus.questions):
            raise TaskError(
                f"repeats={self.repeats}, but {self.label} has {len(corpus.questions)} questions; set at most that"
            )
        return lambda index, size: write_qa(self.rng(index), size, corpus, index)


def write_niah(rng: Random, kind: Niah, size: int, words: list[str]) -> Text:
    """Needles in `size` noises, other needles, or words of a text."""
    what = kind.value_kind
    keys = draw.distinct(rng, kind.key_kind, kind.keys)
    drawn = iter(draw.distinct(rng, what, kind.keys * kind.values))
    values = {key: [next(drawn) for _ in range(kind.values)] for key in keys}
    needles = [_magic(what, key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    asked = rng.sample(keys, kind.queries)
    depths = sorted(rng.sample(NIAH_DEPTHS, len(needles)))
    if kind.haystack == "text":
        pieces = split_sentences(" ".join(words[i % len(words)] for i in range(size)))
        places = [int(len(pieces) * depth) for depth in depths]
        joint = " "
    else:
        places = sorted(int(size * rng.random()) for _ in needles)
        if kind.haystack == "noise":
            pieces = [" ".join(NOISE)] * size
        else:
            pieces = [_magic(what, draw.DRAW[kind.key_kind](rng), draw.DRAW[what](rng)) for _ in range(size)]
        joint = "\n"
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        pieces.insert(place, needle)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    answers = [value for key in asked for value in values[key]]
    context = joint.join(pieces)
    if len(answers) == 1:
        one = what.removesuffix("s")
        return Text(
            f"A special magic {one} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {one} afterwards.\n{context}",
            f"\nWhat is the special magic {one} for {query} mentioned in the provided text?",
            f" The special magic {one} for {query} mentioned in the provided text is",
            answers,
        )
    return Text(
        f"Some special magic {what} are hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n{context}",
        f"\nWhat are all the special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text are",
        answers,
    )


def _magic(what: str, key: str, value: str) -> str:
    return f"One of the special magic {what} for {key} is: {value}."


def write_vt(rng: Random, size: int, tokenizer: "PreTrainedTokenizerBase") -> Text:
    """A chain of assignments in `size` noises, after an example of about 500 tokens with its answer."""
    seed = rng.random()

    def example(noises: int) -> str:
        text = _vt(Random(seed), noises, letters=3)
        return f"{text.context}{text.question}{text.answer_prefix} {' '.join(text.answers)}\n\n"

    fitting = largest(lambda n: len(tokenizer(example(n))["input_ids"]), VT_EXAMPLE_TOKENS, 10)
    text = _vt(rng, size, letters=5)
    return text._replace(context=example(fitting or 0) + text.context)


def _vt(rng: Random, size: int, letters: int) -> Text:
    names: dict[str, None] = {}
    while len(names) <= VT_HOPS:
        names.setdefault("".join(rng.choices(string.ascii_uppercase, k=letters)))
    variables = list(names)
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    lines = [" ".join(NOISE)] * size
    places = sorted(int((size + 1) * rng.random()) for _ in chain)
    for place, assignment in zip(reversed(places), reversed(chain), strict=True):
        lines.insert(place, assignment)
    return Text(
        VT_INTRODUCTION + "\n".join(lines),
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(variables)} variables are "
        f"assigned the value {value}, they are: ",
        variables,
    )


def write_cwe(rng: Random, size: int, short: bool) -> Text:
    """Ten common words among `size` rarer ones, after a small example with its answer."""
    example_size, example_often, example_rarely = (10, 3, 1) if short else (30, 10, 3)
    often, rarely = (6, 1) if short else (30, 3)
    example = _cwe(rng, example_size, example_often, example_rarely)
    text = _cwe(rng, size, often, rarely)
    shown = f"{example.context}{example.question}{example.answer_prefix} {_numbered(example.answers)}\n"
    return text._replace(context=shown + text.context)


def _cwe(rng: Random, size: int, often: int, rarely: int) -> Text:
    words = some_words(Random(rng.random()), CWE_COMMON + size)
    common, rare = words[:CWE_COMMON], words[CWE_COMMON:]
    listed = common * often + rare * rarely
    rng.shuffle(listed)
    return Text(
        CWE_INTRODUCTION + _numbered(listed),
        "\nQuestion: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        common,
    )


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


@cache
def _book_words() -> tuple[str, ...]:
    """The lower-case words of the shipped books with four letters or more."""
    words = (word.strip(string.punctuation + "“”‘’—") for word in book_text().split())
    return tuple(
        sorted({word for word in words if len(word) > 3 and word.isascii() and word.isalpha() and word.islower()})
    )


def some_words(rng: Random, count: int) -> list[str]:
    """So many different words, from the books and then made up of syllables."""
    words = dict.fromkeys(rng.sample(_book_words(), len(_book_words()))[:count])
    while len(words) < count:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randrange(3, 5)))
        words.setdefault("".join(syllables))
    return list(words)


def write_fwe(rng: Random, size: int, vocabulary: int) -> Text:
    """Coded words whose frequencies fall with the square of their rank; the most frequent is three dots."""
    coded: dict[str, None] = {"...": None}
    while len(coded) < vocabulary:
        coded.setdefault("".join(rng.choices(string.ascii_lowercase, k=6)))
    total = math.pi**2 / 6  # the sum over all ranks, without end
    words = [word for rank, word in enumerate(coded, 1) for _ in range(int(size / rank**2 / total))]
    rng.shuffle(words)
    return Text(
        FWE_INTRODUCTION + " ".join(words),
        FWE_QUESTION,
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        list(coded)[1:4],
    )


def write_qa(rng: Random, size: int, corpus: Corpus, index: int) -> Text:
    """A question whose documents stand among `size` others, those near to it first; all there are at most."""
    question = corpus.questions[index]
    near = rng.sample(question.near, len(question.near))
    far = rng.sample(range(len(corpus.documents)), len(corpus.documents))
    others = [number for number in dict.fromkeys(near + far) if number not in question.about]
    chosen = question.about + others[:size]
    rng.shuffle(chosen)
    documents = "\n\n".join(f"Document {place}:\n{corpus.documents[number]}" for place, number in enumerate(chosen, 1))
    return Text(
        f"{QA_RULE}\n\nThe following are given documents.\n\n{documents}",
        f"\n\n{QA_RULE}\n\nQuestion: {question.text}",
        " Answer:",
        question.answers,
    )
