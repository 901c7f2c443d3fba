"""Time of a prompt under each policy against transformers' own prompt time.

    python benchmarks/prompt.py                      # SmolLM2-135M, 4k tokens, float32 and bfloat16

Every round runs the same random prompt once with transformers' DynamicCache (sdpa) and once under each policy, eviction
included; the ratio is the median over rounds of (policy / transformers in that round).
"""

import time
from contextlib import nullcontext
from typing import Any

import torch
from common import Rows, arguments, chosen_policies, ratios

import kvpress
from kvpress.models import load_model
from kvpress.policy import Policy

PLAIN = "transformers"


@torch.inference_mode()
def compare(model: Any, policies: list[Policy], context: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Time every policy's prompt against transformers' in one setting."""
    ids = torch.randint(10, 1000, (batch, context), generator=torch.Generator().manual_seed(0))
    by_name: dict[str, Policy | None] = {PLAIN: None, **{policy.describe(): policy for policy in policies}}
    times: dict[str, list[float]] = {name: [] for name in by_name}
    model(ids[:, :256], use_cache=True, logits_to_keep=1)  # warm up
    for _ in range(rounds):
        for name, policy in by_name.items():
            with nullcontext() if policy is None else kvpress.patch(model, policy):
                start = time.perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
                times[name].append(time.perf_counter() - start)
    rows = []
    for name, figures in ratios(times, PLAIN).items():
        row = {"context": context, "batch": batch, "policy": name, "seconds": round(figures.pop("median"), 2)}
        rows.append({**row, **figures})
    return rows


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", [4096], [1], "prompt.csv")
    parser.set_defaults(rounds=3)
    options = parser.parse_args()
    policies, rows = chosen_policies(options), Rows(options.out)
    for dtype in options.dtypes:
        model, _ = load_model(options.model, device="cpu", dtype=dtype)
        for context in options.contexts:
            for batch in options.batches:
                for row in compare(model, policies, context, batch, options.rounds):
                    rows.add({"model": options.model, "dtype": dtype, **row})


if __name__ == "__main__":
    main()
