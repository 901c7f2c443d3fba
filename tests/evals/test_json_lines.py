"""Own data: rows as samples, turns, and what is said of rows that do not work."""

import io
import json

import pytest
import torch
from rich.console import Console

import kvpress
from kvpress.evals import make_task
from kvpress.evals.answer import end_tokens
from kvpress.evals.runner import RunError, run_plan
from kvpress.evals.task import TaskError
from support.plans import plan

TEXT = "The grass is green. The sky is blue. "
ROW = {"context": TEXT, "question": "What is blue?", "answers": ["sky", "the sky"]}


@pytest.fixture
def rows(tmp_path):
    """Writes rows (objects, or lines as bytes) into a file, and gives the task over it."""

    def write(*content, **fields):
        path = tmp_path / "mine.jsonl"
        lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in content]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return make_task({"name": "jsonl", "path": str(path), **fields})

    return write


def test_columns_defaults_and_scores(rows, byte):
    task = rows(
        {"document": "A text.", "ask": "Who?", "label": "Ann", "id": 7, "max_new_tokens": 3},
        {"document": "Another.", "ask": "When?", "label": ["noon", "12"], "answer_prefix": " At"},
        columns={"context": "document", "question": "ask", "answers": "label"},
        metric="qa_f1",
        max_new_tokens=9,
    )
    first, second = task.samples(byte)
    assert (first.context, first.question, first.answers, first.max_new_tokens) == ("A text.", "\n\nWho?", ("Ann",), 3)
    assert first.meta == {"row": "line 1", "id": 7}
    assert (second.answers, second.answer_prefix, second.max_new_tokens) == (("noon", "12"), " At", 9)
    assert task.label == "jsonl/mine"
    assert task.score(second, "At noon.") == pytest.approx(2 / 3)
    assert task.score(first, "the ann") == 1.0  # without articles and case


def test_a_text_alone(rows, byte):
    """Nothing is asked, and nothing can be scored."""
    task = rows({"context": TEXT}, chat=False)
    (sample,) = task.samples(byte)
    prompt = task.prompt(sample, byte)
    assert byte.decode(prompt.context + prompt.question, skip_special_tokens=True) == TEXT
    task.check(scored=False)
    with pytest.raises(TaskError, match=r"no metric.*give task.metric: one of exact_match"):
        task.check()


