"""Time per token and memory against the length of the context, for every policy, beside the least time that its reads take.

    python benchmarks/scaling.py                     # a small Llama shape, 1k to 64k on a CPU, to 1M on a GPU
    python benchmarks/scaling.py --policies h2o quest --contexts 1024 16384 --out /tmp/some.csv
    python benchmarks/scaling.py --draw              # the picture once more, from the CSV

Weights, caches and tokens are random: what matters here is sizes, and no prompt of such lengths is run. All evicting
policies keep `--budget` entries, so that their time must not depend on the context; all selecting ones read `--budget`
entries per query head and scan something to find them.

The line beside a policy is floor + bytes / bandwidth. The floor is the patched model with an empty cache; the bytes are the K and V
entries that the policy's report counts as read (scans are in it), and the bandwidth is what this machine reached when it
only read. A cache that fits the processor's own can be faster than its line.

Two policies depend on more than sizes. Random query heads agree on nothing, so that those who select per query head read up
to a group's size times the budget; and no query is like the one before, so that TokenSelect votes anew at every step.
RecycledAttention has one full step in each round of steps (`stride`), as its own default has in 50.
"""

import argparse
import csv
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows, cache_bytes
from gpu_decode import LLAMA, PLAIN, Entries, Settings, finish, fitting_context, plain_cache, policy_cache
from gpu_decode import random_model as build_model
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from memory import resident_mib
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.errors import PolicyError
from kvpress.layer import KVLayer
from kvpress.policy import Policy

FLOOR = "floor"
STEPS = 10  # of a round; RecycledAttention reads everything in one of them
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}
LARGE = {**LLAMA, "num_hidden_layers": 8, "max_position_embeddings": 2 << 20}
CPU = Settings(SMALL, torch.float32, tuple(1024 << i for i in range(7)), (1,), 1024, STEPS, 512, 1.0)
GPU = Settings(LARGE, torch.bfloat16, tuple(1024 << i for i in range(0, 11, 2)), (1,), 16384, STEPS, 512, 1.0)


def chosen(names: list[str], budget: int) -> list[Policy]:
    """The named policies at this budget, an int."""
    made: list[Policy] = []
    for name in names:
        cls = type(kvpress.make_policy(name))
        fields = {"stride": STEPS} if name == "recycled" else {}
        made.append(cls.at_budget(budget, **fields) if cls.takes_budget else cls())
    return made


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: the best of sums over, and products with, more than any cache holds."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    matrix = torch.ones(size // 4096, 1024, device=device)
    vector = torch.ones(1024, device=device)
    best = 0.0
    for read in (matrix.sum, lambda: matrix @ vector):
        for _ in range(5):
            finish(device)
            start = time.perf_counter()
            read()
            finish(device)
            best = max(best, matrix.nbytes / (time.perf_counter() - start))
    return best


class Peak:
    """The most memory held beyond what was held when this was made, in MiB: of the process, or of the GPU's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.known = self.cuda or sys.platform == "linux"
        self.before = 0.0
        if self.cuda:
            self.before = torch.cuda.memory_allocated() / 2**20
        elif self.known:
            self._give_back()
            self.before = resident_mib("VmRSS")

    def _give_back(self) -> None:
        """Let freed memory go back to the system: else it counts as held."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)

    def start_over(self) -> None:
        """Forget the peak so far: that of filling the cache."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.known:
            self._give_back()
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float | None:
        """The peak; None where it is not known."""
        if not self.known:
            return None
        now = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else resident_mib("VmHWM")
        return round(now - self.before, 1)


def entries_read(cache: DynamicCache) -> float:
    """Bytes of the entries that decode steps read of our layers so far."""
    return sum(layer.facts.read * layer.facts.entry_bytes for layer in cache.layers if isinstance(layer, KVLayer))


@torch.no_grad()
def measure(model: Any, policy: Policy | str, entries: Entries, rounds: int) -> dict[str, Any]:
    """Decode with one policy, with transformers' cache, or with an empty one."""
    if policy == FLOOR:
        with kvpress.patch(model, "full"):
            return _measure(model, lambda: plain_cache(model, None), entries, rounds)
    if isinstance(policy, str):
        return _measure(model, lambda: plain_cache(model, entries), entries, rounds)
    with kvpress.patch(model, policy) as handle:
        return _measure(model, lambda: policy_cache(model, handle, entries), entries, rounds)


