"""What holds for every task: registry, errors, equal samples for equal parameters, prompts in two parts."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest
from tokenizers.processors import TemplateProcessing

from kvpress.evals import TASKS, Sample, TaskError, make_task
from kvpress.evals.tasks import LongBench, Needle, Perplexity, Ruler
from support.tiny_saved import byte_tokenizer

SPECS = {
    "needle": {"lengths": [600], "depths": [0.2, 0.9]},
    "passkey": {"lengths": [600], "depths": [0.2, 0.9]},
    "kv_retrieval": {"pairs": 5, "repeats": 2},
    "needle_threads": {"length": 1500, "repeats": 2},
    "infinitebench": {"task": "kv_retrieval", "length": 1500, "repeats": 1},
    "paraphrased_needle": {"lengths": [900], "depths": [0.2, 0.9], "wordings": ["literal"], "distractors": [0]},
    "instructions": {"ask": "request", "repeats": 2},
    "longbench_v2": {"length": 1500, "repeats": 2},
    "reasoning": {"dataset": "arithmetic", "repeats": 2},
    "scbench": {"length": 1500, "repeats": 2, "turns": 3},
    "perplexity": {"length": 300, "scored": 50, "stretches": 2},
    "ruler": {"task": "niah_single_1", "length": 1500, "repeats": 2},
}
DRAWN = sorted(set(SPECS) - {"perplexity", "longbench_v2", "instructions"})  # without answers, or with a letter of four
IN_CONTEXT = sorted(set(DRAWN) - {"reasoning"})


@pytest.fixture(params=sorted(SPECS))
def spec(request):
    return {"name": request.param, **SPECS[request.param]}


def test_every_task_has_its_name():
    assert set(TASKS) == {*SPECS, "longbench", "jsonl"}
    assert all(name == task.name for name, task in TASKS.items())


def test_equal_parameters_equal_samples(spec, byte):
    state = random.getstate()
    first, second = list(make_task(spec).samples(byte)), list(make_task(spec).samples(byte))
    assert first == second
    assert len(first) > 1
    assert [sample.index for sample in first] == list(range(len(first)))
    assert random.getstate() == state  # the global generator is not used


@pytest.mark.parametrize("name", DRAWN)
def test_another_seed_other_samples(name, byte):
    one, other = (list(make_task({"name": name, **SPECS[name], "seed": seed}).samples(byte)) for seed in (0, 1))
    assert len(one) == len(other)
    assert all(a.answers != b.answers and a.context != b.context for a, b in zip(one, other, strict=True))
    assert len({sample.answers for sample in one}) == len(one)


def test_draws_are_the_same_in_another_process():
    code = "from kvpress.evals import make_task; print(make_task('needle').rng(1, 0.5).random())"
    command = [sys.executable, "-c", code]
    drawn = {
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }
    assert drawn == {f"{make_task('needle').rng(1, 0.5).random()}\n"}


def test_a_task_can_be_built_from_its_own_description(spec):
    task = make_task(spec)
    again = make_task(json.loads(json.dumps(task.to_dict())))
    assert again == task
    assert make_task(task) is task
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.seed = 3


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_the_answer_stands_in_the_context_and_is_right(name, byte):
    task = make_task({"name": name, **SPECS[name]})
    for sample in task.samples(byte):
        assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in sample.question + sample.answer_prefix for answer in sample.answers)
        assert task.score(sample, f" {', '.join(sample.answers)}.") == 1
        assert task.score(sample, " 0") == task.score(sample, "") == 0
        assert sample.max_new_tokens > 0


def test_plain_prompt_is_the_sample_in_order(spec, byte):
    task = make_task(spec)
    sample = next(iter(task.samples(byte)))
    prompt = task.prompt(sample, byte)
    assert byte.decode(prompt.context).removeprefix("<s>") == sample.context
    assert byte.decode(prompt.question) == sample.question + sample.answer_prefix
    assert prompt.length == len(prompt.context) + len(prompt.question)


def test_chat_prompt_has_the_template_around_it(real):
    task = Needle(lengths=(500,), depths=(0.5,))
    sample = next(iter(task.samples(real)))
    prompt = task.prompt(sample, real)
    whole = real.decode(prompt.context + prompt.question)
    message = [{"role": "user", "content": sample.context + sample.question}]
    expected = real.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + sample.answer_prefix
    assert whole == expected
    assert real.decode(prompt.question).startswith(sample.question)
    assert prompt.length == 500
    plain = dataclasses.replace(task, chat=False)
    (sample,) = plain.samples(real)
    prompt = plain.prompt(sample, real)
    assert real.decode(prompt.context + prompt.question) == sample.context + sample.question + sample.answer_prefix
    assert prompt.length == 500


def test_special_tokens_stand_at_the_start_only():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "<s>a</s>"
    prompt = Perplexity().prompt(Sample(0, "context", " question", (), 1, " prefix"), tokenizer)
    assert tokenizer.decode(prompt.context) == "<s>context"
    assert tokenizer.decode(prompt.question) == " question prefix"


def test_chat_needs_a_template(byte):
    with pytest.raises(TaskError, match="no chat template; set chat=False"):
        next(iter(Needle(lengths=(600,), chat=True).samples(byte)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nedle", "unknown task 'nedle'; did you mean 'needle'"),
        ({"name": "needle", "length": [9]}, "needle has no field 'length'; did you mean 'lengths'"),
        ({"lengths": [9]}, "has no name; add name: one of"),
        (3, "is no task"),
        ({"name": "needle", "seed": -1}, "seed=-1"),
        ({"name": "needle", "seed": True}, "seed=True"),
        ({"name": "needle", "chat": "yes"}, "chat='yes'"),
        ({"name": "needle", "lengths": 1000}, "lengths=1000 is no list"),
        ({"name": "needle", "lengths": []}, r"lengths=\(\) is no list"),
        ({"name": "needle", "lengths": ["long"]}, "lengths='long' is no count"),
        ({"name": "needle", "depths": [0.5, 2]}, r"2 is outside \[0, 1\]"),
        ({"name": "needle", "depths": ["top"]}, "'top' is outside"),
        ({"name": "needle", "needle": "number"}, "did you mean 'numbers'"),
        ({"name": "needle", "repeats": 0}, "repeats=0"),
        ({"name": "passkey", "digits": 0}, "digits=0"),
        ({"name": "kv_retrieval", "pairs": 0}, "pairs=0"),
        ({"name": "kv_retrieval", "length": 900, "data_dir": "x"}, "drop one"),
        ({"name": "needle_threads", "kind": "single", "steps": 3}, "use kind='multi_step'"),
        ({"name": "needle_threads", "kind": "branch"}, "did you mean 'branching'"),
        ({"name": "needle_threads", "direction": "up"}, "direction='up'"),
        ({"name": "ruler", "task": "vtt"}, "did you mean 'vt'"),
        ({"name": "ruler", "length": 4096.0}, "length=4096.0"),
        ({"name": "infinitebench", "task": "math"}, "task='math'"),
        ({"name": "infinitebench", "length": 900, "data_dir": "x"}, "drop one"),
        ({"name": "infinitebench", "limit": 0}, "limit=0"),
        ({"name": "longbench", "dataset": "hotpot"}, "did you mean 'hotpotqa'"),
        ({"name": "longbench", "dataset": "lsht", "e": True}, "these have: qasper"),
        ({"name": "longbench", "max_length": 1}, "max_length=1"),
        ({"name": "perplexity", "mode": "dens"}, "did you mean 'dense'"),
        ({"name": "perplexity", "chat": True}, "drop chat"),
    ],
)
def test_wrong_parameters_are_named(spec, said):
    with pytest.raises(TaskError, match=said) as error:
        make_task(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"name": "needle", "lengths": [50]}, "length=50 is too short for needle"),
        ({"name": "passkey", "lengths": [50]}, "length=50 is too short for passkey"),
        ({"name": "ruler", "task": "vt", "length": 200}, "too short for ruler/vt; raise length by"),
        ({"name": "kv_retrieval", "length": 100}, "too short for kv_retrieval; raise length by"),
        ({"name": "needle_threads", "length": 100}, "too short for needle_threads/multi_step; raise length by"),
        ({"name": "infinitebench", "length": 100}, "too short for infinitebench/passkey; raise length by"),
        ({"name": "perplexity", "length": 10**7}, "has [0-9]+ tokens; lower them"),
        ({"name": "needle", "haystack": "no/such/text"}, "cannot read the text 'no/such/text'"),
    ],
)
def test_what_cannot_be_made_is_named(spec, said, byte):
    with pytest.raises(TaskError, match=said) as error:
        list(make_task(spec).samples(byte))
    assert "\n" not in str(error.value)


def test_the_length_that_the_error_names_is_enough(byte):
    with pytest.raises(TaskError) as error:
        list(Ruler(task="cwe", length=300, repeats=1).samples(byte))
    more = int(str(error.value).split()[-1])
    assert len(list(Ruler(task="cwe", length=300 + more, repeats=1).samples(byte))) == 1
    with pytest.raises(TaskError):
        list(Ruler(task="cwe", length=300 + more - 1, repeats=1).samples(byte))


def test_data_that_is_not_there_says_how_to_get_it(monkeypatch, byte, tmp_path):
    import datasets

    def offline(*args, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    for task, said in [
        (LongBench(dataset="trec"), "cannot load LongBench's trec from the hub .no route.; unzip data.zip"),
        (LongBench(dataset="trec", e=True, data_dir=str(tmp_path)), r"no file .*trec_e.jsonl; unzip data.zip"),
        (make_task("infinitebench"), "cannot load InfiniteBench's passkey .*set data_dir"),
        (make_task({"name": "infinitebench", "data_dir": str(tmp_path)}), "no file .*passkey.jsonl"),
        (make_task({"name": "kv_retrieval", "data_dir": str(tmp_path)}), "no file .*kv-retrieval-75_keys.jsonl"),
        (Ruler(task="qa_1"), "cannot load SQuAD 2.0 .*squad.json"),
        (Ruler(task="qa_2"), "cannot load HotpotQA .*hotpotqa.json"),
        (Ruler(task="qa_1", data_dir=str(tmp_path)), "no file .*squad.json"),
    ]:
        with pytest.raises(TaskError, match=said) as error:
            list(task.samples(byte))
        assert "\n" not in str(error.value)


def test_datasets_is_asked_for_by_its_extra(monkeypatch, byte):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'kvpress-toolkit\[eval\]'"):
        list(LongBench().samples(byte))
