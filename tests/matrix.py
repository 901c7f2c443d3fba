"""The policies that every situation is tested with. A new policy joins the trap matrix by being listed here, once."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpress.policies import H2O, Full, SnapKV, StreamingLLM
from kvpress.policy import Policy
from oracles import policies as oracle
from oracles.llama import Oracle

VOCAB = 97


@dataclass(frozen=True)
class Case:
    """A policy with small numbers, its oracle, and the same policy with room for everything (U1)."""

    policy: Policy
    oracle: Any
    roomy: Policy

    @property
    def id(self) -> str:
        return self.policy.describe().replace(" ", "")


def both(product: type[Policy], reference: type, roomy: dict[str, Any], **fields: Any) -> Case:
    return Case(product(**fields), reference(**fields), product(**roomy))


CASES = [
    Case(Full(), oracle.Full(), Full()),
    both(StreamingLLM, oracle.StreamingLLM, {"recent": 500}, sink=2, recent=6),
    both(StreamingLLM, oracle.StreamingLLM, {"budget": 500, "rope": "original"}, budget=0.4, rope="original"),
    both(
        StreamingLLM,
        oracle.StreamingLLM,
        {"recent": 500, "evict": "after_prompt"},
        budget=0.3,
        evict="after_prompt",
    ),
    both(H2O, oracle.H2O, {"budget": 500}, budget=0.4),
    both(H2O, oracle.H2O, {"heavy": 300, "recent": 300}, heavy=3, recent=5),
    both(H2O, oracle.H2O, {"budget": 500, "evict": "after_prompt"}, budget=0.3, evict="after_prompt"),
    both(SnapKV, oracle.SnapKV, {"budget": 500}, budget=0.5, window=4, kernel_size=3),
    both(
        SnapKV,
        oracle.SnapKV,
        {"budget": 500, "pooling": "max"},
        budget=12,
        window=5,
        kernel_size=5,
        pooling="max",
    ),
    both(
        SnapKV,
        oracle.SnapKV,
        {"budget": 500, "evict": "after_prompt"},
        budget=0.5,
        window=4,
        kernel_size=1,
        evict="after_prompt",
    ),
]
EVICTING = [case for case in CASES if case.policy.role == "eviction"]


def sharp_llama(layers: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 1) -> LlamaForCausalLM:
    """A random GQA Llama in float32 whose attention is far from uniform, so that rankings are clear."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.25 * noise)
    return model


def prompt(count: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def kept(cache: Any, row: int = 0) -> list[list[list[int]]]:
    """Sorted positions that a cache holds of one sequence: layer -> kv head -> positions."""
    return [
        [sorted(position for position in head if position >= 0) for head in layer.positions[row].tolist()]
        for layer in cache.layers
    ]


def expect(model: Any, case: Case, passes: list[list[int]]) -> list[Any]:
    """What the oracle says of one sequence alone: logits and kept positions after each pass."""
    return getattr(case.oracle, "runner", Oracle)(model, case.oracle).run(passes)


def check(steps: list[Any], logits: list[torch.Tensor], cache: Any = None, row: int = 0) -> None:
    """The last row's logits of the last passes, and what the cache holds in the end, are the oracle's."""
    for step, got in zip(steps[-len(logits) :], logits, strict=True):
        torch.testing.assert_close(got.float(), step.logits[-1], atol=1e-4, rtol=1e-4)
    if cache is not None:
        assert kept(cache, row) == steps[-1].kept
