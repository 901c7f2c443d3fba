"""The runner on a tiny model: rows, sharing, failures, refusals."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import kvpress
from kvpress.evals import answer as answering
from kvpress.evals import executor
from kvpress.evals.runner import RunError, run_plan
from kvpress.evals.store import StoreError
from support.plans import plan


@pytest.fixture
def quick(loaded):
    """Runs a plan with the model that is loaded already."""

    def go(wanted, **options):
        return run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded, **options)

    return go


def rows(wanted):
    return {
        run.policy: [json.loads(line) for line in (wanted.out / run.id / "samples.jsonl").read_text().splitlines()]
        for run in wanted.runs
    }


CHUNKED = {"name": "token_select", "n_init": 4, "n_local": 32, "chunk": 32, "k": 16}
ANSWERS = ("index", "prompt_hash", "answer", "score", "new_tokens", "seen", "kept", "bytes", "full_bytes", "read_share")


@pytest.mark.parametrize("query_aware", [True, False])
def test_sharing_gives_the_answers_of_separate_runs(folder, quick, tmp_path, query_aware):
    sweep = [{"policy": ["full", "h2o", "snapkv", "quest"], "budget": [0.25, 40]}, {"policy": [CHUNKED]}]
    task = {"name": "needle", "lengths": [360], "depths": [0.2, 0.8], "haystack": "noise"}
    defaults = {"task": task, "query_aware": query_aware}
    found = {}
    for share in (True, False):
        wanted = plan(folder, tmp_path / str(share), defaults=defaults, sweep=sweep, share_prompts=share)
        assert quick(wanted).failed == 0
        found[share] = rows(wanted)
    assert len(found[True]) == 8
    for policy, own in found[False].items():
        assert [[row[name] for name in ANSWERS] for row in own] == [
            [row[name] for name in ANSWERS] for row in found[True][policy]
        ]
        assert not any(row["shared_prompt"] for row in own)
        # what reads a prompt in chunks makes its own pass
        assert all(row["shared_prompt"] != policy.startswith("token_select") for row in found[True][policy])
    assert len({row["answer"] for own in found[True].values() for row in own}) > 2  # policies do differ


def test_one_prompt_pass_per_sample(folder, quick, tmp_path, monkeypatch):
    recorded = []
    record = kvpress.record_prompt
    monkeypatch.setattr(
        kvpress, "record_prompt", lambda model, ids: recorded.append(ids.shape) or record(model, ids), raising=False
    )
    quick(plan(folder, tmp_path, sweep={"policy": ["full", "h2o", "tova"], "budget": [0.5]}))
    assert recorded == [(1, 400)] * 2


@pytest.mark.parametrize("query_aware", [True, False])
def test_full_answers_as_generate_does(folder, loaded, quick, tmp_path, query_aware):
    """Whichever way the question is fed; and the rows hold what was measured."""
    wanted = plan(folder, tmp_path, defaults={"query_aware": query_aware, "samples": 1})
    quick(wanted)
    (row,) = rows(wanted)["full()"]
    model, tokenizer = loaded
    (run,) = wanted.runs
    sample = next(iter(run.task.samples(tokenizer)))
    prompt = run.task.prompt(sample, tokenizer)
    ids = torch.tensor([prompt.context + prompt.question])
    output = model.generate(ids, max_new_tokens=16, do_sample=False)
    assert row["answer"] == tokenizer.decode(output[0, 400:], skip_special_tokens=True)
    assert row["new_tokens"] == len(output[0]) - 400 == 16
    assert row["seen"] == row["kept"] == 400 + 15  # the last token is never fed
    assert (
        row["full_bytes"] == 415 * model.config.num_hidden_layers * 2 * 2 * 8 * 4
    )  # K and V, kv heads, head size, bytes
    assert row["meta"] == {"length": 400, "depth": 0.2}
    assert row["prompt_ms"] > 0 and row["token_ms"] > 0


def test_the_question_is_compressed_or_not(folder, quick, tmp_path):
    """A budget of a share counts the tokens of the prompt pass: with the question in it, or without."""
    kept = {}
    for query_aware in (True, False):
        wanted = plan(
            folder, tmp_path, defaults={"policy": "h2o", "budget": 0.5, "query_aware": query_aware, "samples": 1}
        )
        quick(wanted)
        kept[query_aware] = rows(wanted)["h2o(budget=0.5)"][0]["kept"]
    assert kept[True] == 200
    assert 80 < kept[False] < 160  # the byte tokenizer's question is over 80 tokens


def test_perplexity(folder, loaded, quick, tmp_path):
    """One over the score is the perplexity of the continuation, as a dense pass gives it for full attention."""
    task = {"name": "perplexity", "length": 200, "scored": 30, "stretches": 2}
    wanted = plan(
        folder,
        tmp_path,
        defaults={"task": task, "query_aware": False},
        sweep={"policy": ["full", "h2o"], "budget": [20]},
    )
    quick(wanted)
    found = rows(wanted)
    model, tokenizer = loaded
    run = wanted.runs[0]
    for sample, row in zip(run.task.samples(tokenizer), found["full()"], strict=True):
        prompt = run.task.prompt(sample, tokenizer)
        ids = torch.tensor([prompt.context + prompt.question])
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)[0, len(prompt.context) - 1 : -1]
        expected = logits.gather(1, torch.tensor(prompt.question)[:, None]).mean()
        assert row["score"] == pytest.approx(float(expected.exp()), rel=1e-4)
        assert row["perplexity"] == pytest.approx(1 / row["score"])
    assert [row["score"] for row in found["h2o(budget=20)"]] != [row["score"] for row in found["full()"]]


def test_an_error_in_one_sample_is_its_row(folder, quick, tmp_path, monkeypatch):
    wanted = plan(folder, tmp_path, sweep={"policy": ["full", "h2o"], "budget": [0.5]})
    real = executor.answer_batch

    def failing(model, tokenizer, policies, samples, shared=None):
        if policies[0].name == "h2o" and samples[0].source.index == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")
        return real(model, tokenizer, policies, samples, shared)

    monkeypatch.setattr(executor, "answer_batch", failing)
    outcome = quick(wanted)
    assert (outcome.answered, outcome.failed, outcome.finished, outcome.exit_code) == (3, 1, 2, 1)
    first, second = rows(wanted)["h2o(budget=0.5)"]
    assert (first["error"], first["score"]) == ("OutOfMemoryError: CUDA out of memory.", None)
    assert (second["error"], second["index"]) == (None, 1)

    monkeypatch.setattr(executor, "answer_batch", real)
    outcome = quick(wanted)  # done is done, and the exit code still says that something is missing
    assert (outcome.answered, outcome.finished_before, outcome.exit_code) == (0, 2, 1)
    outcome = quick(wanted, retry=True)
    assert (outcome.answered, outcome.failed, outcome.exit_code) == (1, 0, 0)
    assert json.loads((wanted.out / wanted.runs[1].id / "finished.json").read_text())["failed"] == 0
    assert quick(wanted).exit_code == 0


def test_no_memory_to_share_is_no_failure(folder, quick, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(executor, "record", full)
    wanted = plan(folder, tmp_path, sweep={"policy": ["full", "h2o"], "budget": [0.5]})
    assert quick(wanted).exit_code == 0
    assert not any(row["shared_prompt"] for own in rows(wanted).values() for row in own)


def test_a_score_that_fails_is_a_row_too(folder, quick, tmp_path, monkeypatch):
    def broken(self, sample, answer):
        raise ValueError("no such answer")

    wanted = plan(folder, tmp_path)
    monkeypatch.setattr(type(wanted.runs[0].task), "score", broken)
    assert quick(wanted).failed == 2
    assert rows(wanted)["full()"][0]["error"] == "ValueError: no such answer"


def test_a_finished_run_needs_no_model(folder, quick, tmp_path):
    wanted = plan(folder, tmp_path)
    quick(wanted)

    def never(*_):
        raise AssertionError("loaded a model for nothing")

    before = (wanted.out / wanted.runs[0].id / "samples.jsonl").read_bytes()
    assert run_plan(wanted, Console(quiet=True), loader=never).finished_before == 1
    assert (wanted.out / wanted.runs[0].id / "samples.jsonl").read_bytes() == before


def test_the_model_is_loaded_once(folder, loaded, tmp_path):
    loads = []
    sweep = {"policy": ["full", "h2o"], "length": [400, 450], "query_aware": [True, False]}
    defaults = {"task": {"name": "needle", "depths": [0.5]}}
    wanted = plan(folder, tmp_path, defaults=defaults, sweep=sweep)
    run_plan(wanted, Console(quiet=True), loader=lambda *name: loads.append(name) or loaded)
    assert loads == [(folder, "cpu", "float32")]


def test_answers_end(folder, loaded, quick, tmp_path, monkeypatch):
    """At the model's end token, which is not part of the answer."""
    wanted = plan(folder, tmp_path, defaults={"samples": 1})
    model, tokenizer = loaded
    (run,) = wanted.runs
    prompt = run.task.prompt(next(iter(run.task.samples(tokenizer))), tokenizer)
    ids = torch.tensor([prompt.context + prompt.question])
    tokens = model.generate(ids, max_new_tokens=16, do_sample=False)[0, 400:].tolist()
    at = next(i for i in range(2, 16) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(answering, "end_tokens", lambda *_: {tokens[at]})
    quick(wanted)
    (row,) = rows(wanted)["full()"]
    assert (row["new_tokens"], row["answer"]) == (at, tokenizer.decode(tokens[:at]))


def test_a_stop_text_ends_an_answer(folder, loaded, quick, tmp_path, monkeypatch):
    wanted = plan(folder, tmp_path, defaults={"samples": 1})
    quick(wanted)
    (long,) = rows(wanted)["full()"]
    stop = next(char for char in long["answer"][1:] if char.isascii())
    task = type(wanted.runs[0].task)
    real = task.samples
    monkeypatch.setattr(
        task,
        "samples",
        lambda self, tokenizer: (replace(s, meta={**s.meta, "stop": stop}) for s in real(self, tokenizer)),
    )
    shutil.rmtree(wanted.out / wanted.runs[0].id)
    quick(wanted)
    (short,) = rows(wanted)["full()"]
    assert short["answer"] == long["answer"][: long["answer"].index(stop) + 1]
    assert short["new_tokens"] < long["new_tokens"]


def test_too_long_for_the_model(folder, quick, tmp_path):
    defaults = {"task": {"name": "needle", "lengths": [1010], "depths": [0.5]}}  # 1024 positions; 16 new tokens
    with pytest.raises(RunError, match=r"sample 0 has 1026 tokens .* made for 1024; .* allow_extrapolation: true"):
        quick(plan(folder, tmp_path, defaults=defaults))
    assert list(tmp_path.iterdir()) == []
    assert quick(plan(folder, tmp_path, defaults=defaults, allow_extrapolation=True)).exit_code == 0


def test_a_policy_that_the_model_cannot_have(folder, quick, tmp_path):
    """Refused before the first sample, of any policy."""
    sweep = {"policy": ["full", {"name": "tidal_decode", "sparse_layer_start": 40}]}
    wanted = plan(folder, tmp_path, sweep=sweep)
    with pytest.raises(kvpress.PolicyError, match="tidal_decode"):
        quick(wanted)
    assert list(tmp_path.iterdir()) == []


def test_other_prompts_in_the_way(folder, quick, tmp_path):
    wanted = plan(folder, tmp_path)
    quick(wanted)
    directory = wanted.out / wanted.runs[0].id
    (directory / "finished.json").unlink()
    lines = (directory / "samples.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"prompt_hash": "0" * 16}
    (directory / "samples.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    with pytest.raises(StoreError, match="sample 0 was answered for another prompt"):
        quick(wanted)


def test_what_is_written_first(folder, loaded, tmp_path, monkeypatch):
    """Config, versions and hardware are there when the first sample begins."""
    wanted = plan(folder, tmp_path, defaults={"seed": 3})
    directory = wanted.out / wanted.runs[0].id

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "answer_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run_plan(wanted, Console(quiet=True), loader=lambda *_: loaded)
    config = json.loads((directory / "config.json").read_text())
    assert config["definition"]["task"]["seed"] == config["seed"] == 3
    assert config["definition"]["policy"] == [{"name": "full"}]
    (session,) = map(json.loads, (directory / "environment.jsonl").read_text().splitlines())
    assert session["packages"]["torch"] == torch.__version__
    assert session["kvpress"] == kvpress.__version__
    assert (session["dtype"], session["device"], session["seed"]) == ("float32", "cpu", 3)
    assert session["hardware"] and session["started"]


def test_progress_is_quiet_without_a_terminal(folder, loaded, tmp_path, capsys):
    run_plan(plan(folder, tmp_path, defaults={"samples": 1}), loader=lambda *_: loaded)
    assert capsys.readouterr().out == ""


def test_progress_tells_the_running_score(folder, loaded, tmp_path):
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    run_plan(plan(folder, tmp_path), console, loader=lambda *_: loaded)
    shown = console.file.getvalue()
    assert "full(), 0.00 over 2" in shown
    assert "2/2" in shown
