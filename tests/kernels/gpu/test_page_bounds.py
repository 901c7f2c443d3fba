"""How the Triton kernels of page_bounds go through a page. What they compute is in tests/kernels/test_page_bounds.py."""

import torch

from kvpress.kernels.gpu import page_bounds as gpu
from kvpress.kernels.page_bounds import page_bounds
from support.accelerator import DEVICE


def test_a_page_longer_than_a_step(monkeypatch):
    """A page's entries are taken in several steps, the last one short."""
    monkeypatch.setattr(gpu, "blocks", lambda page_size, head_dim: gpu.Blocks(2, 4, 16))
    keys = torch.randn(2, 3, 63, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for page_size in (3, 4, 18):
        expected = page_bounds(keys, None, page_size, backend="torch")
        for ours, theirs in zip(page_bounds(keys, None, page_size, backend="triton"), expected, strict=True):
            assert torch.equal(ours, theirs)
