"""The model's own layers on a CPU: the forms of a product of few rows, and an MLP of a long prompt in tiles.

    python benchmarks/forwards.py                    # SmolLM2's weights and a Llama's, float32 and bfloat16; under a minute

GB/s are those of the weights, read once per product; enough matrices go by in turn that no cache holds them. Each figure is
the best of 20 rounds, in which the forms of a case take turns. `chosen` is what `kvpress.patch` takes for such a layer on
this machine by its own, much shorter measurement.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
from common import RESULTS, Rows
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from kvpress.forwards import mlp_in_tiles
from kvpress.linear import FORMS, ROWS, fastest, measure, possible

WEIGHTS = ((1536, 576), (576, 1536), (49152, 576), (4096, 4096))  # outputs, inputs
TOKENS = 8192
ROUNDS = 20


def best(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Least seconds of each way, after a round to warm up."""
    times: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            if round_:
                taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def few_rows(outputs: int, inputs: int, rows: int, limit: int, dtype: torch.dtype) -> dict[str, object]:
    """GB/s of each form that such a product can have, and which one a patched model would take."""
    count = max(2, (1 << 25) // (outputs * inputs))
    weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(count)]
    hidden = torch.ones(1, rows, inputs, dtype=dtype)
    read = sum(weight.nbytes for weight in weights) / 1e9
    names = possible(dtype, limit)
    ways = [lambda form=FORMS[name]: [form(hidden, weight) for weight in weights] for name in names]
    figures = {name: round(read / taken, 1) for name, taken in zip(names, best(ways, ROUNDS), strict=True)}
    case = {"case": f"linear {outputs} x {inputs}, rows {rows}", "unit": "GB/s"}
    chosen = fastest(measure(weights, rows, names))
    return {**case, **{name: figures.get(name, "") for name in FORMS}, "tiles": "", "chosen": chosen}


def long_prompt(dtype: torch.dtype) -> dict[str, object]:
    """Milliseconds of one of SmolLM2's MLPs, whole and in tiles."""
    mlp = LlamaMLP(LlamaConfig(hidden_size=576, intermediate_size=1536)).to(dtype).eval()
    hidden = torch.ones(1, TOKENS, 576, dtype=dtype)
    tiled = MethodType(mlp_in_tiles, mlp)
    plain, patched = best([lambda: mlp(hidden), lambda: tiled(hidden)], ROUNDS)
    case = {"case": f"MLP 576 x 1536, tokens {TOKENS}", "unit": "ms"}
    figures = {"linear": round(plain * 1e3, 1), "tiles": round(patched * 1e3, 1)}
    return {**case, **{name: figures.get(name, "") for name in (*FORMS, "tiles")}, "chosen": "tiles"}


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "forwards.csv")
    rows = Rows(parser.parse_args().out)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for outputs, inputs in WEIGHTS:
            for limit, count in ROWS.items():
                rows.add({"dtype": name, **few_rows(outputs, inputs, count, limit, dtype)})
        rows.add({"dtype": name, **long_prompt(dtype)})


if __name__ == "__main__":
    main()
