"""attention_mass with noise and temperature (Keyformer), against hand values, its reference and float64."""

import math

import pytest
import torch

from kvpress.kernels import attention_mass as module
from kvpress.kernels.attention_mass import Perturbation, attention_mass, attention_mass_reference
from kvpress.kernels.decode_attention import decode_attention, decode_attention_reference
from kvpress.kernels.gumbel_noise import gumbel_noise

BATCH, KV_HEADS, GROUP, DIM = 2, 2, 3, 16
NOISES = [
    Perturbation(1.7, 3, 2),
    Perturbation(1.0, 3, 0, fresh=False),
    Perturbation(0.6, None),
    Perturbation(2.0, 1, 1, fresh=False),
]
ALL_NOISES = pytest.mark.parametrize("perturbation", NOISES, ids=["fresh", "per-token", "temperature", "both"])


def inputs(rows=9, entries=33, seed=0):
    """Entries in any order with holes; sequence 0 begins with a padding row."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, KV_HEADS * GROUP, rows, DIM, generator=generator)
    key = torch.randn(BATCH, KV_HEADS, entries, DIM, generator=generator)
    order = [torch.randperm(2 * entries, generator=generator)[:entries] for _ in range(BATCH * KV_HEADS)]
    positions = torch.stack(order).view(BATCH, KV_HEADS, entries).int()
    positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    at = torch.randint(2 * entries, (BATCH, rows), generator=generator).int()
    at[0, 0] = -1
    return query, at, key, positions


def brute(query, at, key, positions, scale, perturbation, softcap=None, sinks=None, row_weights=None):
    """Row by row in float64, with the noise of each place asked for alone."""
    mass = torch.zeros(key.shape[:3], dtype=torch.float64)
    heads = query.shape[1]
    for b in range(query.shape[0]):
        for head in range(heads):
            kv_head = head // (heads // key.shape[1])
            for row, place in enumerate(at[b].tolist()):
                seen = [i for i, held in enumerate(positions[b, kv_head].tolist()) if 0 <= held <= place]
                exponents = []
                for i in seen:
                    score = (query[b, head, row].double() @ key[b, kv_head, i].double()).item() * scale
                    score = score if softcap is None else softcap * math.tanh(score / softcap)
                    noise = 0.0
                    if perturbation.seed is not None:
                        rows = torch.tensor([[place if perturbation.fresh else 0]])
                        entry = positions[b, kv_head, i].view(1, 1, 1).expand(1, heads, 1)
                        noise = gumbel_noise(perturbation.seed, perturbation.layer, rows, entry, heads)[
                            0, head, 0, 0
                        ].item()
                    exponents.append((score + noise) / perturbation.temperature)
                extra = [] if sinks is None else [sinks[head].item()]
                total = sum(math.exp(exponent) for exponent in exponents + extra)
                for i, exponent in zip(seen, exponents, strict=True):
                    weight = 1.0 if row_weights is None else row_weights[b, row].item()
                    mass[b, kv_head, i] += weight * math.exp(exponent) / total
    return mass


def test_k2(monkeypatch):
    """K2: scores [1, 0, -1], noise [0, 2, 0], temperature 2: softmax([.5, 1, -.5]) = [0.3315, 0.5466, 0.1220]."""
    noise = torch.tensor([0.0, 2.0, 0.0])
    monkeypatch.setattr(module, "gumbel_noise", lambda *_: noise.view(1, 1, 1, 3))
    monkeypatch.setattr(module, "gumbel_noise_in_order", lambda *_: noise.view(1, 1, 1, 3))
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0], [0.0], [-1.0]]]])
    at, positions = torch.tensor([[2]]), torch.tensor([[[0, 1, 2]]])
    expected = torch.tensor([[[0.3315, 0.5466, 0.1220]]])
    options = {"scale": 1.0, "perturbation": Perturbation(2.0, 0)}
    for held in (positions, None):
        mass = attention_mass(query, at, key, held, **options)
        torch.testing.assert_close(mass, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(attention_mass_reference(query, at, key, positions, **options), mass)


@ALL_NOISES
@pytest.mark.parametrize("tile_scores", [1, 3000, 1 << 22], ids=["row-tiles", "small-tiles", "one-tile"])
@pytest.mark.parametrize("features", ["plain", "softcap", "sinks", "weights"])
def test_equals_the_definition(perturbation, tile_scores, features, monkeypatch):
    """Padding rows, empty slots and any order of entries, against float64 and the reference."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, at, key, positions = inputs()
    options = {
        "plain": {},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": torch.linspace(-1, 1, KV_HEADS * GROUP)},
        "weights": {"row_weights": torch.rand(BATCH, 9, generator=torch.Generator().manual_seed(1))},
    }[features]
    expected = brute(query, at, key, positions, 0.3, perturbation, **options).float()
    mass = attention_mass(query, at, key, positions, scale=0.3, perturbation=perturbation, **options)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)
    reference = attention_mass_reference(query, at, key, positions, scale=0.3, perturbation=perturbation, **options)
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-6)


