"""benchmarks/kernels.py as it is started: every case runs, the CSV keeps what was measured before, goals are judged."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [
    "decode", "decode_selected", "decode_scores", "attention_mass", "block_sparse", "topk_select", "gather_slots",
    "page_scores", "rope_shift", "exponentials",
]  # fmt: skip


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--shapes", "smollm2", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All kernels at a 256th of their lengths."""
    out = tmp_path_factory.mktemp("kernels") / "kernels.csv"
    done = run("--shorter", 256, "--seconds", 0, "--rounds", 1, "--dtypes", "float32", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_kernel_has_ours_and_others(measured):
    by_kernel = {}
    for row in read(measured[0]):
        by_kernel.setdefault(row["kernel"], []).append(row["implementation"])
        assert float(row["ms"]) > 0 and float(row["ratio"]) > 0
    assert list(by_kernel) == KERNELS
    for names in by_kernel.values():
        assert names.count("kvpress") == 1 and len(names) == len(set(names)) > 1


def test_goals_are_judged(measured):
    """Each of the five, met or missed, with its figure."""
    lines = measured[1].split("Goals:")[1].strip().splitlines()
    assert len(lines) == 5
    assert all(line.startswith(("met ", "missed ")) and "(smollm2, float32" in line for line in lines)


def test_other_rows_stay(measured, tmp_path):
    """A run of one kernel replaces its rows and no others; what was not measured is said so."""
    out = tmp_path / "kernels.csv"
    before = read(measured[0])
    out.write_text(measured[0].read_text())
    done = run("--only", "rope_shift", "--shorter", 128, "--seconds", 0, "--rounds", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    after = read(out)
    kept = [row for row in before if row["kernel"] != "rope_shift"]
    assert [row for row in after if row["kernel"] != "rope_shift"] == kept
    rope = [(row["dtype"], row["size"]) for row in after if row["kernel"] == "rope_shift"]
    assert rope == [("float32", "64 entries")] * 2 + [("bfloat16", "64 entries")] * 2
    assert done.stdout.count("not measured") == 5


def test_the_reference_numbers_agree():
    """What stands side by side computes the same: a call of each implementation of each case."""
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import kernels
for name in ("decode", "decode_selected", "decode_scores", "attention_mass", "gather_slots", "page_scores", "rope_shift"):
    make, length = kernels.CASES[name]
    calls = make(kernels.SHAPES["smollm2"], torch.float32, 512).calls
    ours = calls.pop("kvpress")()
    ours = ours[0] if isinstance(ours, tuple) else ours
    for other, call in calls.items():
        if name == "attention_mass" and other.startswith("sdpa") or "all entries" in other or "all keys" in other:
            continue
        theirs = call()
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.testing.assert_close(theirs.view(ours.shape), ours, rtol=1e-4, atol=1e-4, msg=f"{{name}} {{other}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
