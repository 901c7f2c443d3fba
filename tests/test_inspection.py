"""Inspection: density and recall against the attention weights of transformers' eager attention, and against the report."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvpress
from kvpress import inspection
from kvpress.compat import CACHE
from kvpress.policies import (
    H2O,
    FlexPrefill,
    HiP,
    InfiniteHiP,
    Kascade,
    LazyLLM,
    MInference,
    Quest,
    SkipSoftmax,
    SnapKV,
    TokenSelect,
    XAttention,
)
from kvpress.policy import Pattern, PrefillPolicy, View
from support.matrix import prompt, sharp_llama
from support.tiny_families import tiny_family

N = 53
PREFILL = [
    XAttention(block_size=4, stride=2, threshold=0.6),
    FlexPrefill(block_size=4, gamma=0.6, min_budget=4),
    MInference(block_size=4, default=("vertical_slash", 3, 5), sink=1, recent=2, probe=4),
    MInference(block_size=4, default=("vertical_slash", 3, 5), sink=1, recent=2, probe=4, expand="exact"),
    MInference(block_size=4, default=("block_sparse", 3)),
    HiP(k=8, block_size=4, window=4, sink=2, dense_layers=1),
    InfiniteHiP(n_sink=2, n_stream=5, l_c=(4, 2), k=(12, 6), early_k=6, refresh=(1, 1), block_size=4),
    Kascade(k=0.2, least=2, anchors=(0,), tile=5),
    TokenSelect(n_init=2, n_local=5, k=6, chunk=5, theta=1.5),
]


@dataclass(frozen=True, kw_only=True)
class ByHand(PrefillPolicy):
    """Pairs that are written down: the first entries and a window, blocks of 8 counted from the first entry, 24 rows at a time."""

    name: ClassVar[str] = "by_hand_for_inspection"

    layer: int = 0

    @property
    def chunk(self) -> int:
        return 20

    def plan(self, view: View) -> Pattern | None:
        if view.layer != self.layer:
            return None
        n, rows = view.keys.shape[2], view.query.shape[2]
        first = (n - rows) // 8
        blocks = torch.arange(first, -(-n // 8))
        listed = torch.stack((blocks, torch.where(blocks > 1, 0, -1)), dim=-1)
        return Pattern(blocks=listed.expand(1, 2, -1, -1), columns=torch.tensor([[[9], [-1]]]), block_size=8)


def mask_by_hand():
    """What `ByHand` reads, bool [kv_heads, N, N]."""
    mask = torch.zeros(2, N, N, dtype=torch.bool)
    for row in range(N):
        for entry in range(row + 1):
            mask[:, row, entry] = row // 8 == entry // 8 or (row // 8 > 1 and entry < 8)
            mask[0, row, entry] |= entry == 9
    return mask


def exact_weights(model, ids):
    """transformers' own attention weights, layer by layer: [heads, n, n]."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return [one[0] for one in model(torch.tensor([ids]), output_attentions=True).attentions]
    finally:
        model.set_attn_implementation(before)


@pytest.fixture(scope="module")
def model():
    return sharp_llama(layers=3)


