"""Documents and questions about them, for RULER's question answering."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvpress.evals.rows import check_row, hub_rows
from kvpress.evals.task import TaskError

SQUAD = ("rajpurkar/squad_v2", "3ffb306f725f7d2ce8394bc1873b24868140c412")
SQUAD_HELP = (
    "put dev-v2.0.json of https://rajpurkar.github.io/SQuAD-explorer into a folder, "
    "call it squad.json, and set data_dir to the folder"
)
HOTPOTQA = ("hotpotqa/hotpot_qa", "1908d6afbbead072334abe2965f91bd2709910ab")
HOTPOTQA_HELP = (
    "put hotpot_dev_distractor_v1.json of https://hotpotqa.github.io into a folder, "
    "call it hotpotqa.json, and set data_dir to the folder"
)


class Question(NamedTuple):
    """A question.

    Attributes:
        text: the question.
        answers: the right ones.
        about: numbers of the documents that it comes with.
        near: numbers of documents on the same matter.
    """

    text: str
    answers: list[str]
    about: list[int]
    near: list[int]


class Corpus(NamedTuple):
    """Different documents, sorted, and questions about some of them."""

    documents: list[str]
    questions: list[Question]


def read_squad(data_dir: str | None) -> Corpus:
    """SQuAD 2.0's development set: its paragraphs, and the questions that have an answer."""
    rows = list(_squad_on_the_hub() if data_dir is None else _squad_in_a_folder(Path(data_dir).expanduser()))
    numbers = _numbers([paragraph for _, paragraph, _, _ in rows])
    articles: dict[str, dict[int, None]] = {}
    for title, paragraph, _, _ in rows:
        articles.setdefault(title, {})[numbers[paragraph]] = None
    questions = []
    for title, paragraph, text, answers in rows:
        about = numbers[paragraph]
        if answers:
            questions.append(Question(text, answers, [about], [near for near in articles[title] if near != about]))
    return Corpus(list(numbers), questions)


def read_hotpotqa(data_dir: str | None) -> Corpus:
    """HotpotQA's development set with distractors: each question comes with ten documents."""
    rows = list(_hotpotqa_on_the_hub() if data_dir is None else _hotpotqa_in_a_folder(Path(data_dir).expanduser()))
    numbers = _numbers([document for _, _, documents in rows for document in documents])
    questions = [
        Question(text, [answer], [numbers[document] for document in about], []) for text, answer, about in rows
    ]
    return Corpus(list(numbers), questions)


def _numbers(documents: list[str]) -> dict[str, int]:
    return {document: number for number, document in enumerate(sorted(set(documents)))}


def _squad_on_the_hub() -> Iterator[tuple[str, str, str, list[str]]]:
    """Title, paragraph, question and its answers."""
    repo, revision = SQUAD
    fields = {"title": str, "context": str, "question": str, "answers": dict}
    for row in hub_rows("SQuAD 2.0", fields, SQUAD_HELP, repo, split="validation", revision=revision):
        yield row["title"], row["context"], row["question"], list(row["answers"]["text"])


def _squad_in_a_folder(folder: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    path = folder / "squad.json"
    data = check_row(_read_json(path, SQUAD_HELP), {"data": list}, str(path))["data"]
    for number, article in enumerate(data, 1):
        where = f"{path}, article {number}"
        check_row(article, {"title": str, "paragraphs": list}, where)
        for paragraph in article["paragraphs"]:
            check_row(paragraph, {"context": str, "qas": list}, f"{where}, a paragraph")
            for qa in paragraph["qas"]:
                check_row(qa, {"question": str}, f"{where}, a question")
                answers = []
                if not qa.get("is_impossible"):
                    check_row(qa, {"answers": list}, f"{where}, a question")
                    answers = [
                        check_row(answer, {"text": str}, f"{where}, an answer")["text"] for answer in qa["answers"]
                    ]
                yield article["title"], paragraph["context"], qa["question"], answers


def _hotpotqa_on_the_hub() -> Iterator[tuple[str, str, list[str]]]:
    """Question, answer and documents."""
    repo, revision = HOTPOTQA
    fields = {"question": str, "answer": str, "context": dict}
    for row in hub_rows("HotpotQA", fields, HOTPOTQA_HELP, repo, "distractor", split="validation", revision=revision):
        context = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
        yield row["question"], row["answer"], [f"{title}\n{''.join(lines)}" for title, lines in context]


def _hotpotqa_in_a_folder(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    path = folder / "hotpotqa.json"
    for number, row in enumerate(_read_json(path, HOTPOTQA_HELP), 1):
        check_row(row, {"question": str, "answer": str, "context": list}, f"{path}, question {number}")
        yield row["question"], row["answer"], [f"{title}\n{''.join(lines)}" for title, lines in row["context"]]


def _read_json(path: Path, how_to_get: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(f"there is no file {path}; {how_to_get}") from error
    except ValueError as error:
        raise TaskError(f"{path}: not valid JSON ({error}); {how_to_get}") from error
