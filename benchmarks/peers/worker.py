"""One contestant, one setting, once, in a process of its own: reads a job (JSON file), prints what it measured (JSON).

    python benchmarks/peers/worker.py job.json

The job: `contestant`, `model` (a folder), `dtype`, `prompts` ([batch][tokens]), `new_tokens`, `budget` (share kept). Started
by run.py; it runs in NVIDIA's environment too, where `import kvpress` is NVIDIA's.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from contestants import BY_NAME, COMPILED, Contestant
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What this version of transformers calls the cache (kvpress.compat is not there in NVIDIA's environment).
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
WARM_UP = 256  # tokens of a first, unmeasured prompt
Measure = Callable[[], tuple[float, int]]  # entries kept per layer, kv head and sequence, and bytes of the cache
Prepare = Callable[[], tuple[dict[str, Any], Measure]]  # arguments for one `generate`, and how to measure its cache


def resident_mib(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


class Clock(BaseStreamer):
    """Follows `generate`: when the first new token came and when the last, and what the cache kept of the prompt."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._puts = 0
        self.kept = 0.0

    def put(self, value: Tensor) -> None:
        self.last = time.perf_counter()
        self._puts += 1
        if self._puts == 2:  # the first is the prompt itself
            self.first = self.last
            self.kept = self._measure()[0]
            self.decode_start = time.perf_counter()

    def end(self) -> None:
        pass


def load_library(contestant: Contestant) -> None:
    """Import what the contestant needs; this toolkit loads its parts when they are first used."""
    import kvpress

    if contestant.side == "ours":
        kvpress.patch, kvpress.available()


def press(name: str, share: float, target: int) -> Any:
    """NVIDIA's press, made with its own defaults and the share that goes."""
    import kvpress as nvidia

    ratio = 1 - share
    if name == "AdaKV(SnapKV)":
        return nvidia.AdaKVPress(nvidia.SnapKVPress(ratio))
    if name == "ObservedAttention+decoding":
        each_step = nvidia.DecodingPress(nvidia.ObservedAttentionPress(), compression_interval=1, target_size=target)
        return nvidia.PrefillDecodingPress(nvidia.ObservedAttentionPress(ratio), each_step)
    return getattr(nvidia, f"{name}Press")(ratio)


@contextmanager
def prepared(contestant: Contestant, model: Any, job: dict[str, Any]) -> Iterator[Prepare]:
    """The model as the contestant wants it, while the context lasts."""
    batch, tokens = len(job["prompts"]), len(job["prompts"][0])
    if contestant.side == "ours":
        import kvpress

        policy = dict(contestant.policy or {})
        if contestant.compresses:
            policy["budget"] = job["budget"]
        with kvpress.patch(model, policy, compile=contestant.compiled) as handle:

            def report() -> tuple[float, int]:
                total = handle.report().total
                return total.kept / batch, total.bytes

            yield lambda: ({}, report)
        return
    if "StaticCache" in contestant.name:
        static = StaticCache(config=model.config, max_cache_len=tokens + job["new_tokens"])
        more: dict[str, Any] = {"disable_compile": True}
        if contestant.name == COMPILED:
            more = {"compile_config": CompileConfig(mode="default", fullgraph=False)}
            more["compile_config"]._compile_all_devices = True  # transformers compiles on a GPU only unless told

        def emptied() -> tuple[dict[str, Any], Measure]:
            """The same cache again, because what is compiled is compiled for it."""
            if static.layers[0].is_initialized:
                static.reset()
            return {CACHE: static, **more}, lambda: (float(tokens), held_bytes(static))

        yield emptied
        return

    def fresh() -> tuple[dict[str, Any], Measure]:
        cache = DynamicCache(config=model.config)
        return {CACHE: cache}, lambda: (kept_entries(model, cache), held_bytes(cache))

    if not contestant.compresses:
        yield fresh
        return
    with press(contestant.name.removeprefix("NVIDIA "), job["budget"], int(tokens * job["budget"]))(model):
        yield fresh


def kept_entries(model: Any, cache: DynamicCache) -> float:
    """Entries attended per layer, kv head and sequence, mean over layers. AdaKV holds all and masks some."""
    kept = []
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        batch, heads, length = layer.keys.shape[:3]
        masked = getattr(block.self_attn, "masked_key_indices", None)
        kept.append(length - (0 if masked is None else len(masked[0]) / (batch * heads)))
    return sum(kept) / len(kept)


def held_bytes(cache: DynamicCache | StaticCache) -> int:
    """Bytes of the keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, run one prompt and its new tokens."""
    contestant = BY_NAME[job["contestant"]]
    if contestant.side != "transformers":
        load_library(contestant)  # before the memory is looked at: NVIDIA's brings datasets and pyarrow
    kind = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=kind, attn_implementation=contestant.attention, local_files_only=True
    ).eval()
    model.generation_config.eos_token_id = None  # every contestant makes the same number of tokens
    model.generation_config.pad_token_id = 0
    prompts = torch.tensor(job["prompts"])
    model(prompts[:, :8], use_cache=False)  # touches every weight: a file that is mapped is resident only then
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading freed goes back, or the run would reuse it unseen
    loaded = resident_mib("VmRSS")

    def generate(ids: Tensor, count: int, arguments: dict[str, Any], measured: Measure) -> tuple[Tensor, Clock, float]:
        clock, start = Clock(measured), time.perf_counter()
        ones = torch.ones_like(ids)
        made = model.generate(
            ids, attention_mask=ones, max_new_tokens=count, do_sample=False, streamer=clock, **arguments
        )
        return made[:, ids.shape[1] :], clock, start

    with prepared(contestant, model, job) as arguments:
        generate(prompts[:, :WARM_UP], 4, *arguments())
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading; start over
        given, measured = arguments()
        answers, clock, start = generate(prompts, job["new_tokens"], given, measured)
        steps = job["new_tokens"] - 1
        return {
            "prompt_s": clock.first - start,
            "ms_per_token": (clock.last - clock.decode_start) / steps * 1e3,
            "peak_mib": resident_mib("VmHWM") - loaded,
            "cache_mib": measured()[1] / 2**20,
            "kept": clock.kept,
            "answers": answers.tolist(),
            "transformers": transformers.__version__,
        }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
