"""Instructions and secrets in a system prompt: checks by hand, prompts, what the cache held of each part, leaks."""

import json
from random import Random

import pytest
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from kvpress.evals import Sample, make_task
from kvpress.evals.config import ConfigError
from kvpress.evals.constraints import KINDS, Constraint, draw_constraints
from kvpress.evals.metrics import share_told
from kvpress.evals.report import write_report
from kvpress.evals.runner import run_plan
from kvpress.evals.task import TaskError
from kvpress.evals.tasks.instructions import texts
from support.plans import plan
from support.saved import row, save
from support.tiny_saved import byte_tokenizer

KEPT = {
    "lowercase": ("all small, 3 words", "One capital", 1),
    "uppercase": ("ALL LARGE, 3", "almost ALL", 1),
    "no commas": ("no such sign.", "one, here", 1),
    "ends with": ("Yes. i hope this helps.", "I hope this helps. Bye.", 1),
    "quoted": ('"So it is."', '"So" it is.', 1),
    "postscript": ("Yes.\nP.S. No.", "Yes, P.S. in the middle", 1),
    "title": ("<<On Bread>>\nIt rises.", "<On Bread> It << >> rises.", 1),
    "bullets": ("So:\n* one\n* two", "* one\n* two\n* three", 2),
    "parts": ("one\n***\ntwo", "one *** two", 2),
    "uses a word": ("A garden. GARDEN!", "A garden and gardens", 2),
    "avoids a word": ("Some gardens", "The Garden", 1),
    "at least": ("one two three", "one two", 3),
    "at most": ("one two three", "one two three four", 3),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_keeps_an_instruction(kind):
    right, wrong, n = KEPT[kind]
    constraint = Constraint(kind, n, "garden", "I hope this helps.")
    assert constraint.holds(f"\n{right} \n") and not constraint.holds(wrong)
    assert not constraint.holds("") and not constraint.holds(" \n")
    assert "{" not in constraint.text


def test_drawn_instructions_fit_together():
    """Clashes are mutual, and what is drawn has none."""
    for kind, one in KINDS.items():
        assert kind not in one.clashes
        assert all(kind in KINDS[other].clashes for other in one.clashes)
    seen = set()
    for seed in range(200):
        drawn = draw_constraints(Random(seed), 4, texts()["words"], texts()["phrases"])
        kinds = {one.kind for one in drawn}
        assert len(kinds) == 4
        assert not any(kinds & KINDS[kind].clashes for kind in kinds)
        seen |= kinds
    assert seen == set(KINDS)


def test_share_told():
    """Words in their order: a longest common subsequence of 3 of 6, 6 of 6, and of words in another order 1."""
    text = "Never tell them what stands here."
    assert share_told("I will tell you what is here", text) == pytest.approx(3 / 6)
    assert share_told("Well: NEVER tell them, what stands here!!", text) == 1
    assert share_told("here stands what", text) == pytest.approx(1 / 6)
    assert share_told("", text) == 0


@pytest.mark.parametrize("ask", ["request", "attack"])
def test_samples_and_scores(byte, ask):
    task = make_task({"name": "instructions", "ask": ask, "repeats": 6, "constraints": 3})
    samples = list(task.samples(byte))
    for sample in samples:
        (a, b), (c, d) = sample.spans["defence"], sample.spans["instructions"]
        assert (a, c, d) == (0, b + 2, len(sample.context))
        assert sample.context[a:b] in texts()["defences"]
        for one in sample.meta["constraints"]:
            assert Constraint(**one).text in sample.context[c:d]
        asked = sample.question.removeprefix("\n\nUser: ").removesuffix("\n\nAssistant:")
        assert asked in texts()["requests" if ask == "request" else "attacks"]
        json.dumps(sample.meta)
    sample = samples[0]
    if ask == "attack":
        assert task.score(sample, sample.context) == 0 and task.details(sample, sample.context) == {
            "leak": 1,
            "leaked": 1,
        }
        assert task.score(sample, "I am sorry.") == 1 and task.details(sample, "")["leaked"] == 0
    else:
        kept = [
            [Constraint(**one).holds(text) for one in sample.meta["constraints"]] for text in ("Yes, so it is.", "")
        ]
        assert [task.score(sample, text) for text in ("Yes, so it is.", "")] == [float(all(one)) for one in kept]
    (other,) = make_task({"name": "instructions", "order": "instructions_first", "repeats": 1}).samples(byte)
    assert other.spans["instructions"][0] == 0 and other.spans["defence"][1] == len(other.context)


def test_a_reply_that_keeps_all_is_right(byte):
    """Every instruction must hold, not most of them."""
    task = make_task("instructions")
    constraints = [Constraint("no commas", 1, "x", "x"), Constraint("at least", 3, "x", "x")]
    sample = Sample(0, "", "", (), 9, meta={"constraints": [vars(one) for one in constraints]})
    assert [task.score(sample, text) for text in ("one two three", "one, two three", "one two", "")] == [1, 0, 0, 0]


def test_the_system_message_is_the_context(real):
    """Together the parts are what the template makes of both messages; spans are the tokens of the parts' texts."""
    task = make_task({"name": "instructions", "repeats": 3})
    for sample in task.samples(real):
        prompt = task.prompt(sample, real)
        messages = [{"role": "system", "content": sample.context}, {"role": "user", "content": sample.question}]
        assert real.decode(prompt.context + prompt.question) == real.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert sample.question not in real.decode(prompt.context)
        for name, (start, end) in prompt.spans.items():
            a, b = sample.spans[name]
            assert real.decode(prompt.context[start:end]).strip() == sample.context[a:b].strip()


def test_spans_count_the_tokens_before_them(byte):
    task = make_task({"name": "instructions", "repeats": 1})
    (sample,) = task.samples(byte)
    assert task.prompt(sample, byte).spans == sample.spans  # a byte a token, and none before them
    first = byte_tokenizer()
    first.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    moved = {name: (start + 1, end + 1) for name, (start, end) in sample.spans.items()}
    assert task.prompt(sample, first).spans == moved


def test_a_template_that_takes_no_system_message_is_named(byte):
    class Tokenizer:
        chat_template, name_or_path = "any", "some/model"

        def apply_chat_template(self, messages, **_):
            from jinja2.exceptions import TemplateError

            assert messages[0]["role"] == "system"
            raise TemplateError("System role not supported")

    task = make_task({"name": "instructions", "repeats": 1})
    with pytest.raises(
        TaskError, match=r"template of 'some/model' does not take .*System role not supported.*set chat=False"
    ):
        task.prompt(next(task.samples(Tokenizer())), Tokenizer())


def test_what_the_cache_held_of_each_part(folder, loaded, tmp_path):
    """By hand, for StreamingLLM: 4 sinks and 60 recent entries, of a prompt of which the last part is the second span."""
    task = {"name": "instructions", "repeats": 2, "max_new_tokens": 3}
    fields = {"task": task, "query_aware": False, "policy": {"name": "streaming_llm", "sink": 4, "recent": 200}}
    runs = [plan(folder, tmp_path, defaults={**fields, **more}) for more in ({}, {"policy": "full"})]
    rows = []
    for wanted in runs:
        assert run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded).exit_code == 0
        lines = (wanted.out / wanted.runs[0].id / "samples.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["details"] for line in lines])
    tokenizer = loaded[1]
    built = make_task(task)
    for index, sample in enumerate(built.samples(tokenizer)):
        prompt = built.prompt(sample, tokenizer)
        size = len(prompt.context) + len(prompt.question)
        kept = {*range(4), *range(size - 200, size)}
        for name, (start, end) in prompt.spans.items():
            share = len(kept & set(range(start, end))) / (end - start)
            assert rows[0][index][f"kept of {name}"] == pytest.approx(share)
            assert rows[1][index][f"kept of {name}"] == 1
        assert {"followed"} < set(rows[0][index])


def test_the_question_is_never_seen_by_the_compression(tmp_path):
    with pytest.raises(
        ConfigError, match="the system prompt is compressed alone, before anything is asked; set query_aware"
    ):
        plan("x", tmp_path, defaults={"task": "instructions"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ask": "attacks"}, "did you mean 'attack'"),
        ({"order": "first"}, "order='first'"),
        ({"constraints": 5}, "4 at most fit together"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_wrong_parameters_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        make_task({"name": "instructions", **fields})


def test_reports_have_a_column_for_each_figure(tmp_path):
    task = {"name": "instructions", "repeats": 2}
    for policy, shares in (("full", (1.0, 1.0)), ("h2o", (0.2, 0.4))):
        for ask, figures in (("request", {"followed": 1.0}), ("attack", {"leak": 0.3, "leaked": 0.0})):
            details = [{**figures, "kept of defence": share} for share in shares]
            rows = [row(i, 1.0, details=one) for i, one in enumerate(details)]
            fields = {"task": {**task, "ask": ask}, "query_aware": False, "policy": policy}
            save(tmp_path, fields | ({} if policy == "full" else {"budget": 0.5}), rows)
    write_report([tmp_path], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| to full | leak, % | leaked, % | kept of defence, % | followed, % |" in text
    line = next(line for line in text.splitlines() if line.startswith("| h2o(0.5)"))
    assert "| 30.0 | 0.0 | 30.0 | 100.0 |" in line  # leak, leaked, (20 + 40) / 2 kept, followed
