"""The density that a report gives: pairs that were computed over pairs that there were, counted one by one."""

import pytest
import torch

import kvpress
from kvpress.kernels.block_sparse_attention import listed_keys
from kvpress.kernels.skip_attention import skip_attention_reference
from kvpress.policies import (
    FlexPrefill,
    Full,
    GemFilter,
    HiP,
    InfiniteHiP,
    MInference,
    SkipSoftmax,
    SnapKV,
    TokenSelect,
    XAttention,
)
from support.matrix import prompt, sharp_llama
from support.reads import run

SPARSE = [
    XAttention(stride=2, threshold=0.5, block_size=4),
    HiP(k=4, window=3, sink=1, block_size=4, key_block_size=2, dense_layers=0),
    FlexPrefill(gamma=0.6, tau=0.25, min_budget=2, block_size=2),
    MInference(default=["vertical_slash", 2, 4], sink=1, recent=2, probe=4, block_size=4),
    MInference(default=["vertical_slash", 2, 4], expand="exact", sink=1, recent=2, probe=4, block_size=4),
]
PASSES = [prompt(26), [3], [4], prompt(13, 2)]


@pytest.fixture
def model():
    return sharp_llama(layers=2)


@pytest.fixture
def counted(monkeypatch):
    """For each call of the kernel: pairs that it computes, of all heads, rows in front of the first block left out."""
    calls = []
    original = kvpress.prompt.block_sparse_attention

    def recorded(query, key, value, *, block_size, **options):
        lists = {name: options[name] for name in ("blocks", "columns", "diagonals", "distances")}
        rows, n, heads = query.shape[2], key.shape[2], query.shape[1]
        skip = int((query == 0).all(-1).all(1)[0].sum())
        sizes = {"block_size": block_size, "key_block_size": options["key_block_size"]}
        mask = listed_keys(rows, n, heads, **sizes, **lists)[:, :, skip:]
        calls.append((mask.sum().item(), heads))
        return original(query, key, value, block_size=block_size, **options)

    monkeypatch.setattr(kvpress.prompt, "block_sparse_attention", recorded)
    return calls


def causal(rows, entries):
    return rows * (entries - rows) + rows * (rows + 1) / 2


@pytest.mark.parametrize("policy", SPARSE, ids=lambda policy: policy.describe()[:60])
def test_what_was_listed(model, policy, counted):
    """Over a prompt and a second turn that begins inside of a block, layer by layer; steps do not count."""
    _, _, report = run(model, policy, PASSES)
    assert len(counted) == 4  # two passes of two layers
    there = causal(26, 26) + causal(13, 41)
    for layer in range(2):
        computed = sum(pairs / heads for pairs, heads in counted[layer::2])
        assert report.layers[layer].density == pytest.approx(computed / there)
    assert report.total.density == pytest.approx(sum(pairs / heads for pairs, heads in counted) / (2 * there))
    assert 0 < report.total.density < 0.95
    assert report.to_dict()["density"] == report.total.density and f"{report.total.density:.1%}" in str(report)


def test_padded_sequences(model, counted):
    """Each sequence counts its own tokens."""
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :8] = 0
    _, _, report = run(model, SPARSE[0], [[[0] * 8 + prompt(16, 4), prompt(24, 5)]], mask)
    computed = sum(pairs / heads for pairs, heads in counted)
    assert report.total.density == pytest.approx(computed / (2 * (causal(16, 16) + causal(24, 24))))


def test_what_is_exact(model):
    """Without a prefill policy, below `min_len`, and before a prompt."""
    for policy in (Full(), SnapKV(budget=14, window=4, kernel_size=3), XAttention(min_len=100), FlexPrefill()):
        assert run(model, policy, PASSES)[2].total.density == 1


def test_behind_eviction(model, counted):
    """Of the second turn the entries that are held."""
    _, _, report = run(model, [SPARSE[0], SnapKV(budget=14, window=4, kernel_size=3, evict="each_pass")], PASSES)
    computed = sum(pairs / heads for pairs, heads in counted)
    assert report.total.density == pytest.approx(computed / (2 * (causal(26, 26) + causal(13, 14 + 2 + 13))))


def test_skipped_tiles(model):
    """Chunks of 4 rows by the kernel's own reference, in a prompt and a second turn."""
    layers = kvpress.record_prompt(model, torch.tensor([prompt(26)])).layers
    _, _, report = run(model, SkipSoftmax(scale=7, tile=4), [prompt(26)])
    query, key, value, scores = layers[0]  # the second layer's are those of what the first one skipped
    *_, skipped = skip_attention_reference(query, key, value, scale=scores.scale, skip=7 / 26, tile=4)
    assert report.layers[0].density == pytest.approx(1 - skipped.sum().item() / (4 * causal(26, 26)))
    assert 0.1 < report.total.density < 0.95


def test_token_select(model):
    """Chunks of 4 rows: 2 first, 5 last (the chunk among them) and 4 chosen entries."""
    policy = TokenSelect(n_init=2, n_local=5, k=4, chunk=4)
    _, _, report = run(model, policy, [prompt(26)])
    computed = there = 0
    for start in range(0, 26, 4):
        rows = min(4, 26 - start)
        there += causal(rows, start + rows)
        computed += causal(rows, min(start + rows, 2 + 5 + 4))
    assert report.total.density == pytest.approx(computed / there)


@pytest.mark.parametrize("extend", [False, True])
def test_infinite_hip(model, extend):
    """Blocks of 4 rows: 2 first, 3 before the block, 4 found entries and the block; the second turn begins a block of its own."""
    policy = InfiniteHiP(
        n_sink=2, n_stream=3, l_c=(8, 1), k=(16, 4), early_k=4, refresh=(1, 1), block_size=4, extend=extend
    )
    _, _, report = run(model, policy, PASSES)
    computed = there = 0
    for first, count in ((0, 26), (28, 13)):
        for start in range(0, count, 4):
            rows = min(4, count - start)
            there += causal(rows, first + start + rows)
            computed += causal(rows, min(first + start, 2 + 3 + 4) + rows)
    assert report.total.density == pytest.approx(computed / there)


def test_beside_a_cut_prompt(model, counted):
    """What never reached a layer is no pair of it."""
    _, _, report = run(model, [GemFilter(k=20, r=0), SPARSE[0]], [prompt(20)])
    assert report.total.density == pytest.approx(sum(pairs / heads for pairs, heads in counted) / (2 * causal(20, 20)))
