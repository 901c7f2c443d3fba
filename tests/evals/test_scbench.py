"""Several questions about one context: what rows hold, what the cache holds when a question is asked, scores per turn."""

import csv
import json
import re

import pytest
import torch
from rich.console import Console

import kvpress
from kvpress.compat import CACHE
from kvpress.evals import make_task
from kvpress.evals.answer import end_tokens
from kvpress.evals.config import ConfigError
from kvpress.evals.metrics import first_value
from kvpress.evals.report import write_report
from kvpress.evals.runner import run_plan
from kvpress.evals.task import TaskError
from support.plans import plan
from support.saved import row, save

TEXT = "The grass is green. The sky is blue. The sun is yellow. " * 3
TURNS = [
    {"question": "What is blue?", "answers": "sky"},
    {"question": "And green?", "answers": "grass", "max_new_tokens": 3},
    {"question": "Sure?", "answers": ["yes", "indeed"]},
]


def answered(folder, loaded, out, task, **fields):
    """The rows of each run, by policy."""
    wanted = plan(
        folder, out, defaults={"task": task, **fields}, sweep={"policy": ["full", "h2o", "snapkv"], "budget": [40]}
    )
    assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).exit_code == 0
    files = {run.policy.partition("(")[0]: wanted.out / run.id / "samples.jsonl" for run in wanted.runs}
    return {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}


@pytest.fixture
def conversation(tmp_path):
    """A task over one row with three turns; `alone`: over three rows with a question each."""

    def make(alone=False, **fields):
        rows = [{"context": TEXT, **turn} for turn in TURNS] if alone else [{"context": TEXT, "turns": TURNS}]
        path = tmp_path / f"{'alone' if alone else 'together'}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        spec = {"name": "jsonl", "path": str(path), "metric": "words_found", "max_new_tokens": 6, "chat": False}
        return make_task(spec | fields).to_dict()

    return make


@pytest.mark.parametrize("share", [True, False])
def test_requests_are_answered_as_if_each_came_alone(folder, loaded, conversation, tmp_path, share):
    """Whatever the policy evicts while one is answered, the next finds the context's cache as it was."""
    wanted = conversation(mode="requests")
    together = answered(folder, loaded, tmp_path / "a", wanted, query_aware=False)
    alone = answered(folder, loaded, tmp_path / "b", conversation(alone=True), query_aware=False)
    for policy, rows in alone.items():
        (one,) = together[policy]
        assert [turn["answer"] for turn in one["turns"]] == [row["answer"] for row in rows]
        assert [turn["kept"] for turn in one["turns"]] == [row["kept"] for row in rows]
        assert [turn["seen"] for turn in one["turns"]] == [row["seen"] for row in rows]
        assert one["new_tokens"] == sum(row["new_tokens"] for row in rows)
        assert one["prompt_tokens"] == max(row["prompt_tokens"] for row in rows)
    assert {turn["kept"] for turn in together["h2o"][0]["turns"]} == {40}


@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_golden_answers_stand_in_the_conversation(folder, loaded, conversation, tmp_path, policy):
    """By hand: the tokens of a conversation that nobody wrote but the author of the row, each fed as a decode step."""
    task = conversation(golden_history=True)
    (row,) = answered(folder, loaded, tmp_path, task, query_aware=False)[policy]
    model, tokenizer = loaded
    pieces = ["\n\nWhat is blue?", " sky\n\nAnd green?", " grass\n\nSure?"]
    assert len({turn["answer"] for turn in row["turns"]}) > 1 or row["turns"][0]["answer"] != " sky"
    for number, (turn, most) in enumerate(zip(row["turns"], (6, 3, 6), strict=True)):
        with torch.no_grad(), kvpress.patch(model, policy, **({} if policy == "full" else {"budget": 40})) as handle:
            output = model(torch.tensor([tokenizer(TEXT)["input_ids"]]), use_cache=True)
            history = "".join(pieces[: number + 1])
            for token in tokenizer(history, add_special_tokens=False)["input_ids"]:
                output = model(torch.tensor([[token]]), **{CACHE: output[CACHE]}, use_cache=True)
            written = []
            while len(written) < most and not set(written) & end_tokens(model, tokenizer):
                written.append(int(output.logits[0, -1].argmax()))
                if len(written) < most and written[-1] not in end_tokens(model, tokenizer):
                    output = model(torch.tensor([written[-1:]]), **{CACHE: output[CACHE]}, use_cache=True)
            kept = handle.report().total.kept
        words = [token for token in written if token not in end_tokens(model, tokenizer)]
        assert turn["answer"] == tokenizer.decode(words, skip_special_tokens=True)
        assert turn["kept"] == pytest.approx(kept)
        seen = len(tokenizer(TEXT)["input_ids"]) + len(tokenizer(history, add_special_tokens=False)["input_ids"])
        assert turn["seen"] == seen + len(written) - 1


