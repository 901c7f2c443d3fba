"""Everything that only a GPU can show, in one command: kernels right, kernels fast, models fast.

    python scripts/gpu_check.py --out gpu.json             # on a CUDA machine, under 8 minutes
    python scripts/gpu_check.py --interpret --out try.json # on any machine: a tiny run of every part, no figures worth keeping

Parts, each in a process of its own with a share of the time, so that one that crashes or hangs takes nothing else along:

    tests    the Triton kernels against float64 and float32 references, in float32, float16 and bfloat16
    kernels  time of each kernel by CUDA-graph replay, the share of what the device can do, torch's own kernels beside it
    models   decode steps of a model of Llama-3.1-8B's shape with random weights, under every policy

The JSON has every row measured and is written again after each part; the goals come last, each met, missed or not measured.
Needs this checkout (installed or not), torch, Triton, transformers, numpy, einops and pytest, and downloads nothing.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"tests": 3, "kernels": 3, "models": 5}  # of the time
MOST_ERROR = 0.02  # relative, of a result in bfloat16
Row = dict[str, Any]


# ---------------------------------------------------------------------- the parts, each in its own process


def tests(interpret: bool) -> Iterator[Row]:
    """The kernels' tests. Compiling for GPUs that are not here is another machine's work."""
    import pytest

    failed: list[Row] = []
    counts = {"passed": 0, "failed": 0, "skipped": 0}

    class Results:
        """Counts outcomes, and keeps what failed."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
            if report.failed:
                text = str(report.longrepr).strip().splitlines()
                failed.append({"test": report.nodeid, "failed": text[-1][:300] if text else ""})

    folder = ROOT / "tests" / "kernels"
    arguments = [str(folder), "-q", "-x" if interpret else "--maxfail=50", "-p", "no:cacheprovider"]
    arguments += [f"--ignore={folder / 'gpu' / name}" for name in ("test_compile.py", "test_offsets.py")]
    # Those of Triton alone, and the others' runs with it.
    arguments += ["-k", "settings or split_count" if interpret else "gpu or triton"]
    if not interpret and _has("xdist"):
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time goes into compiling
    code = pytest.main(arguments, plugins=[Results()])
    if code and not failed:
        failed.append({"test": "pytest", "failed": f"{pytest.ExitCode(code).name}, exit code {int(code)}"})
    yield from failed
    yield {"passed": counts["passed"], "failures": counts["failed"], "skipped": counts["skipped"]}


def kernels(interpret: bool) -> Iterator[Row]:
    """What the device can do, then each kernel and its rivals."""
    import gpu
    import gpu_kernels
    import torch

    device = torch.device("cpu" if interpret else "cuda")
    limits = gpu.measure_limits(device, interpret)
    yield {"bandwidth": limits.bandwidth, "rate": limits.rate}
    yield from gpu_kernels.rows(device, limits, interpret)


def models(interpret: bool) -> Iterator[Row]:
    """Decode steps of a whole model."""
    import gpu_decode
    import torch

    yield from gpu_decode.rows(torch.device("cpu" if interpret else "cuda"), interpret)


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {"tests": tests, "kernels": kernels, "models": models}


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def run_part(part: str, rows: Path, interpret: bool) -> None:
    """In the part's own process: a line of JSON for every row, as it comes."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    if interpret:
        import runpy

        # Triton's interpreter does not get on with every NumPy; the tests know what to do about it.
        runpy.run_path(str(ROOT / "tests" / "kernels" / "conftest.py"))
    with rows.open("a", encoding="utf-8") as file:
        for row in PARTS[part](interpret):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(table_line(row), flush=True)


# ---------------------------------------------------------------------- the goals


def decode_goals(rows: list[Row]) -> Iterator[tuple[str, float | None, float, bool]]:
    """Goals of the kernels: text, figure or None, bound, and whether the figure must be at least that."""

    def figure(column: str, kernel: str, *implementations: str, **where: Any) -> list[float]:
        wanted = {"kernel": kernel, **where}.items()
        named = implementations or ("kvpress",)
        found = [row for row in rows if column in row and wanted <= row.items()]
        return [row[column] for row in found if row["implementation"] in named]

    selected, dense, mass = "decode_attention, selected", "decode_attention", "attention_mass"
    for batch in (8, 16):
        share = figure("of_limit", selected, batch=batch)
        yield f"decode over selected entries, batch {batch}: share of the limit", _least(share), 0.6, True
    sdpa = figure("ratio", selected, "sdpa flash", "sdpa cudnn", batch=8)
    yield "decode over selected entries, batch 8: dense SDPA's time over ours", _least(sdpa), 20, True
    yield "dense decode: share of the limit", _least(figure("of_limit", dense)), 0.8, True
    topk = figure("ratio", "topk_select", "torch.topk", "torch.topk, unsorted")
    yield "topk_select: torch.topk's time over ours", _least(topk), 2, True
    flash = figure("ratio", mass, "sdpa flash")
    yield "attention_mass with LSE given: its time over a flash forward's", 1 / flash[0] if flash else None, 0.8, False
    sparse = figure("ratio", "block_sparse_attention", "sdpa flash")
    yield "block sparse attention, 10 %: flash's time over ours", _least(sparse), 6, True


def model_goals(rows: list[Row]) -> Iterator[tuple[str, float | None, float, bool]]:
    """Goals of whole models, at the longest context measured with each batch."""
    for batch, tidal, evicting in ((1, 2.1, 2.5), (8, 3, 6)):
        context = max((row["context"] for row in rows if row.get("batch") == batch and "ms" in row), default=0)
        here = {
            row["policy"]: row for row in rows if (row["batch"], row["context"]) == (batch, context) and "ms" in row
        }
        ours = here.get("full", {}).get("ms")
        where = f"batch {batch}, {context or 'no'} tokens"

        def faster(row: Row | None, ours: float | None = ours) -> float | None:
            return None if row is None or ours is None else ours / row["ms"]

        yield f"tidal_decode, {where}: full's time over its", faster(here.get("tidal_decode")), tidal, True
        for name, row in here.items():
            if row.get("evicts"):
                yield f"{name}, {where}: full's time over its", faster(row), evicting, True
        if not any(row.get("evicts") for row in here.values()):
            yield f"evicting policies, {where}: full's time over theirs", None, evicting, True
        plain = here.get("transformers", {}).get("ms")
        yield f"full, {where}: transformers' time over its", plain / ours if plain and ours else None, 1.3, True


def _least(figures: list[float]) -> float | None:
    return min(figures, default=None)


def judged(parts: dict[str, Any], interpret: bool) -> list[Row]:
    """Every goal with its figure and met, missed or not measured; what the interpreter shows is no measurement."""
    found = []
    for part, goals in (("kernels", decode_goals), ("models", model_goals)):
        for text, figure, bound, at_least in goals(parts.get(part, {}).get("rows", [])):
            verdict = "not measured"
            if figure is not None and not interpret:
                verdict = "met" if (figure >= bound if at_least else figure <= bound) else "missed"
            wanted = f"{'at least' if at_least else 'at most'} {bound}"
            found.append({"goal": text, "wanted": wanted, "figure": figure, "verdict": verdict})
    return found


# ---------------------------------------------------------------------- the command


def table_line(row: Row) -> str:
    """A row for people: numbers short, what is missing left out."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    named = ("kernel", "implementation", "policy", "test")
    texts = [cell(row[name]) for name in named if name in row]
    return "  ".join(texts + [f"{name}={cell(value)}" for name, value in row.items() if name not in named])


