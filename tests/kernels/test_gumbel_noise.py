"""gumbel_noise: its distribution, its independence, and that a number depends on its place alone."""

import math

import pytest
import torch

from kvpress.kernels import gumbel_noise as module
from kvpress.kernels.gumbel_noise import TABLE, gumbel_noise, gumbel_noise_in_order, gumbel_table

EULER = 0.5772156649
DEVIATION = math.pi / math.sqrt(6)


def positions(*numbers):
    return torch.tensor([numbers])


def noise(seed=0, layer=0, rows=(0,), count=1000, heads=1, first=0):
    """[heads, rows, count] for one sequence and the entries `first` .. `first + count - 1`."""
    entries = torch.arange(first, first + count)[None, None]
    return gumbel_noise(seed, layer, torch.tensor([list(rows)]), entries, heads)[0]


def correlation(x, y):
    return torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1].item()


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1], ids="seed-{}".format)
def test_moments(seed):
    """Gumbel(0, 1): mean 0.5772, deviation 1.2825, skewness 1.1395, and its quantiles, within sampling error."""
    table = gumbel_table(seed).double()
    assert table.shape == (TABLE,) and torch.isfinite(table).all()
    assert abs(table.mean().item() - EULER) < 5 * DEVIATION / TABLE**0.5
    assert abs(table.std().item() - DEVIATION) < 0.02
    assert abs(((table - table.mean()) / table.std()).pow(3).mean().item() - 1.1395) < 0.06
    for share in (0.01, 0.25, 0.5, 0.75, 0.99):
        below = (table <= -math.log(-math.log(share))).double().mean().item()
        assert abs(below - share) < 5 * (share * (1 - share) / TABLE) ** 0.5


def test_moments_of_what_is_read():
    """Not only the table: the runs that rows of a prompt read have the mean and deviation too."""
    drawn = noise(rows=range(100), count=300, heads=4)
    assert drawn.dtype == torch.float32 and drawn.shape == (4, 100, 300)
    assert abs(drawn.mean().item() - EULER) < 0.03
    assert abs(drawn.std().item() - DEVIATION) < 0.04


@pytest.mark.parametrize("what", ["rows", "heads", "layers", "seeds", "distant rows"])
def test_independence(what):
    """The noise of two rows, heads, layers or seeds is not correlated, nor is that of neighbouring entries."""
    count = 20_000
    bound = 5 / count**0.5
    one = noise(count=count)[0, 0]
    other = {
        "rows": lambda: noise(rows=(1,), count=count)[0, 0],
        "distant rows": lambda: noise(rows=(4096,), count=count)[0, 0],
        "heads": lambda: noise(heads=2, count=count)[1, 0],
        "layers": lambda: noise(layer=1, count=count)[0, 0],
        "seeds": lambda: noise(seed=1, count=count)[0, 0],
    }[what]()
    assert abs(correlation(one, other)) < bound
    assert abs(correlation(one[1:], other[:-1])) < bound and abs(correlation(one[:-1], other[1:])) < bound
    assert abs(correlation(one[1:], one[:-1])) < bound


def test_rows_heads_and_layers_read_other_runs():
    """Where 32 heads of 32 layers and 64 rows start to read: spread over the table, few of them at the same place."""
    starts = torch.cat(
        [module.gumbel_offsets(layer, torch.arange(64)[None], 32).flatten() for layer in range(32)]
    )  # fmt: skip
    assert ((starts >= 0) & (starts < TABLE)).all()
    # n balls into TABLE bins leave TABLE * exp(-n / TABLE) empty.
    expected = TABLE * (1 - math.exp(-len(starts) / TABLE))
    assert abs(len(starts.unique()) - expected) < 0.02 * expected
    shares = torch.histc(starts.double(), 16, 0, TABLE) / len(starts)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 16), atol=0.005, rtol=0)


def test_sums_over_rows_average_out():
    """What an entry gets over many rows: the rows' noise is independent enough that its mean shrinks by sqrt(rows)."""
    rows = 400
    means = noise(rows=range(rows), count=200).mean(1)
    assert abs(means.std().item() - DEVIATION / rows**0.5) < 0.2 * DEVIATION / rows**0.5


def test_same_place_same_number():
    """A number depends on seed, layer, head, row and entry alone: not on the batch, the slots or what was drawn before."""
    rows, entries = (
        torch.tensor([[4, 5, 6], [9, -1, 2]]),
        torch.tensor([[[3, 0, 8], [1, 2, -1]], [[5, 6, 7], [7, 0, 1]]]),
    )
    drawn = gumbel_noise(3, 1, rows, entries, 4)
    noise(seed=3, layer=1, count=7)
    assert torch.equal(gumbel_noise(3, 1, rows, entries, 4), drawn)
    assert torch.equal(gumbel_noise(3, 1, rows.flip(0), entries.flip(0), 4), drawn.flip(0))
    assert torch.equal(gumbel_noise(3, 1, rows.flip(1), entries.flip(2), 4), drawn.flip(2, 3))
    for b in range(2):
        for head in range(4):
            for row in range(3):
                for slot in range(3):
                    place = entries[b, head // 2, slot].item()
                    alone = noise(seed=3, layer=1, rows=(rows[b, row].item(),), first=place, count=1, heads=head + 1)
                    assert place < 0 or drawn[b, head, row, slot] == alone[head, 0, 0]


def test_no_random_state():
    """The global generator is neither read nor moved."""
    state = torch.random.get_rng_state()
    gumbel_table.cache_clear()
    one = noise(seed=11)
    assert torch.equal(torch.random.get_rng_state(), state)
    gumbel_table.cache_clear()
    module._table_on.cache_clear()
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(noise(seed=11), one)


def test_wraps_around():
    """Positions past the table read it from its start again."""
    drawn = gumbel_noise(0, 2, positions(7), torch.tensor([[[0, 5, TABLE - 1, TABLE, TABLE + 5]]]), 1)[0, 0, 0]
    assert drawn[3] == drawn[0] and drawn[4] == drawn[1] and drawn[2] != drawn[0]


@pytest.mark.parametrize("count", [0, 1, 17, 300], ids="{}-entries".format)
def test_in_order_is_the_general_one(count):
    rows = torch.tensor([[0, 3, 100_000, -1], [7, 8, 9, 10]], dtype=torch.int32)
    entries = torch.arange(count).expand(2, 2, count)
    drawn = gumbel_noise_in_order(5, 3, rows, count, 4)
    assert drawn.shape == (2, 4, 4, count)
    assert torch.equal(drawn, gumbel_noise(5, 3, rows, entries, 4))


def test_in_order_wraps_around(monkeypatch):
    """More entries than the table has numbers."""
    monkeypatch.setattr(module, "TABLE", 16)
    gumbel_table.cache_clear()
    module._table_on.cache_clear()
    try:
        rows = positions(0, 1, 2)
        for count in (15, 16, 17, 50):
            drawn = gumbel_noise_in_order(0, 0, rows, count, 2)
            assert torch.equal(drawn, gumbel_noise(0, 0, rows, torch.arange(count)[None, None], 2))
        assert torch.equal(drawn[..., :34], drawn[..., 16:])
    finally:
        gumbel_table.cache_clear()
        module._table_on.cache_clear()