def test_golden_answers_in_a_chat(conversation, real):
    """Together the parts are what the template makes of the conversation with the right answers in it."""
    task = make_task({**conversation(golden_history=True), "chat": None})
    (sample,) = task.samples(real)
    prompt = task.prompt(sample, real)
    messages = [{"role": "user", "content": f"{TEXT}\n\nWhat is blue?"}, {"role": "assistant", "content": "sky"}]
    messages += [{"role": "user", "content": "And green?"}, {"role": "assistant", "content": "grass"}]
    messages += [{"role": "user", "content": "Sure?"}]
    whole = real.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert real.decode([*prompt.context, *prompt.question, *(id for turn in prompt.turns for id in turn)]) == whole


def test_requests_in_a_chat(conversation, real):
    """Context and any one of the questions are a conversation of their own."""
    task = make_task({**conversation(mode="requests"), "chat": None})
    (sample,) = task.samples(real)
    prompt = task.prompt(sample, real)
    for turn, question in zip(TURNS, [prompt.question, *prompt.turns], strict=True):
        message = [{"role": "user", "content": f"{TEXT}\n\n{turn['question']}"}]
        whole = real.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        assert real.decode(prompt.context + question) == whole


@pytest.mark.parametrize("fields", [{"mode": "requests"}, {"golden_history": True}, {}])
def test_agreement_of_each_turn(folder, loaded, conversation, tmp_path, fields):
    rows = answered(folder, loaded, tmp_path, conversation(**fields), query_aware=False, agreement=4)
    (full,), (h2o,) = rows["full"], rows["h2o"]
    assert full["score"] == 1 and [turn["score"] for turn in full["turns"]] == [1, 1, 1]
    assert all(turn["kl"] == pytest.approx(0, abs=1e-6) for turn in full["turns"])
    assert h2o["kl"] == pytest.approx(sum(turn["kl"] for turn in h2o["turns"]) / 3)  # each of 4 tokens
    assert h2o["turns"][1]["kl"] > 0


def test_requests_cannot_be_seen_by_the_compression(conversation, tmp_path):
    with pytest.raises(ConfigError, match=r"mode='requests' shares one compressed context .*; set query_aware: false"):
        plan("x", tmp_path, defaults={"task": conversation(mode="requests")})
    with pytest.raises(ConfigError, match="set query_aware: false"):
        plan("x", tmp_path, defaults={"task": {"name": "scbench", "length": 900, "mode": "requests"}})


@pytest.mark.parametrize("mode", ["turns", "requests"])
@pytest.mark.parametrize("dataset", ["kv", "prefix_suffix", "vt", "mf"])
def test_drawn_rows(byte, dataset, mode):
    """What is asked for follows from the context alone, by rules of this test's own."""
    task = make_task({"name": "scbench", "dataset": dataset, "length": 3000, "repeats": 3, "mode": mode})
    for sample in task.samples(byte):
        assert len(sample.each_turn) == 5
        assert 2600 < task.prompt(sample, byte).length <= 3000
        assert len({turn.question for turn in sample.each_turn}) == 5
        for turn in sample.each_turn:
            assert set(turn.answers) == set(solve(dataset, turn.context, turn.question))
            assert task.score(turn, " " + ", ".join(turn.answers)) == 1
            assert task.score(turn, " nothing") == 0
            assert bool(turn.golden) == (mode == "turns")
        assert sample.golden.strip() == ", ".join(sample.answers) or mode == "requests"


