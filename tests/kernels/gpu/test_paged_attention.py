"""The Triton paged attention against the reference and float64: pages spread evenly and not, empty heads, every feature."""

import pytest
import torch

from kvpress.kernels.gpu import paged_attention as gpu
from kvpress.kernels.paged_attention import list_pages, paged_attention, paged_attention_reference
from support.accelerator import DEVICE, DTYPES
from support.brute import attend, eager

# NumPy, in the interpreter, says so where a logarithm of zero or an overflow to infinity is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

# Kv heads' numbers of pages, one sequence after the other.
SPREADS = {
    "even": [[3, 3, 3], [3, 3, 3]],
    "one-has-all": [[0, 7, 0], [7, 0, 0]],
    "uneven": [[1, 9, 2], [2, 0, 10]],
    "one-page": [[0, 0, 1], [1, 0, 0]],
}
SPREAD = pytest.mark.parametrize("spread", SPREADS)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
PAGE_SIZES = pytest.mark.parametrize("page", [1, 5, 32], ids="page-{}".format)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256], ids="d-{}".format)
FEATURES = pytest.mark.parametrize(
    "features", [(), ("softcap",), ("sinks",), ("softcap", "sinks")], ids=lambda names: "+".join(names) or "plain"
)
SPLITS = pytest.mark.parametrize("keys_per_split", [128, 16], ids=["long-splits", "short-splits"])


def inputs(spread, page, group, head_dim=32, dtype=torch.float32):
    """Pages in any order; the second sequence's first head with pages has no entry in any; empty slots hold NaN."""
    counts = SPREADS[spread]
    generator = torch.Generator().manual_seed(page + group + head_dim)
    owner = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in counts])
    order = torch.rand(owner.shape, generator=generator).argsort(-1)
    owner, slots = owner.gather(1, order), owner.shape[1] * page
    query = 2 * torch.randn(2, 3 * group, 1, head_dim, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, slots, head_dim, generator=generator).to(dtype)
    valid = torch.rand(2, slots, generator=generator) < 0.7
    valid[0, -page] = True
    empty = next(head for head, count in enumerate(counts[1]) if count)
    valid[1, owner[1].repeat_interleave(page) == empty] = False
    key[~valid] = value[~valid] = float("nan")
    return query, key, value, owner, valid


def options(features, heads):
    sinks = torch.linspace(-1, 2, heads)
    return {name: x for name, x in {"softcap": 1.5, "sinks": sinks}.items() if name in features}


def on_device(*tensors, **chosen):
    """The Triton result, of tensors that go to the device and back."""
    chosen = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in chosen.items()}
    results = paged_attention(*(x.to(DEVICE) for x in tensors), kv_heads=3, scale=0.3, **chosen, backend="triton")
    return tuple(x if x is None else x.cpu() for x in results)


def assert_equals_the_definition(tensors, chosen):
    expected = paged_attention_reference(*tensors, kv_heads=3, scale=0.3, **chosen)
    found = on_device(*tensors, **chosen, with_mass=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    output, mass = on_device(*tensors, **chosen)
    assert mass is None and torch.equal(output, found[0])


@SPREAD
@PAGE_SIZES
@SPLITS
@FEATURES
def test_equals_the_definition(spread, page, keys_per_split, features, monkeypatch):
    """Output and mass, with NaN in every slot that is not read; a head without entries gives zeros."""
    monkeypatch.setattr("kvpress.kernels.gpu.decode_attention.KEYS_PER_SPLIT", keys_per_split)
    tensors = inputs(spread, page, 3)
    assert_equals_the_definition(tensors, options(features, 9))


@GROUPS
@SPLITS
def test_groups(group, keys_per_split, monkeypatch):
    monkeypatch.setattr("kvpress.kernels.gpu.decode_attention.KEYS_PER_SPLIT", keys_per_split)
    assert_equals_the_definition(inputs("uneven", 5, group), options(("sinks",), 3 * group))


@HEAD_DIMS
@DTYPES
def test_is_as_precise_as_torch(head_dim, dtype):
    """Each kv head's error against float64 is at most twice that of eager attention in the same precision."""
    query, key, value, owner, valid = inputs("uneven", 5, 3, head_dim, dtype)
    output, mass = on_device(query, key, value, owner, valid, with_mass=True)
    assert output.dtype == dtype and output.shape == query.shape
    errors, floor = [], 8 * torch.finfo(torch.float32).eps * value.nan_to_num().abs().max().double()
    for head in range(3):
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


@SPLITS
def test_many_pages(keys_per_split, monkeypatch):
    """More pages than are listed in one go, the heads' pages mixed."""
    monkeypatch.setattr("kvpress.kernels.gpu.decode_attention.KEYS_PER_SPLIT", keys_per_split)
    monkeypatch.setattr(gpu, "BLOCK_PAGES", 16)
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(3, (2, 70), generator=generator)
    query = torch.randn(2, 6, 1, 16, generator=generator)
    key, value = torch.randn(2, 2, 280, 16, generator=generator)
    valid = torch.rand(2, 280, generator=generator) < 0.9
    assert_equals_the_definition((query, key, value, owner, valid), {})


def test_results_in_memory_full_of_nan(monkeypatch):
    """Every number that is returned is written: buffers that start as NaN or with odd pages make no difference."""
    monkeypatch.setattr("kvpress.kernels.gpu.decode_attention.KEYS_PER_SPLIT", 16)
    tensors = inputs("uneven", 5, 3)
    expected = on_device(*tensors, with_mass=True)

    def full(x, *shape, **how):
        odd = float("nan") if how.get("dtype", x.dtype).is_floating_point else -(1 << 30)
        return x.new_full(shape, odd, **how)

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    for ours, before in zip(on_device(*tensors, with_mass=True), expected, strict=True):
        assert ours.equal(before)


def test_scores_far_apart():
    """A head whose scores are all far below another's is not lost, and scores in the thousands do not overflow."""
    query = torch.tensor([[[[9000.0]], [[-9000.0]], [[0.0]]]])
    key, value = torch.tensor([[[1.0], [0.9], [2.0], [1.0]]]), torch.tensor([[[1.0], [5.0], [7.0], [9.0]]])
    owner, valid = torch.tensor([[0, 1]]), torch.ones(1, 4, dtype=torch.bool)
    output, mass = on_device(query, key, value, owner, valid, with_mass=True)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 9.0, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(mass, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), atol=1e-4, rtol=0)


def test_launches_depend_on_shapes_alone(monkeypatch):
    """One owner of all pages, or pages spread evenly: the same grids, so that a CUDA graph can hold them."""

    class Grids:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in ("list_kernel", "pages_kernel", "merge_kernel", "weigh_kernel"):
        monkeypatch.setattr(gpu, name, Grids(getattr(gpu, name)))
    query, key, value, owner, valid = inputs("even", 5, 3)
    both = []
    for other in (owner, torch.zeros_like(owner)):
        grids = []
        on_device(query, key, value, other, valid, with_mass=True)
        both.append(grids)
    assert both[0] == both[1] and len(both[0]) == 4


def test_kept_lists_save_a_launch(monkeypatch):
    """And give the same."""
    query, key, value, owner, valid = inputs("uneven", 5, 3)
    expected = on_device(query, key, value, owner, valid, with_mass=True)
    lists = list_pages(owner.to(DEVICE), 3, backend="triton")
    monkeypatch.setattr(gpu, "list_kernel", None)
    found = on_device(query, key, value, owner, valid, with_mass=True, lists=lists)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
