"""Time per generated token, and of prompts, of a whole model on a GPU, with random weights: for scripts/gpu_check.py.

The model has the shape of Llama-3.1-8B. Its cache is filled with random keys and values, and policies that accumulate
attention get random masses, because the time of a decode step depends on sizes. One thing that does depend on the numbers
is how far a group's query heads agree: random heads agree on nothing, so that a policy that selects per query head reads up
to a group's size times its budget (`read_share` says how much).

Each row has `floor_ms`, the least time in which this device reads what the step reads (weights, and entries of the cache), or in
which it computes what a prompt takes, and `of_limit`, that time over the measured one.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from common import cache_bytes
from gpu import Limits
from gpu_kernels import first_line
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import kvpress
from kvpress.compat import CACHE
from kvpress.observe import Scores
from kvpress.policy import EvictionPolicy, Policy
from kvpress.tokens import plain_tokens

PLAIN, FLOOR = "transformers", "floor"
MEASURED = ["full", "tidal_decode", "h2o", "snapkv", "streaming_llm"]
MASKED = ["full", "h2o"]  # also with a padding mask that is all ones, as `generate` passes it
PROMPTED = ["full", "h2o"]  # also in a prompt pass and in a second turn
WARM_UP = 3
# Names of CUDA's functions in torch's profiler.
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
Row = dict[str, Any]


class Settings(NamedTuple):
    """What is measured; `TINY` is to try it out on a CPU.

    Attributes:
        shapes: contexts and batches.
        step: a context that does not fit is shortened to a multiple of this.
        steps: decode steps of a round; three rounds hold one of RecycledAttention's full steps.
        selected, share: budgets of selecting policies, in entries, and of evicting ones.
        prompt, turn: tokens of a prompt, and of a second turn behind a context.
    """

    config: dict[str, int]
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    step: int
    steps: int
    selected: int
    share: float
    prompt: int
    turn: int


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
FULL_SIZE = Settings(
    LLAMA, torch.bfloat16, ((131072, 1), (98304, 8)), 16384, 17, selected=2048, share=0.1, prompt=32768, turn=2048
)
TINY = Settings(SMALL, torch.float32, ((64, 1), (48, 2)), 16, 1, selected=24, share=0.25, prompt=32, turn=8)
# One layer more than TidalDecode needs, and the tiles of the full size: what is compiled for it is compiled for this.
BUILD = FULL_SIZE._replace(
    config={**LLAMA, "vocab_size": 1024, "num_hidden_layers": 4}, shapes=((16384, 1),), steps=1, prompt=512, turn=64
)


def random_model(settings: Settings, device: torch.device) -> Any:
    """The model, its weights drawn on the device."""
    config = LlamaConfig(**settings.config, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
    return model.eval()


def policies(settings: Settings) -> list[Policy]:
    """The measured ones, evicting at a share of the context, selecting so many entries."""
    classes = kvpress.available()
    made: list[Policy] = []
    for name in MEASURED:
        cls = classes[name]
        budget = settings.selected if "selection" in cls.roles else settings.share
        made.append(cls.at_budget(budget) if cls.takes_budget else cls())
    return made


class Entries:
    """Random entries of one layer, the same for all layers: a cache copies what it gets.

    Attributes:
        batch, context: how many sequences of how many tokens.
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

        self.batch, self.context = batch, context
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
        if layer.evicts:
            layer.observe_prompt(entries.query, entries.tokens, entries.scores, None, 0, counted)
        layer.finish_prompt(entries.query, entries.tokens, entries.scores)
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


def profiled(step: Callable[[], Any], device: torch.device) -> Row:
    """Per step, from torch's profiler: milliseconds that the device computes, launches, and waits of the host for the device."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as record:
        for _ in range(2):
            step()
        finish(device)
    events = record.key_averages()
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    busy = sum(getattr(event, name) for event in events) / 2 * 1e-3
    return {"busy_ms": busy, **counted(events, 2)}


def counted(events: Any, steps: int) -> Row:
    """Launches and waits per step, of the profiler's averages by name."""
    found = {event.key: event.count for event in events}
    return {
        "launches": sum(found.get(name, 0) for name in LAUNCHES) / steps,
        "waits": sum(found.get(name, 0) for name in WAITS) / steps,
    }


