"""The kernels launched with shapes from a file compute what they compute without it."""

import json

import pytest
import torch

from kvpress.kernels import launch_shapes
from kvpress.kernels.attention_mass import attention_mass
from kvpress.kernels.block_sparse_attention import block_sparse_attention
from kvpress.kernels.decode_attention import decode_attention
from kvpress.kernels.gpu import topk_select as topk_module
from kvpress.kernels.topk_select import topk_select
from support.accelerator import DEVICE

SHAPES = {
    "decode_attention 16x16x4": {"block_n": 16, "num_warps": 2, "num_stages": 2},
    "decode_attention.split": {"keys": 32, "waves": 1},
    "attention_mass.lse 16x4": {"block_m": 64, "block_n": 16, "num_warps": 2, "num_stages": 2},
    "attention_mass.mass 16x4": {"block_m": 16, "block_n": 32, "num_warps": 2, "num_stages": 2},
    "block_sparse_attention 16x16x4": {"block_m": 16, "block_n": 16, "num_warps": 2, "num_stages": 2},
    "topk_select": {"block": 256, "num_warps": 2},
}


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_kernels_read_the_file_and_compute_the_same(tmp_path, monkeypatch):
    """Every entry of a file is asked for under that name, and changes nothing but the launch."""
    monkeypatch.setattr(topk_module, "ONE_TILE", 0)  # the kernels for long rows
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 80, 16, generator=generator).to(DEVICE) for h in (4, 2, 2))
    at = torch.arange(80, device=DEVICE)[None]
    blocks = torch.arange(5, device=DEVICE).expand(1, 2, 5, 5)

    def results():
        options = {"scale": 0.3, "backend": "triton"}
        index, chosen = topk_select(key[..., 0], torch.tensor([[7]], device=DEVICE), 9, backend="triton")
        return (
            decode_attention(query[:, :, :1], key, value, **options)[0],
            attention_mass(query, at, key, None, **options),
            block_sparse_attention(query, key, value, blocks=blocks, block_size=16, **options)[0],
            index.where(chosen, 0).double(),
        )

    before = results()
    monkeypatch.setattr(launch_shapes, "TUNED", tmp_path)
    monkeypatch.setattr(launch_shapes, "gpu_name", lambda device: "Some GPU")
    launch_shapes.tuned_file("Some GPU").write_text(json.dumps({"shapes": SHAPES}))
    used = set()
    original = launch_shapes.read_shapes

    class Recorded(dict):
        def get(self, key, default=None):
            used.add(key)
            return super().get(key, default)

    monkeypatch.setattr(launch_shapes, "read_shapes", lambda path: Recorded(original(path)))
    launch_shapes.forget_plans()
    found = results()
    launch_shapes.forget_plans()
    for one, expected in zip(found, before, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    assert set(SHAPES) <= used
