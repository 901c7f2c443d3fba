"""What several policies cost on one prompt, when they share its pass: against each of them alone.

    python benchmarks/sharing.py                     # SmolLM2-135M, 2000 tokens and 16 new ones, eight policies

Alone, a policy runs the prompt and decodes. Together, the prompt is recorded once (`kvpress.record_prompt`), and every policy
makes its cache from it and decodes. A round does both; `ratio` is (all together) / (mean of one alone), the median over
rounds.
"""

import argparse
import statistics
import time
from typing import Any

import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.haystack import book_text
from kvpress.models import load_model
from kvpress.policy import Policy

POLICIES = ["h2o", "h2o_prefill", "pyramid_kv", "quest", "snapkv", "streaming_llm", "tidal_decode", "tova"]


def decode(model: Any, cache: Any, logits: torch.Tensor, new: int) -> None:
    """Write `new` tokens, of which the first is the prompt pass's."""
    for _ in range(new - 1):
        logits = model(logits.argmax(-1, keepdim=True), **{CACHE: cache}, logits_to_keep=1).logits[:, -1]


def alone(model: Any, policy: Policy, ids: torch.Tensor, new: int) -> float:
    """Seconds of a policy that runs the prompt itself."""
    start = time.perf_counter()
    with kvpress.patch(model, policy):
        output = model(ids, use_cache=True, logits_to_keep=1)
        decode(model, output[CACHE], output.logits[:, -1], new)
    return time.perf_counter() - start


def together(model: Any, policies: list[Policy], ids: torch.Tensor, new: int) -> dict[str, float]:
    """Seconds of recording the prompt, of making the caches from it, and of decoding."""
    start = time.perf_counter()
    prompt = kvpress.record_prompt(model, ids)
    spent = {"record": time.perf_counter() - start, "caches": 0.0, "decode": 0.0}
    for policy in policies:
        with kvpress.patch(model, policy) as handle:
            start = time.perf_counter()
            cache = handle.adopt_prompt(prompt)
            made = time.perf_counter()
            decode(model, cache, prompt.logits, new)
            spent["caches"] += made - start
            spent["decode"] += time.perf_counter() - made
    return spent


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub name or folder of a causal LM")
    parser.add_argument("--dtype", default="auto", help="auto is what the CPU multiplies fastest")
    parser.add_argument("--context", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens written")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="names; each leaves prompts exact")
    parser.add_argument("--budget", type=float, default=0.25, help="a share of the prompt")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    policies = [kvpress.make_policy(name, budget=options.budget) for name in options.policies]
    if wrong := [policy.describe() for policy in policies if not policy.leaves_prompts_exact]:
        parser.error(f"{', '.join(wrong)} would not leave the prompt exact; leave out")
    model, tokenizer = load_model(options.model, device="cpu", dtype=options.dtype)
    ids = tokenizer(book_text(), return_tensors="pt")["input_ids"][:, : options.context]
    alone(model, policies[0], ids, 2)  # warm up
    ratios = []
    for number in range(options.rounds):
        each = {policy.describe(): alone(model, policy, ids, options.new) for policy in policies}
        parts = together(model, policies, ids, options.new)
        one, all_of_them = statistics.fmean(each.values()), sum(parts.values())
        ratios.append(all_of_them / one)
        print(f"round {number}: alone " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in each.items()))
        print(
            f"  together {all_of_them:.2f} s: "
            + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        )
    print(
        f"{len(policies)} policies cost {statistics.median(ratios):.2f} times one of them "
        f"({options.context} tokens, {options.new} new, {str(model.dtype).removeprefix('torch.')})"
    )


if __name__ == "__main__":
    main()
