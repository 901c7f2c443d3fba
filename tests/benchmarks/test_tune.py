"""benchmarks/tune.py: its tiny run, what it keeps of the shapes that it tries, and the file that it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is optional)")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "tune.py"
# Cases whose call takes what the shape says, by a clock that is set by it; the last two shapes are wrong or impossible.
CHOOSE = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import tune
from kvpress.kernels import launch_shapes

class FakeCase:
    waits = False
    def __init__(self, times):
        self.times, self.calls = times, {"kvpress": [self.run]}
    def run(self):
        return launch_shapes.launch_shape("kernel", torch.device("cpu"), 1, block_n=0)["block_n"]
    def error(self):
        return 1.0 if self.run() == 4 else 0.0

def timing(calls, device, waits):
    case = calls[0].__self__
    if calls[0]() == 5:
        raise RuntimeError("out of resource: shared memory")
    return tune_timing(case.times[calls[0]()], "clock")

from gpu import Timing as tune_timing
tune.timing = timing
shapes = [{"block_n": number} for number in (1, 2, 3, 4, 5)]
# Times with the heuristic (0) and with each shape: 1 is faster on average and slower in one case, 2 gains, 3 gains less.
slow = FakeCase({0: 10.0, 1: 11.0, 2: 8.0, 3: 9.0, 4: 1.0})
fast = FakeCase({0: 10.0, 1: 2.0, 2: 9.0, 3: 9.5, 4: 1.0})
shape, gain = tune.best_shape([slow, fast], "kernel", shapes, None)
print((shape, round(gain, 3)))
print(tune.best_shape([slow, fast], "kernel", shapes[:1], None))
print(tune.keys_asked(slow, "kernel"))
"""


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_without_a_gpu_it_says_so():
    done = run(SCRIPT)
    assert done.returncode == 0 and "no CUDA device" in done.stdout
    done = run(SCRIPT, "--interpret")
    assert done.returncode == 2 and "--out" in done.stderr


def test_inspect_says_what_launches_take():
    """Shared memory, registers and spills of each launch of a kernel, by the compiler."""
    done = run(SCRIPT, "--inspect", "--only", "topk_select", "--architectures", "90")
    assert done.returncode == 0, done.stderr
    heading, *lines, summary, _ = done.stdout.split("\n")[:-1]
    assert heading.split()[:4] == ["sm_90", "shared", "regs", "spilled"]
    assert {line.split()[0] for line in lines} == {f"topk_select.{x}_kernel" for x in ("tile", "count", "collect")}
    assert all(0 < int(line.split()[2]) <= 255 for line in lines)
    assert summary.startswith(f"{len(lines)} launches; ")


def test_a_tiny_run_tries_every_kernel(tmp_path):
    """Whether anything beats the heuristic here is chance; what is written is what the kernels read."""
    out = tmp_path / "tuned.json"
    out.write_text(json.dumps({"gpu": "x", "triton": "0", "shapes": {"other 1x2": {"block_n": 16}}}))
    done = run(SCRIPT, "--interpret", "--out", out)
    assert done.returncode == 0, done.stderr
    keys = (
        "decode_attention 16x16x2", "decode_attention.listed 16x16x2",
        "decode_attention.split", "attention_mass.lse 16x2", "attention_mass.mass 16x2",
        "antidiagonal_mass 16x2", "vertical_slash_mass 16x2", "block_sparse_attention 16x16x2",
    )  # fmt: skip
    for key in keys:
        assert f"\n{key}\n" in "\n" + done.stdout
    assert done.stdout.count("of the heuristic's time") == 2 * len(keys)
    assert "wrong results" not in done.stdout
    shapes = json.loads(out.read_text())["shapes"]
    assert shapes["other 1x2"] == {"block_n": 16}
    assert all(isinstance(number, int) for shape in shapes.values() for number in shape.values())


def test_what_is_kept():
    """The fastest of those that gain, are slower nowhere, run and compute the right thing."""
    done = run("-c", CHOOSE, ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr
    found, nothing, keys = (line for line in done.stdout.splitlines() if not line.startswith("  "))
    assert found == "({'block_n': 2}, 0.849)" and nothing == "None" and keys == "{'kernel 1'}"
    assert "block_n=4: wrong results" in done.stdout and "block_n=5: RuntimeError: out of resource" in done.stdout
