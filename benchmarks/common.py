"""What the benchmarks of whole models share: which policies, at which budgets, and writing rows."""

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

from transformers import DynamicCache

import kvpress
from kvpress.layer import KVLayer
from kvpress.policy import Policy

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, contexts: list[int], batches: list[int], out: str) -> argparse.ArgumentParser:
    """The options that all of them take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub name or folder of a causal LM")
    parser.add_argument("--contexts", type=int, nargs="+", default=contexts, help="tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=batches)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--policies", nargs="+", default=sorted(kvpress.available()), help="names")
    parser.add_argument("--share", type=float, default=0.1, help="budget of evicting policies, a share of the context")
    parser.add_argument("--selected", type=int, default=512, help="budget of selecting policies, entries read")
    parser.add_argument("--rounds", type=int, default=7, help="a ratio is the median over so many rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def chosen_policies(options: argparse.Namespace) -> list[Policy]:
    """The named policies, evicting ones at a share of the context, selecting ones at so many entries."""
    made: list[Policy] = []
    for name in options.policies:
        policy = type(kvpress.make_policy(name))
        if not policy.takes_budget:
            made.append(policy())
        else:
            made.append(policy.at_budget(options.selected if "selection" in policy.roles else options.share))
    return made


def ratios(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Name -> median of its times, and of its ratio to the baseline's time of the same round, with the extremes."""
    found = {}
    for name, values in times.items():
        shares = sorted(value / other for value, other in zip(values, times[baseline], strict=True))
        found[name] = {
            "median": statistics.median(values),
            "ratio": round(statistics.median(shares), 3),
            "ratio_low": round(shares[0], 3),
            "ratio_high": round(shares[-1], 3),
        }
    return found


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors that a cache holds."""
    return sum(
        layer.nbytes if isinstance(layer, KVLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if layer.keys is not None
    )


class Rows:
    """A CSV file that grows row by row, each also printed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer: csv.DictWriter[str] | None = None

    def add(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(row))
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()
        print(*row.values(), sep="\t", flush=True)
