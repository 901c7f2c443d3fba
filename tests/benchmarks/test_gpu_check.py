"""scripts/gpu_check.py where there is no GPU: it says so; its tiny run goes through every part; its verdicts are right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.models import shipped_policies

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
KERNELS = {
    "decode_attention, selected", "decode_attention", "topk_select", "attention_mass", "block_sparse_attention",
    "decode_scores", "page_bounds", "page_scores", "soft_vote", "union_select", "attention_mass, window",
    "compact_slots", "rope_shift", "merge_slots", "block_sparse_attention, flex", "paged_attention",
}  # fmt: skip


def load(name, path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_check = load("gpu_check", SCRIPT)
gpu = load("gpu", ROOT / "benchmarks" / "gpu.py")


def run(out, *arguments, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)
    return done, json.loads(out.read_text())


def test_without_a_gpu_everything_is_skipped(tmp_path):
    done, result = run(tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert [part["ended"] for part in result["parts"].values()] == ["skipped: no CUDA device"] * 3
    assert {goal["verdict"] for goal in result["goals"]} == {"not measured"}
    assert done.stdout.count("skipped") == 3 and "nothing wrong" in done.stdout


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny run of every part, where rich and typer cannot be imported."""
    folder = tmp_path_factory.mktemp("gpu_check")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = sys.modules['typer'] = None\n")
    return run(folder / "out.json", "--interpret", "--minutes", "20", PYTHONPATH=str(folder))


def test_every_part_runs(tiny):
    done, result = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["ended"] for name, part in result["parts"].items()} == dict.fromkeys(
        ("tests", "kernels", "models"), "done"
    )
    assert result["wrong"] == []
    (tests,) = result["parts"]["tests"]["rows"]
    assert tests["passed"] >= 2 and not tests["failures"]
    assert {goal["verdict"] for goal in result["goals"]} == {"not measured"}


def test_every_kernel_is_timed_and_checked(tiny):
    limits, *rows = tiny[1]["parts"]["kernels"]["rows"]
    assert limits["bandwidth"] > 0 and limits["rate"] > 0
    ours = [row for row in rows if row["implementation"] == "kvpress"]
    assert {row["kernel"] for row in ours} == KERNELS
    for row in ours:
        assert row["ms"] > 0 and row["limit_ms"] > 0 and row["error"] < 5e-3
        assert len({other["implementation"] for other in rows if other["kernel"] == row["kernel"]}) > 1
    # The one implementation that a CPU has not.
    assert {row["implementation"] for row in rows if "failed" in row} == {"sdpa cudnn"}


def test_every_policy_decodes(tiny):
    rows = tiny[1]["parts"]["models"]["rows"]
    for batch in (1, 2):
        here = {row["policy"]: row for row in rows if row["batch"] == batch}
        how = ("compiled", "compiled, CUDA graphs") if batch == 1 else ()
        compiled = {f"{name} {one}" for name in ("full", "tidal_decode", "h2o") for one in how}
        assert set(here) == {"transformers", "floor", *shipped_policies()} | compiled
        assert all(row["ms"] > 0 and row["busy_ms"] > 0 for row in here.values())
        assert here["h2o"]["cache_gib"] < here["full"]["cache_gib"] / 2
        assert here["h2o"]["read_share"] < 0.5 and here["full"]["read_share"] == 1


def test_no_time_left_stops_a_part_and_keeps_the_others(tmp_path):
    """A part that is stopped is said to be wrong, and the JSON is there."""
    done, result = run(tmp_path / "out.json", "--interpret", "--parts", "models", "--minutes", "0.03")
    assert done.returncode == 1
    ended = result["parts"]["models"]["ended"]
    assert ended.startswith("stopped after") and result["wrong"] == [f"models {ended}"]


