"""scripts/gpu_check.py where there is no GPU: it says so; its tiny run goes through every part; its verdicts are right."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
KERNELS = {
    "decode_attention, selected", "decode_attention", "topk_select", "attention_mass", "block_sparse_attention",
    "decode_scores", "page_bounds", "page_scores", "soft_vote", "union_select", "attention_mass, window",
    "compact_slots", "rope_shift", "merge_slots", "block_sparse_attention, flex", "paged_attention",
    "antidiagonal_mass", "vertical_slash_mass",
}  # fmt: skip


def load(name, path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def in_benchmarks(name):
    """A module of benchmarks/, which import each other by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


gpu_check = load("gpu_check", SCRIPT)
gpu = load("gpu", ROOT / "benchmarks" / "gpu.py")
PARTS = ("build", "kernels", "models", "tests")
MEASURED = ("full", "tidal_decode", "h2o", "snapkv", "streaming_llm")


def run(out, *arguments, **environment):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)
    return done, json.loads(out.read_text())


def test_without_a_gpu_everything_is_skipped(tmp_path):
    done, result = run(tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert {name: part["ended"] for name, part in result["parts"].items()} == dict.fromkeys(
        PARTS, "skipped: no CUDA device"
    )
    assert {goal["verdict"] for goal in result["goals"]} == {"not measured"}
    assert done.stdout.count("skipped") == 4 and "nothing wrong" in done.stdout


def test_the_calls_have_their_parts_and_time(tmp_path):
    """A is what is fast, B is what is right; together they are below a quarter of an hour, with a start each."""
    for call, parts in (("A", PARTS[:3]), ("B", PARTS[3:])):
        _, result = run(tmp_path / "out.json", "--call", call)
        assert tuple(result["parts"]) == parts
    assert gpu_check.MINUTES["A"] <= 5 and gpu_check.MINUTES["B"] <= 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny run of every part, where rich and typer cannot be imported."""
    folder = tmp_path_factory.mktemp("gpu_check")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['rich'] = sys.modules['typer'] = None\n")
    return run(folder / "out.json", "--interpret", "--minutes", "20", PYTHONPATH=str(folder))


def test_every_part_runs(tiny):
    done, result = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["ended"] for name, part in result["parts"].items()} == dict.fromkeys(PARTS, "done")
    assert result["wrong"] == []
    tests = result["parts"]["tests"]["rows"][-1]
    assert tests["passed"] >= 2 and not tests["failures"] and tests["complete"]
    assert {goal["verdict"] for goal in result["goals"]} == {"not measured"}


def test_every_kernel_is_timed_and_checked(tiny):
    limits, *rows = tiny[1]["parts"]["kernels"]["rows"]
    assert limits["bandwidth"] > 0 and limits["rate"] > 0
    ours = [row for row in rows if row["implementation"] == "kvpress"]
    assert {row["kernel"] for row in ours} == KERNELS
    for row in ours:
        assert row["ms"] > 0 and row["floor_ms"] > 0 and row["error"] < 5e-3
        assert len({other["implementation"] for other in rows if other["kernel"] == row["kernel"]}) > 1
    assert all(row["of_limit"] == pytest.approx(row["floor_ms"] / row["ms"]) for row in rows if "ms" in row)
    # The one implementation that a CPU has not.
    assert {row["implementation"] for row in rows if "failed" in row} == {"sdpa cudnn"}


def test_everything_is_built_first(tiny):
    """Every kernel and every policy, once."""
    rows = tiny[1]["parts"]["build"]["rows"]
    assert {row["built"] for row in rows} == KERNELS | set(MEASURED)


def test_every_policy_decodes(tiny):
    """Launched, replayed where there is a GPU, with a mask of ones; and prompts, and second turns."""
    rows = tiny[1]["parts"]["models"]["rows"]
    for context, batch in ((64, 1), (48, 2)):
        of_batch = [row for row in rows if row["batch"] == batch and row.get("context") == context]
        here = {row["policy"]: row for row in of_batch if "how" not in row}
        assert tuple(here) == ("transformers", *MEASURED, "floor")
        assert all(row["ms"] > 0 and row["busy_ms"] > 0 for row in here.values())
        assert all(row["of_limit"] == pytest.approx(row["floor_ms"] / row["ms"]) for row in here.values())
        assert all({"launches", "waits"} <= set(row) for row in here.values())
        assert here["h2o"]["cache_gib"] < here["full"]["cache_gib"] / 2
        assert here["h2o"]["read_share"] < 0.5 and here["full"]["read_share"] == 1
        assert here["floor"]["floor_ms"] < here["h2o"]["floor_ms"] < here["full"]["floor_ms"]
        assert here["full"]["floor_ms"] == here["transformers"]["floor_ms"]
        replayed = {row["policy"]: row["not_replayed"] for row in of_batch if row.get("how") == "graph replay"}
        assert replayed == dict.fromkeys(MEASURED, "no CUDA device")
        assert {row["policy"] for row in of_batch if row.get("how") == "mask of ones"} == {"full", "h2o"}
    for how, tokens in (("prompt", 32), ("second turn", 8)):
        found = {row["policy"]: row for row in rows if row.get("how") == how}
        assert set(found) == {"transformers", "full", "h2o"}
        assert all(row["ms"] > 0 and row["floor_ms"] > 0 and row["tokens"] == tokens for row in found.values())


def test_what_the_profiler_counts():
    """Kernel launches and waits for the device, per step; other functions of CUDA are neither."""
    gpu_decode = in_benchmarks("gpu_decode")
    events = [
        SimpleNamespace(key=key, count=count)
        for key, count in (
            ("cudaLaunchKernel", 30), ("cuLaunchKernelEx", 12), ("cudaStreamSynchronize", 2), ("cudaMemcpyAsync", 7),
            ("cudaDeviceSynchronize", 3), ("aten::mm", 5),
        )
    ]  # fmt: skip
    assert gpu_decode.counted(events, 2) == {"launches": 21.0, "waits": 1.0}


def test_the_least_time_of_a_step():
    """By hand: 2 layers of 2 kv heads of 8 numbers, K and V, of 3 sequences; weights but for the table of embeddings."""
    gpu_decode = in_benchmarks("gpu_decode")
    settings = gpu_decode.TINY._replace(config={**gpu_decode.SMALL, "num_hidden_layers": 2})
    bench = gpu_decode.Bench(
        gpu_decode.random_model(settings, torch.device("cpu")), settings, gpu.Limits(bandwidth=1e6, rate=1e9)
    )
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 32 + 2 * 32  # q and o, k and v, the MLP, two norms
    weights = 2 * layer + 32 + 64 * 32
    assert bench.step_floor(3, 100, 0.5) == pytest.approx(4 * (weights + 0.5 * 3 * 100 * 2 * 2 * 2 * 8) / 1e6 * 1e3)
    pairs = 10 * 5 + 55
    operations = 2 * 10 * (2 * layer + 32) + 4 * pairs * 4 * 8 * 2
    assert bench.prompt_floor(10, 5) == pytest.approx(operations / 1e9 * 1e3)


def test_rows_are_in_the_file_while_a_part_runs(tmp_path, monkeypatch):
    """Whoever is cut off keeps what was measured, marked as running."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\nopen(sys.argv[sys.argv.index('--out') + 1], 'w').write('{\"ms\": 1}\\n')\ntime.sleep(1.5)\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "EVERY", 0.2)
    kept = []
    part = gpu_check.run_in_process("kernels", 60, False, kept.append)
    assert part["ended"] == "done" and len(kept) >= 2
    assert kept[-1]["ended"] == "running" and kept[-1]["rows"] == [{"ms": 1}]
    assert gpu_check.wrong({"kernels": kept[-1]}) == ["kernels running"]


def test_tests_write_failures_and_counts_as_they_come(tmp_path):
    """Twelve pass, one fails, and one is not started any more because the time is over."""
    (tmp_path / "tests" / "kernels" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "kernels" / "conftest.py").write_text("")
    (tmp_path / "tests" / "test_replay.py").write_text("def test_on_a_cpu(): assert False\n")
    (tmp_path / "tests" / "kernels" / "gpu" / "test_it.py").write_text(
        "import pytest, time\n"
        "@pytest.mark.parametrize('i', range(12))\ndef test_good(i): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_slow(): time.sleep(6)\n"
        "def test_never(): pass\n"
    )
    code = (
        f"import sys, time, pathlib; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"import gpu_check; gpu_check.ROOT = pathlib.Path({str(tmp_path)!r}); gpu_check._has = lambda name: False\n"
        f"gpu_check.tests(gpu_check.Run(pathlib.Path({str(tmp_path / 'rows')!r}), False, time.monotonic() + 5))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = gpu_check.read_rows(tmp_path / "rows")
    assert rows[0] == {"passed": 10, "failures": 0, "skipped": 0, "complete": False}
    assert rows[1]["test"].endswith("test_bad") and "assert 1 == 2" in rows[1]["failed"]
    assert rows[2] == {"left_out": "no time for the other tests"}
    assert rows[3] == {"passed": 13, "failures": 1, "skipped": 0, "complete": False}


def test_fewer_cases_have_every_value(tmp_path):
    """Each value of each parameter once, and of heads and groups those that models have."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "kernels" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('head_dim', [16, 64, 128])\n@pytest.mark.parametrize('group', [1, 3, 4])\n"
        "@pytest.mark.parametrize('form', ['a', 'b', 'c'])\ndef test_one(form, group, head_dim): pass\n"
        "@pytest.mark.parametrize('head_dim', [16, 80])\ndef test_other(head_dim): pass\n"
        "def test_plain(): pass\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KVPRESS_FEWER_CASES": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert names == [
        "test_one[a-3-64]", "test_one[a-3-128]", "test_one[a-4-64]", "test_one[b-3-64]", "test_one[c-3-64]",
        "test_other[16]", "test_other[80]", "test_plain",
    ]  # fmt: skip


def test_a_part_without_time_says_what_it_leaves_out():
    """And measures nothing."""
    gpu_kernels = in_benchmarks("gpu_kernels")
    limits = gpu.Limits(1e12, 1e14)
    rows = list(gpu_kernels.rows(torch.device("cpu"), limits, gpu_kernels.TINY, lambda: False))
    assert rows == [{"left_out": "no time for decode_selected and what comes after it"}]
    gpu_decode = in_benchmarks("gpu_decode")
    rows = list(gpu_decode.rows(torch.device("cpu"), limits, gpu_decode.TINY, lambda: False))
    assert rows == [{"left_out": "no time for the rest"}]


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
    """Every evicting policy has goals of its own, as launched; replays are held against the floor; prompts against full's."""
    rows = [
        {"bandwidth": 1.0, "rate": 1.0},
        model_row("transformers", 40.0),
        model_row("full", 30.0),
        model_row("tidal_decode", 15.0, evicts=False),
        model_row("h2o", 10.0, evicts=True),
        model_row("snapkv", 24.0, evicts=True),
        model_row("h2o", 8.0, evicts=True, how="graph replay", floor_ms=4.0),
        model_row("full", 12.0, how="graph replay", floor_ms=10.0),
        {"policy": "ems", "context": 131072, "batch": 1, "failed": "x", "evicts": True},
        model_row("full", 100.0, how="prompt"),
        model_row("h2o", 140.0, how="prompt"),
    ]
    found = gpu_check.judged({"models": {"rows": rows}}, False)
    told = [(goal["goal"].partition(",")[0], goal["figure"], goal["verdict"]) for goal in found[7:]]
    assert told == [
        ("h2o", 3.0, "met"),
        ("h2o", 4.0, "met"),
        ("snapkv", 1.25, "missed"),
        ("snapkv", pytest.approx(5 / 3), "missed"),
        ("full", pytest.approx(4 / 3), "met"),
        ("replayed steps", 2.0, "missed"),
        ("evicting policies", None, "not measured"),
        ("full", None, "not measured"),
        ("replayed steps", None, "not measured"),
        ("h2o", 1.4, "met"),
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
