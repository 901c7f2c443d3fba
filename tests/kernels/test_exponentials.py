"""exp, softmax and logsumexp for scores far below the largest, against float64."""

import torch

from kvpress.kernels.exponentials import exp_, logsumexp, softmax_

INF = float("inf")


def scores():
    """Rows with a little of everything: near, far below where floats end, nothing seen, one thing seen."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(6, 40, generator=generator) * 20
    some[1, 3:] -= 95
    some[2, 5:] = -INF
    some[3] = -INF
    some[4] = -INF
    some[4, 7] = -300.0
    some[5] += 1000
    return some


def test_exp():
    x = torch.linspace(-110, 20, 1000)
    wanted = x.double().exp()
    given = x.clone()
    assert exp_(given) is given
    torch.testing.assert_close(given.double(), wanted, rtol=2e-5, atol=1e-38)
    assert exp_(torch.tensor([-INF, 0.0, -1e30])).tolist() == [0.0, 1.0, 0.0]


def test_softmax_and_its_denominator():
    rows = scores()
    seen = torch.tensor([0, 1, 2, 4, 5])
    wanted, lse = rows[seen].double().softmax(-1), rows[seen].double().logsumexp(-1)
    weights, found = softmax_(rows.clone())
    torch.testing.assert_close(weights[seen].double(), wanted, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(found[seen].double(), lse, rtol=1e-6, atol=1e-6)
    assert weights[3].count_nonzero() == 0
    assert found[3] == -INF


def test_logsumexp():
    rows = scores()
    torch.testing.assert_close(logsumexp(rows).double(), rows.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
