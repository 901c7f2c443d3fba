"""What only the Triton paged attention does: splits, many pages, launches; ../test_paged_attention.py has what both paths do."""

import pytest
import torch

from kvpress.kernels.gpu import paged_attention as gpu
from kvpress.kernels.paged_attention import list_pages, paged_attention, paged_attention_reference
from support.accelerator import DEVICE
from support.owned_pages import SPREADS, inputs, options

# NumPy, in the interpreter, says so where a logarithm of zero or an overflow to infinity is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow encountered in exp")

SPREAD = pytest.mark.parametrize("spread", SPREADS)
GROUPS = pytest.mark.parametrize("group", [1, 3, 8], ids="group-{}".format)
SPLITS = pytest.mark.parametrize("keys_per_split", [128, 16], ids=["long-splits", "short-splits"])


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
@GROUPS
@SPLITS
def test_splits(spread, group, keys_per_split, monkeypatch):
    """A kv head's entries in one piece and in several."""
    monkeypatch.setattr("kvpress.kernels.gpu.decode_attention.KEYS_PER_SPLIT", keys_per_split)
    assert_equals_the_definition(inputs(spread, 32, group), options(("sinks",), 3 * group))


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
