"""Time per generated token of a whole model on a GPU, with random weights and random caches: for scripts/gpu_check.py.

The model has the shape of Llama-3.1-8B. Its cache is filled with random keys and values, and policies that accumulate
attention get random masses, because the time of a decode step depends on sizes. One thing that does depend on the numbers
is how far a group's query heads agree: random heads agree on nothing, so that a policy that selects per query head reads up
to a group's size times its budget (`read_share` says how much).
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import cache_bytes
from gpu_kernels import first_line
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import kvpress
from kvpress.compat import CACHE
from kvpress.observe import Scores
from kvpress.passes import plain_tokens
from kvpress.policy import EvictionPolicy, Policy

PLAIN, FLOOR = "transformers", "floor"
# Those that goals are about come first; then the rest of what there is.
FIRST = ["full", "tidal_decode", "h2o", "snapkv", "streaming_llm"]
# Those with compiled steps, too, at last: compiling takes a minute or more, and the time may be over.
COMPILED = ["full", "tidal_decode", "h2o"]
WARM_UP = 3


class Settings(NamedTuple):
    """What is measured; `TINY` is to try it out on a CPU."""

    config: dict[str, int]
    dtype: torch.dtype
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    step: int  # a context that does not fit is shortened to a multiple of this
    steps: int  # decode steps of a round; three rounds hold one of RecycledAttention's full steps
    selected: int
    share: float


LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
FULL_SIZE = Settings(LLAMA, torch.bfloat16, (131072, 32768), (1, 8), 16384, 17, 2048, 0.1)
TINY = Settings(SMALL, torch.float32, (64,), (1, 2), 32, 1, 24, 0.25)


def random_model(settings: Settings, device: torch.device) -> Any:
    """The model, its weights drawn on the device."""
    config = LlamaConfig(**settings.config, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
    return model.eval()


def policies(settings: Settings) -> list[Policy]:
    """Every policy, evicting ones at a share of the context, selecting ones at so many entries."""
    classes = kvpress.available()
    made: list[Policy] = []
    for name in [*FIRST, *(name for name in classes if name not in FIRST)]:
        cls = classes[name]
        budget = settings.selected if "selection" in cls.roles else settings.share
        made.append(cls.at_budget(budget) if cls.takes_budget else cls())
    return made


class Entries:
    """Random entries of one layer, the same for all layers: a cache copies what it gets.

    Attributes:
        key, value: [batch, kv_heads, context, head_dim].
        query: the last rows of a prompt, [batch, heads, rows, head_dim].
        mass: float32 [batch, kv_heads, context].
    """

    def __init__(self, model: Any, batch: int, context: int) -> None:
        config, device = model.config, model.device
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, rows: int) -> Tensor:
            made = torch.empty(batch, heads, rows, config.head_dim, dtype=model.dtype, device=device)
            return made.normal_(generator=generator)

        self.key, self.value = (normal(config.num_key_value_heads, context) for _ in range(2))
        self.query = normal(config.num_attention_heads, min(512, context))
        self.mass = torch.rand(self.key.shape[:3], device=device, generator=generator)
        self.tokens = plain_tokens(batch, context, None, None, device)
        self.scores = Scores(config.head_dim**-0.5)


def plain_cache(model: Any, entries: Entries | None) -> DynamicCache:
    """transformers' cache, filled, or empty."""
    cache = DynamicCache(config=model.config)
    if entries is not None:
        for layer in cache.layers:
            layer.update(entries.key, entries.value)
    return cache


