"""LongBench: official prompts, truncation, chat and first-line rules, metrics, and its rows."""

import json
import zipfile

import pytest

from kvpress.evals import TaskError, metrics
from kvpress.evals.tasks import LongBench
from kvpress.evals.tasks.longbench import METRICS, bucket, cut_middle, datasets

NO_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
WITH_E = {
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
}
BY_METRIC = {
    "qa_f1": {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"},
    "qa_f1_zh": {"multifieldqa_zh"},
    "rouge": {"gov_report", "qmsum", "multi_news", "samsum"},
    "rouge_zh": {"dureader", "vcsum"},
    "classification": {"trec", "lsht"},
    "retrieval": {"passage_retrieval_en", "passage_retrieval_zh"},
    "count": {"passage_count"},
    "code_sim": {"lcc", "repobench-p"},
}


def row(**fields):
    return {
        "input": "Who?",
        "context": "Ann and {Bob}.",
        "answers": ["Ann"],
        "length": 3,
        "all_classes": None,
        **fields,
    }


def write(folder, name, *rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def test_rules_of_the_data_sets():
    assert len(datasets()) == 21
    for name in datasets():
        task = LongBench(dataset=name)
        assert name in BY_METRIC[task.metric]
        assert METRICS[task.metric] is getattr(metrics, task.metric)
        assert task.wants_chat == (name not in NO_CHAT)
    assert {name for name, entry in datasets().items() if entry.get("e")} == WITH_E


def test_prompts_are_the_official_ones(data, byte, tmp_path):
    prompts = json.loads((data / "longbench" / "config" / "dataset2prompt.json").read_text())
    new_tokens = json.loads((data / "longbench" / "config" / "dataset2maxlen.json").read_text())
    assert set(prompts) == set(datasets())
    for name, prompt in prompts.items():
        folder = write(tmp_path, name, row(all_classes=["Ann"]))
        (sample,) = LongBench(dataset=name, data_dir=folder).samples(byte)
        assert sample.context + sample.question == prompt.format(context="Ann and {Bob}.", input="Who?")
        assert sample.context.endswith("Ann and {Bob}.")
        assert sample.max_new_tokens == new_tokens[name]


@pytest.mark.parametrize("name", list(datasets()))
def test_right_answers_score_one(name, data, real):
    task = LongBench(dataset=name, data_dir=str(data / "longbench" / "mini"), limit=3)
    samples = list(task.samples(real))
    assert len(samples) == 3
    for sample in samples:
        assert task.score(sample, sample.answers[0]) == pytest.approx(1)
        assert task.score(sample, "") == 0
        assert 0 <= task.score(sample, sample.context[:300]) < 1


def test_chat_template_where_the_official_code_uses_one(data, real):
    for name in ("hotpotqa", "trec"):
        task = LongBench(dataset=name, data_dir=str(data / "longbench" / "mini"), limit=1)
        (sample,) = task.samples(real)
        prompt = task.prompt(sample, real)
        assert ("<|im_start|>user" in real.decode(prompt.context)) == (name == "hotpotqa")


@pytest.mark.parametrize("max_length", [100, 101])
def test_the_middle_goes(byte, max_length):
    context, question = "".join(chr(97 + i % 26) for i in range(200)), " What is it?"
    text = context + question
    cut, rest = cut_middle(byte, context, question, max_length)
    assert cut + rest == text[:50] + text[-50:]
    assert rest == question
    assert cut_middle(byte, context, question, 212) == (context, question)
    assert cut_middle(byte, context, question, 211)[0] != context


def test_a_question_longer_than_half_is_cut_too(byte):
    cut, rest = cut_middle(byte, "a" * 100, "b" * 60 + "c" * 10, 80)
    assert (cut, rest) == ("a" * 40, "b" * 30 + "c" * 10)
    cut, rest = cut_middle(byte, "a" * 100, "b" * 40, 80)
    assert (cut, rest) == ("a" * 40, "b" * 40)


def test_real_rows_are_cut_to_the_length(data, real):
    task = LongBench(dataset="narrativeqa", data_dir=str(data / "longbench" / "mini"), max_length=1000, chat=False)
    whole = list(LongBench(dataset="narrativeqa", data_dir=str(data / "longbench" / "mini")).samples(real))
    for sample, full in zip(task.samples(real), whole, strict=True):
        assert abs(task.prompt(sample, real).length - 1000) <= 2  # the two halves are tokenised again
        assert full.context.startswith(sample.context[:1000]) and full.context.endswith(sample.context[-500:])
        assert sample.question == full.question


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht", "hotpotqa"])
def test_first_line_only(name, byte, tmp_path):
    folder = write(tmp_path, name, row(answers=["Ann Lee"], all_classes=["Ann Lee", "Bob"]))
    task = LongBench(dataset=name, data_dir=folder)
    (sample,) = task.samples(byte)
    answer = "\n\nAnn Lee\nBob and others"
    assert task.score(sample, answer) == (1 if name != "hotpotqa" else pytest.approx(4 / 7))
    assert sample.meta.get("stop") == ("\n" if name == "samsum" else None)


def test_the_best_of_several_answers(byte, tmp_path):
    folder = write(tmp_path, "hotpotqa", row(answers=["Robert Lee", "Bob"]))
    task = LongBench(data_dir=folder)
    (sample,) = task.samples(byte)
    assert task.score(sample, "Bob.") == 1


def test_lengths_and_their_buckets(byte, tmp_path):
    assert [bucket(words) for words in (0, 3999, 4000, 7999, 8000)] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+"]
    folder = write(tmp_path, "hotpotqa_e", row(length=5000, _id="x"), row(), row())
    task = LongBench(e=True, data_dir=folder, limit=2)
    first, second = task.samples(byte)
    assert (first.meta["bucket"], first.meta["id"], second.meta["bucket"]) == ("4-8k", "x", "0-4k")
    assert task.label == "longbench/hotpotqa_e"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input": "a", "context": "b", "length": 3}', "no field 'answers'"),
        ('{"input": "a", "context": "b", "answers": [], "length": 3}', "answers is '\\[\\]'"),
        ('{"input": "a", "context": "b", "answers": "c", "length": 3}', "answers is 'c'; give a list"),
        ('{"input": 1, "context": "b", "answers": ["c"], "length": 3}', "input is '1'; give a str"),
        ("[1]", "is no JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(byte, tmp_path, line, said):
    folder = write(tmp_path, "hotpotqa", row())
    with (tmp_path / "hotpotqa.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(TaskError, match=rf"hotpotqa.jsonl, line 3: .*{said}"):
        list(LongBench(data_dir=folder).samples(byte))


def test_classification_needs_its_classes(byte, tmp_path):
    folder = write(tmp_path, "trec", row())
    with pytest.raises(TaskError, match="line 1: all_classes is 'None'; give a list"):
        list(LongBench(dataset="trec", data_dir=folder).samples(byte))


def test_rows_of_the_hub_come_out_of_its_archive(byte, tmp_path, monkeypatch):
    """The address is read by `datasets`, with a local archive in the hub's place."""
    from kvpress.evals.tasks import longbench

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    # Offline, `datasets` refuses every address with a scheme, one inside a local archive too.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    write(tmp_path, "hotpotqa", row(), row(input="Where?"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(tmp_path / "hotpotqa.jsonl", "data/hotpotqa.jsonl")
    asked = []

    def local(what, required, how, kind, *, data_files, split):
        asked.append(data_files)
        inside, _, address = data_files.partition("::")
        assert address == f"https://huggingface.co/datasets/zai-org/LongBench/resolve/{longbench.REVISION}/data.zip"
        files = f"{inside}::{tmp_path / 'data.zip'}"
        options = {"data_files": files, "split": split, "cache_dir": str(tmp_path / "cache")}
        return hub_rows(what, required, how, kind, **options)

    hub_rows = longbench.hub_rows
    monkeypatch.setattr(longbench, "hub_rows", local)
    assert [sample.question for sample in LongBench().samples(byte)] == [
        sample.question for sample in LongBench(data_dir=str(tmp_path)).samples(byte)
    ]
    assert asked == [
        f"zip://data/hotpotqa.jsonl::https://huggingface.co/datasets/zai-org/LongBench/resolve/{longbench.REVISION}/data.zip"
    ]