def _measure(model: Any, fill: Any, entries: Entries, rounds: int) -> dict[str, Any]:
    device, batch = model.device, entries.key.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, ((rounds + 1) * STEPS, batch, 1), generator=generator).to(device)
    peak = Peak(device)
    cache = fill()
    peak.start_over()
    times, before = [], 0.0
    for round_ in range(rounds + 1):
        if round_ == 1:  # the first warms up
            before = entries_read(cache)
        finish(device)
        start = time.perf_counter()
        for token in ids[round_ * STEPS : (round_ + 1) * STEPS]:
            model(input_ids=token, **{CACHE: cache}, use_cache=True)
        finish(device)
        times.append((time.perf_counter() - start) / STEPS * 1e3)
    if isinstance(cache.layers[0], KVLayer):
        read = (entries_read(cache) - before) / (rounds * STEPS)
    else:
        read = float(cache_bytes(cache))
    return {
        "ms_per_token": round(statistics.median(times[1:]), 3),
        "ms_low": round(min(times[1:]), 3),
        "ms_high": round(max(times[1:]), 3),
        "read_mib_per_token": round(read / 2**20, 3),
        "cache_mib": round(cache_bytes(cache) / 2**20, 2),
        "peak_mib": peak.mib(),
    }


def rows(device: torch.device, settings: Settings, policies: list[Policy], rounds: int) -> Iterator[dict[str, Any]]:
    """Every context and policy; the floor and transformers first."""
    model = build_model(settings, device)
    bandwidth = read_bandwidth(device)
    print(f"reads {bandwidth / 1e9:.1f} GB/s", flush=True)
    for context in settings.contexts:
        if fitting_context(model, context, 1, settings) < context:
            print(f"context {context} left out: the full cache does not fit the device", file=sys.stderr)
            continue
        entries = Entries(model, 1, context)
        floor = 0.0
        todo: list[Policy | str] = [FLOOR, PLAIN, *policies]
        for policy in todo:
            figures = measure(model, policy, entries, rounds)
            named = isinstance(policy, str)
            if policy == FLOOR:
                floor, figures["read_mib_per_token"] = figures["ms_per_token"], 0.0
            limit = floor + figures["read_mib_per_token"] * 2**20 / bandwidth * 1e3
            yield {
                "context": context,
                "policy": policy if named else policy.name,
                "as": policy if named else policy.describe(),
                "kind": "reference" if named else policy.kind,
                **figures,
                "line_ms": round(limit, 3),
                "read_gb_per_s": round(bandwidth / 1e9, 2),
                "threads": torch.get_num_threads(),
            }


# ---------------------------------------------------------------------------------------------------- what came out


def read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Policy -> its rows in order of context, the figures as numbers."""
    found: dict[str, list[dict[str, Any]]] = {}
    words = ("policy", "as", "kind")
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(text) if text else None for name, text in row.items() if name not in words}
            found.setdefault(row["policy"], []).append({**row, **numbers})
    return {name: sorted(points, key=lambda row: row["context"]) for name, points in found.items()}


def print_growth(series: dict[str, list[dict[str, Any]]]) -> None:
    """How each policy's time and its line grow with the context, by least squares."""
    print("policy\tms shortest\tms longest\tµs per 1000 tokens\tthe line's\tMiB longest\tpeak MiB longest")
    for name, points in series.items():
        contexts = [row["context"] for row in points]
        slope, line = (
            statistics.linear_regression(contexts, [row[column] for row in points]).slope * 1e6
            if len(points) > 1
            else float("nan")
            for column in ("ms_per_token", "line_ms")
        )
        first, last = points[0], points[-1]
        figures = f"{first['ms_per_token']:.2f}\t{last['ms_per_token']:.2f}\t{slope:.1f}\t{line:.1f}"
        print(f"{name}\t{figures}\t{last['cache_mib']:.1f}\t{last['peak_mib']}")


