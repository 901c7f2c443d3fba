"""Reasoning: boxes and what counts as equal in them, rows, and what reports say of long answers."""

import csv
import json
import re

import pytest
from rich.console import Console

from kvpress.evals import make_task
from kvpress.evals.metrics import boxed, boxed_strict, last_box
from kvpress.evals.report import write_report
from kvpress.evals.runner import run_plan
from kvpress.evals.task import TaskError
from support.plans import plan
from support.saved import row, save


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {a}", "a"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and then \boxed{never closed", "7"),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_the_last_box(text, inside):
    assert last_box(text) == inside


@pytest.mark.parametrize(
    ("inside", "truth", "same"),
    [
        ("5", "5", True),
        ("5.0", "5", True),
        ("073", "73", True),
        ("-3", "3", False),
        ("1,000", "1000", True),
        ("1,000,000.5", "1000000.5", True),
        ("1,00", "100", False),  # no thousands
        ("0.5", r"\frac{1}{2}", True),
        ("1/2", r"\dfrac12", True),
        (r"-\frac{3}{4}", "-0.75", True),
        (r"\frac{-3}{4}", "-3/4", True),
        (r"\frac{1}{0}", "0", False),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"(2, 3)", "(3, 2)", False),
        (r"x = 4", "4", True),
        (r"90^\circ", "90", True),
        (r"90^{\circ}", "90", True),
        (r"25\%", "25", True),
        (r"\$12", "12", True),
        (r"12\text{ cm}^2", "12", True),
        (r"\text{(C)}", "(C)", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"2\sqrt{3}", r"2 \sqrt{3}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        (r"\,x+1", "x+1", True),
        (r"\leftarrow", "arrow", False),  # no \left
        ("5.", "5", True),
    ],
)
def test_equal_answers(inside, truth, same):
    assert boxed(rf"Thus \boxed{{{inside}}}.", truth) == same


def test_strict_boxes_are_those_of_the_other_toolkit():
    text = r"First \boxed{12} then \boxed{\frac{1}{2}}"
    assert boxed_strict(text, "12", first=True) == 1
    assert boxed_strict(text, r"\frac{1", first=False) == 1  # up to the next brace
    assert boxed_strict(text, r"\frac{1}{2}", first=False) == 0
    assert boxed_strict(r"\boxed{12.0}", "12", first=True) == 0
    assert boxed_strict("12", "12", first=True) == 0


def test_rows_in_the_schema_of_the_hub(byte, tmp_path):
    lines = [
        {
            "problem": "What is 1+1?",
            "solution": "...",
            "answer": "2",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "t/1",
        },
        {"problem": "And 2+2?", "answer": "4", "subject": "Algebra", "level": 5, "unique_id": "t/2"},
    ]
    (tmp_path / "math500.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "aime24.jsonl").write_text(json.dumps({"id": 60, "problem": "Find n.", "answer": "073"}))
    spec = {"name": "reasoning", "data_dir": str(tmp_path)}
    task = make_task(spec)
    first, second = task.samples(byte)
    assert first.context + first.question == (
        "What is 1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert (first.answers, first.max_new_tokens, second.meta["groups"]) == (
        ("2",),
        8192,
        {"level": "5", "subject": "Algebra"},
    )
    assert task.score(first, r"It is \boxed{2.0}.") == 1 and task.details(first, r"It is \boxed{2.0}.") == {"strict": 0}
    (only,) = make_task({**spec, "dataset": "aime24", "max_new_tokens": 100}).samples(byte)
    assert (only.meta["id"], only.max_new_tokens) == (60, 100)
    aime = make_task({**spec, "dataset": "aime24"})
    assert next(aime.samples(byte)).max_new_tokens == 32768
    assert aime.details(only, r"\boxed{1} \boxed{073}") == {"strict": 1}
    assert make_task({**spec, "dataset": "aime25"}).label == "reasoning/aime25"
    with pytest.raises(
        TaskError, match=r"no file .*aime25.jsonl; save the rows of https://huggingface.co/datasets/math-ai/aime25"
    ):
        list(make_task({**spec, "dataset": "aime25"}).samples(byte))


def test_drawn_problems(byte):
    """Worked out again from their words."""
    for sample in make_task({"name": "reasoning", "dataset": "arithmetic", "repeats": 12, "steps": 6}).samples(byte):
        count = int(re.search(r"holds (\d+)", sample.context)[1])
        steps = re.findall(r"Then (?:(\d+) marbles are (put|taken)|.*?made (\d+) times)", sample.context)
        assert len(steps) == 6
        for number, way, times in steps:
            count = count * int(times) if times else count + (int(number) if way == "put" else -int(number))
            assert count > 0
        assert sample.answers == (str(count),)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dataset": "math"}, "dataset='math' is not known; did you mean 'math500'"),
        ({"dataset": "arithmetic", "data_dir": "x"}, "arithmetic is drawn; drop it"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"thinking": "yes"}, "thinking='yes' is not known; give true or false"),
    ],
)
def test_wrong_parameters_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        make_task({"name": "reasoning", **fields})


