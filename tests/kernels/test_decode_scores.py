"""decode_scores against its definition, on both paths; gpu/test_decode_scores.py has what only the Triton kernel does."""

import pytest
import torch

from kvpress.kernels import decode_scores as module
from kvpress.kernels.decode_scores import decode_scores, decode_scores_reference
from support.backends import BACKENDS, BACKENDS_AND_DTYPES, on

LENGTHS = pytest.mark.parametrize("n", [1, 63, 111], ids="n-{}".format)
GROUPS = pytest.mark.parametrize("group", [1, 3, 4, 8], ids="group-{}".format)
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256], ids="d-{}".format)


def inputs(backend, n, group, head_dim=24, dtype=torch.float32):
    """A query, another, and the first n keys of a longer buffer, whose rest is NaN and never looked at."""
    generator = torch.Generator().manual_seed(n + group)
    query, other = torch.randn(2, 2, 2 * group, 1, head_dim, generator=generator).to(dtype)
    buffer = torch.randn(2, 2, n + 5, head_dim, generator=generator).to(dtype)
    buffer[:, :, n:] = float("nan")
    query, other, buffer = on(backend, query, other, buffer)
    return query, other, buffer[:, :, :n]


@BACKENDS
@LENGTHS
@GROUPS
@pytest.mark.parametrize("moved", ["none", "marked", "first"])
@pytest.mark.parametrize("small", [False, True], ids=["one-tile", "small-tiles"])
def test_equals_the_definition(n, group, moved, small, backend, monkeypatch):
    """A second query for marked slots, or for the first ones; keys in one piece and in several."""
    if small:
        monkeypatch.setattr(module, "TILE_KEYS", 1)
    if backend == "triton":
        from kvpress.kernels.gpu import decode_attention as launch

        monkeypatch.setattr(launch, "KEYS_PER_SPLIT", 16 if small else 128)
    query, other, key = inputs(backend, n, group)
    options = {"scale": 0.3}
    if moved != "none":
        marks = (torch.arange(n, device=key.device) % 3 == 0).expand(2, 2, n)
        options["moved"] = [(other, marks if moved == "marked" else (n + 1) // 2)]
    scores = decode_scores(query, key, **options, backend=backend)
    assert scores.shape == (2, 2 * group, n) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, decode_scores_reference(query, key, **options), rtol=1e-5, atol=2e-6)


@BACKENDS_AND_DTYPES
@HEAD_DIMS
def test_head_dims_and_dtypes(head_dim, dtype, backend):
    """As precise as float32, whatever the dtype; a float32 query reads half-precision keys as they are."""
    query, _, key = inputs(backend, 63, 3, head_dim, dtype)
    for one in {dtype: query, torch.float32: query.float()}.values():
        scores = decode_scores(one, key, scale=head_dim**-0.5, backend=backend)
        expected = (one.double() @ key.repeat_interleave(3, dim=1).double().mT * head_dim**-0.5)[:, :, 0].float()
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=2e-6)


@BACKENDS
def test_strides(backend):
    """A query and keys that are transposed views, and keys whose channels are strided."""
    query, _, key = inputs(backend, 63, 3)
    expected = decode_scores(query, key, scale=0.3, backend=backend)
    wide = key.mT.contiguous().mT
    assert wide.stride(-1) != 1
    for one, other in ((query.transpose(0, 1).contiguous().transpose(0, 1), key), (query, wide)):
        found = decode_scores(one, other, scale=0.3, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@BACKENDS
def test_no_keys(backend):
    query, _, key = inputs(backend, 0, 3)
    assert decode_scores(query, key, scale=1.0, backend=backend).shape == (2, 6, 0)


@BACKENDS
def test_by_hand(backend):
    """Two query heads, one kv head; the second slot is seen by the other query."""
    query = torch.tensor([[[[1.0, 2.0]], [[-1.0, 0.0]]]])
    other = torch.tensor([[[[0.0, 1.0]], [[1.0, 1.0]]]])
    keys = torch.tensor([[[[3.0, 1.0], [2.0, 5.0]]]])
    query, other, keys = on(backend, query, other, keys)
    assert decode_scores(query, keys, scale=2.0, backend=backend).tolist() == [[[10.0, 24.0], [-6.0, -4.0]]]
    moved = [(other, *on(backend, torch.tensor([[[False, True]]])))]
    assert decode_scores(query, keys, scale=2.0, moved=moved, backend=backend).tolist() == [
        [[10.0, 10.0], [-6.0, 14.0]]
    ]