def test_a_part_that_crashes_keeps_its_rows(tmp_path, monkeypatch):
    """And what it wrote before is read, but for half a line."""
    script = tmp_path / "crash.py"
    script.write_text(
        "import sys\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').write('{\"ms\": 1}\\n{\"ms\"')\nsys.exit(3)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    part = gpu_check.run_in_process("kernels", 60, False)
    assert part["rows"] == [{"ms": 1}] and part["ended"] == "failed with exit code 3"
    assert gpu_check.wrong({"kernels": part}) == ["kernels failed with exit code 3"]


def kernel_row(kernel, batch=1, implementation="kvpress", **figures):
    return {"kernel": kernel, "batch": batch, "implementation": implementation, **figures}


def test_goals_of_kernels():
    """At least, at most, the worst of several, and nothing measured."""
    rows = [
        kernel_row("decode_attention, selected", 8, of_limit=0.61),
        kernel_row("decode_attention, selected", 16, of_limit=0.59),
        kernel_row("decode_attention, selected", 8, "sdpa flash", ratio=21.0),
        kernel_row("decode_attention, selected", 8, "sdpa cudnn", ratio=19.0),
        kernel_row("decode_attention", 1, of_limit=0.9),
        kernel_row("decode_attention", 8, of_limit=0.85),
        kernel_row("attention_mass", 1, "sdpa flash", ratio=1.6),
        kernel_row("attention_mass, window", 1, "torch", ratio=0.1),
        kernel_row("block_sparse_attention", 1, "sdpa flash", failed="no"),
    ]
    found = {goal["goal"]: goal for goal in gpu_check.judged({"kernels": {"rows": rows}}, False)}
    verdicts = {goal.partition(":")[0]: (found[goal]["figure"], found[goal]["verdict"]) for goal in list(found)[:7]}
    assert verdicts == {
        "decode over selected entries, batch 8": (19.0, "missed"),  # the share of the limit stands below
        "decode over selected entries, batch 16": (0.59, "missed"),
        "dense decode": (0.85, "met"),
        "topk_select": (None, "not measured"),
        "attention_mass with LSE given": (0.625, "met"),
        "block sparse attention, 10 %": (None, "not measured"),
    }
    assert found["decode over selected entries, batch 8: share of the limit"]["verdict"] == "met"
    assert {g["verdict"] for g in gpu_check.judged({"kernels": {"rows": rows}}, True)} == {"not measured"}


def model_row(policy, ms, context=131072, batch=1, **other):
    return {"policy": policy, "ms": ms, "context": context, "batch": batch, **other}


def test_goals_of_models():
    """The longest context of each batch counts, and every evicting policy has a goal of its own."""
    rows = [
        model_row("transformers", 40.0),
        model_row("full", 30.0),
        model_row("tidal_decode", 15.0, evicts=False),
        model_row("h2o", 10.0, evicts=True),
        model_row("snapkv", 20.0, evicts=True),
        model_row("h2o", 1.0, context=32768, evicts=True),
        {"policy": "ems", "context": 131072, "batch": 1, "failed": "x", "evicts": True},
    ]
    found = gpu_check.judged({"models": {"rows": rows}}, False)
    told = [(goal["goal"].partition(",")[0], goal["figure"], goal["verdict"]) for goal in found[7:]]
    assert told == [
        ("tidal_decode", 2.0, "missed"),
        ("h2o", 3.0, "met"),
        ("snapkv", 1.5, "missed"),
        ("full", pytest.approx(4 / 3), "met"),
        ("tidal_decode", None, "not measured"),
        ("evicting policies", None, "not measured"),
        ("full", None, "not measured"),
    ]


def test_what_is_wrong():
    """Ours failing or off, a failed test; not another's failing, nor a cache that does not fit."""
    rows = [
        kernel_row("a", error=0.03, ms=1.0),
        kernel_row("b", error=0.01, ms=1.0),
        kernel_row("c", implementation="sdpa cudnn", failed="RuntimeError: none"),
        {"kernel": "d", "batch": 1, "failed": "ValueError: x"},
    ]
    models = [{"policy": "full", "failed": "OutOfMemoryError: CUDA"}, {"policy": "h2o", "failed": "ValueError: y"}]
    parts = {
        "tests": {"ended": "done", "rows": [{"test": "t::x", "failed": "assert 1 == 2"}, {"passed": 3, "failures": 1}]},
        "kernels": {"ended": "done", "rows": rows},
        "models": {"ended": "skipped: no CUDA device", "rows": models},
    }
    assert [line.split()[1] for line in gpu_check.wrong(parts)] == ["t::x", "a", "d", "h2o"]


class Event:
    """Of a stand-in for torch.cuda whose clock goes on by what is launched or replayed."""

    clock = 0.0

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self):
        self.at = Event.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    """Holds how many calls were captured, and takes 2 ms for each in a replay."""

    def __init__(self):
        self.calls, self.was_reset = 0, False

    def replay(self):
        Event.clock += 2.0 * self.calls

    def reset(self):
        self.was_reset = True


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda without a device: a call takes 5 ms when it is launched, 2 ms in a graph."""
    graphs = []

    class Capture:
        def __init__(self, graph):
            self.graph = graph
            graphs.append(graph)

        def __enter__(self):
            Capture.active = self.graph

        def __exit__(self, *error):
            Capture.active = None

    class Stream:
        def wait_stream(self, other):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    Capture.active = None
    for name, value in {
        "Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "current_stream": Stream,
        "stream": lambda stream: stream, "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def call():
        if Capture.active is None:
            Event.clock += 5.0
        else:
            Capture.active.calls += 1

    def waiting():
        if Capture.active is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        call()

    return call, waiting, graphs


def test_timing_on_cuda(stand_in):
    """Replays of a graph per call; launches for what waits, and for what a graph refuses."""
    call, waiting, graphs = stand_in
    cuda = torch.device("cuda")
    assert gpu.timing([call, call, call], cuda) == (2.0, "replayed")
    assert graphs[0].calls == 3 and graphs[0].was_reset
    assert gpu.timing([call], cuda, waits=True) == (5.0, "launched")
    assert gpu.timing([waiting, waiting], cuda) == (5.0, "launched")


def test_limits():
    """Whichever of the two takes longer."""
    limits = gpu.Limits(bandwidth=1e12, rate=1e14)
    assert limits.milliseconds(2e9, 1e11) == 2.0 and limits.milliseconds(1e9, 3e11) == pytest.approx(3.0)