@pytest.mark.parametrize(
    ("content", "fields", "said"),
    [
        ([ROW, {"contxt": "x"}], {}, "line 2: no text in 'context', and no question"),
        ([ROW], {"columns": {"context": "text"}}, r"line 1: no column 'text' \(context\); did you mean 'context'"),
        ([ROW, {"context": TEXT}], {"metric": "rouge"}, "line 2: no right answer in 'answers'"),
        ([ROW, {**ROW, "answers": []}], {"metric": "rouge"}, "line 2: no right answer"),
        ([{**ROW, "question": 3}], {}, r"line 1: question \(question\) is '3'; give a str"),
        ([{**ROW, "max_new_tokens": 0}], {}, "line 1: max_new_tokens=0"),
        ([{**ROW, "turns": [3]}], {}, "line 1, turn 1: '3' is no JSON object"),
        ([{**ROW, "turns": [{"answers": "x"}]}], {}, r"line 1, turn 1: no column 'question'"),
        ([{**ROW, "turns": ["And green?"]}], {"metric": "rouge"}, "line 1, turn 1: no right answer"),
        ([["a"]], {}, "line 1: .* is no JSON object"),
        ([b"{"], {}, "line 1: not valid JSON"),
        ([ROW, b'{"context": "caf\xe9"}'], {}, r"line 2: no UTF-8 text \(byte 17 is 0xe9\); save the file as UTF-8"),
        ([b'{"context": "\\ud83d"}'], {}, "line 1: context .* half a character"),
        ([], {}, "mine.jsonl has no rows"),
        ([b"", b"  "], {}, "mine.jsonl has no rows"),
    ],
)
def test_broken_rows_are_named(rows, content, fields, said, byte):
    with pytest.raises(TaskError, match=said) as error:
        list(rows(*content, **fields).samples(byte))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "path=None and dataset=None"),
        ({"path": "x", "dataset": "y"}, "give the path of a JSON lines file, or the name"),
        ({"path": "x", "metric": "rogue"}, "metric='rogue' is not known; did you mean 'rouge'"),
        ({"path": "x", "columns": {"contexts": "a"}}, "did you mean 'context'"),
        ({"path": "x", "columns": "context"}, "no mapping"),
        ({"path": "x", "max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_fields_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        make_task({"name": "jsonl", **fields})


def test_a_file_with_a_byte_order_mark(rows, byte):
    (sample,) = rows(b"\xef\xbb\xbf" + json.dumps(ROW).encode()).samples(byte)
    assert sample.context == TEXT


def test_rows_of_a_data_set_by_name(monkeypatch, byte):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return [ROW, {"context": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = make_task({"name": "jsonl", "dataset": "me/mine", "config": "en", "split": "dev", "metric": "rouge"})
    with pytest.raises(TaskError, match="me/mine, row 2: no right answer"):
        list(task.samples(byte))
    assert asked == [(("me/mine", "en"), {"split": "dev", "revision": None})]
    assert task.label == "jsonl/me/mine"


def test_turns_in_a_chat(rows, real):
    """Each part ends where the model's answer begins, and together they are what the template makes of the conversation."""
    task = rows({**ROW, "turns": ["And green?", {"question": "Sure?", "answer_prefix": "I am"}]})
    (sample,) = task.samples(real)
    prompt = task.prompt(sample, real)
    messages = [{"role": "user", "content": TEXT + "\n\nWhat is blue?"}]
    for question in ("And green?", "Sure?"):
        messages += [{"role": "assistant", "content": "Well."}, {"role": "user", "content": question}]
    whole = real.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    parts = [real.decode(ids) for ids in (prompt.context + prompt.question, *prompt.turns)]
    assert "Well.".join(parts) == whole + "I am"


@pytest.mark.parametrize("query_aware", [True, False])
def test_turns_are_one_conversation(folder, loaded, rows, tmp_path, query_aware):
    """Full attention answers each turn as `generate` does over all that came before; the score is the turns' mean."""
    model, tokenizer = loaded
    turns = [
        {"question": "And green?", "answers": "grass"},
        {"question": "Sure?", "answers": "yes", "max_new_tokens": 3},
    ]
    task = rows({**ROW, "turns": turns}, metric="words_found", max_new_tokens=5).to_dict()
    wanted = plan(folder, tmp_path / "out", defaults={"task": task, "query_aware": query_aware, "policy": "full"})
    assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).exit_code == 0
    (row,) = (json.loads(line) for line in (wanted.out / wanted.runs[0].id / "samples.jsonl").read_text().splitlines())
    ids = tokenizer(f"{TEXT}\n\nWhat is blue?")["input_ids"]
    for turn, following, most in zip(row["turns"], ("\n\nAnd green?", "\n\nSure?", ""), (5, 5, 3), strict=True):
        output = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)[0].tolist()
        new = [token for token in output[len(ids) :] if token not in end_tokens(model, tokenizer)]
        assert turn["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        ids = [*ids, *new, *tokenizer(following, add_special_tokens=False)["input_ids"]]
    assert row["seen"] == len(ids) - 1  # the last token is never fed
    assert row["new_tokens"] == 13
    assert row["answers"] == ["sky", "the sky"] and row["turns"][2]["answers"] == ["yes"]
    assert row["score"] == pytest.approx(sum(turn["score"] for turn in row["turns"]) / 3)


def test_turns_share_a_prompt_and_are_answered_outside_of_batches(folder, loaded, rows, tmp_path):
    rows_of = {}
    content = [{**ROW, "turns": [{"question": t, "answers": "x"}]} for t in ("Sure?", "Yes?")]
    task = rows(*content, ROW, ROW, max_new_tokens=4, metric="words_found").to_dict()
    for size, share in ((1, True), (4, False)):
        wanted = plan(
            folder,
            tmp_path / f"out{size}",
            defaults={"task": task},
            sweep={"policy": ["full", "h2o"], "budget": [20]},
            batch_size=size,
            share_prompts=share,
        )
        assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).exit_code == 0
        lines = [(wanted.out / run.id / "samples.jsonl").read_text().splitlines() for run in wanted.runs]
        rows_of[size] = [sorted(map(json.loads, own), key=lambda row: row["index"]) for own in lines]
    for one, other in zip(rows_of[1], rows_of[4], strict=True):
        assert [(row["answer"], row["kept"], row["seen"]) for row in one] == [
            (row["answer"], row["kept"], row["seen"]) for row in other
        ]
        assert [row["batch"] for row in other] == [1, 1, 2, 2]


def test_rows_are_refused_before_a_model_loads(folder, rows, tmp_path):
    task = rows(ROW, {"context": TEXT}, metric="rouge").to_dict()
    wanted = plan(folder, tmp_path / "out", defaults={"task": task})

    def never(*_):
        raise AssertionError("loaded")

    with pytest.raises(TaskError, match="line 2: no right answer"):
        run_plan(wanted, Console(file=io.StringIO()), loader=never)
    assert not (tmp_path / "out").exists()


def test_a_row_longer_than_the_model_is_named(folder, loaded, rows, tmp_path):
    task = rows(ROW, {**ROW, "context": "x" * 2000}, metric="rouge").to_dict()
    wanted = plan(folder, tmp_path / "out", defaults={"task": task})
    with pytest.raises(
        RunError, match=r"line 2 has 20[0-9]+ tokens with its answer, and .* was made for 1024; shorten it"
    ):
        run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded)
    assert kvpress.patch(loaded[0], "full").unpatch() is None  # nothing is left on the model
