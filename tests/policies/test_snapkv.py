"""SnapKV by the spec's hand values (section 7.2)."""

import pytest
import torch

from kvpress.policies import SnapKV
from kvpress.policy import Entries, Quota
from support.brute import attend
from support.layers import HEAD_DIM, counted, feed, kept, new_layer, observe, row, step


def score(policy, mass, candidates):
    """The policy's scores of entries in position order, the first `candidates` of which compete."""
    n = mass.shape[-1]
    positions = torch.arange(n, dtype=torch.int32).expand(mass.shape)
    return policy.score(Entries(positions, positions < candidates, {"mass": mass}))


@pytest.mark.parametrize(
    ("kernel_size", "pooling", "expected"),
    [
        pytest.param(3, "max", [0.0, 9.0, 9.0, 9.0, 0.0], id="max-3"),
        pytest.param(3, "avg", [0.0, 3.0, 3.0, 3.0, 0.0], id="avg-3"),
        pytest.param(1, "max", [0.0, 0.0, 9.0, 0.0, 0.0], id="max-1"),
        pytest.param(1, "avg", [0.0, 0.0, 9.0, 0.0, 0.0], id="avg-1"),
    ],
)
def test_spec_pooling(kernel_size, pooling, expected):
    """[0, 0, 9, 0, 0] pooled, before a window whose own mass must not leak in."""
    policy = SnapKV(budget=6, window=2, kernel_size=kernel_size, pooling=pooling)
    scores = score(policy, row(0.0, 0.0, 9.0, 0.0, 0.0, 50.0, 70.0), candidates=5)
    torch.testing.assert_close(scores[..., :5], row(*expected))


def test_spec_defaults():
    """The authors' values."""
    policy = SnapKV()
    assert (policy.budget, policy.window, policy.kernel_size, policy.pooling) == (2048, 32, 5, "avg")


def oracle(mass, budget, window, kernel_size, pooling):
    """Section 7.2 with lists: pool what is before the window, take the best, keep the window."""
    n, half = len(mass), kernel_size // 2
    if n <= budget:
        return list(range(n))
    padding = 0.0 if pooling == "avg" else float("-inf")
    padded = [padding] * half + mass[: n - window] + [padding] * half
    windows = [padded[at : at + kernel_size] for at in range(n - window)]
    pooled = [sum(w) / kernel_size if pooling == "avg" else max(w) for w in windows]
    ranked = sorted(range(n - window), key=lambda at: (-pooled[at], at))
    return sorted(ranked[: budget - window]) + list(range(n - window, n))


def attended(tokens, rows, seed):
    """Queries, keys and the attention mass that the last `rows` of the rows give, by the float64 loop."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(2, 6, tokens, HEAD_DIM, generator=generator)
    key = torch.randn(2, 2, tokens, HEAD_DIM, generator=generator)
    visible = torch.zeros(2, 2, rows, tokens, dtype=torch.bool)
    for index in range(rows):
        visible[:, :, index, : tokens - rows + index + 1] = True
    return query, key, attend(query[:, :, tokens - rows :], key, key, visible, scale=0.5)[1]


@pytest.mark.parametrize("tokens", [8, 9, 31], ids="{}-tokens".format)
@pytest.mark.parametrize("window", [1, 3, 7], ids="window-{}".format)
@pytest.mark.parametrize("kernel_size", [1, 3, 5], ids="kernel-{}".format)
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_prompt_against_lists(tokens, window, kernel_size, pooling):
    """The kept sets of a group of three, from the queries on."""
    policy = SnapKV(budget=8, window=window, kernel_size=kernel_size, pooling=pooling)
    query, key, mass = attended(tokens, window, seed=tokens)
    layer = new_layer(policy, scale=0.5)
    passed = feed(layer, tokens, batch=2, kv_heads=2)
    layer.keys[:, :, :tokens] = key
    observe(layer, query, passed)
    layer.close_prompt(passed)
    for b in range(2):
        for head in range(2):
            assert kept(layer, b, head) == oracle(mass[b, head].tolist(), 8, window, kernel_size, pooling)


def test_all_rows_without_pooling_are_column_sums():
    """The window of all rows and kernel size 1 ranks by plain column sums (section 8.1, 4)."""
    query, key, mass = attended(9, 9, seed=1)
    policy = SnapKV(budget=0.5, window=9, kernel_size=1)
    layer = new_layer(policy, scale=0.5)
    tokens = feed(layer, 9, batch=2, kv_heads=2)
    layer.keys[:, :, :9] = key
    observe(layer, query, tokens)
    torch.testing.assert_close(counted(layer)["mass"], mass.float())
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), 9 * 3.0, dtype=torch.float64))


def test_decode_appends_and_never_evicts():
    """Prompt only: every new entry stays."""
    layer = snap(SnapKV(budget=5, window=2, kernel_size=1), 9)
    held = kept(layer)
    for seen in range(9, 30):
        step(layer)
        assert kept(layer) == [*held, *range(9, seen + 1)]


def snap(policy, count, layer=None, seed=0):
    """A prompt pass whose queries are random."""
    layer = new_layer(policy, scale=0.5) if layer is None else layer
    tokens = feed(layer, count, seed=seed)
    query = torch.randn(1, 2, count, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    observe(layer, query, tokens)
    layer.close_prompt(tokens)
    return layer


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1, 11], [11, 1], [4, 4, 4], [10, 2]], ids=str)
def test_u7_chunks_keep_what_one_pass_keeps(chunks):
    """U7: with evict="after_prompt" the last rows score, in whichever chunks they came."""
    query, key, mass = attended(12, 3, seed=7)
    policy = SnapKV(budget=6, window=3, kernel_size=3, evict="after_prompt")
    layer, seen = new_layer(policy, scale=0.5), 0
    for count in chunks:
        tokens = feed(layer, count, batch=2, kv_heads=2)
        layer.keys[:, :, seen : seen + count] = key[:, :, seen : seen + count]
        observe(layer, query[:, :, seen : seen + count], tokens, seen)
        layer.close_prompt(tokens)
        seen += count
    layer.settle()
    for b in range(2):
        for head in range(2):
            assert kept(layer, b, head) == oracle(mass[b, head].tolist(), 6, 3, 3, "avg")


def test_later_passes_compress_again():
    """A second turn's last rows score all that is still held; what steps added competes like the rest."""
    policy = SnapKV(budget=5, window=2, kernel_size=1)
    layer = snap(policy, 9)
    step(layer)
    before = set(kept(layer))
    snap(policy, 4, layer, seed=1)
    assert len(kept(layer)) == 5 and kept(layer)[-2:] == [12, 13]
    assert set(kept(layer)) <= before | {10, 11, 12, 13}


