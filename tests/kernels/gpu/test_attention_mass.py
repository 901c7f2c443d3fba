"""What only the Triton kernels of attention_mass do: splits, strides, noise made on the device; ../test_attention_mass.py
has what both paths do."""

import pytest
import torch

from kvpress.kernels.attention_mass import Perturbation, attention_mass, attention_mass_reference
from kvpress.kernels.gpu import attention_mass as gpu
from support.accelerator import DEVICE
from support.brute import attend

# NumPy, in the interpreter, says so where a logarithm of zero is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")

CPU = torch.device("cpu")
BATCH, KV_HEADS = 2, 2
NOISE = {
    "plain": None,
    "temperature": Perturbation(1.7),
    "noise": Perturbation(1.0, seed=3, layer=2),
    "noise-and-temperature": Perturbation(0.8, seed=5, layer=1, fresh=False),
}


def inputs(rows, entries, group, head_dim=16, dtype=torch.float32, seed=0):
    """Entries in any order, some slots empty; rows at random positions, the first of sequence 0 padding."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, KV_HEADS * group, rows, head_dim, generator=generator).to(DEVICE, dtype)
    key = torch.randn(BATCH, KV_HEADS, entries, head_dim, generator=generator).to(DEVICE, dtype)
    order = [torch.randperm(2 * entries, generator=generator)[:entries] for _ in range(BATCH * KV_HEADS)]
    positions = torch.stack(order).view(BATCH, KV_HEADS, entries).int()
    at = torch.randint(2 * entries, (BATCH, rows), generator=generator).int()
    positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    at[0, 0] = -1
    return query, at.to(DEVICE), key, positions.to(DEVICE)


def in_order(rows, entries, group, head_dim=16, dtype=torch.float32):
    """Entry i at position i, the rows at the last positions."""
    query, _, key, _ = inputs(rows, entries, group, head_dim, dtype)
    places = torch.arange(entries, dtype=torch.int32, device=DEVICE)
    return query, places[entries - rows :].expand(BATCH, rows), key, places.expand(BATCH, KV_HEADS, entries)


def visibility(at, positions):
    """Bool [batch, kv_heads, rows, n]: an entry is seen by the rows at its position and after."""
    places = positions[:, :, None].cpu()
    return (places >= 0) & (places <= at[:, None, :, None].cpu())


def exact(query, at, key, positions, **chosen):
    """The loop in float64, without noise or weights."""
    query, key = query.cpu(), key.cpu()
    return attend(query, key, key, visibility(at, positions), **chosen)[1].float().to(DEVICE)


@pytest.mark.parametrize("features", [("softcap",), ("sinks",), ("softcap", "sinks")], ids="+".join)
@pytest.mark.parametrize("splits", [1, 3], ids="{}-splits".format)
def test_softcap_and_sinks(features, splits):
    """Each alone and both together; a sink counts once however many splits there are."""
    tensors = inputs(9, 111, 3)
    sinks = torch.randn(3 * KV_HEADS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    softcap, sinks = 1.5 if "softcap" in features else None, sinks if "sinks" in features else None
    mass = gpu.attention_mass(
        *tensors, scale=0.3, softcap=softcap, sinks=sinks, row_weights=None, perturbation=None, lse=None, splits=splits
    )
    chosen = {"softcap": softcap} | ({} if sinks is None else {"sinks": sinks.cpu()})
    torch.testing.assert_close(mass, exact(*tensors, scale=0.3, **chosen), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("splits", [1, 2, 4], ids="{}-splits".format)
def test_splits_change_nothing(splits):
    """Splits of the keys, some of which a row sees nothing of."""
    tensors = in_order(7, 111, 3)
    for positions in (None, tensors[3]):
        mass = gpu.attention_mass(
            *tensors[:3],
            positions,
            scale=0.3,
            softcap=None,
            sinks=None,
            row_weights=None,
            perturbation=None,
            lse=None,
            splits=splits,
        )
        torch.testing.assert_close(mass, exact(*tensors, scale=0.3), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("structural", [False, True], ids=["positions", "in-order"])
@pytest.mark.parametrize("weigh", [False, True], ids=["plain", "weighed"])
def test_noise_temperature_and_weights(noise, structural, weigh):
    """The same noise at the same places as the definition, on sinks and softcap, with a factor on each row."""
    query, at, key, positions = in_order(9, 40, 3) if structural else inputs(9, 40, 3)
    generator = torch.Generator().manual_seed(1)
    options = {
        "scale": 0.3,
        "softcap": 2.5,
        "sinks": torch.randn(3 * KV_HEADS, generator=generator).to(DEVICE),
        "row_weights": torch.rand(BATCH, 9, generator=generator).to(DEVICE) if weigh else None,
        "perturbation": NOISE[noise],
    }
    mass = attention_mass(query, at, key, None if structural else positions, backend="triton", **options)
    expected = attention_mass_reference(query, at, key, positions, **options)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("structural", [False, True], ids=["positions", "in-order"])
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sinks"])
def test_with_the_rows_lse(backend, structural, sink):
    """Given the LSE of the perturbed scores (and the sink) the result is the one that computes it."""
    query, at, key, positions = in_order(9, 63, 3) if structural else inputs(9, 63, 3)
    sinks = torch.randn(3 * KV_HEADS, generator=torch.Generator().manual_seed(1)).to(DEVICE) if sink else None
    scores = query.float() @ key.float().repeat_interleave(3, dim=1).transpose(-1, -2) * 0.3 / 1.7
    scores = scores.masked_fill(~visibility(at, positions).repeat_interleave(3, dim=1).to(DEVICE), float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(BATCH, -1, 9, 1)), dim=-1)
    options = {"scale": 0.3, "perturbation": Perturbation(1.7)}
    held = None if structural else positions
    mass = attention_mass(query, at, key, held, lse=scores.logsumexp(-1), backend=backend, **options)
    expected = attention_mass(query, at, key, held, sinks=sinks, backend="torch", **options)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=2e-6)


def test_strides():
    """A slice of a larger buffer whose rest is NaN, a transposed query, int64 positions."""
    query, at, key, positions = inputs(9, 63, 3)
    buffer = torch.full((BATCH, KV_HEADS, 80, 16), float("nan"), device=DEVICE)
    buffer[:, :, :63] = key
    held = torch.full((BATCH, KV_HEADS, 80), 3, device=DEVICE)
    held[:, :, :63] = positions
    view = query.transpose(1, 2).contiguous().transpose(1, 2)
    mass = attention_mass(view, at.long(), buffer[:, :, :63], held[:, :, :63], scale=0.3, backend="triton")
    torch.testing.assert_close(mass, attention_mass(query, at, key, positions, scale=0.3, backend="torch"))


def test_empty_slots_are_not_read():
    """NaN in K where a slot is empty reaches nothing."""
    query, at, key, positions = inputs(9, 63, 3)
    expected = attention_mass(query, at, key, positions, scale=0.3, backend="triton")
    key = key.masked_fill((positions < 0)[..., None], float("nan"))
    mass = attention_mass(query, at, key, positions, scale=0.3, backend="triton")
    assert torch.equal(mass, expected)


def test_a_temperature_on_the_device():
    """A tensor gives what the number gives."""
    query, at, key, positions = inputs(9, 63, 3)
    masses = [
        attention_mass(query, at, key, positions, scale=0.3, perturbation=Perturbation(one, seed=3), backend="triton")
        for one in (1.7, torch.tensor(1.7, device=DEVICE))
    ]
    torch.testing.assert_close(*masses)


def test_equal_inputs_give_equal_results():
    """To the bit."""
    tensors = inputs(9, 111, 3)
    first = attention_mass(*tensors, scale=0.3, backend="triton")
    assert torch.equal(first, attention_mass(*tensors, scale=0.3, backend="triton"))


def test_settings_follow_shapes():
    """Two waves of programs at most, no split of less than its share, and tiles that tl.dot takes."""
    assert gpu.split_count(131072, 8, CPU) == 33
    assert gpu.split_count(131072, 4096, CPU) == 1
    assert gpu.split_count(600, 1, CPU) == 2
    for packed in (1, 4, 100, 1 << 20):
        for chosen in (gpu.lse_config(packed, 80, 2, CPU), gpu.mass_config(packed, 80, 4, CPU)):
            assert 16 <= chosen.block_m <= 128 and chosen.block_n >= 16 and chosen.block_d == 128
