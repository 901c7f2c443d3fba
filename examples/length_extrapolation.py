"""A pass key in a text longer than the model was trained for: SmolLM2-135M (8192 tokens) at 12k tokens.

    python examples/length_extrapolation.py                          # all four; 5 keys each
    python examples/length_extrapolation.py --dtype bfloat16         # a quarter of an hour on two cores that have it
    python examples/length_extrapolation.py --tokens 16000 --policies token_select --seeds 10

The key is said once in a text of five sentences that repeat, at a depth that differs from seed to seed, and asked for at
the end; the answer is found if it begins with the key. Every policy reads the prompt in chunks of 512 tokens, in a process
of its own, so that peak memory is the policy's. `full` goes past the trained positions; `streaming_llm` and `token_select`
read as many tokens as one another, at positions that the model knows; `dual_chunk` reads all of them there.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

import kvpress
from kvpress.models import load_model
from kvpress.policies import DualChunkAttention, StreamingLLM, TokenSelect

CHUNK = 512
READ = 128 + 2048 + 512  # what TokenSelect reads by default
POLICIES: dict[str, kvpress.Policy] = {
    "streaming_llm": StreamingLLM(sink=4, recent=READ - 4),
    "token_select": TokenSelect(),
    "dual_chunk": DualChunkAttention(),
}
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there. "
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"
DIGITS = 5


def passkey_prompt(tokenizer: Any, tokens: int, depth: float, seed: int) -> tuple[list[int], str]:
    """A prompt of exactly `tokens` tokens with the key at `depth` of its text (0 to 1), and the key."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    key = str(random.Random(seed).randrange(10 ** (DIGITS - 1), 10**DIGITS))
    before, said, asked, noise = map(encode, (INTRODUCTION, KEY.format(key=key), QUESTION, NOISE))
    room = tokens - len(before) - len(said) - len(asked)
    if room < 0:
        raise SystemExit(f"--tokens {tokens} is too short; give at least {tokens - room}")
    text = (noise * (room // len(noise) + 1))[:room]
    at = round(depth * room / len(noise)) * len(noise)  # between two repetitions
    return before + text[:at] + said + text[at:] + asked, key


def answer_all(options: argparse.Namespace) -> dict[str, Any]:
    """Ask for every key under one policy, in this process."""
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    with torch.no_grad():
        model(torch.ones(1, 64, dtype=torch.long, device=model.device))  # weights are read from disk when first used
    loaded = memory(model, restart=True)
    policy = POLICIES.get(options.only) or kvpress.make_policy(options.only)
    found, seconds, cache = [], [], 0
    with kvpress.patch(model, policy) as handle:
        for seed in range(options.seeds):
            ids, key = passkey_prompt(tokenizer, options.tokens, (seed + 0.5) / options.seeds, seed)
            started = time.perf_counter()
            output = model.generate(
                torch.tensor([ids], device=model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
                max_new_tokens=DIGITS + 2,
                do_sample=False,
                pad_token_id=0,
                prefill_chunk_size=CHUNK,
            )
            seconds.append(time.perf_counter() - started)
            answer = tokenizer.decode(output[0, len(ids) :])
            found.append(answer.strip().startswith(key))
            cache = handle.report().total.bytes
            print(
                f"{policy.describe()}, seed {seed}: {key} {answer!r} {seconds[-1]:.0f} s", file=sys.stderr, flush=True
            )
    return {
        "policy": policy.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "trained": model.config.max_position_embeddings,
        "found": found,
        "seconds": statistics.median(seconds),
        "cache": cache,
        "peak": memory(model) - loaded,
    }


def memory(model: Any, restart: bool = False) -> int:
    """Bytes at the peak of the device, or of this process (Linux, else 0); `restart` forgets what was before."""
    if model.device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub name or a folder")
    parser.add_argument("--tokens", type=int, default=12_000, help="length of the prompt")
    parser.add_argument("--seeds", type=int, default=5, help="keys, each at a depth of its own")
    parser.add_argument("--policies", nargs="+", default=["full", *POLICIES], help="names; see `kvpress policies`")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ...")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the policy of a process
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} asks for nothing; give at least 1")
    if unknown := set(options.policies) - set(kvpress.available()):
        parser.error(f"unknown policies {', '.join(sorted(unknown))}; there are {', '.join(kvpress.available())}")
    if options.only:
        print(json.dumps(answer_all(options)))
        return

    results = []
    for name in options.policies:
        command = [sys.executable, __file__, "--only", name, "--model", options.model, "--dtype", options.dtype]
        command += ["--tokens", str(options.tokens), "--seeds", str(options.seeds)]
        # Freed tensors go back to the system at once: else the peak depends on how malloc's heap fell apart.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "TRANSFORMERS_VERBOSITY": "error"}
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if run.returncode:
            raise SystemExit(run.returncode)  # what went wrong is on stderr
        results.append(json.loads(run.stdout.splitlines()[-1]))

    first = results[0]
    title = f"{options.model}, trained for {first['trained']} tokens; {options.tokens} tokens, {first['dtype']}"
    table = Table(
        Column("policy", no_wrap=True),
        "found",
        "at depth",
        "cache",
        "peak over the model",
        "prompt and answer",
        title=title,
    )
    for result in results:
        depths = [f"{(seed + 0.5) / options.seeds:.0%}" for seed, found in enumerate(result["found"]) if found]
        table.add_row(
            result["policy"],
            f"{sum(result['found'])}/{options.seeds}",
            " ".join(depths) or "-",
            f"{result['cache'] / 2**20:.0f} MiB",
            f"{result['peak'] / 2**20:.0f} MiB" if result["peak"] > 0 else "?",
            f"{result['seconds']:.0f} s",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
