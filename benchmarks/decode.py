"""Time per generated token against transformers' own cache.

    python benchmarks/decode.py                      # SmolLM2-135M, 2k/4k/8k, batch 1 and 4, float32 and bfloat16
    python benchmarks/decode.py --contexts 8192 --dtypes float32 --batches 1 --policies full h2o
    python benchmarks/decode.py --contexts 8192 --batches 1 --policies full snapkv --compile --out compiled.csv

All policies of one setting run interleaved with transformers' DynamicCache (sdpa) in one process: a round gives every one
of them the same decode steps, and the ratio is the median over rounds of (policy / transformers in that round). The prompt
is text of novels, run once and given to all, because what a selecting policy reads depends on how far its query heads agree.
`floor` is the patched model with an empty cache: no policy can be faster than that. With --compile every policy is there twice, the
second time with `kvpress.patch(..., compile=True)`.
"""

import time
from typing import Any

import torch
from common import Rows, arguments, cache_bytes, chosen_policies, ratios
from torch import Tensor
from transformers import DynamicCache

import kvpress
from kvpress.compat import CACHE
from kvpress.haystack import book_text
from kvpress.models import load_model
from kvpress.policies import Full
from kvpress.policy import Policy
from kvpress.sharing import SharedPrompt

PLAIN, FLOOR = "transformers", "floor"
COMPILED = " compiled"


def text(tokenizer: Any, batch: int, length: int) -> Tensor:
    """Token ids of running text, [batch, length], each sequence from another place."""
    ids = torch.tensor(tokenizer(book_text())["input_ids"])
    starts = [row * (len(ids) - length) // max(1, batch - 1) for row in range(batch)]
    return torch.stack([ids[start : start + length] for start in starts])


def plain_cache(model: Any, prompt: SharedPrompt) -> DynamicCache:
    """transformers' cache, filled."""
    cache = DynamicCache(config=model.config)
    for layer, (_, key, value, _) in zip(cache.layers, prompt.layers, strict=True):
        layer.update(key.clone(), value.clone())
    return cache


def policy_cache(model: Any, policy: Policy, prompt: SharedPrompt) -> DynamicCache:
    """Our cache as the prompt leaves it."""
    with kvpress.patch(model, policy) as handle:
        if policy.leaves_prompts_exact:
            return handle.adopt_prompt(prompt)
        # What such a prompt computes is other keys and values of the same size.
        cache = DynamicCache(config=model.config)
        cache.layers[:] = handle.new_layers(cache)
    for layer, (_, key, value, _) in zip(cache.layers, prompt.layers, strict=True):
        layer.append(key, value, prompt.tokens)
    return cache


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    policies: list[Policy],
    context: int,
    batch: int,
    rounds: int,
    steps: int,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Time every policy against transformers in one setting."""
    ids = text(tokenizer, batch, context + (rounds + 1) * steps)
    prompt = kvpress.record_prompt(model, ids[:, :context])
    caches = {PLAIN: plain_cache(model, prompt), FLOOR: DynamicCache(config=model.config)}
    endings = ["", COMPILED] if compiled else [""]
    by_name = {policy.describe() + ending: policy for policy in policies for ending in endings}
    for name, policy in by_name.items():
        caches[name] = policy_cache(model, policy, prompt)
    by_name[FLOOR] = Full()
    del prompt

    def step_ms(name: str, at: int) -> float:
        start = time.perf_counter()
        for step in range(at, at + steps):
            model(input_ids=ids[:, step : step + 1], **{CACHE: caches[name]}, use_cache=True)
        return (time.perf_counter() - start) / steps * 1e3

    times: dict[str, list[float]] = {name: [] for name in caches}
    for round_ in range(rounds + 1):
        at = context + round_ * steps
        for name in caches:
            if name in by_name:
                with kvpress.patch(model, by_name[name], compile=name.endswith(COMPILED)):
                    value = step_ms(name, at)
            else:
                value = step_ms(name, at)
            if round_:  # the first round warms up
                times[name].append(value)
    rows = []
    for name, figures in ratios(times, PLAIN).items():
        row = {"context": context, "batch": batch, "policy": name, "ms_per_token": round(figures.pop("median"), 2)}
        rows.append({**row, **figures, "cache_mib": round(cache_bytes(caches[name]) / 2**20, 1)})
    return rows


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", [2048, 4096, 8192], [1, 4], "decode.csv")
    parser.add_argument("--steps", type=int, default=4, help="decode steps per round")
    parser.add_argument("--compile", action="store_true", help="every policy also with compiled steps")
    options = parser.parse_args()
    policies, rows = chosen_policies(options), Rows(options.out)
    for dtype in options.dtypes:
        model, tokenizer = load_model(options.model, device="cpu", dtype=dtype)
        for context in options.contexts:
            for batch in options.batches:
                todo = context, batch, options.rounds, options.steps, options.compile
                for row in compare(model, tokenizer, policies, *todo):
                    rows.add({"model": options.model, "dtype": dtype, **row})


if __name__ == "__main__":
    main()