def machine() -> Row:
    """What the figures were measured on and with."""
    import torch

    found: Row = {"python": platform.python_version(), "system": platform.platform(), "gpu": None}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    return found


def run_in_process(part: str, seconds: float, interpret: bool) -> Row:
    """Run a part for so long; its rows so far, and how it ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["KINETO_LOG_LEVEL"] = "99"  # torch's profiler has nothing to say
    if interpret:
        # No CUDA for the tiny run, even where there is some: it is to run the same everywhere.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, __file__, "--run-part", part, "--out", str(rows)] + ["--interpret"] * interpret
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            ended = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # pytest's workers too
            process.wait()
            ended = f"stopped after {seconds:.0f} s"
        lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line of a process that was stopped
            break
    return {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "rows": found}


def main() -> int:
    """Command line. The exit code is 1 if a part did not end, or a kernel's result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the JSON goes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="time for all of them; one that needs less leaves more"
    )
    parser.add_argument(
        "--interpret", action="store_true", help="a tiny run on the CPU, kernels in Triton's interpreter"
    )
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_part:
        run_part(options.run_part, options.out, options.interpret)
        return 0
    started = time.perf_counter()
    result: Row = {"machine": machine(), "interpret": options.interpret, "parts": {}}
    runs = options.interpret or result["machine"]["gpu"] is not None
    print(table_line(result["machine"]), flush=True)
    for place, part in enumerate(options.parts):
        if not runs:
            print(f"skipped {part}: no CUDA device (--interpret runs a tiny version of it here)")
            result["parts"][part] = {"ended": "skipped: no CUDA device", "seconds": 0.0, "rows": []}
            continue
        left = options.minutes * 60 - (time.perf_counter() - started)
        shares = sum(SHARES[other] for other in options.parts[place:])
        seconds = max(1.0, left * SHARES[part] / shares)
        print(f"\n== {part}, {seconds:.0f} s at most", flush=True)
        result["parts"][part] = run_in_process(part, seconds, options.interpret)
        print(f"== {part} {result['parts'][part]['ended']} ({result['parts'][part]['seconds']} s)", flush=True)
        result["goals"] = judged(result["parts"], options.interpret)
        options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    result["goals"] = judged(result["parts"], options.interpret)
    result["wrong"] = wrong(result["parts"])
    options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print("\n== goals")
    for goal in result["goals"]:
        figure = "" if goal["figure"] is None else f": {goal['figure']:.3g}"
        print(f"{goal['verdict']:13} {goal['goal']}{figure} ({goal['wanted']})")
    print("\n== wrong" if result["wrong"] else "\nnothing wrong", *result["wrong"], f"\n{options.out}", sep="\n")
    return 1 if result["wrong"] else 0


def wrong(parts: dict[str, Any]) -> list[str]:
    """Parts that did not end, tests that failed, kernels and policies that failed or whose result is off."""
    found = []
    for name, part in parts.items():
        if not part["ended"].startswith(("done", "skipped")):
            found.append(f"{name} {part['ended']}")
        for row in part["rows"]:
            # Another implementation may not take these tensors, and a cache may not fit.
            excused = row.get("implementation", "kvpress") != "kvpress" or "OutOfMemory" in row.get("failed", "")
            if ("failed" in row and not excused) or row.get("error", 0.0) > MOST_ERROR:
                found.append(f"{name}: {table_line(row)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
