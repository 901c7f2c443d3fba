"""What can go wrong with a run, as its user sees it: one line that says what to do, and nothing half done."""

import json
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals import executor, runner
from kvpress.evals.cluster import run_on_ray
from kvpress.evals.runner import RunError
from support.plans import plan, tree, write

ROW = {"input": "Who?", "context": "Ann said so. " * 20, "answers": ["Ann"], "length": 60, "dataset": "hotpotqa"}


@pytest.fixture
def ablate(folder, tmp_path):
    """Runs a configuration by the command line; what it says, its exit code and its results' folder."""

    def go(defaults, *options, **parts):
        out = tmp_path / "out"
        config = write(tmp_path / "a.yaml", tree(folder, out, defaults=defaults, **parts))
        return CliRunner().invoke(app, ["ablate", str(config), *options]), out

    return go


def refused(result, out):
    """The line on stderr of a run that did not begin."""
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert not out.exists()
    return result.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./none", "there is no folder"),
        ("{tmp}", "cannot load a causal LM; tried the folder {tmp}"),
        ("nobody/nothing", "tried the hub model 'nobody/nothing' (there is no folder"),
    ],
)
def test_a_model_that_cannot_be_loaded(ablate, tmp_path, monkeypatch, model, said):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(*ablate({"model": model.format(tmp=tmp_path)}))
    assert said.format(tmp=tmp_path) in line


def test_a_context_longer_than_the_model(ablate):
    task = {"name": "needle", "lengths": [1010], "depths": [0.5]}
    line = refused(*ablate({"task": task}))
    assert "sample 0 has 1026 tokens with its answer" in line
    assert "was made for 1024; shorten it, give a smaller length, or allow_extrapolation: true" in line
    result, _ = ablate({"task": task}, "--set", "allow_extrapolation=true")
    assert result.exit_code == 0


def test_out_of_memory_in_one_sample(ablate, monkeypatch):
    """The sample's row has the reason, the others are answered, and the exit code says that something is missing."""
    real = executor.answer_batch

    def full(model, tokenizer, policies, samples, shared=None):
        if samples[0].source.index == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return real(model, tokenizer, policies, samples, shared)

    monkeypatch.setattr(executor, "answer_batch", full)
    result, out = ablate({})
    assert result.exit_code == 1
    assert "1 runs finished with 1 new answers; 1 samples failed" in result.output and "--retry" in result.output
    (path,) = out.glob("*/samples.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["error"] for row in rows] == ["OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB", None]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"answers": None}, "answers is 'None'; give a list"),
        ({"context": 3}, "context is '3'; give a str"),
        ("answers", "no field 'answers'; a row has"),
    ],
)
def test_a_data_row_with_missing_fields(ablate, tmp_path, broken, said):
    """Named by file and line, before the first row is answered."""
    row = ROW | broken if isinstance(broken, dict) else {k: v for k, v in ROW.items() if k != broken}
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROW, ROW, row])) + "\n")
    line = refused(*ablate({"task": {"name": "longbench", "dataset": "hotpotqa", "data_dir": str(tmp_path)}}))
    assert f"{path}, line 3: {said}" in line


@pytest.mark.parametrize(
    ("dataset", "missing", "said"),
    [
        ("gov_report", "rouge_score.rouge_scorer", "rouge-score"),
        ("vcsum", "jieba", "jieba"),
        ("multifieldqa_zh", "jieba", "jieba"),
    ],
)
def test_a_metric_whose_library_is_missing(ablate, tmp_path, monkeypatch, without, dataset, missing, said):
    """Before the model is loaded, not as the failure of every sample."""
    without(missing)
    monkeypatch.setattr(runner.ModelSpec, "load", lambda *_: pytest.fail("loaded a model for nothing"))
    line = refused(*ablate({"task": {"name": "longbench", "dataset": dataset, "data_dir": str(tmp_path)}}))
    assert f"the metric needs {said}; run: pip install 'kvpress-toolkit[eval]'" in line


def test_a_policy_that_the_model_cannot_have(ablate):
    line = refused(*ablate({}, sweep={"policy": ["full", {"name": "tidal_decode", "sparse_layer_start": 40}]}))
    assert "gives" not in line and "sparse_layer_start=40 picks in no layer of a model with 4" in line


def test_a_cluster_without_ray(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"needs Ray; run: pip install 'kvpress-toolkit\[ray\]'"):
        run_on_ray(plan(folder, tmp_path / "out", launcher="ray"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there(ablate):
    pytest.importorskip("ray", reason="needs the extra ray")
    line = refused(*ablate({}, "--set", "ray.address=127.0.0.1:9", launcher="ray"))
    assert "cannot connect to a Ray cluster at 127.0.0.1:9" in line and "ray start --head" in line
