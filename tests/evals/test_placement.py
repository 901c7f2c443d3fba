"""Models over several devices or processes: what reaches the loader, and that patched models give the same there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import kvpress
from kvpress import models
from kvpress.cli import app
from kvpress.evals import commands
from kvpress.evals.config import make_plan
from kvpress.evals.runner import Outcome, RunError, run_plan
from kvpress.evals.store import read_rows
from kvpress.models import ModelLoadError, load_model
from support.plans import plan, tree, write

SWEEP = {"policy": ["full", "h2o", "snapkv"], "budget": [0.25]}


def torchrun(*arguments):
    """Two processes on this machine; what the run prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(kvpress.__file__).parents[1])}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, arguments),
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "given", [{"device_map": "auto"}, {"device_map": {"model": 0, "lm_head": "cpu"}}, {"tp_plan": "auto"}]
)
def test_placement_reaches_the_loader(folder, tmp_path, given):
    loads = []

    def loader(*names, **placement):
        loads.append((names, placement))
        return load_model(folder, "cpu", "float32")

    wanted = plan(folder, tmp_path, defaults={"device": "auto", "samples": 1, **given})
    assert run_plan(wanted, Console(quiet=True), loader=loader).exit_code == 0
    assert loads == [((folder, "auto", "float32"), given)]
    (config,) = tmp_path.glob("*/config.json")
    definition = json.loads(config.read_text())["definition"]
    assert {name: definition[name] for name in given} == given


def test_an_id_without_placement_is_what_it_was():
    """Results from before there was a choice are found again."""
    (run,) = make_plan({"out": "x", "defaults": {"task": "needle"}}).runs
    assert not {"device_map", "tp_plan"} & set(run.definition)
    ids = {run.id}
    for given in ({"device_map": "auto"}, {"tp_plan": "auto"}):
        ids |= {one.id for one in make_plan({"out": "x", "defaults": {"task": "needle", **given}}).runs}
    assert len(ids) == 3