def solve(dataset, context, question):
    if dataset == "kv":
        pairs = json.loads(context[context.index("{") :])
        return [pairs[re.search(r'Key: "(.*?)"', question)[1]]]
    if dataset == "prefix_suffix":
        begin, end = re.findall(r'"(.*?)"', question)
        return [line for line in context.splitlines() if line.startswith(begin) and line.endswith(end)]
    if dataset == "vt":
        held = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):  # in order: what is named stands before
            held[name] = held.get(value, value)
        wanted = re.search(r"\d+", question)[0]
        return [name for name, value in held.items() if value == wanted]
    numbers = sorted(json.loads(context[context.index("[") :]))
    place = {"largest": -1, "smallest": 0, "second largest": -2, "second smallest": 1, "median": len(numbers) // 2}
    return [str(numbers[place[re.search(r"is the (.*?)(?: number)? of the list", question)[1]]])]


def test_official_rows(byte, tmp_path):
    """The schema of the authors' files; prompts and history as their code has them."""
    turns = [{"input": "The first?", "answer": "alpha"}, {"input": "All?", "answer": ["beta", "gamma"]}]
    rows = [{"id": n, "context": "Some text.", "multi_turns": turns} for n in range(3)]
    (tmp_path / "scbench_qa_eng.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = {"name": "scbench", "dataset": "qa_eng", "data_dir": str(tmp_path), "limit": 2}
    task = make_task(spec)
    first, second = task.samples(byte)
    prompt = task.prompt(first, byte)
    assert byte.decode([*prompt.context, *prompt.question, *prompt.turns[0]]).removeprefix("<s>") == (
        "Read the book and answer the question. Be very concise in your answer.\n\nSome text.\n\nQuestion: The first?\nAnswer: "
        "alpha\n\nQuestion: All?\nAnswer:"
    )
    assert (second.index, first.turns[0].answers, first.max_new_tokens) == (1, ("beta", "gamma"), 40)
    assert task.score(first.each_turn[1], "Gamma, I think") == 1
    (only,) = make_task({**spec, "turns": 1, "limit": 1}).samples(byte)
    assert only.turns == ()


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("7.", "7", 1), ("7.9", "7", 1), ("17", "7", 0), ("2.5!", "2.5", 1), ("2.6", "2.5", 0), ("none", "7", 0)],
)
def test_first_value(answer, truth, score):
    assert first_value(answer, truth) == score


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dataset": "kvs"}, "did you mean 'kv'"),
        ({"mode": "turn"}, "did you mean 'turns'"),
        ({"golden_history": 1}, "golden_history=1 is not known; give true or false"),
        ({"dataset": "qa_eng", "length": 900}, "rows of qa_eng cannot be drawn, only those of kv"),
        ({"dataset": "mf", "length": 900, "turns": 6}, "mf asks 5 questions"),
        ({"length": 900, "data_dir": "x"}, "drop one"),
        ({"turns": 0}, "turns=0"),
    ],
)
def test_wrong_parameters_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        make_task({"name": "scbench", **fields})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"context": "x"}, "line 1: no field 'multi_turns'"),
        ({"context": "x", "multi_turns": []}, "line 1: multi_turns is .*must not be empty"),
        (
            {"context": "x", "multi_turns": [{"input": "a", "answer": "b"}, {"input": "a"}]},
            "row 1, turn 2: no field 'answer'",
        ),
        ({"context": "x", "multi_turns": ["why"]}, "row 1, turn 1: 'why' is no JSON object"),
    ],
)
def test_broken_rows_are_named(byte, tmp_path, row, said):
    (tmp_path / "scbench_kv.jsonl").write_text(json.dumps(row))
    with pytest.raises(TaskError, match=said):
        list(make_task({"name": "scbench", "data_dir": str(tmp_path)}).samples(byte))


def test_reports_show_each_turn(tmp_path):
    """Means by hand: of two samples with three turns and one with two."""
    task = {"name": "scbench", "length": 900, "repeats": 3}

    def turns(*scores, kept=1.0):
        return [
            {"answer": "", "answers": [], "score": score, "seen": 100, "kept": 100 * kept, "bytes": 1, "full_bytes": 1}
            for score in scores
        ]

    save(tmp_path, {"task": task}, [row(i, 1.0, turns=turns(1, 1, 1)) for i in range(3)])
    rows = [
        row(0, 0.5, turns=turns(1.0, 0.5, 0.0, kept=0.5)),
        row(1, 0.5, turns=turns(1.0, 0.0, 0.5, kept=0.25)),
        row(2, 0.5, turns=turns(0.5, 0.5, kept=0.25)),
    ]
    save(tmp_path, {"task": task, "policy": "h2o", "budget": 0.5}, rows)
    write_report([tmp_path], tmp_path)
    with (tmp_path / "report.csv").open() as file:
        (line,) = [line for line in csv.DictReader(file) if line["policy"].startswith("h2o")]
    assert [float(line[f"score@turn{n}"]) for n in (1, 2, 3)] == pytest.approx([2.5 / 3, 1 / 3, 0.25])
    assert float(line["kept@turn1"]) == pytest.approx(1 / 3) and float(line["kept@turn3"]) == pytest.approx(0.375)
    text = (tmp_path / "report.md").read_text()
    assert "| policy | turn 1 | turn 2 | turn 3 |" in text and "| h2o(0.5) | 83.3 | 33.3 | 25.0 |" in text
    page = (tmp_path / "report.html").read_text()
    assert "Score by turn" in page and "Entries kept after each turn" in page and ">37.5</a>" in page
