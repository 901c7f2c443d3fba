"""Peak resident memory of a prompt and 16 tokens under each policy, a process each.

    python benchmarks/memory.py                      # SmolLM2-135M, 8k tokens, float32 and bfloat16
    python benchmarks/memory.py --chunk 2048 --contexts 32768 --policies full snapkv h2o streaming_llm

With --chunk the prompt goes in by so many tokens at a time (`prefill_chunk_size`), malloc is left as it is, and the rows go
to prompt_memory.csv: `times` is the weights and all that came on top, over the weights and the final cache.

Linux only: the peak is the process's VmHWM, reset when the model is loaded.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows, arguments, cache_bytes, chosen_policies
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.models import load_model


def resident_mib(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Run one prompt and 16 tokens in this process; under policy number `peak_of`, or unpatched at -1."""
    model, _ = load_model(options.model, device="cpu", dtype=options.dtypes[0])
    shape = (options.batches[0], options.contexts[0])
    ids = torch.randint(10, 1000, shape, generator=torch.Generator().manual_seed(0))
    if options.chunk:  # what loading freed goes back, or the run would reuse it unseen
        model(ids[:, :8], use_cache=False)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading; start over
    loaded = resident_mib("VmRSS")
    policy = chosen_policies(options)[options.peak_of] if options.peak_of >= 0 else None
    if policy is not None:
        kvpress.patch(model, policy)
    cache = DynamicCache(config=model.config)
    chunk = {"prefill_chunk_size": options.chunk} if options.chunk else {}
    model.generate(ids, **{CACHE: cache}, max_new_tokens=16, do_sample=False, pad_token_id=0, **chunk)
    peak = resident_mib("VmHWM")
    name = "transformers" if policy is None else policy.describe()
    row = {"policy": name, "loaded_mib": round(loaded), "peak_mib": round(peak)}
    if options.chunk:
        weights = sum(tensor.nbytes for tensor in model.parameters()) / 2**20
        held = cache_bytes(cache) / 2**20
        times = (weights + peak - loaded) / (weights + held)
        row |= {"weights_mib": round(weights), "cache_mib": round(held), "times": round(times, 2)}
    return row


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", [8192], [1], "memory.csv")
    parser.add_argument("--chunk", type=int, help="tokens of the prompt at a time; left out: the whole prompt")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.chunk is not None and options.chunk < 2:
        parser.error(f"--chunk {options.chunk}: at least 2")
    if options.chunk and options.out == RESULTS / "memory.csv":
        options.out = RESULTS / "prompt_memory.csv"
    if options.peak_of is not None:
        print(json.dumps(peak_memory(options)))
        return
    rows = Rows(options.out)
    # Freed tensors go back to the system at once: else the peak depends on how malloc's heap fell apart.
    environment = {**os.environ} if options.chunk else {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for dtype in options.dtypes:
        for context in options.contexts:
            for index in range(-1, len(options.policies)):
                command = [sys.executable, __file__, "--model", options.model, "--dtypes", dtype]
                command += ["--contexts", str(context), "--batches", str(options.batches[0])]
                command += ["--share", str(options.share), "--selected", str(options.selected)]
                command += ["--policies", *options.policies, "--peak-of", str(index)]
                command += ["--chunk", str(options.chunk)] if options.chunk else []
                run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                result = json.loads(run.stdout.splitlines()[-1])
                rows.add({"model": options.model, "dtype": dtype, "context": context, **result})


if __name__ == "__main__":
    main()
