"""Everything that only a GPU can show, in two calls: kernels fast and models fast, then kernels right.

    python scripts/gpu_check.py --call A --out a.json      # on a CUDA machine, 4.7 minutes at most
    python scripts/gpu_check.py --call B --out b.json      # and 3.7 minutes
    python scripts/gpu_check.py --interpret --out try.json # on any machine: a tiny run of every part, no figures worth keeping

Parts, each in a process of its own with a share of the call's time, so that one that crashes or hangs takes nothing else along:

    A  build    compiles what the next two parts launch, in many processes at once
       kernels  time of each kernel by CUDA-graph replay, the share of what the device can do, torch's own kernels beside it
       models   decode steps and prompts of a model of Llama-3.1-8B's shape with random weights
    B  tests    the Triton kernels against float64 and float32 references, in float32, float16 and bfloat16

Every row is in the JSON within seconds, goals and all, so that a run that is cut off keeps what it had. A part knows when its time
is over, and ends before it is stopped. Each goal is met, missed or not measured.
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
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CALLS = {"A": ("build", "kernels", "models"), "B": ("tests",)}
MINUTES = {"A": 4.7, "B": 3.7}
SHARES = {"build": 2, "kernels": 3, "models": 4, "tests": 9}  # of the time
WORKERS = 16  # processes that compile
MARGIN = 0.1  # of a part's share, in which it ends by itself
EVERY = 2.0  # seconds between two writings of the JSON
MOST_ERROR = 0.02  # relative, of a result in bfloat16
Row = dict[str, Any]


# ---------------------------------------------------------------------- the parts, each in its own process


@dataclass(frozen=True)
class Run:
    """What a part is told.

    Attributes:
        rows: the file that takes a line of JSON for every row.
        interpret: tiny, on the CPU.
        ends: by `time.monotonic`, when the part ends by itself.
        place, count: which of how many processes of the part this is; the first of one as a rule.
    """

    rows: Path
    interpret: bool
    ends: float
    place: int = 0
    count: int = 1

    def in_time(self) -> bool:
        """Whether there is time for more."""
        return time.monotonic() < self.ends

    def emit(self, row: Row) -> None:
        """Write a row, and show it."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(table_line(row), flush=True)

    @property
    def device(self) -> Any:
        """Where the part runs."""
        import torch

        return torch.device("cpu") if self.interpret else torch.device("cuda", torch.cuda.current_device())