def test_only_the_rows_of_a_pass_score_it():
    """A second pass shorter than the window is scored by its own rows alone, not by those of the first."""
    query, key, _ = attended(11, 2, seed=3)
    policy = SnapKV(budget=6, window=3, kernel_size=1)
    layer = new_layer(policy, scale=0.5)
    for start, stop in [(0, 9), (9, 11)]:
        tokens = feed(layer, stop - start, batch=2, kv_heads=2)
        for slot in range(layer.length - (stop - start), layer.length):
            layer.keys[:, :, slot] = key[:, :, layer.positions[0, 0, slot]]
        held = layer.positions[:, :, : layer.length].tolist()
        observe(layer, query[:, :, start:stop], tokens, start)
        layer.close_prompt(tokens)
    for b in range(2):
        for head in range(2):
            places = held[b][head]
            rows = query[b : b + 1, 3 * head : 3 * head + 3, 9:]
            keys = key[b, head, places][None, None]
            visible = torch.tensor([[[[place <= at for place in places] for at in (9, 10)]]])
            mass = attend(rows, keys, keys, visible, scale=0.5)[1].flatten().tolist()
            chosen = oracle(mass, 6, 3, 1, "avg")
            assert kept(layer, b, head) == [places[index] for index in chosen]


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({"budget": 64}, 100, 64, 32, id="int"),
        pytest.param({"budget": 33}, 100, 33, 32, id="one-beside-the-window"),
        pytest.param({"budget": 0.5}, 100, 50, 32, id="share"),
        pytest.param({"budget": 0.29, "window": 8}, 100, 29, 8, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2}, 100, 20, 20, id="share-smaller-than-the-window"),
        pytest.param({"budget": 0.2}, 3, 1, 1, id="share-of-a-short-prompt"),
        pytest.param({"budget": 1.0}, 7, 7, 7, id="everything"),
    ],
)
def test_quota(fields, tokens, total, recent):
    """How many stay, and how many of them are the window."""
    assert SnapKV(**fields).quota(tokens, 0, 1) == Quota(total, recent)


def test_share_smaller_than_the_window_keeps_the_newest():
    """A short prompt under a share: the last entries alone."""
    assert kept(snap(SnapKV(budget=0.5, window=8), 10)) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel_size", [3, 5, 63], ids="kernel-{}".format)
def test_pooling_stays_on_the_candidates(pooling, kernel_size):
    """The window's mass never reaches the candidates, whatever the kernel's width."""
    policy = SnapKV(budget=40, window=4, kernel_size=kernel_size, pooling=pooling)
    mass = torch.rand(1, 1, 40, generator=torch.Generator().manual_seed(0))
    loud = mass.clone()
    loud[..., 36:] = 1e6
    quiet, other = score(policy, mass, 36)[..., :36], score(policy, loud, 36)[..., :36]
    torch.testing.assert_close(other, quiet)
    padding, half = (0.0 if pooling == "avg" else float("-inf")), kernel_size // 2
    padded = [padding] * half + mass[0, 0, :36].tolist() + [padding] * half
    windows = [padded[at : at + kernel_size] for at in range(36)]
    expected = [sum(w) / kernel_size if pooling == "avg" else max(w) for w in windows]
    torch.testing.assert_close(quiet, row(*expected))