@pytest.mark.parametrize("tile", [1, 700, 1 << 20])
@pytest.mark.parametrize("layer", [0, 1])
def test_recall_and_maps_are_those_of_transformers_attention(model, monkeypatch, layer, tile):
    """Up to the layer that reads less, all layers attend exactly; so transformers' weights are the ones that are looked at."""
    monkeypatch.setattr(inspection, "TILE_NUMBERS", tile)
    ids = prompt(N)
    found = kvpress.inspect(model, ByHand(layer=layer), ids, cells=7)
    weights = exact_weights(model, ids)[layer]
    mask = mask_by_hand().repeat_interleave(len(weights) // 2, dim=0)
    reads = found.prompt[layer]
    torch.testing.assert_close(reads.recall.float(), (weights * mask).sum((1, 2)) / N, atol=1e-5, rtol=0)
    assert reads.density.tolist() == (mask.sum((1, 2)).double() / (N * (N + 1) / 2)).tolist()
    assert found.cell == 8
    pairs = torch.ones(N, N).tril()
    for name, x, over in (
        ("kept", mask.float(), pairs),
        ("mass", weights, None),
        ("held", weights * mask, None),
    ):
        shown = getattr(reads, name)
        assert shown.shape == (len(weights), 7, 7)
        for i in range(7):
            for j in range(7):
                cell = (slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
                whole = max(1.0, pairs[cell].sum().item()) if over is not None else len(range(N)[cell[0]])
                wanted = x[:, cell[0], cell[1]].sum((1, 2)) / whole
                torch.testing.assert_close(shown[:, i, j], wanted, atol=1e-5, rtol=0)
    if layer:
        assert found.prompt[0].recall.tolist() == [1.0] * len(weights)


@pytest.mark.parametrize("policy", PREFILL, ids=lambda policy: policy.describe().replace(" ", ""))
def test_density_is_the_reports(model, policy):
    ids = prompt(N, 3)
    found = kvpress.inspect(model, policy, ids)
    with torch.no_grad(), kvpress.patch(model, policy) as handle:
        model(torch.tensor([ids]), use_cache=True)
        report = handle.report()
    assert report.total.density < 0.95
    assert set(found.prompt) == set(report.layers)
    for layer, reads in found.prompt.items():
        assert reads.density.mean().item() == pytest.approx(report.layers[layer].density, abs=1e-9)
        assert (reads.recall <= 1).all()
        assert (reads.held <= reads.mass + 1e-6).all()
        torch.testing.assert_close(reads.mass.sum(-1), torch.ones_like(reads.mass[..., 0]))
        whole = reads.density == 1
        assert (reads.recall[whole] == 1).all()


@pytest.mark.parametrize("chunk", [5, 20])
def test_chunks_of_token_select_are_what_their_rows_read(model, chunk):
    """What the rows read is told of in chunks; layer by layer it adds up to what one vote for each row's chunk says."""
    policy = TokenSelect(n_init=2, n_local=20, k=0, chunk=chunk)
    ids = prompt(N, 4)
    found = kvpress.inspect(model, policy, ids)
    weights = exact_weights(model, ids)[0]
    mask = torch.zeros(N, N, dtype=torch.bool)
    for row in range(N):
        stop = min(N, (row // chunk + 1) * chunk)
        read = range(stop) if stop <= 22 else [0, 1, *range(stop - 20, stop)]
        mask[row, list(read)] = True
    mask &= torch.ones(N, N, dtype=torch.bool).tril()
    torch.testing.assert_close(found.prompt[0].recall.float(), (weights * mask).sum((1, 2)) / N, atol=1e-5, rtol=0)


FULL = [
    XAttention(block_size=4, stride=2, threshold=1.0),
    FlexPrefill(block_size=4, gamma=1.0),
    MInference(default=("a_shape", 64, 64)),
    HiP(k=512, dense_layers=1),
    InfiniteHiP(),
    TokenSelect(),
    SkipSoftmax(scale=0),
]


@pytest.mark.parametrize("policy", FULL, ids=lambda policy: policy.name)
def test_what_reads_all_has_all_the_mass(model, policy):
    found = kvpress.inspect(model, policy, prompt(N))
    for reads in found.prompt.values():
        assert reads.density.tolist() == reads.recall.tolist() == [1.0] * len(reads.recall)


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(budget=0.4, window=4, kernel_size=3),
        SnapKV(budget=12, window=4, kernel_size=3, evict="after_prompt"),
        H2O(budget=14),
        kvpress.policies.AdaKV(SnapKV(budget=0.4, window=4, kernel_size=3)),
        kvpress.policies.StreamingLLM(sink=2, recent=9),
    ],
    ids=lambda policy: policy.describe(),
)
def test_what_eviction_leaves(model, monkeypatch, policy):
    monkeypatch.setattr(inspection, "LAST", 5)
    ids = prompt(N)
    found = kvpress.inspect(model, policy, ids, cells=9)
    assert (found.prompt, found.last, found.cell) == ({}, 5, 8)
    with torch.no_grad(), kvpress.patch(model, policy):
        cache = model(torch.tensor([ids]), use_cache=True)[CACHE]
        for layer in cache.layers:
            layer.settle()
        left = [layer.storage.positions[0].tolist() for layer in cache.layers]
    for layer, weights in enumerate(exact_weights(model, ids)):
        heads = len(weights)
        reads = found.after[layer]
        for head in range(heads):
            kept = sorted(at for at in left[layer][head * 2 // heads] if at >= 0)
            assert reads.density[head].item() == pytest.approx(len(kept) / N)
            assert reads.recall[head].item() == pytest.approx(weights[head, -5:, kept].sum().item() / 5, abs=1e-5)
            for cell in range(7):
                inside = [at for at in kept if at // 8 == cell]
                width = len(range(N)[8 * cell : 8 * cell + 8])
                assert reads.kept[head, 0, cell].item() == pytest.approx(len(inside) / width)
                assert reads.mass[head, 0, cell].item() == pytest.approx(
                    weights[head, -5:, 8 * cell : 8 * cell + 8].sum().item() / 5, abs=1e-5
                )


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_soft_capping_and_sinks(monkeypatch, name):
    """Soft-capped scores; a sink takes part in the softmax, and the shares are of what is left for the entries."""
    monkeypatch.setattr(inspection, "LAST", 5)
    model = tiny_family(name)
    ids = prompt(30)
    policy = kvpress.policies.StreamingLLM(sink=2, recent=9, rope="original")
    found = kvpress.inspect(model, policy, ids)
    weights = exact_weights(model, ids)
    assert found.after
    for layer, reads in found.after.items():
        rows = weights[layer][:, -5:]
        kept = rows[..., [0, 1, *range(21, 30)]].sum(-1) / rows.sum(-1)
        torch.testing.assert_close(reads.recall.float(), kept.mean(1), atol=1e-5, rtol=0)


def test_two_roles_at_once(model):
    policies = [PREFILL[0], SnapKV(budget=0.4, window=4, kernel_size=3)]
    found = kvpress.inspect(model, policies, torch.tensor([prompt(N)]))
    assert set(found.prompt) == set(found.after) == {0, 1, 2}
    shown = str(found)
    assert "read by the 53 rows" in shown
    assert "its last 53 rows" in shown
    least = found.prompt[1].recall.min().item()
    assert f"{least:.1%}" in shown
    figures = found.to_dict()
    assert figures["prompt"][1] == {
        "layer": 1,
        "density": found.prompt[1].density.tolist(),
        "recall": found.prompt[1].recall.tolist(),
    }


def test_the_model_is_as_it_was(model):
    ids = torch.tensor([prompt(N)])
    with torch.no_grad():
        before = model(ids).logits
        kvpress.inspect(model, PREFILL[0], ids)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("policy", "ids", "words"),
    [
        (Quest(budget=16), prompt(9), ["quest", "nothing to inspect", "x_attention"]),
        (kvpress.policies.Full(), prompt(9), ["full", "nothing to inspect"]),
        (LazyLLM(), prompt(9), ["lazy_llm", "leaves tokens"]),
        (XAttention(min_len=60), prompt(53), ["53 tokens", "min_len=60", "longer"]),
        (PREFILL[0], [], ["empty"]),
        (PREFILL[0], [3], ["1 token", "at least 2"]),
        (PREFILL[0], [3, 999999], ["999999", "ids from 0"]),
        (PREFILL[0], [[3, 4], [5, 6]], ["2 sequences", "one of them"]),
    ],
)
def test_bad_input(model, policy, ids, words):
    with pytest.raises(kvpress.PolicyError) as raised:
        kvpress.inspect(model, policy, ids)
    assert all(word in str(raised.value) for word in words), raised.value
    kvpress.patch(model, "full").unpatch()


def test_bad_cells(model):
    with pytest.raises(kvpress.PolicyError, match="cells=0"):
        kvpress.inspect(model, PREFILL[0], prompt(9), cells=0)
