"""nearest_centre against its reference and a float64 loop."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpress.kernels import nearest_centre as module
from kvpress.kernels.nearest_centre import nearest_centre, nearest_centre_reference

BATCH, KV_HEADS, DIM = 2, 3, 8
RAW = pytest.mark.parametrize("raw_product", [False, True], ids=["clamped", "raw"])


def inputs(n=23, k=7, m=12, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, KV_HEADS, n, DIM, generator=generator).to(dtype)
    slots = torch.stack([torch.randperm(n, generator=generator) for _ in range(BATCH * KV_HEADS)])
    slots = slots.view(BATCH, KV_HEADS, n)
    is_centre = torch.rand(BATCH, KV_HEADS, k, generator=generator) < 0.8
    return keys, values, slots[..., :k], is_centre, slots[..., k : k + m]


def brute(keys, values, centres, is_centre, rest, raw_product):
    """The largest product of cosines of each, and all products, in float64."""
    products = torch.full((*rest.shape, centres.shape[2]), float("-inf"), dtype=torch.float64)
    for b in range(BATCH):
        for head in range(KV_HEADS):
            for i, slot in enumerate(rest[b, head].tolist()):
                for j, centre in enumerate(centres[b, head].tolist()):
                    if is_centre[b, head, j]:
                        pairs = [(x[b, head, slot].double(), x[b, head, centre].double()) for x in (keys, values)]
                        factors = [(x @ y / (x.norm() * y.norm())).item() for x, y in pairs]
                        if not raw_product:
                            factors = [max(0.0, factor) for factor in factors]
                        products[b, head, i, j] = factors[0] * factors[1]
    return products


@RAW
@pytest.mark.parametrize(("n", "k", "m"), [(23, 7, 12), (2, 1, 1), (40, 3, 37), (9, 8, 1), (9, 8, 0)], ids=str)
@pytest.mark.parametrize("tile", [1, 60, 1 << 22], ids=["single-tiles", "small-tiles", "one-tile"])
def test_equals_the_definition(n, k, m, tile, raw_product, monkeypatch):
    monkeypatch.setattr(module, "TILE_SIMILARITIES", tile)
    arguments = inputs(n, k, m)
    products = brute(*arguments, raw_product)
    for function in (nearest_centre, nearest_centre_reference):
        place, similarity = function(*arguments, raw_product=raw_product)
        best = products.amax(-1)
        torch.testing.assert_close(similarity, best.float(), rtol=1e-5, atol=1e-6)
        found = products.gather(-1, place[..., None])[..., 0]
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_first_centre():
    """Clamped cosines are often 0 for every centre: then it is the first that is one."""
    keys = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0], [-1.0, 1.0], [-2.0, 0.0]]]])
    centres, rest = torch.tensor([[[3, 1, 2]]]), torch.tensor([[[0]]])
    for is_centre, expected in (([True, True, True], 0), ([False, True, True], 1)):
        for function in (nearest_centre, nearest_centre_reference):
            place, similarity = function(keys, keys, centres, torch.tensor([[is_centre]]), rest)
            assert (place.item(), similarity.item()) == (expected, 0.0)


def test_opposite_keys_and_values():
    """Two negative cosines: a product of 1 as they are, 0 when each is at least 0."""
    keys = torch.tensor([[[[1.0, 0.0], [-1.0, 0.0]]]])
    centres, rest, is_centre = torch.tensor([[[1]]]), torch.tensor([[[0]]]), torch.tensor([[[True]]])
    assert nearest_centre(keys, keys, centres, is_centre, rest)[1].item() == 0
    assert nearest_centre(keys, keys, centres, is_centre, rest, raw_product=True)[1].item() == 1


def test_no_centre_at_all():
    keys, values, centres, _, rest = inputs()
    _, similarity = nearest_centre(keys, values, centres, torch.zeros(centres.shape, dtype=torch.bool), rest)
    assert similarity.isneginf().all()


def test_bfloat16_is_computed_in_float32():
    arguments = inputs(dtype=torch.bfloat16)
    best = brute(*arguments, False).amax(-1)
    torch.testing.assert_close(nearest_centre(*arguments)[1], best.float(), rtol=1e-5, atol=1e-6)


def test_zeros_are_like_nothing():
    """A key of zeros has no direction: similarity 0, never NaN."""
    keys, values, centres, is_centre, rest = inputs()
    keys[:, :, rest[0, 0, 0]] = 0
    for function in (nearest_centre, nearest_centre_reference):
        assert not function(keys, values, centres, is_centre, rest)[1].isnan().any()


def test_few_operations_where_each_is_a_launch():
    """A layer of 131,072 tokens at batch 8, of which a tenth stay: on a device other than a CPU, with tensors without numbers."""

    class Counted(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            return func(*args, **(kwargs or {}))

    keys = torch.empty(8, 8, 131072, 128, dtype=torch.bfloat16, device="meta")
    centres = torch.empty(8, 8, 13107, dtype=torch.int64, device="meta")
    rest = torch.empty(8, 8, 117965, dtype=torch.int64, device="meta")
    with Counted() as counted:
        place, similarity = nearest_centre(keys, keys, centres, torch.empty_like(centres, dtype=torch.bool), rest)
    assert place.shape == similarity.shape == rest.shape
    assert 0 < counted.operations < 20_000
