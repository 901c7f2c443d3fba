"""SCBench: several questions about one long context, as a conversation or as requests that share it."""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvpress.evals import draw, metrics
from kvpress.evals.fit import fill
from kvpress.evals.rows import NOISE, Kind, check_row, hub_rows, read_rows
from kvpress.evals.task import Sample, Task, TaskError, Turn, check_choice, check_count, check_flag
from kvpress.evals.tasks.kv_retrieval import json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "microsoft/SCBench"
MODES = ("turns", "requests")
FIELDS: dict[str, Kind] = {"context": str, "multi_turns": list}
TURN: dict[str, Kind] = {"input": str, "answer": (str, int, float, list)}
VT_HOPS = 4


class Part(NamedTuple):
    """One of the data sets; {context} and {input} are a row's."""

    context: str
    question: str
    max_new_tokens: int
    metric: str


PARTS = {
    "kv": Part(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}",
        "{input}",
        150,
        "contained",
    ),
    "prefix_suffix": Part("{context}", "{input}", 150, "contained"),
    "vt": Part("{context}", "{input}", 30, "string_match_all"),
    "mf": Part("{context}", "{input}", 5, "first_value"),
    "many_shot": Part("{context}", "{input}", 10, "string_match_any"),
    "qa_eng": Part(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}",
        "Question: {input}\nAnswer:",
        40,
        "string_match_any",
    ),
}
SCORES: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "contained": lambda answer, truths: max(float(truth in answer) for truth in truths),
    "string_match_all": metrics.string_match_all,
    "string_match_any": metrics.string_match_any,
    "first_value": lambda answer, truths: max(metrics.first_value(answer, truth) for truth in truths),
}


@dataclass(frozen=True, kw_only=True)
class SCBench(Task):
    """Several questions about one context; each is scored by itself, so that reports show how scores fall from turn to turn.

    Source: Li et al., "SCBench", arXiv 2412.10319, and the authors' code (microsoft/MInference, commit 0ff346d8): prompts, new
    tokens and scores of these six of its twelve data sets are theirs. Deviations:

    - Official scores of vt are rounded to two digits for each turn; here they are not.
    - mf says what is looked for in its questions alone, not in front of the list as well, so that one context serves all.
    - Drawn rows are in the form of the official ones, in our own words, of any length.

    Args:
        dataset: "kv" (values of a JSON object), "prefix_suffix" (the string that begins and ends so), "vt" (variables that hold
            a value), "mf" (largest, smallest, median, ... of a list of numbers); with official rows "many_shot" and "qa_eng" too.
        mode: "turns" is one conversation. "requests" reads the context once and asks each question about it alone, on a copy of
            its cache: it needs `query_aware: false`.
        golden_history: whether the conversation holds the right answers when the next turn is asked, as in the official code;
            else what the model wrote.
        length: for drawn rows, tokens of the context and the first question at most; None for the official rows.
        turns: questions of a drawn row; mf has 5 at most. Of an official row, at most so many are asked.
        repeats: drawn rows.
        limit: of official rows, the first so many; None for all.
        data_dir: a folder with scbench_`dataset`.jsonl in the official schema; None loads it from the hub.

    Raises:
        TaskError: an unknown data set or mode, a number out of range, or `length` where rows cannot be drawn.
    """

    name: ClassVar[str] = "scbench"

    dataset: str = "kv"
    mode: str = "turns"
    golden_history: bool = True
    length: int | None = None
    turns: int = 5
    repeats: int = 10
    limit: int | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.dataset, "dataset", list(PARTS))
        check_choice(self.mode, "mode", MODES)
        check_flag(self.golden_history, "golden_history")
        check_count(self.turns, "turns", 1)
        check_count(self.repeats, "repeats", 1)
        if self.limit is not None:
            check_count(self.limit, "limit", 1)
        if self.length is None:
            return
        check_count(self.length, "length", 1)
        if self.data_dir is not None:
            raise TaskError(
                f"length={self.length} and data_dir={self.data_dir!r}: the rows have their own length; drop one"
            )
        if self.dataset not in DRAW:
            raise TaskError(
                f"length={self.length}, but rows of {self.dataset} cannot be drawn, only those of {', '.join(DRAW)}; drop length"
            )
        if self.dataset == "mf" and self.turns > len(MF_ASKED):
            raise TaskError(f"turns={self.turns}, but mf asks {len(MF_ASKED)} questions; give at most that")

    @property
    def metric(self) -> str:
        return PARTS[self.dataset].metric

    @property
    def label(self) -> str:
        return f"{self.name}/{self.dataset}" + (" (requests)" if self.mode == "requests" else "")

    @property
    def unseen_because(self) -> str:
        return requests_because(self.mode)

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        if self.length is None:
            for index, row in enumerate(self._rows()):
                if index == self.limit:
                    return
                yield self._sample(index, row, {})
            return
        guess = self.length // 40
        for index in range(self.repeats):

            def build(size: int, index: int = index) -> Sample:
                return self._sample(
                    index, DRAW[self.dataset](self.rng(index), size, self.turns), {"length": self.length}
                )

            guess = fill(self, tokenizer, build, self.length, guess)
            yield build(guess)

    def score(self, sample: Sample, answer: str) -> float:
        return SCORES[self.metric](answer, sample.answers)

    def _sample(self, index: int, row: dict[str, Any], meta: dict[str, Any]) -> Sample:
        part = PARTS[self.dataset]
        first, *later = (self._turn(part, turn) for turn in row["multi_turns"][: self.turns])
        return Sample(
            index=index,
            context=part.context.replace("{context}", row["context"]),
            question=first.question,
            answers=first.answers,
            max_new_tokens=first.max_new_tokens,
            meta=meta,
            turns=tuple(later),
            golden=first.golden,
            requests=self.mode == "requests",
        )

    def _turn(self, part: Part, turn: dict[str, Any]) -> Turn:
        answer = turn["answer"]
        answers = tuple(map(str, answer if isinstance(answer, list) else [answer]))
        golden = " " + (", ".join(answers) if part.metric == "string_match_all" else answers[0])
        return Turn(
            f"\n\n{part.question.replace('{input}', turn['input'])}",
            answers,
            part.max_new_tokens,
            golden=golden if self.golden_history and self.mode == "turns" else "",
        )

    def _rows(self) -> Iterator[dict[str, Any]]:
        name = f"scbench_{self.dataset}"
        how = f"put {name}.jsonl from https://huggingface.co/datasets/{HUB} (folder data) into a folder and set data_dir to it"
        if self.data_dir is not None:
            path = Path(self.data_dir).expanduser() / f"{name}.jsonl"
            rows, what = read_rows(path, FIELDS, how), str(path)
        else:
            url = f"https://huggingface.co/datasets/{HUB}/resolve/main/data/{name}.jsonl"
            what = f"SCBench's {self.dataset}"
            rows = hub_rows(what, FIELDS, how, "json", data_files=url, split="train")
        for number, row in enumerate(rows, 1):
            for turn, asked in enumerate(row["multi_turns"], 1):
                check_row(asked, TURN, f"{what}, row {number}, turn {turn}")
            yield row


