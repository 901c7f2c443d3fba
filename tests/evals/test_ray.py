"""Runs on a real Ray cluster of two nodes: the same results as in one process, also when a node dies in the middle."""

import json
import os
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

import kvpress
from kvpress.evals import cluster as launching
from kvpress.evals.cluster import run_on_ray
from kvpress.evals.config import RayOptions, read_plan
from kvpress.evals.runner import RunError, run_plan
from kvpress.evals.store import read_rows
from kvpress.models import load_model
from support.plans import plan, tree, write

ray = pytest.importorskip("ray", reason="needs the extra ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

TASK = {"name": "needle", "lengths": [400], "depths": [0.2, 0.5, 0.8], "repeats": 8}
SWEEP = {"policy": ["full", "h2o", "snapkv", "streaming_llm"], "budget": [0.5]}
ANSWERS = ("index", "prompt_hash", "answer", "score", "new_tokens", "seen", "kept", "bytes", "full_bytes", "read_share")

OWN = '''
from dataclasses import dataclass
from kvpress.policy import EvictionPolicy, Quota

@dataclass(frozen=True, kw_only=True)
class KeepFirst(EvictionPolicy):
    """Keep the first tokens, and the newest one."""

    name = "keep_first_on_ray"
    evict_every = None
    budget: int = 9

    def quota(self, tokens, layer, layers):
        return Quota(self.budget, 1)

    def score(self, entries):
        return -entries.positions.float()
'''


@pytest.fixture(scope="module")
def nodes():
    """A cluster of a head without cores and two nodes with one each; this process is connected to it."""
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    small = {"object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1, **small)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.pop("RAY_USAGE_STATS_ENABLED")
    if before is not None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = before


def on_ray(wanted, **options):
    return replace(wanted, launcher="ray", ray=RayOptions(num_gpus=0).model_copy(update=options))


def sessions(wanted):
    return {run.id: len((wanted.out / run.id / "environment.jsonl").read_text().splitlines()) for run in wanted.runs}


def test_a_worker_keeps_its_model(folder, tmp_path, monkeypatch):
    """From run to run, until a run needs another one; and it works where the run was started."""
    loads = []
    monkeypatch.setattr(launching, "load_model", lambda *names, **_: loads.append(names) or load_model(*names))
    monkeypatch.setenv("SOME_MODEL", "somewhere else")
    monkeypatch.chdir(tmp_path)
    worker = launching.Worker(str(tmp_path), {"SOME_MODEL": folder})
    defaults = {"samples": 1, "model": "${SOME_MODEL}"}
    wanted = plan(folder, "out", defaults=defaults, sweep={"policy": ["full", "h2o"], "dtype": ["float32", "bfloat16"]})
    for run in sorted(wanted.runs, key=lambda run: run.fields.dtype):
        assert worker.run(replace(wanted, runs=(run,)), False, 0.0).finished == 1
    assert loads == [(folder, "cpu", "bfloat16"), (folder, "cpu", "float32")]
    assert len(list(tmp_path.glob("out/*/finished.json"))) == 4


# The tests that need both nodes come before the one that takes a node away.


def test_errors_of_runs_come_out_as_they_are(folder, nodes, tmp_path):
    """As in one process: a policy that the model cannot have, in a worker that goes on to run another plan."""
    wanted = on_ray(
        plan(folder, tmp_path, sweep={"policy": [{"name": "tidal_decode", "sparse_layer_start": 40}]}), workers=1
    )
    with pytest.raises(kvpress.PolicyError, match="tidal_decode"):
        run_on_ray(wanted, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_policies_outside_of_the_package(folder, nodes, tmp_path, monkeypatch, without_traces):
    """A file, relative to the configuration, and a class inside a policy of the package: workers import what they are told,
    and refuse other code than what the run was started with."""
    (tmp_path / "own_on_ray.py").write_text(OWN, encoding="utf-8")
    sweep = {
        "policy": ["./own_on_ray.py", {"name": "ada_kv", "inner": {"name": "./own_on_ray.py:KeepFirst", "budget": 9}}]
    }
    path = write(tmp_path / "a.yaml", tree(folder, tmp_path / "out", sweep=sweep))
    wanted = on_ray(read_plan(path), workers=1)
    monkeypatch.chdir("/")
    outcome = run_on_ray(wanted, Console(quiet=True))
    assert (outcome.finished, outcome.failed) == (2, 0)
    for run in wanted.runs:
        rows = read_rows(wanted.out / run.id).values()
        assert [row["kept"] - row["new_tokens"] for row in rows] == [8, 8]  # 9, and what was written, but the last

    (tmp_path / "own_on_ray.py").write_text(OWN + "# as another node may have it\n", encoding="utf-8")
    again = replace(wanted, out=tmp_path / "again")
    with pytest.raises(kvpress.PolicyError, match=r"own_on_ray.py:KeepFirst@.* all need the same file"):
        run_on_ray(again, Console(quiet=True))
    (tmp_path / "own_on_ray.py").unlink()
    with pytest.raises(kvpress.PolicyError, match=r"own_on_ray.py:KeepFirst: cannot read"):
        run_on_ray(again, Console(quiet=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_cpus": 64}, r"no node has ray.num_cpus=64 and ray.num_gpus=0 .*1 CPUs and 0 GPUs"),
        ({"num_gpus": 1}, r"no node has ray.num_cpus=1 and ray.num_gpus=1"),
    ],
)
def test_what_no_node_has(folder, nodes, tmp_path, options, said):
    with pytest.raises(RunError, match=said):
        run_on_ray(on_ray(plan(folder, tmp_path), **options), Console(quiet=True))


def test_a_folder_that_a_node_does_not_see(folder, nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "write_whole", lambda path, text: None)  # as on a node with a disk of its own
    with pytest.raises(RunError, match=r"node .* does not see .*; out must be a folder that all nodes share"):
        run_on_ray(on_ray(plan(folder, tmp_path), workers=1), Console(quiet=True))


def test_the_results_of_one_process_though_a_node_dies(folder, nodes, tmp_path):
    wanted = on_ray(plan(folder, tmp_path / "ray", defaults={"task": TASK}, sweep=SWEEP))
    seen = {}

    def kill():
        """One node, as soon as both are in the middle of a run."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            rows = {path.parent.name: path.read_bytes().count(b"\n") for path in wanted.out.glob("*/samples.jsonl")}
            if len(rows) >= 2 and min(rows.values()) >= 2:
                nodes.remove_node(next(iter(nodes.worker_nodes)))
                seen.update(rows)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run_on_ray(wanted, Console(quiet=True))
    killer.join()
    assert seen and min(seen.values()) < 24, "no node was killed in the middle of a run"
    assert (outcome.finished, outcome.failed, outcome.lost, outcome.exit_code) == (4, 0, 0, 0)
    assert sorted(sessions(wanted).values()) == [1, 1, 1, 2]  # one run was begun twice, and went on where it was

    loaded = load_model(folder, "cpu", "float32")
    local = replace(plan(folder, tmp_path / "local", defaults={"task": TASK}, sweep=SWEEP), share_prompts=False)
    run_plan(local, Console(quiet=True), loader=lambda *_: loaded)
    for run in local.runs:
        theirs, ours = (read_rows(p.out / run.id) for p in (local, wanted))
        assert [[ours[i][name] for name in ANSWERS] for i in range(24)] == [
            [theirs[i][name] for name in ANSWERS] for i in range(24)
        ]
        lines = (wanted.out / run.id / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(24))  # none was answered twice

    again = run_on_ray(wanted, Console(quiet=True))
    assert (again.finished_before, again.answered) == (4, 0)


def test_a_run_that_loses_every_worker_is_given_up(folder, nodes, tmp_path, monkeypatch):
    """And the others are run: its rows so far stay."""
    wanted = on_ray(plan(folder, tmp_path, sweep={"policy": ["full", "h2o"], "budget": [0.5]}), attempts=2)
    bad = wanted.runs[1].id

    class Fragile(launching.Worker):
        def run(self, plan, retry, patience):
            if plan.runs[0].id == bad:
                os._exit(1)
            return super().run(plan, retry, patience)

    monkeypatch.setattr(launching, "Worker", Fragile)
    outcome = run_on_ray(wanted, Console(quiet=True))
    assert (outcome.finished, outcome.lost, outcome.exit_code) == (1, 1, 1)
    assert not (wanted.out / bad / "finished.json").exists()