def test_thinking_is_asked_of_the_template(byte):
    asked = []

    class Tokenizer:
        chat_template, name_or_path, eos_token_id = "any", "x", None

        def apply_chat_template(self, messages, **options):
            asked.append(options["enable_thinking"])
            return messages[0]["content"]

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    for thinking in (False, True):
        task = make_task({"name": "reasoning", "dataset": "arithmetic", "repeats": 1, "thinking": thinking})
        task.prompt(next(task.samples(byte)), Tokenizer())
    assert asked == [False, True]


def test_a_run_counts_what_was_written_held_and_cut_off(folder, loaded, tmp_path):
    """A random model never ends: 100 tokens each, all cut off; h2o holds 30 entries at every step, full attention all."""
    task = {"name": "reasoning", "dataset": "arithmetic", "repeats": 2, "max_new_tokens": 100}
    wanted = plan(folder, tmp_path, defaults={"task": task}, sweep={"policy": ["full", "h2o"], "budget": [30]})
    loaded[0].generation_config.eos_token_id, before = None, loaded[0].generation_config.eos_token_id
    try:
        assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).exit_code == 0
    finally:
        loaded[0].generation_config.eos_token_id = before
    full, h2o = (
        [json.loads(line) for line in (wanted.out / run.id / "samples.jsonl").read_text().splitlines()]
        for run in wanted.runs
    )
    for one, other in zip(full, h2o, strict=True):
        assert one["details"] == {"strict": 0.0}
        if one["new_tokens"] == 100:
            assert one["cut_off"] == 1
        assert (
            one["peak_kept"] == one["seen"] == one["kept"] == one["prompt_tokens"] + one["new_tokens"] - one["cut_off"]
        )
        assert other["peak_kept"] == other["kept"] == 30
    assert {row["cut_off"] for row in full} == {1}


def test_reports_say_what_long_answers_cost(tmp_path):
    """By hand: two answers each; those under the policy are longer, one of them is cut off."""
    task = {"name": "reasoning", "dataset": "arithmetic", "repeats": 2}

    def one(index, score, tokens, cut, kept, strict, seen):
        return row(index, score, new_tokens=tokens, cut_off=cut, peak_kept=kept, seen=seen, details={"strict": strict})

    save(tmp_path, {"task": task}, [one(0, 1.0, 100, 0, 150, 1.0, 150), one(1, 1.0, 200, 0, 250, 0.0, 250)])
    policy = {"task": task, "policy": "h2o", "budget": 50}
    save(tmp_path, policy, [one(0, 1.0, 300, 0, 50, 1.0, 350), one(1, 0.0, 400, 1, 50, 0.0, 450)])
    write_report([tmp_path], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| to full | strict, % | new tokens | cut off, % | most entries | of full's length, % | MiB |" in text
    assert re.search(r"\| h2o\(50\) \|.*\| 50\.0 \| 350 \| 50\.0 \| 50 \| 25\.0 \|", text)
    assert re.search(r"\| full\(\) \|.*\| 50\.0 \| 150 \| 0\.0 \| 200 \| 100\.0 \|", text)
    with (tmp_path / "report.csv").open() as file:
        found = {line["policy"]: line for line in csv.DictReader(file)}
    assert (found["h2o(budget=50)"]["new_tokens"], found["h2o(budget=50)"]["strict"]) == ("350.0", "0.5")
    assert (found["h2o(budget=50)"]["cut_off"], found["h2o(budget=50)"]["tokens_kept_most"]) == ("0.5", "50.0")
    page = (tmp_path / "report.html").read_text()
    assert "new tokens" in page and "of full&#39;s length, %" in page and ">350</a>" in page