def run_step(model: Any, cache: DynamicCache, batch: int, masked: bool = False) -> Callable[[], Any]:
    """A decode step with this cache; with a mask of ones over all that was seen if that is wanted."""
    inputs = torch.full((batch, 1), 5, device=model.device)

    def step() -> Any:
        options = {}
        if masked:
            options["attention_mask"] = inputs.new_ones(batch, cache.get_seq_length() + 1)
        return model(input_ids=inputs, **{CACHE: cache}, use_cache=True, **options)

    return step


def weight_numbers(model: Any) -> int:
    """Weights that a token goes through: all but the table of embeddings, of which it takes a row."""
    table = model.get_input_embeddings().weight
    return sum(weight.numel() for weight in model.parameters() if weight is not table)


def cache_numbers(model: Any, batch: int, context: int) -> int:
    """Numbers of K and V of all layers."""
    config = model.config
    return 2 * batch * context * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def against_floor(row: Row, floor: float) -> Row:
    """The row with the least time, and which share of the measured one it is."""
    return {**row, "floor_ms": floor, "of_limit": floor / row["ms"]}


class Bench:
    """A model on a device, what the device can do, and how its figures are made."""

    def __init__(self, model: Any, settings: Settings, limits: Limits) -> None:
        self.model, self.settings, self.limits, self.device = model, settings, limits, model.device

    def step_floor(self, batch: int, context: int, read_share: float) -> float:
        """Milliseconds for reading the weights and that share of a full cache."""
        numbers = weight_numbers(self.model) + read_share * cache_numbers(self.model, batch, context)
        return self.limits.milliseconds(numbers * self.model.dtype.itemsize, 0)

    def prompt_floor(self, tokens: int, past: int) -> float:
        """Milliseconds for the products of a prompt pass: with the weights, and causal attention."""
        config = self.model.config
        pairs = tokens * past + tokens * (tokens + 1) / 2
        attention = 4 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
        # Of the rows behind the last layer only the last gets logits.
        body = weight_numbers(self.model) - self.model.get_output_embeddings().weight.numel()
        return self.limits.milliseconds(0, 2 * body * tokens + attention)

    def steps(self, cache: DynamicCache, entries: "Entries", masked: bool = False) -> Row:
        """Figures of decode steps."""
        step = run_step(self.model, cache, entries.batch, masked)
        rounds = step_times(step, self.device, self.settings.steps)
        figures = {"ms": sum(rounds) / len(rounds), "low": min(rounds), "high": max(rounds)}
        return {**figures, **profiled(step, self.device), "cache_gib": cache_bytes(cache) / 2**30}

    def replayed(self, handle: kvpress.Handle, cache: DynamicCache, entries: "Entries") -> Row:
        """Figures of steps that are recorded once and replayed as one CUDA graph."""
        if self.device.type != "cuda":
            return {"not_replayed": "no CUDA device"}
        try:
            handle.compile("replay")
            return self.steps(cache, entries)
        except Exception as error:
            return {"failed": first_line(error)}

    def plain(self, name: str, entries: "Entries") -> Iterator[Row]:
        """transformers' cache, full or empty."""
        cache = plain_cache(self.model, entries if name == PLAIN else None)
        share = 1.0 if name == PLAIN else 0.0
        yield against_floor(self.steps(cache, entries), self.step_floor(entries.batch, entries.context, share))

    def patched(self, policy: Policy, entries: "Entries") -> Iterator[Row]:
        """Our cache under a policy: launched, with a mask of ones, and replayed."""
        with kvpress.patch(self.model, policy) as handle:
            cache = policy_cache(self.model, handle, entries)
            figures = self.steps(cache, entries)
            share = handle.report().total.read_share
            floor = self.step_floor(entries.batch, entries.context, share)
            yield {**against_floor(figures, floor), "read_share": share}
            if policy.name in MASKED:
                yield {"how": "mask of ones", **against_floor(self.steps(cache, entries, masked=True), floor)}
            replayed = {"how": "graph replay", **self.replayed(handle, cache, entries)}
            yield against_floor(replayed, floor) if "ms" in replayed else replayed

    def prompts(self, policy: Policy | None, entries: "Entries | None") -> Iterator[Row]:
        """A prompt pass, or a second turn behind the entries of a context; transformers' cache without a policy."""
        tokens = self.settings.turn if entries else self.settings.prompt
        past = entries.context if entries else 0
        ids = torch.full((1, tokens), 5, device=self.device)

        def time_of(cache: DynamicCache) -> float:
            finish(self.device)
            start = time.perf_counter()
            self.model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            finish(self.device)
            return (time.perf_counter() - start) * 1e3

        if policy is None:
            made = [plain_cache(self.model, entries) for _ in range(1 if entries else 2)]
            ms = [time_of(cache) for cache in made][-1]
        else:
            with kvpress.patch(self.model, policy) as handle:
                if entries is not None:
                    ms = time_of(policy_cache(self.model, handle, entries))
                else:
                    ms = [time_of(DynamicCache(config=self.model.config)) for _ in range(2)][-1]
        yield {"tokens": tokens, **against_floor({"ms": ms}, self.prompt_floor(tokens, past))}


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


