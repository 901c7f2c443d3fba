"""Prompts of different lengths: prepacked against the same batch padded, time and peak memory of the prompt.

    python benchmarks/ragged.py                      # SmolLM2-135M, 8 prompts of 200 to 2000 tokens, float32

Every round runs the same prompts once in each way; a ratio is the median over rounds of (the way / transformers padded, in
that round). The peak is over the loaded model, of the prompt alone, in a process for each way (Linux only).
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Rows, ratios
from memory import resident_mib

import kvpress
from kvpress.models import load_model
from kvpress.prepacking import left_padded

PLAIN = "transformers, padded"


def lengths(shortest: int, longest: int, batch: int) -> list[int]:
    """The lengths of a batch's prompts, in equal steps."""
    return [round(shortest + (longest - shortest) * i / max(1, batch - 1)) for i in range(batch)]


def ways(policies: list[str]) -> dict[str, tuple[str | None, bool]]:
    """Name -> policy, None for an unpatched model, and whether the prompts are packed."""
    return {PLAIN: (None, False)} | {
        f"{name}, {'prepacked' if packed else 'padded'}": (name, packed)
        for name in policies
        for packed in (False, True)
    }


@torch.inference_mode()
def run(model: Any, prompts: list[list[int]], policy: str | None, packed: bool, share: float) -> float:
    """Seconds of the prompts' pass."""
    fields = {} if policy in (None, "full") else {"budget": share}
    with nullcontext() if policy is None else kvpress.patch(model, policy, **fields):
        ids, mask = left_padded(prompts, model.device)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = kvpress.prepack(model, prompts) if packed else {"input_ids": ids, "attention_mask": mask}
        start = time.perf_counter()
        model(**inputs, position_ids=places, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shortest", type=int, default=200)
    parser.add_argument("--longest", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--policies", nargs="+", default=["full", "snapkv"])
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "ragged.csv")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, _ = load_model(options.model, device="cpu", dtype=options.dtype)
    generator = torch.Generator().manual_seed(0)
    counts = lengths(options.shortest, options.longest, options.batch)
    prompts = [torch.randint(10, 1000, (count,), generator=generator).tolist() for count in counts]
    by_name = ways(options.policies)
    if options.peak_of:
        run(model, [prompt[:40] for prompt in prompts], *by_name[options.peak_of], options.share)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading; start over
        before = resident_mib("VmRSS")
        run(model, prompts, *by_name[options.peak_of], options.share)
        print(json.dumps(round(resident_mib("VmHWM") - before)))
        return
    times: dict[str, list[float]] = {name: [] for name in by_name}
    for way in by_name.values():  # warm up
        run(model, [prompt[:40] for prompt in prompts], *way, options.share)
    for _ in range(options.rounds):
        for name, way in by_name.items():
            times[name].append(run(model, prompts, *way, options.share))
    rows = Rows(options.out)
    for name, figures in ratios(times, PLAIN).items():
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        setting = {
            "model": options.model,
            "dtype": options.dtype,
            "tokens": sum(counts),
            "padded": max(counts) * len(counts),
        }
        rows.add({**setting, "way": name, "seconds": round(figures.pop("median"), 2), **figures, "peak_mib": peak})


if __name__ == "__main__":
    main()