def build(run: Run) -> None:
    """Compile in as many processes as there are cores, at small sizes: what is on disk then is found by the other parts."""
    if run.count > 1 or run.interpret:
        build_some(run)
        return
    workers = min(WORKERS, os.cpu_count() or 1)
    command = part_command("build", run.rows, run.interpret, run.ends - time.monotonic())
    started = [subprocess.Popen([*command, "--worker", str(place), str(workers)]) for place in range(workers)]
    for place, worker in enumerate(started):
        try:
            code = worker.wait(max(0.1, run.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            run.emit({"left_out": f"process {place} had more to compile"})
            continue
        if code:
            run.emit({"failed": f"process {place} of {workers} ended with exit code {code}"})


def build_some(run: Run) -> None:
    """One process's share."""
    import gpu_decode
    import gpu_kernels

    sizes = gpu_kernels.TINY if run.interpret else gpu_kernels.BUILD
    settings = gpu_decode.TINY if run.interpret else gpu_decode.BUILD
    start = time.perf_counter()
    for made in (
        gpu_kernels.build(run.device, sizes, run.place, run.count),
        gpu_decode.build(run.device, settings, run.place, run.count),
    ):
        for name in made:
            run.emit({"built": name, "process": run.place, "seconds": round(time.perf_counter() - start, 1)})
            if not run.in_time():
                run.emit({"left_out": f"process {run.place} had more to compile"})
                return


def kernels(run: Run) -> None:
    """What the device can do, then each kernel and its rivals."""
    import gpu
    import gpu_kernels

    limits = gpu.measure_limits(run.device, run.interpret)
    run.emit({"bandwidth": limits.bandwidth, "rate": limits.rate})
    for row in gpu_kernels.rows(
        run.device, limits, gpu_kernels.TINY if run.interpret else gpu_kernels.Sizes(), run.in_time
    ):
        run.emit(row)


def models(run: Run) -> None:
    """Decode steps and prompts of a whole model."""
    import gpu
    import gpu_decode

    limits = gpu.measure_limits(run.device, run.interpret)
    settings = gpu_decode.TINY if run.interpret else gpu_decode.FULL_SIZE
    for row in gpu_decode.rows(run.device, limits, settings, run.in_time):
        run.emit(row)


def tests(run: Run) -> None:
    """The kernels' tests, a case for each value of each parameter. Compiling for GPUs that are not here is another machine's work.

    A failure is a row at once, and so is every count that a multiple of ten changes.
    """
    import pytest

    counts = {"passed": 0, "failed": 0, "skipped": 0}

    def told(complete: bool) -> Row:
        return {
            "passed": counts["passed"],
            "failures": counts["failed"],
            "skipped": counts["skipped"],
            "complete": complete,
        }

    class Results:
        """Counts outcomes, says what failed, and ends the session in time."""

        def pytest_sessionstart(self, session: Any) -> None:
            self.session = session

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
                if sum(counts.values()) % 10 == 0:
                    run.emit(told(complete=False))
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                text = str(report.longrepr) if crash is None else crash.message
                run.emit({"test": report.nodeid, "failed": text[:300]})
            if not run.in_time():
                self.session.shouldstop = "no time for the rest"

    folder = ROOT / "tests" / "kernels"
    whole_steps = ROOT / "tests" / "test_replay.py"
    arguments = [
        str(folder),
        str(whole_steps),
        "-q",
        "-x" if run.interpret else "--maxfail=50",
        "-p",
        "no:cacheprovider",
    ]
    arguments += [f"--ignore={folder / 'gpu' / 'test_compile.py'}"]
    # Those of Triton alone, and the others' runs with it.
    arguments += ["-k", "settings or split_count" if run.interpret else "gpu or triton"]
    if not run.interpret and _has("xdist"):
        arguments += ["-n", str(min(WORKERS, os.cpu_count() or 1))]  # most of the time goes into compiling
    os.environ["KVPRESS_FEWER_CASES"] = "1"  # for the folder's conftest.py
    code = pytest.main(arguments, plugins=[Results()])
    if not run.in_time():
        run.emit({"left_out": "no time for the other tests"})
    elif code and not counts["failed"]:
        run.emit({"test": "pytest", "failed": f"{pytest.ExitCode(code).name}, exit code {int(code)}"})
    run.emit(told(complete=run.in_time()))


PARTS: dict[str, Callable[[Run], None]] = {"build": build, "kernels": kernels, "models": models, "tests": tests}


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def run_part(part: str, run: Run) -> None:
    """In the part's own process."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    if run.interpret:
        import runpy

        # Triton's interpreter does not get on with every NumPy; the tests know what to do about it.
        runpy.run_path(str(ROOT / "tests" / "kernels" / "conftest.py"))
    PARTS[part](run)


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
    """Goals of whole models, at the context measured with each batch: of steps as launched, and as replayed."""
    for batch, evicting, plainly, floors in ((1, 1.5, 3, 1.6), (8, 3, 6, 1.4)):
        of_batch = [row for row in rows if row.get("batch") == batch and "ms" in row]
        here = {row["policy"]: row for row in of_batch if "how" not in row}
        replayed = {row["policy"]: row for row in of_batch if row.get("how") == "graph replay"}
        context = max((row["context"] for row in here.values()), default=0)
        where = f"batch {batch}, {context or 'no'} tokens"

        def times(name: str, other: Row, here: dict[str, Row] = here) -> float | None:
            return here[name]["ms"] / other["ms"] if name in here else None

        evicted = [row for row in here.values() if row.get("evicts")]
        for row in evicted:
            yield f"{row['policy']}, {where}: full's time over its", times("full", row), evicting, True
            yield f"{row['policy']}, {where}: transformers' time over its", times("transformers", row), plainly, True
        if not evicted:
            yield f"evicting policies, {where}: full's time over theirs", None, evicting, True
        full = here.get("full")
        yield f"full, {where}: transformers' time over its", times("transformers", full) if full else None, 1.3, True
        slowest = max((row["ms"] / row["floor_ms"] for row in replayed.values()), default=None)
        yield f"replayed steps, {where}: time over the floor, the largest", slowest, floors, False
    prompts = {row["policy"]: row["ms"] for row in rows if row.get("how") == "prompt" and "ms" in row}
    both = {"full", "h2o"} <= set(prompts)
    yield "h2o, prompt: its time over full's", prompts["h2o"] / prompts["full"] if both else None, 1.5, False


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


def part_command(part: str, rows: Path, interpret: bool, seconds: float) -> list[str]:
    """The command of a part's process."""
    command = [sys.executable, __file__, "--run-part", part, "--out", str(rows), "--seconds", str(seconds)]
    return command + ["--interpret"] * interpret


def read_rows(path: Path) -> list[Row]:
    """The rows that a part has written so far."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line of a process that is writing, or was stopped
            break
    return found


def run_in_process(part: str, seconds: float, interpret: bool, keep: Callable[[Row], None] = lambda part: None) -> Row:
    """Run a part for so long; its rows, and how it ended. `keep` gets the same while it runs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["KINETO_LOG_LEVEL"] = "99"  # torch's profiler has nothing to say
    if interpret:
        # No CUDA for the tiny run, even where there is some: it is to run the same everywhere.
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = part_command(part, rows, interpret, seconds * (1 - MARGIN))
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
        ended = ""
        while not ended:
            left = seconds - (time.perf_counter() - start)
            try:
                code = process.wait(timeout=max(0.01, min(EVERY, left)))
                ended = "done" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                if left <= EVERY:
                    os.killpg(process.pid, signal.SIGKILL)  # its own processes too
                    process.wait()
                    ended = f"stopped after {seconds:.0f} s"
                else:
                    keep({"ended": "running", "seconds": round(seconds - left, 1), "rows": read_rows(rows)})
        return {"ended": ended, "seconds": round(time.perf_counter() - start, 1), "rows": read_rows(rows)}


def main() -> int:
    """Command line. The exit code is 1 if a part did not end, or a kernel's result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the JSON goes")
    parser.add_argument("--call", choices=CALLS, help="one of the two calls; both without it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="some parts only")
    parser.add_argument("--minutes", type=float, help="time for all parts; one that needs less leaves more")
    parser.add_argument(
        "--interpret", action="store_true", help="a tiny run on the CPU, kernels in Triton's interpreter"
    )
    parser.add_argument("--run-part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_part:
        ends = time.monotonic() + options.seconds
        run_part(options.run_part, Run(options.out, options.interpret, ends, *options.worker))
        return 0
    started = time.perf_counter()
    chosen = [options.call] if options.call else list(CALLS)
    parts = options.parts or [part for call in chosen for part in CALLS[call]]
    minutes = options.minutes or sum(MINUTES[call] for call in chosen)
    result: Row = {"machine": machine(), "interpret": options.interpret, "parts": {}}
    runs = options.interpret or result["machine"]["gpu"] is not None
    print(table_line(result["machine"]), flush=True)

    def write(part: str, found: Row) -> None:
        """What there is by now. A file is replaced whole: whoever copies it gets no half."""
        result["parts"][part] = found
        result["goals"], result["wrong"] = judged(result["parts"], options.interpret), wrong(result["parts"])
        draft = options.out.with_suffix(".part")
        draft.write_text(json.dumps(result, indent=1), encoding="utf-8")
        draft.replace(options.out)

    for place, part in enumerate(parts):
        if not runs:
            print(f"skipped {part}: no CUDA device (--interpret runs a tiny version of it here)")
            write(part, {"ended": "skipped: no CUDA device", "seconds": 0.0, "rows": []})
            continue
        left = minutes * 60 - (time.perf_counter() - started)
        shares = sum(SHARES[other] for other in parts[place:])
        seconds = max(1.0, left * SHARES[part] / shares)
        print(f"\n== {part}, {seconds:.0f} s at most", flush=True)

        def keep(found: Row, part: str = part) -> None:
            write(part, found)

        found = run_in_process(part, seconds, options.interpret, keep)
        write(part, found)
        print(f"== {part} {found['ended']} ({found['seconds']} s)", flush=True)
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
