"""The policies that every situation is tested with. A new policy joins the trap matrix by being listed here, once."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

import kvpress
from kvpress.compat import CACHE
from kvpress.patching import handle_of
from kvpress.policies import (
    A2SF,
    EMS,
    H2O,
    TOVA,
    A2SFPrefill,
    AdaKV,
    DualChunkAttention,
    Finch,
    FlexPrefill,
    Full,
    GemFilter,
    H2OPrefill,
    HiP,
    InfiniteHiP,
    Kascade,
    KeyDiff,
    Keyformer,
    Knorm,
    LazyLLM,
    MInference,
    ObservedAttention,
    Packed,
    PyramidKV,
    Quest,
    RecycledAttention,
    SkipSoftmax,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
    XAttention,
)
from kvpress.policy import EvictionPolicy, Policy, entries_for
from oracles import oracle_of
from oracles.common.llama import Oracle
from support.models import VOCAB, tiny_llama


@dataclass(frozen=True)
class Case:
    """A policy with small numbers, its oracle, and the same policy with room for everything (U1)."""

    policy: Policy
    oracle: Any
    roomy: Policy

    @property
    def id(self) -> str:
        return self.policy.describe().replace(" ", "")

    def run_of(self, count: int) -> int:
        """How many tokens of a prompt of so many the whole model is run on."""
        return min(count, entries_for(self.policy.k, count)) if isinstance(self.policy, GemFilter) else count

    def cuts(self, count: int) -> bool:
        """Whether some of a prompt of so many tokens have no logits."""
        return self.run_of(count) < count or isinstance(self.policy, LazyLLM)

    @property
    def traits(self) -> set[Any]:
        """How the policy plays each of its roles, which tests over several cases have to meet (support/pairwise.py)."""
        policy = self.policy
        traits = {*policy.roles, ("heads", policy.heads), ("places", type(policy.places).__name__)}
        traits.add(("exact prompts", policy.leaves_prompts_exact))
        if isinstance(policy, EvictionPolicy):
            how_often = {None: "never", 1: "each step"}.get(policy.evict_every, "every few steps")
            traits |= {("decode", how_often), ("merges", policy.merges), ("share", policy.keeps_a_share)}
            traits.add(("evict", policy.evict, type(policy.observes).__name__))
        return traits

    @property
    def named_traits(self) -> set[Any]:
        """And which policy it is."""
        return self.traits | {self.policy.name}


def both(policy: type[Policy], roomy: dict[str, Any], **fields: Any) -> Case:
    """A policy with `fields`, as it is and as its oracle, and the same class with `roomy`."""
    return Case(policy(**fields), oracle_of(policy)(**fields), policy(**roomy))


def shared(policy: type[EvictionPolicy], inner: dict[str, Any], **fields: Any) -> Case:
    """Ada-KV over a policy with the fields `inner`."""
    roomy = AdaKV(policy(**{**inner, "budget": 500, "evict": "each_pass"}), **fields)
    return Case(AdaKV(policy(**inner), **fields), oracle_of(AdaKV)(oracle_of(policy)(**inner), **fields), roomy)


CASES = [
    both(Full, {}),
    both(StreamingLLM, {"recent": 500}, sink=2, recent=6),
    both(StreamingLLM, {"budget": 500, "rope": "original"}, budget=0.4, rope="original"),
    both(
        StreamingLLM,
        {"recent": 500, "evict": "after_prompt"},
        budget=0.3,
        evict="after_prompt",
    ),
    both(H2O, {"budget": 500}, budget=0.4),
    both(H2O, {"heavy": 300, "recent": 300}, heavy=3, recent=5),
    both(H2O, {"budget": 500, "evict": "after_prompt"}, budget=0.3, evict="after_prompt"),
    both(SnapKV, {"budget": 500}, budget=0.5, window=4, kernel_size=3),
    both(
        SnapKV,
        {"budget": 500, "pooling": "max"},
        budget=12,
        window=5,
        kernel_size=5,
        pooling="max",
    ),
    both(
        SnapKV,
        {"budget": 500, "evict": "after_prompt"},
        budget=0.5,
        window=4,
        kernel_size=1,
        evict="after_prompt",
    ),
    both(Finch, {"budget": 500, "question": 4}, budget=0.5, question=4),
    both(
        Finch,
        {"budget": 500, "evict": "after_prompt"},
        budget=11,
        question=3,
        chunk=5,
        evict="after_prompt",
    ),
    both(Finch, {"budget": 500, "rope": "original"}, budget=0.4, question=2, chunk=4, rope="original"),
    both(H2O, {"budget": 500, "rope": "reindex"}, budget=0.4, rope="reindex"),
    both(
        H2O,
        {"budget": 500, "rope": "reindex", "evict": "after_prompt"},
        heavy=4,
        recent=2,
        rope="reindex",
        evict="after_prompt",
    ),
    both(H2OPrefill, {"budget": 500}, budget=0.5, recent=3),
    both(
        H2OPrefill,
        {"budget": 500, "evict": "after_prompt"},
        budget=9,
        recent=4,
        evict="after_prompt",
    ),
    both(ObservedAttention, {"budget": 500}, budget=0.4),
    both(
        ObservedAttention,
        {"budget": 500, "evict": "after_prompt"},
        budget=7,
        evict="after_prompt",
    ),
    both(A2SF, {"budget": 500, "alpha": 0.3}, budget=0.4, alpha=0.3),
    both(
        A2SF,
        {"budget": 500, "alpha": 0.95, "recent": 3, "evict": "after_prompt"},
        budget=8,
        alpha=0.95,
        recent=3,
        evict="after_prompt",
    ),
    both(
        A2SF,
        {"budget": 500, "alpha": 0.5, "evict": "each_row"},
        budget=7,
        alpha=0.5,
        evict="each_row",
    ),
    both(
        A2SF,
        {"budget": 500, "alpha": 0.0, "evict": "each_row"},
        budget=0.4,
        alpha=0.0,
        recent=0.1,
        evict="each_row",
    ),
    both(A2SFPrefill, {"budget": 500}, budget=0.5, alpha=0.9, recent=3),
    both(
        A2SFPrefill,
        {"budget": 500, "evict": "after_prompt"},
        budget=9,
        alpha=0.6,
        recent=2,
        evict="after_prompt",
    ),
    both(TOVA, {"budget": 500}, budget=0.4),
    both(TOVA, {"budget": 500, "evict": "after_prompt"}, budget=6, recent=1, evict="after_prompt"),
    both(PyramidKV, {"budget": 500}, budget=9, window=3, kernel_size=3, beta=4),
    both(PyramidKV, {"budget": 500}, budget=0.3, window=2, kernel_size=5, pooling="avg"),
    both(
        PyramidKV,
        {"budget": 500, "evict": "after_prompt"},
        budget=0.4,
        window=3,
        kernel_size=1,
        evict="after_prompt",
    ),
    shared(SnapKV, {"budget": 12, "window": 4, "kernel_size": 3}),
    shared(SnapKV, {"budget": 0.5, "window": 3, "kernel_size": 1, "evict": "after_prompt"}, alpha=0.5),
    shared(
        PyramidKV,
        {"budget": 9, "window": 3, "kernel_size": 3, "beta": 4},
        alpha=0.0,
        normalize=False,
    ),
    shared(H2OPrefill, {"budget": 0.4, "recent": 3}, alpha=0.3),
    shared(A2SFPrefill, {"budget": 9, "alpha": 0.9, "recent": 2}, normalize=False),
    shared(ObservedAttention, {"budget": 7}),
    both(TokenSelect, {"k": 500}, n_init=2, n_local=5, k=4, chunk=4, theta=0.3),
    both(
        TokenSelect,
        {"k": 500, "n_local": 3, "chunk": 3},
        n_init=1,
        n_local=3,
        k=5,
        chunk=3,
        theta=2.0,
        rotate_query=False,
        pool=4,
        vote_scale=0.4,
        gqa_map="mod",
    ),
    both(TokenSelect, {"n_init": 400}, n_init=3, n_local=6, k=0, chunk=6),
    both(Keyformer, {"budget": 500}, budget=0.4, new_tokens=4),
    both(
        Keyformer,
        {"budget": 500, "noise": "per_token"},
        budget=9,
        recent_ratio=0.2,
        tau_init=0.5,
        tau_end=3.0,
        new_tokens=3,
        noise="per_token",
        seed=7,
        evict_every=3,
    ),
    both(
        Keyformer,
        {"budget": 500, "evict": "after_prompt"},
        budget=0.5,
        new_tokens=4,
        noise="none",
        evict="after_prompt",
    ),
    # In entries: of two keys neither is less like their mean, and rounding alone would choose in a prompt of two tokens.
    both(KeyDiff, {"budget": 500}, budget=5),
    both(KeyDiff, {"budget": 500, "evict": "after_prompt"}, budget=7, evict="after_prompt"),
    both(Knorm, {"budget": 500}, budget=0.3),
    both(Knorm, {"budget": 500, "skip_layers": 1}, budget=6, skip_layers=1, evict="after_prompt"),
    both(EMS, {"budget": 500}, budget=0.4, window=4, recent=3, kernel_size=3, tau=0.1, evict_every=2),
    both(
        EMS,
        {"budget": 500, "recent": 4},
        budget=9,
        window=4,
        recent=4,
        kernel_size=1,
        align="mean",
        n_sink=1,
        rho=1.0,
        kappa=0.7,
        tau=0.0,
        value_norms=True,
        evict_every=1,
    ),
    both(
        EMS,
        {"budget": 500, "evict": "after_prompt"},
        budget=0.5,
        window=2,
        recent=1,
        kernel_size=5,
        pooling="avg",
        global_weight=0.5,
        tau=0.05,
        raw_product=True,
        keep_centre_score=True,
        evict_every=4,
        evict="after_prompt",
    ),
    both(TidalDecode, {"k": 500, "sparse_layer_start": 0}, k=5, sparse_layer_start=0),
    both(
        TidalDecode,
        {"k": 500, "sparse_layer_start": 0, "correct_every": 2},
        k=0.3,
        sparse_layer_start=0,
        correct_every=2,
    ),
    both(
        Quest,
        {"budget": 500, "dense_layers": 0},
        budget=8,
        page_size=4,
        dense_layers=0,
    ),
    both(
        Quest,
        {"budget": 500, "dense_layers": 1},
        budget=0.4,
        page_size=3,
        dense_layers=1,
    ),
    both(RecycledAttention, {"budget": 500}, budget=6, stride=3),
    both(
        RecycledAttention,
        {"budget": 500, "stride": 2},
        budget=0.3,
        stride=100,
        group_reduce="sum",
    ),
    both(
        RecycledAttention,
        {"budget": 500, "query_stride": 1, "similarity": 0.5},
        budget=5,
        query_stride=2,
        similarity=0.3,
    ),
    both(Kascade, {"k": 500}, k=6, tile=3),
    both(Kascade, {"least": 500}, k=0.4, least=2, tile=4, anchors=[0]),
    both(Kascade, {"k": 1.0, "least": 1}, k=5, anchors=[0], decode_only=True),
    both(XAttention, {"threshold": 1.0}, stride=2, threshold=0.5, block_size=4),
    both(XAttention, {"min_len": 500}, stride=1, threshold=0.3, block_size=2, norm=0.5),
    both(SkipSoftmax, {"scale": 0.0}, scale=7.0, tile=2),
    both(SkipSoftmax, {"min_len": 500}, scale=50.0, tile=4, min_len=9),
    both(FlexPrefill, {"gamma": 1.0}, gamma=0.6, tau=0.0, min_budget=1, block_size=2),
    both(FlexPrefill, {"min_budget": 500}, gamma=0.4, tau=0.8, min_budget=3, max_budget=6, block_size=2),
    both(
        MInference,
        {"default": ["vertical_slash", 500, 1]},
        default=["vertical_slash", 3, 4],
        sink=1,
        recent=2,
        probe=4,
        block_size=2,
    ),
    both(
        MInference,
        {"default": ["a_shape", 100, 400]},
        default=["tri_shape", 2, 3],
        expand="exact",
        n_last=3,
        block_size=4,
    ),
    both(
        HiP,
        {"k": 500, "dense_layers": 0},
        k=4,
        window=3,
        sink=1,
        block_size=4,
        key_block_size=2,
        row_stride=1,
        dense_layers=0,
        refresh=3,
    ),
    both(
        HiP,
        {"window": 500, "dense_layers": 0},
        k=3,
        window=1,
        sink=2,
        block_size=4,
        key_block_size=1,
        row_stride=3,
        dense_layers=1,
        refresh=1,
    ),
    both(
        InfiniteHiP,
        {"k": [500, 500, 500], "l_c": [4, 2, 1], "early_layers": 0},
        n_sink=1,
        n_stream=2,
        l_c=[4, 2],
        k=[8, 4],
        early_layers=1,
        early_k=6,
        refresh=[4, 2],
        block_size=4,
    ),
    both(
        InfiniteHiP,
        {"n_stream": 500},
        n_sink=2,
        n_stream=1,
        l_c=[6, 3, 1],
        k=[12, 6, 3],
        early_layers=0,
        refresh=[3, 1, 2],
        block_size=2,
        min_len=9,
    ),
    both(
        InfiniteHiP,
        {"n_sink": 500, "extend": True},
        n_sink=1,
        n_stream=3,
        l_c=[5, 1],
        k=[10, 3],
        early_layers=1,
        early_k=4,
        refresh=[3, 2],
        block_size=4,
        extend=True,
    ),
    both(LazyLLM, {"rate": 0.0}, rate=0.4),
    both(LazyLLM, {"layers": []}, layers=[0], rate=[0.6]),
    both(GemFilter, {"k": 500}, k=7, r=1),
    both(GemFilter, {"k": 1.0}, k=0.5, r=0, kernel_size=3, keep_first=1, keep_last=2),
    # Two bits: with more, the last bit of a number would tell now and then which of two codes is nearer.
    both(Packed, {"residual": 500}, bits=2, group=4, residual=3),
    both(DualChunkAttention, {"chunk_size": 500}, chunk_size=8, local_size=3),
    both(DualChunkAttention, {}, chunk_size=12, local_size=0),
]
TOGETHER: list[list[Policy]] = [
    [H2O(budget=0.4), Packed(bits=8, group=4, residual=3)],
    [SnapKV(budget=0.5, window=4, kernel_size=3), Packed(bits=4, group=8, residual=2)],
    [Quest(budget=8, page_size=4, dense_layers=0), Packed(bits=8, group=4, residual=0)],
]
"""Policies of several roles; the last one packs."""
GRAPHS = [case for case in CASES if not isinstance(case.policy, LazyLLM)]
"""Those whose decode steps are graphs: they can be compiled and replayed."""
BACK = [case for case in GRAPHS if "eviction" not in case.policy.roles]
"""Those whose caches can take tokens back."""
EVICTING = [case for case in CASES if "eviction" in case.policy.roles]


def sharp_llama(layers: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 1) -> LlamaForCausalLM:
    """A random GQA Llama in float32 whose attention is far from uniform, so that rankings are clear."""
    return tiny_llama(layers, heads, kv_heads, seed, head_dim=32 // heads)


def prompt(count: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def rows_to_ask(model: Any, count: int) -> dict[str, int]:
    """How a pass of `count` tokens asks a patched model for logits: of the last one alone if others are left out of it."""
    handle = handle_of(model)
    policies = [] if handle is None else handle.policies
    if any(isinstance(policy, LazyLLM) and policy.rate != 0.0 and policy.layers != () for policy in policies):
        return {"logits_to_keep": 1}
    cut = any(isinstance(policy, GemFilter) and entries_for(policy.k, count) < count for policy in policies)
    return {"logits_to_keep": 1} if cut else {}


def conversation(steps: int) -> list[list[int]]:
    """The passes of a prompt, so many decode steps, a second turn and three steps more."""
    return [prompt(24), *([token] for token in prompt(steps, 1)), prompt(7, 2), *([token] for token in prompt(3, 3))]


@torch.no_grad()
def run(model: Any, policy: Any, passes: list[list[int]]) -> tuple[list[torch.Tensor], list[Any]]:
    """What one sequence gives: after each pass its logits [q, vocab], and the kept positions as of `kept`."""
    cache, logits, sets = DynamicCache(config=model.config), [], []
    with kvpress.patch(model, policy):
        for ids in passes:
            logits.append(model(torch.tensor([ids]), **{CACHE: cache}, **rows_to_ask(model, len(ids))).logits[0])
            sets.append(kept(cache))
    return logits, sets


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