def rows(device: torch.device, limits: Limits, settings: Settings, in_time: Callable[[], bool]) -> Iterator[Row]:
    """Every setting and policy; one that fails is a row that says so, and what there is no time for is left out."""
    bench = Bench(random_model(settings, device), settings, limits)
    model, first = bench.model, None
    for wanted, batch in settings.shapes:
        context = fitting_context(model, wanted, batch, settings)
        if not context or not in_time():
            continue
        entries = Entries(model, batch, context)
        todo: list[Policy | str] = [PLAIN, *policies(settings), FLOOR]
        for policy in todo:
            if in_time():
                one = bench.plain if isinstance(policy, str) else bench.patched
                yield from attempt({"context": context, "batch": batch, **named(policy)}, one, policy, entries)
        first = context if batch == 1 else first
        del entries
    chosen = [None, *(policy for policy in policies(settings) if policy.name in PROMPTED)]
    for policy in chosen:
        if in_time():
            yield from attempt({"how": "prompt", "batch": 1, **named(policy or PLAIN)}, bench.prompts, policy, None)
    if first is not None and in_time():
        entries = Entries(model, 1, first)
        for policy in chosen:
            if in_time():
                row = {"how": "second turn", "context": first, "batch": 1, **named(policy or PLAIN)}
                yield from attempt(row, bench.prompts, policy, entries)
    if not in_time():
        yield {"left_out": "no time for the rest"}


def named(policy: Policy | str) -> Row:
    """What a row says about its policy."""
    if isinstance(policy, str):
        return {"policy": policy}
    return {"policy": policy.name, "as": policy.describe(), "evicts": isinstance(policy, EvictionPolicy)}


@torch.no_grad()
def attempt(row: Row, one: Callable[..., Iterator[Row]], *case: Any) -> Iterator[Row]:
    """The row with each of the figures that `one` gives, or with why it failed."""
    try:
        for figures in one(*case):
            yield {**row, **figures}
    except Exception as error:
        yield {**row, "failed": first_line(error)}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build(device: torch.device, settings: Settings, place: int, count: int) -> Iterator[str]:
    """Run every `count`-th policy once in all ways, from number `place` on: so its kernels are compiled, and kept on disk."""
    chosen = policies(settings)[place::count]
    if not chosen:
        return
    bench = Bench(random_model(settings, device), settings, Limits(1.0, 1.0))
    ((context, batch),) = settings.shapes[:1]
    entries = Entries(bench.model, batch, context)
    for policy in chosen:
        for one, given in ((bench.patched, entries), (bench.prompts, None), (bench.prompts, entries)):
            for row in attempt({}, one, policy, given):
                if "failed" in row:
                    raise RuntimeError(f"{policy.name}: {row['failed']}")
        yield policy.name
