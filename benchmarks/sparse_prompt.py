"""What policies that read or compute less of a prompt save: attention alone, planning, and the whole prompt.

    python benchmarks/sparse_prompt.py                       # a few layers of SmolLM2, and two of a Llama of 1B, 8k tokens
    python benchmarks/sparse_prompt.py --contexts 8192 16384 --policies '{name: gem_filter, r: 1}'

The models are the first layers of SmolLM2 with its weights, reading a novel if KVPRESS_DATA has it (else random tokens), and
layers of Llama-3.2-1B's shape with random weights. What is in a prompt besides layers is small. Every round runs the same
prompt under transformers' sdpa, `full`, and each policy; a ratio is the median over rounds of (policy / sdpa in that round).

- attention: the seconds inside of the attention function that the layers call, planning included, storing included.
- planning: the seconds inside of the policy's `plan`, as a share of sdpa's attention.
- prompt: the whole pass.
- density: the share of causal pairs that was computed.

With `--threads 1` seconds are the processor time of that thread, which other work on the machine changes less.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, Rows, ratios
from gpu_decode import PLAIN, TINY, random_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvpress
from kvpress import attention
from kvpress.models import load_model
from kvpress.policy import Policy, PrefillPolicy

LLAMA_1B = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}
POLICIES = (
    "full",
    "{name: x_attention, threshold: 0.15}",
    "{name: x_attention, threshold: 0.8}",
    "{name: gem_filter, k: 1024}",
    "lazy_llm",
)


def now() -> float:
    """Seconds: of the processor if one thread does the work, else of the clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Clock:
    """Seconds in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Any) -> Any:
        """The function, whose time is counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + now() - start

        return call


@contextmanager
def clocked(policy: Policy | None) -> Iterator[Clock]:
    """Count the time in attention functions, and in the policy's `plan`."""
    clock = Clock()
    plan = type(policy).plan if isinstance(policy, PrefillPolicy) else None
    names = [name for name in ("sdpa", attention.NAME) if name in ALL_ATTENTION_FUNCTIONS]
    for name in names:  # set in this object alone, before what is registered
        ALL_ATTENTION_FUNCTIONS[name] = clock.timed("attention", ALL_ATTENTION_FUNCTIONS[name])
    if plan is not None:
        type(policy).plan = clock.timed("planning", plan)  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]
        if plan is not None:
            type(policy).plan = plan  # type: ignore[method-assign]


def smollm2(layers: int, dtype: str) -> tuple[Any, Any]:
    """The first layers of SmolLM2-135M, and a tokenizer."""
    model, tokenizer = load_model("smollm2", device="cpu", dtype=dtype)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model, tokenizer


def llama(layers: int, dtype: str) -> tuple[Any, None]:
    """Layers of Llama-3.2-1B's shape with random weights."""
    shape = TINY._replace(config={**LLAMA_1B, "num_hidden_layers": layers}, dtype=getattr(torch, dtype))
    return random_model(shape, torch.device("cpu")), None


def prompt(tokenizer: Any, context: int) -> torch.Tensor:
    """So many tokens: int64 [1, context]."""
    folder = os.environ.get("KVPRESS_DATA")
    if tokenizer is None or folder is None:
        return torch.randint(10, 1000, (1, context), generator=torch.Generator().manual_seed(0))
    text = (Path(folder) / "text" / "books" / "moby-dick_pg2701.txt").read_text(encoding="utf-8")[5000:]
    return tokenizer(text[: 8 * context], return_tensors="pt").input_ids[:, :context]


@torch.inference_mode()
def once(model: Any, policy: Policy | None, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of one prompt, and its density."""
    with nullcontext() if policy is None else kvpress.patch(model, policy) as handle, clocked(policy) as clock:
        start = now()
        out = model(ids, use_cache=True, logits_to_keep=1)
        seconds = now() - start
        density = 1.0 if handle is None else handle.report(out.past_key_values).total.density
    attended = clock.seconds["attention"]
    return {
        "prompt": seconds,
        "attention": attended,
        "planning": clock.seconds.get("planning", 0.0),
        "density": density,
    }


def compare(model: Any, policies: list[Policy], ids: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row for each policy: medians of the ratios to transformers in the same round, and their extremes."""
    runs: dict[str, list[dict[str, float]]] = {}
    once(model, None, ids[:, :512])  # warm up
    for _ in range(rounds):
        for policy in (None, *policies):
            runs.setdefault(PLAIN if policy is None else policy.describe(), []).append(once(model, policy, ids))
    rows: dict[str, dict[str, Any]] = {
        name: {"policy": name, "density": round(of_name[0]["density"], 3)} for name, of_name in runs.items()
    }
    for key, of in (("attention", "attention"), ("planning", "attention"), ("prompt", "prompt")):
        times = {name: [run[key] for run in of_name] for name, of_name in runs.items()}
        baseline = {"baseline": [run[of] for run in runs[PLAIN]]}
        for name, figures in ratios(times | baseline, "baseline").items():
            if name in rows:
                extremes = f"{figures['ratio_low']:.2f} to {figures['ratio_high']:.2f}"
                rows[name] |= {key: figures["ratio"], f"{key}_range": extremes}
    for name, row in rows.items():
        row["seconds"] = round(statistics.median(run["prompt"] for run in runs[name]), 2)
    return list(rows.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama-1b"], choices=["smollm2", "llama-1b"])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192], help="tokens")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="names, or YAML mappings with fields")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_prompt.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policies = [kvpress.make_policy(yaml.safe_load(spec)) for spec in options.policies]
    rows = Rows(options.out)
    for dtype in options.dtypes:
        for name in options.models:
            model, tokenizer = {"smollm2": smollm2, "llama-1b": llama}[name](options.layers, dtype)
            for context in options.contexts:
                for row in compare(model, policies, prompt(tokenizer, context), options.rounds):
                    rows.add({"model": name, "layers": options.layers, "dtype": dtype, "context": context, **row})


if __name__ == "__main__":
    main()