def test_the_command_line_passes_it_on(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(commands, "run_plan", lambda plan, *_, **__: asked.append(plan) or Outcome())
    for options in (["--device-map", "balanced", "--batch-size", "4"], ["--tp-plan", "auto"]):
        assert CliRunner().invoke(app, ["eval", "--model", folder, *options, "--out", str(tmp_path)]).exit_code == 0
    first, second = (one.runs[0].fields for one in asked)
    assert (first.device_map, first.tp_plan, asked[0].batch_size) == ("balanced", None, 4)
    assert (second.device_map, second.tp_plan) == (None, "auto")


@pytest.mark.parametrize("device_map", ["auto", "disk"])
@pytest.mark.parametrize(
    "policy", ["full", {"name": "h2o", "budget": 0.3}, {"name": "quest", "budget": 16, "page_size": 4}]
)
def test_device_map_on_a_cpu(folder, device_map, policy):
    """Also with accelerate's hooks on every layer, which fetch the weights of some from the disk."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    spread = device_map
    if device_map == "disk":
        spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        spread |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    placed = load_model(folder, dtype="float32", device_map=spread)[0]
    if device_map == "disk":
        assert placed.model.layers[1].self_attn.q_proj.weight.device.type == "meta"  # on the disk
    whole = load_model(folder, "cpu", "float32")[0]
    ids = torch.randint(2, 250, (1, 60), generator=torch.Generator().manual_seed(0))
    answers = []
    for model in (placed, whole):
        with kvpress.patch(model, policy) as handle:
            wanted = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            answers.append(model.generate(ids, max_new_tokens=20, **wanted))
            assert handle.report().total.seen == 79
    torch.testing.assert_close(torch.stack(answers[0].logits), torch.stack(answers[1].logits), atol=1e-4, rtol=1e-4)


def test_device_map_runs_an_evaluation(folder, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    found = {}
    for name, given in (("map", {"device": "auto", "device_map": "auto"}), ("plain", {})):
        wanted = plan(folder, tmp_path / name, defaults=given, sweep=SWEEP)
        assert run_plan(wanted, Console(quiet=True)).exit_code == 0
        found[name] = {p.policy: [row["answer"] for row in read_rows(wanted.out / p.id).values()] for p in wanted.runs}
    assert found["map"] == found["plain"]


def test_a_split_model_has_the_logits_of_the_whole_one(folder):
    """Two processes with half of the heads each; a policy that decides over all heads together is refused."""
    done = torchrun(Path(__file__).parents[1] / "support" / "split_logits.py", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    refused = found.pop("tova()")
    assert "over all heads of a layer together" in refused and "2 processes" in refused
    assert len(found) == 10
    assert {name: difference for name, difference in found.items() if difference > 1e-5} == {}


def test_a_split_run_writes_what_a_whole_one_does(folder, tmp_path):
    """One process writes, the other computes along; bytes are those of both."""
    defaults = {"device": "auto", "tp_plan": "auto"}
    config = write(tmp_path / "a.yaml", tree(folder, tmp_path / "split", defaults=defaults, sweep=SWEEP, batch_size=2))
    done = torchrun("-m", "kvpress.cli", "ablate", config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 runs finished with 6 new answers") == 1
    wanted = plan(folder, tmp_path / "whole", sweep=SWEEP)
    run_plan(wanted, Console(quiet=True))
    split = plan(folder, tmp_path / "split", defaults=defaults, sweep=SWEEP)
    for ours, theirs in zip(split.runs, wanted.runs, strict=True):
        rows, expected = read_rows(split.out / ours.id), read_rows(wanted.out / theirs.id)
        for index, row in expected.items():
            for name in ("answer", "score", "new_tokens", "seen", "kept", "full_bytes", "prompt_hash", "error"):
                assert rows[index][name] == row[name], (ours.policy, name)
            # each process has a few numbers per sequence of its own
            assert rows[index]["bytes"] == pytest.approx(row["bytes"], rel=0.01)
        (session,) = map(json.loads, (split.out / ours.id / "environment.jsonl").read_text().splitlines())
        assert session["hardware"].startswith("2 x ")


def test_a_split_run_ends_with_the_first_process_error(folder, tmp_path):
    """And the other one does not wait for it."""
    sweep = {"policy": ["full", "tova"], "budget": [0.25]}
    defaults = {"device": "auto", "tp_plan": "auto"}
    config = write(tmp_path / "a.yaml", tree(folder, tmp_path / "out", defaults=defaults, sweep=sweep))
    done = torchrun("-m", "kvpress.cli", "ablate", config)
    assert done.returncode != 0
    assert done.stderr.count("error: tova(budget=0.25)") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "given", "said"),
    [
        ("auto", {"tp_plan": "auto"}, "a single one; start one per device: torchrun"),
        ("auto", {"tp_plan": "auto", "device_map": "auto"}, "each of them places the model; keep one"),
        ("cpu", {"device_map": "auto"}, "device_map='auto' and device='cpu': each of them"),
    ],
)
def test_a_placement_that_cannot_work(folder, device, given, said):
    with pytest.raises(ModelLoadError, match=said):
        load_model(folder, device, **given)


def test_device_map_without_accelerate(folder, monkeypatch):
    real = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "accelerate" else real(name))
    with pytest.raises(ModelLoadError, match="needs accelerate; run: pip install accelerate"):
        load_model(folder, device_map="auto")


def test_heads_that_cannot_be_shared_out(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ModelLoadError, match="has 4 heads and 2 kv heads, which 3 processes cannot share evenly"):
        load_model(folder, tp_plan="auto")


def test_split_and_whole_runs_need_files_of_their_own(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    sweep = [{"policy": ["full"]}, {"policy": ["full"], "tp_plan": ["auto"]}]
    with pytest.raises(RunError, match="some runs have a tp_plan and some have none"):
        run_plan(plan(folder, tmp_path, defaults={"device": "auto"}, sweep=sweep), Console(quiet=True))