@ALL_NOISES
@pytest.mark.parametrize("tile_scores", [1, 1000, 1 << 22], ids=["row-tiles", "small-tiles", "one-tile"])
def test_entries_in_order(perturbation, tile_scores, monkeypatch):
    """Without positions: entry i at i, the rows the last ones; the same numbers as with positions."""
    monkeypatch.setattr(module, "TILE_SCORES", tile_scores)
    query, _, key, _ = inputs()
    at = torch.arange(24, 33, dtype=torch.int32).expand(BATCH, 9)
    positions = torch.arange(33, dtype=torch.int32).expand(BATCH, KV_HEADS, 33)
    mass = attention_mass(query, at, key, None, scale=0.3, perturbation=perturbation)
    expected = brute(query, at, key, positions, 0.3, perturbation).float()
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-6)


@ALL_NOISES
def test_u5_each_row_still_adds_the_group(perturbation):
    """U5: a perturbed row is a distribution too."""
    query, at, key, positions = inputs()
    mass = attention_mass(query, at, key, positions, scale=0.3, perturbation=perturbation)
    sees = ((positions[:, :, None] >= 0) & (positions[:, :, None] <= at[:, None, :, None])).any(-1).sum(-1)
    torch.testing.assert_close(mass.sum(-1), sees.float() * GROUP)


def test_k4_a_constant_changes_nothing(monkeypatch):
    """K4: the same number added to all noise of a row."""
    query, at, key, positions = inputs()
    options = {"scale": 0.3, "perturbation": Perturbation(1.5, 0)}
    mass = attention_mass(query, at, key, positions, **options)
    constants = torch.arange(9.0)[:, None]
    monkeypatch.setattr(module, "gumbel_noise", lambda *args: gumbel_noise(*args) + constants)
    torch.testing.assert_close(attention_mass(query, at, key, positions, **options), mass, rtol=1e-4, atol=1e-5)


def test_nothing_is_nothing():
    """Temperature 1 without noise is the plain mass, bit by bit."""
    query, at, key, positions = inputs()
    plain = attention_mass(query, at, key, positions, scale=0.3)
    assert torch.equal(attention_mass(query, at, key, positions, scale=0.3, perturbation=Perturbation()), plain)


def test_fresh_and_per_token_noise_differ():
    """Per token the noise of an entry is the same for every row; fresh it is not."""
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    positions = torch.tensor([[[0, 1]]], dtype=torch.int32)
    ratios = {}
    for fresh in (True, False):
        per_row = [
            attention_mass(
                query[:, :, :1],
                torch.tensor([[row]]),
                key,
                positions,
                scale=1.0,
                perturbation=Perturbation(1.0, 0, fresh=fresh),
            )
            for row in (5, 6)
        ]
        ratios[fresh] = [mass[0, 0, 0].item() for mass in per_row]
    assert ratios[False][0] == ratios[False][1]
    assert ratios[True][0] != ratios[True][1]


@ALL_NOISES
@pytest.mark.parametrize(
    "features", [(), ("softcap",), ("sinks",), ("softcap", "sinks")], ids=lambda n: "+".join(n) or "plain"
)
def test_decode_attention_hands_out_the_perturbed_mass(perturbation, features):
    """The mass is that of one row of `attention_mass`, the output and the LSE those of the plain softmax."""
    query, _, key, positions = inputs(rows=1)
    at = torch.tensor([[70], [80]], dtype=torch.int32)  # after every entry
    value, valid = torch.randn(key.shape, generator=torch.Generator().manual_seed(3)), positions >= 0
    options = {"scale": 0.3}
    if "softcap" in features:
        options["softcap"] = 1.5
    if "sinks" in features:
        options["sinks"] = torch.linspace(-1, 1, query.shape[1])
    plain = decode_attention(query, key, value, valid, **options, with_mass=True, with_lse=True)
    output, mass, lse = decode_attention(
        query, key, value, valid, **options, perturbed=(perturbation, at, positions), with_mass=True, with_lse=True
    )
    assert torch.equal(output, plain[0]) and torch.equal(lse, plain[2])
    assert (mass - plain[1]).abs().max() > 0.01
    expected = brute(query, at, key, positions, perturbation=perturbation, **options)
    torch.testing.assert_close(mass, expected.float(), rtol=1e-4, atol=1e-6)
    reference = decode_attention_reference(query, key, value, valid, **options, perturbed=(perturbation, at, positions))
    torch.testing.assert_close(reference[1], expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reference[0], plain[0])
    by_head = decode_attention(
        query, key, value, valid, **options, perturbed=(perturbation, at, positions), with_mass=True, per_head=True
    )[1]
    torch.testing.assert_close(by_head.unflatten(1, (KV_HEADS, GROUP)).sum(2), mass)
