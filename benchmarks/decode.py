"""Time per generated token against transformers' own cache, and peak memory of the process.

    python benchmarks/decode.py                      # SmolLM2-135M, 2k/4k/8k, batch 1 and 4, float32 and bfloat16
    python benchmarks/decode.py --contexts 8192 --dtypes float32 --batches 1
    python benchmarks/decode.py --memory             # adds the peak resident memory of a real prompt, a process each

All policies of one setting run interleaved with transformers' DynamicCache (sdpa) in one process: a round gives every one
of them the same number of decode steps, and the ratio is the median over rounds of (policy / transformers in that round).
The caches are filled with random keys and values through the same code that a prompt pass uses, because the time of a
decode step depends on their sizes only; `--memory` runs real prompts. `floor` is the model with an empty cache: no policy
can be faster than that.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvpress
from kvpress.layer import KVLayer
from kvpress.models import load_model
from kvpress.passes import Scores, plain_tokens
from kvpress.policies import H2O, Full, SnapKV, StreamingLLM
from kvpress.policy import Policy

FIELDS = [
    "model",
    "dtype",
    "context",
    "batch",
    "policy",
    "ms_per_token",
    "ratio",
    "ratio_low",
    "ratio_high",
    "cache_mib",
]


def policies(share: float) -> list[Policy]:
    """What is compared."""
    return [Full(), StreamingLLM(budget=share), H2O(budget=share), SnapKV(budget=share)]


def random_entries(model: Any, batch: int, context: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random K and V per layer, [batch, kv_heads, context, head_dim]."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, context, head_dim)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        made.append((key, value))
    return made


def plain_cache(model: Any, entries: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """transformers' cache, filled."""
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in zip(cache.layers, entries, strict=True):
        layer.update(key.clone(), value.clone())
    return cache


def policy_cache(model: Any, policy: Policy, entries: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Our cache as a prompt of random tokens leaves it."""
    cache = DynamicCache(config=model.config)
    eviction = policy if isinstance(policy, kvpress.EvictionPolicy) else None
    for index, (key, value) in enumerate(entries):
        batch, kv_heads, context, head_dim = key.shape
        layer = KVLayer(eviction, index, len(entries))
        tokens = plain_tokens(batch, context, None, None, key.device)
        layer.append(key, value, tokens)
        if eviction is not None:
            if eviction.observes == "every row":
                layer.observe(torch.rand(batch, kv_heads, context))
            if eviction.observes == "window":
                heads = model.config.num_attention_heads
                rows = torch.randn(batch, heads, context, head_dim, dtype=key.dtype)
                layer.remember(rows, tokens, Scores(head_dim**-0.5))
            layer.close_prompt(tokens)
        cache.layers[index] = layer
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors that a cache holds."""
    return sum(
        layer.nbytes if isinstance(layer, KVLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if layer.keys is not None
    )


@torch.inference_mode()
def compare(model: Any, context: int, batch: int, share: float, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time every policy against transformers in one setting."""
    entries = random_entries(model, batch, context, seed=0)
    inputs = torch.full((batch, 1), 5)

    def timed(cache: DynamicCache) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            model(input_ids=inputs, past_key_values=cache, use_cache=True)
        return (time.perf_counter() - start) / steps * 1e3

    runs: dict[str, Callable[[], float]] = {}
    caches: dict[str, DynamicCache] = {
        "transformers": plain_cache(model, entries),
        "floor": DynamicCache(config=model.config),
    }
    for policy in policies(share):
        caches[policy.describe()] = policy_cache(model, policy, entries)
    by_name = {policy.describe(): policy for policy in policies(share)}
    del entries

    def run(name: str) -> float:
        if name not in by_name:
            return timed(caches[name])
        with kvpress.patch(model, by_name[name]):
            return timed(caches[name])

    for name in caches:
        runs[name] = lambda name=name: run(name)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, one in runs.items():
            value = one()
            if round_:  # the first round warms up
                times[name].append(value)
    rows = []
    for name, values in times.items():
        ratios = sorted(value / other for value, other in zip(values, times["transformers"], strict=True))
        rows.append(
            {
                "context": context,
                "batch": batch,
                "policy": name,
                "ms_per_token": round(statistics.median(values), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_low": round(ratios[0], 3),
                "ratio_high": round(ratios[-1], 3),
                "cache_mib": round(cache_bytes(caches[name]) / 2**20, 1),
            }
        )
    return rows


def resident_mib(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_memory(model_name: str, dtype: str, context: int, index: int, share: float) -> dict[str, Any]:
    """Run one prompt and 16 tokens in this process; policy `index`, or plain transformers at -1."""
    model, _ = load_model(model_name, device="cpu", dtype=dtype)
    ids = torch.randint(10, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading; start over
    loaded = resident_mib("VmRSS")
    policy = policies(share)[index] if index >= 0 else None
    if policy is not None:
        kvpress.patch(model, policy)
    model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    peak = resident_mib("VmHWM")
    name = "transformers" if policy is None else policy.describe()
    return {"policy": name, "loaded_mib": round(loaded), "peak_mib": round(peak)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--share", type=float, default=0.1, help="budget of the evicting policies")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="decode steps per round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.csv"))
    parser.add_argument("--memory", action="store_true", help="also measure peak resident memory of real prompts")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of is not None:
        print(
            json.dumps(
                peak_memory(options.model, options.dtypes[0], options.contexts[0], options.peak_of, options.share)
            )
        )
        return

    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.memory:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for dtype in options.dtypes:
                model, _ = load_model(options.model, device="cpu", dtype=dtype)
                for context in options.contexts:
                    for batch in options.batches:
                        for row in compare(model, context, batch, options.share, options.rounds, options.steps):
                            writer.writerow({"model": options.model, "dtype": dtype, **row})
                            file.flush()
                            print(*row.values(), dtype, sep="\t", flush=True)
        return
    rows = []
    for dtype in options.dtypes:
        for context in options.contexts:
            for index in range(-1, len(policies(options.share))):
                command = [
                    sys.executable,
                    __file__,
                    "--model",
                    options.model,
                    "--dtypes",
                    dtype,
                    "--contexts",
                    str(context),
                ]
                command += ["--share", str(options.share), "--peak-of", str(index)]
                # Freed tensors go back to the system at once: else the peak depends on how malloc's heap fell apart.
                environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
                run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                result = json.loads(run.stdout.splitlines()[-1])
                rows.append({"model": options.model, "dtype": dtype, "context": context, **result})
                print(*rows[-1].values(), sep="\t", flush=True)
    path = options.out.with_name("memory.csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
