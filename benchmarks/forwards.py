"""The model's own layers on a CPU: products of few rows on all threads, and an MLP of a long prompt in tiles.

    python benchmarks/forwards.py                    # SmolLM2's weights and a Llama's, float32 and bfloat16; under a minute

GB/s are those of the weights, read once per product; enough matrices go by in turn that no cache holds them. Each figure is
the median of 20 rounds, in which the two ways of a case take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
from common import RESULTS, Rows
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from kvpress.forwards import linear_of_few_rows, mlp_in_tiles

WEIGHTS = ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))  # outputs, inputs
ROWS = (1, 4, 32)
TOKENS = 8192
ROUNDS = 20


def medians(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each way, after a round to warm up."""
    times: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if round_:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def few_rows(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> dict[str, object]:
    """GB/s of `linear`, and of what a patched model calls."""
    count = max(2, (1 << 26) // (outputs * inputs))
    layers = [nn.Linear(inputs, outputs, bias=False, dtype=dtype) for _ in range(count)]
    hidden = torch.ones(1, rows, inputs, dtype=dtype)
    read = sum(layer.weight.nbytes for layer in layers) / 1e9
    ways = [
        lambda: [layer(hidden) for layer in layers],
        lambda: [linear_of_few_rows(layer, hidden) for layer in layers],
    ]
    plain, patched = medians(ways, ROUNDS)
    case = f"linear {outputs} x {inputs}, rows {rows}"
    return {"case": case, "unit": "GB/s", "plain": round(read / plain, 1), "patched": round(read / patched, 1)}


def long_prompt(dtype: torch.dtype) -> dict[str, object]:
    """Milliseconds of one of SmolLM2's MLPs, whole and in tiles."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=576, intermediate_size=1536)).to(dtype).eval()
    hidden = torch.ones(1, TOKENS, 576, dtype=dtype)
    tiled = MethodType(mlp_in_tiles, mlp)
    plain, patched = medians([lambda: mlp(hidden), lambda: tiled(hidden)], ROUNDS)
    case = f"MLP 576 x 1536, tokens {TOKENS}"
    return {"case": case, "unit": "ms", "plain": round(plain * 1e3, 1), "patched": round(patched * 1e3, 1)}


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "forwards.csv")
    rows = Rows(parser.parse_args().out)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for outputs, inputs in WEIGHTS:
            for count in ROWS:
                rows.add({"dtype": name, **few_rows(outputs, inputs, count, dtype)})
        rows.add({"dtype": name, **long_prompt(dtype)})


if __name__ == "__main__":
    main()