def styles(series: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Evicting policies share the cool colours, those that keep everything have a strong one each."""
    strong = iter(("#D55E00", "#CC79A7", "#E69F00", "#B22222", "#8B5A2B", "#FF69B4"))
    evicting = [name for name, points in series.items() if points[0]["kind"] == "evicting"]
    markers = "os^vD<>P*Xph"
    made: dict[str, dict[str, Any]] = {}
    for name, points in series.items():
        if name in evicting:
            at = evicting.index(name)
            colour = colormaps["winter"](at / max(1, len(evicting) - 1))
            made[name] = {"color": colour, "marker": markers[at % len(markers)], "linewidth": 0.9, "markersize": 3.5}
        elif name in (PLAIN, FLOOR):
            made[name] = {"color": "black" if name == PLAIN else "0.55", "linewidth": 1.8}
        else:
            colour = "#555599" if points[0]["kind"] == "exact" else next(strong)
            made[name] = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 4}
    return made


def draw(path: Path, series: dict[str, list[dict[str, Any]]]) -> None:
    """Two panels over the context: time per token with its line, and the cache with the peak."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    FigureCanvasAgg(figure)
    times, sizes = figure.subplots(1, 2)
    style = styles(series)
    for name, points in series.items():
        contexts = [row["context"] for row in points]
        dashed = {"color": style[name]["color"], "linestyle": (0, (3, 2)), "linewidth": 1, "alpha": 0.8}
        times.plot(contexts, [row["ms_per_token"] for row in points], **style[name])
        if name != FLOOR:
            times.plot(contexts, [row["line_ms"] for row in points], **dashed)
            sizes.plot(contexts, [row["cache_mib"] for row in points], **style[name])
            if all(row["peak_mib"] is not None and row["peak_mib"] > 0 for row in points):
                sizes.plot(contexts, [row["peak_mib"] for row in points], **dashed)
    measured = next(iter(series.values()))[0]
    times.set_title(
        f"time per token, CPU threads: {measured['threads']:g} (dashed: floor + bytes read / {measured['read_gb_per_s']:g} GB/s)",
        fontsize=10,
    )
    sizes.set_title("cache held (dashed: peak while decoding)", fontsize=10)
    times.set_ylabel("milliseconds")
    sizes.set_ylabel("MiB")
    contexts = sorted({row["context"] for points in series.values() for row in points})
    for panel in (times, sizes):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(contexts, [f"{context / 1024:g}k" for context in contexts])
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("context (tokens)")
        panel.grid(alpha=0.25, which="both", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    order = {"reference": 0, "exact": 1, "selecting": 2, "evicting": 3}
    names = sorted(series, key=lambda name: order[series[name][0]["kind"]])
    labels = [f"{name} ({series[name][0]['kind']})" for name in names]
    figure.legend([Line2D([], [], **style[name]) for name in names], labels, loc="outside right", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens")
    parser.add_argument("--policies", nargs="+", default=sorted(kvpress.available()), help="names")
    parser.add_argument("--budget", type=int, default=512, help="entries kept or, by a selecting policy, read")
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"a figure is the median of so many rounds of {STEPS} steps"
    )
    parser.add_argument(
        "--threads", type=int, help="of a CPU; all by default. Fewer bear other work on the machine better"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv", help="the picture goes beside it")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what --out holds")
    options = parser.parse_args()
    if options.draw and not options.out.is_file():
        parser.error(f"--draw needs the rows of an earlier run, and there is no {options.out}")
    if not options.draw:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = GPU if device.type == "cuda" else CPU
        if options.contexts:
            settings = settings._replace(contexts=tuple(sorted(options.contexts)))
        if min(settings.contexts) <= options.budget:
            parser.error(f"--contexts {min(settings.contexts)} is not longer than --budget {options.budget}")
        if options.rounds < 1:
            parser.error(f"--rounds {options.rounds} measures nothing; give at least 1")
        if options.threads is not None:
            if options.threads < 1:
                parser.error(f"--threads {options.threads} computes nothing; give at least 1")
            torch.set_num_threads(options.threads)
        try:
            policies = chosen(options.policies, options.budget)
        except PolicyError as error:
            parser.error(str(error))
        out = Rows(options.out)
        for row in rows(device, settings, policies, options.rounds):
            out.add(row)
    series = read_rows(options.out)
    print_growth(series)
    draw(options.out.with_suffix(".png"), series)


if __name__ == "__main__":
    main()
