"""Own data: rows of a JSON lines file, or of a data set on the hub."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvpress.errors import nearest
from kvpress.evals import metrics
from kvpress.evals.rows import Kind, check_row, located_hub_rows, located_rows
from kvpress.evals.task import Sample, Task, TaskError, Turn, check_choice, check_count, check_flag
from kvpress.evals.tasks.scbench import MODES, requests_because

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_ALL: dict[str, Callable[[str, Sequence[str]], float]] = {
    "words_found": metrics.words_found,
    "string_match_all": metrics.string_match_all,
    "string_match_any": metrics.string_match_any,
}
"""Metrics of an answer and all right answers."""
ALL_COUNT = ("words_found", "string_match_all")
"""Those of them that want every right answer."""
OF_ONE: dict[str, Callable[[str, str], float]] = {
    "exact_match": metrics.exact_match,
    "qa_f1": metrics.qa_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge": metrics.rouge,
    "rouge_zh": metrics.rouge_zh,
    "code_sim": metrics.code_sim,
}
"""Metrics of an answer and one right answer; of several the largest counts."""
METRICS = (*OF_ONE, *OF_ALL)
TEXT: dict[str, Kind] = {
    "question": str,
    "answer_prefix": str,
    "answers": (str, int, float, list),
    "max_new_tokens": int,
}
"""What a question may have, in a row or in one of its turns."""
COLUMNS: dict[str, Kind] = {"context": str, **TEXT, "turns": list}


@dataclass(frozen=True, kw_only=True)
class JsonLines(Task):
    """Rows of your own, each a long text with a question or several, or a long text alone.

    A row has `context`, and as far as it needs them `question`, `answer_prefix` (the answer's first words), `answers` (a text, or
    a list of right ones), `max_new_tokens`, and `turns`: further questions in the same conversation, each a text or an object
    with question, answers, answer_prefix and max_new_tokens. A row's score is the mean over its questions.

    Args:
        path: a file with one JSON object per line.
        dataset: instead of it, a data set as `datasets.load_dataset` finds it: a name on the hub (owner/name), or a folder.
        config, split, revision: of that data set.
        columns: what the rows call these, where they call it otherwise: {"context": "document", "answers": "label"}. What is
            named here must be in every row.
        metric: how answers are scored, one of `METRICS`. Without one answers cannot be scored.
        mode: how the questions of `turns` are asked: "turns" is one conversation; "requests" asks each about the context alone,
            on a copy of its cache, and needs `query_aware: false`.
        golden_history: whether the conversation holds each turn's right answer when the next one is asked (the first of them;
            all of them for a metric of all); else what the model wrote.
        max_new_tokens: of answers, where a row does not say.
        separator: between context and question, and without a chat template before each further question.
        limit: the first so many rows; None for all.

    Raises:
        TaskError: neither or both of path and dataset, an unknown metric or column, or a number out of range.
    """

    name: ClassVar[str] = "jsonl"

    path: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str = ""
    mode: str = "turns"
    golden_history: bool = False
    max_new_tokens: int = 64
    separator: str = "\n\n"
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.dataset is None):
            both = f"path={self.path!r} and dataset={self.dataset!r}"
            raise TaskError(f"{both}; give the path of a JSON lines file, or the name of a data set")
        for name in ("path", "dataset", "config", "split", "revision", "separator"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TaskError(f"{name}={value!r} is no text; write it in quotes")
        if not isinstance(self.columns, Mapping):
            raise TaskError(f"columns={self.columns!r} is no mapping; write columns: {{context: document}}")
        for role, column in self.columns.items():
            check_choice(role, "columns", list(COLUMNS))
            if not isinstance(column, str):
                raise TaskError(f"columns.{role}={column!r} is no column's name; write it in quotes")
        if self.metric:
            check_choice(self.metric, "metric", METRICS)
        check_choice(self.mode, "mode", MODES)
        check_flag(self.golden_history, "golden_history")
        check_count(self.max_new_tokens, "max_new_tokens", 1)
        if self.limit is not None:
            check_count(self.limit, "limit", 1)

    @property
    def label(self) -> str:
        return f"{self.name}/{self.dataset if self.path is None else Path(self.path).stem}"

    @property
    def unseen_because(self) -> str:
        return requests_because(self.mode)

    def check(self, scored: bool = True) -> None:
        if scored and not self.metric:
            raise TaskError(
                f"{self.label} has no metric, so that answers cannot be scored; give task.metric: one of {', '.join(METRICS)}"
            )
        for _ in self._samples(scored):
            pass

    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        yield from self._samples(bool(self.metric))

    def score(self, sample: Sample, answer: str) -> float:
        if self.metric in OF_ALL:
            return OF_ALL[self.metric](answer, sample.answers)
        return max(OF_ONE[self.metric](answer, truth) for truth in sample.answers)

    def name_of(self, sample: Sample) -> str:
        return str(sample.meta["row"])

    def _samples(self, scored: bool) -> Iterator[Sample]:
        """The rows as samples; with answers in each of them if `scored`."""
        for index, (where, row) in enumerate(self._rows()):
            if index == self.limit:
                return
            yield self._sample(index, check_row(row, {}, where), where, scored)

    def _rows(self) -> Iterator[tuple[str, Any]]:
        if self.path is not None:
            return located_rows(Path(self.path).expanduser(), "give the path of a file with one JSON object per line")
        assert self.dataset is not None
        config = () if self.config is None else (self.config,)
        how = "give the path of a JSON lines file instead"
        return located_hub_rows(self.dataset, how, self.dataset, *config, split=self.split, revision=self.revision)

    def _sample(self, index: int, row: dict[str, Any], where: str, scored: bool) -> Sample:
        turns = self._values(row, {"turns": list}, where).get("turns", [])
        in_turns = TEXT if turns else {}  # columns that may be there only
        found = self._values(row, COLUMNS, where, [role for role in self.columns if role not in in_turns])
        asked = [(found, where)] if found.get("question") or not turns else []
        for number, turn in enumerate(turns, 1):
            place, turn = f"{where}, turn {number}", {"question": turn} if isinstance(turn, str) else turn
            asked.append((self._values(check_row(turn, {}, place), TEXT, place, ["question"]), place))
        if not found.get("context") and not asked[0][0].get("question"):
            named = self.columns.get("context", "context")
            raise TaskError(f"{where}: no text in {named!r}, and no question; name the text's column: columns.context")
        first, *later = (self._turn(values, place, scored) for values, place in asked)
        context = found.get("context", "")
        return Sample(
            index=index,
            context=context,
            question=self.separator + first.question if context and first.question else first.question,
            answers=first.answers,
            max_new_tokens=first.max_new_tokens,
            answer_prefix=first.answer_prefix,
            meta={
                "row": where.rpartition(", ")[2],
                **({"id": row["id"]} if isinstance(row.get("id"), str | int) else {}),
            },
            turns=tuple(replace(turn, question=self.separator + turn.question) for turn in later),
            golden=first.golden,
            requests=self.mode == "requests",
        )

    def _turn(self, found: dict[str, Any], where: str, scored: bool) -> Turn:
        answers = found.get("answers", [])
        texts = tuple(map(str, answers if isinstance(answers, list) else [answers]))
        if (scored or self.golden_history) and (not texts or "" in texts):
            named = self.columns.get("answers", "answers")
            what = "scoring" if scored else "golden_history"
            raise TaskError(f"{where}: no right answer in {named!r}, which {what} needs; add it, or name its column")
        most = found.get("max_new_tokens", self.max_new_tokens)
        check_count(most, f"{where}: max_new_tokens", 1)
        golden = ""
        if self.golden_history and self.mode == "turns":
            golden = " " + (", ".join(texts) if self.metric in ALL_COUNT else texts[0])
        return Turn(found.get("question", ""), texts, most, found.get("answer_prefix", ""), golden)

    def _values(
        self, row: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, needed: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Role -> value, of those that the row has and that are not null.

        Raises:
            TaskError: a needed one is not there, or a value is of another type or no text that can be encoded.
        """
        found = {}
        for role, kind in kinds.items():
            column = self.columns.get(role, role)
            value = row.get(column)
            if value is None:
                if role in needed:
                    raise TaskError(f"{where}: no column {column!r} ({role}){nearest(column, list(map(str, row)))}")
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
                raise TaskError(f"{where}: {column} ({role}) is {str(value)[:40]!r}; give a {wanted}")
            if isinstance(value, str):
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise TaskError(
                        f"{where}: {column} ({role}) has {value[error.start]!a}, half a character; save the data as UTF-8"
                    ) from error
            found[role] = value
        return found
