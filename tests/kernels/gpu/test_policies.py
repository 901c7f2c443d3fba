"""Policies on a patched model with every kernel in Triton: the same tokens' logits and the same cache as with torch."""

import importlib
from pathlib import Path

import pytest
import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.kernels import backend
from kvpress.policies import (
    A2SF,
    EMS,
    H2O,
    AdaKV,
    FlexPrefill,
    H2OPrefill,
    HiP,
    InfiniteHiP,
    Kascade,
    Keyformer,
    MInference,
    Quest,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    TokenSelect,
    XAttention,
)
from support import accelerator
from support.models import tiny_llama, token_ids

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

COMMON = ("decode_attention", "topk_select")
# Each with kernels that it cannot do without.
POLICIES = {
    "quest": (Quest(budget=12, page_size=4, dense_layers=1), (*COMMON, "page_bounds", "page_scores", "union_select")),
    "token_select": (TokenSelect(n_init=2, n_local=6, k=4, chunk=6, theta=1.5), (*COMMON, "soft_vote", "rope_shift")),
    "hip": (
        HiP(k=8, window=6, sink=2, block_size=8, key_block_size=2, dense_layers=1, refresh=2),
        (*COMMON, "gather_slots", "union_select"),
    ),
    "infinite_hip": (
        InfiniteHiP(n_sink=2, n_stream=6, l_c=(4, 2), k=(8, 4), early_k=4, refresh=(4, 2), block_size=8),
        (*COMMON, "gather_slots", "union_select"),
    ),
    "infinite_hip, extended": (
        InfiniteHiP(
            n_sink=2,
            n_stream=6,
            l_c=(4, 2),
            k=(8, 4),
            early_layers=1,
            early_k=4,
            refresh=(4, 2),
            block_size=8,
            extend=True,
        ),
        (*COMMON, "gather_slots", "union_select", "rope_shift"),
    ),
    "tidal_decode": (
        TidalDecode(k=6, sparse_layer_start=0, correction_layer=1),
        (*COMMON, "decode_scores", "union_select"),
    ),
    "tidal_decode beside streaming_llm": (
        [TidalDecode(k=6, sparse_layer_start=0, correction_layer=1), StreamingLLM(budget=16, sink=2)],
        (*COMMON, "decode_scores", "rope_shift"),
    ),
    "kascade": (
        Kascade(k=10, tile=5, anchors=[0, 2], head_map=[[0, 1], [1, 1], [0, 1]]),
        (*COMMON, "decode_scores", "attention_mass"),
    ),
    "x_attention": (XAttention(block_size=4, stride=2, threshold=0.5), ("decode_attention", "antidiagonal_mass")),
    "flex_prefill": (
        FlexPrefill(block_size=4, min_budget=4, gamma=0.5),
        ("decode_attention", "vertical_slash_mass", "union_select"),
    ),
    "minference": (
        MInference(default=("vertical_slash", 6, 8), sink=2, recent=4, block_size=4, probe=8),
        ("decode_attention", "vertical_slash_mass", "union_select"),
    ),
    "streaming_llm": (StreamingLLM(budget=16, sink=2), ("decode_attention", "rope_shift")),
    "ada_kv": (AdaKV(SnapKV(budget=16, window=4)), ("paged_attention", "attention_mass")),
    "ada_kv, all rows": (
        AdaKV(H2OPrefill(budget=12, recent=3, evict="each_pass")),
        ("paged_attention", "compact_slots"),
    ),
    "ems": (EMS(budget=16, window=4, recent=4, n_sink=2), (*COMMON, "merge_slots", "attention_mass")),
    "keyformer": (Keyformer(budget=12, new_tokens=8), (*COMMON, "attention_mass")),
    "h2o": (H2O(heavy=6, recent=6), (*COMMON, "compact_slots")),
    "a2sf": (A2SF(budget=12), (*COMMON, "attention_mass")),
    "snapkv": (SnapKV(budget=16, window=4), (*COMMON, "attention_mass")),
}


def run(policy):
    """Logits of a padded prompt in two chunks and of three steps, and the positions that each layer keeps."""
    model = tiny_llama(layers=3, heads=8, kv_heads=2, head_dim=16, attention="eager").to(accelerator.DEVICE)
    ids = token_ids(2, 35).to(accelerator.DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits = []
    with torch.no_grad(), kvpress.patch(model, policy):
        cache = None
        for start, stop in ((0, 20), (20, 32), (32, 33), (33, 34), (34, 35)):
            output = model(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            logits.append(output.logits[:, -1])
    return torch.stack(logits), [layer.positions.clone() for layer in cache.layers]


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_runs_the_same(name, monkeypatch):
    """As far as float32 sums in another order allow."""
    policy, own = POLICIES[name]
    used, results = set(), []
    for triton in (False, True):
        for file in Path(backend.__file__).parent.glob("*.py"):
            module = importlib.import_module(f"kvpress.kernels.{file.stem}")
            if file.stem != "backend" and hasattr(module, "use_triton"):

                def choose(chosen, tensor, operation=file.stem, triton=triton):
                    used.add((operation, triton and chosen != "torch"))
                    return triton and chosen != "torch"

                monkeypatch.setattr(module, "use_triton", choose)
        results.append(run(policy))
    assert {(operation, True) for operation in own} <= used
    (expected, kept), (found, also_kept) = results
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(also_kept, kept, strict=True):
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
