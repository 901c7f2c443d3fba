"""paged_attention against its reference and a float64 loop over each kv head's entries."""

import pytest
import torch

from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.paged_attention import list_pages, paged_attention, paged_attention_reference
from support.brute import attend

BATCH, KV_HEADS, PAGES = 2, 3, 7
PAGE_SIZES = pytest.mark.parametrize("page", [1, 5, 32], ids="page-{}".format)
GROUPS = pytest.mark.parametrize("group", [1, 4], ids="group-{}".format)
FEATURES = pytest.mark.parametrize("features", [(), ("softcap",), ("sinks",), ("softcap", "sinks")], ids=str)


def inputs(page, group, dtype=torch.float32, head_dim=16):
    """Pages in any order of owners; the last sequence's last kv head owns pages without an entry; empty slots hold 1e4."""
    generator = torch.Generator().manual_seed(page + group)
    query = 2 * torch.randn(BATCH, KV_HEADS * group, 1, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, BATCH, PAGES * page, head_dim, generator=generator).to(dtype)
    owner = torch.tensor([[2, 0, 0, 1, 0, 2, 0], [1, 1, 2, 1, 0, 1, 2]])
    valid = torch.rand(BATCH, PAGES * page, generator=generator) < 0.7
    valid[:, :: page * PAGES // 3 or 1] = True
    valid[1, owner[1].repeat_interleave(page) == 2] = False
    key[~valid] = value[~valid] = 1e4
    return query, key, value, owner, valid


def options(features, heads):
    sinks = torch.linspace(-1, 2, heads)
    return {name: value for name, value in {"softcap": 1.5, "sinks": sinks}.items() if name in features}


@PAGE_SIZES
@GROUPS
@FEATURES
def test_against_loops(page, group, features):
    """Every kv head attends the entries of its pages: the float64 loop on those alone, and the reference."""
    query, key, value, owner, valid = inputs(page, group)
    chosen = options(features, query.shape[1])
    output, mass = paged_attention(
        query, key, value, owner, valid, kv_heads=KV_HEADS, scale=0.3, with_mass=True, **chosen
    )
    expected, expected_mass = paged_attention_reference(
        query, key, value, owner, valid, kv_heads=KV_HEADS, scale=0.3, **chosen
    )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass, expected_mass, atol=1e-5, rtol=1e-5)
    assert not mass[~valid].any()
    for b in range(BATCH):
        for head in range(KV_HEADS):
            slots = [s for s in range(PAGES * page) if owner[b, s // page] == head and valid[b, s]]
            heads = slice(head * group, (head + 1) * group)
            if not slots:
                assert not output[b, heads].any()
                continue
            own = {**chosen, "sinks": chosen["sinks"][heads]} if "sinks" in chosen else chosen
            visible = torch.ones(1, 1, 1, len(slots), dtype=torch.bool)
            entries = (x[b, slots][None, None] for x in (key, value))
            exact, weights = attend(query[b : b + 1, heads], *entries, visible, scale=0.3, **own)[:2]
            torch.testing.assert_close(output[b : b + 1, heads].double(), exact, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mass[b, slots].double(), weights[0, 0], atol=1e-5, rtol=1e-5)


@GROUPS
def test_bfloat16_is_as_precise_as_decode_attention(group):
    """Heads of equal numbers of entries: the error against float64 is at most twice that of the rectangle."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, 2 * group, 1, 64, generator=generator).bfloat16()
    key, value = torch.randn(2, BATCH, 2, 96, 64, generator=generator).bfloat16()
    exact = attend(query, key, value, torch.ones(BATCH, 2, 1, 96, dtype=torch.bool), scale=0.125)[0]
    owner = torch.tensor([0, 0, 0, 1, 1, 1]).expand(BATCH, -1)
    valid = torch.ones(BATCH, 192, dtype=torch.bool)
    rows = (x.flatten(1, 2) for x in (key, value))
    output, mass = paged_attention(query, *rows, owner, valid, kv_heads=2, scale=0.125)
    rectangle = decode_attention(query, key, value, scale=0.125)[0]
    assert output.dtype == torch.bfloat16 and mass is None
    assert (output.double() - exact).abs().max() <= 2 * (rectangle.double() - exact).abs().max()


def test_scores_far_apart():
    """A head whose scores are all far below another's is not lost, and large scores do not overflow."""
    query = torch.tensor([[[[300.0]], [[-300.0]]]])
    key, value = torch.tensor([[[1.0], [0.9], [2.0], [1.0]]]), torch.tensor([[[1.0], [5.0], [7.0], [9.0]]])
    owner, valid = torch.tensor([[0, 1]]), torch.ones(1, 4, dtype=torch.bool)
    output, mass = paged_attention(query, key, value, owner, valid, kv_heads=2, scale=1.0, with_mass=True)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 9.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(mass, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("group", [1, 2])
def test_order_of_pages_means_nothing(group):
    query, key, value, owner, valid = inputs(5, group)
    order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(1))
    slots = (order[:, None] * 5 + torch.arange(5)).flatten()
    one, _ = paged_attention(query, key, value, owner, valid, kv_heads=KV_HEADS, scale=0.3)
    two, _ = paged_attention(
        query, key[:, slots], value[:, slots], owner[:, order], valid[:, slots], kv_heads=KV_HEADS, scale=0.3
    )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kv_heads", [3, 5])
def test_pages_of_each_head_side_by_side(kv_heads, backend):
    """By a loop over heads; some of the five own none."""
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (it is optional)")
    owner = inputs(1, 1)[3]
    order, starts = list_pages(owner, kv_heads, backend=backend)
    assert order.dtype == starts.dtype == torch.int32
    for b, row in enumerate(owner.tolist()):
        for head in range(kv_heads):
            pages = order[b, starts[b, head] : starts[b, head + 1]].tolist()
            assert pages == [page for page, own in enumerate(row) if own == head]
        assert starts[b, -1] == PAGES


def test_kept_lists_change_nothing():
    query, key, value, owner, valid = inputs(5, 4)
    options = {"kv_heads": KV_HEADS, "scale": 0.3, "with_mass": True}
    expected = paged_attention(query, key, value, owner, valid, **options)
    found = paged_attention(query, key, value, owner, valid, **options, lists=list_pages(owner, KV_HEADS))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
