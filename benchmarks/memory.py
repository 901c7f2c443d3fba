"""Peak resident memory of a prompt and 16 tokens under each policy, a process each.

    python benchmarks/memory.py                      # SmolLM2-135M, 8k tokens, float32 and bfloat16

Linux only: the peak is the process's VmHWM, reset when the model is loaded.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import Rows, arguments, chosen_policies

import kvpress
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading; start over
    loaded = resident_mib("VmRSS")
    policy = chosen_policies(options)[options.peak_of] if options.peak_of >= 0 else None
    if policy is not None:
        kvpress.patch(model, policy)
    model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    name = "transformers" if policy is None else policy.describe()
    return {"policy": name, "loaded_mib": round(loaded), "peak_mib": round(resident_mib("VmHWM"))}


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", [8192], [1], "memory.csv")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of is not None:
        print(json.dumps(peak_memory(options)))
        return
    rows = Rows(options.out)
    # Freed tensors go back to the system at once: else the peak depends on how malloc's heap fell apart.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for dtype in options.dtypes:
        for context in options.contexts:
            for index in range(-1, len(options.policies)):
                command = [sys.executable, __file__, "--model", options.model, "--dtypes", dtype]
                command += ["--contexts", str(context), "--batches", str(options.batches[0])]
                command += ["--share", str(options.share), "--selected", str(options.selected)]
                command += ["--policies", *options.policies, "--peak-of", str(index)]
                run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                result = json.loads(run.stdout.splitlines()[-1])
                rows.add({"model": options.model, "dtype": dtype, "context": context, **result})


if __name__ == "__main__":
    main()