def policy_cache(model: Any, handle: kvpress.Handle, entries: Entries) -> DynamicCache:
    """Our cache as a prompt leaves it."""
    cache = DynamicCache(config=model.config)
    cache.layers[:] = handle.new_layers(cache)
    for layer in cache.layers:
        layer.append(entries.key, entries.value, entries.tokens)
        counted = "mass" in layer.stats
        if counted:
            layer.add_mass(entries.mass)
        layer.finish_prompt(entries.query, entries.tokens, entries.scores, None, 0, mass_known=counted)
    return cache


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_times(step: Callable[[], Any], device: torch.device, steps: int) -> list[float]:
    """Milliseconds per step by the clock, of three rounds: what a user waits for, launches included."""
    for _ in range(WARM_UP):
        step()
    rounds = []
    for _ in range(3):
        finish(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        finish(device)
        rounds.append((time.perf_counter() - start) / steps * 1e3)
    return rounds


def busy_ms(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds per step that the device computes, from torch's profiler: the rest of a step it waits for launches."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        for _ in range(2):
            step()
        finish(device)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    return sum(getattr(event, name) for event in record.key_averages()) / 2 * 1e-3


def run_step(model: Any, cache: DynamicCache, batch: int) -> Callable[[], Any]:
    """A decode step with this cache."""
    inputs = torch.full((batch, 1), 5, device=model.device)
    return lambda: model(input_ids=inputs, **{CACHE: cache}, use_cache=True)


def measured(step: Callable[[], Any], cache: DynamicCache, device: torch.device, settings: Settings) -> dict[str, Any]:
    """A row's figures."""
    rounds = step_times(step, device, settings.steps)
    return {
        "ms": sum(rounds) / len(rounds),
        "low": min(rounds),
        "high": max(rounds),
        "busy_ms": busy_ms(step, device),
        "cache_gib": cache_bytes(cache) / 2**30,
    }


@torch.inference_mode()
def one(
    model: Any,
    policy: Policy | str,
    entries: Entries,
    settings: Settings,
    mode: str | None = None,
) -> dict[str, Any]:
    """Decode with one policy (in a mode of torch.compile, or not compiled), with transformers' cache, or with an empty one."""
    batch, device = entries.key.shape[0], model.device
    if isinstance(policy, str):
        cache = plain_cache(model, entries if policy == PLAIN else None)
        return measured(run_step(model, cache, batch), cache, device, settings)
    with kvpress.patch(model, policy) as handle:
        if mode is not None:
            handle.compile(mode=mode)
        cache = policy_cache(model, handle, entries)
        figures = measured(run_step(model, cache, batch), cache, device, settings)
        return {**figures, "read_share": handle.report().total.read_share}


def fitting_context(model: Any, context: int, batch: int, settings: Settings) -> int:
    """The context, or the longest multiple of `settings.step` below it whose full cache fits the device's free memory.

    Beside the cache there have to be room for one layer's growth, the entries that fill it, and 4 GiB.
    """
    if model.device.type != "cuda":
        return context
    config = model.config
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    per_layer = 2 * batch * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    most = (free - (4 << 30)) / (per_layer * (config.num_hidden_layers * 33 / 32 + 4))
    return context if context <= most else int(most) // settings.step * settings.step


def rows(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every setting and policy; one that fails is a row that says so."""
    settings = TINY if tiny else FULL_SIZE
    model = random_model(settings, device)
    seen = set()
    for wanted in settings.contexts:
        for batch in settings.batches:
            context = fitting_context(model, wanted, batch, settings)
            if not context or (context, batch) in seen:
                continue
            seen.add((context, batch))
            entries = Entries(model, batch, context)
            todo: list[Policy | str] = [PLAIN, FLOOR, *policies(settings)]
            for policy in todo:
                name = policy if isinstance(policy, str) else policy.name
                row: dict[str, Any] = {"context": context, "batch": batch, "policy": name}
                if isinstance(policy, Policy):
                    row |= {"as": policy.describe(), "evicts": isinstance(policy, EvictionPolicy)}
                yield attempt(row, model, policy, entries, settings)
            del entries
    context, batch = min(seen)
    entries = Entries(model, batch, context)
    for policy in policies(settings):
        if policy.name in COMPILED:
            for mode, label in ("default", "compiled"), ("reduce-overhead", "compiled, CUDA graphs"):
                row = {"context": context, "batch": batch, "policy": f"{policy.name} {label}", "as": policy.describe()}
                yield attempt(row, model, policy, entries, settings, mode=mode)


def attempt(row: dict[str, Any], model: Any, *case: Any, **options: Any) -> dict[str, Any]:
    """The row with what `one` measured, or with why it failed."""
    try:
        figures = one(model, *case, **options)
    except Exception as error:
        figures = {"failed": first_line(error)}
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return {**row, **figures}
