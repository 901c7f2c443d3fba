"""decode_scores against its definition."""

import pytest
import torch

from kvpress.kernels import decode_scores as module
from kvpress.kernels.decode_scores import decode_scores, decode_scores_reference


@pytest.mark.parametrize("tile", [1, 1 << 22], ids=["small-tiles", "one-tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("moved", [False, True], ids=["plain", "moved"])
@pytest.mark.parametrize(("slots", "group"), [(1, 1), (63, 4), (111, 3)], ids=str)
def test_equals_the_definition(slots, group, moved, dtype, tile, monkeypatch):
    """Slots of a longer buffer, whose rest is never looked at."""
    monkeypatch.setattr(module, "TILE_KEYS", tile)
    generator = torch.Generator().manual_seed(0)
    query, other = torch.randn(2, 2, 2 * group, 1, 24, generator=generator).to(dtype)
    buffer = torch.randn(2, 2, slots + 5, 24, generator=generator).to(dtype)
    buffer[:, :, slots:] = float("nan")
    options = {"scale": 0.3}
    if moved:
        options["moved"] = [(other, torch.rand(2, 2, slots, generator=generator) < 0.5)]
    scores = decode_scores(query, buffer[:, :, :slots], **options)
    assert scores.shape == (2, 2 * group, slots) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, decode_scores_reference(query, buffer[:, :, :slots], **options))


def test_by_hand():
    """Two query heads, one kv head; the second slot is seen by the other query."""
    query = torch.tensor([[[[1.0, 2.0]], [[-1.0, 0.0]]]])
    other = torch.tensor([[[[0.0, 1.0]], [[1.0, 1.0]]]])
    keys = torch.tensor([[[[3.0, 1.0], [2.0, 5.0]]]])
    assert decode_scores(query, keys, scale=2.0).tolist() == [[[10.0, 24.0], [-6.0, -4.0]]]
    moved = [(other, torch.tensor([[[False, True]]]))]
    assert decode_scores(query, keys, scale=2.0, moved=moved).tolist() == [[[10.0, 10.0], [-6.0, 14.0]]]