def requests_because(mode: str) -> str:
    """Why requests keep their questions out of the compressed prompt; empty for a conversation."""
    return "mode='requests' shares one compressed context among all questions" if mode == "requests" else ""


def draw_kv(rng: Random, size: int, turns: int) -> dict[str, Any]:
    """A JSON object of the asked pairs and `size` others."""
    ids = draw.distinct(rng, "uuids", 2 * (turns + size))
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    asked = pairs[:turns]
    rng.shuffle(pairs)
    return {
        "context": f"JSON data:\n{json_object(pairs)}",
        "multi_turns": [
            {"input": f'Key: "{key}"\nThe value associated with the specified key is:', "answer": value}
            for key, value in asked
        ],
    }


def draw_prefix_suffix(rng: Random, size: int, turns: int) -> dict[str, Any]:
    """Strings of 30 letters and digits, a line each; no two begin or end alike."""
    found: dict[str, str] = {}
    ends: set[str] = set()
    while len(found) < turns + size:
        text = "".join(rng.choices(string.ascii_lowercase + string.digits, k=30))
        if text[:8] not in found and text[-8:] not in ends:
            found[text[:8]] = text
            ends.add(text[-8:])
    strings = list(found.values())
    asked = strings[:turns]
    rng.shuffle(strings)
    return {
        "context": "Below is a list of strings, one on each line.\n\n" + "\n".join(strings),
        "multi_turns": [
            {
                "input": f'The string of the list that begins with "{text[:8]}" and ends with "{text[-8:]}" is:',
                "answer": text,
            }
            for text in asked
        ],
    }


def draw_vt(rng: Random, size: int, turns: int) -> dict[str, Any]:
    """A chain of assignments for each turn, spread over `size` noises; the chains are interleaved."""
    names: dict[str, None] = {}
    while len(names) < turns * (VT_HOPS + 1):
        names.setdefault("".join(rng.choices(string.ascii_uppercase, k=5)))
    variables = list(names)
    chains = [variables[at::turns] for at in range(turns)]
    values = [draw.number(rng, 5) for _ in range(turns)]
    while len(set(values)) < turns:
        values = [draw.number(rng, 5) for _ in range(turns)]
    assignments = [f"VAR {chain[0]} = {value}" for chain, value in zip(chains, values, strict=True)]
    for hop in range(1, VT_HOPS + 1):
        assignments += [f"VAR {chain[hop]} = VAR {chain[hop - 1]}" for chain in chains]
    lines = [" ".join(NOISE)] * size
    places = sorted(rng.randrange(size + 1) for _ in assignments)
    for place, assignment in zip(reversed(places), reversed(assignments), strict=True):
        lines.insert(place, assignment)
    return {
        "context": "Memorize the assignments of variables that are hidden in the following text.\n\n"
        + "\n".join(lines),
        "multi_turns": [
            {"input": f"All variables that hold the value {value}, directly or through others, are:", "answer": chain}
            for chain, value in zip(chains, values, strict=True)
        ],
    }


MF_ASKED: dict[str, Callable[[list[int]], int]] = {
    "largest number": lambda ordered: ordered[-1],
    "smallest number": lambda ordered: ordered[0],
    "second largest number": lambda ordered: ordered[-2],
    "second smallest number": lambda ordered: ordered[1],
    "median": lambda ordered: ordered[len(ordered) // 2],
}


def draw_mf(rng: Random, size: int, turns: int) -> dict[str, Any]:
    """An odd number of different numbers, three at least, in any order."""
    count = 2 * size + 3
    numbers = rng.sample(range(10 * count), count)
    ordered = sorted(numbers)
    return {
        "context": f"Below is a list of numbers.\n\n{numbers}",
        "multi_turns": [
            {"input": f"What is the {name} of the list?\n\nThe {name} is:", "answer": MF_ASKED[name](ordered)}
            for name in list(MF_ASKED)[:turns]
        ],
    }


DRAW: dict[str, Callable[[Random, int, int], dict[str, Any]]] = {
    "kv": draw_kv,
    "prefix_suffix": draw_prefix_suffix,
    "vt": draw_vt,
    "mf": draw_mf,
}
