"""Time per generated token against transformers' own cache.

    python benchmarks/decode.py                      # SmolLM2-135M, 2k/4k/8k, batch 1 and 4, float32 and bfloat16
    python benchmarks/decode.py --contexts 8192 --dtypes float32 --batches 1 --policies full h2o

All policies of one setting run interleaved with transformers' DynamicCache (sdpa) in one process: a round gives every one
of them the same number of decode steps, and the ratio is the median over rounds of (policy / transformers in that round).
The caches are filled with random keys and values, because the time of a decode step depends on their sizes only. `floor` is
the model with an empty cache: no policy can be faster than that.
"""

import time
from typing import Any

import torch
from common import Rows, arguments, chosen_policies, ratios
from transformers import DynamicCache

import kvpress
from kvpress.layer import KVLayer
from kvpress.models import load_model
from kvpress.passes import Scores, plain_tokens
from kvpress.policy import Policy

PLAIN = "transformers"


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
    with kvpress.patch(model, policy) as handle:
        cache.layers[:] = handle.new_layers(cache)
    for layer, (key, value) in zip(cache.layers, entries, strict=True):
        batch, kv_heads, context, head_dim = key.shape
        tokens = plain_tokens(batch, context, None, None, key.device)
        layer.append(key, value, tokens)
        if layer.policy is not None:
            if layer.mass is not None:
                layer.observe(torch.rand(batch, kv_heads, context))
            if layer.policy.observes == "window":
                heads = model.config.num_attention_heads
                rows = torch.randn(batch, heads, context, head_dim, dtype=key.dtype)
                layer.remember(rows, tokens, Scores(head_dim**-0.5))
            layer.close_prompt(tokens)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors that a cache holds."""
    return sum(
        layer.nbytes if isinstance(layer, KVLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
        if layer.keys is not None
    )


@torch.inference_mode()
def compare(
    model: Any, policies: list[Policy], context: int, batch: int, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Time every policy against transformers in one setting."""
    entries = random_entries(model, batch, context, seed=0)
    inputs = torch.full((batch, 1), 5)
    caches = {PLAIN: plain_cache(model, entries), "floor": DynamicCache(config=model.config)}
    by_name = {policy.describe(): policy for policy in policies}
    for name, policy in by_name.items():
        caches[name] = policy_cache(model, policy, entries)
    del entries

    def step_ms(name: str) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            model(input_ids=inputs, past_key_values=caches[name], use_cache=True)
        return (time.perf_counter() - start) / steps * 1e3

    times: dict[str, list[float]] = {name: [] for name in caches}
    for round_ in range(rounds + 1):
        for name in caches:
            if name in by_name:
                with kvpress.patch(model, by_name[name]):
                    value = step_ms(name)
            else:
                value = step_ms(name)
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
    options = parser.parse_args()
    policies, rows = chosen_policies(options), Rows(options.out)
    for dtype in options.dtypes:
        model, _ = load_model(options.model, device="cpu", dtype=dtype)
        for context in options.contexts:
            for batch in options.batches:
                for row in compare(model, policies, context, batch, options.rounds, options.steps):
                    rows.add({"model": options.model, "dtype": dtype, **row})


if __name__ == "__main__":
    main()
