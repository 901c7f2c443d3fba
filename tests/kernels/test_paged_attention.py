"""paged_attention on both paths against its reference and a float64 loop over each kv head's entries.

gpu/test_paged_attention.py has what only the Triton kernels do.
"""

import pytest
import torch

from kvpress.kernels.paged_attention import list_pages, paged_attention, paged_attention_reference
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on
from support.brute import attend, eager
from support.owned_pages import KV_HEADS, SPREADS, inputs, options

# NumPy, in Triton's interpreter, says so where a logarithm of zero or an overflow to infinity is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

SPREAD = pytest.mark.parametrize("spread", SPREADS)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
PAGE_SIZES = pytest.mark.parametrize("page", [1, 5, 32], ids="page-{}".format)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256], ids="d-{}".format)
FEATURES = pytest.mark.parametrize(
    "features", [(), ("softcap",), ("sinks",), ("softcap", "sinks")], ids=lambda names: "+".join(names) or "plain"
)


# What empty slots hold: the torch path needs finite numbers there.
EMPTY = {"torch": 1e4, "triton": float("nan")}


def attended(backend, tensors, kv_heads=KV_HEADS, scale=0.3, **chosen):
    """Output and mass, on the CPU, of tensors that go where the path runs."""
    chosen = dict(zip(chosen, on(backend, *chosen.values()), strict=True))
    results = paged_attention(*on(backend, *tensors), kv_heads=kv_heads, scale=scale, **chosen, backend=backend)
    return tuple(x if x is None else x.cpu() for x in results)


def loops(tensors, page, features):
    """Output and mass of every kv head over the entries of its pages: a float64 loop on those alone."""
    query, key, value, owner, valid = tensors
    group, chosen = query.shape[1] // KV_HEADS, options(features, query.shape[1])
    output, mass = torch.zeros(query.shape, dtype=torch.float64), torch.zeros(valid.shape, dtype=torch.float64)
    for b in range(len(query)):
        for head in range(KV_HEADS):
            slots = [s for s in range(valid.shape[1]) if owner[b, s // page] == head and valid[b, s]]
            if not slots:
                continue
            heads = slice(head * group, (head + 1) * group)
            own = {**chosen, "sinks": chosen["sinks"][heads]} if "sinks" in chosen else chosen
            visible = torch.ones(1, 1, 1, len(slots), dtype=torch.bool)
            entries = (x[b, slots][None, None] for x in (key, value))
            found, weights = attend(query[b : b + 1, heads], *entries, visible, scale=0.3, **own)[:2]
            output[b, heads], mass[b, slots] = found[0], weights[0, 0]
    return output, mass


@BACKENDS
@SPREAD
@PAGE_SIZES
@FEATURES
@GROUPS
def test_equals_the_definition(spread, page, features, group, backend):
    """Output and mass, whatever is in slots that are not read; a head without entries gives zeros."""
    tensors = inputs(spread, page, group, empty_slots=EMPTY[backend])
    chosen = options(features, KV_HEADS * group)
    found = attended(backend, tensors, **chosen, with_mass=True)
    definition = paged_attention_reference(*tensors, kv_heads=KV_HEADS, scale=0.3, **chosen)
    for ours, theirs, exact in zip(found, definition, loops(tensors, page, features), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
    output, mass = attended(backend, tensors, **chosen)
    assert mass is None and torch.equal(output, found[0])


@BACKENDS_AND_DTYPES
@HEAD_DIMS
def test_is_as_precise_as_eager_attention(head_dim, dtype, backend):
    """Each kv head's error against float64 is at most twice that of eager attention in the same precision."""
    query, key, value, owner, valid = inputs("uneven", 5, 3, head_dim, dtype, EMPTY[backend])
    output, mass = attended(backend, (query, key, value, owner, valid), with_mass=True)
    assert output.dtype == dtype and output.shape == query.shape
    errors, floor = [], 8 * torch.finfo(torch.float32).eps * value[valid].abs().max().double()
    for head in range(KV_HEADS):
        slots = ((owner[0].repeat_interleave(5) == head) & valid[0]).nonzero().flatten()
        own = query[:1, 3 * head : 3 * head + 3], *(x[:1, None, slots] for x in (key, value))
        visible = torch.ones(1, 1, 1, len(slots), dtype=torch.bool)
        exact, _ = attend(*own, visible, scale=0.3)
        found = output[:1, 3 * head : 3 * head + 3].double()
        textbook = eager(*own, visible, scale=0.3).double()
        errors.append(((found - exact).abs().max().item(), (textbook - exact).abs().max().item()))
        torch.testing.assert_close(mass[0, slots].sum(), torch.tensor(3.0), atol=1e-5, rtol=0)
    ours, theirs = (max(column) for column in zip(*errors, strict=True))
    assert ours <= 2 * theirs + floor


@BACKENDS
def test_scores_far_apart(backend):
    """A head whose scores are all far below another's is not lost, and scores in the thousands do not overflow."""
    query = torch.tensor([[[[9000.0]], [[-9000.0]], [[0.0]]]])
    key, value = torch.tensor([[[1.0], [0.9], [2.0], [1.0]]]), torch.tensor([[[1.0], [5.0], [7.0], [9.0]]])
    owner, valid = torch.tensor([[0, 1]]), torch.ones(1, 4, dtype=torch.bool)
    output, mass = attended(backend, (query, key, value, owner, valid), with_mass=True)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 9.0, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(mass, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), atol=1e-4, rtol=0)


@BACKENDS
@pytest.mark.parametrize("group", [1, 3])
def test_order_of_pages_means_nothing(group, backend):
    query, key, value, owner, valid = inputs("uneven", 5, group, empty_slots=EMPTY[backend])
    pages = owner.shape[1]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
    slots = (order[:, None] * 5 + torch.arange(5)).flatten()
    mixed = query, key[:, slots], value[:, slots], owner[:, order], valid[:, slots]
    one, two = (attended(backend, tensors)[0] for tensors in ((query, key, value, owner, valid), mixed))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


@BACKENDS
@pytest.mark.parametrize("kv_heads", [3, 5])
def test_pages_of_each_head_side_by_side(kv_heads, backend):
    """By a loop over heads; some of the five own none."""
    owner = inputs("uneven", 1, 1)[3]
    order, starts = (x.cpu() for x in list_pages(*on(backend, owner), kv_heads, backend=backend))
    assert order.dtype == starts.dtype == torch.int32
    for b, row in enumerate(owner.tolist()):
        for head in range(kv_heads):
            pages = order[b, starts[b, head] : starts[b, head + 1]].tolist()
            assert pages == [page for page, own in enumerate(row) if own == head]
        assert starts[b, -1] == owner.shape[1]


@BACKENDS
def test_kept_lists_change_nothing(backend):
    tensors = on(backend, *inputs("uneven", 5, 4, empty_slots=EMPTY[backend]))
    expected = attended(backend, tensors, with_mass=True)
    found = attended(backend, tensors, with_mass=True, lists=list_pages(tensors[3], KV_HEADS, backend=backend))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
