"""LongBench v2: the authors' prompt, both protocols, the letter that an answer names, drawn rows, tables by group."""

import csv
import json
import re

import pytest

from kvpress.evals import make_task
from kvpress.evals.metrics import chosen_letter
from kvpress.evals.report import write_report
from kvpress.evals.task import TaskError
from support.saved import row, save

ROW = {
    "_id": "abc",
    "domain": "Single-Document QA",
    "difficulty": "easy",
    "length": "short",
    "question": "Who did it? ",
    "choice_A": "The cook",
    "choice_B": "The {question}",
    "choice_C": "Nobody",
    "choice_D": "All",
    "answer": "C",
    "context": " It was a dark night. " * 40,
}


@pytest.fixture
def rows(tmp_path):
    """Writes rows as the hub has them, and gives the task over them."""

    def write(*content, **fields):
        (tmp_path / "longbench_v2.jsonl").write_text("\n".join(map(json.dumps, content)))
        return make_task({"name": "longbench_v2", "data_dir": str(tmp_path), **fields})

    return write


def test_the_prompt(rows, byte):
    first, second = rows(ROW, {**ROW, "difficulty": "hard", "length": "long"}, ROW, limit=2).samples(byte)
    assert first.context + first.question == (
        "Please read the following text and answer the question below.\n\n<text>\n"
        + ROW["context"].strip()
        + "\n</text>\n\nWhat is the correct answer to this question: Who did it?\nChoices:\n(A) The cook\n(B) The {question}\n"
        '(C) Nobody\n(D) All\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert (first.answers, first.max_new_tokens, first.meta["id"]) == (("C",), 128, "abc")
    assert second.meta["groups"] == {"difficulty": "hard", "length of the text": "long"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B)", "B"),
        ("**The correct answer is (B)**", "B"),
        ("I think. The correct answer is D.", "D"),
        ("The correct answer is (insert answer here). The correct answer is (A)", "A"),
        (
            "The correct answer is A, no: The correct answer is (C)",
            "C",
        ),  # with brackets comes first, as in the authors' code
        ("The correct answer is (E)", None),
        ("B", None),
        ("the correct answer is (B)", None),
        ("", None),
    ],
)
def test_the_letter_that_counts(rows, byte, answer, letter):
    assert chosen_letter(answer) == letter
    (sample,) = rows({**ROW, "answer": "B"}).samples(byte)
    assert rows(ROW).score(sample, answer) == (letter == "B")


def test_the_protocols_cut_differently(rows, byte):
    """Bytes are tokens here: 300 of the middle of the whole prompt, or of the context's end, are gone."""
    whole = sum(map(len, next((s.context, s.question) for s in rows(ROW).samples(byte))))
    text = next(s.context + s.question for s in rows(ROW).samples(byte))
    for protocol, tokens in (("official", 128), ("nv", 16)):
        (sample,) = rows(ROW, protocol=protocol, max_length=whole - 300).samples(byte)
        cut = sample.context + sample.question
        assert sample.max_new_tokens == tokens
        assert whole - 302 <= len(cut) <= whole - 299  # the token at the start counts, halves are rounded down
        if protocol == "official":
            half = len(cut) // 2
            assert text.startswith(cut[: half - 2]) and text.endswith(cut[half + 2 :])
        else:
            assert text.endswith(sample.question) and text.startswith(sample.context) and "(D) All" in sample.question
    (other,) = rows(ROW, protocol="nv", truncate="middle", max_length=whole - 300).samples(byte)
    assert not text.startswith(other.context)
    with pytest.raises(TaskError, match=r"max_length=100, but a question alone has \d+ tokens"):
        list(rows(ROW, protocol="nv", max_length=100).samples(byte))


def test_drawn_rows(byte):
    task = make_task({"name": "longbench_v2", "length": 2500, "repeats": 6})
    letters = []
    for sample in task.samples(byte):
        assert 1800 < task.prompt(sample, byte).length <= 2500
        facts = dict(re.findall(r"The special magic word for (\w+) is ([\w-]+)\.", sample.context))
        choices = dict(re.findall(r"\(([A-D])\) ([\w-]+)\n", sample.question))
        city = re.search(r"magic word for (\w+)\?", sample.question)[1]
        assert len(facts) == 4 and set(choices.values()) == set(facts.values())
        assert choices[sample.answers[0]] == facts[city]
        letters.append(sample.answers[0])
    assert len(set(letters)) > 1
    other = next(make_task({**task.to_dict(), "seed": 1}).samples(byte))
    assert other.context != next(task.samples(byte)).context


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choice_C": None}, "line 1: choice_C is 'None'; give a str"),
        ({"answer": "E"}, "row 1: answer is 'E'; give one of A, B, C, D"),
        ({"answer": ""}, "row 1: answer is ''"),
        ({"answer": "AB"}, "row 1: answer is 'AB'"),
    ],
)
def test_broken_rows_are_named(rows, byte, change, said):
    with pytest.raises(TaskError, match=said):
        list(rows({**ROW, **change}).samples(byte))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"protocol": "nvidia"}, "protocol='nvidia' is not known"),
        ({"truncate": "head"}, "truncate='head'"),
        ({"length": 900, "data_dir": "x"}, "drop one"),
        ({"max_length": 1}, "max_length=1"),
    ],
)
def test_wrong_parameters_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        make_task({"name": "longbench_v2", **fields})


def test_data_that_is_not_there_says_how_to_get_it(monkeypatch, byte):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(TaskError, match=r"cannot load LongBench v2 .*longbench_v2.jsonl, one a line, in a data_dir"):
        list(make_task("longbench_v2").samples(byte))
    assert asked == [(("zai-org/LongBench-v2",), {"split": "train"})]


def test_reports_have_a_table_for_each_group(tmp_path):
    task = {"name": "longbench_v2", "data_dir": "x"}
    groups = [("easy", "short"), ("easy", "long"), ("hard", "short"), ("hard", "short")]

    def rows(*scores):
        return [
            row(i, float(score), meta={"groups": {"difficulty": a, "length of the text": b}})
            for i, (score, (a, b)) in enumerate(zip(scores, groups, strict=True))
        ]

    save(tmp_path, {"task": task}, rows(1, 1, 1, 0))
    save(tmp_path, {"task": task, "policy": "h2o", "budget": 0.5}, rows(1, 0, 1, 0))
    write_report([tmp_path], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "Score by difficulty:\n\n| policy | easy | hard |\n|---|---|---|\n| full() | 100.0 | 50.0 |\n| h2o(0.5) | 50.0 | 50.0 |"
        in text
    )
    assert "| policy | short | long |\n|---|---|---|\n| full() | 66.7 | 100.0 |\n| h2o(0.5) | 66.7 | 0.0 |" in text
    with (tmp_path / "report.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
